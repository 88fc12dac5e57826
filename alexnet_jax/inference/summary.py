"""The table of a network's layers that `alexnet_jax train --summary` prints."""

from alexnet_jax.core.architecture import ConvSpec, gathered_elements, infer_shapes
from alexnet_jax.core.model import AlexNet
from alexnet_jax.inference.receptive_field import receptive_field
from alexnet_jax.utils.errors import UserError

_COLUMNS = 'layer,input,window,groups,output,post,receptive field,parameters,Mflops,from the other tower'


def summary(network: AlexNet, image_size: int, towers: int) -> str:
    """Formats a table of the layers: shapes, receptive fields, parameters, FLOPs, elements from the other tower.

    image_size: side of the network's input in pixels. towers: number of devices that share the channels.
    Raises UserError as `architecture.infer_shapes` does.
    """
    shapes, gathered = infer_shapes(network, image_size, towers), gathered_elements(network, image_size, towers)
    rows = [tuple(_COLUMNS.split(','))]
    for name, layer in network.layers.items():
        window = f'{layer.kernel}x{layer.kernel} / {layer.stride}' if isinstance(layer, ConvSpec) else ''
        inputs, outputs = ('x'.join(map(str, shape)) for shape in (shapes[name].inputs, shapes[name].outputs))
        received = f'{gathered[name]:,}' if name in gathered else ''
        counts = f'{shapes[name].parameters:,}', f'{shapes[name].flops / 1e6:,.1f}', received
        field = _field(network, name, image_size)
        rows.append((name, inputs, window, str(layer.groups), outputs, layer.post, field, *counts))
    parameters, flops = (sum(getattr(shape, key) for shape in shapes.values()) for key in ('parameters', 'flops'))
    rows.append(('all', *[''] * 6, f'{parameters:,}', f'{flops / 1e6:,.1f}', f'{sum(gathered.values()):,}'))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = '  '.join(f'{{:{side}{width}}}' for side, width in zip('<<<<<<<>>>', widths, strict=True))
    text = [line.format(*row).rstrip() for row in rows]
    text.append(
        f'{towers} tower{"s" if towers > 1 else ""}, {image_size} px, forward pass of one image. Receptive field: size '
        'and stride in pixels, with padding; dense layers: the pixels that they see. A multiply-add is two FLOPs. The '
        'last column counts the elements that each tower receives; the backward pass sends as many back.'
    )
    return '\n'.join(text)


def _field(network: AlexNet, name: str, image_size: int) -> str:
    """Returns '195x195 / 32'; the box for a dense layer; '?' above an operation whose window is unknown."""
    try:
        field = receptive_field(network, name)
    except UserError:
        return '?'
    if field.size is not None:
        return f'{field.size}x{field.size} / {field.stride}'
    top, left, bottom, right = field.box(0, 0, image_size)
    return f'{bottom - top}x{right - left}'
