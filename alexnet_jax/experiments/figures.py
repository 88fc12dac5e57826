"""Computes the data of the paper's figures, which plots.py draws."""

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
from alexnet_jax.inference import activations, class_map, predict
from alexnet_jax.inference.evaluate import Evaluator
from alexnet_jax.training.published_curves import CURVES
from alexnet_jax.utils.errors import UserError

Drawn = tuple[str, Any, list[str]]  # name, matplotlib Figure, lines to print
_LEFT, _RIGHT = 8, 5  # images in the left and the right panel of figure 4


class LayerFigure(NamedTuple):
    """One layer of figure 2."""

    name: str
    maps: tuple[int, ...]  # feature maps or units of each tower
    groups: int
    reads: tuple[tuple[int, ...], ...]  # for each tower, the towers whose outputs it reads; (): the image
    post: str  # operations after the linear operation
    neurons: int
    parameters: int
    size: int | None = None  # side of its maps before `post`; None: fully connected
    kernel: tuple[int, int] | None = None  # side and depth of a kernel; None: fully connected
    stride: int | None = None
    read_size: int | None = None  # side of its input maps; None: fully connected


class Prediction(NamedTuple):
    """The most probable labels of an image."""

    true: str
    names: tuple[str, ...]  # most probable first
    probabilities: tuple[float, ...]
    place: int | None  # index of the true label in `names`; None: not among them


class Curve(NamedTuple):
    """The lines of one split in metrics.jsonl."""

    epoch: np.ndarray
    top1_error: np.ndarray  # percent
    loss: np.ndarray  # nats


def architecture(network: AlexNet, image_size: int, towers: int) -> list[LayerFigure]:
    """Returns the data of figure 2 for every layer, conv1 ... fc8.

    With two towers, a layer with one group reads both towers, and a layer with groups only its own tower. Both towers
    read the image.

    image_size: side of the input in pixels. towers: 1 or 2. Raises UserError if the network cannot be split.
    """
    layers: list[LayerFigure] = []
    for name, sizes in infer_shapes(network, image_size, towers).items():
        spec = network.layers[name]
        # If the number of classes is odd, the first tower has one more.
        maps = tuple((spec.features + towers - 1 - tower) // towers for tower in range(towers))
        sources = [(tower,) if spec.groups > 1 else tuple(range(towers)) for tower in range(towers)]
        reads = tuple(sources if layers else [()] * towers)
        layer = LayerFigure(name, maps, spec.groups, reads, spec.post, math.prod(sizes.linear), sizes.parameters)
        if isinstance(spec, ConvSpec):
            kernel = (spec.kernel, sizes.inputs[-1] // spec.groups)
            layer = layer._replace(size=sizes.linear[0], kernel=kernel, stride=spec.stride, read_size=sizes.inputs[0])
        layers.append(layer)
    return layers


def kernel_pictures(kernel_HWIO, towers: int) -> list[np.ndarray]:
    """Returns the first layer's kernels as images (figure 3), one array per tower: float [O / towers, H, W, 3], 0 to 1.

    All kernels share one scale, (x - min) / (max - min), as in the authors' `shownet.py`. kernel_HWIO: float [H, W, 3,
    O], RGB; the first half of O belongs to tower 0. Raises UserError for another shape.
    """
    kernel = np.asarray(kernel_HWIO, np.float64)
    if kernel.ndim != 4 or kernel.shape[2] != 3:
        raise UserError(f'kernels of shape {kernel.shape} are not RGB; expected (H, W, 3, O).')
    scaled = (kernel - kernel.min()) / (np.ptp(kernel) or 1)
    return np.split(scaled.transpose(3, 0, 1, 2), towers)


def color_share(kernel_HWIO) -> np.ndarray:
    """Returns the share of each kernel's energy that is not gray: float [O], 0 to 1.

    Let k [H, W, 3] be a kernel and m [H, W] its mean over R, G and B. The gray part of k has m in every channel, so the
    share is 1 - 3 |m|^2 / |k|^2. It is 0 for gray kernels and kernels of zeros, 2/3 on average for Gaussian noise, and
    1 if the channels sum to zero everywhere (opponent colors).

    A gray kernel, one of opponent colors, and a red one, of one pixel each:

    >>> print(color_share(np.array([[1, 1, 1], [1, -1, 0], [1, 0, 0]]).T.reshape(1, 1, 3, 3)).round(2))
    [0.   1.   0.67]
    """
    kernel = np.asarray(kernel_HWIO, np.float64)
    energy = (kernel**2).sum((0, 1, 2))
    gray = 3 * (kernel.mean(2) ** 2).sum((0, 1))
    share = 1 - np.divide(gray, energy, out=np.ones_like(energy), where=energy > 0)
    return np.clip(share, 0, 1)  # removes rounding errors


def predictions(checkpoint: Checkpoint, images, labels: Sequence[int], top: int = 5) -> list[Prediction]:
    """Returns the `top` most probable labels of each image from its center crop (figure 4, left).

    images: records, uint8 [N, S, S, 3]. labels: true classes, int [N].
    """
    results, classes = [], checkpoint.class_names
    outputs = predict.predict(checkpoint, images, views=1)
    for probabilities, label, order in zip(outputs, labels, predict.top_k(outputs, top).tolist(), strict=True):
        names = tuple(classes[i] for i in order)
        rank = order.index(label) if label in order else None
        results.append(Prediction(classes[label], names, tuple(probabilities[order].tolist()), rank))
    return results


def nearest(query_ND, base: Iterable, count: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nearest base vectors of each query by Euclidean distance in float64 (figure 4, right).

    The search is exact. (The authors' search took at most one image per training file.) Ties go to the lower index.

    query_ND: float [N, ...]; queries are flattened. base: batches [n, ...]; one is in memory at a time.
    Returns (indices int [N, count], distances float64 [N, count]), nearest first; fewer if the base has fewer vectors.
    """
    query = np.asarray(query_ND, np.float64).reshape(len(query_ND), -1)
    best, squares, start = np.zeros((len(query), 0), int), np.zeros((len(query), 0)), 0
    for batch in base:
        batch = np.asarray(batch, np.float64).reshape(len(batch), -1)
        # |a|^2 - 2ab + |b|^2 would lose the precision of small distances and ties.
        new = np.stack([((batch - vector) ** 2).sum(1) for vector in query])
        indices = np.broadcast_to(np.arange(start, start + len(batch)), new.shape)
        best, squares = np.concatenate([best, indices], 1), np.concatenate([squares, new], 1)
        order = np.argsort(squares, axis=1, kind='stable')[:, :count]
        best, squares = np.take_along_axis(best, order, 1), np.take_along_axis(squares, order, 1)
        start += len(batch)
    return best, np.sqrt(squares)


def confusion(labels, predicted, classes: int) -> np.ndarray:
    """Returns the confusion matrix int [K, K] of int [N]: rows are true classes, columns predicted classes.

    >>> confusion(labels=[0, 0, 1], predicted=[0, 1, 1], classes=2)
    array([[1, 1],
           [0, 1]])
    """
    pairs = np.ravel_multi_index((labels, predicted), (classes, classes))
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def merge_others(matrix, shown: Sequence[int]) -> np.ndarray:
    """Returns the confusion matrix of the classes `shown`; its last row and column stand for all others."""
    index = np.full(len(matrix), len(shown))
    index[list(shown)] = np.arange(len(shown))
    merged = np.zeros((len(shown) + 1,) * 2, int)
    np.add.at(merged, (index[:, None], index), matrix)
    return merged


def most_confused(matrix, class_names: Sequence[str], count: int = 10) -> list[tuple[str, str, int, float]]:
    """Returns the most frequent errors: (true class, predicted class, number, share of the true class)."""
    wrong = np.array(matrix)
    np.fill_diagonal(wrong, 0)
    rows = []
    for index in np.argsort(-wrong, axis=None, kind='stable')[:count]:
        true, predicted = divmod(int(index), len(wrong))
        if number := int(wrong[true, predicted]):
            rows.append((class_names[true], class_names[predicted], number, number / int(np.sum(matrix[true]))))
    return rows


def curves(workdir: str | os.PathLike) -> dict[str, Curve]:
    """Returns the 'train' and 'val' curves of a run, finished or not. Raises UserError without metrics.jsonl."""
    rows_of: dict[str, list] = {'train': [], 'val': []}
    for line in log_lines(workdir):
        with contextlib.suppress(KeyError):
            rows_of[line['split']].append([line[key] for key in Curve._fields])
    return {split: Curve(*np.array(rows, float).reshape(-1, 3).T) for split, rows in rows_of.items()}


def norms(workdir: str | os.PathLike, kind: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns {layer: (epochs, norms)} of a run. kind: 'gradient_norms', or 'update_norms', those of the updates.

    A norm is that of a layer's weights and biases together, in the last update of a log line.
    """
    rows = [(line['epoch'], line[kind]) for line in log_lines(workdir) if kind in line]
    epochs = np.array([epoch for epoch, _ in rows])
    return {layer: (epochs, np.array([row[layer] for _, row in rows])) for layer in (rows[0][1] if rows else ())}


def log_lines(workdir: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Yields the lines of metrics.jsonl. Raises UserError if there is no such file."""
    path = pathlib.Path(workdir, 'metrics.jsonl')
    if not path.is_file():
        raise UserError(f'{str(path)!r} does not exist; use the workdir of a run, or --checkpoint instead of --run.')
    for text in path.read_text(encoding='utf-8', errors='replace').splitlines():
        with contextlib.suppress(ValueError, RecursionError):  # an incomplete line
            if isinstance(line := json.loads(text), dict):
                yield line


def towers_of(network: AlexNet, image_size: int) -> int:
    """Returns 2 if the network can be split into two towers, otherwise 1."""
    try:
        infer_shapes(network, image_size, towers=2)
    except UserError:
        return 1
    return 2


def match_dataset(checkpoint: Checkpoint, dataset: Dataset, split: str, path: str) -> tuple[Dataset, list[int] | None]:
    """Returns a dataset with labels of the network at `path`, and which of its classes the data have.

    The latter is None if the classes are the network's. Otherwise logs how they match and what is left out, see
    `class_map`. Raises UserError if the classes do not match, or if no image of the split has a class of the network.
    """
    classes = class_map.match_classes(dataset.class_names, checkpoint.class_names, path)
    if not classes.method:
        return dataset, None
    class_map.log_method(classes, path)
    splits = {
        name: class_map.relabel_split(dataset.splits[name], classes, name, path)[0]
        for name in dict.fromkeys((split, 'train'))
        if name in dataset.splits
    }
    if not len(splits[split]):
        raise UserError(f'no image of the {split} split has a class of {path}; use another --split.')
    splits = {name: records for name, records in splits.items() if len(records)}
    shown = sorted(classes.labels[classes.labels >= 0].tolist())
    return dataset._replace(splits=splits, class_names=checkpoint.class_names), shown


def draw(
    checkpoint: Checkpoint,
    *,
    run: str | os.PathLike | None = None,
    dataset: Dataset | None = None,
    split: str = 'val',
    shown: Sequence[int] | None = None,
    seed: int = 0,
    beside: str = '',
) -> Iterator[Drawn]:
    """Yields all figures of a network: (name, matplotlib Figure, lines to print).

    run: workdir of its run; draws the learning curves. dataset, split: images to show, with labels of the network;
    without a dataset, figures that show images are skipped. shown: classes in the confusion matrix, which merges all
    others; None: all. seed: random seed of the choice of images. beside: name of a published curve on ImageNet
    (`published_curves.CURVES`), drawn beside those of the run.
    """
    from alexnet_jax.experiments import picture_plots, plots  # matplotlib is an extra

    if run:
        of_split = {part: curve for part, curve in curves(run).items() if len(curve.epoch)}
        for name, field, label in (('error', 'top1_error', 'Top-1 error (%)'), ('loss', 'loss', 'Loss (nats)')):
            drawn = {part: (curve.epoch, getattr(curve, field)) for part, curve in of_split.items()}
            if beside and len(CURVES[beside].points(field)[0]):
                drawn[f'{beside}, val'] = CURVES[beside].points(field)
            yield name, plots.learning_curves(drawn, y_label=label), []
        for name, label in (('gradient_norms', 'Gradient norm'), ('update_norms', 'Update norm')):
            if of_layer := norms(run, name):
                yield name, plots.learning_curves(of_layer, y_label=label, log_scale=True), []
    network, size = checkpoint.network, checkpoint.image_size
    towers = towers_of(network, size)
    yield 'architecture', plots.architecture(architecture(network, size, towers), size), []
    first, spec = next(iter(network.layers.items()))
    kernel = checkpoint.params[first]['kernel']
    if type(spec) is ConvSpec and spec.groups == 1:
        shares = np.split(color_share(kernel), towers)
        lines: list[str] = []
        for tower, share in enumerate(shares):
            high = share > 0.5
            lines.append(
                f'{first}, tower {tower}: mean color share {share.mean():.3f}, {high.sum()} of {len(high)} kernels '
                f'({100 * high.mean():.0f}%) above 1/2'
            )
        yield 'kernels', plots.kernels(kernel_pictures(kernel, towers), [share.mean() for share in shares]), lines
    else:
        logging.info('No figure of kernels: %s is not a convolution over all three colors.', first)
    if dataset:
        yield from _image_figures(checkpoint, dataset, split, shown, seed)
        order = np.random.default_rng(seed).permutation(len(dataset.split(split)))
        yield from picture_plots.draw(checkpoint, dataset.split(split), order)


def _image_figures(
    checkpoint: Checkpoint, dataset: Dataset, split: str, shown: Sequence[int] | None, seed: int
) -> Iterator[Drawn]:
    from alexnet_jax.experiments import plots  # matplotlib is an extra

    source, classes = dataset.split(split), checkpoint.class_names
    order = np.random.default_rng(seed).permutation(len(source))

    def crops(images):
        return augment.center_crop(images, checkpoint.image_size)  # the network's input

    images, labels = pipeline.decode_some(source, order[:_LEFT], checkpoint.record_size)
    yield 'predictions', plots.predictions(crops(images), predictions(checkpoint, images, labels)), []

    outputs, all_labels = Evaluator(checkpoint, sharding.make_mesh(data=0, tower=1)).probabilities(source)
    matrix = confusion(all_labels, outputs.argmax(1), len(classes))
    lines = [f'{split}: {matrix.trace()} of {len(all_labels)} images correct (center crop); most frequent errors:']
    for true, predicted, number, share in most_confused(matrix, classes):
        lines.append(f'  {true} predicted as {predicted}: {number} ({100 * share:.1f}% of class {true})')
    if shown is None or len(shown) == len(classes):
        yield 'confusion', plots.confusion(matrix, classes), lines
    else:
        names = [*(classes[label] for label in shown), 'other classes']
        yield 'confusion', plots.confusion(merge_others(matrix, shown), names), lines

    if 'train' not in dataset.splits:
        logging.info('No figure of nearest training images: the dataset has no train split.')
        return
    # The layer before the classifier, or the classifier if it is the only layer.
    layer = list(checkpoint.network.layers)[-2:][0]
    train = dataset.split('train')
    queries = order[_LEFT:][:_RIGHT] if len(order) > _LEFT else order[:_RIGHT]
    images, labels = pipeline.decode_some(source, queries, checkpoint.record_size)
    vectors = activations.activations(checkpoint, images, layer)[layer]
    batches = (batch[layer] for batch in activations.iter_activations(checkpoint, train, layer))
    neighbors = []
    for query, indices in zip(queries, nearest(vectors, batches, count=7)[0], strict=True):
        if split == 'train':
            indices = indices[indices != query]  # exclude the image itself
        neighbors.append(pipeline.decode_some(train, indices[:6], checkpoint.record_size))
    names = [classes[label] for label in labels]
    near_names = [[classes[label] for label in row] for _, row in neighbors]
    figure = plots.neighbors(crops(images), [crops(near) for near, _ in neighbors], names, near_names)
    same = sum(row.count(label) for label, (_, row) in zip(labels, neighbors, strict=True))
    total = sum(len(row) for _, row in neighbors)
    line = f'nearest training images in {layer}: {same} of {total} have the class of their {split} image'
    yield 'neighbors', figure, [line]
