"""Lists and reads raw images: of an archive, an image folder or a TFDS dataset.

Archives are not unpacked: processes read each member at its offset in the uncompressed archive.
"""

import os
import unicodedata
from collections.abc import Collection, Iterator

import numpy as np
from absl import logging

from alexnet_jax.data import image_io
from alexnet_jax.data.imagenet_classes import are_numbers, wordnet_ids
from alexnet_jax.prepare import split_folders, tar, tfds
from alexnet_jax.prepare.class_lists import CLASS_LISTS
from alexnet_jax.prepare.image_ref import ImageRef, Listing
from alexnet_jax.utils.errors import UserError
from alexnet_jax.utils.files import as_utf8

_ANNOTATIONS = 'val_annotations.txt'  # of Tiny ImageNet: NAME<tab>CLASS<tab>... for the images in images/


def find_images(path: str) -> Listing:
    """Lists the images at `path` by split, in a fixed order. Raises UserError for unsupported or empty inputs.

    path: `ILSVRC2012_img_train.tar` or `ILSVRC2012_img_val.tar`; a folder with one or both, or with their extracted
    contents; a folder of SPLIT/CLASS/images or CLASS/images (all in the train split), which other folders may wrap; or
    `tfds:NAME`. Logs which folders are which splits, and counts what is skipped.
    """
    listing = tfds.list_images(path) if path.startswith(tfds.PREFIX) else _list_images(path)
    if len(listing.class_names) < 2:
        raise UserError(
            f'{path!r}: expected at least two classes, got only {listing.class_names[0]!r}; use the folder that '
            'contains the class folders (are they one level further up or down?).'
        )
    return listing


def _list_images(path: str) -> Listing:
    """Lists the images of an archive or a folder."""
    if not os.path.exists(path):
        raise UserError(f'input {path!r} does not exist; expected an ImageNet archive, an image folder or tfds:NAME.')
    folder, counts = path, image_io.FileCounts()
    if os.path.isfile(path):
        images = list(tar.list_images(path))
    else:
        folder = split_folders.data_folder(path)
        if folder != path:
            logging.info('reading the images in %s', as_utf8(folder))
            _count_stray_files(path, [e for e in image_io.list_entries(path) if not image_io.is_folder(e)], counts)
        images = list(_list_folder(folder, path, counts))
        counts.log(path)
    official = any(ref.path.endswith('.tar') or ref.name.startswith(tar.VAL_PREFIX) for ref, _ in images)
    if not images:
        raise UserError(
            f'{path!r} contains no images; expected {tar.TRAIN_TAR}, {tar.VAL_TAR}, SPLIT/CLASS/*.jpg or CLASS/*.jpg '
            f'({", ".join(image_io.suffixes())}).'
        )
    for split in {ref.split for ref, _ in images}:  # images must not count twice
        paths = {ref.path.endswith('.tar'): ref.path for ref, _ in images if ref.split == split}
        if len(paths) == 2:
            raise UserError(
                f'the {split} images exist both in archives ({paths[True]}) and as files ({paths[False]}); '
                'remove one of the two from the input.'
            )
    class_names = wordnet_ids() if official else in_label_order({class_name for _, class_name in images})
    labels = {name: i for i, name in enumerate(class_names)}
    train_classes = {class_name for ref, class_name in images if ref.split == 'train'}
    splits: dict[str, list[ImageRef]] = {}
    for ref, class_name in images:
        if class_name not in labels:
            raise UserError(f'{ref.name!r}: class {class_name!r} is not one of the {len(labels)} of ILSVRC-2012.')
        if train_classes and not official and class_name not in train_classes:
            raise UserError(f'{ref.name!r}: class {class_name!r} has no training images.')
        splits.setdefault(ref.split, []).append(ref._replace(label=labels[class_name]))
    ordered = {name: sorted(splits[name], key=lambda r: r.name) for name in sorted(splits)}
    return Listing(ordered, class_names, folder)


def in_label_order(class_names: set[str]) -> tuple[str, ...]:
    """Sorts class names. If all are numbers, as in ImageNet-V2, sorts them by value: '2' comes before '10'."""
    names = tuple(sorted(class_names))
    if not are_numbers(names) or names == (by_value := tuple(sorted(names, key=lambda name: (int(name), name)))):
        return names
    logging.info('all class names are numbers: labels follow their values (%s, ...).', ', '.join(by_value[:3]))
    return by_value


def _list_folder(path: str, root: str, counts: image_io.FileCounts) -> Iterator[tuple[ImageRef, str]]:
    """Yields (image, class name) for the images below a folder. Warns about skipped images and folders."""
    entries = image_io.list_entries(path)
    for entry in entries:
        if tar.is_archive(entry.name) and os.path.isfile(entry.path):
            yield from tar.list_images(entry.path)
    folders = [entry for entry in entries if image_io.is_folder(entry)]
    splits = split_folders.find_splits(folders)
    if not splits:
        split_folders.check_not_flat(path, folders)
        yield from _list_split(path, root, None, counts)
        return
    split_folders.log_splits(root, splits)
    train_classes: set[str] = set()
    # Training images first: they tell whether a folder of another split is a class.
    for entry, split in sorted(splits, key=lambda item: item[1] != 'train'):
        parent = split_folders.class_parent(entry.path)
        for ref, class_name in _list_split(parent, root, split, counts, train_classes):
            if ref.split == 'train':
                train_classes.add(class_name)
            yield ref, class_name
    if others := [entry for entry in folders if entry not in [split for split, _ in splits]]:
        numbers = [sum(1 for _ in image_io.iter_image_files(entry.path)) for entry in others]
        listed = [f'{as_utf8(entry.name)} ({number} images)' for entry, number in zip(others, numbers, strict=True)]
        logging.warning('skipped folders that are not splits with class folders: %s', ', '.join(listed))
    files = [entry for entry in entries if entry not in folders and not tar.is_archive(entry.name)]
    _count_stray_files(path, files, counts)


def _list_split(
    folder: str, root: str, split: str | None, counts: image_io.FileCounts, train_classes: Collection[str] = ()
) -> Iterator[tuple[ImageRef, str]]:
    """Yields (image, class name) from CLASS/**/images, one-class archives, or the images of the ILSVRC-2012 val set."""
    entries = image_io.list_entries(folder, counts)
    folders = [entry for entry in entries if image_io.is_folder(entry)]
    only = folders[0] if len(folders) == 1 and split else None
    if only and os.path.isfile(os.path.join(folder, _ANNOTATIONS)):
        yield from _list_annotated(folder, only.path, root, split, counts)
        return
    is_class = split == 'train' or not only or only.name in train_classes
    if only and not is_class and split_folders.is_generic(only.name, os.path.basename(folder)):
        count = sum(1 for _ in image_io.iter_image_files(only.path))
        logging.warning(
            'skipped the %s split: nothing says the classes of the %d images in %s', split, count, only.path
        )
        return
    yield from _list_classes(folders, root, split or 'train', counts)
    stray = []
    for entry in entries:
        if entry.name.startswith(tar.VAL_PREFIX) and image_io.is_image(entry, image_io.FileCounts()):
            yield _ref(entry.path, folder, split or 'val'), tar.validation_class(entry.name)
        elif split and tar.is_archive(entry.name) and (split == 'train' or not tar.class_of_tar(entry.name)):
            yield from tar.list_images(entry.path)
        elif entry not in folders and (split or not tar.is_archive(entry.name)):  # those of the root have been read
            stray.append(entry)
    _count_stray_files(folder, stray, counts)


def _list_classes(folders, root: str, split: str, counts: image_io.FileCounts) -> Iterator[tuple[ImageRef, str]]:
    """Yields (image, class name) from CLASS/**/images. Names are compared in Unicode's normal form NFC."""
    empty: list[str] = []
    folder_of: dict[str, str] = {}  # by class name
    for entry in folders:
        name = unicodedata.normalize('NFC', as_utf8(entry.name))
        paths = list(image_io.iter_image_files(entry.path, counts))
        if not paths:
            empty.append(name)
            continue
        if as_utf8(entry.name) != entry.name:
            logging.warning('the name of the folder %r is not UTF-8; its class is %r.', entry.path, name)
        other = folder_of.setdefault(name, entry.name)
        if other != entry.name:
            if as_utf8(entry.name) != entry.name or as_utf8(other) != other:
                raise UserError(f'{entry.path!r}: another folder has the same class name {name!r}; rename one of them.')
            logging.warning('two folders are the class %r: %r and %r.', name, other, entry.name)
        yield from ((_ref(image, root, split), name) for image in paths)
    if empty:
        logging.warning(f'skipped folders without images ({", ".join(image_io.suffixes())}): {", ".join(empty)}')


def _list_annotated(
    folder: str, images: str, root: str, split: str | None, counts: image_io.FileCounts
) -> Iterator[tuple[ImageRef, str]]:
    """Yields (image, class name) for a split of Tiny ImageNet whose classes are in `val_annotations.txt`."""
    with open(os.path.join(folder, _ANNOTATIONS), encoding='utf-8-sig', errors='replace') as file:
        classes = {cells[0]: cells[1].strip() for line in file if len(cells := line.split('\t')) > 1}
    found = {os.path.basename(path): path for path in image_io.iter_image_files(images, counts)}
    for name, path in found.items():
        if name in classes:
            yield _ref(path, root, split or 'val'), classes[name]
    unlabeled, missing = found.keys() - classes.keys(), classes.keys() - found.keys()
    if unlabeled or missing:
        logging.warning(
            '%s: %d images are not in %s and are skipped; %d of its files are missing.',
            *(images, len(unlabeled), _ANNOTATIONS, len(missing)),
        )


def _count_stray_files(folder: str, files: list[os.DirEntry], counts: image_io.FileCounts) -> None:
    """Counts files outside class folders, and warns of images among them."""
    count = sum(image_io.is_image(file, counts) for file in files if file.name not in (_ANNOTATIONS, *CLASS_LISTS))
    if count:
        logging.warning('skipped %d images outside class folders in %s', count, folder)


def _ref(path: str, root: str, split: str) -> ImageRef:
    return ImageRef(path, 0, -1, as_utf8(os.path.relpath(path, root)), -1, split)


def read_image(ref: ImageRef) -> tuple[bytes | np.ndarray, int]:
    """Returns (file bytes, or pixels for some TFDS datasets; label). Raises the errors of `image_io.read_bytes`."""
    if ref.path.startswith(tfds.PREFIX):
        try:
            record = tfds.open_source(ref.path, ref.split)[ref.offset]
        except Exception:  # array_record does not distinguish a damaged record from a missing file
            for file in tfds.open_builder(ref.path).info.splits[ref.split].filepaths:
                open(file, 'rb').close()  # raises OSError for a missing file
            raise
        return record['image'], int(record['label'])
    return image_io.read_bytes(ref.path, ref.offset, ref.length), ref.label
