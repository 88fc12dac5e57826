"""Response normalization (section 3.3) as pure functions of NHWC arrays, with gradients of their own."""

import functools
from typing import cast

import chex
import jax
import jax.numpy as jnp
from jax import Array, lax

Windows = tuple[tuple[int, int], ...]  # (axis, n) for each axis summed over


def local_response_norm(
    x_NHWC: Array, *, n: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75, groups: int = 1
) -> Array:
    """Divides each activation by a power of its neighbors' energy along the channels.  Paper, section 3.3.

        b_i = a_i / (k + alpha * sum of a_j^2 over the n channels around i) ^ beta

    Args:
      x_NHWC: float [N, H, W, C]; sums are taken in float32 at least.
      n: window length; it is cut short at the first and last channel of a group.
      k, alpha, beta: the paper's constants. Alpha multiplies the sum, as printed, not the mean.
      groups: the window stays inside each of this many equal parts of the channels.
        Deviation: the paper prints N, all kernels of the layer; its GPUs each saw their own half (groups=2).

    Returns:
      float [N, H, W, C].
    """
    chex.assert_rank(x_NHWC, 4)
    x = x_NHWC.reshape(*x_NHWC.shape[:-1], groups, -1)
    return _over_energy(((4, n),), k, alpha, beta, x).reshape(x_NHWC.shape)


def spatial_response_norm(x_NHWC: Array, *, n: int, k: float, alpha: float, beta: float) -> Array:
    """Divides each activation by a power of the energy around it in its own map.  Authors' code, not in the paper.

        b = a / (k + alpha * sum of a^2 over the n x n window around it) ^ beta

    `type=rnorm` of `layer.py`, as net 145 has it behind its second normalization; there alpha is a scale / n^2. The
    window begins n // 2 before its place and is cut short by the edges.

    x_NHWC: float [N, H, W, C]; sums are taken in float32 at least. Returns the same shape.
    """
    chex.assert_rank(x_NHWC, 4)
    return _over_energy(((1, n), (2, n)), k, alpha, beta, x_NHWC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _over_energy(windows: Windows, k: float, alpha: float, beta: float, x: Array) -> Array:
    """x / (k + alpha * sum of x^2)^beta.

    With a gradient of its own, which keeps nothing but x and takes a quarter of the time of the derived one on the CPU
    backend. (JAX has no forward mode through it then; `jax.grad` of `jax.grad` works.)
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * _power(k + alpha * _window_sums(jnp.square(wide), windows), beta)).astype(x.dtype)


def _over_energy_forward(windows: Windows, k: float, alpha: float, beta: float, x: Array) -> tuple[Array, Array]:
    return _over_energy(windows, k, alpha, beta, x), x


def _over_energy_backward(
    windows: Windows, k: float, alpha: float, beta: float, x: Array, gradient: Array
) -> tuple[Array]:
    """With d = k + alpha sum x^2:  g d^-beta - 2 alpha beta x sum' (g x d^-beta / d), sum' over those that saw x.

    The barrier hides from XLA that this d equals the forward pass's: it would store that array of float32 instead of
    computing it again.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    dtype, x, gradient = x.dtype, x.astype(wide), gradient.astype(wide)
    one = lax.optimization_barrier(jnp.ones((), wide))
    denominator = k + alpha * _window_sums(jnp.square(one * x), windows)
    direct = gradient * _power(denominator, beta)
    through = _window_sums(direct * x / denominator, windows, reverse=True)
    return ((direct - (2 * alpha * beta) * x * through).astype(dtype),)


_over_energy.defvjp(_over_energy_forward, _over_energy_backward)


def _power(x: Array, beta: float) -> Array:
    """x^-beta; the paper's 3/4 as two roots, which cost a fraction of a logarithm and an exponential."""
    return lax.rsqrt(x * jnp.sqrt(x)) if beta == 0.75 else x**-beta


def _window_sums(x: Array, windows: Windows, reverse: bool = False) -> Array:
    """Sums over the n places around each, along one axis after the other; beyond the ends there is nothing.

    A window begins n // 2 before its place; `reverse` turns it about: over all places whose window holds this one.
    """
    for axis, n in windows:
        size, around = x.shape[axis], (n // 2, (n - 1) // 2)
        x = jnp.pad(x, [around[:: -1 if reverse else 1] if i == axis else (0, 0) for i in range(x.ndim)])
        x = cast(Array, sum(lax.slice_in_dim(x, j, j + size, axis=axis) for j in range(n)))
    return x
