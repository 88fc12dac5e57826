"""Fine-tuning on a folder of images in one command, from class folders and from another fine-tuned network."""

import os
import shutil

import numpy as np
import pytest
from absl import flags

from alexnet_jax.convert import loading
from alexnet_jax.data import datasets
from alexnet_jax.experiments import finetune, output_folders
from alexnet_jax.prepare import prepare
from alexnet_jax.utils.config_files import get_config
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
    assert 'of 40 val images' in said and ', center crop:' in said and (out / 'figures' / 'confusion.png').exists()
    first = loading.load_checkpoint(str(out / 'run'))
    assert first.class_names == ('digit 0', 'digit 1', 'digit 4')
    assert 'is finished' in _run('finetune', *words)  # a second run prepares and trains nothing
    assert 'digit ' in _run('predict', f'--checkpoint={out}/run', pictures / 'digit 4')

    # Other settings: a new run with the same data. The old one stays.
    said = _run('finetune', *words, '--config.seed=1', '--config.num_steps=2')
    assert f'{out}/run has other settings (seed: 0 -> 1) and is kept' in said and f'--checkpoint={out}/run-2' in said
    assert sorted(os.listdir(out / 'run' / 'checkpoints')) and not (out / 'data-2').exists()

    # Fine-tuned on other classes: all layers except the classifier are copied.
    others, tuned = helpers.write_pictures(tmp_path / 'others', (2, 7)), tmp_path / 'tuned'
    words = (f'--input={others}', f'--output={tuned}', f'--init_from={out}/run')
    said = _run('finetune', *words, '--config.num_steps=1', '--config.optim.learning_rate=0.0')
    assert 'fc8 starts with new weights' in said and '--mode=full: --config.num_steps is for training all' in said
    assert '--config.batch_size=8:' in said and '--config.num_epochs' not in said
    second = loading.load_checkpoint(str(tuned / 'run'))
    assert second.class_names == ('digit 2', 'digit 7') and second.record_size == first.record_size
    assert all(
        (second.params[name]['kernel'] == first.params[name]['kernel']).all() for name in ('conv1', 'conv5', 'fc7')
    )

    # The default for few pictures: a new last layer.
    said = _run('finetune', *words)
    assert '--mode=features: 53 training pictures are few' in said and f'--checkpoint={tuned}/run-2' in said
    assert 'cross-validation on 53 training pictures' in said
    fitted = loading.load_checkpoint(str(tuned / 'run-2'))
    assert (fitted.image_stats.mean_image == first.image_stats.mean_image).all()
    assert (fitted.params['fc7']['kernel'] == first.params['fc7']['kernel']).all()
    assert f'{tuned}/run-2 is finished' in _run('finetune', *words)


def _nested(folder, pictures):
    shutil.copytree(pictures, folder / 'one')
    return folder


def _prepare(pictures, output, size=16, fraction=0.5, **options):
    listed = output_folders.list_pictures(str(pictures), str(output), fraction, **options)
    folder, dataset = output_folders.prepare_pictures(str(pictures), str(output), listed, size, 0)
    return os.path.basename(folder), dataset


def test_prepared_images_are_used_again(tmp_path):
    """Existing prepared data are enough: the source images need not exist anymore."""
    one = helpers.write_pictures(tmp_path / 'one', (0, 1), 2)
    folder, first = _prepare(one, tmp_path / 'out')
    assert folder == 'data' and first.class_names == ('digit 0', 'digit 1') and len(first.splits['val']) == 2
    nested = _prepare(_nested(tmp_path / 'nest', one), tmp_path / 'nested')[1]
    assert nested.class_names == first.class_names
    single = _nested(tmp_path / 'single', one / 'digit 0')
    with pytest.raises(UserError, match="expected at least two classes, got only 'one'"):
        _prepare(single, tmp_path / 'single_out')
    assert not (tmp_path / 'single_out').exists()
    odd = helpers.write_pictures(tmp_path / os.fsdecode(b'odd\xff'), (0, 1), 2)
    for _ in range(2):
        assert len(_prepare(odd, tmp_path / 'odd')[1].splits['val']) == 2
    shutil.rmtree(one)
    for fraction in (0.5, None):
        assert _prepare(one, tmp_path / 'out', fraction=fraction)[1].class_names == first.class_names
    with pytest.raises(UserError, match='one does not exist, and .*out has no images of 24 px'):
        _prepare(one, tmp_path / 'out', size=24)
    for name in ('data.json', 'data.source'):
        os.remove(tmp_path / 'odd' / name)
    with pytest.raises(UserError, match='the source of .*odd/data is unknown'):
        _prepare(odd, tmp_path / 'odd')


def test_other_pictures_and_settings_get_new_folders(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(prepare, 'prepare_if_needed', lambda _, folder, **options: os.makedirs(folder, exist_ok=True))
    monkeypatch.setattr(output_folders, 'open_dataset', lambda folder: None)
    one, out = helpers.write_pictures(tmp_path / 'one', (0, 1), 2), tmp_path / 'out'
    for _ in range(2):
        assert _prepare(one, out)[0] == 'data'
    assert _prepare(one, out, fraction=0.25)[0] == 'data-2'
    assert 'data has other settings (val_fraction: 0.5 -> 0.25) and is kept' in caplog.text
    assert _prepare(one, out, size=24)[0] == 'data-3'
    helpers.write_pictures(tmp_path / 'one', (0, 1), 3)  # one more of each class
    assert [_prepare(one, out)[0], _prepare(one, out)[0]] == ['data-4', 'data-4']
    assert 'images: 4 images, ' in caplog.text and '-> 6 images, ' in caplog.text
    changed = next((one / 'digit 0').iterdir())
    changed.write_bytes(changed.read_bytes() + b'0')  # as many, with the same names
    assert _prepare(one, out)[0] == 'data-5'
    table = tmp_path / 'labels.csv'
    names = [path.relative_to(one).as_posix() for path in sorted(one.rglob('*.png'))]
    for folder, odd in (('data-6', 'b'), ('data-7', 'c')):  # the same pictures under other labels
        table.write_text(''.join(f'{name},{odd if i % 2 else "a"}\n' for i, name in enumerate(names)))
        assert [_prepare(one, out, labels=table)[0] for _ in range(2)] == [folder, folder]
    with pytest.raises(UserError, match='out was made from .*one, not from .*two; use the same --input or another'):
        _prepare(helpers.write_pictures(tmp_path / 'two', (0, 1), 2), out)
    (out / 'data.json').write_text('no JSON')
    with pytest.raises(UserError, match='data.json. cannot be read .*; use another --output'):
        _prepare(one, out)


def test_run_with_other_images_is_announced_without_their_digests(tmp_path, caplog):
    dataset = datasets.open_dataset('digits')
    first = output_folders.run_folder(str(tmp_path), {'seed': 0}, 'full', None, dataset)
    os.mkdir(first)
    other = datasets.open_dataset('digits')._replace(fingerprint='0' * 64)
    assert output_folders.run_folder(str(tmp_path), {'seed': 1}, 'full', None, other) == f'{tmp_path}/run-2'
    assert 'run has other settings (other images; seed: 0 -> 1) and is kept' in caplog.text


def test_a_fitted_run_without_its_settings_is_refused(tmp_path):
    """Else the result of another run would be reported. A run that is trained is checked by `train`."""
    dataset = datasets.open_dataset('digits')
    (tmp_path / 'run').mkdir()
    assert output_folders.run_folder(str(tmp_path), {'seed': 0}, 'full', None, dataset) == f'{tmp_path}/run'
    with pytest.raises(UserError, match='settings of .*run are unknown: .*run.json is missing; use another --output'):
        output_folders.run_folder(str(tmp_path), {'seed': 0}, 'features', None, dataset)


def test_impossible_requests_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    def refusal(config=None, pictures='pictures', **options):
        with pytest.raises(UserError) as error:
            finetune.finetune(config, tmp_path / pictures, tmp_path / 'out', **options)
        assert not (tmp_path / 'out').exists()
        return str(error.value)

    assert 'needs trained weights; use --init_from=CHECKPOINT or --mode=full' in refusal(init_from='', mode='features')
    overrides = {'num_epochs': 3.0}
    assert 'has no --config.num_epochs' in refusal(init_from='runs/old', mode='features', overrides=overrides)
    assert '--mode=some: expected one of auto, features, full' in refusal(mode='some')

    helpers.write_pictures(tmp_path / 'pictures', (0, 1), 2)

    def no_network(path):
        raise UserError(f'{path} cannot be fetched.')

    monkeypatch.setattr(finetune, 'load_checkpoint', no_network)
    assert 'torchvision cannot be fetched.' in refusal() and 'use --init_from=none' in refusal()
    hint = 'To train from scratch, use --init_from=none.'
    assert refusal(init_from='runs/old') == f'runs/old cannot be fetched. {hint}'
    assert "nothing' does not exist" in refusal(pictures='nothing')  # before weights are fetched


def test_config_without_weights_is_trained_from_scratch(tmp_path, monkeypatch):
    """A config names a network, so --init_from is not torchvision by default."""
    pictures, trained = helpers.write_pictures(tmp_path / 'pictures', (0, 1), 2), []
    monkeypatch.setattr(prepare, 'prepare_if_needed', lambda _, folder, **options: os.makedirs(folder))
    monkeypatch.setattr(output_folders, 'open_dataset', lambda _: datasets.open_dataset('digits'))
    monkeypatch.setattr(finetune.train, 'train_and_evaluate', lambda config, _: trained.append(config))
    monkeypatch.setattr(finetune, 'load_checkpoint', lambda path: 1 / 0)
    config = get_config('tiny_imagenet')
    for given in (config, None):
        with pytest.raises(ZeroDivisionError):  # when the result is loaded
            finetune.finetune(given, pictures, tmp_path / f'out{len(trained)}', init_from=None if given else 'none')
    one, other = trained
    assert one.init_from == other.init_from == '' and one.model.layers == other.model.layers
    # Without a config, the schedule follows from the 1,437 images; with one, only the classes change.
    assert (other.batch_size, other.num_epochs, other.optim.stages[1][0]) == (128, 60.0, 40.0)
    config.data.path, config.model.num_classes = one.data.path, 10
    assert one == config


@pytest.mark.parametrize(
    ('words', 'named', 'changed'),
    [((), False, {}), (('--config.num_epochs=3',), False, {'num_epochs': 3.0}), (('--config=paper',), True, {})],
)
def test_command_tells_given_options_from_defaults(monkeypatch, words, named, changed):
    from alexnet_jax.commands import app
    from alexnet_jax.commands import finetune as command

    got = {}

    def record(config, *_, **options):
        got.update(options, config=config)
        matrix = np.eye(2, dtype=int)
        return finetune.FinetuneResult('run', 0, ('a', 'b'), matrix, '', '', [])

    monkeypatch.setattr(finetune, 'finetune', record)
    values = flags.FlagValues()
    app.parse(command, ['--input=a', '--output=b', *words], values)
    command.main(values)
    assert (got['config'] is not None) == named and got['overrides'] == changed
    assert got['init_from'] is None and got['val_fraction'] is None and got['mode'] == 'auto'


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
