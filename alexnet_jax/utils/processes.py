"""Worker processes and their signals; cores and memory available to a process."""

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

# Grain frees the shared memory of batches in the background. At exit, Python's resource tracker frees the rest and
# would warn about a leak.
_NO_LEAK_WARNING = 'ignore:resource_tracker:UserWarning'
_CONTAINER = pathlib.Path('/sys/fs/cgroup')  # cgroup v2
_HUGE_PAGES = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')


def end_with_parent(*_: object) -> None:
    """Makes this worker process exit when its parent exits: a killed parent cannot stop its workers."""
    if (parent := multiprocessing.parent_process()) is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def script_without_guard() -> str | None:
    """Returns the path of a main script without a `__main__` guard, which every spawned worker would run again."""
    main = sys.modules['__main__']
    path = getattr(main, '__file__', None)
    if path is None or getattr(main, '__spec__', None) is not None or not os.path.isfile(path):
        return None  # a notebook, or `python -m`
    with open(path, encoding='utf-8', errors='replace') as file:
        return None if '__main__' in file.read() else path


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """Prevents interpreters started within the context from importing modules from the current folder.

    Python starts worker processes and their tracker with -c, which searches the current folder first. Commands set
    PYTHONSAFEPATH for all their processes (`app`); this is for programs that use this package.
    """
    if os.environ.get('PYTHONSAFEPATH'):
        yield
        return
    os.environ['PYTHONSAFEPATH'] = '1'
    try:
        yield
    finally:
        del os.environ['PYTHONSAFEPATH']


@contextlib.contextmanager
def without_main() -> Iterator[None]:
    """Prevents processes spawned within the context from importing the main module of the program.

    The main module of a command imports JAX (400 MB in each process), and a script without a `__main__` guard would run
    again. The function that the processes run must be in another module.
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
    """Returns the number of this run's processes on this machine: LOCAL_WORLD_SIZE (set by `launch/local.sh`) or 1."""
    count = os.environ.get('LOCAL_WORLD_SIZE', '')
    return max(1, int(count)) if count.isdecimal() else 1


def on_several_machines() -> bool:
    """Returns whether this run may use several machines: it has several processes without `launch/local.sh`."""
    several = 'JAX_COORDINATOR_ADDRESS' in os.environ and os.environ.get('JAX_NUM_PROCESSES', '') != '1'
    return several and 'LOCAL_WORLD_SIZE' not in os.environ


def use_huge_pages() -> None:
    """Restarts this command with memory in pages of 2 MB, if the machine offers them to programs that ask.

    On a CPU, XLA allocates the memory of a training step anew in each step. With pages of 4 kB, up to 30% of the time
    of a small network's step went into page faults. glibc reads its setting only when a program starts, therefore the
    restart, which takes 20 ms. Does nothing if JAX is already imported, in a debugger, or if GLIBC_TUNABLES has the
    setting.
    """
    tunables = os.environ.get('GLIBC_TUNABLES', '')
    started = sys.gettrace() is not None or not sys.modules.keys().isdisjoint({'jax', 'pydevd'})
    if started or 'hugetlb' in tunables or sys.platform != 'linux':
        return
    with contextlib.suppress(OSError):  # the system has no huge pages
        if '[madvise]' in _HUGE_PAGES.read_text():
            os.environ['GLIBC_TUNABLES'] = ':'.join(filter(None, (tunables, 'glibc.malloc.hugetlb=1')))
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def cores() -> int:
    """Returns the number of cores for this process: its share of the cores of the machine or container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        quota, period = map(int, (_CONTAINER / 'cpu.max').read_text().split())
        count = min(count, -(-quota // period))
    return max(1, count // local_processes())


def memory() -> int:
    """Returns the memory for this process in bytes: its share of the memory of the machine or container."""
    size = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    with contextlib.suppress(OSError, ValueError):
        size = min(size, int((_CONTAINER / 'memory.max').read_text()))
    return size // local_processes()


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Blocks SIGTERM and SIGINT within the context, and permanently in processes started in it.

    Schedulers and terminals send these signals to all processes of a group. Workers must survive them: the parent first
    saves its state, and would wait forever for a worker that died while holding the lock of its queue.
    """
    if _NO_LEAK_WARNING not in sys.warnoptions:  # the tracker process inherits these options
        sys.warnoptions.append(_NO_LEAK_WARNING)
    with safe_path():
        resource_tracker.ensure_running()  # starting it later would unblock the signals
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
