"""Images kept in memory or on the device, and records that cannot be decoded."""

import itertools
import multiprocessing
import re
import time

import chex
import jax
import numpy as np
import pytest

from alexnet_jax.core import augment
from alexnet_jax.data import cache, pipeline
from alexnet_jax.training import build
from alexnet_jax.utils import processes
from alexnet_jax.utils.errors import UnreadableError, UserError
from tests import helpers


def test_non_uint8_pixels_are_refused():
    """Values from 0 to 1 would all be black."""
    with pytest.raises(UnreadableError, match='float32 of shape .* expected uint8'):
        cache.decode({'image': np.ones((6, 6, 3), np.float32)}, 6)


@pytest.mark.parametrize('name', [b'n01/a.jpg', 'n01/a.jpg'])
def test_undecodable_record_is_named(name):
    with pytest.raises(UserError, match="record 'n01/a.jpg' cannot be decoded"):
        cache.decode({'image': b'\xff\xd8garbage', 'label': 0, 'file_name': name}, 6)


@pytest.mark.slow
@pytest.mark.parametrize('cache', ['host', 'device'])
def test_cached_training_uses_workers_only_for_validation(cache):
    run = build.build(helpers.run_config(**{'data.cache': cache, 'data.num_workers': 2}))
    batches, val_batches = run.train_batches(0), run.val_batches()
    try:
        next(batches)
        assert not multiprocessing.active_children()
        chex.assert_trees_all_equal(next(val_batches), next(build.build(helpers.run_config()).val_batches()))
        deadline = time.monotonic() + 30  # the first batch may arrive before the second process starts
        while len(multiprocessing.active_children()) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(multiprocessing.active_children()) == 2
    finally:
        batches.close()
        val_batches.close()


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [{'data': 1, 'tower': 1}, {'data': 2, 'tower': 2}])
def test_cached_images_equal_uncached(mesh):
    """Pixels and draws do not depend on the cache, and an update equals that of a batch cropped on the host."""
    changes = {'data.image_size': 29, 'data.reflect': True, **{f'mesh.{name}': n for name, n in mesh.items()}}
    runs = {
        where: build.build(helpers.run_config(**{'data.cache': where, **changes})) for where in ('', 'host', 'device')
    }
    found = {}
    for where, run in runs.items():
        batches = run.train_batches(20)  # spans two epochs
        *_, batch = (next(batches) for _ in range(4))
        batches.close()
        state, report = run.steps.train_step(
            run.steps.init(jax.random.key(0)), run.to_mesh(batch), run.image_stats, jax.random.key(1)
        )
        found[where] = batch, jax.device_get((state.params, report['loss']))
    assert found[''][0]['reflect'].any() and len(np.unique(found[''][0]['offset'])) == 3
    for where in ('host', 'device'):
        batch, (params, loss) = found[where]
        assert 'image' not in batch
        for key, value in found[''][0].items():
            assert key == 'image' or (batch[key] == value).all()
        on_device = augment.crop_on_device(runs[where].to_mesh(batch), 29)
        chex.assert_trees_all_equal(np.asarray(on_device['image']), found[''][0]['image'])
        chex.assert_trees_all_close((params, loss), found[''][1], rtol=1e-4, atol=1e-6)
    # Each device crops its own records.
    cut = jax.jit(lambda batch: augment.crop_on_device(batch, 29))
    text = cut.lower(runs['host'].to_mesh(found['host'][0])).compile().as_text()
    assert not re.findall('all-gather|all-reduce|all-to-all|collective-permute', text)


@pytest.mark.slow
def test_host_cache_resizes_random_areas():
    changes = {'data.crop_area': (0.3, 1.0), 'data.mean': 'channel'}
    runs = {where: build.build(helpers.run_config(**{'data.cache': where, **changes})) for where in ('', 'host')}
    for a, b in zip(*(itertools.islice(run.train_batches(20), 3) for run in runs.values()), strict=True):
        chex.assert_trees_all_equal(a, b)


def test_cache_larger_than_memory_is_refused(monkeypatch, tmp_path):
    """1,437 images of 32 px take 4.4 MB; with a copy on each of four CPU devices they take five times as much."""
    container = tmp_path / 'memory.max'
    container.write_text('max\n')
    monkeypatch.setattr(processes, '_CONTAINER', tmp_path)
    machine = processes.memory()
    assert machine > 2**30
    for where, memory in (('host', 5.4e6), ('device', 27e6)):
        container.write_text(f'{memory:.0f}\n')
        assert processes.memory() == memory < machine
        message = rf"data.cache='{where}': the 1437 training images need 0.0 GiB, more than 80% of the 0.0 GiB of mem"
        with pytest.raises(UserError, match=message):
            build.build(helpers.run_config(**{'data.cache': where}))
        monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')  # processes that share the memory
        assert processes.memory() == memory // 4
        monkeypatch.delenv('LOCAL_WORLD_SIZE')
    container.write_text('5600000')
    build.build(helpers.run_config(**{'data.cache': 'host'}))


@pytest.mark.parametrize('shard', [(0, 1), (1, 2)])
@pytest.mark.parametrize('start_step', [0, 5])
def test_batches_drawn_at_once_equal_single_batches(start_step, shard):
    """In a device cache, 16 batches at once: 40 batches of 8 from 50 images span three groups and seven epochs."""
    pixels, labels = np.zeros((50, 6, 6, 3), np.uint8), np.arange(50, dtype=np.int32) - 1  # one without a label
    options = {'batch_size': 8, 'seed': 3, 'start_step': start_step, 'shard': shard, 'num_threads': 2}
    options['augmentation'] = augment.Augmentation(image_size=4)
    single, grouped = (
        list(itertools.islice(pipeline.train_batches(kind(pixels, labels), **options), 40))
        for kind in (cache.HostCache, cache.DeviceCache)
    )
    assert not any(batch.pop('whole').any() for batch in single)
    for batch, other in zip(grouped, single, strict=True):
        index = batch.pop('index')
        assert index.dtype == np.int32 and (np.maximum(labels[index], 0) == batch['label']).all()
        chex.assert_trees_all_equal(batch, other)
    assert sum(batch['weight'].sum() for batch in grouped) < 40 * 8 / shard[1]


@pytest.mark.parametrize('mesh', [{'data': 1, 'tower': 1}, {'data': 2, 'tower': 2}])
def test_batches_sent_at_once_equal_single_batches(mesh):
    run = build.build(helpers.run_config(**{'data.cache': 'device', **{f'mesh.{name}': n for name, n in mesh.items()}}))
    batches = run.train_batches(3)
    host = list(itertools.islice(batches, 20))  # 16 at once, then the last 4 one by one
    batches.close()
    sent = list(run.prefetch(iter([dict(batch) for batch in host])))
    for (batch, waited), values in zip(sent, host, strict=True):
        expected = run.to_mesh(values)
        assert 0 <= waited < 10 and list(batch) == list(expected)
        chex.assert_trees_all_equal(batch, expected)
        for x, y in zip(batch.values(), expected.values(), strict=True):
            assert x.dtype == y.dtype and x.sharding == y.sharding
