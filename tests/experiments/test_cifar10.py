"""The CIFAR-10 networks: parameters and shapes by hand, towers against one device, and config changes."""

import chex
import jax
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax.convert import layout
from alexnet_jax.core import architecture, model, post_ops, sharding
from alexnet_jax.core.architecture import ConvSpec, DenseSpec, LocalSpec
from alexnet_jax.core.config import model_from_config
from alexnet_jax.experiments import ablations, cifar10
from alexnet_jax.training.check_config import _check_keys
from alexnet_jax.utils.errors import UserError

CONV1, CONV2, CONV3 = 5 * 5 * 3 * 32 + 32, 5 * 5 * 32 * 32 + 32, 5 * 5 * 32 * 64 + 64
WIDE1, WIDE2 = 5 * 5 * 3 * 64 + 64, 5 * 5 * 64 * 64 + 64
PARAMETERS = {
    '80sec': CONV1 + CONV2 + CONV3 + (4 * 4 * 64 * 64 + 64) + (64 * 10 + 10),
    '19pct': CONV1 + CONV2 + CONV3 + (4 * 4 * 64 * 10 + 10),
    '18pct': CONV1 + CONV2 + CONV3 + (4 * 4 * 64 * 10 + 10),
    # Each of the 6 x 6 positions has its own kernels and biases.
    '13pct': WIDE1 + WIDE2 + 36 * (9 * 64 * 32 + 32) + 36 * (9 * 32 * 32 + 32) + (36 * 32 * 10 + 10),
    '11pct': WIDE1 + WIDE2 + 36 * (9 * 64 * 64 + 64) + 36 * (9 * 64 * 32 + 32) + (36 * 32 * 10 + 10),
}


def _config(name):
    return alexnet_jax.get_config(f'cifar10:{name}' if name else 'cifar10')


@pytest.mark.parametrize('name', cifar10.NETS)
def test_parameter_counts(name):
    config = _config(name)
    network = model_from_config(config.model)
    sizes = architecture.infer_shapes(network, config.data.image_size)
    assert sum(size.parameters for size in sizes.values()) == PARAMETERS[name]
    drawn = jax.eval_shape(lambda: model.init_params(network, jax.random.key(0), config.data.image_size))
    assert {layer: sum(x.size for x in parts.values()) for layer, parts in drawn.items()} == {
        layer: size.parameters for layer, size in sizes.items()
    }


def test_authors_weight_decays_and_stages():
    """cuda-convnet's files: decay 0.004 on convolutions, 3 on the classifier; rate / 10 at epoch 120, again at 130."""
    config = _config('19pct')
    assert (config.optim.weight_decay, dict(config.optim.layer_decays)) == (0.004, {'fc4': 3.0})
    assert [row[:3] for row in config.optim.stages] == [(0, 1.0, 1.0), (120, 0.1, 0.1), (130, 0.01, 0.01)]
    assert (config.optim.learning_rate, config.optim.bias_rate, config.batch_size) == (0.001, 2.0, 128)


def test_18pct_normalizes_within_each_map():
    """layers-18pct.cfg: type=rnorm, size=3, scale=0.00005, pow=.75; scale / size^2, the constant is 1."""
    network = model_from_config(_config('18pct').model)
    for name in ('conv1', 'conv2'):
        assert network.layers[name].post.split()[-1] == 'spatial_norm'
    x = np.random.default_rng(0).uniform(-400, 400, (1, 4, 5, 2)).astype(np.float32)
    expected = np.empty_like(x, np.float64)
    for i, j, c in np.ndindex(4, 5, 2):
        window = x[0, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2, c].astype(np.float64)
        expected[0, i, j, c] = x[0, i, j, c] / (1 + 0.00005 / 9 * (window**2).sum()) ** 0.75
    found = post_ops.POST_OPS['spatial_norm'].function(x, post_ops.Context(network, 1, None))
    chex.assert_trees_all_close(np.asarray(found, np.float64), expected, rtol=1e-5)


@pytest.mark.parametrize('base', ['quickstart', 'caffe', 'torchvision', 'authors_2012', 'large_batch', 'modern'])
def test_networks_do_not_depend_on_the_base_config(base):
    """Except the data path, the classes, and keys about dropout and color augmentation, which these networks lack."""
    no_matter = {'path', 'num_classes', 'dropout_inverted', 'color_scale', 'color_divide', 'color_epochs'}
    for name in cifar10.NETS:
        config, expected = alexnet_jax.get_config(base), _config(name)
        config.update_from_flattened_dict(cifar10.NETS[name])
        assert config.batch_size == expected.batch_size
        for part in ('data', 'model', 'optim'):
            values = config[part].items()
            assert {key for key, value in values if value != expected[part][key]} <= no_matter


@pytest.mark.slow
def test_unshared_layers_agree_over_two_towers():
    wide = {'init': 'normal(0.5)'}
    network = model.AlexNet(
        layers={
            'conv1': ConvSpec(features=4, kernel=3, stride=2, padding=(1, 1), bias=0.1, post='tanh avg_pool', **wide),
            'local2': LocalSpec(features=6, kernel=3, padding=(1, 1), groups=2, bias=0.1, post='relu lrn', **wide),
            'local3': LocalSpec(features=4, kernel=3, bias=0.1, post='tanh', **wide),
            'fc4': DenseSpec(**wide),
        },
        num_classes=3,
    )
    params = model.init_params(network, jax.random.key(0), 15)
    x = np.random.default_rng(0).standard_normal((4, 15, 15, 3)).astype(np.float32)
    labels = np.array([0, 1, 2, 0])
    with jax.enable_x64():
        params, x = jax.tree.map(lambda a: np.asarray(a, np.float64), params), x.astype(np.float64)
        network = network.clone(dtype='float64')

        def loss(params, forward):
            logits = forward(params, x)
            return -jax.nn.log_softmax(logits)[np.arange(4), labels].mean()

        gradients = []
        for data, tower in ((1, 1), (2, 2)):
            forward = sharding.forward(network, sharding.make_mesh(data=data, tower=tower))
            gradients.append(jax.jit(jax.value_and_grad(lambda p, f=forward: loss(p, f)))(params))
    chex.assert_trees_all_close(jax.device_get(gradients[1]), jax.device_get(gradients[0]), rtol=1e-9, atol=1e-12)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradients[0]))


def test_figure1_variants_differ_only_in_activation():
    base = alexnet_jax.get_config('cifar10:19pct')
    base.model.layers.conv3.post += ' dropout'  # is no part of "no regularization of any kind"
    relu, tanh = (
        ablations.with_changes(base, cifar10.figure1_changes(activation, 0.01)) for activation in ('relu', 'tanh')
    )
    assert str(relu) != str(tanh) and str(relu).replace('relu', 'tanh') == str(tanh)
    assert [layer.post for layer in tanh.model.layers.values()] == ['tanh pool', 'tanh avg_pool', 'tanh avg_pool', '']
    assert not any((relu.optim.weight_decay, relu.optim.layer_decays, relu.data.reflect, relu.data.color_std))


def test_export_of_unshared_layers_is_refused():
    network = model_from_config(_config('13pct').model)
    with pytest.raises(UserError, match='local layers cannot be converted'):
        layout.from_params(network, 24, {})


def test_unknown_variant_is_refused():
    with pytest.raises(ValueError, match='expected one of 80sec'):
        _config('20pct')


def test_changes_use_known_config_keys():
    for changes in (*cifar10.NETS.values(), cifar10.figure1_changes('tanh', 0.1)):
        _check_keys(ablations.with_changes(alexnet_jax.get_config('paper'), changes))
