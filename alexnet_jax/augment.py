"""The paper's data augmentation (section 4.1): random draws on the host, arithmetic on the device.

`draw` and `crop` run in the input pipeline on uint8; `preprocess` and `views` run inside the jitted step, so that bytes
and not floats cross to the device.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from PIL import Image

from alexnet_jax.errors import UserError
from alexnet_jax.statistics import Statistics


class Augmentation(NamedTuple):
    """What a config's `data` says of crops, reflections, colour and mean. The defaults are the paper's.

    Sources: section 4.1; `convdata_jpeg.py` of the authors' release; Caffe's data layer; torchvision's training script.
    """

    image_size: int = 224  # side of what the network reads, pixels; Caffe's 227
    crop_area: tuple[float, float] | tuple = ()  # (): windows of image_size; torchvision's (0.08, 1): parts of the area
    random_crop: bool = True  # False: always the centre
    all_positions: bool = False  # 32 x 32 windows of 256 px, section 4.1's factor of 2048; True: all 33 x 33 (authors)
    draw_every: int = 1  # successive images that share crop and reflection: 1 by the words, 32 in the authors' code
    reflect: bool = True
    mean: str = 'crop'  # subtract the mean image 'crop' by crop, its 'centre' always (authors), or its mean a 'channel'
    pixel_std: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of R, G, B; what mean-subtracted pixels are divided by
    colour_std: float = 0.1  # of the components' alphas; 0: off
    colour_scale: str = 'eigenvalue'  # what the alphas are times: 'eigenvalue' (on [0, 1]) or 'std', its root (authors)
    colour_divide: bool = False  # divide the image by 1 + colour_std while colour is on (authors)
    colour_epochs: float = 0.0  # colour goes off after so many epochs, 0: never; 67 in the authors' net 145 (2010)


def from_config(fields: dict[str, Any]) -> Augmentation:
    """The augmentation in a config's `data`, also when JSON has turned its tuples into lists; other keys are ignored.

    Raises:
      UserError: a value outside its range.
    """
    fields = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items() if key in Augmentation._fields}
    found = Augmentation(**fields)
    area, stds = found.crop_area, found.pixel_std
    for key, right, expected in (
        ('image_size', _whole(found.image_size), 'a whole number of pixels above 0'),
        ('draw_every', _whole(found.draw_every), 'a whole number of images above 0'),
        ('crop_area', area == () or (_numbers(area, 2) and 0 < area[0] <= area[1] <= 1), '() or (least, most), 0 to 1'),
        ('mean', found.mean in ('crop', 'centre', 'channel'), "'crop', 'centre' or 'channel'"),
        ('pixel_std', _numbers(stds, 3) and min(stds) > 0, 'three numbers above 0'),
        ('colour_std', _numbers((found.colour_std,), 1) and found.colour_std >= 0, 'a number of 0 or more'),
        ('colour_scale', found.colour_scale in ('eigenvalue', 'std'), "'eigenvalue' or 'std'"),
        ('colour_epochs', _numbers((found.colour_epochs,), 1) and found.colour_epochs >= 0, 'a number of 0 or more'),
    ):
        if not right:
            raise UserError(f'data.{key}={getattr(found, key)!r}; expected {expected}.')
    if area and not found.random_crop:
        raise UserError(f'data.crop_area={area} draws crops; use data.crop_area=() with data.random_crop=False.')
    if area and found.mean != 'channel':
        raise UserError(
            f'data.mean={found.mean!r}, but data.crop_area changes the scale, where no pixel has a mean of its own; '
            "use data.mean='channel'."
        )
    return found


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _numbers(values, count: int) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == count
        and all(isinstance(v, int | float) and -1e300 < v < 1e300 for v in values)
    )


class Draw(NamedTuple):
    """What is random about one image in one use."""

    offset: np.ndarray  # int32 [2]: row and column of the crop's first pixel
    extent: np.ndarray  # int32 [2]: its height and width, before it is brought to image_size
    reflect: np.bool_  # mirror left to right
    colour: np.ndarray  # float32 [3]: the paper's alphas, one for each principal component


def draw(augmentation: Augmentation, *, seed: int, position: int, record_size: int) -> Draw:
    """Draws crop, reflection and colour for one image: 2048 = 32 x 32 x 2 crops in the paper.

    They depend on (seed, position in the stream) alone.
    """
    drawn = draw_batch(augmentation, seed=seed, first=position, count=1, record_size=record_size)
    return Draw(*(values[0] for values in drawn))


def draw_batch(augmentation: Augmentation, *, seed: int, first: int, count: int, record_size: int) -> Draw:
    """What `draw` draws for `count` positions from `first` on, with an axis for them in front of every field.

    All numbers are drawn whatever the switches say, so that switching one off leaves the others as they were.
    """
    every, size = augmentation.draw_every, augmentation.image_size
    groups = np.arange(first, first + count) // every
    shared = _uniform((seed, 0), groups[0], groups[-1] - groups[0] + 1, 24)[groups - groups[0]]
    mirror, place, areas = shared[:, 0] < 0.5, shared[:, 1:3], shared[:, 4:].reshape(count, 10, 2)
    extent = np.full((count, 2), size)
    if augmentation.crop_area:
        extent = _parts_of_the_area(areas, record_size, augmentation.crop_area)
        room = record_size - extent + 1
    else:
        room = crop_positions(record_size, size, augmentation.all_positions)
    offset = np.floor(place * room)
    if not augmentation.random_crop:
        offset[:] = (record_size - size) // 2
    alphas = _normal(_uniform((seed, 1), first, count, 4))[:, :3]
    return Draw(
        offset.astype(np.int32),
        extent.astype(np.int32),
        mirror & augmentation.reflect,
        (alphas * augmentation.colour_std).astype(np.float32),
    )


def _uniform(key: tuple[int, int], first: int, count: int, words: int) -> np.ndarray:
    """Float64 [count, words] in [0, 1): row i depends on (key, first + i) alone. words: a multiple of 4.

    Philox counts instead of remembering, four numbers a count: what belongs to a position is found without drawing all
    before it, and a batch takes one call (a generator for every image took 40 us each).
    """
    counter = int(first) * (words // 4)
    raw = np.random.Philox(key=key, counter=counter).random_raw(int(count) * words)
    return (raw >> np.uint64(11)).reshape(count, words) * 2.0**-53


def _normal(uniform: np.ndarray) -> np.ndarray:
    """As many independent normal numbers as uniform ones (Box and Muller)."""
    radius, angle = np.split(uniform, 2, axis=-1)
    radius = np.sqrt(-2 * np.log(1 - radius))
    return np.concatenate([radius * np.cos(2 * np.pi * angle), radius * np.sin(2 * np.pi * angle)], axis=-1)


def _parts_of_the_area(uniform: np.ndarray, size: int, area: tuple[float, float]) -> np.ndarray:
    """Height and width [N, 2] of parts of a square's area with sides of 3:4 to 4:3, as torchvision's RandomResizedCrop.

    uniform: [N, tries, 2]; the first try that fits into the square counts, else it is the square.
    """
    share = area[0] + (area[1] - area[0]) * uniform[..., 0]
    aspect = np.exp(np.log(3 / 4) + np.log(16 / 9) * uniform[..., 1])
    tries = np.round(size * np.sqrt(np.stack([share / aspect, share * aspect], axis=-1)))
    fits = ((tries > 0) & (tries <= size)).all(-1)
    found = np.take_along_axis(tries, fits.argmax(1)[:, None, None], axis=1)[:, 0]
    return np.where(fits.any(1)[:, None], found, size).astype(int)


def crop(image_HWC: np.ndarray, drawn: Draw, size: int, out: np.ndarray | None = None) -> np.ndarray:
    """The drawn part of a uint8 image as [size, size, 3], mirrored if drawn so; in `out`, if that is given."""
    (y, x), (height, width) = drawn.offset, drawn.extent
    part = image_HWC[y : y + height, x : x + width]
    if (height, width) != (size, size):
        part = np.asarray(Image.fromarray(part).resize((size, size), Image.Resampling.BILINEAR))
    out = np.empty((size, size, 3), np.uint8) if out is None else out
    if drawn.reflect:
        for channel in range(3):  # a fifth of the time of numpy's copy of part[:, ::-1]
            out[:, :, channel] = part[:, ::-1, channel]
    else:
        out[...] = part
    return out


def crop_on_device(batch: dict, size: int) -> dict:
    """What `crop` does, for a batch of whole records, or one that has their numbers and all records.

    Args:
      batch: 'whole' uint8 [n, S, S, 3], or 'index' int32 [n] and 'records' uint8 [N, S, S, 3]; 'offset' and 'reflect'.
      size: of the crops, pixels.

    Returns:
      the batch with 'image' uint8 [n, size, size, 3] instead of these.
    """

    def from_one(record_HWC, offset, reflect):
        start = (*offset, jnp.zeros_like(offset[0]))  # of one type, in float64 too
        part = lax.dynamic_slice(record_HWC, start, (size, size, 3))
        return jnp.where(reflect, part[:, ::-1], part)

    def from_all(index, offset, reflect):
        start = (index, *offset, jnp.zeros_like(index))
        part = lax.dynamic_slice(batch['records'], start, (1, size, size, 3))[0]
        return jnp.where(reflect, part[:, ::-1], part)

    cut_out, which = (from_one, 'whole') if 'whole' in batch else (from_all, 'index')
    rest = {key: value for key, value in batch.items() if key not in (which, 'records')}
    return {**rest, 'image': jax.vmap(cut_out)(batch[which], batch['offset'], batch['reflect'])}


def default_record_size(image_size: int) -> int:
    """Side of the records that crops of a size are taken from, in the paper's proportion: 256 for 224."""
    return -(-image_size * 8 // 7)


def crop_positions(record_size: int, image_size: int, all_positions: bool = False) -> int:
    """Places at which a crop may begin, in each direction: 32 for 224 out of 256 (section 4.1's factor of 2048).

    all_positions: counts the last one too, as the authors' code does: 33.

    Raises:
      UserError: the records are smaller than what the network reads.
    """
    if image_size > record_size:
        raise UserError(
            f'data.image_size={image_size} is larger than the prepared images ({record_size} px); lower it, or '
            f'prepare again with --size={image_size} or more.'
        )
    return max(1, record_size - image_size + all_positions)


def colour_shift(alphas_N3, statistics: Statistics, scale: str = 'eigenvalue'):
    """[p1 p2 p3] [a1 l1, a2 l2, a3 l3]^T for each image, in grey levels.  Section 4.1.

    Deviation: the formula gives no scale. It is read on pixels in [0, 1], the one reading with sensible results (about
    3.4 levels of 255; eigenvalues of 0-255 pixels would shift by hundreds): l / 255^2 there, times 255 back here.

    Args:
      alphas_N3: float [N, 3].
      statistics: components of the RGB values.
      scale: 'eigenvalue', or 'std': the authors' code has the standard deviation sqrt(l), about 7.4 levels.

    Returns:
      float [N, 3], to be added to every pixel.
    """
    lengths = jnp.sqrt(statistics.eigenvalues) if scale == 'std' else statistics.eigenvalues / 255.0
    return (alphas_N3 * lengths[None]) @ statistics.eigenvectors.T


def preprocess(batch: dict, statistics: Statistics, augmentation: Augmentation, *, colour=True, dtype=jnp.float32):
    """Turns a training batch's bytes into the network's input: minus the mean, plus the colour shift.

    Args:
      batch: 'image' uint8 [N, s, s, 3], cropped, mirrored; 'offset' int32 [N, 2], 'reflect' bool [N], 'colour' float32
        [N, 3] as drawn for each.
      statistics: of the training set.
      augmentation: with mean='crop' the mean image is cropped and mirrored like its image (section 2: the mean activity
        of each pixel); with 'centre' its central part stays as it is, whatever the crop.
      colour: bool scalar, whether colour is (still) on.
      dtype: of the result.

    Returns:
      float [N, s, s, 3], mean-subtracted, 0-255 scale (divided by `pixel_std`).
    """
    chex.assert_rank(batch['image'], 4)
    size = batch['image'].shape[1:]
    statistics = jax.tree.map(lambda x: jnp.asarray(x, dtype), statistics)

    def mean_under(offset, reflect):
        part = lax.dynamic_slice(statistics.mean_image, (offset[0], offset[1], jnp.zeros_like(offset[0])), size)
        return jnp.where(reflect, part[:, ::-1], part)

    if augmentation.mean == 'crop':
        mean = jax.vmap(mean_under)(batch['offset'], batch['reflect'])
    else:
        mean = _fixed_mean(statistics, augmentation, size[0])
    shift = colour_shift(batch['colour'].astype(dtype), statistics, augmentation.colour_scale)
    x = batch['image'].astype(dtype) - mean + jnp.where(colour, shift, 0)[:, None, None, :]
    if augmentation.colour_divide:
        x = x / jnp.where(colour, 1 + augmentation.colour_std, 1).astype(dtype)
    return x / jnp.asarray(augmentation.pixel_std, dtype)[None, None, None]


def _fixed_mean(statistics: Statistics, augmentation: Augmentation, size: int):
    """[1, size, size, 3] or [1, 1, 1, 3], the same for every crop."""
    mean = jnp.asarray(statistics.mean_image)[None]
    return centre(mean, size) if augmentation.mean == 'centre' else mean.mean((1, 2), keepdims=True)


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


def views(image_NHWC, statistics: Statistics, augmentation: Augmentation, *, count: int, dtype=jnp.float32) -> list:
    """The network's inputs for a test: the centre alone (count=1), or ten views (count=10). No colour.

    Args:
      image_NHWC: uint8 [N, S, S, 3], whole records of the mean image's size.
      statistics: of the training set.
      augmentation: its `mean` says whether that of the same crop is subtracted (the paper), or one fixed (authors).

    Returns:
      `count` arrays, float [N, size, size, 3], mean-subtracted, 0-255 scale (divided by `pixel_std`).

    Raises:
      UserError: another count.
    """
    if count not in (1, 10):
        raise UserError(f'views={count}; expected 1 (centre) or 10 (corners and centre, with reflections).')
    chex.assert_equal_shape([image_NHWC[0], statistics.mean_image])
    size, image = augmentation.image_size, image_NHWC.astype(dtype)
    fixed = 0
    if augmentation.mean == 'crop':
        image = image - jnp.asarray(statistics.mean_image, dtype)[None]
    else:
        fixed = _fixed_mean(statistics, augmentation, size).astype(dtype)
    cuts = ten_views(image, size) if count == 10 else [centre(image, size)]
    return [(part - fixed) / jnp.asarray(augmentation.pixel_std, dtype)[None, None, None] for part in cuts]
