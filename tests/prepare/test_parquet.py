"""Parquet files as Hugging Face serves them: the right images, classes and splits, or one clear line."""

import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from alexnet_jax.data import image_io
from alexnet_jax.prepare import discovery, parquet, prepare
from alexnet_jax.utils.errors import UserError
from tests import helpers

NAMES = ['tench, Tinca tinca', 'goldfish', 'crane']


def _write(path, labels, names=NAMES, image='image', label='label', kind=None, flat=False, content=None, **options):
    """Writes images `helpers.picture(i)` with labels. flat: the column holds the bytes themselves."""
    contents = content or [helpers.encode(helpers.picture(i)) for i in range(len(labels))]
    images = contents if flat else [{'bytes': c, 'path': f'{i}.jpg'} for i, c in enumerate(contents)]
    columns = {image: pa.array(images), label: pa.array(labels, kind), 'width': pa.array([48] * len(labels))}
    table = pa.table({**columns, **{name: options.pop(name) for name in list(options) if name.endswith('_label')}})
    features = {image: {'_type': 'Image'}, label: {'names': names, '_type': 'ClassLabel'}}
    if names:
        table = table.replace_schema_metadata({'huggingface': json.dumps({'info': {'features': features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def _found(path):
    """Returns {split: classes in order of the rows}, and the names of the classes."""
    listing = discovery.find_images(str(path))
    return {s: [listing.class_names[r.label] for r in refs] for s, refs in listing.splits.items()}, listing.class_names


def test_imagenet_of_hugging_face(tmp_path, capfd):
    """Shards with several row groups, and a test split without labels. Names keep the order of the metadata."""
    root = tmp_path / 'in'
    _write(root / 'data' / 'train-00000-of-00002.parquet', [2, 0, 1, 1, 0], row_group_size=2)
    _write(root / 'data' / 'train-00001-of-00002.parquet', [1, 2])
    _write(root / 'data' / 'validation-00000-of-00001-9a8f.parquet', [2, 1])
    _write(root / 'data' / 'test-00000-of-00001.parquet', [-1, -1, -1])
    helpers.write_files(root, {'README.md': b'', '.gitattributes': b''})
    out = str(tmp_path / 'out')
    prepare.prepare(root, out, size=16, workers=1)
    train = helpers.read_back(out, 'train')
    assert [(name, c) for name, (_, c) in train.items()] == [
        *((f'data/train-00000-of-00002.parquet/{i}/{i}.jpg', NAMES[k]) for i, k in enumerate([2, 0, 1, 1, 0])),
        *((f'data/train-00001-of-00002.parquet/{i}/{i}.jpg', NAMES[k]) for i, k in enumerate([1, 2])),
    ]
    assert [c for _, c in helpers.read_back(out, 'val').values()] == [NAMES[2], NAMES[1]]

    for i, (pixels, _) in enumerate(list(train.values())[:5]):
        square = image_io.resize_center_crop(helpers.encode(helpers.picture(i)), 16)
        assert (pixels == np.asarray(image_io.decode(image_io.encode_jpeg(square)))).all()
    said = capfd.readouterr()
    assert 'test split: skipped 3 of 3 images, which have no label' in said.err
    assert 'classes: 3 (tench, Tinca tinca, goldfish, crane)' in said.out and 'ignored columns: width' in said.out


def test_rows_of_any_order_and_size_of_row_group(tmp_path):
    contents = [bytes([i]) * (1 + 997 * i) for i in range(50)]
    for size in (1, 7, 20, 1000):
        path = _write(tmp_path / f'{size}.parquet', [i % 3 for i in range(50)], content=contents, row_group_size=size)
        refs = discovery.find_images(str(path)).splits['train']
        for i in (*range(50), 3, 49, 0, 17, 17, 18):
            assert discovery.read_image(refs[i]) == (contents[i], i % 3)


def test_val_fraction_keeps_the_order_of_the_rows(tmp_path):
    path = _write(tmp_path / 'train.parquet', [0, 1, 2] * 10)
    splits = prepare._shuffle_and_split(discovery.find_images(str(path)).splits, 0.2, 0)
    assert {split: len(refs) for split, refs in splits.items()} == {'train': 24, 'val': 6}
    assert sorted(r.label for r in splits['val']) == [0, 0, 1, 1, 2, 2]
    assert all([r.offset for r in refs] == sorted(r.offset for r in refs) for refs in splits.values())


@pytest.mark.parametrize(
    'options, classes, names',
    [
        ({}, [NAMES[i] for i in (2, 0, 2)], NAMES),
        ({'image': 'img', 'label': 'fine_label', 'coarse_label': [0, 0, 1]}, [NAMES[i] for i in (2, 0, 2)], NAMES),
        ({'image': 'photograph', 'label': 'kind', 'other_label': [5, 5, 5]}, [NAMES[i] for i in (2, 0, 2)], NAMES),
        ({'flat': True}, [NAMES[i] for i in (2, 0, 2)], NAMES),
        ({'names': None}, ['2', '0', '2'], ['0', '1', '2']),
        ({'names': None, 'labels': [10, 9, None]}, ['10', '9'], [str(i) for i in range(11)]),
        ({'names': None, 'labels': ['dog', 'cat', '']}, ['dog', 'cat'], ['cat', 'dog']),
        ({'names': None, 'labels': ['e\u0301', 'b', '\u00e9']}, ['\u00e9', 'b', '\u00e9'], ['b', '\u00e9']),
        ({'names': None, 'labels': ['10', '9', '9'], 'kind': pa.large_string()}, ['10', '9', '9'], ['9', '10']),
        ({'names': ['crane', 'a', 'crane']}, ['crane (2)', 'crane (0)', 'crane (2)'], ['crane (0)', 'a', 'crane (2)']),
    ],
)
def test_usual_columns_and_labels(options, classes, names, tmp_path):
    path = _write(tmp_path / 'file.parquet', **{'labels': [2, 0, 2], **options})
    assert _found(path) == ({'train': classes}, tuple(names))
    ref = discovery.find_images(str(path)).splits['train'][1]
    assert discovery.read_image(ref) == (helpers.encode(helpers.picture(1)), names.index(classes[1]))


@pytest.mark.parametrize(
    'files, splits',
    [
        (('default/train/0000.parquet', 'default/validation/0000.parquet'), {'train', 'val'}),
        (('train.parquet', 'test.parquet'), {'train', 'test'}),
        (('imagenet-train.parquet', 'imagenet-valid.parquet'), {'train', 'val'}),
        (('a/b/all.parquet',), {'train'}),
    ],
)
def test_names_say_the_splits(files, splits, tmp_path):
    for file in files:
        _write(tmp_path / file, [0, 1, 2])
    assert set(_found(tmp_path)[0]) == splits


@pytest.mark.parametrize(
    'files, message',
    [
        ({'cats/train.parquet': {}, 'dogs/train.parquet': {}}, 'in several folders; use one of them .*cats'),
        ({'a.parquet': {'names': ['a', 'b', 'c']}, 'b.parquet': {}}, 'different lists of class names'),
        ({'a.parquet': {'labels': [0, 1, 3]}}, 'label 3 is not one of the 3 classes, 0 to 2'),
        ({'a.parquet': {'labels': [-1, -1, None]}}, 'no image in its parquet files has a label'),
        ({'a.parquet': {'label': 'x', 'names': None}}, r'one column of labels, .* its columns are: .*x \(int64\)'),
        ({'a.parquet': {'labels': [[0], [1], [2]]}}, 'one column of labels'),
        ({'a.parquet': {'labels': [0.5, 1.0, 2.0]}}, 'one column of labels'),
        ({'a.parquet': {'labels': [0, 1, 2**40], 'names': None}}, 'label 1099511627776, but no class names'),
        ({'train-00000-of-00002.parquet': {}, 'train-00000-of-00001.parquet': {}}, 'train-.* of several versions'),
        ({'x-00000-of-00002.parquet': {}, 'x-00000-of-00002-9a8f.parquet': {}}, 'x-.* of several versions'),
        ({'a.parquet': {'names': ['a']}}, 'is not one of the 1 classes'),
    ],
)  # fmt: skip
def test_parquet_files_that_cannot_be_meant_are_refused(files, message, tmp_path):
    for file, options in files.items():
        _write(tmp_path / file, **{'labels': [0, 1, 2], **options})
    with pytest.raises(UserError, match=message) as error:
        discovery.find_images(str(tmp_path))
    assert '\n' not in str(error.value)


def test_files_that_are_no_parquet_are_refused(tmp_path):
    pointer = b'version https://git-lfs.github.com/spec/v1\noid sha256:3f75\nsize 160712\n'
    for content, message in ((pointer, 'is a Git LFS pointer.*git lfs pull'), (b'PAR1' * 9, 'cannot be read')):
        root = helpers.write_files(tmp_path, {'train-00000-of-00001.parquet': content})
        with pytest.raises(UserError, match=message):
            discovery.find_images(root)
    pq.write_table(pa.table({'text': ['a', 'b']}), tmp_path / 'train-00000-of-00001.parquet')
    with pytest.raises(
        UserError, match=r'one column of encoded images, such as image; its columns are: text \(string\)'
    ):
        discovery.find_images(root)


def test_missing_shards_and_images_are_counted(tmp_path, capfd):
    """Rows without bytes, and rows behind a damaged page, are unreadable images; the others are prepared."""
    contents = [helpers.encode(helpers.picture(i)) for i in range(6)]
    options = {'row_group_size': 3, 'compression': 'gzip', 'use_dictionary': False, 'write_statistics': False}
    path = _write(
        tmp_path / 'in' / 'train-00001-of-00003.parquet', [0, 1, 2] * 2, content=[None, *contents[1:]], **options
    )
    damaged = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    damaged[start + 100 : start + 200] = bytes(100)
    path.write_bytes(damaged)
    prepare.prepare(tmp_path / 'in', tmp_path / 'out', size=16, workers=1, max_unreadable=4)
    said = capfd.readouterr().err
    assert 'train split: only 1 of 3 parquet files are there' in said
    assert 'the row holds no image, or only the path of one' in said and 'skipped 4 unreadable images' in said
    assert len(helpers.read_back(str(tmp_path / 'out'), 'train')) == 2


def test_parquet_files_beside_images_are_skipped(tmp_path, capfd):
    _write(tmp_path / 'meta.parquet', [0, 1, 2])
    helpers.write_files(tmp_path, {'cat/a.jpg': b'', 'dog/a.jpg': b''})
    assert _found(tmp_path)[0] == {'train': ['cat', 'dog']}
    assert '1 .parquet' in capfd.readouterr().err


@pytest.mark.slow
def test_class_names_are_part_of_the_fingerprint(tmp_path):
    found = set()
    for i, names in enumerate((NAMES, ['a', 'b', 'c'])):
        _write(tmp_path / 'in' / 'train.parquet', [0, 1, 2], names)
        prepare.prepare(tmp_path / 'in', tmp_path / str(i), size=16, workers=1)
        found.add(json.loads((tmp_path / str(i) / 'metadata.json').read_text())['fingerprint'])
    assert len(found) == 2


def test_a_reader_holds_a_few_rows_in_memory(tmp_path):
    """A row group of 64 MB in pages of 4 MB."""
    contents = [bytes([i]) * 2**20 for i in range(64)]
    path = _write(
        tmp_path / 'a.parquet',
        [i % 3 for i in range(64)],
        content=contents,
        compression='none',
        use_dictionary=False,
        write_batch_size=4,
    )
    del contents
    before = pa.total_allocated_bytes()
    rows = parquet._Rows(str(path))
    peak = 0
    for i in range(64):
        assert rows.read(i)[:1] == bytes([i])
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 40 * 2**20, peak
