"""Activations against the network's own outputs, a NumPy loop, and the readers of both file formats."""

import io
import json
import os
import struct

import chex
import numpy as np
import pytest
import safetensors.numpy

from alexnet_jax.checkpoints import loading
from alexnet_jax.core import model
from alexnet_jax.core.architecture import DenseSpec
from alexnet_jax.data import datasets
from alexnet_jax.inference import activations, predict
from alexnet_jax.utils.errors import UserError
from tests import helpers


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    return helpers.save_untrained(tmp_path_factory.mktemp('features') / 'run')


@pytest.fixture(scope='module')
def loaded(path):
    return loading.load_checkpoint(path)


@pytest.fixture(scope='module')
def val():
    records = datasets.open_dataset('digits').split('val')
    return records, np.stack([r['image'] for r in records]), np.array([r['label'] for r in records], np.int32)


def test_probabilities_follow_from_fc7(loaded, val):
    """fc8 reads half of fc7 at test time (section 4.2); the batch size does not divide the number of images."""
    found = activations.activations(loaded, val[1][:40], ['fc7'], batch_size=16)
    fc8 = loaded.params['fc8']
    logits = 0.5 * found['fc7'].astype(np.float64) @ fc8['kernel'] + fc8['bias']
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, predict.predict(loaded, val[1][:40], views=1), rtol=1e-4)


def test_first_layer_matches_loop(loaded, val):
    """The input is the center crop minus its part of the mean image, padded with zeros."""
    found = activations.activations(loaded, val[1][:2], 'conv1.linear')['conv1.linear']
    assert found.shape == (2, 28, 28, 8) and found.dtype == np.float32
    pixels = val[1][1].astype(np.float64) - loaded.image_stats.mean_image
    padded = np.pad(pixels[2:30, 2:30], ((2, 2), (2, 2), (0, 0)))
    conv1 = loaded.params['conv1']
    for y, x, map_ in ((0, 0, 0), (27, 5, 3), (13, 14, 7)):
        expected = conv1['bias'][map_]
        for i in range(5):
            for j in range(5):
                for color in range(3):
                    expected += padded[y + i, x + j, color] * conv1['kernel'][i, j, color, map_]
        np.testing.assert_allclose(found[1, y, x, map_], expected, rtol=1e-4)


def test_layer_and_step_names(loaded, val):
    """A layer name selects the output before dropout, after all other steps; a step name the output of that step."""
    asked = ['conv1.relu', 'conv1.pool', 'conv1', 'conv3', 'conv5', 'fc6', 'fc6.relu', 'fc6.dropout', 'fc8']
    found = activations.activations(loaded, val[1][:3], asked)
    assert list(found) == asked
    x = (val[1][:3].astype(np.float32) - loaded.image_stats.mean_image[None])[:, 2:30, 2:30]
    logits, state = loaded.network.apply({'params': loaded.params}, x, mutable='intermediates')
    sown = state['intermediates']
    for name, key in (('conv1.relu', 'conv1.relu'), ('conv1.pool', 'conv1.pool'), ('conv1', 'conv1.pool'),
                      ('conv3', 'conv3.relu'), ('conv5', 'conv5.pool'), ('fc6', 'fc6.relu')):  # fmt: skip
        np.testing.assert_allclose(found[name], sown[key][0], rtol=1e-4, atol=1e-4)
        assert np.any(found[name] > 0)
    chex.assert_trees_all_equal(found['fc6'], found['fc6.relu'])
    np.testing.assert_allclose(found['fc6.dropout'], 0.5 * found['fc6'], rtol=1e-6)
    np.testing.assert_allclose(found['fc8'], logits, rtol=1e-4, atol=1e-4)


def test_names_if_dropout_is_not_last():
    network = model.AlexNet(
        layers={
            'fc1': DenseSpec(features=8, post='relu dropout relu'),
            'fc2': DenseSpec(features=8, post='dropout'),
            'fc3': DenseSpec(),
        }
    )
    names = activations.activation_names(network)
    assert names['fc1'] == ('fc1.relu', 0) and names['fc1.relu'] == ('fc1.relu', -1)
    assert names['fc2'] == ('fc2.linear', 0) and names['fc3'] == ('fc3.linear', 0)
    assert set(names) == {'fc1', 'fc1.linear', 'fc1.relu', 'fc1.dropout', 'fc2', 'fc2.linear', 'fc2.dropout', 'fc3',
                          'fc3.linear'}  # fmt: skip


def test_compiled_once_and_float32(loaded, val):
    half = loaded._replace(network=loaded.network.clone(dtype='bfloat16'))
    found = activations.activations(half, val[1][:2], 'conv2')['conv2']
    assert found.dtype == np.float32
    part, _ = next(activations.iter_activations(half, val[0][:2], 'conv2'))
    assert part.dtype == np.float32 and np.array_equal(part, found)
    whole = activations.activations(loaded, val[1][:2], 'conv2')['conv2']
    assert 0 < np.abs(found - whole).max() < 0.1 * whole.max()
    activations.activations(loaded, val[1][2:4], 'conv2')
    function = activations._layer_outputs(loaded, ['conv2'])
    assert function is activations._layer_outputs(loaded, ['conv2']) and function._cache_size() == 1
    assert activations.activations(loaded, val[1][:0], 'conv2')['conv2'].shape == (0, *found.shape[1:])


@pytest.mark.parametrize('layer', ['fc7', 'conv5.pool'])
@pytest.mark.parametrize('ending', ['safetensors', 'npz'])
def test_files_keep_the_order_of_the_split(loaded, val, tmp_path, layer, ending):
    """360 images in batches of 100, read by the standard readers of both formats."""
    output = str(tmp_path / f'out.{ending}')
    shape = activations.write_activations(output, loaded, val[0], layer, batch_size=100)
    found = safetensors.numpy.load_file(output) if ending == 'safetensors' else dict(np.load(output))
    assert os.listdir(tmp_path) == [f'out.{ending}'] and set(found) == {'features', 'labels'}
    assert found['features'].dtype == np.float32 and found['labels'].dtype == np.int32
    assert found['features'].shape == shape == (360, *((32,) if layer == 'fc7' else (3, 3, 8)))
    np.testing.assert_array_equal(found['labels'], val[2])
    expected = activations.activations(loaded, val[1], layer)[layer]
    np.testing.assert_allclose(found['features'], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('write', [activations._write_safetensors, activations._write_npz])
def test_rows_are_written_incrementally(write):
    """When a batch is requested, the previous one is already in the file."""
    file, positions = io.BytesIO(), []

    def parts():
        for i in range(3):
            positions.append(file.tell())
            yield np.full((50, 100), i, np.float32), np.full(50, i, np.int32)

    write(file, (150, 100), parts())
    assert np.diff(positions).tolist() == [20000, 20000]
    if write is activations._write_safetensors:
        (length,) = struct.unpack('<Q', file.getvalue()[:8])
        assert length % 8 == 0 and len(file.getvalue()) == 8 + length + 150 * 404
        assert json.loads(file.getvalue()[8 : 8 + length])['labels']['data_offsets'] == [60000, 60600]


def test_unreadable_images_are_refused(loaded, val, tmp_path, capsys):
    records = [*val[0][:3], {'image': b'no image', 'file_name': b'broken.jpg', 'label': 1}, *val[0][4:6]]
    with pytest.raises(UserError, match=r'1 of 6 images cannot be read \(named above\)'):
        activations.write_activations(str(tmp_path / 'out.npz'), loaded, records, 'fc7', batch_size=4)
    assert 'broken.jpg' in capsys.readouterr().err and not os.listdir(tmp_path)


def test_user_errors(loaded, val, tmp_path):
    (tmp_path / 'there.npz').write_text('mine')
    for name, layer, message in (
        ('out.npz', 'fc9', "unknown layer 'fc9'. Did you mean 'fc8'?"),
        ('out.npz', 'conv1.norm', "unknown layer 'conv1.norm'. Did you mean 'conv1"),
        ('out.h5', 'fc7', 'expected a name ending in .safetensors or .npz'),
        ('there.npz', 'fc7', 'already exists; remove it or choose another --output'),
        ('none/out.npz', 'fc7', 'cannot be written: No such file or directory'),
    ):
        with pytest.raises(UserError) as error:
            activations.write_activations(str(tmp_path / name), loaded, val[0], layer)
        assert message in str(error.value)
    assert os.listdir(tmp_path) == ['there.npz'] and (tmp_path / 'there.npz').read_text() == 'mine'
    with pytest.raises(UserError, match=r'images are float64 of shape .*: expected uint8 of shape \(N, 32, 32, 3\)'):
        activations.activations(loaded, np.zeros((1, 32, 32, 3)), 'fc7')
    with pytest.raises(UserError, match="unknown layer 'fc'"):
        activations.iter_activations(loaded, val[0], 'fc')  # raised before the first batch is requested


@pytest.mark.slow
def test_command(path, loaded, tmp_path):
    fixed = [f'--checkpoint={path}', '--data=digits', '--cpu_devices=1']
    result = helpers.run_command(
        'activations', *fixed, '--layer=fc7', f'--output={tmp_path}/out.safetensors', '--split=train'
    )
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert 'features float32 [1437, 32], labels int32 [1437]; fc7 of' in result.stdout
    found = safetensors.numpy.load_file(tmp_path / 'out.safetensors')
    train = datasets.open_dataset('digits').split('train')
    np.testing.assert_array_equal(found['labels'], [record['label'] for record in train])
    images = np.stack([record['image'] for record in train[-3:]])
    expected = activations.activations(loaded, images, 'fc7')['fc7']
    np.testing.assert_allclose(found['features'][-3:], expected, rtol=1e-4, atol=1e-5)
    wrong = helpers.run_command('activations', *fixed, '--layer=fc77', f'--output={tmp_path}/out.npz')
    assert wrong.returncode == 2 and "no layer 'fc77'" in wrong.stderr and len(wrong.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == ['out.safetensors']
