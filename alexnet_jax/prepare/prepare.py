"""Prepares raw images for training: square records of one size, the mean image and the color statistics."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import logging

from alexnet_jax.prepare import class_lists, dataset_writer, discovery, parquet, parts
from alexnet_jax.prepare.image_ref import Listing, Splits
from alexnet_jax.utils import processes
from alexnet_jax.utils.errors import UserError, as_user_error, listed
from alexnet_jax.utils.files import absolute_local_path, as_path, atomic_directory, check_new, open_regular


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
    part: str | None = None,
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
      part: '2/4' writes the second of four parts of the dataset, into the folder `OUTPUT.parts`; see `parts`.

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
    if part is not None:
        parts.parse(part)
        if max_unreadable:
            raise UserError(f'--max_unreadable={max_unreadable}: use it with --join, for the images of all parts.')
    source, output = as_path(source), absolute_local_path(output)
    check_new(output)
    listing = listing or discovery.find_images(source, labels=labels, nested_classes=nested_classes)
    class_names = class_lists.class_names((source, listing.folder or source), listing.class_names)
    splits = _shuffle_and_split(listing.splits, val_fraction, seed)
    counts = '  '.join(f'{name}: {len(refs)} images' for name, refs in splits.items())
    logging.info(f'{counts}  classes: {len(class_names)} ({listed(class_names, 5)})')
    _warn_of_untrained_classes(splits, class_names, val_fraction)

    # The names of the images tell their classes, unless files do.
    named_classes = '\0'.join(listing.class_names) if listing.in_files else ''
    plan = dataset_writer.make_plan(splits, size, format, class_names, named_classes)
    workers = workers or processes.cores()
    if part is not None:
        parts.write(output, part, plan, splits, {'--val_fraction': val_fraction, '--seed': seed}, workers)
        return
    with atomic_directory(output) as folder:
        shards = dataset_writer.make_shards(folder, plan, splits)
        dataset_writer.finish(folder, plan, dataset_writer.write_shards(shards, workers), max_unreadable)
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
    else:
        with open_regular(source_file, **encoding) as file:
            recorded = file.read().rstrip('\n')
        if recorded not in (description, path):  # for a source with a val split, only `path` is recorded
            raise UserError(
                f'{output} was prepared from {recorded}, not from {description}; use the same source or another '
                '--output, or remove that folder.'
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
        logging.warning(f'no training images{cause} for {dataset_writer.counted(untrained, len(class_names))}.')
