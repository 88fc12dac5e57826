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
from collections.abc import Iterator
from importlib import metadata

import jax
from google.protobuf.message import DecodeError

from alexnet_jax import errors, processes
from alexnet_jax.errors import as_user_error

# tensorboardX imports PyTorch where it is installed, for records of kinds that are not written here: seconds and 450 MB
# in this process and in each that decodes.
_without_torch = sys.modules.setdefault('torch', None) is None
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto import event_pb2  # noqa: E402

if _without_torch:
    del sys.modules['torch']

_METRICS = 'metrics.jsonl'


class RunWriter:
    """Appends lines to metrics.jsonl and the same numbers to TensorBoard events; process 0 writes, the others are mute.

    Opening cuts both after `step`: what a killed run wrote beyond its last checkpoint is written again. validated:
    whether a validation at `step` itself stays.

    Raises:
      UserError: (`write`, `flush`, too) the file system does not take it.
    """

    def __init__(self, workdir: str, step: int, *, validated: bool = True):
        self._writes = jax.process_index() == 0
        self._workdir, self._flushed = workdir, -math.inf
        if self._writes:
            with self._as_user_error():
                path = os.path.join(workdir, _METRICS)
                _cut_metrics(path, step, validated)
                for events in glob.glob(os.path.join(glob.escape(workdir), 'events.out.tfevents.*')):
                    _cut_events(events, step, validated)
                self._lines = open(path, 'a', encoding='utf-8')
                # Not SummaryWriter: its thread dies of a full disk, and whoever waits for it waits for ever.
                self._events = EventsWriter(os.path.join(workdir, 'events'), filename_suffix=f'.{step}')

    def write(self, line: dict) -> None:
        """line: 'step', 'split' and numbers, or numbers by layer."""
        if not self._writes:
            return
        now = time.time()
        with self._as_user_error():
            self._lines.write(json.dumps(line, allow_nan=False) + '\n')
            self._lines.flush()
            flat = {}
            for key, value in line.items():
                by_layer = isinstance(value, dict)
                flat |= {f'{key}/{name}': number for name, number in value.items()} if by_layer else {key: value}
            event = event_pb2.Event(step=line['step'], wall_time=now)
            for key, value in flat.items():
                if key not in ('step', 'split'):
                    event.summary.value.add(tag=f'{line["split"]}/{key}', simple_value=value)
            self._events.write_event(event)
            if now - self._flushed > 10:
                self.flush()

    def flush(self) -> None:
        """Call before saving: a run that goes on from a checkpoint does not write again what was written before it."""
        if self._writes:
            with self._as_user_error():
                self._events.flush()
                self._flushed = time.time()

    def close(self) -> None:
        """What cannot be written any more is given up: the next start writes it again."""
        if self._writes:
            for file in (self._lines, self._events):
                with contextlib.suppress(OSError):
                    file.close()

    def _as_user_error(self):
        return _as_user_error(self._workdir)


def _as_user_error(workdir: str):
    remedy = 'Checkpoints are as they were; put it right and give the same command again.'
    return as_user_error(f'{workdir!r} cannot be written', remedy)


def last_step(workdir: str) -> int:
    """The last step in the workdir's metrics.jsonl; 0 where there is none."""
    with _as_user_error(workdir):
        return max((found[0] for _, found in _read_lines(os.path.join(workdir, _METRICS)) if found), default=0)


def write_json(workdir: str, files: dict[str, dict]) -> None:
    """Process 0 replaces each file (NAME.json) in one move. Raises UserError."""
    for name, content in files.items() if jax.process_index() == 0 else ():
        path = os.path.join(workdir, f'{name}.json')
        with _as_user_error(workdir):
            with open(path + '.tmp', 'w', encoding='utf-8') as file:
                json.dump(content, file, indent=2)
            os.replace(path + '.tmp', path)


def _cut_metrics(path: str, step: int, validated: bool) -> None:
    """Keeps the whole lines up to and with `step`."""
    if not os.path.exists(path):
        return
    torn = None
    with open(path + '.tmp', 'w', encoding='utf-8') as file:
        for number, (line, found) in enumerate(_read_lines(path), 1):
            if torn:  # a kill tears the last alone
                warn(f'{path}: line {torn} cannot be read, and is left out.')
            torn = None if found else number
            if found and not _beyond(*found, step, validated):
                file.write(line if line.endswith('\n') else line + '\n')
    os.replace(path + '.tmp', path)


def _read_lines(path: str) -> Iterator[tuple[str, tuple[int, str] | None]]:
    """(line, its step and split) of a metrics.jsonl, nothing of those that are torn; none where there is no file."""
    if not os.path.exists(path):
        return
    with open(path, encoding='utf-8', errors='replace') as file:
        for line in file:
            try:
                said = json.loads(line)
                found = int(said['step']), str(said['split'])
            except (ValueError, KeyError, TypeError):
                found = None
            yield line, found


def _beyond(line_step: int, split: str, step: int, validated: bool) -> bool:
    return line_step > step or (line_step == step and split == 'val' and not validated)


def _cut_events(path: str, step: int, validated: bool) -> None:
    """Truncates an events file before its first record after `step`, or where a kill tore it."""
    end, size = 0, os.path.getsize(path)
    with open(path, 'rb') as file:
        # A record: length (8 bytes), its checksum (4), an Event, its checksum (4).
        while len(header := file.read(12)) == 12:
            (length,) = struct.unpack('<Q', header[:8])
            if length > size:
                break
            record = file.read(length + 4)
            try:
                event = event_pb2.Event.FromString(record[:length])
            except DecodeError:
                break
            split = event.summary.value[0].tag.split('/')[0] if event.summary.value else ''
            if len(record) < length + 4 or _beyond(event.step, split, step, validated):
                break
            end = file.tell()
    os.truncate(path, end)


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
    """Hours, minutes and seconds: '1:02:03'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}'


def environment() -> dict:
    """Versions, devices and commit, for environment.json and for published numbers."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    only_here = {**os.environ, 'GIT_CEILING_DIRECTORIES': os.path.dirname(root)}  # not of a repository around a venv
    describe = ['git', 'describe', '--always', '--dirty', '--abbrev=40']
    try:
        commit = subprocess.run(describe, cwd=root, env=only_here, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = ''
    of_gpus = ('jax-cuda12-plugin', 'jax-cuda13-plugin', 'nvidia-cudnn-cu12', 'nvidia-cudnn-cu13')
    packages = ('alexnet_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'pillow')
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a folder without installing
            versions[name] = None
    versions |= {found.name: found.version for found in metadata.distributions() if found.name in of_gpus}
    return {
        'python': platform.python_version(),
        'machine': platform.platform(),
        'cores': processes.cores() * processes.local_processes(),  # of this machine, for this program
        'versions': versions,
        'devices': [f'{d.platform}:{d.id} {d.device_kind}' for d in jax.devices()],
        'xla_flags': os.environ.get('XLA_FLAGS'),
        'commit': commit or None,
        'command': sys.argv,
    }


def warn_of_changes(workdir: str, now: dict) -> None:
    """Where a run goes on with other software or cores than the environment.json of its last start names."""
    try:
        with open(os.path.join(workdir, 'environment.json'), encoding='utf-8') as file:
            before = json.load(file)
        before = {**before, **before.pop('versions')}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return
    changes = [
        f'{key} {before.get(key)} -> {value}'
        for key, value in {**now, **now['versions']}.items()
        if key in ('cores', 'xla_flags', *now['versions']) and before.get(key) != value
    ]
    if changes:
        warn(f'{"; ".join(changes)}: the run goes on, but the last bits may be others than without the change.')


def warn(message: str) -> None:
    """One line on stderr, from process 0."""
    if jax.process_index() == 0:
        errors.warn(message)
