"""Statistics of the training images: the mean image, and the principal components of the RGB values.

Uses only NumPy, so that the worker processes that prepare images need not import JAX.
"""

from typing import NamedTuple

import numpy as np


class ImageStats(NamedTuple):
    """Statistics for the preprocessing of sections 2 (mean) and 4.1 (color), on the 0-255 scale."""

    mean_image: np.ndarray  # float32 [S, S, 3]
    eigenvalues: np.ndarray  # float32 [3], of the 3x3 RGB covariance, ascending; gray levels squared
    eigenvectors: np.ndarray  # float32 [3, 3]; column i belongs to eigenvalue i


class Moments(NamedTuple):
    """Sums over images, from which `from_moments` computes the statistics. Sums of several processes can be merged."""

    num_images: int
    image: np.ndarray  # float64 [S, S, 3], sum of the images
    outer: np.ndarray  # float64 [3, 3], sum of r r^T over all pixels r

    @classmethod
    def zeros(cls, size: int) -> 'Moments':
        """Returns the sums over no images; `size` is the side of the images in pixels."""
        return cls(0, np.zeros((size, size, 3)), np.zeros((3, 3)))

    def add(self, image_HWC: np.ndarray) -> 'Moments':
        """Returns the sums with one uint8 image added. Changes the arrays in place."""
        pixels = image_HWC.reshape(-1, 3).astype(np.float32)
        np.add(self.image, image_HWC, out=self.image)
        # The entries of one image's product are below 2^32 for up to 256 px; float32 keeps seven digits of them.
        np.add(self.outer, pixels.T @ pixels, out=self.outer)
        return self._replace(num_images=self.num_images + 1)

    def merge(self, other: 'Moments') -> 'Moments':
        """Returns the sums over both sets of images."""
        return Moments(self.num_images + other.num_images, self.image + other.image, self.outer + other.outer)


def from_moments(moments: Moments) -> ImageStats:
    """Returns the mean image, and the eigenvalues and eigenvectors of the covariance of all pixels' RGB values."""
    pixels = moments.num_images * moments.image.shape[0] * moments.image.shape[1]
    mean_rgb = moments.image.sum((0, 1)) / pixels
    covariance = moments.outer / pixels - np.outer(mean_rgb, mean_rgb)
    values, vectors = np.linalg.eigh(covariance)
    return ImageStats(
        (moments.image / moments.num_images).astype(np.float32),
        np.maximum(values, 0).astype(np.float32),
        vectors.astype(np.float32),
    )
