"""Draws the pictures of `alexnet_jax.visualize` and receptive fields as matplotlib Figure objects."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from alexnet_jax.experiments.plots import MANY_LINES, Figure, Rectangle


def pictures(rows: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """Draws rows of pictures, such as images, their deconvnet projections and their Grad-CAM maps.

    rows: {title: pictures}. A picture is an image, uint8 [H, W, 3]; an image with signs, float [H, W, 3], of which each
    picture is divided by its largest magnitude and drawn around gray; or a map, float [H, W], drawn in colors from its
    lowest to its highest value. Rows may have different lengths.
    """
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(1.1 * columns + 1.2, 1.1 * len(rows)), layout='constrained')
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, (title, row) in zip(grid, rows.items(), strict=True):
        line[0].text(-0.08, 0.5, title, transform=line[0].transAxes, ha='right', va='center', fontsize=8)
        for axes, picture in zip(line, row, strict=False):
            axes.imshow(_around_gray(picture), cmap='cividis', interpolation='nearest')
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
