"""What the paper's figures show, as arrays; plots.py draws it."""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.core import augment, sharding
from alexnet_jax.core.architecture import ConvSpec, infer_shapes
from alexnet_jax.core.model import AlexNet
from alexnet_jax.data import pipeline
from alexnet_jax.data.datasets import Dataset
from alexnet_jax.inference import activations, predict
from alexnet_jax.inference.evaluate import Evaluator
from alexnet_jax.utils.errors import UserError

Drawn = tuple[str, Any, list[str]]  # name, matplotlib's Figure, lines to print
_LEFT, _RIGHT = 8, 5  # images in the two panels of figure 4


class LayerFigure(NamedTuple):
    """A layer as figure 2 shows it."""

    name: str
    maps: tuple[int, ...]  # maps or units, of each tower
    groups: int
    reads: tuple[tuple[int, ...], ...]  # for each tower: the towers below that it reads; (): the image
    post: str  # operations that follow
    neurons: int
    parameters: int
    size: int | None = None  # side of its maps, before what follows; None: a fully-connected layer
    kernel: tuple[int, int] | None = None  # side and depth of a kernel; None: fully connected
    stride: int | None = None
    read_size: int | None = None  # side of the maps it reads; None: it reads units, or all of the maps at once


class Prediction(NamedTuple):
    """The best labels of an image."""

    true: str
    names: tuple[str, ...]  # the most probable first
    probabilities: tuple[float, ...]
    place: int | None  # of the true label among them


class Curve(NamedTuple):
    """Lines of one split in metrics.jsonl."""

    epoch: np.ndarray
    top1_error: np.ndarray  # percent
    loss: np.ndarray  # nats


def architecture(network: AlexNet, image_size: int, towers: int) -> list[LayerFigure]:
    """What figure 2 shows of every layer, conv1 ... fc8.

    A layer with one group whose input is split reads both towers, any other its own; both see the image.

    image_size: side of the input, pixels. towers: 1 or 2; raises UserError where the network cannot be split so.
    """
    layers: list[LayerFigure] = []
    for name, sizes in infer_shapes(network, image_size, towers).items():
        row = network.layers[name]
        own = [(tower,) if row.groups > 1 else tuple(range(towers)) for tower in range(towers)]
        # Of an odd number of classes the first tower has one more.
        maps = tuple((row.features + towers - 1 - tower) // towers for tower in range(towers))
        reads = tuple(own if layers else [()] * towers)
        figure = LayerFigure(name, maps, row.groups, reads, row.post, math.prod(sizes.linear), sizes.parameters)
        if isinstance(row, ConvSpec):
            kernel = (row.kernel, sizes.inputs[-1] // row.groups)
            figure = figure._replace(size=sizes.linear[0], kernel=kernel, stride=row.stride, read_size=sizes.inputs[0])
        layers.append(figure)
    return layers


def kernel_pictures(kernel_HWIO, towers: int) -> list[np.ndarray]:
    """The first layer's kernels as pictures (figure 3), tower by tower: float [O / towers, H, W, 3], 0 to 1.

    All are scaled together, by (x - min) / (max - min), as in the authors' `shownet.py`. kernel_HWIO: float
    [H, W, 3, O], RGB; the first half of O is tower 0. Raises UserError for another shape.
    """
    kernel = np.asarray(kernel_HWIO, np.float64)
    if kernel.ndim != 4 or kernel.shape[2] != 3:
        raise UserError(f'kernels of shape {kernel.shape} are no RGB pictures; expected (H, W, 3, O).')
    least, most = kernel.min(), kernel.max()
    scaled = (kernel - least) / (most - least or 1)
    return np.split(scaled.transpose(3, 0, 1, 2), towers)


def color_share(kernel_HWIO) -> np.ndarray:
    """How colored each kernel is: the share of its energy that is not gray, float [O], 0 to 1.

    With m the mean of a kernel k [H, W, 3] over R, G and B at each place, the gray part of k is m in all channels, and
    the share is 1 - 3 |m|^2 / |k|^2. 0: a gray kernel; 2/3 on average: random Gaussian numbers; 1: no gray part, as
    where two channels oppose each other. Of a kernel that is zero it is 0.
    """
    kernel = np.asarray(kernel_HWIO, np.float64)
    energy = (kernel**2).sum((0, 1, 2))
    gray = 3 * (kernel.mean(2) ** 2).sum((0, 1))
    share = 1 - np.divide(gray, energy, out=np.ones_like(energy), where=energy > 0)
    return np.clip(share, 0, 1)  # rounding


def predictions(checkpoint: Checkpoint, images, labels: Sequence[int], top: int = 5) -> list[Prediction]:
    """The best labels of records, uint8 [N, S, S, 3], from the center crop (figure 4, left); labels: the true ones."""
    results, classes = [], checkpoint.class_names
    outputs = predict.predict(checkpoint, images, views=1)
    for probabilities, label, order in zip(outputs, labels, predict.top_k(outputs, top).tolist(), strict=True):
        names, place = tuple(classes[i] for i in order), order.index(label) if label in order else None
        results.append(Prediction(classes[label], names, tuple(probabilities[order].tolist()), place))
    return results


def nearest(query_ND, base: Iterable, count: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of many vectors to each query, by Euclidean distance in float64 (figure 4, right).

    Exact: the authors' search took the nearest of each file of training images, at most. Ties go to the lower index.

    query_ND: float [N, ...], each query taken as one vector. base: batches [n, ...] in order, of which one at a time is
    held. Returns (indices int [N, count], distances float64 [N, count]), the nearest first; or as many as there are.
    """
    query = np.asarray(query_ND, np.float64).reshape(len(query_ND), -1)
    best, squares, start = np.zeros((len(query), 0), int), np.zeros((len(query), 0)), 0
    for part in base:
        part = np.asarray(part, np.float64).reshape(len(part), -1)
        # Differences, not products: |a|^2 - 2ab + |b|^2 would lose the small distances and break the ties.
        new = np.stack([((part - q[None]) ** 2).sum(1) for q in query])
        indices = np.broadcast_to(np.arange(start, start + len(part)), new.shape)
        best, squares = np.concatenate([best, indices], 1), np.concatenate([squares, new], 1)
        order = np.argsort(squares, axis=1, kind='stable')[:, :count]
        best, squares = np.take_along_axis(best, order, 1), np.take_along_axis(squares, order, 1)
        start += len(part)
    return best, np.sqrt(squares)


def confusion(labels, predicted, classes: int) -> np.ndarray:
    """How often each true class (rows) was taken for each class (columns): int [K, K]; labels, predicted: int [N]."""
    pairs = np.ravel_multi_index((labels, predicted), (classes, classes))
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def most_confused(matrix, class_names: Sequence[str], count: int = 10) -> list[tuple[str, str, int, float]]:
    """The most frequent errors: (true class, what it was taken for, how often, share of the true class's images)."""
    wrong = np.array(matrix)
    np.fill_diagonal(wrong, 0)
    rows = []
    for place in np.argsort(-wrong, axis=None, kind='stable')[:count]:
        true, taken = divmod(int(place), len(wrong))
        if number := int(wrong[true, taken]):
            rows.append((class_names[true], class_names[taken], number, number / int(np.sum(matrix[true]))))
    return rows


def curves(workdir: str) -> dict[str, Curve]:
    """The 'train' and 'val' lines of a run's metrics.jsonl, even of one under way; UserError where there is none."""
    path = pathlib.Path(workdir, 'metrics.jsonl')
    if not path.is_file():
        expected = 'the workdir of a run (of a checkpoint alone: --checkpoint=PATH)'
        raise UserError(f'there is no {str(path)!r}; expected {expected}.')
    rows_of: dict[str, list] = {'train': [], 'val': []}
    for text in path.read_text(encoding='utf-8', errors='replace').splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # torn by a kill, or not yet whole
            line = json.loads(text)
            rows_of[line['split']].append([line[key] for key in Curve._fields])
    return {split: Curve(*np.array(rows, float).reshape(-1, 3).T) for split, rows in rows_of.items()}


def towers_of(network: AlexNet, image_size: int) -> int:
    """2 where a network can be split over two towers, else 1."""
    try:
        infer_shapes(network, image_size, towers=2)
    except UserError:
        return 1
    return 2


def draw(
    checkpoint: Checkpoint,
    *,
    run: str | os.PathLike | None = None,
    dataset: Dataset | None = None,
    split: str = 'val',
    seed: int = 0,
) -> Iterator[Drawn]:
    """Every figure there is of a network, one after the other: (name, matplotlib's Figure, what to print with it).

    run: a workdir, for its curves. dataset, split: for the figures that show images; seed: which ones.
    """
    from alexnet_jax.experiments import plots  # matplotlib is an extra

    if run:
        shown = {part: curve for part, curve in curves(os.fspath(run)).items() if len(curve.epoch)}
        for name, field, label in (('error', 'top1_error', 'Top-1 error (%)'), ('loss', 'loss', 'Loss (nats)')):
            drawn = {part: (curve.epoch, getattr(curve, field)) for part, curve in shown.items()}
            yield name, plots.learning_curves(drawn, y_label=label), []
    network, size = checkpoint.network, checkpoint.image_size
    towers = towers_of(network, size)
    yield 'architecture', plots.architecture(architecture(network, size, towers), size), []
    first, row = next(iter(network.layers.items()))
    kernel = checkpoint.params[first]['kernel']
    if type(row) is ConvSpec and row.groups == 1:
        shares = np.split(color_share(kernel), towers)
        lines: list[str] = []
        for tower, share in enumerate(shares):
            above = f'{np.sum(share > 0.5)} of {len(share)} kernels ({100 * np.mean(share > 0.5):.0f}%) above 1/2'
            lines.append(f'{first}, tower {tower}: mean color share {share.mean():.3f}, {above}')
        yield 'kernels', plots.kernels(kernel_pictures(kernel, towers), [share.mean() for share in shares]), lines
    else:
        logging.info('%s has no kernels that see three colors at once: no figure of them.', first)
    if dataset:
        yield from _of_images(checkpoint, dataset, split, seed)


def _of_images(checkpoint: Checkpoint, dataset: Dataset, split: str, seed: int) -> Iterator[Drawn]:
    from alexnet_jax.experiments import plots  # matplotlib is an extra

    source, classes = dataset.split(split), checkpoint.class_names
    order = np.random.default_rng(seed).permutation(len(source))

    def crops(images):
        return augment.center_crop(images, checkpoint.image_size)  # what the network sees

    images, labels = pipeline.decode_some(source, order[:_LEFT], checkpoint.record_size)
    yield 'predictions', plots.predictions(crops(images), predictions(checkpoint, images, labels)), []

    outputs, all_labels = Evaluator(checkpoint, sharding.make_mesh(data=0, tower=1)).probabilities(source)
    matrix = confusion(all_labels, outputs.argmax(1), len(classes))
    lines = [f'{split}: {matrix.trace()} of {len(all_labels)} images right (center crop); most confused:']
    for true, taken, number, share in most_confused(matrix, classes):
        lines.append(f'  {true} taken for {taken}: {number} ({100 * share:.1f}% of {true})')
    yield 'confusion', plots.confusion(matrix, classes), lines

    if 'train' not in dataset.splits:
        logging.info('these data have no train split: no figure of nearest training images.')
        return
    # The last hidden layer; where there is none, the layer before the classifier; of a classifier alone, itself.
    layer = list(checkpoint.network.layers)[-2:][0]
    train = dataset.split('train')
    right = order[_LEFT:][:_RIGHT] if len(order) > _LEFT else order[:_RIGHT]
    images, labels = pipeline.decode_some(source, right, checkpoint.record_size)
    query = activations.activations(checkpoint, images, layer)[layer]
    indices, _ = nearest(query, (part for part, _ in activations.iter_activations(checkpoint, train, layer)), count=7)
    own = right if split == 'train' else [-1] * len(right)  # no image is a neighbor of itself
    rows = [row[row != i][:6] for row, i in zip(indices, own, strict=True)]
    pictures = [pipeline.decode_some(train, row, checkpoint.record_size) for row in rows]
    names = [classes[label] for label in labels]
    near_names = [[classes[label] for label in row] for _, row in pictures]
    figure = plots.neighbors(crops(images), [crops(near) for near, _ in pictures], names, near_names)
    same = sum(row.count(label) for label, (_, row) in zip(labels, pictures, strict=True))
    line = f'nearest training images in {layer}: {same} of {sum(map(len, rows))} have the class of their {split} image'
    yield 'neighbors', figure, [line]
