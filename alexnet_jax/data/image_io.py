"""Lists, reads and decodes image files. Checks declared sizes before allocating memory."""

import collections
import dataclasses
import io
import os
import stat
import warnings
from collections.abc import Iterable

import numpy as np
from absl import logging
from PIL import ExifTags, Image, UnidentifiedImageError

from alexnet_jax.utils.errors import UserError, first_line
from alexnet_jax.utils.files import as_utf8

SUFFIXES = (
    *('.jpeg', '.jpg', '.jpe', '.jfif', '.mpo', '.png', '.apng', '.bmp', '.gif', '.tif', '.tiff', '.webp'),
    *('.ppm', '.pgm', '.pbm', '.pnm'),
)
# Files of these kinds are not opened to see whether they are images: data sets have as many of them as images.
_TEXT_SUFFIXES = ('.txt', '.xml', '.json', '.csv', '.tsv')
# Images of formats that are not read.
_CONVERTIBLE = (
    *('.heic', '.heif', '.hif', '.avif', '.jxl', '.jp2', '.j2k', '.tga', '.psd', '.ico', '.svg', '.pdf', '.exr'),
    *('.dng', '.nef', '.cr2', '.cr3', '.arw', '.raf', '.orf', '.rw2', '.dcm'),
)
# Folders of Synology, QNAP, Windows, ext4 and macOS archives: thumbnails, deleted files, metadata.
_SYSTEM_FOLDERS = (
    *('@eadir', '#recycle', '#snapshot', '@recycle', '@recently-snapshot', '$recycle.bin'),
    *('system volume information', 'lost+found', '__macosx'),
)
MAX_BYTES = 2**28  # size of the largest accepted image file
MAX_PIXELS = 89_478_485  # Pillow's threshold for its decompression bomb warning
# The formats of common datasets. Pillow supports dozens more, and runs Ghostscript for EPS. MPO is read as JPEG.
_FORMATS = ('JPEG', 'PNG', 'BMP', 'GIF', 'TIFF', 'WEBP', 'PPM')


@dataclasses.dataclass
class FileCounts:
    """Counts of files by suffix: those that a search for images skips, and images that only their content shows."""

    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    by_content: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def log(self, folder: str) -> None:
        """Logs the counts, with a remedy for images of formats that are not read."""
        if self.by_content:
            logging.info('%s: files read as images because of their content: %s', folder, _listed(self.by_content))
        if self.skipped:
            formats = [suffix for suffix, _ in self.skipped.most_common() if suffix in _CONVERTIBLE]
            remedy = f'; to use them, convert them (magick mogrify -format jpg *{formats[0]})' if formats else ''
            logging.warning(
                '%s: skipped what is not an image of a known format: %s%s', folder, _listed(self.skipped), remedy
            )


def _listed(counts: collections.Counter[str]) -> str:
    most = [f'{count} {suffix}' for suffix, count in counts.most_common(8)]
    more = f', {counts.total() - sum(n for _, n in counts.most_common(8))} others' if len(counts) > 8 else ''
    return ', '.join(most) + more


def iter_image_files(folder: str, counts: FileCounts | None = None, _parents: tuple[str, ...] = ()) -> Iterable[str]:
    """Yields the paths of all image files below a folder, sorted by name. Raises UserError if it cannot be read."""
    counts = counts or FileCounts()
    real_path = os.path.realpath(folder)
    if real_path in _parents:  # a cycle of symbolic links
        return
    if len(_parents) > 100:
        raise UserError(f'{_parents[0]!r} has folders nested more than 100 deep; use a folder closer to the images.')
    for entry in list_entries(folder, counts):
        if is_folder(entry):
            yield from iter_image_files(entry.path, counts, (*_parents, real_path))
        elif is_image(entry, counts):
            yield entry.path


def is_image(entry: os.DirEntry, counts: FileCounts) -> bool:
    """Returns whether a file is an image by its suffix or, for other suffixes, by its content. Counts the file.

    Camera raw files are TIFF files whose first image is a thumbnail. TIFF is therefore not recognized by content if
    the name has a suffix.
    """
    if entry.name.lower().endswith(SUFFIXES):
        return True
    suffix = as_utf8(os.path.splitext(entry.name)[1].lower())
    formats = [name for name in _FORMATS if name != 'TIFF' or not suffix]
    # isfile is False for pipes, which must not be opened.
    if suffix not in _TEXT_SUFFIXES and os.path.isfile(entry.path) and _has_format(entry.path, formats):
        counts.by_content[suffix or 'without suffix'] += 1
        return True
    counts.skipped[suffix or 'without suffix'] += 1
    return False


def _has_format(path: str, formats: list[str]) -> bool:
    with warnings.catch_warnings(action='ignore'):
        try:
            with Image.open(path, formats=formats):
                return True
        except Image.DecompressionBombError:  # an image; reading it raises an error with the reason
            return True
        except Exception:  # Pillow raises undocumented exception types
            return False


def is_folder(entry: os.DirEntry) -> bool:
    """Returns whether an entry is a folder or a link to one. `entry.is_dir` raises OSError for a link to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def list_entries(folder: str, counts: FileCounts | None = None) -> list[os.DirEntry]:
    """Returns the entries of a folder sorted by name. Leaves out hidden ones, and folders of operating systems.

    The latter are added to `counts.skipped`. Raises UserError if the folder cannot be read.
    """
    try:
        with os.scandir(folder) as scanned:
            entries = sorted((e for e in scanned if not e.name.startswith('.')), key=lambda e: e.name)
    except OSError as error:
        raise UserError(f'cannot read the folder {folder!r}: {error.strerror}.') from error
    system = [entry for entry in entries if entry.name.lower() in _SYSTEM_FOLDERS]
    if counts:
        counts.skipped.update(f'{entry.name}/' for entry in system)
    return [entry for entry in entries if entry not in system]


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
