"""Child processes that train, means to disturb them, and checks that nothing was lost."""

import contextlib
import functools
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

from alexnet_jax.checkpoints import verify
from alexnet_jax.data import datasets
from alexnet_jax.training import build
from tests import ROOT, helpers
from tests.faults import config as config_file

_PATIENCE = 90.0  # seconds from a signal to the exit, on a loaded machine and during compilation
TOO_LATE = 'five runs were over before it came'
_NO_OVERRIDE = '--bounding-set=-dac_override,-dac_read_search'  # root without the capabilities that bypass permissions


class LostError(AssertionError):
    """A promise did not hold."""


class SilentError(LostError):
    """The result is wrong, and nothing was said."""


class NotPossibleError(Exception):
    """This machine does not allow the fault."""


class TooLateError(Exception):
    """The run had finished before the fault: nothing was tested."""


def expect(holds, what: str, error: type[LostError] = LostError) -> None:
    if not holds:
        raise error(what)


def require_running(condition) -> None:
    """Raises TooLateError if `condition` is false: a trial of a finished run must not count as survived."""
    if not condition:
        raise TooLateError


def last_step(workdir) -> int:
    """Returns the last step in metrics.jsonl; the run is at most a few steps further."""
    found = re.findall(r'^\{"step": (\d+),', _text(workdir / 'metrics.jsonl'), re.M)
    return int(found[-1]) if found else 0


def expect_noticed(code: int, before: int) -> None:
    """Checks that a fault at step `before` changed the exit code; 0 is accepted only near the end of the run."""
    noticed = code != 0 or before > config_file.get_config().num_steps - 24
    expect(noticed, f'a fault at step {before} changed nothing', SilentError)
    require_running(code != 0)


def _text(path: pathlib.Path) -> str:
    return path.read_text(errors='replace') if path.exists() else ''


class Scene:
    """A folder and a random generator for one trial, and undisturbed reference runs."""

    def __init__(self, folder: pathlib.Path, rng: np.random.Generator, shared: pathlib.Path):
        self.folder, self.rng, self._shared = folder, rng, shared
        self.mark = f'{os.getpid()}-{rng.integers(1 << 40)}'
        self.slowest_stop = 0.0

    def start(
        self, workdir, *options, command=('train',), processes=1, limited=False, through=(), environment=None, **popen
    ) -> subprocess.Popen:
        """Starts the command itself, without a wrapper except for several processes.

        limited: root obeys permissions. through: words of a program that starts it, such as strace. environment: added
        variables.
        """
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
                raise NotPossibleError('needs setpriv, to bind root by permissions')
            words = ['setpriv', _NO_OVERRIDE, *words]
        if through and shutil.which(through[0]) is None:
            raise NotPossibleError(f'needs {through[0]}')
        # All trials share the compiled programs, also those that compile in less than a second.
        fast = {'XDG_CACHE_HOME': str(self._shared / 'cache'), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
        own = {'PYTHONPATH': str(ROOT), 'PYTHON': sys.executable, 'FAULT_MARK': self.mark, **(environment or {})}
        inherited = {key: value for key, value in os.environ.items() if key != 'JAX_COMPILATION_CACHE_DIR'}  # of pytest
        log = open(self.folder / 'log.txt', 'a+')
        return subprocess.Popen(
            [*through, *words], cwd=ROOT, env={**inherited, **fast, **own}, stdout=log, stderr=log,
            start_new_session=True, **popen,
        )  # fmt: skip

    def run(self, workdir, *options, **keywords) -> tuple[int, str]:
        """Runs a command undisturbed; returns (exit code, output)."""
        before = self.log()
        code = self.wait_for_exit(self.start(workdir, *options, **keywords), 400)
        return code, self.log()[len(before) :]

    def wait_for_exit(self, child, seconds: float = 120) -> int:
        """Returns the exit code of a child that should exit by itself."""
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            raise LostError(f'it still runs after {seconds} s: {self.log()[-2000:]}') from None

    def log(self) -> str:
        return _text(self.folder / 'log.txt')

    def reference(self, *options, processes=1) -> pathlib.Path:
        """Returns the workdir of the same run, never interrupted."""
        path = self._shared / ('whole ' + ' '.join((*options, str(processes)))).replace('/', '_')
        if not path.exists():
            partial = self._shared / f'partial-{self.mark}'
            code, printed = self.run(partial, *options, processes=processes)
            expect(code == 0, f'a run that nothing happened to ends with {code}: {printed[-2000:]}')
            with contextlib.suppress(OSError):  # another process was faster
                partial.rename(path)
        return path

    def copy_reference(self, *options) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(self.reference(*options), self.folder / 'run'))

    def prepared(self) -> pathlib.Path:
        """Returns the digits as JPEG, prepared by the command; shared by all trials."""
        path = self._shared / 'prepared'
        if not path.exists():
            raw = self.raw()
            partial = self._shared / f'partial-{self.mark}'
            began = time.monotonic()
            code, printed = self.run(None, command=('prepare', f'--input={raw}', f'--output={partial}', '--size=32'))
            expect(code == 0, printed[-2000:])
            (self._shared / 'prepare_seconds').write_text(str(time.monotonic() - began))
            with contextlib.suppress(OSError):
                partial.rename(path)
        return path

    def wait_into_prepare(self) -> None:
        """Waits for a random time, up to most of the time that `prepare` took on this machine."""
        self.prepared()
        time.sleep(self.rng.uniform(0, 0.8 * float((self._shared / 'prepare_seconds').read_text())))

    def raw(self) -> pathlib.Path:
        """Returns the digits as JPEG files, in a folder for each class; shared by all trials."""
        path = self._shared / 'raw'
        if not path.exists():
            partial = self._shared / f'partial-{self.mark}'
            for split, records in datasets.open_dataset('digits').splits.items():
                for i, record in enumerate(records):
                    folder = partial / split / str(record['label'])
                    folder.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(record['image']).save(folder / f'{i}.jpg')
            with contextlib.suppress(OSError):
                partial.rename(path)
        return path

    def wait_for_training(self, child, workdir, *, more: int = 1) -> None:
        """Waits until the child has written `more` lines, or has exited."""
        metrics = workdir / 'metrics.jsonl'
        count = lambda: metrics.read_bytes().count(b'\n') if metrics.exists() else 0  # noqa: E731
        least = count()
        while child.poll() is None:
            now = count()
            least = min(least, now)  # a resumed run truncates the lines it writes again
            if now >= least + more:
                return
            time.sleep(0.02)

    def wait_random(self, child, workdir) -> None:
        """Waits for a random time: mostly into training, sometimes only into the start."""
        if self.rng.uniform() < 0.2:
            time.sleep(self.rng.uniform(0, 6))
        else:
            self.wait_into_training(child, workdir)

    def wait_into_training(self, child, workdir) -> None:
        """Waits for a random line of the first two thirds of a run, and a moment more."""
        self.wait_for_training(child, workdir, more=int(self.rng.integers(1, 16)))
        time.sleep(self.rng.uniform(0, 0.2))

    def stop(self, child, number=signal.SIGTERM, *, group=False) -> int:
        """Sends a signal and waits; checks that no process and no shared memory of the child is left."""
        before = _unmapped_memory()
        began = time.monotonic()
        require_running(child.poll() is None)
        (os.killpg if group else os.kill)(child.pid, number)
        try:
            code = child.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            raise LostError(f'{_PATIENCE} s after signal {number} it still runs: {self.log()[-2000:]}') from None
        require_running(number != signal.SIGKILL or code == -number)
        if number == signal.SIGTERM:
            self.slowest_stop = max(self.slowest_stop, time.monotonic() - began)
        self.expect_clean_exit(before)
        return code

    def expect_clean_exit(self, before=None) -> None:
        """`before` is the shared memory that was already unused; None skips this check."""
        deadline = time.monotonic() + 20
        left = lambda: (self.child_processes(), [] if before is None else sorted(_unmapped_memory() - before))  # noqa: E731
        while any(left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        expect(not any(left()), f'left behind: {left()}')

    def child_processes(self, words: bytes = b'') -> list[int]:
        """Returns the processes of this trial, or those with `words` in their command line."""
        found = []
        for pid in filter(str.isdigit, os.listdir('/proc')):
            try:
                environment = pathlib.Path('/proc', pid, 'environ').read_bytes()
                command = pathlib.Path('/proc', pid, 'cmdline').read_bytes()
                state = pathlib.Path('/proc', pid, 'stat').read_text().rsplit(')', 1)[1].split()[0]
            except OSError:
                continue
            if f'FAULT_MARK={self.mark}'.encode() in environment and state != 'Z' and words in command:
                found.append(int(pid))
        return found

    def random_process(self, words: bytes) -> int:
        """Returns one of the processes of this trial with `words` in their command line."""
        processes = self.child_processes(words)
        require_running(processes)
        return int(self.rng.choice(processes))

    def expect_same_result(self, workdir, *options, processes=1, written: str = '') -> None:
        """Checks that the same command resumes to the same parameters, optimizer state and metrics, bit for bit."""
        sealed = [path.parent.name for path in workdir.glob('checkpoints/*/SHA256SUMS')]
        steps = [int(found[1]) for name in sealed if (found := re.fullmatch(r'(\d+)(\.replaced)?', name))]
        code, printed = self.run(workdir, *options, processes=processes)
        expect(code == 0, f'the same command ends with {code}: {printed[-3000:]}')
        # A run that starts from the beginning ends the same, too.
        written = written or (f'(Resuming from|is finished:) step {max(steps)} of' if steps else '')
        expect(re.search(written, printed), f'{written!r} is not in what it says: {printed[-3000:]}')
        whole = self.reference(*options, processes=processes)
        found, expected = (helpers.untimed_metrics(path) for path in (workdir, whole))
        expect(found == expected, f'the metrics differ: {found} and {expected}', SilentError)
        a, b = (jax.tree.leaves(helpers.read_state(path, _state_shapes())) for path in (workdir, whole))
        same = all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
        expect(same, 'the parameters or velocities differ', SilentError)
        expect(not verify.verify(str(workdir))[1], f'damage at the end: {verify.verify(str(workdir))[1]}')


@functools.cache
def _state_shapes():
    return build.build(config_file.get_config()).steps.state_shapes


def _unmapped_memory() -> set[str]:
    """Shared memory of grain's workers that no process has mapped."""
    mapped = set()
    for pid in filter(str.isdigit, os.listdir('/proc')):
        with contextlib.suppress(OSError):
            mapped |= set(re.findall(r'/dev/shm/(psm_\w+)', pathlib.Path('/proc', pid, 'maps').read_text()))
    return {name for name in os.listdir('/dev/shm') if name.startswith('psm_')} - mapped


@contextlib.contextmanager
def small_disk(path: pathlib.Path, size: str):
    """Mounts a tmpfs of a few megabytes at `path`."""
    path.mkdir()
    made = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', str(path)], capture_output=True)
    if made.returncode:
        raise NotPossibleError(f'needs the right to mount a tmpfs ({made.stderr.decode().strip()})')
    try:
        yield path
    finally:
        subprocess.run(['umount', '-l', str(path)], check=True)


@contextlib.contextmanager
def full_disk(path: pathlib.Path):
    """Fills the rest of a disk."""
    filler = path / 'filler'
    with open(filler, 'wb', buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


def attempt(fault, folder: pathlib.Path, shared: pathlib.Path, *seed: int) -> Scene:
    """Injects a fault; repeats up to five times if the run had finished before it.

    Raises:
      LostError: a promise did not hold.
      NotPossibleError: the fault cannot be injected on this machine.
    """
    for turn in range(5):
        scene = Scene(folder / str(turn), np.random.default_rng([*seed, turn]), shared)
        scene.folder.mkdir(parents=True)
        try:
            fault(scene)
            return scene
        except TooLateError:
            for pid in scene.child_processes():
                os.kill(pid, signal.SIGKILL)
    raise NotPossibleError(TOO_LATE)
