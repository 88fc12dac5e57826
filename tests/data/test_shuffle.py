"""The order of the training images is grain's."""

import grain
import numpy as np
import pytest

from alexnet_jax.data import shuffle


@pytest.mark.parametrize('count', [1, 20, 50, 1437, 65535, 65536, 65538, 1_281_167, 2**24 + 2, 2**32 - 1])
def test_order_equals_grain(count):
    """Positions at the start of an epoch, at its end and in a later epoch; words of 8, 9, 11, 13 and 16 bits."""
    for seed in (0, 2**32 - 1):
        order = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
        for first in (0, max(0, count - 9), 3 * count + 1):
            found = shuffle.shuffled_indices(range(first, first + 20), count, seed)
            assert found.dtype == np.uint32 and found.tolist() == [order[first + i] for i in range(20)]


@pytest.mark.parametrize('count', [50, 65536, 65537, 65538, 262_145])
def test_an_epoch_has_each_image_once(count):
    """Grain itself misses one image of 65,537 and of 262,145."""
    found = shuffle.shuffled_indices(range(count, 2 * count), count, seed=1)
    assert (np.bincount(found, minlength=count) == 1).all()
