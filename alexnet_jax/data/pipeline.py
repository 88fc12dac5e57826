"""Input pipeline (grain): shuffle, draw random parameters, read, crop, batch. It can start at any step.

A batch depends only on the step: with batch size B, batch k holds the positions kB to (k+1)B - 1 of an endless stream
that is reshuffled every epoch. Random parameters depend only on (seed, position), not on threads, processes or mesh.
"""

import contextlib
import errno
import functools
import itertools
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags, logging
from jax.sharding import Mesh

from alexnet_jax.core import sharding
from alexnet_jax.core.augment import Augmentation, crop_positions
from alexnet_jax.data import random_crops
from alexnet_jax.data.cache import Batch, DeviceCache, Records, Storage, decode
from alexnet_jax.data.shared_slots import SHARED_MEMORY, SharedSlots, start_worker
from alexnet_jax.data.shuffle import shuffled_indices
from alexnet_jax.utils import processes
from alexnet_jax.utils.errors import UserError

UNREADABLE_LABEL = -2  # label in `decode_all` of unreadable images; TFDS uses -1 for a missing label
_MIN_WORKERS = 3  # fewer worker processes are not faster than threads
_CHUNK = 1024  # most images per chunk: a worker holds several chunks in shared memory
_SLOTS = 6  # chunks of a worker in shared memory, at most: w workers were seen to hold 5 w + 2
INDEX_BATCHES = 16  # batches of a `DeviceCache` that are drawn and sent at once: each is only a few kB


def train_batches(
    storage: Storage,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    augmentation: Augmentation,
    shard: tuple[int, int] = (0, 1),
    num_workers: int = 0,
    num_threads: int = 0,
) -> Generator[Batch, None, None]:
    """Yields training batches without end, from `start_step` on. A batch may span two epochs.

    Args:
      storage: the images of the train split.
      batch_size: the global batch size, over all processes.
      seed: random seed of the order and of the random parameters.
      shard: (index, count) of this process's rows in each batch, from `sharding.data_shard`.
      num_workers: number of decoding processes; 0 decodes in threads. With processes, scripts need a `__main__` guard.
      num_threads: threads per process; 0 uses `default_threads`.

    Yields:
      Batches of n = batch_size / shard count rows: 'image' uint8 [n, s, s, 3], 'label' int32 [n], 'weight' float32 [n]
      (1: counts in the loss), 'offset' and 'extent' int32 [n, 2], 'reflect' bool [n] and 'color' float32 [n, 3].
      A `HostCache` yields 'whole' uint8 [n, S, S, 3] instead of 'image', a `DeviceCache` 'index' int32 [n];
      `augment.crop_on_device` crops them to 'image'. An unreadable image keeps its row, with weight 0. A batch with
      unreadable images has the reasons in 'unreadable' (list[str]); see `warn_unreadable`.
    """
    record_size, image_size = storage.record_size, augmentation.image_size
    crop_positions(record_size, image_size)  # raises UserError here rather than in a worker

    # Not a partial: grain logs its repr, which would contain all records.
    def build(positions: range, **options: Any) -> Batch:
        count = len(positions)
        params = random_crops.draw_batch(
            augmentation, seed=seed, first=positions.start, count=count, record_size=record_size
        )
        indices: Any = shuffled_indices(positions, len(storage.records), seed)
        return {**params._asdict(), **storage.read(indices, params, image_size, **options)}

    slot_size = image_size if isinstance(storage, Records) else None
    parts = batches_at_once(storage) if shard[1] == 1 else 1
    start, size = start_step * batch_size, parts * batch_size
    several = _iterate(build, start, sys.maxsize, size, shard, num_workers, num_threads, slot_size)
    return _split(several, parts, batch_size) if parts > 1 else several


def batches_at_once(storage: Storage) -> int:
    """Returns the number of batches to draw and to send at once. Batches with images are handled one by one."""
    return INDEX_BATCHES if isinstance(storage, DeviceCache) else 1


def _split(several: Generator[Batch, None, None], parts: int, size: int) -> Generator[Batch, None, None]:
    """Yields the batches of arrays that hold `parts` batches of `size` rows each."""
    with contextlib.closing(several):
        for arrays in several:
            for first in range(0, parts * size, size):
                yield {name: array[first : first + size] for name, array in arrays.items()}


def eval_batches(
    records: Sequence,
    *,
    batch_size: int,
    record_size: int,
    shard: tuple[int, int] = (0, 1),
    num_workers: int = 0,
    num_threads: int = 0,
    repeat: bool = False,
) -> Generator[Batch, None, None]:
    """Yields the records of a split once, in order. The last batch is padded with rows of weight 0.

    record_size: side of a record's image, pixels. repeat: repeats the split endlessly and keeps the worker processes.
    The other arguments are those of `train_batches`.

    Yields 'image' uint8 [n, S, S, 3] (whole images), 'label' int32 [n], 'weight' float32 [n], and 'unreadable' as in
    `train_batches`. Every process gets the same number of batches, ceil(records / batch_size) per pass.
    """
    count = -(-len(records) // batch_size)
    workers = min(num_workers, count * math.ceil(batch_size // shard[1] / _CHUNK))
    source, length = Records(records, record_size), count * batch_size
    # Worker processes take seconds to start, so they are kept. Threads would hold batches of the next pass in memory.
    end = sys.maxsize if repeat and workers else length

    def build(positions: range, **options: Any) -> Batch:
        return source.read([position % length for position in positions], **options)

    while True:
        yield from _iterate(build, 0, end, batch_size, shard, workers, num_threads, record_size)
        if not repeat:
            return


def decode_all(records: Sequence, size: int, num_workers: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns all images and labels: (uint8 [N, size, size, 3], int32 [N]). Unreadable images get UNREADABLE_LABEL."""
    images, labels = np.empty((len(records), size, size, 3), np.uint8), np.empty(len(records), np.int32)
    rows = min(64, len(records))
    batches = eval_batches(records, batch_size=rows, record_size=size, num_workers=num_workers)
    for start, batch in zip(range(0, len(records), rows), batches, strict=True):
        readable, rest = warn_unreadable(batch)['weight'] > 0, len(records) - start
        images[start : start + rows] = batch['image'][:rest]
        labels[start : start + rows] = np.where(readable, batch['label'], UNREADABLE_LABEL)[:rest]
    return images, labels


def decode_some(records: Sequence, indices: Iterable[int], size: int) -> tuple[np.ndarray, list[int]]:
    """Returns images uint8 [N, size, size, 3] and labels of some records. Raises UserError if one is unreadable."""
    some = [records[int(index)] for index in indices]
    return np.stack([decode(record, size) for record in some]), [int(record['label']) for record in some]


def warn_unreadable(batch: Batch) -> Batch:
    """Removes 'unreadable' from a batch, logs the reasons (at most three of them) and returns the batch."""
    reasons: list[str] = batch.pop('unreadable', [])
    for reason in reasons[:3]:
        logging.warning('unreadable image: %s', reason)
    if len(reasons) > 3:
        logging.warning('%d more images of this batch are unreadable.', len(reasons) - 3)
    return batch


def _concat_chunks(chunks: Sequence[Batch]) -> Batch:
    """Concatenates chunks into one batch."""
    batch = {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0] if key != 'unreadable'}
    unreadable = [reason for chunk in chunks for reason in chunk.get('unreadable', ())]
    return {**batch, 'unreadable': unreadable} if unreadable else batch


def default_workers(rows: int, row_bytes: int, devices: int) -> int:
    """Returns the number of decoding processes to use with accelerators; 0 means decoding in threads.

    Uses all cores but one, at most 32 per device, fewer if shared memory is short, and threads below _MIN_WORKERS.

    rows: this process's rows of a batch. row_bytes: bytes of one training image plus one validation image. devices:
    number of this process's devices.
    """
    workers = min(processes.cores() - 1, 32 * devices)
    if workers < _MIN_WORKERS:
        return 0
    free = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else 0
    free //= processes.local_processes()
    # Measured for training and for validation: w processes hold 5 w + 2 chunks in shared memory, plus the chunks that
    # wait until their batch is complete.
    chunks = free // (min(rows, _CHUNK) * row_bytes)
    if (fitting := max(0, chunks - math.ceil(rows / _CHUNK) - 1) // 5) < workers:
        workers = fitting if fitting >= _MIN_WORKERS else 0
        logging.warning(
            f'{SHARED_MEMORY} has {free >> 20} MiB free, enough for {fitting} decoding processes: decoding in '
            f'{f"{workers} processes" if workers else "threads"}. In a container, use --ipc=host or --shm-size=16g.'
        )
    return workers


def default_threads(num_workers: int) -> int:
    """Returns the number of threads per worker: min(cores, 16) / workers. Each thread holds one chunk in memory."""
    return max(1, min(processes.cores(), 16) // max(1, num_workers))


def _iterate(build, start, end, batch_size, shard, num_workers, num_threads, slot_size) -> Generator[Batch, None, None]:
    """Yields `build(positions)` for this process's rows of each batch, from position `start` to position `end`.

    slot_size: side of the images that worker processes pass in `SharedSlots`; None: grain passes the arrays.
    """
    index, count = shard
    rows, threads = batch_size // count, num_threads or default_threads(num_workers)
    chunks = math.ceil(rows / _CHUNK) if num_workers else 1
    # In a worker, the queue to the parent buffers chunks. With one thread, the worker itself builds them.
    ahead = threads + 2 if not num_workers else threads if threads > 1 else 0
    slots = None
    if num_workers and slot_size:
        try:
            slots = SharedSlots(num_workers, _SLOTS + ahead, (math.ceil(rows / chunks), slot_size, slot_size, 3))
        except OSError as error:
            logging.info('Workers copy images to new shared memory, which is slower (%s).', error)

    def build_chunk(number):
        """Returns chunk `number` of this process. Positions are global; a process's rows in a batch are contiguous."""
        batch, chunk = divmod(number, chunks)
        first = start + batch * batch_size + index * rows
        positions = range(first + rows * chunk // chunks, first + rows * (chunk + 1) // chunks)
        return slots.build(build, positions) if slots else build(positions)

    dataset = grain.MapDataset.range((end - start) // batch_size * chunks).map(build_chunk)
    # Each thread builds one chunk, and two more chunks are buffered. Grain would buffer 500 by default.
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=min(ahead, threads), prefetch_buffer_size=ahead))
    if num_workers:
        if not flags.FLAGS.is_parsed():  # in notebooks and scripts; grain reads an absl flag
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1)  # more is not faster
        dataset = dataset.mp_prefetch(workers, worker_init_fn=start_worker)
        # Only images are passed in shared memory: for labels and random parameters its overhead is too large.
        options = grain.experimental.DatasetOptions(min_shm_size=1 << 14)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
        dataset = dataset.map(slots.open) if slots else dataset
    if chunks > 1:
        dataset = dataset.batch(chunks, batch_fn=_concat_chunks)
    return _closing(dataset, processes.signals_blocked() if num_workers else contextlib.nullcontext())


def _closing(dataset, starting) -> Generator[Batch, None, None]:
    """Yields the batches. Stops the workers at the end, also if the consumer calls `close()` or raises an exception.

    starting: context manager that is active until the first batch arrives, when all workers have started.
    """
    with contextlib.ExitStack() as stack:
        try:
            with starting:
                iterator = stack.enter_context(contextlib.closing(iter(dataset)))
                first = next(iterator, None)
            if first is not None:
                yield first
                yield from iterator
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(
                f'{SHARED_MEMORY} is full; decoding processes pass images through it. Enlarge it (Docker: --shm-size), '
                'or add --config.data.num_workers=0 to decode in threads.'
            ) from error
        except RuntimeError as error:
            if 'terminated unexpectedly' not in str(error):
                raise
            raise UserError(
                f'a decoding process died ({str(error).split(". ")[0]}), maybe for lack of memory or {SHARED_MEMORY}. '
                'Run the same command to resume, or add --config.data.num_workers=0 to decode in threads.'
            ) from error


def prefetch_to_device(batches: Iterator[Any], send: Callable[[Any], Any]) -> Iterator[tuple[Any, float]]:
    """Yields (batch on the devices, seconds waited for it). Each batch is sent before the previous one is yielded.

    A GPU writes to newly allocated memory only after all previously dispatched work. A batch sent after the dispatch of
    a step is copied after that step; a batch sent before it is copied while the previous step computes.

    send: function that puts a batch, or several, on the devices, such as `sharding.to_mesh`.
    """
    pending, start = None, time.perf_counter()
    for batch in batches:
        waited = time.perf_counter() - start
        sent = send(batch), waited
        if pending is not None:
            yield pending
        pending, start = sent, time.perf_counter()
    if pending is not None:
        yield pending


def prefetch_groups(
    batches: Iterator[Batch], send: Callable[[list[Batch]], list[dict]], size: int
) -> Iterator[tuple[dict, float]]:
    """Like `prefetch_to_device`, but sends `size` batches at once. The last group may be smaller."""
    groups = iter(lambda: list(itertools.islice(batches, size)), [])
    for sent, waited in prefetch_to_device(groups, send):
        for batch in sent:
            yield batch, waited / len(sent)


def to_mesh_at_once(mesh: Mesh, batches: list[Batch]) -> list[dict[str, jax.Array]]:
    """Returns the same as `sharding.to_mesh` for each batch, in one transfer: faster if batches are small."""
    # Stacked along the second axis, because the first one is divided between devices.
    stacked = {name: np.stack([batch[name] for batch in batches], axis=1) for name in batches[0]}
    return _unstack(mesh, len(batches))(sharding.to_mesh(mesh, stacked))


@functools.cache
def _unstack(mesh: Mesh, count: int) -> Callable[[dict[str, jax.Array]], list[dict[str, jax.Array]]]:
    """Returns a jitted function that separates stacked batches."""

    def unstack(stacked: dict[str, jax.Array]) -> list[dict[str, jax.Array]]:
        return [{name: array[:, i] for name, array in stacked.items()} for i in range(count)]

    return jax.jit(unstack, out_shardings=sharding.batch_sharding(mesh))
