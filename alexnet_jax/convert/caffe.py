"""Reads Caffe's protocol buffers: weights (.caffemodel) and arrays such as mean images (.binaryproto)."""

import functools
import math
import os
import pathlib

import numpy as np

from alexnet_jax.convert.weight_file import LayerWeights, WeightFile, reading
from alexnet_jax.utils.errors import UserError, printable

_MAX_BYTES = 2**31 - 1  # protobuf's own limit
_MAX_AXES = 32  # Caffe's own limit
# The parts of caffe.proto (BVLC/caffe, src/caffe/proto) that contain weights: (field name, number, type, repeated).
_MESSAGES = {
    'BlobShape': [('dim', 1, 'INT64', True)],
    'BlobProto': [
        *((side, i, 'INT32', False) for i, side in enumerate(('num', 'channels', 'height', 'width'), 1)),
        ('data', 5, 'FLOAT', True), ('shape', 7, 'BlobShape', False), ('double_data', 8, 'DOUBLE', True),
    ],
    'LayerParameter': [('name', 1, 'STRING', False), ('type', 2, 'STRING', False), ('blobs', 7, 'BlobProto', True)],
    'V1LayerParameter': [('name', 4, 'STRING', False), ('type', 5, 'INT32', False), ('blobs', 6, 'BlobProto', True)],
    'NetParameter': [('layers', 2, 'V1LayerParameter', True), ('layer', 100, 'LayerParameter', True)],
}  # fmt: skip
# Layer types by name (LayerParameter) and by number (V1LayerParameter).
_OPS = {'ReLU': 'relu', 'LRN': 'lrn', 'Pooling': 'pool', 18: 'relu', 15: 'lrn', 17: 'pool'}


@functools.cache
def _caffe_message(name: str):
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name='caffe.proto', package='caffe')
    for message, fields in _MESSAGES.items():
        added = file.message_type.add(name=message)
        for field, number, kind, repeated in fields:
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            type_ = {'type_name': kind} if kind in _MESSAGES else {'type': kinds.Type.Value(f'TYPE_{kind}')}
            added.field.add(name=field, number=number, label=label, **type_)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f'caffe.{name}'))


def _parse(path: str, name: str):
    """Parses a file as a message of type `name`, a key of `_MESSAGES`."""
    if (size := os.path.getsize(path)) > _MAX_BYTES:
        raise UserError(f"expected Caffe's {name} of at most {_MAX_BYTES} bytes, found {size}.")
    message = _caffe_message(name)()
    message.ParseFromString(pathlib.Path(path).read_bytes())
    return message


def _blob_array(name: str, blob) -> np.ndarray:
    """Converts a BlobProto to a float32 array. Raises UserError if its shape does not match its number of values."""
    with np.errstate(over='ignore'):  # `convert` rejects infinity and names the layer
        data = np.array(blob.data or blob.double_data, np.float32)
    shape = tuple(blob.shape.dim) or (blob.num, blob.channels, blob.height, blob.width)
    if len(shape) > _MAX_AXES or min(shape) < 0:
        raise UserError(f'{name}: expected at most {_MAX_AXES} sizes of 0 or more, found {printable(str(shape))}.')
    if math.prod(shape) != data.size or not data.size:
        raise UserError(f'{name}: expected {math.prod(shape)} numbers for shape {shape}, found {data.size}.')
    return data.reshape(shape)


def read_array(path: str) -> np.ndarray:
    """Reads a .binaryproto, such as a mean image, as a float32 array. Raises UserError if it is damaged."""
    with reading(path, "Caffe's BlobProto in binary"):
        return _blob_array('blob', _parse(path, 'BlobProto'))


def read(path: str) -> WeightFile:
    """Reads a .caffemodel. Raises UserError if it is damaged or has weights of unsupported layers."""
    with reading(path, "Caffe's NetParameter in binary"):
        return WeightFile(path, _read_layers(_parse(path, 'NetParameter')), bgr=True)


def _read_layers(net) -> list[LayerWeights]:
    layers: list[LayerWeights] = []
    for layer in (*net.layers, *net.layer):
        if not layer.blobs:
            if layers and layer.type in _OPS:
                layers[-1] = layers[-1]._replace(post=f'{layers[-1].post} {_OPS[layer.type]}'.strip())
            continue
        name = printable(str(layer.name))  # protobuf returns bytes for invalid UTF-8
        weight, *others = (_blob_array(name, blob) for blob in layer.blobs)
        if weight.ndim == 4 and weight.shape[:2] == (1, 1):  # files before 2014 have 4-D weights in linear layers
            weight = weight.reshape(weight.shape[2:])
        if weight.ndim not in (2, 4) or len(others) != 1:
            shapes = ', '.join(str(array.shape) for array in (weight, *others))
            raise UserError(f'{name}: expected weights (4 or 2 axes) and biases, found {shapes}.')
        layers.append(LayerWeights(name, weight, others[0].reshape(-1)))
    return layers
