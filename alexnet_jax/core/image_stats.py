"""What the training images say about their pixels: the mean image, and the principal components of RGB.

Numpy only, so that the processes that prepare images need not load JAX.
"""

import io
import os
import zipfile
from typing import NamedTuple

import numpy as np

from alexnet_jax.utils.errors import UserError
from alexnet_jax.utils.files import check_declared_size

FILE_NAME = 'image_stats.npz'


class ImageStats(NamedTuple):
    """Preprocessing of section 2 (mean) and section 4.1 (color), on the 0-255 scale."""

    mean_image: np.ndarray  # float32 [S, S, 3]
    eigenvalues: np.ndarray  # float32 [3], of the 3x3 covariance of RGB, ascending; gray levels squared
    eigenvectors: np.ndarray  # float32 [3, 3]; column i belongs to eigenvalue i


class Moments(NamedTuple):
    """Sums that add up over processes: images, their pixels' sum, and the sum of r r^T over all pixels r."""

    count: int
    image: np.ndarray  # float64 [S, S, 3]
    outer: np.ndarray  # float64 [3, 3]

    @classmethod
    def zeros(cls, size: int) -> 'Moments':
        """The sums over no image yet; size: side of the images, pixels."""
        return cls(0, np.zeros((size, size, 3)), np.zeros((3, 3)))

    def add(self, image_HWC: np.ndarray) -> 'Moments':
        """Counts one more uint8 image in (the sums are changed in place)."""
        pixels = image_HWC.reshape(-1, 3).astype(np.float32)
        np.add(self.image, image_HWC, out=self.image)
        np.add(self.outer, pixels.T @ pixels, out=self.outer)  # below 2^32 an entry and image: float32 keeps 7 digits
        return self._replace(count=self.count + 1)

    def merge(self, other: 'Moments') -> 'Moments':
        """The sums over both sets of images."""
        return Moments(*(a + b for a, b in zip(self, other, strict=True)))


def from_moments(moments: Moments) -> ImageStats:
    """The mean image, and eigenvalues and eigenvectors of the covariance of all training pixels' RGB values."""
    pixels = moments.count * moments.image.shape[0] * moments.image.shape[1]
    mean_rgb = moments.image.sum((0, 1)) / pixels
    covariance = moments.outer / pixels - np.outer(mean_rgb, mean_rgb)
    values, vectors = np.linalg.eigh(covariance)
    return ImageStats(
        (moments.image / moments.count).astype(np.float32),
        np.maximum(values, 0).astype(np.float32),
        vectors.astype(np.float32),
    )


def save(directory: str, image_stats: ImageStats) -> None:
    """Writes FILE_NAME into a directory."""
    buffer = io.BytesIO()
    np.savez(buffer, **image_stats._asdict())
    with open(os.path.join(directory, FILE_NAME), 'wb') as file:
        file.write(buffer.getvalue())


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Not `numpy.load`, which allocates what the header declares before it looks how much there is."""
    with archive.open(f'{name}.npy') as file:
        np.lib.format.read_magic(file)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        content = np.frombuffer(file.read(), dtype)  # refuses Python objects
    return content.reshape(shape, order='F' if fortran_order else 'C').astype(np.float32)


def load(directory: str) -> ImageStats | None:
    """Statistics that lie beside a prepared dataset; None where it was prepared without a train split.

    Raises:
      UserError: the file is damaged.
    """
    path = os.path.join(directory, FILE_NAME)
    if not os.path.exists(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            check_declared_size(path, sum(entry.file_size for entry in archive.infolist()))  # `save` does not compress
            image_stats = ImageStats(*(_array(archive, name) for name in ImageStats._fields))
        side = image_stats.mean_image.shape[0]
        shapes = [(side, side, 3), (3,), (3, 3)]
        if [array.shape for array in image_stats] != shapes or not all(np.isfinite(a).all() for a in image_stats):
            raise ValueError(f'shapes {[array.shape for array in image_stats]}, or values that are not finite')
    except Exception as error:  # zipfile, zlib, numpy and KeyError: each its own kind
        raise UserError(f'{path} is damaged ({error}); run alexnet_jax prepare again.') from error
    return image_stats
