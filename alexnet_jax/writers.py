"""What a run leaves to read: metrics.jsonl, TensorBoard events, the progress line, and what it ran on."""

import contextlib
import glob
import json
import math
import os
import platform
import struct
import subprocess
import sys
import time
from collections import deque
from importlib import metadata

import jax
from google.protobuf.message import DecodeError
from tensorboardX import SummaryWriter
from tensorboardX.proto import event_pb2

from alexnet_jax import metrics
from alexnet_jax.errors import DivergedError

_METRICS = 'metrics.jsonl'


class RunWriter:
    """Appends lines to metrics.jsonl and the same numbers to TensorBoard events; process 0 writes, the others are mute.

    Opening cuts both after `step`: what a killed run wrote beyond its last checkpoint is written again.
    """

    def __init__(self, workdir: str, step: int):
        self._writes = jax.process_index() == 0
        if self._writes:
            path = os.path.join(workdir, _METRICS)
            _cut_metrics(path, step)
            for events in glob.glob(os.path.join(glob.escape(workdir), 'events.out.tfevents.*')):
                _cut_events(events, step)
            self._lines = open(path, 'a', encoding='utf-8')
            self._events = SummaryWriter(workdir, flush_secs=10)

    def write(self, line: dict) -> None:
        """line: 'step', 'split' and numbers."""
        if not self._writes:
            return
        self._lines.write(json.dumps(line) + '\n')
        self._lines.flush()
        for key, value in line.items():
            if key not in ('step', 'split'):
                self._events.add_scalar(f'{line["split"]}/{key}', value, line['step'])

    def flush(self) -> None:
        """Call before saving: what a checkpoint has behind it is not written again."""
        if self._writes:
            self._events.flush()

    def close(self) -> None:
        if self._writes:
            self._lines.close()
            self._events.close()


def _cut_metrics(path: str, step: int) -> None:
    """Keeps the whole lines up to and with `step`."""
    if not os.path.exists(path):
        return
    kept = []
    with open(path, encoding='utf-8', errors='replace') as file:
        for line in file:
            try:
                if json.loads(line)['step'] > step:
                    break
            except (ValueError, KeyError, TypeError):
                continue  # torn by a kill in mid-write
            kept.append(line if line.endswith('\n') else line + '\n')
    with open(path + '.tmp', 'w', encoding='utf-8') as file:
        file.writelines(kept)
    os.replace(path + '.tmp', path)


def _cut_events(path: str, step: int) -> None:
    """Truncates an events file before its first record after `step`, or where a kill tore it."""
    end = 0
    with open(path, 'rb') as file:
        # A record: length (8 bytes), its checksum (4), an Event, its checksum (4).
        while len(header := file.read(12)) == 12:
            (length,) = struct.unpack('<Q', header[:8])
            record = file.read(length + 4)
            try:
                if len(record) < length + 4 or event_pb2.Event.FromString(record[:length]).step > step:
                    break
            except DecodeError:
                break
            end = file.tell()
    os.truncate(path, end)


class TrainLog:
    """Collects the reports of training steps two steps late, so that fetching them never makes the device wait.

    A line is the mean over all steps since the line before; its speed and data wait are over the same steps, and at
    least the last eight, since steps are sent ahead of the device unevenly. It raises DivergedError at the first report
    that is not finite (or says so and goes on, with `on_nonfinite='skip'`).
    """

    def __init__(self, writer: RunWriter, *, batch_size: int, examples: int, total_steps: int, on_nonfinite: str):
        self._writer = writer
        self._batch_size, self._examples, self._total_steps = batch_size, examples, total_steps
        self._skip = on_nonfinite == 'skip'
        self._pending = deque()
        self._sums, self._steps = None, 0
        self._clock = deque([(time.perf_counter(), 0.0)])  # (when it was sent, seconds its batch was waited for)
        self._paused = 0.0  # seconds that were no training
        self._printed = -math.inf

    def add(self, step: int, report: dict, *, waited: float, log: bool) -> None:
        """report: of `steps.train_step`, on device. waited: seconds spent waiting for its batch. log: write a line."""
        self._pending.append((step, report, waited, time.perf_counter() - self._paused, log))
        while len(self._pending) > 2:
            self._take()

    @contextlib.contextmanager
    def pause(self):
        """Around validation and saving. First fetches all reports, so that what is on the device is known to be finite;
        the time inside does not count in images/s."""
        while self._pending:
            self._take()
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def _take(self) -> None:
        step, report, waited, sent, log = self._pending.popleft()
        report = jax.device_get(report)
        rate, norm = float(report.pop('learning_rate')), float(report.pop('gradient_norm'))
        self._steps += 1
        self._clock.append((sent, waited))
        if report.pop('finite'):
            self._sums = metrics.merge(self._sums, report)
        elif self._skip:
            warn(f'step {step}: loss or gradient is not finite; its batch is left out.')
        else:
            raise DivergedError(
                f'step {step}: loss or gradient is not finite (learning rate {rate:g}); the update was not made, and '
                'none after it is kept. Lower optim.learning_rate (in another --workdir, if this has a checkpoint).'
            )
        if log and self._sums:
            self._line(step, rate, norm)

    def _line(self, step: int, rate: float, norm: float) -> None:
        while len(self._clock) > 1 + max(8, self._steps):
            self._clock.popleft()
        elapsed = max(self._clock[-1][0] - self._clock[0][0], 1e-9)
        speed = (len(self._clock) - 1) * self._batch_size / elapsed
        line = {
            'step': step,
            'epoch': step * self._batch_size / self._examples,
            'split': 'train',
            **metrics.finish(self._sums),
            'learning_rate': rate,
            'gradient_norm': norm,
            'images_per_second': speed,
            'data_wait': min(1.0, sum(waited for _, waited in list(self._clock)[1:]) / elapsed),
        }
        self._writer.write(line)
        now = time.perf_counter()
        if now - self._printed >= 1 or step == self._total_steps:
            left = (self._total_steps - step) * self._batch_size / speed
            progress(line, self._total_steps, f'  ETA {duration(left)}')
            self._printed = now
        self._sums, self._steps = None, 0


def progress(line: dict, total_steps: int, ending: str = '') -> None:
    """Prints a line of metrics, from process 0."""
    counted = f' of {line["count"]} images' if 'count' in line else ''
    if jax.process_index() == 0:
        print(
            f'{line["split"]:5}  step {line["step"]}/{total_steps}  epoch {line["epoch"]:.2f}  '
            f'loss {line["loss"]:.4f}  top-1 error {line["top1_error"]:.2f}%{counted}  '
            f'{line["images_per_second"]:.0f} images/s  data wait {100 * line["data_wait"]:.0f}%{ending}',
            flush=True,
        )


def duration(seconds: float) -> str:
    """'1:02:03'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}'


def environment() -> dict:
    """Versions, devices and commit, for environment.json and for published numbers."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        commit = subprocess.run(
            ['git', 'describe', '--always', '--dirty', '--abbrev=40'], cwd=root, capture_output=True, text=True
        ).stdout.strip()
    except OSError:  # no git
        commit = ''
    packages = ('alexnet_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'pillow')
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a folder without installing
            versions[name] = None
    return {
        'python': platform.python_version(),
        'machine': platform.platform(),
        'cores': os.cpu_count(),
        'versions': versions,
        'devices': [f'{d.platform}:{d.id} {d.device_kind}' for d in jax.devices()],
        'commit': commit or None,
        'command': sys.argv,
    }


def warn(message: str) -> None:
    """One line on stderr, from process 0."""
    if jax.process_index() == 0:
        print(f'warning: {message}', file=sys.stderr, flush=True)
