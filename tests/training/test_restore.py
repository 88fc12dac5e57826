"""An uninterrupted run: its files, runs that resume from it or are refused, and evaluation of its checkpoints."""

import json
import os
import re
import shutil
import time

import chex
import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from alexnet_jax.checkpoints import manager
from alexnet_jax.convert import loading
from alexnet_jax.core import image_stats, sharding
from alexnet_jax.data import datasets, pipeline
from alexnet_jax.inference import evaluate, predict
from alexnet_jax.training import build, train
from alexnet_jax.utils import checksums
from alexnet_jax.utils.errors import UserError
from tests import ROOT, helpers


def _events(workdir):
    """Returns (step, tag) of every scalar in the workdir's TensorBoard files, in the order written."""
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


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('uninterrupted')
    config = helpers.run_config(**{'optim.schedule': 'plateau', 'optim.patience': 1, 'optim.min_delta': 50.0})
    result = train.train_and_evaluate(config, str(workdir))
    return config, workdir, result


def test_metrics_and_events_of_a_run(uninterrupted):
    config, workdir, result = uninterrupted
    lines = helpers.read_metrics(workdir)
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
    # The first validation is a gain; the next two are not (a gain takes 50 points), and each drops the rate.
    rates = {line['step']: line['learning_rate'] for line in train_lines}
    chex.assert_trees_all_close([rates[s] for s in (12, 24, 25, 30)], [0.01, 0.01, 0.001, 0.001], rtol=1e-6)
    # The first update uses the first batch of the stream and the initial parameters of the seed.
    run = build.build(config)
    batch = helpers.first_batch(run)
    before = jax.device_get(run.steps.init(jax.random.key(0)).params)
    state, report = run.steps.train_step(run.steps.init(jax.random.key(0)), batch, run.image_stats, jax.random.key(0))
    assert float(report['loss']) / 64 == train_lines[0]['loss']
    # The norm of a layer's update is that of its parameter change; the gradient norm combines all layers.
    changes = jax.tree.map(lambda a, b: np.float64(a) - b, jax.device_get(state.params), before)
    for layer, parts in changes.items():
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


def test_last_two_and_best_steps_are_kept(uninterrupted):
    _, workdir, _ = uninterrupted
    errors = {line['step']: line['top1_error'] for line in helpers.read_metrics(workdir) if line['split'] == 'val'}
    saved_with_error = {s: e for s, e in errors.items() if s in (24, 30)}  # saved at 8, 16, 24, 30
    best = min(saved_with_error, key=lambda step: (saved_with_error[step], -step))  # of equal errors, the later step
    kept = {int(name) for name in os.listdir(workdir / 'checkpoints')}
    assert kept == {24, 30, best}
    assert loading.load_checkpoint(str(workdir)).step == best


@pytest.mark.parametrize('stops_at', [5, 27])  # before any save; after a save that followed a rate drop
def test_resume_is_bit_exact(uninterrupted, tmp_path, monkeypatch, stops_at):
    """Training is interrupted some updates after the last save, and metrics.jsonl ends in a partial line."""
    config, workdir, _ = uninterrupted
    _stop_at(config, tmp_path, monkeypatch, stops_at)
    with open(tmp_path / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 23, "spl')
    train.train_and_evaluate(config, str(tmp_path))
    chex.assert_trees_all_equal(helpers.last_state(config, tmp_path), helpers.last_state(config, workdir))
    assert helpers.untimed_metrics(tmp_path) == helpers.untimed_metrics(workdir)
    assert sorted(_events(tmp_path)) == sorted(_events(workdir))  # no step twice
    assert json.dumps(helpers.untimed_metrics(tmp_path)) == json.dumps(helpers.untimed_metrics(workdir))


def _stop_at(config, workdir, monkeypatch, step):
    """Trains until an exception after update `step`."""
    add = train.train_log.TrainLog.add

    def stop(self, now, *args, **kwargs):
        add(self, now, *args, **kwargs)
        if now == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.train_log.TrainLog, 'add', stop)
        train.train_and_evaluate(config, str(workdir))


@pytest.mark.parametrize('off', [0, 1])
def test_resume_starts_at_step_times_batch(uninterrupted, tmp_path, monkeypatch, off):
    """With the stream shifted by one batch (off = 1) the parameters differ at the end; with off = 0 they are equal."""
    config, workdir, _ = uninterrupted
    _stop_at(config, tmp_path, monkeypatch, 27)
    batches = pipeline.train_batches

    def shifted(*args, start_step, **kwargs):
        return batches(*args, start_step=start_step + off, **kwargs)

    monkeypatch.setattr(build.pipeline, 'train_batches', shifted)
    train.train_and_evaluate(config, str(tmp_path))
    a, b = (jax.tree.leaves(helpers.last_state(config, d).params) for d in (tmp_path, workdir))
    assert any((x != y).any() for x, y in zip(a, b, strict=True)) == bool(off)


def test_finished_run_is_reported(uninterrupted, capsys):
    config, workdir, _ = uninterrupted
    before = (workdir / 'metrics.jsonl').read_bytes()
    assert train.train_and_evaluate(config, str(workdir)) == {}
    assert 'is finished: step 30 of 30' in capsys.readouterr().out
    assert (workdir / 'metrics.jsonl').read_bytes() == before


@pytest.mark.slow
def test_resume_with_more_steps_on_another_mesh(uninterrupted, tmp_path):
    config, workdir, _ = uninterrupted
    shutil.copytree(workdir, tmp_path / 'copy')
    longer = helpers.run_config(
        optim=config.optim, num_steps=34, **{'mesh.data': 1, 'mesh.tower': 1, 'data.num_threads': 1}
    )
    train.train_and_evaluate(longer, str(tmp_path / 'copy'))
    assert [line['step'] for line in helpers.read_metrics(tmp_path / 'copy') if line['split'] == 'train'] == list(
        range(1, 35)
    )


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'batch_size': 32}, 'batch_size: 64 -> 32'),
        ({'optim.learning_rate': 0.1}, r'optim.learning_rate: 0.01 -> 0.1'),
        ({'model.lrn_n': 3, 'seed': 1}, 'model.lrn_n: 5 -> 3; seed: 0 -> 1'),
    ],
)
def test_workdir_of_another_config_is_refused(uninterrupted, changes, message):
    config, workdir, _ = uninterrupted
    before = {name: (workdir / name).read_bytes() for name in ('config.json', 'metrics.jsonl')}
    changed = config.copy_and_resolve_references()
    for key, value in changes.items():
        changed.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f'contains a run with another config .*{message}.* or another --workdir'):
        train.train_and_evaluate(changed, str(workdir))
    assert before == {name: (workdir / name).read_bytes() for name in before}


@pytest.mark.parametrize('what', ['fewer', 'another order', 'another size'])
def test_resume_with_other_data_is_refused(uninterrupted, tmp_path, what):
    config, workdir, _ = uninterrupted
    shutil.copytree(workdir, tmp_path / 'copy')
    digits = datasets.open_dataset('digits')
    other = {
        'fewer': digits._replace(splits={**digits.splits, 'train': digits.splits['train'][:-1]}),
        'another order': digits._replace(fingerprint='another'),
        'another size': digits._replace(record_size=40, image_stats=image_stats.from_moments(
            image_stats.Moments.zeros(40).add(np.zeros((40, 40, 3), np.uint8)))),
    }[what]  # fmt: skip
    longer = helpers.run_config(optim=config.optim, num_steps=40)
    with pytest.raises(UserError, match='was trained on other data'):
        train.train_and_evaluate(longer, str(tmp_path / 'copy'), dataset=other)


def test_checkpoint_restores_on_any_mesh(uninterrupted):
    config, workdir, _ = uninterrupted
    states = []
    meshes = ((1, 1, 'replicated'), (1, 2, 'split'), (2, 2, 'replicated'), (2, 2, 'split'), (4, 1, 'split'))
    for data_axis, tower, dense in meshes:
        there = config.copy_and_resolve_references()
        there.mesh.data, there.mesh.tower, there.mesh.dense = data_axis, tower, dense
        run = build.build(there)
        with manager.CheckpointManager(str(workdir)) as saved:
            state = saved.restore(30, run.steps.state_shapes)
        kernel = state.params['conv2']['kernel']
        assert kernel.addressable_data(0).shape[-1] == kernel.shape[-1] // tower
        parts, hidden = (data_axis if dense == 'split' else 1) * tower, state.opt_state.velocity['fc6']['kernel']
        assert hidden.addressable_data(0).shape[-1] == hidden.shape[-1] // parts
        assert state.opt_state.velocity['conv2']['kernel'].sharding == kernel.sharding
        states.append(jax.device_get(state))
    for other in states[1:]:
        chex.assert_trees_all_equal(other, states[0])


@pytest.mark.slow
@pytest.mark.parametrize('page', ['README.md', 'docs/python_api.md'])
def test_python_code_of_a_page_runs(page, uninterrupted):
    _, workdir, _ = uninterrupted
    code = '\n'.join(re.findall(r'```python\n(.*?)```', (ROOT / page).read_text(), re.S))
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


def test_checkpoint_evaluates_and_predicts(uninterrupted):
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
    # Ten views: the mean of the softmax outputs of ten crops computed by hand.
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
def test_init_from_copies_parameters(uninterrupted, tmp_path, capsys):
    _, workdir, _ = uninterrupted
    config = helpers.run_config(init_from=str(workdir), num_steps=1, **{'optim.learning_rate': 0.0})
    train.train_and_evaluate(config, str(tmp_path / 'same'))
    old = loading.load_checkpoint(str(workdir)).params
    chex.assert_trees_all_equal(loading.load_checkpoint(str(tmp_path / 'same')).params, old)
    # Another number of classes: the classifier is reinitialized, the other layers are copied.
    digits = datasets.open_dataset('digits')
    twelve = config.copy_and_resolve_references()
    twelve.model.num_classes = 12
    more_classes = digits._replace(class_names=tuple('0123456789ab'))
    train.train_and_evaluate(twelve, str(tmp_path / 'twelve'), dataset=more_classes)
    new = loading.load_checkpoint(str(tmp_path / 'twelve')).params
    assert new['fc8']['kernel'].shape[-1] == 12
    chex.assert_trees_all_equal(
        {k: v for k, v in new.items() if k != 'fc8'}, {k: v for k, v in old.items() if k != 'fc8'}
    )
    # The same number of classes with other names.
    letters = digits._replace(class_names=tuple('abcdefghij'))
    train.train_and_evaluate(config, str(tmp_path / 'letters'), dataset=letters)
    assert 'fc8 starts with new weights of shape (32, 10), because' in capsys.readouterr().out
    new = loading.load_checkpoint(str(tmp_path / 'letters')).params
    assert np.abs(new['fc8']['kernel'] - old['fc8']['kernel']).max() > 0.01
    chex.assert_trees_all_equal(new['fc7'], old['fc7'])
    other = config.copy_and_resolve_references()
    other.model.layers.conv1.features = 4
    with pytest.raises(UserError, match=r'expected a kernel of shape \(5, 5, 3, 4\) for conv1, found shape'):
        train.train_and_evaluate(other, str(tmp_path / 'other'))


@pytest.mark.slow
def test_extended_run_equals_one_planned_longer(uninterrupted, tmp_path):
    """The validation at the first end, outside the interval, does not affect the rate."""
    config, workdir, _ = uninterrupted
    shorter = config.copy_and_resolve_references()
    shorter.num_steps = 20
    train.train_and_evaluate(shorter, str(tmp_path))
    assert [line['step'] for line in helpers.read_metrics(tmp_path) if line['split'] == 'val'] == [12, 20]
    train.train_and_evaluate(config, str(tmp_path))
    chex.assert_trees_all_equal(helpers.last_state(config, tmp_path), helpers.last_state(config, workdir))


def test_reading_a_checkpoint_keeps_a_save_in_progress(uninterrupted, tmp_path):
    """Evaluation during somebody's training must not remove the folder that orbax is writing."""
    _, workdir, _ = uninterrupted
    shutil.copytree(workdir / 'checkpoints', tmp_path / 'checkpoints')
    under_way = tmp_path / 'checkpoints' / '31.orbax-checkpoint-tmp'
    under_way.mkdir()
    assert loading.load_checkpoint(str(tmp_path)).step
    time.sleep(3)  # orbax cleans up in the background
    assert under_way.exists()


def _edit_meta(workdir, edit):
    (path,) = (workdir / 'checkpoints').glob('*/meta/metadata')
    meta = json.loads(path.read_text())
    edit(meta['config'])
    path.write_text(json.dumps(meta))
    checksums.write(str(path.parent.parent))


def test_run_of_another_version_is_refused(uninterrupted, tmp_path):
    config, workdir, _ = uninterrupted
    shutil.copytree(workdir / 'checkpoints' / '30', tmp_path / 'checkpoints' / '30')
    _edit_meta(tmp_path, lambda config: config['model'].update(tanh=True))
    with pytest.raises(UserError, match=r'a run with another config \(model.tanh: True -> None\); use the same'):
        train.train_and_evaluate(config, str(tmp_path))
    with pytest.raises(UserError, match="checkpoints/30 is from another version: unknown config key 'model.tanh'"):
        loading.load_checkpoint(str(tmp_path))
    _edit_meta(tmp_path, lambda config: config.pop('model'))
    with pytest.raises(UserError, match='checkpoints/30 cannot be read'):
        loading.load_checkpoint(str(tmp_path))


@pytest.mark.parametrize('number', [None, 2, 4])
def test_checkpoint_of_another_format_is_refused(number, uninterrupted, tmp_path):
    """None stands for checkpoints from before formats were numbered."""
    config, workdir, _ = uninterrupted
    step = shutil.copytree(workdir / 'checkpoints' / '30', tmp_path / 'checkpoints' / '30')
    path = step / 'meta' / 'metadata'
    meta = json.loads(path.read_text())
    assert meta.pop('format') == 3
    path.write_text(json.dumps(meta if number is None else {**meta, 'format': number}))
    checksums.write(str(step))
    message = f'30 is from another version: its format is {number or 1}, expected 3; use the version'
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
def test_invalid_checkpoint_metadata_is_refused(change, message, uninterrupted, tmp_path):
    """The checksums are valid."""
    config, workdir, _ = uninterrupted
    shutil.copytree(workdir / 'checkpoints' / '30', tmp_path / 'checkpoints' / '30')
    path = tmp_path / 'checkpoints' / '30' / 'meta' / 'metadata'
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    checksums.write(str(tmp_path / 'checkpoints' / '30'))
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(config, str(tmp_path))


def test_damaged_checkpoint_is_named(uninterrupted, tmp_path):
    config, workdir, _ = uninterrupted
    shutil.copytree(workdir / 'checkpoints' / '30', tmp_path / 'checkpoints' / '30')
    shutil.rmtree(tmp_path / 'checkpoints' / '30' / 'params')
    for path in (tmp_path, tmp_path / 'checkpoints', f'{tmp_path}/checkpoints/30/'):
        with pytest.raises(UserError, match=r'damaged: .*checkpoints/30/params/_METADATA: missing. There is no other'):
            loading.load_checkpoint(str(path))
    with pytest.raises(UserError, match=r'all checkpoints in .* are damaged: .*/30/params/_METADATA: missing'):
        train.train_and_evaluate(config, str(tmp_path))
    assert (tmp_path / 'checkpoints' / '30').exists()  # nothing is removed


def test_renamed_step_folder_is_refused(uninterrupted, tmp_path):
    config, workdir, _ = uninterrupted
    shutil.copytree(workdir / 'checkpoints' / '30', tmp_path / 'checkpoints' / '100')
    with pytest.raises(UserError, match='checkpoints/100 contains the state of step 30; rename the folder to 30'):
        train.train_and_evaluate(config, str(tmp_path))
