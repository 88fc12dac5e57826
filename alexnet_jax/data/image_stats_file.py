"""Reads and writes image_stats.npz, the training image statistics of a prepared dataset."""

import io
import os
import warnings
import zipfile

import numpy as np

from alexnet_jax.core.image_stats import ImageStats
from alexnet_jax.utils.errors import UserError
from alexnet_jax.utils.files import check_declared_size, open_regular

FILE_NAME = 'image_stats.npz'


def save(directory: str, image_stats: ImageStats) -> None:
    """Writes image_stats.npz into a directory."""
    buffer = io.BytesIO()
    np.savez(buffer, **image_stats._asdict())
    with open(os.path.join(directory, FILE_NAME), 'wb') as file:
        file.write(buffer.getvalue())


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Reads one array. `numpy.load` would allocate the declared size without checking the size of the file."""
    with archive.open(f'{name}.npy') as file:
        np.lib.format.read_magic(file)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.kind != 'f':
            raise ValueError(f'{name} is {dtype}')
        content = np.frombuffer(file.read(), dtype).reshape(shape, order='F' if fortran_order else 'C')
    with np.errstate(over='ignore'):  # `load` rejects infinity
        return content.astype(np.float32)


def load(directory: str) -> ImageStats | None:
    """Returns a prepared dataset's image statistics, or None if it has no such file. Raises UserError for damage."""
    path = os.path.join(directory, FILE_NAME)
    if not os.path.exists(path):
        return None
    try:
        # NumPy warns of files of Python 2.
        with (
            warnings.catch_warnings(action='ignore'),
            open_regular(path, 'rb') as file,
            zipfile.ZipFile(file) as archive,
        ):
            check_declared_size(path, sum(entry.file_size for entry in archive.infolist()))  # saved uncompressed
            image_stats = ImageStats(*(_array(archive, name) for name in ImageStats._fields))
        side = image_stats.mean_image.shape[0]
        shapes = [(side, side, 3), (3,), (3, 3)]
        if [array.shape for array in image_stats] != shapes or not all(np.isfinite(a).all() for a in image_stats):
            raise ValueError(f'wrong shapes {[array.shape for array in image_stats]}, or values are not finite')
    except Exception as error:  # zipfile, zlib and numpy raise different types
        raise UserError(f'{path} is damaged ({error}); run alexnet_jax prepare again.') from error
    return image_stats
