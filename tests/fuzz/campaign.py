"""Tries changed files on a reader and collects what must not happen."""

import contextlib
import json
import os
import pathlib
import random
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable

from tests import test_fuzz as made
from tests.fuzz.readers import READERS

_SHOWN = (UserWarning, RuntimeWarning, SyntaxWarning, FutureWarning)  # warnings that Python prints by default


class Campaign:
    """Runs a reader on cases in a folder of its own. `findings` maps the place of a failure to its first example."""

    def __init__(self, reader: str, root: pathlib.Path):
        self._reader, self._root, self._folder = READERS[reader], root, root / 'in'
        for name in ('in', 'cwd', 'tmp'):
            (root / name).mkdir(parents=True)
        os.chdir(root / 'cwd')
        tempfile.tempdir = str(root / 'tmp')
        seeds = self._reader.set_up(self._folder)
        self._names = sorted({name for name, _ in seeds})
        self.seeds = [bytes([self._names.index(name)]) + content for name, content in seeds]
        self._kept = {n: (self._folder / n).read_bytes() for n in self._names if (self._folder / n).is_file()}
        self.findings: dict[str, tuple[str, bytes]] = {}
        self.executions = self.accepted = 0
        self._others = _tree(self._folder)

    def run(self, case: bytes) -> None:
        """Reads the file of a case. Keeps the case if anything but success or an error of one line happens."""
        if not case:
            return
        self.executions += 1
        name = self._names[case[0] % len(self._names)]
        (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self._folder / name).write_bytes(self._reader.encode(name, case[1:]))
        began, before = time.monotonic(), made._peak()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter('always')
            try:
                self._reader.read(self._folder, name)
                self.accepted += 1
            except self._reader.errors as error:
                self._check_error(case, error)
            except Exception as error:
                self._found(case, error, f'{type(error).__name__}: {error}')
        seconds, memory = time.monotonic() - began, made._peak() - before
        if seconds > made._MOST_SECONDS:
            self._found(case, None, f'{name}: {seconds:.0f} s')
        if memory > self._reader.memory + 100 * len(case):
            self._found(case, None, f'{name}: {memory / 2**20:,.0f} MiB for {len(case):,} bytes')
        for warning in warned:
            if issubclass(warning.category, _SHOWN):
                self._found(case, None, f'{warning.category.__name__} in {warning.filename}: {warning.message}')
        self._check_files(case, name)

    def _check_error(self, case: bytes, error: Exception) -> None:
        try:
            made._one_line(error)
        except Exception as wrong:
            self._found(case, error, f'not one printable line: {wrong!r:.300}')
        cause: BaseException | None = error
        while cause := (cause.__cause__ or cause.__context__):
            if isinstance(cause, MemoryError):
                self._found(case, cause, 'out of memory')

    def _check_files(self, case: bytes, name: str) -> None:
        written = [path for part in ('cwd', 'tmp') for path in os.listdir(self._root / part)]
        if written or len(os.listdir(self._root)) != 3:
            self._found(case, None, f'{name}: wrote {written or os.listdir(self._root)}')
        if name in self._kept:
            (self._folder / name).write_bytes(self._kept[name])
        else:
            with contextlib.suppress(FileNotFoundError):
                (self._folder / name).unlink()
        if self.executions % 64 == 1 and (others := _tree(self._folder) - self._others):
            self._found(case, None, f'{name}: left {sorted(others)[:3]}')

    def _found(self, case: bytes, error: BaseException | None, what: str) -> None:
        frames = traceback.extract_tb(error.__traceback__) if error else []
        place = f'{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}' if frames else ''
        key = f'{place} {what[:60]}'
        if key not in self.findings:
            stack = ''.join(traceback.format_list(frames[-6:]))
            self.findings[key] = (f'{what[:500]}\n{stack}', case)
            print(f'finding {len(self.findings)}: {what[:500]}\n{stack}{case[:200]!r}', flush=True)


def _tree(folder: pathlib.Path) -> set[str]:
    return {os.path.join(root, name) for root, _, names in os.walk(folder) for name in names}


def mutate(case: bytes, rng: random.Random, other: Callable[[bytes], bytes] | None = None) -> bytes:
    """Changes a case: an element of JSON, or bytes at a few places, as `test_fuzz._damaged` does."""
    kind, content = case[:1], case[1:]
    if content[:1] in (b'{', b'[') and rng.random() < 0.7:
        with contextlib.suppress(ValueError, RecursionError):
            return kind + json.dumps(_changed(json.loads(content), rng)).encode('utf-8', 'replace')
    if other and rng.random() < 0.6:
        return kind + other(content)
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, rng.choice([len(changed), min(len(changed), 64)]))
        match rng.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                size = rng.choice([1, 2, 3, 4, 8])
                number = rng.choice(made._LENGTHS) % 256**size
                changed[at : at + size] = number.to_bytes(size, rng.choice(['little', 'big']))
            case 2:
                changed[at:at] = rng.randbytes(rng.randint(1, 40))
            case 3:
                del changed[at : at + rng.randint(1, 40)]
            case 4:
                del changed[at + rng.randint(0, len(changed)) :]
            case 5:
                changed[at:at] = changed[at : at + rng.randint(1, 600)] * rng.choice([1, 2, 50])
    return kind + bytes(changed[: 2**20])


_VALUES = [None, True, -1, 0, 1, 3, 2**31, 2**62, 10**400, 1.5, float('nan'), float('inf'), '', 'a', '\x1b[2J',
           '\ud800', '../../x', '/etc/passwd', '\0', [], {}, [1, [2]], {'a': 1}, 'x\ny', '9' * 5000]  # fmt: skip


def _changed(value, rng: random.Random):
    """Returns JSON with one element changed, removed, repeated or nested deeply."""
    if not isinstance(value, list | dict) or not value or rng.random() < 0.1:
        return rng.choice(_VALUES) if rng.random() < 0.97 else made._DEEP
    value = value.copy()
    key = rng.randrange(len(value)) if isinstance(value, list) else rng.choice(sorted(value))
    if rng.random() < 0.1:
        del value[key]
    elif rng.random() < 0.1 and isinstance(value, dict):
        value[str(rng.choice(_VALUES))[:99]] = value.pop(key)
    else:
        value[key] = _changed(value[key], rng)
    return value
