"""Error rates against a sort, and the rule for ties against an enumeration of all orders."""

import itertools

import chex
import jax
import numpy as np

from alexnet_jax.core import metrics


def test_errors_and_loss_match_numpy():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((50, 20)).astype(np.float32), rng.integers(0, 20, 50)
    weight = (rng.random(50) < 0.7).astype(np.float32)
    best = np.argsort(-logits, axis=1)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    keep = weight > 0
    found = metrics.means(metrics.sums(metrics.log_likelihood(logits, labels), logits, labels, weight))
    top1 = (best[:, 0] != labels)[keep].mean()
    top5 = (best[:, :5] != labels[:, None]).all(1)[keep].mean()
    loss = -np.log(p[np.arange(50), labels])[keep].mean()
    chex.assert_trees_all_close(found, {'loss': loss, 'top1_error': 100 * top1, 'top5_error': 100 * top5}, rtol=1e-5)


def test_log_likelihood_of_invalid_label_is_nan():
    found = metrics.log_likelihood(np.zeros((4, 3), np.float32), np.array([-1, 0, 2, 3]))
    chex.assert_trees_all_close(found, np.array([np.nan, -np.log(3), -np.log(3), np.nan], np.float32), rtol=1e-6)


def test_ties_count_as_fractions():
    """The error is its expectation when tied classes are ordered at random; all orders are enumerated."""
    scores, label, k = np.array([[3.0, 1.0, 1.0, 1.0, 0.0]]), 2, 3
    misses = 0
    orders = list(itertools.permutations(range(5)))
    for order in orders:
        ranking = sorted(range(5), key=lambda c: (-scores[0, c], order[c]))
        misses += label not in ranking[:k]
    chex.assert_trees_all_close(
        metrics.top_k_error(scores, np.array([label]), k), np.array([misses / len(orders)]), rtol=1e-6
    )


def test_nan_scores_count_as_errors():
    chex.assert_trees_all_equal(metrics.top_k_error(np.full((1, 10), np.nan), np.array([0]), 5), np.ones(1))
    # A network with equal scores for all classes has the error of guessing.
    chex.assert_trees_all_close(metrics.top_k_error(np.zeros((1, 10)), np.array([0]), 1), np.array([0.9]), rtol=1e-6)


def test_nan_in_padding_is_ignored():
    sums = metrics.sums(
        np.array([-1.0, np.nan], np.float32), np.zeros((2, 4), np.float32), np.array([0, 0]), np.array([1.0, 0.0])
    )
    assert jax.device_get(sums)['loss'] == 1 and sums['weight'] == 1
