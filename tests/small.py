"""Small instances for tests: values of the same table, the same code."""

import dataclasses

import jax
import numpy as np

from alexnet_jax.core import model, optim
from alexnet_jax.core.architecture import ConvSpec, DenseSpec, LayerSpec
from alexnet_jax.core.config import optimizer_from_config
from alexnet_jax.training.large_batch import hooks_from_config
from alexnet_jax.utils.config_files import get_config

INIT = 'normal(0.1)'
# Five convolutions with the paper's groups on 35 px: every rule is there (gathers, norm, overlap, dropout).
SMALL = dict(
    layers={
        'conv1': ConvSpec(features=8, kernel=5, stride=2, padding=(0, 1), init=INIT, bias=0.1, post='relu lrn pool'),
        'conv2': ConvSpec(features=16, kernel=3, padding=(1, 1), groups=2, init=INIT, bias=0.5, post='relu lrn pool'),
        'conv3': ConvSpec(features=24, kernel=3, padding=(1, 1), init=INIT, post='relu'),
        'conv4': ConvSpec(features=24, kernel=3, padding=(1, 1), groups=2, init=INIT, bias=0.5, post='relu'),
        'conv5': ConvSpec(features=16, kernel=3, padding=(1, 1), groups=2, init=INIT, bias=0.5, post='relu pool'),
        'fc6': DenseSpec(features=32, init=INIT, bias=0.5, post='relu dropout'),
        'fc7': DenseSpec(features=32, init=INIT, bias=0.5, post='relu dropout'),
        'fc8': DenseSpec(init=INIT),
    },
    num_classes=12,
    lrn_alpha=1e-2,  # so that the norm is felt at this scale of activations
)
SIZE = 35


def network(**changes) -> model.AlexNet:
    return model.AlexNet(**{**SMALL, **changes})


def layers(**changes) -> dict[str, LayerSpec]:
    """The layers of `SMALL` with other fields: conv1={'groups': 2}."""
    return {name: dataclasses.replace(spec, **changes.get(name, {})) for name, spec in SMALL['layers'].items()}


def init(network: model.AlexNet, seed: int = 0, size: int = SIZE):
    return jax.jit(lambda key: model.init_params(network, key, size))(jax.random.key(seed))


def optimizer(network: model.AlexNet, **changes) -> optim.Optimizer:
    """The update of configs/paper.py with other values; ten updates are an epoch."""
    config = get_config('paper')
    options = {'steps_per_epoch': 10.0, 'layers': list(network.layers)}
    options |= {key: changes.pop(key) for key in options if key in changes}
    fields = {**config.optim, **changes}
    return optimizer_from_config(fields, **options, **hooks_from_config(fields, options['steps_per_epoch']))


def digits_config(**changes):
    """configs/quickstart.py, smaller still; `changes` by dotted key."""
    config = get_config('quickstart')
    layers = config.model.layers
    for name in ('conv1', 'conv2', 'conv3', 'conv4', 'conv5'):
        layers[name].features = 8
    for name, std in (('conv1', 0.003), ('conv2', 0.17), ('conv3', 0.17), ('conv4', 0.23), ('conv5', 0.23)):
        layers[name].init = f'normal({std})'
    layers.fc6.update(features=32, init='normal(0.17)')
    layers.fc7.update(features=32, init='normal(0.25)')
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
