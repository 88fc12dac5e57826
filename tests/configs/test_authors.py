"""Compares configs/authors_2012.py with a NumPy version of the authors' released code, written from its formulas.

Section numbers refer to the notes on the release. The oracle uses plain loops and keeps separate weights for each GPU,
as the released configs do (conv1a, conv1b ...).
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax.core import augment, model, train_step
from alexnet_jax.core.config import augmentation_from_config, model_from_config
from alexnet_jax.core.image_stats import ImageStats
from alexnet_jax.data import random_crops
from tests import helpers

SIZE = 36  # (36 - 5) / 2 is not an integer, so the last window of conv 1 extends over the edge


def _get_config(arg=None):
    return alexnet_jax.get_config(f'authors_2012:{arg}' if arg else 'authors_2012')


def _small_model():
    """Returns a narrow network with the operations, groups and constants of configs/authors_2012.py."""
    fields = _get_config().model.to_dict()
    widths = {'conv1': 8, 'conv2': 12, 'conv3': 16, 'conv4': 16, 'conv5': 12, 'fc6': 24, 'fc7': 24}
    for name, width in widths.items():
        fields['layers'][name] |= {'features': width, 'init': 'normal(0.1)'}
    fields['layers']['conv1'] |= {'kernel': 5, 'stride': 2, 'padding': (0, 1)}
    # Larger alphas make the effect of both normalizations visible.
    fields |= {'num_classes': 10, 'lrn_alpha': 0.05, 'spatial_alpha': 0.4}
    return model_from_config(fields)


def _conv(x_HWC, kernel_HWIO, bias, stride, padding):
    """Convolves at 1 + ceil((2 padding + size - filter) / stride) positions; pixels outside the image are zero."""
    size, window = x_HWC.shape[0], kernel_HWIO.shape[0]
    positions = 1 + -(-(2 * padding + size - window) // stride)
    out = np.zeros((positions, positions, kernel_HWIO.shape[-1]))
    for i in range(positions):
        for j in range(positions):
            for dy in range(window):
                for dx in range(window):
                    y, x = i * stride - padding + dy, j * stride - padding + dx
                    if 0 <= y < size and 0 <= x < size:
                        out[i, j] += x_HWC[y, x] @ kernel_HWIO[dy, dx]
    return out + bias


def _cross_map(x_HWC, scale, power=0.75, size=5, min_div=2.0):
    out = np.empty_like(x_HWC)
    for f in range(x_HWC.shape[2]):
        low = f - size // 2
        window = x_HWC[:, :, max(0, low) : max(0, low + size)]
        out[:, :, f] = x_HWC[:, :, f] * (min_div + scale / size * (window**2).sum(2)) ** -power
    return out


def _spatial(x_HWC, scale, power=0.75, size=5):
    out = np.empty_like(x_HWC)
    for i in range(x_HWC.shape[0]):
        for j in range(x_HWC.shape[1]):
            y, x = i - size // 2, j - size // 2
            window = x_HWC[max(0, y) : y + size, max(0, x) : x + size]
            out[i, j] = x_HWC[i, j] * (1 + scale / size**2 * (window**2).sum((0, 1))) ** -power
    return out


def _pool(x_HWC, size=3, stride=2):
    positions = 1 + -(-(x_HWC.shape[0] - size) // stride)
    at = [slice(i * stride, i * stride + size) for i in range(positions)]
    return np.stack([np.stack([x_HWC[a, b].max((0, 1)) for b in at]) for a in at])


def _relu(x):
    return np.maximum(x, 0)


def _gpus(params, name):
    """Returns (kernel, bias) of GPU a and of GPU b."""
    kernel, bias = params[name]['kernel'], params[name]['bias']
    half = len(bias) // 2
    return (kernel[..., :half], bias[:half]), (kernel[..., half:], bias[half:])


def _logits(params, image_HWC, lrn_scale, spatial_scale, masks=None):
    """Computes net 145 layer by layer. masks: 1-D dropout masks of 0 and 1 for training; None at test time."""
    drop = lambda x, name: x * (0.5 if masks is None else masks[name])  # noqa: E731
    pool1 = [_pool(_cross_map(_conv(image_HWC, *w, 2, 0), lrn_scale)) for w in _gpus(params, 'conv1')]
    neuron1 = [_relu(x) for x in pool1]
    conv2 = [_relu(_conv(x, *w, 1, 2)) for x, w in zip(neuron1, _gpus(params, 'conv2'), strict=True)]
    pool2 = [_pool(_spatial(_cross_map(x, lrn_scale), spatial_scale)) for x in conv2]
    both = np.concatenate(pool2, axis=2)
    conv3 = [_relu(_conv(both, *w, 1, 1)) for w in _gpus(params, 'conv3')]
    conv4 = [_relu(_conv(x, *w, 1, 1)) for x, w in zip(conv3, _gpus(params, 'conv4'), strict=True)]
    conv5 = [_conv(x, *w, 1, 1) for x, w in zip(conv4, _gpus(params, 'conv5'), strict=True)]
    pool3 = np.concatenate([_relu(_pool(x)) for x in conv5], axis=2)
    hs1 = drop(np.concatenate([_relu(pool3.ravel() @ k + b) for k, b in _gpus(params, 'fc6')]), 'fc6')
    hs2 = drop(np.concatenate([_relu(hs1 @ k + b) for k, b in _gpus(params, 'fc7')]), 'fc7')
    return hs2 @ params['fc8']['kernel'] + params['fc8']['bias']


def test_forward_pass_with_and_without_dropout():
    network = _small_model()
    params = helpers.to_float64(helpers.init(network, 0, SIZE))
    x = np.random.default_rng(0).normal(0, 3, (2, SIZE, SIZE, 3))
    with jax.enable_x64():
        double = network.clone(dtype='float64')
        masks = model.dropout_masks(double, jax.random.key(1), 2, SIZE)
        assert set(masks) == {'fc6', 'fc7'}
        for drawn in (None, masks):
            found = np.asarray(jax.jit(double.apply)({'params': params}, x, drawn))
            for n in range(2):
                one = None if drawn is None else {name: np.asarray(mask[n], float) for name, mask in drawn.items()}
                chex.assert_trees_all_close(found[n], _logits(params, x[n], 0.05, 0.4, one), rtol=1e-9)


def test_network_of_the_config():
    """Layers at full size, compared with the table in section 2."""
    network = model_from_config(_get_config().model)
    rows = network.layers
    assert [rows[f'conv{i}'].init for i in range(1, 6)] == ['normal(0.01)'] * 2 + ['normal(0.03)'] * 3
    assert [row.bias for row in rows.values()] == [0, 1, 0, 1, 1, 1, 1, 0]
    assert rows['conv1'].post == 'lrn pool relu' and rows['conv2'].post == 'relu lrn spatial_norm pool'
    assert (network.lrn_k, network.lrn_n, network.lrn_beta, network.norm_groups) == (2, 5, 0.75, 2)
    assert network.lrn_alpha / network.lrn_n == pytest.approx(2e-5) and network.lrn_alpha_over_n
    assert network.spatial_alpha / network.spatial_n**2 == pytest.approx(4e-5) and network.spatial_k == 1


# Section 11's table: (first epoch, last epoch, rate of conv 1 weights, of other weights, of conv 1 biases, of other
# biases, color augmentation); epochs are 1-based.
RUN_2010 = (
    (1, 22, 0.01, 0.01, 0.02, 0.02, True),
    (23, 50, 0.001, 0.001, 0.002, 0.002, True),
    (51, 67, 0.0001, 0.0001, 0.002, 0.002, True),
    (68, 71, 0.00001, 0.0001, 0.002, 0.002, False),
    (72, 77, 0, 0.0001, 0, 0.002, False),
    (78, 93, 0, 0.00001, 0, 0.002, False),
)
RUN_2012 = (  # drops at 25, 51, 79; conv 1 slowed at 67, frozen at 72; bias rates do not drop
    (1, 24, 0.01, 0.01, 0.02, 0.02, True),
    (25, 50, 0.001, 0.001, 0.02, 0.02, True),
    (51, 66, 0.0001, 0.0001, 0.02, 0.02, True),
    (67, 71, 0.00001, 0.0001, 0.02, 0.02, False),
    (72, 78, 0, 0.0001, 0, 0.02, False),
    (79, 91, 0, 0.00001, 0, 0.02, False),
)
HANDS_OFF = {1: 0.01, 23: 0.01, 25: 0.001587, 47: 0.001587, 48: 0.000252, 71: 0.000252, 72: 0.00004, 95: 0.00004}


def _rates(config, passes, per_epoch=200):
    """Measures the learning rates after a number of epochs: the update for gradient -1 and velocity 0."""
    network = model_from_config(config.model)
    optimizer = helpers.optimizer(network, **{**config.optim, 'weight_decay': 0.0}, steps_per_epoch=per_epoch)
    params = {name: {'kernel': jnp.zeros(1), 'bias': jnp.zeros(1)} for name in network.layers}
    state = optimizer.tx.init(params)._replace(count=jnp.int32(round(per_epoch * passes)))
    updates, _ = optimizer.tx.update(jax.tree.map(lambda p: p - 1, params), state, params)
    return updates


@pytest.mark.parametrize(('arg', 'epochs', 'table'), [(None, 93, RUN_2010), ('schedule=2012', 91, RUN_2012)])
def test_schedule_of_the_2010_and_2012_runs(arg, epochs, table):
    config = _get_config(arg)
    assert config.num_epochs == epochs
    for first, last, conv1, other, conv1_bias, bias, color in table:
        for epoch in (first, last):
            updates = _rates(config, epoch - 0.5)
            expected = {name: {'kernel': [other], 'bias': [bias]} for name in updates}
            expected['conv1'] = {'kernel': [conv1], 'bias': [conv1_bias]}
            for name, parts in expected.items():
                for part, rate in parts.items():
                    np.testing.assert_allclose(updates[name][part], rate, rtol=1e-5, err_msg=f'{epoch} {name} {part}')
            assert (epoch <= config.data.color_epochs) == color


def test_hands_off_schedule_of_net_170():
    config = _get_config('schedule=170')
    assert config.num_epochs == 95
    assert 61 <= config.data.color_epochs <= 68
    for epoch, rate in HANDS_OFF.items():
        updates = _rates(config, epoch - 0.5)
        np.testing.assert_allclose(updates['fc8']['kernel'], rate, rtol=0.01)
        np.testing.assert_allclose(updates['fc8']['bias'], 0.02 if epoch < 48 else 0.002, rtol=1e-5)
        assert (updates['conv1']['kernel'] == 0) == (epoch > 74)


# Section 7's chain: (num_epochs, color_epochs, rows). A row: completed epochs (the diary's epoch minus one, plus files
# of 1,024 images), rates of conv 1, of the other convolutions, of the hidden dense layers, of the classifier.
CHAIN = {
    'authors=2009': (5.74, 0, [
        (0, 0.001, 0.001, 0.01, 0.01), (1 + 1580 / 8800, 0.001, 0.001, 0.01, 0.01),
        (1 + 1640 / 8800, 0.001, 0.001, 0.001, 0.001), (5.7, 0.001, 0.001, 0.001, 0.001),
    ]),
    'authors=2011': (7.81, 0, [
        (0, 0.001, 0.001, 0.01, 0.01), (4.99, 0.001, 0.001, 0.01, 0.01), (5.01, 0.001, 0.001, 0.001, 0.001),
    ]),
    'authors=2012': (54, 37, [
        (0, 0.0001, 0.001, 0.001, 0.001), (290 / 1251, 0.0001, 0.001, 0.001, 0.001),
        (310 / 1251, 0.0001, 0.001, 0.001, 0.01), (3.99, 0.0001, 0.001, 0.001, 0.01),
        (4.01, 0.00001, 0.001, 0.001, 0.01), (6.01, 0, 0.001, 0.001, 0.01), (7.99, 0, 0.001, 0.001, 0.01),
        (8.01, 0, 0.001, 0.001, 0.001), (20.99, 0, 0.001, 0.001, 0.001), (21.01, 0, 0.0001, 0.0001, 0.0001),
        (41.01, 0, 0.00001, 0.00001, 0.00001),
    ]),
}  # fmt: skip
CHAIN['finetune'] = (
    54,
    0,
    CHAIN['authors=2012'][2],
)  # as in the paper: color stays on, biases have the rates of weights


@pytest.mark.parametrize('arg', CHAIN)
def test_rates_of_the_pretraining_chain(arg):
    config = alexnet_jax.get_config(f'sixth_conv:{arg}' if arg else 'sixth_conv')
    epochs, color, rows = CHAIN[arg]
    assert (config.num_epochs, config.data.color_epochs) == (epochs, color)
    last = list(model_from_config(config.model).layers)[-1]
    for passes, conv1, convs, hidden, classifier in rows:
        slow_conv6 = convs if arg != 'authors=2009' else hidden  # conv 6 is new in this stage
        for name, parts in _rates(config, passes, per_epoch=10_000).items():
            rate = {'conv1': conv1, 'conv6': slow_conv6, last: classifier}.get(
                name, convs if name.startswith('conv') else hidden
            )
            np.testing.assert_allclose(parts['kernel'], rate, rtol=1e-5, err_msg=f'{passes} {name}')
            if arg == 'finetune' or rate == 0:
                np.testing.assert_allclose(parts['bias'], rate, rtol=1e-5, err_msg=f'{passes} {name}')


def test_update_rule_with_bias_rates_and_a_frozen_layer():
    """Section 4: v <- 0.9 v + eps g - wc eps w, w <- w + v; eps = 0 skips an array and its velocity."""
    config = _get_config()
    network = model_from_config(config.model)
    optimizer = helpers.optimizer(network, **config.optim, steps_per_epoch=1)
    rng = np.random.default_rng(0)
    w = {name: {'kernel': rng.normal(size=3), 'bias': rng.normal(size=3)} for name in ('conv1', 'conv2')}
    v = jax.tree.map(np.zeros_like, w)
    # Updates in epochs 1, 26, 56 and 76 (1-based) of the table above.
    eps = {'conv1': ((0.01, 0.02), (0.001, 0.002), (1e-4, 0.002), (0, 0)),
           'conv2': ((0.01, 0.02), (0.001, 0.002), (1e-4, 0.002), (1e-4, 0.002))}  # fmt: skip
    with jax.enable_x64():
        params = jax.tree.map(jnp.asarray, w)
        state = optimizer.tx.init(params)
        for i, count in enumerate((0, 25, 55, 75)):
            state = state._replace(count=jnp.int32(count))
            g = jax.tree.map(lambda x: rng.normal(size=x.shape), w)  # ascent direction
            updates, state = optimizer.tx.update(jax.tree.map(lambda x: -x, g), state, params)
            params = jax.tree.map(lambda p, u: p + u, params, updates)
            for name in w:
                for part, decay, rate in zip(('kernel', 'bias'), (0.0005, 0), eps[name][i], strict=True):
                    if rate == 0:
                        continue
                    v[name][part] = 0.9 * v[name][part] + rate * g[name][part]
                    v[name][part] = v[name][part] - decay * rate * w[name][part]
                    w[name][part] = w[name][part] + v[name][part]
            chex.assert_trees_all_close((jax.device_get(params), jax.device_get(state.velocity)), (w, v), rtol=1e-12)


def test_augmentation_of_the_config():
    """Section 6: 33 x 33 x 2 crops, one draw per 32 successive images, and a color draw per image."""
    config = _get_config()
    augmentation = augmentation_from_config(config.data)
    draws = [helpers.draw(augmentation, seed=5, position=i, record_size=256) for i in range(1024)]
    chunks = [{(*d.offset.tolist(), bool(d.reflect)) for d in draws[i : i + 32]} for i in range(0, 1024, 32)]
    assert all(len(chunk) == 1 for chunk in chunks)
    assert len(set.union(*chunks)) > 25  # 32 draws out of 2178
    assert len({d.color.tobytes() for d in draws}) == 1024
    many = [helpers.draw(augmentation, seed=5, position=32 * i, record_size=256) for i in range(8000)]
    offsets = np.stack([d.offset for d in many])
    assert offsets.min() == 0 and offsets.max() == 32  # 8,000 draws miss one end with a probability below 1e-100
    assert abs(np.mean([d.reflect for d in many]) - 0.5) < 0.03
    for column in offsets.T:
        counts = np.bincount(column, minlength=33)
        assert abs(counts - 8000 / 33).max() < 5 * np.sqrt(8000 / 33)


def _record_batch(augmentation, count, record_size):
    rng = np.random.default_rng(1)
    records = rng.integers(0, 256, (count, record_size, record_size, 3), np.uint8)
    draws = [helpers.draw(augmentation, seed=0, position=20 * i, record_size=record_size) for i in range(count)]
    cuts = np.stack([random_crops.crop(r, d, augmentation.image_size) for r, d in zip(records, draws, strict=True)])
    return records, {
        'image': cuts,
        **{f: np.stack([getattr(d, f) for d in draws]) for f in random_crops.AugmentParams._fields},
    }


def test_pixels_that_reach_the_network():
    augmentation = augmentation_from_config({**_get_config().data, 'image_size': 8})
    rng = np.random.default_rng(0)
    vectors = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    std = np.array([19.72, 37.09, 121.78])
    stats = ImageStats(rng.uniform(90, 130, (12, 12, 3)), std**2, vectors)
    records, batch = _record_batch(augmentation, 6, 12)
    assert len({bool(r) for r in batch['reflect']}) == 2
    on = np.asarray(augment.preprocess(batch, stats, augmentation, color=True))
    off = np.asarray(augment.preprocess(batch, stats, augmentation, color=False))
    for n, record in enumerate(records):
        y, x = batch['offset'][n]
        cut = record[y : y + 8, x : x + 8].astype(float)
        if batch['reflect'][n]:
            cut = cut[:, ::-1]
        cut = cut - stats.mean_image[2:10, 2:10]
        noise = sum(batch['color'][n][i] * std[i] * vectors[:, i] for i in range(3))
        chex.assert_trees_all_close(on[n], (cut + noise) / 1.1, atol=1e-3)
        chex.assert_trees_all_close(off[n], cut, atol=1e-3)  # without color there is no division
    scale = np.stack([helpers.draw(augmentation, seed=0, position=i, record_size=12).color for i in range(4000)])
    chex.assert_trees_all_close(scale.std(0), np.full(3, 0.1, np.float32), rtol=0.05)


@pytest.mark.slow
def test_color_goes_off_at_its_step():
    """The loss of the step with and without color, at the steps before and after the boundary."""
    network = helpers.network(num_classes=10)
    augmentation = augmentation_from_config({**_get_config().data, 'image_size': helpers.SIZE})
    stats = ImageStats(
        np.full((40, 40, 3), 120.0, np.float32), np.array([400.0, 1400, 14800], np.float32), np.eye(3, dtype=np.float32)
    )
    _, batch = _record_batch(augmentation, 4, 40)
    batch |= {'label': np.arange(4, dtype=np.int32), 'weight': np.ones(4, np.float32)}
    optimizer = helpers.optimizer(network)
    params = helpers.init(network)
    fixed = dict(network=network, forward=lambda p, x, m: network.apply({'params': p}, x, m), optimizer=optimizer)
    step = jax.jit(
        lambda s: train_step.train_step(
            s, batch, stats, jax.random.key(0), **fixed, augmentation=augmentation, color_steps=7
        )[1]['loss']
    )
    for now in (6, 7):
        x = augment.preprocess(batch, stats, augmentation, color=now < 7)
        masks = model.dropout_masks(network, jax.random.fold_in(jax.random.key(0), now), 4, helpers.SIZE)
        logits = np.asarray(network.apply({'params': params}, x, masks), np.float64)
        expected = -(logits[np.arange(4), np.arange(4)] - np.log(np.exp(logits).sum(1))).sum()
        updates = optimizer.tx.init(params)._replace(count=jnp.int32(now))
        found = step(train_step.TrainState(jnp.int32(now), params, updates))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize('count', [1, 10])
def test_views_average_softmax_and_subtract_the_central_mean(count):
    network = _small_model()
    params = helpers.init(network, 0, SIZE)
    augmentation = augmentation_from_config({**_get_config().data, 'image_size': SIZE})
    rng = np.random.default_rng(0)
    stats = ImageStats(rng.uniform(110, 130, (44, 44, 3)).astype(np.float32), np.ones(3), np.eye(3))
    image = rng.integers(100, 150, (1, 44, 44, 3), np.uint8)
    forward = lambda p, x: network.apply({'params': p}, x)  # noqa: E731
    options = dict(forward=forward, augmentation=augmentation, views=count)
    found = np.exp(train_step.log_probabilities(params, image, stats, **options))[0]
    mean = stats.mean_image[4:40, 4:40]
    total = np.zeros(10)
    for y, x in ((0, 0), (0, 8), (4, 4), (8, 0), (8, 8)) if count == 10 else ((4, 4),):
        cut = image[0, y : y + 36, x : x + 36].astype(float)
        for view in (cut, cut[:, ::-1]) if count == 10 else (cut,):
            logits = _logits(helpers.to_float64(params), view - mean, 0.05, 0.4)
            total += np.exp(logits) / np.exp(logits).sum()
    chex.assert_trees_all_close(found, (total / count).astype(np.float32), rtol=1e-4)


def test_float64_network_is_evaluated_on_float64_inputs():
    deviations = (58.4, 57.1, 57.4)
    augmentation = augmentation_from_config({**_get_config().data, 'image_size': 4, 'pixel_std': deviations})
    rng = np.random.default_rng(0)
    stats = ImageStats(rng.uniform(110, 130, (6, 6, 3)).astype(np.float32), np.ones(3), np.eye(3))
    image = rng.integers(100, 150, (1, 6, 6, 3), np.uint8)
    logits = (image - stats.mean_image.astype(np.float64))[0, 1:5, 1:5].mean((0, 1)) / deviations
    with jax.enable_x64():
        options = dict(forward=lambda p, x: x.mean((1, 2)) * p, augmentation=augmentation, views=1)
        found = train_step.log_probabilities(jnp.float64(1), image, stats, **options)
        np.testing.assert_allclose(found[0], logits - np.log(np.exp(logits).sum()), rtol=1e-12)
