"""Trains a tiny network for very long and measures, from outside, whether anything grows.

    python -m tests.faults.long_run --updates=100000 --output=docs/results/long_run.json

The first part is one `alexnet_jax train` with decoding processes, validations and checkpoints. The second part resumes
a run again and again in one Python process, which starts all decoding processes anew each time. This module is also
the config of both (`get_config`).
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import numpy as np
from scipy import stats

from alexnet_jax.utils.environment import describe_environment
from tests import ROOT, helpers
from tests.faults import results

Samples = dict[str, list[float]]
LIMIT = 0.02  # a quantity is flat if a line through it over the last three quarters of a run rises by less
# These must stay flat. Times do not count, because other programs may use the same cores.
FLAT = ('rss', 'pss', 'files', 'threads', 'processes', 'shared_files', 'shared_bytes')
# There are two to four steps at any time, so a line says little: the largest value must not rise by more.
BOUNDED = ('checkpoint_bytes',)
COUNTERS = ('cpu', 'seconds', 'metrics_bytes', 'event_bytes')  # these grow
CRITERION = (
    f'a Theil-Sen line through the last three quarters rises by less than {LIMIT:.0%}; for bytes of checkpoints, the '
    f'largest value rises by less than {LIMIT:.0%} from the first to the second half of these three quarters'
)
_SECONDS = 0.2  # between two readings
_TICK = os.sysconf('SC_CLK_TCK')


def get_config():
    """Returns a network of two layers whose update takes two milliseconds."""
    every = {'log_every_steps': 50, 'eval_every_steps': 1000, 'checkpoint_every_steps': 400}
    workers = {'data.num_workers': 2, 'data.num_threads': 1, 'data.image_size': 12}
    config = helpers.digits_config(**every, **workers, **{'batch_size': 4, 'mesh.data': 1, 'mesh.tower': 1})
    for name in ('conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7'):
        del config.model.layers[name]
    config.model.layers.conv1.update(features=4, kernel=3, stride=2, padding=(1, 1), post='relu')
    config.optim.learning_rate = 1e-5
    return config


def resume_repeatedly(workdir: str, data: str, times: int, updates: int) -> None:
    """Trains for `updates` more updates, `times` times in this process. Each time starts four decoding processes."""
    import jax

    from alexnet_jax.training.train import train_and_evaluate
    from alexnet_jax.utils import logs

    jax.config.update('jax_platforms', 'cpu')
    logs.configure()
    for i in range(times):
        config = get_config()
        config.data.path, config.num_steps, config.eval_every_steps = data, (i + 1) * updates, updates
        train_and_evaluate(config, workdir)


def _tree(pid: int) -> list[int]:
    """Returns a process and all its descendants."""
    found = [pid]
    for parent in found:
        for path in pathlib.Path(f'/proc/{parent}/task').glob('*/children'):
            with contextlib.suppress(OSError):
                found += map(int, path.read_text().split())
    return found


def read_processes(pid: int) -> dict[str, float]:
    """Returns the memory, the open files and so on of a process and its descendants. Raises OSError if it has ended."""
    os.stat(f'/proc/{pid}/fd')
    found = dict.fromkeys(('processes', 'threads', 'files', 'rss', 'pss', 'shared_bytes', 'cpu'), 0.0)
    shared = set()
    for process in _tree(pid):
        folder = pathlib.Path('/proc', str(process))
        with contextlib.suppress(OSError):  # it has ended
            kib = {words[0]: 1024 * int(words[1]) for words in _fields(folder / 'smaps_rollup') if words[-1] == 'kB'}
            stat = (folder / 'stat').read_text().rsplit(')', 1)[1].split()
            open_files = len(os.listdir(folder / 'fd'))
            # Shared memory may be a deleted file, or one that is mapped but no longer open. Inodes identify both.
            shared |= {words[4] for words in _fields(folder / 'maps') if words[5:] and '/dev/shm/' in words[5]}
            found['rss'] += kib['Rss:']
            found['pss'] += kib['Pss:']
            found['shared_bytes'] += kib.get('Pss_Shmem:', 0)
            found['processes'] += 1
            found['threads'] += int(stat[17])
            found['files'] += open_files
            # The root includes the times of children that have ended and been waited for.
            found['cpu'] += sum(map(int, stat[11 : 15 if process == pid else 13])) / _TICK
    return {**found, 'shared_files': len(shared)}


def _fields(path: pathlib.Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()]


def read_files(workdir: pathlib.Path) -> dict[str, int]:
    """Returns the bytes of the files of a workdir: of metrics.jsonl, of TensorBoard's events, and of checkpoints."""
    found = {'metrics_bytes': 0, 'event_bytes': 0, 'checkpoint_bytes': 0}
    for root, _, names in os.walk(workdir):
        for name in names:
            kind = 'metrics' if name == 'metrics.jsonl' else 'event' if 'tfevents' in name else 'checkpoint'
            with contextlib.suppress(OSError):  # a step that the run has removed
                found[f'{kind}_bytes'] += os.stat(os.path.join(root, name)).st_size
    return found


class _Progress:
    """The last step in a growing metrics.jsonl; reads only what was added."""

    def __init__(self, path: pathlib.Path):
        self._path, self._end, self._step = path, 0, 0

    def step(self) -> int:
        """Returns the step of the last complete line; 0 without one."""
        with contextlib.suppress(FileNotFoundError), open(self._path, 'rb') as file:
            if os.fstat(file.fileno()).st_size < self._end:  # a resumed run writes the file anew
                self._end = 0
            file.seek(self._end)
            *lines, _ = file.read().split(b'\n')
            self._end += sum(len(line) + 1 for line in lines)
            if lines:
                self._step = json.loads(lines[-1])['step']
        return self._step


def measure(
    command: Sequence[str], workdir: pathlib.Path, updates: int, count: int, statistic: str = 'median'
) -> Samples:
    """Runs a command that trains in a workdir. Returns `count` samples, each of all readings since the previous one.

    statistic: 'median' of the readings, or 'max'; always 'max' for the quantities in BOUNDED.

    Raises RuntimeError if the command fails or leaves processes or shared memory.
    """
    samples: list[dict[str, float]] = []
    readings: list[dict[str, float]] = []
    every = updates / count
    shared = _shared_memory()
    progress, log = _Progress(workdir / 'metrics.jsonl'), workdir.with_suffix('.log')
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'TMPDIR': str(workdir.parent)}
    with (
        open(log, 'w') as output,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output) as child,
    ):
        children: set[int] = set()
        while child.poll() is None:
            with contextlib.suppress(OSError):
                children |= set(_tree(child.pid))
                readings.append({**read_processes(child.pid), **read_files(workdir), 'seconds': time.monotonic()})
            if (step := progress.step()) >= every * (len(samples) + 1) and readings:
                reduce = max if statistic == 'max' else statistics.median
                levels = {name: reduce([one[name] for one in readings]) for name in FLAT}
                levels |= {name: max(one[name] for one in readings) for name in BOUNDED}
                samples.append({'step': step, **levels, **{name: readings[-1][name] for name in COUNTERS}})
                readings = []
            time.sleep(_SECONDS)
    if child.returncode or progress.step() < updates:
        raise RuntimeError(
            f'{command} ended with {child.returncode} at step {progress.step()}:\n{log.read_text()[-3000:]}'
        )
    deadline = time.monotonic() + 20  # Python's resource tracker ends a little later than the process, and cleans up
    while left := _left(children, shared):
        if time.monotonic() > deadline:
            raise RuntimeError(f'{command} left {left}')
        time.sleep(0.1)
    return {name: [sample[name] for sample in samples] for name in samples[0]}


def _left(children: set[int], shared: set[str]) -> list:
    """Returns the processes that still run, and the memory in /dev/shm that is new and that no process has mapped."""
    mapped = set().union(*map(_mapped_shared_memory, pathlib.Path('/proc').glob('[0-9]*')))
    names = _shared_memory() - shared - mapped
    return [*filter(helpers.is_running, children), *sorted(names)]


def _shared_memory() -> set[str]:
    """Returns the blocks and semaphores of `multiprocessing`, of all programs."""
    return {f'/dev/shm/{name}' for name in os.listdir('/dev/shm') if name.startswith(('psm_', 'sem.mp-'))}


def _mapped_shared_memory(process: pathlib.Path) -> set[str]:
    with contextlib.suppress(OSError):
        return {words[5] for words in _fields(process / 'maps') if words[5:] and words[5].startswith('/dev/shm/')}
    return set()


def trends(samples: Samples) -> dict[str, dict]:
    """Fits a line to the last three quarters of each quantity. The rise is relative to the start of the line.

    The slope is the median of the slopes between all pairs of samples (Theil-Sen), so that single readings at an
    unusual moment do not count. For quantities in BOUNDED, compares the largest values in the two halves instead.
    """
    first = len(samples['step']) // 4
    steps = np.array(samples['step'][first:])
    found = {}
    for name in (*FLAT, *BOUNDED):
        values = np.array(samples[name][first:])
        found[name] = {'median': float(np.median(values))}
        if name in BOUNDED:
            start, end = (half.max() for half in np.array_split(values, 2))
        else:
            line = stats.theilslopes(values, steps)
            start, end = line.intercept + line.slope * steps[[0, -1]]
            found[name]['per_1000_updates'] = 1000 * float(line.slope)
        rise = (end - start) / start if start > 0 else end > start
        found[name] |= {'rise': float(rise), 'flat': bool(rise < LIMIT)}
    return found


def per_update(samples: Samples) -> dict[str, list[float]]:
    """Returns milliseconds and bytes per update in the second and in the last quarter."""
    size = len(samples['step']) // 4
    ends = [(size, 2 * size), (-size - 1, -1)]
    units = {'cpu': ('cpu_ms', 1000), 'seconds': ('ms', 1000)}
    units |= {name: (name, 1) for name in ('metrics_bytes', 'event_bytes')}
    change = lambda name, a, b: samples[name][b] - samples[name][a]  # noqa: E731
    return {
        title: [scale * change(name, *quarter) / change('step', *quarter) for quarter in ends]
        for name, (title, scale) in units.items()
    }


def prepare(folder: pathlib.Path) -> pathlib.Path:
    """Returns 400 digits, prepared by the command: 40 of them for validation."""
    pictures, output = helpers.write_pictures(folder / 'pictures', range(10)), folder / 'prepared'
    options = ('--size=16', '--val_fraction=0.1')
    if (done := helpers.run_command('prepare', f'--input={pictures}', f'--output={output}', *options)).returncode:
        raise RuntimeError(done.stderr)
    return output


def run(updates: int, resumed: int, times: int, count: int = 100) -> Iterator[dict[str, dict]]:
    """Yields the samples and trends of the first part, then those of both.

    resumed: updates of the second part, in `times` resumed runs.
    """
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        data = prepare(folder)
        train = [sys.executable, '-m', 'alexnet_jax', 'train', f'--config={__file__}', '--cpu_devices=1']
        options = [f'--workdir={folder}/run', f'--config.data.path={data}', f'--config.num_steps={updates}']
        arguments = f'{str(folder / "resumed")!r}, {str(data)!r}, {times}, {resumed // times}'
        code = f'from tests.faults import long_run; long_run.resume_repeatedly({arguments})'
        parts = {'run': ([*train, *options], updates, min(count, updates // 50), 'median')}
        # A sample for each start: the processes come and go, so only the highest readings are comparable.
        parts['resumed'] = ([sys.executable, '-c', code], resumed, times, 'max')
        for part, (command, total, number, statistic) in parts.items():
            samples = measure(command, folder / part, total, number, statistic)
            samples['seconds'] = [seconds - samples['seconds'][0] for seconds in samples['seconds']]
            found[part] = {'updates': total, 'statistic': statistic, 'trends': trends(samples)}
            found[part] |= {'per_update': per_update(samples), 'samples': samples}
            report(part, found[part])
            yield found


def report(part: str, result: dict) -> None:
    """Prints the trends of one part."""
    for name, trend in result['trends'].items():
        rise = f'{trend["median"]:.6g}, rises by {trend["rise"]:.2%}{"" if trend["flat"] else ": NOT FLAT"}'
        print(f'{part}: {name}: {rise}', flush=True)
    print(f'{part}: per update, in the second and in the last quarter: {result["per_update"]}', flush=True)


def plot(path: pathlib.Path, found: dict[str, dict]) -> None:
    """Draws memory, open files, threads and so on over the updates."""
    import matplotlib.pyplot as plt

    titles = {
        'rss': ('memory (RSS), MiB', 2**20), 'shared_bytes': ('shared memory, MiB', 2**20), 'files': ('open files', 1),
        'threads': ('threads', 1), 'processes': ('processes', 1),
        'checkpoint_bytes': ('checkpoints on disk, KiB', 2**10),
    }  # fmt: skip
    figure, axes = plt.subplots(len(found), len(titles), figsize=(14, 2.2 * len(found)), squeeze=False)
    for row, (part, result) in zip(axes, found.items(), strict=True):
        for axis, (name, (title, unit)) in zip(row, titles.items(), strict=True):
            samples = result['samples']
            axis.plot(np.array(samples['step']) / 1000, np.array(samples[name]) / unit, linewidth=0.8)
            axis.set_ylim(bottom=0)
            axis.set_title(title, fontsize=9)
            axis.tick_params(labelsize=7)
        row[0].set_ylabel(part)
        row[0].set_xlabel('thousand updates', fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=70)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--updates', type=int, default=100_000, help='of the uninterrupted run')
    parser.add_argument('--resumed', type=int, default=2_500, help='updates of the run that is resumed')
    parser.add_argument('--times', type=int, default=25, help='how often that run is resumed')
    parser.add_argument('--output', required=True, help='file of the results; the figure is written to ../img')
    args = parser.parse_args()
    found: dict[str, dict] = {}
    environment = describe_environment()  # before the files of the results change the working tree
    for found in run(args.updates, args.resumed, args.times):
        results.write(args.output, 'long_run', {'criterion': CRITERION, **found}, environment)
        plot(pathlib.Path(args.output).resolve().parents[1] / 'img' / 'long_run.png', found)
    raise SystemExit(any(not trend['flat'] for result in found.values() for trend in result['trends'].values()))


if __name__ == '__main__':
    main()
