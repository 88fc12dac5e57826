"""Projects a unit back to the pixels: the deconvolutional network, and guided backpropagation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.core.augment import Augmentation
from alexnet_jax.core.model import AlexNet
from alexnet_jax.core.pooling import pooled_size
from alexnet_jax.inference.predict import Images
from alexnet_jax.utils.errors import UserError
from alexnet_jax.visualize import forward
from alexnet_jax.visualize.forward import Position

_TRANSPOSED = ('linear', 'avg_pool', 'dropout')  # linear operations; the bias is left out
_UNCHANGED = ('lrn', 'spatial_norm')  # the paper has no rule for them


def deconvnet(
    checkpoint: Checkpoint,
    images: Images,
    layer: str,
    unit: int,
    position: Position = None,
    *,
    batch_size: int = 32,
) -> np.ndarray:
    """Projects the activation of one unit back to the pixels with the deconvolutional network of Zeiler and Fergus.

    All other activations of the layer are set to zero. Then the operations below are reversed, from the last to the
    first: max pooling puts each value at the location of its window's maximum in the forward pass (the first one in
    row-major order, if several are equal) and adds up where windows overlap; a ReLU rectifies; convolutions and dense
    layers apply their transposed weights, without the bias. The paper does not say how to reverse its contrast
    normalization: here the normalizations pass the signal through unchanged. Mean pooling and the factor of dropout are
    linear and are transposed. A unit that is not active gives zeros.

    Source: Zeiler and Fergus, "Visualizing and understanding convolutional networks", ECCV 2014, section 2.1
    (arXiv:1311.2901).

    Args:
      checkpoint: from `alexnet_jax.load_checkpoint`.
      images: as for `alexnet_jax.predict`, or prepared uint8 [N, S, S, 3]. Their center crops are used.
      layer: the name of an activation, as for `alexnet_jax.activations`: 'conv5' is the output of the layer's last
        operation, such as its pooling, and 'conv5.relu' that of one operation.
      unit: index of the feature map, or of the unit of a dense layer.
      position: (row, column) in the map; None takes the maximum of each image's map (the first one in row-major order).
      batch_size: images per batch; it does not change the results.

    Returns:
      float32 [N, s, s, 3] at the pixels of the center crops, s = `checkpoint.image_size`. The division by `pixel_std`
      counts as a part of the first layer.

    Raises:
      UserError: the layer is unknown, unit or position is out of range, images cannot be read, or the network has an
        operation that the deconvolutional network cannot reverse, such as tanh.
    """
    return _project(_jit_deconvnet, checkpoint, images, layer, unit, position, batch_size)


def guided_backprop(
    checkpoint: Checkpoint,
    images: Images,
    layer: str,
    unit: int,
    position: Position = None,
    *,
    batch_size: int = 32,
) -> np.ndarray:
    """Returns the gradient of one unit by guided backpropagation.

    It is the gradient of the unit's activation with respect to the pixels, except that each ReLU also passes no
    negative gradient down. All other operations have their true gradients. Without ReLUs, as in a tanh network, it is
    the true gradient.

    Source: Springenberg, Dosovitskiy, Brox and Riedmiller, "Striving for simplicity: the all convolutional net", ICLR
    workshop 2015 (arXiv:1412.6806).

    Args:
      checkpoint, images, layer, unit, position, batch_size: as for `deconvnet`.

    Returns:
      float32 [N, s, s, 3] at the pixels of the center crops, s = `checkpoint.image_size`: change of the activation per
      gray level.

    Raises:
      UserError: as for `deconvnet`; each operation is allowed.
    """
    return _project(_jit_guided_backprop, checkpoint, images, layer, unit, position, batch_size)


def _project(
    jitted: Callable, checkpoint: Checkpoint, images: Images, layer: str, unit: int, position: Position, batch_size: int
) -> np.ndarray:
    found = forward.find_unit(checkpoint, layer, unit, position)
    function = jitted(checkpoint.network, checkpoint.augmentation, found.stop)
    parts = forward.map_images(checkpoint, function, images, found.unit, found.position, batch_size=batch_size)
    side = checkpoint.image_size
    return np.concatenate(parts).astype(np.float32) if parts else np.zeros((0, side, side, 3), np.float32)


@functools.lru_cache(maxsize=8)
def _jit_deconvnet(network: AlexNet, augmentation: Augmentation, stop: int) -> Callable:
    operations = forward.operations(network)[:stop]
    for layer, op in operations:
        if op not in (*_TRANSPOSED, *_UNCHANGED, 'relu', 'pool'):
            raise UserError(f'{layer}.{op} cannot be reversed by a deconvolutional network; use guided_backprop.')

    def project(params, image_NHWC, image_stats, unit, position):
        y, reversals = forward.network_input(network, augmentation, image_NHWC, image_stats), []
        for layer, op in operations:
            y, reverse = _reversible(network, params, layer, op, y)
            reversals.append(reverse)
        signal = jnp.where(forward.select(y, unit, position)[1], y, 0)
        for reverse in reversed(reversals):
            signal = reverse(signal)
        return _per_gray_level(signal, augmentation)

    return forward.jit(project)


def _reversible(network: AlexNet, params: Any, layer: str, op: str, x: Array) -> tuple[Array, Callable]:
    """Returns the output of an operation, and the function that takes the deconvnet's signal from there to its input.

    All operations are those of the network.
    """
    function = functools.partial(forward.apply, network, params, layer, op)
    if op in _UNCHANGED:
        return function(x), lambda signal: signal
    if op == 'relu':
        return function(x), jax.nn.relu
    if op == 'pool':
        return function(x), functools.partial(_unpool, x, network.pool_window, network.pool_stride)
    y, transpose = jax.vjp(function, x)
    return y, lambda signal: transpose(signal)[0]


def _unpool(x: Array, window: int, stride: int, signal: Array) -> Array:
    """Adds each value of the signal [N, H', W', C] at the first maximum of its window of x [N, H, W, C].

    The gradient of JAX's `reduce_window` does this; the network's own max pooling shares it among equal values.
    """
    ends = [(0, max(0, (pooled_size(side, window, stride) - 1) * stride + window - side)) for side in x.shape[1:3]]
    padding = [(0, 0), *ends, (0, 0)]

    def max_pool(x: Array) -> Array:
        lowest = np.asarray(-np.inf, x.dtype)
        return lax.reduce_window(x, lowest, lax.max, (1, window, window, 1), (1, stride, stride, 1), padding)

    return jax.vjp(max_pool, x)[1](signal)[0]


@functools.lru_cache(maxsize=8)
def _jit_guided_backprop(network: AlexNet, augmentation: Augmentation, stop: int) -> Callable:
    def gradient(params, image_NHWC, image_stats, unit, position):
        def total(x_NHWC: Array) -> Array:
            y = forward.run(network, params, x_NHWC, 0, stop, replace={'relu': _guided_relu})
            return forward.select(y, unit, position)[0].sum()  # each image's gradient depends on this image only

        x_NHWC = forward.network_input(network, augmentation, image_NHWC, image_stats)
        return _per_gray_level(jax.grad(total)(x_NHWC), augmentation)

    return forward.jit(gradient)


@jax.custom_vjp
def _guided_relu(x: Array) -> Array:
    return jax.nn.relu(x)


def _guided_relu_forward(x: Array) -> tuple[Array, Array]:
    return jax.nn.relu(x), x > 0


def _guided_relu_backward(active: Array, gradient: Array) -> tuple[Array]:
    return (jnp.where(active, jax.nn.relu(gradient), 0),)


_guided_relu.defvjp(_guided_relu_forward, _guided_relu_backward)


def _per_gray_level(signal: Array, augmentation: Augmentation) -> Array:
    """Takes a signal from the network's input back through the division by `pixel_std`."""
    return signal / jnp.asarray(augmentation.pixel_std, signal.dtype)[None, None, None]
