"""Errors against a sort, and the tie rule against a count of all orders."""

import itertools

import chex
import jax
import numpy as np

from alexnet_jax.core import metrics


def test_errors_and_loss_against_numpy():
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


def test_a_label_of_no_class_is_no_loss_of_0():
    found = metrics.log_likelihood(np.zeros((4, 3), np.float32), np.array([-1, 0, 2, 3]))
    chex.assert_trees_all_close(found, np.array([np.nan, -np.log(3), -np.log(3), np.nan], np.float32), rtol=1e-6)


def test_ties_count_their_share():
    """The error expected when tied classes are put in random order: all orders counted."""
    scores, label, k = np.array([[3.0, 1.0, 1.0, 1.0, 0.0]]), 2, 3
    misses = 0
    orders = list(itertools.permutations(range(5)))
    for order in orders:
        ranking = sorted(range(5), key=lambda c: (-scores[0, c], order[c]))
        misses += label not in ranking[:k]
    chex.assert_trees_all_close(
        metrics.top_k_error(scores, np.array([label]), k), np.array([misses / len(orders)]), rtol=1e-6
    )


def test_scores_that_are_no_numbers_are_errors():
    chex.assert_trees_all_equal(metrics.top_k_error(np.full((1, 10), np.nan), np.array([0]), 5), np.ones(1))
    # A network that cannot tell any two classes apart has the error of guessing.
    chex.assert_trees_all_close(metrics.top_k_error(np.zeros((1, 10)), np.array([0]), 1), np.array([0.9]), rtol=1e-6)


def test_padding_with_nan_does_not_count():
    sums = metrics.sums(
        np.array([-1.0, np.nan], np.float32), np.zeros((2, 4), np.float32), np.array([0, 0]), np.array([1.0, 0.0])
    )
    assert jax.device_get(sums)['loss'] == 1 and sums['weight'] == 1
