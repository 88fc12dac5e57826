"""The update against the two lines of section 5, and the plateau against a hand-worked sequence."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax import optim
from alexnet_jax.errors import UserError

PAPER = dict(
    learning_rate=0.01, momentum=0.9, weight_decay=5e-4, schedule='epochs', drop_factor=0.1, max_drops=3, patience=2,
    min_gain=0.5, drop_epochs=(), steps_per_epoch=10.0,
)  # fmt: skip


def _optimizer(**changes):
    return optim.make_optimizer(**{**PAPER, **changes})


def _run(optimizer, w, gradients):
    """Applies the gradients of 'kernel' and 'bias' alike; returns both parameters' histories."""
    params = {'conv1': {'kernel': jnp.asarray(w), 'bias': jnp.asarray(w)}}
    state, history = optimizer.tx.init(params), []
    update = jax.jit(optimizer.tx.update)
    for g in gradients:
        updates, state = update({'conv1': {'kernel': jnp.asarray(g), 'bias': jnp.asarray(g)}}, state, params)
        params = optax.apply_updates(params, updates)
        history.append(jax.device_get(params['conv1']))
    return history, state


def test_update_is_the_papers():
    rng = np.random.default_rng(0)
    w, gradients = rng.standard_normal(5), rng.standard_normal((8, 5))
    with jax.enable_x64():
        history, _ = _run(_optimizer(drop_epochs=(0.3, 0.6)), w, gradients)
    for part, decay in (('kernel', 0.0005), ('bias', 0.0)):
        by_hand, v = w.copy(), np.zeros(5)
        for i, g in enumerate(gradients):
            rate = 0.01 / 10 ** ((i >= 3) + (i >= 6))  # drops after 0.3 and 0.6 epochs of 10 updates
            v = 0.9 * v - decay * rate * by_hand - rate * g
            by_hand = by_hand + v
            chex.assert_trees_all_close(history[i][part], by_hand, rtol=1e-12)


def test_velocity_keeps_its_scale_across_a_drop():
    """With the gradient gone at the drop, the paper's step goes on at 0.9 of the last; optax.sgd's is a tenth."""
    history, _ = _run(_optimizer(drop_epochs=(0.1,), weight_decay=0.0), np.zeros(1), np.array([[1.0], [0.0]]))
    first, second = history[0]['kernel'], history[1]['kernel'] - history[0]['kernel']
    chex.assert_trees_all_close(second / first, np.array([0.9]), rtol=1e-6)


def test_plateau_drops_after_patience_three_times_at_most():
    optimizer = _optimizer(schedule='plateau')
    state = optimizer.tx.init({})
    rates = []
    # patience 2, gains of more than 0.5 count:  best 50 -> 49.6 is no gain, nor 49.5; then drop. 49 is a gain.
    for error in (50.0, 49.6, 49.5, 49.0, 48.8, 48.4, 49.0, 60.0, 60.0, 60.0, 60.0, 60.0, 60.0):
        state = optimizer.after_validation(state, error)
        rates.append(float(optimizer.learning_rate(state)))
    expected = [1e-2, 1e-2, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5, 1e-5, 1e-5]
    chex.assert_trees_all_close(rates, expected, rtol=1e-6)
    assert int(state.drops) == 3


def test_after_validation_leaves_its_argument_and_the_velocity_alone():
    optimizer = _optimizer(schedule='plateau')
    state = optimizer.tx.init({'fc8': {'kernel': jnp.ones(3)}})
    before = jax.device_get(state)
    after = optimizer.after_validation(state, 12.0)
    chex.assert_trees_all_equal(jax.device_get(state), before)
    chex.assert_trees_all_equal(after.velocity, state.velocity)
    assert float(after.best_error) == 12.0
    fixed = _optimizer()
    chex.assert_trees_all_equal(fixed.after_validation(state, 12.0), state)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'schedule': 'cosine'}, "optim.schedule='cosine'; expected 'plateau' or 'epochs'"),
        ({'patience': 0}, 'optim.patience=0 is out of range'),
        ({'learning_rate': -1.0}, 'optim.learning_rate=-1.0 is out of range'),
        ({'drop_epochs': ('a',)}, 'expected rising'),
        ({'drop_epochs': (5.0, 2.0)}, 'expected rising'),
    ],
)
def test_errors(changes, message):
    with pytest.raises(UserError, match=message):
        _optimizer(**changes)
