"""Parts of later training recipes, all off in configs/paper.py: LARS, warm-up, cosine and polynomial schedules, label
smoothing, mixup, average of the parameters. The functions of core/ take them as arguments.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from alexnet_jax.core import metrics
from alexnet_jax.core.augment import Batch
from alexnet_jax.core.optim import DecayTable


def add_decays_with_lars(
    table: DecayTable, *, trust_coefficient: float, clip: bool = False
) -> optax.GradientTransformationExtraArgs:
    """LARS (You, Gitman and Ginsburg 2017, and their released code). Replaces `optim.add_decays`.

    Multiplies `gradient + decay * w` of each array by `trust_coefficient * |w| / (|gradient| + decay * |w|)`, or by 1
    if w or the gradient is 0. This adapts the large learning rate of a large batch to each layer.
    `optax.scale_by_trust_ratio` differs: it divides by `|gradient + decay * w|`.

    With `clip` (NVIDIA's Caffe: `larc: true`, `larc_policy: "clip"`), the rate of each array is the smaller of its
    learning rate and `trust_coefficient * |w| / |gradient|`, instead of their product.
    """

    def scaled(path, gradient, w, rate):
        decay = table.of(path[0].key, path[-1].key)
        w_norm, gradient_norm = jnp.linalg.norm(w), jnp.linalg.norm(gradient)
        ratio = trust_coefficient * w_norm / (gradient_norm + (0.0 if clip else decay * w_norm))
        ratio = jnp.where((w_norm > 0) & (gradient_norm > 0), ratio, 1.0)
        if clip:
            ratio = jnp.minimum(1.0, ratio / rate)
        return ratio * (gradient + decay * w)

    def update(grads: Any, state: Any, params: Any = None, *, rates: Any) -> tuple[Any, Any]:
        return jax.tree.map_with_path(scaled, grads, params, rates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def warmup(count: Array, steps: int, *, start: float) -> Array:
    """Learning-rate factor that rises linearly from `start` to 1 over `steps` updates (Goyal et al. 2017).

    >>> print(warmup(jnp.arange(6), 4, start=0))
    [0.25 0.5  0.75 1.   1.   1.  ]
    """
    return jnp.minimum(1.0, start + (1 - start) * (count + 1) / steps)


def cosine(count: Array, warmup_steps: int, total_steps: int) -> Array:
    """Learning-rate factor that falls from 1 to 0 along half a cosine (Loshchilov and Hutter 2017, without restarts).

    It is 1 during warm-up and reaches 0 after the last update.
    """
    progress = (count - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + jnp.cos(math.pi * jnp.clip(progress, 0, 1)))


def poly(count: Array, warmup_steps: int, total_steps: int, *, start: float) -> Array:
    """Learning-rate factor of NVIDIA's Caffe for `lr_policy: "poly"` and `power: 2` (`sgd_solver.cpp:GetLearningRate`).

    In warm-up it rises from `start` toward 1 with the square of the number of updates. Then it is
    (1 - count / total_steps)^2, so that it drops at the end of warm-up: the decay counts from the first update.
    """
    rise = start + (1 - start) * (count / max(1, warmup_steps)) ** 2
    return jnp.where(count < warmup_steps, rise, jnp.clip(1 - count / total_steps, 0) ** 2)


class AverageState(NamedTuple):
    """State of `average_params`."""

    average: Any  # a tree like the parameters
    updates: Array  # int32: updates so far


def average_params(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the parameters in its state (Polyak and Juditsky 1992).

    The average after update t = 0, 1, ... is `d * average + (1 - d) * w`, where d is the smaller of `decay` and
    t / (t + 10), so that early parameters do not dominate a short run. TensorFlow's ExponentialMovingAverage has
    (1 + t) / (10 + t); here the initial parameters have no weight. Updates pass through unchanged.
    """

    def init(params: Any) -> AverageState:
        return AverageState(jax.tree.map(jnp.copy, params), jnp.int32(0))  # copied: a buffer cannot be donated twice

    def update(updates: Any, state: AverageState, params: Any) -> tuple[Any, AverageState]:
        new = optax.apply_updates(params, updates)
        weight = 1 - jnp.minimum(decay, state.updates / (state.updates + 10))
        return updates, AverageState(optax.incremental_update(new, state.average, weight), state.updates + 1)

    return optax.GradientTransformation(init, update)


def mixup(x_NHWC: Array, batch: Batch, key: Array, *, alpha: float) -> tuple[Array, Batch]:
    """Mixes pairs of images, with their labels (Zhang et al. 2018).

    Each image becomes m * image + (1 - m) * other. The pairs are the images 2i and 2i + 1 of the batch, so that no data
    moves between devices; the order of the images is random anyway. As in the authors' code, a batch has one m, drawn
    from Beta(alpha, alpha). An image whose partner has weight 0 (padding, unreadable) stays as it is.

    Args:
      x_NHWC: float [N, s, s, 3], preprocessed; N is even.
      batch: 'label' int [N] and 'weight' [N].
      key: random key of this step.
      alpha: above 0; 0.2 for ImageNet in the paper.

    Returns:
      The mixed images, and the batch with the additional keys 'other_label' int [N] and 'mix' float [N], m.
    """

    def swapped(a: Array) -> Array:
        return a.reshape(-1, 2, *a.shape[1:])[:, ::-1].reshape(a.shape)

    both = (batch['weight'] > 0) & (swapped(batch['weight']) > 0)
    mix_N = jnp.where(both, jax.random.beta(key, alpha, alpha, dtype=jnp.float32), 1.0).astype(x_NHWC.dtype)
    mix_N111 = mix_N[:, None, None, None]
    mixed = mix_N111 * x_NHWC + (1 - mix_N111) * swapped(x_NHWC)
    return mixed, {**batch, 'other_label': swapped(batch['label']), 'mix': mix_N}


def log_likelihood(logits_NK: Array, batch: Batch, *, smoothing: float) -> Array:
    """Returns the negative cross-entropy with smoothed (Szegedy et al. 2016) and mixed labels, float [N].

    The target is (1 - smoothing) * p + smoothing / K, where p is the distribution of the label, or of two labels after
    `mixup`.
    """
    log_p = jax.nn.log_softmax(logits_NK)
    likelihood = metrics.take_label(log_p, batch['label'])
    if 'mix' in batch:
        mix, other = batch['mix'], metrics.take_label(log_p, batch['other_label'])
        likelihood = mix * likelihood + (1 - mix) * other
    return (1 - smoothing) * likelihood + smoothing * log_p.mean(-1)


def optimizer_hooks(fields: Mapping[str, Any], steps_per_epoch: float, total_steps: int) -> dict[str, Any]:
    """Returns keyword arguments of `config.optimizer_from_config` for a config's `optim`; {} if all parts are off."""
    hooks: dict[str, Any] = {}
    if trust_coefficient := fields['trust_coefficient']:
        options = {'trust_coefficient': trust_coefficient, 'clip': fields['trust_clip']}
        hooks['decay'] = functools.partial(add_decays_with_lars, **options)
    factors: list[Callable[[Array], Array]] = []
    steps, start = round(fields['warmup_epochs'] * steps_per_epoch), fields['warmup_start']
    if fields['schedule'] == 'poly':  # has its own warm-up
        factors.append(functools.partial(poly, warmup_steps=steps, total_steps=total_steps, start=start))
    elif steps:
        factors.append(functools.partial(warmup, steps=steps, start=start))
    if fields['schedule'] == 'cosine':
        factors.append(functools.partial(cosine, warmup_steps=steps, total_steps=total_steps))
    if factors:
        hooks['factor'] = lambda count: math.prod(factor(count) for factor in factors)
    if decay := fields['average_decay']:
        hooks['average'] = average_params(decay)
    return hooks


def step_hooks(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns keyword arguments of `train_step.train_step` for a config; empty if mixup and smoothing are off."""
    alpha, smoothing = config['data']['mixup_alpha'], config['optim']['label_smoothing']
    hooks: dict[str, Any] = {}
    if alpha:
        hooks['mix'] = functools.partial(mixup, alpha=alpha)
    if alpha or smoothing:
        hooks['likelihood'] = functools.partial(log_likelihood, smoothing=smoothing)
    return hooks
