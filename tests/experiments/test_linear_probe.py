"""The linear classifier of frozen features: its optimum, its cross-validation, and its place in a checkpoint."""

import copy

import numpy as np
import pytest

from alexnet_jax.convert.loading import load_checkpoint
from alexnet_jax.core.architecture import DenseSpec
from alexnet_jax.data import datasets
from alexnet_jax.experiments import linear_probe
from alexnet_jax.inference import activations, evaluate
from alexnet_jax.utils.errors import UserError
from tests import helpers


def _blobs(count=30, views=2, width=5, classes=3, noise=1.0):
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    centers = rng.normal(size=(classes, width))
    features = 3 + 7 * (centers[labels][:, None] + noise * rng.normal(size=(count, views, width)))
    return features.astype(np.float32), labels


def _gradient(features, labels, found):
    """Returns the gradient of the penalized loss at the classifier, in float64 by loops over pictures and views."""
    features = features.astype(np.float64)
    mean = features.mean((0, 1))
    scale = np.sqrt(((features - mean) ** 2).sum(2).mean())
    # In terms of the scaled features (x - mean) / scale: W' = scale W, b' = b + mean W.
    kernel, bias = found.kernel * scale, found.bias + mean @ found.kernel.astype(np.float64)
    grad_kernel, grad_bias = found.l2 * kernel, found.l2 * bias
    for picture, label in zip(features, labels, strict=True):
        for view in picture:
            x = (view - mean) / scale
            p = np.exp(x @ kernel + bias)
            p = p / p.sum() - np.eye(len(p))[label]
            grad_kernel = grad_kernel + np.outer(x, p) / features[..., 0].size
            grad_bias = grad_bias + p / features[..., 0].size
    return np.concatenate([grad_kernel.ravel(), grad_bias])


def test_gradient_of_penalized_loss_is_zero_at_the_classifier():
    features, labels = _blobs()
    found = linear_probe.fit(features, labels, 3)
    assert np.abs(_gradient(features, labels, found)).max() < 1e-4
    assert np.abs(_gradient(features, labels, found._replace(bias=np.add(found.bias, (0.1, 0, 0))))).max() > 1e-3
    # A picture can only be left out with all its views: noise does not look better than guessing.
    noise = np.repeat(np.random.default_rng(1).normal(size=(30, 1, 5)), 2, axis=1).astype(np.float32)
    assert linear_probe.fit(noise, labels, 3).correct < 20 and found.correct > 20


@pytest.mark.parametrize(
    ('count', 'value', 'problem'),
    [(1, 0.0, 'expected two training pictures or more, found 1'), (4, np.nan, 'are NaN or infinite')],
)
def test_features_that_determine_no_classifier_are_refused(count, value, problem):
    features, labels = _blobs(count)
    features[0, 0, 0] += value
    with pytest.raises(UserError, match=f'--mode=features: .*{problem}'):
        linear_probe.fit(features, labels, 3)


def test_unfinished_fit_is_reported(monkeypatch, caplog):
    features, labels = _blobs()
    linear_probe.fit(features, labels, 3)
    assert 'not fully fitted' not in caplog.text
    monkeypatch.setattr(linear_probe, '_MAX_STEPS', 1)
    features = features[:, :1]  # another shape, which is compiled anew
    linear_probe.fit(features, labels, 3)
    assert 'The last layer is not fully fitted: after 1 steps the gradient is' in caplog.text


def test_folds_have_equal_shares_of_each_class():
    labels = np.array([0] * 20 + [1] * 10)
    folds = linear_probe.folds(labels, 5)
    assert [[int((folds[labels == c] == f).sum()) for f in range(5)] for c in (0, 1)] == [[4] * 5, [2] * 5]
    assert sorted(linear_probe.folds(np.array([0, 1, 1]), 5)) == [0, 1, 2]


@pytest.mark.parametrize('inverted', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_saved_network_applies_the_classifier_to_its_features(tmp_path, inverted):
    """The features already contain dropout's test-time factor, whichever convention the network has."""
    changes = {'model.dropout_inverted': inverted, 'data.reflect': False}
    source = load_checkpoint(helpers.save_untrained(tmp_path / 'source', **changes))
    records = [datasets.open_dataset('digits').split('train')[i] for i in range(6)]
    features, labels = linear_probe.features(source, records, 1, 0)
    images = np.stack([record['image'] for record in records])
    fc7 = activations.activations(source, images, 'fc7')['fc7']  # before dropout
    np.testing.assert_allclose(features[:, 0], fc7 * (1.0 if inverted else 0.5), rtol=1e-6)
    assert labels.tolist() == [record['label'] for record in records]

    rng = np.random.default_rng(0)
    new = linear_probe.LinearClassifier(
        rng.normal(size=(32, 2)).astype(np.float32), np.array([1, -1], np.float32), l2=0.1, folds=5, correct=0
    )
    config = copy.deepcopy(source.config)
    config['model']['num_classes'] = 2
    linear_probe.save(tmp_path / 'run', source, new, ['cat', 'dog'], config)
    saved = load_checkpoint(tmp_path / 'run')
    scores = features[:, 0] @ new.kernel + new.bias
    expected = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    np.testing.assert_allclose(evaluate.Evaluator(saved).predict(images), expected, atol=1e-5)
    assert (
        saved.class_names == ('cat', 'dog') and (saved.params['fc6']['kernel'] == source.params['fc6']['kernel']).all()
    )
    assert (saved.image_stats.mean_image == source.image_stats.mean_image).all()


@pytest.mark.parametrize(
    ('layers', 'problem'),
    [
        (helpers.layers(fc8={'groups': 2}), 'fc8 has groups or operations after it'),
        ({'fc1': DenseSpec()}, 'fc1 is the only layer, so there are no features'),
    ],
)
def test_networks_without_a_plain_last_layer_are_refused(layers, problem):
    network = helpers.network(layers=layers)
    with pytest.raises(UserError, match=f'{problem}.*; use --mode=full'):
        linear_probe.check_network(type('Source', (), {'network': network}))


def test_unreadable_images_are_refused(tmp_path, monkeypatch):
    source = load_checkpoint(helpers.save_untrained(tmp_path / 'source'))
    monkeypatch.setattr(evaluate.Evaluator, 'map_records', lambda *_: iter(()))
    with pytest.raises(UserError, match='3 of 3 images cannot be read'):
        linear_probe.features(source, [{}] * 3, 1, max_unreadable=3)
