"""The public API as a notebook uses it: custom training loops, images of any kind, paths of any type."""

import pydoc
import re
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from PIL import Image

import alexnet_jax
from alexnet_jax.checkpoints import verify
from alexnet_jax.convert import convert
from alexnet_jax.core import model
from alexnet_jax.data import datasets
from alexnet_jax.experiments import figures, finetune, plots
from alexnet_jax.export import hub
from alexnet_jax.inference import activations, predict
from alexnet_jax.prepare import prepare
from alexnet_jax.utils.errors import UserError
from tests import ROOT, helpers

NAMES = [str(i) for i in range(10)]


def _arrays(count=32, side=32):
    rng = np.random.default_rng(0)
    return {'image': rng.integers(0, 256, (count, side, side, 3), np.uint8), 'label': rng.integers(0, 10, count)}


@pytest.fixture(scope='module')
def setup():
    config = helpers.digits_config(**{'batch_size': 8, 'mesh.tower': 1, 'mesh.data': 1, 'data.reflect': True})
    return alexnet_jax.build(config, alexnet_jax.in_memory({'train': _arrays()}, NAMES))


@pytest.mark.slow
def test_example_program_of_the_python_api(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / 'tests' / 'api_example.py', tmp_path],
        cwd=tmp_path, env={'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'HOME': str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "'conv2': (5, 5, 16, 64)" in lines[0] and lines[1] == 'logits (2, 2) (2, 2)'
    assert lines[2].startswith('loss ') and lines[2].endswith('top-1 error 0.0')
    assert lines[3].startswith('Checkpoint(step=4, conv1 conv2 ')
    assert lines[4:] == [
        'probabilities (2,)',
        "activations {'conv3': (3, 7, 7, 96), 'conv3.linear': (3, 7, 7, 96), 'conv2.tanh': (3, 14, 14, 64)}",
    ]
    assert {path.name for path in tmp_path.glob('*.png')} == {'kernels.png', 'maps.png'}


@pytest.mark.slow
def test_code_of_the_page_on_the_inside_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    helpers.save_untrained(tmp_path / 'runs' / 'quickstart')
    code = re.findall(r'^```python\n(.*?)^```', (ROOT / 'docs' / 'inside.md').read_text(), re.S | re.M)
    names = {}
    for block in code:
        exec(block, names)
    assert names['means']['conv1'].ndim == 2 and names['found']['pixels'].shape[0] == 8
    assert len(capsys.readouterr().out.splitlines()) == 4 + 1 + 2


@pytest.mark.slow
def test_custom_loop_matches_train_and_evaluate(tmp_path):
    """All images are equal, so the order in which the pipeline reads them does not matter."""
    config = helpers.digits_config(**{'batch_size': 8, 'num_steps': 3, 'mesh.tower': 1, 'data.reflect': True})
    config.mesh.data = 1
    arrays = _arrays()
    arrays['image'][:], arrays['label'][:] = arrays['image'][0], 3
    dataset = alexnet_jax.in_memory({'train': arrays}, NAMES)
    alexnet_jax.train_and_evaluate(config, tmp_path / 'run', dataset=dataset)  # a pathlib.Path
    setup = alexnet_jax.build(config, dataset)
    state = setup.init(setup.key)
    for _ in range(3):
        state, metrics = setup.train_step(state, {key: value[:8] for key, value in arrays.items()})
    checkpoint = alexnet_jax.load_checkpoint(tmp_path / 'run')
    chex.assert_trees_all_equal(jax.device_get(state.params), checkpoint.params)
    assert metrics['loss'].shape == () and float(metrics['learning_rate']) == pytest.approx(0.01)


def test_loss_is_the_weighted_mean(setup):
    batch = {key: value[:8] for key, value in _arrays().items()}
    metrics = {}
    for name, extra in (('all', {}), ('ones', {'weight': np.ones(8)}), ('one', {'weight': np.arange(8) == 2})):
        _, metrics[name] = setup.train_step(setup.init(jax.random.key(1)), batch | extra)
    assert float(metrics['all']['loss']) == float(metrics['ones']['loss']) != float(metrics['one']['loss'])
    assert 1 < float(metrics['one']['loss']) < 5 and float(metrics['one']['top1_error']) in (0, 100)


def test_images_of_the_input_size_are_not_cropped(setup):
    """The centers of whole images give the update of a run without random crops."""
    batch = {key: value[:8] for key, value in _arrays().items()}
    config = setup.config.copy_and_resolve_references()
    config.data.random_crop = False
    fixed = alexnet_jax.build(config, setup.dataset)
    expected, _ = fixed.train_step(fixed.init(jax.random.key(0)), batch)
    middle = {'image': batch['image'][:, 2:30, 2:30], 'label': batch['label']}
    found, _ = setup.train_step(setup.init(jax.random.key(0)), middle)
    chex.assert_trees_all_equal(jax.device_get(found.params), jax.device_get(expected.params))


@pytest.mark.parametrize(
    ('batch', 'message'),
    [
        ({'image': np.zeros((8, 32, 32, 3)), 'label': np.zeros(8, int)}, 'images are float64 of shape'),
        (_arrays(8, 31), r'expected uint8 of shape \(N, S, S, 3\), with S=32 \(to be cropped\) or S=28'),
        ({'image': np.zeros((8, 32, 32), np.uint8), 'label': np.zeros(8, int)}, 'images are uint8 of shape'),
        (_arrays(0), 'the batch has 0 images, 0 labels and 0 weights'),
        (_arrays(8) | {'label': np.zeros(7, int)}, 'the batch has 8 images, 7 labels and 8 weights'),
        (_arrays(8) | {'weight': np.ones(9)}, 'the batch has 8 images, 8 labels and 9 weights'),
        (_arrays(8) | {'label': np.full(8, 10)}, 'the labels are int64 from 10 to 10: expected integers from 0 to 9'),
        (_arrays(8) | {'label': np.full(8, 0.5)}, 'the labels are float64'),
        (_arrays(8) | {'label': np.full(8, -1)}, '-1 to -1: expected int'),
    ],
)
def test_invalid_batches_are_refused(setup, batch, message):
    with pytest.raises(UserError, match=message):
        setup.train_step(setup.init(jax.random.key(0)), batch)


def test_dropout_rng_equals_explicit_masks():
    network = helpers.network()
    params, x = helpers.init(network), np.ones((2, helpers.SIZE, helpers.SIZE, 3), np.float32)
    key = jax.random.key(5)

    def apply(*masks, **options):
        return network.apply({'params': params}, x, *masks, **options)

    chex.assert_trees_all_equal(apply(train=True, rng=key), apply(model.dropout_masks(network, key, 2, helpers.SIZE)))
    assert not np.allclose(apply(train=True, rng=key), apply())
    with pytest.raises(UserError, match='train=True needs a random key for dropout; pass rng'):
        apply(train=True)


def test_predict_accepts_any_kind_of_image(setup, tmp_path):
    config = helpers.digits_config(**{'num_steps': 1, 'mesh.tower': 1, 'mesh.data': 1, 'batch_size': 8})
    alexnet_jax.train_and_evaluate(config, tmp_path / 'run', dataset=setup.dataset)
    checkpoint = alexnet_jax.load_checkpoint(tmp_path / 'run')
    array = np.random.default_rng(1).integers(0, 256, (48, 60, 3), np.uint8)
    Image.fromarray(array).save(tmp_path / 'a.png')
    expected = alexnet_jax.predict(checkpoint, array)
    assert expected.shape == (10,) and expected.sum() == pytest.approx(1, rel=1e-5)
    for one in (tmp_path / 'a.png', str(tmp_path / 'a.png'), Image.fromarray(array)):
        np.testing.assert_array_equal(alexnet_jax.predict(checkpoint, one), expected)
    many = alexnet_jax.predict(checkpoint, [array, tmp_path / 'a.png', array[:32, :32]])
    assert many.shape == (3, 10)
    np.testing.assert_allclose(many[:2], [expected, expected], rtol=1e-5)
    assert alexnet_jax.predict(checkpoint, []).shape == (0, 10)
    assert alexnet_jax.activations(checkpoint, array, 'conv3')['conv3'].shape == (1, 7, 7, 8)
    with pytest.raises(UserError, match='cannot be read as an image'):
        alexnet_jax.predict(checkpoint, tmp_path / 'none.png')
    with pytest.raises(UserError, match=r'an image is float64 of shape \(48, 60, 3\): expected uint8'):
        alexnet_jax.predict(checkpoint, array / 255)


@pytest.mark.parametrize('name', [name for name in alexnet_jax.__all__ if not name.startswith('_')])
def test_help_describes_arguments_and_results(name):
    """They are on the first screen, not below the attributes that Flax adds."""
    text = pydoc.render_doc(getattr(alexnet_jax, name), renderer=pydoc.plaintext)[:5000]
    assert 'FrozenDict' not in text and 'conv5' in text if name == 'AlexNet' else re.search(r'float32|\[N|Raises', text)


def test_arrays_and_records_make_the_same_dataset():
    arrays = _arrays(6)
    records = [{'image': i, 'label': int(k)} for i, k in zip(arrays['image'], arrays['label'], strict=True)]
    a, b = (alexnet_jax.in_memory({'train': split}) for split in (arrays, records))
    chex.assert_trees_all_equal(a.image_stats, b.image_stats)
    assert a.class_names == b.class_names == tuple(str(i) for i in range(1 + arrays['label'].max()))
    with pytest.raises(UserError, match='6 images and 5 labels'):
        alexnet_jax.in_memory({'train': {**arrays, 'label': arrays['label'][:5]}})


@pytest.mark.slow
def test_paths_may_be_pathlib(tmp_path):
    """From raw images to an exported network: each function accepts a `pathlib.Path`."""
    rng = np.random.default_rng(0)
    for i in range(16):
        folder = tmp_path / 'raw' / ('val' if i < 4 else 'train') / 'ab'[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8)).save(folder / f'{i}.png')
    data, run = tmp_path / 'data', tmp_path / 'run'
    prepare.prepare(tmp_path / 'raw', data, size=32, format='raw', workers=1)
    prepare.prepare_if_needed(tmp_path / 'raw', tmp_path / 'again', size=32, format='raw', workers=1)
    (tmp_path / 'own.py').write_text(
        'from alexnet_jax import get_config as get\n\n\ndef get_config():\n    return get("quickstart")'
    )
    config = alexnet_jax.get_config(tmp_path / 'own.py')
    changes = {'data.path': str(data), 'model.num_classes': 2, 'num_steps': 1, 'batch_size': 4, 'mesh.tower': 1}
    config.update(helpers.digits_config(**{'data.image_size': 28, **changes}))
    dataset = datasets.open_dataset(data)
    alexnet_jax.train_and_evaluate(config, run)
    checkpoint = alexnet_jax.load_checkpoint(run / 'checkpoints' / '1')
    convert.convert(run, tmp_path / 'weights', to='safetensors')
    convert.convert(tmp_path / 'weights' / 'model.safetensors', tmp_path / 'converted', config=config)
    assert len(alexnet_jax.load_checkpoint(tmp_path / 'converted').network.layers) == 8
    assert verify.verify(run)[1] == verify.verify(data)[1] == []
    hub.export(checkpoint, tmp_path / 'exported', 1)
    activations.write_activations(tmp_path / 'fc7.npz', checkpoint, dataset.split('val'), 'fc7')
    files = predict.list_image_files([tmp_path / 'raw' / 'val'])
    assert len(list(predict.predict_files(checkpoint, [tmp_path / files[0]], views=1, top=1))) == 1
    name, figure, _ = next(figures.draw(checkpoint, run=run))
    plots.save(figure, tmp_path / 'figures', name)
    assert (tmp_path / 'figures' / f'{name}.png').exists()
    result = finetune.finetune(
        config, tmp_path / 'raw', tmp_path / 'tuned', init_from=run, val_fraction=0.1, max_unreadable=0
    )
    assert result.confusion.sum() == 4
