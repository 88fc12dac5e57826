"""Activations against the network's own outputs, a NumPy loop, and the readers of both file formats."""

import os
import pathlib
import re
import shutil
import tempfile

import chex
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import alexnet_jax
from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.convert import layout, loading
from alexnet_jax.convert.weight_file import LayerWeights
from alexnet_jax.core import model
from alexnet_jax.core.architecture import DenseSpec
from alexnet_jax.core.config import augmentation_from_config, model_from_config
from alexnet_jax.core.image_stats import ImageStats
from alexnet_jax.data import datasets
from alexnet_jax.inference import activation_files, activations, predict
from alexnet_jax.inference.evaluate import Evaluator
from alexnet_jax.utils.errors import UserError
from tests import ROOT, helpers
from tests.commands import forked


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
    part = next(activations.iter_activations(half, val[0][:2], 'conv2'))['conv2']
    assert part.dtype == np.float32 and np.array_equal(part, found)
    whole = activations.activations(loaded, val[1][:2], 'conv2')['conv2']
    assert 0 < np.abs(found - whole).max() < 0.1 * whole.max()
    activations.activations(loaded, val[1][2:4], 'conv2')
    function = activations.layer_outputs(loaded, ['conv2'])
    assert function is activations.layer_outputs(loaded, ['conv2']) and function._cache_size() == 1
    assert activations.activations(loaded, val[1][:0], 'conv2')['conv2'].shape == (0, *found.shape[1:])


def _read(path):
    """Reads a file with the standard reader of its format. Returns (arrays, names of the images)."""
    if not str(path).endswith('.safetensors'):
        found = dict(np.load(path))
        return found, found.pop('files').tolist()
    found = safetensors.numpy.load_file(path)
    return found, [os.fsdecode(bytes(row).rstrip(b'\0')) for row in found.pop('files')]


@pytest.mark.parametrize('ending', ['safetensors', 'npz'])
def test_files_keep_the_order_of_the_split(loaded, val, tmp_path, ending):
    """360 images in batches of 100, two layers of different rank, read by the standard readers of both formats."""
    output, layers = tmp_path / f'out.{ending}', ['fc7', 'conv5.pool']
    arrays = activations.write_activations(output, loaded, val[0], layers, batch_size=100)
    found, names = _read(output)
    assert os.listdir(tmp_path) == [f'out.{ending}'] and set(found) == {*layers, 'labels'}
    assert names == [str(i) for i in range(360)]  # these records have no file names
    assert found['labels'].dtype == np.int32 and arrays['labels'] == ('int32', (360,))
    np.testing.assert_array_equal(found['labels'], val[2])
    expected = activations.activations(loaded, val[1], layers)
    for layer, shape in (('fc7', (360, 32)), ('conv5.pool', (360, 3, 3, 8))):
        assert found[layer].dtype == np.float32 and found[layer].shape == shape and arrays[layer] == ('float32', shape)
        np.testing.assert_allclose(found[layer], expected[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('ending', ['safetensors', 'npz'])
def test_one_file_a_layer(loaded, val, tmp_path, monkeypatch, ending):
    """Each file has the names and labels, and is what the single file has; an error leaves no folder."""
    given, layers = {'labels': [2, 0, 1], 'class_names': ['ä', 'b', 'c']}, ['fc7', 'conv5.pool']
    images = list(val[1][:3])
    activations.write_activations(tmp_path / f'all.{ending}', loaded, images, layers, **given)
    whole, names = _read(tmp_path / f'all.{ending}')
    activations.write_activations(tmp_path / f'f/l {{layer}}.{ending}', loaded, images, layers, **given)
    assert sorted(os.listdir(tmp_path / 'f')) == [f'l conv5.pool.{ending}', f'l fc7.{ending}']
    for layer in layers:
        found, same_names = _read(tmp_path / 'f' / f'l {layer}.{ending}')
        assert set(found) == {layer, 'labels', 'class_names'} and same_names == names
        for name in found:
            np.testing.assert_array_equal(found[name], whole[name])
    texts = found['class_names'].tolist() if ending == 'npz' else [bytes(r).decode() for r in found['class_names']]
    assert [text.rstrip('\0') for text in texts] == given['class_names'] and found['labels'].tolist() == [2, 0, 1]
    for output, message in (
        ('f/{layer}.npz', "f' already exists; remove it or choose another --output"),
        ('f/', "a new folder and {layer}, as in 'f/{layer}.npz'"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            activations.write_activations(f'{tmp_path}/{output}', loaded, images, layers)
    with pytest.raises(UserError, match="expected a new folder for the files, as in 'f/{layer}.npz'"):
        activations.write_activations('{layer}.npz', loaded, images, layers)
    write = activation_files._write

    def fail_at_the_second(file, arrays):
        if 'conv5.pool' in arrays:
            raise OSError(28, 'No space left on device')
        write(file, arrays)

    monkeypatch.setattr(activation_files, '_write', fail_at_the_second)
    with pytest.raises(UserError, match='g.: No space left on device'):
        activations.write_activations(f'{tmp_path}/g/{{layer}}.{ending}', loaded, images, layers)
    assert sorted(os.listdir(tmp_path)) == [f'all.{ending}', 'f']


def test_class_folders_give_labels(tmp_path, capfd):
    """As in `prepare`: numbers by value. Flat folders, splits and several paths have no labels."""
    image = helpers.encode(helpers.picture(0), 'PNG')

    def found(*folders):
        root = tmp_path / '-'.join(folders).replace('/', '_')
        files = predict.list_image_files(
            [helpers.write_files(root, {f'{f}/{i}.png': image for f in folders for i in (0, 1)})]
        )
        return predict.class_folders([root], files)

    assert found('b', 'a/deeper', 'a') == ([0, 0, 0, 0, 1, 1], ('a', 'b'))
    assert 'labels are the 2 folders in ' in (said := capfd.readouterr().out) and said.endswith(': a, b\n')
    assert found('10', '9') == ([1, 1, 0, 0], ('9', '10'))
    capfd.readouterr()
    assert found('.', 'a', 'b') is None and found('a') is None and not capfd.readouterr().out
    assert found('train/a', 'train/b', 'val/a') is None
    assert 'holds splits (train, val): no labels' in capfd.readouterr().out
    paths = [tmp_path / 'b-a_deeper-a' / name for name in 'ab']
    assert predict.class_folders(paths, predict.list_image_files(paths)) is None


@pytest.mark.parametrize('ending', ['safetensors', 'npz'])
def test_one_batch_is_held_in_memory(loaded, val, tmp_path, monkeypatch, ending):
    """When a batch is computed, the rows of all earlier batches of every layer are on disk."""
    real, opened, sizes = tempfile.TemporaryFile, [], []
    monkeypatch.setattr(tempfile, 'TemporaryFile', lambda dir: opened.append(real(dir=dir)) or opened[-1])
    map_records = Evaluator.map_records

    def watched(self, *arguments):
        for batch in map_records(self, *arguments):
            for file in opened:
                file.flush()
            sizes.append([os.fstat(file.fileno()).st_size for file in opened])
            yield batch

    monkeypatch.setattr(Evaluator, 'map_records', watched)
    activations.write_activations(tmp_path / f'out.{ending}', loaded, val[0][:10], ['fc6', 'conv3'], batch_size=4)
    conv3 = 4 * 7 * 7 * 8
    assert sizes == [[0, 0], [4 * 4 * 32, 4 * conv3], [8 * 4 * 32, 8 * conv3]] and all(file.closed for file in opened)


@pytest.fixture
def stimuli(tmp_path):
    """A flat folder of images of several sizes and formats."""
    names = ['b.png', '10.jpg', 'a b.bmp', 'bär,1.png', 'sub/c.PNG']
    kinds = {'.jpg': 'JPEG', '.bmp': 'BMP'}
    pictures = [helpers.picture(i, 40 + i, 48) for i in range(len(names))]
    files = {n: helpers.encode(p, kinds.get(n[-4:], 'PNG')) for n, p in zip(names, pictures, strict=True)}
    return helpers.write_files(tmp_path / 'stimuli', files)


_STIMULI = ['10.jpg', 'a b.bmp', 'b.png', 'bär,1.png', 'sub/c.PNG']  # in the order of the names


@pytest.mark.parametrize('ending', ['safetensors', 'npz'])
def test_image_files_have_their_names(loaded, stimuli, tmp_path, ending):
    """Rows are in name order, equal to those of pixels read by Pillow, and there are no labels."""
    paths = [f'{stimuli}/{name}' for name in _STIMULI]
    output = tmp_path / f'out.{ending}'
    files = predict.list_image_files([stimuli])
    arrays = activations.write_activations(output, loaded, files, ['fc7', 'conv3.linear'], batch_size=2)
    found, names = _read(output)
    assert names == paths and set(found) == {'fc7', 'conv3.linear'} and arrays['files'] == ('names', (5,))
    pixels = [np.asarray(Image.open(path).convert('RGB')) for path in paths]
    expected = activations.activations(loaded, pixels, ['fc7', 'conv3.linear'])
    for layer, array in expected.items():
        np.testing.assert_allclose(found[layer], array, rtol=1e-4, atol=1e-5)
    assert len(np.unique(expected['fc7'], axis=0)) == 5


def test_paths_and_folders_in_python(loaded, stimuli):
    paths = [f'{stimuli}/{name}' for name in _STIMULI]
    expected = activations.activations(loaded, [np.asarray(Image.open(path).convert('RGB')) for path in paths], 'fc7')
    pixels = np.asarray(Image.open(paths[0]))
    for images, rows in (
        (stimuli, range(5)),
        (pathlib.Path(stimuli), range(5)),
        ([pathlib.Path(paths[2]), stimuli], [2, *range(5)]),
        ([f'{stimuli}/sub', pixels, Image.open(paths[3])], [4, 0, 3]),
        (iter(paths[:3]), range(3)),
        (paths[1], [1]),
        (Image.open(paths[1]), [1]),
    ):
        found = activations.activations(loaded, images, 'fc7', batch_size=2)['fc7']
        np.testing.assert_allclose(found, expected['fc7'][list(rows)], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match='1 of 2 images cannot be read: .*none.png.* cannot be read as an image'):
        activations.activations(loaded, [paths[0], 'none.png'], 'fc7')
    with pytest.raises(UserError, match='1 of 2 images cannot be read: an image is float64 of shape'):
        activations.activations(loaded, [paths[0], np.zeros((4, 4, 3))], 'fc7')


@pytest.mark.parametrize('ending', ['safetensors', 'npz'])
@pytest.mark.parametrize('labels', [[3, -1, 1], [-1, -1, -1], [None, None, None]])
def test_names_and_labels_of_records(loaded, val, tmp_path, labels, ending):
    """Prepared records have file names. A split without labels has no `labels`; -1 is a missing one."""
    given = ['a.jpg', 'ä/b.jpg', 'c']
    records = [{'image': val[1][i], 'label': labels[i], 'file_name': given[i].encode()} for i in range(3)]
    records = [{key: value for key, value in record.items() if value is not None} for record in records]
    activations.write_activations(tmp_path / f'out.{ending}', loaded, records, 'fc7', batch_size=2)
    found, names = _read(tmp_path / f'out.{ending}')
    assert names == given
    assert found['labels'].tolist() == labels if 3 in labels else 'labels' not in found


@pytest.mark.parametrize('ending', ['safetensors', 'npz'])
def test_name_that_is_not_utf8(loaded, stimuli, tmp_path, ending):
    path = os.path.join(stimuli, 'sub', os.fsdecode(b'\xff.png'))
    os.rename(os.path.join(stimuli, 'b.png'), path)
    activations.write_activations(tmp_path / f'out.{ending}', loaded, [path], 'fc7')
    assert _read(tmp_path / f'out.{ending}')[1] == [path]


def test_repeated_layers_are_written_once(loaded, val, tmp_path):
    activations.write_activations(tmp_path / 'out.npz', loaded, val[0][:2], ['fc7', 'conv5', 'fc7'])
    assert np.load(tmp_path / 'out.npz').files == ['fc7', 'conv5', 'labels', 'files']
    assert list(activations.activations(loaded, val[1][:1], ['fc7', 'conv5', 'fc7'])) == ['fc7', 'conv5']


def _torchvision(**changes):
    """A small network with the layers and operations of configs/torchvision.py."""
    config = alexnet_jax.get_config('torchvision')
    layers = config.model.to_dict()['layers']
    features = dict(conv1=4, conv2=6, conv3=8, conv4=6, conv5=6, fc6=16, fc7=16)
    for name, count in features.items():
        layers[name]['features'] = count
    for name, fields in changes.items():
        layers[name] |= fields
    return model_from_config({**config.model.to_dict(), 'layers': layers, 'num_classes': 5})


# Written from torchvision/models/alexnet.py: the place of each operation in `features` and `classifier`.
_ALIASES = {
    'features.0': 'conv1.linear', 'features.1': 'conv1.relu', 'features.2': 'conv1.pool', 'features.3': 'conv2.linear',
    'features.4': 'conv2.relu', 'features.5': 'conv2.pool', 'features.6': 'conv3.linear', 'features.7': 'conv3.relu',
    'features.8': 'conv4.linear', 'features.9': 'conv4.relu', 'features.10': 'conv5.linear',
    'features.11': 'conv5.relu', 'features.12': 'conv5.pool', 'avgpool': 'conv5.pool', 'classifier.0': 'conv5.dropout',
    'classifier.1': 'fc6.linear', 'classifier.2': 'fc6.relu', 'classifier.3': 'fc6.dropout',
    'classifier.4': 'fc7.linear', 'classifier.5': 'fc7.relu', 'classifier.6': 'fc8.linear',
}  # fmt: skip


def test_names_of_torchvision():
    names = activations.activation_names(_torchvision())
    assert {name: names[name] for name in _ALIASES} == {name: names[own] for name, own in _ALIASES.items()}
    assert 'classifier.7' not in names and 'features.13' not in names
    page = (ROOT / 'docs' / 'python_api.md').read_text()
    rows = re.findall(r'^\| `((?:features|classifier)\.\d+|avgpool)` \| `([\w.]+)`', page, re.MULTILINE)
    assert dict(rows) == _ALIASES


@pytest.mark.parametrize(
    'change',
    [{'conv1': {'post': 'relu lrn pool'}}, {'fc7': {'post': 'relu dropout'}}, {'conv5': {'post': 'pool relu dropout'}}],
)
def test_no_torchvision_names_for_other_layouts(change):
    assert not set(_ALIASES) & set(activations.activation_names(_torchvision(**change)))


def test_torchvision_names_match_pytorch():
    """Every module of torchvision's network, by its name there, in PyTorch's order of axes."""
    torch = pytest.importorskip('torch', reason="needs PyTorch: pip install 'alexnet_jax[oracle]'")
    nn, network = torch.nn, _torchvision()
    torch.manual_seed(0)
    relu_pool = lambda: (nn.ReLU(), nn.MaxPool2d(3, 2))  # noqa: E731
    net = nn.ModuleDict({
        'features': nn.Sequential(
            nn.Conv2d(3, 4, 11, 4, 2), *relu_pool(), nn.Conv2d(4, 6, 5, padding=2), *relu_pool(),
            nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1), *relu_pool(),
        ),
        'avgpool': nn.AdaptiveAvgPool2d((6, 6)),
        'classifier': nn.Sequential(
            nn.Dropout(), nn.Linear(6 * 36, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)
        ),
    }).eval()  # fmt: skip
    expected = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda _, x, y, name=name: expected.update({name: y.detach().numpy()}))
    image = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    x = torch.tensor(image.astype(np.float32) / 255 - 0.5).permute(0, 3, 1, 2)
    net['classifier'](net['avgpool'](net['features'](x)).flatten(1))
    weights = [layer for part in ('features', 'classifier') for layer in net[part] if hasattr(layer, 'weight')]
    layers = [LayerWeights('', w.weight.detach().numpy(), w.bias.detach().numpy()) for w in weights]
    stats = ImageStats(np.full((224, 224, 3), 127.5, np.float32), np.zeros(3, np.float32), np.eye(3, dtype=np.float32))
    augmentation = augmentation_from_config({**alexnet_jax.get_config('torchvision').data, 'pixel_std': (255.0,) * 3})
    params = layout.to_params(network, 224, layers)
    loaded = Checkpoint(0, params, network, augmentation, 224, tuple('abcde'), stats, {})
    found = activations.activations(loaded, image, list(_ALIASES))
    for name, array in found.items():
        array = array if array.ndim == 2 else array.transpose(0, 3, 1, 2)
        np.testing.assert_allclose(array.reshape(expected[name].shape), expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('as_files', [True, False])
def test_unreadable_images_have_no_row(loaded, val, stimuli, tmp_path, capsys, as_files):
    """The other rows are written, with their names; the error names the unreadable images and counts them."""
    bad = {f'{stimuli}/broken{i}.jpg': b'no image' for i in range(12)}
    helpers.write_files(pathlib.Path(stimuli), {os.path.basename(name): content for name, content in bad.items()})
    files = predict.list_image_files([stimuli])
    good = [name for name in files if name not in bad]
    if as_files:
        images, reason = files, f"'{stimuli}/broken0.jpg' cannot be read as an image .unknown image format.*convert or"
    else:
        pixels = {name: val[1][i] for i, name in enumerate(good)}
        images = [{'image': pixels.get(n, b'no image'), 'label': 1, 'file_name': n.encode()} for n in files]
        reason = "broken0.jpg', .*; prepare the data again"
    with pytest.raises(UserError, match=f'12 of 17 images cannot be read and have no row .*{reason}') as error:
        activations.write_activations(tmp_path / 'out.npz', loaded, images, 'fc7', batch_size=4)
    assert ' and 2 more; ' in str(error.value) and 'broken0.jpg' in capsys.readouterr().err
    found, names = _read(tmp_path / 'out.npz')
    assert names == good and found['fc7'].shape == (5, 32) and ('labels' in found) is not as_files
    rows = [files.index(name) for name in good]
    again = good if as_files else np.stack([images[row]['image'] for row in rows])
    np.testing.assert_allclose(found['fc7'], activations.activations(loaded, again, 'fc7')['fc7'], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match='1 of 1 images cannot be read'):
        activations.write_activations(tmp_path / 'none.npz', loaded, [images[files.index(next(iter(bad)))]], 'fc7')
    assert sorted(os.listdir(tmp_path)) == ['out.npz', 'stimuli']
    with pytest.raises(UserError, match='12 of 17 images cannot be read'):
        list(activations.iter_activations(loaded, images, 'fc7'))


def test_user_errors(loaded, val, tmp_path):
    (tmp_path / 'there.npz').write_text('mine')
    for name, layer, message in (
        ('out.npz', 'fc9', "unknown layer 'fc9'. Did you mean 'fc8'?"),
        ('out.npz', 'conv1.norm', "unknown layer 'conv1.norm'. Did you mean 'conv1"),
        ('out.npz', ['fc7', 'features.10'], "unknown layer 'features.10': the network does not have torchvision's lay"),
        ('out.npz', [], 'no layers given; choose from: conv1.linear'),
        ('out.h5', 'fc7', 'expected a name ending in .safetensors or .npz'),
        ('there.npz', 'fc7', 'already exists; remove it or choose another --output'),
        ('none/out.npz', 'fc7', 'cannot be written: No such file or directory'),
    ):
        with pytest.raises(UserError) as error:
            activations.write_activations(str(tmp_path / name), loaded, val[0], layer)
        assert message in str(error.value)
    with pytest.raises(UserError, match='there are no images'):
        activations.write_activations(tmp_path / 'out.npz', loaded, [], 'fc7')
    assert os.listdir(tmp_path) == ['there.npz'] and (tmp_path / 'there.npz').read_text() == 'mine'
    with pytest.raises(UserError, match=r'images are float64 of shape .*: expected uint8 of shape \(N, 32, 32, 3\)'):
        activations.activations(loaded, np.zeros((1, 32, 32, 3)), 'fc7')
    with pytest.raises(UserError, match="unknown layer 'fc'"):
        activations.iter_activations(loaded, val[0], 'fc')  # raised before the first batch is requested


def test_full_disk_is_refused_at_the_start(loaded, val, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=2 * 4 * 32 * 360 - 1))
    with pytest.raises(UserError, match='takes 0.0 GB, and as much again .* use another disk'):
        activations.write_activations(tmp_path / 'out.npz', loaded, val[0], 'fc7')
    assert not os.listdir(tmp_path)


def _run(path, tmp_path, *words):
    return forked.run_command(['activations', f'--checkpoint={path}', '--cpu_devices=1', *map(str, words)], tmp_path)


@pytest.mark.parametrize('flags', [['--layers=fc7,conv5'], ['--layers=fc7', '--layers= conv5']])
def test_command_writes_a_split(path, loaded, val, tmp_path, flags):
    result = _run(path, tmp_path, '--data=digits', *flags, f'--output={tmp_path}/out.npz')
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert (
        'fc7 float32 [360, 32], conv5 float32 [360, 3, 3, 8], labels int32 [360], files names [360], class_names names '
        '[10];' in result.stdout
    )
    found, names = _read(tmp_path / 'out.npz')
    np.testing.assert_array_equal(found['labels'], val[2])
    assert set(found) == {'fc7', 'conv5', 'labels', 'class_names'} and names[-1] == '359'
    assert found['class_names'].tolist() == list('0123456789')
    expected = activations.activations(loaded, val[1][-3:], 'fc7')['fc7']
    np.testing.assert_allclose(found['fc7'][-3:], expected, rtol=1e-4, atol=1e-5)


def test_command_pools_feature_maps(path, loaded, val, tmp_path):
    output = tmp_path / 'out.npz'
    result = _run(path, tmp_path, '--data=digits', '--layers=conv5', '--layers=fc7', '--pool=max', f'--output={output}')
    assert 'conv5 float32 [360, 8], fc7 float32 [360, 32]' in result.stdout
    maps = activations.activations(loaded, val[1][:5], 'conv5')['conv5']
    np.testing.assert_allclose(_read(output)[0]['conv5'][:5], maps.max((1, 2)), rtol=1e-5)


def test_command_labels_class_folders(path, tmp_path):
    image = helpers.encode(helpers.picture(0), 'PNG')
    folder = helpers.write_files(tmp_path / 'in', {f'{name}/0.png': image for name in ('dog', 'café')})
    result = _run(path, tmp_path, f'--images={folder}', '--layers=fc7', f'--output={tmp_path}/f/{{layer}}.npz')
    assert result.returncode == 0 and not result.stderr, result.stderr
    found, names = _read(tmp_path / 'f' / 'fc7.npz')
    assert names == [f'{folder}/café/0.png', f'{folder}/dog/0.png']
    assert found['labels'].tolist() == [0, 1] and found['class_names'].tolist() == ['café', 'dog']


def test_command_reads_files_and_folders(path, stimuli, tmp_path):
    more = [f'--images={stimuli}/b.png', f'--images={stimuli}/sub', f'--images={stimuli}/bär,1.png']
    result = _run(path, tmp_path, *more, '--layers=conv3,fc7', f'--output={tmp_path}/out.safetensors')
    assert result.returncode == 0 and not result.stderr, result.stderr
    found, names = _read(tmp_path / 'out.safetensors')
    assert names == [f'{stimuli}/b.png', f'{stimuli}/sub/c.PNG', f'{stimuli}/bär,1.png']
    assert found['conv3'].shape == (3, 7, 7, 8) and found['fc7'].shape == (3, 32)


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--data=digits', '--layers=fc77'], "unknown layer 'fc77'"),
        (['--data=digits', '--layer=fc7', '--layer=conv5'], "Unknown command line flag 'layer'. Did you mean: layers"),
        (['--data=digits', '--layers=fc7', '--split=val', '--split=train'], 'flag --split=train: already defined as'),
        (['--data=digits'], '--layers is missing'),
        (['--data=digits', '--layers=,'], 'no layers given; choose from: conv1.linear, '),
        (['--layers=fc7'], 'expected either --data=DIR or --images=FOLDER_OR_FILE'),
        (['--layers=fc7', '--data=digits', '--images=W'], 'expected either --data=DIR or --images=FOLDER_OR_FILE'),
        (['--layers=fc7', '--images=W', '--split=train'], '--split=train: --images has no splits'),
        (['--layers=fc7', '--images=W/none'], "none' does not exist; give an image file or a folder"),
        (['--layers=fc7', '--images=W/sub'], "sub' contains no images"),
        (['--layers=fc7', '--images=W', 'b.png'], "unexpected argument 'b.png'"),
    ],
)  # fmt: skip
def test_command_refuses(path, tmp_path, words, message):
    (tmp_path / 'w' / 'sub').mkdir(parents=True)
    Image.fromarray(helpers.picture(0)).save(tmp_path / 'w' / 'a.png')
    words = [word.replace('W', str(tmp_path / 'w')) for word in words]
    wrong = _run(path, tmp_path, *words, f'--output={tmp_path}/out.npz')
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1 and message in wrong.stderr, wrong.stderr
    assert not (tmp_path / 'out.npz').exists()
