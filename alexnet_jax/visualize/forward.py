"""The forward pass, one operation at a time, and the choice of a unit: what the pictures have in common."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.core import ops
from alexnet_jax.core.architecture import ConvSpec, LocalSpec
from alexnet_jax.core.augment import Augmentation, views
from alexnet_jax.core.image_stats import ImageStats
from alexnet_jax.core.model import AlexNet
from alexnet_jax.core.post_ops import POST_OPS, Context
from alexnet_jax.inference.activations import find_outputs
from alexnet_jax.inference.evaluate import Evaluator
from alexnet_jax.inference.predict import Images, to_records
from alexnet_jax.utils import compiler
from alexnet_jax.utils.errors import UserError, check_type

Position = tuple[int, int] | None  # (row, column) in a feature map
ANYWHERE = -1  # the flat position that stands for the maximum of the map


def operations(network: AlexNet) -> list[tuple[str, str]]:
    """Returns (layer, operation) in network order: ('conv1', 'linear'), ('conv1', 'relu'), ..."""
    return [(layer, op) for layer, spec in network.layers.items() for op in ('linear', *spec.ops)]


def apply(network: AlexNet, params: Any, layer: str, op: str, x: Array) -> Array:
    """Returns the output of one operation for its input, float [N, H, W, C] or [N, F]. Dropout is off."""
    if op != 'linear':
        entry = POST_OPS[op]
        return entry.function(x, Context(network, entry.groups(network) if entry.groups else 1, None))
    spec = network.layers[layer]
    function: Callable[..., Array] = ops.dense
    if isinstance(spec, LocalSpec):
        function = functools.partial(ops.local_conv, size=spec.kernel, stride=spec.stride, padding=spec.padding)
    elif isinstance(spec, ConvSpec):
        function = functools.partial(ops.conv, stride=spec.stride, padding=spec.padding)
    arrays = [x, *(jnp.asarray(params[layer][name], x.dtype) for name in ('kernel', 'bias'))]
    groups = zip(*(ops.regroup([array], spec.groups) for array in arrays), strict=True)
    return ops.regroup([ops.add_bias(function(part, kernel), bias) for part, kernel, bias in groups], 1)[0]


def run(
    network: AlexNet,
    params: Any,
    x: Array,
    start: int = 0,
    stop: int | None = None,
    replace: Mapping[str, Callable[[Array], Array]] | None = None,
) -> Array:
    """Applies `operations(network)[start:stop]` to x. `replace` has functions to use for operations, by name."""
    for layer, op in operations(network)[start:stop]:
        x = replace[op](x) if replace and op in replace else apply(network, params, layer, op, x)
    return x


def network_input(network: AlexNet, augmentation: Augmentation, image_NHWC: Array, image_stats: ImageStats) -> Array:
    """Returns the network's input for the center crops of uint8 images [N, S, S, 3]: [N, s, s, 3], mean-subtracted.

    It is float32, or float64 if the network computes in float64. The pictures of a bfloat16 network are computed in
    float32.
    """
    dtype = jnp.promote_types(network.dtype, jnp.float32)
    return views(image_NHWC, image_stats, augmentation, count=1, dtype=dtype)[0]


def stop_after(checkpoint: Checkpoint, layer: str) -> int:
    """Returns how many operations it takes to compute an activation. Raises UserError if its name is unknown."""
    check_type('checkpoint', checkpoint, Checkpoint, 'a Checkpoint; use alexnet_jax.load_checkpoint(PATH)')
    check_type('layer', layer, str, "the name of a layer, such as 'conv1'")
    ((key, index),) = find_outputs(checkpoint.network, [layer])
    ends = [i for i, names in enumerate(operations(checkpoint.network), 1) if '.'.join(names) == key]
    return ends[index]


def shape_after(checkpoint: Checkpoint, stop: int) -> tuple[int, ...]:
    """Returns the shape of an activation for one image: (H, W, C), or (F,) after a dense layer."""
    network, side = checkpoint.network, checkpoint.image_size
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return jax.eval_shape(lambda params, x: run(network, params, x, 0, stop), checkpoint.params, x).shape[1:]


class Unit(NamedTuple):
    """A unit of a network, or the same unit at all positions of its map."""

    stop: int  # `operations(network)[:stop]` compute it
    unit: int  # its channel, or its index in a dense layer
    position: int  # row * width + column, or `ANYWHERE`
    shape: tuple[int, ...]  # of the activation: (H, W, C) or (F,)


def find_unit(checkpoint: Checkpoint, layer: str, unit: int, position: Position = None) -> Unit:
    """Finds a unit by the name of its layer. Raises UserError if the layer, the unit or the position is none."""
    stop = stop_after(checkpoint, layer)
    shape = shape_after(checkpoint, stop)
    index = check_index('unit', unit, shape[-1], f'the units of {layer}')
    if position is None:
        return Unit(stop, index, ANYWHERE, shape)
    if len(shape) == 1:
        raise UserError(f'position={position!r}: {layer} has no positions; use position=None.')
    if not isinstance(position, tuple | list | np.ndarray) or len(position) != 2:
        raise UserError(f'position={position!r}: expected (row, column) or None.')
    sides = zip(('row', 'column'), position, shape, strict=False)
    row, column = (check_index(name, value, side, f'the {name}s of {layer}') for name, value, side in sides)
    return Unit(stop, index, row * shape[1] + column, shape)


def check_index(name: str, value: Any, count: int, what: str) -> int:
    """Returns an index from 0 to count - 1 as int. Raises UserError for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < count:
        raise UserError(f'{name}={value!r}: expected an integer from 0 to {count - 1}, {what}.')
    return int(value)


def check_count(name: str, value: Any, most: int | None = None) -> None:
    """Raises UserError if a value is not an integer from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1 or (most and value > most):
        expected = f'an integer from 1 to {most}' if most else 'a positive integer'
        raise UserError(f'{name}={value!r}: expected {expected}.')


def by_position(y: Array) -> Array:
    """Reshapes an activation to [N, P, F], with P = H * W; P = 1 for a dense layer."""
    return y.reshape(y.shape[0], -1, y.shape[-1])


def select(y: Array, unit: Array, position: Array) -> tuple[Array, Array]:
    """Returns the values [N] of a unit in an activation y, and a mask of the shape of y, True at the unit.

    At the position `ANYWHERE` it is each map's first maximum in row-major order.
    """
    map_NP = jnp.take(by_position(y), unit, axis=2)
    at_N1 = jnp.where(position == ANYWHERE, jnp.argmax(map_NP, axis=1), position)[:, None]
    at_NP = jnp.arange(map_NP.shape[1])[None] == at_N1
    mask = at_NP[:, :, None] & (jnp.arange(y.shape[-1]) == unit)[None, None]
    return jnp.take_along_axis(map_NP, at_N1, axis=1)[:, 0], mask.reshape(y.shape)


def map_images(
    checkpoint: Checkpoint, function: Callable, images: Images, *arguments: int, batch_size: int
) -> list[Any]:
    """Applies a jitted function (params, uint8 [n, S, S, 3], image_stats, *arguments) to images, in batches.

    Returns its results for each batch, in order, as numpy arrays. Raises UserError if images cannot be read.
    """
    evaluator = Evaluator(checkpoint, batch_size=batch_size)

    def with_arguments(params: Any, image_NHWC: Array, image_stats: Any) -> Any:
        return function(params, image_NHWC, image_stats, *arguments)

    return list(evaluator.map_images(with_arguments, to_records(checkpoint, images)))


def jit(function: Callable) -> Callable:
    """`jax.jit` with the compiler options for networks."""
    return jax.jit(function, compiler_options=compiler.compiler_options(jax.default_backend()))
