"""The paper's update rule as an optax transformation, and the two ways its rates fall.  Section 5."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class SgdState(NamedTuple):
    """All the update remembers; every scalar is an array, so that a checkpoint holds it."""

    velocity: Any  # shaped like the parameters
    count: jax.Array  # int32: updates so far
    drops: jax.Array  # int32: drops of the learning rate decided by validation
    best_error: jax.Array  # float32, percent: lowest validation error so far
    plateau_count: jax.Array  # int32: validations since it improved


class Stage(NamedTuple):
    """Factors of the rates from an epoch on."""

    start: float  # epoch
    weights: float
    biases: float
    layers: tuple[tuple[str, float, float], ...] = ()  # (layer, of its weights, of its biases): those with their own

    def factor(self, layer: str, part: str) -> float:
        """The factor of one array: part is 'kernel' or 'bias'."""
        own = {name: (weights, biases) for name, weights, biases in self.layers}
        weights, biases = own.get(layer, (self.weights, self.biases))
        return biases if part == 'bias' else weights


class Plateau(NamedTuple):
    """When a stalled validation error drops the rate to that of the next stage.

    Deviation: the paper dropped the rate by hand, "when the validation error rate stopped improving".
    """

    patience: int  # validations in a row without a gain before a drop
    min_delta: float  # percentage points by which the error must fall below its best to count as a gain
    max_drops: int  # three in the paper


class Optimizer(NamedTuple):
    """The update, and how its rate is known and decided."""

    tx: optax.GradientTransformation
    learning_rate: Callable[[SgdState], jax.Array]  # of the next update
    after_validation: Callable[[SgdState, Any], SgdState]  # takes the validation top-1 error in percent


def make_optimizer(
    stages: Sequence[Stage],
    *,
    learning_rate: float,
    bias_rate: float = 1.0,
    layer_rates: Mapping[str, float] | None = None,
    momentum: float = 0.9,
    rate_in_velocity: bool = True,
    weight_decay: float = 0.0005,
    bias_decay: float = 0.0,
    layer_decays: Mapping[str, float] | None = None,
    steps_per_epoch: float,
    plateau: Plateau | None = None,
    trust_ratio: Callable | None = None,
    rate_factor: Callable | None = None,
) -> Optimizer:
    """Stochastic gradient descent as section 5 writes it, with the rate inside the velocity.

        v <- momentum * v - decay * rate * w - rate * gradient
        w <- w + v

    So a velocity keeps its old scale across a drop of the rate (`optax.sgd` scales it down at once). The authors' code
    (`src/weights.cu`) and Caffe's do the same. An array whose rate is 0 is frozen: neither it nor its velocity change.

    Args:
      stages: the rates over time, the first from epoch 0 on.
      learning_rate: the first rate; 0.01 in the paper.
      bias_rate: multiplies the rate of biases. The paper has one rate for all; 2 at first in the authors' files, and in
        Caffe's (`lr_mult`).
      layer_rates: {layer: factor} multiplies the rate of that layer's weights and biases; 0 freezes it.
      momentum: 0.9 in the paper.
      rate_in_velocity: False is `torch.optim.SGD`: v <- momentum * v - decay * w - gradient; w <- w + rate * v.
      weight_decay: of weights; 0.0005 in the paper.
      bias_decay: of biases; 0 in the paper's config: its update has one w, but the authors' code (and Caffe's) decays
        weights only. `torch.optim.SGD` decays both alike.
      layer_decays: {layer: decay} of that layer's weights, instead of weight_decay.
      steps_per_epoch: updates a pass takes; need not be whole.
      plateau: None: stages follow one another by epoch; else a validation decides, see `after_validation`.
      trust_ratio: (w, gradient, decay) -> what multiplies an array's rate, such as LARS's; None: 1.
      rate_factor: count of updates -> what multiplies every rate, such as a warm-up; None: 1.
    """
    layer_rates, layer_decays = layer_rates or {}, layer_decays or {}
    starts = [round(stage.start * steps_per_epoch) for stage in stages[1:]]

    def stage_index(state: SgdState):
        """Of the stages, the one that holds for the next update."""
        return jnp.sum(state.count >= jnp.asarray(starts, jnp.int32)) if plateau is None else state.drops

    def scheduled(rates: Sequence[float], index, state: SgdState):
        """Of one rate for each stage, the one to use."""
        rate = jnp.asarray(rates)[index]
        return rate if rate_factor is None else rate * rate_factor(state.count)

    def init(params):
        velocity = jax.tree.map(jnp.zeros_like, params)
        return SgdState(velocity, jnp.int32(0), jnp.int32(0), jnp.float32(jnp.inf), jnp.int32(0))  # one buffer each

    def update(grads, state, params):
        index = stage_index(state)

        def array_rate(path):
            layer, part = path[0].key, path[-1].key
            fixed = learning_rate * layer_rates.get(layer, 1.0) * (bias_rate if part == 'bias' else 1.0)
            return scheduled([fixed * stage.factor(layer, part) for stage in stages], index, state)

        def velocity(path, v, g, w):
            rate = array_rate(path)
            decay = bias_decay if path[-1].key == 'bias' else layer_decays.get(path[0].key, weight_decay)
            scale = rate if rate_in_velocity else 1.0
            if trust_ratio is not None:
                scale *= trust_ratio(w, g, decay)
            return jnp.where(rate > 0, momentum * v - decay * scale * w - scale * g, v).astype(w.dtype)

        def change(path, v):
            rate = array_rate(path)
            return jnp.where(rate > 0, v if rate_in_velocity else rate * v, 0).astype(v.dtype)

        new = jax.tree.map_with_path(velocity, state.velocity, grads, params)
        updates = jax.tree.map_with_path(change, new)
        return updates, state._replace(velocity=new, count=state.count + 1)

    def base_rate(state: SgdState):
        return scheduled([learning_rate * stage.weights for stage in stages], stage_index(state), state)

    return Optimizer(optax.GradientTransformation(init, update), base_rate, functools.partial(_decide, plateau))


def _decide(plateau: Plateau | None, state: SgdState, error) -> SgdState:
    """Counts a validation; drops the rate where too many in a row brought no gain."""
    if plateau is None:
        return state
    error = jnp.asarray(error, jnp.float32)
    gained = error < state.best_error - plateau.min_delta
    count = jnp.where(gained, 0, state.plateau_count + 1)
    drop = (count >= plateau.patience) & (state.drops < plateau.max_drops)
    return state._replace(
        best_error=jnp.where(gained, error, state.best_error),
        plateau_count=jnp.where(drop, 0, count),
        drops=state.drops + drop,
    )
