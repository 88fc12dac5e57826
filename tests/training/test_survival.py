"""Interruptions at any point, non-finite numbers, unreadable records and changes of the mesh."""

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

from alexnet_jax.convert import loading
from alexnet_jax.core import sharding, train_step
from alexnet_jax.core.augment import Augmentation, crop_on_device
from alexnet_jax.data import cache, datasets, pipeline
from alexnet_jax.inference import evaluate
from alexnet_jax.training import build, train, train_log
from alexnet_jax.utils import distributed
from alexnet_jax.utils.errors import DivergedError, TerminatedError, UnreadableError, UserError
from tests import ROOT, helpers
from tests.helpers import last_state, resume_config, untimed_metrics


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('uninterrupted')
    train.train_and_evaluate(resume_config(), str(workdir))
    return workdir


def _stop_after(monkeypatch, calls):
    """Requests SIGTERM at the given check, after an update or before a batch of a validation."""
    count = itertools.count(1)
    monkeypatch.setattr(distributed, 'defer_sigterm', lambda: contextlib.nullcontext(lambda: next(count) >= calls))


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1])
def test_repeated_sigterm_gives_the_same_result(uninterrupted, tmp_path, monkeypatch, seed):
    """Stopped again and again until it finishes: parameters, velocities, rates and all lines are those of one run."""
    rng, stops = np.random.default_rng(seed), []
    while True:
        _stop_after(monkeypatch, rng.integers(2, 16))
        try:
            train.train_and_evaluate(resume_config(), str(tmp_path))
            break
        except TerminatedError as error:
            stops.append(str(error))
    assert len(stops) > 3 and 'is saved; run the same command to resume' in stops[0]
    assert untimed_metrics(tmp_path) == untimed_metrics(uninterrupted)
    chex.assert_trees_all_equal(last_state(resume_config(), tmp_path), last_state(resume_config(), uninterrupted))


@pytest.mark.slow
def test_batches_sent_at_once_leave_a_run_unchanged(tmp_path, monkeypatch):
    """From the memory of the device, one by one or 16 at once and stopped at step 10: the same lines and states."""
    config, single, grouped = resume_config(**{'data.cache': 'device'}), tmp_path / 'single', tmp_path / 'grouped'
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, 'INDEX_BATCHES', 1)
        train.train_and_evaluate(config, str(single))
    _stop_after(monkeypatch, 10)
    with pytest.raises(TerminatedError, match='step 10 of 30'):
        train.train_and_evaluate(config, str(grouped))
    monkeypatch.undo()
    train.train_and_evaluate(config, str(grouped))
    assert untimed_metrics(grouped) == untimed_metrics(single)
    assert sorted(os.listdir(grouped / 'checkpoints')) == sorted(os.listdir(single / 'checkpoints'))
    chex.assert_trees_all_equal(last_state(config, grouped), last_state(config, single))


def test_interrupted_validation_is_repeated_first(uninterrupted, tmp_path, monkeypatch):
    _stop_after(monkeypatch, 15)  # in the third batch of the validation at step 12
    with pytest.raises(TerminatedError, match='step 12 of 30'):
        train.train_and_evaluate(resume_config(), str(tmp_path))
    # The line of the updates to 12, none of the validation.
    assert [line['step'] for line in untimed_metrics(tmp_path)] == [3, 6, 8, 9, 12]
    # Killed after the validation was written, with nothing saved since: it is not written twice.
    validation = next(line for line in untimed_metrics(uninterrupted) if line['split'] == 'val')
    with open(tmp_path / 'metrics.jsonl', 'a') as file:
        file.write(json.dumps(validation) + '\n')
    monkeypatch.undo()
    train.train_and_evaluate(resume_config(), str(tmp_path))
    assert untimed_metrics(tmp_path) == untimed_metrics(uninterrupted)


@pytest.mark.slow
def test_shortened_run_completes_its_validation(uninterrupted, tmp_path, monkeypatch):
    _stop_after(monkeypatch, 14)  # in the validation at step 12
    with pytest.raises(TerminatedError, match='step 12 of 30'):
        train.train_and_evaluate(resume_config(), str(tmp_path))
    monkeypatch.undo()
    result = train.train_and_evaluate(resume_config(num_steps=6), str(tmp_path))
    validation = next(line for line in untimed_metrics(uninterrupted) if line['split'] == 'val')
    assert validation['step'] == 12 and result['loss'] == validation['loss']
    assert train.train_and_evaluate(resume_config(num_steps=6), str(tmp_path)) == {}
    train.train_and_evaluate(resume_config(), str(tmp_path))  # and resumes as if it had not been shortened
    assert untimed_metrics(tmp_path) == untimed_metrics(uninterrupted)
    chex.assert_trees_all_equal(last_state(resume_config(), tmp_path), last_state(resume_config(), uninterrupted))


@pytest.mark.slow
def test_overflowing_update_is_discarded_and_not_saved(tmp_path, monkeypatch):
    """Loss and gradient are finite, but the rate makes the update infinite; the previous state is kept."""
    huge = {'optim.layer_rates': (('fc8', 1e38),), 'optim.learning_rate': 10.0, 'num_steps': 3}
    config = resume_config(**huge, checkpoint_every_steps=1, **{'optim.stages': ()})
    with pytest.raises(DivergedError, match=r'step 1: .*update is not finite \(learning rate 10\).*There is no check'):
        train.train_and_evaluate(config, str(tmp_path))
    run = build.build(config)
    state, report = run.steps.train_step(
        run.steps.init(jax.random.key(0)), next(run.train_batches(0)), run.image_stats, jax.random.key(0)
    )
    assert np.isfinite(report['loss']) and np.isfinite(report['gradient_norm']) and not report['finite']
    chex.assert_tree_all_finite(state.params)


@pytest.mark.slow
def test_divergence_error_names_last_good_checkpoint(tmp_path, monkeypatch):
    batches = pipeline.train_batches

    def batches_with_nan(*args, start_step, **kwargs):
        for i, batch in enumerate(batches(*args, start_step=start_step, **kwargs), start_step):
            batch['color'][:] = np.nan if i == 20 else 0
            yield batch

    monkeypatch.setattr(build.pipeline, 'train_batches', batches_with_nan)
    with pytest.raises(DivergedError, match=r'step 21: .* The last good checkpoint is step 16 in '):
        train.train_and_evaluate(resume_config(), str(tmp_path))
    with pytest.raises(DivergedError, match='step 21: .* as in 0 batches before; max_nonfinite=0'):
        train.train_and_evaluate(resume_config(on_nonfinite='skip', max_nonfinite=0), str(tmp_path))
    train.train_and_evaluate(resume_config(on_nonfinite='skip'), str(tmp_path))
    assert untimed_metrics(tmp_path)[-1]['step'] == 30
    # A line is due at step 21, whose gradient is NaN: it has the last finite gradient norm.
    assert all(np.isfinite(line['gradient_norm']) for line in untimed_metrics(tmp_path) if line['split'] == 'train')


def test_nonfinite_validation_loss_ends_the_run(tmp_path, monkeypatch):
    one_pass = evaluate.evaluate_batches
    monkeypatch.setattr(evaluate, 'evaluate_batches', lambda *a, **k: {**one_pass(*a, **k), 'loss': float('nan')})
    with pytest.raises(DivergedError, match='step 12: the validation loss is nan.* The last good checkpoint is step 8'):
        train.train_and_evaluate(resume_config(), str(tmp_path))
    assert loading.load_checkpoint(str(tmp_path)).step == 8


def test_loss_at_chance_level_is_detected():
    """ln 10 = 2.3026: within 1% over the last quarter of a window, reported once per window."""
    stall = train_log.ChanceLevelMonitor(10, length=8)
    assert [stall.add(2.3 * 64, 64) for _ in range(16)] == ([False] * 7 + [True]) * 2
    assert [stall.add(loss * 64, 64) for loss in (4.6, 3.0, 2.5, 2.4, 2.31, 2.31, 2.29, 2.31)] == [False] * 7 + [True]


@pytest.mark.parametrize(
    'losses',
    [
        (2.3, 2.3, 2.3, 2.3, 2.3, 2.3, 2.2, 2.1),  # learned at the end
        (2.35,) * 8,  # above chance level
        (4.6, 3.0, 2.3, 2.0, 1.8, 1.7, 1.6, 1.5),  # has learned, with a mean of 2.31
        (3.0, 2.7, 2.4, 2.3, 2.3, 2.3, 2.2, 2.1),
    ],
)
def test_loss_that_has_left_chance_level_is_not_reported(losses):
    stall = train_log.ChanceLevelMonitor(10, length=8)
    assert not any(stall.add(loss * 64, 64) for loss in losses)


def _logged(losses, at, saved=None):
    """Returns the log lines of one update per loss (None: not finite), interrupted before update `at` and resumed."""
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
    return [{key: line[key] for key in line if key not in helpers.TIMINGS} for line in lines]


@pytest.mark.parametrize('at', range(2, 8))
def test_resumed_log_writes_the_same_lines(at):
    """This includes the norms of the last finite gradient, here from before the interruption."""
    losses = [1.0, 2.0, 3.0, 4.0, None, None, None, 8.0, None]
    whole = _logged(losses, at=0)
    assert [line['step'] for line in whole] == [3, 6, 9] and whole[1]['gradient_norm'] == 4
    assert _logged(losses, at) == whole


def test_chance_level_is_detected_after_resume(capsys):
    """The window of 100 updates continues, too."""
    for at, told in ((0, 1), (60, 1)):
        _logged([2.3] * 101, at)
        assert capsys.readouterr().err.count('is at chance level') == told


@pytest.mark.slow
def test_run_at_chance_level_warns(capsys, tmp_path):
    train.train_and_evaluate(resume_config(num_steps=101, **{'optim.learning_rate': 0.0}), str(tmp_path / 'stalled'))
    told = [line for line in capsys.readouterr().err.splitlines() if 'ln(num_classes) = 2.30' in line]
    assert len(told) == 1 and told[0].startswith('warning: step 100: the loss of the last 25 updates is at chance')


class Damaged(helpers.Records):
    """Records of which some cannot be read."""

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


def test_unreadable_training_record_keeps_its_position(capsys):
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
    assert 5 <= missing <= 8  # each once per epoch, 3.2 epochs
    told = capsys.readouterr().err.splitlines()
    assert len(told) == missing and told[0].startswith('warning: unreadable image: record ')


def test_unreadable_evaluation_record_keeps_its_position(capsys):
    parts = list(pipeline.eval_batches(Damaged({7, 31}), batch_size=16, record_size=6))
    weight = np.concatenate([part['weight'] for part in parts])
    assert (np.flatnonzero(weight == 0) == [7, 31, *range(50, 64)]).all()
    images, labels = pipeline.decode_all(Damaged({7, 31}), 6)
    assert [i for i, label in enumerate(labels) if label < 0] == [7, 31] and not images[[7, 31]].any()
    # As `data.cache='host'` keeps them: the same weights, and no second warning.
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

    def corrupt(records, bad):
        return [{**r, 'image': b'\xff\xd8 no', 'file_name': b'7.jpg'} if i in bad else r for i, r in enumerate(records)]

    splits = {'train': corrupt(digits.splits['train'], bad), 'val': corrupt(digits.splits['val'], {3})}
    return digits._replace(splits=splits)


@pytest.mark.slow
def test_unreadable_images_are_limited_per_epoch(tmp_path, capsys):
    """There are seven per epoch: a limit of seven holds in every epoch, a limit of six fails in the first."""
    broken = _broken_digits({1, 2, 3, 5, 7, 11, 13})
    config = resume_config(num_steps=50, **{'data.max_unreadable': 7})  # 2.2 epochs
    train.train_and_evaluate(config, str(tmp_path / 'seven'), dataset=broken)
    assert capsys.readouterr().err.count("unreadable image: record '7.jpg' cannot be decoded") >= 14
    assert {line['count'] for line in untimed_metrics(tmp_path / 'seven') if line['split'] == 'val'} == {359}
    with pytest.raises(UserError, match='7 images of this pass cannot be read .* data.max_unreadable=6'):
        train.train_and_evaluate(
            resume_config(num_steps=50, **{'data.max_unreadable': 6}), str(tmp_path / 'six'), dataset=broken
        )
    with pytest.raises(UserError, match='1 of 360 images cannot be read'):
        train.train_and_evaluate(
            resume_config(num_steps=1, **{'data.max_unreadable': 0}), str(tmp_path / 'val'), dataset=broken
        )


@pytest.mark.slow
def test_unreadable_image_does_not_affect_the_update(monkeypatch):
    """An update from a batch with an unreadable image equals that from the batch without it."""
    run = build.build(resume_config())
    batch = next(run.train_batches(0))
    key, state = jax.random.key(0), lambda: run.steps.init(jax.random.key(0))
    without = {**batch, 'weight': (np.arange(64) != 5).astype(np.float32)}
    noise = {**without, 'image': batch['image'].copy(), 'label': batch['label'].copy()}
    noise['image'][5], noise['label'][5] = 255, 3
    (a, reported), (b, _) = (run.steps.train_step(state(), x, run.image_stats, key) for x in (without, noise))
    chex.assert_trees_all_equal(a, b)
    assert reported['weight'] == 63


_MESHES = ((1, 1), (1, 2), (2, 2), (4, 1), (1, 1))


def _use_float64(monkeypatch):
    init = train_step.init_state

    def init_in_float64(*args, **kwargs):
        floats = lambda x: x.astype(np.float64) if x.dtype == np.float32 else x  # noqa: E731
        return jax.tree.map(floats, init(*args, **kwargs))

    monkeypatch.setattr(train_step, 'init_state', init_in_float64)


@pytest.mark.slow
def test_resume_on_other_meshes_gives_the_same_result(tmp_path, monkeypatch):
    """float64: one device, 1x2, 2x2, 4x1 and back, with split dense layers, other threads, caches and workers."""
    with jax.enable_x64():
        _use_float64(monkeypatch)
        config = resume_config(**{'model.dtype': 'float64'})
        train.train_and_evaluate(config, str(tmp_path / 'whole'))
        made = [0]
        split = {'mesh.dense': 'split'}
        workers, device = {'data.num_workers': 2, **split}, {'data.cache': 'device', **split}
        ways = ({'data.num_threads': 3}, {'data.cache': 'host'}, workers, device, {})
        for (parts, towers), way, calls in zip(_MESHES, ways, (5, 6, 7, 12, 1000), strict=True):
            moved = resume_config(**{'model.dtype': 'float64', 'mesh.data': parts, 'mesh.tower': towers, **way})
            with monkeypatch.context() as patch, contextlib.suppress(TerminatedError):
                _stop_after(patch, calls)
                train.train_and_evaluate(moved, str(tmp_path / 'moved'))
            made.append(untimed_metrics(tmp_path / 'moved')[-1]['step'])
        assert all(b - a >= 2 for a, b in itertools.pairwise(made))  # updates were made on each mesh
        a, b = (last_state(config, tmp_path / name) for name in ('whole', 'moved'))
        assert a.params['conv1']['kernel'].dtype == np.float64
        chex.assert_trees_all_close(a, b, rtol=1e-9, atol=1e-12)
        for x, y in zip(untimed_metrics(tmp_path / 'whole'), untimed_metrics(tmp_path / 'moved'), strict=True):
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


def _train_whole(tmp_path, monkeypatch):
    """Trains in one process, in float64, to compare with. Returns the program of other processes, and the config."""
    script = tmp_path / 'child.py'
    script.write_text(_CHILD)
    with jax.enable_x64():
        _use_float64(monkeypatch)
        config = resume_config(**{'model.dtype': 'float64'})
        train.train_and_evaluate(config, str(tmp_path / 'whole'))
    return script, config


def _assert_moved_equals_whole(config, tmp_path):
    with jax.enable_x64():
        a, b = (last_state(config, tmp_path / name) for name in ('whole', 'moved'))
        assert b.params['conv1']['kernel'].dtype == np.float64
        chex.assert_trees_all_close(a, b, rtol=1e-9, atol=1e-12)
    for x, y in zip(untimed_metrics(tmp_path / 'whole'), untimed_metrics(tmp_path / 'moved'), strict=True):
        chex.assert_trees_all_close(x | {'split': 0}, y | {'split': 0}, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [(2, 1, 'replicated'), (1, 2, 'replicated'), (2, 1, 'split')])
def test_two_processes_resume_the_run_of_one(tmp_path, monkeypatch, mesh):
    """float64: 12 updates in one process and the rest in two with one device each, compared with one process."""
    script, config = _train_whole(tmp_path, monkeypatch)
    with jax.enable_x64():
        with monkeypatch.context() as patch, pytest.raises(TerminatedError):
            _stop_after(patch, 14)  # in a validation
            train.train_and_evaluate(config, str(tmp_path / 'moved'))
    options = [f'--workdir={tmp_path}/moved', '--config.model.dtype=float64', '--config.num_steps=30']
    _two_processes(
        script,
        *options,
        *(f'--config.mesh.{key}={value}' for key, value in zip(('data', 'tower', 'dense'), mesh, strict=True)),
    )
    _assert_moved_equals_whole(config, tmp_path)


@pytest.mark.slow
def test_a_run_on_8_devices_goes_on_on_4_and_16(tmp_path, monkeypatch):
    """float64, split dense layers: 12 updates on 8 devices, 12 on 4, 6 on 16, compared with one device."""
    script, config = _train_whole(tmp_path, monkeypatch)
    options = ['--config=tests/faults/config.py', f'--workdir={tmp_path}/moved', '--config.model.dtype=float64']
    for devices, steps in ((8, 12), (4, 24), (16, 30)):
        mesh = [f'--config.mesh.data={devices // 2}', '--config.mesh.tower=2', '--config.mesh.dense=split']
        words = [*options, *mesh, f'--cpu_devices={devices}', f'--config.num_steps={steps}']
        done = subprocess.run(
            [sys.executable, str(script), *words],
            cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f'Training on {devices} x cpu' in done.stdout
    _assert_moved_equals_whole(config, tmp_path)


def test_shards_and_restarts_cover_every_image_once():
    """An epoch of 48 images read in parts: by one process, by two, by four, by one with other threads."""
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


def test_random_key_does_not_depend_on_the_mesh():
    key = sharding.random_key(sharding.make_mesh(data=2, tower=2), 7)
    assert (jax.random.key_data(key) == jax.random.key_data(jax.random.key(7))).all()
    assert len(key.sharding.device_set) == 4
