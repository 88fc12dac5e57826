"""Writes a page to look inside a network, as one HTML file that works offline.

For a small network, the page has the weights and computes the forward pass itself, so that units can be silenced in it.
`inside_page.html` is the template. `inside_page.js` uses the helpers and the filter demonstration of `report.js`.
"""

import io
import os
import re
from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from alexnet_jax import visualize
from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.core import architecture, augment
from alexnet_jax.core.architecture import ConvSpec, LocalSpec
from alexnet_jax.core.model import AlexNet
from alexnet_jax.data import datasets, pipeline
from alexnet_jax.data.imagenet_classes import with_meaning
from alexnet_jax.experiments import report
from alexnet_jax.inference.activations import activations
from alexnet_jax.inference.evaluate import check_images
from alexnet_jax.inference.predict import predict, to_records, top_k
from alexnet_jax.inference.receptive_field import receptive_field
from alexnet_jax.utils.errors import UserError, as_user_error
from alexnet_jax.utils.files import atomic_file
from alexnet_jax.visualize import forward

# A parameter takes 5.3 bytes of the file. A network of 27 MFLOPs took 25 ms for an image in JavaScript on one core.
MAX_PARAMETERS, MAX_FLOPS = 2_000_000, 500_000_000
SEARCHED = 1000  # images among which the patches are sought
_IMAGES = 12  # images to choose from
_UNITS = {True: 96, False: 32}  # units of a layer with pictures, in a small and in a large network
_PATCHES = 9
_TILE = 40  # pixels, the largest side of a picture of a unit; whole JPEG blocks of 8 px, so neighbors do not mix
_COMPUTED = ('relu', 'tanh', 'dropout', 'lrn', 'spatial_norm', 'pool', 'avg_pool')  # as `operations` of inside_page.js


def write(
    path: str,
    checkpoint: Checkpoint,
    image_NHWC: np.ndarray,
    captions: Sequence[str] = (),
    *,
    title: str = 'Look inside a network',
    source: str = '',
    log: Callable[[str], None] = lambda text: None,
) -> None:
    """Writes the page atomically, replacing an existing file.

    The page shows the maps of each layer for one of up to 12 images. For a unit it shows the nine patches among all
    images that excite it most, the projection of the strongest to the pixels (`visualize.deconvnet`, or
    `visualize.guided_backprop` if the network has other operations than a deconvnet can reverse), and its receptive
    field. Up to 96 units of a layer have these pictures, evenly spaced.

    A network of at most 2 million parameters and 500 MFLOPs for an image is computed in the page, in float32. Units and
    towers can be silenced there. Of a larger network, the page has the maps of up to 32 units of each layer.

    Args:
      path: the HTML file.
      checkpoint: from `alexnet_jax.load_checkpoint`.
      image_NHWC: uint8 [N, S, S, 3] with S = `checkpoint.record_size`; their center crops are used. The images to
        choose from are evenly spaced.
      captions: of the images; by default 'image 0', 'image 1', ...
      title, source: plain text: the heading, and where network and images come from.
      log: gets a line when a layer is done.

    Raises:
      UserError: the images have another shape or type or are none, there are not as many captions as images, the
        network has an operation whose window is unknown, or the file cannot be written.
    """
    image_NHWC = check_images(checkpoint, image_NHWC)
    if not len(image_NHWC):
        raise UserError(f'image_NHWC of shape {image_NHWC.shape}: expected at least one image.')
    captions = list(captions) or [f'image {i}' for i in range(len(image_NHWC))]
    if len(captions) != len(image_NHWC):
        raise UserError(f'captions: expected {len(image_NHWC)}, one for each image, got {len(captions)}.')
    data = page_data(checkpoint, image_NHWC, captions, log)
    folder = resources.files('alexnet_jax.experiments')
    names = ('inside_page.html', 'report.html', 'report.js', 'inside_page.js')
    page, shared, *scripts = (folder.joinpath(name).read_text(encoding='utf-8') for name in names)
    parts = {
        'title': escape(title),
        'summary': escape(_summary(checkpoint, data, len(image_NHWC), source)),
        'style': _between(shared, '<style>', '</style>'),
        'slide': _between(shared, '<!--slide-->', '<!--/slide-->') if 'slide' in data else '',
        'data': report.to_json(data),
        'script': '\n'.join(scripts),
    }
    page = re.sub(r'<!--(\w+)-->', lambda found: parts[found[1]], page)  # one pass: inserted text is not scanned
    with as_user_error(f'the page {path!r} cannot be written'), atomic_file(path) as file:
        file.write(page)


def _between(text: str, start: str, end: str) -> str:
    return text.split(start)[1].split(end)[0].strip('\n')


def _summary(checkpoint: Checkpoint, data: dict[str, Any], count: int, source: str) -> str:
    about = f'{len(checkpoint.class_names)} classes, {checkpoint.image_size} px, {_parameters(checkpoint):,} parameters'
    patches = f'patches from {count:,} images, {len(data["pictures"])} of them to choose from'
    return '\n'.join(filter(None, [source, f'Network: {about}; {patches}; center crops.']))


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(shapes.parameters for shapes in _shapes(checkpoint).values())


def _shapes(checkpoint: Checkpoint) -> dict[str, architecture.LayerShapes]:
    return architecture.infer_shapes(checkpoint.network, checkpoint.image_size)


def why_large(checkpoint: Checkpoint) -> str:
    """Returns why the page does not compute a network itself, as a clause; '' if it does."""
    shapes, network = _shapes(checkpoint), checkpoint.network
    parameters, flops = _parameters(checkpoint), sum(layer.flops for layer in shapes.values())
    if parameters > MAX_PARAMETERS:
        return f'the network has {parameters:,} parameters, and a page with over {MAX_PARAMETERS:,} would be too large'
    if flops > MAX_FLOPS:
        limit = f'{MAX_FLOPS // 10**6:,}'
        return f'an image takes {flops / 1e6:,.0f} MFLOPs, and more than {limit} would take a browser too long'
    unknown = [op for spec in network.layers.values() for op in spec.ops if op not in _COMPUTED]
    return f'the page does not know its operation {unknown[0]!r}' if unknown else ''


def page_data(
    checkpoint: Checkpoint, image_NHWC: np.ndarray, captions: Sequence[str], log: Callable[[str], None]
) -> dict[str, Any]:
    """Returns the data for inside_page.js, for `json.dumps`. Arguments: as for `write`."""
    reason, network = why_large(checkpoint), checkpoint.network
    chosen = np.unique(np.linspace(0, len(image_NHWC) - 1, _IMAGES).round().astype(int))
    shown_NHWC, names = image_NHWC[chosen], [with_meaning(name) for name in checkpoint.class_names]
    data: dict[str, Any] = {
        'small': not reason,
        'how': _how(reason),
        'side': checkpoint.image_size,
        'captions': [captions[i] for i in chosen],
        'pictures': [report.encode(image) for image in augment.center_crop(shown_NHWC, checkpoint.image_size)],
        'class_names': names,
        'projection': 'deconvnet' if _has_deconvnet(network) else 'guided backpropagation',
        'network': _constants(checkpoint),
        'layers': [],
    }
    if slide := report.slide_data(checkpoint):
        data['slide'] = slide
    for name in network.layers:
        layer = {**_layer(checkpoint, name), **_unit_pictures(checkpoint, image_NHWC, name, not reason)}
        layer |= _large_layer(checkpoint, shown_NHWC, name, layer['units']) if reason else _weights(checkpoint, name)
        if reason:
            layer['note'] += f' Shown: {len(layer["units"])} of {layer["shape"][-1]}, evenly spaced.'
        data['layers'].append(layer)
        log(f'{name}: patches of {len(layer["units"])} of {layer["shape"][-1]} units')
    if reason:
        probabilities_NK = predict(checkpoint, shown_NHWC)
        data['labels'] = [
            [{'label': names[i], 'index': int(i), 'probability': float(p[i])} for i in order]
            for order, p in zip(top_k(probabilities_NK, 5), probabilities_NK, strict=True)
        ]
    return data


def _how(reason: str) -> str:
    look = 'Point at a unit, tap it, or go to it with Tab and the arrow keys to see what excites it.'
    if not reason:
        return f'{look} A click, a second tap or Enter silences it, and your browser computes the network again.'
    return (
        f'{look} Units cannot be silenced in this page, because {reason}. Their effect is computed with '
        "alexnet_jax.activations(checkpoint, images, layers, edit={'conv3': function})."
    )


def _constants(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns what the operations need besides the weights. The network's input is byte / std + background."""
    network, black_1HWC = checkpoint.network, np.zeros((1, *[checkpoint.record_size] * 2, 3), np.uint8)
    (background_1HWC,) = augment.views(
        jnp.asarray(black_1HWC), checkpoint.image_stats, checkpoint.augmentation, count=1
    )
    alpha = network.lrn_alpha / network.lrn_n if network.lrn_alpha_over_n else network.lrn_alpha
    spatial_alpha = network.spatial_alpha / network.spatial_n**2
    lrn = {'n': network.lrn_n, 'k': network.lrn_k, 'alpha': alpha, 'beta': network.lrn_beta}
    spatial = {'n': network.spatial_n, 'k': network.spatial_k, 'alpha': spatial_alpha, 'beta': network.spatial_beta}
    return {
        'std': checkpoint.augmentation.pixel_std,
        'background': report.encode(background_1HWC, '<f4'),
        'lrn': {**lrn, 'groups': network.norm_groups},
        'spatial': spatial,
        'pool': {'window': network.pool_window, 'stride': network.pool_stride},
        'dropout': 1 if network.dropout_inverted else 1 - network.dropout_rate,
    }


def _layer(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Returns the description of a layer. Its output is that of its last operation before dropout."""
    network, spec = checkpoint.network, checkpoint.network.layers[name]
    shape = forward.shape_after(checkpoint, forward.stop_after(checkpoint, name))
    field, side = receptive_field(network, name), checkpoint.image_size
    last = name == list(network.layers)[-1]
    split = any(layer.groups == 2 for layer in network.layers.values()) and not last and not spec.features % 2
    kind = 'local' if isinstance(spec, LocalSpec) else 'conv' if isinstance(spec, ConvSpec) else 'fc'
    operations = ['linear', *spec.ops]
    texts = [report.describe_op(network, spec, _shapes(checkpoint)[name].inputs, op) for op in operations]
    count = f'{shape[-1]} maps of {shape[0]} x {shape[1]}' if len(shape) == 3 else f'{shape[0]} units'
    layer: dict[str, Any] = {
        'name': name,
        'kind': kind,
        'title': ', '.join(title for title, _ in texts),
        'note': f'{count}. {texts[0][1]}',
        'shape': [1, 1, *shape][-3:],
        'features': spec.features,
        'groups': spec.groups,
        'ops': spec.ops,
        'before': spec.ops.index('dropout') if 'dropout' in spec.ops else len(spec.ops),
        'towers': 2 if split else 1,
        'spans': [field.box(i, i, side)[::2] for i in range(shape[0] if len(shape) == 3 else 1)],  # of rows, columns
    }
    if isinstance(spec, ConvSpec):
        layer |= {'kernel': spec.kernel, 'stride': spec.stride, 'padding': spec.padding}
    return layer


def _weights(checkpoint: Checkpoint, name: str) -> dict[str, str]:
    weights = checkpoint.params[name]
    return {'weights': report.encode(weights['kernel'], '<f4'), 'bias': report.encode(weights['bias'], '<f4')}


def _unit_pictures(checkpoint: Checkpoint, image_NHWC: np.ndarray, name: str, small: bool) -> dict[str, Any]:
    """Returns the indices of units of a layer, and for each the values of its patches and a row of pictures.

    The pictures, square tiles in one JPEG image, are the patches in descending order of the values and the projection.
    """
    count = forward.shape_after(checkpoint, forward.stop_after(checkpoint, name))[-1]
    unit_U = np.unique(np.linspace(0, count - 1, _UNITS[small]).round().astype(int)).tolist()
    found = visualize.top_patches(checkpoint, image_NHWC, name, unit_U, _PATCHES)
    project = visualize.deconvnet if _has_deconvnet(checkpoint.network) else visualize.guided_backprop
    widest = int((found.boxes[..., 2:] - found.boxes[..., :2]).max())
    inner = min(widest * max(1, _TILE // widest), _TILE)  # side of the pictures
    rows = []
    for i, unit in enumerate(unit_U):
        position = None if _is_dense(checkpoint.network, name) else tuple(found.positions[i, 0].tolist())
        best_1HWC = image_NHWC[found.indices[i, :1]]
        (signal_HWC,) = project(checkpoint, best_1HWC, name, unit, position, batch_size=1)
        top, left, bottom, right = found.boxes[i, 0]
        signal = _as_picture(signal_HWC[top:bottom, left:right])
        rows.append(np.concatenate([_tile(p, inner / widest) for p in (*found.patches[i], signal)], axis=1))
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).save(buffer, 'JPEG', quality=80, subsampling=0)
    values = [[float(f'{value:.4g}') for value in row] for row in found.values]
    tiles = report.encode(np.frombuffer(buffer.getvalue(), 'u1'))
    return {'units': unit_U, 'values': values, 'tile': _TILE, 'inner': inner, 'tiles': tiles}


def _has_deconvnet(network: AlexNet) -> bool:
    return all(op in _COMPUTED and op != 'tanh' for spec in network.layers.values() for op in spec.ops)


def _is_dense(network: AlexNet, name: str) -> bool:
    return not isinstance(network.layers[name], ConvSpec)


def _as_picture(signal_HWC: np.ndarray) -> np.ndarray:
    """Returns a signal as uint8, with 128 for zero."""
    return np.round(128 + 127 * signal_HWC / (np.abs(signal_HWC).max() or 1)).astype(np.uint8)


def _tile(patch_HWC: np.ndarray, scale: float) -> np.ndarray:
    """Scales a patch and puts it into the corner of a gray square, uint8 [_TILE, _TILE, 3]."""
    square = Image.new('RGB', (_TILE, _TILE), (128,) * 3)
    if patch_HWC.size:
        height, width = (max(1, round(side * scale)) for side in patch_HWC.shape[:2])
        square.paste(Image.fromarray(patch_HWC).resize((width, height), Image.Resampling.BOX))
    return np.asarray(square)


def _large_layer(checkpoint: Checkpoint, image_NHWC: np.ndarray, name: str, units: Sequence[int]) -> dict[str, Any]:
    """Returns the maps of chosen units for each image, downsampled, and the maximum of each: row, column, value."""
    found = activations(checkpoint, image_NHWC, name, units={name: units})[name]
    maps_NHWU = found if found.ndim == 4 else found[:, None, None]
    flat_NPU = maps_NHWU.reshape(len(found), -1, len(units))
    rows, columns = np.divmod(flat_NPU.argmax(1), maps_NHWU.shape[2])
    maxima = np.stack([rows, columns, flat_NPU.max(1)], axis=2).astype(float).round(4)
    size = min(maps_NHWU.shape[1], report.MAP_SIZE)
    maps = [report.signed(report.downsample(np.moveaxis(image, -1, 0), size)) for image in maps_NHWU]
    return {'map': size, 'maps': maps, 'maxima': maxima.tolist()}


def read_images(
    checkpoint: Checkpoint, items: Sequence, class_names: Sequence[str] = ()
) -> tuple[np.ndarray, list[str]]:
    """Returns up to 1,000 images, uint8 [N, S, S, 3], and a caption for each. More are reduced to a random subset.

    items: the records of a split, whose labels have `class_names`, or paths of image files. Raises UserError if one of
    them cannot be read.
    """
    items = datasets.subset(items, min(1, SEARCHED / len(items)))
    records = [items[i] for i in range(len(items))]
    if isinstance(records[0], str):
        return to_records(checkpoint, records), [os.path.join(*path.split(os.sep)[-2:]) for path in records]
    images, labels = pipeline.decode_some(records, range(len(records)), checkpoint.record_size)
    captions = []
    for record, label in zip(records, labels, strict=True):
        name = os.fsdecode(record.get('file_name') or '')
        captions.append(f'{name} ({with_meaning(class_names[label])})' if name else with_meaning(class_names[label]))
    return images, captions
