"""Finds the images of a split that excite units most, and the patches of them that these units see."""

import contextlib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from PIL import Image

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.core.augment import Augmentation, center_crop
from alexnet_jax.core.model import AlexNet
from alexnet_jax.data import pipeline
from alexnet_jax.inference.evaluate import Evaluator
from alexnet_jax.inference.image_source import ImageSource
from alexnet_jax.inference.predict import to_records
from alexnet_jax.inference.receptive_field import receptive_field
from alexnet_jax.utils.errors import UserError
from alexnet_jax.visualize import forward


class TopPatches(NamedTuple):
    """The images with the largest activations of U units, k for each, in descending order."""

    values: np.ndarray  # float32 [U, k], the activations
    indices: np.ndarray  # int [U, k], of the images
    positions: np.ndarray  # int [U, k, 2], (row, column) of the activation in the map; (0, 0) for a dense layer
    boxes: np.ndarray  # int [U, k, 4], (top, left, bottom, right) of the patches, pixels of the center crop
    patches: tuple[tuple[np.ndarray, ...], ...]  # U times k arrays, uint8 [bottom - top, right - left, 3]
    images: int  # that were read; warnings name the others


def top_patches(
    checkpoint: Checkpoint,
    records: Any,
    layer: str,
    units: Sequence[int] | int,
    count: int = 9,
    *,
    batch_size: int = 128,
) -> TopPatches:
    """Finds the images that excite units most, and crops them to what the units see.

    Each image counts once for a unit: at the largest activation of the map (the first one in row-major order, if
    several are equal). Images with equal activations are in the order of the split. A patch is the smallest box around
    the unit's receptive field, cut at the edges of the image. It is the whole center crop for a dense layer.

    One batch of images is in memory at a time, and the patches.

    Source: Zeiler and Fergus, "Visualizing and understanding convolutional networks", ECCV 2014, figure 2
    (arXiv:1311.2901), which shows nine patches for a unit.

    Args:
      checkpoint: from `alexnet_jax.load_checkpoint`.
      records: the records of a split, or images as for `alexnet_jax.predict`. Their center crops are used.
      layer: the name of an activation, as for `alexnet_jax.activations`.
      units: index of a feature map or of a unit of a dense layer, or several.
      count: number of images for each unit.
      batch_size: images per batch; it does not change the results.

    Returns:
      A `TopPatches`, with k = count, or the number of readable images if it is smaller.

    Raises:
      UserError: the layer is unknown, a unit is out of range, count is not positive, there are no images, images in
        memory cannot be read, or an operation's window is unknown (see `receptive_field`).
    """
    stop = forward.stop_after(checkpoint, layer)
    shape = forward.shape_after(checkpoint, stop)
    unit_U = [units] if isinstance(units, int | np.integer) else list(units)
    unit_U = [forward.check_index('unit', unit, shape[-1], f'the units of {layer}') for unit in unit_U]
    if not unit_U:
        raise UserError(f'units={units!r}: expected at least one unit of {layer}.')
    forward.check_count('count', count)
    field = receptive_field(checkpoint.network, layer)  # refuses a network before hours of work
    source = ImageSource(checkpoint, _as_records(checkpoint, records))
    values, indices, flat, images = _search(checkpoint, source, stop, unit_U, count, batch_size)
    positions = np.stack(np.divmod(flat, shape[1] if len(shape) == 3 else 1), axis=2)
    boxes = [[field.box(row, column, checkpoint.image_size) for row, column in unit] for unit in positions.tolist()]
    boxes_array = np.array(boxes, int).reshape(*values.shape, 4)
    return TopPatches(values, indices, positions, boxes_array, _cut(checkpoint, source, indices, boxes_array), images)


def _as_records(checkpoint: Checkpoint, records: Any) -> Any:
    """Returns the records of a split unchanged, and images as records."""
    listed = isinstance(records, list | tuple)
    if listed and len(records) and isinstance(records[0], Mapping):
        return records
    if listed or isinstance(records, str | os.PathLike | Image.Image | np.ndarray):
        return [{'image': image} for image in to_records(checkpoint, records)]
    return records


def _search(
    checkpoint: Checkpoint, source: ImageSource, stop: int, units: list[int], count: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Returns values, images and flat positions of the largest activations [U, k], and the number of images."""
    jitted, unit_U = _jit_maxima(checkpoint.network, checkpoint.augmentation, stop), np.array(units)
    best = np.zeros((len(units), 0), np.float32), np.zeros((len(units), 0), int), np.zeros((len(units), 0), int)
    images = 0

    def maxima(params, image_NHWC, image_stats):
        return jitted(params, image_NHWC, image_stats, unit_U)

    evaluator = Evaluator(checkpoint, batch_size=batch_size)
    with contextlib.closing(source.map(maxima, evaluator)) as batches:
        for (value_NU, flat_NU), index_N in batches:
            index_UN = np.tile(index_N.astype(int), (len(units), 1))
            best = _keep_largest(best, (value_NU.T, index_UN, flat_NU.T.astype(int)), count)
            images += len(index_N)
    return *best, images


def _keep_largest(best: tuple, new: tuple, count: int) -> tuple:
    """Merges two triples (values, indices, positions) of [U, n]: keeps the `count` largest values of each row.

    The first of equal values comes first.
    """
    arrays = [np.concatenate(pair, axis=1) for pair in zip(best, new, strict=True)]
    order = np.argsort(-arrays[0], axis=1, kind='stable')[:, :count]
    return tuple(np.take_along_axis(array, order, axis=1) for array in arrays)


@functools.lru_cache(maxsize=8)
def _jit_maxima(network: AlexNet, augmentation: Augmentation, stop: int) -> Callable:
    def maxima(params, image_NHWC, image_stats, unit_U):
        """Returns the maxima of the units' maps and their flat positions, [N, U]."""
        x = forward.network_input(network, augmentation, image_NHWC, image_stats)
        maps_NPU = jnp.take(forward.by_position(forward.run(network, params, x, 0, stop)), unit_U, axis=2)
        return maps_NPU.max(1).astype(jnp.float32), jnp.argmax(maps_NPU, axis=1)

    return forward.jit(maxima)


def _cut(checkpoint: Checkpoint, source: Sequence, indices: np.ndarray, boxes: np.ndarray) -> tuple[tuple, ...]:
    """Returns the patches: `boxes` [U, k, 4] of the images at `indices` [U, k]. Reads each image once."""
    patches: dict[tuple[int, int], np.ndarray] = {}
    for index in np.unique(indices):
        image_1HWC, _ = pipeline.decode_some(source, [index], checkpoint.record_size)
        (crop,) = center_crop(image_1HWC, checkpoint.image_size)
        for row, column in np.argwhere(indices == index).tolist():
            top, left, bottom, right = boxes[row, column]
            patches[row, column] = crop[top:bottom, left:right].copy()
    rows, columns = indices.shape
    return tuple(tuple(patches[row, column] for column in range(columns)) for row in range(rows))
