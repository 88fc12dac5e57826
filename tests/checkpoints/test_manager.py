"""Retention, integrity checks and repair of checkpoints, including files that were tampered with."""

import concurrent.futures
import contextlib
import errno
import functools
import gc
import json
import operator
import os
import pathlib
import shutil
import subprocess
import sys
import time
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alexnet_jax.checkpoints import arrays, loading, manager, repair, verify
from alexnet_jax.commands import verify as verify_command
from alexnet_jax.core import train_step
from alexnet_jax.core.config import model_from_config
from alexnet_jax.core.image_stats import ImageStats
from alexnet_jax.data import datasets, image_io
from alexnet_jax.prepare import prepare
from alexnet_jax.training import build, train
from alexnet_jax.utils import checksums
from alexnet_jax.utils.errors import UserError
from tests import ROOT, helpers

SETTINGS = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    """A workdir with steps 1 to 3 of a small network and the errors 30, 10 and 20."""
    path = tmp_path_factory.mktemp('run')
    config, digits = helpers.digits_config(), datasets.open_dataset('digits')
    network = model_from_config(config.model)
    meta = {'config': manager.config_to_json(config), 'class_names': list(digits.class_names)}
    meta |= {'record_size': 32, 'examples': 1, 'fingerprint': ''}
    params = helpers.init(network, 0, 28)
    with manager.CheckpointManager(str(path)) as saved:
        for step, error in enumerate((30.0, 10.0, 20.0), 1):
            state = train_step.TrainState(
                jnp.int32(step), {**params, 'fc8': {k: v * step for k, v in params['fc8'].items()}}, None
            )
            saved.save(state, digits.image_stats, meta, error)
    return path


@pytest.fixture
def copy(workdir, tmp_path):
    return shutil.copytree(workdir, tmp_path / 'copy')


def _set_meta(value, *keys):
    """Returns a function that sets a value in a step's metadata, at the nested `keys`."""

    def change(step):
        path = step / 'meta' / 'metadata'
        meta = json.loads(path.read_text())
        inner = functools.reduce(operator.getitem, keys[:-1], meta)
        inner[keys[-1]] = value
        path.write_text(json.dumps(meta))

    return change


def _set_in_metadata(*path, **changes):
    """Returns a function that changes Orbax's metadata of the image statistics, or of the array of the given name."""

    def change(step):
        metadata = json.loads((step / 'image_stats' / '_METADATA').read_text())
        inner = metadata['tree_metadata'][str(path)]['value_metadata'] if path else metadata
        inner.update(changes)
        (step / 'image_stats' / '_METADATA').write_text(json.dumps(metadata))

    return change


def _add_array(step):
    path = step / 'image_stats' / '_METADATA'
    text = path.read_text()
    assert '"eigenvalues"' in text
    metadata, other = json.loads(text), json.loads(text.replace('"eigenvalues"', '"other"'))
    metadata['tree_metadata']["('other',)"] = other['tree_metadata']["('eigenvalues',)"]
    path.write_text(json.dumps(metadata))


def _remove_error(step):
    (step / 'metrics' / 'metrics').unlink()


def _remove_checksums(step):
    (step / 'SHA256SUMS').unlink()


def _change_error(step):
    path = step / 'metrics' / 'metrics'
    path.write_text(path.read_text().replace('1', '2'))


def _enlarge_fc7(step):
    """Replaces the kernel of fc7 with 4000 x 4000 zeros: 64 MB of memory, a few kB on disk."""
    saved = loading.load_saved(str(step))
    saved.params['fc7']['kernel'] = np.zeros((4000, 4000), np.float32)
    shutil.rmtree(step / 'params')
    with ocp.StandardCheckpointer() as writer:
        writer.save(step / 'params', saved.params)


def _enlarge_mean_image(step):
    """Stores a mean image of 3,000 x 3,000 zeros and matching metadata: 108 MB of memory, a few kB on disk."""
    shutil.rmtree(step / 'image_stats')
    zeros = ImageStats(np.zeros((3000, 3000, 3), np.float32), np.zeros(3, np.float32), np.zeros((3, 3), np.float32))
    with ocp.StandardCheckpointer() as writer:
        writer.save(step / 'image_stats', zeros._asdict())
    _set_meta(3000, 'record_size')(step)


def _store_vector(step, item='image_stats', name='eigenvalues', **changes):
    """Stores a vector with other metadata, such as a chunk of 5,000,000 numbers: 20 MB of memory, a few kB on disk."""
    store = ts.KvStore.open({'driver': 'ocdbt', 'base': f'file://{step}/{item}/'}).result()
    meta = json.loads(store.read(f'{name}/.zarray').result().value) | changes
    store.write(f'{name}/.zarray', json.dumps(meta).encode()).result()
    store.write(f'{name}/0', None).result()  # its content is shorter than the new chunk
    spec = {'driver': 'zarr', 'kvstore': store.spec().to_json(), 'path': f'{name}/'}
    array = ts.open(spec, open=True).result()
    array.write(np.ones(array.shape, array.dtype.numpy_dtype)).result()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            functools.partial(_store_vector, chunks=[5_000_000]),
            r'image_stats/eigenvalues: chunks of \(5000000,\); expected at most \(3,\)',
        ),
        (
            functools.partial(_store_vector, compressor={'id': 'blosc', 'cname': 'lz4', 'clevel': 5, 'shuffle': 1}),
            "image_stats/eigenvalues: compressed by 'blosc'; expected zstd",
        ),
        # Two types with which tensorstore adds a dimension to the shape that the file declares.
        (functools.partial(_store_vector, dtype='|S9'), r"image_stats/eigenvalues: elements of type '\|S9'"),
        (
            functools.partial(_store_vector, dtype=[['x', '<f4', [9]]]),
            r"elements of type \[\['x', '<f4', \[9\]\]\]",
        ),
        (_set_in_metadata(use_zarr3=True), 'image_stats/_METADATA: another driver; expected zarr 2 in OCDBT'),
        (_set_in_metadata(use_ocdbt=0), 'image_stats/_METADATA: another driver; expected zarr 2 in OCDBT'),
        (_set_in_metadata('eigenvalues', skip_deserialize=True), r'image_stats/eigenvalues: missing; expected \(3,\)'),
        (_add_array, 'image_stats/other: unexpected; expected 3 other arrays'),
        (_enlarge_mean_image, r'image_stats declares 108,000,048 bytes, but its files have \d'),
        (_enlarge_fc7, r'params/fc7.kernel: \(4000, 4000\); expected \(32, 32\)'),
        (_set_meta(16, 'record_size'), r'image_stats/mean_image: \(32, 32, 3\); expected \(16, 16, 3\)'),
        (_set_meta('32', 'record_size'), 'cannot be read'),
        (_set_meta(-1, 'record_size'), 'cannot be read'),
        (
            _set_meta(2**31, 'config', 'model', 'layers', 'fc6', 'features'),
            r'fc6.bias: \(32,\); expected \(2147483648,\)',
        ),
        (_set_meta('nonsense', 'config', 'model', 'layers', 'conv1', 'post'), "'nonsense'"),
        (_set_meta('text', 'config', 'data'), 'cannot be read'),
        (_set_meta([], 'config', 'model'), 'cannot be read'),
        (_set_meta(0, 'config', 'data', 'image_size'), 'data.image_size=0'),
        (_set_meta(33, 'config', 'data', 'image_size'), 'data.image_size=33'),
        (_set_meta(5, 'class_names'), 'cannot be read'),
        (_set_meta(['0', '1'], 'class_names'), '2 class names for 10 classes'),
    ],
)
def test_inconsistent_checkpoint_is_refused(copy, change, message):
    """The checksums are valid, as in a crafted checkpoint. Declared sizes are checked before memory is allocated."""
    step = copy / 'checkpoints' / '3'
    change(step)
    checksums.write(str(step))
    with pytest.raises(UserError, match=message) as error:
        loading.load_saved(str(step))
    assert len(str(error.value).splitlines()) == 1


def test_array_of_unknown_type_is_loaded(copy):
    """The config determines all types. Orbax's `metadata` failed here, and Python warned of unfinished coroutines."""
    path = copy / 'checkpoints' / '3' / 'params' / '_METADATA'
    metadata = json.loads(path.read_text())
    expected = loading.load_saved(str(copy / 'checkpoints' / '3')).params
    list(metadata['tree_metadata'].values())[-1]['value_metadata']['value_type'] = 'unknown'
    path.write_text(json.dumps(metadata))
    checksums.write(str(copy / 'checkpoints' / '3'))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        chex.assert_trees_all_equal(loading.load_saved(str(copy / 'checkpoints' / '3')).params, expected)
        gc.collect()
    assert [warning for warning in warned if warning.category is RuntimeWarning] == []


@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='reads /proc')
def test_checking_declared_arrays_leaks_no_memory(copy):
    """Training does it before it restores and after each save. With Orbax's `metadata`, 200 of them take 10 MB."""
    folder = str(copy / 'checkpoints' / '3' / 'params')
    expected = arrays.shapes_by_name(loading.load_saved(str(copy / 'checkpoints' / '3')).params)

    def resident():
        return int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')

    for _ in range(20):
        arrays.check_declared(folder, expected)
    before = resident()
    for _ in range(200):
        arrays.check_declared(folder, expected)
    assert resident() - before < 2**21


def test_large_chunk_is_not_restored(copy):
    saved = loading.load_saved(str(copy))
    like = train_step.TrainState(np.int32(3), saved.params, None)
    _store_vector(copy / 'checkpoints' / '3', 'params', 'fc8.bias', chunks=[5_000_000])
    with manager.CheckpointManager(str(copy), read_only=True) as saved:
        with pytest.raises(UserError, match=r'params/fc8.bias: chunks of \(5000000,\); expected at most \(10,\)'):
            saved.restore(3, like)


def test_only_decimal_numbers_are_steps(tmp_path):
    for name in ('2', '10', '\u00b2', '-1', '1.5', '3.damaged', '\u0663', '02'):
        (tmp_path / 'checkpoints' / name).mkdir(parents=True)
    (tmp_path / 'checkpoints' / '3').write_text('')
    assert repair.list_steps(str(tmp_path / 'checkpoints')) == [2, 10]


def _flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def test_flipped_bit_is_refused_though_orbax_loads_it(copy):
    """As a control, with checksums written after the damage the same files load and a weight differs."""
    rng, silent = np.random.default_rng(0), 0
    whole = loading.load_saved(str(copy / 'checkpoints' / '3')).params
    step = copy / 'checkpoints' / '3'
    for path in sorted((step / 'params' / 'ocdbt.process_0' / 'd').iterdir(), key=lambda p: p.stat().st_size)[-3:]:
        before = path.read_bytes()
        for _ in range(4):
            _flip(path, rng)
            with pytest.raises(UserError, match=f'is damaged: .*{path.name}: its content has changed .* in .*: 2'):
                loading.load_saved(str(step))
            checksums.write(str(step))
            try:
                loaded = loading.load_saved(str(step)).params
                silent += any((a != b).any() for a, b in zip(*map(_leaves, (whole, loaded)), strict=True))
            except UserError:
                pass
            path.write_bytes(before)
            checksums.write(str(step))
    assert silent


def _leaves(params):
    return [params[layer][name] for layer in sorted(params) for name in sorted(params[layer])]


def test_opening_for_training_repairs_checkpoints(copy):
    (copy / 'checkpoints' / '4').mkdir()  # renamed by orbax, killed before its checksums were written
    (copy / 'checkpoints' / '4' / '_CHECKPOINT_METADATA').write_text('{}')
    (copy / 'checkpoints' / '5.orbax-checkpoint-tmp').mkdir()
    _flip(copy / 'checkpoints' / '3' / 'meta' / 'metadata', np.random.default_rng(0))
    before = loading.load_saved(str(copy / 'checkpoints' / '2'))
    with manager.CheckpointManager(str(copy), read_only=True) as saved:
        assert saved.steps() == [2, 3]  # read-only access changes nothing
        assert (copy / 'checkpoints' / '4').exists()
    with manager.CheckpointManager(str(copy)) as saved:
        assert saved.steps() == [2] and saved.latest() == saved.best() == 2
        *half_written, problem = saved.damaged
        assert 'checkpoints/3/meta/metadata: its content has changed' in problem and '3.damaged' in problem
        assert sorted(path.name for path in map(_parse_half_written, half_written)) == ['4', '5.orbax-checkpoint-tmp']
        state = train_step.TrainState(jnp.int32(3), before.params, None)  # the damaged step is written again
        saved.save(state, before.image_stats, json.loads((copy / 'meta.json').read_text()), 5.0)
    assert loading.load_saved(str(copy)).step == 3
    assert {path.name for path in (copy / 'checkpoints').iterdir()} == {'2', '3', '3.damaged'}


def test_step_retired_during_read_is_not_called_damaged(copy):
    with manager.CheckpointManager(str(copy), read_only=True) as saved:
        step = saved.latest()
        shutil.rmtree(copy / 'checkpoints' / str(step))
        with pytest.raises(UserError, match='checkpoints/3 was removed during reading, because its run'):
            saved.load(step)
        # The step may also disappear between the check of its checksums and the read.
        saved.check = lambda step, wanted: None
        with pytest.raises(UserError, match='checkpoints/3 was removed during reading, because its run'):
            saved.load(step)


@pytest.mark.parametrize('change', [_remove_error, _remove_checksums, _change_error])
def test_damage_to_older_step_does_not_stop_training(copy, capsys, change):
    """New steps are saved and retired as usual; the damaged step is kept for the next start."""
    with manager.CheckpointManager(str(copy)) as saved:
        before, meta = saved.load(3), json.loads((copy / 'meta.json').read_text())
        change(copy / 'checkpoints' / '2')
        for step in (4, 5):
            saved.save(train_step.TrainState(jnp.int32(step), before.params, None), before.image_stats, meta, 1.0)
            saved.wait()
        assert repair.list_steps(saved.folder) == [2, 4, 5]
        assert 'warning: the checkpoint is damaged: ' in capsys.readouterr().err
    with manager.CheckpointManager(str(copy)) as saved:
        assert ['checkpoints/2' in damaged for damaged in saved.damaged] == [True]
        saved.save(train_step.TrainState(jnp.int32(6), before.params, None), before.image_stats, meta, 2.0)
        saved.wait()
        assert saved.steps() == [5, 6]  # 5 is also the best


def _parse_half_written(half_written):
    path, _, said = half_written.partition(': ')
    assert said == 'incomplete step (no SHA256SUMS), removed'
    return pathlib.Path(path)


def test_failed_background_save_is_raised_by_poll(copy, monkeypatch):
    def raise_disk_full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with manager.CheckpointManager(str(copy)) as saved:
        before, meta = saved.load(3), json.loads((copy / 'meta.json').read_text())
        saved.poll()  # no save is in progress
        monkeypatch.setattr(checksums, 'write', raise_disk_full)
        saved.save(train_step.TrainState(jnp.int32(4), before.params, None), before.image_stats, meta, 1.0)
        concurrent.futures.wait([saved._finalizing])
        with pytest.raises(UserError, match='step 4 cannot be saved .* No space left on device'):
            saved.poll()
        assert saved.steps() == [2, 3]


def test_slow_save_is_reported(copy, monkeypatch, capsys):
    wait = ocp.AsyncCheckpointer.wait_until_finished
    monkeypatch.setattr(ocp.AsyncCheckpointer, 'wait_until_finished', lambda self: (time.sleep(0.5), wait(self)))
    monkeypatch.setattr(manager, '_WARN_SECONDS', 0.2)
    _save_again(copy, copy, step=4)
    assert f"warning: still waiting for a checkpoint to be saved in '{copy}/checkpoints'" in capsys.readouterr().err
    assert checksums.present(str(copy / 'checkpoints' / '4'))


def test_step_saved_again_is_never_missing(copy):
    """Killed before the new step is finalized, the old one is restored; killed afterwards, the old one is removed."""
    old, step = copy / 'checkpoints' / '3.replaced', copy / 'checkpoints' / '3'
    step.rename(old)
    shutil.copytree(old, step)
    (step / 'SHA256SUMS').unlink()
    (step / 'new').write_text('')
    manager.CheckpointManager(str(copy)).close()
    assert not old.exists() and not (step / 'new').exists() and not checksums.find_mismatches(str(step))
    shutil.copytree(step, old)
    manager.CheckpointManager(str(copy)).close()
    assert not old.exists() and not checksums.find_mismatches(str(step))
    with manager.CheckpointManager(str(copy)) as saved:
        before = saved.load(3)
        meta = json.loads((copy / 'meta.json').read_text())
        saved.save(train_step.TrainState(jnp.int32(3), before.params, None), before.image_stats, meta, 1.0)
        saved.wait()
        assert saved.best() == 3 and {path.name for path in step.parent.iterdir()} == {'2', '3'}


def test_names_that_others_gave_remove_nothing(copy):
    """Once, `...replaced` removed the whole workdir, and `foo.replaced` removed `foo`."""
    checkpoints, notes = copy / 'checkpoints', copy / 'notes'
    for kept in (notes / 'kept', checkpoints / 'foo' / 'kept', checkpoints / 'foo.replaced' / 'kept'):
        kept.parent.mkdir()
        kept.write_text('')
    for name in ('03.replaced', 'foo.orbax-checkpoint-tmp', '3.old.orbax-checkpoint-tmp'):
        (checkpoints / name).mkdir()
    for name in ('...replaced', '.replaced', '2.replaced', '4.orbax-checkpoint-tmp', '5'):
        (checkpoints / name).write_text('')
    for name in ('3.replaced', '5.orbax-checkpoint-tmp', 'removed'):
        (checkpoints / name).symlink_to(notes)
    before = sorted(copy.rglob('*'))
    assert not repair.repair(str(checkpoints))
    assert sorted(copy.rglob('*')) == before


def test_steps_without_checksums_are_not_removed(copy):
    for step in ('2', '3'):  # as saved by a version that wrote no checksums
        (copy / 'checkpoints' / step / 'SHA256SUMS').unlink()
    with pytest.raises(UserError, match='all checkpoints in .* are damaged: .*/2/SHA256SUMS: missing.* did not write'):
        manager.CheckpointManager(str(copy))
    assert {path.name for path in (copy / 'checkpoints').iterdir()} == {'2', '3'}


@pytest.fixture(autouse=True)
def _write_meta_file(workdir):
    text = (workdir / 'checkpoints' / '3' / 'meta' / 'metadata').read_text()
    (workdir / 'meta.json').write_text(text)


def test_nothing_is_moved_if_every_step_is_damaged(copy):
    for step in ('2', '3'):
        _flip(copy / 'checkpoints' / step / 'meta' / 'metadata', np.random.default_rng(0))
    with pytest.raises(UserError, match='all checkpoints in .* are damaged: .*2/meta/metadata.*; .*3/meta/metadata'):
        manager.CheckpointManager(str(copy))
    assert {path.name for path in (copy / 'checkpoints').iterdir()} == {'2', '3'}


def test_best_step_is_not_chosen_by_damaged_error(copy):
    path = copy / 'checkpoints' / '3' / 'metrics' / 'metrics'
    path.write_text(path.read_text().replace('20.0', '00.0'))
    with pytest.raises(UserError, match='is damaged: .*checkpoints/3/metrics/metrics'):
        loading.load_saved(str(copy))
    assert loading.load_saved(str(copy / 'checkpoints' / '2')).step == 2


def test_step_retired_during_search_is_not_best(copy):
    """The step is removed between the listing of the steps and its check."""

    class Retiring(manager.CheckpointManager):
        def check(self, step, wanted):
            if step == 2:
                shutil.rmtree(copy / 'checkpoints' / '2')
            super().check(step, wanted)

    with Retiring(str(copy), read_only=True) as saved:
        assert saved.best() == 3


@pytest.mark.parametrize('change', [_remove_error, _remove_checksums])
def test_incomplete_best_step_is_not_skipped(copy, change):
    """A step is never skipped silently because one of its files is missing."""
    change(copy / 'checkpoints' / '2')
    with pytest.raises(UserError, match=r'the checkpoint is damaged: .*checkpoints/2/.*: missing\. Other steps .*: 3'):
        loading.load_saved(str(copy))


def test_verify(copy, tmp_path, capsys):
    for i in range(4):
        folder = tmp_path / 'raw' / 'ab'[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f'{i}.jpg').write_bytes(image_io.encode_jpeg(np.full((20, 20, 3), 40 * i, np.uint8)))
    data = tmp_path / 'data'
    prepare.prepare(str(tmp_path / 'raw'), str(data), size=16, workers=1)
    verify_command.main(None, [str(copy), str(copy / 'checkpoints'), str(copy / 'checkpoints' / '2'), str(data)])
    assert capsys.readouterr().out.count('all digests match') == 4
    shard = next(data.glob('*train*array_record*'))
    _flip(shard, np.random.default_rng(0))
    _flip(copy / 'checkpoints' / '3' / 'params' / '_METADATA', np.random.default_rng(0))
    result = subprocess.run(
        [sys.executable, '-m', 'alexnet_jax', 'verify', str(copy), str(data)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert f'damaged: {shard}: its content has changed' in result.stderr
    assert 'checkpoints/3/params/_METADATA: its content has changed' in result.stderr
    (data / 'checkpoints').symlink_to(copy / 'checkpoints')  # a workdir that contains its data
    folders, found = verify.verify(str(data))
    assert len(folders) == 3 and [problem.split(': ')[0] for problem in found][-1] == str(shard)
    (data / 'checkpoints').unlink()
    for nothing, message in ((tmp_path / 'raw', 'nothing to verify'), (tmp_path / 'no', 'there is no directory')):
        with pytest.raises(UserError, match=message):
            verify.verify(str(nothing))
    with pytest.raises(UserError, match='the prepared data is damaged') as error:
        (data / 'label.labels.txt').write_text('another\n')
        datasets.open_dataset(str(data))
    assert 'label.labels.txt' in str(error.value)
    (data / 'SHA256SUMS').unlink()
    with pytest.raises(UserError, match='SHA256SUMS is missing'):
        datasets.open_dataset(str(data))


@settings(max_examples=25, **SETTINGS)
@given(data=st.data())
def test_any_file_damage_loads_or_raises_one_line(workdir, tmp_path_factory, data):
    """Files are flipped, truncated, extended, replaced or removed, with the old checksums and with matching ones."""
    path = tmp_path_factory.mktemp('fuzz')
    step = path / 'checkpoints' / '3'
    shutil.copytree(workdir / 'checkpoints' / '3', step)
    files = sorted(p for p in step.rglob('*') if p.is_file())
    small_ones = [p for p in files if p.stat().st_size < 4096]
    victim = data.draw(st.sampled_from(small_ones))
    content = bytearray(victim.read_bytes())
    place = data.draw(st.integers(0, max(0, len(content) - 1)))
    match data.draw(st.sampled_from(['flip', 'cut', 'insert', 'remove', 'replace'])):
        case 'flip' if content:
            content[place] ^= data.draw(st.integers(1, 255))
        case 'cut':
            del content[place:]
        case 'insert':
            content[place:place] = data.draw(st.binary(min_size=1, max_size=64))
        case 'replace':
            content = bytearray(data.draw(st.binary(max_size=256)))
        case 'remove':
            victim.unlink()
    if victim.exists():
        victim.write_bytes(content)
    for sealed in (False, True):
        if sealed and victim.name != checksums.FILE_NAME:
            checksums.write(str(step))
        try:
            found = loading.load_saved(str(step))
            chex.assert_tree_all_finite(found.image_stats)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
    shutil.rmtree(path)


def test_early_best_step_is_kept(tmp_path):
    saved = manager.CheckpointManager(str(tmp_path))
    config = helpers.run_config()
    run = build.build(config)
    state = run.steps.init(jax.random.key(0))
    meta = {
        'config': manager.config_to_json(config),
        'class_names': list('0123456789'),
        'record_size': 32,
    }
    for step, error in ((1, 30.0), (2, 10.0), (3, None), (4, 20.0), (5, 10.5), (6, None)):
        saved.save(state._replace(step=jnp.int32(step)), run.dataset.image_stats, meta, error)
    saved.wait()
    assert saved.steps() == [2, 5, 6]
    saved.close()
    assert loading.load_saved(str(tmp_path)).step == 2
    assert loading.load_saved(str(tmp_path / 'checkpoints' / '5')).step == 5


def test_missing_checkpoints_are_refused(tmp_path):
    with pytest.raises(UserError, match='there is no checkpoint at'):
        loading.load_saved(str(tmp_path))
    (tmp_path / 'checkpoints').mkdir()
    with pytest.raises(UserError, match='there is no checkpoint in .* yet'):
        loading.load_saved(str(tmp_path))


@pytest.mark.parametrize(
    'name',
    ['with blank', '{a,b}', 'ünï', '日本', 'a%20b', 'a#b', '$HOME', "it's", 'a"b', 'a;b', 'a&b', '-x', '~x', 'a\nb'],
)
def test_unusual_paths_are_saved_and_loaded(name, workdir, tmp_path):
    _save_again(workdir, tmp_path / name)
    assert loading.load_saved(tmp_path / name).step == 3


@pytest.mark.parametrize('name', ['lr[0.1]', '[!a]', 'a]', 'a*', 'a?', 'a\\b', os.fsdecode(b'\xff\xfe')])
def test_paths_that_cannot_be_read_again_are_refused(name, tmp_path):
    """Orbax merges its files through a glob of the path, which would find no files, or those of another run."""
    expected = None if name == 'a]' else pytest.raises(UserError, match='checkpoints cannot be saved below a name with')
    config = helpers.digits_config(**{'num_steps': 1, 'mesh.tower': 1})
    with expected or contextlib.nullcontext():
        train.train_and_evaluate(config, tmp_path / name / 'run')
    assert (tmp_path / name).exists() == (expected is None)


def test_step_that_cannot_be_read_is_not_finalized(copy, monkeypatch):
    """Whatever the reason: here, files of the parameters that orbax reports as saved are missing."""
    wait = ocp.AsyncCheckpointer.wait_until_finished

    def wait_and_lose_a_file(self):
        wait(self)
        for path in copy.glob('checkpoints/4/params/manifest.ocdbt'):
            path.unlink()

    monkeypatch.setattr(ocp.AsyncCheckpointer, 'wait_until_finished', wait_and_lose_a_file)
    with pytest.raises(UserError, match='step 4 was saved in .* but cannot be read .params/conv1.bias: missing'):
        _save_again(copy, copy, step=4)
    assert not checksums.present(str(copy / 'checkpoints' / '4'))
    assert loading.load_saved(copy).step == 2  # the best


def _save_again(source, target, step=3):
    """Saves the network of a workdir into another one."""
    loaded = loading.load_saved(source / 'checkpoints' / '3')
    meta = {'config': loaded.config, 'class_names': list(loaded.class_names), 'record_size': 32}
    with manager.CheckpointManager(target) as saved:
        state = train_step.TrainState(jnp.int32(step), loaded.params, None)
        saved.save(state, loaded.image_stats, {**meta, 'examples': 1, 'fingerprint': ''}, None)
