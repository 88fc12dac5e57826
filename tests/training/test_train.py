"""The training loop: early ends, skipped batches, warnings. Small networks on the embedded digits."""

import os
import signal
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.convert import loading
from alexnet_jax.core import train_step
from alexnet_jax.data import datasets, pipeline
from alexnet_jax.training import build, train
from alexnet_jax.utils import checksums
from alexnet_jax.utils.errors import DivergedError
from tests import helpers


@pytest.mark.slow
def test_divergence_stops_and_saves_nothing(tmp_path, capsys):
    with pytest.raises(
        DivergedError, match=r'step \d+: loss, gradient or update is not finite \(learning rate 1e\+30\)'
    ):
        train.train_and_evaluate(
            helpers.run_config(**{'optim.learning_rate': 1e30, 'optim.schedule': 'plateau'}), str(tmp_path)
        )
    assert not os.listdir(tmp_path / 'checkpoints')
    # Nothing was saved, so the remedy may be tried in the same workdir. If checkpoints got lost, the message tells.
    (tmp_path / 'metrics.jsonl').write_text('{"step": 7, "split": "train"}\n{"step": 8, "sp')
    train.train_and_evaluate(helpers.run_config(num_steps=2), str(tmp_path))
    assert f'{tmp_path} has no checkpoint; the 7 steps in its metrics.jsonl are run again' in capsys.readouterr().err
    assert [line['step'] for line in helpers.read_metrics(tmp_path) if line['split'] == 'train'] == [1, 2]


def test_nonfinite_step_changes_nothing():
    run = build.build(helpers.run_config())
    state = run.steps.init(jax.random.key(0))
    before = jax.device_get(state)
    batch = helpers.first_batch(run)
    batch['color'][3] = np.nan
    after, report = run.steps.train_step(state, batch, run.image_stats, jax.random.key(1))
    after = jax.device_get(after)
    assert not report['finite'] and int(after.step) == 1
    chex.assert_trees_all_equal((after.params, after.opt_state), (before.params, before.opt_state))


def test_dropout_masks_depend_on_the_step():
    """With rate 0, the same batch has another loss at the next step, and the same loss if the step is repeated."""
    run = build.build(helpers.run_config(**{'optim.learning_rate': 0.0}))
    batch = helpers.first_batch(run)
    losses = []
    for step in (0, 1, 1):
        state = run.steps.init(jax.random.key(0))._replace(step=jnp.int32(step))
        losses.append(float(run.steps.train_step(state, batch, run.image_stats, jax.random.key(1))[1]['loss']))
    assert losses[0] != losses[1] == losses[2]


def test_on_nonfinite_skip_drops_the_batch(tmp_path, monkeypatch, capsys):
    batches = pipeline.train_batches

    def batches_with_nan(*args, **kwargs):
        for i, batch in enumerate(batches(*args, **kwargs)):
            if i == 2:
                batch['color'][:] = np.nan
            yield batch

    monkeypatch.setattr(build.pipeline, 'train_batches', batches_with_nan)
    train.train_and_evaluate(helpers.run_config(num_steps=5, on_nonfinite='skip'), str(tmp_path))
    assert 'is not finite (learning rate 0.01); skipping the batch (1 of at most' in capsys.readouterr().err
    lines = [line for line in helpers.read_metrics(tmp_path) if line['split'] == 'train']
    assert [line['step'] for line in lines] == [1, 2, 4, 5] and all(np.isfinite(line['loss']) for line in lines)


def test_steps_are_compiled_once(tmp_path, monkeypatch):
    """Through validation, rate drops, saving and resuming, each step is traced once per run."""
    config = helpers.run_config(**{'optim.schedule': 'plateau', 'optim.patience': 1})
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


def test_plateau_without_val_split_warns_once(tmp_path, capsys):
    digits = datasets.open_dataset('digits')
    no_val = digits._replace(splits={'train': digits.splits['train']})
    config = helpers.run_config(num_steps=13, **{'optim.schedule': 'plateau'})
    result = train.train_and_evaluate(config, str(tmp_path), dataset=no_val)
    assert result == {}
    told = capsys.readouterr().err
    assert told.count('no val split') == 1
    assert 'never lowers the rate' in told
    assert {line['split'] for line in helpers.read_metrics(tmp_path)} == {'train'}
    assert len({line['learning_rate'] for line in helpers.read_metrics(tmp_path)}) == 1
    assert loading.load_checkpoint(str(tmp_path)).step == 13  # the latest, since there is no best

    config.optim.schedule = 'cosine'
    config.num_steps = 1
    train.train_and_evaluate(config, str(tmp_path / 'cosine'), dataset=no_val)
    assert 'no val split: nothing is evaluated.' in capsys.readouterr().err


@pytest.mark.slow
def test_run_stops_at_the_target_error(tmp_path, capsys):
    """It stops at the first line at or below the error; with a lower target it continues like an uninterrupted run."""
    changes = {'num_steps': 60, 'log_every_steps': 5, 'eval_every_steps': 30, 'checkpoint_every_steps': 30}
    whole = helpers.digits_config(**changes)
    train.train_and_evaluate(whole, str(tmp_path / 'whole'))
    errors = [line['top1_error'] for line in helpers.read_metrics(tmp_path / 'whole') if line['split'] == 'train']
    first = next(i for i, error in enumerate(errors) if 0 < i < 10 and error == min(errors[: i + 1]))
    config = helpers.digits_config(**changes, stop_at_error=errors[first])
    result = train.train_and_evaluate(config, str(tmp_path / 'run'))
    lines = [line for line in helpers.read_metrics(tmp_path / 'run') if line['split'] == 'train']
    assert [line['step'] for line in lines] == [5 * (i + 1) for i in range(first + 1)]
    assert 'top1_error' in result
    train.train_and_evaluate(config, str(tmp_path / 'run'))
    assert 'Lower stop_at_error to continue' in capsys.readouterr().out
    train.train_and_evaluate(whole, str(tmp_path / 'run'))
    assert [line for line in helpers.untimed_metrics(tmp_path / 'run') if line['split'] == 'train'] == [
        line for line in helpers.untimed_metrics(tmp_path / 'whole') if line['split'] == 'train'
    ]
    chex.assert_trees_all_equal(
        helpers.last_state(whole, tmp_path / 'run').params, helpers.last_state(whole, tmp_path / 'whole').params
    )


def test_line_written_for_a_save_can_stop_the_run(tmp_path, capsys):
    """Lines are due every 10 steps, and a save at step 4 writes one. A resumed run must end the same."""
    cadences = {'num_steps': 10, 'log_every_steps': 10, 'eval_every_steps': 10, 'checkpoint_every_steps': 4}
    whole = helpers.digits_config(**cadences)
    train.train_and_evaluate(whole, str(tmp_path / 'whole'))
    first = next(line for line in helpers.read_metrics(tmp_path / 'whole') if line['split'] == 'train')
    assert first['step'] == 4
    config = helpers.digits_config(**cadences, stop_at_error=first['top1_error'] + 0.01)
    result = train.train_and_evaluate(config, str(tmp_path / 'run'))
    assert [(line['step'], line['split']) for line in helpers.read_metrics(tmp_path / 'run')] == [
        (4, 'train'),
        (4, 'val'),
    ]
    assert result['top1_error'] == helpers.read_metrics(tmp_path / 'run')[-1]['top1_error']
    assert train.train_and_evaluate(config, str(tmp_path / 'run')) == {}
    assert 'is finished: step 4 of 10. Lower stop_at_error' in capsys.readouterr().out


def test_sigterm_is_deferred_while_the_last_step_is_saved(tmp_path, monkeypatch):
    """The handler stays until the checksums are written; then the previous handler is restored."""
    seen, write = [], checksums.write

    def write_slowly(folder):
        time.sleep(1)  # until the training loop has ended
        seen.append(signal.getsignal(signal.SIGTERM))
        write(folder)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(checksums, 'write', write_slowly)
    train.train_and_evaluate(helpers.digits_config(num_steps=2), str(tmp_path))
    assert len(seen) == 1 and seen[0] != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_profile_covers_the_requested_updates(tmp_path, capsys):
    config = helpers.digits_config(num_steps=6, eval_every_steps=6)
    train.train_and_evaluate(config, str(tmp_path), profile=2)
    (trace,) = (tmp_path / 'profile').rglob('*.xplane.pb')
    assert b'train_step' in trace.read_bytes()
    train.train_and_evaluate(
        helpers.digits_config(num_steps=4), str(tmp_path / 'again'), profile=9
    )  # fewer updates than requested
    assert list((tmp_path / 'again' / 'profile').rglob('*.xplane.pb'))
    train.train_and_evaluate(helpers.digits_config(num_steps=2), str(tmp_path / 'short'), profile=1)
    assert 'only 2 remain: nothing is traced' in capsys.readouterr().err
