"""Writes a shard of prepared records: reads, resizes, crops and encodes its images. Runs in a worker process."""

import collections
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
    """A file of records to write."""

    path: str
    refs: Sequence[image_ref.ImageRef]
    size: int
    format: str
    class_names: tuple[str, ...]
    in_stats: bool  # whether its images count in the image statistics


class ShardResult(NamedTuple):
    """The result of writing one shard."""

    digest: str  # of the records
    sha256: str  # of the file
    count: int  # type: ignore[assignment]
    labels: collections.Counter[int]  # number of records by label
    num_bytes: int
    moments: image_stats.Moments
    unreadable: list[tuple[str, str]]  # (name, reason)
    notes: list[tuple[str, str]]  # (name, a note of `image_io`)


@functools.cache
def features(size: int, format: str, class_names: tuple[str, ...]):
    """Returns the TFDS features of the records."""
    import tensorflow_datasets as tfds

    shape, label = (size, size, 3), tfds.features.ClassLabel(names=class_names)
    if format == 'jpeg':
        image = tfds.features.Image(shape=shape, encoding_format='jpeg')
    else:
        image = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES)
    return tfds.features.FeaturesDict({'image': image, 'label': label, 'file_name': tfds.features.Text()})


def write_shard(shard: Shard) -> ShardResult:
    """Reads, resizes, crops, encodes and writes the images of a shard. Raises UserError for lost files."""
    from array_record.python import array_record_module
    from tensorflow_datasets.core import example_serializer

    record_features = features(shard.size, shard.format, shard.class_names)
    serializer = example_serializer.ExampleSerializer(record_features.get_serialized_info())
    # One record per group, so that random access reads a single record. JPEGs do not compress further.
    writer = array_record_module.ArrayRecordWriter(shard.path, 'group_size:1,uncompressed')
    moments, digest, num_bytes = image_stats.Moments.zeros(shard.size), hashlib.sha256(), 0
    labels: collections.Counter[int] = collections.Counter()
    unreadable: list[tuple[str, str]] = []
    notes: list[tuple[str, str]] = []
    for ref in shard.refs:
        image_notes: list[str] = []
        try:
            original, label = _read_image(ref)
            pixels = image_io.resize_center_crop(original, shard.size, image_notes)
        except UserError:
            raise
        except Exception as error:  # Pillow raises undocumented exception types
            unreadable.append((ref.name, first_line(error)))
            continue
        notes.extend((ref.name, note) for note in image_notes)
        if shard.in_stats:
            moments = moments.add(pixels)
        content = image_io.encode_jpeg(pixels) if shard.format == 'jpeg' else pixels.tobytes()
        feature = io.BytesIO(content) if shard.format == 'jpeg' else pixels
        example = record_features.encode_example({'image': feature, 'label': label, 'file_name': ref.name})
        # `features.serialize_example` would write the fields in an order that differs between processes.
        record = serializer.get_tf_example(example).SerializeToString(deterministic=True)
        writer.write(record)
        # The record itself is not hashed, because the order of the fields may change with the version of protobuf.
        digest.update(f'{ref.name}\0{label}\0'.encode() + content)
        num_bytes += len(record)
        labels[label] += 1
    writer.close()
    hashes = digest.hexdigest(), checksums.sha256(shard.path)
    return ShardResult(*hashes, labels.total(), labels, num_bytes, moments, unreadable, notes)


def is_readable(ref: image_ref.ImageRef, size: int) -> bool:
    """Returns whether `write_shard` can read an image. Raises UserError for lost files."""
    try:
        image_io.resize_center_crop(_read_image(ref)[0], size)
    except UserError:
        raise
    except Exception:  # as in `write_shard`
        return False
    return True


def _read_image(ref: image_ref.ImageRef) -> tuple[bytes | np.ndarray, int]:
    """Calls `discovery.read_image`. Raises UserError for file system errors that are not a defect of the image."""
    try:
        return discovery.read_image(ref)
    except OSError as error:
        dangling = os.path.islink(ref.path) and ref.length < 0 and error.errno in (errno.ENOENT, errno.ELOOP)
        if error.errno is None or dangling:  # a defective image: invalid content, or a dangling link
            raise
        path = error.filename or ref.path
        raise UserError(f'lost access to the image {ref.name!r}: {path}: {error.strerror}.') from error
