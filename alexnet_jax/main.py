"""Trains the network a config describes, or goes on with a run that was stopped.

python -m alexnet_jax.main --config=configs/paper.py --workdir=runs/paper [--config.key=value ...]
python -m alexnet_jax.main --config=configs/paper.py --summary
"""

from absl import flags
from ml_collections import config_flags

from alexnet_jax import assemble, cli, layers, train
from alexnet_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'A file of configs/; may take an argument: paper.py:init=authors.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run: checkpoints, metrics, config.')
_SUMMARY = flags.DEFINE_boolean('summary', False, 'Only print layers, shapes, parameters and what crosses the towers.')
_PROFILE = flags.DEFINE_integer(
    'profile', 0, 'Write a trace of so many updates, after two, to WORKDIR/profile.', lower_bound=0
)


def main() -> None:
    config = _CONFIG.value
    if _SUMMARY.value:
        network, augmentation = assemble.network_of(config)
        print(layers.summary(network, augmentation.image_size, config.mesh.tower))
        return
    if not _WORKDIR.value:
        raise UserError('--workdir is missing; see --help.')
    cli.set_up_jax()
    train.train_and_evaluate(config, _WORKDIR.value, profile=_PROFILE.value)


if __name__ == '__main__':
    cli.define_cpu_devices()
    cli.run(main, required=('config',))
