"""Overlapping pooling (section 3.4) as pure functions of NHWC arrays; the last window may be cut by the edge."""

import functools
import itertools
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def pooled_size(size: int, window: int, stride: int) -> int:
    """Pooling windows along a side of `size` pixels: the last may be cut by the edge, as in the authors' kernels."""
    return 1 + -(-(size - window) // stride)


def max_pool(x_NHWC: Array, *, window: int, stride: int) -> Array:
    """Overlapping max pooling where window > stride.  Paper, section 3.4.

    Where several places of a window hold its maximum they share its gradient. Deviation: the authors' kernels give each
    of them all of it, PyTorch's give the first of them all; the paper does not say.

    Args:
      x_NHWC: float [N, H, W, C].
      window, stride: the paper's 3 and 2.

    Returns:
      float [N, pooled_size(H), pooled_size(W), C].
    """
    chex.assert_rank(x_NHWC, 4)
    return _max_pool(window, stride, x_NHWC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _max_pool(window: int, stride: int, x: Array) -> Array:
    """The gradient asks every place which of the few windows over it had their maximum there.

    That is one pass, which writes the result once, and nothing is scattered, as it is in `reduce_window`'s own.
    """
    ends = [(0, max(0, _span(size, window, stride) + window - 1 - size)) for size in x.shape[1:3]]
    windows, strides = (1, window, window, 1), (1, stride, stride, 1)
    return lax.reduce_window(x, np.asarray(-np.inf, x.dtype), lax.max, windows, strides, [(0, 0), *ends, (0, 0)])


def _span(size: int, window: int, stride: int) -> int:
    """Places from the first of the first window to the first of the last."""
    return (pooled_size(size, window, stride) - 1) * stride + 1


def _taken(x: Array, window: int, stride: int, axis: int) -> list[Array]:
    """What the first, second, ... place of each window along an axis holds; -inf beyond the edge."""
    span = _span(x.shape[axis], window, stride)
    if (missing := span + window - 1 - x.shape[axis]) > 0:
        x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)], constant_values=-jnp.inf)
    return [lax.slice_in_dim(x, j, j + span, stride, axis) for j in range(window)]


def _max_pool_forward(window: int, stride: int, x: Array) -> tuple[Array, tuple[Array, ...]]:
    """Counts, too, how many values of a window are its maximum: x is at hand here, and is read once for both.

    From slices, which XLA fuses with the count; where nothing is counted it would fuse them with what x comes from, and
    compute that again for each window over a value.
    """
    count = np.min_scalar_type(window**2)
    values = [value for row in _taken(x, window, stride, 1) for value in _taken(row, window, stride, 2)]
    y = functools.reduce(jnp.maximum, values)
    ties = sum((value == y).astype(count) for value in values)
    y, ties = lax.optimization_barrier((y, ties))  # else XLA counts later, from x again
    return y, (x, y, ties)


def _max_pool_backward(window: int, stride: int, arrays: tuple[Array, ...], gradient: Array) -> tuple[Array]:
    x, y, ties = arrays
    wide = jnp.promote_types(x.dtype, jnp.float32)
    share = gradient.astype(wide) / ties.astype(wide)
    # A place p is the one p % stride + m * stride of the window p // stride - m, if that is within the window.
    back = range(-(-window // stride))
    inside = [[np.arange(size) % stride + m * stride < window for m in back] for size in x.shape[1:3]]  # axis, then m
    total: Any = 0
    for m, n in itertools.product(back, back):
        over = functools.partial(_over_places, back=(m, n), stride=stride, shape=x.shape)
        mine = (x == over(y)) & (inside[0][m][:, None] & inside[1][n])[None, :, :, None]
        total += jnp.where(mine, over(share), 0)
    return (total.astype(x.dtype),)


def _over_places(y: Array, back: tuple[int, int], stride: int, shape: tuple[int, ...]) -> Array:
    """For each place (i, j) of a shape what y holds at (i // stride - back[0], j // stride - back[1]); 0 beyond."""
    for axis, m in zip((1, 2), back, strict=True):
        count = -(-shape[axis] // stride)
        widths = [(m, max(0, count - m - y.shape[axis])) if i == axis else (0, 0) for i in range(4)]
        y = lax.slice_in_dim(jnp.pad(y, widths), 0, count, axis=axis)
        y = lax.slice_in_dim(jnp.repeat(y, stride, axis), 0, shape[axis], axis=axis)
    return y


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def avg_pool(x_NHWC: Array, *, window: int, stride: int) -> Array:
    """Overlapping mean pooling, as the CIFAR-10 networks of the authors have it; not in the paper.

    A window that is cut by the edge is the mean of what it holds, as in the authors' kernels.

    x_NHWC: float [N, H, W, C]. Returns float [N, pooled_size(H), pooled_size(W), C].
    """
    chex.assert_rank(x_NHWC, 4)
    x = x_NHWC
    for axis in (1, 2):
        size = x.shape[axis]
        span = _span(size, window, stride)
        inside = [min(window, size - start) for start in range(0, span, stride)]
        missing = max(0, span + window - 1 - size)
        x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(4)])
        x = cast(Array, sum(lax.slice_in_dim(x, j, j + span, stride, axis) for j in range(window)))
        x = x / jnp.asarray(inside, x.dtype).reshape([-1 if i == axis else 1 for i in range(4)])
    return x
