"""From raw files to records: every kind of input and of odd file, read back through TFDS alone."""

import collections
import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
import zlib

import chex
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image, ImageOps

from alexnet_jax.core import augment
from alexnet_jax.data import cache, datasets, image_io, image_stats_file, imagenet_classes, pipeline
from alexnet_jax.inference import predict
from alexnet_jax.prepare import discovery, image_ref, prepare, record_writer
from alexnet_jax.prepare import tfds as tfds_input
from alexnet_jax.utils.errors import UnreadableError, UserError
from tests import ROOT
from tests.small import running


def _pixels(seed, height=40, width=48):
    """A smooth picture: JPEG keeps it within a few levels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def _encode(pixels, kind='JPEG', **options):
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, kind, **options)
    return buffer.getvalue()


def _write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(root)


def _read_back(directory, split):
    """{file name: (pixels, class name)} by TFDS's own decoding-free reader."""
    builder = tfds.builder_from_directory(directory)
    names = builder.info.features['label'].names
    raw = not isinstance(builder.info.features['image'], tfds.features.Image)
    decoders = None if raw else {'image': tfds.decode.SkipDecoding()}
    found = {}
    for record in builder.as_data_source(split, decoders=decoders):
        image = record['image']
        pixels = image if raw else np.asarray(Image.open(io.BytesIO(image)))
        found[record['file_name'].decode()] = (pixels, names[record['label']])
    return found


def test_square_is_the_shorter_side_resized_and_the_center_cut():
    for height, width in ((300, 431), (431, 300), (97, 64), (64, 64), (20, 31)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
        # The paper's words literally: rescale all of it, then cut.
        scale = 64 / min(height, width)
        w, h = round(width * scale), round(height * scale)
        left, top = (w - 64) // 2, (h - 64) // 2
        resized = image.resize((w, h), Image.Resampling.BILINEAR).crop((left, top, left + 64, top + 64))
        found = image_io.resize_center_crop(_encode(image, 'PNG'), 64)
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
        'PNG': (_encode(image, 'PNG'), pixels),
        'JPEG': (_encode(image, quality=98, subsampling=0), pixels),
        'CMYK JPEG': (_encode(image.convert('CMYK'), quality=98), pixels),
        'gray JPEG': (_encode(image.convert('L'), quality=98), gray),
        'palette GIF': (_encode(image, 'GIF'), pixels),
        'RGBA PNG': (_encode(image.convert('RGBA'), 'PNG'), pixels),
        '16-bit PNG': (_encode(sixteen, 'PNG'), gray),
        'progressive JPEG': (_encode(image, quality=98, subsampling=0, progressive=True), pixels),
        'EXIF': (_encode(image, quality=98, subsampling=0, exif=turned), np.rot90(pixels, -1)),
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
    stored = Image.open(io.BytesIO(_encode(_pixels(1, 40, 40), quality=95, exif=exif)))
    upright = np.asarray(ImageOps.exif_transpose(stored))
    chex.assert_trees_all_equal(
        image_io.resize_center_crop(_encode(_pixels(1, 40, 40), quality=95, exif=exif), 40), upright
    )


def test_odd_exif_does_not_spoil_an_image():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, 'maker'  # turned by 90 degrees; made by
    content = _encode(_pixels(1, 40, 40), quality=95, exif=exif)
    entry = content.index(b'\x01\x0f\x00\x02')
    odd = content[:entry] + b'\x01\x00' + content[entry + 2 :]  # now its width is the text 'maker'
    with pytest.raises(Exception, match='not an integer'):  # as Pillow's own transposition finds
        ImageOps.exif_transpose(Image.open(io.BytesIO(odd)))
    chex.assert_trees_all_equal(image_io.resize_center_crop(odd, 40), image_io.resize_center_crop(content, 40))


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_data_that_are_gone_end_the_run_and_a_damaged_record_does_not(folder, tmp_path, workers):
    """And what is back when it is asked for once more was never gone, though array_record's own reader stays so."""
    out = tmp_path / 'out'
    prepare.prepare(folder, str(out), size=16, format='raw')
    away = tmp_path / 'away'
    whole = [record['image'] for record in datasets.open_dataset(str(out)).splits['train']]

    def stream(records):
        batches = pipeline.train_batches(
            cache.Records(records, 16), batch_size=5, seed=0, start_step=0, num_workers=workers, num_threads=1,
            augmentation=augment.Augmentation(image_size=16, reflect=False),
        )  # fmt: skip
        try:
            return next(batches)
        finally:
            batches.close()

    records = datasets.open_dataset(str(out)).splits['train']
    out.rename(away)
    with pytest.raises(UserError, match='data files disappeared while they were read') as error:
        stream(records)
    assert not isinstance(error.value, UnreadableError)
    with pytest.raises(UserError, match='data files disappeared while they were read.*No such file'):
        records[3]
    away.rename(out)
    assert stream(records)['weight'].all()
    for record, image in zip(records, whole, strict=True):
        chex.assert_trees_all_equal(record['image'], image)
    for shard in out.glob('*train*array_record*'):  # every byte of pixels and names is another
        content = bytearray(shard.read_bytes())
        content[64:-64] = bytes(byte ^ 1 for byte in content[64:-64])
        shard.write_bytes(content)
    records = datasets.open_dataset(str(out)).splits['train']
    with pytest.raises(UnreadableError, match='record 3 in train of .* cannot be read'):
        records[3]
    assert not stream(records)['weight'].any()


def test_folders_in_folders_without_end(tmp_path):
    here = tmp_path / 'train'
    for _ in range(300):
        here /= 'd'
    here.mkdir(parents=True)
    with pytest.raises(UserError, match='more than 100 deep'):
        list(image_io.iter_image_files(str(tmp_path)))


@pytest.fixture
def folder(tmp_path):
    files = {f'train/cat/{i}.jpg': _encode(_pixels(i)) for i in range(5)}
    files |= {f'train/dog/deeper/{i}.PNG': _encode(_pixels(10 + i), 'PNG') for i in range(5)}
    files |= {f'val/{c}/v{i}.jpeg': _encode(_pixels(20 + i)) for i, c in enumerate(('cat', 'dog'))}
    files |= {'train/cat/notes.txt': b'no image', 'train/.hidden/x.jpg': b'', 'val/.DS_Store': b''}
    return _write(tmp_path / 'in', files)


@pytest.mark.parametrize('kind', ['jpeg', 'raw'])
def test_folder_of_splits(folder, tmp_path, kind):
    out = str(tmp_path / 'out')
    prepare.prepare(folder, out, size=32, format=kind, workers=1)
    train, val = _read_back(out, 'train'), _read_back(out, 'val')
    assert sorted(train) == sorted(
        [f'train/cat/{i}.jpg' for i in range(5)] + [f'train/dog/deeper/{i}.PNG' for i in range(5)]
    )
    assert {name: c for name, (_, c) in val.items()} == {'val/cat/v0.jpeg': 'cat', 'val/dog/v1.jpeg': 'dog'}
    squares = {}
    for name, (pixels, class_name) in train.items():
        with open(os.path.join(folder, name), 'rb') as file:
            squares[name] = image_io.resize_center_crop(file.read(), 32)
        assert class_name == name.split('/')[1]
        difference = np.abs(pixels.astype(int) - squares[name])
        assert difference.max() == 0 if kind == 'raw' else difference.mean() < 3
    # Statistics are of the train split alone.
    stats = image_stats_file.load(out)
    everything = np.stack(list(squares.values())).astype(np.float64)
    chex.assert_trees_all_close(stats.mean_image, everything.mean(0).astype(np.float32), rtol=1e-5)
    covariance = np.cov(everything.reshape(-1, 3).T, bias=True)
    rebuilt = stats.eigenvectors @ np.diag(stats.eigenvalues) @ stats.eigenvectors.T
    chex.assert_trees_all_close(rebuilt, covariance, rtol=1e-3, atol=0.5)
    # And our own source agrees with TFDS's reader.
    dataset = datasets.open_dataset(out)
    assert dataset.class_names == ('cat', 'dog') and dataset.record_size == 32
    assert [r['label'] for r in dataset.split('train')].count(0) == 5  # a loop over the records ends
    assert len(dataset.split('train')) == 10


def test_classes_are_called_what_a_list_in_the_folder_says(tmp_path):
    """Their order stays that of the folders; two cranes (a bird, a machine) stay apart."""
    for name in ('n04', 'n03', 'n02', 'n01'):
        _write(tmp_path / 'raw', {f'train/{name}/a.jpg': _encode(_pixels(0))})
    (tmp_path / 'raw' / 'words.txt').write_text(
        '\ufeffn01\tcrane\r\nn00\tentity\nn02\tcrane\nn03\tEgyptian cat, Felis catus\n'
    )
    prepare.prepare(str(tmp_path / 'raw'), str(tmp_path / 'out'), size=16, workers=1)
    assert datasets.open_dataset(str(tmp_path / 'out')).class_names == (
        'crane (n01)',
        'crane (n02)',
        'Egyptian cat',
        'n04',
    )
    (tmp_path / 'raw' / 'classes.tsv').write_bytes(b'n04\t\xff\n\n\t\t\nn01\n')
    prepare.prepare(str(tmp_path / 'raw'), str(tmp_path / 'again'), size=16, workers=1)
    names = datasets.open_dataset(str(tmp_path / 'again')).class_names
    assert names[2] == 'Egyptian cat' and all(name.isprintable() for name in names)


def test_the_order_is_shuffled_by_the_seed_alone(folder, tmp_path):
    def prepared(seed, workers):
        out = str(tmp_path / f'{seed}-{workers}')
        prepare.prepare(folder, out, size=16, seed=seed, workers=workers)
        return _read_back(out, 'train'), image_stats_file.load(out)

    alone, alone_statistics = prepared(0, 1)
    both, both_statistics = prepared(0, 2)
    assert list(alone) != sorted(alone)
    assert list(alone) == list(both)  # however many processes
    chex.assert_trees_all_equal({n: p for n, (p, _) in alone.items()}, {n: p for n, (p, _) in both.items()})
    chex.assert_trees_all_equal(alone_statistics, both_statistics)
    assert list(prepared(1, 1)[0]) != list(alone)


def test_val_fraction_sets_training_images_aside(folder, tmp_path):
    _write(tmp_path / 'flat', {f'{c}/{i}.png': _encode(_pixels(i), 'PNG') for c in 'ab' for i in range(10)})
    out = str(tmp_path / 'out')
    prepare.prepare(str(tmp_path / 'flat'), out, size=16, val_fraction=0.25, seed=5, workers=1)
    train, val = _read_back(out, 'train'), _read_back(out, 'val')
    assert (len(train), len(val)) == (15, 5) and not set(train) & set(val)
    assert sorted(collections.Counter(name[0] for name in val).values()) == [2, 3]  # of each class its part
    with pytest.raises(UserError, match='needs a train split and no val split; there are: train, val'):
        prepare.prepare(folder, str(tmp_path / 'other'), val_fraction=0.5)


def test_classes_that_lose_all_images_to_val_are_counted(capsys):
    """Of a photo a class, as in the official archive's first thousand, every fifth goes."""
    refs = [image_ref.ImageRef(f'{c}/0', 0, -1, f'{c}/0', c) for c in range(20)]
    orders = prepare._orders({'train': refs}, 0.2, seed=0)
    labels = sorted(ref.label for ref in orders['val'])
    assert len(labels) == 4 and set(np.diff(labels)) == {5} and set(orders['train']) | set(orders['val']) == set(refs)
    assert 'leaves no training image of 4 classes' in capsys.readouterr().err
    prepare._orders({'train': refs + [ref._replace(name=f'{ref.name}b') for ref in refs]}, 0.2, seed=0)
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match='sets 0 of 20 images aside'):
        prepare._orders({'train': refs}, 0.02, seed=0)


def test_arrays_that_are_no_gray_levels_are_refused():
    for kind in (np.float32, np.int32):
        with pytest.raises(ValueError, match=f'its pixels are {kind.__name__}, of which nothing says what is white'):
            image_io.resize_center_crop(np.full((16, 16, 1), 200, kind), 8)
    assert image_io.resize_center_crop(np.full((16, 16, 1), 200, np.uint8), 8).min() == 200


def test_what_is_left_out_is_told(tmp_path, capfd):
    """And what was found: a folder too deep shows as one class."""
    content = _encode(_pixels(0))
    files = {f'{name}/1.jpg': content for name in ('a', 'b')} | {'loose.jpg': content, 'c/1.heic': content}
    _write(tmp_path / 'in', files)
    prepare.prepare(str(tmp_path / 'in'), str(tmp_path / 'out'), size=16, workers=1)
    said, errors = capfd.readouterr()
    assert 'train: 2 images  classes: 2 (a, b)' in said
    assert f'in no class folder, and so left out: 1 images in {tmp_path}/in' in errors
    assert errors.count('left out') == 2 and 'without images (.jpeg' in errors and 'and so left out: c\n' in errors


def test_bad_images_are_named_counted_and_limited(folder, tmp_path, capfd):
    good = _encode(_pixels(0))
    _write(
        tmp_path / 'in',
        {'train/cat/cut.jpg': good[: len(good) // 2], 'train/dog/empty.jpg': b'', 'train/dog/text.png': b'hello'},
    )
    out = tmp_path / 'out'
    with pytest.raises(UserError, match=r'3 of \d+ images cannot be read .* --max_unreadable=3'):
        prepare.prepare(folder, str(out), size=16, max_unreadable=2, workers=1)
    assert os.listdir(tmp_path) == ['in']  # nothing half-written
    prepare.prepare(folder, str(out), size=16, max_unreadable=3, workers=1)
    said = capfd.readouterr().err
    for name in ('train/cat/cut.jpg', 'train/dog/empty.jpg', 'train/dog/text.png'):
        assert f'unreadable: {name}: ' in said
    assert '3 unreadable images were left out' in said
    assert len(_read_back(str(out), 'train')) == 10
    assert len(datasets.open_dataset(str(out)).split('train')) == 10


def test_a_script_without_a_guard_prepares_once(folder, tmp_path):
    """Its processes do not run it again."""
    script = tmp_path / 'mine.py'
    script.write_text(
        'import sys\nfrom alexnet_jax.prepare import prepare\nprint("begun", flush=True)\n'
        'prepare.prepare(sys.argv[1], sys.argv[2], size=16, workers=2)\nprint(__file__, __spec__)\n'
    )
    words = [sys.executable, str(script), folder, str(tmp_path / 'out')]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0 and done.stdout.count('begun') == 1, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f'{script} None'
    assert len(datasets.open_dataset(str(tmp_path / 'out')).split('train')) == 10


def test_images_that_are_gone_are_not_taken_for_bad_ones(folder, tmp_path, monkeypatch):
    find, out = discovery.find_images, tmp_path / 'out'

    def then_gone(path):
        found = find(path)
        os.rename(tmp_path / 'in' / 'train' / 'cat', tmp_path / 'away')
        return found

    monkeypatch.setattr(discovery, 'find_images', then_gone)
    with pytest.raises(UserError, match=r"the image 'train/cat/.*' cannot be read any more: .*: No such file"):
        prepare.prepare(folder, str(out), size=16, max_unreadable=100, workers=1)
    assert not out.exists()


def test_records_of_tfds_that_are_gone_are_not_bad_either(folder, tmp_path, monkeypatch):
    """And links: an archive behind one is not an image that links to nothing."""
    prepare.prepare(folder, str(tmp_path / 'out'), size=16, workers=1)
    builder = tfds.builder_from_directory(str(tmp_path / 'out'))
    monkeypatch.setattr(tfds_input, 'open_builder', lambda path: builder)
    monkeypatch.setattr(tfds_input, 'open_source', lambda path, split: builder.as_data_source(split))
    ref = image_ref.ImageRef('tfds:ours', 3, -1, 'train/3', -1, 'train')
    assert record_writer._read(ref)[0].shape == (16, 16, 3)
    (tmp_path / 'out').rename(tmp_path / 'away')
    with pytest.raises(UserError, match="'train/3' cannot be read any more: .*array_record.*: No such file"):
        record_writer._read(ref)
    os.symlink('nowhere.tar', tmp_path / 'train.tar')
    with pytest.raises(UserError, match="'a.jpg' cannot be read any more: .*train.tar: No such file"):
        record_writer._read(image_ref.ImageRef(str(tmp_path / 'train.tar'), 512, 100, 'a.jpg', 0))


def test_empty_and_all_bad_folders(tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='holds no images; expected ILSVRC2012_img_train.tar'):
        prepare.prepare(str(tmp_path / 'empty'), str(tmp_path / 'out'))
    _write(tmp_path / 'bad', {'cat/a.jpg': b'x', 'dog/b.jpg': b'y'})
    with pytest.raises(UserError, match='none of the 2 images of the train split can be read'):
        prepare.prepare(str(tmp_path / 'bad'), str(tmp_path / 'out'), max_unreadable=9, workers=1)
    with pytest.raises(UserError, match='there is no input'):
        prepare.prepare(str(tmp_path / 'nowhere'), str(tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()


def test_what_exists_is_not_overwritten(folder, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'precious').write_text('data')
    with pytest.raises(UserError, match='exists already'):
        prepare.prepare(folder, str(tmp_path / 'out'))
    assert os.listdir(tmp_path / 'out') == ['precious']


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'size': 4}, '--size=4'),
        ({'size': 100_000}, '--size=100000; expected 8 to 4096'),
        ({'seed': -1}, '--seed=-1'),
        ({'format': 'webp'}, "--format='webp'; expected jpeg or raw"),
        ({'val_fraction': 1.0}, '--val_fraction=1.0'),
    ],
)
def test_bad_options(folder, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prepare.prepare(folder, str(tmp_path / 'out'), **options)


def _tar(path, members):
    with tarfile.open(path, 'w') as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.read_bytes()


@pytest.fixture
def official(tmp_path):
    """Small archives in the official layout: train of archives of classes, val flat."""
    classes = imagenet_classes.wordnet_ids()
    root = tmp_path / 'official'
    root.mkdir()
    inner = {}
    for k in (0, 500, 999):
        files = {f'{classes[k]}_{i}.JPEG': _encode(_pixels(k + i)) for i in range(2)}
        inner[f'{classes[k]}.tar'] = _tar(tmp_path / 'inner.tar', files)
    _tar(root / 'ILSVRC2012_img_train.tar', inner)
    _tar(root / 'ILSVRC2012_img_val.tar', {f'ILSVRC2012_val_{i:08}.JPEG': _encode(_pixels(i)) for i in (3, 1, 2)})
    return root


# First three lines of the validation ground truth as published with the data set.
FIRST_VALIDATION_CLASSES = {1: 'n01751748', 2: 'n09193705', 3: 'n02105855'}


def _check_official(out, train=True):
    classes = imagenet_classes.wordnet_ids()
    if train:
        found = _read_back(out, 'train')
        assert len(found) == 6
        assert {c for _, c in found.values()} == {classes[0], classes[500], classes[999]}
        assert all(os.path.basename(name).startswith(c) for name, (_, c) in found.items())
    val = {os.path.basename(name): c for name, (_, c) in _read_back(out, 'val').items()}
    assert val == {f'ILSVRC2012_val_{i:08}.JPEG': c for i, c in FIRST_VALIDATION_CLASSES.items()}
    assert len(datasets.open_dataset(out).class_names) == 1000


def test_official_archives_and_what_they_are_extracted_to(official, tmp_path):
    out = str(tmp_path / 'both')
    prepare.prepare(str(official), out, size=16, workers=1)
    _check_official(out)

    extracted = tmp_path / 'extracted'
    with tarfile.open(official / 'ILSVRC2012_img_train.tar') as tar:
        tar.extractall(extracted / 'train', filter='data')
    with tarfile.open(official / 'ILSVRC2012_img_val.tar') as tar:
        tar.extractall(extracted / 'val', filter='data')
    out = str(tmp_path / 'once')  # train: archives of classes
    prepare.prepare(str(extracted), out, size=16, workers=1)
    _check_official(out)

    for path in sorted((extracted / 'train').iterdir()):
        with tarfile.open(path) as tar:
            tar.extractall(extracted / 'train' / path.stem, filter='data')
        path.unlink()
    out = str(tmp_path / 'twice')  # train: folders of classes
    prepare.prepare(str(extracted), out, size=16, workers=1)
    _check_official(out)


def test_an_archive_beside_its_extraction_is_refused(official, tmp_path):
    with tarfile.open(official / 'ILSVRC2012_img_train.tar') as tar:
        tar.extractall(tmp_path / 'twice', filter='data')
    for path in (tmp_path / 'twice').iterdir():
        with tarfile.open(path) as tar:
            tar.extractall(official / 'train' / path.stem, filter='data')
    with pytest.raises(UserError, match='the train images are there both in archives .* and as files'):
        prepare.prepare(str(official), str(tmp_path / 'out'))


def test_a_class_may_be_called_like_a_split(tmp_path, capfd):
    _write(tmp_path / 'in', {f'{c}/{i}.png': _encode(_pixels(i), 'PNG') for c in ('train', 'bus') for i in range(2)})
    assert discovery.find_images(str(tmp_path / 'in')).class_names == ('bus', 'train')
    names = ('train/cat/a.png', 'extra/cat/a.png', 'loose.png')
    _write(tmp_path / 'split', {name: _encode(_pixels(0), 'PNG') for name in names})
    found = discovery.find_images(str(tmp_path / 'split'))
    assert set(found.splits) == {'train'} and len(found.splits['train']) == 1
    said = capfd.readouterr().err
    assert 'not splits, and so left out: extra' in said and 'and so left out: 1 images in' in said


def test_the_fingerprint_tells_orders_and_formats_apart(folder, tmp_path):
    def fingerprint(name, **options):
        prepare.prepare(folder, str(tmp_path / name), size=16, workers=1, **options)
        return datasets.open_dataset(str(tmp_path / name)).fingerprint

    first = fingerprint('a')
    assert first and first == fingerprint('b')
    assert len({first, fingerprint('c', seed=1), fingerprint('d', format='raw')}) == 3


def test_a_damaged_record_is_named(folder, tmp_path):
    out = tmp_path / 'out'
    prepare.prepare(folder, str(out), size=16, workers=1)
    (path, *_) = sorted(out.glob('images-train*'))
    content = bytearray(path.read_bytes())
    content[100:4000] = bytes(len(content[100:4000]))
    path.write_bytes(content)
    with pytest.raises(UserError, match='record 0 in train of .* cannot be read'):
        datasets.open_dataset(str(out)).split('train')[0]
    path.unlink()
    with pytest.raises(UserError, match=f'prepared data are damaged: .*{path.name}: missing'):
        datasets.open_dataset(str(out))


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.isdir('/proc/self'), reason='looks processes up in /proc, which this system has not got'
)
def test_workers_end_with_a_killed_command(imagenet_tar, tmp_path):
    command = [sys.executable, '-m', 'alexnet_jax', 'prepare', f'--input={imagenet_tar}', f'--output={tmp_path}/out']
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while '/1000 images' not in parent.stdout.readline():  # until the workers are at work
        assert parent.poll() is None
    children = [int(p) for p in open(f'/proc/{parent.pid}/task/{parent.pid}/children').read().split()]
    assert len(children) >= 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(map(running, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(running, children))
    assert not (tmp_path / 'out').exists()
    # What it left does not stand in the way.
    again = subprocess.run([*command, '--size=64'], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert os.listdir(tmp_path) == ['out']


def test_validation_alone(official, tmp_path):
    out = str(tmp_path / 'out')
    prepare.prepare(str(official / 'ILSVRC2012_img_val.tar'), out, size=16, workers=1)
    _check_official(out, train=False)
    assert datasets.open_dataset(out).image_stats is None


def test_damaged_archive(official, tmp_path):
    path = official / 'ILSVRC2012_img_train.tar'
    path.write_bytes(b'\0' * 100 + path.read_bytes()[100:3000])
    with pytest.raises(UserError, match='ILSVRC2012_img_train.tar.* is no readable archive'):
        prepare.prepare(str(path), str(tmp_path / 'out'))
    other = tmp_path / 'other.tar'
    other.write_bytes(b'')
    with pytest.raises(UserError, match=r'other.tar.* is not ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar'):
        prepare.prepare(str(other), str(tmp_path / 'out'))


def test_a_generated_tfds_dataset(tmp_path):
    """`tfds:cifar10` as TFDS lays it out once generated (here of nine small pictures)."""
    folder = tmp_path / 'cifar10' / '3.0.2'
    folder.mkdir(parents=True)
    features = tfds.builder('cifar10', data_dir=str(tmp_path)).info.features
    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name='cifar10', filetype_suffix='array_record')
    infos, pictures = [], {}
    for split, count in (('train', 6), ('test', 3), ('validation', 2)):
        files = template.replace(split=split)
        path = files.sharded_filepath(shard_index=0, num_shards=1)
        writer = array_record_module.ArrayRecordWriter(os.fspath(path), 'group_size:1')
        for i in range(count):
            pixels = _pixels(len(pictures), 32, 32)
            if split != 'validation':
                pictures[f'{split}/{i}'] = pixels, features['label'].names[i]
            encoded = io.BytesIO(_encode(pixels, 'PNG'))
            label = -1 if split == 'validation' else i
            writer.write(features.serialize_example({'id': str(i), 'image': encoded, 'label': label}))
        writer.close()
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=[count], num_bytes=1, filename_template=files))
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=infos, check_data=False, version='3.0.2',
        filename_template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
    )  # fmt: skip
    # TFDS reads the variable when it is imported: a process of its own.
    out = str(tmp_path / 'out')
    command = [sys.executable, '-m', 'alexnet_jax', 'prepare', '--input=tfds:cifar10', f'--output={out}']
    environment = {**os.environ, 'TFDS_DATA_DIR': str(tmp_path)}
    subprocess.run([*command, '--size=32', '--format=raw'], env=environment, cwd=ROOT, check=True)
    found = {**_read_back(out, 'train'), **_read_back(out, 'test')}
    chex.assert_trees_all_equal({n: p for n, (p, _) in found.items()}, {n: p for n, (p, _) in pictures.items()})
    assert {n: c for n, (_, c) in found.items()} == {n: c for n, (_, c) in pictures.items()}
    assert set(datasets.open_dataset(out).splits) == {'train', 'test'}  # what has no labels is left out
    with pytest.raises(UserError, match='tfds:mnist is not there in the array_record format .* takes TensorFlow'):
        prepare.prepare('tfds:mnist', str(tmp_path / 'other'))
    with pytest.raises(UserError, match='tfds:no_such_thing cannot be opened'):
        prepare.prepare('tfds:no_such_thing', str(tmp_path / 'other'))


def test_original_photos(imagenet_tar, tmp_path):
    """The official train archive: 1,000 originals, one a class (here every 25th, so as to take seconds)."""
    refs = discovery.find_images(str(imagenet_tar)).splits['train']
    assert len(refs) == 1000 and [r.label for r in refs] == list(range(1000))
    classes = imagenet_classes.wordnet_ids()
    for ref in refs[::25]:
        assert ref.name.startswith(classes[ref.label])
        pixels = image_io.resize_center_crop(discovery.read_image(ref)[0], 256)
        assert pixels.shape == (256, 256, 3) and pixels.std() > 5


def test_damaged_statistics_are_named(folder, tmp_path):
    out = tmp_path / 'out'
    prepare.prepare(folder, str(out), size=16, workers=1)
    content = (out / 'image_stats.npz').read_bytes()
    (out / 'image_stats.npz').write_bytes(content[: len(content) // 2])
    with pytest.raises(
        UserError, match=r'data are damaged: .*image_stats.npz: its bytes have changed \(SHA-256\); prep'
    ):
        datasets.open_dataset(str(out))
    for name in ('SHA256SUMS', 'metadata.json'):  # a dataset that somebody else wrote
        (out / name).unlink()
    with pytest.raises(UserError, match='image_stats.npz is damaged'):
        datasets.open_dataset(str(out))
    (out / 'dataset_info.json').write_text(json.dumps({'name': 'images'}))
    with pytest.raises(UserError, match='cannot be opened as a prepared dataset'):
        datasets.open_dataset(str(out))


def test_an_error_without_words_is_told_by_its_kind(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def refuse(path):
        raise AssertionError

    for name in ('dataset_info.json', 'features.json'):
        (tmp_path / name).write_text('{}')
    monkeypatch.setattr(tfds, 'builder_from_directory', refuse)
    with pytest.raises(UserError, match='cannot be opened as a prepared dataset: AssertionError'):
        datasets.open_dataset(str(tmp_path))


def _png(width, height, data):
    """A PNG of its bare parts, the checksums right."""
    parts = (b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)), (b'IDAT', data), (b'IEND', b'')
    chunks = (struct.pack('>I', len(d)) + k + d + struct.pack('>I', zlib.crc32(k + d)) for k, d in parts)
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunks)


@pytest.mark.parametrize('name', ['  ', ' cat', 'cat ', 'a cat\nand a dog', 'cat\r', 'cat\x85dog'])
def test_class_names_that_tfds_would_read_otherwise_are_refused(name, tmp_path):
    """Its file of names has one a line, without blanks around them or empty ones: labels would name other classes."""
    folders = {'dog': _encode(_pixels(0)), name: _encode(_pixels(1))}
    _write(tmp_path / 'in', {f'{folder}/1.jpg': content for folder, content in folders.items()})
    with pytest.raises(UserError, match='class name .* has blanks around it or more than a line; rename its folder'):
        prepare.prepare(str(tmp_path / 'in'), str(tmp_path / 'out'), size=16)
    assert not (tmp_path / 'out').exists()


def test_files_that_are_no_images_or_too_large(tmp_path, capfd):
    """Each is named with its reason, nothing else is said of it, and the good ones that Pillow would warn of are in."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 48), np.uint8)
    rows = zlib.compress(np.pad(pixels, ((0, 0), (1, 0))).tobytes())
    flipped = bytearray(rows)
    flipped[len(rows) // 2] ^= 255
    palette = Image.fromarray(_pixels(0)).quantize(16)
    good = {
        'palette.png': _encode(palette, 'PNG', transparency=bytes(range(16))),
        'sixteen.tif': _encode(Image.fromarray(np.full((20, 20), 40_000, np.uint16)), 'TIFF'),
        'two.jpg': _encode(_pixels(1), 'MPO', save_all=True, append_images=[Image.fromarray(_pixels(2))]),
    }
    bad = {
        'bomb.png': (_png(10_000, 9000, rows), '10000 x 9000 pixels, more than the 89,478,485 that an image may have'),
        'larger.png': (_png(20_000, 20_000, rows), '400000000 pixels.*, more than the 89,478,485'),
        'bits.png': (_png(16, 16, bytes(flipped)), 'damaged: broken data stream'),
        'cut.jpg': (_encode(_pixels(3))[:700], 'damaged: image file is truncated'),
        'empty.jpg': (b'', 'the file is empty'),
        'text.jpg': (b'hello', 'of no known format'),
        # 0 to 1, or to 255: as 16-bit numbers all of it would be black.
        'float.tif': (_encode(Image.fromarray(np.ones((20, 20), np.float32)), 'TIFF'), 'its pixels are 32-bit numbers'),
        'int.tif': (
            _encode(Image.fromarray(np.full((20, 20), 255, np.int32)), 'TIFF'),
            'its pixels are 32-bit numbers',
        ),
        # Pillow would start Ghostscript.
        'figure.jpg': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n', 'of no known format'),
        'huge.jpg': (b'', '268,435,457 bytes, more than the 268,435,456 that an image may have'),
        'pipe.jpg': (None, 'not a regular file'),
        'gone.jpg': (None, 'No such file'),
    }
    assert image_io.resize_center_crop(_png(16, 16, rows), 16).std() > 5
    files = good | {name: content for name, (content, _) in bad.items() if content is not None}
    _write(tmp_path / 'in' / 'cat', files)
    os.truncate(tmp_path / 'in' / 'cat' / 'huge.jpg', 2**28 + 1)  # without taking room
    os.mkfifo(tmp_path / 'in' / 'cat' / 'pipe.jpg')
    os.symlink('nowhere', tmp_path / 'in' / 'cat' / 'gone.jpg')
    for name, (_, reason) in bad.items():
        with pytest.raises(UserError, match=f'{name}. cannot be read as an image .*{reason}'):
            predict._read_square(str(tmp_path / 'in' / 'cat' / name), 16)
    prepare.prepare(str(tmp_path / 'in'), str(tmp_path / 'out'), size=16, max_unreadable=len(bad), workers=1)
    said = capfd.readouterr().err
    for name, (_, reason) in bad.items():
        assert re.search(f'^warning: unreadable: cat/{name}: .*{reason}', said, re.MULTILINE), (name, said)
    assert len(said.splitlines()) == len(bad) + 1, said
    assert {os.path.basename(name) for name in _read_back(str(tmp_path / 'out'), 'train')} == set(good)


def test_formats_are_those_of_photos():
    for kind in ('ICO', 'ICNS', 'TGA', 'PCX', 'SGI', 'JPEG2000', 'DDS', 'PDF', 'EPS'):
        with pytest.raises(ValueError, match='^of no known format$'):
            image_io.resize_center_crop(_encode(_pixels(0), kind), 16)


def test_nothing_is_unpacked_from_an_archive(tmp_path):
    """Names that lead out of the folder, links and devices: only images are read, and only from the archive."""
    root = tmp_path / 'in'
    root.mkdir()
    with tarfile.open(root / 'ILSVRC2012_img_val.tar', 'w') as tar:
        for i, name in ((1, '../../ILSVRC2012_val_00000001.JPEG'), (2, f'{tmp_path}/ILSVRC2012_val_00000002.JPEG')):
            info, content = tarfile.TarInfo(name), _encode(_pixels(i))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for i, kind in ((3, tarfile.SYMTYPE), (4, tarfile.LNKTYPE), (5, tarfile.FIFOTYPE), (6, tarfile.DIRTYPE)):
            info = tarfile.TarInfo(f'../ILSVRC2012_val_{i:08}.JPEG')
            info.type, info.linkname = kind, '/etc/passwd'
            tar.addfile(info)
    prepare.prepare(str(root), str(tmp_path / 'out'), size=16, workers=1)
    assert sorted(os.listdir(tmp_path)) == ['in', 'out'] and os.listdir(root) == ['ILSVRC2012_img_val.tar']
    assert sorted(_read_back(str(tmp_path / 'out'), 'val')) == [f'ILSVRC2012_val_0000000{i}.JPEG' for i in (1, 2)]


def test_an_archive_that_is_damaged_further_on(official):
    """tarfile takes a header it cannot read for the end, and what came before for all."""
    path = official / 'ILSVRC2012_img_val.tar'
    whole = path.read_bytes()
    second = whole.index(b'ILSVRC2012_val_00000001')
    for damaged, reason in (
        (whole[:second] + b'\xff' + whole[second + 1 :], f'at byte {second} it is damaged'),
        (whole[:second] + bytes(512) + whole[second + 512 :], f'at byte {second} it is damaged'),
        (whole[:second], f'after {second} bytes it is cut short'),
        (whole[: second + 700], 'unexpected end of data'),
        (whole[: second + 124] + b'\x80' + whole[second + 125 :], 'at byte .* it is damaged'),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f'ILSVRC2012_img_val.tar.* is no readable archive: .*{reason}'):
            discovery.find_images(str(path))
    # Of the archives in the archive too.
    path = official / 'ILSVRC2012_img_train.tar'
    whole = path.read_bytes()
    second = whole.index(b'n01440764_1.JPEG')
    path.write_bytes(whole[:second] + b'\xff' + whole[second + 1 :])
    with pytest.raises(UserError, match='is no readable archive: at byte .* it is damaged'):
        discovery.find_images(str(path))


def test_an_archive_that_declares_more_than_it_holds(tmp_path):
    path = tmp_path / 'ILSVRC2012_img_val.tar'
    name = 'ILSVRC2012_val_00000001.JPEG'
    for member, size, reason in (
        (name, -512, 'declares -512 bytes'),  # it would lead back to itself for ever
        (name, 2**62, 'unexpected end of data'),
        ('././@LongLink', 2**40, 'declares 1099511627776 bytes for itself'),  # a name, which is read into memory
    ):
        info = tarfile.TarInfo(member)
        info.type = tarfile.GNUTYPE_LONGNAME if '@' in member else tarfile.REGTYPE
        info.size = size
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        with pytest.raises(UserError, match=f'is no readable archive: .*{reason}'):
            discovery.find_images(str(path))
    with tarfile.open(path, 'w') as tar:
        tar.addfile(tarfile.TarInfo('ILSVRC2012_val_²².JPEG'))
    with pytest.raises(UserError, match='is no image of the ILSVRC-2012 validation set'):
        discovery.find_images(str(path))


def test_statistics_that_would_grow(tmp_path):
    """Before anything is read: the sizes that the archive declares, and those that an array in it does."""
    path = tmp_path / 'image_stats.npz'
    np.savez_compressed(path, mean_image=np.zeros((2000, 2000, 3)))
    with pytest.raises(UserError, match=r'image_stats.npz is damaged \(\d+ bytes that declare 96000\d+\)'):
        image_stats_file.load(str(tmp_path))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {'descr': '<f4', 'fortran_order': False, 'shape': (2**31,)})
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('mean_image.npy', header.getvalue())
    tracemalloc.start()
    with pytest.raises(UserError, match=r'image_stats.npz is damaged \(cannot reshape'):
        image_stats_file.load(str(tmp_path))
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
