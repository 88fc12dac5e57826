"""Grad-CAM against backward passes written as NumPy loops, and occlusion maps against predictions one by one."""

import jax
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax.inference import predict
from alexnet_jax.utils.errors import UserError
from alexnet_jax.visualize import class_maps
from tests.visualize import tiny


@pytest.fixture(scope='module')
def x64():
    with jax.enable_x64(True):
        yield tiny.checkpoint()


def _cam(checkpoint, image, layer, label):
    """Weights each map by its mean gradient, from backward loops below the logit."""
    inputs, y = tiny.forward(checkpoint, tiny.network_input(checkpoint, image), 'fc4.linear')
    label = int(np.argmax(y)) if label is None else label
    names = list(inputs)
    gradient = np.eye(len(y))[label]
    for name in reversed(names[names.index(layer) + 1 :]):
        gradient = tiny.reverse(checkpoint, name, inputs[name], gradient, {'relu': 'gradient', 'lrn': 'gradient'})
    maps = inputs[names[names.index(layer) + 1]]
    return np.maximum((gradient.mean((0, 1)) * maps).sum(2), 0), label


def _resize(map_, side):
    """Bilinear interpolation between the centers of the cells; the border is repeated."""
    place = np.clip((np.arange(side) + 0.5) * len(map_) / side - 0.5, 0, len(map_) - 1)
    low = np.minimum(place.astype(int), len(map_) - 2)
    part = place - low
    rows = map_[low] * (1 - part)[:, None] + map_[low + 1] * part[:, None]
    return rows[:, low] * (1 - part) + rows[:, low + 1] * part


@pytest.mark.parametrize(
    ('layer', 'operation', 'label'),
    [(None, 'conv2.relu', None), pytest.param('conv1.linear', 'conv1.linear', 2, marks=pytest.mark.slow)],
)
def test_grad_cam_matches_numpy_loops(x64, layer, operation, label):
    images = tiny.images(5)
    found = alexnet_jax.visualize.grad_cam(x64, images, label, layer, batch_size=2)
    assert found.maps.dtype == found.resized.dtype == np.float32 and found.resized.shape == (5, 19, 19)
    for i, image in enumerate(images):
        expected, expected_label = _cam(x64, image, operation, label)
        assert found.labels[i] == expected_label
        np.testing.assert_allclose(found.maps[i], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.resized[i], _resize(expected, 19), rtol=1e-5, atol=1e-6)
    assert np.any(found.maps > 0, axis=(1, 2)).sum() > 2


@pytest.mark.slow
def test_grad_cam_explains_the_prediction():
    checkpoint, images = tiny.checkpoint(), tiny.images(5)
    found = class_maps.grad_cam(checkpoint, images)
    np.testing.assert_array_equal(found.labels, np.argmax(predict.predict(checkpoint, images), axis=1))
    empty = class_maps.grad_cam(checkpoint, images[:0])
    assert empty.maps.shape == (0, 4, 4) and empty.resized.shape == (0, 19, 19) and empty.labels.shape == (0,)


def test_occlusion_matches_single_predictions():
    """The network's own forward pass on each covered input. Positions 0, 4 and 8: 3 pixels at the edge stay."""
    checkpoint, (image,) = tiny.checkpoint(), tiny.images(1)
    found = alexnet_jax.visualize.occlusion_map(checkpoint, image, size=8, stride=4, batch_size=4)
    expected = np.zeros((3, 3))
    apply = jax.jit(checkpoint.network.apply)

    def probabilities(x):
        logits = np.asarray(apply({'params': checkpoint.params}, x[None])[0], np.float64)
        return np.exp(logits) / np.exp(logits).sum()

    whole = probabilities(tiny.network_input(checkpoint, image).astype(np.float32))
    label = int(np.argmax(whole))
    for i, j in np.ndindex(3, 3):
        x = tiny.network_input(checkpoint, image).astype(np.float32)
        x[4 * i : 4 * i + 8, 4 * j : 4 * j + 8] = 0
        expected[i, j] = probabilities(x)[label]
    np.testing.assert_allclose(found.probability, expected, rtol=1e-4)
    assert found.probability.dtype == np.float32 and np.ptp(expected) > 0.01
    assert (found.label, found.size, found.starts.tolist()) == (label, 8, [0, 4, 8])
    np.testing.assert_allclose(found.baseline, whole[label], rtol=1e-4)


@pytest.mark.slow
def test_occlusion_of_a_given_class_at_default_positions():
    checkpoint, (image,) = tiny.checkpoint(), tiny.images(1)
    found = class_maps.occlusion_map(checkpoint, image, 3)
    assert found.probability.shape == (17, 17) and (found.label, found.size) == (3, 3)
    same = class_maps.occlusion_map(checkpoint, image, 3, size=3, stride=2)
    np.testing.assert_allclose(same.probability, found.probability[::2, ::2], rtol=1e-4)
    np.testing.assert_allclose(found.baseline, predict.predict(checkpoint, image)[3], rtol=1e-4)
    whole = class_maps.occlusion_map(checkpoint, image, 3, size=19)
    assert whole.probability.shape == (1, 1)


@pytest.mark.parametrize(
    ('images', 'options', 'message'),
    [
        (2, {}, 'there are 2 images: expected one'),
        (1, {'label': 5}, 'label=5: expected an integer from 0 to 4, the classes'),
        (1, {'size': 20}, 'size=20: expected an integer from 1 to 19.'),
        (1, {'size': 0}, 'size=0: expected an integer from 1 to 19.'),
        (1, {'stride': 1.5}, 'stride=1.5: expected an integer from 1 to 19.'),
        (1, {'batch_size': 0}, 'batch_size=0: expected a positive integer.'),
    ],
)
def test_invalid_occlusions_are_refused(images, options, message):
    with pytest.raises(UserError, match=message):
        class_maps.occlusion_map(tiny.checkpoint(), tiny.images(images), **options)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'label': 5}, 'label=5: expected an integer from 0 to 4, the classes'),
        ({'label': 'cat'}, "label='cat': expected an integer"),
        ({'layer': 'fc3'}, "layer='fc3' has no feature maps; use a convolutional layer"),
        ({'layer': 'conv6'}, "unknown layer 'conv6'. Did you mean"),
    ],
)
def test_invalid_labels_and_layers_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        class_maps.grad_cam(tiny.checkpoint(), tiny.images(1), **options)
