"""Pixels of every kind of file."""

import io

import chex
import numpy as np
import pytest
from PIL import Image, ImageOps

from alexnet_jax.data import image_io
from alexnet_jax.utils.errors import UserError
from tests import helpers


def test_square_is_the_shorter_side_resized_and_the_center_cut():
    for height, width in ((300, 431), (431, 300), (97, 64), (64, 64), (20, 31)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
        # The paper's words literally: rescale all of it, then cut.
        scale = 64 / min(height, width)
        w, h = round(width * scale), round(height * scale)
        left, top = (w - 64) // 2, (h - 64) // 2
        resized = image.resize((w, h), Image.Resampling.BILINEAR).crop((left, top, left + 64, top + 64))
        found = image_io.resize_center_crop(helpers.encode(image, 'PNG'), 64)
        assert np.abs(found.astype(int) - np.asarray(resized)).max() <= 1


def test_odd_files_come_out_right():
    colors = np.asarray([[255, 0, 0], [0, 128, 0], [0, 0, 255], [200, 200, 40]], np.uint8).reshape(2, 2, 3)
    pixels = np.kron(colors, np.ones((32, 32, 1), np.uint8))
    image = Image.fromarray(pixels)
    gray = np.repeat(np.asarray(image.convert('L'))[..., None], 3, axis=2)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90 degrees clockwise
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
        inner = np.r_[4:28, 36:60]  # away from the edges between colors, where JPEG smears
        difference = np.abs(found.astype(int) - expected)[inner][:, inner]
        assert difference.max() <= 8, (name, difference.max())


@pytest.mark.parametrize('orientation', range(1, 9))
def test_every_exif_orientation(orientation):
    """What a camera stored turned is shown upright: Pillow's own transposition is the oracle."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.open(io.BytesIO(helpers.encode(helpers.picture(1, 40, 40), quality=95, exif=exif)))
    upright = np.asarray(ImageOps.exif_transpose(stored))
    chex.assert_trees_all_equal(
        image_io.resize_center_crop(helpers.encode(helpers.picture(1, 40, 40), quality=95, exif=exif), 40), upright
    )


def test_odd_exif_does_not_spoil_an_image():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, 'maker'  # turned by 90 degrees; made by
    content = helpers.encode(helpers.picture(1, 40, 40), quality=95, exif=exif)
    entry = content.index(b'\x01\x0f\x00\x02')
    odd = content[:entry] + b'\x01\x00' + content[entry + 2 :]  # now its width is the text 'maker'
    with pytest.raises(Exception, match='not an integer'):  # as Pillow's own transposition finds
        ImageOps.exif_transpose(Image.open(io.BytesIO(odd)))
    chex.assert_trees_all_equal(image_io.resize_center_crop(odd, 40), image_io.resize_center_crop(content, 40))


def test_folders_in_folders_without_end(tmp_path):
    here = tmp_path / 'train'
    for _ in range(300):
        here /= 'd'
    here.mkdir(parents=True)
    with pytest.raises(UserError, match='nested more than 100 deep'):
        list(image_io.iter_image_files(str(tmp_path)))


def test_arrays_that_are_no_gray_levels_are_refused():
    for kind in (np.float32, np.int32):
        with pytest.raises(ValueError, match=f'{kind.__name__} pixels have no defined white level'):
            image_io.resize_center_crop(np.full((16, 16, 1), 200, kind), 8)
    assert image_io.resize_center_crop(np.full((16, 16, 1), 200, np.uint8), 8).min() == 200


def test_formats_are_those_of_photos():
    for kind in ('ICO', 'ICNS', 'TGA', 'PCX', 'SGI', 'JPEG2000', 'DDS', 'PDF', 'EPS'):
        with pytest.raises(ValueError, match='^unknown image format$'):
            image_io.resize_center_crop(helpers.encode(helpers.picture(0), kind), 16)
