"""Reads .npy files that hold a dictionary of layers, such as bvlc_alexnet.npy, without executing code from them."""

import dataclasses
import math
import pathlib
import re
from typing import Any

import numpy as np

from alexnet_jax.convert import unpickle
from alexnet_jax.convert.unpickle import Placeholder
from alexnet_jax.convert.weight_file import LayerWeights, WeightFile, in_numeric_order, reading
from alexnet_jax.utils.errors import UserError, printable


class _Array(Placeholder):
    """A pickled array. Its `state` is (version, shape, dtype, whether in Fortran's order, bytes or list of objects)."""

    path = 'array'


_CLASSES: dict[str, type] = {f'numpy.{core}.multiarray._reconstruct': _Array for core in ('core', '_core')}


def read(path: str) -> WeightFile:
    """Reads {layer: [weights, biases]} or {layer: {'weights': ..., 'biases': ...}} as caffe-tensorflow writes it.

    Kernels are HWIO and linear weights [inputs, outputs], with maps flattened as (H, W, C). The network expects BGR, as
    Caffe's do. Raises UserError if the file is damaged or holds something else.
    """
    with reading(path, 'a dictionary of layers written by numpy.save'), pathlib.Path(path).open('rb') as file:
        if np.lib.format.read_magic(file) == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        if not dtype.hasobject or shape:
            raise ValueError(f'a {dtype} array of shape {shape}')
        (found,) = unpickle.load(file, _CLASSES).state[4]
        if not isinstance(found, dict) or not found:
            raise ValueError(f'a {unpickle.kind(found)} is not a dictionary of layers')
        layers = [_layer(printable(str(name)), value) for name, value in found.items() if isinstance(name, str)]
        if len(layers) < len(found):
            raise ValueError('names of other types than str')
        weights = WeightFile(path, in_numeric_order(layers), bgr=True)
        convs, dense = weights.of_rank(4), weights.of_rank(2)
        converted = [layer._replace(weight=layer.weight.transpose(3, 2, 0, 1)) for layer in convs]
        for i, layer in enumerate(dense):
            weight = layer.weight.T
            maps = convs[-1].weight.shape[3] if convs and i == 0 else 0  # the first linear layer reads maps
            side = math.isqrt(weight.shape[1] // maps) if maps else 0
            if maps and weight.shape[1] == side * side * maps:
                weight = weight.reshape(-1, side, side, maps).transpose(0, 3, 1, 2).reshape(weight.shape)
            converted.append(layer._replace(weight=weight))
    return dataclasses.replace(weights, layers=converted)


def _layer(name: str, value: Any) -> LayerWeights:
    if isinstance(value, dict) and {*value} == {'weights', 'biases'}:
        value = [value['weights'], value['biases']]
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(part, _Array) for part in value):
        raise UserError(f'{name}: expected [weights, biases], found {unpickle.kind(value)}.')
    weight, bias = map(_array, value)
    if weight.ndim not in (2, 4):
        raise UserError(f'{name}: expected weights of 4 or 2 axes, found {weight.shape}.')
    return LayerWeights(name, weight, bias.reshape(-1))


def _array(pickled: _Array) -> np.ndarray:
    _, shape, dtype, fortran, data = pickled.state
    code, order = dtype.args[0], dtype.state[1]
    if not re.fullmatch('[fiu][1248]', code) or order not in ('<', '>', '|', '='):
        raise ValueError('arrays of other types than numbers')
    if isinstance(data, str):  # written by Python 2
        data = data.encode('latin1')
    return np.frombuffer(data, np.dtype(order + code)).reshape(shape, order='F' if fortran else 'C')
