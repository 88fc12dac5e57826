"""Response normalization (section 3.3) as pure functions of NHWC arrays, with custom gradients."""

import functools
from typing import cast

import chex
import jax
import jax.numpy as jnp
from jax import Array, lax

Windows = tuple[tuple[int, int], ...]  # (axis, window length n) for each axis to sum over


def local_response_norm(
    x_NHWC: Array, *, n: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75, groups: int = 1
) -> Array:
    """Local response normalization across channels (section 3.3).

        b_i = a_i / (k + alpha * sum of a_j^2 over the n channels around i) ^ beta

    Args:
      x_NHWC: float [N, H, W, C]; the result has the same shape. Sums are computed in float32 or wider.
      n: window length, in channels.
      k, alpha, beta: the paper's constants. Alpha multiplies the sum, as printed, not the mean.
      groups: number of equal channel groups; windows are truncated at their edges. Deviation: the paper's formula sums
        up to N, all kernels of the layer, but each of its GPUs held only half of them (groups=2).

    Two maps are summed at the edges, 1 / (2 + 1 + 1), and three between them. In two groups, every map is at an edge:

    >>> x, constants = jnp.ones((1, 1, 1, 4)), {'n': 3, 'k': 2, 'alpha': 1, 'beta': 1}
    >>> print(local_response_norm(x, **constants).ravel(), local_response_norm(x, groups=2, **constants).ravel())
    [0.25 0.2  0.2  0.25] [0.25 0.25 0.25 0.25]
    """
    chex.assert_rank(x_NHWC, 4)
    x = x_NHWC.reshape(*x_NHWC.shape[:-1], groups, -1)
    return _response_norm(((4, n),), k, alpha, beta, x).reshape(x_NHWC.shape)


def spatial_response_norm(x_NHWC: Array, *, n: int, k: float, alpha: float, beta: float) -> Array:
    """Response normalization over an n x n window of each feature map, from the authors' code; not in the paper.

        b = a / (k + alpha * sum of a^2 over the window around it) ^ beta

    It is `type=rnorm` of `layer.py`; net 145 applies it after the second normalization, with alpha = scale / n^2. A
    window begins n // 2 before its position and is truncated at the edges. `x_NHWC` is float [N, H, W, C]; the result
    has the same shape. Sums are computed in float32 or wider.
    """
    chex.assert_rank(x_NHWC, 4)
    return _response_norm(((1, n), (2, n)), k, alpha, beta, x_NHWC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _response_norm(windows: Windows, k: float, alpha: float, beta: float, x: Array) -> Array:
    """Returns x / (k + alpha * sum of x^2)^beta.

    The custom gradient stores only x, and takes a quarter of the time of automatic differentiation on the CPU backend.
    `jax.jvp` is not available, as for all `custom_vjp` functions; `jax.grad` of `jax.grad` works.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * _power(k + alpha * _window_sums(jnp.square(wide), windows), beta)).astype(x.dtype)


def _response_norm_forward(windows: Windows, k: float, alpha: float, beta: float, x: Array) -> tuple[Array, Array]:
    return _response_norm(windows, k, alpha, beta, x), x


def _response_norm_backward(
    windows: Windows, k: float, alpha: float, beta: float, x: Array, gradient: Array
) -> tuple[Array]:
    """Returns g d^-beta - 2 alpha beta x sum' (g x d^-beta / d) with d = k + alpha sum x^2.

    sum' is over the positions whose window contains x. The barrier keeps XLA from merging this d with that of the
    forward pass; otherwise d, a float32 array, would be stored instead of recomputed.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    dtype, x, gradient = x.dtype, x.astype(wide), gradient.astype(wide)
    one = lax.optimization_barrier(jnp.ones((), wide))
    denominator = k + alpha * _window_sums(jnp.square(one * x), windows)
    direct = gradient * _power(denominator, beta)
    indirect = _window_sums(direct * x / denominator, windows, reverse=True)
    return ((direct - (2 * alpha * beta) * x * indirect).astype(dtype),)


_response_norm.defvjp(_response_norm_forward, _response_norm_backward)


def _power(x: Array, beta: float) -> Array:
    """Returns x^-beta. The paper's 3/4 takes two square roots, much cheaper than a logarithm and an exponential."""
    return lax.rsqrt(x * jnp.sqrt(x)) if beta == 0.75 else x**-beta


def _window_sums(x: Array, windows: Windows, reverse: bool = False) -> Array:
    """Sums over a window of n positions around each position, along each axis in turn, with zeros beyond the edges.

    A window begins n // 2 before its position. With `reverse`, sums over the positions whose windows contain it.
    """
    for axis, n in windows:
        size, padding = x.shape[axis], (n // 2, (n - 1) // 2)
        x = jnp.pad(x, [padding[:: -1 if reverse else 1] if i == axis else (0, 0) for i in range(x.ndim)])
        x = cast(Array, sum(lax.slice_in_dim(x, j, j + size, axis=axis) for j in range(n)))
    return x
