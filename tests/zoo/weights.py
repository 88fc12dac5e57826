"""Writers of small weight files, from the descriptions of their formats, without PyTorch and Caffe."""

import collections
import io
import json
import pickle
import struct
import sys
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

CONVS = ((2, 3, 11, 11), (2, 2, 5, 5), (2, 2, 3, 3), (2, 2, 3, 3), (2, 2, 3, 3))  # OIHW
DENSE = ((4, 72), (4, 4), (3, 4))  # [outputs, inputs]; 72: 2 maps of 6 x 6
TORCHVISION = tuple(f'features.{i}' for i in (0, 3, 6, 8, 10)) + tuple(f'classifier.{i}' for i in (1, 4, 6))


def layers(shapes=(*CONVS, *DENSE)) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns (weight, bias) of each layer in PyTorch's and Caffe's layout, float32."""
    rng = np.random.default_rng(0)
    draw = [(rng.normal(size=shape), rng.normal(size=shape[0])) for shape in shapes]
    return [
        (weight.astype(np.float16).astype(np.float32), bias.astype(np.float16).astype(np.float32))
        for weight, bias in draw
    ]


def state_dict(names=TORCHVISION, dtype: Any = np.float32, values=None) -> dict[str, Any]:
    """Returns {name: array} in the order of PyTorch."""
    state = {}
    for name, (weight, bias) in zip(names, layers() if values is None else values, strict=True):
        state[f'{name}.weight'], state[f'{name}.bias'] = weight.astype(dtype), bias.astype(dtype)
    return state


class Global(NamedTuple):
    """A class or function that the pickle names, whether or not it can be imported here."""

    module: str
    name: str

    def __call__(self):
        raise NotImplementedError


class Object(NamedTuple):
    """The result of a call, with a state."""

    function: Global
    args: tuple = ()
    state: Any = None


_STORAGES = {
    'float32': 'Float',
    'float64': 'Double',
    'float16': 'Half',
    'bfloat16': 'BFloat16',
    'int64': 'Long',
    'int8': 'Char',
    'uint8': 'Byte',
    'bool': 'Bool',
    'float8_e5m2': 'Untyped',
}


class _Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes arrays as PyTorch's tensors, and collects their storages."""

    def __init__(self, file):
        super().__init__(file, protocol=2)
        self.storages: dict[str, np.ndarray] = {}
        self._keys: dict[int, str] = {}

    def persistent_id(self, obj):
        if not isinstance(obj, collections.UserString):
            return None
        array = self.storages[obj.data]
        return 'storage', Global('torch', f'{_STORAGES[array.dtype.name]}Storage'), obj.data, 'cpu', array.size

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            self.write(pickle.GLOBAL + f'{obj.module}\n{obj.name}\n'.encode())
        elif isinstance(obj, Object):
            self.save_reduce(obj.function, obj.args, obj.state, obj=obj)
        elif isinstance(obj, np.ndarray):
            base = obj if obj.base is None else obj.base
            key = self._keys.setdefault(id(base), str(len(self._keys)))
            self.storages[key] = base
            offset = (obj.ctypes.data - base.ctypes.data) // base.itemsize
            stride = tuple(step // obj.itemsize for step in obj.strides)
            tensor = collections.UserString(key), offset, obj.shape, stride, False, collections.OrderedDict()
            self.save_reduce(Global('torch._utils', '_rebuild_tensor_v2'), tensor)
        else:
            super().save(obj, save_persistent_id)


def _pickled(value) -> tuple[bytes, dict[str, np.ndarray]]:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return file.getvalue(), pickler.storages


def torch_zip(value, extra=(), byteorder=b'little', root='archive/') -> bytes:
    """Returns what torch.save writes since PyTorch 1.6. extra: further (name, content)."""
    data, storages = _pickled(value)
    entries = [('data.pkl', data), ('byteorder', byteorder), ('version', b'3\n'), *extra]
    entries += [(f'data/{key}', array.tobytes('A')) for key, array in storages.items()]
    return zipped((f'{root}{name}', content) for name, content in entries)


def zipped(entries, compression=zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return file.getvalue()


def torch_legacy(value, little_endian=True) -> bytes:
    """Returns what torch.save wrote before PyTorch 1.6."""
    data, storages = _pickled(value)
    system = {'protocol_version': 1001, 'little_endian': little_endian, 'type_sizes': {}}
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system)]
    parts += [data, pickle.dumps(list(storages), 2)]
    return b''.join([*parts, *(struct.pack('<q', array.size) + array.tobytes('A') for array in storages.values())])


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def field(number: int, value: int | str | bytes) -> bytes:
    """Returns a field of a protocol buffer."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    value = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def blob(array, old=False) -> bytes:
    """Returns Caffe's BlobProto. old: with four sizes, as before 2014."""
    sizes = (1,) * (4 - array.ndim) + array.shape
    if old:
        shape = b''.join(field(i, side) for i, side in enumerate(sizes, 1))
    else:
        shape = field(7, field(1, b''.join(map(_varint, array.shape))))
    return field(5, np.asarray(array, '<f4').tobytes()) + shape


def caffemodel(values=None, old=False, blobs=2) -> bytes:
    """Returns Caffe's NetParameter. old: with V1LayerParameter."""
    layers_field, name_field, blobs_field = (2, 4, 6) if old else (100, 1, 7)
    parts = []
    for i, arrays in enumerate(layers() if values is None else values):
        content = field(name_field, f'layer{i}') + b''.join(field(blobs_field, blob(a, old)) for a in arrays[:blobs])
        parts.append(field(layers_field, content))
    return b''.join(parts)


def safetensors_file(code: str, dtype: Any) -> bytes:
    """Returns a safetensors file of this type, such as 'BF16'."""
    header, data = {}, b''
    for name, array in state_dict(dtype=dtype).items():
        end = len(data) + array.nbytes
        header[name] = {'dtype': code, 'shape': array.shape, 'data_offsets': [len(data), end]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + data


def npy(value) -> bytes:
    file = io.BytesIO()
    np.save(file, value, allow_pickle=True)
    return file.getvalue()


def tensorflow_layers() -> dict[str, list[np.ndarray]]:
    """Returns {layer: [weights, biases]} in TensorFlow's layout: HWIO, [inputs, outputs], maps flattened (H, W, C)."""
    names, found = ('conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7', 'fc8'), {}
    for name, (weight, bias) in zip(names, layers(), strict=True):
        found[name] = [kernel(weight, first_dense=name == 'fc6'), bias]
    return found


def kernel(weight, first_dense=False) -> np.ndarray:
    """Returns a weight in the layout of TensorFlow and of this package, by loops over the output channels."""
    if weight.ndim == 4:
        return np.stack([np.stack(list(channels), -1) for channels in weight], -1)
    if first_dense:
        weight = np.stack([np.stack(list(row.reshape(2, 6, 6)), -1).ravel() for row in weight])
    return weight.T.copy()


bfloat16 = ml_dtypes.bfloat16
assert sys.byteorder == 'little'
