"""Invalid configs are refused before anything is written."""

import pytest

from alexnet_jax.training import build, train
from alexnet_jax.utils.errors import UserError
from tests import helpers


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model.num_classes': 12}, 'num_classes=12: the data have 10 classes; use --config.model.num_classes=10'),
        (
            {'batch_size': 63, 'mesh.data': 2},
            'batch_size=63, grad_accum_steps=1: expected batch_size to be a multiple of 2',
        ),
        ({'data.image_size': 64}, 'data.image_size=64 is larger than the prepared images'),
        ({'data.image_size': 2}, 'data.image_size=2: conv1: a'),
        ({'data.path': '/nowhere'}, 'there is no data directory'),
        ({'seed': None}, 'seed=None: expected an integer, 0 to 2'),
        ({'optim.momentum': None}, 'optim.momentum=None: expected a number'),
        ({'optim.schedule': 'epochs', 'optim.stages': None}, 'optim.stages has the row None'),
        ({'data.fraction': None}, 'data.fraction=None: expected a number above 0'),
        ({'model': None}, 'model=None: expected a section of keys'),
        ({'on_nonfinite': 'pray'}, "on_nonfinite='pray': expected 'stop' or 'skip'"),
        ({'mesh.data': 3}, 'needs 6 devices, but there are 4'),
        ({'num_steps': 0, 'num_epochs': 0.0}, 'num_epochs=0.0, num_steps=0: expected one of them above 0'),
        ({'num_steps': 0, 'num_epochs': float('inf')}, 'num_epochs=inf'),
        ({'mesh.tower': 0}, 'mesh.tower=0: expected 1 or 2'),
        ({'mesh.dense': 'half'}, "mesh.dense='half': expected 'replicated' or 'split'"),
        ({'data.color_epochs': float('inf')}, 'data.color_epochs=inf: expected a number of 0 or more'),
        ({'optim.learning_rate': float('inf')}, 'optim.learning_rate=inf: expected a number of 0 or more'),
        ({'optim.stages': ((0, 1.0, 1.0, 5),)}, r'optim.stages has 5: expected a layer and 2 factor'),
        ({'optim.stages': ((0, float('inf'), 1.0, ()),)}, r'optim.stages has the row \(0, inf'),
        (
            {'optim.layer_rates': (('conv1', 0.1), ('conv1', 0.2))},
            'optim.layer_rates has a layer twice: conv1, conv1',
        ),
        ({'data.crop_area': (0.1, 1.0), 'data.mean': 'center'}, "data.mean='center': expected 'channel' with"),
        ({'seed': -1}, 'seed=-1: expected an integer, 0 to'),
        ({'data.num_workers': -2}, 'data.num_workers=-2: expected an integer of -1 or more'),
        ({'data.cache': 'disk'}, "data.cache='disk': expected '', 'host' or 'device'"),
        ({'data.cache': 'device', 'data.crop_area': (0.1, 1.0), 'data.mean': 'channel'}, 'cannot resize'),
    ],
)
def test_invalid_values_are_refused_before_writing(tmp_path, changes, message):
    config = helpers.run_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(config, str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'key',
    [
        'num_steps',
        'grad_accum_steps',
        'max_nonfinite',
        'eval_every_steps',
        'data.num_threads',
        'data.max_unreadable',
        'optim.max_drops',
    ],
)  # fmt: skip
def test_fractions_are_refused_where_integers_are_expected(key):
    """A config written in Python can hold them; `ml_collections` checks types only when a value is replaced."""
    config = helpers.run_config()
    with config.ignore_type():
        config.update_from_flattened_dict({key: 1.5})
    with pytest.raises(UserError, match=f'{key}=1.5: expected an? (positive )?integer'):
        build.build(config)


def test_unknown_and_missing_keys_are_refused(tmp_path):
    config = helpers.run_config()
    with config.unlocked():
        config.optim.pateince = 3
    with pytest.raises(UserError, match="unknown config key 'optim.pateince'. Did you mean 'patience'"):
        train.train_and_evaluate(config, str(tmp_path / 'run'))
    config = helpers.run_config()
    del config.on_nonfinite
    with pytest.raises(UserError, match="missing config key 'on_nonfinite'"):
        train.train_and_evaluate(config, str(tmp_path / 'run'))
