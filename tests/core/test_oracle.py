"""Compares logits, gradients and updates of the paper's, Caffe's and torchvision's networks with PyTorch.

The PyTorch networks are written from the sources (the paper, `train_val.prototxt`, `torchvision/models/alexnet.py`),
not from our configs. Small instances have the full depth and window sizes, but few maps and images of about 96 px.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax.core import metrics, model, train_step
from alexnet_jax.core.config import augmentation_from_config, model_from_config
from alexnet_jax.core.image_stats import ImageStats
from tests import helpers

torch = pytest.importorskip('torch', reason="needs PyTorch: pip install 'alexnet_jax[oracle]'")
F = torch.nn.functional

NAMES = ('paper', 'caffe', 'torchvision')
SIZES = {'paper': (96, 224), 'caffe': (99, 227), 'torchvision': (95, 224)}  # small, full
FULL = [False, pytest.param(True, marks=pytest.mark.slow)]


def _network(name, full_size, **changes):
    """Returns (network of configs/NAME.py, config, image size)."""
    config = alexnet_jax.get_config(name)
    fields = config.model.to_dict()
    if not full_size:
        widths = {'conv1': 8, 'conv2': 12, 'conv3': 16, 'conv4': 12, 'conv5': 12, 'fc6': 24, 'fc7': 24}
        for layer, width in widths.items():
            std = 0.05 if layer.startswith('conv') else 0.1
            fields['layers'][layer] |= {'features': width, 'init': f'normal({std})', 'bias': 0.1}
        fields['layers']['fc8'] |= {'init': 'normal(0.1)', 'bias': 0.0}
        fields['num_classes'] = 10
    return model_from_config({**fields, **changes}), config, SIZES[name][full_size]


def _in_torch_layout(params, dtype):
    """Returns NumPy arrays: OIHW kernels, and [outputs, inputs] with inputs in (C, H, W) order."""
    found = {}
    maps = np.shape(params['conv5']['kernel'])[-1]
    for name, layer in params.items():
        kernel = np.asarray(layer['kernel'], dtype)
        if kernel.ndim == 4:
            weight = kernel.transpose(3, 2, 0, 1)
        else:
            weight = kernel.T
            if name == 'fc6':
                side = round((weight.shape[1] / maps) ** 0.5)
                weight = weight.reshape(-1, side, side, maps).transpose(0, 3, 1, 2).reshape(weight.shape)
        found[name] = (weight.copy(), np.array(layer['bias'], dtype))
    return found


def _paper(p, x, drop):
    norm = lambda x: torch.cat(  # PyTorch divides alpha by the window, the paper's formula does not  # noqa: E731
        [F.local_response_norm(half, 5, alpha=5e-4, beta=0.75, k=2.0) for half in x.chunk(2, 1)], 1
    )
    x = F.max_pool2d(norm(F.relu(F.conv2d(F.pad(x, (0, 3, 0, 3)), *p['conv1'], stride=4))), 3, 2)
    x = F.max_pool2d(norm(F.relu(F.conv2d(x, *p['conv2'], padding=2, groups=2))), 3, 2)
    x = F.relu(F.conv2d(x, *p['conv3'], padding=1))
    x = F.relu(F.conv2d(x, *p['conv4'], padding=1, groups=2))
    x = F.max_pool2d(F.relu(F.conv2d(x, *p['conv5'], padding=1, groups=2)), 3, 2)
    x = drop(F.relu(F.linear(x.flatten(1), *p['fc6'])), 'fc6')
    x = drop(F.relu(F.linear(x, *p['fc7'])), 'fc7')
    return F.linear(x, *p['fc8'])


def _caffe(p, x, drop):
    norm = lambda x: F.local_response_norm(x, 5, alpha=1e-4, beta=0.75, k=1.0)  # noqa: E731
    x = F.max_pool2d(norm(F.relu(F.conv2d(x, *p['conv1'], stride=4))), 3, 2, ceil_mode=True)
    x = F.max_pool2d(norm(F.relu(F.conv2d(x, *p['conv2'], padding=2, groups=2))), 3, 2, ceil_mode=True)
    x = F.relu(F.conv2d(x, *p['conv3'], padding=1))
    x = F.relu(F.conv2d(x, *p['conv4'], padding=1, groups=2))
    x = F.max_pool2d(F.relu(F.conv2d(x, *p['conv5'], padding=1, groups=2)), 3, 2, ceil_mode=True)
    x = drop(F.relu(F.linear(x.flatten(1), *p['fc6'])), 'fc6')
    x = drop(F.relu(F.linear(x, *p['fc7'])), 'fc7')
    return F.linear(x, *p['fc8'])


def _torchvision(p, x, drop):
    x = F.max_pool2d(F.relu(F.conv2d(x, *p['conv1'], stride=4, padding=2)), 3, 2)
    x = F.max_pool2d(F.relu(F.conv2d(x, *p['conv2'], padding=2)), 3, 2)
    x = F.relu(F.conv2d(x, *p['conv3'], padding=1))
    x = F.relu(F.conv2d(x, *p['conv4'], padding=1))
    x = F.max_pool2d(F.relu(F.conv2d(x, *p['conv5'], padding=1)), 3, 2)
    x = F.relu(F.linear(drop(x, 'conv5').flatten(1), *p['fc6']))
    x = F.relu(F.linear(drop(x, 'fc6'), *p['fc7']))
    return F.linear(x, *p['fc8'])


FORWARD = {'paper': _paper, 'caffe': _caffe, 'torchvision': _torchvision}


def _drop(name, masks):
    """Returns the dropout function of the named network for given masks; None: at test time."""

    def apply(x, layer):
        if masks is None:
            return x * 0.5 if name == 'paper' else x
        mask = np.asarray(masks[layer])
        mask = torch.tensor(mask.transpose(0, 3, 1, 2) if mask.ndim == 4 else mask).to(x.dtype)
        return x * mask if name == 'paper' else x * mask * 2

    return apply


def _assert_close(found, expected, tolerance):
    """Checks max|a - b| <= tolerance * max|b| for every array."""
    for name, pair in expected.items():
        for a, b in zip(found[name], pair, strict=True):
            assert a.shape == b.shape
            assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), name


@pytest.mark.parametrize('full_size', FULL)
@pytest.mark.parametrize('name', NAMES)
def test_logits(name, full_size):
    network, _, size = _network(name, full_size)
    params = helpers.init(network, 0, size)
    x = 60 * np.random.default_rng(0).standard_normal((4, size, size, 3)).astype(np.float32)
    logits = np.asarray(jax.jit(network.apply)({'params': params}, x))
    torch_params = {k: tuple(map(torch.tensor, pair)) for k, pair in _in_torch_layout(params, np.float32).items()}
    expected = FORWARD[name](torch_params, torch.tensor(x).permute(0, 3, 1, 2), _drop(name, None)).numpy()
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


def _torch_gradients(name, params, x_NHWC, labels, masks):
    torch_params = {
        k: tuple(torch.tensor(a, requires_grad=True) for a in pair)
        for k, pair in _in_torch_layout(params, np.float64).items()
    }
    logits = FORWARD[name](torch_params, torch.tensor(x_NHWC).permute(0, 3, 1, 2), _drop(name, masks))
    F.cross_entropy(logits, torch.tensor(labels)).backward()
    return {k: tuple(a.grad.numpy() for a in pair) for k, pair in torch_params.items()}


@pytest.mark.parametrize('full_size', FULL)
@pytest.mark.parametrize('name', NAMES)
def test_gradients_with_dropout(name, full_size):
    with jax.enable_x64():
        network, _, size = _network(name, full_size, dtype='float64')
        rng = np.random.default_rng(0)
        x, labels = 60 * rng.standard_normal((2, size, size, 3)), np.array([3, 7])
        params = helpers.to_float64(helpers.init(network, 0, size))
        masks = model.dropout_masks(network, jax.random.key(1), 2, size)
        assert set(masks) == ({'conv5', 'fc6'} if name == 'torchvision' else {'fc6', 'fc7'})

        def loss(params):
            logits = network.apply({'params': params}, x, masks)
            return -metrics.log_likelihood(logits, labels).mean()

        found = jax.device_get(jax.jit(jax.grad(loss))(params))
    _assert_close(_in_torch_layout(found, np.float64), _torch_gradients(name, params, x, labels, masks), 1e-9)


def _batches(size, number):
    rng = np.random.default_rng(0)
    for _ in range(number):
        yield {
            'image': rng.integers(0, 256, (2, size, size, 3), np.uint8),
            'offset': np.zeros((2, 2), np.int32),
            'reflect': np.zeros(2, bool),
            'color': np.zeros((2, 3)),
            'label': rng.integers(0, 10, 2),
            'weight': np.ones(2, np.float32),
        }


@pytest.mark.parametrize('full_size', FULL)
@pytest.mark.parametrize('name', NAMES)
def test_ten_updates(name, full_size):
    """The training step, with weight decay and a learning rate drop after five updates, without dropout."""
    with jax.enable_x64():
        network, config, size = _network(name, full_size, dtype='float64', dropout_rate=0.0)
        options = {**config.optim, 'schedule': 'epochs', 'stages': ((0, 1, 1, ()), (0.5, 0.1, 0.1, ()))}
        optimizer = helpers.optimizer(network, **options)
        augmentation = augmentation_from_config({**config.data, 'image_size': size})
        forward = lambda p, x, masks: network.apply({'params': p}, x, masks)  # noqa: E731
        fixed = dict(network=network, forward=forward, optimizer=optimizer, augmentation=augmentation)
        image_stats = ImageStats(np.full((size, size, 3), 120.0), np.ones(3), np.eye(3))
        step = jax.jit(
            lambda *args: train_step.train_step(*args, image_stats, jax.random.key(0), **fixed)[0], donate_argnums=0
        )
        start = helpers.to_float64(helpers.init(network, 0, size))
        params = jax.tree.map(jnp.asarray, start)
        state = train_step.TrainState(jnp.int32(0), params, optimizer.tx.init(params))
        for batch in _batches(size, 10):
            state = step(state, batch)
        found = _in_torch_layout(jax.device_get(state.params), np.float64)

    torch_params = {k: tuple(map(torch.tensor, pair)) for k, pair in _in_torch_layout(start, np.float64).items()}
    flat = [a.requires_grad_() for pair in torch_params.values() for a in pair]
    std = torch.tensor([58.395, 57.12, 57.375] if name == 'torchvision' else [1.0, 1, 1], dtype=torch.float64)
    sgd = torch.optim.SGD(flat, lr=0.01, momentum=0.9, weight_decay=1e-4)
    velocities = [torch.zeros_like(a) for a in flat]
    for i, batch in enumerate(_batches(size, 10)):
        rate = 0.01 if i < 5 else 0.001
        x = ((torch.tensor(batch['image']).double() - 120) / std).permute(0, 3, 1, 2)
        sgd.zero_grad()
        F.cross_entropy(FORWARD[name](torch_params, x, lambda x, layer: x), torch.tensor(batch['label'])).backward()
        if name == 'torchvision':
            sgd.param_groups[0]['lr'] = rate
            sgd.step()
            continue
        with torch.no_grad():  # the paper's rule, and Caffe's (sgd_solver.cpp; lr_mult 2 and decay_mult 0 of biases)
            for j, (w, v) in enumerate(zip(flat, velocities, strict=True)):
                own = rate * 2 if j % 2 and name == 'caffe' else rate
                v.mul_(0.9).sub_(own * w.grad)
                if j % 2 == 0:
                    v.sub_(0.0005 * own * w)
                w.add_(v)
    expected = {k: tuple(a.detach().numpy() for a in pair) for k, pair in torch_params.items()}
    _assert_close(found, expected, 1e-9)
    before = _in_torch_layout(start, np.float64)
    moved = [np.abs(a - b).max() for k in expected for a, b in zip(expected[k], before[k], strict=True)]
    assert min(moved) > 0
