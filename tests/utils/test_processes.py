"""Cores, hosts, and processes that are started and left behind."""

import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import io

from alexnet_jax.utils import processes
from tests import ROOT


def _blocked(pid):
    with open(f'/proc/{pid}/status') as file:
        return int(next(line.split()[1] for line in file if line.startswith('SigBlk')), 16)


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='looks processes up in /proc')
def test_signals_stay_blocked_in_child_processes():
    """In a fresh interpreter: the first process also starts multiprocessing's tracker, which unblocks signals."""
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


_STARTS = {
    'workers': """
    with processes.signals_blocked():
        worker = multiprocessing.get_context('spawn').Process(target=print, args=('worked',))
        worker.start()
        worker.join()
""",
    'prepare': """
    from alexnet_jax.prepare import dataset_writer
    shard = dataset_writer.Shard(os.path.abspath('a.array_record'), [], 8, 'raw', (), False)
    dataset_writer.write_shards([shard], 1)
    print('worked')
""",
    'command': """
    from types import SimpleNamespace
    from alexnet_jax.commands import app
    main = lambda args: print('worked', subprocess.run([sys.executable, '-c', 'import json']).returncode)
    app._call(SimpleNamespace(FLAGS=(), main=main), [])
    del os.environ['PYTHONSAFEPATH']
""",
    'meta.mat': """
    from alexnet_jax.prepare import ground_truth
    print('worked', ground_truth._read_mat('meta.mat'))
""",
}


@pytest.mark.parametrize('start', _STARTS)
def test_nothing_is_imported_from_the_current_folder(start, tmp_path):
    """Python searches it first in interpreters that are started with -c, as multiprocessing does."""
    folder, script = tmp_path / 'of others', tmp_path / 'script.py'
    folder.mkdir()
    for name in ('json', 'multiprocessing', 'scipy'):
        (folder / f'{name}.py').write_text(f'open({str(tmp_path / "ran")!r}, "w")\nraise SystemExit')
    synsets = np.array([(1, 'n1')], [('ILSVRC2010_ID', object), ('WNID', object)])
    io.savemat(folder / 'meta.mat', {'synsets': synsets})
    imports = 'import multiprocessing, os, subprocess, sys\nfrom alexnet_jax.utils import processes\n'
    after = "    assert not os.environ.get('PYTHONSAFEPATH')\n"
    script.write_text(f"{imports}if __name__ == '__main__':{_STARTS[start]}{after}")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONSAFEPATH': ''},
    )  # fmt: skip
    assert 'worked' in done.stdout and not done.returncode and not (tmp_path / 'ran').exists()


@pytest.mark.parametrize(
    ('beside', 'quota', 'cores'),
    [('', 'max 100000', 8), ('2', 'max 100000', 4), ('', '250000 100000', 3), ('2', '100000 100000', 1)],
)
def test_cores_of_the_container_are_shared(beside, quota, cores, tmp_path, monkeypatch):
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
    ids=['no launcher', 'slurm', 'one process', 'local'],
)
def test_on_several_machines(here, several, monkeypatch):
    for name in ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'LOCAL_WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    assert processes.on_several_machines() == several


def test_leftover_shared_memory_is_removed_silently():
    code = (
        'from alexnet_jax.utils import processes\nfrom multiprocessing import shared_memory\n'
        'with processes.signals_blocked():\n    print(shared_memory.SharedMemory(create=True, size=9).name)'
    )
    ended = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stderr == ''
    left = pathlib.Path('/dev/shm', ended.stdout.strip())
    deadline = time.monotonic() + 10
    while left.exists() and time.monotonic() < deadline:  # the tracker outlives the program briefly
        time.sleep(0.05)
    assert not left.exists()


@pytest.mark.skipif(sys.platform != 'linux', reason='huge pages are a setting of Linux')
@pytest.mark.parametrize(
    ('pages', 'tunables', 'jax', 'expected'),
    [
        ('always [madvise] never', None, False, 'glibc.malloc.hugetlb=1'),
        (
            'always [madvise] never',
            'glibc.malloc.arena_max=2',
            False,
            'glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1',
        ),
        ('always [madvise] never', 'glibc.malloc.hugetlb=0', False, None),
        ('always [madvise] never', None, True, None),
        ('[always] madvise never', None, False, None),
        (None, None, False, None),
    ],
)
def test_command_restarts_once_for_huge_pages(monkeypatch, tmp_path, pages, tunables, jax, expected):
    restarts = []
    monkeypatch.setattr(os, 'execv', lambda path, words: restarts.append((path, words)))
    monkeypatch.setattr(processes, '_HUGE_PAGES', tmp_path / 'enabled')
    monkeypatch.setattr(sys, 'orig_argv', ['python', '-m', 'alexnet_jax', 'train'])
    monkeypatch.setattr(sys, 'gettrace', lambda: None)
    monkeypatch.delitem(sys.modules, 'jax', raising=False)
    if jax:
        monkeypatch.setitem(sys.modules, 'jax', sys)
    monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
    if tunables:
        monkeypatch.setenv('GLIBC_TUNABLES', tunables)
    if pages:
        (tmp_path / 'enabled').write_text(pages)
    processes.use_huge_pages()
    processes.use_huge_pages()  # after a restart
    found = [(sys.executable, [sys.executable, '-m', 'alexnet_jax', 'train'])] if expected else []
    assert restarts == found and os.environ.get('GLIBC_TUNABLES') == (expected or tunables)
