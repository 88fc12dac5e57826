"""The paper's data augmentation (section 4.1): its settings, and the arithmetic on the device.

`data/random_crops.py` draws and crops in the input pipeline, on uint8; `preprocess` and `views` run inside the jitted
step, so that bytes and not floats cross to the device.
"""

import functools
from typing import Any, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from alexnet_jax.core.image_stats import ImageStats
from alexnet_jax.utils.errors import UserError

Images = TypeVar('Images', Array, np.ndarray)
Batch = dict[str, Array]
DType = jax.typing.DTypeLike


class Augmentation(NamedTuple):
    """What a config's `data` says of crops, reflections, color and mean. The defaults are the paper's.

    Sources: section 4.1; `convdata_jpeg.py` of the authors' release; Caffe's data layer; torchvision's training script.
    """

    image_size: int = 224  # side of what the network reads, pixels; Caffe's 227
    crop_area: tuple[float, float] | tuple[()] = ()  # (): windows of image_size; torchvision's (0.08, 1): of the area
    random_crop: bool = True  # False: always the center
    all_positions: bool = False  # 32 x 32 windows of 256 px, section 4.1's factor of 2048; True: all 33 x 33 (authors)
    draw_every: int = 1  # successive images that share crop and reflection: 1 by the words, 32 in the authors' code
    reflect: bool = True
    mean: str = 'crop'  # subtract the mean image 'crop' by crop, its 'center' always (authors), or its mean a 'channel'
    pixel_std: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of R, G, B; what mean-subtracted pixels are divided by
    color_std: float = 0.1  # of the components' alphas; 0: off
    color_scale: str = 'eigenvalue'  # what the alphas are times: 'eigenvalue' (on [0, 1]) or 'std', its root (authors)
    color_divide: bool = False  # divide the image by 1 + color_std while color is on (authors)
    color_epochs: float = 0.0  # color goes off after so many epochs, 0: never; 67 in the authors' net 145 (2010)


def crop_on_device(batch: Batch, size: int) -> Batch:
    """What `crop` does, for a batch of whole records, or one that has their numbers and all records.

    Args:
      batch: 'whole' uint8 [n, S, S, 3], or 'index' int32 [n] and 'records' uint8 [N, S, S, 3]; 'offset' and 'reflect'.
      size: of the crops, pixels.

    Returns:
      the batch with 'image' uint8 [n, size, size, 3] instead of these.
    """

    def from_all(index: Array, offset: Array, reflect: Array) -> Array:
        start = (index, *offset, jnp.zeros_like(index))
        part = lax.dynamic_slice(batch['records'], start, (1, size, size, 3))[0]
        return jnp.where(reflect, part[:, ::-1], part)

    from_one = functools.partial(_crop, size=size)
    cut_out, which = (from_one, 'whole') if 'whole' in batch else (from_all, 'index')
    rest = {key: value for key, value in batch.items() if key not in (which, 'records')}
    return {**rest, 'image': jax.vmap(cut_out)(batch[which], batch['offset'], batch['reflect'])}


def _crop(image_HWC: Array | np.ndarray, offset: Array, reflect: Array, size: int) -> Array:
    """The size x size part at an offset, mirrored where `reflect` is true."""
    start = (offset[0], offset[1], jnp.zeros_like(offset[0]))  # of one type, in float64 too
    part = lax.dynamic_slice(image_HWC, start, (size, size, 3))
    return jnp.where(reflect, part[:, ::-1], part)


def default_record_size(image_size: int) -> int:
    """Side of the records that crops of a size are taken from, in the paper's proportion: 256 for 224."""
    return -(-image_size * 8 // 7)


def crop_positions(record_size: int, image_size: int, all_positions: bool = False) -> int:
    """Places at which a crop may begin, in each direction: 32 for 224 out of 256 (section 4.1's factor of 2048).

    all_positions: counts the last one too, as the authors' code does: 33. Raises UserError where the records are
    smaller than what the network reads.
    """
    if image_size > record_size:
        raise UserError(
            f'data.image_size={image_size} is larger than the prepared images ({record_size} px); lower it, or '
            f'prepare again with --size={image_size} or more.'
        )
    return max(1, record_size - image_size + all_positions)


def color_shift(alphas_N3: Array, image_stats: ImageStats, scale: str = 'eigenvalue') -> Array:
    """[p1 p2 p3] [a1 l1, a2 l2, a3 l3]^T for each image, in gray levels.  Section 4.1.

    Deviation: the formula gives no scale. It is read on pixels in [0, 1], the one reading with sensible results (about
    3.4 levels of 255; eigenvalues of 0-255 pixels would shift by hundreds): l / 255^2 there, times 255 back here.

    Args:
      alphas_N3: float [N, 3].
      image_stats: components of the RGB values.
      scale: 'eigenvalue', or 'std': the authors' code has the standard deviation sqrt(l), about 7.4 levels.

    Returns:
      float [N, 3], to be added to every pixel.
    """
    lengths = jnp.sqrt(image_stats.eigenvalues) if scale == 'std' else image_stats.eigenvalues / 255.0
    return (alphas_N3 * lengths[None]) @ image_stats.eigenvectors.T


def preprocess(
    batch: Batch, image_stats: ImageStats, augmentation: Augmentation, *, color: Any = True, dtype: DType = jnp.float32
) -> Array:
    """Turns a training batch's bytes into the network's input: minus the mean, plus the color shift.

    Args:
      batch: 'image' uint8 [N, s, s, 3], cropped, mirrored; 'offset' int32 [N, 2], 'reflect' bool [N], 'color' float32
        [N, 3] as drawn for each.
      image_stats: of the training set.
      augmentation: with mean='crop' the mean image is cropped and mirrored like its image (section 2: the mean activity
        of each pixel); with 'center' its central part stays as it is, whatever the crop.
      color: bool scalar, whether color is (still) on.
      dtype: of the result.

    Returns:
      float [N, s, s, 3], mean-subtracted, 0-255 scale (divided by `pixel_std`).
    """
    chex.assert_rank(batch['image'], 4)
    size = batch['image'].shape[1]
    image_stats = jax.tree.map(lambda x: jnp.asarray(x, dtype), image_stats)
    if augmentation.mean == 'crop':
        mean_under = functools.partial(_crop, image_stats.mean_image, size=size)
        mean = jax.vmap(mean_under)(batch['offset'], batch['reflect'])
    else:
        mean = _fixed_mean(image_stats, augmentation, size)
    shift = color_shift(batch['color'].astype(dtype), image_stats, augmentation.color_scale)
    x = batch['image'].astype(dtype) - mean + jnp.where(color, shift, 0)[:, None, None, :]
    if augmentation.color_divide:
        x = x / jnp.where(color, 1 + augmentation.color_std, 1).astype(dtype)
    return x / jnp.asarray(augmentation.pixel_std, dtype)[None, None, None]


def _fixed_mean(image_stats: ImageStats, augmentation: Augmentation, size: int) -> Array:
    """[1, size, size, 3] or [1, 1, 1, 3], the same for every crop."""
    mean = jnp.asarray(image_stats.mean_image)[None]
    return center_crop(mean, size) if augmentation.mean == 'center' else mean.mean((1, 2), keepdims=True)


def center_crop(image_NHWC: Images, size: int) -> Images:
    """The central size x size part of images [N, S, S, 3]."""
    y, x = ((side - size) // 2 for side in image_NHWC.shape[1:3])
    return image_NHWC[:, y : y + size, x : x + size]


def ten_views(image_NHWC: Images, size: int) -> list[Images]:
    """Four corners, the center, and their reflections: ten arrays [N, size, size, 3].  Section 4.1.

    image_NHWC: [N, S, S, 3] of any type. The center comes first, the five reflections last.
    """
    _, height, width, _ = image_NHWC.shape
    corners = [(y, x) for y in (0, height - size) for x in (0, width - size)]
    five = [center_crop(image_NHWC, size)] + [image_NHWC[:, y : y + size, x : x + size] for y, x in corners]
    return five + [view[:, :, ::-1] for view in five]


def views(
    image_NHWC: Array, image_stats: ImageStats, augmentation: Augmentation, *, count: int, dtype: DType = jnp.float32
) -> list[Array]:
    """The network's inputs for a test: the center alone (count=1), or ten views (count=10). No color.

    Args:
      image_NHWC: uint8 [N, S, S, 3], whole records of the mean image's size.
      image_stats: of the training set.
      augmentation: its `mean` says whether that of the same crop is subtracted (the paper), or one fixed (authors).

    Returns:
      `count` arrays, float [N, size, size, 3], mean-subtracted, 0-255 scale (divided by `pixel_std`).

    Raises:
      UserError: another count.
    """
    if count not in (1, 10):
        raise UserError(f'views={count}; expected 1 (center) or 10 (corners and center, with reflections).')
    chex.assert_equal_shape([image_NHWC[0], image_stats.mean_image])
    size, image = augmentation.image_size, image_NHWC.astype(dtype)
    fixed: Array | int = 0
    if augmentation.mean == 'crop':
        image = image - jnp.asarray(image_stats.mean_image, dtype)[None]
    else:
        fixed = _fixed_mean(image_stats, augmentation, size).astype(dtype)
    cuts = ten_views(image, size) if count == 10 else [center_crop(image, size)]
    return [(part - fixed) / jnp.asarray(augmentation.pixel_std, dtype)[None, None, None] for part in cuts]
