"""The file of the training images' statistics."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from alexnet_jax.data import image_stats_file
from alexnet_jax.utils.errors import UserError


def test_statistics_that_would_grow(tmp_path):
    """Before anything is read: the sizes that the archive declares, and those that an array in it does."""
    path = tmp_path / 'image_stats.npz'
    np.savez_compressed(path, mean_image=np.zeros((2000, 2000, 3)))
    with pytest.raises(UserError, match=r'image_stats.npz is damaged \(\d+ bytes, but 96000\d+ declared\)'):
        image_stats_file.load(str(tmp_path))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {'descr': '<f4', 'fortran_order': False, 'shape': (2**31,)})
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('mean_image.npy', header.getvalue())
    tracemalloc.start()
    with pytest.raises(UserError, match=r'image_stats.npz is damaged \(cannot reshape'):
        image_stats_file.load(str(tmp_path))
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
