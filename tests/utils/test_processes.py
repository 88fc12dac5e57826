"""Cores, machines, and processes that are started and left."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from alexnet_jax.utils import processes
from tests import ROOT


def _blocked(pid):
    with open(f'/proc/{pid}/status') as file:
        return int(next(line.split()[1] for line in file if line.startswith('SigBlk')), 16)


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='looks processes up in /proc')
def test_a_process_started_while_signals_are_held_never_sees_them():
    """In a fresh interpreter: its first process starts multiprocessing's tracker too, which lets signals through."""
    script = """
import multiprocessing, signal, time
from alexnet_jax.utils import processes
if __name__ == '__main__':
    with processes.signals_blocked():
        child = multiprocessing.get_context('spawn').Process(target=time.sleep, args=(60,))
        child.start()
    print(child.pid, *signal.pthread_sigmask(signal.SIG_BLOCK, []), flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, '-c', script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        pid, *own = parent.stdout.readline().split()
        found = _blocked(pid)
        parent.kill()
        os.kill(int(pid), 9)
    assert found & (1 << 14) and found & (1 << 1) and not own  # bits 14 and 1: SIGTERM, SIGINT


@pytest.mark.parametrize(
    ('beside', 'quota', 'cores'),
    [('', 'max 100000', 8), ('2', 'max 100000', 4), ('', '250000 100000', 3), ('2', '100000 100000', 1)],
)
def test_cores_are_those_of_the_container_dealt_out(beside, quota, cores, tmp_path, monkeypatch):
    (tmp_path / 'cpu.max').write_text(quota)
    monkeypatch.setattr(processes, '_CONTAINER', tmp_path)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(8)))
    monkeypatch.setenv('LOCAL_WORLD_SIZE', beside)
    assert processes.cores() == cores


@pytest.mark.parametrize(
    ('here', 'several'),
    [
        ({}, False),
        ({'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '4'}, True),  # launch/slurm.sh, jobset.yaml
        ({'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '1'}, False),
        ({'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '4', 'LOCAL_WORLD_SIZE': '4'}, False),  # local.sh
    ],
)
def test_processes_may_be_on_several_machines(here, several, monkeypatch):
    for name in ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'LOCAL_WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    assert processes.on_several_machines() == several


def test_what_workers_leave_in_shared_memory_is_removed_without_a_word():
    code = (
        'from alexnet_jax.utils import processes\nfrom multiprocessing import shared_memory\n'
        'with processes.signals_blocked():\n    print(shared_memory.SharedMemory(create=True, size=9).name)'
    )
    ended = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stderr == ''
    left = pathlib.Path('/dev/shm', ended.stdout.strip())
    deadline = time.monotonic() + 10
    while left.exists() and time.monotonic() < deadline:  # the tracker outlives the program by a moment
        time.sleep(0.05)
    assert not left.exists()
