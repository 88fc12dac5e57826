"""Draws random crops, reflections and colors of training images on the host, and crops images.  Section 4.1."""

from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from alexnet_jax.core.augment import Augmentation, crop_positions
from alexnet_jax.utils.errors import UserError


class AugmentParams(NamedTuple):
    """Random augmentation parameters of one image, or of several with a leading axis."""

    offset: np.ndarray  # int32 [2]: row and column of the crop's first pixel
    extent: np.ndarray  # int32 [2]: height and width of the crop, before it is resized to image_size
    reflect: Any  # bool: mirror left to right
    color: np.ndarray  # float32 [3]: the paper's alphas, one per principal component


def draw_batch(augmentation: Augmentation, *, seed: int, first: int, count: int, record_size: int) -> AugmentParams:
    """Draws the parameters of `count` positions from `first` on, stacked along a leading axis.

    The parameters of a position depend only on (seed, position). The paper has 32 x 32 x 2 = 2048 crops and
    reflections. Always draws all random numbers, so that disabling one augmentation does not change the others.
    """
    size = augmentation.image_size
    groups = np.arange(first, first + count) // augmentation.draw_every
    uniform = _uniform((seed, 0), groups[0], groups[-1] - groups[0] + 1, 24)[groups - groups[0]]
    reflect = (uniform[:, 0] < 0.5) & augmentation.reflect
    if augmentation.crop_area:
        extent = _areas_to_extents(uniform[:, 4:].reshape(count, 10, 2), record_size, augmentation.crop_area)
        num_positions: Any = record_size - extent + 1
    else:
        extent = np.full((count, 2), size)
        num_positions = crop_positions(record_size, size, augmentation.all_positions)
    offset = np.floor(uniform[:, 1:3] * num_positions)
    if not augmentation.random_crop:
        offset[:] = (record_size - size) // 2
    alphas = _normal(_uniform((seed, 1), first, count, 4))[:, :3]
    color = (alphas * augmentation.color_std).astype(np.float32)
    return AugmentParams(offset.astype(np.int32), extent.astype(np.int32), reflect, color)


def _uniform(key: tuple[int, int], first: int, count: int, words: int) -> np.ndarray:
    """Returns uniform float64 [count, words] in [0, 1). Row i depends only on (key, first + i).

    words: a multiple of 4. Philox is counter-based and has four numbers per count. The numbers of a position need no
    earlier draws, and a batch takes one call (a generator for each image took 40 us per image).
    """
    counter = int(first) * (words // 4)
    raw = np.random.Philox(key=key, counter=counter).random_raw(int(count) * words)
    return (raw >> np.uint64(11)).reshape(count, words) * 2.0**-53


def _normal(uniform: np.ndarray) -> np.ndarray:
    """Converts uniform to independent normal random numbers, as many as given (Box-Muller transform)."""
    radius, angle = np.split(uniform, 2, axis=-1)
    radius = np.sqrt(-2 * np.log(1 - radius))
    return np.concatenate([radius * np.cos(2 * np.pi * angle), radius * np.sin(2 * np.pi * angle)], axis=-1)


def _areas_to_extents(uniform: np.ndarray, size: int, area: tuple[float, float]) -> np.ndarray:
    """Returns heights and widths [N, 2] of crops of a square, as torchvision's RandomResizedCrop.

    Uses the first try that fits into the square, else the whole square. Aspect ratios are between 3:4 and 4:3.
    uniform: [N, tries, 2]. size: side of the square. area: range of the crop's fraction of the square's area.
    """
    share = area[0] + (area[1] - area[0]) * uniform[..., 0]
    aspect = np.exp(np.log(3 / 4) + np.log(16 / 9) * uniform[..., 1])
    tries = np.round(size * np.sqrt(np.stack([share / aspect, share * aspect], axis=-1)))
    fits = ((tries > 0) & (tries <= size)).all(-1)
    chosen = np.take_along_axis(tries, fits.argmax(1)[:, None, None], axis=1)[:, 0]
    return np.where(fits.any(1)[:, None], chosen, size).astype(int)


def augment_arrays(
    image_NHWC: np.ndarray, augmentation: Augmentation, *, seed: int, step: int, record_size: int
) -> dict[str, np.ndarray]:
    """Augments arrays with the random parameters that the pipeline draws for batch number `step`.

    image_NHWC: uint8 [N, S, S, 3]. S is record_size, or image_size for images that are already cropped.

    Returns 'image' uint8 [N, image_size, image_size, 3] and the fields of `AugmentParams`. Raises UserError for images
    of another shape or type.
    """
    size, count = augmentation.image_size, len(image_NHWC)
    side = image_NHWC.shape[1] if image_NHWC.ndim == 4 else 0
    if image_NHWC.dtype != np.uint8 or side not in (size, record_size) or image_NHWC.shape[1:] != (side, side, 3):
        raise UserError(
            f'images are {image_NHWC.dtype} of shape {image_NHWC.shape}; expected uint8 of shape (N, S, S, 3), with '
            f'S={record_size} (to be cropped) or S={size} (already cropped).'
        )
    if side == size:  # not cropped; the center offset selects the center of the mean image
        augmentation = augmentation._replace(random_crop=False, crop_area=())
    drawn = draw_batch(augmentation, seed=seed, first=step * count, count=count, record_size=record_size)
    offsets = np.zeros_like(drawn.offset) if side == size else drawn.offset
    params = [AugmentParams(*values) for values in zip(*drawn._replace(offset=offsets), strict=True)]
    images = np.stack([crop(image, p, size) for image, p in zip(image_NHWC, params, strict=True)])
    return {'image': images, **drawn._asdict()}


def crop(image_HWC: np.ndarray, params: AugmentParams, size: int, out: np.ndarray | None = None) -> np.ndarray:
    """Crops, resizes and reflects a uint8 image. Returns uint8 [size, size, 3], in `out` if given."""
    (y, x), (height, width) = params.offset, params.extent
    part = image_HWC[y : y + height, x : x + width]
    if (height, width) != (size, size):
        part = np.asarray(Image.fromarray(part).resize((size, size), Image.Resampling.BILINEAR))
    out = np.empty((size, size, 3), np.uint8) if out is None else out
    if params.reflect:
        for channel in range(3):  # five times as fast as copying part[:, ::-1] at once
            out[:, :, channel] = part[:, ::-1, channel]
    else:
        out[...] = part
    return out
