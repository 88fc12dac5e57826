"""The generated PyTorch module: outputs and gradients against JAX; all four networks at full size, also as ONNX."""

import importlib.util

import jax
import numpy as np
import pytest

from alexnet_jax.export import check, hub, onnx_model, pytorch_module
from tests.export import cases

torch = pytest.importorskip('torch', reason="needs PyTorch: pip install 'alexnet_jax[oracle]'")
FULL = [pytest.param(name, marks=pytest.mark.slow) for name in ('paper', 'authors_2012', 'caffe', 'torchvision')]


def _load(source, folder, views=1):
    """Writes the module and its tensors to a folder, and loads the network."""
    for name in ('safetensors', 'pytorch'):
        hub.write(folder, name, source, views)
    spec = importlib.util.spec_from_file_location('alexnet', folder / pytorch_module.FILE_NAME)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(folder)


def _logits(model, images):
    with torch.no_grad():
        return model(model.preprocess(torch.tensor(images))).numpy()


@pytest.mark.parametrize(('name', 'views'), [('authors', 1), ('caffe', 10), ('torchvision', 1)])
def test_module_gives_the_same_logits(name, views, tmp_path):
    source = cases.SMALL[name]()
    images = cases.images(source)
    model = _load(source, tmp_path, views)
    expected = check.reference(source, images, views, 'float32')
    logits = expected['logits'] if views == 1 else expected['logits'].swapaxes(0, 1).reshape(10 * len(images), -1)
    np.testing.assert_allclose(_logits(model, images), logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    helpers = {'authors': {'normalize_groups', 'spatial_norm', 'dropout', 'GroupedLinear'}}.get(name, set())
    defined = set(model.forward.__globals__) & {'normalize_groups', 'spatial_norm', 'dropout', 'GroupedLinear'}
    assert defined == helpers  # no helper that the network does not use
    with torch.no_grad():
        probabilities = model.probabilities(torch.tensor(images)).numpy()
    np.testing.assert_allclose(probabilities, expected['probabilities'], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['authors', 'torchvision'])
def test_gradients_agree_in_float64(name, tmp_path):
    source = cases.SMALL[name]()
    x = np.random.default_rng(1).normal(0, 64, (3, source.image_size, source.image_size, 3))
    labels = np.array([0, 3, 1])
    model = _load(source, tmp_path).double()
    logits = model(torch.tensor(x.transpose(0, 3, 1, 2)))
    torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
    with jax.enable_x64():
        network = source.network.clone(dtype='float64')

        def loss(params):
            logits = network.apply({'params': params}, x)
            return -jax.nn.log_softmax(logits)[np.arange(3), labels].mean()

        params = jax.tree.map(lambda value: value.astype(np.float64), source.params)
        gradients = jax.device_get(jax.jit(jax.grad(loss))(params))
    layers = [part for part in model.modules() if hasattr(part, 'weight')]
    for (layer, expected), found in zip(gradients.items(), layers, strict=True):
        kernel = expected['kernel']
        weight = found.weight.grad.numpy()
        if kernel.ndim == 4:
            weight = weight.transpose(2, 3, 1, 0)
        elif layer == 'fc6':  # reads maps [H, W, C]
            weight = weight.reshape(len(weight), -1, *_map_shape(source)).transpose(2, 3, 1, 0).reshape(kernel.shape)
        else:
            weight = weight.T
        for a, b in ((weight, kernel), (found.bias.grad.numpy(), expected['bias'])):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.abs(b).max(), err_msg=layer)


def _map_shape(source):
    channels = source.params['conv5']['bias'].shape[0]
    side = round((source.params['fc6']['kernel'].shape[0] / channels) ** 0.5)
    return side, side


@pytest.mark.parametrize('name', ['quickstart', *FULL])
def test_whole_networks_agree(name, tmp_path):
    source = cases.of_config(name)
    images = cases.images(source, 2)
    expected = check.reference(source, images, 1, 'float32')['logits']
    runtime = pytest.importorskip('onnxruntime')
    session = runtime.InferenceSession(onnx_model.onnx_model(source), providers=['CPUExecutionProvider'])
    for logits in (session.run(['logits'], {'image': images})[0], _logits(_load(source, tmp_path), images)):
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_dropout_of_the_paper(tmp_path):
    source = cases.SMALL['authors']()
    model, x = _load(source, tmp_path), torch.tensor(cases.images(source))
    with torch.no_grad():
        one, two = (model(model.preprocess(x)) for _ in range(2))
        model.train()
        three, four = (model(model.preprocess(x)) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(three, four)
    ones, dropout = torch.ones(1000), model.forward.__globals__['dropout']
    assert set(dropout(ones, 0.5, True).tolist()) == {0.0, 1.0}  # not scaled in training, but at test time
    assert set(dropout(ones, 0.5, False).tolist()) == {0.5}
