"""Decoding of image files of all supported kinds."""

import io
import itertools
import re
import struct
import zlib

import chex
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps, features

from alexnet_jax.data import cache, image_files, image_io
from alexnet_jax.inference import predict
from alexnet_jax.utils.errors import UnreadableError, UserError
from tests import helpers
from tests.zoo import images
from tests.zoo.case import SIZE


def test_shorter_side_is_resized_and_center_cropped():
    for height, width in ((300, 431), (431, 300), (97, 64), (64, 64), (20, 31)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
        # The paper's procedure literally: rescale the whole image, then crop.
        scale = 64 / min(height, width)
        w, h = round(width * scale), round(height * scale)
        left, top = (w - 64) // 2, (h - 64) // 2
        resized = image.resize((w, h), Image.Resampling.BILINEAR).crop((left, top, left + 64, top + 64))
        found = image_io.resize_center_crop(helpers.encode(image, 'PNG'), 64)
        assert np.abs(found.astype(int) - np.asarray(resized)).max() <= 1


def test_unusual_files_are_decoded_correctly():
    colors = np.asarray([[255, 0, 0], [0, 128, 0], [0, 0, 255], [200, 200, 40]], np.uint8).reshape(2, 2, 3)
    pixels = np.kron(colors, np.ones((32, 32, 1), np.uint8))
    image = Image.fromarray(pixels)
    gray = np.repeat(np.asarray(image.convert('L'))[..., None], 3, axis=2)
    turned = Image.Exif()
    turned[0x0112] = 6  # display rotated by 90 degrees clockwise
    sixteen = Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 257)
    cases = {
        'PNG': (helpers.encode(image, 'PNG'), pixels),
        'JPEG': (helpers.encode(image, quality=98, subsampling=0), pixels),
        'CMYK JPEG': (helpers.encode(image.convert('CMYK'), quality=98), pixels),
        'gray JPEG': (helpers.encode(image.convert('L'), quality=98), gray),
        'palette GIF': (helpers.encode(image, 'GIF'), pixels),
        'RGBA PNG': (helpers.encode(image.convert('RGBA'), 'PNG'), pixels),
        '16-bit PNG': (helpers.encode(sixteen, 'PNG'), gray),
        'progressive JPEG': (helpers.encode(image, quality=98, subsampling=0, progressive=True), pixels),
        'EXIF': (helpers.encode(image, quality=98, subsampling=0, exif=turned), np.rot90(pixels, -1)),
    }
    for name, (content, expected) in cases.items():
        found = image_io.resize_center_crop(content, 64)
        assert found.shape == (64, 64, 3) and found.dtype == np.uint8, name
        inner = np.r_[4:28, 36:60]  # away from the edges between colors, which JPEG blurs
        difference = np.abs(found.astype(int) - expected)[inner][:, inner]
        assert difference.max() <= 8, (name, difference.max())


@pytest.mark.parametrize('orientation', range(1, 9))
def test_every_exif_orientation(orientation):
    """Images stored rotated are decoded upright; Pillow's own transposition is the reference."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.open(io.BytesIO(helpers.encode(helpers.picture(1, 40, 40), quality=95, exif=exif)))
    upright = np.asarray(ImageOps.exif_transpose(stored))
    chex.assert_trees_all_equal(
        image_io.resize_center_crop(helpers.encode(helpers.picture(1, 40, 40), quality=95, exif=exif), 40), upright
    )


def test_malformed_exif_is_tolerated():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, 'maker'  # rotated by 90 degrees; camera maker
    content = helpers.encode(helpers.picture(1, 40, 40), quality=95, exif=exif)
    entry = content.index(b'\x01\x0f\x00\x02')
    odd = content[:entry] + b'\x01\x00' + content[entry + 2 :]  # now its width is the text 'maker'
    with pytest.raises(Exception, match='not an integer'):  # Pillow's own transposition fails
        ImageOps.exif_transpose(Image.open(io.BytesIO(odd)))
    chex.assert_trees_all_equal(image_io.resize_center_crop(odd, 40), image_io.resize_center_crop(content, 40))


def test_very_deep_folders_are_refused(tmp_path):
    here = tmp_path / 'train'
    for _ in range(300):
        here /= 'd'
    here.mkdir(parents=True)
    with pytest.raises(UserError, match='nested more than 100 deep'):
        list(image_files.iter_image_files(str(tmp_path)))


def test_ambiguous_gray_levels_are_refused():
    for kind in (np.float32, np.int32):
        with pytest.raises(ValueError, match=f'{kind.__name__} pixels have no defined white level'):
            image_io.resize_center_crop(np.full((16, 16, 1), 200, kind), 8)
    assert image_io.resize_center_crop(np.full((16, 16, 1), 200, np.uint8), 8).min() == 200


def test_unsupported_formats_are_refused():
    for kind in ('ICO', 'ICNS', 'TGA', 'PCX', 'SGI', 'JPEG2000', 'DDS', 'PDF', 'EPS'):
        with pytest.raises(ValueError, match='^unknown image format$'):
            image_io.resize_center_crop(helpers.encode(helpers.picture(0), kind), 16)


_COLORS = np.array([[200, 100, 50], [0, 0, 0], [10, 20, 30], [255, 255, 255]])
_ALPHAS = np.array([255, 0, 128, 51])
# By hand: color * alpha / 255 + 255 - alpha.
_ON_WHITE = np.array([[200, 100, 50], [255, 255, 255], [132, 137, 142], [255, 255, 255]])


def _read(image):
    """Returns the first pixel of each of four columns of 4 x 4 pixels, and the notes."""
    notes: list[str] = []
    return image_io.resize_center_crop(image, 16, notes)[1, 1::4].astype(int), notes


def _columns(values, dtype=np.uint8):
    """Returns 16 x 16 pixels, four columns of equal values."""
    return np.tile(np.repeat(np.asarray(values, dtype), 4, axis=0)[None], (16,) + (1,) * np.ndim(values))


def _png(samples, depth, color_type, transparent):
    """Returns a PNG file of samples [H, W] or [H, W, C] with a transparent gray level or color, as its chunk tRNS."""
    bits = (samples.reshape(len(samples), -1, 1) >> np.arange(depth)[::-1]) & 1
    rows = np.packbits(bits.reshape(len(samples), -1).astype(np.uint8), axis=1)
    header = struct.pack('>IIBBBBB', *samples.shape[1::-1], depth, color_type, 0, 0, 0)
    data = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())
    chunks = ((b'IHDR', header), (b'tRNS', transparent), (b'IDAT', data), (b'IEND', b''))
    parts = [struct.pack('>I', len(d)) + k + d + struct.pack('>I', zlib.crc32(k + d)) for k, d in chunks]
    return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


def _tiff(pixels, bits, photometric):
    """Returns an uncompressed little-endian TIFF file of 16 x 16 gray pixels."""
    tags = [(256, 16), (257, 16), (258, bits), (259, 1), (262, photometric), (273, 122), (277, 1), (278, 16)]
    tags.append((279, len(pixels)))
    entries = b''.join(struct.pack('<HHII', tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    return b'II*\0' + struct.pack('<IH', 8, len(tags)) + entries + bytes(4) + pixels


@pytest.mark.parametrize('mode', ['RGBA', 'RGBa', 'LA', 'La', 'PA', 'P', 'P bytes', 'WebP', 'TIFF', 'array', 'uint16'])
def test_transparency_becomes_white(mode):
    rgba = _columns(np.c_[_COLORS, _ALPHAS])
    image, expected = Image.fromarray(rgba), _ON_WHITE
    if mode in ('LA', 'La'):
        gray = np.c_[_COLORS[:, 2], _ALPHAS]
        expected = np.repeat([[50], [255], [142], [255]], 3, axis=1)
        image = Image.fromarray(_columns(gray), 'LA').convert(mode)
    elif mode.startswith('P'):
        image = Image.fromarray(_columns(range(4)), 'P')
        image.putpalette(_COLORS.astype(np.uint8).tobytes())
        if mode == 'PA':
            image = image.convert('PA')
            image.putalpha(Image.fromarray(rgba[..., 3]))
        elif mode == 'P':  # one transparent color
            image, expected = helpers.encode(image, 'PNG', transparency=1), np.array(_ON_WHITE)
            expected[2:] = _COLORS[2:]
        else:  # a palette with alpha
            image = helpers.encode(image, 'PNG', transparency=bytes(_ALPHAS.tolist()))
    elif mode == 'RGBa':
        image = image.convert('RGBa')
    elif mode in ('WebP', 'TIFF'):
        image = helpers.encode(image, mode, **({'lossless': True, 'exact': True} if mode == 'WebP' else {}))
    elif mode == 'array':
        image = rgba
    elif mode == 'uint16':
        image = rgba.astype(np.uint16) * 257
    found, notes = _read(image)
    assert not notes
    np.testing.assert_allclose(found, expected, atol=2 if mode in ('RGBa', 'La') else 1)  # premultiplied: rounded twice


@pytest.mark.parametrize('depth', [1, 2, 4, 8, 16])
def test_transparent_gray_level_of_any_depth(depth):
    """Level 1 is nearly black, except for a depth of 1; it is one of the file's own levels, before they are scaled."""
    white = 2**depth - 1
    samples = _columns([0, 1, white, 1], int)
    for transparent, expected in ((1, [0, 255, 255, 255]), (0, [255, 255 // white, 255, 255 // white])):
        found, _ = _read(_png(samples, depth, 0, struct.pack('>H', transparent)))
        np.testing.assert_array_equal(found, np.repeat(np.array(expected)[:, None], 3, axis=1))


@pytest.mark.parametrize('depth', [8, 16])
def test_transparent_color_of_any_depth(depth):
    scale = 257 if depth == 16 else 1
    content = _png(_columns(_COLORS, int) * scale, depth, 2, struct.pack('>HHH', *(_COLORS[0] * scale)))
    np.testing.assert_array_equal(_read(content)[0], [[255] * 3, *_COLORS[1:]])


def test_opaque_images_are_unchanged_by_an_alpha_channel():
    picture = Image.fromarray(helpers.picture(0))
    for mode in ('RGBA', 'RGBa'):
        with_alpha, without = (image_io.resize_center_crop(image, 16) for image in (picture.convert(mode), picture))
        chex.assert_trees_all_equal(with_alpha, without)


def test_fully_transparent_images_are_noted():
    found, notes = _read(helpers.encode(Image.new('RGBA', (16, 16)), 'PNG'))
    assert notes == [image_io.BLANK] and found.min() == 255


_LEVELS = np.array([0, 1000, 2048, 4095])


@pytest.mark.parametrize(
    ('content', 'expected', 'noted'),
    [
        (_columns(_LEVELS, np.uint16)[..., None], _LEVELS >> 8, True),
        (_columns(_LEVELS * 16, np.uint16)[..., None], _LEVELS >> 4, False),
        (_columns(np.c_[_LEVELS, _LEVELS, _LEVELS], np.uint16), _LEVELS >> 8, True),
        (_columns(_LEVELS * 0, np.uint16)[..., None], _LEVELS * 0, False),  # black
        (helpers.encode(Image.fromarray(_columns(_LEVELS, np.uint16)), 'PNG'), _LEVELS >> 8, True),
        (helpers.encode(Image.fromarray(_columns(_LEVELS, np.uint16)), 'TIFF'), _LEVELS >> 8, True),
        (Image.fromarray(_columns(_LEVELS, np.uint16)), _LEVELS >> 8, True),
        (Image.fromarray(_columns(_LEVELS, '>u2')), _LEVELS >> 8, True),
        (_png(_columns(np.c_[_LEVELS, _LEVELS, _LEVELS], int), 16, 2, bytes([255] * 6)), _LEVELS >> 8, True),
        (b'P5 16 16 4095\n' + _columns(_LEVELS, '>u2').tobytes(), _LEVELS >> 4, False),  # the file names its maximum
        (_tiff(_columns(_LEVELS * 16, '<u2').tobytes(), 16, 1), _LEVELS >> 4, False),
        (_tiff(_columns(_LEVELS * 16, '<u2').tobytes(), 16, 0), (65535 - _LEVELS * 16) >> 8, False),  # 0 is white
        (
            _tiff(np.packbits((_columns(_LEVELS, int)[..., None] >> np.arange(12)[::-1]) & 1).tobytes(), 12, 1),
            _LEVELS >> 4,
            False,
        ),
    ],
    ids='array-wide-rgb-black-png-tiff-pil-pil_big-png_rgb-pgm_12-tiff_16-tiff_white0-tiff_12'.split('-'),
)  # fmt: skip
def test_gray_levels_of_more_than_8_bits(content, expected, noted):
    found, notes = _read(content)
    np.testing.assert_allclose(found[:, 0], expected, atol=1)
    assert notes == [image_io.DARK] * noted


@pytest.mark.parametrize('mode', ['I', 'F'])
def test_pil_images_of_32_bits_are_refused(mode):
    with pytest.raises(ValueError, match='32-bit pixels have no defined white level'):
        image_io.resize_center_crop(Image.new(mode, (16, 16), 1), 8)


def test_pil_images_are_read_as_their_files_are():
    exif = Image.Exif()
    exif[0x0112] = 6
    for content in (
        helpers.encode(helpers.picture(1, 40, 30), quality=95, exif=exif),
        helpers.encode(Image.fromarray(helpers.picture(1, 40, 30)).convert('CMYK'), quality=95),
        helpers.encode(Image.fromarray(helpers.picture(1, 40, 30)).quantize(16), 'GIF'),
    ):
        as_pil = image_io.resize_center_crop(Image.open(io.BytesIO(content)), 16)
        chex.assert_trees_all_equal(as_pil, image_io.resize_center_crop(content, 16))
    cut = Image.open(io.BytesIO(helpers.encode(helpers.picture(1))[:700]))
    with pytest.raises(ValueError, match='^damaged: image file is truncated'):
        image_io.resize_center_crop(cut, 16)


def _need(kind):
    if kind == 'HEIF':
        pytest.importorskip('pillow_heif', reason="needs pillow-heif: pip install 'alexnet_jax[heif]'")
    elif not features.check('avif'):
        pytest.skip('needs a Pillow with AVIF')
    assert kind in image_io.formats()


@pytest.mark.parametrize('kind', ['AVIF', 'HEIF'])
def test_heif_and_avif_are_rotated_once(kind):
    """Both formats store the rotation outside the EXIF block too, and pillow-heif applies it."""
    _need(kind)
    pixels = helpers.picture(1, 64, 96)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = helpers.encode(pixels, kind, quality=95, exif=exif.tobytes())
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(helpers.encode(pixels, 'PNG', exif=exif))))
        expected = image_io.resize_center_crop(np.asarray(upright), 32).astype(int)
        assert np.abs(image_io.resize_center_crop(content, 32) - expected).mean() < 3
    assert image_io.resize_center_crop(content.replace(content[4:12], b'ftypmif1', 1), 32).shape == (32, 32, 3)
    transparent = helpers.encode(Image.new('RGBA', (16, 16), (0, 0, 0, 0)), kind, quality=95)
    notes = []
    assert image_io.resize_center_crop(transparent, 8, notes).min() > 250 and notes == [image_io.BLANK]
    for damaged in (content[: len(content) // 2], content[:40]):
        with pytest.raises(ValueError, match='damaged|unknown image format'):
            image_io.resize_center_crop(damaged, 32)


@pytest.mark.parametrize('kind', ['AVIF', 'HEIF'])
def test_heif_and_avif_files_are_found(kind, tmp_path, capfd):
    _need(kind)
    suffix, content = {'AVIF': '.avif', 'HEIF': '.HEIC'}[kind], helpers.encode(helpers.picture(1), kind)
    helpers.write_files(tmp_path, {f'a{suffix}': content, 'b': content, 'c.jpg': content})
    assert len(predict.list_image_files([tmp_path])) == 3
    assert capfd.readouterr().err.endswith('because of their content: 1 without suffix\n')


def test_heic_without_pillow_heif_is_named(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(image_io, 'formats', lambda: image_io._FORMATS)
    monkeypatch.setattr(image_io, 'suffixes', image_io.suffixes.__wrapped__)  # the cached ones may have HEIC
    content = b'\0\0\0\x18ftypheic' + bytes(16)
    with pytest.raises(ValueError, match=r"^a HEIC image; convert it, or pip install 'alexnet_jax\[heif\]'$"):
        image_io.decode(content)
    helpers.write_files(tmp_path, {'a.HEIC': content, 'b.png': b''})
    assert len(predict.list_image_files([tmp_path])) == 1
    assert "*.HEIC), or read HEIC with pip install 'alexnet_jax[heif]'" in capfd.readouterr().err


def _jpegs():
    """Yields JPEGs of every usual kind: odd sizes, subsampling, progressive, restart markers, gray, stored as RGB."""
    for height, width in ((1, 1), (7, 9), (16, 17), (33, 64)):
        for seed, (subsampling, progressive) in enumerate(itertools.product(('4:4:4', '4:2:2', '4:2:0'), (0, 1))):
            image = Image.fromarray(helpers.picture(seed, height, width))
            options = {'subsampling': subsampling, 'progressive': progressive, 'restart_marker_blocks': seed % 3}
            yield from (helpers.encode(image, quality=quality, **options) for quality in (10, 95))
            yield helpers.encode(image.convert('L'), progressive=progressive)
        yield helpers.encode(image, keep_rgb=True)
        yield from (simplejpeg.encode_jpeg(np.asarray(image), colorsubsampling=kind) for kind in ('440', '411'))


def test_jpegs_have_the_pixels_of_pillow():
    contents = list(_jpegs())
    for content in contents:
        expected = np.asarray(Image.open(io.BytesIO(content)).convert('RGB'))
        np.testing.assert_array_equal(image_io.decode_jpeg(content, *expected.shape[:2]), expected)
    assert len(contents) == 84


@pytest.mark.filterwarnings('ignore:Corrupt EXIF data')
def test_jpegs_of_the_zoo_have_the_pixels_of_pillow(monkeypatch):
    """Read, refused or left to Pillow, a record gives the same pixels or the same error without simplejpeg."""
    names = {case.input: case.content() for case in images.CASES if case.content().startswith(b'\xff\xd8')}
    decoded = {name for name, content in names.items() if image_io.decode_jpeg(content, SIZE, SIZE) is not None}
    found = {name: _decoded(content) for name, content in names.items()}
    monkeypatch.setattr(image_io, 'decode_jpeg', lambda *_: None)
    for name, content in names.items():
        chex.assert_trees_all_equal(found[name], _decoded(content))
    assert (
        len(decoded) >= 8 and {'JPEG cut in its pixels', 'JPEG, CMYK as Photoshop writes it'} <= names.keys() - decoded
    )


def _decoded(content):
    """Returns the pixels of a record, or its error."""
    try:
        return cache.decode({'image': content}, SIZE)
    except UnreadableError as error:
        return re.sub('0x[0-9a-f]+', '', str(error))


def test_other_jpegs_are_left_to_pillow():
    picture = Image.fromarray(helpers.picture(0, 16, 16))
    content = helpers.encode(picture)
    assert image_io.decode_jpeg(content, 16, 16) is not None
    other = (helpers.encode(picture.convert('CMYK')), helpers.encode(picture, 'PNG'), content[:-20], content[:30], b'')
    assert [image_io.decode_jpeg(data, 16, 16) for data in other] == [None] * 5
    assert image_io.decode_jpeg(content, 16, 17) is None
