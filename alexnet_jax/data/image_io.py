"""Lists, reads and decodes image files. Checks declared sizes before allocating memory."""

import io
import os
import stat
import warnings
from collections.abc import Iterable

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from alexnet_jax.utils.errors import UserError, first_line

SUFFIXES = ('.jpeg', '.jpg', '.png', '.bmp', '.gif', '.tif', '.tiff', '.webp', '.ppm', '.pgm')
MAX_BYTES = 2**28  # size of the largest accepted image file
MAX_PIXELS = 89_478_485  # Pillow's threshold for its decompression bomb warning
# The formats of common datasets. Pillow supports dozens more, and runs Ghostscript for EPS. MPO is read as JPEG.
_FORMATS = ('JPEG', 'PNG', 'BMP', 'GIF', 'TIFF', 'WEBP', 'PPM')


def iter_image_files(folder: str, _parents: tuple[str, ...] = ()) -> Iterable[str]:
    """Yields the paths of all image files below a folder, sorted by name. Raises UserError if it cannot be read."""
    real_path = os.path.realpath(folder)
    if real_path in _parents:  # a cycle of symbolic links
        return
    if len(_parents) > 100:
        raise UserError(f'{_parents[0]!r} has folders nested more than 100 deep; use a folder closer to the images.')
    for entry in list_entries(folder):
        if os.path.isdir(entry.path):  # unlike entry.is_dir, returns False for a link to itself
            yield from iter_image_files(entry.path, (*_parents, real_path))
        elif is_image(entry.name):
            yield entry.path


def is_image(name: str) -> bool:
    """Returns whether a file name has an image suffix."""
    return name.lower().endswith(SUFFIXES)


def list_entries(folder: str) -> list[os.DirEntry]:
    """Returns the entries of a folder, without hidden ones, sorted by name. Raises UserError if it cannot be read."""
    try:
        with os.scandir(folder) as scanned:
            return sorted((e for e in scanned if not e.name.startswith('.')), key=lambda e: e.name)
    except OSError as error:
        raise UserError(f'cannot read the folder {folder!r}: {error.strerror}.') from error


def read_bytes(path: str, offset: int = 0, length: int = -1) -> bytes:
    """Reads `length` bytes at `offset`, or all bytes. Raises OSError, or ValueError if this cannot be an image."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe may block; a device may have no end
        raise ValueError('not a regular file')
    with open(path, 'rb') as file:
        if length < 0:
            length = os.fstat(file.fileno()).st_size - offset
        if length > MAX_BYTES:
            raise ValueError(f'{length:,} bytes; expected at most {MAX_BYTES:,}')
        file.seek(offset)
        return file.read(length)


def resize_center_crop(image: bytes | np.ndarray, size: int) -> np.ndarray:
    """Resizes an image's shorter side to `size` and returns the center crop, uint8 [size, size, 3].  Section 2.

    image: the bytes of an image file, or uint8 or uint16 pixels [H, W, C]. Raises ValueError if it cannot be decoded.

    Deviation: the paper names no filter and does not mention EXIF rotation. This uses Pillow's BILINEAR, which is
    antialiased (its window widens with the reduction), and applies the rotation.
    """
    if isinstance(image, np.ndarray):
        if image.dtype not in (np.uint8, np.uint16):
            raise ValueError(f'{image.dtype} pixels have no defined white level; expected uint8 or uint16')
        original = rgb(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image))
    else:
        original = decode(image)
    scale = size / min(original.size)
    width, height = (max(size, round(side * scale)) for side in original.size)
    left, top = (width - size) // 2, (height - size) // 2
    # Equals resizing to width x height and then cropping, without computing the pixels outside the crop.
    x, y = original.width / width, original.height / height
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return np.asarray(original.resize((size, size), Image.Resampling.BILINEAR, box=box))


def encode_jpeg(pixels: np.ndarray) -> bytes:
    """Encodes uint8 [H, W, 3] as a JPEG of quality 95."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, 'JPEG', quality=95)
    return buffer.getvalue()


def decode(content: bytes) -> Image.Image:
    """Decodes an image file to RGB and applies its EXIF rotation. Raises ValueError with the reason if that fails."""
    if not content:
        raise ValueError('the file is empty')
    with warnings.catch_warnings(action='ignore'):  # Pillow warns about defects it repairs; sizes are checked below
        try:
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                width, height = image.size  # from the header
                if width * height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f'{width} x {height} pixels')
                # Load before reading EXIF data: `getexif` of a PNG also loads the pixels, and would hide their errors.
                image.load()
                is_32_bit = image.mode == 'F' or (image.mode == 'I' and image.format != 'PPM')  # PGM's mode I: 16 bits
                decoded = rgb(_apply_exif_rotation(image))
        except Image.DecompressionBombError as error:  # Pillow itself raises it above 2 * MAX_PIXELS
            declared = str(error).split(' exceeds')[0]
            raise ValueError(f'{declared}; expected at most {MAX_PIXELS:,} pixels') from error
        except UnidentifiedImageError as error:  # its message names only the buffer
            raise ValueError('unknown image format') from error
        except Exception as error:  # Pillow raises undocumented exception types
            raise ValueError(f'damaged: {first_line(error)}') from error
    if is_32_bit:
        raise ValueError('32-bit pixels have no defined white level; expected 8 or 16 bits')
    return decoded


def rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB, scaling 16-bit pixels to 8 bits."""
    if image.mode.startswith(('I', 'F')):  # 16-bit pixels: image.convert would clip instead of scale
        image = Image.fromarray(np.uint8(np.asarray(image, np.uint32).clip(0, 65535) >> 8))
    return image.convert('RGB')


_METHODS = 'FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90'.split()
_TRANSPOSITIONS = dict(enumerate(_METHODS, start=2))  # by the EXIF orientation that the method reverts


def _apply_exif_rotation(image: Image.Image) -> Image.Image:
    """Applies the EXIF rotation. `ImageOps.exif_transpose` also rewrites the EXIF block, which may fail."""
    try:
        method = _TRANSPOSITIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # ignore an unreadable EXIF block: the pixels may be valid
        method = None
    return image if method is None else image.transpose(Image.Transpose[method])
