"""Tables of labels in the forms that people write: which images, classes and splits are found, or which error."""

import json
import unicodedata

import pytest

from alexnet_jax.prepare import discovery, prepare
from alexnet_jax.utils.errors import UserError
from tests import helpers


def _found(tmp_path, table, files=('a.jpg', 'b.jpg', 'c.jpg'), name='labels.csv'):
    """Writes empty files and a table. Returns {split: {file: class}} as found."""
    root = helpers.write_files(tmp_path / 'in', dict.fromkeys(files, b''))
    path = tmp_path / name
    path.write_bytes(table if isinstance(table, bytes) else table.encode())
    listing = discovery.find_images(root, labels=path)
    return {s: {ref.name: listing.class_names[ref.label] for ref in refs} for s, refs in listing.splits.items()}


PAIRS = {'train': {'a.jpg': 'cat', 'b.jpg': 'dog', 'c.jpg': 'dog'}}
FISH = {'train': {'a.jpg': 'tench, Tinca', 'b.jpg': 'eel', 'c.jpg': 'eel'}}
SPLITS = {'train': {'a.jpg': 'cat', 'b.jpg': 'dog'}, 'val': {'c.jpg': 'dog'}}


@pytest.mark.parametrize(
    'table, found',
    [
        ('a.jpg,cat\nb.jpg,dog\nc.jpg,dog\n', PAIRS),
        ('\ufeffa.jpg;cat\r\nb.jpg;dog\r\n\r\nc.jpg;dog', PAIRS),
        ('a.jpg\tcat\nb.jpg\tdog\nc.jpg\tdog', PAIRS),
        ('a.jpg cat\nb.jpg  dog\n\nc.jpg dog', PAIRS),  # Caffe's lists
        ('"a.jpg","cat"\n"b.jpg", dog \n./c.jpg,"dog"\n', PAIRS),
        ('a.jpg,cat\nb.jpg,dog\nc.jpg,dog\n'.encode('utf-16'), PAIRS),
        ('file,label\na.jpg,cat\nb.jpg,dog\nc.jpg,dog\n', PAIRS),
        ('Label;Width;File Name\ncat;3,5;a.jpg\ndog;4;b.jpg\ndog;5;c.jpg\n', PAIRS),
        ('id,breed\na,cat\nb,dog\nc,dog\n', PAIRS),  # Kaggle's dog breeds
        ('a.jpg,cat,train\nb.jpg,dog,Training\nc.jpg,dog,validation\n', SPLITS),
        ('class id,filepaths,labels,data set\n0,a.jpg,cat,train\n1,b.jpg,dog,train\n1,c.jpg,dog,valid\n', SPLITS),
        ('image,label\na.jpg,"tench, Tinca"\nb.jpg,eel\n"c.jpg",eel', FISH),
        ('a.jpg;tench, Tinca\nb.jpg;eel\nc.jpg;eel', FISH),
        ('a.jpg,10\nb.jpg,2\nc.jpg,2', {'train': {'a.jpg': '10', 'b.jpg': '2', 'c.jpg': '2'}}),
        ('a.jpg,10.0\nb.jpg,2\nc.jpg,2.0', {'train': {'a.jpg': '10', 'b.jpg': '2', 'c.jpg': '2'}}),
    ],
)  # fmt: skip
def test_usual_forms(table, found, tmp_path, capfd):
    assert _found(tmp_path, table) == found
    if table[:2] != 'id':  # files without a suffix are a guess
        assert not capfd.readouterr().err


def test_numbers_keep_their_order(tmp_path):
    _found(tmp_path, 'a.jpg,10\nb.jpg,2\nc.jpg,1')
    assert discovery.find_images(str(tmp_path / 'in'), labels=tmp_path / 'labels.csv').class_names == ('1', '2', '10')


@pytest.mark.parametrize(
    'table, said',
    [
        ('a.jpg,cat\nb.jpg,dog\nd.jpg,dog\ne.jpg,eel\n', '2 rows whose file is missing or no image, such as d.jpg'),
        ('a.jpg,cat\nb.jpg,dog\n', 'skipped 1 images that it does not list, such as c.jpg'),
        ('a.jpg,cat\nb.jpg,dog\na.jpg,cat\nc.jpg,', '1 rows repeat another row'),
        ('a.jpg,cat\nb.jpg,dog\nc.jpg,', 'skipped 1 images without a label'),
        ('a.jpg,0\nb.jpg,1\nc.jpg,-1', 'skipped 1 images without a label'),
        ('Bild,Klasse\na.jpg,cat\nb.jpg,dog\nc.jpg,dog', '1 rows whose file is missing or no image, such as Bild'),
        ('x/y/a.jpg,cat\nb,dog\nc.jpg,dog', '2 files were found by the end of their paths, such as x/y/a.jpg at a.jpg'),
    ],
)  # fmt: skip
def test_what_is_skipped_or_guessed_is_counted(table, said, tmp_path, capfd):
    assert set(_found(tmp_path, table)['train']) >= {'a.jpg', 'b.jpg'}
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    'table, message',
    [
        ('', 'has no rows'),
        ('file,label\n', 'has no rows below its header'),
        ('a.jpg\nb.jpg\n', 'line 1: 1 cells; expected rows file,label'),
        ('a.jpg,cat,train,1\n', 'line 1: 4 cells; expected rows file,label'),
        ('a.jpg,cat\nb.jpg\n', 'line 2: 1 cells, not 2 as in its first row'),
        ('a.jpg,cat,train\nb.jpg,dog,0.7\n', "line 2: '0.7' is not a split such as train"),
        ('a.jpg,cat,train\nb.jpg,dog,\n', "line 2: '' is not a split such as train"),
        ('a.jpg,cat\n,dog\n', 'line 2: no file'),
        ('cat,a.jpg\ndog,b.jpg\n', "none of its 2 files is an image in .*, such as 'cat' in line 1"),
        ('a.jpg,cat\nb.jpg,dog\na.jpg,dog\n', "'a.jpg' is cat in line 1 and dog in line 3"),
        ('a.jpg,cat,train\nb.jpg,dog,train\n./a.jpg,cat,val\n', 'is cat, train in line 1 and cat, val in line 3'),
        ('a.jpg,cat\nb.jpg,cat\n', "at least two classes, got only 'cat'"),
        ('a.jpg,cat,train\nb.jpg,dog,train\nc.jpg,eel,val\n', "class 'eel' has no training images"),
        ('a.jpg,\nb.jpg,\n', 'none of its 2 images has a label'),
        ('a.jpg,cat\nb.jpg,café\n'.encode('latin-1'), 'line 2: not UTF-8'),
        ('a.jpg,cat\nb.jpg,"dog' + 'x' * 200_000, 'cannot be read: field larger than field limit'),
    ],
)
def test_tables_that_cannot_be_meant_are_refused(table, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        _found(tmp_path, table)
    assert '\n' not in str(error.value)


def test_paths_of_a_table(tmp_path, capfd):
    """Absolute paths, inside the input and elsewhere; backslashes; accents as macOS writes them; shared names."""
    decomposed = unicodedata.normalize('NFD', 'é')
    outside = helpers.write_files(tmp_path / 'other', {'z.jpg': b''}) + '/z.jpg'
    files = ('x/a.jpg', f'x/{decomposed}.jpg', 'y/a.jpg')
    table = f'{tmp_path}/in/x/a.jpg,cat\nx\\é.jpg,dog\ny/a.jpg,dog\n{outside},dog\n../other/z.jpg,dog\n'
    expected = {'x/a.jpg': 'cat', f'x/{decomposed}.jpg': 'dog', 'y/a.jpg': 'dog', outside: 'dog'}
    assert _found(tmp_path, table, files, 'in/labels.csv') == {'train': expected}
    assert capfd.readouterr().err.count('warning') == 1  # z.jpg is listed twice
    with pytest.raises(UserError, match="'a.jpg' may be x/a.jpg and y/a.jpg; write paths relative to"):
        _found(tmp_path, 'a.jpg,cat\nx/a.jpg,dog\n', files)


@pytest.mark.parametrize(
    'files, splits',
    [
        (('train/a.jpg', 'test/b.jpg'), ('train', 'test')),
        (('x/Training/a.jpg', 'x/Validation/n/b.jpg'), ('train', 'val')),
        (('train/a.jpg', 'more/b.jpg'), ('train', 'train')),
    ],
)
def test_folders_say_the_splits_that_a_table_lacks(files, splits, tmp_path, capfd):
    rows = [(f'{label}/{file}', label, s) for label in ('cat', 'dog') for file, s in zip(files, splits, strict=True)]
    found = _found(tmp_path, ''.join(f'{file},{label}\n' for file, label, _ in rows), [file for file, _, _ in rows])
    assert found == {s: {file: label for file, label, split in rows if split == s} for s in splits}
    said = capfd.readouterr()
    assert ('the folders of 2 of 4 are named like splits' in said.err) == ('more/b.jpg' in files)


def test_labels_need_a_folder(tmp_path):
    table = helpers.write_files(tmp_path, {'labels.csv': b'a,b'}) + '/labels.csv'
    for source in ('tfds:mnist', table):
        with pytest.raises(UserError, match='--labels=.*: expected a folder of images as the input'):
            discovery.find_images(source, labels=table)
    with pytest.raises(UserError, match="none.csv' cannot be read: No such file"):
        discovery.find_images(str(tmp_path), labels=tmp_path / 'none.csv')
    with pytest.raises(UserError, match=f"--labels='labels.csv' does not exist; use --labels='{table}'"):
        discovery.find_images(str(tmp_path), labels='labels.csv')


def test_prepared_data_depend_on_the_table(tmp_path):
    """Records and fingerprint: another label, and the same labels under other names. Classes' names come from lists."""
    files = {f'{i}.png': helpers.encode(helpers.picture(i), 'PNG') for i in range(6)}
    root = helpers.write_files(tmp_path / 'in', {**files, 'classes.tsv': b'n01\tcat\nn02\tdog\n'})
    labels = {f'{i}.png': 'n01' if i % 2 else 'n02' for i in range(6)}

    def fingerprint(out, changes, **replaced):
        rows = {**labels, **changes}
        table = tmp_path / f'{out}.csv'
        table.write_text(''.join(f'{file},{replaced.get(label, label)}\n' for file, label in rows.items()))
        prepare.prepare(root, tmp_path / out, size=16, workers=1, val_fraction=0.5, labels=table)
        with open(tmp_path / out / 'metadata.json') as file:
            return json.load(file)['fingerprint']

    first = fingerprint('first', {})
    found = helpers.read_back(str(tmp_path / 'first'), 'train') | helpers.read_back(str(tmp_path / 'first'), 'val')
    assert {name: label for name, (_, label) in found.items()} == {
        name: 'cat' if label == 'n01' else 'dog' for name, label in labels.items()
    }
    assert fingerprint('other', {'0.png': 'n01'}) != first
    assert fingerprint('names', {}, n01='n03', n02='n04') != first
