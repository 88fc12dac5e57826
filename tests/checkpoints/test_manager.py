"""What is kept, what is taken for whole and what for damaged, and files that somebody has tampered with."""

import concurrent.futures
import errno
import functools
import json
import operator
import os
import pathlib
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alexnet_jax.checkpoints import loading, manager, repair, verify
from alexnet_jax.commands import verify as verify_command
from alexnet_jax.core import train_step
from alexnet_jax.core.config import model_from_config
from alexnet_jax.core.image_stats import ImageStats
from alexnet_jax.data import datasets, image_io
from alexnet_jax.prepare import prepare
from alexnet_jax.training import build
from alexnet_jax.utils import checksums
from alexnet_jax.utils.errors import UserError
from tests import ROOT, helpers

SETTINGS = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    """A workdir with steps 1 to 3 of a small network, errors 30, 10 and 20."""
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


def _meta_is(value, *keys):
    """Another value in a step's meta, under keys one below the other."""

    def change(step):
        path = step / 'meta' / 'metadata'
        meta = json.loads(path.read_text())
        inner = functools.reduce(operator.getitem, keys[:-1], meta)
        inner[keys[-1]] = value
        path.write_text(json.dumps(meta))

    return change


def _no_error(step):
    (step / 'metrics' / 'metrics').unlink()


def _no_list(step):
    (step / 'SHA256SUMS').unlink()


def _other_error(step):
    path = step / 'metrics' / 'metrics'
    path.write_text(path.read_text().replace('1', '2'))


def _larger(step):
    """fc 7 of 4000 x 4000, all zeros: 64 MB of memory, a few kB on disk."""
    saved = loading.load_checkpoint(str(step))
    saved.params['fc7']['kernel'] = np.zeros((4000, 4000), np.float32)
    shutil.rmtree(step / 'params')
    with ocp.StandardCheckpointer() as writer:
        writer.save(step / 'params', saved.params)


def _vast(step):
    """A mean image of 3,000 x 3,000 zeros, and a meta that agrees: 108 MB of memory, a few kB on disk."""
    shutil.rmtree(step / 'image_stats')
    zeros = ImageStats(np.zeros((3000, 3000, 3), np.float32), np.zeros(3, np.float32), np.zeros((3, 3), np.float32))
    with ocp.StandardCheckpointer() as writer:
        writer.save(step / 'image_stats', zeros._asdict())
    _meta_is(3000, 'record_size')(step)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (_vast, r'image_stats declares 108,000,048 bytes, but its files have \d'),
        (_larger, r'params/fc7/kernel: \(4000, 4000\); expected \(32, 32\)'),
        (_meta_is(16, 'record_size'), r'image_stats/mean_image: \(32, 32, 3\); expected \(16, 16, 3\)'),
        (_meta_is('32', 'record_size'), 'cannot be read'),
        (_meta_is(-1, 'record_size'), 'cannot be read'),
        (
            _meta_is(2**31, 'config', 'model', 'layers', 'fc6', 'features'),
            r'fc6/bias: \(32,\); expected \(2147483648,\)',
        ),
        (_meta_is('nonsense', 'config', 'model', 'layers', 'conv1', 'post'), "'nonsense'"),
        (_meta_is(0, 'config', 'data', 'image_size'), 'data.image_size=0'),
        (_meta_is(33, 'config', 'data', 'image_size'), 'data.image_size=33'),
        (_meta_is(5, 'class_names'), 'cannot be read'),
        (_meta_is(['0', '1'], 'class_names'), '2 class names for 10 classes'),
    ],
)
def test_a_checkpoint_whose_parts_do_not_fit_each_other_is_refused(copy, change, message):
    """With digests that fit: somebody made it so. What the files declare takes no memory before it is looked at."""
    step = copy / 'checkpoints' / '3'
    change(step)
    checksums.write(str(step))
    with pytest.raises(UserError, match=message) as error:
        loading.load_checkpoint(str(step))
    assert len(str(error.value).splitlines()) == 1


def test_only_numbers_are_steps(tmp_path):
    for name in ('2', '10', '\u00b2', '-1', '1.5', '3.damaged', '\u0663'):
        (tmp_path / 'checkpoints' / name).mkdir(parents=True)
    assert repair.list_steps(str(tmp_path / 'checkpoints')) == [2, 10]


def _flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def test_one_flipped_bit_is_loaded_silently_by_orbax_and_refused_here(copy):
    """The control: with a list written after the damage the same files load, and a weight is another."""
    rng, silent = np.random.default_rng(0), 0
    whole = loading.load_checkpoint(str(copy / 'checkpoints' / '3')).params
    step = copy / 'checkpoints' / '3'
    for path in sorted((step / 'params' / 'ocdbt.process_0' / 'd').iterdir(), key=lambda p: p.stat().st_size)[-3:]:
        before = path.read_bytes()
        for _ in range(4):
            _flip(path, rng)
            with pytest.raises(UserError, match=f'is damaged: .*{path.name}: its content has changed .* in .*: 2'):
                loading.load_checkpoint(str(step))
            checksums.write(str(step))
            try:
                loaded = loading.load_checkpoint(str(step)).params
                silent += any((a != b).any() for a, b in zip(*map(_leaves, (whole, loaded)), strict=True))
            except UserError:
                pass
            path.write_bytes(before)
            checksums.write(str(step))
    assert silent


def _leaves(params):
    return [params[layer][name] for layer in sorted(params) for name in sorted(params[layer])]


def test_opening_for_training_puts_right_what_a_kill_and_a_bad_disk_left(copy):
    (copy / 'checkpoints' / '4').mkdir()  # renamed by orbax, killed before its list was written
    (copy / 'checkpoints' / '4' / '_CHECKPOINT_METADATA').write_text('{}')
    (copy / 'checkpoints' / '5.orbax-checkpoint-tmp').mkdir()
    _flip(copy / 'checkpoints' / '3' / 'meta' / 'metadata', np.random.default_rng(0))
    before = loading.load_checkpoint(str(copy / 'checkpoints' / '2'))
    with manager.CheckpointManager(str(copy), read_only=True) as saved:
        assert saved.steps() == [2, 3]  # reading touches nothing
        assert (copy / 'checkpoints' / '4').exists()
    with manager.CheckpointManager(str(copy)) as saved:
        assert saved.steps() == [2] and saved.latest() == saved.best() == 2
        *half_written, problem = saved.damaged
        assert 'checkpoints/3/meta/metadata: its content has changed' in problem and '3.damaged' in problem
        assert sorted(path.name for path in map(_named, half_written)) == ['4', '5.orbax-checkpoint-tmp']
        state = train_step.TrainState(jnp.int32(3), before.params, None)  # the step that was damaged is made again
        saved.save(state, before.image_stats, json.loads((copy / 'meta.json').read_text()), 5.0)
    assert loading.load_checkpoint(str(copy)).step == 3
    assert {path.name for path in (copy / 'checkpoints').iterdir()} == {'2', '3', '3.damaged'}


def test_a_step_that_training_retires_while_it_is_read_is_not_called_damaged(copy):
    with manager.CheckpointManager(str(copy), read_only=True) as saved:
        step = saved.latest()
        shutil.rmtree(copy / 'checkpoints' / str(step))
        with pytest.raises(UserError, match='checkpoints/3 was removed during reading, because its run'):
            saved.load(step)
        # Between the look at its digests and the reading, too.
        saved.check = lambda step, wanted: None
        with pytest.raises(UserError, match='checkpoints/3 was removed during reading, because its run'):
            saved.load(step)


@pytest.mark.parametrize('change', [_no_error, _no_list, _other_error])
def test_an_older_step_that_is_damaged_meanwhile_does_not_end_a_run(copy, capsys, change):
    """What is saved is there, and so is that step, for the next start; the others come and go."""
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
        assert saved.steps() == [5, 6]  # 5 is the best, too


def _named(half_written):
    path, _, said = half_written.partition(': ')
    assert said == 'incomplete step (no SHA256SUMS), removed'
    return pathlib.Path(path)


def test_a_save_that_fails_in_the_background_is_told_before_the_next(copy, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with manager.CheckpointManager(str(copy)) as saved:
        before, meta = saved.load(3), json.loads((copy / 'meta.json').read_text())
        saved.poll()  # nothing is under way
        monkeypatch.setattr(checksums, 'write', full)
        saved.save(train_step.TrainState(jnp.int32(4), before.params, None), before.image_stats, meta, 1.0)
        concurrent.futures.wait([saved._finalizing])
        with pytest.raises(UserError, match='step 4 cannot be saved .* No space left on device'):
            saved.poll()
        assert saved.steps() == [2, 3]


def test_a_step_that_is_saved_again_is_there_all_the_while(copy):
    """Killed before the new one is finalized: the old one comes back; after that: it is gone."""
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


def test_steps_without_digests_are_not_thrown_away_but_the_last(copy):
    for step in ('2', '3'):  # as of a version that wrote none
        (copy / 'checkpoints' / step / 'SHA256SUMS').unlink()
    with pytest.raises(UserError, match='all checkpoints in .* are damaged: .*/2/SHA256SUMS: missing.* did not write'):
        manager.CheckpointManager(str(copy))
    assert {path.name for path in (copy / 'checkpoints').iterdir()} == {'2', '3'}


@pytest.fixture(autouse=True)
def _meta_beside(workdir):
    text = (workdir / 'checkpoints' / '3' / 'meta' / 'metadata').read_text()
    (workdir / 'meta.json').write_text(text)


def test_where_every_step_is_damaged_nothing_is_moved(copy):
    for step in ('2', '3'):
        _flip(copy / 'checkpoints' / step / 'meta' / 'metadata', np.random.default_rng(0))
    with pytest.raises(UserError, match='all checkpoints in .* are damaged: .*2/meta/metadata.*; .*3/meta/metadata'):
        manager.CheckpointManager(str(copy))
    assert {path.name for path in (copy / 'checkpoints').iterdir()} == {'2', '3'}


def test_the_best_step_is_not_chosen_by_a_damaged_number(copy):
    path = copy / 'checkpoints' / '3' / 'metrics' / 'metrics'
    path.write_text(path.read_text().replace('20.0', '00.0'))
    with pytest.raises(UserError, match='is damaged: .*checkpoints/3/metrics/metrics'):
        loading.load_checkpoint(str(copy))
    assert loading.load_checkpoint(str(copy / 'checkpoints' / '2')).step == 2


def test_a_step_that_training_retires_is_not_the_best(copy, monkeypatch):
    """Between the listing of the steps and the look at each."""
    check = manager.CheckpointManager.check

    def retired(self, step, wanted):
        if step == 2:
            shutil.rmtree(copy / 'checkpoints' / '2')
        check(self, step, wanted)

    monkeypatch.setattr(manager.CheckpointManager, 'check', retired)
    with manager.CheckpointManager(str(copy), read_only=True) as saved:
        assert saved.best() == 3


@pytest.mark.parametrize('change', [_no_error, _no_list])
def test_the_best_step_is_not_one_of_those_that_are_whole(copy, change):
    """A step is never passed over in silence because something of it is missing."""
    change(copy / 'checkpoints' / '2')
    with pytest.raises(UserError, match=r'the checkpoint is damaged: .*checkpoints/2/.*: missing\. Other steps .*: 3'):
        loading.load_checkpoint(str(copy))


def test_verify(copy, tmp_path, capsys):
    folder = tmp_path / 'raw' / 'class'
    folder.mkdir(parents=True)
    for i in range(4):
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
    (data / 'checkpoints').symlink_to(copy / 'checkpoints')  # both a workdir and its data
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
def test_whatever_happens_to_a_file_there_is_one_clear_error(workdir, tmp_path_factory, data):
    """Bytes flipped, cut, put in, files removed: with the list of digests, and with a list that fits the damage."""
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
            found = loading.load_checkpoint(str(step))
            chex.assert_tree_all_finite(found.image_stats)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
    shutil.rmtree(path)


def test_an_early_best_is_kept(tmp_path):
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
    assert loading.load_checkpoint(str(tmp_path)).step == 2
    assert loading.load_checkpoint(str(tmp_path / 'checkpoints' / '5')).step == 5


def test_checkpoints_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match='there is no checkpoint at'):
        loading.load_checkpoint(str(tmp_path))
    (tmp_path / 'checkpoints').mkdir()
    with pytest.raises(UserError, match='there is no checkpoint in .* yet'):
        loading.load_checkpoint(str(tmp_path))
