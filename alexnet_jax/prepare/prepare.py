"""Prepares raw images for training: square records of one size, the mean image and the color statistics."""

import collections
import functools
import hashlib
import itertools
import multiprocessing
import os
import pathlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import numpy as np
from absl import logging

from alexnet_jax.core import image_stats
from alexnet_jax.data import image_stats_file
from alexnet_jax.prepare import class_lists, discovery, parquet, record_writer
from alexnet_jax.prepare.image_ref import Listing, Splits
from alexnet_jax.prepare.record_writer import Shard, ShardResult
from alexnet_jax.utils import checksums, processes
from alexnet_jax.utils.errors import UserError, as_user_error, listed
from alexnet_jax.utils.files import absolute_local_path, as_path, atomic_directory, check_new
from alexnet_jax.utils.logs import Progress

_MAX_SHARD_IMAGES = 4096
_MIN_SHARDS = 16  # per split, unless it has fewer images
_MAX_NAMED = 1000  # unreadable images with a warning of their own


def prepare(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    size: int = 256,
    format: str = 'jpeg',
    val_fraction: float = 0.0,
    seed: int = 0,
    max_unreadable: int = 0,
    workers: int | None = None,
    labels: str | os.PathLike | None = None,
    nested_classes: bool = False,
    listing: Listing | None = None,
) -> None:
    """Prepares the images at `source` into a new directory. The output does not depend on the number of processes.

    Args:
      source: see `discovery.find_images`. A folder may contain a list of class names, see `class_lists.class_names`.
      output: the directory to create. It is written as `.NAME.incomplete` beside it and renamed when complete.
      size: side of the square images, pixels.
      format: 'jpeg' (quality 95, about 33 kB each at 256 px) or 'raw' (uint8, 197 kB). Deviation: 'jpeg' is lossy; the
        paper uses "raw RGB values".
      val_fraction: fraction of the training images to move to the val split.
      seed: random seed of the order of the records and of the choice of val images.
      max_unreadable: number of unreadable images that are skipped with a warning. With more, all images are still read,
        and the UserError says how many there are.
      workers: number of processes; by default the number of cores.
      labels, nested_classes: see `discovery.find_images`.
      listing: result of `discovery.find_images` for these arguments, if already computed.

    Raises:
      UserError: an option is out of range, there are no images or too many unreadable ones, or the disk is full.
    """
    if not 8 <= size <= 4096:
        raise UserError(f'--size={size}: expected 8 to 4096 pixels.')
    if format not in ('jpeg', 'raw'):
        raise UserError(f'--format={format!r}: expected jpeg or raw.')
    if not 0 <= val_fraction < 1:
        raise UserError(f'--val_fraction={val_fraction}: expected a number from 0 up to, but not including, 1.')
    if seed < 0 or max_unreadable < 0:
        raise UserError(f'--seed={seed}, --max_unreadable={max_unreadable}: expected 0 or more.')
    source, output = as_path(source), absolute_local_path(output)
    check_new(output)
    listing = listing or discovery.find_images(source, labels=labels, nested_classes=nested_classes)
    class_names = class_lists.class_names((source, listing.folder or source), listing.class_names)
    splits = _shuffle_and_split(listing.splits, val_fraction, seed)
    counts = '  '.join(f'{name}: {len(refs)} images' for name, refs in splits.items())
    logging.info(f'{counts}  classes: {len(class_names)} ({listed(class_names, 5)})')
    _warn_of_untrained_classes(splits, class_names, val_fraction)

    # The names of the images tell their classes, unless files do.
    fingerprint = hashlib.sha256('\0'.join(listing.class_names).encode() if listing.in_files else b'')
    with atomic_directory(output) as folder:
        workers = workers or processes.cores()
        _write_dataset(folder, splits, class_names, size, format, max_unreadable, workers, fingerprint)
    logging.info('%s is ready.', output)


def prepare_if_needed(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    size: int,
    val_fraction: float = 0.0,
    listing: Listing | None = None,
    **options,
) -> None:
    """Calls `prepare` unless `output` exists. Records the source in the file OUTPUT.source.

    For commands that resume. Takes the arguments of `prepare`, but ignores val_fraction if the source has a val split.
    Raises the errors of `prepare`, and UserError if `output` was prepared from another source.
    """
    source, output = os.fspath(source), os.fspath(output)
    path = source if source.startswith('tfds:') else absolute_local_path(source)
    description = f'{path} with --val_fraction={val_fraction:g}' if val_fraction else path
    source_file = pathlib.Path(f'{output}.source')
    encoding = {'encoding': 'utf-8', 'errors': 'surrogateescape'}
    if not os.path.exists(output):
        listing = listing or discovery.find_images(source)
        if 'val' in listing.splits:
            val_fraction, description = 0.0, path
        with as_user_error(f'{output!r} cannot be written'):
            os.makedirs(os.path.dirname(absolute_local_path(output)), exist_ok=True)
            source_file.write_text(description, **encoding)
        prepare(source, output, size=size, val_fraction=val_fraction, listing=listing, **options)
    elif not source_file.exists():
        raise UserError(
            f'the source of {output} is unknown; if it is {description}, write this text to {source_file}; otherwise '
            'use another --output, or remove that folder.'
        )
    # For a source with a val split, only `path` is recorded.
    elif (recorded := source_file.read_text(**encoding).rstrip('\n')) not in (description, path):
        raise UserError(
            f'{output} was prepared from {recorded}, not from {description}; use the same source or another --output, '
            'or remove that folder.'
        )


def _shuffle_and_split(splits: Splits, val_fraction: float, seed: int) -> Splits:
    """Shuffles each split, unless it is in parquet files. Moves a fraction of train to val: of each class, if known."""
    rng = np.random.default_rng(seed)
    shuffled = {name: [refs[i] for i in rng.permutation(len(refs))] for name, refs in splits.items()}
    if val_fraction:
        if 'train' not in splits or 'val' in splits:
            raise UserError(f'--val_fraction needs a train split and no val split; the input has: {", ".join(splits)}.')
        refs = shuffled['train']
        num_val = np.round(np.arange(len(refs) + 1) * val_fraction).astype(int)  # val images among the first i images
        by_class = sorted(refs, key=lambda ref: ref.label)
        val = {ref for i, ref in enumerate(by_class) if num_val[i] < num_val[i + 1]}
        if not 0 < len(val) < len(refs):
            raise UserError(f'--val_fraction={val_fraction} moves {len(val)} of {len(refs)} images to val; change it.')
        shuffled['val'] = [ref for ref in refs if ref in val]
        shuffled['train'] = [ref for ref in refs if ref not in val]
    # Random access to parquet files is slow. Training shuffles the records again.
    in_parquet = any(ref.path.startswith(parquet.PREFIX) for refs in splits.values() for ref in refs[:1])
    return {name: sorted(refs) if in_parquet else refs for name, refs in shuffled.items()}


def _warn_of_untrained_classes(splits: Splits, class_names: Sequence[str], val_fraction: float) -> None:
    """Warns of classes without training images, as in a part of ImageNet's archives or after a high val_fraction."""
    labels = {ref.label for ref in splits.get('train', ())}
    if labels and -1 not in labels and len(labels) < len(class_names):
        untrained = [name for label, name in enumerate(class_names) if label not in labels]
        cause = f' after --val_fraction={val_fraction}' if val_fraction else ''
        logging.warning(f'no training images{cause} for {_counted(untrained, len(class_names))}.')


def _counted(names: Sequence[str], total: int) -> str:
    """Returns '2 of 5 classes (cat, dog)'. At most ten are named."""
    return f'{len(names)} of {total} classes ({listed(names, 10)})'


def _check_lost_classes(split: str, refs, readable: collections.Counter[int], class_names, unreadable) -> None:
    """Warns of classes all of whose images in a split are unreadable; two classes must have training images.

    refs: the images of the split. readable: numbers of its readable images by label. unreadable: (name, reason) of each
    unreadable image, for the message.
    """
    given = {ref.label for ref in refs}
    if -1 in given:  # the labels of a TFDS dataset are in its records; those of unreadable records are unknown
        given = set(range(len(class_names))) if split == 'train' else set()
    lost = [class_names[label] for label in sorted(given - set(readable))]
    if not lost:
        return
    which = f'no image of the {split} split can be read for {_counted(lost, len(class_names))}'
    if split == 'train' and len(readable) < 2:
        raise UserError(f'{which} ({_summary(unreadable)}): expected training images of at least two classes.')
    logging.warning(f'{which}; they stay in the list of classes. Repair their images, or remove their folders.')


def _write_dataset(folder, splits, class_names, size, format, max_unreadable, workers, fingerprint) -> None:
    import tensorflow_datasets as tfds

    names = {'data_dir': folder, 'dataset_name': 'images', 'filetype_suffix': 'array_record'}
    templates = {split: tfds.core.ShardedFileTemplate(split=split, **names) for split in splits}
    shards = {}
    for split, refs in splits.items():
        number = max(-(-len(refs) // _MAX_SHARD_IMAGES), min(_MIN_SHARDS, len(refs)))
        bounds = [len(refs) * i // number for i in range(number + 1)]
        paths = templates[split].sharded_filepaths(number)
        shards[split] = [
            Shard(os.fspath(path), refs[start:end], size, format, class_names, split == 'train')
            for path, (start, end) in zip(paths, itertools.pairwise(bounds), strict=True)
        ]
    all_results = iter(_write_shards(list(itertools.chain(*shards.values())), workers))
    unreadable: list[tuple[str, str]] = []
    notes: list[tuple[str, str]] = []
    infos = []
    digests: dict[str, str] = {}
    for split in splits:
        results = list(itertools.islice(all_results, len(shards[split])))
        digests |= {os.path.basename(s.path): r.sha256 for s, r in zip(shards[split], results, strict=True)}
        fingerprint.update(''.join([split, *(r.digest for r in results)]).encode())
        lengths, num_bytes = [r.count for r in results], sum(r.num_bytes for r in results)
        unreadable.extend(itertools.chain(*(r.unreadable for r in results)))
        notes.extend(itertools.chain(*(r.notes for r in results)))
        if not any(lengths):
            total = len(splits[split])
            raise UserError(f'none of the {total} images of the {split} split can be read ({_summary(unreadable)}).')
        readable = sum((r.labels for r in results), collections.Counter())
        _check_lost_classes(split, splits[split], readable, class_names, unreadable)
        options = {'name': split, 'shard_lengths': lengths, 'num_bytes': num_bytes}
        infos.append(tfds.core.SplitInfo(**options, filename_template=templates[split]))
        if split == 'train':
            moments = functools.reduce(image_stats.Moments.merge, [r.moments for r in results])
            image_stats_file.save(folder, image_stats.from_moments(moments))
    _check_unreadable(unreadable, sum(map(len, splits.values())), max_unreadable)
    for note, noted in _by_second(notes):
        logging.warning('%d images, such as %s, have %s', len(noted), noted[0], note)
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=record_writer.features(size, format, class_names),
        split_infos=infos,
        filename_template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
        check_data=False,
        metadata=tfds.core.MetadataDict(fingerprint=fingerprint.hexdigest()),
        description=f'Images as central squares of {size} px, prepared by alexnet_jax.',
    )
    checksums.write(folder, digests)


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
    if count > max_unreadable:
        raise UserError(
            f'{count} of {total} images cannot be read ({_summary(unreadable)}); repair them (the warnings above name '
            f'them), or skip them with --max_unreadable={count}.'
        )
    if count:
        logging.warning('skipped %d unreadable images.', count)


def _write_shards(shards: list[Shard], workers: int) -> list[ShardResult]:
    """Writes all shards in parallel and returns the results in the order of the shards."""
    done, num_unreadable = 0, 0
    progress = Progress(sum(len(shard.refs) for shard in shards), seconds=1)
    # Not fork, because TFDS and array_record run threads in the parent.
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(workers, mp_context=context, initializer=processes.end_with_parent) as pool:
        with processes.without_main():
            futures = [pool.submit(record_writer.write_shard, shard) for shard in shards]
        try:
            for result in (future.result() for future in as_completed(futures)):
                for name, reason in result.unreadable[: max(0, _MAX_NAMED - num_unreadable)]:
                    logging.warning('unreadable image: %s: %s', name, reason)
                num_unreadable += len(result.unreadable)
                done += result.count + len(result.unreadable)
                progress.update(done)
        finally:
            pool.shutdown(cancel_futures=True)
    if num_unreadable > _MAX_NAMED:
        logging.warning('%d more images cannot be read.', num_unreadable - _MAX_NAMED)
    return [future.result() for future in futures]
