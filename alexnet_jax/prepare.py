"""Turns raw images into what training reads: squares of one size, their mean image and their colour statistics.

    python -m alexnet_jax.prepare --input=ILSVRC2012_img_train.tar --output=DIR [--size=256] [--format=jpeg|raw]

The shorter side becomes `size` pixels, the central square is kept (section 2). The output is a TFDS dataset that
`tfds.builder_from_directory(DIR)` opens, with statistics.npz beside it where there are training images, and SHA256SUMS.
"""

import collections
import functools
import hashlib
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait

import numpy as np
from absl import flags

from alexnet_jax import cli, digests, listing, processes, shards, statistics
from alexnet_jax.errors import UserError, as_user_error, check_new, local, warn

_NAME = 'images'  # of the TFDS dataset, and so of its files
_LISTS, _LONGEST_LIST = ('classes.tsv', 'words.txt'), 2**24  # of names for classes; characters
_MOST_IN_SHARD, _SHARDS = 4096, 16  # at most so many images in a shard; where there are few, so many shards


def prepare(
    source: str,
    output: str,
    *,
    size: int = 256,
    format: str = 'jpeg',
    val_fraction: float = 0.0,
    seed: int = 0,
    max_bad: int = 0,
    workers: int | None = None,
    listed: listing.Listing | None = None,
) -> None:
    """Prepares `source` into the new directory `output`; what it writes does not depend on the number of processes.

    Args:
      source: see `listing.find`. A folder may hold `classes.tsv` or Tiny ImageNet's `words.txt`: a class's folder, a
        tab and its name on each line; labels keep the order of the folders.
      output: must not exist. Written as a sibling `.NAME.incomplete` and renamed when whole.
      size: side of the squares, pixels.
      format: 'jpeg' (quality 95, about 33 kB each at 256 px) or 'raw' (uint8, 197 kB). Deviation: 'jpeg' loses a little
        that the paper's "raw RGB values" keep.
      val_fraction: part of the training images to set aside as the val split.
      seed: of the order in which images are written, and of the choice for val.
      max_bad: unreadable images that are named, counted and left out; one more ends it.
      workers: processes; all cores by default.
      listed: what `listing.find` says of the source, where that was asked before.

    Raises:
      UserError: an option out of its range, no images, too many bad ones, no space.
    """
    if not 8 <= size <= 4096:
        raise UserError(f'--size={size}; expected 8 to 4096 pixels.')
    if format not in ('jpeg', 'raw'):
        raise UserError(f'--format={format!r}; expected jpeg or raw.')
    if not 0 <= val_fraction < 1:
        raise UserError(f'--val_fraction={val_fraction}; expected 0 up to, not including, 1.')
    if seed < 0 or max_bad < 0:
        raise UserError(f'--seed={seed}, --max_bad={max_bad}; expected 0 or more.')
    output = local(output)
    check_new(output)
    splits, folders = listed or listing.find(source)
    class_names = _in_words(source, folders)
    _check_names(class_names)
    orders = _orders(splits, val_fraction, seed)
    counts = '  '.join(f'{name}: {len(refs)} images' for name, refs in orders.items())
    more = ', ...' if len(class_names) > 5 else ''
    print(f'{counts}  classes: {len(class_names)} ({", ".join(class_names[:5])}{more})', flush=True)

    with processes.new_directory(output) as folder:
        _write_all(folder, orders, class_names, size, format, max_bad, workers)
    print(f'{output} is ready.', flush=True)


def once(
    source: str,
    output: str,
    *,
    size: int,
    val_fraction: float = 0.0,
    listed: listing.Listing | None = None,
    **options,
) -> None:
    """Prepares `source` into `output`, unless that was done before; OUTPUT.source says of what it was made.

    For programs that go on where they were. Arguments as for `prepare`, but val_fraction is for sources without val.

    Raises:
      UserError: `output` was prepared from something else; or see `prepare`.
    """
    path = source if source.startswith('tfds:') else local(source)
    made = f'{path} with --val_fraction={val_fraction:g}' if val_fraction else path
    encoding = {'encoding': 'utf-8', 'errors': 'surrogateescape'}
    if not os.path.exists(output):
        listed = listed or listing.find(source)
        if 'val' in listed.splits:
            val_fraction, made = 0.0, path
        with as_user_error(f'{output!r} cannot be written'):
            os.makedirs(os.path.dirname(local(output)), exist_ok=True)
            with open(f'{output}.source', 'w', **encoding) as file:
                file.write(made)
        prepare(source, output, size=size, val_fraction=val_fraction, listed=listed, **options)
        return
    if not os.path.exists(f'{output}.source'):
        raise UserError(
            f'it is not known what {output} was prepared from; if that was {made}, write so into {output}.source, else '
            'give another --output, or remove that folder.'
        )
    with open(f'{output}.source', **encoding) as file:
        known = file.read().rstrip('\n')
    if known not in (made, path):  # the path alone where it has a val split of its own
        raise UserError(
            f'{output} was prepared from {known}, not from {made}; give the same again, or another --output, or remove '
            'that folder.'
        )


def _in_words(path: str, class_names: Sequence[str]) -> tuple[str, ...]:
    """What people call the classes, as a list in the input says; two of one name keep their folders' beside it."""
    words = {}
    for place in (os.path.join(path, name) for name in _LISTS):
        if os.path.isfile(place):
            with open(place, encoding='utf-8-sig', errors='replace') as file:
                for line in file.read(_LONGEST_LIST).splitlines():
                    folder, _, name = line.partition('\t')
                    words[folder.strip()] = ' '.join(name.split(',')[0].split())
    names = [words.get(name) or name for name in class_names]
    pairs, counts = zip(names, class_names, strict=True), collections.Counter(names)
    return tuple(name if counts[name] == 1 else f'{name} ({folder})' for name, folder in pairs)


def _check_names(class_names: Sequence[str]) -> None:
    """TFDS keeps names as the lines of a file, without blanks around them or empty ones: labels would shift."""
    for name in class_names:
        if name.splitlines() != [name] or name != name.strip():
            raise UserError(f'the class name {name!r} has blanks around it or more than a line; rename its folder.')


def _orders(splits: dict[str, list[listing.Ref]], val_fraction: float, seed: int) -> dict[str, list[listing.Ref]]:
    """Each split in a random order fixed by the seed; of train a part of each class set aside as val if so wished.

    (Not of each class for `tfds:`, whose labels are not known here.)
    """
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
            warn(f'--val_fraction leaves no training image of {lost} classes.')
    return orders


def _write_all(folder, orders, class_names, size, format, max_bad, workers) -> None:
    import tensorflow_datasets as tfds

    template = functools.partial(tfds.core.ShardedFileTemplate, data_dir=folder, dataset_name=_NAME)
    planned = {}
    for split, refs in orders.items():
        number = max(-(-len(refs) // _MOST_IN_SHARD), min(_SHARDS, len(refs)))
        cuts = [len(refs) * i // number for i in range(number + 1)]
        files = template(split=split, filetype_suffix='array_record')
        planned[split] = [
            shards.Shard(
                os.fspath(files.sharded_filepath(shard_index=i, num_shards=number)),
                refs[cuts[i] : cuts[i + 1]],
                size,
                format,
                class_names,
                split == 'train',
            )
            for i in range(number)
        ]
    results = _in_processes([shard for split in planned.values() for shard in split], max_bad, workers)
    infos, fingerprint, known = [], hashlib.sha256(), {}
    for split, files in planned.items():
        written = [results.pop(0) for _ in files]
        known |= {os.path.basename(s.path): w.sha256 for s, w in zip(files, written, strict=True)}
        fingerprint.update(''.join([split, *(w.digest for w in written)]).encode())
        if not any(w.count for w in written):
            raise UserError(f'none of the {len(orders[split])} images of the {split} split can be read.')
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[w.count for w in written],
                num_bytes=sum(w.num_bytes for w in written),
                filename_template=template(split=split, filetype_suffix='array_record'),
            )
        )
        if split == 'train':
            moments = functools.reduce(statistics.Moments.merge, [w.moments for w in written])
            statistics.save(folder, statistics.from_moments(moments))
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=shards.features(size, format, class_names),
        split_infos=infos,
        filename_template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
        check_data=False,
        metadata=tfds.core.MetadataDict(fingerprint=fingerprint.hexdigest()),
        description=f'Images as central squares of {size} px, prepared by alexnet_jax.',
    )
    digests.write(folder, known)


def _in_processes(wanted: list[shards.Shard], max_bad: int, workers: int | None) -> list[shards.Written]:
    """Writes all shards on all cores; results in the order of the shards."""
    total, began, done, bad = sum(len(s.refs) for s in wanted), time.monotonic(), 0, 0
    # spawn: the parent has threads (TFDS, array_record), which a fork would copy in mid-air.
    context = multiprocessing.get_context('spawn')
    workers = workers or processes.cores()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=processes.end_with_parent) as pool:
        with processes.without_main():
            futures = [pool.submit(shards.write, shard) for shard in wanted]
        pending = set(futures)
        try:
            while pending:
                finished, pending = wait(pending, return_when=FIRST_EXCEPTION, timeout=0.5)
                for written in [future.result() for future in finished]:
                    for reason in written.bad:
                        print(f'unreadable: {reason}', file=sys.stderr, flush=True)
                    bad += len(written.bad)
                    done += written.count + len(written.bad)
                if bad > max_bad:
                    raise UserError(
                        f'{bad} of {done} images cannot be read (named above); put them right, or leave them out '
                        f'with --max_bad={bad} or more.'
                    )
                if finished:
                    speed = done / (time.monotonic() - began)
                    print(
                        f'{done}/{total} images  {speed:.0f} images/s  ETA {(total - done) / max(speed, 1e-9):.0f} s',
                        flush=True,
                    )
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if bad:
        print(f'{bad} unreadable images were left out.', file=sys.stderr, flush=True)
    return [future.result() for future in futures]


def main() -> None:
    args = flags.FLAGS
    prepare(
        args.input,
        args.output,
        size=args.size,
        format=args.format,
        val_fraction=args.val_fraction,
        seed=args.seed,
        max_bad=args.max_bad,
    )


if __name__ == '__main__':
    flags.DEFINE_string('input', None, 'An ImageNet archive, a folder of archives or images, or tfds:NAME.')
    flags.DEFINE_string('output', None, 'Directory to write; must not exist.')
    flags.DEFINE_integer('size', 256, 'Side of the prepared squares, pixels.')
    flags.DEFINE_string('format', 'jpeg', 'jpeg: small; raw: no decoding in training.')
    flags.DEFINE_float('val_fraction', 0.0, 'Part of the training images to set aside as the val split.')
    flags.DEFINE_integer('seed', 0, 'Of the order of the images and of the choice for val.')
    flags.DEFINE_integer('max_bad', 0, 'Unreadable images to leave out before giving up.')
    cli.run(main, required=('input', 'output'))
