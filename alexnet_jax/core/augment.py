"""Data augmentation (section 4.1): its settings, and the part that runs on the device.

`data/random_crops.py` draws and crops uint8 images in the input pipeline. `preprocess` and `views` run inside the
jitted step, so that images are sent to the device as uint8, not as floats.
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
    """Settings of crop, reflection, color and mean: part of a config's `data`. The defaults are the paper's.

    Sources: section 4.1; `convdata_jpeg.py` of the authors' release; Caffe's data layer; torchvision's training script.
    """

    image_size: int = 224  # side of the network's input, pixels; 227 in Caffe
    crop_area: tuple[float, float] | tuple[()] = ()  # (): fixed size; (0.08, 1): range of area, as in torchvision
    random_crop: bool = True  # False: always the center crop
    all_positions: bool = False  # False: 32 x 32 offsets in 256 px (section 4.1's factor 2048); True: 33 x 33 (authors)
    draw_every: int = 1  # consecutive images that share crop and reflection: 1 in the paper, 32 in the authors' code
    reflect: bool = True
    mean: str = 'crop'  # subtract the mean image under the 'crop', its 'center' (authors), or its mean per 'channel'
    pixel_std: tuple[float, float, float] = (1.0, 1.0, 1.0)  # divisors of the mean-subtracted R, G, B values
    color_std: float = 0.1  # standard deviation of the paper's alphas; 0: no color augmentation
    color_scale: str = 'eigenvalue'  # factor of the alphas: 'eigenvalue' (pixels in [0, 1]) or its root 'std' (authors)
    color_divide: bool = False  # divide the image by 1 + color_std while color augmentation is on (authors)
    color_epochs: float = 0.0  # color augmentation ends after this epoch; 0: never; 67 in the authors' net 145 (2010)


def crop_on_device(batch: Batch, size: int) -> Batch:
    """Crops and reflects on the device, for batches that hold whole images, or indices into all images.

    `batch` has 'whole' uint8 [n, S, S, 3], or 'index' int32 [n] and 'records' uint8 [N, S, S, 3]. In the result,
    'image' uint8 [n, size, size, 3] replaces them. The crops are given by 'offset' int32 [n, 2] and 'reflect' bool [n].
    """

    def crop_record(index: Array, offset: Array, reflect: Array) -> Array:
        start = (index, *offset, jnp.zeros_like(index))
        part = lax.dynamic_slice(batch['records'], start, (1, size, size, 3))[0]
        return jnp.where(reflect, part[:, ::-1], part)

    crop_image = functools.partial(_crop, size=size)
    crop, source = (crop_image, 'whole') if 'whole' in batch else (crop_record, 'index')
    rest = {key: value for key, value in batch.items() if key not in (source, 'records')}
    return {**rest, 'image': jax.vmap(crop)(batch[source], batch['offset'], batch['reflect'])}


def _crop(image_HWC: Array | np.ndarray, offset: Array, reflect: Array, size: int) -> Array:
    """Returns the size x size crop at an offset, mirrored if `reflect` is true."""
    start = (offset[0], offset[1], jnp.zeros_like(offset[0]))  # all indices need the same dtype, also with enable_x64
    part = lax.dynamic_slice(image_HWC, start, (size, size, 3))
    return jnp.where(reflect, part[:, ::-1], part)


def default_record_size(image_size: int) -> int:
    """Returns the side of the records for crops of a given size, in the paper's ratio of 256 to 224.

    >>> default_record_size(224)
    256
    """
    return -(-image_size * 8 // 7)


def crop_positions(record_size: int, image_size: int, all_positions: bool = False) -> int:
    """Returns the number of crop offsets in each direction: 32 for 224 out of 256 (section 4.1's factor of 2048).

    With `all_positions` the last offset counts too, as in the authors' code: 33. Raises UserError if the records are
    smaller than the network's input.
    """
    if image_size > record_size:
        raise UserError(
            f'data.image_size={image_size} is larger than the prepared images ({record_size} px); lower it, or '
            f'prepare again with --size={image_size} or more.'
        )
    return max(1, record_size - image_size + all_positions)


def color_shift(alphas_N3: Array, image_stats: ImageStats, scale: str = 'eigenvalue') -> Array:
    """Returns the color added to each image's pixels, [p1 p2 p3] [a1 l1, a2 l2, a3 l3]^T (section 4.1), float [N, 3].

    Deviation: the paper does not give the pixel scale. Pixels in [0, 1] are assumed, which shifts colors by about 3.4
    of 255 levels. Eigenvalues on the 0-255 scale would shift them by hundreds of levels. On [0, 1] the eigenvalue is
    l / 255^2, and the shift is multiplied by 255 to get gray levels.

    `alphas_N3`, float [N, 3], are the random factors a. `image_stats` has the eigenvectors p and the eigenvalues l.
    `scale` is 'eigenvalue', or 'std' for sqrt(l) as in the authors' code (about 7.4 levels).
    """
    lengths = jnp.sqrt(image_stats.eigenvalues) if scale == 'std' else image_stats.eigenvalues / 255.0
    return (alphas_N3 * lengths[None]) @ image_stats.eigenvectors.T


def preprocess(
    batch: Batch, image_stats: ImageStats, augmentation: Augmentation, *, color: Any = True, dtype: DType = jnp.float32
) -> Array:
    """Converts a uint8 training batch to the network's input: subtracts the mean and adds the color shift.

    Args:
      batch: 'image' uint8 [N, s, s, 3], cropped and mirrored; its random parameters 'offset' int32 [N, 2], 'reflect'
        bool [N] and 'color' float32 [N, 3], the alphas.
      image_stats: statistics of the training set.
      augmentation: with mean='crop' the mean image is cropped and mirrored like the image (section 2: the mean activity
        of each pixel). With 'center' its center crop, and with 'channel' its mean color, is subtracted from every crop.
      color: bool scalar: whether color augmentation is on in this step.
      dtype: dtype of the result.

    Returns:
      float [N, s, s, 3], mean-subtracted, on the 0-255 scale (divided by `pixel_std`).
    """
    chex.assert_rank(batch['image'], 4)
    size = batch['image'].shape[1]
    image_stats = jax.tree.map(lambda x: jnp.asarray(x, dtype), image_stats)
    if augmentation.mean == 'crop':
        crop_mean = functools.partial(_crop, image_stats.mean_image, size=size)
        mean = jax.vmap(crop_mean)(batch['offset'], batch['reflect'])
    else:
        mean = _fixed_mean(image_stats, augmentation, size)
    shift = color_shift(batch['color'].astype(dtype), image_stats, augmentation.color_scale)
    x = batch['image'].astype(dtype) - mean + jnp.where(color, shift, 0)[:, None, None, :]
    if augmentation.color_divide:
        x = x / jnp.where(color, 1 + augmentation.color_std, 1).astype(dtype)
    return x / jnp.asarray(augmentation.pixel_std, dtype)[None, None, None]


def _fixed_mean(image_stats: ImageStats, augmentation: Augmentation, size: int) -> Array:
    """Returns the mean subtracted from every crop, [1, size, size, 3] or [1, 1, 1, 3]."""
    mean = jnp.asarray(image_stats.mean_image)[None]
    return center_crop(mean, size) if augmentation.mean == 'center' else mean.mean((1, 2), keepdims=True)


def center_crop(image_NHWC: Images, size: int) -> Images:
    """Returns the central size x size part of images [N, S, S, 3].

    >>> center_crop(np.arange(16).reshape(1, 4, 4, 1), 2).ravel()
    array([ 5,  6,  9, 10])
    """
    y, x = ((side - size) // 2 for side in image_NHWC.shape[1:3])
    return image_NHWC[:, y : y + size, x : x + size]


def ten_views(image_NHWC: Images, size: int) -> list[Images]:
    """Returns the ten test views of section 4.1, [N, size, size, 3] each: center, four corners, and their reflections.

    `image_NHWC` is [N, S, S, 3] of any dtype. The five reflections come last, in the order of the originals. Raises
    UserError for another shape, and for views that are larger than the images.

    Of a 3 x 3 image, the center pixel, the corners, and the same again: their reflections have one pixel too.

    >>> pixels = np.arange(9).repeat(3).reshape(1, 3, 3, 3)
    >>> [int(view[0, 0, 0, 0]) for view in ten_views(pixels, 1)]
    [4, 0, 2, 6, 8, 4, 0, 2, 6, 8]
    """
    shape = np.shape(image_NHWC)
    if len(shape) != 4 or shape[3] != 3 or not isinstance(image_NHWC, np.ndarray | Array):
        found = f'{type(image_NHWC).__name__} of shape {shape}'
        raise UserError(f'images are {found}: expected an array of shape (N, S, S, 3).')
    _, height, width, _ = shape
    if not isinstance(size, int | np.integer) or not 0 < size <= min(height, width):
        raise UserError(f'size={size!r}: expected an integer from 1 to {min(height, width)}, the side of the images.')
    corners = [(y, x) for y in (0, height - size) for x in (0, width - size)]
    five = [center_crop(image_NHWC, size)] + [image_NHWC[:, y : y + size, x : x + size] for y, x in corners]
    return five + [view[:, :, ::-1] for view in five]


def views(
    image_NHWC: Array, image_stats: ImageStats, augmentation: Augmentation, *, count: int, dtype: DType = jnp.float32
) -> list[Array]:
    """Returns the network's inputs at test time: center crop (count=1) or ten views (count=10), without color shift.

    `image_NHWC` is uint8 [N, S, S, 3], as large as the mean image. `augmentation.mean` selects the mean image under the
    same crop (paper) or one mean for all views (authors). The result has `count` arrays, `dtype` [N, size, size, 3],
    mean-subtracted, on the 0-255 scale (divided by `pixel_std`). Raises UserError for other counts.
    """
    if count not in (1, 10):
        raise UserError(f'views={count}: expected 1 (center) or 10 (corners and center, with reflections).')
    chex.assert_equal_shape([image_NHWC[0], image_stats.mean_image])
    size, image = augmentation.image_size, image_NHWC.astype(dtype)
    mean: Array | int = 0
    if augmentation.mean == 'crop':
        image = image - jnp.asarray(image_stats.mean_image, dtype)[None]
    else:
        mean = _fixed_mean(image_stats, augmentation, size).astype(dtype)
    crops = ten_views(image, size) if count == 10 else [center_crop(image, size)]
    return [(part - mean) / jnp.asarray(augmentation.pixel_std, dtype)[None, None, None] for part in crops]
