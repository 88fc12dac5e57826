"""Layer specifications, and the shapes, parameter counts and FLOPs derived from them."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alexnet_jax.core.post_ops import POST_OPS, Context
from alexnet_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Fields shared by all kinds of layers."""

    features: int = 0  # output channels, summed over towers; `AlexNet.num_classes` replaces it in the last layer
    groups: int = 1  # 1: each output reads all input channels; 2: each half reads only its own tower's input channels
    init: str = 'normal(0.01)'  # standard deviation of the weights; 'fan_in': weights from U(-b, b), b = fan_in^-1/2
    bias: float = 0.0  # initial value of every bias; 'fan_in' adds a draw from U(-b, b), as PyTorch does
    post: str = ''  # operations applied to the output, in order: names from `POST_OPS`

    @property
    def ops(self) -> list[str]:
        """The names in `post`, in order."""
        return self.post.split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvSpec(LayerSpec):
    """A convolutional layer, such as conv1."""

    kernel: int  # side of the square window, pixels
    stride: int = 1
    padding: tuple[int, int] = (0, 0)  # zeros (before, after), the same for rows and columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalSpec(ConvSpec):
    """A locally connected layer, such as local3: a convolution with separate weights and biases at every position."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseSpec(LayerSpec):
    """A fully connected layer, such as fc6."""


Shape = tuple[int, ...]  # without the batch axis: (H, W, C) for feature maps, (F,) for dense layers
INIT_PATTERN = re.compile(r'fan_in|normal\((\d*\.?\d+(?:e[+-]?\d\d?)?)\)')
KINDS = {'conv': ConvSpec, 'local': LocalSpec, 'fc': DenseSpec}  # layer name prefix -> spec, in network order


def parse_name(name: str) -> tuple[str, int]:
    """Splits a layer name into its kind (a key of `KINDS`) and its number. Raises UserError for any other name."""
    match = re.fullmatch(f'({"|".join(KINDS)})([1-9][0-9]*)', str(name))
    if not match:
        raise UserError(f'model.layers has {name!r}: expected {", ".join(KINDS)} and a number, such as conv1 or fc6.')
    return match[1], int(match[2])


def sort_layers(names: Iterable[str]) -> list[str]:
    """Sorts layer names in network order: by kind (conv, local, fc), then by number. Gaps are allowed.

    >>> sort_layers(['fc6', 'conv10', 'conv2'])
    ['conv2', 'conv10', 'fc6']
    """
    order = list(KINDS)
    return sorted(names, key=lambda name: (order.index(parse_name(name)[0]), parse_name(name)[1]))


def init_std(init: str) -> float | None:
    """Returns STD of 'normal(STD)', or None for 'fan_in'. Raises UserError for any other string."""
    if not (match := INIT_PATTERN.fullmatch(init)):
        raise UserError(f"init={init!r}: expected 'normal(STD)' with STD >= 0, or 'fan_in'.")
    return float(match[1]) if match[1] else None


class LayerShapes(NamedTuple):
    """Shapes and costs of one layer for one image."""

    inputs: Shape
    linear: Shape  # before the post ops
    outputs: Shape  # after the post ops
    dropped: Shape | None  # shape of the dropout mask; None without dropout
    parameters: int
    flops: int  # of the matrix products only; a multiply-add counts as two


def infer_shapes(model: Any, image_size: int, towers: int = 1) -> dict[str, LayerShapes]:
    """Returns the shapes, parameter count and FLOPs of every layer, by layer name.

    `model` is an AlexNet, or any object with its attributes. `towers` is the number of devices that share the channels.
    Raises UserError if the layers are incompatible with each other, with the image size (in pixels), or with `towers`.

    >>> from alexnet_jax.core.model import AlexNet
    >>> shapes = infer_shapes(AlexNet(), image_size=224)
    >>> shapes['conv1'].linear, shapes['conv1'].outputs, sum(layer.parameters for layer in shapes.values())
    ((55, 55, 96), (27, 27, 96), 60965224)
    """
    groups = [spec.groups for spec in model.layers.values()]
    groups += [_mixing_groups(model, op) for spec in model.layers.values() for op in spec.ops]
    if towers > 1 and max(groups) < 2:
        raise UserError(f'mesh.tower={towers}: no layer has groups=2; use mesh.tower=1.')
    shapes: dict[str, LayerShapes] = {}
    shape: Shape = (image_size, image_size, 3)
    for name, layer in model.layers.items():
        _check_groups(model, name, shape[-1], towers)
        try:
            inputs, op_shapes = shape, list(_op_shapes(model, name, shape))
        except UserError as error:
            raise UserError(f'data.image_size={image_size}: {name}: {error}; use a larger size.') from error
        linear, shape = op_shapes[0][1], op_shapes[-1][1]
        weights = _fan_in(layer, inputs) * layer.features
        positions = linear[0] * linear[1] if isinstance(layer, ConvSpec) else 1
        parameters = (weights + layer.features) * (positions if isinstance(layer, LocalSpec) else 1)
        dropped = dict(op_shapes).get('dropout')
        shapes[name] = LayerShapes(inputs, linear, shape, dropped, parameters, 2 * weights * positions)
    return shapes


def _mixing_groups(model: Any, op: str) -> int:
    """Returns the number of channel groups within which a post op mixes channels; 0 if it mixes none or is unknown."""
    entry = POST_OPS.get(op)
    return entry.groups(model) if entry and entry.groups else 0


def _check_groups(model: Any, name: str, channels: int, towers: int) -> None:
    """Raises UserError if a layer has an unknown post op or if its channels are not divisible as required."""
    layer, last = model.layers[name], name == list(model.layers)[-1]
    allowed = sorted(op for op, entry in POST_OPS.items() if isinstance(layer, ConvSpec) or not entry.maps_only)
    if unknown := [op for op in layer.ops if op not in allowed]:
        raise UserError(
            f'{name}.post={layer.post!r}: op {unknown[0]!r} is not available for this layer; use {", ".join(allowed)}, '
            'or add an op to POST_OPS.'
        )
    if layer.ops.count('dropout') > 1:
        raise UserError(f'{name}.post={layer.post!r}: expected dropout at most once.')
    for kind, count in (('inputs', channels), ('features', layer.features)):
        if count % layer.groups:
            raise UserError(f'{name} has {count} {kind}: expected a multiple of groups={layer.groups}.')
    # An odd number of classes is allowed: `sharding.forward` pads the classifier.
    if (layer.features % towers and not last) or (layer.groups > 1 and layer.groups % towers):
        raise UserError(
            f'{name} has {layer.features} features in {layer.groups} group(s), which cannot be split over {towers} '
            'towers; use mesh.tower=1.'
        )
    for op in layer.ops:
        groups = _mixing_groups(model, op)
        if groups and layer.features % groups:
            raise UserError(f'{name}.features={layer.features}: expected a multiple of the {groups} groups of {op}.')
        if groups % towers:
            raise UserError(
                f'{name}: {op} has {groups} group(s), which cannot be split over {towers} towers; use mesh.tower=1.'
            )


def gathered_elements(model: Any, image_size: int, towers: int) -> dict[str, int]:
    """Returns, for each layer that gathers, the number of elements per image that a tower receives from the other.

    A layer with one group reads all channels, of which each tower already holds half if its input is split.
    """
    shapes, layers = infer_shapes(model, image_size, towers), list(model.layers.items())
    if towers == 1:
        return {}
    return {  # the first layer gathers nothing: every tower holds the whole image
        name: math.prod(shapes[name].inputs) * (towers - 1) // towers for name, layer in layers[1:] if layer.groups == 1
    }


def _fan_in(layer: LayerSpec, inputs: Shape) -> int:
    """Returns the number of inputs of each output unit."""
    if isinstance(layer, ConvSpec):
        return layer.kernel**2 * inputs[-1] // layer.groups
    return math.prod(inputs) // layer.groups


def _op_shapes(model: Any, name: str, inputs: Shape) -> Iterator[tuple[str, Shape]]:
    """Yields ('linear', shape), then (op, shape) for each post op. Raises UserError if the maps are too small."""
    layer: LayerSpec = model.layers[name]
    shape: Shape = (layer.features,)
    if isinstance(layer, ConvSpec):
        size = inputs[0] + sum(layer.padding)
        if size < layer.kernel:
            raise UserError(f'a window of {layer.kernel} px does not fit padded maps of {size} px')
        shape = ((size - layer.kernel) // layer.stride + 1,) * 2 + shape
    yield 'linear', shape
    for op in layer.ops:
        context = Context(model, groups=max(1, _mixing_groups(model, op)), mask=None)
        x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        shape = jax.eval_shape(lambda x, op=op, context=context: POST_OPS[op].function(x, context), x).shape[1:]
        yield op, shape
