"""The paper's update as a chain of optax transformations, and the two ways its rates fall.  Section 5.

The paper writes its update with the rate inside the velocity:

    v <- momentum * v - decay * rate * w - rate * gradient
    w <- w + v

In optax's parts that is `chain(add_decayed_weights, scale_by_learning_rate, trace)`. With the last two in the other
order it is `torch.optim.SGD` (and `optax.sgd`), which has the rate outside:

    v <- momentum * v + decay * w + gradient
    w <- w - rate * v

The two differ where the rate drops: the paper's velocity keeps its old scale, PyTorch's takes the new one at once. The
authors' code (`src/weights.cu`) and Caffe's are as the paper.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class PlateauState(NamedTuple):
    """What validations have decided; only `Optimizer.after_validation` changes it."""

    drops: jax.Array  # int32: drops of the learning rate
    best_error: jax.Array  # float32, percent: lowest validation error so far
    count: jax.Array  # type: ignore[assignment]  # not tuple.count. int32: validations since it improved


class SgdState(NamedTuple):
    """All the update remembers; every scalar is an array, so that a checkpoint holds it."""

    count: jax.Array  # type: ignore[assignment]  # not tuple.count. int32: updates so far
    plateau: PlateauState
    chain: Any  # of optax's transformations

    @property
    def velocity(self) -> Any:
        """Shaped like the parameters."""
        return optax.tree.get(self.chain, 'trace')


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

    def decide(self, state: PlateauState, error: jax.typing.ArrayLike) -> PlateauState:
        """Counts a validation; drops the rate where too many in a row brought no gain. error: top-1, percent."""
        error = jnp.asarray(error, jnp.float32)
        gained = error < state.best_error - self.min_delta
        count = jnp.where(gained, 0, state.count + 1)
        drop = (count >= self.patience) & (state.drops < self.max_drops)
        best = jnp.where(gained, error, state.best_error)
        return PlateauState(state.drops + drop, best, jnp.where(drop, 0, count))


@dataclasses.dataclass(frozen=True)
class RateTable:
    """The learning rate of every array: by stage, layer and kind of parameter."""

    stages: Sequence[Stage]  # the first from epoch 0 on
    learning_rate: float  # of the first stage; 0.01 in the paper
    steps_per_epoch: float  # updates a pass takes; need not be whole
    # Multiplies the rate of biases. The paper has one rate for all; 2 in the authors' files and Caffe's (`lr_mult`).
    bias_rate: float = 1.0
    layer_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)  # multiply all of a layer; 0 freezes it
    plateau: Plateau | None = None  # None: stages follow one another by epoch; else validations decide
    warmup: Callable[[jax.Array], jax.Array] | None = None  # count of updates -> what multiplies every rate

    def _now(self, rates: Sequence[float], state: SgdState) -> jax.Array:
        """Of one rate for each stage, that of the next update."""
        starts = [round(stage.start * self.steps_per_epoch) for stage in self.stages[1:]]
        stage = state.plateau.drops if self.plateau else jnp.sum(state.count >= jnp.asarray(starts, jnp.int32))
        rate = jnp.asarray(rates)[stage]
        return rate if self.warmup is None else rate * self.warmup(state.count)

    def base(self, state: SgdState) -> jax.Array:
        """The rate of weights in layers without their own."""
        return self._now([self.learning_rate * stage.weights for stage in self.stages], state)

    def of(self, params: Any, state: SgdState) -> Any:
        """The rate of each array of `params`, {layer: {'kernel', 'bias'}}."""

        def rate(path: tuple[Any, ...], _: Any) -> jax.Array:
            layer, part = path[0].key, path[-1].key
            fixed = self.learning_rate * self.layer_rates.get(layer, 1.0) * (self.bias_rate if part == 'bias' else 1.0)
            return self._now([fixed * stage.factor(layer, part) for stage in self.stages], state)

        return jax.tree.map_with_path(rate, params)


class Optimizer(NamedTuple):
    """The update, and how its rate is known and decided."""

    tx: optax.GradientTransformation
    learning_rate: Callable[[SgdState], jax.Array]  # of the next update
    after_validation: Callable[[SgdState, Any], SgdState]  # takes the validation top-1 error in percent


@dataclasses.dataclass(frozen=True)
class DecayTable:
    """The decay of every array: its factor, which the update multiplies by the learning rate."""

    weights: float = 0.0005  # as in the paper
    # 0 in the paper's config: its update has one w, but the authors' code (and Caffe's) decays weights only.
    # `torch.optim.SGD` decays both alike.
    biases: float = 0.0
    layers: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of that layer's weights, instead

    def of(self, layer: str, part: str) -> float:
        """The factor of one array: part is 'kernel' or 'bias'."""
        return self.biases if part == 'bias' else self.layers.get(layer, self.weights)


def add_decays(table: DecayTable) -> optax.GradientTransformation:
    """Adds decay * w to each gradient: one `optax.add_decayed_weights` for each factor of the table."""

    def mask(factor: float, params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: table.of(path[0].key, path[-1].key) == factor, params)

    factors = sorted({table.weights, table.biases, *table.layers.values()})
    return optax.chain(*(optax.add_decayed_weights(f, functools.partial(mask, f)) for f in factors))


def make_optimizer(
    rates: RateTable,
    decay: optax.GradientTransformation,
    *,
    momentum: float = 0.9,
    rate_in_velocity: bool = True,
) -> Optimizer:
    """Stochastic gradient descent as the module's docstring writes it.

    An array whose rate is 0 is frozen: neither it nor its velocity change. (The bare chain would go on moving it by its
    velocity; `optax.partition` would rewrite the state, so that no checkpoint could be restored with other layers
    frozen.)

    Args:
      rates: of every array.
      decay: comes before the rate: `add_decays`, or what a large batch needs in its place.
      momentum: 0.9 in the paper.
      rate_in_velocity: False is `torch.optim.SGD`.
    """
    scale, trace = _scale_by_rates(), _hold_where_rate_is_0(optax.trace(momentum))
    chain = optax.chain(decay, *((scale, trace) if rate_in_velocity else (trace, scale)))

    def init(params: Any) -> SgdState:
        plateau = PlateauState(jnp.int32(0), jnp.float32(jnp.inf), jnp.int32(0))  # a buffer each
        return SgdState(jnp.int32(0), plateau, chain.init(params))

    def update(grads: Any, state: SgdState, params: Any) -> tuple[Any, SgdState]:
        updates, new = chain.update(grads, state.chain, params, rates=rates.of(params, state))
        return updates, state._replace(count=state.count + 1, chain=new)

    def after_validation(state: SgdState, error: jax.typing.ArrayLike) -> SgdState:
        return state if rates.plateau is None else state._replace(plateau=rates.plateau.decide(state.plateau, error))

    return Optimizer(optax.GradientTransformation(init, update), rates.base, after_validation)


def _scale_by_rates() -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_learning_rate` with a rate for each array, given to `update` as `rates`."""

    def update(updates: Any, state: Any, params: Any = None, *, rates: Any) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda rate, u: -rate * u, rates, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _hold_where_rate_is_0(trace: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optax.trace`, but where an array's rate is 0 its velocity stays and its update is 0."""

    def update(updates: Any, state: Any, params: Any = None, *, rates: Any) -> tuple[Any, Any]:
        _, new = trace.update(updates, state, params)
        held = jax.tree.map(lambda rate, a, b: jnp.where(rate > 0, a, b), rates, new.trace, state.trace)
        return jax.tree.map(lambda rate, v: jnp.where(rate > 0, v, 0), rates, held), new._replace(trace=held)

    return optax.GradientTransformationExtraArgs(trace.init, update)
