"""Compares representations: dissimilarity matrices (RDM), their correlation (RSA), linear CKA. Uses numpy only.

The rows of all arguments are the same images in the same order; the activations are those of two layers, networks or
seeds. Computations are in float64.

Sources: Kriegeskorte, Mur and Bandettini, "Representational similarity analysis" (2008); Nili et al., "A toolbox for
representational similarity analysis" (2014); Kornblith et al., "Similarity of neural network representations revisited"
(2019).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from alexnet_jax.utils.errors import UserError

_CLOSE = 1e-6  # a squared distance below this fraction of the squared norms is computed again, from the difference


class NoiseCeiling(NamedTuple):
    """Bounds of the mean correlation with several seeds' RDMs."""

    lower: float
    upper: float


def rdm(x_ND: Any, metric: str = 'correlation') -> np.ndarray:
    """Returns the representational dissimilarity matrix of N images: float64 [N, N], symmetric, zeros on the diagonal.

    Args:
      x_ND: activations, float [N, D] or [N, H, W, C], which is flattened; N >= 2.
      metric: 'correlation': 1 minus Pearson's correlation over the D units, from 0 to 2. 'euclidean': the Euclidean
        distance, not divided by the square root of D.

    Raises:
      UserError: the activations have another shape or values that are not finite; the metric is unknown; or, for
        'correlation', the activations of an image are all equal.

    >>> rdm([[1, 2, 3], [2, 4, 6], [3, 2, 1]]).round(3)
    array([[0., 0., 2.],
           [0., 0., 2.],
           [2., 2., 0.]])
    """
    _check_choice('metric', metric, ('correlation', 'euclidean'))
    x_ND = _activations('x_ND', x_ND, least=2)
    if metric == 'euclidean':
        return np.sqrt(_squared_distances(x_ND))
    if constant := int((np.ptp(x_ND, axis=1) == 0).sum()):
        raise UserError(
            f'the activations of {constant} of {len(x_ND)} images are all equal, so their correlation is undefined; '
            "leave these images out or use metric='euclidean'."
        )
    return _squared_distances(_standardize(x_ND)) / 2  # 1 - r = |u - v|^2 / 2 for vectors of norm 1


def rsa(rdm_a: Any, rdm_b: Any, method: str = 'spearman') -> float:
    """Returns the correlation of two RDMs over all pairs of images, the entries above the diagonal.

    Args:
      rdm_a: float [N, N] as from `rdm`; N >= 3.
      rdm_b: float [N, N].
      method: 'spearman', with average ranks for ties, or 'pearson'.

    Raises:
      UserError: an argument is not an RDM, their sizes differ, all entries of one are equal, or the method is unknown.

    >>> a, b = ([[0, 1, 2], [1, 0, 4], [2, 4, 0]], [[0, 2, 1], [2, 0, 3], [1, 3, 0]])  # pairs: 1, 2, 4 and 2, 1, 3
    >>> round(rsa(a, b), 6)  # ranks 1, 2, 3 and 2, 1, 3
    0.5
    """
    return _correlation(*_pairs({'rdm_a': rdm_a, 'rdm_b': rdm_b}, method))


def noise_ceiling(rdms_SNN: Sequence, method: str = 'spearman') -> NoiseCeiling:
    """Returns bounds of the mean `rsa` of one RDM with those of S seeds, given how much the seeds differ.

    The upper bound is the mean correlation of each seed with the mean of all, the lower bound with the mean of the
    others (Nili et al. 2014). Means are of ranks ('spearman') or of entries with mean 0 and norm 1 ('pearson').

    Args:
      rdms_SNN: one RDM per seed, float [S, N, N]; S >= 2, N >= 3.
      method: as for `rsa`.

    Raises:
      UserError: there is only one RDM, or as for `rsa`.
    """
    rdms = {f'rdms_SNN[{i}]': one for i, one in enumerate(rdms_SNN)}
    if len(rdms) < 2:
        raise UserError(f'rdms_SNN has length {len(rdms)}: expected the RDMs of two seeds or more.')
    rows_SP = _pairs(rdms, method)
    total = np.sum(rows_SP, axis=0)

    def mean_correlation(references: Sequence[np.ndarray]) -> float:
        means = [_comparable('the mean of the RDMs', reference, method) for reference in references]
        return float(np.mean([_correlation(row, mean) for row, mean in zip(rows_SP, means, strict=True)]))

    return NoiseCeiling(mean_correlation([total - row for row in rows_SP]), mean_correlation([total] * len(rows_SP)))


def linear_cka(x_ND: Any, y_NE: Any) -> float:
    """Returns the linear centered kernel alignment of two representations, from 0 to 1 (Kornblith et al. 2019).

    It does not change with rotations and one scale factor of either. With few images and many units it is near 1 even
    for unrelated representations.

    Args:
      x_ND: activations, float [N, D] or [N, H, W, C], which is flattened; N >= 3.
      y_NE: float [N, E] or [N, H, W, C].

    Raises:
      UserError: the numbers of images differ, values are not finite, or all images have the same activations.

    >>> x = np.array([[0, 1], [2, 0], [0, 3]])
    >>> round(linear_cka(x, -2 * x[:, ::-1]), 6)  # two units exchanged and scaled
    1.0
    """
    x_ND, y_NE = _activations('x_ND', x_ND, least=3), _activations('y_NE', y_NE, least=3)
    if len(x_ND) != len(y_NE):
        raise UserError(f'x_ND has {len(x_ND)} images and y_NE has {len(y_NE)}: expected the same images in both.')
    for name, x in (('x_ND', x_ND), ('y_NE', y_NE)):
        if not np.ptp(x, axis=0).any():
            raise UserError(f'{name}: all images have the same activations, so CKA is undefined.')
    x_ND, y_NE = x_ND - x_ND.mean(0), y_NE - y_NE.mean(0)
    if len(x_ND) <= max(x_ND.shape[1], y_NE.shape[1]):  # |x'y|^2 = <xx', yy'>: the smaller of the two forms
        k_NN, l_NN = x_ND @ x_ND.T, y_NE @ y_NE.T
        return float(np.vdot(k_NN, l_NN) / (np.linalg.norm(k_NN) * np.linalg.norm(l_NN)))
    norms = np.linalg.norm(x_ND.T @ x_ND) * np.linalg.norm(y_NE.T @ y_NE)
    return float(np.linalg.norm(x_ND.T @ y_NE) ** 2 / norms)


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f'{name}={value!r}: expected {" or ".join(map(repr, choices))}.')


def _numbers(name: str, x: Any, expected: str) -> np.ndarray:
    """Returns x as a float64 array. Raises UserError if it is no array of finite real numbers."""
    try:
        array = np.asarray(x)
    except ValueError:  # rows of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in 'fiub' and array.dtype.name != 'bfloat16':
        raise UserError(f'{name} is {type(x).__name__} of {array.dtype}: expected {expected}.')
    array = array.astype(np.float64)
    if bad := int((~np.isfinite(array)).sum()):
        raise UserError(f'{name} has {bad} of {array.size} values that are not finite: expected {expected}.')
    return array


def _activations(name: str, x: Any, least: int) -> np.ndarray:
    """Returns activations as float64 [N, D]. Raises UserError if there are fewer than `least` images."""
    array = _numbers(name, x, 'activations [N, ...]')
    if array.ndim < 2 or not array.size or len(array) < least:
        raise UserError(f'{name} has the shape {array.shape}: expected [N, ...], of at least {least} images.')
    return array.reshape(len(array), -1)


def _pairs(rdms: dict[str, Any], method: str) -> list[np.ndarray]:
    """Returns the `_comparable` entries above the diagonal of each RDM, float64 [N (N - 1) / 2]."""
    _check_choice('method', method, ('spearman', 'pearson'))
    rows: list[np.ndarray] = []
    for name, one in rdms.items():
        array = _numbers(name, one, 'dissimilarities [N, N]')
        if array.ndim != 2 or array.shape[0] != array.shape[1] or len(array) < 3:
            raise UserError(f'{name} has the shape {array.shape}: expected [N, N], of at least three images.')
        size = np.abs(array).max()
        if np.abs(array.diagonal()).max() > 1e-6 * size or np.abs(array - array.T).max() > 1e-6 * size:
            raise UserError(f'{name}: expected dissimilarities, symmetric and with zeros on the diagonal; use rdm().')
        rows.append(_comparable(name, array[np.triu_indices(len(array), 1)], method))
        if len(rows[-1]) != len(rows[0]):
            first = next(iter(rdms))
            raise UserError(f'{name} is {array.shape}, unlike {first}: expected the same images in both.')
    return rows


def _comparable(name: str, values: np.ndarray, method: str) -> np.ndarray:
    """Returns the ranks of values ('spearman'), or values with mean 0 and norm 1. Equal values raise UserError."""
    if np.ptp(values) == 0:
        raise UserError(f'{name}: all dissimilarities are equal, so their correlation is undefined.')
    return _ranks(values) if method == 'spearman' else _standardize(values)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(_standardize(a) @ _standardize(b))


def _standardize(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Returns ranks from 1; equal values have the mean of their ranks."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def _squared_distances(x_ND: np.ndarray) -> np.ndarray:
    """Returns the squared Euclidean distances of all pairs of rows; exactly 0 for equal rows."""
    x_ND = x_ND - x_ND.mean(0)  # smaller norms, smaller rounding errors
    norms = np.einsum('nd,nd->n', x_ND, x_ND)
    sums_NN = norms[:, None] + norms[None]
    squares_NN = sums_NN - 2 * (x_ND @ x_ND.T)
    for i, close in enumerate(squares_NN <= _CLOSE * sums_NN):
        squares_NN[i, close] = ((x_ND[close] - x_ND[i]) ** 2).sum(1)
    return np.maximum(squares_NN, squares_NN.T)
