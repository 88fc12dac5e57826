"""Receptive fields: the pixels that the units of a layer can see, computed from the layer table."""

import dataclasses
from typing import Any

import numpy as np

from alexnet_jax.core.architecture import ConvSpec
from alexnet_jax.core.model import AlexNet
from alexnet_jax.core.pooling import pooled_size
from alexnet_jax.core.post_ops import POST_OPS, Window
from alexnet_jax.inference.activations import find_outputs
from alexnet_jax.utils.errors import UserError, check_type

Box = tuple[int, int, int, int]  # top, left, bottom, right: rows top to bottom - 1, columns left to right - 1


@dataclasses.dataclass(frozen=True)
class ReceptiveField:
    """The receptive field of each unit of a layer, in pixels of the network's input (the crop of an image).

    Along either axis, the field of the unit at position i is the interval [start + i * stride, start + i * stride +
    size), where pixel p is [p, p + 1). It may extend past the image into the padding; `box` returns the part inside.
    It has gaps if a layer's stride exceeds its window.

    A unit of a dense layer reads every position of the layers below. Its field depends on the size of the image: size,
    stride and start are None, and `box` returns it.

    Attributes:
      layer: the name of the layer's output, as for `activations`.
      size: side of the field, in pixels.
      stride: distance between the fields of neighboring units, in pixels.
      start: first pixel of the field of the first unit; negative if it includes padding.
      windows: the operations from the image to this layer.
    """

    layer: str
    size: int | None
    stride: int | None
    start: int | None
    windows: tuple[Window, ...] = dataclasses.field(repr=False)

    def center(self, row: int, column: int) -> tuple[float, float]:
        """Returns the center (y, x) of a unit's field, in pixels. Padding counts; 0.5 is the middle of pixel 0.

        Raises UserError for a dense layer.
        """
        if self.size is None or self.stride is None or self.start is None:
            raise UserError(f'{self.layer} is a dense layer, without positions; use box(0, 0, image_size).')
        middle = self.start + self.size / 2
        return middle + row * self.stride, middle + column * self.stride

    def box(self, row: int, column: int, image_size: int) -> Box:
        """Returns the smallest box around the pixels that a unit sees: (top, left, bottom, right).

        Args:
          row: row of the unit in the layer's maps, from 0; 0 for a dense layer.
          column: column of the unit.
          image_size: side of the network's input, in pixels.

        Returns:
          The box: `image[top:bottom, left:right]`. (0, 0, 0, 0) if the unit sees only padding.

        Raises:
          UserError: the image is too small for the layer, or the maps have no such row or column.
        """
        _check_integer('image_size', image_size, 1, 'a positive integer, in pixels')
        sizes = [int(image_size)]  # of the maps, from the image to this layer
        for window in self.windows:
            padded = sizes[-1] + window.before + window.after
            if padded < window.size:
                raise UserError(f'image_size={image_size}: {self.layer} needs more pixels; use a larger size.')
            whole = (padded - window.size) // window.stride + 1
            sizes.append(pooled_size(padded, window.size, window.stride) if window.truncated else whole)
        rows, columns = (self._pixels(name, i, sizes) for name, i in (('row', row), ('column', column)))
        if not (len(rows) and len(columns)):
            return 0, 0, 0, 0
        return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1

    def _pixels(self, name: str, index: int, sizes: list[int]) -> np.ndarray:
        """Returns the pixels along an axis that the units at an index see, sorted; int [P]."""
        if self.size is None:
            _check_integer(name, index, 0, f'0, because {self.layer} is a dense layer', most=0)
            found = np.arange(sizes[-1])
        else:
            last = sizes[-1] - 1
            _check_integer(name, index, 0, f'0 to {last}, the positions of {self.layer} at {sizes[0]} px', most=last)
            found = np.array([index])
        for window, size in zip(self.windows[::-1], sizes[-2::-1], strict=True):
            found = (found[:, None] * window.stride - window.before + np.arange(window.size)).ravel()
            found = np.unique(found[(found >= 0) & (found < size)])
        return found


def receptive_field(network: AlexNet, layer: str) -> ReceptiveField:
    """Returns the receptive field of a layer's units.

        field = alexnet_jax.receptive_field(checkpoint.network, 'conv3')
        top, left, bottom, right = field.box(row, column, checkpoint.image_size)

    Args:
      network: such as `checkpoint.network`.
      layer: a name as for `alexnet_jax.activations`: 'conv3', 'conv3.linear', 'conv1.pool', 'fc6'.

    Returns:
      Its size, stride and start in pixels, and the field of each unit: see `ReceptiveField`.

    Raises:
      UserError: the layer is unknown, or the window of an operation that was added to `POST_OPS` is.

    The pooling of conv 1 reads three units, 4 pixels apart: 11 + 2 * 4 pixels.

    >>> receptive_field(AlexNet(), 'conv1.pool')
    ReceptiveField(layer='conv1.pool', size=19, stride=8, start=0)
    >>> receptive_field(AlexNet(), 'conv1.pool').box(row=0, column=1, image_size=224)
    (0, 8, 19, 27)
    """
    check_type('network', network, AlexNet, 'an AlexNet, such as checkpoint.network')
    check_type('layer', layer, str, "a name, such as 'conv3'")
    ((key, index),) = find_outputs(network, [layer])
    outputs = [(name, op) for name, spec in network.layers.items() for op in ('linear', *spec.ops)]
    end = [i for i, (name, op) in enumerate(outputs) if f'{name}.{op}' == key][index]
    windows = tuple(_window(network, *output) for output in outputs[: end + 1] if _has_maps(network, output[0]))
    if not _has_maps(network, outputs[end][0]):
        return ReceptiveField(layer, None, None, None, windows)
    size, stride, start = 1, 1, 0
    for window in windows:
        size += (window.size - 1) * stride
        start -= window.before * stride
        stride *= window.stride
    return ReceptiveField(layer, size, stride, start, windows)


def _has_maps(network: AlexNet, name: str) -> bool:
    return isinstance(network.layers[name], ConvSpec)


def _window(network: AlexNet, name: str, op: str) -> Window:
    """Returns the window of a convolution (op 'linear') or of one of its post ops."""
    spec: Any = network.layers[name]
    if op == 'linear':
        return Window(spec.kernel, spec.stride, *spec.padding)
    entry = POST_OPS.get(op)
    if not entry or not entry.window:
        raise UserError(f'{name}: the window of operation {op!r} is unknown; set window in its entry of POST_OPS.')
    return entry.window(network)


def _check_integer(name: str, value: Any, least: int, expected: str, most: float = np.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
        raise UserError(f'{name}={value!r}: expected {expected}.')
