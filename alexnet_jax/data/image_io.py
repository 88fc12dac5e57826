"""Reads and decodes image files. Checks declared sizes before allocating memory."""

import functools
import io
import os
import re
import stat
import warnings

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError, features

from alexnet_jax.utils.errors import first_line
from alexnet_jax.utils.files import foreign_kind

SUFFIXES = tuple('.jpeg .jpg .jpe .jfif .mpo .png .apng .bmp .gif .tif .tiff .webp .ppm .pgm .pbm .pnm'.split())
HEIF_SUFFIXES = ('.heic', '.heif', '.hif')
_HEIF_MAGIC = re.compile(rb'.{4}ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)', re.DOTALL)
HEIF_EXTRA = "pip install 'alexnet_jax[heif]'"
MAX_BYTES = 2**28  # size of the largest accepted image file
MAX_PIXELS = 89_478_485  # Pillow's threshold for its decompression bomb warning
# The formats of common datasets. Pillow supports dozens more, and runs Ghostscript for EPS. MPO is read as JPEG.
_FORMATS = ('JPEG', 'PNG', 'BMP', 'GIF', 'TIFF', 'WEBP', 'PPM')
# Notes on images that can be read, but whose pixels are probably not as they were meant.
DARK = '16-bit pixels below a quarter of 65535, as in 12-bit data: it is read as dark; scale its pixels up to 65535'
BLANK = 'only fully transparent pixels: it is read as white'
FRAMES = 'several frames or pages: only the first is read'
_WITH_FRAMES = ('GIF', 'PNG', 'TIFF', 'WEBP')  # a second picture in a JPEG (MPO) is a preview


@functools.cache  # per process: registers pillow-heif with Pillow
def formats() -> tuple[str, ...]:
    """Returns Pillow's names of the formats that are read: AVIF if Pillow has its decoder, HEIF with pillow-heif."""
    avif = ('AVIF',) if features.check('avif') else ()
    try:
        import pillow_heif
    except ImportError:
        return (*_FORMATS, *avif)
    pillow_heif.register_heif_opener()
    return (*_FORMATS, *avif, 'HEIF')


@functools.cache
def suffixes() -> tuple[str, ...]:
    """Returns the suffixes, in lower case, of files that are read as images."""
    by_format = {'AVIF': ('.avif',), 'HEIF': HEIF_SUFFIXES}
    return (*SUFFIXES, *(suffix for name in formats() for suffix in by_format.get(name, ())))


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


def resize_center_crop(
    image: bytes | np.ndarray | Image.Image, size: int, notes: list[str] | None = None
) -> np.ndarray:
    """Resizes an image's shorter side to `size` and returns the center crop, uint8 [size, size, 3].  Section 2.

    Args:
      image: the bytes of an image file, a PIL image, or pixels uint8 or uint16 [H, W, C]: gray (C=1), gray and alpha
        (2), RGB (3) or RGBA (4). Transparent parts become white.
      size: side of the result, pixels.
      notes: receives `DARK`, `BLANK` or `FRAMES` where they apply.

    Raises ValueError if the image cannot be decoded or its pixels have no defined white level.

    Deviation: the paper names no filter and does not mention EXIF rotation. This uses Pillow's BILINEAR, which is
    antialiased (its window widens with the reduction), and applies the rotation.
    """
    notes = [] if notes is None else notes
    original = _from_array(image, notes) if isinstance(image, np.ndarray) else decode(image, notes)
    if not min(original.size):
        raise ValueError('it has no pixels')
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


def decode_jpeg(content: bytes, height: int, width: int) -> np.ndarray | None:
    """Returns the pixels of a JPEG, uint8 [height, width, 3], or None if Pillow has to decode the image.

    simplejpeg and Pillow use the same library, libjpeg-turbo, with the same settings, so their pixels are equal. At
    256 px simplejpeg takes 0.7 of Pillow's time; for photos of 500 px, which `decode` reads, Pillow is as fast. Pillow
    has to decode other formats and CMYK, and to say what is wrong with damaged files and files of another size.
    """
    if not content.startswith(b'\xff\xd8'):
        return None
    try:
        *size, colorspace, _ = simplejpeg.decode_jpeg_header(content)
        is_usual = size == [height, width] and colorspace in ('YCbCr', 'RGB', 'Gray')
        return simplejpeg.decode_jpeg(content, 'RGB') if is_usual else None
    except (ValueError, KeyError):
        return None


def decode(image: bytes | Image.Image, notes: list[str] | None = None) -> Image.Image:
    """Converts an image file or a PIL image to RGB, on a white background, and applies its EXIF rotation.

    notes: as for `resize_center_crop`. Raises ValueError with the reason if the image cannot be decoded.
    """
    notes = [] if notes is None else notes
    if isinstance(image, bytes) and not image:
        raise ValueError('the file is empty')
    with warnings.catch_warnings(action='ignore'):  # Pillow warns about defects it repairs; sizes are checked below
        try:
            opened = Image.open(io.BytesIO(image), formats=formats()) if isinstance(image, bytes) else image
            width, height = opened.size  # from the header
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError(f'{width} x {height} pixels')
            raw_mode = str(getattr(opened, 'tile', ''))  # how the file stores the pixels; loading clears it
            if isinstance(image, bytes) and _has_frames(opened):
                notes.append(FRAMES)
            # Load before reading EXIF data: `getexif` of a PNG also loads the pixels, and would hide their errors.
            opened.load()
            is_32_bit = opened.mode == 'F' or (opened.mode == 'I' and opened.format != 'PPM')  # PGM's mode I: 16 bits
            if not is_32_bit:
                rgb = _on_white(opened, raw_mode, notes)
                method = _exif_rotation(opened)
        except Image.DecompressionBombError as error:  # Pillow itself raises it above 2 * MAX_PIXELS
            declared = str(error).split(' exceeds')[0]
            raise ValueError(f'{declared}; expected at most {MAX_PIXELS:,} pixels') from error
        except UnidentifiedImageError as error:  # its message names only the buffer
            if isinstance(image, bytes) and _HEIF_MAGIC.match(image) and 'HEIF' not in formats():
                raise ValueError(f'a HEIC image; convert it, or {HEIF_EXTRA}') from error
            kind = foreign_kind(image[:512]) if isinstance(image, bytes) else None
            raise ValueError(kind or 'unknown image format') from error
        except Exception as error:  # Pillow raises undocumented exception types
            raise ValueError(f'damaged: {first_line(error)}') from error
    if is_32_bit:
        raise ValueError('signed or 32-bit pixels have no defined white level; expected 8 or 16 bits')
    return rgb if method is None else rgb.transpose(method)


def _has_frames(image: Image.Image) -> bool:
    """Returns whether an image file has a second frame or page."""
    try:
        return image.format in _WITH_FRAMES and getattr(image, 'is_animated', False)
    except Exception:  # ignore a damaged second frame
        return False


def _from_array(pixels: np.ndarray, notes: list[str]) -> Image.Image:
    """Converts uint8 or uint16 [H, W, C] to RGB on a white background."""
    if pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f'{pixels.dtype} pixels have no defined white level; expected uint8 or uint16')
    if pixels.ndim != 3 or not 1 <= pixels.shape[2] <= 4 or not pixels.size:
        raise ValueError(f'pixels of shape {pixels.shape}; expected (H, W, C) with 1 to 4 channels')
    if pixels.dtype == np.uint16:
        num_colors = 1 if pixels.shape[2] == 2 else 3
        _note_dark(int(pixels[..., :num_colors].max()), notes)
        pixels = (pixels >> 8).astype(np.uint8)
    return _on_white(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), '', notes)


def _on_white(image: Image.Image, raw_mode: str, notes: list[str]) -> Image.Image:
    """Converts a loaded image of any mode to RGB: scales 16 bits to 8 and composites transparency on white."""
    if image.mode.startswith('I'):
        image = _gray_to_8_bits(image, notes)
    elif ';16' in raw_mode:  # Pillow kept the upper 8 bits of 16
        brightest = max(high for _, high in image.convert('RGB').getextrema())  # type: ignore[misc]
        _note_dark(brightest << 8 | 255, notes)
    color = image.info.get('transparency')
    # A color declared transparent has the file's bits, but Pillow compares it with the 8-bit pixels.
    if isinstance(color, tuple) and ';16' in raw_mode:
        image.info['transparency'] = tuple(value >> 8 for value in color)
    elif isinstance(color, int) and (few_bits := re.search("'L;([24])'", raw_mode)):
        image.info['transparency'] = color * 255 // (2 ** int(few_bits[1]) - 1)
    if not image.has_transparency_data:
        return image.convert('RGB')
    rgba = (image.convert('LA') if image.mode == 'La' else image).convert('RGBA')
    if rgba.getchannel('A').getextrema()[1] == 0:
        notes.append(BLANK)
    return Image.alpha_composite(Image.new('RGBA', rgba.size, 'white'), rgba).convert('RGB')


def _gray_to_8_bits(image: Image.Image, notes: list[str]) -> Image.Image:
    """Converts gray of 12 or 16 bits to mode L, or to LA if the file declares one gray level transparent."""
    pixels, tags = np.asarray(image).clip(0, 65535), getattr(image, 'tag_v2', {})
    bits = 12 if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,) else 16
    if bits == 16:
        _note_dark(int(pixels.max()), notes)
    white_is_zero = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0  # Pillow inverts 8 bits, but not 16
    gray = Image.fromarray(np.uint8((2**bits - 1 - pixels if white_is_zero else pixels) >> (bits - 8)))
    color = image.info.get('transparency')
    if not isinstance(color, int):
        return gray
    return Image.merge('LA', (gray, Image.fromarray(np.uint8(pixels != color) * np.uint8(255))))


def _note_dark(maximum: int, notes: list[str]) -> None:
    if 0 < maximum < 2**14:
        notes.append(DARK)


_METHODS = 'FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90'.split()
_TRANSPOSITIONS = dict(enumerate(_METHODS, start=2))  # by the EXIF orientation that the method reverts


def _exif_rotation(image: Image.Image) -> Image.Transpose | None:
    """Returns the transposition of the EXIF orientation.

    `ImageOps.exif_transpose` also rewrites the EXIF block, which may fail.
    """
    try:
        method = _TRANSPOSITIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # ignore an unreadable EXIF block: the pixels may be valid
        method = None
    return None if method is None else Image.Transpose[method]
