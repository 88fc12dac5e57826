"""Image files and folders for `predict`. A build returns the list of (path, picture) in the order of the output.

A picture is the seed of `picture`, or its pixels. CHECKPOINT stands for a checkpoint of ten classes.
"""

import os
import pathlib

from tests import helpers
from tests.zoo import images
from tests.zoo.case import Cases, png

CASES = Cases('predict')


def _add_image(case: images.ImageCase):
    def build(folder: pathlib.Path):
        content = case.content()
        (folder / case.name).write_bytes(content)
        return [(folder / case.name, case.pixels(content))] if case.pixels else None

    if case.pixels:
        CASES.read(case.input, case.outcome, words=[f'FOLDER/{case.name}'], says=case.says)(build)
    else:
        says = f'cannot be read as an image .*({case.says})'
        by = f'{case.says}|1 of 1 (files|images)'
        CASES.refused(case.input, case.outcome, words=[f'FOLDER/{case.name}'], by=by, says=says)(build)


for _case in images.CASES:
    _add_image(_case)


def write(folder, *names):
    """Writes a picture for each name and returns (path, seed) in the order of the paths."""
    helpers.write_files(folder, {name: png(seed) for seed, name in enumerate(names)})
    return sorted((folder / name, seed) for seed, name in enumerate(names))


def in_folder(input, outcome, *names, **options):
    CASES.read(input, outcome, words=['FOLDER'], **options)(lambda folder: write(folder, *names))


in_folder('folder of images', 'all, in the order of their names', 'b.png', 'a.png', 'c.png')
in_folder('folders inside the folder', 'all, in the order of their names', 'b/2.png', 'a.png', 'b/1.png', 'c/x/1.png')
in_folder('names with numbers', 'in the order of their characters', '10.png', '9.png')
in_folder('names in several scripts', 'kept', 'Zürich.png', '東京.png', '\U0001f408.png', 'e\u0301.png')
in_folder('names with blanks, line breaks and glob characters', 'kept', 'a b.png', 'a\nb.png', '[a]*.png', '{a}?.png')
in_folder(
    'one image without suffix among others',
    'by content, with a count',
    'a',
    'b.png',
    says='because of their content: 1 without suffix',
)


@CASES.read('texts among the images', 'skipped, with a count', words=['FOLDER'], says='skipped files .* 1 .csv, 1 .txt')
def _(folder):
    helpers.write_files(folder, {'labels.csv': b'a,b', 'read.txt': b'x'})
    return write(folder, 'a.png')


@CASES.read('hidden files among the images', 'skipped, with a count', words=['FOLDER'], says='skipped 1 hidden')
def _(folder):
    helpers.write_files(folder, {'._a.png': b'\0\5\x16\7'})
    return write(folder, 'a.png')


@CASES.read('file name that is not UTF-8', 'read; printed with U+FFFD or escapes', words=['FOLDER'])
def _(folder):
    write(folder, 'a.png')
    path = os.path.join(os.fsencode(folder), b'caf\xe9.png')
    os.rename(folder / 'a.png', path)
    return [(pathlib.Path(os.fsdecode(path)), 0)]


@CASES.read('file and folder that holds it', 'twice, as given', words=['FOLDER/b.png', 'FOLDER'])
def _(folder):
    found = write(folder, 'a.png', 'b.png')
    return [found[1], *found]


@CASES.read('link to an image', 'read', words=['FOLDER/link'])
def _(folder):
    write(folder, 'a.png')
    os.symlink('a.png', folder / 'link')
    return [(folder / 'link', 0)]


@CASES.read('folder with a link to itself', 'each image once', words=['FOLDER'], says='1 links to a folder above')
def _(folder):
    os.symlink('.', folder / 'loop')
    return write(folder, 'a.png')


@CASES.read('file name that starts with a dash', 'read after --', words=['--', 'FOLDER/-a.png'])
def _(folder):
    return write(folder, '-a.png')


@CASES.read('33 images, more than a batch', 'all', words=['FOLDER'])
def _(folder):
    return write(folder, *(f'{i:02}.png' for i in range(33)))


@CASES.read(
    'transparent, dark and animated images in one folder',
    'a warning for each',
    words=['FOLDER'],
    says=('no.png. has only fully', 'dark.png. has 16-bit', 'some.gif. has several frames'),
)
def _(folder):
    wanted = {
        'PNG, all pixels transparent': 'no.png',
        'PNG, 12-bit data in 16 bits': 'dark.png',
        'GIF, animated': 'some.gif',
    }
    found = []
    for case in images.CASES:
        if case.input in wanted:
            path, content = folder / wanted[case.input], case.content()
            path.write_bytes(content)
            found.append((path, case.pixels(content)))
    return sorted(found, key=lambda item: item[0])


def _bad_and_good(folder):
    write(folder, 'a.png', 'c.png')
    (folder / 'b.png').write_bytes(png(0)[:100])


CASES.refused(
    'damaged image among others',
    'the others are predicted; it is named; exit code 2',
    words=['FOLDER', '--lines'],
    by='1 of 3 (files|images) cannot be read',
    says=('b.png', r'a\.png: ', r'c\.png: '),
)(_bad_and_good)


@CASES.refused('link to nothing among others', 'named; exit code 2', words=['FOLDER'], by='1 of 2', says='gone.png')
def _(folder):
    write(folder, 'a.png')
    os.symlink('nothing', folder / 'gone.png')


@CASES.refused(
    'image without read permission', 'named; exit code 2', words=['FOLDER'], by='1 of 2', says='Permission denied'
)
def _(folder):
    write(folder, 'a.png', 'b.png')
    os.chmod(folder / 'b.png', 0)


@CASES.refused('pipe named like an image', 'named; exit code 2', words=['FOLDER/p.png'], by='1 of 1|not a regular file')
def _(folder):
    os.mkfifo(folder / 'p.png')


@CASES.refused(
    'file of more than 256 MB',
    'named; exit code 2',
    words=['FOLDER/big.png'],
    by='1 of 1|268,435,456',
    says='expected at most',
)
def _(folder):
    write(folder, 'big.png')
    os.truncate(folder / 'big.png', 2**28 + 1)


CASES.refused('path that does not exist', 'refused', words=['FOLDER/none.png'], by='does not exist')(lambda f: None)
CASES.refused('glob pattern that the shell did not expand', 'refused', words=['FOLDER/*.jpg'], by='does not exist')(
    lambda f: write(f, 'a.png')
)
CASES.refused('empty folder', 'refused', words=['FOLDER'], by='contains no images')(lambda f: None)
CASES.refused('folder of texts', 'refused', words=['FOLDER'], by='contains no images', says='skipped files .* 1 .txt')(
    lambda f: (f / 'a.txt').write_text('x')
)
CASES.refused('no path', 'refused', by='missing argument: give one IMAGE_OR_FOLDER')(lambda f: None)
CASES.refused(
    'address on the web', 'refused', words=['https://example.org/a.jpg'], by='remote paths are not supported'
)(lambda f: None)
CASES.refused('more labels than classes', 'refused', words=['FOLDER', '--top=11'], by='expected 1 to 10, the number')(
    lambda f: write(f, 'a.png')
)
CASES.refused(
    'file of weights as the checkpoint',
    'refused; names `alexnet_jax convert`',
    words=['FOLDER', '--checkpoint=FOLDER/a.png'],
    by='is a file, not a checkpoint; use alexnet_jax convert',
)(lambda f: write(f, 'a.png'))
CASES.refused(
    'folder without a checkpoint', 'refused', words=['FOLDER', '--checkpoint=FOLDER'], by='there is no checkpoint at'
)(lambda f: write(f, 'a.png'))
