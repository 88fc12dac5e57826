"""Values of a wrong kind in the Python API: each ends in one line that says what was expected."""

import jax
import numpy as np
import pytest
from PIL import Image

import alexnet_jax
from alexnet_jax.utils.errors import UserError
from tests import helpers

_RNG = np.random.default_rng(0)
_IMAGE = _RNG.integers(0, 256, (40, 48, 3), np.uint8)
_IMAGES, _LABELS = _RNG.integers(0, 256, (8, 32, 32, 3), np.uint8), np.arange(8)
_ARRAYS = {'image': _IMAGES, 'label': _LABELS}


def _raises(pattern):
    return pytest.raises(UserError, match=rf'\A(?!.*\n).*{pattern}')  # in one line


@pytest.fixture(scope='module')
def setup():
    config = helpers.digits_config(**{'batch_size': 8, 'mesh.tower': 1, 'mesh.data': 1})
    return alexnet_jax.build(config, alexnet_jax.in_memory({'train': _ARRAYS}, [str(i) for i in range(10)]))


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return alexnet_jax.load_checkpoint(helpers.save_untrained(tmp_path_factory.mktemp('run')))


@pytest.mark.parametrize(
    'image',
    [
        None, 3, 1.5, b'abc', np.uint8(3), _IMAGE[0, 0], _IMAGE[..., 0], _IMAGE[None, None], _IMAGE.transpose(2, 0, 1),
        _IMAGE / 255, _IMAGE.astype(int), _IMAGE > 3, _IMAGE[:0], _IMAGE[:, :0], _IMAGE[..., :0],
        np.zeros((9, 9, 5), np.uint8), _IMAGE.astype(complex), [[1, 2], [3]], [None], {'image': _IMAGE}, object(),
        [object()], Image.new('F', (9, 9)), Image.new('I', (9, 9)), Image.new('RGB', (0, 9)), '', 'a\0b',
        np.array(['none.jpg']),
    ],
    ids=lambda value: f'{type(value).__name__}{getattr(value, "shape", "")}',
)  # fmt: skip
def test_predict_and_activations_refuse_other_images(checkpoint, image):
    for call in (alexnet_jax.predict, lambda *given: alexnet_jax.activations(*given, 'conv1')):
        with _raises('(expected|cannot be read)'):
            call(checkpoint, image)


def test_predict_says_how_to_read_a_folder(checkpoint, tmp_path):
    with _raises(r"' is a folder; give its files, predict.list_image_files\("):
        alexnet_jax.predict(checkpoint, tmp_path)


def test_all_unreadable_images_are_named_at_once(checkpoint, tmp_path):
    """Files, and arrays among them; the readable ones in between do not hide those that follow."""
    bad = {f'bad{i:02}.png': b'no image' for i in range(13)}
    helpers.write_files(tmp_path, bad | {'good.png': helpers.encode(_IMAGE, 'PNG')})
    paths = [tmp_path / name for name in ['bad00.png', 'good.png', *list(bad)[1:], 'none.png']]
    for call in (alexnet_jax.predict, lambda *given: alexnet_jax.activations(*given, 'conv1')):
        with _raises('15 of 17 images cannot be read: ') as error:
            call(checkpoint, [*paths, _IMAGE, _IMAGE / 255])
        message = str(error.value)
        assert all(f"{name}' cannot be read as an image (unknown image format)" in message for name in bad)
        assert "none.png' cannot be read as an image ([Errno 2] No such file" in message
        assert 'an image is float64 of shape (40, 48, 3): expected uint8' in message
        with _raises('2 of 3 images cannot be read: an image is float64 .* an image is bool'):
            call(checkpoint, [_IMAGE / 255, _IMAGE, _IMAGE > 3])


def test_predict_and_activations_refuse_other_arguments(checkpoint):
    for value in ('runs/x', None, {}, checkpoint.params):
        with _raises('checkpoint is .*: expected a Checkpoint; use alexnet_jax.load_checkpoint'):
            alexnet_jax.predict(value, _IMAGE)
        with _raises('checkpoint is .*: expected a Checkpoint; use alexnet_jax.load_checkpoint'):
            alexnet_jax.activations(value, _IMAGE, 'conv1')
    for size in (0, -1, 1.5, None, '8'):
        with _raises('batch_size=.*: expected a positive integer'):
            alexnet_jax.predict(checkpoint, _IMAGE, batch_size=size)
    with _raises('mesh is int: expected a Mesh'):
        alexnet_jax.predict(checkpoint, _IMAGE, mesh=3)
    for layers in ([], {}):
        with _raises('no layers given; choose from: conv1'):
            alexnet_jax.activations(checkpoint, _IMAGE, layers)
    for layers in (5, None, [5], b'conv1'):
        with _raises("layers is .*: expected a name or several, such as 'conv1'"):
            alexnet_jax.activations(checkpoint, _IMAGE, layers)


@pytest.mark.parametrize(
    ('splits', 'pattern'),
    [
        (None, 'splits is NoneType: expected a dict'),
        ([_ARRAYS], 'splits is list: expected a dict'),
        ({'train': 3}, 'a split is int: expected a dict of arrays'),
        ({'train': _IMAGES}, 'a split is ndarray: expected'),
        ({'train': _ARRAYS, 'validation': _ARRAYS}, "split 'validation': expected one of train, val, test"),
        ({'train': {'image': _IMAGES}}, r"a split is {'image': \(8, 32, 32, 3\)}: expected a dict of arrays"),
        ({'train': {'label': _LABELS}}, 'a split is .*: expected'),
        ({'train': _ARRAYS | {'image': None}}, "a split is {'image': NoneType, .*: expected"),
        ({'train': _ARRAYS | {'label': None}}, 'a split is .*: expected'),
        ({'train': _ARRAYS | {'label': 3}}, 'a split is .*: expected'),
        ({'train': _ARRAYS | {'label': [[1], [2, 3]]}}, 'a split is .*: expected'),
        ({'train': _ARRAYS | {'image': np.array(3)}}, r"a split is {'image': \(\), .*: expected"),
        ({'train': _ARRAYS | {'label': np.eye(10, dtype=int)[_LABELS]}}, r"'label': \(8, 10\)}: expected"),
        ({'train': _ARRAYS | {'label': _LABELS + 0.5}}, 'the labels are float64; expected integers'),
        ({'train': _ARRAYS | {'label': ['1'] * 8}}, 'the labels are <U1; expected integers'),
        ({'train': _ARRAYS | {'label': _LABELS + 10**9}}, 'the highest label is 1000000007; give class_names'),
        ({'train': _ARRAYS | {'image': _IMAGES / 255}}, r'an image is float64 of shape \(32, 32, 3\); expected uint8'),
        ({'train': _ARRAYS | {'image': _IMAGES[..., 0]}}, 'an image is uint8 of shape .*; expected'),
        ({'train': _ARRAYS | {'image': _IMAGES[:, :20]}}, 'an image is uint8 of shape .*; expected'),
        ({'train': _ARRAYS | {'image': _IMAGES[:, :0, :0]}}, r'an image is uint8 of shape \(0, 0, 3\); expected'),
        ({'train': _ARRAYS | {'image': _LABELS}}, 'an image is int64 of shape .*; expected'),
        ({'train': [{'image': _IMAGES[0]}]}, 'a split holds .*: expected'),
        ({'train': [(_IMAGES[0], 1)]}, 'a split holds tuple: expected'),
        ({'train': [{'image': _IMAGES[0], 'label': None}]}, 'an image has the label None; expected an integer'),
        ({'train': (record for record in ())}, 'a split is generator: expected'),
    ],
)
def test_in_memory_refuses_other_splits(splits, pattern):
    with _raises(pattern):
        alexnet_jax.in_memory(splits)


def test_in_memory_refuses_other_class_names():
    for names in ('01234567', 8, [None] * 8):
        with _raises('expected'):
            alexnet_jax.in_memory({'train': _ARRAYS}, names)
    assert alexnet_jax.in_memory({'train': _ARRAYS}, range(8)).class_names == tuple('01234567')


@pytest.mark.parametrize(
    'images',
    [_IMAGE, _IMAGE[0], _IMAGES[None], _IMAGES.tolist(), None, _IMAGES[..., :2]],
    ids=lambda x: f'{type(x).__name__}{getattr(x, "shape", "")}',
)
def test_ten_views_refuses_other_images(images):
    with _raises(r'images are .*: expected an array of shape \(N, S, S, 3\)'):
        alexnet_jax.ten_views(images, 8)


@pytest.mark.parametrize('size', [33, 0, -3, 8.0, None, '8'])
def test_ten_views_refuses_other_sizes(size):
    with _raises('size=.*: expected an integer from 1 to 32'):
        alexnet_jax.ten_views(_IMAGES, size)


@pytest.mark.parametrize(
    'batch',
    [
        None, (_IMAGES, _LABELS), _IMAGES, {'image': _IMAGES}, {'label': _LABELS},
        {'image': _IMAGES, 'labels': _LABELS},
        *(_ARRAYS | {'label': labels} for labels in (3, None, ['a'] * 8, _LABELS[:, None], np.eye(8, dtype=int))),
        *(_ARRAYS | {'image': images} for images in (np.uint8(3), None, [_IMAGE, _IMAGE[:3]])),
        *(_ARRAYS | {'weight': w} for w in (1.0, None, ['x'] * 8, np.ones((8, 1)), np.full(8, np.nan), -np.ones(8))),
    ],
    ids=range(20),
)  # fmt: skip
def test_train_step_refuses_other_batches(setup, batch):
    with _raises('expected|is not one array'):
        setup.train_step(setup.init(jax.random.key(0)), batch)


def test_other_objects_and_paths_are_refused(setup, tmp_path):
    for value in (str(tmp_path), {'train': _ARRAYS}, [_ARRAYS]):
        with _raises('the dataset is .*: expected a Dataset; use alexnet_jax.in_memory'):
            alexnet_jax.build(setup.config, value)
        with _raises('the dataset is .*: expected a Dataset'):
            alexnet_jax.train_and_evaluate(setup.config, tmp_path / 'run', dataset=value)
    with _raises('devices is str: expected a list'):
        alexnet_jax.build(setup.config, setup.dataset, 'cpu')
    with _raises('the state is dict: expected a TrainState'):
        setup.train_step({}, _ARRAYS)
    for path in (None, 3, []):
        for function in (alexnet_jax.load_checkpoint, alexnet_jax.get_config):
            with _raises('a path is .*: expected str or pathlib.Path'):
                function(path)
    for size in (0, -5, 28.0, None, '28', (28, 28)):
        with _raises('image_size=.*: expected a positive integer'):
            alexnet_jax.init_params(setup.network, jax.random.key(0), size)
    with _raises('the model is NoneType: expected an AlexNet'):
        alexnet_jax.init_params(None, jax.random.key(0), 28)
    params = setup.init(jax.random.key(0)).params
    for x in (np.zeros((28, 28, 3)), np.zeros((3, 3)), None):
        with pytest.raises(UserError, match='^the input has . axes: expected 4'):
            setup.network.apply({'params': params}, x)
