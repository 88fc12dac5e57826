"""Storage of the training images: records on disk, or decoded images in host or device memory.

Each class returns pixels, labels and weights for given indices; `pipeline.train_batches` adds the random parameters.
"""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from PIL import Image

from alexnet_jax.data import image_io
from alexnet_jax.data.random_crops import AugmentParams, crop
from alexnet_jax.utils.errors import UnreadableError

Batch = dict[str, Any]


def decode(record: dict[str, Any], size: int) -> np.ndarray:
    """Returns a record's image as uint8 [size, size, 3]. Raises UnreadableError for damage, another size or type."""
    image = record['image']
    try:
        if not isinstance(image, np.ndarray):
            pixels = image_io.decode_jpeg(image, size, size)
            image = _decode_with_pillow(image, size) if pixels is None else pixels
        if image.shape != (size, size, 3) or image.dtype != np.uint8:
            raise ValueError(f'{image.dtype} of shape {image.shape}; expected uint8 of shape {(size, size, 3)}')
    except Exception as error:  # Pillow raises undocumented exception types
        raise UnreadableError(f'record {_name(record)!r} cannot be decoded ({error}); prepare it again.') from error
    return image


def _decode_with_pillow(content: bytes, size: int) -> np.ndarray:
    with Image.open(io.BytesIO(content), formats=('JPEG', 'PNG')) as file:
        if file.size != (size, size):  # checked before the pixels are allocated
            raise ValueError(f'{file.width} x {file.height} px; expected {size} x {size}')
        return np.asarray(file if file.mode == 'RGB' else file.convert('RGB'))


def _name(record: dict[str, Any]) -> str:
    name = record.get('file_name', b'')
    return name.decode(errors='replace') if isinstance(name, bytes) else str(name)


@dataclasses.dataclass(frozen=True)
class Records:
    """Encoded records, decoded and cropped for each batch."""

    records: Sequence[dict[str, Any]] = dataclasses.field(repr=False)  # grain logs the reprs of its transformations
    record_size: int  # side of a record's image, pixels
    on_device: ClassVar[dict[str, jax.Array]] = {}  # device arrays to add to every batch

    def read(
        self,
        indices: Sequence[int],
        params: AugmentParams | None = None,
        image_size: int | None = None,
        out: np.ndarray | None = None,
    ) -> Batch:
        """Returns a batch of crops of side `image_size` selected by `params`, or of whole images if both are None.

        A batch has 'image' uint8 [n, image_size, image_size, 3], 'label' int32 [n] and 'weight' float32 [n], which is 0
        for unreadable images and indices past the last record. 'unreadable' lists the reasons, if there are any.

        out: memory for the images, which is used instead of new memory.
        """
        count, size = len(indices), image_size or self.record_size
        # Crop directly into the batch: the first access to newly allocated memory is slow.
        images = np.empty((count, size, size, 3), np.uint8) if out is None else out
        labels, weight, unreadable = np.zeros(count, np.int32), np.zeros(count, np.float32), []
        for i, index in enumerate(indices):
            if index >= len(self.records):
                break
            try:
                record = self.records[int(index)]
                if record['label'] < 0:  # TFDS stores -1 for a missing label
                    raise UnreadableError(f'the image {_name(record)!r} has no label.')
                image = decode(record, self.record_size)
                if params is None:
                    images[i] = image
                else:
                    image_params = AugmentParams(*(values[i] for values in params))
                    crop(image, image_params, size, out=images[i])
                labels[i], weight[i] = record['label'], 1
            except UnreadableError as error:
                unreadable.append(str(error))
        images[weight == 0] = 0
        batch = {'image': images, 'label': labels, 'weight': weight}
        return {**batch, 'unreadable': unreadable} if unreadable else batch


@dataclasses.dataclass(frozen=True)
class HostCache:
    """All images, decoded, in host memory. Batches hold whole images; the train step crops them, to save host time."""

    images: np.ndarray | jax.Array  # uint8 [N, S, S, 3]; replicated on every device in a DeviceCache
    labels: np.ndarray  # int32 [N]; negative for unreadable images

    @property
    def on_device(self) -> dict[str, Any]:
        """Device arrays to add to every batch."""
        return {}

    @property
    def record_size(self) -> int:
        return self.images.shape[1]

    @property
    def records(self) -> np.ndarray:
        """A sequence with one entry per image."""
        return self.labels

    def read(self, indices: Sequence[int], params: AugmentParams, image_size: int) -> Batch:
        """Returns a batch with the entry of `_pixels`, 'label' int32 [n] and 'weight' float32 [n]."""
        rows = np.asarray(indices, np.int32)
        labels = self.labels[rows]
        return {**self._pixels(rows), 'label': np.maximum(labels, 0), 'weight': (labels >= 0).astype(np.float32)}

    def _pixels(self, indices: np.ndarray) -> Batch:
        """Returns 'whole' uint8 [n, S, S, 3]."""
        return {'whole': np.take(self.images, indices, axis=0, mode='clip')}


class DeviceCache(HostCache):
    """All images, decoded, in the memory of every device. Batches hold indices; the train step gathers and crops."""

    @property
    def on_device(self) -> dict[str, Any]:
        """'records': all images, uint8 [N, S, S, 3]."""
        return {'records': self.images}

    def _pixels(self, indices: np.ndarray) -> Batch:
        """Returns 'index' int32 [n]."""
        return {'index': indices}


Storage = Records | HostCache
