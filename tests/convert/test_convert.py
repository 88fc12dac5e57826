"""Conversion of weight files written by PyTorch, or by a protobuf writer that is independent of our reader.

The oracle is PyTorch's output. Default configs run at their full input size; only the widths are smaller than in
published files.
"""

import collections
import errno
import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile

import chex
import jax
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax.checkpoints import manager
from alexnet_jax.convert import convert, fit, layout, published
from alexnet_jax.convert.weight_file import WeightFile
from alexnet_jax.core.config import model_from_config
from alexnet_jax.utils.errors import UserError
from tests import helpers

torch = pytest.importorskip('torch', reason="needs PyTorch: pip install 'alexnet_jax[oracle]'")
safetensors_torch = pytest.importorskip('safetensors.torch')
nn = torch.nn

WIDTHS, HIDDEN, CLASSES = (8, 12, 16, 12, 12), 24, 7
FULL_SIZE = ((96, 256, 384, 384, 256), 4096, 1000)


def _caffe_net(widths=WIDTHS, hidden=HIDDEN, classes=CLASSES, pool_first=False, groups=(2, 1, 2, 2)):
    """Builds bvlc_alexnet, or bvlc_reference_caffenet if pool_first."""
    a, b, c, d, e = widths

    def norm_and_pool():
        norm, pool = nn.LocalResponseNorm(5, 1e-4, 0.75, 1.0), nn.MaxPool2d(3, 2, ceil_mode=True)
        return (nn.ReLU(), pool, norm) if pool_first else (nn.ReLU(), norm, pool)

    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, a, 11, 4), *norm_and_pool(), nn.Conv2d(a, b, 5, padding=2, groups=groups[0]), *norm_and_pool(),
        nn.Conv2d(b, c, 3, padding=1, groups=groups[1]), nn.ReLU(),
        nn.Conv2d(c, d, 3, padding=1, groups=groups[2]), nn.ReLU(),
        nn.Conv2d(d, e, 3, padding=1, groups=groups[3]), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Flatten(),
        nn.Linear(36 * e, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(),
        nn.Linear(hidden, classes),
    ).eval()  # fmt: skip


def _torchvision_net(widths=WIDTHS, hidden=HIDDEN, classes=CLASSES):
    """Builds torchvision.models.alexnet from its source."""
    a, b, c, d, e = widths
    torch.manual_seed(2)
    net = nn.Module()
    net.features = nn.Sequential(
        nn.Conv2d(3, a, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(a, b, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(3, 2), nn.Conv2d(b, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, d, 3, padding=1), nn.ReLU(),
        nn.Conv2d(d, e, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip
    net.classifier = nn.Sequential(
        nn.Dropout(), nn.Linear(36 * e, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(),
        nn.Linear(hidden, classes),
    )  # fmt: skip
    net.forward = lambda x: net.classifier(net.features(x).flatten(1))
    return net.eval()


def _sharpen(classifier, factor=30):
    """Scales the classifier, because PyTorch's initial weights give all classes nearly the same probability."""
    with torch.no_grad():
        classifier.weight *= factor


def _probabilities(net, image_NHWC):
    with torch.no_grad():
        x = torch.tensor(np.ascontiguousarray(image_NHWC), dtype=torch.float32).permute(0, 3, 1, 2)
        return torch.softmax(net(x), 1).numpy()


def _torchvision_probabilities(net, images):
    """Applies ToTensor, Normalize and a center crop, then the network."""
    scaled = (images[:, 16:240, 16:240] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return _probabilities(net, scaled)


def _caffe_probabilities(net, images, mean_bgr):
    """Converts to BGR, subtracts the mean image and takes the center crop of 227, then applies the network."""
    return _probabilities(net, (images[..., ::-1] - mean_bgr)[:, 14:241, 14:241])


@pytest.fixture(scope='module')
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 256, 256, 3), np.uint8)


@pytest.fixture(scope='module')
def mean_bgr():
    return np.random.default_rng(1).uniform(90, 140, (256, 256, 3)).astype(np.float32)


def _predict(path, images, views=1):
    return alexnet_jax.predict(alexnet_jax.load_checkpoint(str(path)), images, views=views)


def _config(name):
    return alexnet_jax.get_config(name)


# A writer of protobuf's wire format, from its specification, with the field numbers of BVLC/caffe's caffe.proto.


def _varint(number):
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def _field(number, value):
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    value = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _blob(array, kind):
    """Encodes a BlobProto. kind: 'shape' (since 2014), 'legacy' (four sizes, unpacked values) or 'double'."""
    if kind == 'legacy':
        shape = (1,) * (4 - array.ndim) + array.shape
        sides = b''.join(_field(i, side) for i, side in enumerate(shape, 1))
        return sides + b''.join(_varint(5 << 3 | 5) + struct.pack('<f', x) for x in array.ravel().tolist())
    shape = _field(7, _field(1, b''.join(map(_varint, array.shape))))
    if kind == 'double':
        return _field(8, array.astype('<f8').tobytes()) + shape
    return _field(5, array.astype('<f4').tobytes()) + shape


V1_TYPES = {'Data': 5, 'Convolution': 4, 'ReLU': 18, 'LRN': 15, 'Pooling': 17, 'InnerProduct': 14, 'Dropout': 6}


def _caffemodel(net, kind='shape', v1=False, all_layers=True):
    """Encodes a torch Sequential as NetParameter. Caffe writes all layers, most of them without weights."""
    kinds = {
        nn.Conv2d: 'Convolution', nn.ReLU: 'ReLU', nn.LocalResponseNorm: 'LRN', nn.MaxPool2d: 'Pooling',
        nn.Linear: 'InnerProduct', nn.Dropout: 'Dropout',
    }  # fmt: skip
    fields = [_field(1, 'AlexNet')]
    for i, module in enumerate([None, *net]):
        type_ = 'Data' if module is None else kinds.get(type(module))
        if type_ is None or not (all_layers or hasattr(module, 'weight')):
            continue
        arrays = [p.detach().numpy() for p in module.parameters()] if module else []
        name, bottom = f'{type_.lower()}{i}', _field(2 if v1 else 3, f'blob{i}')
        if v1:
            blobs = b''.join(_field(6, _blob(array, kind)) for array in arrays)
            fields.append(_field(2, bottom + _field(4, name) + _field(5, V1_TYPES[type_]) + blobs))
        else:
            blobs = b''.join(_field(7, _blob(array, kind)) for array in arrays)
            fields.append(_field(100, _field(1, name) + _field(2, type_) + bottom + blobs))
    return b''.join(fields)


@pytest.mark.parametrize('zipped', [True, False])
def test_torchvision_state_dict(zipped, images, tmp_path):
    net = _torchvision_net()
    _sharpen(net.classifier[6])
    torch.save(net.state_dict(), tmp_path / 'w.pth', _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(tmp_path / 'w.pth') == zipped
    convert.convert(str(tmp_path / 'w.pth'), str(tmp_path / 'out'))
    expected = _torchvision_probabilities(net, images)
    assert expected.max() > 0.2  # not a uniform distribution
    np.testing.assert_allclose(_predict(tmp_path / 'out', images), expected, rtol=1e-4)
    assert sorted(os.listdir(tmp_path)) == ['out', 'w.pth']


@pytest.mark.parametrize('groups', [(2, 1, 2, 2), (1, 1, 1, 1), (4, 2, 1, 2)])
def test_state_dict_with_other_names_and_groups(groups, images, mean_bgr, tmp_path):
    """Names of a Sequential, half precision, nested in a training checkpoint with DataParallel's prefix, RGB input."""
    net = _caffe_net(groups=groups)
    _sharpen(net[-1])
    weights = {f'module.{name}': tensor.half() for name, tensor in net.state_dict().items()}
    torch.save({'epoch': 90, 'state_dict': weights}, tmp_path / 'w.pth.tar')
    net.half().float()
    mean_rgb = mean_bgr[..., ::-1]
    np.save(tmp_path / 'mean.npy', mean_rgb)
    convert.convert(
        str(tmp_path / 'w.pth.tar'), str(tmp_path / 'out'), config=_config('caffe'), mean=str(tmp_path / 'mean.npy')
    )
    expected = _probabilities(net, (images - mean_rgb)[:, 14:241, 14:241])
    np.testing.assert_allclose(_predict(tmp_path / 'out', images), expected, rtol=1e-4)
    layers = alexnet_jax.load_checkpoint(str(tmp_path / 'out')).network.layers
    assert [layers[f'conv{i}'].groups for i in range(1, 6)] == [1, *groups]


@pytest.mark.parametrize(
    ('kind', 'v1', 'pool_first', 'mean'),
    [
        ('shape', False, False, 'binaryproto'),
        ('legacy', True, False, 'binaryproto'),  # as the published bvlc_alexnet.caffemodel
        ('legacy', True, True, 'npy'),  # as bvlc_reference_caffenet.caffemodel
        ('double', False, True, 'npy'),
        ('shape', False, False, 'color'),
    ],
)
def test_caffemodel(kind, v1, pool_first, mean, images, mean_bgr, tmp_path):
    net = _caffe_net(pool_first=pool_first)
    _sharpen(net[-1])
    (tmp_path / 'w.caffemodel').write_bytes(_caffemodel(net, kind, v1))
    file = tmp_path / ('mean.binaryproto' if mean == 'binaryproto' else 'mean.npy')
    if mean == 'binaryproto':
        file.write_bytes(_blob(mean_bgr.transpose(2, 0, 1), 'legacy'))
    else:
        mean_bgr = np.array([104, 117, 123], np.float32) if mean == 'color' else mean_bgr
        np.save(file, mean_bgr.transpose(2, 0, 1) if mean == 'npy' else mean_bgr)
    convert.convert(str(tmp_path / 'w.caffemodel'), str(tmp_path / 'out'), mean=str(file))
    expected = _caffe_probabilities(net, images, mean_bgr)
    assert expected.max() > 0.2
    np.testing.assert_allclose(_predict(tmp_path / 'out', images), expected, rtol=2e-4)


def _pytorchcv_net(normalized, classes=CLASSES):
    """Builds pytorchcv's alexnet, or alexnetb if not normalized, from its source."""
    a, b, c, d, e = WIDTHS

    def unit(*sizes, norm=False):
        parts = {'conv': nn.Conv2d(*sizes), 'act': nn.ReLU()}
        return nn.Sequential(
            collections.OrderedDict(parts | ({'norm': nn.LocalResponseNorm(5, k=2.0)} if norm else {}))
        )

    def stage(*units):
        named = {f'unit{i}': unit for i, unit in enumerate(units, 1)}
        return nn.Sequential(collections.OrderedDict(named | {'pool': nn.MaxPool2d(3, 2, ceil_mode=True)}))

    def dense(inputs, outputs):
        return nn.Sequential(collections.OrderedDict(fc=nn.Linear(inputs, outputs), act=nn.ReLU(), drop=nn.Dropout()))

    torch.manual_seed(3)
    net = nn.Module()
    net.features = nn.Sequential(collections.OrderedDict(
        stage1=stage(unit(3, a, 11, 4, 0 if normalized else 2, norm=normalized)),
        stage2=stage(unit(a, b, 5, 1, 2, norm=normalized)),
        stage3=stage(unit(b, c, 3, 1, 1), unit(c, d, 3, 1, 1), unit(d, e, 3, 1, 1)),
    ))  # fmt: skip
    net.output = nn.Sequential(collections.OrderedDict(
        fc1=dense(36 * e, HIDDEN), fc2=dense(HIDDEN, HIDDEN), fc3=nn.Linear(HIDDEN, classes)
    ))  # fmt: skip
    net.forward = lambda x: net.output(net.features(x).flatten(1))
    return net.eval()


def _publish(monkeypatch, folder, name, content, mean=None):
    """Writes files under the published names of an entry and replaces its digests by theirs."""
    entry = published.PUBLISHED[name]
    monkeypatch.setenv(published.FOLDER_VARIABLE, str(folder))
    monkeypatch.setenv('XDG_CACHE_HOME', str(folder))
    files = []
    for file, data in ((entry.weights, content), (entry.mean, mean)):
        if file is not None:
            written = data
            if file.name.endswith('.zip'):
                with zipfile.ZipFile(folder / file.name, 'w', zipfile.ZIP_DEFLATED) as archive:
                    archive.writestr(file.member, data)
            elif file.name.endswith('.tar.gz'):
                with tarfile.open(folder / file.name, 'w:gz') as archive:
                    member = tarfile.TarInfo(file.member)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
            else:
                (folder / file.name).write_bytes(written)
            file = file._replace(digest=f'sha1:{hashlib.sha1(data).hexdigest()}')
        files.append(file)
    monkeypatch.setitem(published.PUBLISHED, name, entry._replace(weights=files[0], mean=files[1]))


@pytest.mark.parametrize('name', ['torchvision', 'caffe', 'caffenet', 'pytorchcv', 'pytorchcv-b'])
def test_published_names(name, images, mean_bgr, tmp_path, monkeypatch):
    """Small networks of the published layouts, under the published names of the files.

    CaffeNet's file lists no operations here, so that their order is that of the config.
    """
    mean = None
    if name.startswith('caffe'):
        net = _caffe_net(pool_first=name == 'caffenet')
        _sharpen(net[-1])
        content, mean = _caffemodel(net, all_layers=name == 'caffe'), _blob(mean_bgr.transpose(2, 0, 1), 'shape')
        expected = _caffe_probabilities(net, images, mean_bgr)
    else:
        net = _torchvision_net() if name == 'torchvision' else _pytorchcv_net(name == 'pytorchcv')
        _sharpen(net.classifier[6] if name == 'torchvision' else net.output[-1])
        buffer = io.BytesIO()
        torch.save(net.state_dict(), buffer)
        content, expected = buffer.getvalue(), _torchvision_probabilities(net, images)
    assert expected.max() > 0.2
    _publish(monkeypatch, tmp_path, name, content, mean)
    np.testing.assert_allclose(_predict(name, images), expected, rtol=2e-4)


def test_zipped_weights(images, tmp_path):
    """As pytorchcv publishes them. With other files beside the weights, too."""
    net = _pytorchcv_net(True)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    with zipfile.ZipFile(tmp_path / 'w.pth.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('net/w.pth', buffer.getvalue())
        archive.writestr('net/README.txt', b'...')
    convert.convert(tmp_path / 'w.pth.zip', tmp_path / 'out', config=_config('pytorchcv'))
    (tmp_path / 'w.pth').write_bytes(buffer.getvalue())
    chex.assert_trees_all_equal(
        alexnet_jax.load_checkpoint(tmp_path / 'out').params,
        convert.read(tmp_path / 'w.pth', config=_config('pytorchcv')).params,
    )


def test_safetensors_round_trip_is_bit_exact(images, tmp_path):
    """PyTorch's safetensors -> checkpoint -> safetensors, which PyTorch loads strictly with identical bits."""
    net = _torchvision_net()
    safetensors_torch.save_file(net.state_dict(), tmp_path / 'w.safetensors')
    convert.convert(str(tmp_path / 'w.safetensors'), str(tmp_path / 'out'))
    np.testing.assert_allclose(_predict(tmp_path / 'out', images), _torchvision_probabilities(net, images), rtol=1e-4)
    convert.convert(str(tmp_path / 'out'), str(tmp_path / 'back'), to='safetensors')
    held = safetensors_torch.load_file(tmp_path / 'back' / 'model.safetensors')
    _torchvision_net().load_state_dict(held, strict=True)
    for name, tensor in net.state_dict().items():
        assert torch.equal(held[name], tensor), name


def test_checkpoint_round_trip_is_exact(images, mean_bgr, tmp_path):
    """An exported checkpoint is read back identically (weights, mean, class names, network), also by PyTorch."""
    net = _caffe_net()
    (tmp_path / 'w.caffemodel').write_bytes(_caffemodel(net))
    np.save(tmp_path / 'mean.npy', mean_bgr)
    (tmp_path / 'names').write_text('\n'.join('abcdefg'))
    paths = [str(tmp_path / name) for name in ('first', 'exported', 'second')]
    convert.convert(
        str(tmp_path / 'w.caffemodel'), paths[0], mean=str(tmp_path / 'mean.npy'), classes=str(tmp_path / 'names')
    )
    convert.convert(paths[0], paths[1], to='safetensors')
    assert sorted(os.listdir(paths[1])) == ['image_stats.npz', 'model.safetensors']
    convert.convert(f'{paths[1]}/model.safetensors', paths[2])
    first, second = (alexnet_jax.load_checkpoint(paths[i]) for i in (0, 2))
    chex.assert_trees_all_equal(first.params, second.params)
    chex.assert_trees_all_equal(first.image_stats, second.image_stats)
    assert first._replace(params=None, image_stats=None) == second._replace(params=None, image_stats=None)
    assert second.class_names == tuple('abcdefg')
    held = safetensors_torch.load_file(f'{paths[1]}/model.safetensors')
    exported, names = _caffe_net(), ('conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7', 'fc8')
    tensors = [held[f'{name}.{kind}'] for name in names for kind in ('weight', 'bias')]
    exported.load_state_dict(dict(zip(exported.state_dict(), tensors, strict=True)))
    found = _probabilities(exported, (images - mean_bgr[..., ::-1])[:, 14:241, 14:241])  # RGB
    np.testing.assert_allclose(found, _caffe_probabilities(net, images, mean_bgr), rtol=1e-4)


@pytest.mark.slow
def test_grouped_dense_layers_round_trip(tmp_path):
    """Dense layers in two groups; the first one reads maps."""
    config = _config('ablations:no_communication')
    for name, width in zip(('conv1', 'conv2', 'conv3', 'conv4', 'conv5'), WIDTHS, strict=True):
        config.model.layers[name].features = width
    config.model.layers.fc6.features = config.model.layers.fc7.features = HIDDEN
    config.model.num_classes = CLASSES
    params = helpers.init(model_from_config(config.model), 0, 224)
    found = layout.from_params(model_from_config(config.model), 224, params)
    fc6 = np.asarray(params['fc6']['kernel']).reshape(6, 6, 6, HIDDEN)  # y, x, channel in its tower, unit
    assert found[5].weight.shape == (HIDDEN, 6 * 36)
    assert found[5].weight[5, 4 * 36 + 3 * 6 + 2] == fc6[3, 2, 4, 5]
    back = layout.to_params(model_from_config(config.model), 224, found)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, params), back)
    fitted = fit.fit_config(manager.config_to_json(config), WeightFile('', found))
    assert model_from_config(fitted['model']) == model_from_config(config.model)


@pytest.mark.slow
def test_full_size_caffemodel(images, mean_bgr, tmp_path):
    """Sizes of the published file: 60,965,224 parameters, 1,000 classes named by WordNet ids."""
    net = _caffe_net(*FULL_SIZE)
    _sharpen(net[-1], 300)
    (tmp_path / 'w.caffemodel').write_bytes(_caffemodel(net, v1=True))
    (tmp_path / 'mean.binaryproto').write_bytes(_blob(mean_bgr.transpose(2, 0, 1), 'legacy'))
    output = tmp_path / 'out'
    convert.convert(str(tmp_path / 'w.caffemodel'), str(output), mean=str(tmp_path / 'mean.binaryproto'))
    loaded = alexnet_jax.load_checkpoint(str(output))
    assert sum(x.size for x in jax.tree.leaves(loaded.params)) == 60_965_224
    assert loaded.class_names[:2] == ('n01440764', 'n01443537') and len(loaded.class_names) == 1000
    expected = _caffe_probabilities(net, images, mean_bgr)
    assert expected.max() > 0.01
    np.testing.assert_allclose(_predict(output, images), expected, rtol=1e-3)


# Invalid files, and the error for each.


class _Trap:
    """Creates a directory when unpickled without restrictions."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class _Zeros:
    """Allocates two gigabytes when unpickled, even with weights_only."""

    def __reduce__(self):
        return bytearray, (2**31,)


def _deflated(archive):
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as given, zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as made:
        for name in given.namelist():
            made.writestr(name, given.read(name))
    return file.getvalue()


def _saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


def _wrong_files(folder):
    """Yields (file name, content, pattern of the error)."""
    net = _torchvision_net()
    state = net.state_dict()
    whole, caffe = _saved(state), _caffemodel(_caffe_net())
    tensors = safetensors_torch.save(state)
    kernel_of_3 = state | {'features.3.weight': torch.zeros(12, 8, 3, 3)}
    norms = state | {'bn.weight': torch.ones(8), 'bn.bias': torch.zeros(8), 'bn.running_mean': torch.zeros(8)}
    nan = state | {'classifier.4.bias': torch.full((HIDDEN,), float('nan'))}
    extra = state | {'aux.weight': torch.zeros(3, 4), 'aux.bias': torch.zeros(3)}
    noise = np.random.default_rng(0).bytes(5000)
    yield 'cut.pth', whole[: len(whole) // 2], 'cut.pth.* cannot be read: expected a state_dict written by torch.save'
    yield 'empty.pth', b'', 'found 0 bytes'
    yield 'noise.pth', noise, 'expected a state_dict written by torch.save, found 5000 bytes'
    yield 'text.pth', b'weights, they said', r"found 18 bytes starting with b'weights,'"
    yield 'module.pth', _saved(net.features), 'conv5 ok; fc6 expected .* found nothing'
    yield 'trap.pth', _saved({'w': _Trap(folder / 'sprung')}), r'found a dict with w \(posix.mkdir\); use torch.save'
    yield 'bare.pth', pickle.dumps(_Trap(folder / 'sprung')), 'cannot be read'
    yield 'list.pth', _saved([1, 2]), r'expected a state_dict \(names and tensors\), found list'
    yield 'numbers.pth', _saved({'epoch': 3, 'lr': 0.1}), r'found a dict with epoch \(int\), lr \(float\)'
    yield 'norms.pth', _saved(norms), r'unsupported tensors bn.weight \(8,\), bn.bias \(8,\), bn.running_mean'
    pattern = r"conv1 ok; conv2 expected \(N, 8 / groups, 5, 5\), found \(12, 8, 3, 3\) in 'features.3'; conv3 ok"
    yield 'kernel.pth', _saved(kernel_of_3), pattern
    four_convs = _without(state, 'features.10.weight', 'features.10.bias')
    pattern = r'conv5 expected \(N, 12 / groups, 3, 3\), found nothing; .*fc8 ok.* Use --config=NAME'
    yield 'missing.pth', _saved(four_convs), pattern
    unbiased = _without(state, 'features.0.bias')
    yield 'unbiased.pth', _saved(unbiased), r'unsupported tensors features.0.weight \(8, 3, 11, 11\)'
    biases = state | {'features.6.bias': torch.zeros(12)}
    yield 'bias.pth', _saved(biases), r"conv3 expected \(16,\) biases, found \(12,\) in 'features.6'"
    yield 'extra.pth', _saved(extra), r"expected no further layer, found \(3, 4\) in 'aux'"
    yield 'nan.pth', _saved(nan), r'fc7 \(classifier.4.bias\): expected finite numbers'
    yield 'whole.pth', _saved({k: v.int() for k, v in state.items()}), 'expected floating-point numbers, found int32'
    yield 'cut.safetensors', tensors[:-100], 'cannot be read: expected a safetensors file'
    yield 'noise.safetensors', noise, 'cannot be read: expected a safetensors file'
    yield 'cut.caffemodel', caffe[: len(caffe) // 2], "cannot be read: expected Caffe's NetParameter in binary"
    yield 'noise.caffemodel', noise, "cannot be read: expected Caffe's NetParameter in binary"
    yield 'text.caffemodel', b'name: "AlexNet"\n', "expected Caffe's NetParameter in binary, found 16 bytes"
    yield 'empty.caffemodel', b'', r'conv1 expected \(N, 3, 11, 11\), found nothing; conv2'
    two_of_three = _field(5, bytes(8)) + _field(7, _field(1, b'\x03'))
    short = _field(100, _field(1, 'a') + _field(7, two_of_three))
    yield 'short.caffemodel', short, r'a: expected 3 numbers for shape \(3,\), found 2'
    for sides in ((-1, -3), (1,) * 70):
        shape = _field(1, b''.join(_varint(side % 2**64) for side in sides))
        odd = _field(1, 'a\n\x1b') + _field(7, _field(5, bytes(12)) + _field(7, shape))
        yield (
            'sides.caffemodel',
            _field(100, odd),
            r'a\?\?: expected at most 32 sizes of 0 or more, found \(',
        )
    # Files that would take far more memory than they have bytes.
    few = {'a.weight': torch.zeros(1, dtype=torch.half).expand(40_000, 50_000), 'a.bias': torch.zeros(1)}
    yield 'expanded.pth', _saved(few), r'\d{4} bytes, but 4000000000 declared'
    yield 'bytes.pth', _saved({'w': _Zeros()}), r'found a dict with w \(__builtin__.bytearray\)'
    yield 'packed.pth', _deflated(_saved({'w': torch.zeros(1_000_000)})), 'its entries are compressed'
    yield 'line.pth', _saved({'a\nb\ud800': torch.zeros(1)}), r'unsupported tensors a\?b\? \(1,\)'
    whole = {'config': {'model': {}, 'data': {'image_size': 9, 'mean': 'crop'}}, 'record_size': 9, 'class_names': []}
    changed = [{**whole, **change} for change in ({'record_size': '9'}, {'class_names': [1]}, {'class_names': None})]
    for text in ('[' * 100_000, '[1]', *map(json.dumps, changed)):
        pattern = 'expected the metadata that alexnet_jax convert writes'
        yield 'own.safetensors', safetensors_torch.save(state, {'alexnet_jax': text}), pattern
    plain = manager.config_to_json(_config('torchvision'))
    for part, key, pattern in (
        ('model', 'lrn_k', 'model.lrn_k=1000+: expected a positive number'),
        ('data', 'color_std', 'data.color_std=1000+: expected a number of 0 or more'),
        ('model', '\n', r"own.safetensors.: unknown config key 'model\. '\."),
    ):
        changed = {**plain, part: {**plain[part], key: 10**400}}
        own = json.dumps({'config': changed, 'class_names': [], 'record_size': 256})
        yield 'own.safetensors', safetensors_torch.save(state, {'alexnet_jax': own}), pattern
    yield 'w.h5', b'', 'expected an existing .caffemodel, .pth, .npy or .safetensors file'


def test_invalid_files_are_rejected(tmp_path):
    mean, files = tmp_path / 'mean.npy', tmp_path / 'files'
    files.mkdir()
    np.save(mean, np.full(3, 120.0))
    for name, content, pattern in _wrong_files(files):
        (files / name).write_bytes(content)
        with pytest.raises(UserError, match=pattern) as caught:
            convert.convert(str(files / name), str(tmp_path / 'out'), mean=str(mean))
        assert '\n' not in str(caught.value), name
        assert sorted(os.listdir(tmp_path)) == ['files', 'mean.npy'] and os.listdir(files) == [name], name
        os.remove(files / name)


def test_caffe_layers_missing_an_operation_are_rejected(tmp_path):
    """A net without normalization after the second layer does not fit the config."""
    net = nn.Sequential(*(module for i, module in enumerate(_caffe_net()) if i != 6))
    (tmp_path / 'w.caffemodel').write_bytes(_caffemodel(net))
    np.save(tmp_path / 'mean.npy', np.full(3, 120.0))
    message = "conv2 expected operations 'relu lrn pool', found 'relu pool' after 'convolution"
    with pytest.raises(UserError, match=message):
        convert.convert(str(tmp_path / 'w.caffemodel'), str(tmp_path / 'out'), mean=str(tmp_path / 'mean.npy'))
    # If the file lists no operations, those of the config are used.
    (tmp_path / 'w.caffemodel').write_bytes(_caffemodel(net, all_layers=False))
    convert.convert(str(tmp_path / 'w.caffemodel'), str(tmp_path / 'out'), mean=str(tmp_path / 'mean.npy'))


def test_invalid_options_are_rejected(mean_bgr, tmp_path):
    source, out = tmp_path / 'w.caffemodel', tmp_path / 'out'
    source.write_bytes(_caffemodel(_caffe_net()))
    (tmp_path / 'exists').mkdir()
    np.save(tmp_path / 'good.npy', mean_bgr)
    np.save(tmp_path / 'small.npy', mean_bgr[:100, :100])
    np.save(tmp_path / 'oblong.npy', mean_bgr[:, :200])
    np.save(tmp_path / 'unit.npy', mean_bgr / 255)
    np.save(tmp_path / 'pickled.npy', np.array([{}]), allow_pickle=True)
    np.save(tmp_path / 'nothing.npy', np.zeros((0, 0, 3)))
    np.save(tmp_path / 'complex.npy', np.full(3, 120j))
    with open(tmp_path / 'short.npy', 'wb') as file:
        np.lib.format.write_array_header_1_0(file, {'descr': '<f4', 'fortran_order': False, 'shape': (2**31, 3)})
    with open(tmp_path / 'large.binaryproto', 'wb') as file:
        file.truncate(2**31)  # sparse: takes no disk space
    (tmp_path / 'cut.binaryproto').write_bytes(_blob(mean_bgr, 'shape')[:1000])
    (tmp_path / 'two').write_text('cat\ndog\n')
    good = str(tmp_path / 'good.npy')
    before = sorted(os.listdir(tmp_path))
    for changes, pattern in [
        (dict(mean=None), "has no mean image, which data.mean='crop' needs; use --mean=FILE"),
        (dict(mean='none.npy'), "--mean='none.npy': expected an existing .binaryproto or .npy file"),
        (dict(mean='small.npy'), 'expected an image of at least data.image_size=227 px, found 100 px'),
        (dict(mean='oblong.npy'), r'expected a shape \[3, S, S\].* found \(256, 200, 3\)'),
        (dict(mean='unit.npy'), 'expected values from 0 to 255, found 0.3'),
        (dict(mean='pickled.npy'), 'expected an array written by numpy.save'),
        (dict(mean='cut.binaryproto'), "expected Caffe's BlobProto in binary"),
        (dict(mean='large.binaryproto'), r"expected Caffe's BlobProto of at most 2147483647 bytes, found 2147483648"),
        (dict(mean='nothing.npy'), r'expected a shape \[3, S, S\].* found \(0, 0, 3\)'),
        (dict(mean='complex.npy'), 'expected an array written by numpy.save.* complex128 array of shape'),
        (dict(mean='short.npy'), 'expected an array written by numpy.save.* mmap length is greater than file size'),
        (dict(mean='two'), 'expected an existing .binaryproto or .npy file'),
        (dict(classes='two'), 'expected 7 class names, one per output, found 2'),
        (dict(classes='none'), "--classes=.* cannot be read"),
        (dict(output='exists'), "exists' already exists; remove it or choose another --output"),
        (dict(to='onnx'), "--to='onnx': expected checkpoint or safetensors"),
        (dict(to='safetensors', mean=None), 'is a file, not a checkpoint'),
        (dict(to='safetensors'), '--to=safetensors: remove --mean, --config, --classes and --color_order'),
        (dict(color_order='grb'), "--color_order='grb': expected rgb or bgr"),
        (dict(source='none.pth'), 'expected an existing .caffemodel, .pth, .npy or .safetensors file'),
        (dict(source='exists'), '; for a checkpoint use --to=safetensors'),
    ]:  # fmt: skip
        options = dict(source=str(source), output=str(out), mean=good)
        for key, value in changes.items():
            beside = value is not None and key not in ('to', 'color_order') and value != 'none.npy'
            options[key] = str(tmp_path / value) if beside else value
        with pytest.raises(UserError, match=pattern):
            convert.convert(**options)
        assert sorted(os.listdir(tmp_path)) == before, changes


def test_full_disk_leaves_no_files(tmp_path, monkeypatch):
    source, out = tmp_path / 'w.caffemodel', tmp_path / 'out'
    source.write_bytes(_caffemodel(_caffe_net()))
    np.save(tmp_path / 'mean.npy', np.full(3, 120.0))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(manager.CheckpointManager, 'save', full)
    with pytest.raises(UserError, match='cannot write .*out.*No space left on device'):
        convert.convert(str(source), str(out), mean=str(tmp_path / 'mean.npy'))
    assert sorted(os.listdir(tmp_path)) == ['mean.npy', 'w.caffemodel']
