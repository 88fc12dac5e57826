"""Overlapping pooling (section 3.4) as pure functions of NHWC arrays. The edge may truncate the last window."""

import functools
import itertools
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from alexnet_jax.core import cpu


def pooled_size(size: int, window: int, stride: int) -> int:
    """Number of windows along a side of `size` pixels. The last may be truncated, as in the authors' code.

    >>> pooled_size(55, window=3, stride=2)
    27
    """
    return 1 + -(-(size - window) // stride)


def max_pool(x_NHWC: Array, *, window: int, stride: int) -> Array:
    """Max pooling of float [N, H, W, C] to float [N, pooled_size(H), pooled_size(W), C] (section 3.4).

    Windows overlap if window > stride; the paper's values are 3 and 2.
    Deviation: positions that tie for the maximum of a window share its gradient. The paper does not mention ties. The
    authors' CUDA kernels give the whole gradient to each of these positions; PyTorch gives it to the first.

    The two windows of a row share its third pixel:

    >>> x = jnp.array([4, 1, 9, 2, 3.0] * 5).reshape(1, 5, 5, 1)
    >>> print(max_pool(x, window=3, stride=2)[0, :, :, 0])
    [[9. 9.]
     [9. 9.]]
    """
    chex.assert_rank(x_NHWC, 4)
    return _max_pool(window, stride, x_NHWC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _max_pool(window: int, stride: int, x: Array) -> Array:
    """Max pooling with a custom gradient, which checks for each position which windows have their maximum there.

    The gradient is written in one pass, without the scatter that `reduce_window`'s gradient needs.
    """
    return lax.platform_dependent(
        x,
        cpu=functools.partial(_max_pool_by_axis, window, stride),
        default=functools.partial(_reduce_window, window, stride),
    )


def _max_pool_by_axis(window: int, stride: int, x: Array) -> Array:
    for axis in (1, 2):
        x = lax.optimization_barrier(x)  # otherwise XLA would recompute x for each window over it
        x = functools.reduce(jnp.maximum, _window_slices(x, window, stride, axis, fill=-jnp.inf))
    return x


def _reduce_window(window: int, stride: int, x: Array) -> Array:
    ends = [(0, max(0, _span(size, window, stride) + window - 1 - size)) for size in x.shape[1:3]]
    windows, strides = (1, window, window, 1), (1, stride, stride, 1)
    return lax.reduce_window(x, np.asarray(-np.inf, x.dtype), lax.max, windows, strides, [(0, 0), *ends, (0, 0)])


def _span(size: int, window: int, stride: int) -> int:
    """Returns the number of positions from the start of the first window to the start of the last, inclusive."""
    return (pooled_size(size, window, stride) - 1) * stride + 1


def _window_slices(x: Array, window: int, stride: int, axis: int, fill: float) -> list[Array]:
    """Returns `window` arrays: array j has the value at offset j of each window along an axis, `fill` past the edge."""
    span = _span(x.shape[axis], window, stride)
    if (padding := span + window - 1 - x.shape[axis]) > 0:
        x = jnp.pad(x, [(0, padding if i == axis else 0) for i in range(x.ndim)], constant_values=fill)
    return [lax.slice_in_dim(x, j, j + span, stride, axis) for j in range(window)]


def _max_pool_forward(window: int, stride: int, x: Array) -> tuple[Array, tuple[Array, ...]]:
    """Also counts how many values of each window equal its maximum.

    On a GPU, one pass over x computes both. `_max_pool` without a count uses `reduce_window` there, because XLA would
    fuse slices with the operation that computes x, and recompute a value for each window over it.
    """
    by_axis, at_once = (functools.partial(f, window, stride) for f in (_count_by_axis, _count_at_once))
    y, ties = lax.platform_dependent(x, cpu=by_axis, default=at_once)
    y, ties = lax.optimization_barrier((y, ties))  # otherwise XLA delays the count and reads x again
    return y, (x, y, ties)


def _count_at_once(window: int, stride: int, x: Array) -> tuple[Array, Array]:
    rows = _window_slices(x, window, stride, 1, fill=-jnp.inf)
    values = [value for row in rows for value in _window_slices(row, window, stride, 2, fill=-jnp.inf)]
    y = functools.reduce(jnp.maximum, values)
    return y, cast(Array, sum((value == y).astype(np.min_scalar_type(window**2)) for value in values))


def _count_by_axis(window: int, stride: int, x: Array) -> tuple[Array, Array]:
    """Along rows, then along columns. The integers are counted in float32, which is faster on a CPU."""
    rows = _window_slices(x, window, stride, 1, fill=-jnp.inf)
    row_max = functools.reduce(jnp.maximum, rows)
    row_ties = sum((row == row_max).astype(jnp.float32) for row in rows)
    row_max, row_ties = lax.optimization_barrier((row_max, row_ties))
    values = _window_slices(row_max, window, stride, 2, fill=-jnp.inf)
    counts = _window_slices(row_ties, window, stride, 2, fill=0)
    y = functools.reduce(jnp.maximum, values)
    ties = sum(jnp.where(value == y, count, 0) for value, count in zip(values, counts, strict=True))
    return y, cast(Array, ties).astype(np.min_scalar_type(window**2))


def _max_pool_backward(window: int, stride: int, arrays: tuple[Array, ...], gradient: Array) -> tuple[Array]:
    x, y, ties = arrays
    wide = jnp.promote_types(x.dtype, jnp.float32)
    # Position p is at offset p % stride + m * stride of window p // stride - m, if that offset is less than `window`.
    back = range(-(-window // stride))
    counts = [-(-size // stride) for size in x.shape[1:3]]  # of p // stride
    edges = [(back[-1], max(0, count - size)) for count, size in zip(counts, y.shape[1:3], strict=True)]
    y, share = (jnp.pad(a, [(0, 0), *edges, (0, 0)]) for a in (y, gradient.astype(wide) / ties.astype(wide)))
    y, share = cpu.barrier(y, share)
    inside = [[np.arange(size) % stride + m * stride < window for m in back] for size in x.shape[1:3]]  # axis, then m

    def upsample(a: Array, *shift: int) -> Array:
        """Returns an array of the shape of x with a[i // stride - m, j // stride - n] at (i, j)."""
        for axis, m in zip((1, 2), shift, strict=True):
            a = lax.slice_in_dim(a, back[-1] - m, back[-1] - m + counts[axis - 1], axis=axis)
            a = lax.slice_in_dim(jnp.repeat(a, stride, axis), 0, x.shape[axis], axis=axis)
        return a

    total: Any = 0
    for m, n in itertools.product(back, back):
        is_max = (x == upsample(y, m, n)) & (inside[0][m][:, None] & inside[1][n])[None, :, :, None]
        total += jnp.where(is_max, upsample(share, m, n), 0)
    return (total.astype(x.dtype),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def avg_pool(x_NHWC: Array, *, window: int, stride: int) -> Array:
    """Mean pooling of float [N, H, W, C] to float [N, pooled_size(H), pooled_size(W), C].

    The authors' CIFAR-10 networks use it; the paper does not. A truncated window gives the mean of the values inside
    the image, as in the authors' CUDA kernels.
    """
    chex.assert_rank(x_NHWC, 4)
    x = x_NHWC
    for axis in (1, 2):
        size = x.shape[axis]
        counts = [min(window, size - start) for start in range(0, _span(size, window, stride), stride)]
        x = cast(Array, sum(_window_slices(x, window, stride, axis, fill=0)))
        x = x / jnp.asarray(counts, x.dtype).reshape([-1 if i == axis else 1 for i in range(4)])
    return x
