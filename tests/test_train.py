"""The loop: exact resume, what is kept and written, what stops it. Small networks on the embedded digits."""

import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

import alexnet_jax
from alexnet_jax.checkpoints import loading, manager
from alexnet_jax.core import augment, image_stats, model, sharding, train_step
from alexnet_jax.data import datasets, pipeline
from alexnet_jax.inference import evaluate, predict
from alexnet_jax.training import build, metric_writer, train
from alexnet_jax.utils import checksums, processes
from alexnet_jax.utils.environment import describe_environment, warn_of_changes
from alexnet_jax.utils.errors import DivergedError, UserError
from tests import ROOT, small

TIMINGS = ('images_per_second', 'data_wait')


def _lines(workdir):
    with open(os.path.join(workdir, 'metrics.jsonl')) as file:
        return [json.loads(line) for line in file]


def _untimed(workdir):
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in _lines(workdir)]


def _state(config, workdir):
    """Everything the last checkpoint holds, as numpy."""
    run = build.build(config)
    with manager.CheckpointManager(str(workdir)) as saved:
        return jax.device_get(saved.restore(saved.latest(), run.steps.state_shapes))


def _events(workdir):
    """(step, tag) of every scalar in the workdir's TensorBoard files, in the order written."""
    found = []
    for name in sorted(os.listdir(workdir)):
        if not name.startswith('events.'):
            continue
        with open(os.path.join(workdir, name), 'rb') as file:
            while header := file.read(12):
                record = file.read(int.from_bytes(header[:8], 'little') + 4)[:-4]
                event = event_pb2.Event.FromString(record)
                found += [(event.step, value.tag) for value in event.summary.value]
    return found


def _config(**changes):
    """23 updates an epoch; validation and saving at other cadences than epochs, so that batches straddle them."""
    return small.digits_config(**{'num_steps': 30, 'eval_every_steps': 12, 'checkpoint_every_steps': 8, **changes})


def _first_batch(run):
    return next(run.train_batches(0))


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('uninterrupted')
    config = _config(**{'optim.schedule': 'plateau', 'optim.patience': 1, 'optim.min_delta': 50.0})
    result = train.train_and_evaluate(config, str(workdir))
    return config, workdir, result


def test_a_run_tells_its_story(uninterrupted):
    config, workdir, result = uninterrupted
    lines = _lines(workdir)
    train_lines = [line for line in lines if line['split'] == 'train']
    assert [line['step'] for line in train_lines] == list(range(1, 31))
    assert [line['step'] for line in lines if line['split'] == 'val'] == [12, 24, 30]
    keys = 'step epoch split loss top1_error top5_error learning_rate images_per_second data_wait'.split()
    for line in lines:
        assert set(keys) <= set(line)
        assert line['epoch'] == line['step'] * 64 / 1437
    assert abs(train_lines[0]['loss'] - np.log(10)) < 1
    losses = [line['loss'] for line in lines if line['split'] == 'val']
    assert losses == sorted(losses, reverse=True)
    assert result['count'] == 360 and result['top1_error'] == lines[-1]['top1_error']
    # The first validation is a gain, the next two (a gain takes 50 points) each drop the rate.
    rates = {line['step']: line['learning_rate'] for line in train_lines}
    chex.assert_trees_all_close([rates[s] for s in (12, 24, 25, 30)], [0.01, 0.01, 0.001, 0.001], rtol=1e-6)
    # The first update is of the stream's first batch, from the seed's parameters.
    run = build.build(config)
    batch = _first_batch(run)
    before = jax.device_get(run.steps.init(jax.random.key(0)).params)
    state, report = run.steps.train_step(run.steps.init(jax.random.key(0)), batch, run.image_stats, jax.random.key(0))
    assert float(report['loss']) / 64 == train_lines[0]['loss']
    # A layer's update is by how much its weights have changed; the gradient's norm is that of all layers' together.
    moved = jax.tree.map(lambda a, b: np.float64(a) - b, jax.device_get(state.params), before)
    for layer, parts in moved.items():
        norm = np.sqrt(sum(np.sum(part**2) for part in parts.values()))
        assert train_lines[0]['update_norms'][layer] == pytest.approx(norm, rel=1e-3), layer
    by_layer = np.array(list(train_lines[0]['gradient_norms'].values()))
    assert len(by_layer) == 8 and train_lines[0]['gradient_norm'] == pytest.approx(
        np.sqrt(np.sum(by_layer**2)), rel=1e-5
    )
    for name in ('config.json', 'environment.json'):
        assert json.loads((workdir / name).read_text())
    events = _events(workdir)
    assert {step for step, tag in events if tag == 'train/loss'} == set(range(1, 31))
    assert {step for step, tag in events if tag == 'train/update_norms/fc8'} == set(range(1, 31))
    assert {step for step, tag in events if tag == 'val/top1_error'} == {12, 24, 30}


def test_the_last_two_and_the_best_are_kept(uninterrupted):
    _, workdir, _ = uninterrupted
    errors = {line['step']: line['top1_error'] for line in _lines(workdir) if line['split'] == 'val'}
    saved_with_error = {s: e for s, e in errors.items() if s in (24, 30)}  # saved at 8, 16, 24, 30
    best = min(saved_with_error, key=lambda step: (saved_with_error[step], -step))  # of equals the later
    kept = {int(name) for name in os.listdir(workdir / 'checkpoints')}
    assert kept == {24, 30, best}
    assert loading.load_checkpoint(str(workdir)).step == best


def test_an_early_best_is_kept(tmp_path):
    saved = manager.CheckpointManager(str(tmp_path))
    config = _config()
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


@pytest.mark.parametrize('stops_at', [5, 27])  # before any save; after one that followed a rate decision
def test_a_run_taken_up_again_ends_as_one_that_never_stopped(uninterrupted, tmp_path, monkeypatch, stops_at):
    """Stopped by an exception after some updates beyond the last save, torn lines and all."""
    config, workdir, _ = uninterrupted
    _stop_at(config, tmp_path, monkeypatch, stops_at)
    with open(tmp_path / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 23, "spl')
    train.train_and_evaluate(config, str(tmp_path))
    chex.assert_trees_all_equal(_state(config, tmp_path), _state(config, workdir))
    assert _untimed(tmp_path) == _untimed(workdir)
    assert sorted(_events(tmp_path)) == sorted(_events(workdir))  # no step twice
    assert json.dumps(_untimed(tmp_path)) == json.dumps(_untimed(workdir))


def _stop_at(config, workdir, monkeypatch, step):
    """Trains until an exception after update number `step`."""
    add = train.train_log.TrainLog.add

    def stop(self, now, *args, **kwargs):
        add(self, now, *args, **kwargs)
        if now == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.train_log.TrainLog, 'add', stop)
        train.train_and_evaluate(config, str(workdir))


@pytest.mark.parametrize('off', [0, 1])
def test_the_stream_must_begin_at_step_times_batch(uninterrupted, tmp_path, monkeypatch, off):
    """Resuming one batch off ends with other parameters; as it is (off = 0) with the same."""
    config, workdir, _ = uninterrupted
    _stop_at(config, tmp_path, monkeypatch, 27)
    batches = pipeline.train_batches

    def moved(*args, start_step, **kwargs):
        return batches(*args, start_step=start_step + off, **kwargs)

    monkeypatch.setattr(build.pipeline, 'train_batches', moved)
    train.train_and_evaluate(config, str(tmp_path))
    a, b = (jax.tree.leaves(_state(config, d).params) for d in (tmp_path, workdir))
    assert any((x != y).any() for x, y in zip(a, b, strict=True)) == bool(off)


def test_a_finished_run_says_so(uninterrupted, capsys):
    config, workdir, _ = uninterrupted
    before = (workdir / 'metrics.jsonl').read_bytes()
    assert train.train_and_evaluate(config, str(workdir)) == {}
    assert 'is finished: step 30 of 30' in capsys.readouterr().out
    assert (workdir / 'metrics.jsonl').read_bytes() == before


def test_longer_training_elsewhere_and_on_another_mesh_goes_on(uninterrupted, tmp_path):
    config, workdir, _ = uninterrupted
    shutil.copytree(workdir, tmp_path / 'copy')
    longer = _config(optim=config.optim, num_steps=34, **{'mesh.data': 1, 'mesh.tower': 1, 'data.num_threads': 1})
    train.train_and_evaluate(longer, str(tmp_path / 'copy'))
    assert [line['step'] for line in _lines(tmp_path / 'copy') if line['split'] == 'train'] == list(range(1, 35))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'batch_size': 32}, 'batch_size: 64 -> 32'),
        ({'optim.learning_rate': 0.1}, r'optim.learning_rate: 0.01 -> 0.1'),
        ({'model.lrn_n': 3, 'seed': 1}, 'model.lrn_n: 5 -> 3; seed: 0 -> 1'),
    ],
)
def test_a_workdir_of_another_config_is_refused(uninterrupted, changes, message):
    config, workdir, _ = uninterrupted
    before = {name: (workdir / name).read_bytes() for name in ('config.json', 'metrics.jsonl')}
    changed = config.copy_and_resolve_references()
    for key, value in changes.items():
        changed.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f'contains a run with another config .*{message}.* or another --workdir'):
        train.train_and_evaluate(changed, str(workdir))
    assert before == {name: (workdir / name).read_bytes() for name in before}


@pytest.mark.parametrize('what', ['fewer', 'another order', 'another size'])
def test_other_data_are_refused(uninterrupted, tmp_path, monkeypatch, what):
    config, workdir, _ = uninterrupted
    shutil.copytree(workdir, tmp_path / 'copy')
    digits = datasets.open_dataset('digits')
    other = {
        'fewer': digits._replace(splits={**digits.splits, 'train': digits.splits['train'][:-1]}),
        'another order': digits._replace(fingerprint='another'),
        'another size': digits._replace(record_size=40, image_stats=image_stats.from_moments(
            image_stats.Moments.zeros(40).add(np.zeros((40, 40, 3), np.uint8)))),
    }[what]  # fmt: skip
    monkeypatch.setattr(datasets, 'open_dataset', lambda path: other)
    with pytest.raises(UserError, match='was trained on other data'):
        train.train_and_evaluate(_config(optim=config.optim, num_steps=40), str(tmp_path / 'copy'))


def test_a_checkpoint_restores_on_one_device_and_on_two(uninterrupted):
    config, workdir, _ = uninterrupted
    states = []
    for data_axis, tower in ((1, 1), (1, 2), (2, 2), (4, 1)):
        there = config.copy_and_resolve_references()
        there.mesh.data, there.mesh.tower = data_axis, tower
        run = build.build(there)
        with manager.CheckpointManager(str(workdir)) as saved:
            state = saved.restore(30, run.steps.state_shapes)
        kernel = state.params['conv2']['kernel']
        assert kernel.addressable_data(0).shape[-1] == kernel.shape[-1] // tower
        assert state.opt_state.velocity['conv2']['kernel'].sharding == kernel.sharding
        states.append(jax.device_get(state))
    for other in states[1:]:
        chex.assert_trees_all_equal(other, states[0])


def test_the_readmes_python_runs_as_it_stands(uninterrupted):
    _, workdir, _ = uninterrupted
    code = '\n'.join(re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S))
    assert 'runs/quickstart' in code
    exec(code.replace('runs/quickstart', str(workdir)), found := {})
    assert found['probabilities'].shape == (2, 10)
    assert {name: array.shape[1:] for name, array in found['maps'].items()} == {
        'conv3': (7, 7, 8), 'conv3.linear': (7, 7, 8)
    }  # fmt: skip
    assert int(found['state'].step) == 5 and found['setup'].dataset.class_names == ('even', 'odd')
    chex.assert_trees_all_close(
        found['setup'].dataset.image_stats.mean_image, found['arrays']['image'].mean(0, dtype=np.float64), rtol=1e-5
    )


@pytest.mark.parametrize(
    ('image', 'label', 'message'),
    [
        (np.ones((8, 8, 3), np.float32), 0, r'an image is float32 of shape \(8, 8, 3\); expected uint8 of \(8, 8, 3\)'),
        (np.ones((9, 9, 3), np.uint8), 0, r'an image is uint8 of shape \(9, 9, 3\); expected uint8 of \(8, 8, 3\)'),
        (np.ones((8, 8, 3), np.uint8), 2, 'has the label 2; expected an integer, 0 to 1'),
        (np.uint8(3), 0, r'an image is uint8 of shape \(\); expected'),
        (np.ones((8, 8, 3), np.uint8), -1, 'has the label -1; expected an integer, 0 to 1'),
        (np.ones((8, 8, 3), np.uint8), 0.5, 'has the label 0.5; expected an integer'),
        (np.ones((8, 8, 3), np.uint8), 'cat', "has the label 'cat'; expected an integer"),
    ],
)
def test_arrays_that_are_no_dataset(image, label, message):
    good, other = {'image': np.ones((8, 8, 3), np.uint8), 'label': 1}, {'image': image, 'label': label}
    with pytest.raises(UserError, match=message):
        datasets.in_memory({'train': [good, other]}, ('a', 'b'))
    with pytest.raises(UserError):
        datasets.in_memory({'train': [other, good]}, ('a', 'b'))
    assert list(datasets.in_memory({'train': [good], 'val': []}, ('a', 'b')).splits) == ['train']
    with pytest.raises(UserError, match="no images in a split 'train'; there are: val"):
        datasets.in_memory({'val': [good]}, ('a', 'b'))


def test_a_checkpoint_alone_evaluates_and_predicts(uninterrupted):
    _, workdir, result = uninterrupted
    found = loading.load_checkpoint(str(workdir / 'checkpoints' / '30'))
    val = datasets.open_dataset('digits').split('val')
    mesh = sharding.make_mesh(data=1, tower=2)
    again = evaluate.evaluate(found, val, mesh, batch_size=50)
    for name in ('loss', 'top1_error', 'top5_error', 'count'):
        chex.assert_trees_all_close(again[name], result[name], rtol=1e-5)
    images = np.stack([r['image'] for r in val])
    labels = np.array([r['label'] for r in val])
    p = predict.predict(found, images, views=1)
    chex.assert_shape(p, (360, 10))
    chex.assert_trees_all_close(p.sum(1), np.ones(360, np.float32), rtol=1e-5)
    chex.assert_trees_all_close(predict.predict(found, images[:7], views=1, batch_size=3), p[:7], rtol=1e-5)
    both = sharding.make_mesh(data=2, tower=2)
    chex.assert_trees_all_close(predict.predict(found, images[:7], batch_size=3, mesh=both), p[:7], rtol=1e-5)
    chex.assert_shape(predict.predict(found, images[:0], views=1), (0, 10))
    assert abs(100 * (p.argmax(1) != labels).mean() - again['top1_error']) < 1e-3
    # Ten views: the mean of the softmax outputs of ten crops made here by hand.
    ten = np.zeros((4, 10))
    for y, x in ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2)):
        for step in (1, -1):
            part = (images[:4].astype(np.float32) - found.image_stats.mean_image)[:, y : y + 28, x : x + 28][
                :, :, ::step
            ]
            logits = np.asarray(found.network.apply({'params': found.params}, part), np.float64)
            ten += np.exp(logits) / np.exp(logits).sum(1, keepdims=True) / 10
    chex.assert_trees_all_close(
        predict.predict(found, images[:4], views=10), ten.astype(np.float32), rtol=1e-4, atol=1e-6
    )
    with pytest.raises(UserError, match=r'expected uint8 of shape \(N, 32, 32, 3\)'):
        predict.predict(found, images / 255)


@pytest.mark.slow
def test_training_that_is_not_finite_stops_and_keeps_nothing_of_it(tmp_path, capsys):
    with pytest.raises(
        DivergedError, match=r'step \d+: loss, gradient or update is not finite \(learning rate 1e\+30\)'
    ):
        train.train_and_evaluate(_config(**{'optim.learning_rate': 1e30, 'optim.schedule': 'plateau'}), str(tmp_path))
    assert not os.listdir(tmp_path / 'checkpoints')
    # Nothing was saved, so the remedy may be tried in the same place. Somebody else may miss what was: it is said.
    (tmp_path / 'metrics.jsonl').write_text('{"step": 7, "split": "train"}\n{"step": 8, "sp')
    train.train_and_evaluate(_config(num_steps=2), str(tmp_path))
    assert f'{tmp_path} has no checkpoint; the 7 steps in its metrics.jsonl are run again' in capsys.readouterr().err
    assert [line['step'] for line in _lines(tmp_path) if line['split'] == 'train'] == [1, 2]


def test_a_step_that_is_not_finite_changes_nothing():
    run = build.build(_config())
    state = run.steps.init(jax.random.key(0))
    before = jax.device_get(state)
    batch = _first_batch(run)
    batch['color'][3] = np.nan
    after, report = run.steps.train_step(state, batch, run.image_stats, jax.random.key(1))
    after = jax.device_get(after)
    assert not report['finite'] and int(after.step) == 1
    chex.assert_trees_all_equal((after.params, after.opt_state), (before.params, before.opt_state))


def test_dropout_is_drawn_anew_at_every_step():
    """The same batch and parameters (the rate is 0) have another loss at the next step, and the same when repeated."""
    run = build.build(_config(**{'optim.learning_rate': 0.0}))
    batch = _first_batch(run)
    losses = []
    for step in (0, 1, 1):
        state = run.steps.init(jax.random.key(0))._replace(step=jnp.int32(step))
        losses.append(float(run.steps.train_step(state, batch, run.image_stats, jax.random.key(1))[1]['loss']))
    assert losses[0] != losses[1] == losses[2]


def test_skipping_leaves_the_batch_out_and_goes_on(tmp_path, monkeypatch, capsys):
    batches = pipeline.train_batches

    def spoilt(*args, **kwargs):
        for i, batch in enumerate(batches(*args, **kwargs)):
            if i == 2:
                batch['color'][:] = np.nan
            yield batch

    monkeypatch.setattr(build.pipeline, 'train_batches', spoilt)
    train.train_and_evaluate(_config(num_steps=5, on_nonfinite='skip'), str(tmp_path))
    assert 'is not finite (learning rate 0.01); skipping the batch (1 of at most' in capsys.readouterr().err
    lines = [line for line in _lines(tmp_path) if line['split'] == 'train']
    assert [line['step'] for line in lines] == [1, 2, 4, 5] and all(np.isfinite(line['loss']) for line in lines)


def test_nothing_is_compiled_twice(tmp_path, monkeypatch):
    """Through validation, rate decisions, saving and resuming, each step is traced once a run."""
    config = _config(**{'optim.schedule': 'plateau', 'optim.patience': 1})
    traced = {
        'train': chex.assert_max_traces(train_step.train_step, n=1),
        'eval': chex.assert_max_traces(train_step.eval_step, n=1),
    }
    monkeypatch.setattr(build.train_step, 'train_step', traced['train'])
    monkeypatch.setattr(build.train_step, 'eval_step', traced['eval'])
    seen = []
    original = build.build
    monkeypatch.setattr(build, 'build', lambda c, dataset: seen.append(original(c, dataset)) or seen[-1])
    train.train_and_evaluate(config, str(tmp_path))
    chex.clear_trace_counter()
    longer = config.copy_and_resolve_references()
    longer.num_steps = 40
    train.train_and_evaluate(longer, str(tmp_path))
    assert len(seen) == 2
    for run in seen:
        assert run.steps.train_step._cache_size() == 1
        assert run.steps.eval_step._cache_size() == 1
        assert run.steps.after_validation._cache_size() == 1


def test_without_val_the_rate_stays_and_one_warning_says_so(tmp_path, monkeypatch, capsys):
    digits = datasets.open_dataset('digits')
    monkeypatch.setattr(
        datasets, 'open_dataset', lambda path: digits._replace(splits={'train': digits.splits['train']})
    )
    result = train.train_and_evaluate(_config(num_steps=13, **{'optim.schedule': 'plateau'}), str(tmp_path))
    assert result == {}
    assert capsys.readouterr().err.count('no val split') == 1
    assert {line['split'] for line in _lines(tmp_path)} == {'train'}
    assert len({line['learning_rate'] for line in _lines(tmp_path)}) == 1
    assert loading.load_checkpoint(str(tmp_path)).step == 13  # the latest where there is no best


@pytest.mark.slow
def test_init_from_takes_parameters_over(uninterrupted, tmp_path, monkeypatch, capsys):
    _, workdir, _ = uninterrupted
    config = _config(init_from=str(workdir), num_steps=1, **{'optim.learning_rate': 0.0})
    train.train_and_evaluate(config, str(tmp_path / 'same'))
    old = loading.load_checkpoint(str(workdir)).params
    chex.assert_trees_all_equal(loading.load_checkpoint(str(tmp_path / 'same')).params, old)
    # Other classes: the classifier starts afresh, the rest is taken over.
    digits = datasets.open_dataset('digits')
    with monkeypatch.context() as patch:
        patch.setattr(datasets, 'open_dataset', lambda path: digits._replace(class_names=tuple('0123456789ab')))
        twelve = config.copy_and_resolve_references()
        twelve.model.num_classes = 12
        train.train_and_evaluate(twelve, str(tmp_path / 'twelve'))
    new = loading.load_checkpoint(str(tmp_path / 'twelve')).params
    assert new['fc8']['kernel'].shape[-1] == 12
    chex.assert_trees_all_equal(
        {k: v for k, v in new.items() if k != 'fc8'}, {k: v for k, v in old.items() if k != 'fc8'}
    )
    # As many classes, but others.
    with monkeypatch.context() as patch:
        patch.setattr(datasets, 'open_dataset', lambda path: digits._replace(class_names=tuple('abcdefghij')))
        train.train_and_evaluate(config, str(tmp_path / 'letters'))
    assert 'fc8 starts with new weights of shape (32, 10), because' in capsys.readouterr().out
    new = loading.load_checkpoint(str(tmp_path / 'letters')).params
    assert np.abs(new['fc8']['kernel'] - old['fc8']['kernel']).max() > 0.01
    chex.assert_trees_all_equal(new['fc7'], old['fc7'])
    other = config.copy_and_resolve_references()
    other.model.layers.conv1.features = 4
    with pytest.raises(UserError, match=r'expected a kernel of shape \(5, 5, 3, 4\) for conv1, found shape'):
        train.train_and_evaluate(other, str(tmp_path / 'other'))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model.num_classes': 12}, 'num_classes=12: the data have 10 classes; use --config.model.num_classes=10'),
        ({'batch_size': 63, 'mesh.data': 2}, 'batch_size=63 does not divide into the 2 parts'),
        ({'data.image_size': 64}, 'data.image_size=64 is larger than the prepared images'),
        ({'data.image_size': 2}, 'an image of 2 px does not fit the network'),
        ({'data.path': '/nowhere'}, 'there is no data directory'),
        ({'seed': None}, 'seed=None; expected 0 to 2'),
        ({'optim.momentum': None}, 'optim.momentum=None; expected a number'),
        ({'optim.schedule': 'epochs', 'optim.stages': None}, 'optim.stages has the row None'),
        ({'data.fraction': None}, 'data.fraction=None; expected a number above 0'),
        ({'model': None}, 'model=None: expected a section of keys'),
        ({'on_nonfinite': 'pray'}, "on_nonfinite='pray'; expected 'stop' or 'skip'"),
        ({'mesh.data': 3}, 'needs 6 devices; there are 4'),
        ({'num_steps': 0, 'num_epochs': 0.0}, 'num_epochs=0.0, num_steps=0: expected one of them above 0'),
        ({'num_steps': 0, 'num_epochs': float('inf')}, 'num_epochs=inf'),
        ({'mesh.tower': 0}, 'mesh.tower=0: expected 1 or 2'),
        ({'data.color_epochs': float('inf')}, 'data.color_epochs=inf; expected a number of 0 or more'),
        ({'optim.learning_rate': float('inf')}, 'optim.learning_rate=inf; expected a number of 0 or more'),
        ({'optim.stages': ((0, 1.0, 1.0, 5),)}, r'optim.stages has 5; expected a layer and 2 factor'),
        ({'optim.stages': ((0, float('inf'), 1.0, ()),)}, r'optim.stages has the row \(0, inf'),
        (
            {'optim.layer_rates': (('conv1', 0.1), ('conv1', 0.2))},
            'optim.layer_rates names a layer twice: conv1, conv1',
        ),
        ({'data.crop_area': (0.1, 1.0), 'data.mean': 'center'}, "data.mean='center', but data.crop_area"),
        ({'seed': -1}, 'seed=-1; expected 0 to'),
        ({'data.num_workers': -2}, 'data.num_workers=-2; expected -1 or more'),
        ({'data.cache': 'disk'}, "data.cache='disk'; expected '', 'host' or 'device'"),
        ({'data.cache': 'device', 'data.crop_area': (0.1, 1.0), 'data.mean': 'channel'}, 'cannot resize'),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, changes, message):
    config = _config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(config, str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def _mesh(platform):
    device = SimpleNamespace(platform=platform)
    return SimpleNamespace(devices=np.array([[device]]), local_devices=[device])


@pytest.mark.parametrize(
    ('platform', 'changes', 'workers'),
    [
        ('gpu', {}, 15), ('cpu', {}, 0), ('gpu', {'data.num_workers': 2}, 2), ('cpu', {'data.num_workers': 2}, 2),
        ('gpu', {'data.num_workers': 0}, 0),
    ],
)  # fmt: skip
def test_images_are_decoded_in_processes_where_the_step_leaves_the_cores_alone(platform, changes, workers, monkeypatch):
    monkeypatch.setattr(pipeline, 'default_workers', lambda rows, row_bytes, devices: 15)
    config, digits = _config(), datasets.open_dataset('digits')
    config.update_from_flattened_dict(changes)
    prepared = digits._replace(splits={name: tuple(records) for name, records in digits.splits.items()})
    assert build._num_workers(config, prepared, _mesh(platform), 64) == workers
    if 'data.num_workers' not in changes:
        assert build._num_workers(config, digits, _mesh(platform), 64) == 0  # nothing there has to be decoded


@pytest.mark.slow
@pytest.mark.parametrize('cache', ['host', 'device'])
def test_with_a_cache_worker_processes_decode_what_is_validated_alone(cache):
    run = build.build(_config(**{'data.cache': cache, 'data.num_workers': 2}))
    batches, val_batches = run.train_batches(0), run.val_batches()
    try:
        next(batches)
        assert not multiprocessing.active_children()
        chex.assert_trees_all_equal(next(val_batches), next(build.build(_config()).val_batches()))
        deadline = time.monotonic() + 30  # the first batch may be there before the second process is
        while len(multiprocessing.active_children()) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(multiprocessing.active_children()) == 2
    finally:
        batches.close()
        val_batches.close()


def test_a_script_that_worker_processes_would_run_again_gets_none(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, 'default_workers', lambda rows, row_bytes, devices: 15)
    config, digits = _config(), datasets.open_dataset('digits')
    prepared = digits._replace(splits={name: tuple(records) for name, records in digits.splits.items()})
    script = tmp_path / 'mine.py'
    monkeypatch.setitem(sys.modules, '__main__', SimpleNamespace(__spec__=None, __file__=str(script)))
    for text, workers in (("if __name__ == '__main__':\n    train()", 15), ('train()', 0)):
        script.write_text(text)
        assert build._num_workers(config, prepared, _mesh('gpu'), 64) == workers
    config.data.num_workers = 2
    with pytest.raises(UserError, match="would run '.*mine.py' again; move its code under if __name__"):
        build._num_workers(config, prepared, _mesh('gpu'), 64)
    for main in (SimpleNamespace(__spec__=None), SimpleNamespace(__spec__='-m', __file__=str(script))):  # a notebook
        monkeypatch.setitem(sys.modules, '__main__', main)
        assert build._num_workers(config, prepared, _mesh('gpu'), 64) == 2


def test_a_run_made_longer_ends_as_one_planned_so(uninterrupted, tmp_path):
    """The validation at the first end, off the cadence, decides nothing."""
    config, workdir, _ = uninterrupted
    shorter = config.copy_and_resolve_references()
    shorter.num_steps = 20
    train.train_and_evaluate(shorter, str(tmp_path))
    assert [line['step'] for line in _lines(tmp_path) if line['split'] == 'val'] == [12, 20]
    train.train_and_evaluate(config, str(tmp_path))
    chex.assert_trees_all_equal(_state(config, tmp_path), _state(config, workdir))


def test_reading_a_checkpoint_leaves_a_save_under_way_alone(uninterrupted, tmp_path):
    """Evaluating in the middle of somebody's training must not remove what orbax is writing there."""
    _, workdir, _ = uninterrupted
    shutil.copytree(workdir / 'checkpoints', tmp_path / 'checkpoints')
    under_way = tmp_path / 'checkpoints' / '31.orbax-checkpoint-tmp'
    under_way.mkdir()
    assert loading.load_checkpoint(str(tmp_path)).step
    time.sleep(3)  # orbax cleans up in the background
    assert under_way.exists()


def test_config_keys_that_mean_nothing_or_are_missing(tmp_path):
    config = _config()
    with config.unlocked():
        config.optim.pateince = 3
    with pytest.raises(UserError, match="unknown config key 'optim.pateince'. Did you mean 'patience'"):
        train.train_and_evaluate(config, str(tmp_path / 'run'))
    config = _config()
    del config.on_nonfinite
    with pytest.raises(UserError, match="missing config key 'on_nonfinite'"):
        train.train_and_evaluate(config, str(tmp_path / 'run'))


def test_checkpoints_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match='there is no checkpoint at'):
        loading.load_checkpoint(str(tmp_path))
    (tmp_path / 'checkpoints').mkdir()
    with pytest.raises(UserError, match='there is no checkpoint in .* yet'):
        loading.load_checkpoint(str(tmp_path))


def _edit_meta(workdir, edit):
    (path,) = (workdir / 'checkpoints').glob('*/meta/metadata')
    meta = json.loads(path.read_text())
    edit(meta['config'])
    path.write_text(json.dumps(meta))
    checksums.write(str(path.parent.parent))


def test_a_run_of_another_version_is_refused(uninterrupted, tmp_path):
    config, workdir, _ = uninterrupted
    shutil.copytree(workdir / 'checkpoints' / '30', tmp_path / 'checkpoints' / '30')
    _edit_meta(tmp_path, lambda config: config['model'].update(tanh=True))
    with pytest.raises(UserError, match=r'a run with another config \(model.tanh: True -> None\); use the same'):
        train.train_and_evaluate(config, str(tmp_path))
    with pytest.raises(UserError, match='checkpoints/30 is of another version: model.tanh is unknown'):
        loading.load_checkpoint(str(tmp_path))
    _edit_meta(tmp_path, lambda config: config.pop('model'))
    with pytest.raises(UserError, match='checkpoints/30 cannot be read'):
        loading.load_checkpoint(str(tmp_path))


@pytest.mark.parametrize('number', [None, 2, 4])
def test_a_checkpoint_of_another_format_is_refused(number, uninterrupted, tmp_path):
    """None: before formats had a number."""
    config, workdir, _ = uninterrupted
    step = shutil.copytree(workdir / 'checkpoints' / '30', tmp_path / 'checkpoints' / '30')
    path = step / 'meta' / 'metadata'
    meta = json.loads(path.read_text())
    assert meta.pop('format') == 3
    path.write_text(json.dumps(meta if number is None else {**meta, 'format': number}))
    checksums.write(str(step))
    message = f'30 is of another version: its format is {number or 1}, and this version of alexnet_jax reads 3; use the'
    with pytest.raises(UserError, match=message):
        loading.load_checkpoint(str(tmp_path))
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(config, str(tmp_path))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'config': []}, 'step 30 was not written by alexnet_jax train; use another --workdir'),
        ({'fingerprint': None}, 'step 30 was not written by'),
        ({'log': 5}, 'step 30 was not written by'),
        ({'log': {'steps': 'two'}}, 'step 30 was not written by'),
        ({'log': {'window': [0.0, 0.0, 0, 0]}}, 'step 30 was not written by'),
        ({'log': {'stall': [0.0, 0.0, 0]}}, 'step 30 was not written by'),
        ({'log': {'sums': {}}}, 'step 30 was not written by'),
        ({'log': {'norms': 1.0}}, 'step 30 was not written by'),
        ({'log': {'window': 3}}, 'step 30 was not written by'),
        ({'log': {'error': [1.0]}}, 'step 30 was not written by'),
        ({'log': {'steps': {}}}, 'step 30 was not written by'),
        ({'config': {'model': 3, 'data': {}}}, 'a run with another config .*model: 3 -> '),
        ({'examples': 10}, 'was trained on other data'),
    ],
)
def test_a_workdir_that_somebody_else_made_is_one_line(change, message, uninterrupted, tmp_path):
    """With digests that fit."""
    config, workdir, _ = uninterrupted
    shutil.copytree(workdir / 'checkpoints' / '30', tmp_path / 'checkpoints' / '30')
    path = tmp_path / 'checkpoints' / '30' / 'meta' / 'metadata'
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    checksums.write(str(tmp_path / 'checkpoints' / '30'))
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(config, str(tmp_path))


def test_a_damaged_checkpoint_is_named(uninterrupted, tmp_path):
    config, workdir, _ = uninterrupted
    shutil.copytree(workdir / 'checkpoints' / '30', tmp_path / 'checkpoints' / '30')
    shutil.rmtree(tmp_path / 'checkpoints' / '30' / 'params')
    for path in (tmp_path, tmp_path / 'checkpoints', f'{tmp_path}/checkpoints/30/'):
        with pytest.raises(UserError, match=r'damaged: .*checkpoints/30/params/_METADATA: missing. There is no other'):
            loading.load_checkpoint(str(path))
    with pytest.raises(UserError, match=r'no checkpoint in .* is whole: .*/30/params/_METADATA: missing'):
        train.train_and_evaluate(config, str(tmp_path))
    assert (tmp_path / 'checkpoints' / '30').exists()  # nothing is thrown away


def test_a_folder_that_has_another_steps_name_is_not_gone_on_with(uninterrupted, tmp_path):
    config, workdir, _ = uninterrupted
    shutil.copytree(workdir / 'checkpoints' / '30', tmp_path / 'checkpoints' / '100')
    with pytest.raises(UserError, match='checkpoints/100 contains the state of step 30; rename the folder to 30'):
        train.train_and_evaluate(config, str(tmp_path))


def test_a_damaged_line_of_the_metrics_costs_no_other(tmp_path, capsys):
    def line(step, split='train'):
        return json.dumps({'step': step, 'split': split}) + '\n'

    path = tmp_path / 'metrics.jsonl'
    path.write_text(line(1) + line(2)[1:] + line(30) + line(4) + line(5) + line(5, 'val') + line(6) + '{"st')
    metric_writer.MetricWriter(str(tmp_path), 5, validated=False).close()
    assert path.read_text() == line(1) + line(4) + line(5)
    assert capsys.readouterr().err == f'warning: {path}: line 2 cannot be read and is removed.\n'


def test_other_software_or_cores_than_before_are_told(tmp_path, capsys):
    now = describe_environment()
    warn_of_changes(str(tmp_path), now)  # of an earlier start nothing is known
    metric_writer.write_json(str(tmp_path), {'environment': now})
    warn_of_changes(str(tmp_path), {**now, 'commit': 'another', 'command': []})
    assert not capsys.readouterr().err
    warn_of_changes(str(tmp_path), {**now, 'cores': 77, 'versions': {**now['versions'], 'jax': '9.9'}})
    assert f'cores {now["cores"]} -> 77; jax {jax.__version__} -> 9.9: the run continues' in capsys.readouterr().err


def test_the_commit_is_not_that_of_a_repository_around_the_package(tmp_path):
    package = tmp_path / 'venv' / 'lib' / 'alexnet_jax'
    shutil.copytree(ROOT / 'alexnet_jax', package)
    script = "from alexnet_jax.utils.environment import describe_environment as d; print(d()['commit'])"
    for repository, known in ((tmp_path, False), (package.parent, True)):
        subprocess.run(['git', 'init', '-q'], cwd=repository, check=True)
        who = ['-c', 'user.name=a', '-c', 'user.email=b']
        subprocess.run(['git', *who, 'commit', '-q', '--allow-empty', '-m', 'c'], cwd=repository, check=True)
        done = subprocess.run([sys.executable, '-c', script], cwd=package.parent, capture_output=True, text=True)
        assert (len(done.stdout.strip()) >= 40) == known, done.stdout + done.stderr


@pytest.mark.slow
def test_the_steps_of_a_run_follow_its_config():
    """What `data` says of color reaches the jitted step: off after an epoch of 1,437 / 64 = 22.45 updates."""
    on = build.build(_config(**{'data.color_std': 5.0, 'data.color_scale': 'std', 'data.color_epochs': 1.0}))
    off = build.build(_config(**{'data.color_std': 0.0}))
    batch, key = _first_batch(on), jax.random.key(0)
    quiet = {**batch, 'color': np.zeros_like(batch['color'])}

    def loss(run, batch, updates):
        """After so many updates, and two batches that were left out."""
        state = run.steps.init(key)
        step, count = jax.device_put((jnp.int32(updates + 2), jnp.int32(updates)), sharding.replicated(run.mesh))
        state = state._replace(step=step, opt_state=state.opt_state._replace(count=count))
        return float(run.steps.train_step(state, sharding.to_mesh(run.mesh, batch), run.image_stats, key)[1]['loss'])

    assert loss(on, batch, 22) == loss(off, quiet, 22)
    assert abs(loss(on, batch, 21) - loss(off, quiet, 21)) > 0.1
    never = build.build(_config(**{'data.color_std': 5.0, 'data.color_epochs': 0.01}))  # less than an update
    assert loss(never, batch, 0) == loss(off, quiet, 0)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [{'data': 1, 'tower': 1}, {'data': 2, 'tower': 2}])
def test_images_kept_in_memory_or_on_the_device_are_the_same(mesh):
    """The same pixels and the same draws, wherever the records lie; the update is that of the batch cut on the host."""
    changes = {'data.image_size': 29, 'data.reflect': True, **{f'mesh.{name}': n for name, n in mesh.items()}}
    runs = {where: build.build(_config(**{'data.cache': where, **changes})) for where in ('', 'host', 'device')}
    found = {}
    for where, run in runs.items():
        batches = run.train_batches(20)  # straddles two passes
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
    # Each device cuts what it has.
    cut = jax.jit(lambda batch: augment.crop_on_device(batch, 29))
    text = cut.lower(runs['host'].to_mesh(found['host'][0])).compile().as_text()
    assert not re.findall('all-gather|all-reduce|all-to-all|collective-permute', text)


@pytest.mark.slow
def test_images_kept_in_memory_are_resized_there_where_they_have_to_be():
    changes = {'data.crop_area': (0.3, 1.0), 'data.mean': 'channel'}
    runs = {where: build.build(_config(**{'data.cache': where, **changes})) for where in ('', 'host')}
    for a, b in zip(*(itertools.islice(run.train_batches(20), 3) for run in runs.values()), strict=True):
        chex.assert_trees_all_equal(a, b)


def test_what_cannot_be_kept_in_memory_is_refused(monkeypatch, tmp_path):
    """1,437 images of 32 px take 4.4 MB, and with a copy for each of four CPU devices five times as much."""
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
            build.build(_config(**{'data.cache': where}))
        monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')  # processes that share it
        assert processes.memory() == memory // 4
        monkeypatch.delenv('LOCAL_WORLD_SIZE')
    container.write_text('5600000')
    build.build(_config(**{'data.cache': 'host'}))


def _quickstart(**changes):
    config = alexnet_jax.get_config('quickstart')
    config.update_from_flattened_dict({'mesh.tower': 1, 'mesh.data': 1, **changes})
    return build.build(config)


@pytest.mark.slow
def test_gradients_in_bfloat16_point_where_those_in_float32_do():
    found = {}
    for dtype in ('float32', 'bfloat16'):
        run = _quickstart(**{'model.dtype': dtype})
        state, batch = run.steps.init(jax.random.key(0)), _first_batch(run)
        x = augment.preprocess(batch, run.image_stats, run.augmentation)
        masks = model.dropout_masks(run.network, jax.random.key(1), len(x), 32)
        forward = sharding.forward(run.network, run.mesh)
        loss = jax.jit(jax.grad(train_step.loss_and_sums, has_aux=True), static_argnames='forward')
        found[dtype], sums = loss(state.params, x, batch, masks, forward=forward)
        assert sums['loss'].dtype == jnp.float32
        assert {leaf.dtype for leaf in jax.tree.leaves((state.params, found[dtype]))} == {jnp.dtype('float32')}
    for a, b in zip(*map(jax.tree.leaves, found.values()), strict=True):
        a, b = np.ravel(a).astype(float), np.ravel(b).astype(float)
        assert a @ b > 0.99 * np.linalg.norm(a) * np.linalg.norm(b)
        assert abs(np.linalg.norm(b) / np.linalg.norm(a) - 1) < 0.05
        assert (a != b).any()  # it was another precision


def test_bfloat16_over_two_towers_of_a_cpu_is_refused():
    """XLA's compiler would end the process."""
    changes = {'model.dtype': 'bfloat16', 'mesh.data': 1}
    with pytest.raises(UserError, match=r"'bfloat16' with mesh.tower=2: .*; use --config.mesh.tower=1 or"):
        build.build(_config(**changes, **{'mesh.tower': 2}))
    build.build(_config(**changes, **{'mesh.tower': 1}))


@pytest.mark.slow
def test_training_in_bfloat16_tracks_float32():
    """60 updates of the quickstart: from 2.3 (guessing) to about 1.2 in both, within what two seeds differ by."""
    means = {}
    for dtype in ('float32', 'bfloat16'):
        run = _quickstart(**{'model.dtype': dtype})
        state, key, batches, losses = (
            run.steps.init(jax.random.key(0)),
            jax.random.key(0),
            run.train_batches(0),
            [],
        )
        for _ in range(60):
            state, report = run.steps.train_step(state, run.to_mesh(next(batches)), run.image_stats, key)
            losses.append(report['loss'] / report['weight'])
        batches.close()
        means[dtype] = np.mean(jax.device_get(losses[-15:]))
    assert max(means.values()) < 1.6
    assert abs(means['bfloat16'] - means['float32']) < 0.3, means


def test_deterministic_reaches_the_compiler(monkeypatch):
    """Of each program of a run: a validation, too, decides on rates and on which checkpoint is the best."""
    options, jit = [], jax.jit
    monkeypatch.setattr(jax, 'jit', lambda *a, **k: options.append(k.get('compiler_options')) or jit(*a, **k))
    for deterministic in (False, True):
        options.clear()
        run = build.build(_config(deterministic=deterministic))
        assert len(options) >= 3
        assert all(given.get('xla_gpu_deterministic_ops', False) is deterministic for given in options)
    state, batch = run.steps.init(jax.random.key(0)), run.to_mesh(_first_batch(run))
    run.steps.train_step(state, batch, run.image_stats, jax.random.key(0))  # the CPU's compiler takes it too


@pytest.mark.slow
def test_a_run_ends_at_the_error_it_is_to_reach(tmp_path, capsys):
    """At the first line that is there; a lower one lets it go on, as one that was never stopped."""
    changes = {'num_steps': 60, 'log_every_steps': 5, 'eval_every_steps': 30, 'checkpoint_every_steps': 30}
    whole = small.digits_config(**changes)
    train.train_and_evaluate(whole, str(tmp_path / 'whole'))
    errors = [line['top1_error'] for line in _lines(tmp_path / 'whole') if line['split'] == 'train']
    first = next(i for i, error in enumerate(errors) if 0 < i < 10 and error == min(errors[: i + 1]))
    config = small.digits_config(**changes, stop_at_error=errors[first])
    result = train.train_and_evaluate(config, str(tmp_path / 'run'))
    lines = [line for line in _lines(tmp_path / 'run') if line['split'] == 'train']
    assert [line['step'] for line in lines] == [5 * (i + 1) for i in range(first + 1)]
    assert 'top1_error' in result
    train.train_and_evaluate(config, str(tmp_path / 'run'))
    assert 'Lower stop_at_error to continue' in capsys.readouterr().out
    train.train_and_evaluate(whole, str(tmp_path / 'run'))
    assert [line for line in _untimed(tmp_path / 'run') if line['split'] == 'train'] == [
        line for line in _untimed(tmp_path / 'whole') if line['split'] == 'train'
    ]
    chex.assert_trees_all_equal(_state(whole, tmp_path / 'run').params, _state(whole, tmp_path / 'whole').params)


def test_a_fraction_of_the_images_is_what_an_epoch_has():
    config = small.digits_config(**{'data.fraction': 0.25})
    run = build.build(config)
    assert run.num_examples == round(0.25 * 1437) == 359
    assert run.total_steps == -(-359 * 20 // 64)
    for bad in (0.0, 1.5):
        with pytest.raises(UserError, match='data.fraction'):
            build.build(small.digits_config(**{'data.fraction': bad}))


def test_a_line_written_for_a_save_ends_a_run_like_any_other(tmp_path, capsys):
    """Lines are due every 10 steps; a save at 4 writes one. A run that goes on from there must not know better."""
    cadences = {'num_steps': 10, 'log_every_steps': 10, 'eval_every_steps': 10, 'checkpoint_every_steps': 4}
    whole = small.digits_config(**cadences)
    train.train_and_evaluate(whole, str(tmp_path / 'whole'))
    first = next(line for line in _lines(tmp_path / 'whole') if line['split'] == 'train')
    assert first['step'] == 4
    config = small.digits_config(**cadences, stop_at_error=first['top1_error'] + 0.01)
    result = train.train_and_evaluate(config, str(tmp_path / 'run'))
    assert [(line['step'], line['split']) for line in _lines(tmp_path / 'run')] == [(4, 'train'), (4, 'val')]
    assert result['top1_error'] == _lines(tmp_path / 'run')[-1]['top1_error']
    assert train.train_and_evaluate(config, str(tmp_path / 'run')) == {}
    assert 'is finished: step 4 of 10. Lower stop_at_error' in capsys.readouterr().out


def test_sigterm_does_not_end_the_program_while_the_last_step_is_saved(tmp_path, monkeypatch):
    """The handler is there until the digests are written; after that the program's own is back."""
    seen, write = [], checksums.write

    def slowly(folder):
        time.sleep(1)  # the loop is over by then
        seen.append(signal.getsignal(signal.SIGTERM))
        write(folder)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(checksums, 'write', slowly)
    train.train_and_evaluate(small.digits_config(num_steps=2), str(tmp_path))
    assert len(seen) == 1 and seen[0] != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_a_profile_is_of_the_updates_asked_for(tmp_path, capsys):
    config = small.digits_config(num_steps=6, eval_every_steps=6)
    train.train_and_evaluate(config, str(tmp_path), profile=2)
    (trace,) = (tmp_path / 'profile').rglob('*.xplane.pb')
    assert b'train_step' in trace.read_bytes()
    train.train_and_evaluate(small.digits_config(num_steps=4), str(tmp_path / 'again'), profile=9)  # shorter than that
    assert list((tmp_path / 'again' / 'profile').rglob('*.xplane.pb'))
    train.train_and_evaluate(small.digits_config(num_steps=2), str(tmp_path / 'short'), profile=1)
    assert 'only 2 remain: nothing is traced' in capsys.readouterr().err
