"""Loss and error rates, accumulated as sums over images and divided by their number at the end."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NAMES = ('loss', 'top1', 'top5', 'weight')
AnyArray = jax.Array | np.ndarray
Sums = dict[str, Any]  # a sum over images for each of NAMES: arrays on the device, or floats


def log_likelihood(logits_NK: AnyArray, label_N: AnyArray) -> jax.Array:
    """Returns the log-probability of the true class, float [N] (section 3.5: softmax, multinomial log-likelihood).

    `logits_NK` is float [N, K], `label_N` int [N]. Nothing is gathered along K: if the classes are split over devices,
    XLA adds only all-reduces.
    """
    return take_label(jax.nn.log_softmax(logits_NK), label_N)


def take_label(x_NK: AnyArray, label_N: AnyArray) -> jax.Array:
    """Returns each row's entry at its label, float [N]; NaN if the label is not one of the K classes."""
    count = x_NK.shape[-1]
    entry = jnp.sum(jnp.where(jnp.arange(count)[None] == label_N[:, None], x_NK, 0), axis=-1)
    return jnp.where((label_N >= 0) & (label_N < count), entry, jnp.nan)


def top_k_error(score_NK: AnyArray, label_N: AnyArray, k: int) -> jax.Array:
    """Returns the top-k error of each image, float [N], 0 to 1, from the number of scores above the true class's.

    A tie counts as the expected error over random orders: with `above` scores above and `tied` scores equal (including
    the true class), the true class is among the first k with probability (k - above) / tied, as in `LogregCostLayer` of
    the authors' src/layer.cu. NaN scores count as errors.
    Deviation: the paper's "not among the five" does not say how ties count.

    The first label has the highest score; the second ties for it:

    >>> print(top_k_error(np.array([[3, 2, 1], [5, 5, 0]]), np.array([0, 1]), k=1))
    [0.  0.5]
    """
    score_N1 = take_label(score_NK, label_N)[:, None]
    above = jnp.sum(score_NK > score_N1, axis=-1)
    tied = jnp.sum(score_NK == score_N1, axis=-1)
    hit = jnp.clip((k - above) / jnp.maximum(tied, 1), 0, 1)
    return jnp.where(tied > 0, 1 - hit, 1.0)


def sums(log_likelihood_N: AnyArray, score_NK: AnyArray, label_N: AnyArray, weight_N: AnyArray) -> Sums:
    """Returns the sums over a batch, each a scalar. Images of weight 0 (padding) do not count.

    `log_likelihood_N` is float [N], the log-probability of the true class; `score_NK` is float [N, K], logits or
    probabilities (only their order matters); `label_N` is int [N]; `weight_N` is float [N], 0 or 1.
    """
    weight = weight_N.astype(log_likelihood_N.dtype)

    def total(x_N: AnyArray) -> jax.Array:
        return jnp.sum(jnp.where(weight > 0, x_N * weight, 0))

    return {
        'loss': total(-log_likelihood_N),
        'top1': total(top_k_error(score_NK, label_N, 1)),
        'top5': total(top_k_error(score_NK, label_N, 5)),
        'weight': jnp.sum(weight),
    }


def merge(a: Sums | None, b: Sums) -> Sums:
    """Adds two sets of sums; None means no images."""
    return b if a is None else jax.tree.map(operator.add, a, b)


def means(total: Sums) -> dict[str, float]:
    """Returns means over all images: loss in nats, errors in percent (0 to 100) as in the paper.

    >>> means({'loss': 6.0, 'top1': 1.0, 'top5': 0.0, 'weight': 4.0})
    {'loss': 1.5, 'top1_error': 25.0, 'top5_error': 0.0}
    """
    count = float(total['weight'])
    return {
        'loss': float(total['loss']) / count,
        'top1_error': 100 * float(total['top1']) / count,
        'top5_error': 100 * float(total['top5']) / count,
    }
