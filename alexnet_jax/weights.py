"""Files of weights as others write them: Caffe's, PyTorch's and safetensors, and Caffe's mean images.

Nothing in a file is executed: PyTorch's are read for tensors alone, Caffe's by their field numbers.
"""

import contextlib
import functools
import json
import math
import operator
import os
import pathlib
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from alexnet_jax.errors import UserError

METADATA_KEY = 'alexnet_jax'  # of the safetensors files that alexnet_jax.convert writes
_LARGEST_PROTOBUF = 2**31 - 1  # bytes; its own limit
_MOST_AXES = 32  # Caffe's own limit
# What a state_dict in a trainer's dict is made of. PyTorch's own list is longer, with some that allocate at will.
_HARMLESS = re.compile(
    r'collections\.(OrderedDict|Counter)|(__builtin__|builtins)\.set|torch\.([a-z]\w*|\w+Storage|Size)'
    r'|torch\.storage\.\w+|torch\.nn\.parameter\.Parameter|torch\._utils\._rebuild_(tensor|parameter)\w*'
)
_TORCH_SUFFIXES = ('.pth', '.pt', '.bin', '.tar')  # .pth.tar: PyTorch's ImageNet example


class Layer(NamedTuple):
    """A layer's weights as Caffe and PyTorch hold them: images are NCHW, maps flatten in (C, H, W) order."""

    name: str  # in the file
    weight: np.ndarray  # [O, I / groups, h, w] of a convolution, [O, I] of a linear layer
    bias: np.ndarray  # [O]
    then: str = ''  # which of 'relu', 'lrn', 'pool' follow in a Caffe file that says so


def read(path: str) -> tuple[list[Layer], dict[str, Any] | None, bool]:
    """(layers, what a file written here says of itself, whether the input is BGR) of any kind of file.

    Raises:
      UserError: a file of no known kind, or a damaged one.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix == '.caffemodel':
        return _read_caffe(path), None, True
    if suffix == '.safetensors':
        return *_read_safetensors(path), False
    if suffix in _TORCH_SUFFIXES:
        return _read_torch(path), None, False
    raise UserError(f'--input={path!r}; expected a name ending in .caffemodel, .pth or .safetensors, found {suffix!r}.')


def unreadable(path: str, expected: str, error: Exception) -> UserError:
    """The error to raise for a file that is not what was expected; it shows how the file begins."""
    with open(path, 'rb') as file:
        head = file.read(8)
    reason = printed(re.split(r'[\n.]', str(error))[0])
    return UserError(
        f'{path!r} cannot be read: expected {expected}, found {os.path.getsize(path)} bytes that begin with {head!r} '
        f'({type(error).__name__}{": " if reason else ""}{reason}); it is cut short, damaged or of another kind.'
    )


def printed(text: str, longest: int = 100) -> str:
    """Text out of a file as one short, printable line."""
    return ''.join(c if c.isprintable() else '?' for c in text[:longest]) + ('...' if len(text) > longest else '')


def _read_torch(path: str) -> list[Layer]:
    """Tensors alone: `weights_only` runs no code of the file's. The order is that of the file."""
    try:
        import torch
    except ImportError:
        raise UserError(f"reading {path!r} takes PyTorch: pip install 'alexnet_jax[oracle]'.") from None
    try:
        for name in _pickled_names(path):
            if not _HARMLESS.fullmatch(name):
                raise UserError(
                    f'{path!r} holds a pickled Python object ({printed(name)}), and loading it could run code: it is '
                    'refused. Expected a state_dict: torch.save(model.state_dict(), FILE).'
                )
        with warnings.catch_warnings(action='ignore'):
            held = torch.load(path, map_location='cpu', weights_only=True)
            for key in ('state_dict', 'model_state_dict', 'model'):
                if isinstance(held, dict) and isinstance(held.get(key), dict):
                    held = held[key]
            if isinstance(held, dict) and all(isinstance(value, torch.Tensor) for value in held.values()):
                tensors = {str(key): value.detach() for key, value in held.items()}
                # A tensor may repeat one number along an axis for ever.
                size, declared = os.path.getsize(path), sum(v.numel() * v.element_size() for v in tensors.values())
                if declared > size:
                    raise ValueError(f'{size} bytes that declare {declared}')
                return _pairs(
                    path, {k: (v.float() if v.is_floating_point() else v).numpy() for k, v in tensors.items()}
                )
    except UserError:
        raise
    except Exception as error:  # torch has a kind for every way in which a file can be wrong
        raise unreadable(path, 'a state_dict written by torch.save', error) from error
    what = type(held).__name__
    if isinstance(held, dict):
        kinds = [f'{printed(str(key))} ({type(value).__name__})' for key, value in list(held.items())[:8]]
        what = 'a dict with ' + ', '.join(kinds)
    raise UserError(f'{path!r}: expected a state_dict (names and tensors), found {what}.')


def _pickled_names(path: str) -> Iterator[str]:
    """What the pickles of a PyTorch file would import, as 'module.name'; nothing is loaded.

    Raises:
      ValueError: an archive that would grow when it is read; `torch.save` does not compress.
    """
    with open(path, 'rb') as file:
        if file.read(4) != b'PK\3\4':  # as before PyTorch 1.6: five pickles, then numbers
            file.seek(0)
            for _ in range(5):
                yield from _names_in(file)
            return
        with zipfile.ZipFile(file) as archive:
            declared = sum(entry.file_size for entry in archive.infolist())
            if declared > os.path.getsize(path):
                raise ValueError(f'{os.path.getsize(path)} bytes that declare {declared}')
            for entry in archive.infolist():
                if entry.filename.lower().endswith('.pkl'):
                    with archive.open(entry) as pickled:
                        yield from _names_in(pickled)


def _names_in(file) -> Iterator[str]:
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ('GLOBAL', 'INST'):
                yield argument.replace(' ', '.', 1)
            elif opcode.name == 'STACK_GLOBAL':
                yield 'unknown'
    except Exception:  # no pickle, or a damaged one: torch will say so
        return


def _read_safetensors(path: str) -> tuple[list[Layer], dict[str, Any] | None]:
    """The format keeps no order: by name, with numbers in it as numbers (features.3 before features.10)."""
    import safetensors

    try:
        with safetensors.safe_open(path, 'numpy') as file:
            names = sorted(
                file.keys(), key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r'(\d+)', name)]
            )
            tensors, metadata = {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except Exception as error:  # SafetensorError, OSError, AttributeError for types numpy has not got
        raise unreadable(path, 'a safetensors file', error) from error
    own = None
    if METADATA_KEY in metadata:
        with checks_metadata(path):
            own = json.loads(metadata[METADATA_KEY])
            own['config']['model'], own['config']['data']['image_size'], own['config']['data']['mean']
            operator.index(own['record_size'])  # raises TypeError
            if not all(isinstance(name, str) for name in own['class_names']):
                raise TypeError('class names that are no text')
    return _pairs(path, tensors), own


@contextlib.contextmanager
def checks_metadata(path: str) -> Iterator[None]:
    """For what is done with a file's metadata, which may be anything: any error becomes a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f'{path!r}: {printed(str(error), 1000)}') from error
    except Exception as error:
        raise unreadable(path, 'the metadata that alexnet_jax.convert writes', error) from error


def _pairs(path: str, tensors: dict[str, np.ndarray]) -> list[Layer]:
    """Weights with their biases, in the order of the weights."""
    found, rest = [], dict(tensors)
    for name, weight in tensors.items():
        prefix, dot, last = name.rpartition('.')
        if last == 'weight' and weight.ndim in (2, 4) and f'{prefix}{dot}bias' in rest:
            found.append(Layer(printed(prefix), rest.pop(name), rest.pop(f'{prefix}{dot}bias')))
    if rest:
        names = ', '.join(f'{printed(name)} {rest[name].shape}' for name in list(rest)[:6])
        raise UserError(
            f'{path!r} holds what the network has no place for: {names}{" ..." if len(rest) > 6 else ""}; expected '
            'X.weight with X.bias of convolutions (4 axes) and linear layers (2 axes) only.'
        )
    return found


# The part of caffe.proto (BVLC/caffe, src/caffe/proto) that holds weights: field, number, type, whether repeated.
_CAFFE = {
    'BlobShape': [('dim', 1, 'INT64', True)],
    'BlobProto': [
        *((side, i, 'INT32', False) for i, side in enumerate(('num', 'channels', 'height', 'width'), 1)),
        ('data', 5, 'FLOAT', True), ('shape', 7, 'BlobShape', False), ('double_data', 8, 'DOUBLE', True),
    ],
    'LayerParameter': [('name', 1, 'STRING', False), ('type', 2, 'STRING', False), ('blobs', 7, 'BlobProto', True)],
    'V1LayerParameter': [('name', 4, 'STRING', False), ('type', 5, 'INT32', False), ('blobs', 6, 'BlobProto', True)],
    'NetParameter': [('layers', 2, 'V1LayerParameter', True), ('layer', 100, 'LayerParameter', True)],
}  # fmt: skip
_CAFFE_STEPS = {'ReLU': 'relu', 'LRN': 'lrn', 'Pooling': 'pool', 18: 'relu', 15: 'lrn', 17: 'pool'}


@functools.cache
def _caffe_message(name: str):
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name='caffe.proto', package='caffe')
    for message, fields in _CAFFE.items():
        added = file.message_type.add(name=message)
        for field, number, kind, repeated in fields:
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            if kind in _CAFFE:
                type_ = {'type': kinds.TYPE_MESSAGE, 'type_name': f'.caffe.{kind}'}
            else:
                type_ = {'type': kinds.Type.Value(f'TYPE_{kind}')}
            added.field.add(name=field, number=number, label=label, **type_)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f'caffe.{name}'))


def _parse_caffe(path: str, name: str):
    from google.protobuf.message import DecodeError

    if (size := os.path.getsize(path)) > _LARGEST_PROTOBUF:
        raise UserError(f"{path!r}: expected Caffe's {name}, at most {_LARGEST_PROTOBUF} bytes, found {size}.")
    message = _caffe_message(name)()
    try:
        message.ParseFromString(pathlib.Path(path).read_bytes())
    except DecodeError as error:
        raise unreadable(path, f"Caffe's {name} in binary", error) from error
    return message


def _blob(path: str, name: str, blob) -> np.ndarray:
    with np.errstate(over='ignore'):  # infinity is refused later, with the name of the layer
        data = np.array(blob.data or blob.double_data, np.float32)
    shape = tuple(blob.shape.dim) or (blob.num, blob.channels, blob.height, blob.width)
    if len(shape) > _MOST_AXES or min(shape) < 0:
        found = printed(str(shape))
        raise UserError(f'{path!r}, {name}: expected at most {_MOST_AXES} sides, none below 0, found {found}.')
    if math.prod(shape) != data.size or not data.size:
        raise UserError(f'{path!r}, {name}: expected {math.prod(shape)} numbers for {shape}, found {data.size}.')
    return data.reshape(shape)


def _read_caffe(path: str) -> list[Layer]:
    net = _parse_caffe(path, 'NetParameter')
    found = []
    for layer in (*net.layers, *net.layer):
        if not layer.blobs:
            if found and layer.type in _CAFFE_STEPS:
                found[-1] = found[-1]._replace(then=f'{found[-1].then} {_CAFFE_STEPS[layer.type]}'.strip())
            continue
        name = printed(str(layer.name))  # bytes, where they are no text
        weight, *others = (_blob(path, name, blob) for blob in layer.blobs)
        if weight.ndim == 4 and weight.shape[:2] == (1, 1):  # a linear layer as it was written before 2014
            weight = weight.reshape(weight.shape[2:])
        if weight.ndim not in (2, 4) or len(others) != 1:
            shapes = ', '.join(str(array.shape) for array in (weight, *others))
            raise UserError(f'{path!r}, {name}: expected weights (4 or 2 axes) and biases, found {shapes}.')
        found.append(Layer(name, weight, others[0].reshape(-1)))
    return found


def read_mean(path: str, bgr: bool) -> np.ndarray:
    """RGB mean, [S, S, 3] or [3]; bgr: the file has blue first. Raises UserError where it holds no mean."""
    if not os.path.isfile(path):
        raise UserError(f'there is no --mean={path!r}; expected a .binaryproto or .npy file.')
    if path.endswith('.binaryproto'):
        array, bgr = _blob(path, 'mean', _parse_caffe(path, 'BlobProto')), True
    elif path.endswith('.npy'):
        try:
            # Mapped: else it would allocate what the header declares before it looks how much there is.
            array = np.load(path, mmap_mode='r', allow_pickle=False)
            if array.dtype.kind not in 'fiu':
                raise TypeError(f'values of type {array.dtype}')
            if array.size > 3 * 4096**2:
                raise ValueError(f'an array of shape {array.shape}')
            with np.errstate(over='ignore'):
                array = np.array(array, np.float32)
        except Exception as error:  # ValueError, OSError, EOFError, AttributeError of an archive
            raise unreadable(path, 'an array written by numpy.save', error) from error
    else:
        raise UserError(f'--mean={path!r}; expected a name ending in .binaryproto or .npy.')
    shape = array.shape
    if array.ndim == 4 and shape[0] == 1:
        array = array[0]
    if array.size == 3:
        array = array.reshape(3)
    elif array.ndim == 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    side = array.shape[0] if array.ndim else 0
    if not side or array.shape not in ((3,), (side, side, 3)):
        raise UserError(f'--mean={path!r}: expected a shape [3, S, S], [S, S, 3] or [3], found {shape}.')
    low, high = array.min(), array.max()
    if not (0 <= low <= high <= 255 and high > 1):
        raise UserError(f'--mean={path!r}: expected grey levels of 0 to 255, found {low:g} to {high:g}.')
    return array[..., ::-1] if bgr else array
