"""Representational similarity against loops over pairs of images, SciPy, and invariances."""

import re

import numpy as np
import pytest

from alexnet_jax import linear_cka, noise_ceiling, rdm, rsa
from alexnet_jax.utils.errors import UserError


def _activations(count=7, units=12, seed=0):
    return np.random.default_rng(seed).normal(size=(count, units)).astype(np.float32)


def _rdms(seeds=4, count=6):
    """RDMs of noisy versions of the same activations."""
    return [rdm(_activations(count) + 0.7 * _activations(count, seed=1 + seed)) for seed in range(seeds)]


def _pearson(a, b):
    """By the definition, in Python numbers."""
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    products = [(x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)]
    squares = [sum((x - mean) ** 2 for x in v) for v, mean in ((a, mean_a), (b, mean_b))]
    return sum(products) / (squares[0] * squares[1]) ** 0.5


def _ranks(values):
    """Half of the comparisons that a value wins or ties, in Python numbers."""
    return [sum((x > y) + (x >= y) for y in values) / 2 + 0.5 for x in values]


def _upper(matrix):
    return [float(matrix[i, j]) for i in range(len(matrix)) for j in range(i + 1, len(matrix))]


@pytest.mark.parametrize('metric', ['correlation', 'euclidean'])
def test_rdm_is_the_dissimilarity_of_each_pair(metric):
    x = _activations()
    found = rdm(x, metric)
    for i in range(len(x)):
        for j in range(len(x)):
            a, b = x[i].tolist(), x[j].tolist()
            distance = sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) ** 0.5
            expected = 1 - _pearson(a, b) if metric == 'correlation' else distance
            assert abs(found[i, j] - (expected if i != j else 0)) < 1e-13
    assert found.dtype == np.float64 and (found == found.T).all() and not found.diagonal().any()


def test_rdm_of_maps_is_that_of_flat_activations():
    x_ND = _activations()
    np.testing.assert_array_equal(rdm(x_ND.reshape(7, 2, 2, 3)), rdm(x_ND))


def test_close_images_have_exact_distances():
    """In x^2 - 2xy + y^2, distances far below the norms would be rounding errors."""
    x = _activations(4).astype(np.float64)
    x[1] = x[0]
    x[2] = x[0] + 1e-7 * x[3]
    found = rdm(x, 'euclidean')
    assert found[0, 1] == 0
    np.testing.assert_allclose(found[0, 2], 1e-7 * np.linalg.norm(x[3]), rtol=1e-8)
    assert rdm(x)[0, 1] == 0 and rdm([[1.0, 2, 4], [4, 2, 1], [1, 2, 4]])[0, 2] == 0


@pytest.mark.parametrize('shape', [(5, 9), (9, 5)])
def test_equals_scipy(shape):
    spatial, stats = pytest.importorskip('scipy.spatial'), pytest.importorskip('scipy.stats')
    x, y = _activations(*shape), _activations(*shape, seed=1)
    for metric in ('correlation', 'euclidean'):
        expected = spatial.distance.squareform(spatial.distance.pdist(x.astype(np.float64), metric))
        np.testing.assert_allclose(rdm(x, metric), expected, atol=1e-14)
    a, b = (rdm(z, 'euclidean').round(1) for z in (x, y))  # with ties
    np.testing.assert_allclose(rsa(a, b), stats.spearmanr(_upper(a), _upper(b)).statistic, atol=1e-14)
    np.testing.assert_allclose(rsa(a, b, 'pearson'), stats.pearsonr(_upper(a), _upper(b)).statistic, atol=1e-14)


def test_rsa_has_average_ranks_for_ties():
    """By hand: the ranks are 1.5, 1.5, 3, 4, 5, 6 and 1 to 6; sums of products of their deviations are 17 and 17.5."""
    a, b = np.zeros((2, 4, 4))
    pairs = np.triu_indices(4, 1)
    a[pairs], b[pairs] = (1, 1, 2, 5, 6, 7), (0, 1, 4, 9, 16, 25)
    a, b = a + a.T, b + b.T
    assert abs(rsa(a, b) - 17 / (17 * 17.5) ** 0.5) < 1e-15
    assert abs(rsa(a, a) - 1) < 1e-15 and abs(rsa(a, a.max() * (1 - np.eye(4)) - a) + 1) < 1e-15


@pytest.mark.parametrize('method', ['spearman', 'pearson'])
def test_noise_ceiling_correlates_with_means(method):
    rdms = _rdms()
    rows = [_upper(one) for one in rdms]
    if method == 'spearman':
        rows = [_ranks(row) for row in rows]
    else:
        rows = [(np.array(row) - np.mean(row)) / np.std(row) for row in rows]
    lower, upper = [], []
    for i, row in enumerate(rows):
        for bounds, chosen in ((upper, rows), (lower, rows[:i] + rows[i + 1 :])):
            mean = [sum(values) / len(chosen) for values in zip(*chosen, strict=True)]
            bounds.append(_pearson(row, _ranks(mean) if method == 'spearman' else mean))
    found = noise_ceiling(rdms, method)
    np.testing.assert_allclose(found, (np.mean(lower), np.mean(upper)), atol=1e-13)
    assert found.lower < found.upper < 1


@pytest.mark.parametrize('method', ['spearman', 'pearson'])
def test_no_rdm_exceeds_the_noise_ceiling(method):
    rdms = _rdms(seeds=3)
    upper = noise_ceiling(np.stack(rdms), method).upper
    others = [rdm(_activations(6, seed=seed)) for seed in range(20)]
    means = [np.mean([rsa(other, one, method) for one in rdms]) for other in [*rdms, *others, sum(rdms)]]
    assert max(means) <= upper + 1e-12
    np.testing.assert_allclose(noise_ceiling([rdms[0]] * 2, method), (1, 1), atol=1e-13)


@pytest.mark.parametrize(('count', 'units', 'others'), [(6, 20, 4), (20, 6, 4), (6, 4, 20)])
def test_cka_equals_the_sum_over_pairs_of_images(count, units, others):
    """Kornblith et al. 2019, equation 3, with H the centering matrix: tr(KHLH) / sqrt(tr(KHKH) tr(LHLH))."""
    x, y = _activations(count, units), 3 + _activations(count, others, seed=1)
    y[:, 0] += x[:, 0]
    center = np.eye(count) - 1 / count
    gram_x, gram_y = (center @ np.inner(z.astype(np.float64), z) @ center for z in (x, y))
    expected = np.trace(gram_x @ gram_y) / np.sqrt(np.trace(gram_x @ gram_x) * np.trace(gram_y @ gram_y))
    assert 0.05 < expected < 0.95
    np.testing.assert_allclose(linear_cka(x, y), expected, rtol=1e-12)
    np.testing.assert_allclose(linear_cka(y.reshape(count, 1, -1), x), expected, rtol=1e-12)


@pytest.mark.parametrize('count', [5, 30])
def test_cka_ignores_rotation_scale_and_offset(count):
    x, y = _activations(count, 10).astype(np.float64), _activations(count, 8, seed=1)
    rotation = np.linalg.qr(_activations(10, 10, seed=2).astype(np.float64))[0]
    np.testing.assert_allclose(linear_cka(x, x), 1, rtol=1e-13)
    np.testing.assert_allclose(linear_cka(5 * x @ rotation - 2, x), 1, rtol=1e-12)
    np.testing.assert_allclose(linear_cka(5 * x @ rotation - 2, y), linear_cka(x, y), rtol=1e-12)
    assert abs(linear_cka(x @ _activations(10, 10, seed=3), y) - linear_cka(x, y)) > 1e-3  # not a rotation


def test_errors_name_argument_and_count():
    x, a = _activations(), rdm(_activations())
    dead = x.copy()
    dead[[2, 5]] = 0.1
    infinite = np.where(x == x[0, 0], np.inf, x)
    for call, text in (
        (lambda: rdm(dead), 'the activations of 2 of 7 images are all equal, so their correlation is undefined; leave'),
        (lambda: rdm(infinite), 'x_ND has 1 of 84 values that are not finite'),
        (lambda: rdm(x[0]), 'x_ND has the shape (12,): expected [N, ...], of at least 2 images'),
        (lambda: rdm(x[:1]), 'x_ND has the shape (1, 12): expected [N, ...], of at least 2 images'),
        (lambda: rdm(x, 'cosine'), "metric='cosine': expected 'correlation' or 'euclidean'"),
        (lambda: rdm({'conv1': x}), 'x_ND is dict of object: expected activations [N, ...]'),
        (lambda: rdm([[1, 2], [3]]), 'x_ND is list of object: expected activations [N, ...]'),
        (lambda: rsa(a, a[:5, :5]), 'rdm_b is (5, 5), unlike rdm_a: expected the same images in both'),
        (lambda: rsa(a, x), 'rdm_b has the shape (7, 12): expected [N, N], of at least three images'),
        (lambda: rsa(a[:2, :2], a), 'rdm_a has the shape (2, 2): expected [N, N], of at least three images'),
        (lambda: rsa(1 - a, a), 'rdm_a: expected dissimilarities, symmetric and with zeros on the diagonal; use rdm()'),
        (lambda: rsa(a, np.triu(a)), 'rdm_b: expected dissimilarities, symmetric'),
        (lambda: rsa(a, 1 - np.eye(7)), 'rdm_b: all dissimilarities are equal, so their correlation is undefined'),
        (lambda: rsa(a, a, 'kendall'), "method='kendall': expected 'spearman' or 'pearson'"),
        (lambda: noise_ceiling([a]), 'rdms_SNN has length 1: expected the RDMs of two seeds or more'),
        (lambda: noise_ceiling([a, a, a[:5, :5]]), 'rdms_SNN[2] is (5, 5), unlike rdms_SNN[0]'),
        (lambda: linear_cka(x, x[:5]), 'x_ND has 7 images and y_NE has 5: expected the same images in both'),
        (lambda: linear_cka(x[:2], x[:2]), 'x_ND has the shape (2, 12): expected [N, ...], of at least 3 images'),
        (lambda: linear_cka(x, dead[[2, 5, 2, 5, 2, 5, 2]]), 'y_NE: all images have the same activations'),
    ):
        with pytest.raises(UserError, match=re.escape(text)):
            call()
