"""One trial of each fault; `python -m tests.faults --trials=N` makes more."""

import os
import signal
import subprocess

import numpy as np
import pytest

from tests.faults import faults
from tests.faults.scene import NotHereError, Scene, TooLateError, attempt, in_time


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp('shared')


def test_a_run_that_was_over_is_no_trial(tmp_path):
    scene = Scene(tmp_path, np.random.default_rng(0), tmp_path)
    with subprocess.Popen(['true']) as child:
        child.wait()
        with pytest.raises(TooLateError):
            scene.stop(child, signal.SIGKILL)
    turns = []

    def late(scene):
        turns.append(scene.rng.integers(1 << 40))
        in_time(len(turns) == 3)

    assert attempt(late, tmp_path, tmp_path, 7).folder == tmp_path / '2'
    assert len(set(turns)) == 3  # not the same moment again
    with pytest.raises(NotHereError, match='five runs were over'):
        attempt(lambda scene: in_time([]), tmp_path / 'others', tmp_path, 7)


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.isdir('/proc/self'), reason='looks processes up in /proc, which this system has not got'
)
@pytest.mark.parametrize('fault', faults.ALL, ids=lambda fault: fault.__name__)
def test_survives(fault, shared, tmp_path):
    try:
        seed = int.from_bytes(os.urandom(4))
        print('seed', seed)
        attempt(fault, tmp_path, shared, seed)
    except NotHereError as error:
        pytest.skip(str(error))
