"""Training from a checkpoint: copied, reinitialized, slowed and frozen layers. Small networks on the digits."""

import chex
import jax
import numpy as np
import pytest

from alexnet_jax.checkpoints import manager
from alexnet_jax.convert import loading
from alexnet_jax.training import build, restore, train
from alexnet_jax.utils.config_files import get_config
from alexnet_jax.utils.errors import UserError
from tests import helpers


def _small(name, arg=None, **changes):
    """Returns a small version of a config for the digits, with its steps, groups, rates and copied layers unchanged."""
    config = get_config(f'{name}:{arg}' if arg else name)
    for name, layer in config.model.layers.items():
        layer.init = 'normal(0.1)'
        if 'features' in layer:
            layer.features = 8 if name.startswith('conv') else 16
    config.model.layers.conv1.update(kernel=5, stride=1, padding=(2, 2))
    config.model.num_classes = 10
    config.data.path, config.data.image_size, config.data.num_threads = 'digits', 28, 2
    config.data.reflect, config.batch_size, config.num_steps = False, 32, 1
    config.update_from_flattened_dict(changes)
    return config


def _equal_layers(a, b):
    return {name for name in a.keys() & b.keys() if a[name]['kernel'].shape == b[name]['kernel'].shape
            and all(np.array_equal(a[name][part], b[name][part]) for part in a[name])}  # fmt: skip


@pytest.mark.slow
def test_authors_chain_of_initializations(tmp_path):
    """The table of section 7: with rate 0, each run of the chain keeps the copied parameters."""
    lower = {'conv1', 'conv2', 'conv3', 'conv4', 'conv5'}
    links = (
        ('authors_2012', None, set()),
        ('sixth_conv', 'authors=2009', lower),
        ('sixth_conv', 'authors=2011', lower | {'conv6'}),
        ('sixth_conv', 'authors=2012', lower | {'conv6', 'fc6', 'fc7'}),
    )
    before = None
    for i, (name, arg, copied) in enumerate(links):
        config = _small(name, arg, **{'seed': i, 'optim.learning_rate': 0.0})
        if before is not None:
            config.init_from = str(tmp_path / str(i - 1))
        train.train_and_evaluate(config, str(tmp_path / str(i)))
        params = loading.load_checkpoint(str(tmp_path / str(i))).params
        if before is not None:
            assert _equal_layers(before, params) == copied, arg
        before = params


def _first_update(config, tmp_path):
    """Returns the first update for gradient -1; checks that the velocity starts at 0."""
    run = build.build(config)
    with manager.CheckpointManager(str(tmp_path / 'nothing')) as saved:
        state, _ = restore.restore_or_init(saved, run, jax.random.key(0), {}, str(tmp_path))
    before = jax.device_get(state.params)
    # Starts at 0.
    chex.assert_trees_all_equal(jax.device_get(state.opt_state.velocity), jax.tree.map(np.zeros_like, before))
    gradient = jax.tree.map(lambda p: np.full_like(p, -1.0), before)
    updates, _ = run.steps.optimizer.tx.update(gradient, state.opt_state._replace(count=state.step), state.params)
    return jax.device_get(updates)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('arg', 'slow', 'rate'),
    [
        ('authors=2009', {f'conv{i}': 0.1 for i in range(1, 6)}, 0.01),
        ('authors=2011', {f'conv{i}': 0.1 for i in range(1, 7)}, 0.01),
        ('authors=2012', {'conv1': 0.1}, 0.001),
        ('finetune', {'conv1': 0.1}, 0.001),
    ],
)
def test_layer_rates_of_finetuning_configs(tmp_path, arg, slow, rate):
    config = _small('sixth_conv', arg, **{'optim.weight_decay': 0.0})
    config.init_fresh = ()
    updates = _first_update(config, tmp_path)
    for name, update in updates.items():
        np.testing.assert_allclose(update['kernel'], rate * slow.get(name, 1), rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_frozen_and_slowed_layers(tmp_path):
    base = helpers.digits_config(num_steps=3)
    train.train_and_evaluate(base, str(tmp_path / 'old'))
    rates = (('conv1', 0.0), ('conv2', 0.0), ('conv3', 0.01))
    config = helpers.digits_config(
        num_steps=4, seed=1, init_from=str(tmp_path / 'old'), init_fresh=('fc7', 'fc8'), **{'optim.layer_rates': rates}
    )
    train.train_and_evaluate(config, str(tmp_path / 'new'))
    old, new = (loading.load_checkpoint(str(tmp_path / name)).params for name in ('old', 'new'))
    assert _equal_layers(old, new) == {'conv1', 'conv2'}
    moved = {name: np.abs(new[name]['kernel'] - old[name]['kernel']).mean() for name in ('conv3', 'conv4')}
    assert 0 < moved['conv3'] < 0.1 * moved['conv4']
    # Reinitialized: uncorrelated with the old weights.
    correlation = np.corrcoef(old['fc7']['kernel'].ravel(), new['fc7']['kernel'].ravel())[0, 1]
    assert abs(correlation) < 0.2


@pytest.mark.slow
def test_incompatible_checkpoints(tmp_path, capsys):
    train.train_and_evaluate(helpers.digits_config(num_steps=1), str(tmp_path / 'old'))
    begin = {'init_from': str(tmp_path / 'old'), 'num_steps': 1}
    with pytest.raises(UserError, match="init_fresh: unknown layer 'fc9'. Did you mean 'fc"):
        train.train_and_evaluate(helpers.digits_config(**begin, init_fresh=('fc9',)), str(tmp_path / 'a'))
    with pytest.raises(UserError, match=r"init_fresh=\('fc8',\): init_from is empty"):
        train.train_and_evaluate(helpers.digits_config(init_fresh=('fc8',)), str(tmp_path / 'b'))
    six = helpers.digits_config(**begin)
    layers = six.model.layers
    layers.conv6 = {**layers.conv5, 'groups': 1, 'post': 'relu'}
    with pytest.raises(
        UserError, match=r'''expected a kernel of shape .* for conv6, found no such layer.*init_fresh="\('conv6',\)"'''
    ):
        train.train_and_evaluate(six, str(tmp_path / 'c'))
    capsys.readouterr()
    other = helpers.digits_config(**begin, **{'data.mean': 'channel', 'data.pixel_std': (60.0, 60.0, 60.0)})
    train.train_and_evaluate(other, str(tmp_path / 'd'))
    warned = capsys.readouterr().err
    assert 'was trained with data.mean=crop; this config has channel' in warned
    assert 'was trained with data.pixel_std=(1.0, 1.0, 1.0)' in warned and len(warned.splitlines()) == 2
    # The same shapes, but another function.
    other = helpers.digits_config(**begin, **{'model.lrn_k': 1.0, 'model.dropout_rate': 0.1, 'init_fresh': ('fc7',)})
    other.model.layers.conv5.post = 'pool relu'
    other.model.layers.fc7.post = 'relu'
    train.train_and_evaluate(other, str(tmp_path / 'e'))
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 2, warned
    assert 'was trained with conv5=' in warned[0] and "'post': 'relu pool'" in warned[0]
    assert 'was trained with model.lrn_k=2.0; this config has 1.0' in warned[1]
