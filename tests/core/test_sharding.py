"""One device, two towers, two data shards: the same numbers, and only the communication of the paper."""

import collections
import functools
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.benchmark import hlo_cost
from alexnet_jax.core import architecture, augment, model, sharding, train_step
from alexnet_jax.core.image_stats import ImageStats
from alexnet_jax.data import pipeline
from alexnet_jax.training import recipes
from alexnet_jax.utils import environment
from alexnet_jax.utils.errors import UserError
from tests import ROOT, helpers

MESHES = [(1, 2), (2, 2)]
SPLIT = [(2, 1), (4, 1), (2, 2)]  # for mesh.dense='split'


def test_gpus_of_several_hosts_form_a_mesh():
    """XLA calls each host of GPUs a slice; the towers are neighbors on one host."""

    class Gpu(SimpleNamespace):
        __hash__ = object.__hash__

    devices = [Gpu(id=i, slice_index=i // 4, process_index=i // 4, platform='gpu', device_kind='') for i in range(8)]
    mesh = sharding.make_mesh(data=0, tower=2, devices=devices)
    assert dict(mesh.shape) == {'data': 4, 'tower': 2}
    assert [[device.id for device in row] for row in mesh.devices] == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ('platform', 'wanted', 'plugins', 'told'),
    [
        ('cpu', None, ['xla_cuda12'], 'no device for xla_cuda12'),
        ('cpu', 'cpu', ['xla_cuda12'], ''),
        ('gpu', None, ['xla_cuda12'], ''),
        ('cpu', None, [], ''),
    ],
)
def test_undetected_gpu_is_reported(platform, wanted, plugins, told, monkeypatch, capsys):
    """JAX is silent if a GPU plugin is installed but finds no GPU."""
    found = [SimpleNamespace(name=name) for name in plugins]
    monkeypatch.setattr(environment.metadata, 'entry_points', lambda group: found if group == 'jax_plugins' else [])
    monkeypatch.setattr(environment.jax, 'config', SimpleNamespace(jax_platforms=wanted))
    monkeypatch.setattr(environment.os.path, 'exists', lambda path: False)
    environment.warn_if_no_accelerator.__wrapped__(platform)
    said = capsys.readouterr().err
    assert told in said and bool(said) == bool(told)


def _place(mesh, tree, split_dense=False):
    return jax.device_put(tree, sharding.state_sharding(mesh, tree, split_dense=split_dense))


@pytest.mark.parametrize(
    ('data', 'tower', 'split_dense'), [*((*mesh, False) for mesh in MESHES), *((*mesh, True) for mesh in SPLIT)]
)
@pytest.mark.parametrize('full_size', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_forward_agrees_with_one_device(data, tower, split_dense, full_size):
    check_forward(data, tower, split_dense, full_size=full_size)


def check_forward(data, tower, split_dense, *, full_size=False, batch=4):
    """Compares the logits with those of one device, without and with dropout."""
    network, size = (model.AlexNet(), 224) if full_size else (helpers.network(), helpers.SIZE)
    params = helpers.init(network, 0, size)
    x = 60 * jax.random.normal(jax.random.key(1), (batch, size, size, 3))
    masks = model.dropout_masks(network, jax.random.key(2), batch, size)
    mesh = sharding.make_mesh(data=data, tower=tower)
    forward = jax.jit(sharding.forward(network, mesh, split_dense=split_dense))
    for train in (None, masks):
        expected = jax.jit(network.apply)({'params': params}, x, train)
        logits = forward(_place(mesh, params, split_dense), x, train)
        chex.assert_trees_all_close(logits, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))
        # Each device holds the logits of its images for the classes of its tower.
        assert logits.addressable_data(0).shape == (batch // data, network.num_classes // tower)


def _train(network, mesh, number, size, parts=1, weight=(1, 1, 1, 1), hooks=None, split_dense=False, **changes):
    """Runs `number` float64 updates with dropout, decay and a drop; returns the first velocity and the last state."""
    count = len(weight)
    schedule = {'schedule': 'epochs', 'stages': ((0, 1, 1, ()), (0.2, 0.1, 0.1, ()))}
    optimizer = helpers.optimizer(network, **{**schedule, **changes})
    rng = np.random.default_rng(0)
    image_stats = ImageStats(
        rng.uniform(100, 140, (size + 5, size + 5, 3)), np.array([300.0, 1000.0, 9000.0]), np.eye(3)
    )
    params = helpers.to_float64(helpers.init(network, 0, size))
    state = _place(mesh, train_step.TrainState(jnp.int32(0), params, optimizer.tx.init(params)), split_dense)
    forward = sharding.forward(network, mesh, split_dense=split_dense)
    fixed = dict(
        network=network, forward=forward, optimizer=optimizer, grad_accum_steps=parts, data_shards=mesh.shape['data']
    )
    fixed |= {'augmentation': augment.Augmentation(image_size=size), **(hooks or {})}
    step = jax.jit(lambda *args: train_step.train_step(*args, **fixed))
    gradient = None
    for i in range(number):
        batch = {
            'image': rng.integers(0, 256, (count, size, size, 3), np.uint8),
            'offset': rng.integers(0, 5, (count, 2), np.int32),
            'reflect': rng.random(count) < 0.5,
            'color': rng.normal(0, 0.1, (count, 3)),
            'label': rng.integers(0, 12, count, np.int32),
            'weight': np.array(weight, np.float32),
        }
        state, report = step(state, sharding.to_mesh(mesh, batch), image_stats, jax.random.key(7))
        assert report['finite']
        if i == 0:  # -rate * (gradient + decay * weights): the gradient, except for terms that both meshes share
            gradient = jax.device_get(state.opt_state.velocity)
    return gradient, jax.device_get((state.params, state.opt_state.velocity, state.opt_state.average))


SLOW = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in ((2, 2, False), (4, 1, False), *((*mesh, True) for mesh in MESHES))
]


@pytest.mark.parametrize(('data', 'tower', 'full_size'), [(1, 2, False), *SLOW])
def test_updates_agree_with_one_device(data, tower, full_size):
    # float64: in float32 the maxima of pooling flip on nearly equal values, and correct programs diverge.
    with jax.enable_x64():
        network = model.AlexNet(dtype='float64') if full_size else helpers.network(dtype='float64')
        size = 224 if full_size else helpers.SIZE
        expected = _train(network, sharding.make_mesh(data=1, tower=1), 3, size)
        found = _train(network, sharding.make_mesh(data=data, tower=tower), 3, size)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float64
        assert np.abs(a - b).max() <= 1e-9 * np.abs(b).max()


def check_split_dense(data, tower, parts=1, classes=12, full_size=False):
    """Compares three updates with split dense layers with those of one device, in float64."""
    weight = (1, 0, 1, 1) + (1,) * (max(4, parts * data) - 4)  # with one unreadable image
    with jax.enable_x64():
        changes = {} if full_size else {'num_classes': classes}
        network = model.AlexNet(dtype='float64') if full_size else helpers.network(dtype='float64', **changes)
        size = 224 if full_size else helpers.SIZE
        mesh = sharding.make_mesh(data=data, tower=tower)
        expected = _train(network, sharding.make_mesh(data=1, tower=1), 3, size, weight=weight)
        found = _train(network, mesh, 3, size, parts=parts, weight=weight, split_dense=True)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float64
        assert np.abs(a - b).max() <= 1e-9 * np.abs(b).max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('data', 'tower', 'parts', 'classes', 'full_size'),
    [(2, 1, 1, 12, False), (2, 2, 1, 13, False), (4, 1, 1, 12, False), (2, 2, 2, 12, False), (2, 2, 1, 1000, True)],
)
def test_split_dense_layers_make_the_same_update(data, tower, parts, classes, full_size):
    """Also with microbatches, and with a number of classes that the devices do not divide."""
    check_split_dense(data, tower, parts, classes, full_size)


@pytest.mark.slow
def test_eight_devices_share_the_dense_layers():
    code = """
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
from tests.core.test_sharding import check_forward, check_split_dense
check_forward(4, 2, True, batch=8)
check_forward(8, 1, True, batch=8)
check_split_dense(4, 2)
check_split_dense(8, 1, parts=2)
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_unshareable_dense_layers_are_refused():
    mesh = sharding.make_mesh(data=4, tower=1)
    with pytest.raises(UserError, match='4 devices cannot share the 30 outputs of fc6'):
        sharding.forward(helpers.network(layers=helpers.layers(fc6={'features': 30})), mesh, split_dense=True)
    with pytest.raises(UserError, match=r'outputs of fc6 \(groups=2\)'):
        sharding.forward(helpers.network(layers=helpers.layers(fc6={'groups': 2})), mesh, split_dense=True)
    # Classes that are added would move the boundary between the groups of the classifier.
    grouped = helpers.layers(fc6={'groups': 2}, fc7={'groups': 2}, fc8={'groups': 2})
    towers = sharding.make_mesh(data=2, tower=2)
    sharding.forward(helpers.network(layers=grouped), towers, split_dense=True)
    with pytest.raises(UserError, match=r'the 10 outputs of fc8 \(groups=2\)'):
        sharding.forward(helpers.network(layers=grouped, num_classes=10), towers, split_dense=True)


@pytest.mark.slow
def test_towers_can_stay_separate_in_split_dense_layers():
    """With one group for each tower, a dense layer reads its own tower. Classes that are added get no dropout."""
    layers = helpers.layers(fc6={'groups': 2}, fc7={'groups': 2}, fc8={'post': 'dropout'})
    network = helpers.network(layers=layers, num_classes=10)
    mesh, params = sharding.make_mesh(data=2, tower=2), helpers.init(network)
    x = 60 * jax.random.normal(jax.random.key(1), (4, helpers.SIZE, helpers.SIZE, 3))
    masks = model.dropout_masks(network, jax.random.key(2), 4, helpers.SIZE)
    logits = jax.jit(sharding.forward(network, mesh, split_dense=True))(_place(mesh, params, True), x, masks)
    expected = network.apply({'params': params}, x, masks)
    chex.assert_trees_all_close(logits, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.slow
@pytest.mark.parametrize(('data', 'tower'), [(1, 1), (2, 2)])
def test_gradient_accumulation_makes_the_same_update(data, tower):
    """With dropout and one unreadable image, so that the microbatches have different weights."""
    weight = (1, 0, 1, 1)
    with jax.enable_x64():
        network = helpers.network(dtype='float64')
        whole = _train(network, sharding.make_mesh(data=1, tower=1), 2, helpers.SIZE, weight=weight)
        found = _train(network, sharding.make_mesh(data=data, tower=tower), 2, helpers.SIZE, parts=2, weight=weight)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        assert np.abs(a - b).max() <= 1e-9 * np.abs(b).max()


@pytest.mark.slow
@pytest.mark.parametrize(('data', 'tower', 'parts'), [(1, 1, 2), (2, 2, 1)])
def test_later_recipe_makes_the_same_update(data, tower, parts):
    """Mixup, smoothed labels, cosine and an average of the parameters, with one unreadable image."""
    hooks = {'mix': functools.partial(recipes.mixup, alpha=0.5)}
    hooks['likelihood'] = functools.partial(recipes.log_likelihood, smoothing=0.1)
    options = {'weight': (1, 0, 1, 1), 'hooks': hooks, 'average_decay': 0.5, 'schedule': 'cosine', 'total_steps': 4}
    with jax.enable_x64():
        network = helpers.network(dtype='float64')
        expected = _train(network, sharding.make_mesh(data=1, tower=1), 2, helpers.SIZE, **options)
        found = _train(network, sharding.make_mesh(data=data, tower=tower), 2, helpers.SIZE, parts=parts, **options)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max() <= 1e-9 * np.abs(b).max()


def _collectives(function, *args):
    text = jax.jit(function).lower(*args).compile().as_text()
    return collections.Counter(re.findall(helpers.COLLECTIVES, text))


@pytest.mark.parametrize(('data', 'tower'), MESHES)
def test_collectives_of_the_papers_network(data, tower):
    network = model.AlexNet()
    mesh = sharding.make_mesh(data=data, tower=tower)
    shapes = jax.eval_shape(lambda key: model.init_params(network, key, 224), jax.random.key(0))
    put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    params = jax.tree.map(put, shapes, sharding.state_sharding(mesh, shapes))
    on_data = sharding.batch_sharding(mesh)
    x = jax.ShapeDtypeStruct((4, 224, 224, 3), jnp.float32, sharding=on_data)
    batch = {
        'label': jax.ShapeDtypeStruct((4,), jnp.int32, sharding=on_data),
        'weight': jax.ShapeDtypeStruct((4,), jnp.float32, sharding=on_data),
    }
    forward = sharding.forward(network, mesh)
    # Before conv3, fc6, fc7 and fc8; nothing else crosses devices.
    assert _collectives(forward, params, x) == {'all-gather': 4}
    found = _collectives(lambda p, x, b: train_step.loss_and_sums(p, x, b, None, forward=forward), params, x, batch)
    assert found.pop('all-gather') == 4
    assert set(found) == {'all-reduce'}


@pytest.mark.parametrize(('data', 'tower'), [(2, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_bytes_of_split_dense_layers_follow_the_formula(data, tower):
    """The formulas of docs/scaling.md, for the gradient with 8 images for each shard."""
    network, mesh, images = helpers.network(), sharding.make_mesh(data=data, tower=tower), 8
    shapes = jax.eval_shape(lambda: helpers.init(network))
    shardings, on_data = sharding.state_sharding(mesh, shapes, split_dense=True), sharding.batch_sharding(mesh)
    put = lambda shape, kind, s: jax.ShapeDtypeStruct(shape, kind, sharding=s)  # noqa: E731
    params = jax.tree.map(lambda x, s: put(x.shape, x.dtype, s), shapes, shardings)
    batch = images * data
    x = put((batch, helpers.SIZE, helpers.SIZE, 3), jnp.float32, on_data)
    labels = {'label': put((batch,), jnp.int32, on_data), 'weight': put((batch,), jnp.float32, on_data)}
    forward = sharding.forward(network, mesh, split_dense=True)
    loss = functools.partial(train_step.loss_and_sums, forward=forward)
    gradient = jax.jit(jax.grad(loss, has_aux=True), out_shardings=(shardings, None))
    found = hlo_cost.collective_bytes(gradient.lower(params, x, labels, None).compile().as_text(), mesh.size)

    inputs = {name: math.prod(sizes.inputs) for name, sizes in architecture.infer_shapes(network, helpers.SIZE).items()}
    conv3 = images * inputs['conv3'] * (tower - 1) / tower
    fc6 = batch * inputs['fc6'] - images * inputs['fc6'] / tower
    others = batch * (inputs['fc7'] + inputs['fc8']) * (mesh.size - 1) / mesh.size
    assert found['all-gather'][1] == found['reduce-scatter'][1] == 4 * (conv3 + fc6 + others)
    logits = batch * network.num_classes / mesh.size * (data - 1) / data
    assert found['all-to-all'] == (2, 4 * 2 * logits)
    convolutions = sum(x.size for name, layer in shapes.items() if name < 'fc' for x in layer.values()) / tower
    rest = found['all-reduce'][1] - 4 * 2 * convolutions * (data - 1) / data
    assert 0 <= rest <= 512  # the sums of the loss over classes and images
    assert set(found) == {'all-gather', 'reduce-scatter', 'all-to-all', 'all-reduce'}


def test_all_gathers_follow_from_groups():
    """Towers separated up to the classifier need one all-gather; always connected ones need one before each layer."""
    mesh = sharding.make_mesh(data=1, tower=2)
    names = ('conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7')
    for groups, gathers in ((2, 1), (1, 7)):
        network = helpers.network(layers=helpers.layers(**{name: {'groups': groups} for name in names}))
        params = helpers.init(network)
        x = jnp.zeros((2, helpers.SIZE, helpers.SIZE, 3))
        assert _collectives(sharding.forward(network, mesh), _place(mesh, params), x) == {'all-gather': gathers}


def test_initial_parameters_do_not_depend_on_the_mesh():
    network = helpers.network()
    init = lambda key: model.init_params(network, key, helpers.SIZE)  # noqa: E731
    alone = jax.jit(init)(jax.random.key(3))
    mesh = sharding.make_mesh(data=2, tower=2)
    split = jax.jit(init, out_shardings=sharding.state_sharding(mesh, alone))(jax.random.key(3))
    chex.assert_trees_all_equal(jax.device_get(split), jax.device_get(alone))
    assert split['conv2']['kernel'].addressable_data(0).shape == (3, 3, 4, 8)


def test_towers_of_a_data_shard_read_the_same_images():
    mesh = sharding.make_mesh(data=2, tower=2)
    x = sharding.to_mesh(mesh, {'image': np.arange(8, dtype=np.float32)})['image']
    rows = {shard.device: np.asarray(shard.data) for shard in x.addressable_shards}
    for i in range(2):
        for device in mesh.devices[i]:
            chex.assert_trees_all_equal(rows[device], np.arange(4, dtype=np.float32) + 4 * i)
    assert sharding.data_shard(mesh) == (0, 1)


def test_indivisible_batches_are_refused():
    mesh = sharding.make_mesh(data=2, tower=1)
    sharding.check_batch(mesh, 8, 4)
    with pytest.raises(UserError, match='batch_size=8, grad_accum_steps=3: expected batch_size to be a multiple of 6'):
        sharding.check_batch(mesh, 8, 3)
    with pytest.raises(UserError, match='grad_accum_steps=0'):
        sharding.check_batch(mesh, 8, 0)


def test_mesh_errors(capsys):
    devices = jax.devices()
    with pytest.raises(UserError, match=r'mesh.tower=2: 3 devices cannot be paired; use mesh.data=1'):
        sharding.make_mesh(data=0, tower=2, devices=devices[:3])
    with pytest.raises(UserError, match='needs 6 devices, but there are 4'):
        sharding.make_mesh(data=3, tower=2)
    with pytest.raises(UserError, match='mesh.tower=3'):
        sharding.make_mesh(data=0, tower=3)
    with pytest.raises(UserError, match='batch_size=10, grad_accum_steps=1: expected batch_size to be a multiple of 4'):
        sharding.check_batch(sharding.make_mesh(data=4, tower=1), 10)
    assert sharding.make_mesh(data=1, tower=2, devices=devices[:3]).shape == {'data': 1, 'tower': 2}
    assert not capsys.readouterr().out
    assert sharding.make_mesh(data=0, tower=2, devices=devices[:1]).shape == {'data': 1, 'tower': 1}
    assert 'One device' in capsys.readouterr().out


def test_next_batch_is_sent_before_the_last_is_used():
    happened = []

    def batches():
        for i in range(3):
            happened.append(f'{i} made')
            yield i

    def send(batch):
        happened.append(f'{batch} sent')
        return -batch

    for sent, waited in pipeline.prefetch_to_device(batches(), send):
        happened.append(f'{-sent} used')
        assert 0 <= waited < 1
    assert ', '.join(happened) == ('0 made, 0 sent, 1 made, 1 sent, 0 used, 2 made, 2 sent, 1 used, 2 used')
    assert list(pipeline.prefetch_to_device(iter([]), send)) == []


@pytest.mark.slow
@pytest.mark.parametrize(('data', 'tower'), MESHES)
def test_odd_number_of_classes(data, tower):
    """The logits, and all numbers after three updates, agree with one device."""
    with jax.enable_x64():
        network = helpers.network(dtype='float64', num_classes=13)
        architecture.infer_shapes(network, helpers.SIZE, towers=2)
        mesh = sharding.make_mesh(data=data, tower=tower)
        params = helpers.to_float64(helpers.init(network))
        x = 60 * jax.random.normal(jax.random.key(1), (4, helpers.SIZE, helpers.SIZE, 3))
        expected = network.apply({'params': params}, x)
        logits = jax.jit(sharding.forward(network, mesh))(_place(mesh, params), x)
        chex.assert_trees_all_close(logits, expected, rtol=1e-9)
        alone = _train(network, sharding.make_mesh(data=1, tower=1), 3, helpers.SIZE)
        found = _train(network, mesh, 3, helpers.SIZE)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        assert np.abs(a - b).max() <= 1e-9 * np.abs(b).max()
