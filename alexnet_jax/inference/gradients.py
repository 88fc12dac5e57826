"""Computes the gradients of single units or logits with respect to the outputs of layers, or to the pixels."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.core import sharding
from alexnet_jax.core.augment import Augmentation, views
from alexnet_jax.core.model import AlexNet, Edits
from alexnet_jax.inference import activations, image_source
from alexnet_jax.inference.evaluate import Evaluator
from alexnet_jax.inference.predict import Images
from alexnet_jax.utils import compiler
from alexnet_jax.utils.errors import UserError

PIXELS = 'pixels'


def gradients(
    checkpoint: Checkpoint,
    images: Images,
    unit: tuple[str, Any],
    layers: Sequence[str] | str = PIXELS,
    *,
    batch_size: int = 128,
    mesh: Mesh | None = None,
    edit: Edits | None = None,
) -> dict[str, np.ndarray]:
    """Returns the gradient of one unit of each image with respect to the outputs of layers. Dropout is off.

    Args:
      checkpoint, images, batch_size, mesh: as for `alexnet_jax.activations`.
      unit: (name, index): ('fc8', 3) is the logit of class 3, ('conv5', (6, 6, 20)) a (row, column, channel) of feature
        maps. Names are those of `alexnet_jax.activations`.
      layers: one name or several; 'pixels' is the network's input, the center crop minus the mean image, float32
        [N, s, s, 3] on the 0-255 scale.
      edit: as for `alexnet_jax.activations`; the gradients are those of the edited network.

    Returns:
      {name: float32 [N, ...] of the shape of the output}. It is 0 for outputs that the unit does not depend on.

    Raises:
      UserError: a layer or the unit does not exist, an edit is invalid, or images cannot be read.
    """
    evaluator, names = Evaluator(checkpoint, mesh, batch_size=batch_size), activations.as_list(layers)
    network = checkpoint.network
    if not isinstance(unit, tuple | list) or len(unit) != 2 or not isinstance(unit[0], str):
        raise UserError(f"unit={unit!r}: expected (name, index), such as ('fc8', 3) or ('conv5', (6, 6, 20)).")
    if not names:
        raise UserError("no layers given; use 'pixels' or names of layers.")
    shape = image_source.output_shapes(checkpoint, activations.layer_outputs(checkpoint, [unit[0]], mesh))[0]
    (index,) = activations.units_of(f'unit[{unit[0]!r}]', [unit[1]], shape)
    if len(shape) == 3 and isinstance(index, int):
        raise UserError(f'unit={unit!r}: expected (row, column, channel) below {shape}.')
    keys = tuple(PIXELS if name == PIXELS else _last_output(network, name) for name in names)
    function = _jit(
        network,
        checkpoint.augmentation,
        evaluator.mesh,
        (activations.find_outputs(network, [unit[0]])[0], index),
        keys,
        activations.checked_edits(network, edit),
    )
    return dict(zip(names, image_source.compute(evaluator, function, images), strict=True))


def _last_output(network: AlexNet, name: str) -> str:
    """Returns the operation of a name. Raises UserError as `checked_edits` does: gradients are taken at edits."""
    return activations.checked_edits(network, {name: lambda x: x})[0][0]


@functools.lru_cache(maxsize=8)
def _jit(network: AlexNet, augmentation: Augmentation, mesh: Mesh, unit: tuple, keys: tuple[str, ...], edit: tuple):
    forward, (output, index), edits = sharding.forward(network, mesh), unit, dict(edit)
    position = index if isinstance(index, tuple) else (index,)

    def value(deltas: Sequence[jax.Array], params: Any, x_NHWC: jax.Array) -> jax.Array:
        """Returns the sum of the unit over the images. deltas: zeros that are added to the outputs."""
        added = dict(zip(keys, deltas, strict=True))
        x_NHWC = x_NHWC + added.pop(PIXELS, jnp.zeros((), x_NHWC.dtype))
        functions = {**edits, **{key: _add(edits.get(key), delta) for key, delta in added.items()}}
        (y,) = forward(params, x_NHWC, edit=functions, outputs=[output])
        return y[(slice(None), *position)].sum()

    def function(params, image_NHWC, image_stats):
        (x_NHWC,) = views(image_NHWC, image_stats, augmentation, count=1)
        outputs = [(key, -1) for key in keys if key != PIXELS]
        shapes = iter(jax.eval_shape(functools.partial(forward, outputs=outputs), params, x_NHWC) if outputs else ())
        like = [x_NHWC if key == PIXELS else next(shapes) for key in keys]
        deltas = [jnp.zeros(x.shape, x.dtype) for x in like]
        return [gradient.astype(jnp.float32) for gradient in jax.grad(value)(deltas, params, x_NHWC)]

    options = compiler.compiler_options(mesh.devices.flat[0].platform)
    return jax.jit(function, out_shardings=sharding.replicated(mesh), compiler_options=options)


def _add(function: Callable | None, delta: jax.Array) -> Callable:
    return lambda x: (x if function is None else function(x)) + delta
