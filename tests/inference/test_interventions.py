"""Edits, chosen units and gradients of a checkpoint, against NumPy and finite differences, on one device and two."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax.core import sharding
from alexnet_jax.utils.errors import UserError
from tests import helpers


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return alexnet_jax.load_checkpoint(helpers.save_untrained(tmp_path_factory.mktemp('edits') / 'run'))


@pytest.fixture(scope='module')
def images(checkpoint):
    side = checkpoint.record_size
    return np.random.default_rng(0).integers(0, 256, (5, side, side, 3), np.uint8)


def _activations(*arguments, **options):
    return alexnet_jax.activations(*arguments, batch_size=3, **options)


def test_pooled_and_chosen_units_are_parts_of_the_maps(checkpoint, images):
    """The batch size does not divide the number of images."""
    names = ['conv1', 'conv2.relu', 'fc7']
    whole = _activations(checkpoint, images, names)
    for pool, function in (('mean', np.mean), ('max', np.max)):
        found = _activations(checkpoint, images, names, pool=pool)
        for name in names[:2]:
            np.testing.assert_allclose(found[name], function(whole[name], (1, 2)), rtol=1e-5)
        np.testing.assert_array_equal(found['fc7'], whole['fc7'])
    single = [(0, 1, 2), (3, 3, 7)]
    units = {'conv1': [5, 0], 'conv2.relu': single, 'fc7': [3]}
    found = _activations(checkpoint, images, names, units=units)
    np.testing.assert_array_equal(found['conv1'], whole['conv1'][..., [5, 0]])
    expected = np.stack([whole['conv2.relu'][:, r, c, k] for r, c, k in single], axis=1)
    np.testing.assert_allclose(found['conv2.relu'], expected, rtol=1e-6)
    np.testing.assert_array_equal(found['fc7'], whole['fc7'][:, [3]])
    pooled = _activations(checkpoint, images, 'conv1', units={'conv1': [5, 0]}, pool='mean')['conv1']
    np.testing.assert_allclose(pooled, whole['conv1'][..., [5, 0]].mean((1, 2)), rtol=1e-5)


def test_edit_changes_what_follows(checkpoint, images):
    """Silencing a tower of fc7 leaves the other half and the bias of fc8."""
    names = ['conv5', 'fc7.relu', 'fc8']
    whole = _activations(checkpoint, images, names)
    half = whole['fc7.relu'].shape[1] // 2
    edited = _activations(checkpoint, images, names, edit={'fc7.relu': lambda y: y.at[:, :half].set(0)})
    np.testing.assert_array_equal(edited['conv5'], whole['conv5'])
    np.testing.assert_array_equal(edited['fc7.relu'][:, :half], 0)
    np.testing.assert_array_equal(edited['fc7.relu'][:, half:], whole['fc7.relu'][:, half:])
    fc8 = checkpoint.params['fc8']
    expected = 0.5 * whole['fc7.relu'][:, half:] @ fc8['kernel'][half:] + fc8['bias']  # 0.5: section 4.2
    np.testing.assert_allclose(edited['fc8'], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_gradients_agree_with_finite_differences(checkpoint, images):
    """In float64. Edits are part of the function, whether the gradient is taken there or not."""
    with jax.enable_x64(True):
        double = checkpoint._replace(
            network=checkpoint.network.clone(dtype='float64'), params=jax.tree.map(np.float64, checkpoint.params)
        )
        edit = {'conv2.relu': lambda y: 0.5 * y, 'fc7': lambda y: y.at[:, ::2].set(0)}
        names = ['conv2.relu', 'conv3', 'fc6.linear', 'pixels', 'fc8']
        found = alexnet_jax.gradients(double, images[:2], ('fc8', 4), names, edit=edit)

        def logit(name, position, step):
            def moved(y):
                return edit.get(name, lambda y: y)(y).at[(slice(None), *position)].add(step)

            return _activations(double, images[:2], 'fc8', edit={**edit, name: moved})['fc8'][:, 4]

        for name, key in (('conv2.relu', 'conv2.relu'), ('conv3', 'conv3.relu'), ('fc6.linear', 'fc6.linear')):
            position = np.unravel_index(np.abs(found[name][0]).argmax(), found[name].shape[1:])
            numeric = (logit(key, position, 1e-2) - logit(key, position, -1e-2)) / 2e-2
            np.testing.assert_allclose(found[name][(slice(None), *position)], numeric, rtol=2e-2, atol=1e-4)
    np.testing.assert_array_equal(found['fc8'], np.eye(found['fc8'].shape[1], dtype=np.float32)[[4, 4]])
    assert found['pixels'].shape == (2, checkpoint.image_size, checkpoint.image_size, 3)


@pytest.mark.slow
def test_two_towers_give_the_same_edits_and_gradients(checkpoint, images):
    edit = {'conv2.relu': lambda y: y[..., ::-1], 'fc6': lambda y: y - y.mean(1, keepdims=True)}
    calls = (
        functools.partial(alexnet_jax.activations, layers=['conv1', 'conv3', 'fc8'], pool='max'),
        functools.partial(
            alexnet_jax.gradients, unit=('conv4.linear', (2, 3, 5)), layers=['conv1.pool', 'conv3', 'pixels']
        ),
    )
    mesh = sharding.make_mesh(data=1, tower=2)
    for call in calls:
        one, two = (call(checkpoint, images[:3], edit=edit, mesh=mesh) for mesh in (None, mesh))
        for name, array in one.items():
            np.testing.assert_allclose(two[name], array, rtol=1e-3, atol=1e-5 * np.abs(array).max(), err_msg=name)
            assert np.abs(array).max() > 0, name


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'pool': 'sum'}, "pool='sum': expected 'mean', 'max' or None"),
        ({'units': [1]}, 'units is list: expected a dict by layer'),
        ({'units': {'conv9': [1]}}, r"units\['conv9'\]: not one of the layers conv2, fc7"),
        ({'units': {'conv2': [99]}}, r"units\['conv2'\]=\[99\]: expected a list of channels from 0 to"),
        ({'units': {'conv2': [(0, 99, 0)]}}, r'or \(row, column, channel\) below'),
        ({'units': {'fc7': [(0, 0, 0)]}}, 'expected a list of channels from 0 to'),
        ({'units': {'fc7': [0.5]}}, 'expected a list of channels from 0 to'),
        ({'units': {'conv2': [(0, 1, 2), (3,)]}}, 'expected a list of channels from 0 to'),
        ({'units': {'fc7': []}}, 'expected a list of channels from 0 to'),
        ({'edit': lambda y: y}, 'edit is function: expected a dict by layer'),
        ({'edit': {'conv9': lambda y: y}}, "unknown layer 'conv9'"),
        ({'edit': {'conv2.relu': 0}}, r"edit\['conv2.relu'\] is int: expected a function of the output"),
        ({'edit': {'fc7': jnp.abs, 'fc7.relu': jnp.abs}}, "edit has two functions for 'fc7.relu'"),
        ({'edit': {'fc7': lambda y: y[:, :1]}}, "edit of 'fc7.relu' returns the shape"),
    ],
)
def test_invalid_options_are_refused(checkpoint, images, options, message):
    with pytest.raises(UserError, match=message):
        alexnet_jax.activations(checkpoint, images, ['conv2', 'fc7'], **options)


@pytest.mark.parametrize(
    ('unit', 'layers', 'message'),
    [
        ('fc8', 'pixels', r"unit='fc8': expected \(name, index\)"),
        (('fc8', 10), 'pixels', r'expected a list of channels from 0 to 9'),
        (('conv2', 3), 'pixels', r'expected \(row, column, channel\) below'),
        (('conv2', (0, 0, 99)), 'pixels', r'\(row, column, channel\) below'),
        (('conv9', 1), 'pixels', "unknown layer 'conv9'"),
        (('fc8', 1), 'pixel', "unknown layer 'pixel'"),
        (('fc8', 1), [], 'no layers given'),
    ],
)
def test_invalid_units_and_layers_are_refused(checkpoint, images, unit, layers, message):
    with pytest.raises(UserError, match=message):
        alexnet_jax.gradients(checkpoint, images, unit, layers)


@pytest.mark.slow
def test_gradient_of_a_batch_is_that_of_each_image(checkpoint, images):
    whole = alexnet_jax.gradients(checkpoint, images, ('fc8', 0), batch_size=2)['pixels']
    each = [alexnet_jax.gradients(checkpoint, image, ('fc8', 0))['pixels'] for image in images]
    chex.assert_trees_all_close(whole, np.concatenate(each), rtol=1e-4, atol=1e-6)
