"""Draws the pictures of `alexnet_jax.visualize` and receptive fields as matplotlib Figure objects."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from alexnet_jax import visualize
from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.core import augment
from alexnet_jax.core.architecture import ConvSpec
from alexnet_jax.data import pipeline
from alexnet_jax.experiments.plots import MANY_LINES, Figure, Rectangle
from alexnet_jax.inference.activations import activations
from alexnet_jax.inference.receptive_field import receptive_field
from alexnet_jax.utils.errors import UserError
from alexnet_jax.visualize.class_maps import last_maps

_IMAGES, _MAPS, _CLASSES = 8, 6, 8


def draw(checkpoint: Checkpoint, records: Sequence, order: Any) -> Iterator[tuple[str, Figure, list[str]]]:
    """Yields the pictures of `alexnet_jax.visualize` for a split: (name, figure, lines to print).

    'classes': images made to excite the first classes. For a network with convolutions also 'receptive_fields' on an
    image; 'visualizations' of eight images, where deconvnet and guided backpropagation are those of the map of the last
    convolution that responds most to the image; and 'patches', nine for each of six maps of that layer.

    records: the records of a split. order: int [N], indices of its records; the first are shown.
    """
    classes = list(checkpoint.class_names[:_CLASSES])
    made = [
        visualize.maximize_activation(checkpoint, _classifier(checkpoint), i, steps=100) for i in range(len(classes))
    ]
    line = f'images made to excite {", ".join(classes)}'
    yield 'classes', pictures({'': [result.image.round().astype(np.uint8) for result in made]}), [line]
    try:
        layer = last_maps(checkpoint)
    except UserError as error:
        logging.info('No figures of receptive fields, visualizations and patches: %s', error)
        return
    image_NHWC, _ = pipeline.decode_some(records, order[:_IMAGES], checkpoint.record_size)
    crops = augment.center_crop(image_NHWC, checkpoint.image_size)
    yield 'receptive_fields', receptive_fields(crops[0], _central_fields(checkpoint, image_NHWC[:1])), []

    unit_N = activations(checkpoint, image_NHWC, layer, pool='max')[layer].argmax(1)
    rows: dict[str, Any] = {'center crop': crops}
    for title, function in (('deconvnet', visualize.deconvnet), ('guided\nbackpropagation', visualize.guided_backprop)):
        try:
            rows[title] = [
                function(checkpoint, x[None], layer, int(i))[0] for x, i in zip(image_NHWC, unit_N, strict=True)
            ]
        except UserError as error:
            logging.info('No pictures of %s: %s', title, error)
    rows['Grad-CAM'] = visualize.grad_cam(checkpoint, image_NHWC).resized
    rows['occlusion'] = [visualize.occlusion_map(checkpoint, image).probability for image in image_NHWC]
    lines = [f'maps of {layer}: {", ".join(map(str, unit_N))}']
    lowest = ', '.join(f'{covered.min():.3f}' for covered in rows['occlusion'])
    lines.append(f'occlusion: lowest probability of the class, by image: {lowest}')
    yield 'visualizations', pictures(rows), lines

    units = range(min(_MAPS, checkpoint.network.layers[layer.partition('.')[0]].features))
    top = visualize.top_patches(checkpoint, records, layer, list(units))
    yield 'patches', pictures({f'{layer} {unit}': row for unit, row in zip(units, top.patches, strict=True)}), []


def _classifier(checkpoint: Checkpoint) -> str:
    return f'{list(checkpoint.network.layers)[-1]}.linear'


def _central_fields(checkpoint: Checkpoint, image_NHWC: np.ndarray) -> dict[str, Sequence[int]]:
    """Returns the receptive field of the unit at the center of each convolution: {layer: box}."""
    names = [f'{name}.linear' for name, spec in checkpoint.network.layers.items() if isinstance(spec, ConvSpec)]
    boxes: dict[str, Sequence[int]] = {}
    for name, maps in activations(checkpoint, image_NHWC, names).items():
        row, column = maps.shape[1] // 2, maps.shape[2] // 2
        box = receptive_field(checkpoint.network, name).box(row, column, checkpoint.image_size)
        boxes[name.partition('.')[0]] = box
    return boxes


def pictures(rows: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """Draws rows of pictures, such as images, their deconvnet projections and their Grad-CAM maps.

    rows: {title: pictures}. A picture is an image, uint8 [H, W, 3]; an image with signs, float [H, W, 3], of which each
    picture is divided by its largest magnitude and drawn around gray; or a map, float [H, W], drawn in colors from its
    lowest to its highest value; if these are equal and positive, from 0. Rows may have different lengths.
    """
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(1.1 * columns + 1.2, 1.1 * len(rows)), layout='constrained')
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, (title, row) in zip(grid, rows.items(), strict=True):
        line[0].text(-0.08, 0.5, title, transform=line[0].transAxes, ha='right', va='center', fontsize=8)
        for axes, picture in zip(line, row, strict=False):
            # Otherwise an occlusion map of ones would look as dark as one of zeros.
            low = 0 if picture.ndim == 2 and picture.min() == picture.max() > 0 else None
            axes.imshow(_around_gray(picture), cmap='cividis', interpolation='nearest', vmin=low)
    return figure


def _around_gray(picture: np.ndarray) -> np.ndarray:
    """Returns an image with signs as float [H, W, 3] from 0 to 1, where 0 becomes 1/2; other pictures unchanged."""
    if picture.ndim != 3 or picture.dtype == np.uint8:
        return picture
    return 0.5 + 0.5 * picture / max(np.abs(picture).max(), np.finfo(np.float32).tiny)


def receptive_fields(image: np.ndarray, fields: Mapping[str, Sequence[int]]) -> Figure:
    """Draws the receptive fields of units on an image.

    image: the network's input, uint8 [S, S, 3]. fields: {layer: (top, left, bottom, right)} from `ReceptiveField.box`.
    """
    height, width = image.shape[:2]
    figure = Figure(figsize=(6, 4.2), layout='constrained')
    axes = figure.subplots()
    axes.imshow(image, extent=(0, width, height, 0), interpolation='nearest')
    for (color, style), (name, (top, left, bottom, right)) in zip(itertools.cycle(MANY_LINES), fields.items()):
        rows, columns = bottom - top, right - left
        for line, edge in ((3.6, {'edgecolor': 'white'}), (1.8, {'edgecolor': color, 'linestyle': style})):
            box = Rectangle((left, top), columns, rows, fill=False, linewidth=line, clip_on=False, **edge)
            box.set_zorder(3 - rows * columns / (height * width))  # the smaller above the larger
            axes.add_patch(box)
        box.set_label(f'{name}: {rows}\u00d7{columns}')
    axes.set_axis_off()
    figure.legend(frameon=False, fontsize=9, loc='outside right upper')
    return figure
