"""Image files: where they lie, and from one to an upright RGB square; what is refused before memory is spent on it."""

import io
import os
import stat
import warnings
from collections.abc import Iterable

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from alexnet_jax.utils.errors import UserError, first_line

SUFFIXES = ('.jpeg', '.jpg', '.png', '.bmp', '.gif', '.tif', '.tiff', '.webp', '.ppm', '.pgm')
MAX_BYTES = 2**28  # of a file
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs
# No others: Pillow hands EPS to Ghostscript, and knows formats by the dozen that no data set has. MPO counts as JPEG.
_FORMATS = ('JPEG', 'PNG', 'BMP', 'GIF', 'TIFF', 'WEBP', 'PPM')


def iter_image_files(folder: str, _above: tuple[str, ...] = ()) -> Iterable[str]:
    """Paths of the image files in a folder and those in it, in the order of their names. Raises UserError."""
    here = os.path.realpath(folder)
    if here in _above:  # a link has led round in a circle
        return
    if len(_above) > 100:
        raise UserError(f'{_above[0]!r} holds folders more than 100 deep; give one whose images lie nearer.')
    for entry in list_entries(folder):
        if os.path.isdir(entry.path):  # unlike entry.is_dir, it says no of a link to itself
            yield from iter_image_files(entry.path, (*_above, here))
        elif is_image(entry.name):
            yield entry.path


def is_image(name: str) -> bool:
    """Whether a file's name ends as those of images do."""
    return name.lower().endswith(SUFFIXES)


def list_entries(folder: str) -> list[os.DirEntry]:
    """What a folder holds, but for hidden things, in the order of the names."""
    try:
        with os.scandir(folder) as scanned:
            return sorted((e for e in scanned if not e.name.startswith('.')), key=lambda e: e.name)
    except OSError as error:
        raise UserError(f'cannot read the folder {folder!r}: {error.strerror}.') from error


def read_bytes(path: str, offset: int = 0, length: int = -1) -> bytes:
    """A file's bytes, or `length` of them from `offset` on. Raises OSError; ValueError if they cannot be one image."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe waits for its other end, a device may have no end
        raise ValueError('not a regular file')
    with open(path, 'rb') as file:
        if length < 0:
            length = os.fstat(file.fileno()).st_size - offset
        if length > MAX_BYTES:
            raise ValueError(f'{length:,} bytes, more than the {MAX_BYTES:,} that an image may have')
        file.seek(offset)
        return file.read(length)


def resize_center_crop(image: bytes | np.ndarray, size: int) -> np.ndarray:
    """An image's central square with its shorter side resized to `size`, uint8 [size, size, 3].  Section 2.

    Resized by Pillow's BILINEAR, whose window widens with the reduction (antialiased). Deviation: the paper names no
    filter, and nothing of EXIF's rotation, which is applied.

    image: a file's bytes, or pixels [H, W, C] of 8 or 16 bits. Raises ValueError where it cannot be read, see `decode`.
    """
    if isinstance(image, np.ndarray):
        if image.dtype not in (np.uint8, np.uint16):
            raise ValueError(f'its pixels are {image.dtype}, of which nothing says what is white')
        whole = rgb(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image))
    else:
        whole = decode(image)
    scale = size / min(whole.size)
    width, height = (max(size, round(side * scale)) for side in whole.size)
    left, top = (width - size) // 2, (height - size) // 2
    # The same pixels as resizing all of it to width x height and then cropping, without computing the rest.
    x, y = whole.width / width, whole.height / height
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return np.asarray(whole.resize((size, size), Image.Resampling.BILINEAR, box=box))


def encode_jpeg(pixels: np.ndarray) -> bytes:
    """A JPEG of uint8 [H, W, 3], of quality 95."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, 'JPEG', quality=95)
    return buffer.getvalue()


def decode(content: bytes) -> Image.Image:
    """An image file as RGB, turned upright as its EXIF data say. Raises ValueError, which says what is wrong."""
    if not content:
        raise ValueError('the file is empty')
    with warnings.catch_warnings(action='ignore'):  # of what Pillow makes good; too many pixels are refused below
        try:
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                width, height = image.size  # by the header
                if width * height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f'{width} x {height} pixels')
                # Before its EXIF data are asked for: they load a PNG, and what fails there would not fail again.
                image.load()
                wide = image.mode == 'F' or (image.mode == 'I' and image.format != 'PPM')  # a PGM's are of 16 bits
                upright = rgb(_upright(image))
        except Image.DecompressionBombError as error:  # also Pillow's own, from twice as many on
            declared = str(error).split(' exceeds')[0]
            raise ValueError(f'{declared}, more than the {MAX_PIXELS:,} that an image may have') from error
        except UnidentifiedImageError as error:  # it names a buffer
            raise ValueError('of no known format') from error
        except Exception as error:  # Pillow refuses files in more ways than it documents
            raise ValueError(f'damaged: {first_line(error)}') from error
    if wide:
        raise ValueError('its pixels are 32-bit numbers, of which nothing says what is white')
    return upright


def rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB; 16 bits a pixel are scaled to 8."""
    if image.mode.startswith(('I', 'F')):  # 16 bits a pixel: converting would clip, not scale
        image = Image.fromarray(np.uint8(np.asarray(image, np.uint32).clip(0, 65535) >> 8))
    return image.convert('RGB')


# What brings an image of EXIF orientation 2 to 8 upright.
_TURNS = dict(
    enumerate('FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90'.split(), start=2)
)


def _upright(image: Image.Image) -> Image.Image:
    """Not `ImageOps.exif_transpose`: that writes the EXIF block anew, and fails where another tag of it is odd."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # an EXIF block that cannot be read says nothing; the pixels may be fine
        turn = None
    return image if turn is None else image.transpose(Image.Transpose[turn])
