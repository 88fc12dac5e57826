"""Activation maximization against its formula, step by step in NumPy."""

import jax
import numpy as np
import pytest
from scipy import ndimage

import alexnet_jax
from alexnet_jax.utils.errors import UserError
from alexnet_jax.visualize import maximization
from tests.visualize import tiny

OFF = {'start_std': 20, 'decay': 0, 'blur': 0, 'jitter': 0, 'tv': 0}
UNIT = {'conv2.linear': (2, 2, 1), 'fc4': (3,)}  # the center of the map, and the unit


def _steps(checkpoint, layer, steps, seed, start_std, decay, blur, jitter, tv, learning_rate=1, blur_every=4):
    """Returns (image, activation before each step) by the formula of the docstring."""
    rng = np.random.default_rng(seed)
    mean = checkpoint.image_stats.mean_image[1:20, 1:20].astype(np.float64)
    d = np.clip(rng.normal(0, start_std, (1, 19, 19, 3))[0], -mean, 255 - mean)
    shifts = rng.integers(-jitter, jitter + 1, (steps, 2))
    operation, values = {'fc4': 'fc4.linear'}.get(layer, layer), []
    for i in range(steps):
        shifted = np.roll(d, shifts[i], axis=(0, 1))
        inputs, y = tiny.forward(checkpoint, shifted / checkpoint.augmentation.pixel_std, operation)
        values.append(y[UNIT[layer]])
        signal = np.zeros_like(y)
        signal[UNIT[layer]] = 1
        gradient = tiny.backward(checkpoint, inputs, signal, {'relu': 'gradient', 'lrn': 'gradient'})
        gradient = np.roll(gradient, -shifts[i], axis=(0, 1))
        slope = np.zeros_like(d)  # of the sum of squared differences of neighbors
        for axis in (0, 1):
            difference = 2 * np.diff(d, axis=axis)
            slope += np.insert(difference, 0, 0, axis=axis) - np.insert(
                difference, difference.shape[axis], 0, axis=axis
            )
        d = d + learning_rate * (gradient / np.abs(gradient[gradient != 0]).mean() - tv * slope)
        d = d * (1 - decay)
        if blur and (i + 1) % blur_every == 0:
            d = ndimage.gaussian_filter(d, (blur, blur, 0), mode='nearest', radius=(int(np.ceil(3 * blur)),) * 2 + (0,))
        d = np.clip(d, -mean, 255 - mean)
    return d + mean, values


@pytest.mark.parametrize(
    'options',
    [
        {'decay': 0.1, 'blur': 0.8, 'jitter': 3, 'tv': 0.03, 'learning_rate': 2.0},
        *(
            pytest.param({key: value}, marks=pytest.mark.slow)
            for key, value in {'decay': 0.1, 'blur': 0.8, 'jitter': 3, 'tv': 0.03, 'start_std': 200}.items()
        ),
    ],
)
def test_steps_follow_the_formula(options):
    options = {**OFF, **options, 'steps': 4, 'seed': 3, 'blur_every': 2}
    with jax.enable_x64(True):
        checkpoint = tiny.checkpoint()
        found = alexnet_jax.visualize.maximize_activation(checkpoint, 'conv2.linear', 1, **options)
    image, values = _steps(checkpoint, 'conv2.linear', **options)
    assert found.image.dtype == found.activations.dtype == np.float32
    np.testing.assert_allclose(found.image, image, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found.activations[:4], values, rtol=1e-5)
    assert found.image.min() >= 0 and found.image.max() <= 255


@pytest.mark.slow
def test_the_activation_rises_and_repeats():
    checkpoint = tiny.checkpoint()
    for options in (OFF, {}):  # without regularizers, and with the defaults
        found = maximization.maximize_activation(checkpoint, 'fc4', 3, steps=30, **options)
        assert found.activations[-1] > found.activations[0] + 0.5
        again = maximization.maximize_activation(checkpoint, 'fc4', 3, steps=30, **options)
        np.testing.assert_array_equal(found.image, again.image)
        mean = checkpoint.image_stats.mean_image[1:20, 1:20]
        _, y = tiny.forward(checkpoint, (found.image - mean) / checkpoint.augmentation.pixel_std, 'fc4.linear')
        np.testing.assert_allclose(found.activations[-1], y[3], rtol=1e-3)
    other = maximization.maximize_activation(checkpoint, 'fc4', 3, steps=30, seed=1)
    assert np.abs(other.image - found.image).max() > 1


@pytest.mark.slow
def test_units_without_a_gradient_are_refused():
    checkpoint = tiny.checkpoint()
    checkpoint.params['conv2']['bias'][1] = -1e3
    with pytest.raises(UserError, match="unit 1 of conv2.relu has no gradient at the start.*such as 'conv2.linear'"):
        maximization.maximize_activation(checkpoint, 'conv2.relu', 1, steps=1)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'steps': 0}, 'steps=0: expected a positive integer'),
        ({'learning_rate': 0}, 'learning_rate=0: expected a positive number'),
        ({'decay': 1}, 'decay=1: expected a number of at least 0 and below 1'),
        ({'blur': -1}, 'blur=-1: expected a number of at least 0'),
        ({'jitter': 0.5}, 'jitter=0.5: expected an integer of at least 0'),
        ({'tv': float('nan')}, 'tv=nan: expected a number of at least 0'),
        ({'seed': -1}, 'seed=-1: expected an integer of at least 0'),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        maximization.maximize_activation(tiny.checkpoint(), 'fc4', 0, **options)
