"""Reads PyTorch's files without PyTorch, and without executing code from them."""

import functools
import io
import math
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import logging

from alexnet_jax.convert import unpickle
from alexnet_jax.convert.unpickle import Placeholder
from alexnet_jax.convert.weight_file import LayerWeights, WeightFile, in_numeric_order, pair_tensors, reading
from alexnet_jax.utils.errors import UserError, printable
from alexnet_jax.utils.files import check_declared_size

_MAX_AXES = 64  # NumPy's own limit
_EXPECTED = 'a state_dict written by torch.save'
_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file before PyTorch 1.6
_DTYPES = {
    'Float': np.float32, 'Double': np.float64, 'Half': np.float16, 'BFloat16': jnp.bfloat16, 'Bool': np.bool_,
    'Byte': np.uint8, 'Char': np.int8, 'Short': np.int16, 'Int': np.int32, 'Long': np.int64,
    'ComplexFloat': np.complex64, 'ComplexDouble': np.complex128,
}  # fmt: skip
# Keys of the network's state_dict in a training checkpoint, the preferred first: torchvision's script also stores a
# moving average under 'model_ema'.
_KEYS = ('state_dict', 'model_state_dict', 'model_state', 'model', 'net', 'network', 'weights', 'params')


class _OrderedDict(Placeholder):
    path = 'dict'

    def __init__(self, items=()):  # Python 2 pickled the items as an argument
        dict.__init__(self, items)


class _Tensor(Placeholder):
    """A tensor whose `args` start with storage, offset, size, stride. Its values are not read yet."""

    path = 'Tensor'


class _Parameter(Placeholder):
    """Becomes the tensor of the parameter."""

    def __new__(cls, tensor, *_):
        return tensor


class _Subclass(Placeholder):
    """Becomes the tensor of a subclass of Tensor, or of a tensor with attributes."""

    def __new__(cls, function, type_, args, *_):
        return function(*args)


_CLASSES: dict[str, type] = {
    'collections.OrderedDict': _OrderedDict,
    'torch._utils._rebuild_tensor': _Tensor,
    'torch._utils._rebuild_tensor_v2': _Tensor,
    'torch._utils._rebuild_parameter': _Parameter,
    'torch._utils._rebuild_parameter_with_state': _Parameter,
    'torch._tensor._rebuild_from_type_v2': _Subclass,
}


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype | None  # None: not supported
    size: int  # number of values


def _storage(pid: Any) -> Any:
    """Returns the storage of a persistent id: ('storage', class, key, device, number of values[, view]).

    Before PyTorch 1.6 there are also ids of classes with their source: ('module', class, file, text).
    """
    if pid[0] == 'module':
        return pid[1]
    name, class_, key, _, count, *view = pid
    if name != 'storage' or not isinstance(key, str) or not isinstance(count, int) or view not in ([], [None]):
        raise ValueError('an unknown storage')
    dtype = _DTYPES.get(class_.path.rpartition('.')[2].removesuffix('Storage'))
    return _Storage(key, None if dtype is None else np.dtype(dtype), count)


def read(path: str) -> WeightFile:
    """Reads a state_dict, a training checkpoint that contains one, or a pickled module.

    Objects other than tensors become placeholders and are ignored, which is logged. A layer that occurs under two names
    is read once. Raises UserError if the file is damaged or contains no state_dict, or several of equal standing.
    """
    with reading(path, _EXPECTED):
        arrays, ignored = _arrays(path)
        layers: list[LayerWeights] = []
        seen: dict[tuple, str] = {}
        for layer in pair_tensors(arrays):
            views = tuple((array.ctypes.data, array.shape, array.strides) for array in (layer.weight, layer.bias))
            if views in seen:
                ignored.append(f'{layer.name} (the same tensors as {seen[views]})')
            else:
                layers.append(layer)
                seen[views] = layer.name
        log_ignored(path, ignored)
        return WeightFile(path, in_numeric_order(layers))


def read_tensors(path: str) -> dict[str, np.ndarray]:
    """Reads the tensors of a file as `read` does, whatever layers they belong to. Returns them by name."""
    with reading(path, _EXPECTED):
        arrays, ignored = _arrays(path)
        log_ignored(path, ignored)
        return arrays


def log_ignored(path: str, ignored: list[str]) -> None:
    """Logs the number of the ignored entries of a file, and the first of them."""
    if ignored:
        more = ' ...' if len(ignored) > 8 else ''
        logging.info(f'{path}: ignored {len(ignored)} entries: {", ".join(ignored[:8])}{more}.')


def _arrays(path: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the tensors of a file as views of the mapped file, and descriptions of the entries that are not used."""
    data = np.memmap(path, np.uint8, 'r')
    loaded, storages = (_load_zip if bytes(data[:4]) == b'PK\3\4' else _load_legacy)(path, data)
    tensors, ignored = _choose(loaded)
    return {name: _array(path, printable(name), tensor, storages) for name, tensor in tensors.items()}, ignored


def _load_zip(path: str, data: np.ndarray) -> tuple[Any, Callable[[str], np.ndarray]]:
    """Returns the object of a zip archive (since PyTorch 1.6), and a function from a storage's key to its bytes."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    roots = [name.removesuffix('data.pkl') for name in entries if re.fullmatch('([^/]+/)?data.pkl', name)]
    if len(roots) != 1:
        names = ', '.join(printable(name) for name in list(entries)[:4])
        raise UserError(f'expected a file written by torch.save, found a zip archive of {names}; unpack it.')

    @functools.cache  # many tensors may share one storage
    def content(name: str) -> np.ndarray:
        entry = entries[roots[0] + name]
        header = bytes(data[entry.header_offset :][:30])  # followed by a name and extra fields
        start = entry.header_offset + 30 + sum(int.from_bytes(header[i : i + 2], 'little') for i in (26, 28))
        raw = data[start : start + entry.compress_size]
        # PyTorch stores CRC 0 after torch.serialization.set_crc32_options(False).
        if len(raw) != entry.file_size or entry.CRC not in (0, zlib.crc32(raw.data)):
            raise ValueError(f'{printable(name)} does not match its checksum')
        return raw

    if f'{roots[0]}constants.pkl' in entries:
        raise UserError('expected a state_dict, found TorchScript; use torch.save(torch.jit.load(FILE).state_dict(), '
                        'OTHER).')  # fmt: skip
    if any(entry.compress_type for entry in entries.values()):
        raise UserError('its entries are compressed, and those of torch.save are not; pack them again with zip -0 -r.')
    # Nothing is compressed, so a larger declared size is an attack or damage.
    check_declared_size(path, sum(entry.file_size for entry in entries.values()))
    _check_byte_order(f'{roots[0]}byteorder' not in entries or bytes(content('byteorder')) == b'little')
    loaded = unpickle.load(io.BytesIO(bytes(content('data.pkl'))), _CLASSES, _storage)
    return loaded, lambda key: content(f'data/{key}')


def _load_legacy(path: str, data: np.ndarray) -> tuple[Any, Callable[[str], np.ndarray]]:
    """Does the same for a file before PyTorch 1.6: five pickles, then the number of values and the bytes by storage."""
    storages: dict[str, _Storage] = {}

    def storage(pid: Any) -> Any:
        found = _storage(pid)
        return storages.setdefault(found.key, found) if isinstance(found, _Storage) else found

    with pathlib.Path(path).open('rb') as file:
        if unpickle.load(file) != _MAGIC:
            raise ValueError('no magic number')
        unpickle.load(file)  # version
        _check_byte_order(unpickle.load(file)['little_endian'] is True)
        loaded = unpickle.load(file, _CLASSES, storage)
        keys, position = unpickle.load(file), file.tell()
    contents = {}
    for key in keys:
        dtype = storages[key].dtype
        if dtype is None:
            raise UserError('a tensor has an unsupported type; use torch.save with tensors converted by float().')
        size = int.from_bytes(bytes(data[position : position + 8]), 'little', signed=True) * dtype.itemsize
        contents[key] = data[position + 8 : position + 8 + size]
        if size < 0 or len(contents[key]) != size:
            raise ValueError('values are missing')
        position += 8 + size
    return loaded, contents.__getitem__


def _check_byte_order(little_endian: bool) -> None:
    if not little_endian:
        raise UserError(
            'expected little-endian numbers; load the file on the machine that wrote it, and use safetensors.'
        )


def _array(path: str, name: str, tensor: _Tensor, storages: Callable[[str], np.ndarray]) -> np.ndarray:
    """Returns a tensor as a view of its storage. Nothing is copied from a file that is not compressed."""
    storage, offset, size, stride = tensor.args[:4]
    if storage.dtype is None:
        raise UserError(f'{name}: expected a tensor of floating-point numbers of 16, 32 or 64 bits; use float().')
    if len(size) != len(stride) or len(size) > _MAX_AXES:
        raise ValueError('axes are invalid')
    if not all(isinstance(n, int) and 0 <= n < 2**63 for n in (offset, *size, *stride)):
        raise ValueError('sizes are invalid')
    itemsize = storage.dtype.itemsize
    check_declared_size(path, math.prod(size) * itemsize)  # with stride 0, one stored number can have any size
    values = storages(storage.key)[: storage.size * itemsize].view(storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if len(values) != storage.size or (math.prod(size) and last >= storage.size):
        raise ValueError('values are missing')
    steps = [step * itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(values[offset:], size, steps)


def _choose(loaded: Any) -> tuple[dict[str, _Tensor], list[str]]:
    """Returns the tensors of the network in an unpickled file, and descriptions of the entries that are not used."""
    found = list(_state_dicts(loaded, (), set()))
    if not found and isinstance(loaded, dict) and any(isinstance(value, _Tensor) for value in loaded.values()):
        found = [((), loaded)]  # the check of the names reports what is wrong
    if not found:
        text = unpickle.kind(loaded)
        if isinstance(loaded, dict) and loaded:
            text = f'a dict with {", ".join(_entries(loaded, list(loaded)[:8]))}'
        raise UserError(
            f'expected a state_dict (names and tensors), found {text}; use torch.save(model.state_dict(), FILE).'
        )
    rank = {keys: _KEYS.index(keys[-1]) if keys and keys[-1] in _KEYS else len(_KEYS) for keys, _ in found}
    best = [(keys, state) for keys, state in found if rank[keys] == min(rank.values())]
    if len(best) > 1:
        names = ', '.join(printable('.'.join(keys)) for keys, _ in best)
        raise UserError(
            f'expected one network, found {len(best)}: {names}; save one of them with '
            "torch.save(torch.load(FILE)['KEY'], OTHER)."
        )
    keys, state = best[0]
    ignored = _entries(state, [key for key, value in state.items() if not isinstance(value, _Tensor)])
    unsupported = [entry for entry in ignored if '._rebuild_' in entry]
    if unsupported:
        raise UserError(f'unsupported kinds of tensors: {", ".join(unsupported[:6])}; use dense tensors of float32.')
    if keys:
        ignored += _entries(loaded, [key for key in loaded if key != keys[0]])
        logging.info(f"The network is the file's entry {printable('.'.join(keys))!r}.")
    tensors = {key: value for key, value in state.items() if isinstance(value, _Tensor)}
    if not all(isinstance(key, str) for key in tensors):
        raise UserError('expected a state_dict whose keys are names.')
    return tensors, ignored


def _entries(values: dict, keys: list) -> list[str]:
    """Returns descriptions of entries: 'epoch (int)'."""
    named = [(printable(key) if isinstance(key, str) else f'a key of type {unpickle.kind(key)}', key) for key in keys]
    return [f'{name} ({unpickle.kind(values[key])})' for name, key in named]


def _state_dicts(value: Any, keys: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Yields (keys, state_dict) of every dict or module that contains a tensor named 'weight', at any depth."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Placeholder) and isinstance(value.state, dict) and '_modules' in value.state:
        value = dict(_module_tensors(value, '', seen))
    if not isinstance(value, dict):
        return
    names = [key for key in value if isinstance(key, str)]
    if any(name.rpartition('.')[2] == 'weight' and isinstance(value[name], _Tensor) for name in names):
        yield keys, value
        return
    for name in names:
        yield from _state_dicts(value[name], (*keys, name), seen)


def _module_tensors(module: Placeholder, prefix: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yields the parameters and buffers of a pickled torch.nn.Module, under their names in its state_dict."""
    for part in ('_parameters', '_buffers'):
        for name, value in module.state[part].items():
            if value is not None:
                yield f'{prefix}{name}', value
    for name, child in module.state['_modules'].items():
        if isinstance(child, Placeholder) and isinstance(child.state, dict) and id(child) not in seen:
            seen.add(id(child))
            yield from _module_tensors(child, f'{prefix}{name}.', seen)
