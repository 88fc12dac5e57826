"""The paper's update rule as an optax transformation, and the two ways its rates fall."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from alexnet_jax.errors import UserError, did_you_mean


class SgdState(NamedTuple):
    """All the update remembers; every scalar is an array, so that a checkpoint holds it."""

    velocity: Any  # shaped like the parameters
    count: jax.Array  # int32: updates so far
    drops: jax.Array  # int32: drops of the learning rate decided by validation
    best_error: jax.Array  # float32, percent: lowest validation error so far
    stale: jax.Array  # int32: validations since it improved


class Stage(NamedTuple):
    """Factors of the rates from an epoch on."""

    start: float  # epoch
    weights: float
    biases: float
    layers: tuple[tuple[str, float, float], ...] = ()  # (layer, of its weights, of its biases): those with their own

    def factor(self, layer: str, part: str) -> float:
        own = {name: (weights, biases) for name, weights, biases in self.layers}
        weights, biases = own.get(layer, (self.weights, self.biases))
        return biases if part == 'bias' else weights


class Optimizer(NamedTuple):
    """The update, and how its rate is known and decided."""

    tx: optax.GradientTransformation
    learning_rate: Callable[[SgdState], jax.Array]  # of the next update
    after_validation: Callable[[SgdState, Any], SgdState]  # takes the validation top-1 error in percent


def make_optimizer(
    *,
    learning_rate: float,
    bias_rate: float,
    layer_rates: tuple[tuple[str, float], ...],
    momentum: float,
    rate_in_velocity: bool,
    weight_decay: float,
    bias_decay: float,
    layer_decays: tuple[tuple[str, float], ...],
    trust: float,
    warmup_epochs: float,
    schedule: str,
    drop_factor: float,
    max_drops: int,
    patience: int,
    min_gain: float,
    stages: tuple[tuple, ...],
    steps_per_epoch: float,
    layers: Sequence[str],
) -> Optimizer:
    """Stochastic gradient descent as section 5 writes it, with the rate inside the velocity.

        v <- momentum * v - decay * rate * w - rate * gradient
        w <- w + v

    So a velocity keeps its old scale across a drop of the rate (`optax.sgd` scales it down at once). The authors' code
    (`src/weights.cu`) and Caffe's do the same. An array whose rate is 0 is frozen: neither it nor its velocity change.

    Args:
      learning_rate: the first rate; 0.01 in the paper.
      bias_rate: multiplies the rate of biases. The paper has one rate for all; 2 at first in the authors' files, and in
        Caffe's (`lr_mult`).
      layer_rates: (layer, factor) multiplies the rate of that layer's weights and biases; 0 freezes it.
      momentum: 0.9 in the paper.
      rate_in_velocity: False is `torch.optim.SGD`: v <- momentum * v - decay * w - gradient; w <- w + rate * v.
      weight_decay: of weights; 0.0005 in the paper.
      bias_decay: of biases; 0 in the paper's config: its update has one w, but the authors' code (and Caffe's) decays
        weights only. `torch.optim.SGD` decays both alike.
      layer_decays: (layer, decay): of that layer's weights, instead of weight_decay.
      trust: LARS (You, Gitman and Ginsburg 2017, and the code they released): the rate of each array is multiplied by
        trust * |w| / (|gradient| + decay * |w|), by 1 where w or the gradient is 0, so that the rate of a large batch
        suits every layer; 0: off.
      warmup_epochs: the rate rises in equal steps to its value over so many epochs (Goyal et al. 2017); 0: off.
      schedule: 'plateau' divides the rate when validation stalls; 'epochs' follows `stages`.
      drop_factor: what a drop on 'plateau' multiplies the rate by; 0.1 in the paper.
      max_drops: at most so many on 'plateau'; three in the paper.
      patience: a drop comes after so many validations in a row without a gain.
      min_gain: percentage points by which the error must fall below its best to count as a gain.
        Deviation: the paper dropped the rate by hand, "when the validation error rate stopped improving".
      stages: on 'epochs': rows with the fields of `Stage`.
      steps_per_epoch: updates a pass takes; need not be whole.
      layers: names of the network's layers.

    Raises:
      UserError: an unknown schedule or layer, or a value outside its range.
    """
    if schedule not in ('plateau', 'epochs'):
        raise UserError(f"optim.schedule={schedule!r}; expected 'plateau' or 'epochs'.")
    for name, value, right in (
        ('learning_rate', learning_rate, 0 <= learning_rate < math.inf),
        ('bias_rate', bias_rate, 0 <= bias_rate < math.inf),
        ('momentum', momentum, 0 <= momentum < 1),
        ('weight_decay', weight_decay, 0 <= weight_decay < math.inf),
        ('bias_decay', bias_decay, 0 <= bias_decay < math.inf),
        ('trust', trust, 0 <= trust < math.inf),
        ('warmup_epochs', warmup_epochs, 0 <= warmup_epochs < math.inf),
        ('drop_factor', drop_factor, 0 < drop_factor <= 1),
        ('patience', patience, patience >= 1),
        ('max_drops', max_drops, max_drops >= 0),
        ('min_gain', min_gain, min_gain >= 0),
    ):
        if not right:
            raise UserError(f'optim.{name}={value} is out of range; see configs/paper.py.')
    _check_rows('layer_rates', layer_rates, 2, layers)
    _check_rows('layer_decays', layer_decays, 2, layers)
    if schedule == 'plateau':
        rows = [Stage(0.0, drop_factor**i, drop_factor**i) for i in range(max_drops + 1)]
    else:
        rows = _check_stages(stages, layers)
    starts = [round(row.start * steps_per_epoch) for row in rows]
    warmup_steps = round(warmup_epochs * steps_per_epoch)

    def stage(state: SgdState):
        """Which row holds for the next update."""
        return state.drops if schedule == 'plateau' else jnp.sum(state.count >= jnp.asarray(starts[1:], jnp.int32))

    def warmed(rate, state: SgdState):
        return rate * jnp.minimum(1.0, (state.count + 1) / warmup_steps) if warmup_steps else rate

    def rate(state: SgdState):
        return warmed(jnp.asarray([learning_rate * row.weights for row in rows])[stage(state)], state)

    def rates_of(layer: str, part: str) -> list[float]:
        """The rates of one array, one for each of `rows`."""
        fixed = learning_rate * dict(layer_rates).get(layer, 1.0) * (bias_rate if part == 'bias' else 1.0)
        return [fixed * row.factor(layer, part) for row in rows]

    def init(params):
        return SgdState(
            velocity=jax.tree.map(jnp.zeros_like, params),
            count=jnp.int32(0),
            drops=jnp.int32(0),
            best_error=jnp.float32(jnp.inf),
            stale=jnp.int32(0),
        )

    def update(grads, state, params):
        now = stage(state)

        def rate_now(path):
            return warmed(jnp.asarray(rates_of(path[0].key, path[-1].key))[now], state)

        def velocity(path, v, g, w):
            step, own = rate_now(path), dict(layer_decays).get(path[0].key, weight_decay)
            decay = bias_decay if path[-1].key == 'bias' else own
            scale = step if rate_in_velocity else 1.0
            if trust:
                w_norm, g_norm = jnp.linalg.norm(w), jnp.linalg.norm(g)
                ratio = trust * w_norm / (g_norm + decay * w_norm)
                scale *= jnp.where((w_norm > 0) & (g_norm > 0), ratio, 1.0)
            return jnp.where(step > 0, momentum * v - decay * scale * w - scale * g, v).astype(w.dtype)

        def change(path, v):
            step = rate_now(path)
            return jnp.where(step > 0, v if rate_in_velocity else step * v, 0).astype(v.dtype)

        new = jax.tree.map_with_path(velocity, state.velocity, grads, params)
        updates = jax.tree.map_with_path(change, new)
        return updates, state._replace(velocity=new, count=state.count + 1)

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


def _check_stages(stages, layers: Sequence[str]) -> list[Stage]:
    for row in stages:
        if not isinstance(row, tuple | list) or len(row) != 4 or not all(map(_is_rate, row[:3])):
            raise UserError(
                f'optim.stages has the row {row!r}; expected (first epoch, factor for weights, factor for biases, '
                'layers with factors of their own).'
            )
        _check_rows('stages', row[3], 3, layers)
    starts = [row[0] for row in stages]
    if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
        raise UserError(f'optim.stages begins at the epochs {starts}; expected rising ones from 0.')
    return [Stage(*row) for row in stages]


def _check_rows(key: str, rows, length: int, layers: Sequence[str]) -> None:
    for row in rows if isinstance(rows, tuple | list) else [rows]:
        if not isinstance(row, tuple | list) or len(row) != length or not all(map(_is_rate, row[1:])):
            raise UserError(f'optim.{key} has {row!r}; expected a layer and {length - 1} factor(s) of 0 or more.')
        if row[0] not in layers:
            raise UserError(f'optim.{key} names a layer {row[0]!r}.{did_you_mean(str(row[0]), layers)}')
    names = [row[0] for row in rows]
    if len(set(names)) < len(names):
        raise UserError(f'optim.{key} names a layer twice: {", ".join(names)}.')


def _is_rate(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
