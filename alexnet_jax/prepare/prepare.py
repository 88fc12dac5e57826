"""Turns raw images into what training reads: squares of one size, their mean image and their color statistics."""

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
from alexnet_jax.prepare import discovery, record_writer
from alexnet_jax.prepare.image_ref import Listing, Splits
from alexnet_jax.prepare.record_writer import Shard, ShardResult
from alexnet_jax.utils import checksums, processes
from alexnet_jax.utils.errors import UserError, as_user_error
from alexnet_jax.utils.files import absolute_local_path, atomic_directory, check_new
from alexnet_jax.utils.logs import Progress

_NAME = 'images'  # of the TFDS dataset, and so of its files
_LISTS, _LONGEST_LIST = ('classes.tsv', 'words.txt'), 2**24  # of names for classes; characters
_MOST_IN_SHARD, _SHARDS = 4096, 16  # at most so many images in a shard; where there are few, so many shards


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
    listing: Listing | None = None,
) -> None:
    """Prepares `source` into the new directory `output`; what it writes does not depend on the number of processes.

    Args:
      source: see `discovery.find_images`. A folder may hold `classes.tsv` or Tiny ImageNet's `words.txt`: a class's
        folder, a tab and its name on each line; labels keep the order of the folders.
      output: must not exist. Written as a sibling `.NAME.incomplete` and renamed when whole.
      size: side of the squares, pixels.
      format: 'jpeg' (quality 95, about 33 kB each at 256 px) or 'raw' (uint8, 197 kB). Deviation: 'jpeg' loses a little
        that the paper's "raw RGB values" keep.
      val_fraction: part of the training images to set aside as the val split.
      seed: of the order in which images are written, and of the choice for val.
      max_unreadable: unreadable images that are named, counted and left out; one more ends it.
      workers: processes; all cores by default.
      listing: what `discovery.find_images` says of the source, where that was asked before.

    Raises UserError for an option out of its range, no images, too many bad ones, no space.
    """
    if not 8 <= size <= 4096:
        raise UserError(f'--size={size}; expected 8 to 4096 pixels.')
    if format not in ('jpeg', 'raw'):
        raise UserError(f'--format={format!r}; expected jpeg or raw.')
    if not 0 <= val_fraction < 1:
        raise UserError(f'--val_fraction={val_fraction}; expected 0 up to, not including, 1.')
    if seed < 0 or max_unreadable < 0:
        raise UserError(f'--seed={seed}, --max_unreadable={max_unreadable}; expected 0 or more.')
    source, output = os.fspath(source), absolute_local_path(output)
    check_new(output)
    splits, folders = listing or discovery.find_images(source)
    class_names = _class_names(source, folders)
    orders = _orders(splits, val_fraction, seed)
    counts = '  '.join(f'{name}: {len(refs)} images' for name, refs in orders.items())
    more = ', ...' if len(class_names) > 5 else ''
    logging.info(f'{counts}  classes: {len(class_names)} ({", ".join(class_names[:5])}{more})')

    with atomic_directory(output) as folder:
        _write_all(folder, orders, class_names, size, format, max_unreadable, workers or processes.cores())
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
    """Prepares `source` into `output`, unless that was done before; OUTPUT.source says of what it was made.

    For programs that go on where they were. Arguments as for `prepare`, but val_fraction is for sources without val.
    Raises UserError where `output` was prepared from something else; or see `prepare`.
    """
    source, output = os.fspath(source), os.fspath(output)
    path = source if source.startswith('tfds:') else absolute_local_path(source)
    made = f'{path} with --val_fraction={val_fraction:g}' if val_fraction else path
    source_file = pathlib.Path(f'{output}.source')
    encoding = {'encoding': 'utf-8', 'errors': 'surrogateescape'}
    if not os.path.exists(output):
        listing = listing or discovery.find_images(source)
        if 'val' in listing.splits:
            val_fraction, made = 0.0, path
        with as_user_error(f'{output!r} cannot be written'):
            os.makedirs(os.path.dirname(absolute_local_path(output)), exist_ok=True)
            source_file.write_text(made, **encoding)
        prepare(source, output, size=size, val_fraction=val_fraction, listing=listing, **options)
    elif not source_file.exists():
        raise UserError(
            f'it is not known what {output} was prepared from; if that was {made}, write so into {source_file}, else '
            'give another --output, or remove that folder.'
        )
    # The path alone where it has a val split of its own.
    elif (recorded := source_file.read_text(**encoding).rstrip('\n')) not in (made, path):
        raise UserError(
            f'{output} was prepared from {recorded}, not from {made}; give the same again, or another --output, or '
            'remove that folder.'
        )


def _class_names(path: str, folders: Sequence[str]) -> tuple[str, ...]:
    """Readable class names, from a list in the input if there is one; classes of one name get their folder's, too."""
    words = {}
    for list_path in (os.path.join(path, name) for name in _LISTS):
        if os.path.isfile(list_path):
            with open(list_path, encoding='utf-8-sig', errors='replace') as file:
                for line in file.read(_LONGEST_LIST).splitlines():
                    folder, _, name = line.partition('\t')
                    words[folder.strip()] = ' '.join(name.split(',')[0].split())
    names = [words.get(folder) or folder for folder in folders]
    counts = collections.Counter(names)
    names = [name if counts[name] == 1 else f'{name} ({folder})' for name, folder in zip(names, folders, strict=True)]
    for name in names:  # TFDS keeps them as the lines of a file, stripped and without empty ones: labels would shift
        if name.splitlines() != [name] or name != name.strip():
            raise UserError(f'the class name {name!r} has blanks around it or more than a line; rename its folder.')
    return tuple(names)


def _orders(splits: Splits, val_fraction: float, seed: int) -> Splits:
    """Each split in a random order fixed by the seed; a part of train, of each class if labels are known, as val."""
    rng = np.random.default_rng(seed)
    orders = {name: [refs[i] for i in rng.permutation(len(refs))] for name, refs in splits.items()}
    if val_fraction:
        if 'train' not in orders or 'val' in orders:
            raise UserError(f'--val_fraction needs a train split and no val split; there are: {", ".join(orders)}.')
        aside = np.round(np.arange(len(orders['train']) + 1) * val_fraction).astype(int)  # of the first so many
        by_class = sorted(orders['train'], key=lambda ref: ref.label)
        val = {ref for i, ref in enumerate(by_class) if aside[i] < aside[i + 1]}
        if not 0 < len(val) < len(by_class):
            raise UserError(f'--val_fraction={val_fraction} sets {len(val)} of {len(by_class)} images aside.')
        for name, chosen in (('val', True), ('train', False)):
            orders[name] = [ref for ref in orders['train'] if (ref in val) == chosen]
        if lost := len({ref.label for ref in by_class} - {ref.label for ref in orders['train']}):
            logging.warning(f'--val_fraction leaves no training image of {lost} classes.')
    return orders


def _write_all(folder, orders, class_names, size, format, max_unreadable, workers) -> None:
    import tensorflow_datasets as tfds

    names = {'data_dir': folder, 'dataset_name': _NAME, 'filetype_suffix': 'array_record'}
    templates = {split: tfds.core.ShardedFileTemplate(split=split, **names) for split in orders}
    planned = {}
    for split, refs in orders.items():
        number = max(-(-len(refs) // _MOST_IN_SHARD), min(_SHARDS, len(refs)))
        cuts = [len(refs) * i // number for i in range(number + 1)]
        paths = templates[split].sharded_filepaths(number)
        planned[split] = [
            Shard(os.fspath(path), refs[start:end], size, format, class_names, split == 'train')
            for path, (start, end) in zip(paths, itertools.pairwise(cuts), strict=True)
        ]
    results = iter(_in_processes(list(itertools.chain(*planned.values())), max_unreadable, workers))
    infos, fingerprint = [], hashlib.sha256()
    digests: dict[str, str] = {}
    for split, shards in planned.items():
        written = list(itertools.islice(results, len(shards)))
        digests |= {os.path.basename(s.path): w.sha256 for s, w in zip(shards, written, strict=True)}
        fingerprint.update(''.join([split, *(w.digest for w in written)]).encode())
        lengths, num_bytes = [w.count for w in written], sum(w.num_bytes for w in written)
        if not any(lengths):
            raise UserError(f'none of the {len(orders[split])} images of the {split} split can be read.')
        options = {'name': split, 'shard_lengths': lengths, 'num_bytes': num_bytes}
        infos.append(tfds.core.SplitInfo(**options, filename_template=templates[split]))
        if split == 'train':
            moments = functools.reduce(image_stats.Moments.merge, [w.moments for w in written])
            image_stats_file.save(folder, image_stats.from_moments(moments))
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


def _in_processes(shards: list[Shard], max_unreadable: int, workers: int) -> list[ShardResult]:
    """Writes all shards on all cores; results in the order of the shards."""
    done, bad = 0, 0
    progress = Progress(sum(len(shard.refs) for shard in shards), seconds=1)
    # spawn: the parent has threads (TFDS, array_record), which a fork would copy in mid-air.
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(workers, mp_context=context, initializer=processes.end_with_parent) as pool:
        with processes.without_main():
            futures = [pool.submit(record_writer.write_shard, shard) for shard in shards]
        try:
            for written in (future.result() for future in as_completed(futures)):
                for reason in written.bad:
                    logging.warning('unreadable: %s', reason)
                bad += len(written.bad)
                done += written.count + len(written.bad)
                if bad > max_unreadable:
                    raise UserError(
                        f'{bad} of {done} images cannot be read (named above); put them right, or leave them out '
                        f'with --max_unreadable={bad} or more.'
                    )
                progress.update(done)
        finally:
            pool.shutdown(cancel_futures=True)
    if bad:
        logging.warning('%d unreadable images were left out.', bad)
    return [future.result() for future in futures]
