"""Folders as people and public data sets arrange them: which images, classes and splits are found, or which error."""

import os
import unicodedata

import pytest

from alexnet_jax.data import image_io
from alexnet_jax.inference import predict
from alexnet_jax.prepare import discovery, split_folders
from alexnet_jax.utils.errors import UserError
from tests import helpers


def _write(root, *folders, suffix='.jpg', count=2):
    """Writes empty files named like images; the search for images does not open them."""
    return helpers.write_files(root, {f'{f}/{i}{suffix}': b'' for f in folders for i in range(count)})


def _found(path):
    """Returns {split: the classes of its images in the order of their names}."""
    listing = discovery.find_images(str(path))
    return {s: [listing.class_names[ref.label] for ref in refs] for s, refs in listing.splits.items()}


_SPELLINGS = {
    'train': 'train Train TRAIN training Training train_set TrainSet training_set train_images train2017 trainData '
    'images.train ILSVRC2012_img_train 01-train',
    'val': 'val valid Validation validation_set dev valset val_images ILSVRC2012_img_val',
    'test': 'test Test testing Testing test_set testset TestImages eval evaluation',
}


@pytest.mark.parametrize('split', _SPELLINGS)
def test_spellings_of_splits(split):
    for name in _SPELLINGS[split].split():
        assert split_folders.split_name(name) == split, name
    for name in (
        'train_val',
        'trainval',
        'trains',
        'bullet train',
        'tester',
        'values',
        'device',
        '',
        '123',
        'datasets',
    ):
        assert split_folders.split_name(name) is None, name


# (train folder, test folder) as in the data sets named.
@pytest.mark.parametrize(
    'train, test',
    [
        ('Training', 'Testing'),  # Kaggle's brain tumor MRI
        ('archive/train', 'archive/test'),  # archives unpacked into a folder
        ('a/b/c/Train', 'a/b/c/Test'),
        ('seg_train/seg_train', 'seg_test/seg_test'),  # Intel image classification
        ('training_set/training_set', 'test_set/test_set'),  # Kaggle's cats and dogs
        ('asl_alphabet_train/asl_alphabet_train', 'asl_alphabet_test/asl_alphabet_test'),
        ('train/images', 'test/images'),
        ('Data/CLS-LOC/train', 'Data/CLS-LOC/test'),
        ('fruits-360/Training', 'fruits-360/Test'),
    ],
)
def test_split_folders_of_public_data_sets(train, test, tmp_path, capfd):
    _write(tmp_path, *(f'{split}/{name}' for split in (train, test) for name in ('cat', 'dog')))
    helpers.write_files(
        tmp_path, {'readme.txt': b'', 'Annotations/train/cat/a.xml': b'', '__MACOSX/train/cat/b.jpg': b''}
    )
    assert _found(tmp_path) == {split: ['cat'] * 2 + ['dog'] * 2 for split in ('train', 'test')}
    said = capfd.readouterr().out
    for split, folder in (('train', train), ('test', test)):
        assert any(f'{split} split: {folder.rsplit("/", n)[0]}/' in said for n in (0, 1)), said


def test_parts_of_a_split_are_one_split(tmp_path, capfd):
    """ImageNet-100 on Kaggle has train.X1 to train.X4 and val.X."""
    _write(tmp_path, 'train.X1/n01', 'train.X2/n02', 'train.X3/n03', 'val.X/n01', 'val.X/n03', count=1)
    assert _found(tmp_path) == {'train': ['n01', 'n02', 'n03'], 'val': ['n01', 'n03']}
    assert 'train split: train.X1/, train.X2/, train.X3/' in capfd.readouterr().out


@pytest.mark.parametrize('wrapper', ['flowers', 'a/b', 'flowers/flowers'])
def test_folders_that_only_wrap_the_classes(wrapper, tmp_path):
    _write(tmp_path, f'{wrapper}/cat', f'{wrapper}/dog/more')
    assert _found(tmp_path) == {'train': ['cat'] * 2 + ['dog'] * 2}
    _write(tmp_path, '.', count=1)
    assert _found(tmp_path) == {'train': ['cat'] * 2 + ['dog'] * 2}


@pytest.mark.parametrize(
    'folders',
    [
        ('train/cat', 'train/dog', 'extra/cat'),  # one that is no split
        ('train/cat', 'train/dog', 'test'),  # unlabeled images
        ('train/cat', 'train/dog', 'test/test'),
        ('train/cat', 'train/dog', 'test/images'),
        ('train/cat', 'train/dog', 'test/unknown'),
        ('seg_train/seg_train/cat', 'seg_train/seg_train/dog', 'seg_test', 'seg_pred/seg_pred'),
    ],
)
def test_unlabeled_splits_are_skipped_with_a_warning(folders, tmp_path, capfd):
    _write(tmp_path, *folders)
    assert _found(tmp_path) == {'train': ['cat'] * 2 + ['dog'] * 2}
    assert 'warning: skipped' in capfd.readouterr().err


@pytest.mark.parametrize('names', [('train', 'bus'), ('test_tube', 'train_station', 'cat', 'dog', 'bus'), ('val', 'a')])
def test_classes_named_like_splits(names, tmp_path):
    _write(tmp_path, *names, count=1)
    assert _found(tmp_path) == {'train': sorted(names)}
    _write(tmp_path / 'deep', *(f'{name}/a' for name in names), count=1)
    _write(tmp_path / 'unknown', 'train/unknown', 'train/cat', 'val/unknown', count=1)
    assert _found(tmp_path / 'unknown') == {'train': ['cat', 'unknown'], 'val': ['unknown']}
    _write(tmp_path / 'vehicles', 'vehicle/train/steam', 'vehicle/bus', 'animal', count=1)
    assert _found(tmp_path / 'vehicles') == {'train': ['animal', 'vehicle', 'vehicle']}
    if 'cat' in names:  # most folders are no splits
        assert _found(tmp_path / 'deep') == {'train': sorted(names)}


@pytest.mark.parametrize(
    'folders, message',
    [
        (('train', 'test'), "'test' and 'train' hold images outside class folders; expected SPLIT/CLASS/images"),
        (('archive/train', 'archive/test'), 'hold images outside class folders'),
        (('cat/train', 'cat/test', 'dog/train', 'dog/test'), r'inside other folders; use one .*/cat.*/dog'),
        (('a/train/cat', 'a/test/cat', 'b/train/cat', 'b/test/cat'), r'inside other folders; use one .*/a.*/b'),
        (('a/train/cat', 'a/test/cat', 'b/dog'), r'inside other folders; use one .*/a'),
        (('train/cat', 'test/images'), "expected at least two classes, got only 'cat'"),
        (('cat',), "expected at least two classes, got only 'cat'"),
        (('train/cat', 'test/cat'), "expected at least two classes, got only 'cat'"),
        (('train/cat', 'train/dog', 'test/bird', 'test/cat'), "class 'bird' has no training images"),
        (('.hidden/cat', '@eaDir/dog'), 'contains no images'),
    ],
)
def test_ambiguous_folders_are_refused(folders, message, tmp_path):
    _write(tmp_path, *folders)
    with pytest.raises(UserError, match=message) as error:
        discovery.find_images(str(tmp_path))
    assert '\n' not in str(error.value)


def test_tiny_imagenet_as_published(tmp_path, capfd):
    classes, root = ('n02', 'n01', 'n03'), tmp_path / 'tiny-imagenet-200'
    _write(root, *(f'train/{name}/images' for name in classes), 'test/images', suffix='.JPEG')
    helpers.write_files(root, {f'train/{name}/{name}_boxes.txt': b'' for name in classes})
    _write(root, 'val/images', suffix='.JPEG', count=4)
    (root / 'val' / 'val_annotations.txt').write_text(
        ''.join(f'{i}.JPEG\tn0{i}\t0\t0\t62\t62\n' for i in (3, 1, 2)) + '9.JPEG\tn01\t0\t0\t1\t1\n'
    )
    (root / 'words.txt').write_text('n01\tcat\n')
    for path in (root, tmp_path):
        assert _found(path) == {'train': ['n01'] * 2 + ['n02'] * 2 + ['n03'] * 2, 'val': ['n01', 'n02', 'n03']}
        said = capfd.readouterr().err
        assert '1 images are not in val_annotations.txt and are skipped; 1 of its files are missing' in said
        assert 'skipped the test split: nothing says the classes of the 2 images' in said
        assert 'skipped files that are not images of a known format: 3 .txt\n' in said


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'GIF', 'BMP', 'TIFF', 'WEBP', 'PPM'])
@pytest.mark.parametrize('suffix', ['', '.1', '.image', '.txt', '.nef'])
def test_images_are_recognized_by_content(kind, suffix, tmp_path, capfd):
    content = helpers.encode(helpers.picture(0), kind)
    helpers.write_files(
        tmp_path, {f'{c}/a{suffix}': content for c in ('cat', 'dog')} | {'cat/b.jpg': b'', 'dog/b.jpg': b''}
    )
    # Text files are not opened; a camera's raw file is a TIFF file with a thumbnail.
    read = suffix != '.txt' and (kind != 'TIFF' or not suffix)
    assert _found(tmp_path) == {'train': ['cat'] * (1 + read) + ['dog'] * (1 + read)}
    said = capfd.readouterr()
    named = f'2 {suffix or "without suffix"}'
    assert (f'because of their content: {named}\n' in said.err) == read
    assert (f'not images of a known format: {named}' in said.err) != read
    assert predict.list_image_files([tmp_path / 'cat'])[0].endswith(f'a{suffix}') == read
    assert (f'known format: 1 {suffix}' in capfd.readouterr().err) != read


@pytest.mark.parametrize('suffix', ['.jfif', '.JPE', '.pbm', '.pnm', '.apng', '.mpo', '.HEIC', '.avif', '.jp2', '.cr2'])
def test_suffixes_are_read_or_listed(suffix, tmp_path, capfd):
    _write(tmp_path, 'cat', 'dog')
    _write(tmp_path, 'cat', suffix=suffix, count=3)
    read = suffix.lower() in image_io.suffixes()
    if suffix not in ('.HEIC', '.avif'):  # these need a decoder
        assert read == (suffix in ('.jfif', '.JPE', '.pbm', '.pnm', '.apng', '.mpo'))
    assert _found(tmp_path)['train'].count('cat') == 2 + 3 * read
    remedy = f'3 {suffix.lower()}; to use them, convert them (magick mogrify -format jpg *{suffix})'
    assert (remedy in capfd.readouterr().err) != read


@pytest.mark.parametrize(
    'name', ['@eaDir', '#recycle', '$RECYCLE.BIN', 'System Volume Information', 'lost+found', '__MACOSX']
)
def test_system_folders_are_no_classes(name, tmp_path, capfd):
    _write(tmp_path, 'cat', 'dog', name, f'cat/{name}')
    assert _found(tmp_path) == {'train': ['cat'] * 2 + ['dog'] * 2}
    assert f'2 {name}/' in capfd.readouterr().err


def test_class_names_are_compared_in_one_normal_form(tmp_path, capfd):
    """macOS writes accents as characters of their own."""
    name = 'café'
    composed, decomposed = (unicodedata.normalize(form, name) for form in ('NFC', 'NFD'))
    _write(tmp_path, f'train/{composed}', f'val/{decomposed}', 'train/tea', count=1)
    assert _found(tmp_path) == {'train': [composed, 'tea'], 'val': [composed]}
    _write(tmp_path, f'train/{decomposed}', count=1)
    assert _found(tmp_path)['train'] == [composed, composed, 'tea']
    assert "two folders are the class 'café'" in capfd.readouterr().err


def test_class_names_that_are_not_utf8(tmp_path, capfd):
    first, second = (os.fsdecode(b'caf' + byte) for byte in (b'\xe9', b'\xe8'))
    _write(tmp_path, first, 'tea', count=1)
    assert _found(tmp_path) == {'train': ['caf\ufffd', 'tea']}
    assert 'is not UTF-8; its class is' in capfd.readouterr().err
    _write(tmp_path, second)
    with pytest.raises(UserError, match='another folder has the same class name .* rename one of them'):
        discovery.find_images(str(tmp_path))


def test_links_to_themselves_are_no_folders(tmp_path):
    _write(tmp_path, 'cat', 'dog')
    for name in ('loop', 'cat/loop', 'train'):
        os.symlink(os.path.basename(name), tmp_path / name)
    os.symlink('.', tmp_path / 'dog' / 'here')
    assert _found(tmp_path) == {'train': ['cat'] * 2 + ['dog'] * 2}


# Folders of Places365 with groups, of one level or two.
PLACES = ('a/abbey', 'a/apartment_building/outdoor', 'b/bakery/shop')


@pytest.mark.parametrize('splits', [('train', 'val'), ('',)])
def test_nested_classes_are_named_by_their_path(splits, tmp_path, capfd):
    _write(tmp_path, *(f'{split}/{name}'.lstrip('/') for split in splits for name in PLACES), count=1)
    found = {split or 'train': list(PLACES) for split in splits}
    listing = discovery.find_images(str(tmp_path), nested_classes=True)
    assert listing.class_names == PLACES
    assert {s: [PLACES[ref.label] for ref in refs] for s, refs in listing.splits.items()} == found
    assert not capfd.readouterr().err
    assert _found(tmp_path) == {split: ['a', 'a', 'b'] for split in found}
    said = '1 class folders hold images in several folders, such as a: each is one class; with --nested_classes,'
    assert said in capfd.readouterr().err


def test_nested_classes_beside_images_and_in_one_group(tmp_path, capfd):
    _write(tmp_path, 'train/animals/cat', 'train/animals/dog', count=1)
    with pytest.raises(
        UserError, match="got only 'animals'; .* --nested_classes if they are in groups, or --labels=FILE"
    ):
        _found(tmp_path)
    _write(tmp_path, 'train/animals', count=1)
    capfd.readouterr()
    found = discovery.find_images(str(tmp_path), nested_classes=True)
    assert found.class_names == ('animals', 'animals/cat', 'animals/dog')
    assert 'such as animals: each also is a class of its own' in capfd.readouterr().err
    for options in ({'labels': 'a.csv'}, {}):
        with pytest.raises(UserError, match='--nested_classes: '):
            discovery.find_images('tfds:mnist', nested_classes=True, **options)
