"""Receptive fields against the support of the gradient, and against values computed by hand."""

import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax.core import model
from alexnet_jax.core.architecture import ConvSpec, DenseSpec, LocalSpec
from alexnet_jax.core.config import model_from_config
from alexnet_jax.core.post_ops import POST_OPS, PostOp
from alexnet_jax.experiments import cifar10
from alexnet_jax.inference.activations import activation_names
from alexnet_jax.inference.receptive_field import receptive_field
from alexnet_jax.utils.errors import UserError
from tests import helpers
from tests.configs import test_variants

# Not in `test_variants.VARIANTS`.
OTHERS = ['quickstart', 'tiny_imagenet', *(f'cifar10:{name}' for name in cifar10.NETS)]
# The last pixel is not read; maps of 10 positions, whose last pooling window is truncated; conv2 skips every second
# position and reads padding alone at its borders.
UNEVEN = dict(
    layers={
        'conv1': ConvSpec(features=2, kernel=4, stride=3, padding=(1, 0), post='spatial_norm avg_pool'),
        'conv2': ConvSpec(features=2, kernel=1, stride=2, padding=(1, 1), groups=2),
        'local3': LocalSpec(features=2, kernel=3, padding=(1, 1), groups=2, post='lrn'),
        'fc4': DenseSpec(features=2),
    },
    spatial_n=4,
)


def _without_zero_gradients(network):
    """Returns the network in float64 with two maps per layer, mean for max pooling, and without ReLU and tanh."""
    instead = {'relu': '', 'tanh': '', 'pool': 'avg_pool'}
    layers = {
        name: dataclasses.replace(spec, features=2, post=' '.join(instead.get(op, op) for op in spec.ops))
        for name, spec in network.layers.items()
    }
    return network.clone(layers=layers, num_classes=2, dtype='float64')


def _gradient_boxes(network, size, choose):
    """Returns {(name of an output, row, column): box around the pixels with a nonzero gradient}.

    `choose(side)` returns the (row, column) of the units of maps. Weights and pixels are positive, so that no gradient
    is zero by cancellation.
    """
    rng = np.random.default_rng(0)
    with jax.enable_x64():
        shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, size, size, 3))))['params']
        params = jax.tree.map(lambda p: rng.uniform(0.5, 1.5, p.shape) / math.prod(p.shape[:-1]), shapes)

        def outputs(x_NHWC):
            state = network.apply({'params': params}, x_NHWC, mutable='intermediates')[1]
            return {name: values[-1] for name, values in state['intermediates'].items()}

        x_HWC = rng.uniform(0.5, 1.5, (size, size, 3))
        shapes = {name: y.shape for name, y in jax.eval_shape(outputs, x_HWC[None]).items()}
        units = [(name, *at) for name, s in shapes.items() for at in (choose(s[1]) if len(s) == 4 else [(0, 0)])]
        cotangents = {name: np.zeros((len(units), *shape[1:])) for name, shape in shapes.items()}
        for i, (name, *at) in enumerate(units):
            cotangents[name][(i, *at) if len(shapes[name]) == 4 else i] = 1
        x_NHWC = np.repeat(x_HWC[None], len(units), 0)
        gradient_NHWC = jax.jit(lambda x, y: jax.vjp(outputs, x)[1](y)[0])(x_NHWC, cotangents)
        seen_NHW = np.any(np.asarray(gradient_NHWC) != 0, axis=-1)
    return {unit: _bounding_box(seen_HW) for unit, seen_HW in zip(units, seen_NHW, strict=True)}


def _bounding_box(seen_HW):
    if not seen_HW.any():
        return 0, 0, 0, 0
    (top, bottom), (left, right) = (np.flatnonzero(seen_HW.any(axis))[[0, -1]] for axis in (1, 0))
    return top, left, bottom + 1, right + 1


def _check(network, size, choose):
    network = _without_zero_gradients(network)
    boxes = _gradient_boxes(network, size, choose)
    assert {name for name, *_ in boxes} == {name for name in activation_names(network) if '.' in name}
    for (name, row, column), expected in boxes.items():
        assert receptive_field(network, name).box(row, column, size) == expected, (name, row, column)
    return boxes


def test_boxes_are_the_support_of_the_gradient():
    boxes = _check(model.AlexNet(**UNEVEN), 31, lambda side: itertools.product(range(side), repeat=2))
    assert len(boxes) == 10 * 10 * 2 + 5 * 5 + 4 * 4 * 3 + 1
    assert boxes['conv2.linear', 0, 2] == (0, 0, 0, 0)  # only padding
    assert boxes['fc4.linear', 0, 0] == (0, 0, 30, 30)


def _key(network, size):
    """Returns the values on which receptive fields depend, and `lrn`, whose gradient is tested too."""
    maps = [spec for spec in _without_zero_gradients(network).layers.values() if isinstance(spec, ConvSpec)]
    table = [(type(s), s.kernel, s.stride, s.padding, s.post.replace('dropout', '').split()) for s in maps]
    return repr((table, network.pool_window, network.pool_stride, network.spatial_n, size))


@pytest.mark.slow
def test_configs_have_the_support_of_the_gradient():
    """Configs whose networks differ only in widths, activations or dense layers are one case."""
    cases = {}
    for variant in [*test_variants.VARIANTS, *OTHERS]:
        config = alexnet_jax.get_config(variant)
        network, size = model_from_config(config.model), config.data.image_size
        cases[_key(network, size)] = network, size
    for network, size in cases.values():
        _check(network, size, lambda side: [(0, side - 1), (side // 2, 0)])
    assert len(cases) > 10


# Layer, size, stride and start of the paper's network, by hand.
PAPER = [
    ('conv1', 19, 8, 0),  # 11 + 2 * 4
    ('conv1.linear', 11, 4, 0),
    ('conv1.lrn', 11, 4, 0),
    ('conv2.linear', 51, 8, -16),  # 19 + 4 * 8; 2 * 8 px of padding
    ('conv2', 67, 16, -16),  # 51 + 2 * 8
    ('conv3', 99, 16, -32),  # 67 + 2 * 16
    ('conv4', 131, 16, -48),
    ('conv5.relu', 163, 16, -64),
    ('conv5', 195, 32, -64),
    ('fc6', None, None, None),
]


@pytest.mark.parametrize(('layer', 'size', 'stride', 'start'), PAPER)
def test_fields_of_the_paper(layer, size, stride, start):
    field = alexnet_jax.receptive_field(model.AlexNet(), layer)
    assert (field.layer, field.size, field.stride, field.start) == (layer, size, stride, start)


def test_boxes_of_the_paper():
    """The 55 windows of conv 1 end at 54 * 4 + 11 = 227, three pixels past the edge."""
    network = model.AlexNet()
    conv1, conv5, fc6 = (receptive_field(network, name) for name in ('conv1.linear', 'conv5', 'fc6'))
    assert conv1.box(54, 1, 224) == (216, 4, 224, 15)
    assert conv1.center(0, 2) == (5.5, 13.5)
    assert conv5.box(0, 2, 224) == (0, 0, 131, 195)
    assert conv5.box(5, 3, 224) == (96, 32, 224, 224)
    assert conv5.center(0, 5) == (33.5, 193.5)
    assert fc6.box(0, 0, 224) == (0, 0, 224, 224)


def test_repeated_operations_are_distinct():
    """'conv1' is the last ReLU, 'conv1.relu' too; torchvision's names are resolved."""
    layers = {'conv1': ConvSpec(features=2, kernel=3, post='pool relu pool relu'), 'fc2': DenseSpec()}
    network = model.AlexNet(layers=layers)
    assert [receptive_field(network, name).size for name in ('conv1.linear', 'conv1.pool', 'conv1')] == [3, 9, 9]
    network = model_from_config(alexnet_jax.get_config('torchvision').model)
    assert dataclasses.replace(receptive_field(network, 'features.6'), layer='conv3.linear') == receptive_field(
        network, 'conv3.linear'
    )


def test_errors_name_layer_position_and_size(monkeypatch):
    network = helpers.network()
    field = receptive_field(network, 'conv1.linear')
    for call, text in (
        (lambda: receptive_field(network, 'conv9'), "unknown layer 'conv9'. Did you mean"),
        (lambda: receptive_field(network, 'features.3'), "the network does not have torchvision's layout"),
        (lambda: receptive_field(network, ['conv1']), "layer is list: expected a name, such as 'conv3'"),
        (lambda: receptive_field({}, 'conv1'), 'network is dict: expected an AlexNet'),
        (lambda: field.box(16, 0, 35), 'row=16: expected 0 to 15, the positions of conv1.linear at 35 px'),
        (lambda: field.box(0, -1, 35), 'column=-1: expected 0 to 15'),
        (lambda: field.box(0, 0, 3), 'image_size=3: conv1.linear needs more pixels; use a larger size'),
        (lambda: field.box(0, 0, 35.0), 'image_size=35.0: expected a positive integer, in pixels'),
        (lambda: receptive_field(network, 'fc7').box(0, 1, 35), 'column=1: expected 0, because fc7 is a dense layer'),
        (lambda: receptive_field(network, 'fc7').center(0, 0), 'fc7 is a dense layer, without positions; use box'),
    ):
        with pytest.raises(UserError, match=re.escape(text)):
            call()
    monkeypatch.setitem(POST_OPS, 'halve', PostOp(lambda x, context: x[:, ::2, ::2], maps_only=True))
    network = helpers.network(layers=helpers.layers(conv2={'post': 'halve'}))
    assert receptive_field(network, 'conv2.linear').size == 5 + 2 * 2 + 2 * 4
    with pytest.raises(UserError, match="conv2: the window of operation 'halve' is unknown; set window in its entry"):
        receptive_field(network, 'fc6')
