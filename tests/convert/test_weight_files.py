"""Files that people have under the names of weight files. Nothing here needs PyTorch."""

import bz2
import functools
import gzip
import io
import lzma
import os
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.numpy

import alexnet_jax
from alexnet_jax.convert import convert, npy
from alexnet_jax.convert.weight_file import LayerWeights, in_numeric_order
from alexnet_jax.utils.errors import UserError

NAMES = ('conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7', 'fc8')
SHAPES = ((11, 11, 3, 2), (5, 5, 2, 2), (3, 3, 2, 2), (3, 3, 2, 2), (3, 3, 2, 2), (72, 4), (4, 4), (4, 3))  # HWIO


def _layers(dtype=np.float32):
    """Returns {name: [weights, biases]} in TensorFlow's layout."""
    rng = np.random.default_rng(0)
    draws = {
        name: [rng.normal(size=shape), rng.normal(size=shape[-1])] for name, shape in zip(NAMES, SHAPES, strict=True)
    }
    return {name: [array.astype(dtype) for array in arrays] for name, arrays in draws.items()}


def _saved(value):
    file = io.BytesIO()
    np.save(file, value, allow_pickle=True)
    return file.getvalue()


def _python_2(layers):
    """Returns what numpy.save wrote under Python 2: strings of bytes, protocol 2, keys in no order."""

    def text(data):
        return b'T' + struct.pack('<i', len(data)) + data

    def number(n):
        return b'J' + struct.pack('<i', n)

    def array(shape, dtype, data):
        made = b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt' + text(b'b') + b'tR'
        kind = b'cnumpy\ndtype\n(' + text(dtype) + b'I0\nI1\ntR(I3\n' + text(b'|' if dtype == b'O8' else b'<')
        kind += b'NNNI-1\nI-1\nI0\ntb'
        return made + b'(I1\n(' + b''.join(map(number, shape)) + b't' + kind + b'I00\n' + data + b'tb'

    names = ('fc6', 'fc7', 'fc8', 'conv3', 'conv2', 'conv1', 'conv5', 'conv4')
    items = b''
    for name in names:
        pair = [array(part.shape, b'f4', text(part.tobytes())) for part in layers[name]]
        items += text(name.encode()) + b']' + b'(' + b''.join(pair) + b'e'
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {'descr': '|O', 'fortran_order': False, 'shape': ()})
    return header.getvalue() + b'\x80\x02' + array((), b'O8', b'](}(' + items + b'ue') + b'.'


NPY = {
    'lists': lambda: (_saved(_layers()), np.float32),
    'tuples': lambda: (_saved({name: tuple(pair) for name, pair in _layers().items()}), np.float32),
    'named': lambda: (
        _saved({name: dict(zip(('weights', 'biases'), pair, strict=True)) for name, pair in _layers().items()}),
        np.float32,
    ),
    'alphabetical': lambda: (_saved(dict(sorted(_layers().items()))), np.float32),
    'shuffled': lambda: (_saved({name: _layers()[name] for name in (*NAMES[5:], *NAMES[4::-1])}), np.float32),
    'Python 2': lambda: (_python_2(_layers()), np.float32),
    'float16': lambda: (_saved(_layers(np.float16)), np.float16),
    'big-endian float64': lambda: (_saved(_layers('>f8')), np.float64),
    "Fortran's order": lambda: (
        _saved({name: [np.asfortranarray(part) for part in pair] for name, pair in _layers().items()}), np.float32
    ),
}  # fmt: skip


@pytest.mark.parametrize('case', NPY)
def test_npy_dictionary_has_the_layout_of_tensorflow(case, tmp_path):
    content, dtype = NPY[case]()
    (tmp_path / 'w.npy').write_bytes(content)
    weights = npy.read(str(tmp_path / 'w.npy'))
    found = {layer.name: layer for layer in weights.layers}
    assert weights.bgr and [layer.name for layer in weights.of_rank(4) + weights.of_rank(2)] == list(NAMES)
    for name, (weight, bias) in _layers(dtype).items():
        np.testing.assert_array_equal(found[name].bias, bias)
        if weight.ndim == 4:
            assert found[name].weight[1, 0, 2, 1] == weight[2, 1, 0, 1]
        elif name == 'fc6':  # 6 x 6 maps of 2 channels
            assert found[name].weight[3, 1 * 36 + 4 * 6 + 5] == weight[(4 * 6 + 5) * 2 + 1, 3]
        else:
            np.testing.assert_array_equal(found[name].weight, weight.T)


def _weights_file(path, layers):
    tensors = {}
    for name, (weight, bias) in layers.items():
        weight = weight.reshape(6, 6, 2, 4) if name == 'fc6' else weight
        weight = np.moveaxis(weight, (-1, -2), (0, 1)).reshape(weight.shape[-1], -1, *SHAPES[NAMES.index(name)][:-2])
        weight = weight.reshape(len(weight), -1) if name == 'fc6' else weight
        tensors |= {f'{name}.weight': np.ascontiguousarray(weight), f'{name}.bias': bias}
    safetensors.numpy.save_file(tensors, path)


@pytest.mark.parametrize('suffix', ['.npy', '.safetensors', '.weights'])
def test_bgr_is_converted_to_rgb(suffix, tmp_path, caplog):
    """The parameters of this package have the layout of TensorFlow, with RGB input."""
    layers, source = _layers(), tmp_path / f'w{suffix}'
    if suffix == '.safetensors':
        _weights_file(source, layers)
    else:  # also under an unknown suffix
        source.write_bytes(_saved(layers))
    np.save(tmp_path / 'mean.npy', np.array([104.0, 117.0, 123.0]))
    order = 'bgr' if suffix == '.safetensors' else None
    caplog.set_level('INFO', 'absl')
    convert.convert(source, tmp_path / 'out', mean=tmp_path / 'mean.npy', color_order=order)
    assert 'are from caffe; for another' in caplog.text
    loaded = alexnet_jax.load_checkpoint(str(tmp_path / 'out'))
    np.testing.assert_array_equal(loaded.image_stats.mean_image[0, 0], [123, 117, 104])
    for name, (weight, bias) in layers.items():
        expected = weight[:, :, ::-1] if name == 'conv1' else weight
        np.testing.assert_array_equal(loaded.params[name]['kernel'], expected)
        np.testing.assert_array_equal(loaded.params[name]['bias'], bias)


def test_stated_color_order_cannot_be_changed(tmp_path):
    _weights_file(tmp_path / 'w.safetensors', _layers())
    np.save(tmp_path / 'mean.npy', np.full(3, 120.0))
    convert.convert(tmp_path / 'w.safetensors', tmp_path / 'a', mean=tmp_path / 'mean.npy', color_order='rgb')
    convert.convert(tmp_path / 'a', tmp_path / 'b', to='safetensors')
    with pytest.raises(UserError, match='--color_order=bgr: .*model.safetensors. already states its order; remove'):
        convert.convert(tmp_path / 'b' / 'model.safetensors', tmp_path / 'c', color_order='bgr')


@pytest.mark.parametrize(
    ('names', 'expected'),
    [
        ('features.10 features.0 features.3', 'features.0 features.3 features.10'),  # in the order of the alphabet
        ('fc8 conv2 fc6 conv1', 'fc6 conv1 fc8 conv2'),
        ('stem body2 head body1', 'stem body1 head body2'),
        ('stem body head', 'stem body head'),
        ('b2.conv1 b1.conv2 b1.conv1', 'b1.conv1 b1.conv2 b2.conv1'),
    ],
)
def test_layers_are_sorted_by_their_numbers(names, expected):
    layers = [LayerWeights(name, np.zeros((1, 1)), np.zeros(1)) for name in names.split()]
    assert [layer.name for layer in in_numeric_order(layers)] == expected.split()


def _tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as archive:
        archive.addfile(tarfile.TarInfo('alexnet.pth'))
    return file.getvalue()


POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 233\n'
FOREIGN = {
    'pointer': (POINTER, 'is a Git LFS pointer, not the file itself: use git lfs pull'),
    'page': (b'\n<!DOCTYPE html><html>404', 'is a web page, not the file itself: download it again'),
    'page without a type': (b'<HTML><head>', 'is a web page'),
    'gzip': (gzip.compress(b'weights'), 'is compressed by gzip: unpack it'),
    'bzip2': (bz2.compress(b'weights'), 'is compressed by bzip2: unpack it'),
    'xz': (lzma.compress(b'weights'), 'is compressed by xz: unpack it'),
    'tar': (_tar(), 'is a tar archive: unpack it and use the file in it'),
    'HDF5': (b'\x89HDF\r\n\x1a\n' + bytes(100), r'is an HDF5 file \(Keras\): save the weights as safetensors'),
}


@pytest.mark.parametrize('suffix', ['.pth', '.tar', '.ckpt', '.safetensors', '.caffemodel', '.npy'])
def test_other_files_are_named(suffix, tmp_path):
    for content, pattern in FOREIGN.values():
        (tmp_path / f'w{suffix}').write_bytes(content)
        with pytest.raises(UserError, match=pattern) as caught:
            convert.convert(tmp_path / f'w{suffix}', tmp_path / 'out')
        assert '\n' not in str(caught.value)


def test_zipped_weights_are_read_or_refused(tmp_path, capsys):
    """An archive of one file of weights is read. Errors name the file as a path in the archive."""
    rng = np.random.default_rng(1)
    content = _saved({f'conv{i}': [rng.normal(size=(3, 3, 4, 4)), rng.normal(size=4)] for i in (1, 2)})
    for names, data, pattern in (
        (['a/w.npy', 'README'], content, r'the weights do not fit the config: .*\(4, 4, 3, 3\)'),
        (['a/w.npy'], content[:-9], "w.zip/w.npy' cannot be read: expected a dictionary"),
        (['a/w.npy', 'b/w.npy'], content, 'expected a file written by torch.save, found a zip archive of a/w.npy'),
        (['README'], content, 'expected a file written by torch.save, found a zip archive of README'),
        (['w.npy'], bytes(10**8), 'w.npy declares 100,000,000 bytes'),
    ):
        with zipfile.ZipFile(tmp_path / 'w.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.writestr(name, data)
        with pytest.raises(UserError, match=pattern) as caught:
            convert.convert(tmp_path / 'w.zip', tmp_path / 'out', mean='unused.npy')
        assert '\n' not in str(caught.value) and os.listdir(tmp_path) == ['w.zip']
    assert 'reading a/w.npy, the only weights in this archive' in capsys.readouterr().out


class _Mkdir:
    """Creates a directory when unpickled without restrictions."""

    def __reduce__(self):
        return functools.partial(os.mkdir, 'sprung'), ()


@pytest.mark.parametrize(
    ('value', 'pattern'),
    [
        (np.zeros((2, 3), np.float32), r'a float32 array of shape \(2, 3\)'),
        (np.array([{}, {}]), r'a object array of shape \(2,\)'),
        (np.array('x', object), 'a str is not a dictionary of layers'),
        (_Mkdir(), 'ValueError: a functools'),
        ({'conv1': _Mkdir()}, r'conv1: expected \[weights, biases\], found functools.partial'),
        ({'conv1': [np.zeros((1, 1))]}, r'conv1: expected \[weights, biases\], found list'),
        ({'conv1': [np.zeros(2), np.zeros(2)]}, r'conv1: expected weights of 4 or 2 axes, found \(2,\)'),
        ({'conv1': [np.array([['a']]), np.zeros(2)]}, 'arrays of other types than numbers'),
        ({3: [np.zeros((1, 1)), np.zeros(1)]}, 'names of other types than str'),
    ],
)
def test_other_npy_files_are_refused(value, pattern, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'w.npy').write_bytes(_saved(value))
    with pytest.raises(UserError, match=pattern) as caught:
        npy.read('w.npy')
    assert '\n' not in str(caught.value) and os.listdir() == ['w.npy']
