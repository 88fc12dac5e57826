"""Where training images come from: records on disk, or decoded in the memory of the host or of each device.

Each class gives the pixels, labels and weights of some images; `pipeline.train_batches` adds what is drawn for each.
"""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from PIL import Image

from alexnet_jax.data import random_crops
from alexnet_jax.utils.errors import UnreadableError

Batch = dict[str, Any]


def decode(record: dict[str, Any], size: int) -> np.ndarray:
    """A record's JPEG decoded, or its raw pixels: uint8 [size, size, 3]. Raises UnreadableError unless it is that."""
    image = record['image']
    try:
        if not isinstance(image, np.ndarray):
            with Image.open(io.BytesIO(image), formats=('JPEG', 'PNG')) as file:
                if file.size != (size, size):  # seen before the pixels take memory
                    raise ValueError(f'it has {file.width} x {file.height} px; expected {size} x {size}')
                image = np.asarray(file if file.mode == 'RGB' else file.convert('RGB'))
        if image.shape != (size, size, 3) or image.dtype != np.uint8:
            raise ValueError(f'it is {image.dtype} of shape {image.shape}; expected uint8 of {(size, size, 3)}')
    except Exception as error:  # Pillow refuses files in more ways than it documents
        what = f'the record of image {_name(record)!r} cannot be decoded ({error})'
        raise UnreadableError(f'{what}; prepare the data again.') from error
    return image


def _name(record: dict[str, Any]) -> str:
    name = record.get('file_name', b'')
    return name.decode(errors='replace') if isinstance(name, bytes) else str(name)


@dataclasses.dataclass(frozen=True)
class Records:
    """Records that are decoded and cropped when a batch needs them."""

    records: Sequence[dict[str, Any]] = dataclasses.field(repr=False)  # grain prints its steps: not every record
    record_size: int  # side of a record, pixels
    on_device: ClassVar[dict[str, jax.Array]] = {}  # what every batch has on the devices already

    def read(
        self, indices: Sequence[int], params: random_crops.AugmentParams | None = None, image_size: int | None = None
    ) -> Batch:
        """Images of a batch: crops of `image_size` as `params` says, or, without both, whole records.

        Returns 'image' uint8 [n, image_size, image_size, 3], 'label' int32 [n], 'weight' float32 [n]: 0 for images that
        cannot be read and for rows past the last record; 'unreadable', list[str], only if some cannot, says why.
        """
        count, size = len(indices), image_size or self.record_size
        # Cropped into the batch itself: memory that is touched for the first time is slow.
        images = np.empty((count, size, size, 3), np.uint8)
        labels, weight, unreadable = np.zeros(count, np.int32), np.zeros(count, np.float32), []
        for i, index in enumerate(indices):
            if index >= len(self.records):
                break
            try:
                record = self.records[int(index)]
                if record['label'] < 0:  # -1 in TFDS
                    raise UnreadableError(f'the image {_name(record)!r} has no label.')
                image = decode(record, self.record_size)
                if params is None:
                    images[i] = image
                else:
                    own = random_crops.AugmentParams(*(values[i] for values in params))
                    random_crops.crop(image, own, size, out=images[i])
                labels[i], weight[i] = record['label'], 1
            except UnreadableError as error:
                unreadable.append(str(error))
        images[weight == 0] = 0
        batch = {'image': images, 'label': labels, 'weight': weight}
        return {**batch, 'unreadable': unreadable} if unreadable else batch


@dataclasses.dataclass(frozen=True)
class HostCache:
    """All images decoded in the host's memory. A batch has whole records, which the step crops: copying costs less."""

    images: np.ndarray | jax.Array  # uint8 [N, S, S, 3]; of a DeviceCache on every device
    labels: np.ndarray  # int32 [N]; negative where an image could not be read

    @property
    def on_device(self) -> dict[str, Any]:
        """What every batch has on the devices already."""
        return {}

    @property
    def record_size(self) -> int:
        return self.images.shape[1]

    @property
    def records(self) -> np.ndarray:
        """One entry for each image."""
        return self.labels

    def read(self, indices: Sequence[int], params: random_crops.AugmentParams, image_size: int) -> Batch:
        """The pixels, 'label' int32 [n], 'weight' float32 [n]."""
        rows = np.asarray(indices, np.int32)
        labels = self.labels[rows]
        weight = (labels >= 0).astype(np.float32)
        return {**self._pixels(rows), 'label': np.maximum(labels, 0), 'weight': weight}

    def _pixels(self, indices: np.ndarray) -> Batch:
        """'whole' uint8 [n, S, S, 3]."""
        return {'whole': np.take(self.images, indices, axis=0, mode='clip')}


class DeviceCache(HostCache):
    """All images decoded in the memory of every device. A batch has their indices, and the step crops."""

    @property
    def on_device(self) -> dict[str, Any]:
        """'records', all images."""
        return {'records': self.images}

    def _pixels(self, indices: np.ndarray) -> Batch:
        """'index' int32 [n]."""
        return {'index': indices}


Storage = Records | HostCache
