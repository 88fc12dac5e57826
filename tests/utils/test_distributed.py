"""SIGTERM is deferred; results are broadcast."""

import os
import threading

import jax
import numpy as np
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


def test_other_values_in_one_process_are_refused_in_all(monkeypatch):
    distributed.check_equal({'the config': 1})  # one process has nothing to compare with
    monkeypatch.setattr(distributed.jax, 'process_count', lambda: 2)
    sent = []
    monkeypatch.setattr(multihost_utils, 'process_allgather', lambda own: sent.append(own) or np.stack([own, own]))
    distributed.check_equal({'the config': {'b': 1, 'a': 2}, 'the data': 'x'})
    distributed.check_equal({'the config': {'a': 2, 'b': 1}, 'the data': 'y'})
    monkeypatch.setattr(multihost_utils, 'process_allgather', lambda own: np.stack(sent))
    for process in range(2):  # they are refused in both
        monkeypatch.setattr(distributed.jax, 'process_index', lambda process=process: process)
        with pytest.raises(UserError, match='process 1 has another value of the data than process 0'):
            distributed.check_equal({'the config': {'a': 2, 'b': 1}, 'the data': 'xy'[process]})
