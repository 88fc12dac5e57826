"""The update against the two equations of section 5, and the plateau schedule against a sequence computed by hand."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax.core import model
from alexnet_jax.utils.errors import UserError
from tests import helpers

DROPS = ((0, 1, 1, ()), (0.3, 0.1, 0.1, ()), (0.6, 0.01, 0.01, ()))  # after 0.3 and 0.6 epochs of 10 updates


def _optimizer(**changes):
    fixed = {'schedule': 'epochs', 'stages': ((0, 1, 1, ()),), 'patience': 2, 'min_delta': 0.5}
    return helpers.optimizer(model.AlexNet(), **{**fixed, **changes})


def _run(optimizer, w, gradients):
    """Applies the same gradients to 'kernel' and 'bias'; returns the history of both parameters and the last state."""
    params = {'conv1': {'kernel': jnp.asarray(w), 'bias': jnp.asarray(w)}}
    state, history = optimizer.tx.init(params), []
    update = jax.jit(optimizer.tx.update)
    for g in gradients:
        updates, state = update({'conv1': {'kernel': jnp.asarray(g), 'bias': jnp.asarray(g)}}, state, params)
        params = optax.apply_updates(params, updates)
        history.append(jax.device_get(params['conv1']))
    return history, state


def test_update_matches_the_paper():
    rng = np.random.default_rng(0)
    w, gradients = rng.standard_normal(5), rng.standard_normal((8, 5))
    with jax.enable_x64():
        history, _ = _run(_optimizer(stages=DROPS), w, gradients)
    for part, decay in (('kernel', 0.0005), ('bias', 0.0)):
        by_hand, v = w.copy(), np.zeros(5)
        for i, g in enumerate(gradients):
            rate = 0.01 / 10 ** ((i >= 3) + (i >= 6))
            v = 0.9 * v - decay * rate * by_hand - rate * g
            by_hand = by_hand + v
            chex.assert_trees_all_close(history[i][part], by_hand, rtol=1e-12)


def test_velocity_is_not_rescaled_by_rate_drop():
    """With gradient 0 at the drop, the paper's step is 0.9 of the last one; that of optax.sgd is a tenth of it."""
    history, _ = _run(
        _optimizer(stages=((0, 1, 1, ()), (0.1, 0.1, 0.1, ())), weight_decay=0.0), np.zeros(1), np.array([[1.0], [0.0]])
    )
    first, second = history[0]['kernel'], history[1]['kernel'] - history[0]['kernel']
    chex.assert_trees_all_close(second / first, np.array([0.9]), rtol=1e-6)


def test_initial_state_can_be_donated():
    state = _optimizer().tx.init({'fc8': {'kernel': jnp.ones(3)}})  # not jitted: the scalars are those of init
    after = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)
    assert int(after.count) == int(after.plateau.drops) == int(after.plateau.count) == 1


def test_plateau_drops_after_patience_at_most_three_times():
    optimizer = _optimizer(schedule='plateau')
    state = optimizer.tx.init({})
    rates = []
    # Patience 2; only gains of more than 0.5 count. After the best error of 50, 49.6 and 49.5 are no gains, so the
    # rate drops. 49 is a gain.
    for error in (50.0, 49.6, 49.5, 49.0, 48.8, 48.4, 49.0, 60.0, 60.0, 60.0, 60.0, 60.0, 60.0):
        state = optimizer.after_validation(state, error)
        rates.append(float(optimizer.learning_rate(state)))
    expected = [1e-2, 1e-2, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5, 1e-5, 1e-5]
    chex.assert_trees_all_close(rates, expected, rtol=1e-6)
    assert int(state.plateau.drops) == 3


def test_after_validation_is_pure_and_keeps_velocity():
    optimizer = _optimizer(schedule='plateau')
    state = optimizer.tx.init({'fc8': {'kernel': jnp.ones(3)}})
    before = jax.device_get(state)
    after = optimizer.after_validation(state, 12.0)
    chex.assert_trees_all_equal(jax.device_get(state), before)
    chex.assert_trees_all_equal(after.velocity, state.velocity)
    assert float(after.plateau.best_error) == 12.0
    fixed = _optimizer()
    chex.assert_trees_all_equal(fixed.after_validation(state, 12.0), state)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'schedule': 'step'}, "optim.schedule='step': expected 'plateau', 'epochs', 'cosine' or 'poly'"),
        ({'warmup_start': 1.0}, 'optim.warmup_start=1.0: expected a number of at least 0 and below 1'),
        ({'patience': 0}, 'optim.patience=0: expected a positive integer'),
        ({'learning_rate': -1.0}, 'optim.learning_rate=-1.0: expected a number of 0 or more'),
        ({'stages': ()}, 'expected increasing epochs'),
        ({'stages': ((5.0, 1, 1, ()),)}, 'expected increasing epochs, the first of them 0'),
        ({'stages': ((0, 1, 1, ()), (5, 1, 1, ()), (2, 1, 1, ()))}, 'expected increasing epochs'),
        ({'stages': ((0, 1, ()),)}, r'optim.stages has the row \(0, 1, \(\)\): expected \(first epoch'),
        ({'stages': ((0, 1, 1, (('conv1', 1),)),)}, r"optim.stages has \('conv1', 1\): expected a layer and 2"),
        ({'stages': ((0, 1, 1, (('conv9', 1, 1),)),)}, r"unknown layer 'conv9'. Did you mean 'conv"),
        ({'layer_rates': (('fc9', 0.1),)}, r"optim.layer_rates has an unknown layer 'fc9'. Did you mean 'fc"),
        ({'layer_rates': (('fc8', -1),)}, 'expected a layer and 1 factor'),
    ],
)
def test_invalid_optimizer_values_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        _optimizer(**changes)


def test_rate_outside_velocity_matches_torch_sgd():
    """PyTorch's rule: decay of all parameters, and the rate applied to the velocity at the end."""
    rng = np.random.default_rng(0)
    w, gradients = rng.standard_normal(5), rng.standard_normal((8, 5))
    with jax.enable_x64():
        optimizer = _optimizer(stages=DROPS, rate_in_velocity=False, weight_decay=0.01, bias_decay=0.02)
        history, _ = _run(optimizer, w, gradients)
    for part, decay in (('kernel', 0.01), ('bias', 0.02)):
        by_hand, v = w.copy(), np.zeros(5)
        for i, g in enumerate(gradients):
            v = 0.9 * v + (g + decay * by_hand)
            by_hand = by_hand - 0.01 / 10 ** ((i >= 3) + (i >= 6)) * v
            chex.assert_trees_all_close(history[i][part], by_hand, rtol=1e-12)


def _effective_rates(optimizer, count=0, drops=0):
    """Returns the update of (weights, biases) per layer for gradient -1 and velocity 0."""
    params = {name: {'kernel': jnp.zeros(1), 'bias': jnp.zeros(1)} for name in model.AlexNet().layers}
    state = optimizer.tx.init(params)._replace(count=jnp.int32(count))
    state = state._replace(plateau=state.plateau._replace(drops=jnp.int32(drops)))
    updates, _ = optimizer.tx.update(jax.tree.map(lambda p: p - 1, params), state, params)
    return {name: (float(u['kernel'][0]), float(u['bias'][0])) for name, u in updates.items()}


def test_layer_and_bias_rates_multiply_the_schedule():
    layer_rates = (('conv1', 0.0), ('fc6', 0.5))
    plateau = _optimizer(schedule='plateau', layer_rates=layer_rates, bias_rate=2.0)
    for drops, factor in ((0, 1), (2, 0.01)):
        rates = _effective_rates(plateau, drops=drops)
        expected = {name: (0.01 * factor, 0.02 * factor) for name in rates}
        expected |= {'conv1': (0, 0), 'fc6': (0.005 * factor, 0.01 * factor)}
        chex.assert_trees_all_close(rates, expected, rtol=1e-5)
    stages = ((0, 1, 1, ()), (1, 0.1, 0.5, (('fc6', 0.01, 0.3), ('fc8', 0, 0))))
    staged = _optimizer(stages=stages, layer_rates=layer_rates, bias_rate=2.0)
    rates = _effective_rates(staged, count=10)
    assert rates['conv1'] == rates['fc8'] == (0, 0)
    chex.assert_trees_all_close(rates['fc6'], (0.01 * 0.01 * 0.5, 0.01 * 0.3 * 2 * 0.5), rtol=1e-5)
    chex.assert_trees_all_close(rates['fc7'], (0.001, 0.01), rtol=1e-5)
    chex.assert_trees_all_close(_effective_rates(staged, count=9)['fc7'], (0.01, 0.02), rtol=1e-5)


@pytest.mark.parametrize('rate_in_velocity', [True, False])
def test_frozen_layer_keeps_weights_and_velocity(rate_in_velocity):
    """Frozen for updates 1 and 2 of 4: these have no effect, also not by decay or momentum."""
    stages = ((0, 1, 1, ()), (0.1, 1, 1, (('conv1', 0, 0),)), (0.3, 1, 1, ()))
    fixed = {'rate_in_velocity': rate_in_velocity, 'weight_decay': 0.1}
    gradients = np.array([[1.0], [50.0], [-70.0], [2.0]])
    frozen, state = _run(_optimizer(stages=stages, **fixed), np.ones(1), gradients)
    free, expected = _run(_optimizer(**fixed), np.ones(1), gradients[[0, 3]])
    assert frozen[0] == frozen[1] == frozen[2] == free[0]
    chex.assert_trees_all_close(frozen[3], free[1], rtol=1e-6)
    chex.assert_trees_all_close(state.velocity, expected.velocity, rtol=1e-6)


def test_layer_decay_replaces_global_decay():
    """Two updates by hand: v <- 0.9 v - decay rate w, without gradient; biases keep their own decay."""
    optimizer = _optimizer(layer_decays=(('conv1', 3.0),), bias_decay=0.5)
    history, _ = _run(optimizer, np.ones(1), np.zeros((2, 1)))
    for part, decay in (('kernel', 3.0), ('bias', 0.5)):
        w, v = 1.0, 0.0
        for i in range(2):
            v = 0.9 * v - decay * 0.01 * w
            w = w + v
            chex.assert_trees_all_close(history[i][part], np.array([w], np.float32), rtol=1e-6)


def test_lars_matches_its_paper():
    """Ten updates with decay, momentum and two drops; weights or gradients of 0 use the plain rate."""
    rng = np.random.default_rng(0)
    w, gradients = rng.standard_normal(5), rng.standard_normal((10, 5))
    gradients[7] = 0
    with jax.enable_x64():
        history, _ = _run(_optimizer(stages=DROPS, trust_coefficient=0.01), w, gradients)
        from_zero, _ = _run(_optimizer(trust_coefficient=0.01), np.zeros(5), gradients[:1])
    for part, decay in (('kernel', 0.0005), ('bias', 0.0)):
        by_hand, v = w.copy(), np.zeros(5)
        for i, g in enumerate(gradients):
            rate = 0.01 / 10 ** ((i >= 3) + (i >= 6))
            if i != 7:
                w_norm, g_norm = math.sqrt(sum(x * x for x in by_hand)), math.sqrt(sum(x * x for x in g))
                rate *= 0.01 * w_norm / (g_norm + decay * w_norm)
            v = 0.9 * v - rate * (g + decay * by_hand)
            by_hand = by_hand + v
            chex.assert_trees_all_close(history[i][part], by_hand, rtol=1e-12)
        chex.assert_trees_all_close(from_zero[0][part], -0.01 * gradients[0], rtol=1e-12)


@pytest.mark.parametrize('trust', [0.001, 0.1, 10.0])  # |w| / |gradient| is about 1: 10 exceeds the learning rate
def test_lars_clips_as_nvidias_caffe(trust):
    """`SGDSolver::ComputeUpdateValue` with `larc_policy: "clip"`: min(rate, local); local is 1 for a norm of 0."""
    rng = np.random.default_rng(0)
    w, gradients = rng.standard_normal(5), rng.standard_normal((6, 5))
    gradients[4] = 0
    options = {'learning_rate': 2.0, 'bias_rate': 1.5, 'stages': DROPS, 'trust_coefficient': trust, 'trust_clip': True}
    with jax.enable_x64():
        history, _ = _run(_optimizer(**options), w, gradients)
        from_zero, _ = _run(_optimizer(**options), np.zeros(5), gradients[:1])
    for part, factor, decay in (('kernel', 1.0, 0.0005), ('bias', 1.5, 0.0)):
        by_hand, v = w.copy(), np.zeros(5)
        for i, g in enumerate(gradients):
            local = trust * math.sqrt(by_hand @ by_hand) / math.sqrt(g @ g) if i != 4 else 1.0
            v = 0.9 * v - min(2.0 * factor / 10 ** (i >= 3), local) * (g + decay * by_hand)
            by_hand = by_hand + v
            chex.assert_trees_all_close(history[i][part], by_hand, rtol=1e-12)
        chex.assert_trees_all_close(from_zero[0][part], -1.0 * gradients[0], rtol=1e-12)


def test_warmup_is_linear():
    """Four updates of warm-up use a quarter, a half, three quarters and all of the rate; later ones the full rate."""
    optimizer = _optimizer(warmup_epochs=0.4, momentum=0.0, weight_decay=0.0)
    history, state = _run(optimizer, np.zeros(1), np.ones((6, 1)))
    steps = -np.diff([0.0, *(float(h['kernel'][0]) for h in history)])
    chex.assert_trees_all_close(steps, 0.01 * np.array([0.25, 0.5, 0.75, 1, 1, 1]), rtol=1e-5)
    assert float(optimizer.learning_rate(optimizer.tx.init({}))) == pytest.approx(0.0025)
    assert float(optimizer.learning_rate(state)) == pytest.approx(0.01)
    state = optimizer.tx.init({})
    started = _optimizer(warmup_epochs=0.4, warmup_start=0.2)
    rates = [float(started.learning_rate(state._replace(count=jnp.int32(i)))) for i in range(5)]
    assert rates == pytest.approx([0.004, 0.006, 0.008, 0.01, 0.01])


def test_state_tree_does_not_depend_on_frozen_layers():
    """A checkpoint of one configuration can be restored with another."""
    params = {name: {'kernel': jnp.ones(3), 'bias': jnp.ones(3)} for name in model.AlexNet().layers}
    frozen = {'layer_rates': (('conv1', 0.0), ('conv2', 0.0)), 'stages': ((0, 1, 1, (('fc8', 0, 0),)),)}
    trees = {jax.tree.structure(_optimizer(**changes).tx.init(params)) for changes in ({}, frozen, {'bias_rate': 0.0})}
    assert len(trees) == 1


def test_rate_position_only_matters_across_drops():
    """Without decay both rules agree until a drop; then they differ by the scale of the velocity."""
    gradients = np.ones((3, 1))
    ends = {}
    for inside in (True, False):
        history, _ = _run(_optimizer(stages=((0, 1, 1, ()), (0.2, 0.1, 0.1, ())), rate_in_velocity=inside,
                                     weight_decay=0.0), np.zeros(1), gradients)  # fmt: skip
        ends[inside] = [float(h['kernel'][0]) for h in history]
    assert ends[True] == pytest.approx([-0.01, -0.029, -0.029 - 0.9 * 0.019 - 0.001])
    assert ends[False] == pytest.approx([-0.01, -0.029, -0.029 - 0.001 * (0.9 * 1.9 + 1)])
