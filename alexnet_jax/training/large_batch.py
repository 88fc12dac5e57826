"""What training in large batches adds to the paper's update: LARS and a warm-up."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from alexnet_jax.core.optim import DecayTable


def add_decays_with_lars(table: DecayTable, *, trust_coefficient: float) -> optax.GradientTransformation:
    """LARS (You, Gitman and Ginsburg 2017, and the code they released), in place of `optim.add_decays`.

    gradient + decay * w of each array is multiplied by trust_coefficient * |w| / (|gradient| + decay * |w|), by 1 where
    w or the gradient is 0, so that the rate of a large batch suits every layer. (`optax.scale_by_trust_ratio` divides
    by |gradient + decay * w|.)
    """

    def scaled(path, gradient, w):
        decay = table.of(path[0].key, path[-1].key)
        w_norm, gradient_norm = jnp.linalg.norm(w), jnp.linalg.norm(gradient)
        ratio = trust_coefficient * w_norm / (gradient_norm + decay * w_norm)
        return jnp.where((w_norm > 0) & (gradient_norm > 0), ratio, 1.0) * (gradient + decay * w)

    return optax.stateless(lambda grads, params: jax.tree.map_with_path(scaled, grads, params))


def warmup(steps: int) -> Callable:
    """A factor of the rate that rises in equal steps to 1 over the first updates (Goyal et al. 2017)."""
    return lambda count: jnp.minimum(1.0, (count + 1) / steps)


def hooks_from_config(fields: Mapping[str, Any], steps_per_epoch: float) -> dict[str, Any]:
    """The hooks of `config.optimizer_from_config` that a config's `optim` asks for; none by default."""
    hooks: dict[str, Any] = {}
    if trust_coefficient := fields['trust_coefficient']:
        hooks['decay'] = functools.partial(add_decays_with_lars, trust_coefficient=trust_coefficient)
    if steps := round(fields['warmup_epochs'] * steps_per_epoch):
        hooks['warmup'] = warmup(steps)
    return hooks
