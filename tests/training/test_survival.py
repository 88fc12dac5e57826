"""What a run survives: stops at any point, numbers that are not finite, records that cannot be read, other meshes."""

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

from alexnet_jax.checkpoints import loading, manager
from alexnet_jax.core import sharding, train_step
from alexnet_jax.core.augment import Augmentation, crop_on_device
from alexnet_jax.data import cache, datasets, pipeline
from alexnet_jax.inference import evaluate
from alexnet_jax.training import build, train, train_log
from alexnet_jax.utils import distributed
from alexnet_jax.utils.errors import DivergedError, TerminatedError, UnreadableError, UserError
from tests import ROOT, helpers
from tests.faults.scene import final_state, lines


def _config(**changes):
    """Lines that are means of three updates; validations and saves between them and between passes."""
    cadences = {'num_steps': 30, 'eval_every_steps': 12, 'checkpoint_every_steps': 8, 'log_every_steps': 3}
    plateau = {'optim.schedule': 'plateau', 'optim.patience': 1, 'optim.min_delta': 50.0}
    return helpers.digits_config(**{**cadences, **plateau, 'mesh.data': 1, 'mesh.tower': 1, **changes})


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('whole')
    train.train_and_evaluate(_config(), str(workdir))
    return workdir


def _stop_after(monkeypatch, calls):
    """SIGTERM when it has been asked for so often: after an update, or before a batch of a validation."""
    count = itertools.count(1)
    monkeypatch.setattr(distributed, 'defer_sigterm', lambda: contextlib.nullcontext(lambda: next(count) >= calls))


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1])
def test_stopped_anywhere_it_ends_the_same(whole, tmp_path, monkeypatch, seed):
    """Again and again, until it gets through: parameters, velocities, rates and every line are those of a whole run."""
    rng, stops = np.random.default_rng(seed), []
    while True:
        _stop_after(monkeypatch, rng.integers(2, 16))
        try:
            train.train_and_evaluate(_config(), str(tmp_path))
            break
        except TerminatedError as error:
            stops.append(str(error))
    assert len(stops) > 3 and 'is saved; run the same command to resume' in stops[0]
    assert lines(tmp_path) == lines(whole)
    chex.assert_trees_all_equal(final_state(tmp_path), final_state(whole))


def test_a_validation_given_up_comes_first_the_next_time(whole, tmp_path, monkeypatch):
    _stop_after(monkeypatch, 15)  # in the third batch of the validation at step 12
    with pytest.raises(TerminatedError, match='step 12 of 30'):
        train.train_and_evaluate(_config(), str(tmp_path))
    assert [line['step'] for line in lines(tmp_path)] == [3, 6, 8, 9, 12]  # that of the updates to 12, none of the pass
    # Killed when the validation was written, and nothing saved since: it is not written twice.
    validation = next(line for line in lines(whole) if line['split'] == 'val')
    with open(tmp_path / 'metrics.jsonl', 'a') as file:
        file.write(json.dumps(validation) + '\n')
    monkeypatch.undo()
    train.train_and_evaluate(_config(), str(tmp_path))
    assert lines(tmp_path) == lines(whole)


def test_a_run_that_is_made_shorter_than_it_is_does_what_was_left_of_its_step(whole, tmp_path, monkeypatch):
    _stop_after(monkeypatch, 14)  # in the validation at step 12
    with pytest.raises(TerminatedError, match='step 12 of 30'):
        train.train_and_evaluate(_config(), str(tmp_path))
    monkeypatch.undo()
    result = train.train_and_evaluate(_config(num_steps=6), str(tmp_path))
    validation = next(line for line in lines(whole) if line['split'] == 'val')
    assert validation['step'] == 12 and result['loss'] == validation['loss']
    assert train.train_and_evaluate(_config(num_steps=6), str(tmp_path)) == {}
    train.train_and_evaluate(_config(), str(tmp_path))  # and goes on as if it had not been
    assert lines(tmp_path) == lines(whole)
    chex.assert_trees_all_equal(final_state(tmp_path), final_state(whole))


@pytest.mark.slow
def test_an_update_that_overflows_is_not_made_and_not_saved(tmp_path, monkeypatch):
    """Loss and gradient are finite, the rate makes infinity of them: the state before it is the last that is kept."""
    huge = {'optim.layer_rates': (('fc8', 1e38),), 'optim.learning_rate': 10.0, 'num_steps': 3}
    config = _config(**huge, checkpoint_every_steps=1, **{'optim.stages': ()})
    with pytest.raises(DivergedError, match=r'step 1: .*update is not finite \(learning rate 10\).*There is no check'):
        train.train_and_evaluate(config, str(tmp_path))
    run = build.build(config)
    state, report = run.steps.train_step(
        run.steps.init(jax.random.key(0)), next(run.train_batches(0)), run.image_stats, jax.random.key(0)
    )
    assert np.isfinite(report['loss']) and np.isfinite(report['gradient_norm']) and not report['finite']
    chex.assert_tree_all_finite(state.params)


def test_the_last_good_checkpoint_is_named(tmp_path, monkeypatch):
    batches = pipeline.train_batches

    def spoilt(*args, start_step, **kwargs):
        for i, batch in enumerate(batches(*args, start_step=start_step, **kwargs), start_step):
            batch['color'][:] = np.nan if i == 20 else 0
            yield batch

    monkeypatch.setattr(build.pipeline, 'train_batches', spoilt)
    with pytest.raises(DivergedError, match=r'step 21: .* The last good checkpoint is step 16 in '):
        train.train_and_evaluate(_config(), str(tmp_path))
    with pytest.raises(DivergedError, match='step 21: .* as in 0 batches before; max_nonfinite=0'):
        train.train_and_evaluate(_config(on_nonfinite='skip', max_nonfinite=0), str(tmp_path))
    train.train_and_evaluate(_config(on_nonfinite='skip'), str(tmp_path))
    assert lines(tmp_path)[-1]['step'] == 30
    # Step 21 is a line of its own time, and its gradient is NaN: the line has the last that was finite.
    assert all(np.isfinite(line['gradient_norm']) for line in lines(tmp_path) if line['split'] == 'train')


def test_a_validation_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    one_pass = evaluate.evaluate_batches
    monkeypatch.setattr(evaluate, 'evaluate_batches', lambda *a, **k: {**one_pass(*a, **k), 'loss': float('nan')})
    with pytest.raises(DivergedError, match='step 12: the validation loss is nan.* The last good checkpoint is step 8'):
        train.train_and_evaluate(_config(), str(tmp_path))
    assert loading.load_checkpoint(str(tmp_path)).step == 8


def test_a_loss_that_stays_at_guessing_is_seen():
    """ln 10 = 2.3026: within 1% over a window, told once a window; one that falls is not told of."""
    stall = train_log.ChanceLevelMonitor(10, length=4)
    assert [stall.add(2.3 * 64, 64) for _ in range(8)] == [False] * 3 + [True] + [False] * 3 + [True]
    assert not any(stall.add(loss * 64, 64) for loss in (2.3, 2.3, 2.2, 2.1, 2.35, 2.35, 2.35, 2.35))


def _reported(losses, at, saved=None):
    """The log of a run of one update for each loss (None: not finite), stopped before update `at` and gone on with."""
    log, state = None, None
    lines = []
    writer = type('Writer', (), {'write': staticmethod(lines.append)})
    for i, loss in enumerate(losses, 1):
        if log is None or i == at:
            if log is not None:
                with log.pause():
                    state = json.loads(json.dumps(log.state()))
            log = train_log.TrainLog(
                writer, batch_size=8, examples=800, total_steps=10**6, num_classes=10,
                on_nonfinite='skip', max_nonfinite=10**6, max_unreadable=0, saved=state,
            )  # fmt: skip
        numbers = {'loss': 8 * (loss or 0.0), 'top1': 4.0, 'top5': 1.0, 'weight': 8.0, 'learning_rate': 0.01}
        norms = {'gradient_norm': float(i), 'gradient_norms': {'fc8': float(i)}, 'update_norms': {'fc8': 1.0 / i}}
        report = {**numbers, **norms, 'finite': loss is not None}
        log.add(i, jax.tree.map(np.float32, report), waited=0.0, log=i % 3 == 0)
    with log.pause():
        pass
    return [{key: line[key] for key in line if key not in ('images_per_second', 'data_wait')} for line in lines]


@pytest.mark.parametrize('at', range(2, 8))
def test_a_log_taken_up_again_writes_the_same_lines(at):
    """Also of the norms, which are those of the last finite gradient: here of a run before."""
    losses = [1.0, 2.0, 3.0, 4.0, None, None, None, 8.0, None]
    whole = _reported(losses, at=0)
    assert [line['step'] for line in whole] == [3, 6, 9] and whole[1]['gradient_norm'] == 4
    assert _reported(losses, at) == whole


def test_a_stall_is_seen_by_a_run_that_was_stopped(capsys):
    """Its window of 100 updates goes on, too."""
    for at, told in ((0, 1), (60, 1)):
        _reported([2.3] * 101, at)
        assert capsys.readouterr().err.count('is at chance level') == told


@pytest.mark.slow
def test_a_run_that_learns_nothing_is_told_so(capsys, tmp_path):
    train.train_and_evaluate(_config(num_steps=101, **{'optim.learning_rate': 0.0}), str(tmp_path / 'stalled'))
    told = [line for line in capsys.readouterr().err.splitlines() if 'ln(num_classes) = 2.30' in line]
    assert len(told) == 1 and told[0].startswith('warning: step 100: over the last 100 updates')


class Damaged(helpers.Records):
    """Some of the records cannot be read."""

    def __init__(self, bad, count=50):
        super().__init__(count)
        self.bad = bad

    def __getitem__(self, i):
        if i in self.bad:
            raise UnreadableError(f'record {i} in train of here cannot be read (broken); prepare it again.')
        return super().__getitem__(i)


def _stream(source, **options):
    stored = source if isinstance(source, cache.HostCache) else cache.Records(source, 6)
    options = {'seed': 3, 'augmentation': Augmentation(image_size=4), 'num_threads': 2, **options}
    batches = pipeline.train_batches(stored, batch_size=8, start_step=0, **options)
    try:
        return list(itertools.islice(batches, 20))
    finally:
        batches.close()


def test_a_record_that_cannot_be_read_keeps_its_place(capsys):
    whole, damaged = _stream(helpers.Records(50)), _stream(Damaged({7, 31}))
    missing = 0
    for a, b in zip(whole, damaged, strict=True):
        bad = np.isin(a['label'], (7, 31))
        assert (b['weight'] == ~bad).all() and len(b.get('unreadable', ())) == bad.sum()
        for name in a:
            assert (a[name][~bad] == b[name][~bad]).all() and name in b
        for name in ('offset', 'reflect', 'color'):
            assert (a[name] == b[name]).all()
        assert not b['image'][bad].any()
        missing += bad.sum()
        assert 'unreadable' not in pipeline.warn_unreadable(b)
    assert 5 <= missing <= 8  # each once a pass, 3.2 passes
    told = capsys.readouterr().err.splitlines()
    assert len(told) == missing and told[0].startswith('warning: unreadable image: record ')


def test_of_an_evaluation_too(capsys):
    parts = list(pipeline.eval_batches(Damaged({7, 31}), batch_size=16, record_size=6))
    weight = np.concatenate([part['weight'] for part in parts])
    assert (np.flatnonzero(weight == 0) == [7, 31, *range(50, 64)]).all()
    images, labels = pipeline.decode_all(Damaged({7, 31}), 6)
    assert [i for i, label in enumerate(labels) if label < 0] == [7, 31] and not images[[7, 31]].any()
    # As `data.cache='host'` keeps them: the same weights, and nothing is told again.
    capsys.readouterr()
    for a, c in zip(_stream(Damaged({7, 31})), _stream(cache.HostCache(images, labels)), strict=True):
        pipeline.warn_unreadable(a)
        cut = jax.device_get(crop_on_device(c, 4))
        bad = a['weight'] == 0
        assert not cut['image'][bad].any()
        for name in a:
            assert (cut[name][~bad] == a[name][~bad]).all()
        assert (c['weight'] == a['weight']).all() and (c['label'] == a['label']).all()


def _broken_digits(bad):
    digits = datasets.open_dataset('digits')

    def spoil(records, bad):
        return [{**r, 'image': b'\xff\xd8 no', 'file_name': b'7.jpg'} if i in bad else r for i, r in enumerate(records)]

    splits = {'train': spoil(digits.splits['train'], bad), 'val': spoil(digits.splits['val'], {3})}
    return digits._replace(splits=splits)


@pytest.mark.slow
def test_training_counts_what_it_cannot_read(tmp_path, monkeypatch, capsys):
    """Seven a pass: a budget of seven holds for every pass anew, one of six does not for the first."""
    broken = _broken_digits({1, 2, 3, 5, 7, 11, 13})
    monkeypatch.setattr(datasets, 'open_dataset', lambda path: broken)
    config = _config(num_steps=50, **{'data.max_unreadable': 7})  # 2.2 passes
    train.train_and_evaluate(config, str(tmp_path / 'seven'))
    assert capsys.readouterr().err.count("unreadable image: record '7.jpg' cannot be decoded") >= 14
    assert {line['count'] for line in lines(tmp_path / 'seven') if line['split'] == 'val'} == {359}
    with pytest.raises(UserError, match='7 images of this pass cannot be read .* data.max_unreadable=6'):
        train.train_and_evaluate(_config(num_steps=50, **{'data.max_unreadable': 6}), str(tmp_path / 'six'))
    with pytest.raises(UserError, match='1 of 360 images cannot be read'):
        train.train_and_evaluate(_config(num_steps=1, **{'data.max_unreadable': 0}), str(tmp_path / 'val'))


@pytest.mark.slow
def test_a_bad_image_changes_no_number_of_the_others(monkeypatch):
    """An update from a batch with an unreadable image is that of the batch without it."""
    run = build.build(_config())
    batch = next(run.train_batches(0))
    key, state = jax.random.key(0), lambda: run.steps.init(jax.random.key(0))
    without = {**batch, 'weight': (np.arange(64) != 5).astype(np.float32)}
    noise = {**without, 'image': batch['image'].copy(), 'label': batch['label'].copy()}
    noise['image'][5], noise['label'][5] = 255, 3
    (a, reported), (b, _) = (run.steps.train_step(state(), x, run.image_stats, key) for x in (without, noise))
    chex.assert_trees_all_equal(a, b)
    assert reported['weight'] == 63


_MESHES = ((1, 1), (1, 2), (2, 2), (4, 1), (1, 1))


def _float64(monkeypatch):
    init = train_step.init_state

    def wide(*args, **kwargs):
        floats = lambda x: x.astype(np.float64) if x.dtype == np.float32 else x  # noqa: E731
        return jax.tree.map(floats, init(*args, **kwargs))

    monkeypatch.setattr(train_step, 'init_state', wide)


def _arrays(config, workdir):
    with manager.CheckpointManager(str(workdir), read_only=True) as saved:
        return jax.device_get(saved.restore(saved.latest(), build.build(config).steps.state_shapes))


@pytest.mark.slow
def test_moved_from_mesh_to_mesh_it_ends_the_same(tmp_path, monkeypatch):
    """float64: one device, two towers, two by two, four parts and back, with other threads, cache and workers."""
    with jax.enable_x64():
        _float64(monkeypatch)
        config = _config(**{'model.dtype': 'float64'})
        train.train_and_evaluate(config, str(tmp_path / 'whole'))
        made = [0]
        ways = ({'data.num_threads': 3}, {'data.cache': 'host'}, {'data.num_workers': 2}, {'data.cache': 'device'}, {})
        for (parts, towers), way, calls in zip(_MESHES, ways, (5, 6, 7, 12, 1000), strict=True):
            moved = _config(**{'model.dtype': 'float64', 'mesh.data': parts, 'mesh.tower': towers, **way})
            with monkeypatch.context() as patch, contextlib.suppress(TerminatedError):
                _stop_after(patch, calls)
                train.train_and_evaluate(moved, str(tmp_path / 'moved'))
            made.append(lines(tmp_path / 'moved')[-1]['step'])
        assert all(b - a >= 2 for a, b in itertools.pairwise(made))  # on each mesh updates were made
        a, b = (_arrays(config, tmp_path / name) for name in ('whole', 'moved'))
        assert a.params['conv1']['kernel'].dtype == np.float64
        chex.assert_trees_all_close(a, b, rtol=1e-9, atol=1e-12)
        for x, y in zip(lines(tmp_path / 'whole'), lines(tmp_path / 'moved'), strict=True):
            chex.assert_trees_all_close(x | {'split': 0}, y | {'split': 0}, rtol=1e-9)


_CHILD = """
import runpy, sys
import jax, numpy as np
if __name__ == '__main__':
    jax.config.update('jax_enable_x64', True)
    from alexnet_jax.core import train_step
    init = train_step.init_state
    wide = lambda x: x.astype(np.float64) if x.dtype == np.float32 else x
    train_step.init_state = lambda *a, **k: jax.tree.map(wide, init(*a, **k))
    sys.argv[0] = 'alexnet_jax.main'
    runpy.run_module('alexnet_jax.main', run_name='__main__')
"""


def _two_processes(script, *options):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{free.getsockname()[1]}'
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': '2'}
    children = [
        subprocess.Popen(
            [sys.executable, str(script), '--config=tests/faults/config.py', '--cpu_devices=1', *options],
            cwd=ROOT, env={**environment, 'JAX_PROCESS_ID': str(i)}, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    for child in children:
        _, errors = child.communicate(timeout=300)
        assert child.returncode == 0, errors


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [(2, 1), (1, 2)])
def test_two_processes_go_on_with_what_one_saved(tmp_path, monkeypatch, mesh):
    """float64: 12 updates in one process, the rest in two of one device each, as one process does all."""
    script = tmp_path / 'child.py'
    script.write_text(_CHILD)
    with jax.enable_x64():
        _float64(monkeypatch)
        config = _config(**{'model.dtype': 'float64'})
        train.train_and_evaluate(config, str(tmp_path / 'whole'))
        with monkeypatch.context() as patch, pytest.raises(TerminatedError):
            _stop_after(patch, 14)  # in a validation
            train.train_and_evaluate(config, str(tmp_path / 'moved'))
    options = [f'--workdir={tmp_path}/moved', '--config.model.dtype=float64', '--config.num_steps=30']
    _two_processes(script, *options, f'--config.mesh.data={mesh[0]}', f'--config.mesh.tower={mesh[1]}')
    with jax.enable_x64():
        a, b = (_arrays(config, tmp_path / name) for name in ('whole', 'moved'))
        assert b.params['conv1']['kernel'].dtype == np.float64
        chex.assert_trees_all_close(a, b, rtol=1e-9, atol=1e-12)
    for x, y in zip(lines(tmp_path / 'whole'), lines(tmp_path / 'moved'), strict=True):
        chex.assert_trees_all_close(x | {'split': 0}, y | {'split': 0}, rtol=1e-9)


def test_shards_and_restarts_deal_out_every_image_once():
    """A pass of 48 read in pieces: by one process, by two, by four, by one with other threads."""
    pieces = ((0, 2, 1), (2, 3, 2), (3, 5, 4), (5, 6, 1))
    seen = []
    for first, last, count in pieces:
        for shard in range(count):
            batches = pipeline.train_batches(
                cache.Records(helpers.Records(48), 6), batch_size=8, start_step=first, seed=3, shard=(shard, count),
                num_threads=2,
                augmentation=Augmentation(image_size=4),
            )  # fmt: skip
            seen += [batch['label'] for batch in itertools.islice(batches, last - first)]
            batches.close()
    assert sorted(np.concatenate(seen).tolist()) == list(range(48))


def test_the_key_is_that_of_the_seed():
    key = sharding.random_key(sharding.make_mesh(data=2, tower=2), 7)
    assert (jax.random.key_data(key) == jax.random.key_data(jax.random.key(7))).all()
    assert len(key.sharding.device_set) == 4
