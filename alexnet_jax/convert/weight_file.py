"""Contents of a weight file, independent of its format, and errors for unreadable weight files."""

import collections
import contextlib
import dataclasses
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from alexnet_jax.utils.errors import UserError, printable
from alexnet_jax.utils.files import foreign_kind


class LayerWeights(NamedTuple):
    """Weights of a layer in the layout of Caffe and PyTorch: NCHW images, maps flattened as (C, H, W)."""

    name: str  # in the file
    weight: np.ndarray  # [O, I / groups, h, w] for a convolution, [O, I] for a linear layer
    bias: np.ndarray  # [O]
    post: str = ''  # operations after the layer ('relu', 'lrn', 'pool'), if a Caffe file lists them


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """Layers and metadata of a weight file."""

    path: str
    layers: list[LayerWeights]
    bgr: bool = False  # whether the first layer expects BGR, as Caffe's networks do
    metadata: dict[str, Any] | None = None  # config, class names, record size; only in files written by alexnet_jax

    def of_rank(self, rank: int) -> list[LayerWeights]:
        """Returns the convolutions (rank 4) or the linear layers (rank 2), in the order of the file."""
        return [layer for layer in self.layers if layer.weight.ndim == rank]


@contextlib.contextmanager
def reading(path: str, expected: str) -> Iterator[None]:
    """Converts any exception in the context to a UserError that names the file, in one line.

    Damaged files raise exceptions of any type. For all but UserError, the message states the expected format and the
    first 8 bytes of the file.
    """
    try:
        with warnings.catch_warnings(action='ignore'):  # of NumPy for files of Python 2
            yield
    except UserError as error:
        raise UserError(f'{path!r}: {printable(str(error), 1000)}') from error
    except Exception as error:
        check_kind(path)
        with open(path, 'rb') as file:
            head = file.read(8)
        reason = printable(re.split(r'[\n.]', str(error))[0])
        raise UserError(
            f'{path!r} cannot be read: expected {expected}, found {os.path.getsize(path)} bytes starting with {head!r} '
            f'({type(error).__name__}{": " if reason else ""}{reason}); it is truncated, damaged or of another format.'
        ) from error


def check_kind(path: str) -> None:
    """Raises UserError, with a remedy, for a few kinds of files that people have under the names of weight files."""
    with open(path, 'rb') as file:
        start = file.read(512)
    kind = foreign_kind(start)
    if start.startswith(b'\x89HDF'):
        kind = 'an HDF5 file (Keras): save the weights as safetensors instead'
    if start[257:262] == b'ustar':
        kind = 'a tar archive: unpack it and use the file in it'
    if kind:
        raise UserError(f'{path!r} is {kind}.')


def pair_tensors(tensors: dict[str, np.ndarray]) -> list[LayerWeights]:
    """Pairs weights with their biases, in the order of the weights. Raises UserError for other tensors."""
    layers, unused = [], dict(tensors)
    for name, weight in tensors.items():
        prefix, dot, last = name.rpartition('.')
        if last == 'weight' and weight.ndim in (2, 4) and f'{prefix}{dot}bias' in unused:
            layers.append(LayerWeights(printable(prefix), unused.pop(name), unused.pop(f'{prefix}{dot}bias')))
    if unused:
        names = ', '.join(f'{printable(name)} {unused[name].shape}' for name in list(unused)[:6])
        raise UserError(
            f'unsupported tensors {names}{" ..." if len(unused) > 6 else ""}; expected only X.weight and X.bias of '
            'convolutions (4 axes) and linear layers (2 axes).'
        )
    return layers


def in_numeric_order(layers: list[LayerWeights]) -> list[LayerWeights]:
    """Sorts layers whose names differ only in numbers by these numbers; keeps the order of the file otherwise."""
    positions = collections.defaultdict(list)
    for i, layer in enumerate(layers):
        positions[re.sub(r'\d+', '#', layer.name)].append(i)
    ordered = list(layers)
    for group in positions.values():
        by_number = sorted(group, key=lambda i: [int(number) for number in re.findall(r'\d+', layers[i].name)])
        for i, source in zip(group, by_number, strict=True):
            ordered[i] = layers[source]
    names = [layer.name for layer in ordered]
    if names != [layer.name for layer in layers]:
        logging.info(f'The layers are in the order of the numbers in their names, not of the file: {", ".join(names)}.')
    return ordered
