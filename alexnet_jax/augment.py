"""The paper's data augmentation (section 4.1): random draws on the host, arithmetic on the device.

`draw` and `cut` run in the input pipeline on uint8; `finish` and `views` run inside the jitted step, so that bytes and
not floats cross to the device.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from alexnet_jax.errors import UserError
from alexnet_jax.statistics import Statistics


class Draw(NamedTuple):
    """What is random about one image in one use."""

    offset: np.ndarray  # int32 [2]: row and column of the cut-out's first pixel
    reflect: np.bool_  # mirror left to right
    colour: np.ndarray  # float32 [3]: the paper's alphas, one for each principal component


def draw(rng: np.random.Generator, *, positions: int, reflect: bool, colour_std: float) -> Draw:
    """Draws crop, reflection and colour for one image: 2048 = 32 x 32 x 2 cut-outs in the paper.

    All numbers are drawn whatever the switches say, so that switching one off leaves the others as they were.

    Args:
      rng: seeded by (seed, position in the stream) alone.
      positions: rows and columns at which a cut-out may begin: 0 ... positions - 1.
      reflect: whether to mirror half of the images.
      colour_std: standard deviation of the alphas; 0.1 in the paper, 0 switches colour off.
    """
    offset = rng.integers(0, positions, 2, dtype=np.int32)
    mirror = np.bool_(rng.random() < 0.5)
    alphas = rng.standard_normal(3, dtype=np.float32)
    return Draw(offset, mirror & reflect, alphas * np.float32(colour_std))


def cut(image_HWC: np.ndarray, drawn: Draw, size: int) -> np.ndarray:
    """The drawn size x size part of a uint8 image, mirrored if drawn so."""
    y, x = drawn.offset
    part = image_HWC[y : y + size, x : x + size]
    return part[:, ::-1] if drawn.reflect else part


def positions(record_size: int, image_size: int) -> int:
    """Places at which a cut-out may begin, in each direction: 32 for 224 out of 256 (section 4.1's factor of 2048).

    Raises:
      UserError: the records are smaller than what the network reads.
    """
    if image_size > record_size:
        raise UserError(
            f'data.image_size={image_size} is larger than the prepared images ({record_size} px); lower it, or '
            f'prepare again with --size={image_size} or more.'
        )
    return max(1, record_size - image_size)


def colour_shift(alphas_N3, statistics: Statistics):
    """[p1 p2 p3] [a1 l1, a2 l2, a3 l3]^T for each image, in grey levels.  Section 4.1.

    The formula gives no scale. It is read on pixels in [0, 1], the one reading with sensible results (about 3.4 levels
    of 255; eigenvalues of 0-255 pixels would shift by hundreds): l / 255^2 there, times 255 back here.

    alphas_N3: float [N, 3]. Returns float [N, 3], to be added to every pixel.
    """
    return (alphas_N3 * (statistics.eigenvalues / 255.0)[None]) @ statistics.eigenvectors.T


def finish(batch: dict, statistics: Statistics, *, dtype=jnp.float32):
    """Turns a training batch's bytes into the network's input: minus the mean image, plus the colour shift.

    Args:
      batch: 'image' uint8 [N, s, s, 3], cut and mirrored; 'offset' int32 [N, 2], 'reflect' bool [N], 'colour' float32
        [N, 3] as drawn for each.
      statistics: the mean image is cut and mirrored like its image (section 2: the mean activity of each pixel).
      dtype: of the result.

    Returns:
      float [N, s, s, 3], mean-subtracted, 0-255 scale.
    """
    chex.assert_rank(batch['image'], 4)
    size = batch['image'].shape[1:]
    mean = jnp.asarray(statistics.mean_image, dtype)

    def mean_under(offset, reflect):
        part = lax.dynamic_slice(mean, (offset[0], offset[1], jnp.zeros_like(offset[0])), size)
        return jnp.where(reflect, part[:, ::-1], part)

    shift = colour_shift(batch['colour'].astype(dtype), jax.tree.map(lambda x: jnp.asarray(x, dtype), statistics))
    return (
        batch['image'].astype(dtype) - jax.vmap(mean_under)(batch['offset'], batch['reflect']) + shift[:, None, None, :]
    )


def centre(image_NHWC, size: int):
    """The central size x size part of images [N, S, S, 3]."""
    y, x = ((side - size) // 2 for side in image_NHWC.shape[1:3])
    return image_NHWC[:, y : y + size, x : x + size]


def ten_views(image_NHWC, size: int) -> list:
    """Four corners, the centre, and their reflections: ten arrays [N, size, size, 3].  Section 4.1.

    image_NHWC: [N, S, S, 3] of any type. The centre comes first, the five reflections last.
    """
    _, height, width, _ = image_NHWC.shape
    corners = [(y, x) for y in (0, height - size) for x in (0, width - size)]
    five = [centre(image_NHWC, size)] + [image_NHWC[:, y : y + size, x : x + size] for y, x in corners]
    return five + [view[:, :, ::-1] for view in five]


def views(image_NHWC, statistics: Statistics, *, size: int, count: int, dtype=jnp.float32) -> list:
    """The network's inputs for a test: the centre alone (count=1), or ten views (count=10).

    Args:
      image_NHWC: uint8 [N, S, S, 3], whole records of the mean image's size. The mean is subtracted before cutting: of
        the same crop.

    Returns:
      `count` arrays, float [N, size, size, 3], mean-subtracted, 0-255 scale.

    Raises:
      UserError: another count.
    """
    if count not in (1, 10):
        raise UserError(f'views={count}; expected 1 (centre) or 10 (corners and centre, with reflections).')
    chex.assert_equal_shape([image_NHWC[0], statistics.mean_image])
    image = image_NHWC.astype(dtype) - jnp.asarray(statistics.mean_image, dtype)[None]
    return ten_views(image, size) if count == 10 else [centre(image, size)]
