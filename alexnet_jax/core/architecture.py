"""Layer specs: what a layer may be, and the shapes, parameters and FLOPs that follow."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from alexnet_jax.core import pooling
from alexnet_jax.utils.errors import UserError

FAN_IN = 'fan_in'  # an init that depends on the number of inputs, see `ConvSpec.init_std`


class ConvSpec(NamedTuple):
    """A convolutional layer; named conv1, conv2, ... in order."""

    features: int  # kernels, both towers together
    kernel: int  # side of the square window, pixels
    stride: int
    padding: tuple[int, int]  # zeros before and after, rows and columns alike
    groups: int  # 1: reads every map below; 2: each half reads its own tower's half, and the towers do not talk
    init_std: float | str  # weights are drawn from N(0, init_std); 'fan_in': U(-b, b), b = inputs^-1/2 (PyTorch)
    bias: float | str  # initial value of every bias; 'fan_in': drawn as such weights are
    post: str  # operations that follow, in order: some of `POST_OPS`


class LocalSpec(ConvSpec):
    """A convolutional layer with kernels, and biases, of its own at every position; numbered on (local3)."""

    __slots__ = ()


class DenseSpec(NamedTuple):
    """A fully-connected layer; numbered on (fc6, fc7)."""

    features: int
    groups: int
    init_std: float | str
    bias: float | str
    post: str


_ANYWHERE = ('relu', 'tanh', 'dropout')
_ON_MAPS = (*_ANYWHERE, 'lrn', 'spatial_norm', 'pool', 'avg_pool')
POST_OPS = {ConvSpec: _ON_MAPS, LocalSpec: _ON_MAPS, DenseSpec: _ANYWHERE}
_NAMES = {ConvSpec: 'conv', LocalSpec: 'local', DenseSpec: 'fc'}


class LayerShapes(NamedTuple):
    """What passes through a layer for one image, and what it costs."""

    inputs: tuple[int, ...]  # (H, W, C) or (F,)
    linear: tuple[int, ...]  # before what follows
    outputs: tuple[int, ...]  # after it
    dropped: tuple[int, ...] | None  # where dropout acts; None if it does not
    parameters: int
    flops: int  # of the products: two for a multiplication and its addition


def layer_specs(model) -> dict[str, ConvSpec | DenseSpec]:
    """Layers by name, in order: conv1 ... fc8."""
    rows = [ConvSpec(*row) for row in model.conv] + [LocalSpec(*row) for row in model.local]
    rows += [DenseSpec(*row) for row in model.dense]
    rows.append(DenseSpec(model.num_classes, 1, *model.classifier, ''))
    return {f'{_NAMES[type(row)]}{i}': row for i, row in enumerate(rows, 1)}


def infer_shapes(model, image_size: int, towers: int = 1) -> dict[str, LayerShapes]:
    """Shapes, parameters and products of every layer.

    Args:
      model: an AlexNet, or whatever has its attributes.
      image_size: side of the network's input, pixels.
      towers: devices the network is to be split over.

    Raises:
      UserError: the layers do not fit together, this image size, or this number of towers.
    """
    layers = layer_specs(model)
    if towers > 1 and not any(
        layer.groups == 2 or (model.norm_groups == 2 and 'lrn' in layer.post.split()) for layer in layers.values()
    ):
        raise UserError('No layer has groups=2; set mesh.tower=1.')
    shapes, shape = {}, (image_size, image_size, 3)
    for name, layer in layers.items():
        if unknown := [op for op in layer.post.split() if op not in POST_OPS[type(layer)]]:
            raise UserError(
                f'{name} is followed by {unknown[0]!r}; expected some of: {", ".join(sorted(POST_OPS[type(layer)]))}.'
            )
        for what, count in (('inputs', shape[-1]), ('features', layer.features)):
            if count % layer.groups:
                raise UserError(f'{name} has {count} {what}, which do not divide into {layer.groups} groups.')
        last = name == list(layers)[-1]  # the classifier may have an odd number of classes: `sharding.forward` pads it
        if (layer.features % towers and not last) or (layer.groups > 1 and layer.groups % towers):
            raise UserError(
                f'{name} has {layer.features} features in {layer.groups} group(s), which cannot be split over '
                f'{towers} towers; use mesh.tower=1.'
            )
        if 'lrn' in layer.post.split() and (model.norm_groups % towers or layer.features % model.norm_groups):
            raise UserError(
                f'{name} is normalized in {model.norm_groups} group(s) of its {layer.features} maps, which cannot be '
                f'split over {towers} towers; use mesh.tower=1.'
            )
        inputs, op_shapes = shape, list(_op_shapes(model, name, layer, shape, image_size))
        linear, shape = op_shapes[0][1], op_shapes[-1][1]
        dropped = dict(op_shapes).get('dropout')
        weights = _fan_in(layer, inputs) * layer.features
        positions = linear[0] * linear[1] if isinstance(layer, ConvSpec) else 1
        parameters = (weights + layer.features) * (positions if isinstance(layer, LocalSpec) else 1)
        shapes[name] = LayerShapes(inputs, linear, shape, dropped, parameters, 2 * weights * positions)
    return shapes


def gathered_elements(model, image_size: int, towers: int) -> dict[str, int]:
    """Elements of one image that a tower receives from the other: {layer: count}, of the layers that gather.

    A layer with one group whose input is split reads all of it, and has half (see `model.AlexNet`).
    """
    shapes, layers = infer_shapes(model, image_size, towers), list(layer_specs(model).items())
    if towers == 1:
        return {}
    return {  # the first layer reads the image, which is whole on every tower
        name: math.prod(shapes[name].inputs) * (towers - 1) // towers for name, layer in layers[1:] if layer.groups == 1
    }


def summary(model, image_size: int, towers: int) -> str:
    """A table of layers for people: shapes, parameters, products, and what crosses between towers."""
    shapes, gathered = infer_shapes(model, image_size, towers), gathered_elements(model, image_size, towers)
    rows = [('layer', 'input', 'window', 'groups', 'output', 'post', 'parameters', 'Mflops', 'from the other tower')]
    for name, layer in layer_specs(model).items():
        window = f'{layer.kernel}x{layer.kernel} / {layer.stride}' if isinstance(layer, ConvSpec) else ''
        inputs, outputs = ('x'.join(map(str, shape)) for shape in (shapes[name].inputs, shapes[name].outputs))
        received = f'{gathered[name]:,}' if name in gathered else ''
        counts = f'{shapes[name].parameters:,}', f'{shapes[name].flops / 1e6:,.1f}', received
        rows.append((name, inputs, window, str(layer.groups), outputs, layer.post, *counts))
    parameters, flops = (sum(getattr(shape, key) for shape in shapes.values()) for key in ('parameters', 'flops'))
    rows.append(('all', *[''] * 5, f'{parameters:,}', f'{flops / 1e6:,.1f}', f'{sum(gathered.values()):,}'))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    columns = list(zip('<<<<<<>>>', widths, strict=True))  # text to the left, numbers to the right
    text = [
        '  '.join(f'{cell:{side}{width}}' for cell, (side, width) in zip(row, columns, strict=True)).rstrip()
        for row in rows
    ]
    text.append(
        f'{towers} tower{"s" if towers > 1 else ""}, {image_size} px, one image forward: two flops a multiplication; '
        'numbers that each tower receives (the gradient sends as many back).'
    )
    return '\n'.join(text)


def _fan_in(layer: ConvSpec | DenseSpec, inputs: tuple[int, ...]) -> int:
    """Numbers that one output is the weighted sum of."""
    if isinstance(layer, ConvSpec):
        return layer.kernel**2 * inputs[-1] // layer.groups
    return math.prod(inputs) // layer.groups


def _op_shapes(model, name, layer, inputs, image_size) -> Iterator[tuple[str, tuple[int, ...]]]:
    """('linear', shape), then (op, shape) for each operation that follows."""
    if isinstance(layer, DenseSpec):
        yield from ((op, (layer.features,)) for op in ('linear', *layer.post.split()))
        return
    size = inputs[0]
    too_small = f'an image of {image_size} px does not fit the network: {name}'
    remedy = 'use a larger data.image_size.'
    if size + sum(layer.padding) < layer.kernel:
        raise UserError(f'{too_small} looks through {layer.kernel} px windows at maps of {size} px; {remedy}')
    size = (size + sum(layer.padding) - layer.kernel) // layer.stride + 1
    for op in ('linear', *layer.post.split()):
        if op in ('pool', 'avg_pool'):
            if size < model.pool_window:
                raise UserError(f'{too_small} pools {size} px maps through {model.pool_window} px windows; {remedy}')
            size = pooling.pooled_size(size, model.pool_window, model.pool_stride)
        yield op, (size, size, layer.features)
