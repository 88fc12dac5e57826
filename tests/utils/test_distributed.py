"""SIGTERM is deferred."""

import os
import threading

from alexnet_jax.utils import distributed


def test_sigterm_is_deferred(monkeypatch):
    with distributed.defer_sigterm() as asked:
        assert not asked()
        os.kill(os.getpid(), 15)
        assert asked()
    found = []
    thread = threading.Thread(target=lambda: found.append(_requested_in_thread()))
    thread.start()
    thread.join()
    assert found == [False]


def _requested_in_thread():
    with distributed.defer_sigterm() as asked:
        return asked()
