"""What a file of weights holds, whoever wrote it."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from alexnet_jax.utils.errors import UserError


class LayerWeights(NamedTuple):
    """A layer's weights as Caffe and PyTorch hold them: images are NCHW, maps flatten in (C, H, W) order."""

    name: str  # in the file
    weight: np.ndarray  # [O, I / groups, h, w] of a convolution, [O, I] of a linear layer
    bias: np.ndarray  # [O]
    post: str = ''  # which of 'relu', 'lrn', 'pool' follow in a Caffe file that says so


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """The layers of a file."""

    path: str
    layers: list[LayerWeights]
    bgr: bool = False  # whether the first layer reads blue first, as Caffe's do
    metadata: dict[str, Any] | None = None  # of a file that `alexnet_jax convert` wrote: config, class names, sizes

    def of_rank(self, rank: int) -> list[LayerWeights]:
        """The convolutions (4 axes) or the linear layers (2 axes), in the order of the file."""
        return [layer for layer in self.layers if layer.weight.ndim == rank]


def unreadable(path: str, expected: str, error: Exception) -> UserError:
    """The error to raise for a file that is not what was expected; it shows how the file begins."""
    with open(path, 'rb') as file:
        head = file.read(8)
    reason = printable(re.split(r'[\n.]', str(error))[0])
    return UserError(
        f'{path!r} cannot be read: expected {expected}, found {os.path.getsize(path)} bytes that begin with {head!r} '
        f'({type(error).__name__}{": " if reason else ""}{reason}); it is cut short, damaged or of another kind.'
    )


def printable(text: str, longest: int = 100) -> str:
    """Text out of a file as one short, printable line."""
    return ''.join(c if c.isprintable() else '?' for c in text[:longest]) + ('...' if len(text) > longest else '')


@contextlib.contextmanager
def reading_metadata(path: str) -> Iterator[None]:
    """Turns any error inside it into a UserError: a file's metadata may be anything."""
    try:
        yield
    except UserError as error:
        raise UserError(f'{path!r}: {printable(str(error), 1000)}') from error
    except Exception as error:
        raise unreadable(path, 'the metadata that alexnet_jax convert writes', error) from error


def pair_tensors(path: str, tensors: dict[str, np.ndarray]) -> list[LayerWeights]:
    """Weights with their biases, in the order of the weights. Raises UserError where tensors are left over."""
    layers, rest = [], dict(tensors)
    for name, weight in tensors.items():
        prefix, dot, last = name.rpartition('.')
        if last == 'weight' and weight.ndim in (2, 4) and f'{prefix}{dot}bias' in rest:
            layers.append(LayerWeights(printable(prefix), rest.pop(name), rest.pop(f'{prefix}{dot}bias')))
    if rest:
        names = ', '.join(f'{printable(name)} {rest[name].shape}' for name in list(rest)[:6])
        raise UserError(
            f'{path!r} holds what the network has no place for: {names}{" ..." if len(rest) > 6 else ""}; expected '
            'X.weight with X.bias of convolutions (4 axes) and linear layers (2 axes) only.'
        )
    return layers
