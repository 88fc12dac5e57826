"""SIGTERM waits."""

import os
import threading

from alexnet_jax.utils import distributed


def test_a_signal_waits_for_the_loop(monkeypatch):
    with distributed.defer_sigterm() as asked:
        assert not asked()
        os.kill(os.getpid(), 15)
        assert asked()
    found = []
    thread = threading.Thread(target=lambda: found.append(_asked_elsewhere()))
    thread.start()
    thread.join()
    assert found == [False]


def _asked_elsewhere():
    with distributed.defer_sigterm() as asked:
        return asked()
