"""One trial of each fault; `python -m tests.faults --trials=N` makes more."""

import os
import signal
import subprocess

import numpy as np
import pytest

from tests.faults import faults
from tests.faults.scene import LostError, NotHereError, Scene, TooLateError, attempt, in_time, noticed, step_of


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


def test_a_fault_that_changes_nothing_is_a_loss(tmp_path):
    """But near the end of a run, which may have been over before it saw it."""
    assert step_of(tmp_path) == 0
    (tmp_path / 'metrics.jsonl').write_text('{"step": 12, "split": "train"}\n{"step": 24, "spl')
    assert step_of(tmp_path) == 24
    noticed(143, 24)
    with pytest.raises(LostError, match='a fault at step 24 changed nothing'):
        noticed(0, 24)
    with pytest.raises(TooLateError):
        noticed(0, 57)


@pytest.mark.parametrize('printed', ['train  step 60/60', 'Resuming from step 8 of 60 in run.'])
def test_to_begin_anew_is_a_loss(printed, tmp_path, monkeypatch):
    """Also where that ends the same."""
    for name in ('8', '16', '24.damaged', '24.orbax-checkpoint-tmp'):
        (tmp_path / 'run' / 'checkpoints' / name).mkdir(parents=True)
        (tmp_path / 'run' / 'checkpoints' / name / 'SHA256SUMS').touch()
    monkeypatch.setattr(Scene, 'run', lambda *_, **__: (0, printed))
    with pytest.raises(LostError, match='step 16 of'):
        Scene(tmp_path, np.random.default_rng(0), tmp_path).expect_same_end(tmp_path / 'run')


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
