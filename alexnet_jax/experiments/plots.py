"""Draws the data of figures.py as matplotlib Figure objects, without windows or changes to global state."""

import math
import os
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from alexnet_jax.utils.errors import UserError, as_user_error

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Polygon, Rectangle
    from matplotlib.transforms import Bbox
except ImportError as error:
    raise UserError("figures need matplotlib, which is not installed: pip install 'alexnet_jax[figures]'") from error

# Color-blind safe palette of Okabe and Ito. Lines also differ in style and bars in hatching.
BLACK, ORANGE, SKY, GREEN = '#000000', '#E69F00', '#56B4E9', '#009E73'
BLUE, VERMILION, PURPLE = '#0072B2', '#D55E00', '#CC79A7'
_LINES = ((BLUE, '-'), (VERMILION, '--'), (GREEN, '-.'), (PURPLE, ':'), (BLACK, (0, (5, 1, 1, 1, 1, 1))))
# For more than five curves: five styles and six colors make 30 different lines.
_COLORS = (BLUE, VERMILION, GREEN, PURPLE, BLACK, ORANGE)
MANY_LINES = [(_COLORS[i % 6], _LINES[i % 5][1]) for i in range(30)]
_OP_NAMES = {'relu': 'ReLU', 'lrn': 'norm', 'pool': 'max pool', 'avg_pool': 'mean pool', 'spatial_norm': 'spatial norm'}
_COLUMN, _ROW = 1.5, 2.2  # inches, for figure 2
_PER_ROW = 16  # kernels or maps per row


def save(figure: Figure, folder: str | os.PathLike, name: str) -> list[str]:
    """Writes NAME.png and NAME.svg into a folder, which is created if needed. Returns the two paths.

    The files are reproducible byte for byte. Raises UserError if a file cannot be written.
    """
    folder = os.fspath(folder)
    paths = [os.path.join(folder, f'{name}.{kind}') for kind in ('png', 'svg')]
    with (
        as_user_error(f'{folder!r} cannot be written'),
        matplotlib.rc_context({'svg.hashsalt': 'alexnet_jax'}),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter('always')
        os.makedirs(folder, exist_ok=True)
        figure.savefig(paths[0], dpi=150, metadata={'Software': None})
        figure.savefig(paths[1], dpi=150, metadata={'Date': None})
    missing = set()
    for warning in caught:
        if found := re.match(r'Glyph (\d+) .* missing from', str(warning.message)):
            missing.add(chr(int(found[1])))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if missing:
        text = "%s: characters that the font lacks are boxes: %s; add a font that has them to matplotlib's font.family."
        logging.warning(text, paths[0], ' '.join(sorted(missing)[:10]))
    return paths


def architecture(rows: Sequence, image_size: int) -> Figure:
    """Draws the network like figure 2: one row of boxes per tower, with lines from the boxes they read.

    rows: from `figures.architecture`. image_size: side of the input in pixels.
    """
    towers = len(rows[0].maps)
    width, height = _COLUMN * (len(rows) + 1), _ROW * towers + 1.5
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))  # in inches
    axes.set_axis_off()
    levels = [0.75 + _ROW * (towers - 0.5 - tower) for tower in range(towers)]
    widest = max((row.maps[0] for row in rows if row.size), default=1)
    longest = max(row.maps[0] for row in rows if not row.size)

    def side(size):  # an exponent below 1 keeps the small upper layers visible
        return 1.25 * (size / image_size) ** 0.45

    def box(row, tower, x):
        maps = row.maps[tower]
        if row.size is None:
            return _block(axes, x, levels[tower], 0.12, max(0.25, 1.5 * (maps / longest) ** 0.4), GREEN, f'{maps:,}', 0)
        color = ORANGE if row.name.startswith('local') else SKY
        label = f'{row.size}\u00d7{row.size}\n{maps} maps'
        return _block(axes, x, levels[tower], 0.07 + 0.36 * (maps / widest) ** 0.5, side(row.size), color, label, 1)

    label = f'{image_size}\u00d7{image_size}\n3 colors'
    below = [_block(axes, _COLUMN / 2, float(np.mean(levels)), 0.1, side(image_size), SKY, label, 1)]
    axes.text(_COLUMN / 2, height - 0.15, 'image', ha='center', va='top', weight='bold', fontsize=9)
    for column, row in enumerate(rows, 1):
        x = _COLUMN * (column + 0.5)
        _heading(axes, row, x, height)
        boxes = [box(row, tower, x) for tower in range(towers)]
        for tower, sources in enumerate(row.reads):
            for source in sources or (0,):
                _connect(axes, below[source], boxes[tower], row, (source - tower) if sources else 0)
        below = boxes
    if towers > 1:
        styles: tuple[tuple[str, str, Any], ...] = (('own tower', BLACK, '-'), ('the other tower', VERMILION, '--'))
        lines = [Line2D([], [], color=color, linestyle=style, label=f'reads {name}') for name, color, style in styles]
        axes.legend(handles=lines, loc='lower left', fontsize=8, frameon=False)
    return figure


def _heading(axes: Axes, row, x: float, height: float) -> None:
    """Writes name, kernels and operations above a column, neurons and parameters below it."""
    lines = ['dense']
    if row.kernel:
        side, depth = row.kernel
        lines = [f'{side}\u00d7{side}\u00d7{depth}, stride {row.stride}']
    if row.groups > 1:
        lines.append(f'{row.groups} groups')
    lines += textwrap.wrap(', '.join(_OP_NAMES.get(op, op) for op in row.post.split()), 20)
    axes.text(x, height - 0.15, row.name, ha='center', va='top', weight='bold', fontsize=9)
    axes.text(x, height - 0.33, '\n'.join(lines), ha='center', va='top', fontsize=7.5, linespacing=1.25)
    below = f'{row.neurons:,} neurons\n{row.parameters:,} parameters'
    axes.text(x, 0.62, below, ha='center', va='top', fontsize=7, color='#444444')


def _block(axes: Axes, x, y, width, height, color, label, depth) -> Bbox:
    """Draws a box centered at (x, y), with top and right faces if depth is 1. Returns its front face."""
    shift = np.array((0.3, 0.22)) * height * depth
    left, right = x - (width + shift[0]) / 2, x + (width - shift[0]) / 2
    low, high = y - height / 2, y + height / 2
    front = np.array([(left, low), (right, low), (right, high), (left, high)])
    top, side = front[[3, 2, 2, 3]], front[[1, 1, 2, 2]]
    top[2:] += shift
    side[1:3] += shift
    for face, alpha in ((front, 0.75), (top, 0.35), (side, 0.5)) if depth else ((front, 0.75),):
        axes.add_patch(Polygon(face, facecolor='white', edgecolor='none', zorder=2))
        axes.add_patch(Polygon(face, facecolor=(color, alpha), edgecolor=BLACK, linewidth=0.7, zorder=3))
    axes.text((left + right) / 2, low - 0.04, label, ha='center', va='top', fontsize=7.5, zorder=6)
    return Bbox.from_extents(left, low, right, high)


def _connect(axes: Axes, source: Bbox, target: Bbox, row, across: int) -> None:
    """Draws lines from the kernel window in the source box to the target box.

    across: 0 if both are in the same tower, 1 if the source tower is drawn below the target tower, -1 if above.
    """
    color, linestyle = (VERMILION, '--') if across else (BLACK, '-')
    style: dict[str, Any] = {'color': color, 'linestyle': linestyle, 'linewidth': 0.8}
    y = np.mean(source.intervaly)
    end = np.mean(target.intervaly) - 0.12 * across  # separate from the line from the target's own tower
    if not row.kernel:
        axes.plot([source.x1, target.x0], [y, end], **style, zorder=4)
        return
    side = max(0.08, source.height * min(1.0, row.kernel[0] / row.read_size))
    width = min(0.6 * source.width, side)
    corner = (source.x1 - width, y - side / 2)
    axes.add_patch(Rectangle(corner, width, side, facecolor='white', edgecolor=BLACK, linewidth=0.7, zorder=4))
    for start in (y - side / 2, y + side / 2):
        axes.plot([source.x1, target.x0], [start, end], **style, zorder=5)


def kernels(towers: Sequence[np.ndarray], shares: Sequence[float] | None = None) -> Figure:
    """Draws the kernels of the first layer like figure 3: 16 per row, one pixel apart, one panel per tower.

    towers: from `figures.kernel_pictures`. shares: mean `figures.color_share` of each tower, for the titles.
    """
    sheets = [_sheet(pictures) for pictures in towers]
    inches = 8 / sheets[0].shape[1]
    figure = Figure(figsize=(8.4, sum(len(sheet) * inches + 0.45 for sheet in sheets)), layout='constrained')
    panels = figure.subplots(len(sheets), 1, squeeze=False)[:, 0]
    for tower, (axes, sheet) in enumerate(zip(panels, sheets, strict=True)):
        axes.imshow(sheet, interpolation='nearest')
        axes.set_axis_off()
        title = f'tower {tower}' if len(sheets) > 1 else f'{len(towers[0])} kernels'
        axes.set_title(title + (f': mean color share {shares[tower]:.2f}' if shares else ''), fontsize=9, loc='left')
    return figure


def maps(x_HWC: np.ndarray) -> Figure:
    """Draws the feature maps of an image, such as `activations(...)['conv3'][0]`: 16 per row, each scaled to [0, 1]."""
    low, high = x_HWC.min((0, 1)), x_HWC.max((0, 1))
    gray = np.moveaxis((x_HWC - low) / np.maximum(high - low, 1e-12), -1, 0)
    figure = Figure(figsize=(8.4, 0.45 + 0.52 * math.ceil(len(gray) / _PER_ROW)), layout='constrained')
    axes = figure.subplots()
    axes.imshow(_sheet(np.repeat(gray[..., None], 3, axis=-1)), interpolation='nearest')
    axes.set_axis_off()
    axes.set_title(f'{len(gray)} maps of {x_HWC.shape[0]}x{x_HWC.shape[1]}', fontsize=9, loc='left')
    return figure


def _sheet(pictures: np.ndarray) -> np.ndarray:
    """Tiles images [O, H, W, 3] on white, one pixel apart."""
    count, height, width, _ = pictures.shape
    tiles = np.pad(pictures, ((0, -count % _PER_ROW), (1, 0), (1, 0), (0, 0)), constant_values=1)
    rows = tiles.reshape(-1, _PER_ROW, height + 1, width + 1, 3).swapaxes(1, 2)
    sheet = rows.reshape(-1, _PER_ROW * (width + 1), 3)
    return np.pad(sheet, ((0, 1), (0, 1), (0, 0)), constant_values=1)


def predictions(images, labels: Sequence) -> Figure:
    """Draws images with bars for the probabilities of their most probable labels (figure 4, left).

    The bar of the true label is orange and hatched. images: uint8 [N, s, s, 3]. labels: from `figures.predictions`.
    """
    columns = min(4, len(images))
    rows, top = -(-len(images) // columns), len(labels[0].names)
    figure = Figure(figsize=(2.2 * columns, rows * (2.25 + 0.2 * top)), layout='constrained')
    panels = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[2, 0.2 * top] * rows)
    for axes in panels.flat:
        axes.set_axis_off()
    for i, (image, prediction) in enumerate(zip(images, labels, strict=True)):
        picture, bars = panels[2 * (i // columns) : 2 * (i // columns) + 2, i % columns]
        picture.imshow(image)
        picture.set_title(_short(prediction.true), fontsize=9, weight='bold')
        bars.set(xlim=(0, 1), ylim=(top - 0.5, -0.5), yticks=[], xticks=[0, 0.5, 1])
        bars.set_axis_on()
        bars.tick_params(labelsize=6)
        for place, (name, probability) in enumerate(zip(prediction.names, prediction.probabilities, strict=True)):
            color, hatch, weight = (ORANGE, '//', 'bold') if place == prediction.place else (SKY, None, None)
            bars.barh(place, probability, 0.85, color=color, hatch=hatch, edgecolor='white', linewidth=0)
            bars.text(0.02, place, _short(name), va='center', fontsize=7.5, weight=weight)
    return figure


def _short(name: str, most: int = 24) -> str:
    """Returns the first synonym of a class name, shortened to `most` characters."""
    name = name.split(',')[0]
    name = name if len(name) <= most else f'{name[: most - 1]}…'
    return name.replace('$', r'\$')  # two of them would be a formula


def neighbors(queries, near, names: Sequence[str], near_names: Sequence[Sequence[str]]) -> Figure:
    """Draws each query image with its nearest training images to its right (figure 4, right).

    queries: uint8 [Q, s, s, 3]. near: for each query, uint8 [n, s, s, 3]. names, near_names: their class names.
    """
    count = len(near[0])
    figure = Figure(figsize=(1.2 * (count + 1.25), 1.4 * len(queries) + 0.1), layout='constrained')
    panels = figure.subplots(len(queries), count + 2, squeeze=False, width_ratios=[1, 0.15] + [1] * count)
    for row, (query, others) in enumerate(zip(queries, near, strict=True)):
        pictures = [(query, names[row]), None, *zip(others, near_names[row], strict=True)]
        for column, (axes, picture) in enumerate(zip(panels[row], pictures, strict=True)):
            axes.set_axis_off()
            if picture:
                axes.imshow(picture[0])
                axes.set_title(_short(picture[1], 16), fontsize=8, weight='bold' if column == 0 else None)
    return figure


def confusion(matrix: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draws a confusion matrix as fractions of the true class. Up to 30 classes are labeled."""
    count = len(matrix)
    side = max(4.5, min(9.0, 0.32 * count + 1.5))
    figure = Figure(figsize=(side + 1, side), layout='constrained')
    axes = figure.subplots()
    # The color scale is the square root of the fraction, so that rare errors are visible.
    image = axes.imshow(matrix / np.maximum(matrix.sum(1, keepdims=True), 1), cmap='cividis', norm=PowerNorm(0.5, 0, 1))
    figure.colorbar(image, label='fraction of the true class', shrink=0.8)
    axes.set(xlabel='predicted class', ylabel='true class')
    if count <= 30:
        names = [_short(name, 18) for name in class_names]
        axes.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 3 else 0, fontsize=8)
        axes.set_yticks(range(count), names, fontsize=8)
    if count <= 20:
        for (row, column), number in np.ndenumerate(matrix):
            if number:
                color = 'black' if number > 0.35 * matrix[row].sum() else 'white'
                axes.text(column, row, number, ha='center', va='center', fontsize=7, color=color)
    return figure


def learning_curves(
    curves: Mapping[str, tuple | list[tuple]],
    *,
    threshold: float | None = None,
    y_label: str = 'Training error rate',
    log_scale: bool = False,
) -> Figure:
    """Draws learning curves like figure 1: the first solid, the second dashed, a horizontal line at `threshold`.

    curves: {name: (x, y)}, or {name: list of (x, y), one per seed}, drawn with thin lines.
    """
    many = len(curves) > len(_LINES)
    lines = MANY_LINES if many else _LINES
    figure = Figure(figsize=(7.5 if many else 5, 3.8), layout='constrained')
    axes = figure.subplots()
    for i, (name, values) in enumerate(curves.items()):
        color, style = lines[i % len(lines)]
        seeds = values if isinstance(values, list) else [values]
        width = 1.8 if len(seeds) == 1 else 0.8
        for j, (x, y) in enumerate(seeds):
            axes.plot(x, y, color=color, linestyle=style, linewidth=width, label=None if j else name)
    if threshold is not None:
        axes.axhline(threshold, color='#666666', linewidth=0.6)
    axes.set(xlabel='Epochs', ylabel=y_label, xlim=(0, None))
    if log_scale:
        axes.set(yscale='log')
        axes.yaxis.set_major_formatter('{x:g}')  # without mathematical fonts
        axes.yaxis.set_minor_formatter(lambda *_: '')
    else:
        axes.set(ylim=(0, None))
    axes.spines[['top', 'right']].set_visible(False)
    if many:
        axes.legend(frameon=False, fontsize=7, loc='upper left', bbox_to_anchor=(1, 1))
    elif curves:
        axes.legend(frameon=False)
    return figure


def effects(changes: Mapping[str, Sequence[float]]) -> Figure:
    """Draws differences from a baseline, one row per variant: each seed, their mean and standard deviation.

    changes: {variant: differences in percentage points, one for each seed}. Variants without any are left out.
    """
    rows = {name: np.asarray(values) for name, values in changes.items() if len(values)}
    figure = Figure(figsize=(6, 0.8 + 0.3 * len(rows)), layout='constrained')
    axes = figure.subplots()
    for place, values in enumerate(rows.values()):
        spread = values.std(ddof=1) if len(values) > 1 else 0.0
        axes.errorbar(values.mean(), place, xerr=spread, fmt='s', color=BLUE, capsize=3, markersize=5)
        axes.plot(values, np.full(len(values), place), 'o', color=ORANGE, markersize=3)
    axes.axvline(0, color=BLACK, linewidth=0.6)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.set(xlabel='Difference from the baseline (percentage points)', ylim=(len(rows) - 0.5, -0.5))
    axes.spines[['top', 'right']].set_visible(False)
    return figure
