"""Damaged and malicious files end in success or in a one-line error message.

They never raise another exception, hang, warn, or allocate memory that their declared sizes ask for.
"""

import contextlib
import functools
import io
import json
import math
import os
import struct
import time
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save as save_safetensors

from alexnet_jax.checkpoints import manager
from alexnet_jax.convert import caffe, convert, fit, loading, safetensors, weight_file
from alexnet_jax.core import image_stats
from alexnet_jax.data import image_io, image_stats_file
from alexnet_jax.prepare import discovery
from alexnet_jax.utils import checksums
from alexnet_jax.utils.config_files import get_config
from alexnet_jax.utils.errors import UserError
from tests import helpers

_NAMES = ('conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7', 'fc8')
_VAL = 'ILSVRC2012_img_val.tar'
_END = bytes(1024)  # end of an archive
_MOST_MEMORY, _MOST_SECONDS = 2**30, 20  # bytes, seconds; more means that sizes declared by the file were trusted


def _examples(fast, slow):
    return pytest.mark.parametrize('examples', [fast, pytest.param(slow, marks=pytest.mark.slow)])


def _fuzz(examples, cases, check):
    """Calls `check` with `examples` cases, the same ones every time."""

    @settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(cases)
    def check_case(case):
        began = time.monotonic()
        with warnings.catch_warnings(action='error'):
            check(case)
        assert time.monotonic() - began < _MOST_SECONDS

    before = _peak()
    check_case()
    assert _peak() - before < _MOST_MEMORY


def _peak():
    """Returns the peak memory of this process since the last call in bytes; 0 except on Linux."""
    try:
        with open('/proc/self/status') as status, open('/proc/self/clear_refs', 'w') as forget:
            peak = next(int(line.split()[1]) for line in status if line.startswith('VmHWM'))
            forget.write('5')
    except OSError:
        return 0
    return peak * 1024


def _one_line(error):
    message = str(error)
    assert message and message.isprintable(), message
    message.encode()


_LENGTHS = [0, 1, 127, 128, 255, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]


@st.composite
def _damaged(draw, wholes):
    """Draws a file with flipped bits, inserted or removed bytes, overwritten lengths, or a truncated end."""
    content = bytearray(draw(st.sampled_from(wholes)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)) | st.integers(0, min(len(content), 64)))
        match draw(st.sampled_from(['bit', 'length', 'put', 'take', 'cut', 'repeat'])):
            case 'bit' if at < len(content):
                content[at] ^= 1 << draw(st.integers(0, 7))
            case 'length':
                number = draw(st.sampled_from(_LENGTHS))
                size, order = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.sampled_from(['little', 'big']))
                content[at : at + size] = (number % 256**size).to_bytes(size, order)
            case 'put':
                content[at:at] = draw(st.binary(min_size=1, max_size=40))
            case 'take':
                del content[at : at + draw(st.integers(1, 40))]
            case 'cut':
                del content[at:]
            case 'repeat':
                content[at:at] = content[at : at + draw(st.integers(1, 600))] * draw(st.sampled_from([1, 2, 50]))
    return bytes(content)


# Images.


def _picture(height=24, width=32):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@functools.cache
def _pictures():
    image, exif = _picture(), Image.Exif()
    exif[0x0112] = 6
    sixteen = Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 257)
    palette = image.quantize(16)
    return [
        helpers.encode(image, 'JPEG', exif=exif),
        helpers.encode(image, 'JPEG', progressive=True),
        helpers.encode(image.convert('CMYK'), 'JPEG'),
        helpers.encode(image, 'MPO', save_all=True, append_images=[image]),
        helpers.encode(image, 'PNG', exif=exif),
        helpers.encode(sixteen, 'PNG'),
        helpers.encode(palette, 'PNG', transparency=bytes(range(0, 256, 16))),
        helpers.encode(image, 'BMP'),
        helpers.encode(palette, 'GIF', save_all=True, append_images=[image.quantize(8)]),
        helpers.encode(image, 'TIFF', exif=exif),
        *(
            helpers.encode(image, 'TIFF', compression=kind)
            for kind in ('tiff_lzw', 'tiff_adobe_deflate', 'jpeg', 'packbits')
        ),
        helpers.encode(sixteen, 'TIFF'),
        helpers.encode(image, 'WEBP', exif=exif),
        helpers.encode(image.convert('RGBA'), 'WEBP', lossless=True),
        helpers.encode(image, 'PPM'),
        b'P3 2 2 255 1 2 3 4 5 6 7 8 9 90 91 92',
    ]


def _square(content):
    try:
        found = image_io.resize_center_crop(content, 16)
    except ValueError as error:
        _one_line(error)
    else:
        assert found.shape == (16, 16, 3)


@_examples(400, 4000)
def test_images(examples):
    wholes = list(_pictures())
    for whole in wholes:
        assert image_io.resize_center_crop(whole, 16).std() > 5
    wholes.append(helpers.encode(Image.fromarray(np.float32(np.arange(400).reshape(20, 20))), 'TIFF'))  # refused
    heads = st.sampled_from([whole[:n] for whole in wholes for n in (4, 12, 40)])
    noise = st.builds(bytes.__add__, heads | st.just(b''), st.binary(max_size=300))
    _fuzz(examples, _damaged(wholes) | _damaged(wholes) | noise, _square)


# Archives.


def _header(name, size, kind=b'0', link=b''):
    """Returns an archive header with a valid checksum, whatever else is invalid, with the fields of POSIX ustar."""
    if isinstance(size, bytes):
        number = size.ljust(12)[:12]
    elif 0 <= size < 8**11:
        number = b'%011o\0' % size
    else:  # GNU format
        number = (b'\xff' if size < 0 else b'\x80') + (size % 256**11).to_bytes(11, 'big')
    fields = [name.encode('utf-8', 'surrogateescape')[:100].ljust(100, b'\0'), b'0000644\0' + b'0000000\0' * 2, number]
    fields += [b'00000000000\0', b' ' * 8, kind, link.ljust(100, b'\0'), b'ustar  \0'.ljust(255, b'\0')]
    block = b''.join(fields)
    return block[:148] + b'%06o\0 ' % sum(block) + block[156:]


def _entry(name, content, kind=b'0'):
    return _header(name, len(content), kind) + content + bytes(-len(content) % 512)


def _pax(key, value):
    record = f' {key}={value}\n'.encode()
    return b'%d' % (len(record) + 2) + record if len(record) < 98 else record


def _val(i):
    return f'ILSVRC2012_val_{i:08}.JPEG'


@st.composite
def _archives(draw):
    """Entries of all kinds with sizes of all kinds and valid checksums."""
    image = _pictures()[0]
    parts = []
    text = st.text(st.characters(codec='utf-8'), max_size=20)
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from([_val(1), f'../{_val(2)}', f'/{_val(3)}', 'ILSVRC2012_val_²²²', 'n01.tar']) | text)
        size = draw(st.sampled_from([len(image)] * 3 + [0, -512, -1024, 2**62, -(2**62)]) | st.binary(max_size=12))
        keys = ('size', 'path', 'GNU.sparse.size', 'GNU.sparse.map', 'GNU.sparse.offset', 'hdrcharset', '')
        pax = _pax(draw(st.sampled_from(keys)), draw(st.sampled_from(['-512', '1', '1,2,3', 'BINARY', '\0']) | text))
        kind, content = draw(st.sampled_from([(kind, image) for kind in (b'0', b'0', b'L', b'S', b'5')] + [
            (b'x', pax), (b'g', pax), (b'K', b'name'), (b'L', b'9' * 5000), (b'2', b''), (b'1', b''), (b'A', image),
        ]))  # fmt: skip
        honest = draw(st.booleans()) or kind in (b'x', b'g')
        parts += [_header(name, len(content) if honest else size, kind), content, bytes(-len(content) % 512)]
    return b''.join(parts) + draw(st.sampled_from([_END, b'', bytes(512), bytes(10240), b'x' * 512]))


@_examples(250, 3000)
def test_archives(examples, tmp_path):
    image = _pictures()[0]
    val = b''.join(_entry(_val(i), image) for i in (1, 2)) + _END
    images_of_class = b''.join(_entry(f'n01440764_{i}.JPEG', image) for i in (1, 2)) + _END
    train = _entry('n01440764.tar', images_of_class) + _END
    (tmp_path / 'root').mkdir()

    def check(case):
        name, content = case
        path = tmp_path / 'root' / name
        path.write_bytes(content)
        try:
            refs = [ref for refs in discovery.find_images(str(path)).splits.values() for ref in refs]
            assert len(refs) < 1000
        except UserError as error:
            return _one_line(error)
        for ref in refs:
            try:
                assert len(discovery.read_image(ref)[0]) <= len(content)
            except ValueError as error:
                _one_line(error)

    files = [_VAL, 'ILSVRC2012_img_train.tar', 'n01440764.tar']
    contents = _archives() | _damaged([val, train]) | st.binary(max_size=1024)
    _fuzz(examples, st.tuples(st.sampled_from(files), contents), check)
    assert os.listdir(tmp_path) == ['root'] and {*os.listdir(tmp_path / 'root')} <= set(files)


# Weights.


def _tensors():
    """Returns the smallest weights accepted by configs/caffe.py and configs/torchvision.py."""
    shapes = [(2, 3, 11, 11), (2, 2, 5, 5), *[(2, 2, 3, 3)] * 3, (4, 72), (4, 4), (3, 4)]
    return {
        f'{name}.{kind}': np.ones(shape if kind == 'weight' else shape[:1], np.float32)
        for name, shape in zip(_NAMES, shapes, strict=True)
        for kind in ('weight', 'bias')
    }


def _caffemodel():
    net, tensors = caffe._caffe_message('NetParameter')(), _tensors()
    for name in _NAMES:
        layer = net.layer.add(name=name, type='Convolution')
        for kind in ('weight', 'bias'):
            array = tensors[f'{name}.{kind}']
            layer.blobs.add(data=array.ravel().tolist()).shape.dim.extend(array.shape)
    return net


@st.composite
def _caffemodels(draw):
    """Well-formed files with invalid content."""
    net = _caffemodel()
    layer = net.layer[draw(st.integers(0, len(_NAMES) - 1))]
    for _ in range(draw(st.integers(1, 3))):
        blob = layer.blobs[draw(st.integers(0, len(layer.blobs) - 1))] if layer.blobs else layer.blobs.add()
        match draw(st.sampled_from(['dims', 'name', 'data', 'no blobs', 'more blobs', 'type', 'double'])):
            case 'dims':
                sides = st.sampled_from([-1, -3, 0, 1, 2, 3, 2**31, 2**62, -(2**63)])
                blob.shape.dim[:] = draw(st.lists(sides, min_size=1, max_size=5) | st.just([1] * 70))
                if 0 < math.prod(blob.shape.dim) < 100:
                    blob.data[:] = [1] * math.prod(blob.shape.dim)
            case 'name':
                layer.name = draw(st.text(st.characters(codec='utf-8')))
            case 'data':
                numbers = st.floats(width=32)
                blob.data[:] = draw(st.lists(numbers, max_size=4))
            case 'double':
                blob.double_data[:] = [draw(st.floats())] * len(blob.data)
                del blob.data[:]
            case 'no blobs':
                del layer.blobs[:]
            case 'more blobs':
                layer.blobs.add().CopyFrom(blob)
            case 'type':
                layer.type = draw(st.sampled_from(['ReLU', 'LRN', 'Pooling', '\n']))
    return net.SerializeToString()


def _safetensors(header, data):
    header = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack('<Q', len(header)) + header + data


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)

_DEEP = functools.reduce(lambda inner, _: [inner], range(900), [])  # the maximum depth of JSON


@st.composite
def _changed(draw, value):
    """Returns a JSON value in which one element, at any depth, is changed or removed."""
    if not isinstance(value, list | dict) or not value or draw(st.integers(0, 5)) == 0:
        return draw(_JSON | st.sampled_from([10**400, _DEEP]))
    value = value.copy()
    key = draw(st.integers(0, len(value) - 1) if isinstance(value, list) else st.sampled_from(sorted(value)))
    if draw(st.integers(0, 5)) == 0:
        del value[key]
    else:
        value[key] = draw(_changed(value[key]))
    return value


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with the files that a weight file may need next to it."""
    folder = tmp_path_factory.mktemp('weights')
    np.save(folder / 'mean.npy', np.full(3, 120.0))
    colors = image_stats.ImageStats(np.ones((230, 230, 3), np.float32), np.zeros(3), np.eye(3))
    image_stats_file.save(str(folder), colors)
    return folder


@pytest.fixture
def read(folder, monkeypatch, capsys):
    """Converts a file without writing the result."""
    monkeypatch.setattr(convert, 'atomic_directory', lambda output: contextlib.nullcontext())
    monkeypatch.setattr(manager, 'CheckpointManager', _Nowhere)

    def read(name, content):
        (folder / name).write_bytes(content)
        try:
            mean = str(folder / 'mean.npy') if name.endswith(('.caffemodel', '.npy')) else None
            convert.convert(str(folder / name), str(folder / 'out'), mean=mean)
            return True
        except UserError as error:
            _one_line(error)

    return read


class _Nowhere(contextlib.nullcontext):
    def __enter__(self):
        return self

    def save(self, *_):
        pass

    def wait(self):
        pass


@_examples(150, 1500)
def test_caffemodels(examples, read):
    whole = _caffemodel().SerializeToString()
    assert read('w.caffemodel', whole)
    cases = _caffemodels() | _damaged([whole]) | st.binary(max_size=200)
    _fuzz(examples, cases, functools.partial(read, 'w.caffemodel'))


@_examples(150, 1200)
def test_safetensors(examples, read):
    plain = save_safetensors(_tensors())
    length = struct.unpack('<Q', plain[:8])[0]
    header, data = json.loads(plain[8 : 8 + length]), plain[8 + length :]
    config = manager.config_to_json(get_config('torchvision'))
    config = fit.fit_config(
        {key: config[key] for key in ('model', 'data')},
        weight_file.WeightFile('', weight_file.pair_tensors(_tensors())),
    )
    own = {'config': config, 'class_names': ['a', 'b', 'c'], 'record_size': 230}

    def exported(own):
        own = own if isinstance(own, str) else json.dumps(own)
        return _safetensors(header | {'__metadata__': {safetensors.METADATA_KEY: own}}, data)

    assert read('w.safetensors', plain) and read('w.safetensors', exported(own))
    text = _damaged([plain[8 : 8 + length]]).map(lambda header: _safetensors(header, data))
    heads = _changed(header).map(lambda header: _safetensors(json.dumps(header).encode(), data))
    own = _changed(own).map(exported)
    for cases in (own, heads | text | _damaged([plain]) | st.binary(max_size=200)):
        _fuzz(examples, cases, functools.partial(read, 'w.safetensors'))


@_examples(200, 2000)
def test_state_dicts(examples, read):
    torch = pytest.importorskip('torch', reason="needs PyTorch: pip install 'alexnet_jax[oracle]'")
    state = {name: torch.tensor(array) for name, array in _tensors().items()}
    new, old = io.BytesIO(), io.BytesIO()
    torch.save({'epoch': 3, 'state_dict': state}, new)
    torch.save(state, old, _use_new_zipfile_serialization=False)
    new, old = new.getvalue(), old.getvalue()
    assert read('w.pth', new) and read('w.pth', old)
    with zipfile.ZipFile(io.BytesIO(new)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (name,) = [name for name in parts if name.endswith('data.pkl')]

    def zipped(pickled, kind=zipfile.ZIP_STORED):
        file = io.BytesIO()
        with zipfile.ZipFile(file, 'w', kind) as archive:
            for part, content in {**parts, name: pickled}.items():
                archive.writestr(part, content)
        return file.getvalue()

    assert read('w.pth', zipped(parts[name]))
    cases = _damaged([parts[name]]).map(zipped) | _damaged([new, old]) | st.binary(max_size=200)
    _fuzz(examples, cases, functools.partial(read, 'w.pth'))


@_examples(150, 1500)
def test_npy_dictionaries(examples, read):
    file, tensors = io.BytesIO(), _tensors()
    layers = {name: [tensors[f'{name}.weight'].T, tensors[f'{name}.bias']] for name in _NAMES}
    np.save(file, layers, allow_pickle=True)
    whole = file.getvalue()
    assert read('w.npy', whole)
    _fuzz(examples, _damaged([whole]) | st.binary(max_size=200), functools.partial(read, 'w.npy'))


@_examples(200, 1500)
def test_means_and_statistics(examples, folder, tmp_path):
    blob = caffe._caffe_message('BlobProto')(num=1, channels=3, height=2, width=2, data=[120] * 12)
    array = io.BytesIO()
    np.save(array, np.full((2, 2, 3), 120, np.uint8))
    small = image_stats.ImageStats(np.ones((2, 2, 3), np.float32), np.zeros(3, np.float32), np.eye(3, dtype=np.float32))
    image_stats_file.save(str(tmp_path), small)
    files = {
        'm.binaryproto': blob.SerializeToString(),
        'm.npy': array.getvalue(),
        image_stats_file.FILE_NAME: (tmp_path / image_stats_file.FILE_NAME).read_bytes(),
    }

    def check(case):
        name, content = case
        (tmp_path / name).write_bytes(content)
        try:
            if name == image_stats_file.FILE_NAME:
                return image_stats_file.load(str(tmp_path))
            return convert.read_mean(str(tmp_path / name), False)
        except UserError as error:
            _one_line(error)

    assert all(check(case) is not None for case in files.items())
    cases = st.sampled_from(sorted(files)).flatmap(lambda name: st.tuples(st.just(name), _damaged([files[name]])))
    _fuzz(examples, cases, check)


@pytest.mark.slow
def test_checkpoint_metadata(tmp_path):
    """The checksums match the changed metadata."""
    step = os.path.join(helpers.save_untrained(tmp_path / 'run'), 'checkpoints', '0')
    path = os.path.join(step, 'meta', 'metadata')
    with open(path) as file:
        whole = json.load(file)

    def check(meta):
        with open(path, 'w') as file:
            json.dump(meta, file)
        checksums.write(step)
        try:
            loading.load_checkpoint(step)
        except UserError as error:
            _one_line(error)

    _fuzz(150, _changed(whole), check)
