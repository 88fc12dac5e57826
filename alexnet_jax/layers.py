"""The table of layers: what a row may hold, and the sizes and costs that follow from it."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from alexnet_jax import pooling
from alexnet_jax.errors import UserError

FAN_IN = 'fan_in'  # an init that depends on the number of inputs, see `Conv.init_std`


class Conv(NamedTuple):
    """A convolutional layer; named conv1, conv2, ... by its place in the table."""

    features: int  # kernels, both towers together
    kernel: int  # side of the square window, pixels
    stride: int
    padding: tuple[int, int]  # zeros before and after, rows and columns alike
    groups: int  # 1: reads every map below; 2: each half reads its own tower's half, and the towers do not talk
    init_std: float | str  # weights are drawn from N(0, init_std); 'fan_in': U(-b, b), b = inputs^-1/2 (PyTorch)
    bias: float | str  # initial value of every bias; 'fan_in': drawn as such weights are
    then: str  # what follows, in order: some of `STEPS`


class Local(Conv):
    """A convolutional layer with kernels, and biases, of its own at every place; numbered on (local3)."""

    __slots__ = ()


class Dense(NamedTuple):
    """A fully-connected layer; numbered on (fc6, fc7)."""

    features: int
    groups: int
    init_std: float | str
    bias: float | str
    then: str


_ANYWHERE = ('relu', 'tanh', 'dropout')
_ON_MAPS = (*_ANYWHERE, 'lrn', 'spatial_norm', 'pool', 'avg_pool')
STEPS = {Conv: _ON_MAPS, Local: _ON_MAPS, Dense: _ANYWHERE}
_NAMES = {Conv: 'conv', Local: 'local', Dense: 'fc'}


class Sizes(NamedTuple):
    """What passes through a layer for one image, and what it costs."""

    inputs: tuple[int, ...]  # (H, W, C) or (F,)
    linear: tuple[int, ...]  # before what follows
    outputs: tuple[int, ...]  # after it
    dropped: tuple[int, ...] | None  # where dropout acts; None if it does not
    parameters: int
    flops: int  # of the products: two for a multiplication and its addition


def table(model) -> dict[str, Conv | Dense]:
    """Layers by name, in order: conv1 ... fc8."""
    rows = [Conv(*row) for row in model.conv] + [Local(*row) for row in model.local]
    rows += [Dense(*row) for row in model.dense]
    rows.append(Dense(model.num_classes, 1, *model.classifier, ''))
    return {f'{_NAMES[type(row)]}{i}': row for i, row in enumerate(rows, 1)}


def sizes(model, image_size: int, towers: int = 1) -> dict[str, Sizes]:
    """Shapes, parameters and products of every layer.

    Args:
      model: an AlexNet, or whatever has its attributes.
      image_size: side of the network's input, pixels.
      towers: devices the network is to be split over.

    Raises:
      UserError: the table is no network: for this image size, or for this number of towers.
    """
    layers = table(model)
    halves = [name for name, layer in layers.items() if layer.groups == 2 or _norm_in_halves(model, layer)]
    if towers > 1 and not halves:
        raise UserError('nothing in this network is in two groups, so it has no two towers; use mesh.tower=1.')
    found, shape = {}, (image_size, image_size, 3)
    for name, layer in layers.items():
        if unknown := [step for step in layer.then.split() if step not in STEPS[type(layer)]]:
            raise UserError(
                f'{name} is followed by {unknown[0]!r}; expected some of: {", ".join(sorted(STEPS[type(layer)]))}.'
            )
        for what, count in (('inputs', shape[-1]), ('features', layer.features)):
            if count % layer.groups:
                raise UserError(f'{name} has {count} {what}, which do not divide into {layer.groups} groups.')
        last = name == list(layers)[-1]  # the classifier may have an odd number of classes: sharding.py fills it up
        if (layer.features % towers and not last) or (layer.groups > 1 and layer.groups % towers):
            raise UserError(
                f'{name} has {layer.features} features in {layer.groups} group(s), which cannot be split over '
                f'{towers} towers; use mesh.tower=1.'
            )
        inputs, dropped = shape, None
        for step, shape in _shapes(model, name, layer, inputs, image_size):
            if step == 'linear':
                linear = shape
            if step == 'dropout':
                dropped = shape
            if step == 'lrn' and (model.norm_groups % towers or layer.features % model.norm_groups):
                raise UserError(
                    f'{name} is normalised in {model.norm_groups} group(s) of its {layer.features} maps, which cannot '
                    f'be split over {towers} towers; use mesh.tower=1.'
                )
        weights = _fan_in(layer, inputs) * layer.features
        places = linear[0] * linear[1] if isinstance(layer, Conv) else 1
        parameters = (weights + layer.features) * (places if isinstance(layer, Local) else 1)
        found[name] = Sizes(inputs, linear, shape, dropped, parameters, 2 * weights * places)
    return found


def crossing(model, image_size: int, towers: int) -> dict[str, int]:
    """Numbers of one image that each tower gets from the other before a layer: {name: numbers}, of those that gather.

    A layer with one group whose input is split reads all of it, and has half (see `model.AlexNet`).
    """
    found, split = {}, False
    for (name, layer), size in zip(table(model).items(), sizes(model, image_size, towers).values(), strict=True):
        if split and layer.groups == 1:
            found[name] = math.prod(size.inputs) * (towers - 1) // towers
        split = towers > 1
    return found


def summary(model, image_size: int, towers: int) -> str:
    """A table of layers for people: shapes, parameters, products, and what crosses between towers."""
    gathered = crossing(model, image_size, towers)
    rows = [('layer', 'input', 'window', 'groups', 'output', 'then', 'parameters', 'Mflops', 'from the other tower')]
    total = [0, 0, 0]
    for (name, layer), size in zip(table(model).items(), sizes(model, image_size, towers).values(), strict=True):
        numbers = (size.parameters, size.flops, gathered.get(name, 0))
        total = [a + b for a, b in zip(total, numbers, strict=True)]
        window = f'{layer.kernel}x{layer.kernel} / {layer.stride}' if isinstance(layer, Conv) else ''
        shapes = ['x'.join(map(str, shape)) for shape in (size.inputs, size.outputs)]
        counts = (f'{numbers[0]:,}', f'{numbers[1] / 1e6:,.1f}', f'{numbers[2]:,}' if numbers[2] else '')
        rows.append((name, shapes[0], window, str(layer.groups), shapes[1], layer.then, *counts))
    rows.append(('all', '', '', '', '', '', f'{total[0]:,}', f'{total[1] / 1e6:,.1f}', f'{total[2]:,}'))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = [
        '  '.join(
            c.rjust(w) if i > 5 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    text.append(
        f'{towers} tower{"s" if towers > 1 else ""}, {image_size} px, one image forward: two flops a multiplication; '
        'numbers that each tower receives (the gradient sends as many back).'
    )
    return '\n'.join(text)


def _norm_in_halves(model, layer) -> bool:
    return model.norm_groups == 2 and 'lrn' in layer.then.split()


def _fan_in(layer: Conv | Dense, inputs: tuple[int, ...]) -> int:
    """Numbers that one output is the weighted sum of."""
    if isinstance(layer, Conv):
        return layer.kernel**2 * inputs[-1] // layer.groups
    return math.prod(inputs) // layer.groups


def _shapes(model, name, layer, inputs, image_size) -> Iterator[tuple[str, tuple[int, ...]]]:
    """('linear', shape), then (step, shape) for each step that follows."""
    if isinstance(layer, Dense):
        for step in ('linear', *layer.then.split()):
            yield step, (layer.features,)
        return
    size = inputs[0]
    if size + sum(layer.padding) < layer.kernel:
        raise UserError(
            f'an image of {image_size} px does not fit the network: {name} looks through {layer.kernel} px '
            f'windows at maps of {size} px; use a larger data.image_size.'
        )
    size = (size + sum(layer.padding) - layer.kernel) // layer.stride + 1
    for step in ('linear', *layer.then.split()):
        if step in ('pool', 'avg_pool'):
            if size < model.pool_window:
                raise UserError(
                    f'an image of {image_size} px does not fit the network: {name} pools {size} px maps through '
                    f'{model.pool_window} px windows; use a larger data.image_size.'
                )
            size = pooling.pooled_size(size, model.pool_window, model.pool_stride)
        yield step, (size, size, layer.features)
