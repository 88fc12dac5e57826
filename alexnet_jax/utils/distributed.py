"""Coordination between the processes of one training run."""

import contextlib
import hashlib
import itertools
import json
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from alexnet_jax.utils.errors import UserError

_BROADCAST_BYTES = 1 << 16


def broadcast_from_process_0(function: Callable[[], Any]) -> Any:
    """Calls `function` in process 0. All processes return its result (JSON up to 64 KiB) or raise UserError."""
    if jax.process_count() == 1:
        return function()
    outcome = {}
    if jax.process_index() == 0:
        try:
            outcome = {'result': function()}
        except Exception as error:  # catch every error, because the other processes wait for the outcome
            outcome = {'error': str(error)[:4096]}
            if not isinstance(error, UserError | OSError):
                traceback.print_exc()
    text = json.dumps(outcome).encode()
    if len(text) > _BROADCAST_BYTES:
        text = json.dumps({'error': f'internal error: a result of {len(text)} bytes to broadcast'}).encode()
    encoded = np.frombuffer(text.ljust(_BROADCAST_BYTES, b'\0'), np.uint8)
    outcome = json.loads(bytes(multihost_utils.broadcast_one_to_all(encoded)).rstrip(b'\0'))
    if 'error' in outcome:
        raise UserError(outcome['error'])
    return outcome['result']


def check_equal(values: Mapping[str, Any]) -> None:
    """Raises UserError in all processes if a value differs between them. values: JSON by name, in all processes."""
    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest() for value in values.values()]
    own = np.stack([np.frombuffer(digest, np.uint8) for digest in digests])
    gathered = multihost_utils.process_allgather(own)  # [process, value, byte]
    for process, value in np.argwhere((gathered != gathered[0]).any(axis=2)):
        raise UserError(
            f'process {process} has another value of {list(values)[value]} than process 0; give all processes the same '
            'config and the same prepared data.'
        )


@contextlib.contextmanager
def defer_sigterm() -> Iterator[Callable[[], bool]]:
    """Defers SIGTERM within the context; yields `should_stop()`.

    All processes must call `should_stop` equally often. It first returns True at the same call in all of them, soon
    after one received the signal (`jax.distributed` has its own handler). Outside the main thread nothing is deferred.
    """
    calls = itertools.count()
    if jax.process_count() > 1:
        yield lambda: multihost_utils.reached_preemption_sync_point(next(calls))
    elif threading.current_thread() is not threading.main_thread():
        yield lambda: False
    else:
        received = threading.Event()
        before = signal.signal(signal.SIGTERM, lambda *_: received.set())
        try:
            yield received.is_set
        finally:
            signal.signal(signal.SIGTERM, before)


def warn(message: str) -> None:
    """Logs a warning from process 0 only."""
    if jax.process_index() == 0:
        logging.warning(message)
