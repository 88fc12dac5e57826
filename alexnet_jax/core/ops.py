"""The paper's array operations as pure functions of NHWC arrays: convolution, dense layer, dropout.

Several have custom gradients. The operations between convolutions are memory-bound, so they are written such that XLA's
programs move few bytes (docs/performance.md has the counts).
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jax import Array, lax

from alexnet_jax.core import cpu

_Arrays = tuple[Array, Array]  # feature maps and kernel, or their gradients


def regroup(parts: list[Array], count: int) -> list[Array]:
    """Splits or concatenates arrays along the last axis (channels) into `count` arrays of equal size, one per group.

    A layer with two groups is computed as two layers, and post ops run on each half. The halves are concatenated only
    before a layer that reads all channels. (XLA's `feature_group_count` took five times as long on the CPU backend.
    Concatenating after every layer would move 6% more bytes on a GPU.)
    """
    if len(parts) == count:
        return parts
    return jnp.split(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1), count, axis=-1)


def conv(x_NHWC: Array, kernel_HWIO: Array, *, stride: int, padding: tuple[int, int]) -> Array:
    """Cross-correlates the feature maps with each kernel; returns float [N, H', W', O] (section 3.5).

    Args:
      x_NHWC: float [N, H, W, C].
      kernel_HWIO: float [h, w, C, O].
      stride: step of the window in both directions, in pixels.
      padding: zeros (before, after), the same for rows and columns. With `(0, 3)`, an 11x11 window with stride 4 has
        55 positions per axis of a 224 px image; the last extends past the right or bottom edge (authors' code).

    >>> x, kernel = jnp.array([1, 2, 4, 7.0]).reshape(1, 1, 4, 1), jnp.array([-1, 1.0]).reshape(1, 2, 1, 1)
    >>> print(conv(x, kernel, stride=1, padding=(0, 0)).ravel())
    [1. 2. 3.]
    """
    chex.assert_rank([x_NHWC, kernel_HWIO], 4)
    return _convolve(stride, tuple(padding), x_NHWC, kernel_HWIO)


def _xla_conv(stride: int, padding: tuple[int, int], x_NHWC: Array, kernel_HWIO: Array) -> Array:
    return lax.conv_general_dilated(
        x_NHWC, kernel_HWIO, (stride, stride), (padding, padding), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


_convolve = jax.custom_vjp(_xla_conv, nondiff_argnums=(0, 1))


def _convolve_forward(stride: int, padding: tuple[int, int], x: Array, kernel: Array) -> tuple[Array, _Arrays]:
    return _xla_conv(stride, padding, x, kernel), (x, kernel)


def _convolve_backward(stride: int, padding: tuple[int, int], arrays: _Arrays, gradient: Array) -> _Arrays:
    """Returns the gradients that JAX derives; on a CPU in another form, which is faster in loops."""

    def derived(x: Array, kernel: Array, gradient: Array) -> _Arrays:
        return jax.vjp(functools.partial(_xla_conv, stride, padding), x, kernel)[1](gradient)

    rewritten = functools.partial(cpu.conv_gradients, stride, padding)
    return lax.platform_dependent(*arrays, gradient, cpu=rewritten, default=derived)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def local_conv(x_NHWC: Array, kernel_HWPO: Array, *, size: int, stride: int, padding: tuple[int, int]) -> Array:
    """Convolves with a separate kernel at every position (`type=local` of the authors' `layer.py`).

    Maps float [N, H, W, C] to [N, H', W', O]. `kernel_HWPO` is float [H', W', C * size * size, O]; P is a patch of
    size x size pixels, flattened in (channel, row, column) order. See `conv` for `stride` and `padding`.
    """
    chex.assert_rank([x_NHWC, kernel_HWPO], 4)
    height, width, _, features = kernel_HWPO.shape
    x_HWNC = jnp.pad(x_NHWC.transpose(1, 2, 0, 3), (padding, padding, (0, 0), (0, 0)))
    pixels = [
        x_HWNC[i : i + (height - 1) * stride + 1 : stride, j : j + (width - 1) * stride + 1 : stride]
        for i in range(size)
        for j in range(size)
    ]
    # One product for each position Q. It sums in (row, column, channel) order, so patches consist of contiguous pieces.
    patches_QNP = jnp.concatenate(pixels, axis=-1).reshape(height * width, len(x_NHWC), -1)
    kernel_QPO = kernel_HWPO.reshape(height * width, -1, size**2, features).swapaxes(1, 2)
    y_QNO = jnp.matmul(patches_QNP, kernel_QPO.reshape(height * width, -1, features))
    return y_QNO.reshape(height, width, len(x_NHWC), features).transpose(2, 0, 1, 3)


def dense(x: Array, kernel_IO: Array, *, dtype: jax.typing.DTypeLike | None = None) -> Array:
    """Applies a fully connected layer to x, float [N, ..., C], flattened in (H, W, C) order; returns float [N, O].

    `kernel_IO` is float [inputs, O]. `dtype` is the dtype of the sums and the result; None: the dtype of x.
    """
    return jnp.matmul(x.reshape(x.shape[0], -1), kernel_IO, preferred_element_type=dtype)


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """Returns x + bias in the dtype of x, float [N, ...]; `bias` has the shape of the last axes of x.

    The addition uses the dtype of x because cuDNN fuses it with the convolution only then. The bias gradient is summed
    in the dtype of the bias, because the sum over all images and positions has many terms.
    """
    return x + jnp.expand_dims(bias.astype(x.dtype), range(x.ndim - bias.ndim))


def _add_bias_forward(x: Array, bias: Array) -> tuple[Array, Array]:
    return add_bias(x, bias), bias


def _add_bias_backward(bias: Array, gradient: Array) -> tuple[Array, Array]:
    wide = gradient.astype(jnp.promote_types(gradient.dtype, bias.dtype))
    return gradient, wide.sum(range(gradient.ndim - bias.ndim)).astype(bias.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def dropout(x: Array, mask: Array | None, *, rate: float, inverted: bool = False) -> Array:
    """Sets units of x, float [N, ...], to zero in training and scales all units at test time (section 4.2).

    `mask` is bool with the shape of x, True to keep a unit; None at test time. `rate` is the probability of zero.
    The paper multiplies by 1 - rate at test time. With `inverted` the kept units are divided by 1 - rate in training
    instead, as in Caffe and PyTorch.

    >>> x = jnp.array([1, 2, 3.0])
    >>> print(dropout(x, jnp.array([True, False, True]), rate=0.5), dropout(x, None, rate=0.5))
    [1. 0. 3.] [0.5 1.  1.5]
    """
    if mask is None:
        return x if inverted else x * (1 - rate)
    chex.assert_equal_shape([x, mask])
    return jnp.where(mask, x / (1 - rate) if inverted else x, 0)
