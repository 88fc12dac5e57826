"""Writes an HTML report with tables, figures and two interactive parts, as one file that works offline.

The first interactive part slides a filter of the first layer over an image; the second shows the activations layer by
layer. `report.html` is the template. `report.js` computes the first part and displays precomputed values in the second.
"""

import base64
import json
import math
import numbers
import os
import re
from collections import Counter
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.core import architecture, augment
from alexnet_jax.core.architecture import ConvSpec, LayerSpec, LocalSpec
from alexnet_jax.core.model import AlexNet
from alexnet_jax.inference.evaluate import check_images
from alexnet_jax.inference.predict import top_k
from alexnet_jax.utils.errors import UserError, as_user_error
from alexnet_jax.utils.files import atomic_file

_PICTURES = 6  # the page has about 3 MB with images of 224 px and 16 maps per layer
_MAPS = 16  # maps shown per layer
MAP_SIZE = 32  # pixels; larger maps are downsampled
_UNITS = 4096  # units shown per fully connected layer
_STRIP = 128  # units shown per row
_NUMBER = ' class="number"'
_TYPES = {'.svg': 'image/svg+xml', '.png': 'image/png'}


class Table(NamedTuple):
    """Rows under named columns."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple]  # str, numbers, or None (an empty cell)
    note: str = ''  # explanation of the numbers
    verdict: str = ''  # the result in a sentence or two, shown above the rows
    folded: bool = False  # hidden until the reader opens it


class Figure(NamedTuple):
    """An image file with a caption."""

    title: str
    path: str  # an .svg or .png file, embedded in the page
    caption: str = ''


def write(
    path: str,
    *,
    title: str,
    summary: str,
    tables: Sequence[Table] = (),
    figures: Sequence[Figure] = (),
    checkpoint: Checkpoint | None = None,
    image_NHWC: np.ndarray | None = None,
    captions: Sequence[str] = (),
) -> None:
    """Writes the report atomically, replacing an existing file. All text is plain text and is escaped.

    checkpoint, image_NHWC: network and images for the interactive parts; give both or neither. The images are uint8
    [N, S, S, 3] with S = `checkpoint.record_size`, prepared like the training images. The center crops of the first six
    are shown. captions: captions of the images; by default 'image 1', 'image 2', ...

    Raises UserError if a row does not fit its table, a figure cannot be read, the images have another shape or type, or
    the file cannot be written.
    """
    if (checkpoint is None) != (image_NHWC is None):
        raise UserError('report: expected both checkpoint and image_NHWC or neither, got only one of them.')
    data = {}
    if checkpoint is not None and image_NHWC is not None:
        data = _interactive_data(checkpoint, image_NHWC, captions)
    sections = [(f'table-{i}', table.title, _table(table)) for i, table in enumerate(tables, 1)]
    sections += [(f'figure-{i}', figure.title, _figure(figure)) for i, figure in enumerate(figures, 1)]
    links = [(name, heading) for name, heading, _ in sections]
    links += [(n, h) for n, h in (('slide', 'Slide a filter'), ('walk', 'Walk through the layers')) if n in data]
    body = [f'<section id="{name}">\n<h2>{escape(title)}</h2>\n{text}</section>' for name, title, text in sections]
    parts = {
        'title': escape(title),
        'summary': escape(summary),
        'contents': ''.join(f'<li><a href="#{name}">{escape(heading)}</a></li>' for name, heading in links),
        'sections': '\n'.join(body),
        'data': to_json(data),
    }
    folder = resources.files('alexnet_jax.experiments')
    page, parts['script'] = (folder.joinpath(f'report.{kind}').read_text(encoding='utf-8') for kind in ('html', 'js'))
    for block, wanted in (('slide', 'slide' in data), ('walk', 'walk' in data), ('interactive', data)):
        page = re.sub(f'<!--/?{block}-->\n' if wanted else f'(?s)<!--{block}-->.*<!--/{block}-->\n', '', page)
    page = re.sub(r'<!--(\w+)-->', lambda found: parts[found[1]], page)  # one pass: inserted text is not scanned
    with as_user_error(f'the report {path!r} cannot be written'), atomic_file(path) as file:
        file.write(page)


def to_json(data: dict[str, Any]) -> str:
    """Formats data for a script element, which `</script>` in a text would end."""
    return json.dumps(data, allow_nan=False).replace('<', '\\u003c')


def _table(table: Table) -> str:
    count = len(table.columns)
    for row in table.rows:
        if len(row) != count:
            raise UserError(f'table {table.title!r}: expected {count} cells in every row, got {len(row)}.')
    head = ''
    for i, column in enumerate(table.columns):
        right = table.rows and all(row[i] is None or _is_number(row[i]) for row in table.rows)
        head += f'<th scope="col"{_NUMBER if right else ""}>{escape(column)}</th>'
    rows = ''.join(f'<tr>{"".join(map(_cell, row))}</tr>\n' for row in table.rows)
    body = _scrolling(table.title, f'<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>')
    body += f'<p class="note">{escape(table.note)}</p>\n' if table.note else ''
    if table.folded:
        body = f'<details><summary>{len(table.rows)} rows</summary>\n{body}</details>\n'
    return f'<p class="verdict">{escape(table.verdict)}</p>\n{body}' if table.verdict else body


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _cell(value) -> str:
    if not _is_number(value):
        return f'<td>{"" if value is None else escape(str(value))}</td>'
    style = '.6g' if not isinstance(value, numbers.Integral) else ',' if abs(int(value)) >= 10_000 else ''
    return f'<td{_NUMBER}>{value:{style}}</td>'


def _figure(figure: Figure) -> str:
    if not (kind := _TYPES.get(os.path.splitext(figure.path)[1].lower())):
        raise UserError(f'figure {figure.path!r}: expected a file of type {" or ".join(_TYPES)}.')
    with as_user_error(f'figure {figure.path!r} cannot be read'), open(figure.path, 'rb') as file:
        content = base64.b64encode(file.read()).decode()
    text, title = escape(figure.caption), escape(figure.title)
    # Scripts and links in an SVG are inactive inside <img>.
    image = f'<img class="figure" src="data:{kind};base64,{content}" alt="{text or title}">'
    return f'<figure>{_scrolling(figure.title, image)}<figcaption>{text}</figcaption></figure>\n'


def _scrolling(title: str, content: str) -> str:
    """Wraps content that may be wider than the page in a scrollable region that the keyboard can focus."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">\n{content}</div>\n'


def _interactive_data(checkpoint: Checkpoint, image_NHWC: np.ndarray, captions: Sequence[str]) -> dict[str, Any]:
    """Returns the data for report.js: 'walk', and 'slide' if the first layer is a convolution over all colors."""
    image_NHWC = check_images(checkpoint, image_NHWC)[:_PICTURES]
    if not len(image_NHWC):
        raise UserError(f'image_NHWC of shape {image_NHWC.shape}: expected at least one image.')
    numbered = [f'image {i}' for i in range(1, len(image_NHWC) + 1)]
    data = {
        'side': checkpoint.image_size,
        'captions': [*captions[: len(image_NHWC)], *numbered[len(captions) :]],
        'pictures': [encode(image) for image in augment.center_crop(image_NHWC, checkpoint.image_size)],
        'walk': _walk(checkpoint, image_NHWC),
    }
    if slide := slide_data(checkpoint):
        data['slide'] = slide
    return data


def slide_data(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the data for `slideFilter` of report.js; {} if the first layer is not a convolution over all colors."""
    name, first = next(iter(checkpoint.network.layers.items()))
    if not isinstance(first, ConvSpec) or isinstance(first, LocalSpec) or first.groups > 1:
        return {}
    black, weights = np.zeros((1, *[checkpoint.record_size] * 2, 3), np.uint8), checkpoint.params[name]
    return {  # the input of the layer is byte / std + background
        'layer': name,
        'size': first.kernel,
        'stride': first.stride,
        'padding': first.padding,
        'std': checkpoint.augmentation.pixel_std,
        'background': encode(_views(checkpoint, black), '<f4'),
        'kernels': encode(np.moveaxis(weights['kernel'], -1, 0), '<f4'),  # [O, h, w, 3]
        'biases': encode(weights['bias'], '<f4'),
    }


def _views(checkpoint: Checkpoint, image_NHWC: np.ndarray):
    return augment.views(jnp.asarray(image_NHWC), checkpoint.image_stats, checkpoint.augmentation, count=1)[0]


def _walk(checkpoint: Checkpoint, image_NHWC: np.ndarray) -> dict[str, Any]:
    """Returns the stages, one per operation of each layer, and the most probable labels."""
    network = checkpoint.network
    run = jax.jit(lambda params, x: network.apply({'params': params}, x, mutable='intermediates'))
    logits, seen = jax.device_get(run(checkpoint.params, _views(checkpoint, image_NHWC)))
    stages = []
    for name, sizes in architecture.infer_shapes(network, checkpoint.image_size).items():
        layer = network.layers[name]
        calls: Counter[str] = Counter()  # an operation may occur twice in a layer
        for op in ('linear', *layer.ops):
            x = seen['intermediates'][f'{name}.{op}'][calls[op]]
            calls[op] += 1
            operation, description = describe_op(network, layer, sizes.inputs, op)
            stage = {'layer': name, 'operation': operation, 'description': description}
            shown = _maps(x) if x.ndim == 4 else _strip(x)
            stages.append({**stage, 'parameters': sizes.parameters if op == 'linear' else 0, **shown})
    probabilities, names = np.nan_to_num(jax.nn.softmax(jnp.asarray(logits))), checkpoint.class_names
    labels = [
        [{'label': names[i], 'probability': float(p[i])} for i in order]
        for order, p in zip(top_k(logits, 5), probabilities, strict=True)
    ]
    return {'stages': stages, 'labels': labels}


def _maps(x_NHWC: np.ndarray) -> dict[str, Any]:
    """Encodes a selection of feature maps, the same for all images and all operations of a layer."""
    side, _, count = x_NHWC.shape[1:]
    chosen = np.unique(np.linspace(0, count - 1, _MAPS).round().astype(int))
    size = min(side, MAP_SIZE)
    pictures = []
    for maps in np.moveaxis(np.asarray(x_NHWC[..., chosen], np.float32), -1, 1):
        pictures.append(signed(downsample(maps, size)))
    shape = f'{side} x {side} x {count}'
    return {'shape': shape, 'width': size, 'height': size, 'chosen': (chosen + 1).tolist(), 'pictures': pictures}


def downsample(maps: np.ndarray, size: int) -> np.ndarray:
    """Reduces float32 maps [N, H, W] to [N, size, size] by averaging."""
    return np.stack([np.asarray(Image.fromarray(x).resize((size, size), Image.Resampling.BOX)) for x in maps])


def _strip(x_NF: np.ndarray) -> dict[str, Any]:
    """Encodes units row by row. The last row may be shorter."""
    shown = min(x_NF.shape[1], _UNITS)
    width = min(shown, _STRIP)
    height = math.ceil(shown / width)
    pictures = [signed(np.asarray(x[:shown], np.float32)) for x in x_NF]
    return {'shape': f'{x_NF.shape[1]}', 'width': width, 'height': height, 'units': shown, 'pictures': pictures}


def signed(x: np.ndarray) -> dict[str, Any]:
    """Encodes values as bytes 1 to 255, with 128 for zero. 'scale' is the largest magnitude."""
    x = np.nan_to_num(x)
    scale = float(np.abs(x).max())
    return {'scale': scale, 'bytes': encode(np.round(x / (scale or 1) * 127) + 128)}


def encode(array, dtype: str = 'u1') -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype).tobytes()).decode()


def describe_op(network: AlexNet, layer: LayerSpec, inputs: tuple[int, ...], op: str) -> tuple[str, str]:
    """Returns (name, description) of one operation of a layer."""
    towers = 'Each half of them reads only its own half of the inputs: the two towers do not communicate here.'
    towers = f' {towers}' if layer.groups == 2 else ''
    if op == 'linear' and isinstance(layer, ConvSpec):
        local = ', with other weights at every position,' if isinstance(layer, LocalSpec) else ''
        return 'locally connected' if local else 'convolution', (
            f'{layer.features} kernels of {layer.kernel} x {layer.kernel}{local} slide over {inputs[-1]} maps '
            f'with stride {layer.stride}. At each position, the kernel is multiplied by the input under it; the sum of '
            f'the products plus a bias is one value of the output map.{towers}'
        )
    if op == 'linear':
        count = math.prod(inputs) // layer.groups
        text = f'Each of the {layer.features} units is a weighted sum of {count} inputs plus a bias.{towers}'
        return 'fully connected', text
    divided = 'Strong responses are reduced: each value is divided by a power of the energy'
    side = network.spatial_n
    window = f'{network.pool_window} x {network.pool_window} window, with stride {network.pool_stride}'
    overlap = '; the windows overlap.' if network.pool_stride < network.pool_window else '.'
    at_test = 'nothing happens' if network.dropout_inverted else f'all are multiplied by {1 - network.dropout_rate:g}'
    dropped = f'In training, units are set to zero with probability {network.dropout_rate:g}.'
    descriptions = {
        'relu': ('ReLU', 'Negative values become zero; the others do not change.'),
        'tanh': ('tanh', 'Every value is mapped to a value between -1 and 1.'),
        'lrn': ('response normalization', f'{divided} at its position in the {network.lrn_n} maps around it.'),
        'spatial_norm': ('spatial normalization', f'{divided} in the {side} x {side} window around it.'),
        'pool': ('max pooling', f'The maximum of each {window}. Small shifts of the input matter less{overlap}'),
        'avg_pool': ('mean pooling', f'The mean of each {window}{overlap}'),
        'dropout': ('dropout', f'{dropped} At test time, as here, {at_test}.'),
    }
    return descriptions.get(op, (op, ''))  # user-defined operations have no description
