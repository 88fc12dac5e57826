"""Logs plain lines, information to stdout and warnings to stderr, and the progress of long tasks.

The library logs with `absl.logging`. Commands call `configure`; notebooks can call it to show progress.
"""

import itertools
import logging as std_logging
import os
import re
import sys
import time
from typing import TextIO

from absl import logging

# Characters that control a terminal, or the direction of text. Names of files and classes may contain them.
_CONTROLS = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]')
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def escape_controls(text: str) -> str:
    """Returns text with control characters, except tabs and newlines, as escapes: '\\x1b'."""
    return _CONTROLS.sub(lambda found: found[0].encode('unicode_escape').decode(), text)


def one_line(text: str) -> str:
    """Returns text with control characters as escapes, also newlines."""
    return escape_controls(text).replace('\n', '\\n')


def escape_stream(stream: TextIO) -> None:
    """Makes a stream write control characters as escapes."""
    write = stream.write
    stream.write = lambda text: write(escape_controls(text))  # type: ignore[method-assign]


class _PlainHandler(std_logging.Handler):
    """Prints each record as a line. A StreamHandler would hide write errors, such as a full disk."""

    def __init__(self, to_stdout: bool):
        super().__init__()
        self._to_stdout = to_stdout

    def emit(self, record: std_logging.LogRecord) -> None:
        prefix = 'warning: ' if record.levelno >= std_logging.WARNING else ''
        stream = sys.stdout if self._to_stdout and not prefix and _is_own(record) else sys.stderr
        escape = one_line if _is_own(record) else escape_controls
        print(escape(f'{prefix}{record.getMessage()}'), file=stream, flush=True)


def _is_own(record: std_logging.LogRecord) -> bool:
    return record.pathname.startswith(_PACKAGE)


def _is_wanted(record: std_logging.LogRecord) -> bool:
    """Selects this package's records, other warnings, and JAX records requested by JAX_DEBUG_LOG_MODULES."""
    if record.levelno < std_logging.WARNING:
        names = itertools.accumulate(record.name.split('.'), '{}.{}'.format)  # jax, jax._src, jax._src.compiler
        requested = record.name.startswith('jax') and any(std_logging.getLogger(name).level for name in names)
        return requested or _is_own(record)
    return f'{os.sep}orbax{os.sep}' not in record.pathname  # orbax logs errors before it raises them


def configure(*, to_stdout: bool = True) -> None:
    """Prints this package's records and all warnings as plain lines. Replaces the handlers of the root logger.

    to_stdout: whether information is printed to stdout; False: to stderr, for commands whose stdout is data.
    """
    handler = _PlainHandler(to_stdout)
    handler.addFilter(_is_wanted)
    std_logging.root.handlers[:] = [handler]
    logging.set_verbosity(logging.INFO)
    std_logging.getLogger('asyncio').setLevel(std_logging.CRITICAL)


class Progress:
    """Logs the progress of a task, at most once every `seconds`, and at its end."""

    def __init__(self, total: int, seconds: float):
        self._total, self._seconds = total, seconds
        self._began = self._logged = time.monotonic()

    def update(self, done: int) -> None:
        """Logs progress if the last line is old enough. done: number of images processed so far."""
        now = time.monotonic()
        if now - self._logged < self._seconds and done < self._total:
            return
        speed, self._logged = done / max(now - self._began, 1e-9), now
        eta = format_duration((self._total - done) / max(speed, 1e-9))
        logging.info('%d/%d images  %.0f images/s  ETA %s', done, self._total, speed, eta)


def format_duration(seconds: float) -> str:
    """Formats a duration as hours, minutes and seconds: '1:02:03'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}'
