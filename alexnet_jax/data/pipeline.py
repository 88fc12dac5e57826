"""The input pipeline (grain): shuffle -> read -> draw -> crop -> batch, rebuilt from any step.

The position of the data is the step: batch k holds positions kB to (k+1)B - 1 of an endless stream, reshuffled on
every pass. What is random depends on (seed, position) alone; threads, processes and mesh do not change it.
"""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import grain
import numpy as np
from absl import flags, logging

from alexnet_jax.core.augment import Augmentation, crop_positions
from alexnet_jax.data import random_crops
from alexnet_jax.data.cache import Batch, Records, Storage, decode
from alexnet_jax.utils import processes
from alexnet_jax.utils.errors import UserError

UNREADABLE_LABEL = -2  # of an image that `decode_all` could not read; TFDS has -1 for no label
_MIN_WORKERS = 3  # fewer processes are not faster than threads
_CHUNK = 1024  # images that a worker process prepares at a time, at most: it holds a few chunks in shared memory
_SHARED_MEMORY = '/dev/shm'


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
    """Endless training batches from `start_step` on; they may straddle passes through the data.

    Args:
      storage: of the train split.
      batch_size: of all processes together.
      seed: of order and draws.
      shard: (index, count): this process's rows of each batch, from `sharding.data_shard`.
      num_workers: 0 decodes in threads; else in so many processes, and a script needs its `if __name__ == '__main__':`.
      num_threads: threads, in each process; 0 takes `default_threads`.

    Yields:
      'image' uint8 [n, s, s, 3], or what `augment.crop_on_device` makes it of: 'whole' uint8 [n, S, S, 3] from a
      `HostCache`, 'index' int32 [n] from a `DeviceCache`;
      'offset' and 'extent' int32 [n, 2], 'reflect' bool [n], 'color' float32 [n, 3],
      'label' int32 [n], 'weight' float32 [n] (1: counts in the loss), with n = batch_size / shard count. An image that
      cannot be read keeps its place, with weight 0; 'unreadable' (list[str], only then) says why: `warn_unreadable`.
    """
    record_size, image_size = storage.record_size, augmentation.image_size
    crop_positions(record_size, image_size)  # raises before a worker would

    def build(rows):  # no partial: grain names a step by its repr, which would print every record of a list
        first, indices = rows[0][0], [int(index) for _, index in rows]
        params = random_crops.draw_batch(augmentation, seed=seed, first=first, count=len(rows), record_size=record_size)
        return {**params._asdict(), **storage.read(indices, params, image_size)}

    # Numbered before the batches are divided between processes: the position is that in the whole stream.
    order = grain.MapDataset.range(len(storage.records)).seed(seed).shuffle().repeat()
    stream = order.map_with_index(lambda position, index: (position, index))
    return _iterate(stream, build, batch_size, start_step, shard, num_workers, num_threads)


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
    """One pass over a split in order, every record once; the last batch is filled up with weight 0.

    record_size: side of a record, pixels; repeat: go over the split again and again, with the same worker processes.
    The others are as for `train_batches`.

    Yields 'image' uint8 [n, S, S, 3] (whole records), 'label' int32 [n], 'weight' float32 [n]; 'unreadable' as from
    `train_batches`. All processes get the same number of batches: ceil(records / batch_size) in a pass.
    """
    count = -(-len(records) // batch_size)
    workers = min(num_workers, count * math.ceil(batch_size // shard[1] / _CHUNK))
    source, stream = Records(records, record_size), grain.MapDataset.range(count * batch_size)
    # Processes take seconds to start. Threads do not, and would hold the next pass's batches till then.
    if repeat and workers:
        stream = stream.repeat()

    while True:
        yield from _iterate(stream, source.read, batch_size, 0, shard, workers, num_threads)
        if not repeat:
            return


def decode_all(records: Sequence, size: int, num_workers: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """All records, decoded: (uint8 [N, size, size, 3], int32 labels [N]). Warnings name what is `UNREADABLE_LABEL`."""
    images, labels = np.empty((len(records), size, size, 3), np.uint8), np.empty(len(records), np.int32)
    rows = min(64, len(records))
    batches = eval_batches(records, batch_size=rows, record_size=size, num_workers=num_workers)
    for start, batch in zip(range(0, len(records), rows), batches, strict=True):
        readable, rest = warn_unreadable(batch)['weight'] > 0, len(records) - start
        images[start : start + rows] = batch['image'][:rest]
        labels[start : start + rows] = np.where(readable, batch['label'], UNREADABLE_LABEL)[:rest]
    return images, labels


def decode_some(records: Sequence, indices: Iterable[int], size: int) -> tuple[np.ndarray, list[int]]:
    """(uint8 [N, size, size, 3], labels) of some records. Raises UserError where one cannot be read."""
    some = [records[int(index)] for index in indices]
    return np.stack([decode(record, size) for record in some]), [int(record['label']) for record in some]


def warn_unreadable(batch: Batch) -> Batch:
    """Removes from a batch the reasons why images cannot be read, and warns of them; returns the batch."""
    reasons: list[str] = batch.pop('unreadable', [])
    for reason in reasons[:3]:
        logging.warning('weight 0: %s', reason)
    if len(reasons) > 3:
        logging.warning('and %d more in this batch', len(reasons) - 3)
    return batch


def _concat_chunks(chunks: Sequence[Batch]) -> Batch:
    """One batch of several chunks."""
    batch = {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0] if key != 'unreadable'}
    unreadable = [reason for chunk in chunks for reason in chunk.get('unreadable', ())]
    return {**batch, 'unreadable': unreadable} if unreadable else batch


def default_workers(rows: int, row_bytes: int, devices: int) -> int:
    """Decoding processes beside accelerators: one for each core but one, fewer where shared memory is short.

    0, for threads, where fewer than `_MIN_WORKERS` are left: they would not be faster. rows: of this process in a
    batch; row_bytes: of an image for training and one for validation; devices: of this process.
    """
    workers = min(processes.cores() - 1, 32 * devices)
    if workers < _MIN_WORKERS:
        return 0
    free = shutil.disk_usage(_SHARED_MEMORY).free if os.path.isdir(_SHARED_MEMORY) else 0
    free //= processes.local_processes()
    # Of each kind of batch w processes were seen to have 4 w + 2 chunks in shared memory, and those besides that wait
    # for the last of their batch.
    chunks = free // (min(rows, _CHUNK) * row_bytes)
    if (fitting := max(0, chunks - math.ceil(rows / _CHUNK) + 1) // 5) < workers:
        workers = fitting if fitting >= _MIN_WORKERS else 0
        how = f'{workers} processes' if workers else 'threads'
        logging.warning(
            f'{_SHARED_MEMORY} has {free >> 20} MiB, enough for the batches of {fitting} processes: images are decoded '
            f'in {how}. A container gets more with --ipc=host or --shm-size=16g.'
        )
    return workers


def default_threads(num_workers: int) -> int:
    """Threads per worker: min(cores, 16) / workers. Each thread holds one batch."""
    return max(1, min(processes.cores(), 16) // max(1, num_workers))


def _iterate(stream, build, batch_size, start_step, shard, num_workers, num_threads) -> Generator[Batch, None, None]:
    index, count = shard
    rows, threads = batch_size // count, num_threads or default_threads(num_workers)
    chunks = math.ceil(rows / _CHUNK) if num_workers else 1

    def entries(number):
        """The entries of the stream that make chunk `number` of this process."""
        batch, chunk = divmod(number, chunks)
        first = (start_step + batch) * batch_size + index * rows  # a process's rows lie together in the global batch
        return [stream[first + row] for row in range(rows * chunk // chunks, rows * (chunk + 1) // chunks)]

    parts = grain.MapDataset.range((len(stream) // batch_size - start_step) * chunks).map(entries).map(build)
    # A thread fills a whole chunk: so many are under way, and two more wait. (Grain's default holds 500 batches.)
    dataset = parts.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 2))
    if num_workers:
        if not flags.FLAGS.is_parsed():  # in a notebook or a script; grain reads a flag of its own
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1)  # more: no faster
        dataset = dataset.mp_prefetch(workers, worker_init_fn=processes.end_with_parent)
        # Images go through shared memory; labels and draws are smaller than what that takes.
        options = grain.experimental.DatasetOptions(min_shm_size=1 << 14)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
    if chunks > 1:
        dataset = dataset.batch(chunks, batch_fn=_concat_chunks)
    return _closing(dataset, processes.signals_blocked() if num_workers else contextlib.nullcontext())


def _closing(dataset, starting) -> Generator[Batch, None, None]:
    """Yields the batches and stops the workers when the consumer stops, by `close()` or by an exception.

    starting: context in which the workers are started, which they are when the first batch is here.
    """
    with contextlib.ExitStack() as stack:
        try:
            with starting:
                iterator = stack.enter_context(contextlib.closing(iter(dataset)))
                first = next(iterator, None)
            if first is not None:
                yield first
                yield from iterator
        except RuntimeError as error:
            if 'terminated unexpectedly' not in str(error):
                raise
            raise UserError(
                f'a process that decodes images has died ({str(error).split(". ")[0]}); out of memory, or of '
                f'{_SHARED_MEMORY}? The same command goes on from the last checkpoint; --config.data.num_workers=0 '
                'decodes in threads.'
            ) from error


def prefetch_to_device(batches: Iterator[dict], send: Callable[[dict], dict]) -> Iterator[tuple[dict, float]]:
    """Batches on the devices, each sent before the one before it is used; and the seconds that it was waited for.

    A GPU writes into new memory only when all that was launched before is done, so a batch sent behind a step is copied
    behind it. Sent before that step, it is copied while the step before computes.

    send: `sharding.to_mesh`, and what goes with it.
    """
    ahead, began = None, time.perf_counter()
    for batch in batches:
        waited = time.perf_counter() - began
        sent = send(batch), waited
        if ahead is not None:
            yield ahead
        ahead, began = sent, time.perf_counter()
    if ahead is not None:
        yield ahead
