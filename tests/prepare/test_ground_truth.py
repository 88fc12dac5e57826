"""Flat folders of ILSVRC-2012, Kaggle and ILSVRC-2010 with their ground truth: right classes, or one clear line."""

import numpy as np
import pytest
from scipy import io

from alexnet_jax.data import imagenet_classes
from alexnet_jax.prepare import discovery, prepare, tfds
from alexnet_jax.utils.errors import UserError
from tests import helpers

# Published classes of the first validation images of ILSVRC-2012.
FIRST = ('n01751748', 'n09193705', 'n02105855')
# Rows of Kaggle's list: boxes x, y, width, height.
KAGGLE = (
    'ImageId,PredictionString\n'
    'ILSVRC2012_val_00000002,n09193705 1 2 3 4 n09193705 5 6 7 8 \n'
    'ILSVRC2012_val_00000001,n01751748 111 108 431 202 \n'
    'ILSVRC2012_val_00000003,n02105855 1 2 3 4 \n'
)


def _write(root, *names, **texts):
    helpers.write_files(root, dict.fromkeys(names, b''))
    for name, text in texts.items():
        path = root / name.replace('__', '/')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix('.csv' if text.startswith('Image') else '.txt').write_text(text)
    return root


def _found(path):
    listing = discovery.find_images(str(path))
    return {s: {ref.name: listing.class_names[ref.label] for ref in refs} for s, refs in listing.splits.items()}


def _kaggle(root, listed=KAGGLE):
    """The folders of Kaggle's ImageNet, with an image in each of two classes."""
    data, classes = 'ILSVRC/Data/CLS-LOC', ('n01751748', 'n02105855')
    names = [f'{data}/train/{c}/{c}_1.JPEG' for c in classes]
    names += [f'{data}/val/ILSVRC2012_val_{i:08}.JPEG' for i in (1, 2, 3)]
    names += [f'{data}/test/ILSVRC2012_test_{i:08}.JPEG' for i in (1, 2)] + ['ILSVRC/Annotations/CLS-LOC/train/a/1.xml']
    return _write(root, *names, LOC_val_solution=listed, LOC_synset_mapping='n01751748 sea snake\nn02105855 sheepdog\n')


@pytest.mark.parametrize('given', ['', 'ILSVRC', 'ILSVRC/Data/CLS-LOC'])
def test_imagenet_of_kaggle(given, tmp_path, capfd):
    found = _found(_kaggle(tmp_path / 'in') / given)
    assert found['val'] == {f'ILSVRC2012_val_{i:08}.JPEG': c for i, c in enumerate(FIRST, 1)}
    assert sorted(found['train'].values()) == ['n01751748', 'n02105855'] and set(found) == {'train', 'val'}
    said = capfd.readouterr()
    assert 'are those of' in said.out and 'LOC_val_solution.csv' in said.out
    assert 'skipped 1 folders that are not splits with class folders: test (2 images)' in said.err


@pytest.mark.parametrize(
    'old, new, said',
    [
        ('n02105855 1', 'n01440764 1', '1 images have another class than in the ground truth of ILSVRC-2012, such as'),
        ('ILSVRC2012_val_00000003,', 'ILSVRC2012_val_00000009,', '1 of its 3 images are missing'),
        ('ILSVRC2012_val_00000003,', 'ILSVRC2012_val_00000009,', 'skipped 1 images that are not in'),
    ],
)
def test_kaggle_list_that_differs_is_reported(old, new, said, tmp_path, capfd):
    found = _found(_kaggle(tmp_path, KAGGLE.replace(old, new)))['val']
    assert found.get('ILSVRC2012_val_00000003.JPEG') == ('n01440764' if 'n0' in new else None)
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    'old, new, message',
    [
        ('n09193705 5', 'n01751748 5', 'line 2: expected an image and boxes of one class'),
        ('n02105855 1 2 3 4', 'n02105855 1 2', 'line 4: expected an image and boxes of one class'),
        ('n02105855', 'sheepdog', 'line 4: expected an image and boxes of one class'),
        ('00000003,n02105855', '00000002,n02105855', "line 4: 'ILSVRC2012_val_00000002' has another class"),
        ('n02105855 1', 'n99999999 1', "class 'n99999999' is not one of the 1000 of ILSVRC-2012"),
    ],
)
def test_kaggle_list_that_is_damaged_is_refused(old, new, message, tmp_path):
    with pytest.raises(UserError, match=message):
        _found(_kaggle(tmp_path, KAGGLE.replace(old, new)))


def test_ground_truth_of_2012_is_known_and_compared(tmp_path):
    ids = {c: i for i, c in enumerate(imagenet_classes.wordnet_ids()[::-1], 1)}  # the kit has another order than labels
    truth = [str(ids[c]) for c in tfds.validation_classes()]
    root = _write(
        tmp_path, 'ILSVRC2012_val_00000002.JPEG', 'ILSVRC2012_val_00000001.JPEG',
        ILSVRC2012_devkit_t12__data__ILSVRC2012_validation_ground_truth='\n'.join(truth) + '\n',
    )  # fmt: skip
    assert list(_found(root)['val'].values()) == list(FIRST[:2])
    for wrong in (truth[:-1], [*truth[:-2], truth[-1], truth[-2]]):
        _write(root, ILSVRC2012_devkit_t12__data__ILSVRC2012_validation_ground_truth='\n'.join(wrong))
        with pytest.raises(UserError, match='are not the ground truth of the 50000 validation images'):
            _found(root)


CLASSES = ('n02119789', 'n01440764', 'n01443537', 'n00000001')  # ILSVRC2010_ID 1 to 4; the last is not a leaf


def _write_2010(root, val='3\n1\n2\n1\n', test='1\n2\n', meta='mat', train=True):
    """ILSVRC-2010 as unpacked: 2 of 4 validation images, 2 test images, 3 classes, the development kit."""
    data = root / 'ILSVRC2010_devkit-1.0' / 'devkit-1.0' / 'data'
    data.mkdir(parents=True)
    names = ['val/ILSVRC2010_val_00000001.JPEG', 'val/ILSVRC2010_val_00000004.JPEG']
    names += [f'test/ILSVRC2010_test_{i:08}.JPEG' for i in (1, 2)]
    names += [f'train/{c}/{c}_{i}.JPEG' for c in CLASSES[:2] for i in (1, 2)] if train else []
    helpers.write_files(root, {name: helpers.encode(helpers.picture(i)) for i, name in enumerate(names)})
    for name, text in (('validation', val), ('test', test)):
        if text is not None:
            (data / f'ILSVRC2010_{name}_ground_truth.txt').write_text(text)
    if meta == 'mat':
        rows = [(i, c, f'words {i}') for i, c in enumerate(CLASSES, 1)]
        kinds = [('ILSVRC2010_ID', object), ('WNID', object), ('words', object)]
        io.savemat(data / 'meta.mat', {'synsets': np.array(rows, kinds).reshape(-1, 1)})
    elif meta:
        (data / 'meta.txt').write_text(meta)
    return root


def test_ilsvrc_2010_as_published(tmp_path, capfd):
    """The paper's main results are of ILSVRC-2010, whose test labels were published. Labels sort the WordNet ids."""
    out = str(tmp_path / 'out')
    prepare.prepare(_write_2010(tmp_path / 'in'), out, size=16, workers=1)
    assert {name: c for name, (_, c) in helpers.read_back(out, 'val').items()} == {
        'ILSVRC2010_val_00000001.JPEG': 'n01443537', 'ILSVRC2010_val_00000004.JPEG': 'n02119789'
    }  # fmt: skip
    assert [c for _, c in helpers.read_back(out, 'test').values()] == ['n02119789', 'n01440764']
    assert len(helpers.read_back(out, 'train')) == 4
    said = capfd.readouterr()
    assert '2 of its 4 images are missing' in said.err
    assert 'classes: 3 (n01440764, n01443537, n02119789)' in said.out  # also the class without training images


@pytest.mark.parametrize('meta', ['mat', ''.join(f'{i} {c} 1300\n' for i, c in enumerate(CLASSES, 1))])
def test_ilsvrc_2010_validation_folder_alone(meta, tmp_path):
    root = _write_2010(tmp_path, meta=meta, train=False)
    assert list(_found(root / 'val')['val'].values()) == ['n01443537', 'n02119789']
    assert set(_found(root)) == {'val', 'test'}


@pytest.mark.parametrize(
    'options, message',
    [
        ({'val': None}, 'put ILSVRC2010_validation_ground_truth.txt and meta.mat there'),
        ({'meta': ''}, 'numbers of classes whose WordNet ids are not known; put meta.mat .* or meta.txt'),
        ({'meta': '1 n02119789\n2 n01440764\n'}, 'has no ILSVRC2010_ID 3'),
        ({'meta': 'n02119789\nn01440764\nn01443537\n'}, 'expected lines NUMBER WORDNET_ID'),  # of unknown order
        ({'meta': '1 n02119789\n1 n01440764\n'}, 'with each number once'),
        ({'val': '3\n1\n2\n'}, 'with at most 3, as in'),
        ({'val': '3\n0\n2\n1\n'}, "line 2: expected the number of a class, from 1, got '0'"),
        ({'val': '3\n\n2\n1\n'}, "line 2: expected the number of a class, from 1, got ''"),
        ({'val': 'n02119789\n'}, 'line 1: expected the number of a class'),
    ],
)
def test_incomplete_ground_truth_of_2010_is_refused(options, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        _found(_write_2010(tmp_path, **options))
    assert '\n' not in str(error.value)


def test_meta_of_another_year_is_refused(tmp_path):
    root = _write_2010(tmp_path, meta='')
    data = root / 'ILSVRC2010_devkit-1.0' / 'devkit-1.0' / 'data'
    io.savemat(data / 'meta.mat', {'synsets': np.array([(1, 'n1')], [('ILSVRC2012_ID', object), ('WNID', object)])})
    for _ in range(2):
        with pytest.raises(UserError, match='expected synsets with ILSVRC2010_ID and WNID'):
            _found(root)
        (data / 'meta.mat').write_bytes(b'damaged')


def test_test_images_of_2010_without_labels_are_skipped(tmp_path, capfd):
    assert set(_found(_write_2010(tmp_path, test=None))) == {'train', 'val'}
    assert 'skipped 2 test images' in capfd.readouterr().err
