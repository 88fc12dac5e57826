"""Trains the network a config describes, or goes on with a run that was stopped.

    python -m alexnet_jax.main --config=configs/paper.py --workdir=runs/paper [--config.KEY=VALUE ...]
    python -m alexnet_jax.main --config=configs/paper.py --summary

Every key of a config is a flag, too: --config.optim.learning_rate=0.005. configs/paper.py explains them.
"""

from absl import flags

from alexnet_jax import assemble, cli, layers, train
from alexnet_jax.errors import UserError


def main() -> None:
    args = flags.FLAGS
    if args.summary:
        network, augmentation = assemble.network_of(args.config)
        print(layers.summary(network, augmentation.image_size, args.config.mesh.tower))
        return
    if not args.workdir:
        raise UserError('--workdir is missing; see --help.')
    cli.set_up_jax()
    train.train_and_evaluate(args.config, args.workdir, profile=args.profile)


if __name__ == '__main__':
    cli.define_config('config', None, 'A file of configs/; may take an argument: paper.py:init=authors.')
    flags.DEFINE_string('workdir', None, 'Directory of the run: checkpoints, metrics, config.')
    flags.DEFINE_boolean('summary', False, 'Only print layers, shapes, parameters and what crosses the towers.')
    flags.DEFINE_integer(
        'profile', 0, 'Write a trace of so many updates, after two, to WORKDIR/profile.', lower_bound=0
    )
    cli.define_cpu_devices()
    cli.run(main, required=('config',))
