"""The paper's update (section 5) as a chain of optax transformations, and two learning rate schedules.

The paper multiplies the gradient by the learning rate before adding it to the velocity:

    v <- momentum * v - decay * rate * w - rate * gradient
    w <- w + v

In optax this is `chain(add_decayed_weights, scale_by_learning_rate, trace)`. With the last two in reverse order, the
rate multiplies the velocity, as in `torch.optim.SGD` and `optax.sgd`:

    v <- momentum * v + decay * w + gradient
    w <- w - rate * v

The two differ when the rate drops: the paper's velocity keeps the old scale, but PyTorch's update uses the new rate
immediately. The authors' code (`src/weights.cu`) and Caffe follow the paper.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class PlateauState(NamedTuple):
    """State of the plateau schedule; only `Optimizer.after_validation` changes it."""

    drops: jax.Array  # int32: drops of the learning rate so far
    best_error: jax.Array  # float32, percent: validation error of the last improvement
    count: jax.Array  # type: ignore[assignment]  # not tuple.count. int32: validations since an improvement or drop


class SgdState(NamedTuple):
    """Optimizer state; scalars are arrays, so that a checkpoint holds them."""

    count: jax.Array  # type: ignore[assignment]  # not tuple.count. int32: updates so far
    plateau: PlateauState
    chain: Any  # state of the optax chain

    @property
    def velocity(self) -> Any:
        """The velocity, a tree like the parameters."""
        return optax.tree.get(self.chain, 'trace')

    @property
    def average(self) -> Any:
        """The average of the parameters over the updates, a tree like the parameters; None if it is not computed."""
        return optax.tree.get(self.chain, 'average')


class Stage(NamedTuple):
    """Learning rate factors that apply from an epoch on."""

    start: float  # epoch
    weights: float
    biases: float
    layers: tuple[tuple[str, float, float], ...] = ()  # overrides: (layer, factor of weights, factor of biases)

    def factor(self, layer: str, part: str) -> float:
        """Returns the factor of one array; `part` is 'kernel' or 'bias'."""
        overrides = {name: (weights, biases) for name, weights, biases in self.layers}
        weights, biases = overrides.get(layer, (self.weights, self.biases))
        return biases if part == 'bias' else weights


class Plateau(NamedTuple):
    """Moves to the next stage when the validation error stops improving.

    Deviation: the paper dropped the rate by hand, "when the validation error rate stopped improving".
    """

    patience: int  # consecutive validations without improvement before a drop
    min_delta: float  # percentage points by which the error must fall below the best to count as an improvement
    max_drops: int  # three in the paper

    def decide(self, state: PlateauState, error: jax.typing.ArrayLike) -> PlateauState:
        """Returns the state after a validation with a top-1 error in percent."""
        error = jnp.asarray(error, jnp.float32)
        improved = error < state.best_error - self.min_delta
        count = jnp.where(improved, 0, state.count + 1)
        drop = (count >= self.patience) & (state.drops < self.max_drops)
        best = jnp.where(improved, error, state.best_error)
        return PlateauState(state.drops + drop, best, jnp.where(drop, 0, count))


@dataclasses.dataclass(frozen=True)
class RateTable:
    """The learning rate of every array, by stage, layer and kind of parameter."""

    stages: Sequence[Stage]  # the first starts at epoch 0
    learning_rate: float  # of the first stage; 0.01 in the paper
    steps_per_epoch: float  # updates per epoch; may be fractional
    bias_rate: float = 1.0  # factor for biases: 1 in the paper, 2 in the authors' files and Caffe's (`lr_mult`)
    layer_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)  # factor by layer; 0 freezes the layer
    plateau: Plateau | None = None  # decides when a stage ends; None: stages start at their epochs
    factor: Callable[[jax.Array], jax.Array] | None = None  # number of updates -> factor of every rate

    def _current(self, rates: Sequence[float], state: SgdState) -> jax.Array:
        """Selects the rate of the next update from `rates`, one per stage."""
        starts = [round(stage.start * self.steps_per_epoch) for stage in self.stages[1:]]
        stage = state.plateau.drops if self.plateau else jnp.sum(state.count >= jnp.asarray(starts, jnp.int32))
        rate = jnp.asarray(rates)[stage]
        return rate if self.factor is None else rate * self.factor(state.count)

    def base(self, state: SgdState) -> jax.Array:
        """Returns the learning rate of weights in layers without overrides."""
        return self._current([self.learning_rate * stage.weights for stage in self.stages], state)

    def of(self, params: Any, state: SgdState) -> Any:
        """Returns the rate of each array of `params`, {layer: {'kernel', 'bias'}}."""

        def rate(path: tuple[Any, ...], _: Any) -> jax.Array:
            layer, part = path[0].key, path[-1].key
            fixed = self.learning_rate * self.layer_rates.get(layer, 1.0) * (self.bias_rate if part == 'bias' else 1.0)
            return self._current([fixed * stage.factor(layer, part) for stage in self.stages], state)

        return jax.tree.map_with_path(rate, params)


class Optimizer(NamedTuple):
    """An optax transformation, and functions that read and adjust its learning rate."""

    tx: optax.GradientTransformation
    learning_rate: Callable[[SgdState], jax.Array]  # rate of the next update
    after_validation: Callable[[SgdState, Any], SgdState]  # takes the validation top-1 error in percent


@dataclasses.dataclass(frozen=True)
class DecayTable:
    """The weight decay of every array, which the update multiplies by the learning rate."""

    weights: float = 0.0005  # the paper's value
    # 0 in the paper's config: the paper's update does not distinguish weights and biases, but the authors' code and
    # Caffe decay only weights. `torch.optim.SGD` decays both.
    biases: float = 0.0
    layers: Mapping[str, float] = dataclasses.field(default_factory=dict)  # overrides `weights` by layer

    def of(self, layer: str, part: str) -> float:
        """Returns the decay of one array; `part` is 'kernel' or 'bias'."""
        return self.biases if part == 'bias' else self.layers.get(layer, self.weights)


def add_decays(table: DecayTable) -> optax.GradientTransformation:
    """Adds decay * w to each gradient, with one `optax.add_decayed_weights` for each distinct decay."""

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
    average: optax.GradientTransformation | None = None,
) -> Optimizer:
    """Returns stochastic gradient descent as in the module docstring.

    An array whose rate is 0 is frozen: neither the array nor its velocity changes. (In the plain chain the velocity
    would still move it. `optax.partition` would change the state tree, so that a checkpoint could not be restored with
    other layers frozen.)

    `decay` is the transformation before the rate: `add_decays`, or a replacement for large batches. The paper's
    momentum is 0.9. With `rate_in_velocity=False` the update is that of `torch.optim.SGD`. `average`, at the end of the
    chain, keeps an average of the parameters in its state; the paper has none.

    A gradient of 1 at a rate of 0.1 gives the velocities -0.1 and 0.9 * -0.1 - 0.1:

    >>> rates = RateTable([Stage(0, 1, 1)], learning_rate=0.1, steps_per_epoch=1)
    >>> sgd = make_optimizer(rates, add_decays(DecayTable(weights=0)))
    >>> params = gradient = {'fc1': {'kernel': jnp.ones(1)}}
    >>> update, state = sgd.tx.update(gradient, sgd.tx.init(params), params)
    >>> print(update['fc1']['kernel'], sgd.tx.update(gradient, state, params)[0]['fc1']['kernel'])
    [-0.1] [-0.19]
    """
    scale, trace = _scale_by_rates(), _trace_unless_frozen(optax.trace(momentum))
    steps = (decay, scale, trace) if rate_in_velocity else (decay, trace, scale)
    chain = optax.chain(*steps, *([average] if average else []))

    def init(params: Any) -> SgdState:
        # Each scalar needs its own buffer, because a buffer cannot be donated twice.
        plateau = PlateauState(jnp.int32(0), jnp.float32(jnp.inf), jnp.int32(0))
        return SgdState(jnp.int32(0), plateau, chain.init(params))

    def update(grads: Any, state: SgdState, params: Any) -> tuple[Any, SgdState]:
        updates, new = chain.update(grads, state.chain, params, rates=rates.of(params, state))
        return updates, state._replace(count=state.count + 1, chain=new)

    def after_validation(state: SgdState, error: jax.typing.ArrayLike) -> SgdState:
        return state if rates.plateau is None else state._replace(plateau=rates.plateau.decide(state.plateau, error))

    return Optimizer(optax.GradientTransformation(init, update), rates.base, after_validation)


def _scale_by_rates() -> optax.GradientTransformationExtraArgs:
    """Like `optax.scale_by_learning_rate`, with one rate per array, passed to `update` as `rates`."""

    def update(updates: Any, state: Any, params: Any = None, *, rates: Any) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda rate, u: -rate * u, rates, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _trace_unless_frozen(trace: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Like `optax.trace`, except that an array with rate 0 keeps its velocity and gets a zero update."""

    def update(updates: Any, state: Any, params: Any = None, *, rates: Any) -> tuple[Any, Any]:
        _, new = trace.update(updates, state, params)
        velocity = jax.tree.map(lambda rate, a, b: jnp.where(rate > 0, a, b), rates, new.trace, state.trace)
        return jax.tree.map(lambda rate, v: jnp.where(rate > 0, v, 0), rates, velocity), new._replace(trace=velocity)

    return optax.GradientTransformationExtraArgs(trace.init, update)
