"""LPIPS equals its definition, written with numpy, and the authors' PyTorch package (CI installs it for this test)."""

import functools
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax.core.config import model_from_config
from alexnet_jax.inference import lpips as lpips_module
from alexnet_jax.utils import checksums
from alexnet_jax.utils.config_files import get_config
from alexnet_jax.utils.errors import UserError
from tests import helpers

WIDTHS = (4, 6, 8, 6, 6)
SHAPE = (3, 43, 58, 3)  # both poolings leave out a row; neither side is that of another image


def _random(rng, widths):
    """Returns (convolutions in torchvision's layout, linear weights), of a scale that keeps many units positive."""
    tensors = helpers.torchvision_tensors(rng, widths)
    linear = {f'lin{i}.model.1.weight': rng.random((1, c, 1, 1)).astype(np.float32) for i, c in enumerate(widths)}
    return tensors, linear


def _weights(tensors, linear):
    layers = dict(zip(('conv1', 'conv2', 'conv3', 'conv4', 'conv5'), (0, 3, 6, 8, 10), strict=True))
    params = {
        name: {'kernel': tensors[f'features.{i}.weight'].transpose(2, 3, 1, 0), 'bias': tensors[f'features.{i}.bias']}
        for name, i in layers.items()
    }
    return lpips_module.LpipsWeights(params, {name: w.ravel() for name, w in zip(layers, linear.values(), strict=True)})


@pytest.fixture(scope='module')
def narrow():
    return _random(np.random.default_rng(0), WIDTHS)


@pytest.fixture(scope='module')
def images():
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, SHAPE, np.uint8), rng.integers(0, 256, SHAPE, np.uint8)


def _definition(tensors, linear, image0, image1):
    """The distance of two images [H, W, 3] from -1 to 1, in float64, with torchvision's strides and paddings."""

    def features(image):
        x = (image.transpose(2, 0, 1) - np.reshape([-0.030, -0.088, -0.188], (3, 1, 1))) / np.reshape(
            [0.458, 0.448, 0.450], (3, 1, 1)
        )
        for i, stride, padding, pool in ((0, 4, 2, 0), (3, 1, 2, 1), (6, 1, 1, 1), (8, 1, 1, 0), (10, 1, 1, 0)):
            if pool:
                x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))[:, ::2, ::2].max((3, 4))
            kernel, bias = (tensors[f'features.{i}.{part}'].astype(float) for part in ('weight', 'bias'))
            x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
            windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], (1, 2))[:, ::stride, ::stride]
            x = np.maximum(np.einsum('chwij,ocij->ohw', windows, kernel) + bias[:, None, None], 0)
            yield x / (np.sqrt((x**2).sum(0)) + 1e-10)

    layers = zip(features(image0), features(image1), linear.values(), strict=True)
    return sum(((a - b) ** 2 * w[0].astype(float)).sum(0).mean() for a, b, w in layers)


def test_equals_its_definition(narrow, images):
    weights = _weights(*narrow)
    found = alexnet_jax.lpips(weights, *images)
    assert found.shape == (3,) and found.dtype == np.float32
    expected = [_definition(*narrow, *(image / 127.5 - 1 for image in pair)) for pair in zip(*images, strict=True)]
    assert min(expected) > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(alexnet_jax.lpips(weights, *images[::-1]), found, rtol=1e-6)
    np.testing.assert_allclose(alexnet_jax.lpips(weights, images[0], images[0]), 0, atol=1e-12)
    floats = [image.astype(np.float32) for image in images]
    for low, high in ((-1, 1), (0, 1), (0, 255)):
        pair = [x / 255 * (high - low) + low for x in floats]
        distance = functools.partial(alexnet_jax.lpips, value_range=(low, high))
        np.testing.assert_allclose(distance(weights, *pair), found, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(distance)(weights, *floats), found, rtol=1e-6)


def test_gradient_is_finite_where_features_are_zero(narrow, images):
    """The gradient of a norm is NaN there."""
    weights = _weights(*narrow)
    weights.params['conv3']['bias'] = np.full(WIDTHS[2], -1e3, np.float32)

    def distance(x):
        return alexnet_jax.lpips(weights, x, images[1], value_range=(0, 255)).sum()

    gradient = jax.jit(jax.grad(distance))(images[0].astype(np.float32))
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


FLOATS = np.full((2, 32, 32, 3), 0.5, np.float32)
BYTES = np.zeros((2, 32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ('pair', 'value_range', 'message'),
    [
        ((FLOATS, FLOATS), None, r'value_range=None: images0 is float32; give the values of black and white, such as'),
        ((BYTES, FLOATS), (1, 0), r'value_range=\(1, 0\): images1 is float32'),
        ((BYTES, BYTES), (0, 1), r'value_range=\(0, 1\): the images are uint8, from 0 to 255; remove value_range'),
        ((BYTES, FLOATS * 200), (-1, 1), r'images1 has values from 100 to 100: expected value_range=\(-1, 1\)'),
        ((BYTES, FLOATS - 1.5), (0, 1), r'images1 has values from -1 to -1: expected'),
        ((BYTES, FLOATS * np.nan), (0, 1), r'images1 has values from nan to nan: expected'),
        ((BYTES, BYTES[:1]), None, r'images0 is \(2, 32, 32, 3\) and images1 is \(1, 32, 32, 3\): expected equal'),
        ((BYTES[:, :30], BYTES), None, r'images0 is uint8 of shape \(2, 30, 32, 3\): .* with H and W of 31 or more'),
        ((BYTES, BYTES.astype(np.int64)), None, r'images1 is int64 of shape \(2, 32, 32, 3\): expected uint8 or float'),
        ((BYTES[0], BYTES[0]), None, r'images0 is uint8 of shape \(32, 32, 3\)'),
        (('a.png', BYTES), None, r'images0 is str: expected an array uint8 or float'),
    ],
)
def test_invalid_images_are_refused(pair, value_range, message):
    weights = lpips_module.LpipsWeights({}, {})
    with pytest.raises(UserError, match=message):
        alexnet_jax.lpips(weights, *pair, value_range=value_range)
    with pytest.raises(UserError, match='weights is dict: expected the result of alexnet_jax.load_lpips'):
        alexnet_jax.lpips({}, BYTES, BYTES)


def _checkpoint(name, params=None, **changes):
    """Returns a `Checkpoint` of a config, of which LPIPS reads only the network and its parameters."""
    config = get_config(name)
    config.model.update(changes)
    network = model_from_config(config.model)
    return lpips_module.Checkpoint(0, params, network, None, 0, (), None, {})


def test_linear_weights_are_read_from_the_package(narrow, images, tmp_path, monkeypatch):
    """Without importing it, because it imports PyTorch."""
    tensors, linear = narrow
    expected = _weights(tensors, linear)
    checkpoint = _checkpoint('torchvision', params={**expected.params, 'fc6': {}})
    folder = tmp_path / 'lpips' / 'weights' / 'v0.1'
    folder.mkdir(parents=True)
    (tmp_path / 'lpips' / '__init__.py').write_text('import nothing_of_that_name')
    path = helpers.write_pth(folder / 'alex.pth', linear)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'lpips', raising=False)
    for found in (alexnet_jax.load_lpips(checkpoint), alexnet_jax.load_lpips(checkpoint, path)):
        assert found.params.keys() == found.linear.keys() == expected.params.keys()
        assert all((found.linear[name] == expected.linear[name]).all() for name in found.linear)
    with pytest.raises(UserError, match='convolutions or poolings; use backbone=CHECKPOINT with a network converted'):
        alexnet_jax.load_lpips(_checkpoint('torchvision', pool_stride=3), path)
    with pytest.raises(UserError, match='this network has other convolutions'):
        alexnet_jax.load_lpips(_checkpoint('caffe'), path)
    with pytest.raises(UserError, match='expected the file lpips/weights/v0.1/alex.pth'):
        alexnet_jax.load_lpips(checkpoint, tmp_path)
    wider = {**linear, 'lin1.model.1.weight': np.ones((1, 9, 1, 1), np.float32)}
    with pytest.raises(UserError, match=r'lin1.model.1.weight of shape \(1, 6, 1, 1\) .*, found \(1, 9, 1, 1\)'):
        alexnet_jax.load_lpips(checkpoint, helpers.write_pth(tmp_path / 'vgg.pth', wider))
    with pytest.raises(UserError, match=r'expected lin0.model.1.weight .*, found no such tensor'):
        alexnet_jax.load_lpips(checkpoint, helpers.write_pth(tmp_path / 'alexnet.pth', tensors))
    monkeypatch.setattr(lpips_module, '_VERSION_0_0', checksums.sha256(path))
    with pytest.raises(UserError, match='these are the weights of version 0.0; use those of 0.1'):
        alexnet_jax.load_lpips(checkpoint, path)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='which is not installed; use pip install --no-deps lpips==0.1.4, or '):
        alexnet_jax.load_lpips(checkpoint)


@pytest.fixture(scope='module')
def reference():
    """Returns the authors' network with random convolutions, and our weights: the same, and the published linear ones.

    Of torchvision, which it imports, only the function `alexnet` exists. It is written from torchvision's source.
    """
    torch = pytest.importorskip('torch', reason="needs PyTorch: pip install 'alexnet_jax[oracle]'")
    if not importlib.util.find_spec('lpips'):
        pytest.skip("needs the authors' package: pip install --no-deps lpips==0.1.4")
    tensors, _ = _random(np.random.default_rng(2), (64, 192, 384, 256, 256))

    def alexnet(pretrained):
        assert not pretrained
        nn = torch.nn
        features = nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(inplace=True), nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        )  # fmt: skip
        found = {name: torch.tensor(array) for name, array in tensors.items() if name.startswith('features')}
        features.load_state_dict({name.removeprefix('features.'): tensor for name, tensor in found.items()})
        return types.SimpleNamespace(features=features)

    with pytest.MonkeyPatch.context() as patch:
        torchvision, models = types.ModuleType('torchvision'), types.ModuleType('torchvision.models')
        torchvision.models, models.alexnet = models, alexnet
        # The trainer imports scipy and tqdm.
        for module in (torchvision, models, types.ModuleType('lpips.trainer')):
            patch.setitem(sys.modules, module.__name__, module)
        net = importlib.import_module('lpips').LPIPS(net='alex', pnet_rand=True, verbose=False)
    params = _weights(tensors, dict.fromkeys('01234', np.zeros(1))).params
    return torch, net, alexnet_jax.load_lpips(_checkpoint('torchvision', params=params))


def _nchw(torch, images, dtype):
    return torch.tensor(images.transpose(0, 3, 1, 2), dtype=dtype)


@pytest.mark.parametrize('size', [(31, 31), (64, 64), (97, 138), (224, 224)])
def test_equals_the_authors_package(reference, size):
    torch, net, weights = reference
    rng = np.random.default_rng(3)
    images = [rng.uniform(-1, 1, (2, *size, 3)).astype(np.float32) for _ in range(2)]
    images[1][1] = images[0][1] + 0.01 * images[1][1]  # a small distance
    with torch.no_grad():
        expected = net(*(_nchw(torch, x, torch.float32) for x in images)).ravel().numpy()
    found = alexnet_jax.lpips(weights, *images, value_range=(-1, 1))
    assert expected[0] > 20 * expected[1] > 0
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)


def test_gradients_equal_those_of_the_authors_package(reference):
    torch, net, weights = reference
    rng = np.random.default_rng(4)
    images = [rng.uniform(-1, 1, (2, 67, 78, 3)) for _ in range(2)]
    tensors = [_nchw(torch, x, torch.float64).requires_grad_() for x in images]
    net.double()
    # The constants were rounded to float32.
    for name in ('shift', 'scale'):
        buffer = getattr(net.scaling_layer, name)
        buffer.copy_((1000 * buffer).round() / 1000)
    net(*tensors).sum().backward()
    with jax.enable_x64():
        gradients = jax.jit(jax.grad(lambda pair: alexnet_jax.lpips(weights, *pair, value_range=(-1, 1)).sum()))(
            [jnp.asarray(x) for x in images]
        )
    net.float()
    for found, tensor in zip(gradients, tensors, strict=True):
        expected = tensor.grad.permute(0, 2, 3, 1).numpy()
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_smaller_images_are_refused_by_the_authors_package_too(reference):
    torch, net, _ = reference
    with pytest.raises(RuntimeError, match='too small'):
        net(torch.zeros(1, 3, 30, 31), torch.zeros(1, 3, 30, 31))
