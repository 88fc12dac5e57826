"""Flips single bits of a checkpoint and of prepared data, and reads them after each flip, in one process.

    python -m tests.faults.flips --flips=34000 --seed=0 --output=docs/results/flips.json

After each flip, every reader must either name what is damaged or return exactly what it returns without the flip.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import logging
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np

from alexnet_jax.checkpoints import verify
from alexnet_jax.checkpoints.manager import CheckpointManager, config_to_json
from alexnet_jax.core import sharding
from alexnet_jax.data import cache, datasets
from alexnet_jax.prepare import dataset_writer, prepare
from alexnet_jax.training import build, restore, train
from alexnet_jax.utils import checksums
from alexnet_jax.utils.environment import describe_environment
from alexnet_jax.utils.errors import UserError
from tests import helpers
from tests.faults import long_run, results

# Returns (all values, what is reported), or None if the flip is not tried.
Read = Callable[['Flip'], tuple[Any, list[str]] | None]
_EVERY_RESTORE = 50  # if the damaged step was moved away, the rest cannot depend on the flip: one in 50 is tried
_EVERY_LOAD = 4  # `load` does not read the optimizer state: it is tried for one in four flips of it
_EVERY_BARE = 20  # one in twenty flips is also read without digests
_WHOLE = 0.85  # of all flips, at most this share for the files of which all positions are flipped
_SHARED_MEMORY = pathlib.Path('/dev/shm')


@dataclasses.dataclass(frozen=True)
class Flip:
    """A flipped bit. Used as a context manager: the bit is flipped back at the end."""

    folder: pathlib.Path  # with the list of digests
    path: pathlib.Path
    position: int
    bit: int
    number: int

    def __enter__(self) -> 'Flip':
        self._flip()
        return self

    def __exit__(self, *_) -> None:
        self._flip()

    def _flip(self) -> None:
        with open(self.path, 'r+b') as file:
            file.seek(self.position)
            byte = file.read(1)[0]
            file.seek(self.position)
            file.write(bytes([byte ^ 1 << self.bit]))

    def is_named(self, text: str) -> bool:
        """Returns whether a message names the file, a record of it, or, for the list of digests, one of its files."""
        is_list, has_records = self.path.name == checksums.FILE_NAME, 'array_record' in self.path.name
        return (
            str(self.path) in text
            or (is_list and f'{self.folder}/' in text)
            or (has_records and re.search(rf'record \d+ in (train|val) of {self.folder} ', text) is not None)
        )


@dataclasses.dataclass(frozen=True)
class Stratum:
    """Positions of a file."""

    folder: pathlib.Path  # with the list of digests
    path: pathlib.Path
    kind: str  # class of the file, a row of the table
    positions: np.ndarray
    whole: bool  # whether to flip a bit at every position


class Checkpoints:
    """A workdir with two steps, and what reads them."""

    def __init__(self, workdir: pathlib.Path):
        self.workdir, self.folder = workdir, workdir / 'checkpoints'
        config = long_run.get_config()
        every = {'checkpoint_every_steps': 2, 'eval_every_steps': 2, 'log_every_steps': 2}
        config.update_from_flattened_dict({'data.num_workers': 0, 'data.path': 'digits', 'num_steps': 4, **every})
        self._setup = build.build(config)
        train.run(self._setup, str(workdir))
        data, sizes = self._setup.dataset, {'examples': self._setup.num_examples}
        sizes['record_size'] = data.record_size
        meta = {'config': config_to_json(config), 'class_names': list(data.class_names), **sizes}
        self._meta = {**meta, 'fingerprint': data.fingerprint}
        self._saved = CheckpointManager(str(workdir), read_only=True)
        self._states: dict[int, Any] = {}
        for step, hidden in ((4, None), (2, 4)):
            with self._hidden(hidden), CheckpointManager(str(workdir)) as saved:
                self._states[step] = self._restore(saved)

    @contextlib.contextmanager
    def _hidden(self, step: int | None) -> Iterator[None]:
        """Moves the folder of a step away and back."""
        path, away = self.folder / str(step), self.workdir / 'hidden'
        if step:
            path.rename(away)
        yield
        if step:
            away.rename(path)

    def strata(self) -> Iterator[Stratum]:
        for step in self._states:
            folder = self.folder / str(step)
            for path in sorted(path for path in folder.rglob('*') if path.is_file()):
                kind = _checkpoint_kind(path.relative_to(folder))
                is_last = step == max(self._states)
                yield Stratum(folder, path, kind, _all(path), is_last and 'arrays of' not in kind)

    def readers(self) -> dict[str, Read]:
        return {'verify': _verify, 'load': self._load, 'best': self._best, 'training': self._train}

    def _load(self, flip: Flip) -> tuple[Any, list[str]] | None:
        if 'training' in flip.path.parts and flip.number % _EVERY_LOAD:
            return None
        found = self._saved.load(int(flip.folder.name))
        rest = (found.step, repr(found.network), repr(found.augmentation), found.record_size, found.class_names)
        return (rest, json.dumps(found.config), _exact((found.params, found.image_stats))), []

    def _best(self, flip: Flip) -> tuple[Any, list[str]]:
        return self._saved.best(), []

    def _train(self, flip: Flip) -> tuple[Any, list[str]]:
        """Opens the checkpoints as training does, which moves a damaged step away, and restores the last step."""
        step, last = flip.folder.name, max(self._states)
        try:
            with CheckpointManager(str(self.workdir)) as saved:
                if not saved.damaged:
                    return self._restore(saved), []
                (left,) = saved.steps()
                is_same = flip.number % _EVERY_RESTORE or self._restore(saved) == self._states[left]
                return self._states[last] if is_same and left != int(step) else None, saved.damaged
        finally:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / f'{step}.damaged').rename(self.folder / step)

    def _restore(self, saved: CheckpointManager) -> Any:
        key = sharding.random_key(self._setup.mesh, self._setup.config.seed)
        state, meta = restore.restore_or_init(saved, self._setup, key, self._meta, str(self.workdir))
        return _exact(state), json.dumps(meta)


def _checkpoint_kind(path: pathlib.PurePath) -> str:
    if path.name == checksums.FILE_NAME:
        return 'checkpoint: list of digests'
    if path.name == 'metrics':
        return 'checkpoint: metrics'
    if path.name == 'manifest.ocdbt':
        return 'checkpoint: manifests'
    if path.parent.name == 'd':
        return f'checkpoint: arrays of {path.parts[0]}'
    return 'checkpoint: other JSON'


class Prepared:
    """A prepared dataset of 30 images, and what reads it."""

    def __init__(self, folder: pathlib.Path, pictures: pathlib.Path, format: str):
        self.folder, self.format = folder, format
        with mock.patch.object(dataset_writer, '_MIN_SHARDS', 2):
            prepare.prepare(pictures, folder, size=32, format=format, val_fraction=0.2, workers=1)
        self._expected: Any = None
        self._expected = self._read(None)[0]

    def strata(self) -> Iterator[Stratum]:
        for path in sorted(self.folder.iterdir()):
            if 'array_record' not in path.name:
                kinds = {checksums.FILE_NAME: 'list of digests', 'image_stats.npz': 'image statistics'}
                kind = kinds.get(path.name, 'JSON and class names')
                yield Stratum(self.folder, path, f'data: {kind}', _all(path), path.suffix != '.npz')
                continue
            is_padding = np.ones(path.stat().st_size, bool)
            parts = [place.span() for place in re.finditer(rb'(?:(?!\0{64}).)+', path.read_bytes(), re.S)]
            for start, end in [(0, 64), (64, parts[0][1]), *parts[1:]]:
                is_padding[start:end] = False
                kind = 'header of ' if not start else '' if start == 64 else 'index of '
                positions = np.arange(start, end)
                yield Stratum(self.folder, path, f'data: {kind}{self.format} records', positions, start != 64)
            kind = f'data: padding of {self.format} records'
            yield Stratum(self.folder, path, kind, np.flatnonzero(is_padding), False)

    def readers(self) -> dict[str, Read]:
        return {'verify': _verify, 'reading': self._read}

    def _read(self, flip: Flip | None) -> tuple[Any, list[str]]:
        """Opens the data and reads all records. Replaces those that are reported as unreadable by the expected ones."""
        data = datasets.open_dataset(self.folder)
        problems, found = [], {}
        for split, records in data.splits.items():
            kept = _Kept(records)
            batch = cache.Records(kept, data.record_size).read(range(len(records)))
            problems += (reasons := batch.get('unreadable', []))
            for i, weight in enumerate(batch['weight']):
                if weight == 1:
                    pixels, label = batch['image'][i].tobytes(), int(batch['label'][i])
                    found[split, i] = pixels, label, kept.names[i]
                elif any(f'record {i} in {split} of {self.folder} ' in reason for reason in reasons):
                    found[split, i] = self._expected[0][split, i]
        return (found, data.class_names, data.record_size, data.fingerprint, _exact(data.image_stats)), problems


class _Kept:
    """Records whose file names are kept when they are read."""

    def __init__(self, records):
        self._records, self.names = records, {}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        self.names[index] = record['file_name']
        return record


def _all(path: pathlib.Path) -> np.ndarray:
    return np.arange(path.stat().st_size)


def _exact(tree: Any) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Returns the names, types, shapes and bytes of arrays."""
    leaves = jax.tree.leaves_with_path(jax.device_get(tree))
    arrays = [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in leaves]
    return [(name, array.dtype.name, array.shape, array.tobytes()) for name, array in arrays]


def _verify(flip: Flip) -> tuple[Any, list[str]]:
    """Without a problem, returns another value than expected: no flip may escape."""
    problems = verify.verify(flip.folder)[1]
    return bool(problems), problems


def outcome(read: Read, flip: Flip, expected: Any) -> tuple[str, str]:
    """Returns what a reader makes of a flip, and a description if it is neither 'named' nor 'harmless'."""
    try:
        found = read(flip)
    except UserError as error:
        text = str(error)
        return ('named', '') if flip.is_named(text) else ('not named', text)
    except Exception as error:
        return 'other error', repr(error)
    if found is None:
        return 'not tried', ''
    value, problems = found
    if value != expected:
        return 'silent', ''
    if any(map(flip.is_named, problems)):
        return 'named', ''
    return ('not named', problems[0]) if problems else ('harmless', '')


def silent_without_digests(readers: dict[str, Read], flip: Flip, expected: dict[str, Any]) -> bool:
    """Returns whether a reader would return other values, and report nothing, if there were no digests."""
    with mock.patch.object(checksums, 'find_mismatches', lambda *_: []):
        found = {name: outcome(read, flip, expected[name])[0] for name, read in readers.items() if name != 'verify'}
    return 'silent' in found.values()


def choose(strata: list[Stratum], flips: int) -> list[int]:
    """Returns how many positions to flip of each stratum: all of those that are small or `whole`, if possible."""
    sizes = [len(stratum.positions) for stratum in strata]
    taken, left = [0] * len(sizes), flips
    for whole, share in ((True, _WHOLE), (False, 1.0)):
        order = sorted((i for i in range(len(sizes)) if strata[i].whole == whole), key=sizes.__getitem__)
        budget = int(left * share)
        for done, i in enumerate(order):
            taken[i] = min(sizes[i], budget // (len(order) - done))
            budget -= taken[i]
            left -= taken[i]
    return taken


def run(
    flips: int, seed: int, formats: Sequence[str] = ('raw', 'jpeg'), *, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Flips about `flips` bits and returns the outcomes by class of file; 'problems' describes those that must not be.

    Also reads without the digests after some of the flips, and counts how many are then silent.
    """
    base = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=base) as name:
        folder = pathlib.Path(name)
        pictures = helpers.write_pictures(folder / 'pictures', range(3), count=10)
        scenes: list[Checkpoints | Prepared] = [Checkpoints(folder / 'run')]
        scenes += [Prepared(folder / format, pictures, format) for format in formats]
        strata = [(stratum, scene.readers()) for scene in scenes for stratum in scene.strata()]
        counts = choose([stratum for stratum, _ in strata], flips)
        return _flip_all(zip(strata, counts, strict=True), np.random.default_rng(seed), say)


def _flip_all(chosen: Iterable, rng: np.random.Generator, say: Callable[[str], None]) -> dict[str, Any]:
    number, began = 0, time.monotonic()
    kinds: dict[str, dict[str, Any]] = {}
    expected: dict[pathlib.Path, dict[str, Any]] = {}
    problems: list[str] = []
    for (stratum, readers), count in chosen:
        folder, path, positions = stratum.folder, stratum.path, stratum.positions
        if folder not in expected:
            undamaged = Flip(folder, folder, 0, 0, 0)
            expected[folder] = {name: name == 'verify' or read(undamaged)[0] for name, read in readers.items()}
        row = kinds.setdefault(stratum.kind, {'files': set(), 'bytes': 0, 'flips': 0, 'readers': {}})
        row['files'].add(path)
        row |= {'bytes': row['bytes'] + len(positions), 'flips': row['flips'] + count}
        without = row.setdefault('without_digests', {'flips': 0, 'silent': 0})
        for position in map(int, np.sort(rng.choice(positions, count, replace=False))):
            number += 1
            with Flip(folder, path, position, int(rng.integers(8)), number) as flip:
                for name, read in readers.items():
                    result, text = outcome(read, flip, expected[folder][name])
                    row['readers'].setdefault(name, collections.Counter())[result] += 1
                    if result not in ('named', 'harmless', 'not tried'):
                        place = f'bit {flip.bit} of byte {position} of {path.relative_to(folder.parent)}'
                        problems.append(f'{name}: {result}: {place}: {text}')
                        say(problems[-1])
                if number % _EVERY_BARE == 0:
                    without['flips'] += 1
                    without['silent'] += silent_without_digests(readers, flip, expected[folder])
            if number % 1000 == 0:
                say(f'{number} flips, {time.monotonic() - began:.0f} s')
    kinds = {kind: {**row, 'files': len(row['files'])} for kind, row in kinds.items()}
    return {'flips': number, 'seconds': time.monotonic() - began, 'kinds': kinds, 'problems': problems}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--flips', type=int, default=34_000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', required=True, help='file of the results')
    args = parser.parse_args()
    jax.config.update('jax_platforms', 'cpu')
    logging.root.handlers[:] = [logging.NullHandler()]  # damage is reported thousands of times
    environment = describe_environment()
    found = run(args.flips, args.seed, say=functools.partial(print, flush=True))
    results.write(args.output, 'flips', {'seed': args.seed, **found}, environment)
    print(f'{found["flips"]} flips, {len(found["problems"])} neither named nor harmless')
    raise SystemExit(bool(found['problems']))


if __name__ == '__main__':
    main()
