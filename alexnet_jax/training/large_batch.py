"""What training in large batches adds to the paper's update: LARS and a warm-up."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp


def lars_trust_ratio(trust_coefficient: float) -> Callable:
    """LARS (You, Gitman and Ginsburg 2017, and the code they released), for `optim.make_optimizer`.

    The rate of each array is multiplied by trust_coefficient * |w| / (|gradient| + decay * |w|), by 1 where w or the
    gradient is 0, so that the rate of a large batch suits every layer.
    """

    def trust_ratio(w, gradient, decay: float):
        w_norm, gradient_norm = jnp.linalg.norm(w), jnp.linalg.norm(gradient)
        ratio = trust_coefficient * w_norm / (gradient_norm + decay * w_norm)
        return jnp.where((w_norm > 0) & (gradient_norm > 0), ratio, 1.0)

    return trust_ratio


def warmup(steps: int) -> Callable:
    """A factor of the rate that rises in equal steps to 1 over the first updates (Goyal et al. 2017)."""
    return lambda count: jnp.minimum(1.0, (count + 1) / steps)


def hooks_from_config(fields: Mapping[str, Any], steps_per_epoch: float) -> dict[str, Callable]:
    """The hooks of `optim.make_optimizer` that a config's `optim` asks for; none by default."""
    hooks = {}
    if fields['trust_coefficient']:
        hooks['trust_ratio'] = lars_trust_ratio(fields['trust_coefficient'])
    if steps := round(fields['warmup_epochs'] * steps_per_epoch):
        hooks['rate_factor'] = warmup(steps)
    return hooks
