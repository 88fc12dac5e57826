"""Worker processes that end with the program, and how many there should be."""

import multiprocessing
import os
import threading


def end_with_parent(*_) -> None:
    """Ends this worker process when its parent is gone, however it went: a killed parent cannot end it itself."""
    parent = multiprocessing.parent_process()

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
