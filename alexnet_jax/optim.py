"""The paper's update rule as an optax transformation, and the two ways its learning rate drops."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from alexnet_jax.errors import UserError


class SgdState(NamedTuple):
    """All the update remembers; every scalar is an array, so that a checkpoint holds it."""

    velocity: Any  # shaped like the parameters
    count: jax.Array  # int32: updates so far
    drops: jax.Array  # int32: drops of the learning rate decided by validation
    best_error: jax.Array  # float32, percent: lowest validation error so far
    stale: jax.Array  # int32: validations since it improved


class Optimizer(NamedTuple):
    tx: optax.GradientTransformation
    learning_rate: Callable[[SgdState], jax.Array]  # of the next update
    after_validation: Callable[[SgdState, Any], SgdState]  # takes the validation top-1 error in percent


def make_optimizer(
    *,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    schedule: str,
    drop_factor: float,
    max_drops: int,
    patience: int,
    min_gain: float,
    drop_epochs: tuple[float, ...],
    steps_per_epoch: float,
) -> Optimizer:
    """Stochastic gradient descent as section 5 writes it, with the rate inside the velocity.

        v <- momentum * v - weight_decay * rate * w - rate * gradient
        w <- w + v

    So a velocity keeps its old scale across a drop of the rate (`optax.sgd` scales it down at once). The biases have
    no decay: the paper speaks of weights, and the authors' code decays weights only (`src/weights.cu`).

    Args:
      learning_rate: the first rate; 0.01 in the paper.
      momentum, weight_decay: 0.9 and 0.0005 in the paper.
      schedule: 'plateau' divides the rate when validation stalls; 'epochs' at `drop_epochs`.
      drop_factor: what a drop multiplies the rate by; 0.1 in the paper.
      max_drops: at most so many on 'plateau'; three in the paper.
      patience: a drop comes after so many validations in a row without a gain.
      min_gain: percentage points by which the error must fall below its best to count as a gain.
        Deviation: the paper dropped the rate by hand, "when the validation error rate stopped improving".
      drop_epochs: when the rate drops on 'epochs', in passes through the training set.
      steps_per_epoch: updates a pass takes; need not be whole.

    Raises:
      UserError: an unknown schedule, or a value outside its range.
    """
    if schedule not in ('plateau', 'epochs'):
        raise UserError(f"optim.schedule={schedule!r}; expected 'plateau' or 'epochs'.")
    for name, value, right in (
        ('learning_rate', learning_rate, learning_rate >= 0),
        ('momentum', momentum, 0 <= momentum < 1),
        ('weight_decay', weight_decay, weight_decay >= 0),
        ('drop_factor', drop_factor, 0 < drop_factor <= 1),
        ('patience', patience, patience >= 1),
        ('max_drops', max_drops, max_drops >= 0),
        ('min_gain', min_gain, min_gain >= 0),
    ):
        if not right:
            raise UserError(f'optim.{name}={value} is out of range; see configs/paper.py.')
    numbers = all(isinstance(epoch, int | float) for epoch in drop_epochs)
    if not numbers or sorted(drop_epochs) != list(drop_epochs):
        raise UserError(f'optim.drop_epochs={drop_epochs}; expected rising numbers of epochs.')
    drop_steps = [round(epoch * steps_per_epoch) for epoch in drop_epochs]
    most = max_drops if schedule == 'plateau' else len(drop_steps)

    def rate(state: SgdState):
        drops = state.drops if schedule == 'plateau' else sum((state.count >= s for s in drop_steps), jnp.int32(0))
        return jnp.asarray([learning_rate * drop_factor**i for i in range(most + 1)])[drops]

    def init(params):
        return SgdState(
            velocity=jax.tree.map(jnp.zeros_like, params),
            count=jnp.int32(0),
            drops=jnp.int32(0),
            best_error=jnp.float32(jnp.inf),
            stale=jnp.int32(0),
        )

    def update(grads, state, params):
        step = rate(state)

        def velocity(path, v, g, w):
            decay = 0.0 if path[-1].key == 'bias' else weight_decay
            return (momentum * v - decay * step * w - step * g).astype(w.dtype)

        new = jax.tree_util.tree_map_with_path(velocity, state.velocity, grads, params)
        return new, state._replace(velocity=new, count=state.count + 1)

    def after_validation(state: SgdState, error) -> SgdState:
        if schedule != 'plateau':
            return state
        error = jnp.asarray(error, jnp.float32)
        gained = error < state.best_error - min_gain
        stale = jnp.where(gained, 0, state.stale + 1)
        drop = (stale >= patience) & (state.drops < max_drops)
        return state._replace(
            best_error=jnp.where(gained, error, state.best_error),
            stale=jnp.where(drop, 0, stale),
            drops=state.drops + drop,
        )

    return Optimizer(optax.GradientTransformation(init, update), rate, after_validation)
