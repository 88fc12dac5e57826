"""Post ops: the operations that may be listed in a layer's `post`.

A new operation is one function and one entry of `POST_OPS`. Other modules may add entries:

    POST_OPS['swish'] = PostOp(lambda x, context: jax.nn.swish(x))
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alexnet_jax.core import normalization, ops, pooling
from alexnet_jax.utils.errors import UserError


class Context(NamedTuple):
    """Arguments of an operation besides its input."""

    network: Any  # the `AlexNet`, for its constants
    groups: int  # number of channel groups in this input, from `PostOp.groups`; 1 if that is None
    mask: jax.Array | None  # dropout mask, bool, the shape of the input; None at test time


class Window(NamedTuple):
    """The positions of its input that each position of an operation's output reads, along rows and columns alike."""

    size: int = 1
    stride: int = 1
    before: int = 0  # positions added before the first
    after: int = 0
    truncated: bool = False  # True: the edge may truncate the last window, see `pooling.pooled_size`


class PostOp(NamedTuple):
    """An operation on the output of a layer.

    `function(x, context)` maps float [N, H, W, C] to [N, H', W', C], and [N, F] to [N, F]. Its input may hold only the
    channels of one tower or of one group of the layer. It raises UserError if the feature maps are too small.
    """

    function: Callable[[jax.Array, Context], jax.Array]
    maps_only: bool = False  # True: cannot follow a fully connected layer
    groups: Callable[[Any], int] | None = None  # network -> number of groups that it mixes within; None: mixes none
    window: Callable[[Any], Window] | None = None  # network -> window; None: unknown, only `receptive_field` needs it


def _dropout(x: jax.Array, context: Context) -> jax.Array:
    return ops.dropout(x, context.mask, rate=context.network.dropout_rate, inverted=context.network.dropout_inverted)


def _lrn(x: jax.Array, context: Context) -> jax.Array:
    net = context.network
    alpha = net.lrn_alpha / net.lrn_n if net.lrn_alpha_over_n else net.lrn_alpha
    return normalization.local_response_norm(
        x, n=net.lrn_n, k=net.lrn_k, alpha=alpha, beta=net.lrn_beta, groups=context.groups
    )


def _spatial_norm(x: jax.Array, context: Context) -> jax.Array:
    net = context.network
    alpha = net.spatial_alpha / net.spatial_n**2
    return normalization.spatial_response_norm(x, n=net.spatial_n, k=net.spatial_k, alpha=alpha, beta=net.spatial_beta)


def _pool_with(pool: Callable[..., jax.Array]) -> Callable[[jax.Array, Context], jax.Array]:
    def function(x: jax.Array, context: Context) -> jax.Array:
        window, stride = context.network.pool_window, context.network.pool_stride
        if x.shape[1] < window:
            raise UserError(f'a pooling window of {window} px does not fit maps of {x.shape[1]} px')
        return pool(x, window=window, stride=stride)

    return function


def _point(network: Any) -> Window:
    return Window()


def _pooling(network: Any) -> Window:
    return Window(network.pool_window, network.pool_stride, truncated=True)


def _around(network: Any) -> Window:
    return Window(network.spatial_n, before=network.spatial_n // 2, after=(network.spatial_n - 1) // 2)


POST_OPS: dict[str, PostOp] = {
    'relu': PostOp(lambda x, context: jax.nn.relu(x), window=_point),
    'tanh': PostOp(lambda x, context: jnp.tanh(x), window=_point),
    'dropout': PostOp(_dropout, window=_point),
    'lrn': PostOp(_lrn, maps_only=True, groups=lambda network: network.norm_groups, window=_point),
    'spatial_norm': PostOp(_spatial_norm, maps_only=True, window=_around),
    'pool': PostOp(_pool_with(pooling.max_pool), maps_only=True, window=_pooling),
    'avg_pool': PostOp(_pool_with(pooling.avg_pool), maps_only=True, window=_pooling),
}
