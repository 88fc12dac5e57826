"""What the processes that train together have to agree on."""

import contextlib
import itertools
import json
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from alexnet_jax.utils.errors import UserError


def broadcast_from_process_0(function: Callable[[], Any]) -> Any:
    """Returns what `function` returns (JSON) in process 0, to all; an error in it is a UserError in every process."""
    if jax.process_count() == 1:
        return function()
    outcome = {}
    if jax.process_index() == 0:
        try:
            outcome = {'result': function()}
        except Exception as error:  # whatever it is: the others wait
            outcome = {'error': str(error)[:4096]}
            if not isinstance(error, UserError | OSError):
                traceback.print_exc()
    encoded = np.frombuffer(json.dumps(outcome).encode().ljust(1 << 16, b'\0'), np.uint8)
    outcome = json.loads(bytes(multihost_utils.broadcast_one_to_all(encoded)).rstrip(b'\0'))
    if 'error' in outcome:
        raise UserError(outcome['error'])
    return outcome['result']


@contextlib.contextmanager
def defer_sigterm() -> Iterator[Callable[[], bool]]:
    """Defers SIGTERM; yields `should_stop()`.

    Several processes must call it equally often; it is true for all of them at the same call, soon after one of them
    got the signal (`jax.distributed` has its own handler). Outside the main thread there is no handler.
    """
    calls = itertools.count()
    if jax.process_count() > 1:
        yield lambda: multihost_utils.reached_preemption_sync_point(next(calls))
    elif threading.current_thread() is not threading.main_thread():
        yield lambda: False
    else:
        asked = threading.Event()
        before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
        try:
            yield asked.is_set
        finally:
            signal.signal(signal.SIGTERM, before)


def warn(message: str) -> None:
    """A warning that every process would give, from process 0 alone."""
    if jax.process_index() == 0:
        logging.warning(message)
