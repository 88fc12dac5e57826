"""Ensembles: weighted averages of softmax outputs (section 6), and a search for the weights. Uses numpy only."""

from collections.abc import Sequence

import numpy as np

from alexnet_jax.utils.errors import UserError

_GRID = np.arange(21) / 20  # 0, 0.05 ... 1
_START, _PASSES = 0.5, 5


def average(probabilities: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Returns the weighted mean [N, K] of softmax outputs.

    Raises UserError if a weight is negative, all are 0, or their number differs from the number of networks.

    >>> networks = [np.array([[0.8, 0.2]]), np.array([[0.4, 0.6]])]
    >>> average(networks, [1, 1]).round(3), average(networks, [1, 3]).round(3)
    (array([[0.6, 0.4]]), array([[0.5, 0.5]]))
    """
    if len(weights) != len(probabilities) or not min(weights) >= 0 or not 0 < sum(weights) < np.inf:
        raise UserError(
            f'weights {", ".join(map(str, weights))} for {len(probabilities)} networks: expected one weight per '
            'network, none negative and not all 0.'
        )
    total = float(sum(weights))
    return np.asarray(sum(np.float32(w / total) * p for w, p in zip(weights, probabilities, strict=True)))


def tune_weights(probabilities: Sequence[np.ndarray], labels: np.ndarray) -> list[float]:
    """Searches for the weights with the lowest top-5 error, as `avg-valid.py` of the authors' release does.

    Starts with 0.5 for each network. Tries 0, 0.05, ..., 1 for one weight after the other, in at most five passes.
    A weight changes only if the error decreases. probabilities: float [N, K] of each network. labels: int [N].
    """
    weights = [_START] * len(probabilities)
    lowest = _top5_errors(average(probabilities, weights), labels)
    for _ in range(_PASSES):
        before = list(weights)
        for i, own in enumerate(probabilities):
            weighted = zip(weights, probabilities, strict=True)
            others = sum(np.float32(w) * p for j, (w, p) in enumerate(weighted) if j != i)
            for weight in _GRID if any(weights[:i] + weights[i + 1 :]) else _GRID[1:]:  # not all weights may be 0
                errors = _top5_errors(others + np.float32(weight) * own, labels)
                if errors < lowest:
                    lowest, weights[i] = errors, float(weight)
        if weights == before:
            break
    return weights


def _top5_errors(scores: np.ndarray, labels: np.ndarray) -> int:
    """Counts the images whose label is not among the five highest scores. Ties go to the lower class index."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = np.arange(scores.shape[1])[None] < labels[:, None]
    return int(((scores > own).sum(1) + ((scores == own) & before).sum(1) >= 5).sum())
