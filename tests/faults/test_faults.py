"""Trials of twenty faults; `python -m tests.faults --trials=N` runs more."""

import datetime
import os
import signal
import subprocess

import numpy as np
import pytest

from tests.faults import __main__ as campaign
from tests.faults import faults, power_cut, system_faults
from tests.faults.scene import (
    LostError,
    NotPossibleError,
    Scene,
    SilentError,
    TooLateError,
    attempt,
    expect_noticed,
    last_step,
    require_running,
)

# Twenty kinds of faults, others each day: the processes of pytest must agree on them.
_ALL = [*faults.ALL, *system_faults.ALL]
_DAY = np.random.default_rng(datetime.date.today().toordinal())
_OF_THE_DAY = [_ALL[i] for i in sorted(_DAY.choice(len(_ALL), 20, replace=False))]


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp('shared')


def test_fault_after_the_end_is_repeated(tmp_path):
    scene = Scene(tmp_path, np.random.default_rng(0), tmp_path)
    with subprocess.Popen(['true']) as child:
        child.wait()
        with pytest.raises(TooLateError):
            scene.stop(child, signal.SIGKILL)
    turns = []

    def late(scene):
        turns.append(scene.rng.integers(1 << 40))
        require_running(len(turns) == 3)

    assert attempt(late, tmp_path, tmp_path, 7).folder == tmp_path / '2'
    assert len(set(turns)) == 3  # a different moment each time
    with pytest.raises(NotPossibleError, match='five runs were over'):
        attempt(lambda scene: require_running([]), tmp_path / 'others', tmp_path, 7)


def test_ignored_fault_counts_as_lost(tmp_path):
    """Except near the end of a run, which may have finished before it noticed the fault."""
    assert last_step(tmp_path) == 0
    (tmp_path / 'metrics.jsonl').write_text('{"step": 12, "split": "train"}\n{"step": 24, "spl')
    assert last_step(tmp_path) == 24
    expect_noticed(143, 24)
    with pytest.raises(LostError, match='a fault at step 24 changed nothing'):
        expect_noticed(0, 24)
    with pytest.raises(TooLateError):
        expect_noticed(0, 57)


@pytest.mark.parametrize('printed', ['train  step 60/60', 'Resuming from step 8 of 60 in run.'])
def test_restart_from_the_beginning_counts_as_lost(printed, tmp_path):
    """Even if the result is the same."""

    class FakeScene(Scene):
        def run(self, *_, **__):
            return 0, printed

    for name in ('8', '16', '24.damaged', '24.orbax-checkpoint-tmp'):
        (tmp_path / 'run' / 'checkpoints' / name).mkdir(parents=True)
        (tmp_path / 'run' / 'checkpoints' / name / 'SHA256SUMS').touch()
    with pytest.raises(LostError, match='step 16 of'):
        FakeScene(tmp_path, np.random.default_rng(0), tmp_path).expect_same_result(tmp_path / 'run')


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.isdir('/proc/self'), reason='looks processes up in /proc, which this system has not got'
)
@pytest.mark.parametrize('fault', _OF_THE_DAY, ids=lambda fault: fault.__name__)
def test_fault_is_survived(fault, shared, tmp_path):
    try:
        seed = int.from_bytes(os.urandom(4))
        print('seed', seed)
        attempt(fault, tmp_path, shared, seed)
    except NotPossibleError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_power_cuts(shared, tmp_path):
    """Of the disks that a power cut could leave; `python -m tests.faults.power_cut` tries all of them."""
    seed = int.from_bytes(os.urandom(4))
    print('seed', seed)
    try:
        results = power_cut.replay_all(Scene(tmp_path, np.random.default_rng(seed), shared), every=60)
    except NotPossibleError as error:
        pytest.skip(str(error))
    assert [counts['losses'] for counts in results.values()] == [[], []]
    assert results['run']['outcomes'].keys() >= {'0', '8', '16'}
    assert results['out']['outcomes'].keys() == {'absent', 'whole'}


@pytest.mark.full
def test_power_cuts_lose_metrics_without_syncs(shared, tmp_path):
    """The trial above can fail."""
    scene = Scene(tmp_path, np.random.default_rng(0), shared)
    results = power_cut.replay_all(scene, every=20, syncs=False)
    assert 'metrics up to step' in ' '.join(results['run']['losses'])


def test_missing_syncs_are_found(tmp_path):
    """In a recording of four changes and their syncs: a line is on disk before the file that counts it."""
    run, rng = f'{tmp_path}/run', np.random.default_rng(0)
    changes = [('mkdir', run), ('sync', str(tmp_path)), ('create', f'{run}/metrics.jsonl'), ('sync', run)]
    changes += [('append', f'{run}/metrics.jsonl', b'1'), ('sync', f'{run}/metrics.jsonl'), ('create', f'{run}/saved')]

    def check(folder, *_):
        lost = (folder / 'saved').exists() and not (folder / 'metrics.jsonl').read_text()
        assert not lost, 'metrics'

    def lost(changes):
        return sum(power_cut.replay('run', changes, tmp_path, tmp_path, check, rng)['lost'] for _ in range(12))

    fewer = power_cut.without_syncs(changes, str(tmp_path))
    assert len(fewer) == 4
    assert lost(changes) == 0
    assert lost(fewer) > 0


def test_campaigns_add_up():
    trial = {'fault': 'killed', 'outcome': 'survived', 'reason': None, 'seconds': 10.0, 'slowest_stop': 1.5}
    lost = {**trial, 'outcome': 'lost', 'reason': 'why', 'seconds': 20.0}
    not_made = {**trial, 'fault': 'slow_disk', 'outcome': 'not made', 'reason': 'no strace', 'seconds': 5.0}
    result = {'name': 'faults'}
    for seed, line in ((1, trial), (1, lost), (2, not_made), (2, trial)):
        result = campaign.add(result, line, seed, 'abc')
    assert (result['trials'], result['survived'], result['lost'], result['silent'], result['not_made']) == (
        3,
        2,
        1,
        0,
        1,
    )
    assert result['seconds_per_trial'] == 13.3 and result['slowest_stop'] == 1.5
    assert result['seeds'] == {'1': 2, '2': 2} and result['commits'] == {'abc': 4}
    assert result['failures'] == [{'fault': 'killed', 'outcome': 'lost', 'reason': 'why'}]
    assert result['reasons_not_made'] == [{'fault': 'slow_disk', 'outcome': 'not made', 'reason': 'no strace'}]
    assert result['kinds']['killed'] == {'trials': 3, 'survived': 2, 'lost': 1, 'silent': 0}


def test_fault_that_never_comes_in_time_fails_the_campaign(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(campaign.logging, 'set_verbosity', lambda level: None)  # it would stay for later tests

    def late(scene):
        require_running(False)

    monkeypatch.setattr(campaign, 'ALL', [late])
    monkeypatch.setattr('sys.argv', ['faults', '--trials=1', f'--output={tmp_path}/out.json'])
    for _ in range(2):  # also when the same command has nothing left to do
        with pytest.raises(SystemExit, match='1'):
            campaign.main()
        assert 'nothing was tested: late' in capsys.readouterr().out


def test_worker_whose_end_changes_nothing_counts_as_silent(monkeypatch, tmp_path):
    """A run that goes on without the batches of a dead worker."""
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'metrics.jsonl').write_text('{"step": 3, "split": "train"}\n')
    scene = Scene(tmp_path, np.random.default_rng(0), tmp_path)
    worker = subprocess.Popen(['sleep', '60'])
    for name, value in (('start', None), ('wait_for_training', None), ('random_process', worker.pid)):
        monkeypatch.setattr(scene, name, lambda *_, value=value: value)
    monkeypatch.setattr(scene, 'wait_for_exit', lambda _: 0)
    with worker, pytest.raises(SilentError, match='a fault at step 3 changed nothing'):
        faults.killed_worker(scene)
