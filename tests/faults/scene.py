"""Children that train, what is done to them, and how one knows that nothing was lost."""

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from PIL import Image

from alexnet_jax.checkpoints import manager, verify
from alexnet_jax.data import datasets
from alexnet_jax.training import build
from tests import ROOT
from tests.faults import config as config_file

TIMINGS = ('images_per_second', 'data_wait')
_PATIENCE = 90.0  # seconds from a signal to the end, on a busy machine and while it compiles
_NO_OVERRIDE = '--bounding-set=-dac_override,-dac_read_search'  # root, but bound by permissions


class LostError(AssertionError):
    """Something that was promised did not hold."""


class NotHereError(Exception):
    """This machine does not let the fault be made."""


class TooLateError(Exception):
    """The run was over before the fault came: nothing was tried."""


def expect(holds, what: str) -> None:
    if not holds:
        raise LostError(what)


def in_time(made) -> None:
    """Whether the fault met a run that was under way; a trial without one must not count as survived."""
    if not made:
        raise TooLateError


def step_of(workdir) -> int:
    """The last in metrics.jsonl: where a run was at least, and no more than a few steps ago."""
    found = re.findall(r'^\{"step": (\d+),', _text(workdir / 'metrics.jsonl'), re.M)
    return int(found[-1]) if found else 0


def noticed(code: int, before: int) -> None:
    """An exit code that is not 0. With 0 the run must have been near its end when the fault came, at step `before`."""
    expect(code != 0 or before > config_file.get_config().num_steps - 24, f'a fault at step {before} changed nothing')
    in_time(code != 0)


def _text(path: pathlib.Path) -> str:
    return path.read_text(errors='replace') if path.exists() else ''


class Scene:
    """A folder for one trial, its chance, and runs that nothing happened to, to compare with."""

    def __init__(self, folder: pathlib.Path, rng: np.random.Generator, shared: pathlib.Path):
        self.folder, self.rng, self._shared = folder, rng, shared
        self.mark = f'{os.getpid()}-{rng.integers(1 << 40)}'
        self.slowest_stop = 0.0

    def start(self, workdir, *options, command=('train',), processes=1, limited=False, **popen) -> subprocess.Popen:
        """The command itself, not a wrapper around it (but with several processes)."""
        words = [sys.executable, '-m', 'alexnet_jax', *command]
        if command == ('train',):
            words = [sys.executable, '-m', 'alexnet_jax.main']
            words += ['--config=tests/faults/config.py', f'--workdir={workdir}', *options]
            if not any('cpu_devices' in option for option in options):
                words.append('--cpu_devices=1')
        if processes > 1:
            words = [str(ROOT / 'launch' / 'local.sh'), str(processes), *words[3:]]
        if limited and os.getuid() == 0:
            if shutil.which('setpriv') is None:
                raise NotHereError('needs setpriv, to bind root by permissions')
            words = ['setpriv', _NO_OVERRIDE, *words]
        environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHON': sys.executable, 'FAULT_MARK': self.mark}
        log = open(self.folder / 'log.txt', 'a+')
        return subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True, **popen
        )

    def run(self, workdir, *options, **keywords) -> tuple[int, str]:
        """(exit code, what was printed) of a command that is let be."""
        before = self.printed()
        code = self.end_of(self.start(workdir, *options, **keywords), 400)
        return code, self.printed()[len(before) :]

    def end_of(self, child, seconds: float = 120) -> int:
        """Exit code of a child that should end by itself."""
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            raise LostError(f'it still runs after {seconds} s: {self.printed()[-2000:]}') from None

    def printed(self) -> str:
        return _text(self.folder / 'log.txt')

    def reference(self, *options, processes=1) -> pathlib.Path:
        """The workdir of the same run, never stopped."""
        path = self._shared / ('whole ' + ' '.join((*options, str(processes)))).replace('/', '_')
        if not path.exists():
            partial = self._shared / f'partial-{self.mark}'
            code, printed = self.run(partial, *options, processes=processes)
            expect(code == 0, f'a run that nothing happened to ends with {code}: {printed[-2000:]}')
            with contextlib.suppress(OSError):  # another one has been quicker
                partial.rename(path)
        return path

    def copy_of_reference(self, *options) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(self.reference(*options), self.folder / 'run'))

    def prepared(self) -> pathlib.Path:
        """The digits as JPEG, prepared by the command; for all trials."""
        path = self._shared / 'prepared'
        if not path.exists():
            raw = self.raw()
            partial = self._shared / f'partial-{self.mark}'
            code, printed = self.run(None, command=('prepare', f'--input={raw}', f'--output={partial}', '--size=32'))
            expect(code == 0, printed[-2000:])
            with contextlib.suppress(OSError):
                partial.rename(path)
        return path

    def raw(self) -> pathlib.Path:
        raw = self._shared / f'raw-{self.mark}'
        if not raw.exists():
            for split, records in datasets.open_dataset('digits').splits.items():
                for i, record in enumerate(records):
                    folder = raw / split / str(record['label'])
                    folder.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(record['image']).save(folder / f'{i}.jpg')
        return raw

    def await_training(self, child, workdir, *, more: int = 1) -> None:
        """Until the child has written so many more lines, or has ended."""
        metrics = workdir / 'metrics.jsonl'
        count = lambda: metrics.read_bytes().count(b'\n') if metrics.exists() else 0  # noqa: E731
        least = count()
        while child.poll() is None:
            now = count()
            least = min(least, now)  # a run that goes on cuts what it writes anew
            if now >= least + more:
                return
            time.sleep(0.02)

    def any_moment(self, child, workdir) -> None:
        """Some time of a run: mostly in training, now and then while it starts."""
        if self.rng.uniform() < 0.2:
            time.sleep(self.rng.uniform(0, 8))
        else:
            self.await_training(child, workdir)
            time.sleep(self.rng.uniform(0, 2.5))

    def stop(self, child, number=signal.SIGTERM, *, group=False) -> int:
        """Sends a signal and waits; nothing of the child may be left: no process, no shared memory."""
        before = _unused_memory()
        began = time.monotonic()
        in_time(child.poll() is None)
        (os.killpg if group else os.kill)(child.pid, number)
        try:
            code = child.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            raise LostError(f'{_PATIENCE} s after signal {number} it still runs: {self.printed()[-2000:]}') from None
        in_time(number != signal.SIGKILL or code == -number)
        if number == signal.SIGTERM:
            self.slowest_stop = max(self.slowest_stop, time.monotonic() - began)
        self.expect_nothing_left(before)
        return code

    def expect_nothing_left(self, before=None) -> None:
        """before: what lay in shared memory unused by any process already; None does not look there."""
        deadline = time.monotonic() + 20
        left = lambda: (self.alive(), [] if before is None else sorted(_unused_memory() - before))  # noqa: E731
        while any(left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        expect(not any(left()), f'left behind: {left()}')

    def alive(self, running: bytes = b'') -> list[int]:
        """Processes of this trial, or those with these words in their command line."""
        found = []
        for pid in filter(str.isdigit, os.listdir('/proc')):
            try:
                environment = pathlib.Path('/proc', pid, 'environ').read_bytes()
                words = pathlib.Path('/proc', pid, 'cmdline').read_bytes()
                state = pathlib.Path('/proc', pid, 'stat').read_text().rsplit(')', 1)[1].split()[0]
            except OSError:
                continue
            if f'FAULT_MARK={self.mark}'.encode() in environment and state != 'Z' and running in words:
                found.append(int(pid))
        return found

    def expect_same_end(self, workdir, *options, processes=1, written: str = '') -> None:
        """The same command goes on to the same parameters, optimizer state and metrics, bit for bit."""
        sealed = [path.parent.name for path in workdir.glob('checkpoints/*/SHA256SUMS')]
        steps = [int(found[1]) for name in sealed if (found := re.fullmatch(r'(\d+)(\.replaced)?', name))]
        code, printed = self.run(workdir, *options, processes=processes)
        expect(code == 0, f'the same command ends with {code}: {printed[-3000:]}')
        # To begin anew ends the same, too.
        written = written or (f'(Resuming from|is finished:) step {max(steps)} of' if steps else '')
        expect(re.search(written, printed), f'{written!r} is not in what it says: {printed[-3000:]}')
        whole = self.reference(*options, processes=processes)
        expect(lines(workdir) == lines(whole), f'the metrics differ: {lines(workdir)} and {lines(whole)}')
        a, b = (jax.tree.leaves(final_state(path)) for path in (workdir, whole))
        expect(all(np.array_equal(x, y) for x, y in zip(a, b, strict=True)), 'the parameters or velocities differ')
        expect(not verify.verify(str(workdir))[1], f'damage at the end: {verify.verify(str(workdir))[1]}')


def _unused_memory() -> set[str]:
    """Shared memory as grain's workers make it that no process has mapped."""
    mapped = set()
    for pid in filter(str.isdigit, os.listdir('/proc')):
        with contextlib.suppress(OSError):
            mapped |= set(re.findall(r'/dev/shm/(psm_\w+)', pathlib.Path('/proc', pid, 'maps').read_text()))
    return {name for name in os.listdir('/dev/shm') if name.startswith('psm_')} - mapped


def lines(workdir) -> list[dict]:
    """Those of metrics.jsonl, but for what was measured with a clock."""
    found = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in found]


@functools.cache
def _shapes(num_classes: int):
    config = config_file.get_config()
    config.model.num_classes = num_classes
    return build.build(config).steps.state_shapes


def final_state(workdir):
    with manager.CheckpointManager(str(workdir), read_only=True) as saved:
        return jax.device_get(saved.restore(saved.latest(), _shapes(10)))


@contextlib.contextmanager
def small_disk(path: pathlib.Path, size: str):
    """A tmpfs of a few megabytes at `path`."""
    path.mkdir()
    made = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', str(path)], capture_output=True)
    if made.returncode:
        raise NotHereError(f'needs the right to mount a tmpfs ({made.stderr.decode().strip()})')
    try:
        yield path
    finally:
        subprocess.run(['umount', '-l', str(path)], check=True)


@contextlib.contextmanager
def filled(path: pathlib.Path):
    """Takes all that is left of a disk."""
    filler = path / 'filler'
    with open(filler, 'wb', buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


def attempt(fault, folder: pathlib.Path, shared: pathlib.Path, *seed: int) -> Scene:
    """Makes a fault, and once more where the run was over before it came.

    Raises:
      LostError: something promised did not hold.
      NotHereError: the fault cannot be made here.
    """
    for turn in range(5):
        scene = Scene(folder / str(turn), np.random.default_rng([*seed, turn]), shared)
        scene.folder.mkdir(parents=True)
        try:
            fault(scene)
            return scene
        except TooLateError:
            for pid in scene.alive():
                os.kill(pid, signal.SIGKILL)
    raise NotHereError('five runs were over before it came')
