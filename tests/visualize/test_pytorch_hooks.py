"""Deconvnet, guided backpropagation and Grad-CAM against PyTorch modules with backward hooks."""

import jax
import numpy as np
import pytest

from alexnet_jax.visualize import class_maps, projections
from tests.visualize import tiny

torch = pytest.importorskip('torch')
nn = torch.nn


class _Normalization(nn.Module):
    """Within each of two groups; PyTorch divides alpha by the window's length."""

    def __init__(self, network):
        super().__init__()
        n, alpha = network.lrn_n, network.lrn_alpha
        self.norm = nn.LocalResponseNorm(n, alpha=alpha * n, beta=network.lrn_beta, k=network.lrn_k)

    def forward(self, x):
        return torch.cat([self.norm(half) for half in x.chunk(2, dim=1)], dim=1)


class _Flatten(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1).flatten(1)


class _Scale(nn.Module):
    def forward(self, x):
        return 0.75 * x


def _network(checkpoint):
    """Returns {name of an activation: module}, in order, in float64."""
    conv1, conv2 = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 6, 3, padding=1, groups=2)
    fc3, fc4, pool = nn.Linear(24, 8), nn.Linear(8, 5), {'kernel_size': 3, 'stride': 2, 'ceil_mode': True}
    for name, module in {'conv1': conv1, 'conv2': conv2, 'fc3': fc3, 'fc4': fc4}.items():
        kernel, bias = (torch.tensor(checkpoint.params[name][key]) for key in ('kernel', 'bias'))
        module.weight.data = kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
        module.bias.data = bias
    modules = {
        'conv1.linear': nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv1),
        'conv1.relu': nn.ReLU(),
        'conv1.lrn': _Normalization(checkpoint.network),
        'conv1.pool': nn.MaxPool2d(**pool),
        'conv2.linear': conv2,
        'conv2.relu': nn.ReLU(),
        'conv2.pool': nn.MaxPool2d(**pool),
        'fc3.linear': nn.Sequential(_Flatten(), fc3),
        'fc3.relu': nn.ReLU(),
        'fc3.dropout': _Scale(),
        'fc4.linear': fc4,
    }
    assert list(modules) == tiny.operations(checkpoint)
    return modules


@pytest.fixture(scope='module')
def x64():
    with jax.enable_x64(True):
        yield tiny.checkpoint()


def _project(checkpoint, image, last, unit, hooks, seed):
    """Returns the gradient at the pixels, with hooks {name of an operation: function of (module, below, above)}."""
    x = torch.tensor(tiny.network_input(checkpoint, image).transpose(2, 0, 1)[None]).requires_grad_()
    y = x
    for name, module in _network(checkpoint).items():
        if hook := hooks.get(name.split('.')[1]):
            module.register_full_backward_hook(hook)
        y = module(y)
        if name == last:
            break
    values = y[0, unit].flatten()
    value = values[values.argmax()]
    (value * (value.detach() if seed == 'activation' else 1)).backward()
    return x.grad[0].numpy().transpose(1, 2, 0) / checkpoint.augmentation.pixel_std


@pytest.mark.parametrize(('layer', 'unit'), [('conv2.pool', 4), ('fc4.linear', 1)])
def test_projections_match_hooks(x64, layer, unit):
    deconvnet = {'relu': lambda m, below, above: (above[0].relu(),), 'lrn': lambda m, below, above: above}
    guided = {'relu': lambda m, below, above: (below[0].relu(),)}
    images = tiny.images(3)
    for function, hooks, seed in (
        (projections.deconvnet, deconvnet, 'activation'),
        (projections.guided_backprop, guided, 'one'),
    ):
        found = function(x64, images, layer, unit)
        for image, picture in zip(images, found, strict=True):
            expected = _project(x64, image, layer, unit, hooks, seed)
            assert np.any(expected)
            np.testing.assert_allclose(picture, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_grad_cam_matches_hooks(x64):
    images, modules, seen = tiny.images(5), _network(x64), {}
    modules['conv2.relu'].register_forward_hook(lambda m, x, y: seen.update(maps=y.detach()))
    modules['conv2.relu'].register_full_backward_hook(lambda m, below, above: seen.update(gradient=above[0]))
    found = class_maps.grad_cam(x64, images, 2)
    for i, image in enumerate(images):
        logits = torch.tensor(tiny.network_input(x64, image).transpose(2, 0, 1)[None]).requires_grad_()
        for module in modules.values():
            logits = module(logits)
        logits[0, 2].backward()
        expected = (seen['gradient'].mean((2, 3), keepdim=True) * seen['maps']).sum(1).relu()
        np.testing.assert_allclose(found.maps[i], expected[0], rtol=1e-5, atol=1e-6)
        resized = nn.functional.interpolate(expected[None], (19, 19), mode='bilinear', align_corners=False)
        np.testing.assert_allclose(found.resized[i], resized[0, 0], rtol=1e-5, atol=1e-6)
