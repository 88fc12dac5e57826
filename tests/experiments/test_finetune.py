"""Fine-tuning on a folder of images in one command, from class folders and from another fine-tuned network."""

import os
import shutil

import pytest

from alexnet_jax.convert import loading
from alexnet_jax.experiments import finetune
from alexnet_jax.utils.errors import UserError
from tests import helpers

CONFIG = """
from tests import helpers

def get_config():
    return helpers.digits_config(**{'num_epochs': 6.0, 'batch_size': 16, 'mesh.tower': 1, 'log_every_steps': 0})
"""


def _run(command, *words, code=0):
    done = helpers.run_command(command, *words, '--cpu_devices=1')
    assert done.returncode == code, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_from_class_folders_to_predictions(tmp_path):
    (tmp_path / 'config.py').write_text(CONFIG)
    pictures, out = helpers.write_pictures(tmp_path / 'pictures', (0, 1, 4)), tmp_path / 'out'
    words = (f'--input={pictures}', f'--output={out}', f'--config={tmp_path}/config.py')
    (pictures / 'digit 0' / 'bad.png').write_bytes(b'no picture')
    assert 'bad.png' in _run('finetune', *words, code=2)
    words = (*words, '--max_unreadable=1')
    said = _run('finetune', *words)
    assert 'of 12 val images, center crop' in said and (out / 'figures' / 'confusion.png').exists()
    first = loading.load_checkpoint(str(out / 'run'))
    assert first.class_names == ('digit 0', 'digit 1', 'digit 4')
    assert 'is finished' in _run('finetune', *words)  # a second run prepares and trains nothing
    assert 'digit ' in _run('predict', f'--checkpoint={out}/run', pictures / 'digit 4')

    # Fine-tuned on other classes: all layers except the classifier are copied.
    others, tuned = helpers.write_pictures(tmp_path / 'others', (2, 7)), tmp_path / 'tuned'
    words = (f'--input={others}', f'--output={tuned}', f'--config={tmp_path}/config.py', f'--init_from={out}/run')
    said = _run('finetune', *words, '--config.num_steps=1', '--config.optim.learning_rate=0.0')
    assert 'fc8 starts with new weights' in said
    second = loading.load_checkpoint(str(tuned / 'run'))
    assert second.class_names == ('digit 2', 'digit 7') and second.record_size == first.record_size
    assert all(
        (second.params[name]['kernel'] == first.params[name]['kernel']).all() for name in ('conv1', 'conv5', 'fc7')
    )
    assert 'there is no checkpoint' in _run('finetune', *words[:-1], '--init_from=nowhere', code=2)


def _nested(folder, pictures):
    shutil.copytree(pictures, folder / 'one')
    return folder


def test_prepared_output_of_other_images_is_refused(tmp_path):
    """Existing prepared data are kept, and are enough: the source images need not exist anymore."""
    one, other = (
        helpers.write_pictures(tmp_path / name, classes, 2) for name, classes in (('one', (0, 1)), ('two', (2, 7)))
    )
    folder = str(tmp_path / 'data')
    first = finetune.prepare_pictures(str(one), folder, 16, 0.5, 0)
    assert first.class_names == ('digit 0', 'digit 1') and len(first.splits['val']) == 2
    with pytest.raises(UserError, match=f'data was prepared from {one} with --val_fraction=0.5, not from {other} with'):
        finetune.prepare_pictures(str(other), folder, 16, 0.5, 0)
    with pytest.raises(UserError, match=f'not from {one} with --val_fraction=0.25; use the same source or another'):
        finetune.prepare_pictures(str(one), folder, 16, 0.25, 0)
    with pytest.raises(UserError, match='expected images of 24 px for this network, got 16 px'):
        finetune.prepare_pictures(str(one), folder, 24, 0.5, 0)
    nested = finetune.prepare_pictures(str(_nested(tmp_path / 'nest', one)), str(tmp_path / 'nested'), 16, 0.5, 0)
    assert nested.class_names == first.class_names
    single = str(_nested(tmp_path / 'single', one / 'digit 0'))
    with pytest.raises(UserError, match="expected at least two classes, got only 'one'"):
        finetune.prepare_pictures(single, str(tmp_path / 'single_data'), 16, 0.5, 0)
    assert not (tmp_path / 'single_data').exists() and not (tmp_path / 'single_data.source').exists()
    os.rename(tmp_path / 'data.source', tmp_path / 'kept')
    with pytest.raises(UserError, match=f'the source of {folder} is unknown; if it is {one}'):
        finetune.prepare_pictures(str(one), folder, 16, 0.5, 0)
    os.rename(tmp_path / 'kept', tmp_path / 'data.source')
    odd = helpers.write_pictures(tmp_path / os.fsdecode(b'odd\xff'), (0, 1), 2)
    for _ in range(2):
        assert len(finetune.prepare_pictures(str(odd), str(tmp_path / 'odd'), 16, 0.5, 0).splits['val']) == 2
    shutil.rmtree(one)
    assert finetune.prepare_pictures(str(one), folder, 16, 0.5, 0).class_names == first.class_names


def test_finetune_config_combines_network_and_rates(tmp_path):
    source = loading.load_checkpoint(
        helpers.save_untrained(tmp_path / 'run', **{'data.mean': 'channel', 'model.lrn_k': 1.5})
    )
    config = helpers.digits_config(**{'optim.learning_rate': 0.5, 'data.image_size': 20, 'data.num_threads': 3})
    found = finetune.finetune_config(config, source, 'somewhere', 7)
    assert (found.model.lrn_k, found.data.mean, found.data.image_size) == (1.5, 'channel', 28)
    assert (found.optim.learning_rate, found.data.num_threads) == (0.5, 3)
    assert (found.data.path, found.model.num_classes) == ('somewhere', 7)
    assert dict(found.optim.layer_rates) == {'fc8': 10.0}
    assert config.data.image_size == 20 and config.optim.layer_rates == ()  # the config is unchanged
    config.optim.layer_rates = (('conv1', 0.0),)
    assert dict(finetune.finetune_config(config, source, '', 7).optim.layer_rates) == {'conv1': 0.0}
    assert finetune.finetune_config(config, None, '', 7).data.image_size == 20
