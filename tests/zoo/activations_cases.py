"""Inputs of `activations`. A build returns (name in `files`, picture, label or None) for each row, in order.

A picture is the seed of `picture`, or its pixels. CHECKPOINT stands for a checkpoint of records of 32 pixels, PREPARED
for a prepared data set with the classes cat and dog.
"""

import os

import numpy as np

from tests import helpers
from tests.zoo.case import Cases, png
from tests.zoo.predict_cases import write

CASES = Cases('activations')
PREPARED = {'cat/1.png': (1, 0), 'cat/3.png': (3, 0), 'dog/2.png': (2, 1)}  # {file name: (seed, label)}
IMAGES = ('--images=FOLDER', '--layers=conv1', '--output=FOLDER/../f.npz')
DATA = ('--data=PREPARED', '--split=train', '--layers=conv1', '--output=FOLDER/../f.npz')


def _images(folder, *names):
    return [(os.fspath(path), seed, None) for path, seed in write(folder, *names)]


def _split(folder):
    order = np.random.default_rng(0).permutation(len(PREPARED))  # the seed of `prepare`
    return [(name, *PREPARED[name]) for name in (sorted(PREPARED)[i] for i in order)]


CASES.read('folder of images', 'rows in the order of their names', words=IMAGES)(lambda f: _images(f, 'b.png', 'a.png'))
CASES.read('folders inside the folder', 'rows in the order of their paths', words=IMAGES)(
    lambda f: _images(f, 'b/2.png', 'a.png', 'b/1.png')
)
CASES.read('prepared split', 'rows with names and labels', words=DATA)(_split)
CASES.read('prepared split, as safetensors', 'the same', words=[*DATA[:-1], '--output=FOLDER/../f.safetensors'])(_split)
CASES.read('batches of two for three images', 'all rows', words=[*IMAGES, '--batch_size=2'])(
    lambda f: _images(f, 'a.png', 'b.png', 'c.png')
)
CASES.read(
    'several layers, with blanks and twice', 'each once', words=[*IMAGES, '--layers= fc7 ,conv1', '--layers=conv2.pool']
)(lambda f: _images(f, 'a.png'))
CASES.read(
    'names in several scripts, in safetensors', 'as UTF-8', words=[*IMAGES[:2], '--output=FOLDER/../f.safetensors']
)(lambda f: _images(f, '東京.png', 'Zürich.png', 'e\u0301.png'))
CASES.read('names with line breaks and blanks at the end', 'kept', words=IMAGES)(
    lambda f: _images(f, 'a\nb.png', 'c .png', ' d.png')
)


@CASES.read('file names that are not UTF-8', "as Python's os.fsdecode returns them", words=IMAGES)
def _(folder):
    write(folder, 'a.png')
    path = os.path.join(os.fsencode(folder), b'caf\xe9.png')
    os.rename(folder / 'a.png', path)
    return [(os.fsdecode(path), 0, None)]


@CASES.read(
    'several files in another order',
    'rows in the order given',
    words=['--images=FOLDER/b.png', '--images=FOLDER/a.png', *IMAGES[1:]],
)
def _(folder):
    return _images(folder, 'a.png', 'b.png')[::-1]


@CASES.read('pictures of several sizes', 'central squares', words=IMAGES)
def _(folder):
    helpers.write_files(folder, {'wide.png': helpers.encode(helpers.picture(4, 32, 48), 'PNG')})
    return [*_images(folder, 'a.png'), (os.fspath(folder / 'wide.png'), helpers.picture(4, 32, 48)[:, 8:40], None)]


@CASES.partly_refused(
    'damaged image among others',
    'the others have rows; it is named; exit code 2',
    words=IMAGES,
    by='1 of 2 images cannot be read and have no row .*bad.png',
)
def _(folder):
    rows = _images(folder, 'a.png')
    (folder / 'bad.png').write_bytes(png(0)[:100])
    return rows


CASES.refused('only damaged images', 'refused', words=IMAGES, by='1 of 1 images cannot be read')(
    lambda f: (f / 'bad.png').write_bytes(b'')
)
CASES.refused('empty folder', 'refused', words=IMAGES, by='contains no images')(lambda f: None)
CASES.refused(
    'unknown layer', 'refused, with a similar name', words=[*IMAGES, '--layers=conv11'], by="Did you mean 'conv1'"
)(lambda f: _images(f, 'a.png'))
CASES.refused(
    "torchvision's name for another network",
    'refused, with the own names',
    words=[*IMAGES, '--layers=features.3'],
    by="does not have torchvision's layout; use conv1, conv2",
)(lambda f: _images(f, 'a.png'))
CASES.refused('no layer', 'refused', words=[IMAGES[0], '--layers=,', IMAGES[2]], by='no layers given')(
    lambda f: _images(f, 'a.png')
)
CASES.refused(
    'output of another suffix',
    'refused',
    words=[*IMAGES[:2], '--output=FOLDER/f.h5'],
    by='ending in .safetensors or .npz',
)(lambda f: _images(f, 'a.png'))
CASES.refused('output that exists', 'refused', words=[*IMAGES[:2], '--output=FOLDER/f.npz'], by='already exists')(
    lambda f: (f / 'f.npz').write_bytes(b'x')
)
CASES.refused(
    'output in a folder that does not exist',
    'refused',
    words=[*IMAGES[:2], '--output=FOLDER/new/f.npz'],
    by='No such file',
)(lambda f: _images(f, 'a.png'))
CASES.refused(
    '`--data` and `--images`', 'refused', words=[*IMAGES, '--data=PREPARED'], by='either --data=DIR or --images'
)(lambda f: None)
CASES.refused(
    '`--split` of a folder of images', 'refused', words=[*IMAGES, '--split=val'], by='--images has no splits'
)(lambda f: _images(f, 'a.png'))
CASES.refused('split that the data lack', 'refused', words=[DATA[0], '--split=test', *DATA[2:]], by="no split 'test'")(
    lambda f: None
)
CASES.refused('folder that is not prepared as `--data`', 'refused', words=['--data=FOLDER', *DATA[1:]], by='prepare')(
    lambda f: _images(f, 'a.png')
)
