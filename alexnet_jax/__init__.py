"""AlexNet (Krizhevsky, Sutskever and Hinton, 2012) in JAX and Flax.

    config = alexnet_jax.get_config('paper')
    alexnet_jax.train_and_evaluate(config, workdir)  # or `build`, for your own training loop
    probabilities = alexnet_jax.predict(alexnet_jax.load_checkpoint(workdir), 'image.jpg')

`help(alexnet_jax.NAME)` explains each name in `alexnet_jax.__all__`.
"""

from importlib import import_module
from typing import Any

__version__ = '0.1.0'

_MODULES = {
    'AlexNet': 'alexnet_jax.core.model',
    'activations': 'alexnet_jax.inference.activations',
    'build': 'alexnet_jax.training.build',
    'get_config': 'alexnet_jax.utils.config_files',
    'gradients': 'alexnet_jax.inference.gradients',
    'in_memory': 'alexnet_jax.data.datasets',
    'init_params': 'alexnet_jax.core.model',
    'linear_cka': 'alexnet_jax.inference.similarity',
    'load_checkpoint': 'alexnet_jax.convert.loading',
    'load_lpips': 'alexnet_jax.inference.lpips',
    'lpips': 'alexnet_jax.inference.lpips',
    'noise_ceiling': 'alexnet_jax.inference.similarity',
    'predict': 'alexnet_jax.inference.predict',
    'rdm': 'alexnet_jax.inference.similarity',
    'receptive_field': 'alexnet_jax.inference.receptive_field',
    'rsa': 'alexnet_jax.inference.similarity',
    'ten_views': 'alexnet_jax.core.augment',
    'train_and_evaluate': 'alexnet_jax.training.train',
}
__all__ = ['__version__', *_MODULES, 'visualize']


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that the worker processes of `alexnet_jax prepare` do not import JAX."""
    if name == 'visualize':
        return import_module('alexnet_jax.visualize')
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
