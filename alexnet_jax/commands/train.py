"""Trains the network of a config, or resumes a stopped run.

    alexnet_jax train --config=paper --workdir=runs/paper [--config.KEY=VALUE ...]
    alexnet_jax train --config=paper --summary

Every key of a config is also a flag: --config.optim.learning_rate=0.005. configs/paper.py explains the keys.
Layers are keys by name: --config.model.layers.conv2.post='tanh pool'.
`python -m alexnet_jax.main` is the same command.
"""

from absl import flags

from alexnet_jax.commands.flag import CPU_DEVICES, ConfigFlag, Flag
from alexnet_jax.utils.errors import UserError

FLAGS = (
    ConfigFlag('config', None, "Name or file of a config; a variant follows ':': paper:init=authors.", required=True),
    Flag('workdir', None, 'Directory for checkpoints, metrics and config.'),
    Flag('summary', False, 'Only print layers, shapes, receptive fields, parameters and communication between towers.'),
    Flag('profile', 0, 'Trace this many updates, after two warm-up updates, to WORKDIR/profile.', at_least=0),
    CPU_DEVICES,
)


def main(args: flags.FlagValues) -> None:
    from alexnet_jax.inference import summary
    from alexnet_jax.training import train
    from alexnet_jax.training.check_config import network_and_augmentation

    if args.summary:
        network, augmentation = network_and_augmentation(args.config)
        print(summary.summary(network, augmentation.image_size, args.config.mesh.tower))
        return
    if not args.workdir:
        raise UserError('--workdir is missing; see --help.')
    train.train_and_evaluate(args.config, args.workdir, profile=args.profile)
