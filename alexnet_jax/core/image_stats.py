"""What the training images say about their pixels: the mean image, and the principal components of RGB.

Numpy only, so that the processes that prepare images need not load JAX.
"""

from typing import NamedTuple

import numpy as np


class ImageStats(NamedTuple):
    """Preprocessing of section 2 (mean) and section 4.1 (color), on the 0-255 scale."""

    mean_image: np.ndarray  # float32 [S, S, 3]
    eigenvalues: np.ndarray  # float32 [3], of the 3x3 covariance of RGB, ascending; gray levels squared
    eigenvectors: np.ndarray  # float32 [3, 3]; column i belongs to eigenvalue i


class Moments(NamedTuple):
    """Sums that add up over processes: images, their pixels' sum, and the sum of r r^T over all pixels r."""

    num_images: int
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
        return self._replace(num_images=self.num_images + 1)

    def merge(self, other: 'Moments') -> 'Moments':
        """The sums over both sets of images."""
        return Moments(self.num_images + other.num_images, self.image + other.image, self.outer + other.outer)


def from_moments(moments: Moments) -> ImageStats:
    """The mean image, and eigenvalues and eigenvectors of the covariance of all training pixels' RGB values."""
    pixels = moments.num_images * moments.image.shape[0] * moments.image.shape[1]
    mean_rgb = moments.image.sum((0, 1)) / pixels
    covariance = moments.outer / pixels - np.outer(mean_rgb, mean_rgb)
    values, vectors = np.linalg.eigh(covariance)
    return ImageStats(
        (moments.image / moments.num_images).astype(np.float32),
        np.maximum(values, 0).astype(np.float32),
        vectors.astype(np.float32),
    )
