"""A file of prepared records, as a process of `alexnet_jax prepare` writes it: read, made square, encoded."""

import errno
import functools
import hashlib
import io
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from alexnet_jax.core import image_stats
from alexnet_jax.data import image_io
from alexnet_jax.prepare import discovery, image_ref
from alexnet_jax.utils import checksums
from alexnet_jax.utils.errors import UserError, first_line


class Shard(NamedTuple):
    """One file to be written, by one process."""

    path: str
    refs: Sequence[image_ref.ImageRef]
    size: int
    format: str
    class_names: tuple[str, ...]
    counts: bool  # whether its pixels enter the image_stats


class ShardResult(NamedTuple):
    digest: str  # of its records
    sha256: str  # of its file
    count: int  # type: ignore[assignment]
    num_bytes: int
    moments: image_stats.Moments
    bad: list[str]  # 'name: reason'


@functools.cache
def features(size: int, format: str, class_names: tuple[str, ...]):
    """What a record holds, for TFDS."""
    import tensorflow_datasets as tfds

    shape, label = (size, size, 3), tfds.features.ClassLabel(names=class_names)
    if format == 'jpeg':
        image = tfds.features.Image(shape=shape, encoding_format='jpeg')
    else:
        image = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES)
    return tfds.features.FeaturesDict({'image': image, 'label': label, 'file_name': tfds.features.Text()})


def write_shard(shard: Shard) -> ShardResult:
    """Runs in a worker process: reads, squares, encodes and writes a shard's images."""
    from array_record.python import array_record_module

    record_features = features(shard.size, shard.format, shard.class_names)
    # One record a group: random access reads only what it needs. JPEGs do not compress further.
    writer = array_record_module.ArrayRecordWriter(shard.path, 'group_size:1,uncompressed')
    moments, digest, count, num_bytes, bad = image_stats.Moments.zeros(shard.size), hashlib.sha256(), 0, 0, []
    for ref in shard.refs:
        try:
            original, label = _read(ref)
            pixels = image_io.resize_center_crop(original, shard.size)
        except UserError:
            raise
        except Exception as error:  # Pillow refuses files in more ways than it documents
            bad.append(f'{ref.name}: {first_line(error)}')
            continue
        if shard.counts:
            moments = moments.add(pixels)
        content = image_io.encode_jpeg(pixels) if shard.format == 'jpeg' else pixels.tobytes()
        feature = io.BytesIO(content) if shard.format == 'jpeg' else pixels
        record = record_features.serialize_example({'image': feature, 'label': label, 'file_name': ref.name})
        writer.write(record)
        # Not of the record: protobuf may order its fields otherwise the next time.
        digest.update(f'{ref.name}\0{label}\0'.encode() + content)
        count, num_bytes = count + 1, num_bytes + len(record)
    writer.close()
    return ShardResult(digest.hexdigest(), checksums.sha256(shard.path), count, num_bytes, moments, bad)


def _read(ref: image_ref.ImageRef) -> tuple[bytes | np.ndarray, int]:
    """`discovery.read_image`, but a file system that does not give the image is no fault of the image."""
    try:
        return discovery.read_image(ref)
    except OSError as error:
        dangling = os.path.islink(ref.path) and ref.length < 0 and error.errno in (errno.ENOENT, errno.ELOOP)
        if error.errno is None or dangling:  # of what was read; a link to nothing is a bad image
            raise
        where = error.filename or ref.path
        raise UserError(f'the image {ref.name!r} cannot be read any more: {where}: {error.strerror}.') from error
