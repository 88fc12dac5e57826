"""The network of the paper: counts and shapes computed by hand, connections checked by gradients."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax.core import architecture, model, ops, sharding
from alexnet_jax.core.architecture import ConvSpec, DenseSpec
from alexnet_jax.core.config import model_from_config
from alexnet_jax.utils.errors import UserError
from tests import helpers

CONV = {'fc2': {}}  # a classifier above the layers under test

# kernel area x inputs x kernels + biases, from section 3.5
PARAMETERS = {
    'conv1': 11 * 11 * 3 * 96 + 96,
    'conv2': 5 * 5 * 48 * 256 + 256,
    'conv3': 3 * 3 * 256 * 384 + 384,
    'conv4': 3 * 3 * 192 * 384 + 384,
    'conv5': 3 * 3 * 192 * 256 + 256,
    'fc6': 6 * 6 * 256 * 4096 + 4096,
    'fc7': 4096 * 4096 + 4096,
    'fc8': 4096 * 1000 + 1000,
}


@pytest.fixture(scope='module')
def shapes():
    return jax.eval_shape(lambda key: model.init_params(model.AlexNet(), key, 224), jax.random.key(0))


def test_parameter_count(shapes):
    counts = {name: sum(x.size for x in jax.tree.leaves(layer)) for name, layer in shapes.items()}
    assert counts == PARAMETERS
    assert sum(counts.values()) == 60_965_224


def test_activation_shapes_and_neurons(shapes):
    network = model.AlexNet()
    run = lambda p, x: network.apply({'params': p}, x, mutable='intermediates')  # noqa: E731
    logits, extra = jax.eval_shape(run, shapes, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    seen = {name: value[0].shape[1:] for name, value in extra['intermediates'].items()}
    assert logits.shape == (1, 1000)
    assert seen['conv1.linear'] == (55, 55, 96)
    assert seen['conv1.pool'] == (27, 27, 96)
    assert seen['conv2.linear'] == (27, 27, 256)
    assert seen['conv2.pool'] == (*seen['conv3.linear'][:2], 256)
    assert seen['conv3.linear'] == seen['conv4.linear'] == (13, 13, 384)
    assert seen['conv5.linear'] == (13, 13, 256)
    assert seen['conv5.pool'] == (6, 6, 256)
    assert seen['fc6.linear'] == seen['fc7.linear'] == (4096,)
    neurons = [int(np.prod(seen[f'conv{i}.linear'])) for i in range(1, 6)]
    # Figure 2 prints 253,440 for the first layer, but 55 x 55 x 96 is 290,400, which gives the 650,000 of the abstract.
    assert neurons == [290_400, 186_624, 64_896, 64_896, 43_264]
    assert sum(neurons) + 4096 + 4096 + 1000 == 659_272


def test_initial_values():
    params = helpers.init(model.AlexNet(), 1, 224)
    for name, layer in params.items():
        assert abs(float(layer['kernel'].std()) - 0.01) < 5e-4, name
        assert abs(float(layer['kernel'].mean())) < 5e-4, name
        expected = 1 if name in ('conv2', 'conv4', 'conv5', 'fc6', 'fc7') else 0  # section 5
        chex.assert_trees_all_equal(layer['bias'], jnp.full_like(layer['bias'], expected))
    # The two towers start with different weights.
    assert not jnp.allclose(params['conv1']['kernel'][..., :48], params['conv1']['kernel'][..., 48:])


def test_towers_connect_only_where_the_paper_says():
    """Uses gradients of one tower's units with respect to the other tower's kernels."""
    network = helpers.network()
    params = helpers.init(network)
    x = jax.random.normal(jax.random.key(1), (2, helpers.SIZE, helpers.SIZE, 3))

    @jax.jit
    def first_tower(params):
        _, extra = network.apply({'params': params}, x, mutable='intermediates')
        outs = {
            name: extra['intermediates'][f'{name}.linear'][0] for name in ('conv2', 'conv3', 'conv4', 'conv5', 'fc6')
        }
        return {name: out[..., : out.shape[-1] // 2].sum() for name, out in outs.items()}

    gradients = jax.jit(jax.jacrev(first_tower))(params)

    def influence(of, on):
        grad = np.abs(gradients[on][of]['kernel'])
        half = grad.shape[-1] // 2
        return grad[..., :half].max() > 0, grad[..., half:].max() > 0

    assert influence(of='conv1', on='conv2') == (True, False)
    assert influence(of='conv2', on='conv3') == (True, True)
    assert influence(of='conv3', on='conv4') == (True, False)
    assert influence(of='conv4', on='conv5') == (True, False)
    assert influence(of='conv5', on='fc6') == (True, True)


def test_conv1_extends_beyond_right_and_bottom_edges():
    """55 windows of 11 px at stride 4 end at pixel 226 of 224: the first begins at pixel 0, the last covers 8 of 11."""
    kernel = jnp.ones((11, 11, 3, 96))
    conv1 = model.AlexNet().layers['conv1']
    seen = ops.conv(jnp.ones((1, 224, 224, 3)), kernel, stride=conv1.stride, padding=conv1.padding)[0, ..., 0]
    chex.assert_shape(seen, (55, 55))
    assert seen[0, 0] == 3 * 11 * 11 and seen[53, 53] == 3 * 11 * 11
    assert seen[54, 0] == seen[0, 54] == 3 * 8 * 11 and seen[54, 54] == 3 * 8 * 8


def test_dropout_masks_are_the_same_in_float64():
    network = model.AlexNet()

    def draw():
        return jax.device_get(model.dropout_masks(network, jax.random.key(3), 8, 224))

    masks = draw()
    with jax.enable_x64():
        chex.assert_trees_all_equal(draw(), masks)


def test_dropout_masks_are_fair_and_independent():
    masks = model.dropout_masks(model.AlexNet(), jax.random.key(0), 64, 224)
    assert set(masks) == {'fc6', 'fc7'}
    for mask in masks.values():
        chex.assert_shape(mask, (64, 4096))
        assert abs(float(mask.mean()) - 0.5) < 0.005  # 4.5 standard deviations of 262,144 fair coins
    a, b = masks['fc6'], masks['fc7']
    for left, right in ((a, b), (a[:, :2048], a[:, 2048:]), (a[:32], a[32:])):  # layers, towers, images
        assert abs(float((left == right).mean()) - 0.5) < 0.01


def test_dropout_halves_hidden_outputs_at_test_time():
    """Test logits equal those of a training pass with all units kept and the weights of the next layers halved."""
    network = helpers.network()
    params = helpers.init(network)
    x = jax.random.normal(jax.random.key(1), (2, helpers.SIZE, helpers.SIZE, 3))
    kept = {name: jnp.ones((2, 32), bool) for name in ('fc6', 'fc7')}
    halved = {**params, **{n: {**params[n], 'kernel': params[n]['kernel'] / 2} for n in ('fc7', 'fc8')}}
    chex.assert_trees_all_close(
        network.apply({'params': params}, x), network.apply({'params': halved}, x, kept), rtol=1e-5
    )


def test_paper_config_is_the_default_network():
    assert model_from_config(alexnet_jax.get_config('paper').model) == model.AlexNet()
    remedy = model_from_config(alexnet_jax.get_config('paper:init=authors').model)
    changed = {name: layer for name, layer in remedy.layers.items() if layer != model.AlexNet().layers[name]}
    assert {name: layer.init for name, layer in changed.items()} == dict.fromkeys(
        ('conv3', 'conv4', 'conv5'), 'normal(0.03)'
    )
    with pytest.raises(ValueError, match='init=authors'):
        alexnet_jax.get_config('paper:init=nobody')


def test_layers_are_sorted_by_kind_and_number():
    """The order is conv, local, fc, then by number, not by letter; gaps are allowed."""
    names = ['fc10', 'local8', 'conv10', 'fc9', 'conv2']
    assert architecture.sort_layers(names) == ['conv2', 'conv10', 'local8', 'fc9', 'fc10']
    network = model.AlexNet(layers={'fc12': DenseSpec(features=3), 'fc9': DenseSpec(features=5)}, num_classes=7)
    assert [(name, layer.features) for name, layer in network.layers.items()] == [('fc9', 5), ('fc12', 7)]


def test_sixth_convolution_keeps_names_of_dense_layers():
    layers = alexnet_jax.get_config('sixth_conv').model.layers
    assert architecture.sort_layers(layers)[5:] == ['conv6', 'fc6', 'fc7', 'fc8']


@pytest.mark.parametrize(
    ('changes', 'size', 'towers', 'message'),
    [
        ({}, 6, 1, 'data.image_size=6: conv1: a pooling window of 3 px does not fit maps of 2 px'),
        ({}, 3, 1, 'data.image_size=3: conv1: a window of 5 px does not fit padded maps'),
        ({'fc6': {'features': 33}}, helpers.SIZE, 2, 'fc6 has 33 features .* cannot be split over 2'),
        ({'conv1': {'post': 'relu prelu'}}, helpers.SIZE, 1, "conv1.post='relu prelu': op 'prelu' is not available"),
        ({'conv1': {'groups': 2}}, helpers.SIZE, 1, 'conv1 has 3 inputs'),
        ({'fc6': {'post': 'dropout relu dropout'}}, helpers.SIZE, 1, "relu dropout': expected dropout at most once"),
        ({'conv1': {'features': 9}}, helpers.SIZE, 1, 'conv1.features=9: expected a multiple of the 2 groups of lrn'),
    ],
)
def test_invalid_architectures_are_refused(changes, size, towers, message):
    with pytest.raises(UserError, match=message):
        architecture.infer_shapes(helpers.network(layers=helpers.layers(**changes)), size, towers)


def test_normalization_across_towers_is_refused():
    with pytest.raises(UserError, match=r'conv1: lrn has 1 group\(s\), which cannot be split over 2 towers'):
        architecture.infer_shapes(helpers.network(norm_groups=1), helpers.SIZE, 2)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'layers': 5}, 'model.layers=5: expected a dict of layers by name'),
        ({'layers': {}}, 'model.layers={}: expected a dict of layers by name'),
        ({'layers': {'fc1': 5}}, "model.layers={'fc1': 5}: expected a dict of layers by name"),
        ({'layers': {'cnv1': {}}}, "model.layers has 'cnv1': expected conv, local, fc and a number"),
        ({'layers': {'conv01': {}}}, "model.layers has 'conv01'"),
        (
            {'layers': CONV | {'conv1': {'features': 8, 'kernel': 3, 'pad': 1}}},
            "unknown config key 'model.layers.conv1.pad'",
        ),
        ({'layers': CONV | {'conv1': {'kernel': 3}}}, "missing config key 'model.layers.conv1.features'"),
        ({'layers': CONV | {'conv1': {'features': 8}}}, "missing config key 'model.layers.conv1.kernel'"),
        ({'layers': {'conv1': {'kernel': 3}}}, 'model.layers ends with conv1: expected a fully connected classifier'),
        ({'layers': {'fc1': {'features': 8}}}, "unknown config key 'model.layers.fc1.features'. Use model.num_classes"),
        (
            {'layers': CONV | {'conv1': {'features': 8, 'kernel': 3, 'padding': 0}}},
            'conv1.padding=0: expected a pair',
        ),
        (
            {'layers': CONV | {'conv1': {'features': 8, 'kernel': 3, 'stride': 0}}},
            'conv1.stride=0: expected a positive integer',
        ),
        ({'layers': CONV | {'conv1': {'features': 'a', 'kernel': 3}}}, "model.layers.conv1.features='a'"),
        ({'layers': {'fc1': {'init': 'he'}}}, r"layers.fc1.init='he': expected 'normal\(STD\)'"),
        ({'layers': {'fc1': {'init': 'normal(-0.1)'}}}, r"init='normal\(-0.1\)': expected"),
        ({'layers': {'fc1': {'init': 'normal(nan)'}}}, r"init='normal\(nan\)': expected"),
        ({'layers': {'fc1': {'init': 0.1}}}, 'model.layers.fc1.init=0.1: expected .normal'),
        ({'layers': {'fc1': {'bias': 'fan_in'}}}, "model.layers.fc1.bias='fan_in': expected a number"),
        ({'pool_stride': 0}, 'model.pool_stride=0'),
        ({'pool_stride': 4}, 'model.pool_stride=4: expected at most model.pool_window=3'),
        ({'lrn_n': 0}, 'model.lrn_n=0'),
        ({'dropout_rate': 2.0}, 'model.dropout_rate=2.0'),
        ({'dtype': 'int32'}, "model.dtype='int32': expected one of float32"),
        ({'dtype': 'float64'}, 'needs jax.enable_x64'),
        ({'lrn_alpha_over_n': 1}, 'model.lrn_alpha_over_n=1: expected True or False'),
        ({'lrn_k': 0.0}, 'model.lrn_k=0.0: expected a positive number'),
        ({'lrn_alpha': float('nan')}, 'model.lrn_alpha=nan: expected a number'),
    ],
)
def test_invalid_model_values_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        model_from_config(fields)


def test_unknown_model_key_is_refused():
    with pytest.raises(UserError, match=r"unknown config key 'model.pool_windw'. Did you mean 'pool_window'\?"):
        model_from_config({'pool_windw': 2})


def test_fan_in_initialization():
    """The default of torch.nn: weights and biases from U(-b, b) with b = inputs^-1/2, shifted by a nonzero bias."""
    layers = {
        'conv1': ConvSpec(features=96, kernel=11, stride=4, padding=(2, 2), init='fan_in', post='relu pool'),
        'conv2': ConvSpec(features=96, kernel=3, padding=(1, 1), groups=2, init='fan_in', bias=0.5, post='relu pool'),
        'fc3': DenseSpec(init='fan_in'),
    }
    network = model.AlexNet(layers=layers, num_classes=2000)
    params = helpers.init(network, 0, 95)
    for name, part, bound in (
        ('conv1', 'kernel', (11 * 11 * 3) ** -0.5),
        ('conv1', 'bias', (11 * 11 * 3) ** -0.5),
        ('conv2', 'kernel', (3 * 3 * 48) ** -0.5),
        ('fc3', 'kernel', (5 * 5 * 96) ** -0.5),
        ('fc3', 'bias', (5 * 5 * 96) ** -0.5),
    ):
        values = np.asarray(params[name][part])
        assert 0.9 * bound < np.abs(values).max() <= bound, name
        assert abs(values.std() / (bound / 3**0.5) - 1) < (0.2 if name == 'conv1' and part == 'bias' else 0.05), name
    centered = np.asarray(params['conv2']['bias']) - 0.5
    assert 0.8 * (3 * 3 * 48) ** -0.5 < np.abs(centered).max() <= (3 * 3 * 48) ** -0.5


def test_grouped_classifier_computes_all_logits():
    """It equals a full layer with a block-diagonal kernel, on one device and on two."""
    grouped = helpers.network(layers=helpers.layers(fc8={'groups': 2}))
    params = helpers.init(grouped)
    half, full = np.asarray(params['fc8']['kernel']), np.zeros((32, 12), np.float32)
    full[:16, :6], full[16:, 6:] = half[:, :6], half[:, 6:]
    x = np.random.default_rng(0).normal(0, 60, (4, helpers.SIZE, helpers.SIZE, 3)).astype(np.float32)
    expected = helpers.network().apply({'params': {**params, 'fc8': {**params['fc8'], 'kernel': full}}}, x)
    for tower in (1, 2):
        mesh = sharding.make_mesh(data=1, tower=tower)
        placed = jax.device_put(params, sharding.state_sharding(mesh, params))
        logits = jax.jit(sharding.forward(grouped, mesh))(placed, x)
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_logits_are_float32_in_bfloat16_networks():
    """Rounded to bfloat16, the best two of 1,000 logits tie in one of thirty images; ties count as fractions."""
    network = helpers.network(dtype='bfloat16')
    params = helpers.init(network)
    x = 60 * np.random.default_rng(0).standard_normal((4, helpers.SIZE, helpers.SIZE, 3)).astype(np.float32)
    logits, seen = jax.jit(lambda x: network.apply({'params': params}, x, mutable='intermediates'))(x)
    (hidden,) = seen['intermediates']['fc7.dropout']
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    kernel, bias = (np.asarray(params['fc8'][name]) for name in ('kernel', 'bias'))
    expected = np.asarray(hidden, np.float64) @ np.asarray(kernel.astype(jnp.bfloat16), np.float64) + bias
    chex.assert_trees_all_close(np.asarray(logits, np.float64), expected, rtol=1e-5, atol=1e-5)
    assert (logits != logits.astype(jnp.bfloat16)).mean() > 0.9


@pytest.mark.parametrize(
    ('attributes', 'message'),
    [
        ({'num_classes': '10'}, "model.num_classes='10': expected a positive integer."),
        ({'num_classes': 10.0}, 'model.num_classes=10.0: expected a positive integer.'),
        ({'num_classes': 0}, 'model.num_classes=0: expected a positive integer.'),
        ({'pool_window': None}, 'model.pool_window=None: expected a positive integer.'),
        ({'lrn_alpha': '1e-4'}, "model.lrn_alpha='1e-4': expected a number."),
        ({'dropout_rate': 1}, 'model.dropout_rate=1: expected a number of at least 0 and below 1.'),
        ({'dropout_inverted': 'no'}, "model.dropout_inverted='no': expected True or False."),
        ({'dtype': 'half'}, "model.dtype='half': expected one of float32, bfloat16, float64."),
        ({'dtype': None}, 'model.dtype=None: expected one of float32, bfloat16, float64.'),
        ({'layers': {}}, "model.layers={}: expected layers by name, such as {'fc1': DenseSpec()}."),
        ({'layers': 8}, "model.layers=8: expected layers by name, such as {'fc1': DenseSpec()}."),
        ({'layers': {1: DenseSpec()}}, 'model.layers has 1: expected conv, local, fc and a number'),
        ({'layers': {'fc1': {'bias': 1}}}, "model.layers.fc1={'bias': 1}: expected a DenseSpec of "),
        (
            {'layers': helpers.layers(conv1={'kernel': 5.0})},
            'model.layers.conv1.kernel=5.0: expected a positive integer.',
        ),
        ({'layers': helpers.layers(conv2={'padding': 2})}, 'model.layers.conv2.padding=2: expected a pair of integers'),
        ({'layers': helpers.layers(conv2={'init': 0.1})}, "model.layers.conv2.init=0.1: expected 'normal(STD)'"),
        ({'layers': helpers.layers(conv2={'post': ['relu']})}, "model.layers.conv2.post=['relu']: expected names of"),
        ({'layers': helpers.layers(fc6={'features': 0})}, 'model.layers.fc6.features=0: expected a positive integer.'),
    ],
)
def test_invalid_attributes_are_refused(attributes, message):
    with pytest.raises(UserError) as error:
        model.AlexNet(**attributes)
    assert str(error.value).startswith(message)


def test_numpy_numbers_and_dtypes_are_attributes():
    network = helpers.network(num_classes=np.int64(7), lrn_k=np.float32(2), dtype=jnp.bfloat16)
    assert network == helpers.network(num_classes=7, dtype='bfloat16')
    assert helpers.init(network)['fc8']['bias'].shape == (7,)


@pytest.mark.parametrize(
    ('changes', 'size', 'message'),
    [
        ({'conv1': {'post': 'relu blur'}}, 35, "conv1.post='relu blur': op 'blur' is not available for this layer"),
        ({'fc6': {'post': 'relu pool'}}, 35, "fc6.post='relu pool': op 'pool' is not available for this layer"),
        ({'conv2': {'groups': 3}}, 35, 'conv2'),
        ({}, 3, 'data.image_size=3: conv1: a window of 5 px does not fit'),
    ],
)
def test_layers_that_do_not_fit_are_refused(changes, size, message):
    with pytest.raises(UserError, match=re.escape(message)):
        model.init_params(helpers.network(layers=helpers.layers(**changes)), jax.random.key(0), size)
