"""Folders and archives for `prepare`.

A build returns {split: {file name: (class, picture)}}; a picture is the seed of `picture`, or its pixels.
"""

import gzip
import io
import os
import tarfile
import unicodedata
import zipfile

from alexnet_jax.data import imagenet_classes
from tests import helpers
from tests.zoo import images
from tests.zoo.case import Cases, picture, png

CASES = Cases('prepare')
WORDNET = imagenet_classes.wordnet_ids()
TRAIN_TAR, VAL_TAR = 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'
VAL_CLASSES = ('n01751748', 'n09193705', 'n02105855')  # of the first three images: the published ground truth


def files(folder, contents):
    """Writes {path: content, or the seed of a PNG}."""
    helpers.write_files(folder, {name: png(c) if isinstance(c, int) else c for name, c in contents.items()})


def plain(folder, prefix=''):
    """Writes two classes with one picture each, and returns what they become."""
    files(folder, {f'{prefix}cat/1.png': 1, f'{prefix}dog/2.png': 2})
    return {'train': {f'{prefix}cat/1.png': ('cat', 1), f'{prefix}dog/2.png': ('dog', 2)}}


def tree(folder, *paths):
    """Writes a picture for each path SPLIT/CLASS/NAME and returns what they become."""
    files(folder, {path: seed for seed, path in enumerate(paths)})
    found = {}
    for seed, path in enumerate(paths):
        split, class_name, _ = path.split('/', 2)
        found.setdefault(split, {})[path] = class_name, seed
    return found


def with_file(folder, name, content):
    files(folder, {name: content})
    return plain(folder)


# Layouts.
CASES.read('`CLASS/images`', 'all images are for training', says='train: 2 images  classes: 2')(plain)
CASES.read('`train`, `val` and `test` with class folders', 'three splits', says='test split: test/')(
    lambda f: tree(f, 'train/cat/a.png', 'train/dog/b.png', 'val/cat/c.png', 'test/dog/d.png')
)


@CASES.read('`Training` and `Testing` inside `archive/data`', 'two splits', says='reading the images in .*archive/data')
def _(folder):
    files(folder, {'archive/data/Training/cat/1.png': 1, 'archive/data/Training/dog/2.png': 2})
    files(folder, {'archive/data/Testing/cat/3.png': 3})
    root = 'archive/data'
    train = {f'{root}/Training/cat/1.png': ('cat', 1), f'{root}/Training/dog/2.png': ('dog', 2)}
    return {'train': train, 'test': {f'{root}/Testing/cat/3.png': ('cat', 3)}}


@CASES.read('`seg_train/seg_train/CLASS`', 'the inner folder is skipped', says='train split: seg_train/')
def _(folder):
    files(folder, {'seg_train/seg_train/cat/1.png': 1, 'seg_train/seg_train/dog/2.png': 2})
    files(folder, {'seg_test/seg_test/cat/3.png': 3})
    train = {f'seg_train/seg_train/{name}.png': (name[:3], int(name[-1])) for name in ('cat/1', 'dog/2')}
    return {'train': train, 'test': {'seg_test/seg_test/cat/3.png': ('cat', 3)}}


@CASES.read('`test` without class folders', 'skipped, with a count', says='nothing says the classes of the 2 images')
def _(folder):
    files(folder, {'test/images/1.png': 1, 'test/images/2.png': 2})
    return plain(folder, 'train/')


@CASES.read(
    'images in several folders inside a class',
    'images of the class, with a warning',
    says=['hold images in several folders'],
)
def _(folder):
    files(folder, {'cat/day/one/1.png': 3, 'cat/night/1.png': 4})
    found = plain(folder)
    found['train'] |= {'cat/day/one/1.png': ('cat', 3), 'cat/night/1.png': ('cat', 4)}
    return found


@CASES.read('images of one name in two classes', 'both')
def _(folder):
    files(folder, {'cat/1.png': 1, 'dog/1.png': 2})
    return {'train': {'cat/1.png': ('cat', 1), 'dog/1.png': ('dog', 2)}}


@CASES.read('`1.png` and `1.jpg` in one class', 'both')
def _(folder):
    content = helpers.encode(picture(5))
    found = with_file(folder, 'cat/1.jpg', content)
    found['train']['cat/1.jpg'] = 'cat', images._by_pillow(content)
    return found


@CASES.read('class folder without files', 'no class, with its name', says='skipped 1 folders without images .*: bird')
def _(folder):
    (folder / 'bird').mkdir()
    return plain(folder)


CASES.read('class folder with text only', 'no class, with its name', says=('without images .*: notes', '1 .md'))(
    lambda f: with_file(f, 'notes/read.md', b'x')
)
CASES.read('images beside the class folders', 'skipped, with a count', says='skipped 1 images outside class folders')(
    lambda f: with_file(f, 'title.png', 3)
)
CASES.read('images beside the split folders', 'skipped, with a count', says='skipped 1 images outside class folders')(
    lambda f: (files(f, {'title.png': 3}), plain(f, 'train/'))[1]
)
CASES.read(
    'folder beside the splits', 'skipped, with a count', says='not splits with class folders: extra \\(1 images\\)'
)(lambda f: (files(f, {'extra/a/1.png': 3}), tree(f, 'train/cat/1.png', 'train/dog/1.png', 'val/cat/1.png'))[1])
CASES.refused('one class', 'refused', by="at least two classes, got only 'cat'")(lambda f: files(f, {'cat/1.png': 1}))
CASES.refused('flat folder of images', 'refused', by='in no class folders')(lambda f: files(f, {'1.png': 1}))
CASES.refused('`train` and `test` without class folders', 'refused', by="'test' and 'train' hold images outside class")(
    lambda f: files(f, {'train/cat.0.png': 1, 'test/1.png': 2})
)
CASES.refused('empty folder', 'refused', by='contains no images; expected')(lambda f: None)
CASES.refused('path that does not exist', 'refused', by='does not exist')(lambda f: os.rmdir(f))
CASES.refused('class of val without training images', 'refused', by="'ox' has no training images")(
    lambda f: tree(f, 'train/cat/1.png', 'train/dog/1.png', 'val/ox/1.png')
)
CASES.refused('`Cat` in train, `cat` in val', 'refused', by="'cat' has no training images")(
    lambda f: tree(f, 'train/Cat/1.png', 'train/dog/1.png', 'val/cat/1.png')
)
CASES.refused('`cat/train` and `cat/test`', 'refused', by='train and test folders inside other folders')(
    lambda f: files(f, {'cat/train/1.png': 1, 'cat/test/2.png': 2, 'dog/train/3.png': 3, 'dog/test/4.png': 4})
)
CASES.refused('folders nested more than 100 deep', 'refused', by='nested more than 100 deep')(
    lambda f: files(f, {'cat/1.png': 1, 'dog/' + 'd/' * 105 + '1.png': 2})
)


@CASES.read('class folders `1`, `2` and `10`', 'labels in the order of the numbers', says='labels follow their values')
def _(folder):
    return tree(folder, *(f'train/{number}/a.png' for number in (1, 10, 2)))


# Files that are no images, or hide what they are.
CASES.read('`Thumbs.db` and `desktop.ini` of Windows', 'skipped, with counts', says='1 .db, 1 .ini')(
    lambda f: (files(f, {'cat/Thumbs.db': b'\xd0\xcf', 'dog/desktop.ini': b'[x]'}), plain(f))[1]
)
CASES.read('`._1.png` of macOS beside `1.png`', 'skipped, with a count', says='skipped 1 hidden .*_1.png')(
    lambda f: with_file(f, 'cat/._1.png', b'\0\5\x16\7')
)
CASES.read(
    '`.ipynb_checkpoints` of Jupyter with a copy of an image', 'skipped, with a count', says='skipped 1 hidden .*.ipynb'
)(lambda f: with_file(f, '.ipynb_checkpoints/1-checkpoint.png', 3))
CASES.read('`__MACOSX` of an unpacked archive', 'no class, with a count', says='1 __MACOSX/')(
    lambda f: with_file(f, '__MACOSX/cat/a.png', 3)
)
CASES.read('`1.png~` and `1.png.bak`, copies that an editor keeps', 'skipped, with counts', says='1 .png.bak|1 .bak')(
    lambda f: (files(f, {'cat/1.png~': 3, 'cat/1.png.bak': 3}), plain(f))[1]
)
CASES.read('`2.png.part`, a download that was interrupted', 'skipped, with a count', says='1 .part')(
    lambda f: with_file(f, 'dog/3.png.part', png(3)[:200])
)
CASES.read('SVG and PDF', 'skipped, with a command that converts them', says='1 .svg, 1 .pdf; to use them, convert')(
    lambda f: (files(f, {'cat/a.svg': b'<svg/>', 'cat/b.pdf': b'%PDF'}), plain(f))[1]
)


@CASES.read('suffix in upper case', 'as in lower case')
def _(folder):
    found = with_file(folder, 'cat/A.PNG', 3)
    found['train']['cat/A.PNG'] = 'cat', 3
    return found


@CASES.read('image without suffix', 'by content, with a count', says='because of their content: 1 without suffix')
def _(folder):
    found = with_file(folder, 'cat/0001', 3)
    found['train']['cat/0001'] = 'cat', 3
    return found


@CASES.read('file of 300 MB without suffix', 'skipped, with a count', says='1 without suffix')
def _(folder):
    found = with_file(folder, 'cat/dump', b'')
    os.truncate(folder / 'cat/dump', 300 << 20)
    return found


# Links, pipes and permissions.
@CASES.read('class folder that is a link', 'read')
def _(folder):
    found = plain(folder)
    os.rename(folder / 'cat', folder.parent / 'elsewhere')
    os.symlink(folder.parent / 'elsewhere', folder / 'cat')
    return found


@CASES.read(
    'class folder that is a link to another one',
    'read as two classes, with a warning',
    says=r'images of another one: 1 \(puma and cat\)',
)
def _(folder):
    found = plain(folder)
    os.symlink('cat', folder / 'puma')
    found['train']['puma/1.png'] = 'puma', 1
    return found


@CASES.read('image that is a link', 'read')
def _(folder):
    found = with_file(folder, '../store/x.png', 3)
    os.symlink('../../store/x.png', folder / 'cat' / 'link.png')
    found['train']['cat/link.png'] = 'cat', 3
    return found


@CASES.read('link to the folder above inside a class', 'skipped, with a count', says='1 links to a folder above')
def _(folder):
    os.makedirs(folder / 'cat')
    os.symlink('..', folder / 'cat' / 'up')
    return plain(folder)


@CASES.read('link to the folder itself, like a class', 'skipped, with a count', says='1 links to a folder above')
def _(folder):
    os.symlink('.', folder / 'all')
    return plain(folder)


@CASES.read(
    'classes that link to each other',
    'read through one link; the cycle is skipped, with a count',
    says='2 links to a folder above',
)
def _(folder):
    found = plain(folder)
    os.symlink('../dog', folder / 'cat' / 'x')
    os.symlink('../cat', folder / 'dog' / 'y')
    found['train'] |= {'cat/x/2.png': ('cat', 2), 'dog/y/1.png': ('dog', 1)}
    return found


@CASES.read('val folder that is a link to train', 'read', says=r'images of another one: 1 \(val and train\)')
def _(folder):
    found = plain(folder, 'train/')
    os.symlink('train', folder / 'val')
    val = {name.replace('train/', 'val/'): image for name, image in found['train'].items()}
    return {**found, 'val': val}


@CASES.read('folder named like an archive of one class', 'a class')
def _(folder):
    return tree(folder, 'train/cat/1.png', 'train/n01440764.tar/1.png')


CASES.refused(
    'archive of one class that is a link to nothing', 'refused', by='archive .* cannot be read: No such file'
)(lambda f: (plain(f, 'train/'), os.symlink('nothing', f / 'train' / 'n01440764.tar')))
CASES.refused('parquet file that is a link to nothing', 'refused', by="train.parquet' cannot be read: No such file")(
    lambda f: os.symlink('nothing', f / 'train.parquet')
)
CASES.refused('no images, and a link to nothing', 'refused', by='contains no images; expected')(
    lambda f: os.symlink('nothing', f / 'README')
)


@CASES.read(
    '20 class folders without files', 'no classes, with their number', says=r'skipped 20 folders .*, j, \.\.\.$'
)
def _(folder):
    for name in 'abcdefghijklmnopqrst':
        (folder / name).mkdir()
    return plain(folder)


@CASES.refused(
    'link to nothing, as git-annex leaves it', 'unreadable', by='1 of 3 images cannot be read .*No such file'
)
def _(folder):
    plain(folder)
    os.symlink('../.git/annex/objects/x.png', folder / 'cat' / '9.png')


@CASES.refused('pipe named like an image', 'unreadable', by='1 of 3 images cannot be read .*not a regular file')
def _(folder):
    plain(folder)
    os.mkfifo(folder / 'cat' / '9.png')


@CASES.refused('image without read permission', 'refused', by="lost access to the image 'cat/1.png'.*Permission denied")
def _(folder):
    plain(folder)
    os.chmod(folder / 'cat' / '1.png', 0)


@CASES.refused('folder without read permission', 'refused', by='cannot read the folder .*cat.*Permission denied')
def _(folder):
    plain(folder)
    os.chmod(folder / 'cat', 0)


# Names.
def named(name):
    """Returns a build with a class of this name."""
    return lambda folder: tree(folder, f'train/{name}/1.png', 'train/zebra/2.png')


CASES.read('class name with blanks and glob characters', 'kept')(named('a [b]*? {c}'))
CASES.read('class name in Chinese, Arabic and emoji', 'kept')(named('猫 قطة \U0001f408\u200d\u2b1b'))
CASES.read('class name with a comma, quotes and a tab', 'kept')(named('a, "b"\t\'c\''))
CASES.read('class name like a flag', 'kept')(named('--size=8'))
CASES.read('class folder named `x.png`', 'kept')(named('x.png'))
CASES.refused('class name with a blank at its end', 'refused', by="class name 'cat ': expected one line")(named('cat '))
CASES.refused('class name with a line break', 'refused', by="class name 'cat\\\\ndog'")(named('cat\ndog'))
CASES.read('file name of 255 bytes with blanks and a line break', 'kept')(
    lambda f: tree(f, 'train/cat/' + 'a b\n' * 62 + '123.png', 'train/dog/1.png')
)


@CASES.read('class name decomposed in train, composed in val', 'one class')
def _(folder):
    parts = [unicodedata.normalize('NFD', 'café'), 'café']
    files(folder, {f'train/{parts[0]}/1.png': 1, 'train/dog/2.png': 2, f'val/{parts[1]}/3.png': 3})
    train = {f'train/{parts[0]}/1.png': ('café', 1), 'train/dog/2.png': ('dog', 2)}
    return {'train': train, 'val': {f'val/{parts[1]}/3.png': ('café', 3)}}


@CASES.read('file name that is not UTF-8', 'invalid bytes become U+FFFD')
def _(folder):
    found = plain(folder)
    os.rename(folder / 'cat' / '1.png', os.path.join(os.fsencode(folder), b'cat/\xe9.png'))
    return {'train': {'cat/\ufffd.png': ('cat', 1), 'dog/2.png': found['train']['dog/2.png']}}


@CASES.read('class name that is not UTF-8', 'invalid bytes become U+FFFD, with a warning', says='is not UTF-8')
def _(folder):
    plain(folder)
    os.rename(folder / 'cat', os.path.join(os.fsencode(folder), b'caf\xe9'))
    return {'train': {'caf\ufffd/1.png': ('caf\ufffd', 1), 'dog/2.png': ('dog', 2)}}


# Unreadable images. The kinds of damage are cases of `predict`.
def _damaged(folder):
    files(folder, {'cat/bad.png': png(1)[:100], 'dog/empty.png': b''})
    return plain(folder)


CASES.refused('damaged images', 'refused, with the count and the flag', by='2 of 4 .*--max_unreadable=2')(_damaged)
CASES.read(
    'damaged images that are allowed',
    'skipped, with a count',
    words=['--max_unreadable=2'],
    says=('unreadable image: cat/bad.png: damaged', 'skipped 2 unreadable images'),
)(_damaged)
CASES.refused(
    'only damaged images', 'refused', words=['--max_unreadable=9'], by='none of the 2 images of the train split'
)(lambda f: files(f, {'cat/1.png': b'', 'dog/1.png': b'x'}))


@CASES.read(
    'dark, transparent and animated images',
    'a warning with a count for each',
    says=('1 images, such as cat/12.png, have 16-bit', 'cat/no.png, have only', 'cat/some.gif, have several'),
)
def _(folder):
    found = plain(folder)
    wanted = {'16-bit pixels': 'cat/12.png', 'only fully': 'cat/no.png', 'several frames': 'cat/some.gif'}
    for case in images.CASES:
        if case.pixels and (name := next((n for start, n in wanted.items() if case.says.startswith(start)), None)):
            content = case.content()
            if content.startswith(b'GIF') == name.endswith('gif'):
                files(folder, {name: content})
                found['train'][name] = 'cat', case.pixels(content)
    return found


# Class lists.
def listed(name, content, *names):
    def build(folder):
        plain(folder)
        (folder / name).write_bytes(content)
        return {'train': {'cat/1.png': (names[0], 1), 'dog/2.png': (names[1], 2)}}

    return build


CASES.read('`classes.tsv`', 'names of the classes')(listed('classes.tsv', b'cat\tKatze\ndog\tHund\n', 'Katze', 'Hund'))
CASES.read('`words.txt` in UTF-16 with `\\r\\n`', 'names of the classes')(
    listed('words.txt', 'cat\tChloé\r\ndog\tHund\r\n'.encode('utf-16'), 'Chloé', 'Hund')
)
CASES.read('`classes.tsv` in Latin-1', 'a warning with a count', says='1 names have characters that are not UTF-8')(
    listed('classes.tsv', b'cat\tChlo\xe9\ndog\tHund\n', 'Chlo\ufffd', 'Hund')
)
CASES.read('`classes.tsv` of other classes', 'a warning', says='classes.tsv names 0 of 2 classes')(
    listed('classes.tsv', b'n01440764\ttench\n', 'cat', 'dog')
)
CASES.read('`classes.tsv` with equal names', 'told apart by the folders')(
    listed('classes.tsv', b'cat\tpet\ndog\tpet\n', 'pet (cat)', 'pet (dog)')
)
CASES.read('`classes.tsv` without content', 'a warning', says='classes.tsv names 0 of 2 classes')(
    listed('classes.tsv', b'', 'cat', 'dog')
)


# Archives.
def tar(members, mode='w', format=tarfile.PAX_FORMAT):
    """Returns an archive of {name: content, seed or TarInfo}."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=format) as archive:
        for name, content in members if isinstance(members, list) else members.items():
            content = png(content) if isinstance(content, int) else content
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = b'' if info is content else content
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def train_tar(**options):
    inner = {f'{WORDNET[k]}.tar': tar({f'{WORDNET[k]}_1.JPEG': k}, **options) for k in (0, 1)}
    return tar(inner, **options)


OFFICIAL = {'train': {f'{WORDNET[k]}_1.JPEG': (WORDNET[k], k) for k in (0, 1)}}


def official(name, content, found=None):
    return lambda folder: (files(folder, {name: content()}), found)[1]


CASES.read('the official train archive', 'not unpacked; 1,000 classes', says='classes: 1000')(
    official(TRAIN_TAR, train_tar, OFFICIAL)
)
CASES.read('train archive with the headers of GNU tar', 'the same', says='no training images for 998 of 1000 classes')(
    official(TRAIN_TAR, lambda: train_tar(format=tarfile.GNU_FORMAT), OFFICIAL)
)
CASES.read('the official val archive', 'classes from the published ground truth')(
    official(
        VAL_TAR,
        lambda: tar({f'ILSVRC2012_val_{i:08}.JPEG': i for i in (1, 2, 3)}),
        {'val': {f'ILSVRC2012_val_{i:08}.JPEG': (VAL_CLASSES[i - 1], i) for i in (1, 2, 3)}},
    )
)


@CASES.read('val archive with folders and links in it', 'folders and links are no images')
def _(folder):
    sub, link = tarfile.TarInfo('val'), tarfile.TarInfo('val/link.JPEG')
    sub.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, '/etc/passwd'
    members = {'val': sub, 'val/ILSVRC2012_val_00000001.JPEG': 1, 'val/link.JPEG': link}
    files(folder, {VAL_TAR: tar(members)})
    return {'val': {'ILSVRC2012_val_00000001.JPEG': (VAL_CLASSES[0], 1)}}


@CASES.read(
    'archives of single classes in a folder',
    'training images; classes without any are counted',
    says='no training images for 998 of 1000 classes',
)
def _(folder):
    files(folder, {f'{WORDNET[k]}.tar': tar({f'{WORDNET[k]}_1.JPEG': k}) for k in (0, 1)})
    return OFFICIAL


@CASES.read('extracted val images in one folder', 'classes from the published ground truth')
def _(folder):
    files(folder, {f'ILSVRC2012_val_{i:08}.JPEG': i for i in (1, 2)})
    return {'val': {f'ILSVRC2012_val_{i:08}.JPEG': (VAL_CLASSES[i - 1], i) for i in (1, 2)}}


CASES.refused('archive beside its extracted images', 'refused', by='exist both in archives .* and as files')(
    lambda f: files(f, {TRAIN_TAR: train_tar(), f'train/{WORDNET[0]}/a.png': 1, f'train/{WORDNET[1]}/b.png': 1})
)
CASES.refused('train archive cut between two members', 'refused', by='truncated after')(
    official(TRAIN_TAR, lambda: train_tar()[: 512 + len(tar({f'{WORDNET[0]}_1.JPEG': 0}))])
)
CASES.refused('train archive cut inside an image', 'refused', by='cannot be read: ')(
    official(TRAIN_TAR, lambda: train_tar()[:2000])
)
CASES.refused('train archive with a damaged header', 'refused', by='cannot be read: ')(
    official(TRAIN_TAR, lambda: images._patched(train_tar(), 700, 255))
)
CASES.refused('train archive without content', 'refused', by='cannot be read: ')(official(TRAIN_TAR, lambda: b''))
CASES.refused('train archive without members', 'refused', by='contains no images')(official(TRAIN_TAR, lambda: tar({})))
CASES.refused('train archive compressed by gzip', 'refused, with the command', by='compressed by gzip: unpack it with')(
    official(TRAIN_TAR, lambda: gzip.compress(train_tar()))
)
CASES.refused('web page named like the train archive', 'refused', by='is a web page')(
    official(TRAIN_TAR, lambda: b'<!DOCTYPE html><title>Sign in</title>')
)
CASES.refused('val archive with a name of another set', 'refused', by='is not an image of the ILSVRC-2012 val set')(
    official(VAL_TAR, lambda: tar({'ILSVRC2012_test_00000001.JPEG': 1}))
)
CASES.refused('val image of number 50,001', 'refused', by='is not an image of the ILSVRC-2012 val set')(
    official(VAL_TAR, lambda: tar({'ILSVRC2012_val_00050001.JPEG': 1}))
)
CASES.refused('class archive of a class that ILSVRC-2012 lacks', 'refused', by="'n00000001' is not one of the 1000")(
    official('n00000001.tar', lambda: tar({'a.JPEG': 1}))
)


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        archive.writestr('cat/1.png', png(1))
    return file.getvalue()


CASES.refused(
    'ZIP archive of a data set', 'refused: unpack it', by='extract other archives', words=['--input=FOLDER/a.zip']
)(lambda f: files(f, {'a.zip': zipped()}))
CASES.refused('image file instead of a folder', 'refused', by='extract other archives', words=['--input=FOLDER/1.png'])(
    lambda f: files(f, {'1.png': 1})
)


@CASES.refused('folder of ZIP archives', 'refused, with a warning: unpack them', by='contains no images')
def _(folder):
    files(folder, {'cat.zip': zipped(), 'dog.zip': zipped()})


CASES.read('`train.zip` beside an unpacked folder', 'a warning: unpack it', says='1 .zip; unpack')(
    lambda f: with_file(f, 'val.zip', zipped())
)
CASES.refused('CIFAR-10 as Python pickles', 'refused', by='contains no images')(
    lambda f: files(f, {'data_batch_1': b'\x80\x02}', 'batches.meta': b'\x80\x02}'})
)
CASES.refused(
    'name of a TFDS data set that does not exist', 'refused', by='cannot be opened', words=['--input=tfds:nothing']
)(plain)

# Flags and outputs.
CASES.refused('output that exists', 'refused', by='already exists', words=['--output=FOLDER/cat'])(plain)
CASES.refused('output that is a link to nothing', 'refused', by='already exists', words=['--output=FOLDER/gone'])(
    lambda f: os.symlink('nothing', f / 'gone')
)
CASES.read('input with a slash at its end', 'read', words=['--input=FOLDER/'])(plain)
CASES.read('input with `..`', 'read', words=['--input=FOLDER/cat/..'])(plain)
CASES.refused(
    '`--val_fraction` of a folder with a val split', 'refused', words=['--val_fraction=0.5'], by='no val split'
)(lambda f: tree(f, 'train/cat/1.png', 'train/dog/1.png', 'val/cat/1.png'))
CASES.refused(
    '`--val_fraction` that moves no image', 'refused', words=['--val_fraction=0.1'], by='moves 0 of 2 images'
)(plain)
CASES.refused('`--size` of 2 pixels', 'refused', words=['--size=2'], by='expected 8 to 4096 pixels')(plain)
CASES.refused('unknown flag', 'refused', words=['--image_size=8'], by="Unknown command line flag 'image_size'")(plain)
CASES.refused('input given twice', 'refused', words=['--input=a', '--input=b'], by='input')(plain)
CASES.refused('remote input', 'refused', words=['--input=gs://bucket/data'], by='remote paths are not supported')(plain)
