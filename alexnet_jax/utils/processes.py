"""Processes side by side: workers that end with the program, those that train together, those that must not."""

import contextlib
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

# Grain removes batches from shared memory in the background. What is left at the end Python's tracker removes, and
# calls a leak.
_QUIET = 'ignore:resource_tracker:UserWarning'
_CONTAINER = pathlib.Path('/sys/fs/cgroup')  # cgroup v2


def end_with_parent(*_: object) -> None:
    """Ends this worker process when its parent is gone, however it went: a killed parent cannot end it itself."""
    if (parent := multiprocessing.parent_process()) is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def script_without_guard() -> str | None:
    """The path of the main script if it has no `__main__` guard: each spawned worker would run it again. Else None."""
    main = sys.modules['__main__']
    path = getattr(main, '__file__', None)
    if path is None or getattr(main, '__spec__', None) is not None or not os.path.isfile(path):
        return None  # a notebook, or `python -m`
    with open(path, encoding='utf-8', errors='replace') as file:
        return None if '__main__' in file.read() else path


@contextlib.contextmanager
def without_main() -> Iterator[None]:
    """Processes spawned within do not import the program's main module again, as they would before all else.

    That of a command imports JAX, 400 MB in each; a script without a guard would do its work once more. What they run
    must be of another module.
    """
    main = sys.modules['__main__']
    hidden: dict[str, Any] = {name: vars(main)[name] for name in ('__spec__', '__file__') if name in vars(main)}
    main.__spec__ = None
    vars(main).pop('__file__', None)
    try:
        yield
    finally:
        vars(main).update(hidden)


def local_processes() -> int:
    """How many processes of this run share this machine: LOCAL_WORLD_SIZE, which `launch/local.sh` sets, else 1."""
    count = os.environ.get('LOCAL_WORLD_SIZE', '')
    return max(1, int(count)) if count.isdecimal() else 1


def on_several_machines() -> bool:
    """Whether this run may be spread over machines: it has several processes, not started by `launch/local.sh`."""
    several = 'JAX_COORDINATOR_ADDRESS' in os.environ and os.environ.get('JAX_NUM_PROCESSES', '') != '1'
    return several and 'LOCAL_WORLD_SIZE' not in os.environ


def cores() -> int:
    """Cores this process may use: of the machine's, or of what a container is allowed."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # none, or "max"
        quota, period = map(int, (_CONTAINER / 'cpu.max').read_text().split())
        count = min(count, -(-quota // period))
    return max(1, count // local_processes())


def memory() -> int:
    """Bytes of memory this process may use: its share of the machine's, or of what a container is allowed."""
    size = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    with contextlib.suppress(OSError, ValueError):
        size = min(size, int((_CONTAINER / 'memory.max').read_text()))
    return size // local_processes()


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
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
