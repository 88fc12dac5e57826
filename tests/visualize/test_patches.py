"""The most exciting patches against sorting all activations in memory."""

import numpy as np
import pytest

import alexnet_jax
from alexnet_jax.data import datasets
from alexnet_jax.inference import activations
from alexnet_jax.utils.errors import UnreadableError, UserError
from alexnet_jax.visualize import patches
from tests.visualize import tiny

# The input pixels of unit i along an axis of 19 pixels: 2i to 2i + 2 for conv1, 4i to 4i + 6 after its pooling.
BOXES = {'conv1.linear': (2, 3), 'conv1': (4, 7)}


@pytest.mark.parametrize(
    ('layer', 'units'),
    [
        ('conv1', [3, 0]),
        pytest.param('conv1.linear', 2, marks=pytest.mark.slow),
        pytest.param('fc4', [4, 1], marks=pytest.mark.slow),
    ],
)
def test_patches_match_sorted_activations(layer, units):
    checkpoint, images = tiny.checkpoint(), tiny.images(11)
    found = alexnet_jax.visualize.top_patches(checkpoint, images, layer, units, 4, batch_size=3)
    output = activations.activations(checkpoint, images, layer)[layer]
    crops = images[:, 1:20, 1:20]
    units = [units] if isinstance(units, int) else units
    assert found.values.shape == found.indices.shape == (len(units), 4) and found.images == 11
    assert found.values.dtype == np.float32
    for i, unit in enumerate(units):
        maps = output[..., unit].reshape(11, -1)
        order = sorted(range(11), key=lambda image: -maps[image].max())[:4]
        np.testing.assert_array_equal(found.indices[i], order)
        for j, image in enumerate(order):
            row, column = np.unravel_index(np.argmax(maps[image]), output.shape[1:3]) if output.ndim == 4 else (0, 0)
            np.testing.assert_allclose(found.values[i, j], maps[image].max(), rtol=1e-5)
            assert tuple(found.positions[i, j]) == (row, column)
            step, size = BOXES.get(layer, (0, 19))
            box = row * step, column * step, min(19, row * step + size), min(19, column * step + size)
            assert tuple(found.boxes[i, j]) == box
            np.testing.assert_array_equal(found.patches[i][j], crops[image, box[0] : box[2], box[1] : box[3]])


def test_the_first_of_equal_activations_is_kept():
    best = np.array([[5.0, 2.0]]), np.array([[0, 1]]), np.array([[7, 7]])
    new = np.array([[2.0, 5.0, 3.0]]), np.array([[2, 3, 4]]), np.array([[8, 8, 8]])
    values, indices, positions = patches._keep_largest(best, new, 4)
    assert values.tolist() == [[5, 5, 3, 2]] and indices.tolist() == [[0, 3, 4, 1]]
    assert positions.tolist() == [[7, 8, 8, 7]]


class _Damaged:
    def __init__(self, records, bad):
        self.records, self.bad = records, bad

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        if index in self.bad:
            raise UnreadableError(f'record {index} is damaged')
        return self.records[index]


@pytest.mark.slow
def test_splits_with_unreadable_records(caplog):
    """A split gives the patches of its images in memory; unreadable records are left out and named."""
    checkpoint, images = tiny.checkpoint(), tiny.images(7)
    split = datasets.in_memory({'train': {'image': images, 'label': np.zeros(7, int)}}, ['one']).split('train')
    found = patches.top_patches(checkpoint, split, 'conv2', [1, 2], batch_size=4)
    memory = patches.top_patches(checkpoint, images, 'conv2', [1, 2], batch_size=4)
    assert found.values.shape == (2, 7) and found.indices.tolist() == memory.indices.tolist()
    assert all(np.array_equal(a, b) for a, b in zip(found.patches[1], memory.patches[1], strict=True))
    best = int(found.indices[0, 0])
    rest = patches.top_patches(checkpoint, _Damaged(split, [best]), 'conv2', 1, batch_size=4)
    assert rest.images == 6 and rest.indices.tolist() == [found.indices[0, 1:].tolist()]
    assert f'record {best} is damaged' in caplog.text
    files = patches.top_patches(checkpoint, list(images), 'conv2', 1, batch_size=4)  # a list of images
    assert files.indices.tolist() == found.indices[:1].tolist()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('conv2', [0, 6]), 'unit=6: expected an integer from 0 to 5, the units of conv2'),
        (('conv2', []), r'units=\[\]: expected at least one unit of conv2'),
        (('conv2', 0, 0), 'count=0: expected a positive integer'),
        (('conv', 0), "unknown layer 'conv'"),
    ],
)
def test_invalid_units_and_counts_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        patches.top_patches(tiny.checkpoint(), tiny.images(2), *arguments)


def test_no_images_are_refused():
    with pytest.raises(UserError, match='there are no images'):
        patches.top_patches(tiny.checkpoint(), tiny.images(0), 'conv2', 0)
