"""The paper's network in PyTorch, which shares no code with ours: the same weights, the same logits and gradients."""

import chex
import jax
import numpy as np
import pytest

from alexnet_jax import metrics, model
from tests import small

torch = pytest.importorskip('torch', reason="needs PyTorch: pip install 'alexnet_jax[oracle]'")
F = torch.nn.functional


def _torch_forward(network, params, x_NHWC, masks):
    """Grouped convolutions by PyTorch's `groups`, normalisation by its LocalResponseNorm, once for each half."""
    x = x_NHWC.permute(0, 3, 1, 2)
    for name, layer in network.table().items():
        kernel, bias = params[name]['kernel'], params[name]['bias']
        if name.startswith('conv'):
            low, high = layer.padding
            weight = kernel.permute(3, 2, 0, 1)
            x = F.conv2d(F.pad(x, (low, high, low, high)), weight, bias, stride=layer.stride, groups=layer.groups)
        else:
            x = x.permute(0, 2, 3, 1).flatten(1) if x.ndim == 4 else x
            x = x @ kernel + bias
        for step in layer.then.split():
            if step == 'relu':
                x = F.relu(x)
            elif step == 'lrn':
                # PyTorch divides alpha by the window, the paper's formula does not.
                norm = lambda half: F.local_response_norm(half, 5, alpha=5 * network.lrn_alpha, beta=0.75, k=2.0)  # noqa: E731
                x = torch.cat([norm(half) for half in x.chunk(2, dim=1)], dim=1)
            elif step == 'pool':
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            elif step == 'dropout':
                x = x * (0.5 if masks is None else masks[name])
    return x


def _as_torch(tree, dtype, grad=False):
    return jax.tree.map(lambda a: torch.tensor(np.asarray(a), dtype=dtype, requires_grad=grad), tree)


@pytest.mark.parametrize('full_size', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_logits(full_size):
    network, size = (model.AlexNet(), 224) if full_size else (small.network(), small.SIZE)
    params = small.init(network, 0, size)
    x = 60 * np.random.default_rng(0).standard_normal((4, size, size, 3)).astype(np.float32)
    logits = np.asarray(jax.jit(network.apply)({'params': params}, x))
    expected = _torch_forward(network, _as_torch(params, torch.float32), torch.tensor(x), None).numpy()
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize('full_size', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_with_dropout(full_size):
    network = model.AlexNet(dtype='float64') if full_size else small.network(dtype='float64')
    size = 224 if full_size else small.SIZE
    rng = np.random.default_rng(0)
    x, labels = 60 * rng.standard_normal((2, size, size, 3)), np.array([3, 7])
    with jax.enable_x64():
        params = small.to_float64(small.init(network, 0, size))
        masks = model.dropout_masks(network, jax.random.key(1), 2, size)

        def loss(params):
            logits = network.apply({'params': params}, x, masks)
            return -metrics.log_likelihood(logits, labels).mean()

        found = jax.device_get(jax.jit(jax.grad(loss))(params))
    theirs = _as_torch(params, torch.float64, grad=True)
    logits = _torch_forward(network, theirs, torch.tensor(x), _as_torch(masks, torch.float64))
    F.cross_entropy(logits, torch.tensor(labels)).backward()
    expected = jax.tree.map(lambda p: p.grad.numpy(), theirs)
    chex.assert_trees_all_equal_shapes(found, expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max() <= 1e-9 * np.abs(b).max()
