"""Finds the images that a raw input holds, and reads one: archives, image folders, TFDS datasets.

Nothing is unpacked: an uncompressed archive is read at the offset where a member lies, by any number of processes.
"""

import functools
import os
import sys
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from alexnet_jax import images
from alexnet_jax.errors import UserError, first_line

_SPLITS = {'train': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'test': 'test'}
_TRAIN_TAR, _VAL_TAR = 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'
_VAL_PREFIX = 'ILSVRC2012_val_'
_TFDS = 'tfds:'
_LONGEST_HEADER = 2**20  # bytes of a name in an archive
_LONGEST_END = 2**24  # bytes of zeros behind its last member


class Ref(NamedTuple):
    """Where one image lies."""

    path: str  # a file, or 'tfds:NAME'
    offset: int  # bytes into the file; for TFDS the index
    length: int  # bytes; -1 for a whole file
    name: str  # for messages and for the record: the path below the input
    label: int  # -1 where only the TFDS dataset's record says it
    split: str = ''  # of a TFDS dataset


class Listing(NamedTuple):
    """The images of a raw input; labels are places in `class_names`."""

    splits: dict[str, list[Ref]]
    class_names: tuple[str, ...]


class _Found(NamedTuple):
    """An image before the classes are numbered."""

    ref: Ref
    split: str
    class_name: str


def find(path: str) -> Listing:
    """Lists an input's images by split, in a fixed order.

    Args:
      path: `ILSVRC2012_img_train.tar` or `_val.tar`; a folder with one or both, or with what they were extracted to; a
        folder of SPLIT/CLASS/images or CLASS/images (then all are train); or `tfds:NAME`.

    Raises:
      UserError: nothing of the kind is there.
    """
    if path.startswith(_TFDS):
        return _tfds(path)
    if not os.path.exists(path):
        raise UserError(f'there is no input {path!r}; expected an ImageNet archive, an image folder or tfds:NAME.')
    if os.path.isfile(path):
        found = list(_archive(path))
        official = True
    else:
        found = list(_folder(path))
        official = any(f.ref.path.endswith('.tar') or f.ref.name.startswith(_VAL_PREFIX) for f in found)
    if not found:
        raise UserError(
            f'{path!r} holds no images; expected {_TRAIN_TAR}, {_VAL_TAR}, SPLIT/CLASS/*.jpg or CLASS/*.jpg '
            f'({", ".join(images.SUFFIXES)}).'
        )
    _refuse_doubles(found)
    class_names = imagenet_classes() if official else tuple(sorted({f.class_name for f in found}))
    numbers = {name: i for i, name in enumerate(class_names)}
    trained = {f.class_name for f in found if f.split == 'train'}
    splits = {}
    for ref, split, class_name in found:
        if class_name not in numbers:
            raise UserError(
                f'{ref.name!r} is of class {class_name!r}, which is none of the {len(numbers)} of ILSVRC-2012.'
            )
        if trained and not official and class_name not in trained:
            raise UserError(f'{ref.name!r} is of class {class_name!r}, which has no training images.')
        splits.setdefault(split, []).append(ref._replace(label=numbers[class_name]))
    return Listing({name: sorted(splits[name], key=lambda r: r.name) for name in sorted(splits)}, class_names)


def _refuse_doubles(found: list[_Found]) -> None:
    """An archive beside what it was extracted to would count every image twice."""
    for split in {f.split for f in found}:
        places = {f.ref.path.endswith('.tar'): f.ref.path for f in found if f.split == split}
        if len(places) == 2:
            raise UserError(
                f'the {split} images are there both in archives ({places[True]}) and as files ({places[False]}); '
                'give one of the two.'
            )


def read(ref: Ref) -> tuple[bytes | np.ndarray, int]:
    """An image's bytes, or its pixels where a TFDS dataset holds them unencoded; and its label.

    Raises:
      OSError, ValueError: it cannot be read, see `images.read`.
    """
    if ref.path.startswith(_TFDS):
        try:
            record = _tfds_source(ref.path, ref.split)[ref.offset]
        except Exception:  # array_record says the same of a damaged record and of a file that is gone
            for file in _tfds_builder(ref.path).info.splits[ref.split].filepaths:
                open(file, 'rb').close()
            raise
        return record['image'], int(record['label'])
    return images.read(ref.path, ref.offset, ref.length), ref.label


def imagenet_classes() -> tuple[str, ...]:
    """The 1,000 WordNet ids of ILSVRC-2012 in the order of their labels, from the list that ships with TFDS."""
    return _shipped_lines('labels.txt')


def _shipped_lines(name: str) -> tuple[str, ...]:
    import tensorflow_datasets as tfds

    return tuple(tfds.core.tfds_path(f'datasets/imagenet2012/{name}').read_text().split())


@functools.cache
def _validation_classes() -> tuple[str, ...]:
    """Class of ILSVRC2012_val_00000001.JPEG, and so on."""
    return _shipped_lines('validation_labels.txt')


def _validation_class(name: str) -> str:
    number = name.removeprefix(_VAL_PREFIX).split('.')[0]
    # The length: int() takes no number of thousands of digits.
    if not (number.isdecimal() and len(number) <= 8 and 1 <= int(number) <= len(_validation_classes())):
        raise UserError(
            f'{name!r} is no image of the ILSVRC-2012 validation set; expected {_VAL_PREFIX}00000001.JPEG ...'
        )
    return _validation_classes()[int(number) - 1]


def _archive(path: str) -> Iterator[_Found]:
    """The official archives: train holds an archive for each class, val holds images."""
    name = os.path.basename(path)
    if name not in (_TRAIN_TAR, _VAL_TAR) and not _is_class_tar(name):
        raise UserError(f'{path!r} is not {_TRAIN_TAR} or {_VAL_TAR}; extract other archives and give the folder.')
    try:
        with open(path, 'rb') as file:
            for member in _members(_Window(file, 0, os.path.getsize(path))):
                if not member.isfile():
                    continue
                start = member.offset_data
                if _is_class_tar(member.name):
                    for image in _members(_Window(file, start, member.size)):
                        if image.isfile():
                            yield _member(path, start + image.offset_data, image, 'train', _stem(member.name))
                elif _is_class_tar(name):
                    yield _member(path, start, member, 'train', _stem(name))
                elif name == _VAL_TAR:
                    yield _member(path, start, member, 'val', _validation_class(os.path.basename(member.name)))
    except UserError:
        raise
    except Exception as error:  # tarfile: of headers that make no sense any kind
        raise UserError(f'{path!r} is no readable archive: {str(error) or type(error).__name__}.') from error


class _Window:
    """A part of a file, as tarfile reads it: in small pieces, but where a header asks it for more."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self._file, self._start, self._size, self._position = file, start, size, 0

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        self._position = position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f'a header at byte {self._position} declares {size} bytes for itself')
        if self._position >= self._size:  # a file may be unable to go there
            return b''
        self._file.seek(self._start + self._position)
        content = self._file.read(min(size, self._size - self._position))
        self._position += len(content)
        return content


def _members(window: _Window) -> Iterator[tarfile.TarInfo]:
    """The entries of an archive. Raises an error where it is damaged; tarfile alone would take that for the end."""
    with tarfile.open(fileobj=window, mode='r:') as archive:
        for member in archive:
            if member.size < 0 or archive.offset <= member.offset:  # it would lead back, and round in a circle
                raise tarfile.ReadError(f'the header at byte {member.offset} declares {member.size} bytes')
            yield member
        window.seek(archive.offset)
        zeros = 0
        while content := window.read(_LONGEST_HEADER):
            zeros += len(content)
            if content.strip(b'\0') or zeros > _LONGEST_END:
                raise tarfile.ReadError(f'at byte {archive.offset} it is damaged')
        if not zeros:
            raise tarfile.ReadError(f'after {archive.offset} bytes it is cut short')


def _member(path: str, start: int, image: tarfile.TarInfo, split: str, class_name: str) -> _Found:
    return _Found(Ref(path, start, image.size, text(os.path.basename(image.name)), -1), split, class_name)


def _is_class_tar(name: str) -> bool:
    stem = _stem(name)
    return name.endswith('.tar') and stem.startswith('n') and stem[1:].isdigit()


def _stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0]


def _folder(path: str) -> Iterator[_Found]:
    tars = [entry for entry in images.entries(path) if entry.is_file() and entry.name.endswith('.tar')]
    for entry in tars:
        if entry.name in (_TRAIN_TAR, _VAL_TAR) or _is_class_tar(entry.name):
            yield from _archive(entry.path)
    folders = [entry for entry in images.entries(path) if entry.is_dir()]
    splits = [entry for entry in folders if _split_of(entry.name) and _holds_classes(entry.path)]
    for entry in splits:
        yield from _split_folder(entry.path, path, _split_of(entry.name))
    if not splits:
        yield from _split_folder(path, path, None)
        return
    if len(splits) < len(folders):
        others = ', '.join(entry.name for entry in folders if entry not in splits)
        print(f'not splits, and so left out: {others}', file=sys.stderr, flush=True)
    _tell_loose(path, sum(entry.is_file() and images.is_image(entry.name) for entry in images.entries(path)))


def _holds_classes(folder: str) -> bool:
    """Whether a folder called like a split is one (it may be a class called so, with images in it)."""
    return any(e.is_dir() or _is_class_tar(e.name) or e.name.startswith(_VAL_PREFIX) for e in images.entries(folder))


def _split_of(folder: str) -> str | None:
    """'train' of 'train' or 'ILSVRC2012_img_train'; None of any other name."""
    return _SPLITS.get(folder.lower().removeprefix('ilsvrc2012_img_'))


def _split_folder(folder: str, root: str, split: str | None) -> Iterator[_Found]:
    """CLASS/**/images, archives of one class each, or the flat validation set of ILSVRC-2012."""
    empty, loose = [], 0
    for entry in images.entries(folder):
        if entry.is_dir():
            image = None
            for image in images.below(entry.path):
                yield _file(image, root, split or 'train', entry.name)
            empty += [] if image else [entry.name]
        elif entry.name.startswith(_VAL_PREFIX) and images.is_image(entry.name):
            yield _file(entry.path, folder, split or 'val', _validation_class(entry.name))
        elif split == 'train' and _is_class_tar(entry.name):
            yield from _archive(entry.path)
        else:
            loose += images.is_image(entry.name)
    _tell_loose(folder, loose)
    if empty:
        names = ', '.join(empty)
        print(f'without images ({", ".join(images.SUFFIXES)}), and so left out: {names}', file=sys.stderr, flush=True)


def _tell_loose(folder: str, count: int) -> None:
    if count:
        print(f'in no class folder, and so left out: {count} images in {folder}', file=sys.stderr, flush=True)


def _file(path: str, root: str, split: str, class_name: str) -> _Found:
    return _Found(Ref(path, 0, -1, text(os.path.relpath(path, root)), -1), split, text(class_name))


def text(name: str) -> str:
    """A file name as valid UTF-8: what is not is replaced."""
    return os.fsencode(name).decode('utf-8', 'replace')


def _tfds(path: str) -> Listing:
    builder = _tfds_builder(path)
    for name in ('image', 'label'):
        if name not in builder.info.features:
            raise UserError(f"{path} has no feature {name!r}; expected a dataset with 'image' and 'label'.")
    splits = {}
    for name, info in builder.info.splits.items():
        split = _SPLITS.get(name)
        if split is None or not info.num_examples:
            continue
        if _tfds_source(path, name)[0]['label'] >= 0:  # ImageNet's test images have none
            splits[split] = [Ref(path, i, -1, f'{name}/{i}', -1, name) for i in range(info.num_examples)]
    if not splits:
        raise UserError(f'{path} has none of the splits {", ".join(sorted(_SPLITS))} with labels.')
    return Listing(splits, tuple(builder.info.features['label'].names))


@functools.cache
def _tfds_builder(path: str):
    """The dataset, generated before or, where TensorFlow is installed, now."""
    import tensorflow_datasets as tfds

    name = path.removeprefix(_TFDS)
    try:
        builder = tfds.builder(name, file_format='array_record')
    except Exception as error:  # TFDS: unknown names, bad configs and versions, each its own kind
        raise UserError(f'{path} cannot be opened: {first_line(error)}') from error
    if not builder.info.splits:
        try:
            import tensorflow  # noqa: F401
        except ImportError:
            raise UserError(
                f'{path} is not there in the array_record format ({builder.data_dir}); generating it takes TensorFlow: '
                f'pip install tensorflow, or generate it elsewhere and set TFDS_DATA_DIR.'
            ) from None
        builder.download_and_prepare(file_format='array_record')
    return builder


@functools.cache
def _tfds_source(path: str, split: str):
    import tensorflow_datasets as tfds

    builder = _tfds_builder(path)
    encoded = isinstance(builder.info.features['image'], tfds.features.Image)
    decoders = {'image': tfds.decode.SkipDecoding()} if encoded else None
    return builder.as_data_source(split, decoders=decoders)
