"""Pictures of what a network has learned, as functions of a checkpoint and images.

    pictures = alexnet_jax.visualize.deconvnet(checkpoint, images, 'conv5', unit=3)  # float32 [N, s, s, 3]

- `deconvnet`: a unit's activation projected to the pixels (Zeiler and Fergus 2014)
- `guided_backprop`: a unit's gradient at the pixels, without negative parts (Springenberg et al. 2015)
- `grad_cam`: where a layer supports a class (Selvaraju et al. 2017)
- `occlusion_map`: the probability of a class with parts of an image covered (Zeiler and Fergus 2014)
- `top_patches`: the patches of many images that excite units most (Zeiler and Fergus 2014)
- `maximize_activation`: an image made to excite a unit (Yosinski et al. 2015, with regularizers of others)
"""

from importlib import import_module
from typing import Any

_MODULES = {
    'deconvnet': 'projections',
    'guided_backprop': 'projections',
    'grad_cam': 'class_maps',
    'occlusion_map': 'class_maps',
    'top_patches': 'patches',
    'maximize_activation': 'maximization',
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Imports a function on first use, so that `import alexnet_jax` does not import JAX."""
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(f'{__name__}.{_MODULES[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
