"""The measurement of long runs finds a leak."""

import os
import sys

import pytest

from tests.faults import long_run

pytestmark = pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='reads /proc, which this system has not got')
STEPS = list(range(500, 100_001, 500))


def _samples(**changed):
    """Returns the samples of a run in which nothing grows but what must, with a little noise."""
    noisy = [1e9 + 1e6 * (i % 7) for i in range(len(STEPS))]
    levels = {name: changed.get(name, noisy) for name in (*long_run.FLAT, *long_run.BOUNDED)}
    return {'step': STEPS, **levels, **{name: [3.0 * step for step in STEPS] for name in long_run.COUNTERS}}


def test_leak_is_not_flat():
    """A start that is higher or lower does not count, nor a single high reading, nor what shrinks."""
    rise = [1e9 + 250 * step for step in STEPS]  # 250 bytes per update: 1.9% of 1 GB in 75,000 updates
    start = [1e6 if step < 25_000 else 9e9 if step == 90_000 else 1e9 for step in STEPS]
    shrinking = [1e9 - 5000 * step for step in STEPS]
    trends = long_run.trends(
        _samples(rss=rise, pss=[2 * value - 1e9 for value in rise], files=start, threads=shrinking)
    )
    assert [name for name, trend in trends.items() if not trend['flat']] == ['pss']
    assert trends['pss']['per_1000_updates'] == pytest.approx(500_000)
    assert trends['pss']['rise'] == pytest.approx(0.0365, abs=1e-3)
    assert not long_run.trends(_samples(shared_bytes=[max(0, step - 60_000) for step in STEPS]))['shared_bytes']['flat']


def test_checkpoints_may_vary_but_not_accumulate():
    varying = [4e5 if i in (60, 150) else 3e5 if i < 120 else 2e5 for i in range(len(STEPS))]
    accumulating = [4.1e5 if i == 170 else value for i, value in enumerate(varying)]
    varying, accumulating = (
        long_run.trends(_samples(checkpoint_bytes=values))['checkpoint_bytes'] for values in (varying, accumulating)
    )
    assert (varying['rise'], varying['flat']) == (0, True)
    assert (accumulating['rise'], accumulating['flat']) == (pytest.approx(0.025), False)


def test_costs_of_an_update():
    found = long_run.per_update(_samples())
    assert found['metrics_bytes'] == found['event_bytes'] == pytest.approx([3, 3])
    assert found['ms'] == found['cpu_ms'] == pytest.approx([3000, 3000])


CHILD = """
import json, sys, threading, time
workdir, leaks = sys.argv[1], sys.argv[2] == 'leaks'
kept = []
with open(f'{workdir}/metrics.jsonl', 'w') as file:
    for step in range(10, 201, 10):
        if leaks:
            kept.append((open('/dev/null'), bytearray(1 << 20)))
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        file.write(json.dumps({'step': step}) + '\\n')
        file.flush()
        time.sleep(0.1)
"""


@pytest.mark.slow
@pytest.mark.parametrize('leaks', [False, True])
def test_growing_process_is_found(leaks, tmp_path, monkeypatch):
    monkeypatch.setattr(long_run, '_SECONDS', 0.02)
    (tmp_path / 'run').mkdir()
    command = [sys.executable, '-c', CHILD, str(tmp_path / 'run'), 'leaks' if leaks else '']
    samples = long_run.measure(command, tmp_path / 'run', 200, 20)
    assert len(samples['step']) >= 15 and samples['step'][-1] == 200
    assert samples['metrics_bytes'][-1] == (tmp_path / 'run' / 'metrics.jsonl').stat().st_size
    grows = {name for name, trend in long_run.trends(samples).items() if not trend['flat']}
    assert grows == ({'rss', 'pss', 'files', 'threads'} if leaks else set())


def test_failed_run_is_not_measured(tmp_path):
    with pytest.raises(RuntimeError, match='ended with 3 at step 0:\nno data'):
        code = 'import sys; print("no data", flush=True); sys.exit(3)'
        long_run.measure([sys.executable, '-c', code], tmp_path / 'run', 200, 20)
