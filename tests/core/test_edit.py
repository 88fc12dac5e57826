"""Edited outputs, against networks whose weights have the same effect, and on two towers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.core import sharding
from alexnet_jax.utils.errors import UserError
from tests import helpers


@pytest.fixture(scope='module')
def setup():
    network = helpers.network()
    params = helpers.init(network, 0, helpers.SIZE)
    x = 60 * jax.random.normal(jax.random.key(1), (4, helpers.SIZE, helpers.SIZE, 3))
    return network, params, x


def _apply(network, params, x, **edit):
    return network.apply({'params': params}, x, edit={name.replace('__', '.'): f for name, f in edit.items()})


def test_ablated_units_equal_weights_of_zero(setup):
    """The channels of conv1 are the inputs of conv2, in two groups; the units of fc6 those of fc7."""
    network, params, x = setup
    groups = network.layers['conv2'].groups
    channel = network.layers['conv1'].features // groups + 1  # the second channel of the second tower
    changed = jax.tree.map(np.array, params)
    half = changed['conv2']['kernel'].shape[-1] // groups
    changed['conv2']['kernel'][:, :, 1, half:] = 0
    changed['fc7']['kernel'][:3] = 0
    edited = _apply(
        network, params, x, conv1__pool=lambda y: y.at[..., channel].set(0), fc6__dropout=lambda y: y.at[:, :3].set(0)
    )
    expected = network.apply({'params': changed}, x)
    chex.assert_trees_all_close(edited, expected, rtol=1e-6, atol=1e-6)
    assert np.abs(edited - network.apply({'params': params}, x)).max() > 1e-3


def test_swapped_maps_give_the_logits_of_the_other_image(setup):
    """All that follows conv3 reads its maps only, so exchanging them exchanges the logits."""
    network, params, x = setup
    swapped = _apply(network, params, x, conv3__relu=lambda y: y[::-1])
    chex.assert_trees_all_close(swapped, network.apply({'params': params}, x)[::-1], rtol=1e-5, atol=1e-5)


def test_last_of_equal_operations_is_edited(setup):
    network, _, x = setup
    layers = {**network.layers, 'fc7': network.layers['fc7'].__class__(features=32, post='relu dropout relu')}
    calls = []
    network.clone(layers=layers).init(jax.random.key(0), x, edit={'fc7.relu': lambda y: calls.append(y.shape) or y})
    assert calls == [(4, 32)]


def test_edit_of_another_shape_is_refused(setup):
    with pytest.raises(UserError, match=r"edit of 'fc7.relu' returns the shape \(4, 1\): expected \(4, "):
        _apply(*setup, fc7__relu=lambda y: y[:, :1])


@pytest.mark.slow  # tests/inference/test_interventions.py has a fast one
@pytest.mark.parametrize('classes', [7, 10])
def test_edits_and_outputs_agree_on_two_towers(setup, classes):
    """The edits mix the channels of both towers. Seven classes do not divide among two towers."""
    network, _, x = setup
    network = network.clone(num_classes=classes)
    params = helpers.init(network, 0, helpers.SIZE)
    scale = jnp.linspace(0, 2, network.layers['conv3'].features).reshape(1, 1, 1, -1)
    edit = {'conv3.relu': lambda y: scale * y[..., ::-1], 'fc6.relu': lambda y: y - y.mean(1, keepdims=True)}
    outputs = [('conv1.linear', -1), ('conv3.relu', 0), ('fc7.relu', -1), ('fc8.linear', -1)]

    def run(forward, params, x):
        def loss(params, x):
            return (forward(params, x, edit=edit) ** 2).sum()

        logits = forward(params, x, edit=edit)
        return [logits, *forward(params, x, edit=edit, outputs=outputs), *jax.grad(loss, (0, 1))(params, x)]

    found = []
    for tower in (1, 2):
        mesh = sharding.make_mesh(data=1, tower=tower)
        placed = jax.device_put(params, sharding.state_sharding(mesh, params))
        found.append(jax.jit(functools.partial(run, sharding.forward(network, mesh)))(placed, x))
    for one, two in zip(*map(jax.tree.leaves, found), strict=True):
        assert one.shape == two.shape
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5 * float(jnp.abs(one).max()))
    logits, outputs = found[0][0], found[0][1:5]
    np.testing.assert_array_equal(outputs[-1], logits)
    _, state = network.apply({'params': params}, x, edit=edit, mutable='intermediates')
    chex.assert_trees_all_close(outputs[1], state['intermediates']['conv3.relu'][0], rtol=1e-5, atol=1e-5)
