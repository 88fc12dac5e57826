"""PyTorch's files are read without PyTorch. The oracle is torch.load."""

import argparse
import collections
import functools
import io
import os
import pathlib
import pickle
import re
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.convert import pytorch, unpickle
from alexnet_jax.utils.errors import UserError
from tests import helpers

torch = pytest.importorskip('torch', reason="needs PyTorch: pip install 'alexnet_jax[oracle]'")
nn = torch.nn
KEYS = 'state_dict model_state_dict model_state model net network weights params'.split()


class _AttributeDict(dict):
    """A dict of Lightning's kind, from a class that the reader does not know."""


class _Net(nn.Module):
    """Has some of its layers under two names."""

    def __init__(self, twice=False):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Conv2d(4, 6, 3))
        self.fc = nn.Linear(7, 8)
        if twice:
            self.last = self.fc


class _Mkdir:
    """Creates a directory when unpickled without restrictions."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _state():
    return _Net().state_dict()


def _optimizer():
    net = _Net()
    sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    sum(parameter.sum() for parameter in net.parameters()).backward()
    sgd.step()
    return sgd.state_dict()


def _torchvision_script():
    """The checkpoint of torchvision's references/classification/train.py."""
    average = {f'module.{name}': tensor + 1 for name, tensor in _state().items()}
    return {
        'model': _state(), 'optimizer': _optimizer(), 'lr_scheduler': {'last_epoch': 3, '_last_lr': [0.1]}, 'epoch': 3,
        'args': argparse.Namespace(lr=0.1, device=torch.device('cpu'), output=pathlib.PurePosixPath('a')),
        'model_ema': {'n_averaged': torch.tensor(3), **average}, 'scaler': {'scale': 65536.0},
    }  # fmt: skip


def _lightning():
    state = {f'net.{name}': tensor for name, tensor in _state().items()}
    return {
        'epoch': 1, 'pytorch-lightning_version': '2.5.0', 'state_dict': state, 'optimizer_states': [_optimizer()],
        'callbacks': {'ModelCheckpoint': {'best_score': torch.tensor(1.0), 'dirpath': pathlib.PurePosixPath('a')}},
        'loops': {'fit_loop': {'state_dict': {}}}, 'hyper_parameters': _AttributeDict(lr=0.1, opt=argparse.Namespace()),
    }  # fmt: skip


def _one_storage():
    """All tensors are views of one storage, as after flattening for a distributed optimizer."""
    state = _state()
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    parts = flat.split([tensor.numel() for tensor in state.values()])
    return {name: part.view(state[name].shape) for name, part in zip(state, parts, strict=True)}


def _strided(tensor):
    """Returns equal values in the reverse order of axes in memory, with gaps."""
    copy = torch.zeros(*(2 * size for size in reversed(tensor.shape)))[tuple([slice(None, None, 2)] * tensor.ndim)]
    return copy.permute(*reversed(range(tensor.ndim))).copy_(tensor)


def _tagged(tensor):
    tensor.tag = 'kept by torch.save'
    return tensor


def _each(change):
    return lambda: {name: change(tensor) for name, tensor in _state().items()}


READ = {
    'plain': _state,
    **{f'under {key}': lambda key=key: {'epoch': 1, key: _state()} for key in KEYS},
    'model.state_dict': lambda: {'model': {'state_dict': _state(), 'step': 5}},
    "torchvision's script": _torchvision_script,
    'Lightning': _lightning,
    "PyTorch's ImageNet example": lambda: {
        'arch': 'alexnet', 'state_dict': {f'module.{k}': v for k, v in _state().items()},
        'best_acc1': torch.tensor(56.5), 'optimizer': _optimizer(),
    },
    'parameters': _each(nn.Parameter),
    'module': _Net,
    'module in DataParallel, in a checkpoint': lambda: {'epoch': 3, 'model': nn.DataParallel(_Net())},
    'half': _each(torch.Tensor.half),
    'bfloat16': _each(torch.Tensor.bfloat16),
    'float64': _each(torch.Tensor.double),
    'strided': _each(_strided),
    'channels last': lambda: _Net().to(memory_format=torch.channels_last).state_dict(),
    'one storage': _one_storage,
    'one layer under two names': lambda: _Net(twice=True).state_dict(),
    'attributes': _each(_tagged),
    'other objects among the tensors': lambda: {
        **_state(), 'version': 2, 'classes': ['cat'], 'x': _Mkdir('sprung'), 'relu': nn.functional.relu,
        'best': np.float64(56.5), 'loss': functools.partial(nn.functional.cross_entropy, label_smoothing=0.1),
    },
    'reverse order': lambda: dict(reversed(_state().items())),
    'defaultdict': lambda: collections.defaultdict(list, {'state_dict': _state(), 'log': []}),
}  # fmt: skip


def _save(value, path, **options):
    torch.save(value, path, **options)
    return str(path)


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('case', READ)
def test_same_values_as_torch_load(case, zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = pytorch.read(_save(READ[case](), 'w.pth', _use_new_zipfile_serialization=zipped)).layers
    dtype = {'half': torch.half, 'bfloat16': torch.bfloat16, 'float64': torch.double}.get(case, torch.float)
    expected = {name: tensor.to(dtype).double().numpy() for name, tensor in _state().items()}
    assert [layer.name.rpartition('features.')[2].removeprefix('module.').removeprefix('net.') for layer in found] == (
        ['fc', '0', '2'] if case == 'reverse order' else ['0', '2', 'fc']
    )
    for layer in found:
        name = 'fc' if layer.name.endswith('fc') else f'features.{layer.name[-1]}'
        for kind in ('weight', 'bias'):
            array = getattr(layer, kind)
            assert str(array.dtype) == str(dtype).removeprefix('torch.')
            np.testing.assert_array_equal(array.astype(np.float64), expected[f'{name}.{kind}'])
    assert os.listdir() == ['w.pth']


def test_torch_reads_the_files_of_other_tests(tmp_path):
    """Those of `helpers.write_pth`, which needs no PyTorch."""
    arrays = {name: tensor.numpy() for name, tensor in _state().items()}
    arrays |= {'half': arrays['fc.weight'].astype(np.float16), 'double': arrays['fc.weight'].T.astype(np.float64)}
    arrays['bfloat16'] = arrays['fc.weight'].astype(jnp.bfloat16)
    found = torch.load(helpers.write_pth(tmp_path / 'w.pth', arrays))
    assert list(found) == list(arrays)
    for name, tensor in found.items():
        assert str(tensor.dtype) == f'torch.{arrays[name].dtype.name}'
        np.testing.assert_array_equal(tensor.double().numpy(), arrays[name].astype(np.float64))


@pytest.mark.parametrize(
    ('case', 'words'),
    [
        ("torchvision's script", ["'model'", 'args (argparse.Namespace)', 'epoch (int)', 'model_ema (dict)']),
        ('Lightning', ["'state_dict'", 'hyper_parameters (tests.convert.test_pytorch._AttributeDict)']),
        ('one layer under two names', ['last (the same tensors as fc)']),
        (
            'other objects among the tensors',
            ['ignored 6 entries: version (int), classes (list), x (posix.mkdir), relu (torch.nn.functional.relu), '],
        ),
        ('reverse order', ['not of the file: fc, features.0, features.2']),
    ],
)
def test_ignored_entries_are_logged(case, words, tmp_path, caplog):
    caplog.set_level('INFO', 'absl')
    pytorch.read(_save(READ[case](), tmp_path / 'w.pth'))
    for word in words:
        assert word in caplog.text


def test_ordered_dict_of_python_2(tmp_path):
    """Python 2 pickled the items of an OrderedDict as its argument. Strings were bytes."""
    pickled = b"ccollections\nOrderedDict\n((l(lS'state_dict'\na(dS'epoch'\nI3\nsaatR."
    loaded = unpickle.load(io.BytesIO(pickled), pytorch._CLASSES)
    assert dict.__eq__(loaded, {'state_dict': {'epoch': 3}})


def test_missing_checksums_are_accepted(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        _save(_state(), tmp_path / 'w.pth')
    finally:
        torch.serialization.set_crc32_options(True)
    assert len(pytorch.read(str(tmp_path / 'w.pth')).layers) == 3


def _rezipped(path, change):
    """Rewrites a zip archive with the contents that change(name, content) returns."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in parts.items():
            archive.writestr(name, change(name, content))


def _flipped(path):
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo('w/data/2').header_offset
    content[start + 200] ^= 1
    path.write_bytes(content)


def _big_endian(path):
    _rezipped(path, lambda name, content: b'big' if name.endswith('byteorder') else content)


def _big_endian_legacy(path):
    torch.save(_state(), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    name = re.search(rb'little_endian(q.)?', content)[0]
    assert name + b'\x88' in content  # True
    path.write_bytes(content.replace(name + b'\x88', name + b'\x89'))


def _short(path):
    _rezipped(path, lambda name, content: content[:-4] if name.endswith('data/2') else content)


def _past_the_storage(path):
    """Changes the size of fc.bias from (8,) to (9,)."""
    _rezipped(path, lambda name, content: content.replace(b'K\x08\x85', b'K\x09\x85'))


def _script(path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 3)), path)


def _saver(value):
    return lambda path: torch.save(value(), path)


def _bytes(content):
    return lambda path: path.write_bytes(content)


def _archive(path):
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('alexnet.pth', b'')


REFUSED = {
    'bit flip': (_flipped, 'data/2 does not match its checksum'),
    'short storage': (_short, 'values are missing'),
    'tensor larger than its storage': (_past_the_storage, 'values are missing'),
    'big-endian': (_big_endian, 'expected little-endian numbers'),
    'big-endian legacy': (_big_endian_legacy, 'expected little-endian numbers'),
    'TorchScript': (_script, r'found TorchScript; use torch.save\(torch.jit.load\(FILE\).state_dict\(\), OTHER\)'),
    'other zip archive': (_archive, 'found a zip archive of alexnet.pth; unpack it'),
    'two networks': (_saver(lambda: {'g': _state(), 'd': _state()}), 'expected one network, found 2: g, d; save one'),
    'two nested networks': (
        _saver(lambda: {'g': {'state_dict': _state()}, 'd': {'state_dict': _state()}, 'model': _state()}),
        'found 2: g.state_dict, d.state_dict',
    ),
    'no network': (_saver(_optimizer), r'found a dict with state \(dict\), param_groups \(list\); use torch.save'),
    'sparse': (
        _saver(lambda: {**_state(), 'fc.weight': torch.eye(3).to_sparse()}),
        r'unsupported kinds of tensors: fc.weight \(torch._utils._rebuild_sparse_tensor\); use dense tensors',
    ),
    'float8': (_saver(_each(lambda t: t.to(torch.float8_e5m2))), 'unsupported kinds|found a dict with features'),
    'trap': (_saver(lambda: _Mkdir('sprung')), r'found posix.mkdir; use torch.save'),
    # Pickles by hand: they would exhaust the memory, change this package or call a function.
    'memo index': (_bytes(b'\x80\x02K\x01r\xff\xff\xff\x7f.'), 'cannot be read.*no magic number'),
    'state of a class': (_bytes(b"ctorch._utils\n_rebuild_tensor_v2\n(S'path'\nS'x'\ndb."), 'cannot be read'),
    'items of a class': (_bytes(b"cbuiltins\nint\nS'path'\nS'x'\ns."), 'cannot be read'),
    'call': (_bytes(pickle.dumps(_Mkdir('sprung'), 0)), 'cannot be read'),
    'call of a member': (_bytes(b"cposix\nmkdir\nS'sprung'\n\x85R."), 'cannot be read'),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_refused_in_one_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write, pattern = REFUSED[case]
    path = tmp_path / 'w.pth'
    _save(_state(), path)
    write(path)
    with pytest.raises(UserError, match=pattern) as caught:
        pytorch.read(str(path))
    assert '\n' not in str(caught.value) and os.listdir() == ['w.pth']
    assert len(pytorch.read(_save(_state(), path)).layers) == 3  # the reader is unchanged
