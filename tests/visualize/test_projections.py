"""Deconvnet and guided backpropagation against backward passes written as NumPy loops."""

import jax
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax.core.architecture import ConvSpec, DenseSpec, LocalSpec
from alexnet_jax.inference import activations
from alexnet_jax.utils.errors import UserError
from alexnet_jax.visualize import forward, projections
from tests import helpers
from tests.visualize import tiny

DECONVNET = {'relu': 'deconvnet', 'lrn': 'unchanged'}
GUIDED = {'relu': 'guided', 'lrn': 'gradient'}
# (name of an activation, its last operation, unit, position): a pooled map, the logits, a convolution.
UNITS = [
    ('conv2', 'conv2.pool', 4, None),
    pytest.param('fc4', 'fc4.linear', 1, None, marks=pytest.mark.slow),
    pytest.param('conv2.linear', 'conv2.linear', 1, (2, 3), marks=pytest.mark.slow),
]


@pytest.fixture(scope='module')
def x64():
    with jax.enable_x64(True):
        yield tiny.checkpoint()


def _expected(checkpoint, image, last, unit, position, rules, value=None):
    inputs, y = tiny.forward(checkpoint, tiny.network_input(checkpoint, image), last)
    if y.ndim == 3:
        position = position or np.unravel_index(np.argmax(y[..., unit]), y.shape[:2])
        at = (*position, unit)
    else:
        at = (unit,)
    signal = np.zeros_like(y)
    signal[at] = y[at] if value is None else value
    return tiny.backward(checkpoint, inputs, signal, rules)


@pytest.mark.parametrize(('layer', 'last', 'unit', 'position'), UNITS)
def test_projections_match_numpy_loops(x64, layer, last, unit, position):
    images = tiny.images(3)
    deconvnet = alexnet_jax.visualize.deconvnet(x64, images, layer, unit, position)
    guided = alexnet_jax.visualize.guided_backprop(x64, images, layer, unit, position)
    assert deconvnet.shape == guided.shape == (3, 19, 19, 3) and deconvnet.dtype == guided.dtype == np.float32
    for image, *found in zip(images, deconvnet, guided, strict=True):
        expected = _expected(x64, image, last, unit, position, DECONVNET)
        np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
        expected = _expected(x64, image, last, unit, position, GUIDED, value=1)
        np.testing.assert_allclose(found[1], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
        assert np.any(expected)
    assert np.any(deconvnet)


def test_unpooling_takes_the_first_of_equal_maxima():
    """Two overlapping windows with stride 2 share the middle column; all zeros tie."""
    x = np.zeros((1, 5, 5, 1), np.float32)
    x[0, 1, 2], x[0, 4, 2], x[0, 4, 3] = 7, 5, 5
    signal = np.array([[1, 2], [10, 20]], np.float32).reshape(1, 2, 2, 1)
    expected = np.zeros((5, 5), np.float32)
    expected[1, 2], expected[4, 2] = 1 + 2, 10 + 20
    np.testing.assert_array_equal(projections._unpool(x, 3, 2, signal)[0, :, :, 0], expected)
    expected = np.zeros((5, 5), np.float32)
    expected[0, 0], expected[0, 2], expected[2, 0], expected[2, 2] = 1, 2, 10, 20
    np.testing.assert_array_equal(projections._unpool(0 * x, 3, 2, signal)[0, :, :, 0], expected)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_own_forward_pass_is_that_of_the_network(dtype):
    """All kinds of layers, operations and groups: each output is what `activations` gives."""
    changed = {
        'conv2': ConvSpec(features=6, kernel=3, padding=(1, 1), groups=2, init=tiny.INIT, post='tanh avg_pool tanh'),
        'local1': LocalSpec(features=8, kernel=2, groups=2, init=tiny.INIT, post='spatial_norm relu'),
        'fc3': DenseSpec(features=8, groups=2, init=tiny.INIT, post='relu dropout'),
    }
    checkpoint, images = tiny.checkpoint(layers={**tiny.LAYERS, **changed}), tiny.images(2)
    params = helpers.init(checkpoint.network, size=tiny.SIDE)
    checkpoint = checkpoint._replace(params=params, network=checkpoint.network.clone(dtype=dtype))
    x = forward.network_input(checkpoint.network, checkpoint.augmentation, images, checkpoint.image_stats)
    names = list(activations.activation_names(checkpoint.network))
    found = activations.activations(checkpoint, images, names)
    assert x.dtype == np.float32  # the pictures of a bfloat16 network are computed in float32
    tolerance = 0.05 if dtype == 'bfloat16' else 1e-4
    stops = [forward.stop_after(checkpoint, name) for name in names]
    outputs = jax.jit(lambda x: [forward.run(checkpoint.network, params, x, 0, stop) for stop in stops])(x)
    for name, y in zip(names, outputs, strict=True):
        np.testing.assert_allclose(y, found[name], rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_batches_do_not_change_projections(x64):
    images = tiny.images(5)
    whole = projections.deconvnet(x64, images, 'conv2', 4, (0, 1))
    parts = projections.deconvnet(x64, images, 'conv2', 4, (0, 1), batch_size=2)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    assert projections.deconvnet(x64, images[:0], 'conv2', 4).shape == (0, 19, 19, 3)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('conv9', 0), "unknown layer 'conv9'. Did you mean 'conv[12]'"),
        ((2, 0), 'layer is int: expected the name of a layer'),
        (('conv2', 6), 'unit=6: expected an integer from 0 to 5, the units of conv2'),
        (('conv2', -1), 'unit=-1: expected an integer'),
        (('conv2', 1.0), 'unit=1.0: expected an integer'),
        (('conv2', True), 'unit=True: expected an integer'),
        (('conv2', 0, (0, 2)), 'column=2: expected an integer from 0 to 1, the columns of conv2'),
        (('conv2', 0, (-1, 0)), 'row=-1: expected an integer from 0 to 1, the rows of conv2'),
        (('conv2', 0, 3), r'position=3: expected \(row, column\)'),
        (('fc3', 0, (0, 0)), r'position=\(0, 0\): fc3 has no positions'),
    ],
)
def test_invalid_units_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        projections.deconvnet(tiny.checkpoint(), tiny.images(1), *arguments)


def test_deconvnets_refuse_operations_without_a_rule():
    layers = {**tiny.LAYERS, 'conv2': ConvSpec(features=6, kernel=3, padding=(1, 1), groups=2, post='tanh pool')}
    checkpoint = tiny.checkpoint(layers=layers)
    with pytest.raises(UserError, match='conv2.tanh cannot be reversed by a deconvolutional network; use guided_back'):
        projections.deconvnet(checkpoint, tiny.images(1), 'fc3', 0)
    assert forward.find_unit(checkpoint, 'fc3', 0).shape == (8,)  # guided backpropagation has no such limit
