"""Writes a prepared dataset: its shards on all cores, then the statistics, the metadata and the digests."""

import collections
import functools
import hashlib
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple

from absl import logging

from alexnet_jax.core import image_stats
from alexnet_jax.data import image_stats_file
from alexnet_jax.prepare import record_writer
from alexnet_jax.prepare.image_ref import Splits
from alexnet_jax.prepare.record_writer import Shard, ShardResult
from alexnet_jax.utils import checksums, processes
from alexnet_jax.utils.errors import UserError, listed
from alexnet_jax.utils.logs import Progress

_MAX_SHARD_IMAGES = 4096
_MIN_SHARDS = 16  # per split, unless it has fewer images
_MAX_NAMED = 1000  # unreadable images with a warning of their own


class Plan(NamedTuple):
    """What `finish` needs to know of a dataset, besides the results of its shards."""

    size: int
    format: str
    class_names: Sequence[str]
    shards: dict[str, list[int]]  # number of images of each shard, by split; they include unreadable images
    labels: dict[str, list[int]]  # the labels of the images of each split; -1 if they are in the records
    named_classes: str  # class names that the fingerprint covers, if the names of the images do not tell the classes


def make_plan(splits: Splits, size: int, format: str, class_names: Sequence[str], named_classes: str) -> Plan:
    """Divides the images into shards, independently of the number of processes."""
    shards, labels = {}, {}
    for split, refs in splits.items():
        number = max(-(-len(refs) // _MAX_SHARD_IMAGES), min(_MIN_SHARDS, len(refs)))
        bounds = [len(refs) * i // number for i in range(number + 1)]
        shards[split] = [end - start for start, end in itertools.pairwise(bounds)]
        labels[split] = sorted({ref.label for ref in refs})
    return Plan(size, format, class_names, shards, labels, named_classes)


def _template(folder: str, split: str):
    """Returns the names of the files of a split in `folder`."""
    import tensorflow_datasets as tfds

    names = {'data_dir': folder, 'dataset_name': 'images', 'filetype_suffix': 'array_record'}
    return tfds.core.ShardedFileTemplate(split=split, **names)


def shard_paths(folder: str, plan: Plan) -> list[str]:
    """Returns the paths of the files of all shards in `folder`, in their order."""
    templates = {split: _template(folder, split) for split in plan.shards}
    return [
        os.fspath(path)
        for split, counts in plan.shards.items()
        for path in templates[split].sharded_filepaths(len(counts))
    ]


def make_shards(folder: str, plan: Plan, splits: Splits) -> list[Shard]:
    """Returns all shards in their order. splits: the images, as for `make_plan`."""
    shards, paths = [], iter(shard_paths(folder, plan))
    for split, counts in plan.shards.items():
        refs = iter(splits[split])
        for count in counts:
            members = list(itertools.islice(refs, count))
            shards.append(
                Shard(next(paths), members, plan.size, plan.format, tuple(plan.class_names), split == 'train')
            )
    return shards


def write_shards(
    shards: Sequence[Shard], workers: int, write: Callable[[Shard], ShardResult] = record_writer.write_shard
) -> list[ShardResult]:
    """Writes shards in parallel and returns the results in the order of the shards. write: runs in the processes."""
    done = 0
    progress = Progress(sum(len(shard.refs) for shard in shards), seconds=1)
    # Not fork, because TFDS and array_record run threads in the parent.
    context = multiprocessing.get_context('spawn')
    new_pool = functools.partial(ProcessPoolExecutor, mp_context=context, initializer=processes.end_with_parent)
    with processes.safe_path(), new_pool(workers) as pool:
        with processes.without_main():
            futures = [pool.submit(write, shard) for shard in shards]
        try:
            for result in warn_of_unreadable(future.result() for future in as_completed(futures)):
                done += result.count + len(result.unreadable)
                progress.update(done)
        finally:
            pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]


def warn_of_unreadable(results: Iterable[ShardResult]) -> Iterator[ShardResult]:
    """Yields the results. Names their unreadable images, up to a limit."""
    count = 0
    for result in results:
        for name, reason in result.unreadable[: max(0, _MAX_NAMED - count)]:
            logging.warning('unreadable image: %s: %s', name, reason)
        count += len(result.unreadable)
        yield result


def finish(folder: str, plan: Plan, results: Iterable[ShardResult], max_unreadable: int) -> None:
    """Writes what a dataset has besides its shards. Merges the sums over images in the order of the shards.

    Raises UserError if there are too many unreadable images, or if no image of a split can be read.

    Args:
      folder: contains the shards, and nothing else.
      results: the results of all shards, in their order. Each is dropped before the next one is read.
    """
    import tensorflow_datasets as tfds

    results, paths = iter(results), iter(shard_paths(folder, plan))
    fingerprint = hashlib.sha256(plan.named_classes.encode())
    unreadable: list[tuple[str, str]] = []
    notes: list[tuple[str, str]] = []
    infos = []
    digests: dict[str, str] = {}
    for split, counts in plan.shards.items():
        lengths, num_bytes, readable = [], 0, collections.Counter[int]()
        moments: image_stats.Moments | None = None
        fingerprint.update(split.encode())
        for result in itertools.islice(results, len(counts)):
            digests[os.path.basename(next(paths))] = result.sha256
            fingerprint.update(result.digest.encode())
            lengths.append(result.count)
            num_bytes += result.num_bytes
            readable.update(result.labels)
            moments = moments.merge(result.moments) if moments else result.moments
            unreadable.extend(result.unreadable)
            notes.extend(result.notes)
        if not any(lengths):
            total = sum(counts)
            raise UserError(f'none of the {total} images of the {split} split can be read ({_summary(unreadable)}).')
        _check_lost_classes(split, plan, readable, unreadable)
        options = {'name': split, 'shard_lengths': lengths, 'num_bytes': num_bytes}
        infos.append(tfds.core.SplitInfo(**options, filename_template=_template(folder, split)))
        if split == 'train' and moments:
            image_stats_file.save(folder, image_stats.from_moments(moments))
    _check_unreadable(unreadable, sum(map(sum, plan.shards.values())), max_unreadable)
    for note, noted in _by_second(notes):
        logging.warning('%d images, such as %s, have %s', len(noted), noted[0], note)
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=record_writer.features(plan.size, plan.format, tuple(plan.class_names)),
        split_infos=infos,
        filename_template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
        check_data=False,
        metadata=tfds.core.MetadataDict(fingerprint=fingerprint.hexdigest()),
        description=f'Images as central squares of {plan.size} px, prepared by alexnet_jax.',
    )
    checksums.write(folder, digests)


def _check_lost_classes(split: str, plan: Plan, readable: collections.Counter[int], unreadable) -> None:
    """Warns of classes all of whose images in a split are unreadable; two classes must have training images.

    readable: numbers of the readable images of the split by label. unreadable: (name, reason) of each unreadable image,
    for the message.
    """
    given = set(plan.labels[split])
    if -1 in given:  # the labels of a TFDS dataset are in its records; those of unreadable records are unknown
        given = set(range(len(plan.class_names))) if split == 'train' else set()
    lost = [plan.class_names[label] for label in sorted(given - set(readable))]
    if not lost:
        return
    which = f'no image of the {split} split can be read for {counted(lost, len(plan.class_names))}'
    if split == 'train' and len(readable) < 2:
        raise UserError(f'{which} ({_summary(unreadable)}): expected training images of at least two classes.')
    logging.warning(f'{which}; they stay in the list of classes. Repair their images, or remove their folders.')


def counted(names: Sequence[str], total: int) -> str:
    """Returns '2 of 5 classes (cat, dog)'. At most ten are named."""
    return f'{len(names)} of {total} classes ({listed(names, 10)})'


def _by_second(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Groups (name, text) by text, largest group first: returns (text, names)."""
    groups: dict[str, list[str]] = {}
    for name, text in pairs:
        groups.setdefault(text, []).append(name)
    return sorted(groups.items(), key=lambda group: -len(group[1]))


def _summary(unreadable: Sequence[tuple[str, str]]) -> str:
    """Returns the counts of the three most frequent reasons, with an image for each."""
    groups = _by_second(unreadable)
    return '; '.join(f'{len(names)}, such as {names[0]}: {reason}' for reason, names in groups[:3])


def _check_unreadable(unreadable: Sequence[tuple[str, str]], total: int, max_unreadable: int) -> None:
    """Raises UserError if more images than `max_unreadable` cannot be read; else warns of how many were skipped."""
    count = len(unreadable)
    if count > _MAX_NAMED:
        logging.warning('%d more images cannot be read.', count - _MAX_NAMED)
    if count > max_unreadable:
        raise UserError(
            f'{count} of {total} images cannot be read ({_summary(unreadable)}); repair them (the warnings above name '
            f'them), or skip them with --max_unreadable={count}.'
        )
    if count:
        logging.warning('skipped %d unreadable images.', count)
