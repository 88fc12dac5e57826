"""The augmentation of section 4.1 against NumPy."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from alexnet_jax.core import augment, image_stats
from alexnet_jax.core.config import augmentation_from_config
from alexnet_jax.data import random_crops
from alexnet_jax.utils.errors import UserError
from tests import helpers


def _images(count, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def _draws(augmentation, count, record_size):
    return [helpers.draw(augmentation, seed=2, position=i, record_size=record_size) for i in range(count)]


def _statistics(size):
    moments = image_stats.Moments.zeros(size)
    for image in _images(20, size, seed=1):
        moments = moments.add(image)
    return image_stats.from_moments(moments)


def test_statistics_match_numpy():
    images = _images(20, 6, seed=1)
    # Correlated, so that the principal components are well defined.
    images[..., 1] = images[..., 0] // 2 + images[..., 1] // 4
    moments = image_stats.Moments.zeros(6)
    other = image_stats.Moments.zeros(6)
    for image in images[:7]:
        moments = moments.add(image)
    for image in images[7:]:
        other = other.add(image)
    found = image_stats.from_moments(moments.merge(other))
    chex.assert_trees_all_close(found.mean_image, images.mean(0).astype(np.float32), rtol=1e-6)
    covariance = np.cov(images.reshape(-1, 3).T.astype(np.float64), bias=True)
    rebuilt = found.eigenvectors @ np.diag(found.eigenvalues) @ found.eigenvectors.T
    chex.assert_trees_all_close(rebuilt, covariance, rtol=1e-4, atol=1e-2)
    chex.assert_trees_all_close(found.eigenvectors.T @ found.eigenvectors, np.eye(3), atol=1e-6)


def test_preprocess_subtracts_mean_and_adds_color():
    stats, size = _statistics(12), 8
    augmentation = augment.Augmentation(image_size=size)
    records = _images(6, 12)
    draws = _draws(augmentation, len(records), 12)
    assert {bool(d.reflect) for d in draws} == {True, False}
    batch = {
        'image': np.stack([random_crops.crop(r, d, size) for r, d in zip(records, draws, strict=True)]),
        **{name: np.stack([getattr(d, name) for d in draws]) for name in random_crops.AugmentParams._fields},
    }
    found = np.asarray(augment.preprocess(batch, stats, augmentation))
    for n, (record, drawn) in enumerate(zip(records, draws, strict=True)):
        # By hand: subtract the mean image from the whole record, then crop, then reflect.
        y, x = drawn.offset
        whole = record.astype(np.float64) - stats.mean_image
        expected = whole[y : y + size, x : x + size]
        if drawn.reflect:
            expected = expected[:, ::-1]
        # [p1, p2, p3][a1 l1, a2 l2, a3 l3]^T on pixels in [0, 1], scaled back to 0-255.
        shift = np.zeros(3)
        for i in range(3):
            shift += stats.eigenvectors[:, i] * drawn.color[i] * (stats.eigenvalues[i] / 255**2)
        chex.assert_trees_all_close(found[n], expected + 255 * shift, atol=1e-3)


def test_color_noise_strength_with_authors_components():
    """With the authors' published components, the formula on pixels in [0, 1] shifts a channel by 3.3 to 3.5 levels."""
    eigenvectors = np.array([[0.4180, -0.8170, 0.3973], [-0.7126, -0.0235, 0.7012], [-0.5635, -0.5762, -0.5920]]).T
    stats = image_stats.ImageStats(np.zeros((1, 1, 3)), np.array([19.72, 37.09, 121.78]) ** 2, eigenvectors)
    alphas = 0.1 * np.random.default_rng(0).standard_normal((100_000, 3))
    spread = np.asarray(augment.color_shift(jnp.asarray(alphas), stats)).std(0)
    rows = np.sqrt(((0.1 * stats.eigenvalues / 255) ** 2 * eigenvectors**2).sum(1))
    chex.assert_trees_all_close(spread, rows, rtol=0.02)
    assert 2 < rows.min() and rows.max() < 5


def test_draws_cover_2048_crops():
    draws = _draws(augment.Augmentation(), 40_000, 256)
    seen = {(*d.offset.tolist(), bool(d.reflect)) for d in draws}
    assert len(seen) == 2048  # 40,000 draws miss one with a probability below 1e-5
    assert min(s[0] for s in seen) == 0 and max(s[0] for s in seen) == 31
    alphas = np.stack([d.color for d in draws])
    chex.assert_trees_all_close(alphas.std(0), np.full(3, 0.1, np.float32), rtol=0.02)
    chex.assert_trees_all_close(alphas.mean(0), np.zeros(3, np.float32), atol=2e-3)


@pytest.mark.parametrize(
    'augmentation',
    [
        augment.Augmentation(),
        augment.Augmentation(draw_every=32, all_positions=True),
        augment.Augmentation(crop_area=(0.08, 1.0), mean='channel'),
        augment.Augmentation(random_crop=False, reflect=False),
    ],
    ids=['default', 'authors', 'crop area', 'center'],
)
def test_draws_do_not_depend_on_the_batch(augmentation):
    found = random_crops.draw_batch(augmentation, seed=2, first=21, count=50, record_size=256)
    alone = [helpers.draw(augmentation, seed=2, position=21 + i, record_size=256) for i in range(50)]
    for name, values in found._asdict().items():
        chex.assert_trees_all_equal(values, np.stack([getattr(drawn, name) for drawn in alone]))
    other = random_crops.draw_batch(augmentation, seed=3, first=21, count=50, record_size=256)
    assert not (other.color == found.color).any()


def test_uniform_numbers_match_numpy_generator():
    """NumPy reads the same counter, row by row."""
    theirs = np.random.Generator(np.random.Philox(key=(7, 1), counter=10 * 2)).random((3, 8))
    chex.assert_trees_all_equal(random_crops._uniform((7, 1), 10, 3, 8), theirs)


def test_colors_are_normal_and_independent():
    augmentation = augment.Augmentation(color_std=1.0)
    alphas = random_crops.draw_batch(augmentation, seed=0, first=0, count=200_000, record_size=256)
    alphas = alphas.color.astype(np.float64)
    moments = [np.mean(alphas**power, axis=0) for power in (1, 2, 3, 4)]
    chex.assert_trees_all_close(moments, [np.full(3, float(m)) for m in (0, 1, 0, 3)], atol=0.05)
    chex.assert_trees_all_close(np.corrcoef(alphas.T), np.eye(3), atol=0.01)
    chex.assert_trees_all_close(np.corrcoef(alphas[1:, 0], alphas[:-1, 0]), np.eye(2), atol=0.01)


def test_disabling_one_draw_keeps_the_others():
    (a,) = _draws(augment.Augmentation(), 1, 256)
    (b,) = _draws(augment.Augmentation(reflect=False, color_std=0.0), 1, 256)
    chex.assert_trees_all_equal(a.offset, b.offset)
    assert not b.reflect and not b.color.any()


def test_ten_views_are_corners_center_and_reflections():
    images = _images(3, 12)
    views = augment.ten_views(images, 8)
    five = [images[:, y : y + 8, x : x + 8] for y, x in ((2, 2), (0, 0), (0, 4), (4, 0), (4, 4))]
    chex.assert_trees_all_equal(views, five + [np.flip(v, axis=2) for v in five])


def test_views_subtract_the_mean_of_their_crop():
    stats, images = _statistics(12), _images(3, 12)
    whole = images.astype(np.float32) - stats.mean_image[None]
    augmentation = augment.Augmentation(image_size=8)
    ten = augment.views(images, stats, augmentation, count=10)
    chex.assert_trees_all_close(ten, augment.ten_views(whole, 8), atol=1e-4)
    (one,) = augment.views(images, stats, augmentation, count=1)
    chex.assert_trees_all_close(one, whole[:, 2:10, 2:10], atol=1e-4)
    with pytest.raises(UserError, match='views=5: expected 1 .* or 10'):
        augment.views(images, stats, augmentation, count=5)


def test_records_smaller_than_the_crop_are_refused():
    with pytest.raises(UserError, match=r'data.image_size=224 is larger than the prepared images \(64 px\)'):
        augment.crop_positions(64, 224)


def test_all_positions_include_the_last():
    assert augment.crop_positions(256, 224, all_positions=True) == 33
    draws = _draws(augment.Augmentation(all_positions=True), 4000, 256)
    seen = np.unique(np.stack([d.offset for d in draws]))
    chex.assert_trees_all_equal(seen, np.arange(33, dtype=np.int32))
    # Records as large as the crop have one position.
    assert {tuple(d.offset) for d in _draws(augment.Augmentation(all_positions=True), 50, 224)} == {(0, 0)}


def test_crop_area_distribution():
    """As torchvision's RandomResizedCrop: areas from 8% to 100%, aspect ratios from 3:4 to 4:3, uniform, inside."""
    augmentation = augment.Augmentation(image_size=224, crop_area=(0.08, 1.0), mean='channel')
    draws = _draws(augmentation, 20_000, 256)
    extents, offsets = (np.stack([getattr(d, f) for d in draws]).astype(float) for f in ('extent', 'offset'))
    assert (offsets >= 0).all() and (offsets + extents <= 256).all()
    area, aspect = extents.prod(1) / 256**2, extents[:, 1] / extents[:, 0]
    assert area.min() < 0.082 and area.max() > 0.98 and 0.72 < aspect.min() < 0.77 and 1.3 < aspect.max() < 1.4
    # Below half the area nearly all tries fit: the area is uniform, and the logarithm of the aspect ratio has mean 0.
    low = area < 0.5
    chex.assert_trees_all_close(np.quantile(area[low], [0.25, 0.5, 0.75]), np.array([0.185, 0.29, 0.395]), atol=0.01)
    assert abs(np.log(aspect[low]).mean()) < 0.01
    # The position is uniform: twice the mean offset is the mean free space.
    assert abs((2 * offsets - (256 - extents)).mean()) < 1.5


def test_crop_area_is_resized_by_pillow():
    image = _images(1, 32)[0]
    drawn = random_crops.AugmentParams(np.array([3, 5]), np.array([12, 20]), np.bool_(True), np.zeros(3))
    found = random_crops.crop(image, drawn, 8)
    expected = np.asarray(Image.fromarray(image[3:15, 5:25]).resize((8, 8), Image.Resampling.BILINEAR))[:, ::-1]
    chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize('mean', ['crop', 'center', 'channel'])
def test_mean_and_pixel_std(mean):
    """Compares training and test preprocessing with NumPy."""
    stats, std = _statistics(12), (50.0, 20.0, 10.0)
    augmentation = augment.Augmentation(image_size=8, mean=mean, pixel_std=std, color_std=0.0)
    (record,) = _images(1, 12)
    drawn = next(d for d in _draws(augmentation, 20, 12) if d.reflect and tuple(d.offset) != (2, 2))
    batch = {name: np.stack([value]) for name, value in drawn._asdict().items()}
    batch['image'] = random_crops.crop(record, drawn, 8)[None]
    y, x = drawn.offset
    under = {
        'crop': stats.mean_image[y : y + 8, x : x + 8][:, ::-1],
        'center': stats.mean_image[2:10, 2:10],
        'channel': stats.mean_image.reshape(-1, 3).mean(0)[None, None],
    }
    expected = (record[y : y + 8, x : x + 8][:, ::-1] - under[mean]) / np.array([[std]])
    chex.assert_trees_all_close(np.asarray(augment.preprocess(batch, stats, augmentation)[0]), expected, atol=1e-4)
    corner = augment.views(record[None], stats, augmentation, count=10)[1][0]  # the crop at row 0, column 0
    under['crop'] = stats.mean_image[:8, :8]
    chex.assert_trees_all_close(np.asarray(corner), (record[:8, :8] - under[mean]) / np.array([[std]]), atol=1e-4)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'image_size': 0}, 'data.image_size=0: expected a positive integer'),
        ({'draw_every': 0}, 'data.draw_every=0'),
        ({'mean': 'mode'}, "data.mean='mode': expected 'crop', 'center' or 'channel'"),
        ({'pixel_std': (1.0, 0.0, 1.0)}, 'data.pixel_std=.*: expected three positive numbers'),
        ({'crop_area': (0.5, 2.0), 'mean': 'channel'}, r'data.crop_area=\(0.5, 2.0\)'),
        ({'crop_area': (0.1, 1.0)}, "data.mean='crop': expected 'channel' with data.crop_area"),
        ({'color_scale': 'variance'}, "data.color_scale='variance'"),
        ({'color_std': -1.0}, 'data.color_std=-1.0'),
        ({'color_epochs': -1.0}, 'data.color_epochs=-1.0'),
    ],
)
def test_invalid_augmentations_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        augmentation_from_config(fields)


def test_center_crop_without_random_crops():
    fixed = augment.Augmentation(random_crop=False)
    draws = [helpers.draw(fixed, seed=0, position=i, record_size=256) for i in range(20)]
    assert {tuple(d.offset) for d in draws} == {(16, 16)}
    moving = [helpers.draw(augment.Augmentation(), seed=0, position=i, record_size=256) for i in range(20)]
    assert [bool(d.reflect) for d in draws] == [bool(d.reflect) for d in moving]  # the other draws are unchanged
