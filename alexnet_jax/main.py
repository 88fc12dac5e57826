"""Trains the network a config describes, or goes on with a run that was stopped.

python -m alexnet_jax.main --config=configs/paper.py --workdir=runs/paper [--config.key=value ...]
"""

from absl import flags
from ml_collections import config_flags

from alexnet_jax import cli, train

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'A file of configs/; may take an argument: paper.py:init=authors.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run: checkpoints, metrics, config.')


def main() -> None:
    cli.set_up_jax()
    train.train_and_evaluate(_CONFIG.value, _WORKDIR.value)


if __name__ == '__main__':
    cli.define_cpu_devices()
    cli.run(main, required=('config', 'workdir'))
