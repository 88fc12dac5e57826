"""Additions to the paper's update for large batches: LARS and a learning-rate warm-up."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from alexnet_jax.core.optim import DecayTable


def add_decays_with_lars(table: DecayTable, *, trust_coefficient: float) -> optax.GradientTransformation:
    """LARS (You, Gitman and Ginsburg 2017, and their released code). Replaces `optim.add_decays`.

    Multiplies `gradient + decay * w` of each array by `trust_coefficient * |w| / (|gradient| + decay * |w|)`, or by 1
    if w or the gradient is 0. This adapts the large learning rate of a large batch to each layer.
    `optax.scale_by_trust_ratio` differs: it divides by `|gradient + decay * w|`.
    """

    def scaled(path, gradient, w):
        decay = table.of(path[0].key, path[-1].key)
        w_norm, gradient_norm = jnp.linalg.norm(w), jnp.linalg.norm(gradient)
        ratio = trust_coefficient * w_norm / (gradient_norm + decay * w_norm)
        return jnp.where((w_norm > 0) & (gradient_norm > 0), ratio, 1.0) * (gradient + decay * w)

    return optax.stateless(lambda grads, params: jax.tree.map_with_path(scaled, grads, params))


def warmup(steps: int) -> Callable:
    """Learning-rate factor that rises linearly to 1 over the first `steps` updates (Goyal et al. 2017)."""
    return lambda count: jnp.minimum(1.0, (count + 1) / steps)


def hooks_from_config(fields: Mapping[str, Any], steps_per_epoch: float) -> dict[str, Any]:
    """Returns the keyword arguments of `config.optimizer_from_config` for LARS and warm-up; empty if both are off."""
    hooks: dict[str, Any] = {}
    if trust_coefficient := fields['trust_coefficient']:
        hooks['decay'] = functools.partial(add_decays_with_lars, trust_coefficient=trust_coefficient)
    if steps := round(fields['warmup_epochs'] * steps_per_epoch):
        hooks['warmup'] = warmup(steps)
    return hooks
