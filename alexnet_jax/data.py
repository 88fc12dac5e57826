"""The input pipeline: source -> shuffle -> decode -> draw -> cut -> batch, rebuilt from any step.

The position of the data is the step: batch k holds positions kB to (k+1)B - 1 of an endless stream, reshuffled on
every pass. What is random depends on (seed, position) alone; threads, processes and mesh do not change it.
"""

import functools
import io
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from absl import flags
from PIL import Image

from alexnet_jax import augment, processes
from alexnet_jax.errors import UserError

Batch = dict[str, np.ndarray]


def decode(record: dict) -> np.ndarray:
    """uint8 [S, S, 3] of a record: its JPEG decoded, or its raw pixels as they are.

    Raises:
      UserError: the bytes are no image.
    """
    if isinstance(record['image'], np.ndarray):
        return record['image']
    try:
        with Image.open(io.BytesIO(record['image'])) as image:
            return np.asarray(image.convert('RGB'))
    except (OSError, ValueError) as error:
        name = record.get('file_name', b'').decode(errors='replace')
        raise UserError(f'the record of image {name!r} cannot be decoded ({error}); prepare the data again.') from error


def train_batches(
    source: Sequence,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    record_size: int,
    augmentation: augment.Augmentation,
    shard: tuple[int, int] = (0, 1),
    num_workers: int = 0,
    num_threads: int = 0,
) -> Iterator[Batch]:
    """Endless training batches from `start_step` on; they may straddle passes through the source.

    Args:
      source: records of the train split (see sources.py).
      batch_size: of all processes together.
      seed: of order and draws.
      start_step: first batch wanted.
      record_size: side of a record, pixels.
      augmentation: what is drawn.
      shard: (index, count): this process's rows of each batch, from `sharding.data_shard`.
      num_workers: 0 decodes in threads; else in so many processes.
      num_threads: threads, in each process; 0 takes one a core, 16 at most.

    Yields:
      'image' uint8 [n, s, s, 3], 'offset' and 'extent' int32 [n, 2], 'reflect' bool [n], 'colour' float32 [n, 3],
      'label' int32 [n], 'weight' float32 [n] (1: counts in the loss), with n = batch_size / shard count.
    """
    augment.positions(record_size, augmentation.image_size)  # raises before a worker would
    element = functools.partial(_train_element, augmentation, seed, record_size)
    # Mapped before the batches are dealt out: the position is that in the whole stream.
    stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat().map_with_index(element)
    return _iterate(stream, batch_size, start_step, shard, num_workers, num_threads)


def eval_batches(
    source: Sequence,
    *,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    num_workers: int = 0,
    num_threads: int = 0,
) -> Iterator[Batch]:
    """One pass over a split in order, every record once; the last batch is filled up with weight 0.

    Arguments as for `train_batches`. All processes get the same number of batches.

    Yields:
      'image' uint8 [n, S, S, 3] (whole records), 'label' int32 [n], 'weight' float32 [n].
    """
    padded = -(-len(source) // batch_size) * batch_size
    element = functools.partial(_eval_element, source)
    return _iterate(grain.MapDataset.range(padded).map(element), batch_size, 0, shard, num_workers, num_threads)


def _train_element(augmentation, seed, record_size, position, record) -> Batch:
    drawn = augment.draw(augmentation, seed=seed, position=position, record_size=record_size)
    return {
        'image': augment.cut(decode(record), drawn, augmentation.image_size),
        **drawn._asdict(),
        'label': np.int32(record['label']),
        'weight': np.float32(1),
    }


def _eval_element(source, position) -> Batch:
    record = source[min(position, len(source) - 1)]
    return {
        'image': decode(record),
        'label': np.int32(record['label']),
        'weight': np.float32(position < len(source)),
    }


def _iterate(stream, batch_size, start, shard, num_workers, num_threads) -> Iterator[Batch]:
    index, count = shard
    threads = num_threads or min(processes.cores(), 16)  # each thread has a batch in hand: bounded on large machines
    # Rows of one process lie together in the global batch: batch first, then deal the parts out.
    parts = stream.batch(batch_size // count)[start * count + index :: count]
    # A thread fills a whole batch: so many are under way, and two more wait. (Grain's default holds 500 batches.)
    dataset = parts.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 2))
    if num_workers:
        if not flags.FLAGS.is_parsed():  # in a notebook or a script; grain reads a flag of its own
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2),
            worker_init_fn=processes.end_with_parent,
        )
    return _closing(iter(dataset))


def _closing(iterator) -> Iterator[Batch]:
    """Passes batches on and stops the workers when the consumer stops, by `close()` or by an exception."""
    try:
        yield from iterator
    finally:
        iterator.close()
