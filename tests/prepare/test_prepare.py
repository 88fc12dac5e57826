"""From image files to records: every kind of input and unusual file, read back with TFDS alone."""

import collections
import io
import json
import os
import re
import struct
import subprocess
import sys
import time
import zlib

import chex
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image

from alexnet_jax.core import augment
from alexnet_jax.data import cache, datasets, image_io, image_stats_file, pipeline
from alexnet_jax.inference import predict
from alexnet_jax.prepare import dataset_writer, discovery, image_ref, prepare, record_writer
from alexnet_jax.prepare import tfds as tfds_input
from alexnet_jax.utils.errors import UnreadableError, UserError
from tests import ROOT, helpers


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_missing_data_stop_a_run_but_damaged_records_do_not(folder, tmp_path, workers):
    """Files that are back at the second attempt do not count as missing, though array_record's reader keeps failing."""
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
    with pytest.raises(UserError, match='lost access to the data files of train') as error:
        stream(records)
    assert not isinstance(error.value, UnreadableError)
    with pytest.raises(UserError, match='lost access to the data files of train.*No such file'):
        records[3]
    away.rename(out)
    assert stream(records)['weight'].all()
    for record, image in zip(records, whole, strict=True):
        chex.assert_trees_all_equal(record['image'], image)
    for shard in out.glob('*train*array_record*'):  # flip a bit in every byte of pixels and names
        content = bytearray(shard.read_bytes())
        content[64:-64] = bytes(byte ^ 1 for byte in content[64:-64])
        shard.write_bytes(content)
    records = datasets.open_dataset(str(out)).splits['train']
    with pytest.raises(UnreadableError, match='record 3 in train of .* cannot be read'):
        records[3]
    assert not stream(records)['weight'].any()


@pytest.fixture
def folder(tmp_path):
    files = {f'train/cat/{i}.jpg': helpers.encode(helpers.picture(i)) for i in range(5)}
    files |= {f'train/dog/deeper/{i}.PNG': helpers.encode(helpers.picture(10 + i), 'PNG') for i in range(5)}
    files |= {f'val/{c}/v{i}.jpeg': helpers.encode(helpers.picture(20 + i)) for i, c in enumerate(('cat', 'dog'))}
    files |= {'train/cat/notes.txt': b'no image', 'train/.hidden/x.jpg': b'', 'val/.DS_Store': b''}
    return helpers.write_files(tmp_path / 'in', files)


@pytest.mark.parametrize('kind', ['jpeg', 'raw'])
def test_folder_of_splits(folder, tmp_path, kind):
    out = str(tmp_path / 'out')
    prepare.prepare(folder, out, size=32, format=kind, workers=1)
    train, val = helpers.read_back(out, 'train'), helpers.read_back(out, 'val')
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
    # The statistics cover the train split only.
    stats = image_stats_file.load(out)
    everything = np.stack(list(squares.values())).astype(np.float64)
    chex.assert_trees_all_close(stats.mean_image, everything.mean(0).astype(np.float32), rtol=1e-5)
    covariance = np.cov(everything.reshape(-1, 3).T, bias=True)
    rebuilt = stats.eigenvectors @ np.diag(stats.eigenvalues) @ stats.eigenvectors.T
    chex.assert_trees_all_close(rebuilt, covariance, rtol=1e-3, atol=0.5)
    # The package's own reader agrees with that of TFDS.
    dataset = datasets.open_dataset(out)
    assert dataset.class_names == ('cat', 'dog') and dataset.record_size == 32
    assert [r['label'] for r in dataset.split('train')].count(0) == 5  # iteration over the records ends
    assert len(dataset.split('train')) == 10


def test_class_names_come_from_a_list_in_the_folder(tmp_path):
    """The class order stays that of the folders; two classes named crane (a bird, a machine) stay apart."""
    for name in ('n04', 'n03', 'n02', 'n01'):
        helpers.write_files(tmp_path / 'raw', {f'train/{name}/a.jpg': helpers.encode(helpers.picture(0))})
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


def test_order_depends_on_the_seed_alone(folder, tmp_path):
    def prepare_with(seed, workers):
        out = str(tmp_path / f'{seed}-{workers}')
        prepare.prepare(folder, out, size=16, seed=seed, workers=workers)
        return helpers.read_back(out, 'train'), image_stats_file.load(out)

    alone, alone_statistics = prepare_with(0, 1)
    both, both_statistics = prepare_with(0, 2)
    assert list(alone) != sorted(alone)
    assert list(alone) == list(both)  # independent of the number of processes
    chex.assert_trees_all_equal({n: p for n, (p, _) in alone.items()}, {n: p for n, (p, _) in both.items()})
    chex.assert_trees_all_equal(alone_statistics, both_statistics)
    assert list(prepare_with(1, 1)[0]) != list(alone)


def test_val_fraction_sets_training_images_aside(folder, tmp_path):
    helpers.write_files(
        tmp_path / 'flat', {f'{c}/{i}.png': helpers.encode(helpers.picture(i), 'PNG') for c in 'ab' for i in range(10)}
    )
    out = str(tmp_path / 'out')
    prepare.prepare(str(tmp_path / 'flat'), out, size=16, val_fraction=0.25, seed=5, workers=1)
    train, val = helpers.read_back(out, 'train'), helpers.read_back(out, 'val')
    assert (len(train), len(val)) == (15, 5) and not set(train) & set(val)
    assert sorted(collections.Counter(name[0] for name in val).values()) == [2, 3]  # a share of each class
    with pytest.raises(UserError, match='needs a train split and no val split; the input has: train, val'):
        prepare.prepare(folder, str(tmp_path / 'other'), val_fraction=0.5)


def test_classes_without_training_images_are_counted(capsys):
    """With one photo per class, as in the first thousand of the official archive, every fifth goes to val."""
    refs = [image_ref.ImageRef(f'{c}/0', 0, -1, f'{c}/0', c) for c in range(20)]
    orders = prepare._shuffle_and_split({'train': refs}, 0.2, seed=0)
    labels = sorted(ref.label for ref in orders['val'])
    assert len(labels) == 4 and set(np.diff(labels)) == {5} and set(orders['train']) | set(orders['val']) == set(refs)
    names = [f'c{i}' for i in range(20)]
    prepare._warn_of_untrained_classes(orders, names, 0.2)
    untrained = ', '.join(f'c{label}' for label in labels)
    assert f'no training images after --val_fraction=0.2 for 4 of 20 classes ({untrained}).' in capsys.readouterr().err
    doubled = {'train': refs + [ref._replace(name=f'{ref.name}b') for ref in refs]}
    prepare._warn_of_untrained_classes(prepare._shuffle_and_split(doubled, 0.2, seed=0), names, 0.2)
    for splits in ({'val': refs[:3]}, {'train': [refs[0]._replace(label=-1)]}):  # TFDS datasets: labels in the records
        prepare._warn_of_untrained_classes(splits, names, 0.0)
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match='moves 0 of 20 images to val; change'):
        prepare._shuffle_and_split({'train': refs}, 0.02, seed=0)


def test_files_outside_classes_are_reported(tmp_path, capfd):
    content = helpers.encode(helpers.picture(0))
    files = {f'{name}/1.jpg': content for name in ('a', 'b')} | {
        'loose.jpg': content,
        'c/1.jp2': b'\0\0\0\x0cjP  ',
    }
    helpers.write_files(tmp_path / 'in', files)
    prepare.prepare(str(tmp_path / 'in'), str(tmp_path / 'out'), size=16, workers=1)
    said, errors = capfd.readouterr()
    assert 'train: 2 images  classes: 2 (a, b)' in said
    assert f'skipped 1 images outside class folders in {tmp_path}/in' in errors
    assert errors.count('warning: skipped') == 2 and 'without images (.jpeg' in errors and '): c\n' in errors
    assert 'known format: 1 .jp2; to use them, convert them (magick mogrify -format jpg *.jp2)' in errors


def test_classes_without_a_readable_image_are_named(tmp_path, capfd):
    """AVIF and HEIC are read in the worker processes, where their decoders are installed."""
    good = {'cat/0.png': 'PNG', 'dog/0.webp': 'WEBP'}
    good |= {
        f'cat/1{suffix}': kind for suffix, kind in (('.avif', 'AVIF'), ('.heic', 'HEIF')) if kind in image_io.formats()
    }
    files = {f'train/{name}': helpers.encode(helpers.picture(0), kind) for name, kind in good.items()}
    files |= {
        'val/cat/0.png': files['train/cat/0.png'],
        'val/dog/0.png': b'',
        'train/elk/0.png': b'',
        'train/elk/1.png': b'',
    }
    out = tmp_path / 'out'
    prepare.prepare(helpers.write_files(tmp_path / 'in', files), out, size=16, max_unreadable=3, workers=1)
    said = capfd.readouterr().err
    assert 'no image of the train split can be read for 1 of 3 classes (elk)' in said
    assert 'no image of the val split can be read for 1 of 3 classes (dog)' in said
    assert len(helpers.read_back(str(out), 'train')) == len(good)
    assert datasets.open_dataset(str(out)).class_names == ('cat', 'dog', 'elk')
    names, refs = ('cat', 'dog', 'elk'), [image_ref.ImageRef('', 0, 1, '', label) for label in range(3)]
    plan = dataset_writer.make_plan({'train': refs}, 16, 'raw', names, '')
    with pytest.raises(
        UserError, match=r'for 2 of 3 classes \(dog, elk\) \(1, such as a: b\): expected training images'
    ):
        dataset_writer._check_lost_classes('train', plan, {0: 1}, [('a', 'b')])
    # The labels of a TFDS dataset are known only from the records that were read.
    refs = [ref._replace(label=-1) for ref in refs]
    plan = dataset_writer.make_plan({'train': refs, 'val': refs}, 16, 'raw', names, '')
    dataset_writer._check_lost_classes('val', plan, {0: 1}, [])
    assert 'no image' not in capfd.readouterr().err
    dataset_writer._check_lost_classes('train', plan, {0: 1, 1: 1}, [])
    assert 'for 1 of 3 classes (elk)' in capfd.readouterr().err


def test_bad_images_are_named_counted_and_limited(folder, tmp_path, capfd):
    good = helpers.encode(helpers.picture(0))
    helpers.write_files(
        tmp_path / 'in',
        {'train/cat/cut.jpg': good[: len(good) // 2], 'train/dog/empty.jpg': b'', 'train/dog/text.png': b'hello'},
    )
    out = tmp_path / 'out'
    with pytest.raises(UserError, match=r'3 of \d+ images cannot be read .* --max_unreadable=3'):
        prepare.prepare(folder, str(out), size=16, max_unreadable=2, workers=1)
    assert os.listdir(tmp_path) == ['in']  # no partial output
    prepare.prepare(folder, str(out), size=16, max_unreadable=3, workers=1)
    said = capfd.readouterr().err
    for name in ('train/cat/cut.jpg', 'train/dog/empty.jpg', 'train/dog/text.png'):
        assert f'unreadable image: {name}: ' in said
    assert 'skipped 3 unreadable images' in said
    assert len(helpers.read_back(str(out), 'train')) == 10
    assert len(datasets.open_dataset(str(out)).split('train')) == 10


def test_one_run_counts_every_unreadable_image(tmp_path, capfd):
    """More shards than workers, with bad images in most: the suggested number suffices at once."""
    good = helpers.encode(helpers.picture(0))
    files = {f'{name}/{i:02}.jpg': good if i % 5 else b'text' * (i > 0) for name in 'ab' for i in range(40)}
    helpers.write_files(tmp_path / 'in', files)
    bad = [name for name, content in files.items() if content is not good]
    with pytest.raises(UserError, match='16 of 80 images cannot be read') as caught:
        prepare.prepare(tmp_path / 'in', tmp_path / 'out', size=16, workers=1)
    message = str(caught.value)
    assert re.search(r'\(14, such as [ab]/\d+.jpg: unknown image format; 2, such as [ab]/00.jpg: the file is', message)
    said = capfd.readouterr().err
    assert all(f'unreadable image: {name}: ' in said for name in bad) and said.count('unreadable') == len(bad)
    number = int(re.search(r'--max_unreadable=(\d+)\.$', message)[1])
    prepare.prepare(tmp_path / 'in', tmp_path / 'out', size=16, workers=1, max_unreadable=number)
    assert len(helpers.read_back(str(tmp_path / 'out'), 'train')) == 64


def test_named_unreadable_images_are_limited(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(dataset_writer, '_MAX_NAMED', 3)
    files = {f'a/{i}.jpg': b'text' for i in range(20)}
    helpers.write_files(tmp_path / 'in', files | {f'{c}/0.jpg': helpers.encode(helpers.picture(0)) for c in 'bc'})
    with pytest.raises(UserError, match='20 of 22 images cannot be read .*--max_unreadable=20'):
        prepare.prepare(tmp_path / 'in', tmp_path / 'out', size=16, workers=1)
    said = capfd.readouterr().err
    assert said.count('unreadable image: ') == 3 and 'warning: 17 more images cannot be read.' in said


def test_dark_and_blank_images_are_counted(tmp_path, capfd):
    dark = helpers.encode(Image.fromarray(np.full((20, 20), 4095, np.uint16)), 'PNG')
    blank = helpers.encode(Image.new('RGBA', (20, 20)), 'PNG')
    files = {f'a/{i}.png': dark for i in range(3)} | {'b/0.png': blank, 'b/1.png': helpers.encode(helpers.picture(0))}
    helpers.write_files(tmp_path / 'in', files)
    prepare.prepare(tmp_path / 'in', tmp_path / 'out', size=16, format='raw', workers=1)
    said = capfd.readouterr().err
    assert re.search('warning: 3 images, such as a/.*, have 16-bit pixels below a quarter of 65535', said)
    assert re.search('warning: 1 images, such as b/0.png, have only fully transparent pixels', said)
    assert len(said.splitlines()) == 2, said


def test_script_without_main_guard_runs_once(folder, tmp_path):
    """The worker processes do not run the script again."""
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


def test_vanished_images_are_not_counted_as_bad(folder, tmp_path, monkeypatch):
    find, out = discovery.find_images, tmp_path / 'out'

    def find_then_remove(path, **options):
        found = find(path, **options)
        os.rename(tmp_path / 'in' / 'train' / 'cat', tmp_path / 'away')
        return found

    monkeypatch.setattr(discovery, 'find_images', find_then_remove)
    with pytest.raises(UserError, match=r"lost access to the image 'train/cat/.*': .*: No such file"):
        prepare.prepare(folder, str(out), size=16, max_unreadable=100, workers=1)
    assert not out.exists()


def test_vanished_tfds_records_are_not_counted_as_bad(folder, tmp_path, monkeypatch):
    """The same holds for an archive that is a dangling link: its images are not broken links."""
    prepare.prepare(folder, str(tmp_path / 'out'), size=16, workers=1)
    builder = tfds.builder_from_directory(str(tmp_path / 'out'))
    monkeypatch.setattr(tfds_input, 'open_builder', lambda path: builder)
    monkeypatch.setattr(tfds_input, 'open_source', lambda path, split: builder.as_data_source(split))
    ref = image_ref.ImageRef('tfds:ours', 3, -1, 'train/3', -1, 'train')
    assert record_writer._read_image(ref)[0].shape == (16, 16, 3)
    (tmp_path / 'out').rename(tmp_path / 'away')
    with pytest.raises(UserError, match="lost access to the image 'train/3': .*array_record.*: No such file"):
        record_writer._read_image(ref)
    os.symlink('nowhere.tar', tmp_path / 'train.tar')
    with pytest.raises(UserError, match="lost access to the image 'a.jpg': .*train.tar: No such file"):
        record_writer._read_image(image_ref.ImageRef(str(tmp_path / 'train.tar'), 512, 100, 'a.jpg', 0))


def test_empty_and_unreadable_folders_are_refused(tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='contains no images; expected ILSVRC2012_img_train.tar'):
        prepare.prepare(str(tmp_path / 'empty'), str(tmp_path / 'out'))
    helpers.write_files(tmp_path / 'bad', {'cat/a.jpg': b'x', 'dog/b.jpg': b'y'})
    with pytest.raises(UserError, match='none of the 2 images of the train split can be read'):
        prepare.prepare(str(tmp_path / 'bad'), str(tmp_path / 'out'), max_unreadable=9, workers=1)
    with pytest.raises(UserError, match='input .* does not exist'):
        prepare.prepare(str(tmp_path / 'nowhere'), str(tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()


def test_existing_output_is_not_overwritten(folder, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'precious').write_text('data')
    with pytest.raises(UserError, match='already exists'):
        prepare.prepare(folder, str(tmp_path / 'out'))
    assert os.listdir(tmp_path / 'out') == ['precious']


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'size': 4}, '--size=4'),
        ({'size': 100_000}, '--size=100000: expected 8 to 4096'),
        ({'seed': -1}, '--seed=-1'),
        ({'format': 'webp'}, "--format='webp': expected jpeg or raw"),
        ({'val_fraction': 1.0}, '--val_fraction=1.0'),
    ],
)
def test_invalid_options_are_refused(folder, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prepare.prepare(folder, str(tmp_path / 'out'), **options)


def test_fingerprint_depends_on_order_and_format(folder, tmp_path):
    def fingerprint(name, **options):
        prepare.prepare(folder, str(tmp_path / name), size=16, workers=1, **options)
        return datasets.open_dataset(str(tmp_path / name)).fingerprint

    first = fingerprint('a')
    assert first and first == fingerprint('b')
    assert len({first, fingerprint('c', seed=1), fingerprint('d', format='raw')}) == 3


def test_damaged_record_is_named(folder, tmp_path):
    out = tmp_path / 'out'
    prepare.prepare(folder, str(out), size=16, workers=1)
    (path, *_) = sorted(out.glob('images-train*'))
    content = bytearray(path.read_bytes())
    content[100:4000] = bytes(len(content[100:4000]))
    path.write_bytes(content)
    with pytest.raises(UserError, match='record 0 in train of .* cannot be read'):
        datasets.open_dataset(str(out)).split('train')[0]
    path.unlink()
    with pytest.raises(UserError, match=f'prepared data is damaged: .*{path.name}: missing'):
        datasets.open_dataset(str(out))


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.isdir('/proc/self'), reason='looks processes up in /proc, which this system has not got'
)
def test_workers_exit_if_the_command_is_killed(imagenet_tar, tmp_path):
    command = [sys.executable, '-m', 'alexnet_jax', 'prepare', f'--input={imagenet_tar}', f'--output={tmp_path}/out']
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while '/1000 images' not in parent.stdout.readline():  # until the workers have started
        assert parent.poll() is None
    children = [int(p) for p in open(f'/proc/{parent.pid}/task/{parent.pid}/children').read().split()]
    assert len(children) >= 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(map(helpers.is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(helpers.is_running, children))
    assert not (tmp_path / 'out').exists()
    # Leftovers do not block a second run.
    again = subprocess.run([*command, '--size=64'], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert os.listdir(tmp_path) == ['out']


def test_generated_tfds_dataset(tmp_path):
    """`tfds:cifar10` in the layout that TFDS generates, here with nine small labeled images."""
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
            pixels = helpers.picture(len(pictures), 32, 32)
            if split != 'validation':
                pictures[f'{split}/{i}'] = pixels, features['label'].names[i]
            encoded = io.BytesIO(helpers.encode(pixels, 'PNG'))
            label = -1 if split == 'validation' else i
            writer.write(features.serialize_example({'id': str(i), 'image': encoded, 'label': label}))
        writer.close()
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=[count], num_bytes=1, filename_template=files))
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=infos, check_data=False, version='3.0.2',
        filename_template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
    )  # fmt: skip
    # TFDS reads the variable at import, so this needs its own process.
    out = str(tmp_path / 'out')
    command = [sys.executable, '-m', 'alexnet_jax', 'prepare', '--input=tfds:cifar10', f'--output={out}']
    environment = {**os.environ, 'TFDS_DATA_DIR': str(tmp_path)}
    subprocess.run([*command, '--size=32', '--format=raw'], env=environment, cwd=ROOT, check=True)
    found = {**helpers.read_back(out, 'train'), **helpers.read_back(out, 'test')}
    chex.assert_trees_all_equal({n: p for n, (p, _) in found.items()}, {n: p for n, (p, _) in pictures.items()})
    assert {n: c for n, (_, c) in found.items()} == {n: c for n, (_, c) in pictures.items()}
    assert set(datasets.open_dataset(out).splits) == {'train', 'test'}  # the split without labels is left out
    with pytest.raises(UserError, match='tfds:mnist does not exist in the array_record format .* install TensorFlow'):
        prepare.prepare('tfds:mnist', str(tmp_path / 'other'))
    with pytest.raises(UserError, match='tfds:no_such_thing cannot be opened'):
        prepare.prepare('tfds:no_such_thing', str(tmp_path / 'other'))


def test_damaged_statistics_are_named(folder, tmp_path):
    out = tmp_path / 'out'
    prepare.prepare(folder, str(out), size=16, workers=1)
    content = (out / 'image_stats.npz').read_bytes()
    (out / 'image_stats.npz').write_bytes(content[: len(content) // 2])
    with pytest.raises(
        UserError,
        match=r'data is damaged: .*image_stats.npz: its content has changed \(SHA-256 mismatch\); prep',
    ):
        datasets.open_dataset(str(out))
    for name in ('SHA256SUMS', 'metadata.json'):  # as in a dataset written by other software
        (out / name).unlink()
    with pytest.raises(UserError, match='image_stats.npz is damaged'):
        datasets.open_dataset(str(out))
    (out / 'dataset_info.json').write_text(json.dumps({'name': 'images'}))
    with pytest.raises(UserError, match='cannot be opened as a prepared dataset'):
        datasets.open_dataset(str(out))


def _png(width, height, data):
    """Returns a minimal PNG with correct checksums."""
    parts = (b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)), (b'IDAT', data), (b'IEND', b'')
    chunks = (struct.pack('>I', len(d)) + k + d + struct.pack('>I', zlib.crc32(k + d)) for k, d in parts)
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunks)


@pytest.mark.parametrize('name', ['  ', ' cat', 'cat ', 'a cat\nand a dog', 'cat\r', 'cat\x85dog'])
def test_class_names_that_tfds_would_change_are_refused(name, tmp_path):
    """TFDS stores one stripped, nonempty name per line; with other names the labels would name other classes."""
    folders = {'dog': helpers.encode(helpers.picture(0)), name: helpers.encode(helpers.picture(1))}
    helpers.write_files(tmp_path / 'in', {f'{folder}/1.jpg': content for folder, content in folders.items()})
    with pytest.raises(UserError, match='class name .* expected one line without outer spaces; rename its folder'):
        prepare.prepare(str(tmp_path / 'in'), str(tmp_path / 'out'), size=16)
    assert not (tmp_path / 'out').exists()


def test_invalid_and_oversized_images_are_named(tmp_path, capfd):
    """Each is named once with its reason, and valid files that Pillow warns about are included."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 48), np.uint8)
    rows = zlib.compress(np.pad(pixels, ((0, 0), (1, 0))).tobytes())
    flipped = bytearray(rows)
    flipped[len(rows) // 2] ^= 255
    palette = Image.fromarray(helpers.picture(0)).quantize(16)
    good = {
        'palette.png': helpers.encode(palette, 'PNG', transparency=bytes(range(16))),
        'sixteen.tif': helpers.encode(Image.fromarray(np.full((20, 20), 40_000, np.uint16)), 'TIFF'),
        'two.jpg': helpers.encode(
            helpers.picture(1), 'MPO', save_all=True, append_images=[Image.fromarray(helpers.picture(2))]
        ),
    }
    bad = {
        'bomb.png': (_png(10_000, 9000, rows), '10000 x 9000 pixels; expected at most 89,478,485 pixels'),
        'larger.png': (_png(20_000, 20_000, rows), '400000000 pixels.*; expected at most 89,478,485'),
        'bits.png': (_png(16, 16, bytes(flipped)), 'damaged: broken data stream'),
        'cut.jpg': (helpers.encode(helpers.picture(3))[:700], 'damaged: image file is truncated'),
        'empty.jpg': (b'', 'the file is empty'),
        'text.jpg': (b'hello', 'unknown image format'),
        # Values from 0 to 1 or 0 to 255: read as 16-bit numbers, all would be black.
        'float.tif': (
            helpers.encode(Image.fromarray(np.ones((20, 20), np.float32)), 'TIFF'),
            '32-bit pixels have no defined white level',
        ),
        'int.tif': (
            helpers.encode(Image.fromarray(np.full((20, 20), 255, np.int32)), 'TIFF'),
            '32-bit pixels have no defined white level',
        ),
        # Pillow would start Ghostscript.
        'figure.jpg': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n', 'unknown image format'),
        'huge.jpg': (b'', '268,435,457 bytes; expected at most 268,435,456'),
        'pipe.jpg': (None, 'not a regular file'),
        'gone.jpg': (None, 'No such file'),
    }
    assert image_io.resize_center_crop(_png(16, 16, rows), 16).std() > 5
    files = good | {name: content for name, (content, _) in bad.items() if content is not None}
    helpers.write_files(tmp_path / 'in' / 'cat', files)
    helpers.write_files(tmp_path / 'in' / 'dog', {'a.png': _png(16, 16, rows)})
    os.truncate(tmp_path / 'in' / 'cat' / 'huge.jpg', 2**28 + 1)  # a sparse file that takes no space
    os.mkfifo(tmp_path / 'in' / 'cat' / 'pipe.jpg')
    os.symlink('nowhere', tmp_path / 'in' / 'cat' / 'gone.jpg')
    for name, (_, reason) in bad.items():
        with pytest.raises(UserError, match=f'{name}. cannot be read as an image .*{reason}'):
            predict._read_square(str(tmp_path / 'in' / 'cat' / name), 16)
    prepare.prepare(str(tmp_path / 'in'), str(tmp_path / 'out'), size=16, max_unreadable=len(bad), workers=1)
    said = capfd.readouterr().err
    for name, (_, reason) in bad.items():
        assert re.search(f'^warning: unreadable image: cat/{name}: .*{reason}', said, re.MULTILINE), (name, said)
    assert len(said.splitlines()) == len(bad) + 1, said
    read = {os.path.basename(name) for name in helpers.read_back(str(tmp_path / 'out'), 'train')}
    assert read == {*good, 'a.png'}
