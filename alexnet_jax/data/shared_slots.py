"""Shared memory in which worker processes pass the images of batches to their parent.

New shared memory is slow: its pages are allocated and zeroed, mapped in two processes and freed. On a virtual machine
this took 140 us per image of 224 px, beside 255 us to decode it. These slots are used again as soon as nothing in the
parent refers to the images of a batch.
"""

import dataclasses
import math
import mmap
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from alexnet_jax.utils import processes

SHARED_MEMORY = '/dev/shm'
_lock = threading.Lock()  # between the threads of a worker
_worker_index: int | None = None  # None in the parent


def start_worker(index: int, count: int) -> None:
    """Initializes a worker process of grain."""
    global _worker_index
    _worker_index = index
    processes.end_with_parent()


@dataclasses.dataclass(frozen=True)
class _Images:
    """Stands for the images of a batch on their way to the parent: the first `count` images of a slot."""

    slot: int
    count: int


class SharedSlots:
    """Slots for the images of batches. Each worker has its own slots, so that processes need no lock.

    The memory is a file without a name, which ends with its last process: nothing is left behind by `kill -9`.
    """

    def __init__(self, workers: int, slots: int, shape: tuple[int, ...]):
        """Allocates `slots` slots of uint8 `shape` for each worker. Raises OSError without enough shared memory."""
        self._slots, self._shape, page = slots, shape, mmap.PAGESIZE
        self._start = -(-workers * slots // page) * page  # before it, a byte for each slot: 1 if it is in use
        self._slot_bytes = -(-math.prod(shape) // page) * page
        self._size = self._start + workers * slots * self._slot_bytes
        if self._size > shutil.disk_usage(SHARED_MEMORY).free:
            raise OSError(f'{SHARED_MEMORY} has less than {self._size} bytes')
        self._file = tempfile.TemporaryFile(dir=SHARED_MEMORY)
        self._file.truncate(self._size)  # a page takes memory from its first access on
        self._path, self._inode = f'/proc/{os.getpid()}/fd/{self._file.fileno()}', os.fstat(self._file.fileno()).st_ino
        self._memory: mmap.mmap | None = mmap.mmap(self._file.fileno(), self._size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_file': None, '_memory': None}  # a worker opens the memory for its first batch

    def build(self, build: Callable[..., dict[str, Any]], rows: Sequence) -> dict[str, Any]:
        """In a worker: returns `build(rows, out=images of a free slot)`, or `build(rows)` if all slots are in use."""
        slot = self._claim()
        if slot is None:
            return build(rows)
        images = _Images(slot, len(rows))
        return {**build(rows, out=self._array(images)), 'image': images}

    def open(self, batch: dict[str, Any]) -> dict[str, Any]:
        """In the parent: returns a batch of `build` with its images as an array, whose deletion frees the slot."""
        if not isinstance(images := batch['image'], _Images):
            return batch
        array = self._array(images)  # views of the array, and JAX arrays that share its memory, keep it alive
        weakref.finalize(array, self._set_in_use, images.slot, False).atexit = False
        return {**batch, 'image': array}

    def _array(self, images: _Images) -> np.ndarray:
        offset = self._start + images.slot * self._slot_bytes
        return np.ndarray((images.count, *self._shape[1:]), np.uint8, buffer=self._memory, offset=offset)

    def _claim(self) -> int | None:
        """Returns a slot of this worker that was free, or None."""
        if _worker_index is None:  # without worker processes, as in free-threaded Python
            return None
        with _lock:
            memory = self._memory = self._memory or self._open()
            if memory is None:
                return None
            first = _worker_index * self._slots
            slot = memory.find(b'\0', first, first + self._slots)
            if slot < 0:
                return None
            self._set_in_use(slot, True)
            return slot

    def _set_in_use(self, slot: int, in_use: bool) -> None:
        assert self._memory
        self._memory[slot] = in_use

    def _open(self) -> mmap.mmap | None:
        """Opens the parent's file in a worker. Returns None if the system does not allow it."""
        try:
            with open(self._path, 'r+b') as file:
                is_same = os.fstat(file.fileno()).st_ino == self._inode  # not if the parent has closed it
                return mmap.mmap(file.fileno(), self._size) if is_same else None
        except OSError:
            return None
