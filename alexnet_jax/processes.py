"""Processes side by side: workers that end with the program, those that train together, those that must not."""

import contextlib
import fcntl
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any

import numpy as np

from alexnet_jax.errors import UserError, local

# Grain removes batches from shared memory in the background. What is left at the end Python's tracker removes, and
# calls a leak.
_QUIET = 'ignore:resource_tracker:UserWarning'
_CONTAINER = pathlib.Path('/sys/fs/cgroup')  # cgroup v2


def end_with_parent(*_) -> None:
    """Ends this worker process when its parent is gone, however it went: a killed parent cannot end it itself."""
    parent = multiprocessing.parent_process()

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def script_without_guard() -> str | None:
    """The path of the main script, if it has no `__main__` guard and each spawned worker would run it again.

    None for a guarded script, a notebook or `python -m`.
    """
    main = sys.modules['__main__']
    path = getattr(main, '__file__', None)
    if path is None or getattr(main, '__spec__', None) is not None or not os.path.isfile(path):
        return None  # a notebook, or `python -m`
    with open(path, encoding='utf-8', errors='replace') as file:
        return None if '__main__' in file.read() else path


@contextlib.contextmanager
def without_main():
    """Processes spawned within do not import the program's main module again, as they would before all else.

    That of a command imports JAX, 400 MB in each; a script without a guard would do its work once more. What they run
    must be of another module.
    """
    main = sys.modules['__main__']
    hidden = {name: vars(main)[name] for name in ('__spec__', '__file__') if name in vars(main)}
    main.__spec__ = None
    vars(main).pop('__file__', None)
    try:
        yield
    finally:
        vars(main).update(hidden)


def local_processes() -> int:
    """How many processes of this run share this machine: LOCAL_WORLD_SIZE, which `launch/local.sh` sets, else 1."""
    said = os.environ.get('LOCAL_WORLD_SIZE', '')
    return max(1, int(said)) if said.isdecimal() else 1


def on_several_machines() -> bool:
    """Whether this run may be spread over machines: it has several processes, not started by `launch/local.sh`."""
    several = 'JAX_COORDINATOR_ADDRESS' in os.environ and os.environ.get('JAX_NUM_PROCESSES', '') != '1'
    return several and 'LOCAL_WORLD_SIZE' not in os.environ


def cores() -> int:
    """Cores this process may use: of the machine's, or of what a container is allowed."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # none, or "max"
        quota, period = map(int, (_CONTAINER / 'cpu.max').read_text().split())
        found = min(found, -(-quota // period))
    return max(1, found // local_processes())


def memory() -> int:
    """Bytes of memory this process may use: its share of the machine's, or of what a container is allowed."""
    found = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    with contextlib.suppress(OSError, ValueError):
        found = min(found, int((_CONTAINER / 'memory.max').read_text()))
    return found // local_processes()


@contextlib.contextmanager
def signals_blocked():
    """Blocks SIGTERM and SIGINT within it. A process started here inherits the block, and never sees them.

    Schedulers and terminals send them to all processes of a group. Workers must outlast them: the parent has a state to
    save first, and one that dies with a lock of its queue in hand leaves the parent waiting for ever.
    """
    if _QUIET not in sys.warnoptions:  # it is given to the tracker
        sys.warnoptions.append(_QUIET)
    resource_tracker.ensure_running()  # when it starts, it lets them through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def locked(path: str, doing: str):
    """Holds a lock file while something is done that only one process may do; the system frees it however that ends.

    Raises:
      UserError: another process holds it, or it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, 'a'))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f'another process is {doing}; wait for it, or stop it.') from error
        except OSError as error:
            raise UserError(f'the lock {path!r} cannot be taken: {error.strerror}.') from error
        if not os.path.exists(path) or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise UserError(f'another process was just {doing}; try again.')  # and has removed the file
        yield


@contextlib.contextmanager
def new_directory(output: str) -> Iterator[str]:
    """A sibling of `output` for one process to write into; renamed to it at the end, removed where that is not reached.

    Raises:
      UserError: it cannot be written, or another process is at it.
    """
    output = local(output)
    partial = os.path.join(os.path.dirname(output), f'.{os.path.basename(output)}.incomplete')
    try:
        os.makedirs(partial, exist_ok=True)
        # Not inside: it is removed, and a folder that another process has taken away meanwhile must not count.
        with locked(f'{partial}.lock', f'writing {output!r}'):
            try:
                shutil.rmtree(partial)  # of a run that was killed
                os.makedirs(partial)
                yield partial
                os.rename(partial, output)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                os.remove(f'{partial}.lock')
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # array_record, orbax and tensorstore: each its own kind
        reason = getattr(error, 'strerror', None) or str(error).split('\n', 1)[0]
        raise UserError(f'cannot write {output!r}: {reason}.') from error


def first_process_decides(function: Callable[[], Any]) -> Any:
    """What `function` returns (JSON) in the first of the processes that train together; the others wait for it."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return function()
    found = {}
    if jax.process_index() == 0:
        try:
            found = {'result': function()}
        except Exception as error:  # whatever it is: the others wait
            found = {'error': str(error)[:4096]}
            if not isinstance(error, UserError | OSError):
                traceback.print_exc()
    encoded = np.frombuffer(json.dumps(found).encode(), np.uint8)
    text = np.zeros(1 << 16, np.uint8)
    text[: len(encoded)] = encoded
    found = json.loads(bytes(multihost_utils.broadcast_one_to_all(text)).rstrip(b'\0'))
    if 'error' in found:
        raise UserError(found['error'])
    return found['result']


@contextlib.contextmanager
def termination():
    """Within it, SIGTERM only sets a mark. Gives a function that tells whether the time to stop has come.

    With several processes all must call it equally often; it says yes to all of them at the same call, soon after one
    of them got the signal (`jax.distributed` has its own handler). Out of the main thread there is no handler.
    """
    import jax
    from jax.experimental import multihost_utils

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
