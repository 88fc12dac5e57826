"""Networks of configs/ at full size: parameters, shapes and FLOPs computed by hand, and collectives on two devices."""

import ast
import collections
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax.benchmark import hlo_cost
from alexnet_jax.convert import loading
from alexnet_jax.core import architecture, model, sharding
from alexnet_jax.core.config import augmentation_from_config, model_from_config, optimizer_from_config
from alexnet_jax.core.post_ops import POST_OPS, PostOp
from alexnet_jax.inference import summary
from alexnet_jax.training import train
from alexnet_jax.training.recipes import optimizer_hooks
from alexnet_jax.utils.errors import UserError
from tests import ROOT, helpers

# (weights = kernel area x inputs per kernel x kernels, biases, positions at which each kernel is applied).
CONV1, CONV3 = (11 * 11 * 3 * 96, 96, 55 * 55), (3 * 3 * 256 * 384, 384, 13 * 13)
CONV2 = (5 * 5 * 48 * 256, 256, 27 * 27)
CONV4, CONV5 = (3 * 3 * 192 * 384, 384, 13 * 13), (3 * 3 * 192 * 256, 256, 13 * 13)
FC6, FC7, FC8 = (9216 * 4096, 4096, 1), (4096 * 4096, 4096, 1), (4096 * 1000, 1000, 1)
PAPER = [CONV1, CONV2, CONV3, CONV4, CONV5, FC6, FC7, FC8]
SIX = [*PAPER[:5], (3 * 3 * 256 * 256, 256, 6 * 6)]
TORCHVISION = [
    (11 * 11 * 3 * 64, 64, 55 * 55), (5 * 5 * 64 * 192, 192, 27 * 27), (3 * 3 * 192 * 384, 384, 13 * 13),
    (3 * 3 * 384 * 256, 256, 13 * 13), (3 * 3 * 256 * 256, 256, 13 * 13), FC6, FC7, FC8,
]  # fmt: skip
VARIANTS = {
    'paper': (60_965_224, PAPER),
    'paper:init=authors': (60_965_224, PAPER),
    'authors_2012': (60_965_224, PAPER),
    'finetune': (60_965_224, PAPER),
    'finetune:scratch': (60_965_224, PAPER),
    'large_batch': (60_965_224, PAPER),
    'large_batch:16384': (60_965_224, PAPER),
    'large_batch:32768': (60_965_224, PAPER),
    'modern': (60_965_224, PAPER),
    'modern:authors_2012': (60_965_224, PAPER),
    'authors_2012:schedule=2012': (60_965_224, PAPER),
    'authors_2012:schedule=170': (60_965_224, PAPER),
    'ablations:no_normalization': (60_965_224, PAPER),
    'ablations:non_overlapping': (  # 55 -> 28 -> 26 -> 13 -> 11 -> 6
        60_965_224,
        [CONV1, (*CONV2[:2], 26 * 26), CONV3, CONV4, (*CONV5[:2], 11 * 11), FC6, FC7, FC8],
    ),
    'ablations:one_gpu': (
        59_798_312,
        [
            (11 * 11 * 3 * 48, 48, 55 * 55), (5 * 5 * 48 * 128, 128, 27 * 27), (3 * 3 * 128 * 192, 192, 13 * 13),
            (3 * 3 * 192 * 192, 192, 13 * 13), (3 * 3 * 192 * 256, 256, 13 * 13), FC6, FC7, FC8,
        ],
    ),
    'ablations:no_communication': (
        60_714_408,
        [
            CONV1, (5 * 5 * 48 * 320, 320, 27 * 27), (3 * 3 * 160 * 384, 384, 13 * 13), CONV4, CONV5,
            (4608 * 8192, 8192, 1), (4096 * 4096, 4096, 1), FC8,
        ],
    ),
    'sixth_conv': (61_555_304, [*SIX, FC6, FC7, FC8]),
    'sixth_conv:finetune': (61_555_304, [*SIX, FC6, FC7, FC8]),
    'sixth_conv:authors=2012': (61_555_304, [*SIX, FC6, FC7, FC8]),
    'sixth_conv:pretrain': (None, [*SIX, FC6, FC7, (4096 * 21_843, 21_843, 1)]),
    'sixth_conv:authors=2009': (None, [*SIX, FC6, FC7, (4096 * 10_184, 10_184, 1)]),
    'sixth_conv:authors=2011': (None, [*SIX, FC6, FC7, (4096 * 2048, 2048, 1), (2048 * 21_843, 21_843, 1)]),
    'caffe': (60_965_224, PAPER),
    'caffe:net=caffenet': (60_965_224, PAPER),
    'pytorchcv': (  # no groups; conv 1 without padding
        62_378_344,
        [
            (*CONV1[:2], 54 * 54), (5 * 5 * 96 * 256, 256, 27 * 27), CONV3,
            (3 * 3 * 384 * 384, 384, 13 * 13), (3 * 3 * 384 * 256, 256, 13 * 13), FC6, FC7, FC8,
        ],
    ),
    'torchvision': (61_100_840, TORCHVISION),
    'pytorchcv:net=b': (61_100_840, TORCHVISION),
}  # fmt: skip


def load(variant):
    return alexnet_jax.get_config(variant)


def test_variants_cover_all_configs():
    names = {
        path.stem for path in (ROOT / 'configs').glob('*.py')
    }  # cifar10 is tested in tests/experiments/test_cifar10.py
    assert names - {'quickstart', 'cifar10', 'tiny_imagenet'} == {variant.partition(':')[0] for variant in VARIANTS}


@pytest.mark.parametrize('variant', VARIANTS)
def test_parameters_shapes_and_products(variant):
    total, rows = VARIANTS[variant]
    config = load(variant)
    network, size = model_from_config(config.model), config.data.image_size
    sizes = architecture.infer_shapes(network, size, towers=config.mesh.tower)
    shapes = jax.eval_shape(lambda key: model.init_params(network, key, size), jax.random.key(0))
    assert list(sizes) == list(network.layers) and set(sizes) == set(shapes)
    for (name, found), (weights, biases, positions) in zip(sizes.items(), rows, strict=True):
        kernel, bias = shapes[name]['kernel'], shapes[name]['bias']
        assert (kernel.size, bias.size) == (weights, biases), name
        assert found.parameters == weights + biases, name
        assert found.flops == 2 * weights * positions, name
    assert total in (None, sum(s.parameters for s in sizes.values()))
    # The inferred shapes are those of the network's intermediates.
    run = lambda p, x: network.apply({'params': p}, x, mutable='intermediates')  # noqa: E731
    logits, extra = jax.eval_shape(run, shapes, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    for name, found in sizes.items():
        seen = {key: v[0].shape[1:] for key, v in extra['intermediates'].items() if key.startswith(f'{name}.')}
        last = ([*network.layers[name].post.split()] or ['linear'])[-1]
        assert (seen[f'{name}.linear'], seen[f'{name}.{last}']) == (found.linear, found.outputs)
    assert logits.shape == (1, config.model.num_classes)
    assert sizes['conv5'].outputs == (6, 6, 256)
    augmentation_from_config(config.data)
    optimizer_from_config(config.optim, steps_per_epoch=100.0, layers=list(network.layers))


def test_flops_agree_with_xla():
    """XLA does not count products with padding zeros. taps: (those on the map, all) along one axis of the output."""
    network = model.AlexNet()
    shapes = jax.eval_shape(lambda key: model.init_params(network, key, 224), jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    counted = jax.jit(network.apply).lower({'params': shapes}, x).compile().cost_analysis()['flops']
    taps = {'conv1': (55 * 11 - 3, 55 * 11), 'conv2': (27 * 5 - 6, 27 * 5)}
    taps |= {name: (13 * 3 - 2, 13 * 3) for name in ('conv3', 'conv4', 'conv5')}
    flops = 0
    for name, sizes in architecture.infer_shapes(network, 224).items():
        on_map, total = taps.get(name, (1, 1))
        flops += sizes.flops * (on_map / total) ** 2
    assert flops < counted < 1.01 * flops  # XLA also counts normalization, pooling and biases


@pytest.mark.parametrize(
    ('variant', 'gathers'),
    [
        ('authors_2012', 4),
        ('ablations:no_normalization', 4),
        ('ablations:non_overlapping', 4),
        ('sixth_conv', 5),
        ('ablations:no_communication', 1),
    ],
)
def test_collectives(variant, gathers):
    """Each layer that reads both towers adds one all-gather. test_sharding.py has the paper's four."""
    config = load(variant)
    network, mesh = model_from_config(config.model), sharding.make_mesh(data=1, tower=2)
    shapes = jax.eval_shape(lambda key: model.init_params(network, key, 224), jax.random.key(0))
    put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    params = jax.tree.map(put, shapes, sharding.state_sharding(mesh, shapes))
    x = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32, sharding=sharding.batch_sharding(mesh))
    text = jax.jit(sharding.forward(network, mesh)).lower(params, x).compile().as_text()
    assert collections.Counter(re.findall(helpers.COLLECTIVES, text)) == {'all-gather': gathers}
    # The program gathers as many bytes as the summary states, for two float32 images.
    gathered = architecture.gathered_elements(network, 224, 2)
    assert len(gathered) == gathers
    assert hlo_cost.collective_bytes(text, 2)['all-gather'][1] == 2 * 4 * sum(gathered.values())


@pytest.mark.parametrize(
    ('variant', 'message'),
    [
        ('caffe', 'conv1: lrn has 1 group.* cannot be split over 2 towers; use mesh.tower=1'),
        ('torchvision', 'mesh.tower=2: no layer has groups=2; use mesh.tower=1'),
        ('ablations:one_gpu', 'mesh.tower=2: no layer has groups=2; use mesh.tower=1'),
    ],
)
def test_one_tower_networks_refuse_two(variant, message):
    config = load(variant)
    assert config.mesh.tower == 1
    with pytest.raises(UserError, match=message):
        architecture.infer_shapes(model_from_config(config.model), config.data.image_size, towers=2)


def _rate(config, count, steps_per_epoch):
    """Measures the learning rates (of weights, of biases) at an update, with decay off, gradient -1 and velocity 0."""
    optimizer = optimizer_from_config(
        {**config.optim, 'weight_decay': 0.0, 'bias_decay': 0.0}, steps_per_epoch=steps_per_epoch, layers=['conv1']
    )
    params = {'conv1': {'kernel': jnp.zeros(1), 'bias': jnp.zeros(1)}}
    state = optimizer.tx.init(params)._replace(count=jnp.int32(count))
    updates, _ = optimizer.tx.update(jax.tree.map(lambda p: p - 1, params), state, params)
    return updates['conv1']['kernel'][0], updates['conv1']['bias'][0]


def test_caffe_recipe():
    """Values of `bvlc_alexnet/solver.prototxt` (base_lr, gamma, stepsize, max_iter, decay) and `train_val.prototxt`."""
    config = load('caffe')
    layers = config.model.layers
    biases = {'conv1': 0, 'conv2': 0.1, 'conv3': 0, 'conv4': 0.1, 'conv5': 0.1, 'fc6': 0.1, 'fc7': 0.1, 'fc8': 0}
    assert {name: layer.bias for name, layer in layers.items()} == biases
    narrow = {name for name, layer in layers.items() if layer.init == 'normal(0.005)'}
    assert narrow == {'fc6', 'fc7'} and {layer.init for layer in layers.values()} == {'normal(0.005)', 'normal(0.01)'}
    assert (config.optim.momentum, config.optim.weight_decay, config.optim.bias_decay) == (0.9, 0.0005, 0)
    assert (config.batch_size, config.data.image_size, config.data.reflect, config.data.color_std) == (
        256,
        227,
        True,
        0,
    )
    assert config.data.all_positions and config.data.mean == 'crop'
    per_epoch = 1_281_167 / 256
    assert math.ceil(config.num_epochs * per_epoch) == 450_000
    for count, rate in [(0, 0.01), (99_999, 0.01), (100_000, 1e-3), (250_000, 1e-4), (399_999, 1e-5), (400_000, 1e-6)]:
        assert _rate(config, count, per_epoch) == pytest.approx((rate, 2 * rate)), count


def test_torchvision_recipe():
    """Values of `references/classification` (train.py --lr 1e-2, presets.py) and PyTorch's default initialization."""
    config = load('torchvision')
    optimizer, data = config.optim, config.data
    assert {(layer.init, layer.bias) for layer in config.model.layers.values()} == {('fan_in', 0.0)}
    assert (optimizer.momentum, optimizer.weight_decay, optimizer.bias_decay) == (0.9, 1e-4, 1e-4)
    assert not optimizer.rate_in_velocity and (config.batch_size, config.num_epochs) == (32 * 8, 90)
    assert (data.image_size, data.crop_area, data.reflect, data.color_std) == (224, (0.08, 1.0), True, 0)
    assert data.mean == 'channel' and np.allclose(np.array(data.pixel_std) / 255, [0.229, 0.224, 0.225])
    for count, rate in [(0, 0.01), (299, 0.01), (300, 1e-3), (599, 1e-3), (600, 1e-4), (899, 1e-4)]:
        assert _rate(config, count, 10) == pytest.approx((rate, rate)), count


# base_lr, max_iter, rampup_interval and larc of the solver files. All have `lr_policy: "poly"` and `power: 2`.
SOLVERS = {
    '1024': (2, 125_000, 0, False),
    '4096': (10, 31_300, 1250, False),
    '8192': (10, 15_600, 0, True),
    '16384': (16, 7_800, 0, True),
    '32768': (32, 4_000, 400, False),
    '1024-sgd': (0.02, 125_000, 0, False),
}


def _caffe_rate(step, base_lr, max_iter, rampup_interval):
    """`SGDSolver::GetLearningRate` of NVIDIA's Caffe."""
    if step < rampup_interval:
        alpha = step / rampup_interval
        return 1 + (base_lr - 1) * alpha * alpha
    return base_lr * (1 - step / max_iter) ** 2


@pytest.mark.parametrize('batch', SOLVERS)
def test_large_batches_follow_nvidias_solver_files(batch):
    """The learning rates at 100 updates of the run and around the end of warm-up."""
    base_lr, max_iter, rampup, clip = SOLVERS[batch]
    config = load(f'large_batch:{batch}')
    assert config.batch_size == int(batch.partition('-')[0])
    assert config.optim.trust_clip == clip and config.optim.trust_coefficient == (0.0 if 'sgd' in batch else 0.001)
    assert config.optim.momentum == 0.9 and config.optim.weight_decay == config.optim.bias_decay == 0.0005
    per_epoch = 1_281_167 / config.batch_size
    assert abs(math.ceil(config.num_epochs * per_epoch) / max_iter - 1) < 0.025  # 100 epochs, as their comments state
    hooks = optimizer_hooks(config.optim, per_epoch, max_iter)
    optimizer = optimizer_from_config(
        config.optim, steps_per_epoch=per_epoch, layers=list(config.model.layers), **hooks
    )
    state = optimizer.tx.init({'conv1': {'kernel': np.zeros(1), 'bias': np.zeros(1)}})
    steps = [*np.linspace(0, max_iter - 1, 100).astype(int), max(rampup - 1, 0), rampup, rampup + 1]
    rates = jax.vmap(lambda step: optimizer.learning_rate(state._replace(count=step)))(jnp.asarray(steps, jnp.int32))
    expected = [_caffe_rate(int(step), base_lr, max_iter, rampup) for step in steps]
    np.testing.assert_allclose(rates, expected, rtol=1e-4, atol=1e-6 * base_lr)


def _flat(config, prefix=''):
    """Returns a flat dict: {'optim.momentum': 0.9, ...}."""
    values = {}
    for key, value in config.items():
        values |= _flat(value, f'{prefix}{key}.') if hasattr(value, 'items') else {prefix + key: value}
    return values


def test_variants_change_only_the_stated_keys():
    """Compares all keys with those of `paper.py`."""
    paper = _flat(load('paper'))
    changed = {
        'ablations:no_normalization': {f'model.layers.{name}.post' for name in ('conv1', 'conv2')},
        'ablations:non_overlapping': {'model.pool_window', *(f'model.layers.{n}.padding' for n in ('conv2', 'conv5'))},
        'ablations:no_communication': {
            'model.layers.conv2.features', 'model.layers.fc6.features',
            *(f'model.layers.{name}.groups' for name in ('conv3', 'fc6', 'fc7')),
        },
        'ablations:one_gpu': {
            'model.norm_groups', 'mesh.tower', *(f'model.layers.{n}.groups' for n in ('conv2', 'conv4', 'conv5')),
            *(f'model.layers.conv{i}.features' for i in (1, 2, 3, 4)),
        },
        'sixth_conv': {
            f'model.layers.conv6.{field}'
            for field in ('features', 'kernel', 'stride', 'padding', 'groups', 'init', 'bias', 'post')
        },
    }  # fmt: skip
    for variant, keys in changed.items():
        flat = _flat(load(variant))
        found = {key for key, value in flat.items() if value != paper.get(key)}
        assert found == keys, variant


def test_config_docstrings_state_source_and_results():
    """Each file opens with source, command, reported results and results measured here."""
    for path in (ROOT / 'configs').glob('*.py'):
        doc = ' '.join(ast.get_docstring(ast.parse(path.read_text())).split())
        assert f'alexnet_jax train --config={path.stem}' in doc, path.name
        if path.stem != 'quickstart':
            assert 'Here:' in doc, path.name
            assert re.search(r'top-1', doc) and re.search(r'center crop|ten views', doc), path.name


def test_summary_of_the_paper():
    """Per image each tower receives half of 13x13x256 before conv 3, and half of 6x6x256, 4096, 4096 before fc 6-8."""
    gathered = architecture.gathered_elements(model.AlexNet(), 224, 2)
    assert gathered == {'conv3': 13 * 13 * 128, 'fc6': 6 * 6 * 128, 'fc7': 2048, 'fc8': 2048}
    assert architecture.gathered_elements(model.AlexNet(), 224, 1) == {}
    text = summary.summary(model.AlexNet(), 224, 2)
    rows = {line.split()[0]: line for line in text.splitlines()}
    assert '60,965,224' in rows['all'] and '30,336' in rows['all']
    assert '21,632' in rows['conv3'] and '3x3 / 1' in rows['conv3'] and '13x13x384' in rows['conv3']


def test_summary_has_receptive_fields(monkeypatch):
    """A dense layer sees 223 pixels of pytorchcv's net=a: its 54 windows of 11 px with stride 4 end there."""
    network = model_from_config(load('pytorchcv').model)
    rows = {line.split()[0]: line.split() for line in summary.summary(network, 224, 1).splitlines()}
    assert ['195x195', '/', '32'] == rows['conv5'][-5:-2] and '223x223' in rows['fc6']
    monkeypatch.setitem(POST_OPS, 'relu', POST_OPS['relu']._replace(window=None))
    rows = {line.split()[0]: line.split() for line in summary.summary(network, 224, 1).splitlines()}
    assert '?' in rows['conv1'] and '?' in rows['fc8']


@pytest.mark.slow
def test_custom_operation_trains_on_two_towers(monkeypatch, tmp_path):
    """A custom operation is a function and a table entry. It mixes pairs of channels, so it states its groups."""

    def pair_mean(x, context):
        assert x.shape[-1] % (2 * context.groups) == 0
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        return jnp.broadcast_to(pairs.mean(-1, keepdims=True), pairs.shape).reshape(x.shape)

    monkeypatch.setitem(POST_OPS, 'pair_mean', PostOp(pair_mean, groups=lambda network: 2))
    monkeypatch.setitem(POST_OPS, 'halve', PostOp(lambda x, context: x[:, ::2, ::2] / 2, maps_only=True))
    seen = {}
    for tower in (1, 2):
        config = helpers.digits_config(**{'num_steps': 3, 'mesh.tower': tower, 'mesh.data': 1})
        config.model.layers.conv1.post = 'relu pair_mean halve'
        config.model.layers.fc6.post = 'relu pair_mean dropout'
        train.train_and_evaluate(config, str(tmp_path / str(tower)))
        seen[tower] = loading.load_checkpoint(str(tmp_path / str(tower))).params
    chex.assert_trees_all_close(seen[1], seen[2], rtol=1e-4, atol=1e-6)
    sizes = architecture.infer_shapes(model_from_config(config.model), 28, towers=2)
    assert sizes['conv1'].outputs == (14, 14, 8)
    monkeypatch.setitem(POST_OPS, 'pair_mean', PostOp(pair_mean, groups=lambda network: 1))
    with pytest.raises(UserError, match=r'conv1: pair_mean has 1 group\(s\), which cannot be split'):
        architecture.infer_shapes(model_from_config(config.model), 28, towers=2)
    config.model.layers.fc6.post = 'halve'
    with pytest.raises(UserError, match="op 'halve' is not available .*; use dropout, pair_mean, relu, tanh"):
        architecture.infer_shapes(model_from_config(config.model), 28)
