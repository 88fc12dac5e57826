"""Datasets by name, by folder and from arrays, and what is refused."""

import collections
import importlib.util
import sys

import chex
import numpy as np
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds

from alexnet_jax.data import datasets
from alexnet_jax.utils.errors import UserError


@pytest.mark.parametrize(
    'named',
    [
        '{"pythonClassName": "antigravity.FeaturesDict", "featuresDict": {"features": {}}}',
        '{"python_class_name": "antigravity.FeaturesDict", "featuresDict": {"features": {}}}',
        '{"python\\u0043lassName": "antigravity.FeaturesDict", "featuresDict": {"features": {}}}',
        '{"type": "antigravity.FeaturesDict", "content": {}}',
        '{"type": "tensorflow_datasets.core.features.Image", "proto_cls": "antigravity.X", "content": {}}',
    ],
    ids=['camel case', 'snake case', 'escaped', 'type', 'proto class'],
)
def test_foreign_features_are_not_imported(named, tmp_path):
    """TFDS imports the module named in features.json, whatever the spelling, and calls what it finds there."""
    data = tmp_path / 'data'
    data.mkdir()
    (data / 'dataset_info.json').write_text('{}')
    (data / 'features.json').write_text(named)
    with pytest.raises(UserError, match="names the class 'antigravity.*'; expected only TFDS features"):
        datasets.open_dataset(str(data))
    assert 'antigravity' not in sys.modules
    (data / 'features.json').write_text(' ' * 2**24 + named)
    with pytest.raises(UserError, match='characters or more'):
        datasets.open_dataset(str(data))
    (data / 'features.json').write_text('[' * 10**6)
    with pytest.raises(UserError, match='cannot be opened as a prepared dataset'):
        datasets.open_dataset(str(data))


def test_digits_are_those_of_scikit_learn():
    expected = sklearn.datasets.load_digits()
    digits = datasets.open_dataset('digits')
    records = [*digits.split('train'), *digits.split('val')]
    assert collections.Counter(record['label'] for record in records) == collections.Counter(expected.target.tolist())
    scaled = expected.images.sum() * (255 / 16) * 4 * 4 * 3  # enlarged from 8 to 32 px, three channels
    assert sum(int(record['image'].sum()) for record in records) == pytest.approx(scaled, rel=1e-3)
    validated = np.random.default_rng(0).permutation(len(records))[:360]
    assert [record['label'] for record in digits.split('val')] == expected.target[validated].tolist()


def test_digits_splits_are_disjoint():
    digits = datasets.open_dataset('digits')
    train, val = digits.split('train'), digits.split('val')
    assert (len(train), len(val), digits.record_size) == (1437, 360, 32)
    assert set(r['label'] for r in train) == set(range(10)) and len(digits.class_names) == 10
    assert not {r['image'].tobytes() for r in train} & {r['image'].tobytes() for r in val}
    mean = np.mean([r['image'] for r in train], axis=0)
    chex.assert_trees_all_close(digits.image_stats.mean_image, mean.astype(np.float32), rtol=1e-5)
    with pytest.raises(UserError, match="no split 'test' in this dataset; choose from: train, val"):
        digits.split('test')


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=r"needs scikit-learn: pip install 'alexnet_jax\[quickstart\]'"):
        datasets.open_dataset('digits')


def test_missing_data_error_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r'no data directory .*alexnet_jax prepare --input=IMAGES --output='):
        datasets.open_dataset(str(tmp_path / 'nowhere'))
    with pytest.raises(UserError, match='is not prepared data'):
        datasets.open_dataset(str(tmp_path))
    with pytest.raises(UserError, match='no dataset given'):
        datasets.open_dataset('')


def test_subsets_are_deterministic_and_nested():
    records = [{'label': i} for i in range(1000)]
    small, large = (datasets.subset(records, fraction) for fraction in (0.1, 0.35))
    few, many = ([record['label'] for record in part] for part in (small, large))
    assert (len(few), len(many)) == (100, 350)
    assert set(few) <= set(many) and sorted(few) == few
    assert few == [record['label'] for record in datasets.subset(records, 0.1)]
    assert 30 < sum(label < 500 for label in few) < 70  # spread over the whole split
    assert datasets.subset(records, 1.0) is records


@pytest.mark.parametrize(
    ('image', 'label', 'message'),
    [
        (np.ones((8, 8, 3), np.float32), 0, r'is float32 of shape \(8, 8, 3\); expected uint8 of shape \(8, 8, 3\)'),
        (np.ones((9, 9, 3), np.uint8), 0, r'is uint8 of shape \(9, 9, 3\); expected uint8 of shape \(8, 8, 3\)'),
        (np.ones((8, 8, 3), np.uint8), 2, 'has the label 2; expected an integer from 0 to 1'),
        (np.uint8(3), 0, r'an image is uint8 of shape \(\); expected'),
        (np.ones((8, 8, 3), np.uint8), -1, 'has the label -1; expected an integer from 0 to 1'),
        (np.ones((8, 8, 3), np.uint8), 0.5, 'has the label 0.5; expected an integer'),
        (np.ones((8, 8, 3), np.uint8), 'cat', "has the label 'cat'; expected an integer"),
    ],
)
def test_invalid_arrays_are_refused(image, label, message):
    good, other = {'image': np.ones((8, 8, 3), np.uint8), 'label': 1}, {'image': image, 'label': label}
    with pytest.raises(UserError, match=message):
        datasets.in_memory({'train': [good, other]}, ('a', 'b'))
    with pytest.raises(UserError):
        datasets.in_memory({'train': [other, good]}, ('a', 'b'))
    assert list(datasets.in_memory({'train': [good], 'val': []}, ('a', 'b')).splits) == ['train']
    with pytest.raises(UserError, match="expected a split 'train' with images"):
        datasets.in_memory({'val': [good]}, ('a', 'b'))


def test_error_without_message_is_reported_by_type(tmp_path, monkeypatch):

    def raise_without_message(path):
        raise AssertionError

    for name in ('dataset_info.json', 'features.json'):
        (tmp_path / name).write_text('{}')
    monkeypatch.setattr(tfds, 'builder_from_directory', raise_without_message)
    with pytest.raises(UserError, match='cannot be opened as a prepared dataset: AssertionError'):
        datasets.open_dataset(str(tmp_path))
