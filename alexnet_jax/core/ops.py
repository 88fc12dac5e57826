"""The paper's array operations as pure functions: convolution, dense layer, dropout.

All take and return NHWC arrays, have no parameters of their own and no state. Several have gradients of their own: what
lies between two convolutions is bound by memory, and is written so that XLA's programs move few bytes;
docs/performance.md counts them.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jax import Array, lax

from alexnet_jax.core import cpu_gradients

_Arrays = tuple[Array, Array]  # maps and kernel, or the gradients of both
_LARGE_BYTES = 5 << 20  # of a gradient: from there on patches were faster, see `_convolve_backward`


def regroup(parts: list[Array], count: int) -> list[Array]:
    """The same channels (the last axis) in `count` arrays of equal size: one for each group of a layer.

    A layer in two groups is two layers side by side, and what follows it is done to each half: whole maps are put
    together only where a layer reads all of them, and cut up where groups begin. (XLA's `feature_group_count` took
    five times as long on the CPU backend; joined after every layer, a program for a GPU moves 6% more bytes.)
    """
    if len(parts) == count:
        return parts
    return jnp.split(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1), count, axis=-1)


def conv(x_NHWC: Array, kernel_HWIO: Array, *, stride: int, padding: tuple[int, int]) -> Array:
    """Cross-correlates the maps with each kernel.  Paper, section 3.5.

    Args:
      x_NHWC: float [N, H, W, C].
      kernel_HWIO: float [h, w, C, O].
      stride: step of the window in both directions, in pixels.
      padding: zeros (before, after) both rows and columns. `(0, 3)` lets an 11x11 window with stride 4 visit
        55 places of a 224 px image, the last hanging over the right and bottom edges as in the authors' code.

    Returns:
      float [N, H', W', O].
    """
    chex.assert_rank([x_NHWC, kernel_HWIO], 4)
    return _convolve(stride, tuple(padding), x_NHWC, kernel_HWIO)


def _plain(stride: int, padding: tuple[int, int], x_NHWC: Array, kernel_HWIO: Array) -> Array:
    return lax.conv_general_dilated(
        x_NHWC, kernel_HWIO, (stride, stride), (padding, padding), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


_convolve = jax.custom_vjp(_plain, nondiff_argnums=(0, 1))


def _convolve_forward(stride: int, padding: tuple[int, int], x: Array, kernel: Array) -> tuple[Array, _Arrays]:
    return _plain(stride, padding, x, kernel), (x, kernel)


def _convolve_backward(stride: int, padding: tuple[int, int], arrays: _Arrays, gradient: Array) -> _Arrays:
    """XLA's, but for the weights on the CPU backend, with a stride or where the gradient is large.

    There XLA's took 1.3 to 2.6 times as long as ours, and down to half as long where the gradient is small.
    """
    x, kernel = arrays
    _, pull_back = jax.vjp(functools.partial(_plain, stride, padding), x, kernel)
    if stride == 1 and gradient.size * gradient.dtype.itemsize <= _LARGE_BYTES:
        return pull_back(gradient)
    by_patches = functools.partial(cpu_gradients.weight_gradient, stride, padding, kernel)
    of_kernel = lax.platform_dependent(x, gradient, cpu=by_patches, default=lambda _, g: pull_back(g)[1])
    return pull_back(gradient)[0], of_kernel


_convolve.defvjp(_convolve_forward, _convolve_backward)


def local_conv(x_NHWC: Array, kernel_HWPO: Array, *, size: int, stride: int, padding: tuple[int, int]) -> Array:
    """A convolution with a kernel of its own at every place.  Type `local` of the authors' `layer.py`.

    Args:
      x_NHWC: float [N, H, W, C].
      kernel_HWPO: float [H', W', C * size * size, O]: for each place the weights of a patch, channel by channel, row
        by row, for each output.
      size, stride, padding: of the window, as in `conv`.

    Returns:
      float [N, H', W', O].
    """
    chex.assert_rank([x_NHWC, kernel_HWPO], 4)
    return lax.conv_general_dilated_local(
        x_NHWC,
        kernel_HWPO,
        (stride, stride),
        (padding, padding),
        filter_shape=(size, size),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )


def dense(x: Array, kernel_IO: Array, *, dtype: jax.typing.DTypeLike | None = None) -> Array:
    """A fully-connected layer; maps are flattened in (H, W, C) order.

    Args:
      x: float [N, ..., C].
      kernel_IO: float [inputs, O].
      dtype: of the sums, if it is to be another than that of x.

    Returns:
      float [N, O].
    """
    return jnp.matmul(x.reshape(x.shape[0], -1), kernel_IO, preferred_element_type=dtype)


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """x + bias, in the type of x; the gradient of the bias is summed in the bias's own type.

    That sum has many terms, of every image and place. The addition stays in x's type since cuDNN fuses it with the
    convolution only so.

    Args:
      x: float [N, ...].
      bias: float, of the shape of the last axes of x.

    Returns:
      of the shape and type of x.
    """
    return x + jnp.expand_dims(bias.astype(x.dtype), range(x.ndim - bias.ndim))


def _add_bias_forward(x: Array, bias: Array) -> tuple[Array, Array]:
    return add_bias(x, bias), bias


def _add_bias_backward(bias: Array, gradient: Array) -> tuple[Array, Array]:
    wide = gradient.astype(jnp.promote_types(gradient.dtype, bias.dtype))
    return gradient, wide.sum(range(gradient.ndim - bias.ndim)).astype(bias.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def dropout(x: Array, mask: Array | None, *, rate: float, inverted: bool = False) -> Array:
    """Silences units in training, scales them at test.  Paper, section 4.2 (no scaling in training).

    Args:
      x: float [N, ...].
      mask: bool, of the shape of x, True where the unit is kept; None at test.
      rate: probability of being set to zero.
      inverted: Caffe and PyTorch divide what is kept by 1 - rate in training and leave the test alone; the paper
        multiplies by 1 - rate at test.

    Returns:
      float, of the shape of x.
    """
    if mask is None:
        return x if inverted else x * (1 - rate)
    chex.assert_equal_shape([x, mask])
    return jnp.where(mask, x / (1 - rate) if inverted else x, 0)
