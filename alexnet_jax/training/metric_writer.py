"""Writes the records of a run: metrics.jsonl, TensorBoard events, JSON files and the progress line."""

import contextlib
import glob
import json
import math
import os
import sys
import time
from collections.abc import Iterator

import jax
from absl import logging
from google.protobuf.message import DecodeError

from alexnet_jax.utils.errors import UserError, as_user_error
from alexnet_jax.utils.files import atomic_file, open_regular, sync

# Hide PyTorch from tensorboardX, which imports it for record types that are not used here. The import takes seconds and
# 450 MB in this process and in each decoding process.
_without_torch = sys.modules.setdefault('torch', None) is None  # type: ignore[arg-type]
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto import event_pb2  # noqa: E402

if _without_torch:
    del sys.modules['torch']

_METRICS = 'metrics.jsonl'


class MetricWriter:
    """Appends metrics to metrics.jsonl and to TensorBoard events. Only process 0 writes.

    The constructor removes everything after `step`: a killed run may have written beyond its last checkpoint, and the
    resumed run repeats these steps. validated: whether to keep a validation line of `step` itself. The constructor,
    `write` and `sync` raise UserError if the files cannot be written, for example on a full disk.
    """

    def __init__(self, workdir: str, step: int, *, validated: bool = True):
        self._writes = jax.process_index() == 0
        self._workdir, self._flushed = workdir, -math.inf
        if self._writes:
            with _as_user_error(self._workdir):
                path = os.path.join(workdir, _METRICS)
                _cut_metrics(path, step, validated)
                for events in _event_files(workdir):
                    _cut_events(events, step, validated)
                self._lines = open(path, 'a', encoding='utf-8')
                # SummaryWriter is not used: its thread dies when the disk is full, and waiting for it never ends.
                self._events = EventsWriter(os.path.join(workdir, 'events'), filename_suffix=f'.{step}')

    def write(self, line: dict) -> None:
        """Writes one line: 'step', 'split', and metrics. A metric is a number or a dict {layer: number}."""
        if not self._writes:
            return
        with _as_user_error(self._workdir):
            self._lines.write(json.dumps(line, allow_nan=False) + '\n')
            self._lines.flush()
            event = event_pb2.Event(step=line['step'], wall_time=time.time())
            for key, value in line.items():
                for layer, number in (value if isinstance(value, dict) else {'': value}).items():
                    if key not in ('step', 'split'):
                        tag = f'{line["split"]}/{key}/{layer}'.removesuffix('/')
                        event.summary.value.add(tag=tag, simple_value=number)
            self._events.write_event(event)
            if (now := time.monotonic()) - self._flushed > 10:
                self._events.flush()
                self._flushed = now

    def sync(self) -> None:
        """Forces all lines to disk. Call it before saving: a resumed run does not repeat the steps before."""
        if self._writes:
            with _as_user_error(self._workdir):
                self._events.flush()
                for path in (os.path.join(self._workdir, _METRICS), *_event_files(self._workdir), self._workdir):
                    sync(path)

    def close(self) -> None:
        """Closes the files. Ignores write errors: a resumed run writes the lost lines again."""
        if self._writes:
            for file in (self._lines, self._events):
                with contextlib.suppress(OSError):
                    file.close()


def _event_files(workdir: str) -> list[str]:
    return glob.glob(os.path.join(glob.escape(workdir), 'events.out.tfevents.*'))


def _as_user_error(workdir: str):
    remedy = 'The checkpoints are intact. Fix the problem and run the same command again.'
    return as_user_error(f'{workdir!r} cannot be written', remedy)


def last_step(workdir: str) -> int:
    """Returns the last step in the workdir's metrics.jsonl; 0 if there is none."""
    with _as_user_error(workdir):
        return max((entry[0] for _, entry in _read_lines(os.path.join(workdir, _METRICS)) if entry), default=0)


def write_json(workdir: str, files: dict[str, dict]) -> None:
    """Replaces each file NAME.json atomically, in process 0 only. Raises UserError if a file cannot be written."""
    for name, content in files.items() if jax.process_index() == 0 else ():
        with _as_user_error(workdir), atomic_file(os.path.join(workdir, f'{name}.json')) as file:
            json.dump(content, file, indent=2)


def _cut_metrics(path: str, step: int, validated: bool) -> None:
    """Keeps the complete lines up to and including `step`."""
    incomplete = None
    with atomic_file(path) as file:
        for number, (line, entry) in enumerate(_read_lines(path), 1):
            if incomplete:  # a kill can truncate only the last line
                logging.warning(f'{path}: line {incomplete} cannot be read and is removed.')
            incomplete = None if entry else number
            if entry and not _is_after(*entry, step, validated):
                file.write(line if line.endswith('\n') else line + '\n')


def _read_lines(path: str) -> Iterator[tuple[str, tuple[int, str] | None]]:
    """Yields (line, (step, split)) for each line of a metrics.jsonl, if it exists; (line, None) if it is incomplete."""
    with contextlib.suppress(FileNotFoundError), open_regular(path, encoding='utf-8', errors='replace') as file:
        for line in file:
            try:
                values = json.loads(line)
                entry = int(values['step']), str(values['split'])
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                entry = None
            yield line, entry


def _is_after(line_step: int, split: str, step: int, validated: bool) -> bool:
    return line_step > step or (line_step == step and split == 'val' and not validated)


def _cut_events(path: str, step: int, validated: bool) -> None:
    """Truncates an events file before its first record after `step`, or before an incomplete record."""
    if os.path.islink(path):
        raise UserError(f'{path!r} is a link; remove it, so that no file elsewhere is changed.')
    end, size = 0, os.path.getsize(path)
    with open_regular(path, 'rb') as file:
        # Record format: length (8 bytes), checksum of the length (4), an Event, checksum of the Event (4).
        while len(header := file.read(12)) == 12:
            length = int.from_bytes(header[:8], 'little')
            if length > size:
                break
            record = file.read(length + 4)
            try:
                event = event_pb2.Event.FromString(record[:length])
            except DecodeError:
                break
            split = event.summary.value[0].tag.split('/')[0] if event.summary.value else ''
            if len(record) < length + 4 or _is_after(event.step, split, step, validated):
                break
            end = file.tell()
    os.truncate(path, end)


def log_line(line: dict, total_steps: int, ending: str = '') -> None:
    """Logs a line of metrics in readable form."""
    counted = f' of {line["count"]} images' if 'count' in line else ''
    logging.info(
        f'{line["split"]:5}  step {line["step"]}/{total_steps}  epoch {line["epoch"]:.2f}  '
        f'loss {line["loss"]:.4f}  top-1 error {line["top1_error"]:.2f}%{counted}  '
        f'{line["images_per_second"]:.0f} images/s  data wait {100 * line["data_wait"]:.0f}%{ending}'
    )
