"""SIGTERM is deferred; results are broadcast."""

import os
import threading

import jax
import pytest
from jax.experimental import multihost_utils

from alexnet_jax.utils import distributed
from alexnet_jax.utils.errors import UserError


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


def test_broadcast_results_have_one_size(monkeypatch):
    """All processes must take part with arrays of one shape, or they wait for each other forever."""
    sizes = []
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(multihost_utils, 'broadcast_one_to_all', lambda x: sizes.append(x.shape) or x)
    assert distributed.broadcast_from_process_0(lambda: ['a']) == ['a']
    with pytest.raises(UserError, match='a result of 70014 bytes'):
        distributed.broadcast_from_process_0(lambda: 'x' * 70_000)
    with pytest.raises(UserError, match='no such folder'):
        distributed.broadcast_from_process_0(lambda: (_ for _ in ()).throw(OSError('no such folder')))
    assert len(set(sizes)) == 1
