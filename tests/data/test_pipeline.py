"""The input pipeline: a batch depends on seed and position alone."""

import collections
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import chex
import numpy as np
import pytest

from alexnet_jax.core import augment
from alexnet_jax.data import cache, pipeline
from tests import ROOT, helpers


def _train(count=50, *, batch_size=8, start_step=0, take=10, damaged=(), **options):
    options = {'seed': 3, 'augmentation': augment.Augmentation(image_size=4), 'num_threads': 2, **options}
    records = helpers.Records(count, damaged=damaged)
    batches = pipeline.train_batches(cache.Records(records, 6), batch_size=batch_size, start_step=start_step, **options)
    try:
        return list(itertools.islice(batches, take))
    finally:
        batches.close()


def test_batch_contents_and_dtypes():
    (batch,) = _train(take=1)
    shapes = {name: (x.dtype.name, x.shape) for name, x in batch.items()}
    assert shapes == {
        'image': ('uint8', (8, 4, 4, 3)), 'offset': ('int32', (8, 2)), 'extent': ('int32', (8, 2)),
        'reflect': ('bool', (8,)), 'color': ('float32', (8, 3)), 'label': ('int32', (8,)), 'weight': ('float32', (8,)),
    }  # fmt: skip


@pytest.mark.parametrize(('cores', 'workers', 'threads'), [(2, 0, 2), (64, 0, 16), (16, 4, 4), (16, 15, 1), (2, 8, 1)])
def test_threads_are_divided_among_workers(cores, workers, threads, monkeypatch):
    monkeypatch.setattr(pipeline.processes, 'cores', lambda: cores)
    assert pipeline.default_threads(workers) == threads


@pytest.mark.parametrize(
    ('cores', 'free_mib', 'devices', 'workers'),
    [(16, 65536, 1, 15), (64, 65536, 1, 32), (64, 65536, 2, 63), (2, 65536, 1, 0), (16, 64, 1, 0), (16, 1000, 1, 4)],
)
def test_default_workers_leave_one_core_free(cores, free_mib, devices, workers, monkeypatch, capsys):
    """A worker needs up to five buffers of 128 training and 128 validation images, 42.4 MiB each.

    That is 128 * 3 * (224^2 + 256^2) bytes. A container has 64 MiB of shared memory. Larger batches are assembled in
    chunks of 1,024 images.
    """
    monkeypatch.setattr(pipeline.processes, 'cores', lambda: cores)
    monkeypatch.setattr(pipeline.shutil, 'disk_usage', lambda path: SimpleNamespace(free=free_mib << 20))
    row_bytes = 3 * (224**2 + 256**2)
    assert pipeline.default_workers(128, row_bytes, devices) == workers
    assert ('--ipc=host' in capsys.readouterr().err) == (free_mib < 65536)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')  # as launch/local.sh sets it
    assert pipeline.default_workers(128, row_bytes, devices) == (workers if free_mib == 65536 else 0)
    monkeypatch.delenv('LOCAL_WORLD_SIZE')
    assert pipeline.default_workers(8192, row_bytes, devices) == (min(workers, 36) if free_mib == 65536 else 0)


def test_default_workers_count_queued_chunks(monkeypatch, capsys):
    """Four processes were seen to hold 5 * 4 + 2 + 7 chunks of a batch of eight: more than the 24 that fit in 8 GiB."""
    monkeypatch.setattr(pipeline.processes, 'cores', lambda: 16)
    monkeypatch.setattr(pipeline.shutil, 'disk_usage', lambda path: SimpleNamespace(free=8 << 30))
    row_bytes = 3 * (224**2 + 256**2)
    assert (8 << 30) // (1024 * row_bytes) == 24
    assert pipeline.default_workers(8192, row_bytes, 1) == 3 and pipeline.default_workers(1024, row_bytes, 1) == 4


def test_records_in_memory_are_never_printed():
    """Grain names each step of a pipeline by its repr, which takes minutes for a list of a million arrays."""

    class Records(list):
        def __repr__(self):
            raise AssertionError('every record would be printed')

    records = Records([{'image': np.zeros((6, 6, 3), np.uint8), 'label': 0}] * 4)
    augmentation = augment.Augmentation(image_size=4)
    stored = cache.Records(records, 6)
    next(pipeline.train_batches(stored, batch_size=2, seed=0, start_step=0, augmentation=augmentation))
    assert len(list(pipeline.eval_batches(records, batch_size=2, record_size=6))) == 2


def test_every_epoch_is_another_permutation():
    stream = np.concatenate(
        [b['label'] for b in _train(take=25)]
    )  # 200 positions are 4 epochs of 50; 8 does not divide 50
    passes = stream.reshape(4, 50)
    for one in passes:
        assert sorted(one) == list(range(50))
    assert len({tuple(one) for one in passes}) == 4


@pytest.mark.parametrize('start_step', [1, 6, 7])  # 7: batches 6 and 7 span the end of the first epoch
def test_restart_resumes_at_step_times_batch(start_step):
    whole = _train(take=12)
    chex.assert_trees_all_equal(_train(take=12 - start_step, start_step=start_step), whole[start_step:])


@pytest.mark.parametrize('label', [-1, -7])
def test_unlabeled_image_is_named(label):
    records = [{'image': np.zeros((6, 6, 3), np.uint8), 'label': label, 'file_name': b'a.jpg'}] * 3
    fixed = {'seed': 0, 'start_step': 0, 'augmentation': augment.Augmentation(image_size=4)}
    batches = pipeline.train_batches(cache.Records(records, 6), batch_size=2, **fixed)
    batch = next(batches)
    batches.close()
    (whole,) = pipeline.eval_batches(records, batch_size=3, record_size=6)
    for found in (batch, whole):
        why = found['unreadable']
        assert set(why) == {"the image 'a.jpg' has no label."} and not found['weight'].any()
    _, labels = pipeline.decode_all(records, 6)
    assert labels.tolist() == [pipeline.UNREADABLE_LABEL] * 3


def test_batches_do_not_depend_on_threads():
    chex.assert_trees_all_equal(_train(num_threads=1), _train(num_threads=5))


@pytest.mark.slow
@pytest.mark.parametrize(('num_workers', 'piece'), [(1, 8), (3, 8), (2, 3)])
def test_batches_do_not_depend_on_workers(num_workers, piece, monkeypatch):
    """Also if workers assemble a batch of 8 from chunks of 2, 3 and 3, some with unreadable images."""
    monkeypatch.setattr(pipeline, '_CHUNK', piece)
    for shard in ((0, 1), (1, 2)):
        in_threads, in_processes = (
            _train(start_step=2, damaged=range(0, 50, 3), shard=shard, num_workers=number)
            for number in (0, num_workers)
        )
        why = [[batch.pop('unreadable', []) for batch in batches] for batches in (in_threads, in_processes)]
        assert why[0] == why[1] and max(map(len, why[0])) > 1
        chex.assert_trees_all_equal(in_processes, in_threads)


@pytest.mark.parametrize('count', [2, 4])
def test_shards_concatenate_to_the_whole_batch(count):
    whole = _train(start_step=3)
    parts = [_train(start_step=3, shard=(i, count)) for i in range(count)]
    for k, batch in enumerate(whole):
        joined = {name: np.concatenate([part[k][name] for part in parts]) for name in batch}
        chex.assert_trees_all_equal(joined, batch)


def test_draws_depend_on_position_not_on_images():
    """The same seed draws the same values at a position, whatever the images and batch size."""
    a, b = _train(), _train(count=47, batch_size=4, take=20)
    assert (np.concatenate([x['label'] for x in a]) != np.concatenate([x['label'] for x in b])).any()
    for name in ('offset', 'reflect', 'color'):
        chex.assert_trees_all_equal(np.concatenate([x[name] for x in a]), np.concatenate([x[name] for x in b]))
    other = _train(seed=4)
    assert (np.concatenate([x['offset'] for x in a]) != np.concatenate([x['offset'] for x in other])).any()


@pytest.mark.parametrize('batch_size', [1, 7, 8, 10, 64])
@pytest.mark.parametrize('shards', [1, 2])
def test_evaluation_counts_every_image_once(batch_size, shards):
    batch_size *= shards
    seen, batches = collections.Counter(), set()
    for i in range(shards):
        parts = list(
            pipeline.eval_batches(
                helpers.Records(30), batch_size=batch_size, record_size=6, shard=(i, shards), num_threads=2
            )
        )
        batches.add(len(parts))
        for part in parts:
            assert part['label'].shape == (batch_size // shards,)
            seen.update(part['label'][part['weight'] > 0].tolist())
    assert seen == {i: 1 for i in range(30)}
    assert len(batches) == 1  # all processes take part in every step


@pytest.mark.parametrize('num_workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_repeated_evaluation_keeps_its_processes(num_workers):
    options = dict(batch_size=8, record_size=6, num_workers=num_workers)
    once = list(pipeline.eval_batches(helpers.Records(30), **options))
    batches, pids = pipeline.eval_batches(helpers.Records(30), **options, repeat=True), []
    for _ in range(3):
        chex.assert_trees_all_equal(list(itertools.islice(batches, 4)), once)
        pids.append({process.pid for process in multiprocessing.active_children()})
    assert pids[0] == pids[1] == pids[2] and len(pids[0]) == num_workers
    batches.close()
    assert not multiprocessing.active_children()


_PARENT = """
import multiprocessing, sys, time
from absl import flags
from tests import helpers
from alexnet_jax.core.augment import Augmentation
from alexnet_jax.data import cache, pipeline
if __name__ == '__main__':
    flags.FLAGS.mark_as_parsed()
    batches = pipeline.train_batches(cache.Records(helpers.Records(50), 6), batch_size=8, start_step=0, seed=3,
                                     num_workers=2, augmentation=Augmentation(image_size=4))
    next(batches)
    print(*[p.pid for p in multiprocessing.active_children()], flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.isdir('/proc/self'), reason='looks processes up in /proc, which this system has not got'
)
@pytest.mark.parametrize('sig', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_exit_with_their_parent(tmp_path, sig):
    script = tmp_path / 'parent.py'
    script.write_text(_PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )  # fmt: skip
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(map(helpers.is_running, workers))
    parent.send_signal(sig)
    parent.wait(20)
    deadline = time.monotonic() + 20
    while any(map(helpers.is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(helpers.is_running, workers))
