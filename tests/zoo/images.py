"""Image files of many kinds: what people have, and the pixels that the file means."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests import helpers
from tests.zoo.case import SIZE, picture, png

RGB = picture(1)
GRAY = np.ascontiguousarray(RGB[..., 1])
RIGHT = np.arange(SIZE) >= SIZE // 2  # the right half of each row
LEFT_WHITE = np.where(RIGHT[:, None], RGB, np.uint8(255))


def _animation(kind: str, frames: int = 3, **options) -> bytes:
    """Encodes several pictures in one file. They are new each time: Pillow stores settings of an encoder in them."""
    first, *others = (Image.fromarray(picture(seed)) for seed in range(1, 1 + frames))
    return helpers.encode(first, kind, save_all=True, append_images=others, **options)


FIRST_OF_SEVERAL = 'several frames or pages'


class ImageCase(NamedTuple):
    """One image file: its content, and its pixels uint8 [SIZE, SIZE, 3], or why it is refused."""

    input: str
    outcome: str
    name: str
    content: Callable[[], bytes]
    pixels: Callable[[bytes], np.ndarray] | None = None
    says: str = ''  # a pattern: of the warning, or of the reason


CASES: list[ImageCase] = []


def _read(input, outcome, name, content, pixels, says=''):
    CASES.append(ImageCase(input, outcome, name, content, pixels, says))


def _refused(input, reason, name, content, outcome='unreadable'):
    CASES.append(ImageCase(input, outcome, name, content, None, reason))


def _file(image, kind, **options):
    return lambda: helpers.encode(image() if callable(image) else image, kind, **options)


def _exactly(pixels):
    """The expected pixels, for formats without loss."""
    pixels = np.broadcast_to(pixels[..., None], (*pixels.shape, 3)) if pixels.ndim == 2 else pixels
    return lambda content: pixels


def _by_pillow(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert('RGB'))


def _with_alpha(mode):
    """Returns an image whose left half is transparent."""
    image = Image.fromarray(RGB).convert('RGB' if mode == 'RGBA' else 'L')
    image.putalpha(Image.fromarray(np.uint8(np.broadcast_to(RIGHT, (SIZE, SIZE)) * 255)))
    return image


def _palette(transparent=False):
    """Returns a palette image with four colors."""
    image = Image.fromarray(np.uint8(GRAY // 64), 'L').convert('L')
    image = Image.frombytes('P', (SIZE, SIZE), image.tobytes())
    image.putpalette([*COLORS.ravel().tolist()])
    if transparent:
        image.info['transparency'] = 0
    return image


COLORS = np.uint8([[255, 0, 0], [0, 200, 0], [0, 0, 150], [90, 90, 10]])
COLORED = COLORS[GRAY // 64]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png_file(width, height, depth, color_type, rows: bytes, *chunks: bytes) -> bytes:
    """Returns a PNG. rows: the bytes of each row after its filter type."""
    header = _chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, color_type, 0, 0, 0))
    return (
        b'\x89PNG\r\n\x1a\n' + header + b''.join(chunks) + _chunk(b'IDAT', zlib.compress(rows)) + _chunk(b'IEND', b'')
    )


def _in_16_bits(pixels):
    return (256 * pixels.astype(np.uint16) + 77).astype('>u2')


def _rows(array) -> bytes:
    return b''.join(b'\0' + row.tobytes() for row in array)


def _exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _pnm(header, data):
    return lambda: header.encode() + data


def _patched(content, position, byte):
    return content[:position] + bytes([byte]) + content[position + 1 :]


# Colors and bits.
_read('PNG, RGB', 'exact pixels', 'a.png', lambda: png(1), _exactly(RGB))
_read('PNG, gray', 'gray in three channels', 'a.png', _file(GRAY, 'PNG'), _exactly(GRAY))
_read(
    'PNG, black and white with 1 bit',
    '0 and 255',
    'a.png',
    _file(Image.fromarray(GRAY > 99), 'PNG'),
    _exactly(np.uint8(GRAY > 99) * 255),
)
_read('PNG, palette', 'colors of the palette', 'a.png', _file(_palette, 'PNG'), _exactly(COLORED))
_read(
    'PNG, palette with a transparent color',
    'that color is white',
    'a.png',
    _file(lambda: _palette(True), 'PNG', transparency=0),
    _exactly(np.where(GRAY[..., None] < 64, np.uint8(255), COLORED)),
)
_read(
    'PNG, RGBA', 'transparent parts are white', 'a.png', _file(lambda: _with_alpha('RGBA'), 'PNG'), _exactly(LEFT_WHITE)
)
_read(
    'PNG, gray with alpha',
    'transparent parts are white',
    'a.png',
    _file(lambda: _with_alpha('LA'), 'PNG'),
    lambda content: np.where(
        RIGHT[:, None], _by_pillow(_file(Image.fromarray(RGB).convert('L'), 'PNG')()), np.uint8(255)
    ),
)
_read(
    'PNG, all pixels transparent',
    'white, with a warning',
    'a.png',
    _file(Image.new('RGBA', (SIZE, SIZE), (9, 9, 9, 0)), 'PNG'),
    _exactly(np.full_like(RGB, 255)),
    'only fully transparent pixels',
)
_read(
    'PNG, gray with 16 bits',
    'the upper 8 bits',
    'a.png',
    lambda: png_file(SIZE, SIZE, 16, 0, _rows(_in_16_bits(GRAY))),
    _exactly(GRAY),
)
_read(
    'PNG, RGB with 16 bits',
    'the upper 8 bits',
    'a.png',
    lambda: png_file(SIZE, SIZE, 16, 2, _rows(_in_16_bits(RGB))),
    _exactly(RGB),
)
_read(
    'PNG, 12-bit data in 16 bits',
    'dark, with a warning',
    'a.png',
    lambda: png_file(SIZE, SIZE, 16, 0, _rows((_in_16_bits(GRAY) >> 4).astype('>u2'))),
    _exactly(GRAY >> 4),
    '16-bit pixels below a quarter',
)
_read(
    'PNG, gray with 2 bits',
    'scaled to 255',
    'a.png',
    lambda: png_file(
        SIZE,
        SIZE,
        2,
        0,
        _rows(np.packbits(np.unpackbits((GRAY >> 6)[..., None], axis=2)[..., 6:].reshape(SIZE, -1), axis=1)),
    ),
    _exactly((GRAY >> 6) * np.uint8(85)),
)
_read('JPEG, RGB', 'as Pillow decodes it', 'a.jpg', _file(RGB, 'JPEG'), _by_pillow)
_read('JPEG, gray', 'gray in three channels', 'a.jpg', _file(GRAY, 'JPEG'), _by_pillow)
_read(
    'JPEG, CMYK as Photoshop writes it',
    'converted to RGB',
    'a.jpg',
    _file(Image.fromarray(RGB).convert('CMYK'), 'JPEG'),
    _by_pillow,
)
_read('JPEG, progressive', 'as Pillow decodes it', 'a.jpg', _file(RGB, 'JPEG', progressive=True), _by_pillow)
_read('TIFF, CMYK', 'converted to RGB', 'a.tif', _file(Image.fromarray(RGB).convert('CMYK'), 'TIFF'), _by_pillow)
_read(
    'TIFF, CIELAB',
    'converted to RGB',
    'a.tif',
    _file(
        Image.merge('LAB', [Image.fromarray(np.uint8(GRAY > 99) * 255), *2 * [Image.new('L', (SIZE, SIZE), 128)]]),
        'TIFF',
    ),
    _by_pillow,
)
_read('TIFF, compressed by LZW', 'exact pixels', 'a.tif', _file(RGB, 'TIFF', compression='tiff_lzw'), _exactly(RGB))
_read(
    'TIFF, gray with 16 bits, big-endian',
    'the upper 8 bits',
    'a.tiff',
    _file(Image.frombytes('I;16B', (SIZE, SIZE), _in_16_bits(GRAY).tobytes()), 'TIFF'),
    _exactly(GRAY),
)
_read('BMP with a palette', 'colors of the palette', 'a.bmp', _file(_palette, 'BMP'), _exactly(COLORED))
_read(
    'GIF with a transparent color',
    'that color is white',
    'a.gif',
    _file(lambda: _palette(True), 'GIF', transparency=0),
    _exactly(np.where(GRAY[..., None] < 64, np.uint8(255), COLORED)),
)
_read(
    'WebP without loss, with alpha',
    'transparent parts are white',
    'a.webp',
    _file(lambda: _with_alpha('RGBA'), 'WEBP', lossless=True, exact=True),
    _exactly(LEFT_WHITE),
)
_read('PPM', 'exact pixels', 'a.ppm', _pnm(f'P6 {SIZE} {SIZE} 255\n', RGB.tobytes()), _exactly(RGB))
_read(
    'PPM as text',
    'exact pixels',
    'a.ppm',
    _pnm(f'P3 {SIZE} {SIZE} 255\n', ' '.join(map(str, RGB.ravel())).encode()),
    _exactly(RGB),
)
_read(
    'PBM, in which 1 is black',
    'black and white',
    'a.pbm',
    _pnm(f'P4 {SIZE} {SIZE}\n', np.packbits(GRAY > 99, axis=1).tobytes()),
    _exactly(np.uint8(GRAY <= 99) * 255),
)
_read(
    'PGM with its own maximum',
    'scaled to 255',
    'a.pgm',
    _pnm(f'P5 {SIZE} {SIZE} 51\n', (GRAY // 5).tobytes()),
    _exactly(GRAY // 5 * np.uint8(5)),
)
# Orientation, frames and shapes.
_read(
    'JPEG, EXIF rotation',
    'upright',
    'a.jpg',
    _file(RGB, 'JPEG', exif=_exif(6)),
    lambda content: np.rot90(_by_pillow(content), -1),
)
_read(
    'JPEG, mirrored by EXIF',
    'upright',
    'a.jpg',
    _file(RGB, 'JPEG', exif=_exif(5)),
    lambda content: _by_pillow(content).transpose(1, 0, 2),
)
_read('PNG, EXIF rotation', 'upright', 'a.png', _file(RGB, 'PNG', exif=_exif(8)), _exactly(np.rot90(RGB)))
_read(
    'WebP, EXIF rotation',
    'upright',
    'a.webp',
    _file(RGB, 'WEBP', lossless=True, exif=_exif(3)),
    _exactly(RGB[::-1, ::-1]),
)
_read(
    'TIFF, rotated by its tag', 'upright', 'a.tif', _file(RGB, 'TIFF', tiffinfo={274: 6}), _exactly(np.rot90(RGB, -1))
)
_read(
    'JPEG, damaged EXIF block',
    'the block is ignored',
    'a.jpg',
    _file(RGB, 'JPEG', exif=b'Exif\0\0MM\0*\xff\xff\xff\xff'),
    _by_pillow,
)
_read('JPEG, followed by other data', 'the picture', 'a.jpg', lambda: _file(RGB, 'JPEG')() + b'tail' * 99, _by_pillow)
_read(
    'GIF, animated',
    'the first frame, with a warning',
    'a.gif',
    lambda: _animation('GIF'),
    _by_pillow,
    FIRST_OF_SEVERAL,
)
_read(
    'WebP, animated',
    'the first frame, with a warning',
    'a.webp',
    lambda: _animation('WEBP', lossless=True),
    _exactly(picture(1)),
    FIRST_OF_SEVERAL,
)
_read(
    'PNG, animated',
    'the first frame, with a warning',
    'a.png',
    lambda: _animation('PNG'),
    _exactly(picture(1)),
    FIRST_OF_SEVERAL,
)
_read(
    'TIFF of several pages',
    'the first page, with a warning',
    'a.tif',
    lambda: _animation('TIFF'),
    _exactly(picture(1)),
    FIRST_OF_SEVERAL,
)
_read(
    'MPO, a JPEG of phones with a second picture',
    'the first picture',
    'a.jpg',
    lambda: _animation('MPO', frames=2),
    _by_pillow,
)
_read(
    'landscape picture',
    'the central square',
    'a.png',
    _file(helpers.picture(4, 32, 47), 'PNG'),
    _exactly(helpers.picture(4, 32, 47)[:, 7:39]),
)
_read(
    'portrait picture',
    'the central square',
    'a.png',
    _file(helpers.picture(4, 60, 32), 'PNG'),
    _exactly(helpers.picture(4, 60, 32)[14:46]),
)
_read(
    'picture of twice the size',
    "resized by Pillow's antialiased bilinear filter",
    'a.png',
    _file(helpers.picture(4, 64, 64), 'PNG'),
    _exactly(np.asarray(Image.fromarray(helpers.picture(4, 64, 64)).resize((32, 32), Image.Resampling.BILINEAR))),
)
_read(
    'picture of one pixel',
    'enlarged',
    'a.png',
    _file(np.full((1, 1, 3), 70, np.uint8), 'PNG'),
    _exactly(np.full_like(RGB, 70)),
)
_read(
    'picture of 1 x 700 pixels',
    'its center, enlarged',
    'a.png',
    _file(np.full((700, 1, 3), 70, np.uint8), 'PNG'),
    _exactly(np.full_like(RGB, 70)),
)
# Names that say something else.
_read('PNG named .JPEG, as n02105855_2933 of ImageNet', 'by content', 'a.JPEG', lambda: png(1), _exactly(RGB))
_read('WebP named .jpg by a web site', 'by content', 'a.jpg', _file(RGB, 'WEBP', lossless=True), _exactly(RGB))
_read('JPEG named .jfif', 'as Pillow decodes it', 'a.jfif', _file(RGB, 'JPEG'), _by_pillow)
# What cannot be read, or has no meaning.
_refused('file without content', 'the file is empty', 'a.jpg', lambda: b'')
_refused('file of one byte', 'unknown image format', 'a.jpg', lambda: b'\xff')
_refused('text', 'unknown image format', 'a.png', lambda: b'hello')
_refused(
    'Git LFS pointer',
    'Git LFS pointer.*git lfs pull',
    'a.jpg',
    lambda: b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n',
    'unreadable; the reason names `git lfs pull`',
)
_refused(
    'web page that a server sent in place of an image',
    'web page',
    'a.jpg',
    lambda: b'\n<!DOCTYPE html><html>',
    'unreadable; the reason says so',
)
_refused('archive named .png', 'unknown image format', 'a.png', lambda: b'PK\3\4' + bytes(60))
_refused('JPEG cut in its header', 'damaged|unknown image format', 'a.jpg', lambda: _file(RGB, 'JPEG')()[:40])
_refused('JPEG cut in its pixels', 'damaged: ', 'a.jpg', lambda: _file(RGB, 'JPEG')()[:-300])
_refused('PNG cut in its pixels', 'damaged: ', 'a.png', lambda: png(1)[: len(png(1)) // 2])
_refused('PNG with a wrong checksum', 'damaged: broken data', 'a.png', lambda: _patched(png(1), 60, png(1)[60] ^ 255))
_refused('GIF cut in its pixels', 'damaged: ', 'a.gif', lambda: _file(_palette, 'GIF')()[:-60])
_refused('WebP cut in its pixels', 'damaged|unknown', 'a.webp', lambda: _file(RGB, 'WEBP')()[:-60])
_refused('BMP cut in its pixels', 'damaged: ', 'a.bmp', lambda: _file(RGB, 'BMP')()[:-60])
_refused('TIFF cut in its pixels', 'damaged|unknown', 'a.tif', lambda: _file(RGB, 'TIFF')()[:-600])
_refused('PPM cut in its pixels', 'damaged: ', 'a.ppm', lambda: _pnm(f'P6 {SIZE} {SIZE} 255\n', RGB.tobytes()[:-9])())
_refused(
    'PNG that declares 60,000 x 60,000 pixels',
    'expected at most 89,478,485 pixels',
    'a.png',
    lambda: png_file(60000, 60000, 8, 2, b'\0'),
)
_refused('PNG of 0 x 0 pixels', 'damaged|no pixels|unknown', 'a.png', lambda: png_file(0, 0, 8, 2, b''))
_refused(
    'PNG with text that unpacks to 80 MB',
    'damaged: Decompressed data too large',
    'a.png',
    lambda: png_file(SIZE, SIZE, 8, 2, _rows(RGB), _chunk(b'zTXt', b'k\0\0' + zlib.compress(bytes(80 << 20)))),
)
_refused(
    'TIFF of floating-point numbers',
    'no defined white level',
    'a.tif',
    _file(Image.fromarray(GRAY.astype(np.float32)), 'TIFF'),
)
_refused(
    'TIFF of 32-bit integers', 'no defined white level', 'a.tif', _file(Image.fromarray(GRAY.astype(np.int32)), 'TIFF')
)
_refused('SVG named .png', 'unknown image format', 'a.png', lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>')
