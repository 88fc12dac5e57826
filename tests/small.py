"""Small instances for tests: values of the same table, the same code."""

import runpy

import jax
import numpy as np

from alexnet_jax.core import model, optim
from alexnet_jax.core.config import optimizer_from_config
from alexnet_jax.training.large_batch import hooks_from_config
from tests import ROOT

# Five convolutions with the paper's groups on 35 px: every rule is there (gathers, norm, overlap, dropout).
SMALL = dict(
    conv=(
        (8, 5, 2, (0, 1), 1, 0.1, 0.1, 'relu lrn pool'),
        (16, 3, 1, (1, 1), 2, 0.1, 0.5, 'relu lrn pool'),
        (24, 3, 1, (1, 1), 1, 0.1, 0.0, 'relu'),
        (24, 3, 1, (1, 1), 2, 0.1, 0.5, 'relu'),
        (16, 3, 1, (1, 1), 2, 0.1, 0.5, 'relu pool'),
    ),
    dense=((32, 1, 0.1, 0.5, 'relu dropout'), (32, 1, 0.1, 0.5, 'relu dropout')),
    num_classes=12,
    classifier=(0.1, 0.0),
    lrn_alpha=1e-2,  # so that the norm is felt at this scale of activations
)
SIZE = 35


def network(**changes) -> model.AlexNet:
    return model.AlexNet(**{**SMALL, **changes})


def init(network: model.AlexNet, seed: int = 0, size: int = SIZE):
    return jax.jit(lambda key: model.init_params(network, key, size))(jax.random.key(seed))


def optimizer(network: model.AlexNet, **changes) -> optim.Optimizer:
    """The update of configs/paper.py with other values; ten updates are an epoch."""
    config = runpy.run_path(str(ROOT / 'configs' / 'paper.py'))['get_config']()
    options = {'steps_per_epoch': 10.0, 'layers': list(network.layer_specs())}
    options |= {key: changes.pop(key) for key in options if key in changes}
    fields = {**config.optim, **changes}
    return optimizer_from_config(fields, **options, **hooks_from_config(fields, options['steps_per_epoch']))


def digits_config(**changes):
    """configs/quickstart.py, smaller still; `changes` by dotted key."""
    config = runpy.run_path(str(ROOT / 'configs' / 'quickstart.py'))['get_config']()
    config.model.conv = (
        (8, 5, 1, (2, 2), 1, 0.003, 0.0, 'relu lrn pool'),
        (8, 5, 1, (2, 2), 2, 0.17, 0.0, 'relu lrn pool'),
        (8, 3, 1, (1, 1), 1, 0.17, 0.0, 'relu'),
        (8, 3, 1, (1, 1), 2, 0.23, 0.0, 'relu'),
        (8, 3, 1, (1, 1), 2, 0.23, 0.0, 'relu pool'),
    )
    config.model.dense = ((32, 1, 0.17, 0.0, 'relu dropout'), (32, 1, 0.25, 0.0, 'relu dropout'))
    config.log_every_steps = 1
    config.data.num_threads = 2
    config.update_from_flattened_dict(changes)
    return config


def to_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def running(pid: int) -> bool:
    """Whether a process is alive (Linux)."""
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError:
        return False
