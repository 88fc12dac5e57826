"""Prepares a dataset in parts, on several machines that share the folder of the output.

    OUTPUT.parts/plan.json     the shards of the dataset, and the conditions that all parts must have in common
    OUTPUT.parts/dataset/      finished shards; `join` adds the other files and renames this folder to OUTPUT
    OUTPUT.parts/results/      the result of each finished shard
    OUTPUT.parts/part-2-of-4/  the unfinished shards of a part, and beside it the part's lock

The shards are those of a run in one piece. Part i of n writes every nth of them, starting with the ith. The result of a
shard is written last, so a part that was stopped goes on with the shards that have none. `join` merges the results in
the order of the shards, as a run in one piece does, so the dataset is the same.
"""

import contextlib
import functools
import hashlib
import inspect
import io
import json
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np
from absl import logging
from PIL import features

from alexnet_jax.core import image_stats
from alexnet_jax.data import image_io
from alexnet_jax.prepare import dataset_writer, record_writer
from alexnet_jax.prepare.dataset_writer import Plan
from alexnet_jax.prepare.image_ref import Splits
from alexnet_jax.prepare.record_writer import Shard, ShardResult
from alexnet_jax.utils.errors import UserError, first_line, listed
from alexnet_jax.utils.files import (
    absolute_local_path,
    as_write_error,
    atomic_file,
    check_new,
    file_lock,
    open_regular,
)

_MAX_PARTS = 500  # `join` holds the locks of all parts
_PACKAGES = ('alexnet_jax', 'numpy', 'pillow', 'array-record', 'tensorflow-datasets', 'protobuf')
_CODE = (dataset_writer, record_writer, image_io, image_stats)  # decides the content of records and their statistics


def parse(part: str) -> tuple[int, int]:
    """Returns (2, 4) for '2/4'. Raises UserError unless it is a part of at least one, counted from 1."""
    match = re.fullmatch(r'([0-9]{1,3})/([0-9]{1,3})', part)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= _MAX_PARTS:
        raise UserError(f'--part={part}: expected i/n with i from 1 to n, such as 1/4, and at most {_MAX_PARTS} parts.')
    return int(match[1]), int(match[2])


def write(output: str, part: str, plan: Plan, splits: Splits, options: Mapping[str, float], workers: int) -> None:
    """Writes the shards of one part that are not finished. Repeats those whose unreadable images have been repaired.

    Args:
      output: absolute path of the dataset.
      options: by flag, those that decide the order and the split of the images. They must be the same for all parts.

    Raises:
      UserError: another process works on this part, the part has other conditions than those before it, an image is
        lost, or the disk is full.
    """
    i, n = parse(part)
    folder = f'{output}.parts'
    conditions = _conditions(plan, splits, {**options, 'the number of parts': n})
    with as_write_error(folder):
        _begin(folder, {'conditions': conditions, 'plan': plan._asdict()})
        _check_conditions(folder, _read_plan(folder)[0], conditions, part)
        scratch = os.path.join(folder, f'part-{i}-of-{n}')
        with file_lock(f'{scratch}.lock', f'writing part {i}/{n} of {output!r}'):
            check_new(output)  # the parts may have been joined since the caller looked
            for name in ('dataset', 'results'):
                os.makedirs(os.path.join(folder, name), exist_ok=True)
            shards = dataset_writer.make_shards(os.path.join(folder, 'dataset'), plan, splits)
            own = shards[i - 1 :: n]
            todo = [shard for shard in own if not _is_finished(shard, folder)]
            if len(todo) < len(own):
                logging.info('part %s: %d of its %d shards are there.', part, len(own) - len(todo), len(own))
            shutil.rmtree(scratch, ignore_errors=True)  # left by a run that was killed
            os.makedirs(scratch)
            write_shard = functools.partial(_write_shard, folder=folder, scratch=scratch)
            results = dataset_writer.write_shards(todo, workers, write_shard) if todo else []
            shutil.rmtree(scratch)
    unreadable = sum(len(result.unreadable) for result in results)
    skipped = f'; skipped {unreadable} unreadable images in the shards of this run' if unreadable else ''
    logging.info('part %s is finished: %d of %d shards%s.', part, len(own), len(shards), skipped)


def join(output: str | os.PathLike, *, max_unreadable: int = 0) -> None:
    """Makes the dataset `output` of its parts, and removes their folder. Needs neither the images nor their listing.

    After a UserError, all parts are still there. A call that was stopped can be repeated.

    Raises:
      UserError: a part is missing, not finished or being written, there are too many unreadable images, or the disk is
        full.
    """
    if max_unreadable < 0:
        raise UserError(f'--max_unreadable={max_unreadable}: expected 0 or more.')
    output = absolute_local_path(output)
    folder = f'{output}.parts'
    if not (os.path.isdir(output) and _is_left_over(folder)):
        check_new(output)
        with as_write_error(output):
            _join(output, folder, max_unreadable)
    shutil.rmtree(folder, ignore_errors=True)  # after the locks: network file systems keep files that are open
    logging.info('%s is ready.', output)


def _is_left_over(folder: str) -> bool:
    """Returns whether a call was stopped at the end, so that a folder has the rest of the parts, without the dataset.

    A folder with anything else is not one of parts, although its name is.
    """
    own = r'plan\.json|results|part-[0-9]+-of-[0-9]+(\.lock)?'
    return os.path.isdir(folder) and all(re.fullmatch(own, name) for name in os.listdir(folder))


def _join(output: str, folder: str, max_unreadable: int) -> None:
    """Completes the dataset and renames it to `output`."""
    if not os.path.isdir(folder):
        raise UserError(
            f'{folder!r} does not exist; first write the parts: --part=1/n to --part=n/n, with the same --output.'
        )
    conditions, plan = _read_plan(folder)
    n, dataset = conditions['the number of parts'], os.path.join(folder, 'dataset')
    with contextlib.ExitStack() as locks:
        for i in range(1, n + 1):
            lock = os.path.join(folder, f'part-{i}-of-{n}.lock')
            locks.enter_context(file_lock(lock, f'writing part {i}/{n} of {output!r}, or joining the parts'))
        paths = dataset_writer.shard_paths(dataset, plan)
        _check_complete(folder, paths, n)
        for name in set(os.listdir(dataset)) - set(map(os.path.basename, paths)):
            os.remove(os.path.join(dataset, name))  # left by a call that was stopped
        results = dataset_writer.warn_of_unreadable(_load_results(folder, paths))
        dataset_writer.finish(dataset, plan, results, max_unreadable)
        os.rename(dataset, output)


def _conditions(plan: Plan, splits: Splits, options: Mapping[str, float]) -> dict[str, Any]:
    """Returns what all parts must have in common, by its name in error messages.

    The images are compared by their names, labels and order, and by their places in archives. The contents of files
    are not compared, nor the paths of their folders: machines may have copies.
    """
    digest = hashlib.sha256()
    for refs in splits.values():
        for ref in refs:
            digest.update(f'{ref.name}\0{ref.label}\0{ref.offset}\0{ref.length}\0'.encode())
    names = '\n'.join([*plan.class_names, plan.named_classes])
    code = ''.join(map(inspect.getsource, _CODE))
    return {
        '--size': plan.size,
        '--format': plan.format,
        **options,
        **{f'the number of {split} images': sum(counts) for split, counts in plan.shards.items()},
        'the number of classes': len(plan.class_names),
        'the digest of the class names': hashlib.sha256(names.encode()).hexdigest(),
        'the digest of the names and labels of the images': digest.hexdigest(),
        'the digest of the code of alexnet_jax': hashlib.sha256(code.encode()).hexdigest(),
        **{f'the version of {name}': _version(name) for name in _PACKAGES},
        'the version of libjpeg-turbo': features.version('libjpeg_turbo'),
    }


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _begin(folder: str, content: Mapping[str, Any]) -> None:
    """Creates the folder of the parts with its plan, unless it exists. Several processes may do so at once."""
    if os.path.isdir(folder):
        return
    new = os.path.join(os.path.dirname(folder), f'.{os.path.basename(folder)}.{uuid.uuid4().hex}')
    os.makedirs(new)
    try:
        with atomic_file(os.path.join(new, 'plan.json')) as file:
            json.dump(content, file, default=int)  # NumPy integers
        os.rename(new, folder)  # fails if the folder exists and is not empty
    except OSError:
        if not os.path.isdir(folder):
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _read_plan(folder: str) -> tuple[dict[str, Any], Plan]:
    """Returns the conditions and the plan of the parts in a folder. Raises UserError if it has none."""
    path = os.path.join(folder, 'plan.json')
    try:
        with open_regular(path, encoding='utf-8') as file:
            content = json.load(file)
        return content['conditions'], Plan(**content['plan'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path!r} cannot be read ({first_line(error)}); remove {folder!r} to begin anew.') from error


def _check_conditions(folder: str, first: Mapping[str, Any], own: Mapping[str, Any], part: str) -> None:
    """Raises UserError if a part has other conditions than the part that began the folder."""
    for name in {**first, **own}:
        now, then = (conditions.get(name, 'none') for conditions in (own, first))
        if now != then:
            raise UserError(
                f'part {part}: {name} is {now}, but it was {then} when {folder!r} was begun; use '
                'the same images, options and versions for all parts, or remove that folder to begin anew.'
            )


def _check_complete(folder: str, paths: Sequence[str], n: int) -> None:
    """Raises UserError if shards are missing. Names their parts."""
    missing = Counter(i % n + 1 for i, path in enumerate(paths) if not _has_result(folder, path))
    if missing:
        total = Counter(i % n + 1 for i in range(len(paths)))
        named = [f'--part={i}/{n} ({missing[i]} of {total[i]} shards are missing)' for i in sorted(missing)]
        raise UserError(f'{folder!r}: {len(missing)} of {n} parts are not finished; run {listed(named, 5)}.')


def _result_path(folder: str, shard_path: str) -> str:
    return os.path.join(folder, 'results', f'{os.path.basename(shard_path)}.npz')


def _has_result(folder: str, shard_path: str) -> bool:
    return os.path.isfile(shard_path) and os.path.isfile(_result_path(folder, shard_path))


def _is_finished(shard: Shard, folder: str) -> bool:
    """Returns whether a shard has a result that is up to date: its unreadable images still cannot be read."""
    if not _has_result(folder, shard.path):
        return False
    try:
        result, _ = _load_result(folder, shard.path)
    except UserError:  # damaged
        return False
    unreadable = {name for name, _ in result.unreadable}
    return not any(record_writer.is_readable(ref, shard.size) for ref in shard.refs if ref.name in unreadable)


def _write_shard(shard: Shard, folder: str, scratch: str) -> ShardResult:
    """Writes a shard, then its result. Each appears when it is complete. Runs in a worker process.

    Returns the result without its sums over images, which are large.
    """
    path = os.path.join(scratch, os.path.basename(shard.path))
    result = record_writer.write_shard(shard._replace(path=path))
    with open(path, 'rb') as file:
        os.fsync(file.fileno())
    rest = result._asdict() | {'moments': None, 'labels': sorted(result.labels.items())}
    arrays: dict[str, Any] = {**result.moments._asdict(), 'rest': json.dumps(rest), 'rounding': _rounding(shard.size)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    with contextlib.suppress(FileNotFoundError):  # of a shard that is written again
        os.remove(_result_path(folder, shard.path))
    os.replace(path, shard.path)
    with atomic_file(_result_path(folder, shard.path), 'wb') as file:
        file.write(buffer.getvalue())
    return result._replace(moments=image_stats.Moments.zeros(0))


@functools.cache
def _rounding(size: int) -> str:
    """Returns a digest of the sums over one image: processors of different types round them differently."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    return hashlib.sha256(image_stats.Moments.zeros(size).add(pixels).outer.tobytes()).hexdigest()


def _load_results(folder: str, shard_paths: Sequence[str]) -> Iterator[ShardResult]:
    """Yields the results of shards. Warns if they were computed on processors of different types."""
    first = None
    for path in shard_paths:
        result, rounding = _load_result(folder, path)
        if first and rounding != first:
            logging.warning(
                'the parts were written on processors that round differently: the color statistics may differ from '
                'those of a run on one machine in their last digits.'
            )
        first = rounding if first in (None, rounding) else ''  # '': has warned
        yield result


def _load_result(folder: str, shard_path: str) -> tuple[ShardResult, str]:
    """Returns the result of a shard, and `_rounding` where it was computed. Raises UserError if it is damaged."""
    path = _result_path(folder, shard_path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            rest = json.loads(str(archive['rest']))
            rest |= {'labels': Counter(dict(rest['labels']))}
            moments = image_stats.Moments(int(archive['num_images']), archive['image'], archive['outer'])
            return ShardResult(**{**rest, 'moments': moments}), str(archive['rounding'])
    except Exception as error:  # zipfile, zlib, json and numpy raise different types
        raise UserError(f'{path!r} is damaged ({first_line(error)}); run the parts again, then join them.') from error
