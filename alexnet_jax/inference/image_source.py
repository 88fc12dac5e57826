"""The images that activations are computed for, of any kind, as records with names and labels."""

import contextlib
import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.inference.evaluate import Evaluator
from alexnet_jax.inference.predict import Images, list_image_files, to_records, unreadable
from alexnet_jax.utils.errors import UnreadableError, UserError

_MAX_NAME = 4096  # of an image, bytes: an array of names takes the space of the longest for each


class ImageSource(Sequence):
    """The records of a split, or images as `predict` takes them, as records whose label is their index.

    It keeps the name and the label of each record that is read. Labels may be missing.
    """

    def __init__(self, checkpoint: Checkpoint, items: Sequence, labels: Sequence[int] | None = None):
        self._checkpoint, self._items = checkpoint, items
        self._errors: dict[int, str] = {}  # of images that are not records
        self.files = [str(i) for i in range(len(items))]  # an image without a name has its index
        self.labels = np.full(len(items), -1, '<i4')  # -1: none
        if labels is not None:
            self.labels[:] = labels
        self.readable = np.zeros(len(items), bool)  # set by `map`

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        item = self._items[index]
        if isinstance(item, Mapping):
            self.labels[index] = item.get('label', -1)
            if name := item.get('file_name'):
                self.files[index] = os.fsdecode(name[:_MAX_NAME])
            return {**item, 'label': index}
        if is_path(item):
            self.files[index] = os.fsdecode(item)
        try:
            return {'image': to_records(self._checkpoint, item)[0], 'label': index}
        except UserError as error:
            self._errors[index] = str(error)
            raise UnreadableError(str(error)) from error

    def map(
        self, function: Callable, evaluator: Evaluator
    ) -> Generator[tuple[list[np.ndarray], np.ndarray], None, None]:
        """Yields (outputs of the function, indices) of the readable images, in order, one batch at a time."""
        with contextlib.closing(evaluator.map_records(function, self)) as batches:
            for parts, indices in batches:
                self.readable[indices] = True
                yield parts, indices

    def check(self, **options: Any) -> None:
        """Raises the error of `unreadable`, which has these options, if images were unreadable."""
        if bad := np.flatnonzero(~self.readable).tolist():
            reasons = [self._errors.get(index, repr(self.files[index])) for index in bad]
            remedy = 'convert or remove the files' if self._errors else 'prepare the data again'
            raise unreadable(reasons, len(self), remedy=remedy, **options)


def compute(evaluator: Evaluator, function: Callable, images: Images) -> list[np.ndarray]:
    """Returns the outputs of a function, as `Evaluator.map_images` takes it, for images in memory, files and folders.

    function: jitted; returns a list of float32 [n, ...]. images: as for `predict`; a path may also be a folder. Files
    are read one batch at a time. Raises UserError if images cannot be read; the message names all.
    """
    checkpoint, source = evaluator.checkpoint, None
    several: Any = [images] if is_path(images) else images
    if isinstance(several, Sequence) and any(map(is_path, several)):
        source = ImageSource(checkpoint, expand_folders(several))
    batches: Iterator[list[np.ndarray]]
    if source:
        count, batches = len(source), (parts for parts, _ in source.map(function, evaluator))
    else:
        image_NHWC = to_records(checkpoint, images)
        count, batches = len(image_NHWC), evaluator.map_images(function, image_NHWC)
    arrays = [np.zeros((count, *shape), np.float32) for shape in output_shapes(checkpoint, function)]
    start = 0
    for parts in batches:
        for array, part in zip(arrays, parts, strict=True):
            array[start : start + len(part)] = part
        start += len(parts[0])
    if source:
        source.check()
    return arrays


def output_shapes(checkpoint: Checkpoint, function: Callable) -> list[tuple[int, ...]]:
    """Returns the shapes of the outputs of a function for one image."""
    side = checkpoint.record_size
    image = jax.ShapeDtypeStruct((1, side, side, 3), np.uint8)
    return [x.shape[1:] for x in jax.eval_shape(function, checkpoint.params, image, checkpoint.image_stats)]


def is_path(image: Any) -> bool:
    return isinstance(image, str | os.PathLike)


def expand_folders(images: Iterable) -> list:
    """Replaces the folders among images by the image files below them."""
    lists = (list_image_files([image]) if is_path(image) and os.path.isdir(image) else [image] for image in images)
    return list(itertools.chain.from_iterable(lists))
