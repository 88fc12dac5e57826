"""Parts of later recipes: schedules, mixup, smoothed labels, average of the parameters. LARS: test_optim.py."""

import math
import os
import shutil
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax.checkpoints import manager
from alexnet_jax.convert import loading
from alexnet_jax.core import train_step
from alexnet_jax.training import recipes, restore, train
from alexnet_jax.utils.config_files import get_config
from alexnet_jax.utils.errors import UserError
from tests import helpers

ALL = {
    'optim.schedule': 'cosine',
    'optim.warmup_epochs': 0.1,
    'optim.label_smoothing': 0.1,
    'optim.average_decay': 0.8,
    'data.mixup_alpha': 0.5,
}


def _rates(**changes):
    """Returns the learning rates of six updates, with an epoch of ten updates."""
    optimizer = helpers.optimizer(helpers.network(), total_steps=6, **changes)
    state = optimizer.tx.init({'conv1': {'kernel': jnp.zeros(1), 'bias': jnp.zeros(1)}})
    return [float(optimizer.learning_rate(state._replace(count=jnp.int32(i)))) / 0.01 for i in range(6)]


def test_cosine_falls_from_one_to_zero():
    halves = [1, 0.5 * (1 + math.sqrt(3) / 2), 0.75, 0.5, 0.25, 0.5 * (1 - math.sqrt(3) / 2)]  # cos of 0, 30, ... 150°
    assert _rates(schedule='cosine') == pytest.approx(halves, abs=1e-6)


def test_cosine_starts_after_warmup():
    """Two updates of warm-up, then cos of 0, 45, 90 and 135 degrees."""
    root = math.sqrt(0.5)
    expected = [0.5, 1, 1, (1 + root) / 2, 0.5, (1 - root) / 2]
    assert _rates(schedule='cosine', warmup_epochs=0.2) == pytest.approx(expected, abs=1e-6)


def test_poly_without_warmup_is_a_square():
    assert _rates(schedule='poly') == pytest.approx([1, 25 / 36, 16 / 36, 9 / 36, 4 / 36, 1 / 36], abs=1e-6)


def test_poly_rises_quadratically_and_counts_warmup():
    """Four updates of warm-up from a fifth: 0.2 + 0.8 * (0, 1/16, 4/16, 9/16); then (1 - 4/6)^2 and (1 - 5/6)^2."""
    expected = [0.2, 0.25, 0.4, 0.65, 4 / 36, 1 / 36]
    assert _rates(schedule='poly', warmup_epochs=0.4, warmup_start=0.2) == pytest.approx(expected, abs=1e-6)


def test_parts_are_off_in_the_papers_config():
    config = get_config('paper')
    assert recipes.optimizer_hooks(config.optim, 10.0, 100) == {}
    assert recipes.step_hooks(config) == {}


def test_mixup_matches_loop():
    rng = np.random.default_rng(0)
    x, label = rng.normal(size=(6, 2, 2, 3)).astype(np.float32), np.arange(6)
    weight = np.array([1, 1, 1, 0, 1, 1], np.float32)  # image 3 could not be read
    batch = {'label': jnp.asarray(label), 'weight': jnp.asarray(weight)}
    mixed, new = recipes.mixup(jnp.asarray(x), batch, jax.random.key(1), alpha=0.5)
    m = float(new['mix'][0])
    assert 0 < m < 1
    for i, partner, own in ((0, 1, m), (1, 0, m), (2, 3, 1), (3, 2, 1), (4, 5, m), (5, 4, m)):
        chex.assert_trees_all_close(mixed[i], own * x[i] + (1 - own) * x[partner], rtol=1e-6)
        assert (int(new['other_label'][i]), float(new['mix'][i])) == (partner, pytest.approx(own))


def test_mixup_draws_from_the_beta_distribution():
    """Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1)): 0.1786 for a = 0.2."""
    batch = {'label': jnp.zeros(2, jnp.int32), 'weight': jnp.ones(2)}
    draw = lambda key: recipes.mixup(jnp.zeros((2, 1, 1, 3)), batch, key, alpha=0.2)[1]['mix'][0]  # noqa: E731
    draws = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), 4000)))
    assert draws.mean() == pytest.approx(0.5, abs=0.03)
    assert draws.var() == pytest.approx(1 / (4 * 1.4), abs=0.01)


@pytest.mark.parametrize('mixed', [False, True])
def test_likelihood_is_the_cross_entropy_with_its_targets(mixed):
    rng = np.random.default_rng(0)
    logits, label, other, m = rng.normal(size=(4, 5)), np.array([0, 3, 2, 4]), np.array([1, 3, 0, 0]), 0.3
    one_hot = np.eye(5)
    target = m * one_hot[label] + (1 - m) * one_hot[other] if mixed else one_hot[label]
    target = 0.9 * target + 0.1 / 5
    expected = (target * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum(1)
    batch = {'label': jnp.asarray(label)}
    batch |= {'other_label': jnp.asarray(other), 'mix': jnp.full(4, m)} if mixed else {}
    found = recipes.log_likelihood(jnp.asarray(logits), batch, smoothing=0.1)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)
    if not mixed:
        smoothed = optax.smooth_labels(jnp.asarray(one_hot[label]), 0.1)
        chex.assert_trees_all_close(found, -optax.softmax_cross_entropy(jnp.asarray(logits), smoothed), rtol=1e-5)


def test_average_of_parameters_matches_loop():
    """Ten updates by the gradient 1. The average forgets the initial parameters, and then decays with at most 0.3."""
    optimizer = helpers.optimizer(helpers.network(), average_decay=0.3, schedule='epochs', stages=((0, 1, 1, ()),))
    params = {'conv1': {'kernel': jnp.full(2, 5.0), 'bias': jnp.zeros(2)}}
    state, w, v, average = optimizer.tx.init(params), 5.0, 0.0, 5.0
    for t in range(10):
        updates, state = optimizer.tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
        v = 0.9 * v - 0.01 * (1 + 0.0005 * w)
        w += v
        decay = min(0.3, t / (t + 10))
        average = decay * average + (1 - decay) * w
    chex.assert_trees_all_close(state.average['conv1']['kernel'], np.full(2, average), rtol=1e-6)
    swapped = train_step.TrainState(jnp.int32(10), params, state).swap_average()
    chex.assert_trees_all_equal((swapped.params, swapped.opt_state.average), (state.average, params))


def _without_a_key(config):
    """Returns the config as an earlier version would have saved it, before it had the key of LARS."""
    saved = manager.config_to_json(config)
    del saved['optim']['trust_coefficient']
    return saved


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run with all parts, its workdir and its result."""
    workdir, config = tmp_path_factory.mktemp('run'), helpers.run_config(**ALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'config_to_json', _without_a_key)
        return config, workdir, train.train_and_evaluate(config, workdir)


@pytest.mark.slow
def test_checkpoint_has_the_averaged_parameters(run):
    config, workdir, result = run
    state = helpers.last_state(config, workdir)
    last = loading.load_checkpoint(workdir / 'checkpoints' / str(state.step))
    chex.assert_trees_all_equal(last.params, state.opt_state.average)
    assert any(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (last.params, state.params)), strict=True))
    # The validation was computed with them.
    val = [line for line in helpers.read_metrics(workdir) if line['split'] == 'val'][-1]
    assert val['top1_error'] == result['top1_error'] < 90


@pytest.mark.slow
def test_run_with_all_parts_resumes_bit_exactly(run, tmp_path):
    config, workdir, _ = run
    step = min(int(name) for name in os.listdir(workdir / 'checkpoints'))
    shutil.copytree(workdir / 'checkpoints' / str(step), tmp_path / 'checkpoints' / str(step))
    assert 0 < step < 30
    assert (
        'trust_coefficient' not in loading.load_checkpoint(tmp_path).config['optim']
    )  # a key that is off has no effect
    train.train_and_evaluate(config, tmp_path)
    chex.assert_trees_all_equal(helpers.last_state(config, tmp_path), helpers.last_state(config, workdir))


def test_keys_without_effect_are_named(monkeypatch):
    said = []
    monkeypatch.setattr(train.distributed, 'warn', said.append)
    mesh, dataset = types.SimpleNamespace(devices=np.array([jax.devices()[:1]])), types.SimpleNamespace(splits=['val'])
    for changes in (
        {'optim.warmup_start': 0.1}, {'optim.trust_clip': True}, {'optim.stages': ((0, 1, 1, ()),)},
        {'mesh.dense': 'split'}, {},
    ):  # fmt: skip
        changes = {'optim.schedule': 'poly', 'optim.stages': (), **changes}
        train._describe_setup(types.SimpleNamespace(mesh=mesh, dataset=dataset, config=helpers.run_config(**changes)))
    assert said == [
        'optim.warmup_start=0.1 has no effect with optim.warmup_epochs=0.',
        'optim.trust_clip=True has no effect with optim.trust_coefficient=0.',
        "optim.stages has no effect with optim.schedule='poly'; use 'epochs'.",
        "mesh.dense='split' has no effect with mesh.data=1.",
    ]


@pytest.mark.parametrize('schedule', ['cosine', 'poly'])
def test_length_is_fixed_by_a_schedule_over_it(schedule):
    new = {'optim': {'schedule': schedule}, 'num_steps': 40}
    assert restore.config_differences({**new, 'num_steps': 30}, new) == ['num_steps: 30 -> 40']
    assert not restore.config_differences({'num_steps': 30}, {'num_steps': 40})


@pytest.mark.slow
def test_cosine_run_cannot_change_its_length(run):
    config, workdir, _ = run
    longer = config.copy_and_resolve_references()
    longer.num_steps += 10
    with pytest.raises(UserError, match='contains a run with another config .num_steps: 30 -> 40'):
        train.train_and_evaluate(longer, workdir)


def test_mixup_needs_an_even_number_per_microbatch(tmp_path):
    config = helpers.run_config(**ALL, batch_size=12, grad_accum_steps=2)
    with pytest.raises(UserError, match='an even number of images per device and microbatch'):
        train.train_and_evaluate(config, tmp_path)
