"""The input pipeline: source -> shuffle -> decode -> draw -> cut -> batch, rebuilt from any step.

The position of the data is the step: batch k holds positions kB to (k+1)B - 1 of an endless stream, reshuffled on
every pass. What is random depends on (seed, position) alone; threads, processes and mesh do not change it.
"""

import contextlib
import io
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from absl import flags
from PIL import Image

from alexnet_jax import augment, processes
from alexnet_jax.errors import UnreadableError, UserError, warn

Batch = dict[str, np.ndarray]
_FEW = 3  # processes that are not slower than threads
_PIECE = 1024  # images that a worker process makes at a time, at most: it holds a few such pieces in shared memory
_SHARED = '/dev/shm'
_LOST = -2  # label of what `decode_all` could not read, and told of; TFDS has -1 for no label


def decode(record: dict, size: int) -> np.ndarray:
    """uint8 [size, size, 3] of a record: its JPEG decoded, or its raw pixels as they are.

    Raises:
      UnreadableError: the bytes are no image, or one of another size.
    """
    found = record['image']
    try:
        if not isinstance(found, np.ndarray):
            with Image.open(io.BytesIO(found), formats=('JPEG', 'PNG')) as image:
                if image.size != (size, size):  # seen before the pixels take memory
                    raise ValueError(f'it has {image.width} x {image.height} px; expected {size} x {size}')
                found = np.asarray(image if image.mode == 'RGB' else image.convert('RGB'))
        if found.shape != (size, size, 3) or found.dtype != np.uint8:
            raise ValueError(f'it is {found.dtype} of shape {found.shape}; expected uint8 of {(size, size, 3)}')
    except Exception as error:  # Pillow refuses files in more ways than it documents
        raise UnreadableError(
            f'the record of image {_name(record)!r} cannot be decoded ({error}); prepare the data again.'
        ) from error
    return found


def _name(record: dict) -> str:
    name = record.get('file_name', b'')
    return name.decode(errors='replace') if isinstance(name, bytes) else str(name)


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
    records_on_device: bool = False,
    in_memory: np.ndarray | None = None,
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
      num_workers: 0 decodes in threads; else in so many processes, and a script needs its `if __name__ == '__main__':`.
      num_threads: threads, in each process; 0 takes `default_threads`.
      records_on_device: batches have only the numbers of records; `augment.crop_on_device` crops them in the step.
      in_memory: all decoded records, uint8 [N, S, S, 3], or None. Batches then have whole copies ('whole'), which cost
        the host less than cropping, and `augment.crop_on_device` crops them in the step.

    Yields:
      'image' uint8 [n, s, s, 3] (or 'index' int32 [n], or 'whole' uint8 [n, S, S, 3], see above),
      'offset' and 'extent' int32 [n, 2], 'reflect' bool [n], 'colour' float32 [n, 3],
      'label' int32 [n], 'weight' float32 [n] (1: counts in the loss), with n = batch_size / shard count. An image that
      cannot be read keeps its place, with weight 0; 'unreadable' (list[str], only then) says why: `warn_unreadable`.
    """
    augment.crop_positions(record_size, augmentation.image_size)  # raises before a worker would

    def build(places):  # no partial: grain names a step by its repr, which would print every record of a list
        return _train_batch(source, augmentation, seed, record_size, records_on_device, in_memory, places)

    # Numbered before the batches are dealt out: the position is that in the whole stream.
    stream = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().map_with_index(_with_position)
    return _iterate(stream, build, batch_size, start_step, shard, num_workers, num_threads)


def eval_batches(
    source: Sequence,
    *,
    batch_size: int,
    record_size: int,
    shard: tuple[int, int] = (0, 1),
    num_workers: int = 0,
    num_threads: int = 0,
    repeat: bool = False,
) -> Iterator[Batch]:
    """One pass over a split in order, every record once; the last batch is filled up with weight 0.

    Arguments as for `train_batches`; with `repeat` one pass follows the other, with the same worker processes. All
    processes get the same number of batches: ceil(records / batch_size) in a pass.

    Yields:
      'image' uint8 [n, S, S, 3] (whole records), 'label' int32 [n], 'weight' float32 [n]; 'unreadable' as above.
    """
    count = -(-len(source) // batch_size)
    stream = grain.MapDataset.range(count * batch_size)
    workers = min(num_workers, count * _pieces(batch_size // shard[1]))

    def build(places):  # as above
        return _eval_batch(source, record_size, places)

    def iterate(stream):
        return _iterate(stream, build, batch_size, 0, shard, workers, num_threads)

    if not repeat:
        return iterate(stream)
    # Processes take seconds to start. Threads do not, and would hold the next pass's batches till then.
    return iterate(stream.repeat()) if workers else _again(lambda: iterate(stream))


def _again(one_pass) -> Iterator[Batch]:
    while True:
        yield from one_pass()


def decode_all(source: Sequence, size: int, num_workers: int = 0) -> tuple[np.ndarray, list[int]]:
    """All records of a source, decoded: (uint8 [N, size, size, 3], labels), for `data.cache`.

    Records that cannot be read are named on stderr, and have the label -2.
    """
    images, labels = np.empty((len(source), size, size, 3), np.uint8), []
    for batch in eval_batches(source, batch_size=min(64, len(source)), record_size=size, num_workers=num_workers):
        warn_unreadable(batch)
        count = min(len(batch['label']), len(source) - len(labels))
        images[len(labels) : len(labels) + count] = batch['image'][:count]
        labels += np.where(batch['weight'] > 0, batch['label'], _LOST)[:count].tolist()
    return images, labels


def decode_some(source: Sequence, indices: Sequence[int], size: int) -> tuple[np.ndarray, list[int]]:
    """(uint8 [N, size, size, 3], labels) of some records. Raises UserError where one cannot be read."""
    records = [source[int(index)] for index in indices]
    return np.stack([decode(record, size) for record in records]), [int(record['label']) for record in records]


def warn_unreadable(batch: Batch) -> Batch:
    """Takes out of a batch what it says of images that cannot be read, and prints it."""
    problems = batch.pop('unreadable', [])
    for problem in problems[:3]:
        warn(f'weight 0: {problem}')
    if len(problems) > 3:
        warn(f'and {len(problems) - 3} more in this batch')
    return batch


def _with_position(position: int, index) -> tuple[int, int]:
    return position, int(index)


def _check_label(record: dict) -> None:
    """Raises UnreadableError where a record has none, without a word where that was said before."""
    if record['label'] < 0:
        raise UnreadableError('' if record['label'] == _LOST else f'the image {_name(record)!r} has no label.')


def _train_batch(source, augmentation, seed, record_size, on_device, in_memory, places) -> Batch:
    """places: (position in the stream, index of the record) of each image; positions follow each other."""
    count, size = len(places), augmentation.image_size
    # Cut into the batch itself: memory that is touched for the first time is slow.
    images = None if on_device or in_memory is not None else np.empty((count, size, size, 3), np.uint8)
    numbers = np.array([index for _, index in places], np.int32)
    if on_device:
        pixels = {'index': numbers}
    elif in_memory is not None:
        pixels = {'whole': np.take(in_memory, numbers, axis=0, mode='clip')}
    else:
        pixels = {'image': images}
    labels, weight, unreadable = np.zeros(count, np.int32), np.ones(count, np.float32), []
    first = places[0][0]
    draws = augment.draw_batch(augmentation, seed=seed, first=first, count=count, record_size=record_size)
    for i, (_, index) in enumerate(places):
        try:
            record = source[index]
            _check_label(record)
            if images is not None:
                drawn = augment.Draw(*(values[i] for values in draws))
                augment.crop(decode(record, record_size), drawn, size, out=images[i])
            labels[i] = record['label']
        except UnreadableError as error:
            unreadable += [str(error)] if str(error) else []
            weight[i] = 0
            if images is not None:
                images[i] = 0
    return {
        **pixels,
        **draws._asdict(),
        'label': labels,
        'weight': weight,
        **({'unreadable': unreadable} if unreadable else {}),
    }


def _eval_batch(source, record_size, places) -> Batch:
    count = len(places)
    images = np.zeros((count, record_size, record_size, 3), np.uint8)
    labels, weight, unreadable = np.zeros(count, np.int32), np.zeros(count, np.float32), []
    for i, place in enumerate(places):
        if place >= len(source):
            break
        try:
            record = source[int(place)]
            _check_label(record)
            images[i] = decode(record, record_size)
            labels[i], weight[i] = record['label'], 1
        except UnreadableError as error:
            unreadable.append(str(error))
    return {
        'image': images,
        'label': labels,
        'weight': weight,
        **({'unreadable': unreadable} if unreadable else {}),
    }


def _joined(pieces: Sequence[Batch]) -> Batch:
    """One batch of several pieces."""
    found = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0] if key != 'unreadable'}
    unreadable = list(itertools.chain.from_iterable(piece.get('unreadable', ()) for piece in pieces))
    return found | ({'unreadable': unreadable} if unreadable else {})


def default_workers(rows: int, row_bytes: int, devices: int) -> int:
    """Processes to decode in beside accelerators: one a core but one, and no more than shared memory has room for; 0,
    which are threads, where that leaves few.

    Args:
      rows: of this process in a batch. Of each kind of batch w processes were seen to have 4 w + 2 pieces in shared
        memory, and those besides that wait for the last of their batch.
      row_bytes: of an image for training and one for validation.
      devices: of this process; each has 32 processes at most.
    """
    workers = min(processes.cores() - 1, 32 * devices)
    if workers < _FEW:
        return 0
    free = shutil.disk_usage(_SHARED).free // processes.local_processes() if os.path.isdir(_SHARED) else 0
    pieces = free // (min(rows, _PIECE) * row_bytes)
    if (room := max(0, pieces - _pieces(rows) + 1) // 5) < workers:
        workers = room if room >= _FEW else 0
        how = f'{workers} processes' if workers else 'threads'
        warn(
            f'{_SHARED} has {free >> 20} MiB, room for the batches of {room} processes: images are decoded in {how}. A '
            'container gets more with --ipc=host or --shm-size=16g.'
        )
    return workers


def _pieces(rows: int) -> int:
    return -(-rows // _PIECE)


def default_threads(num_workers: int) -> int:
    """One a core, dealt out to the processes; each has a batch in hand, so 16 at most."""
    return max(1, min(processes.cores(), 16) // max(1, num_workers))


def _iterate(stream, build, batch_size, start, shard, num_workers, num_threads) -> Iterator[Batch]:
    index, count = shard
    rows, threads = batch_size // count, num_threads or default_threads(num_workers)
    pieces = _pieces(rows) if num_workers else 1

    def places(number):
        batch, piece = divmod(number, pieces)
        first = (start + batch) * batch_size + index * rows  # rows of one process lie together in the global batch
        return [stream[first + row] for row in range(rows * piece // pieces, rows * (piece + 1) // pieces)]

    parts = grain.MapDataset.range((len(stream) // batch_size - start) * pieces).map(places).map(build)
    # A thread fills a whole piece: so many are under way, and two more wait. (Grain's default holds 500 batches.)
    dataset = parts.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 2))
    if num_workers:
        if not flags.FLAGS.is_parsed():  # in a notebook or a script; grain reads a flag of its own
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1),  # more: no faster
            worker_init_fn=processes.end_with_parent,
        )
        # Images go through shared memory; labels and draws are smaller than what that takes.
        options = grain.experimental.DatasetOptions(min_shm_size=1 << 14)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
    if pieces > 1:
        dataset = dataset.batch(pieces, batch_fn=_joined)
    return _closing(dataset, processes.signals_blocked() if num_workers else contextlib.nullcontext())


def _closing(dataset, starting) -> Iterator[Batch]:
    """Passes batches on and stops the workers when the consumer stops, by `close()` or by an exception.

    starting: context in which the workers are started, which they are when the first batch is here.
    """
    iterator = None
    try:
        with starting:
            iterator = iter(dataset)
            first = next(iterator, None)
        if first is not None:
            yield first
            yield from iterator
    except RuntimeError as error:
        if 'terminated unexpectedly' not in str(error):
            raise
        raise UserError(
            f'a process that decodes images has died ({str(error).split(". ")[0]}); out of memory, or of '
            f'{_SHARED}? The same command goes on from the last checkpoint; --config.data.num_workers=0 decodes in '
            'threads.'
        ) from error
    finally:
        if iterator is not None:
            iterator.close()
