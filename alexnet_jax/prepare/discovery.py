"""Lists and reads raw images: of an archive, an image folder, parquet files or a TFDS dataset.

Archives are not unpacked: processes read each member at its offset in the uncompressed archive.
"""

import dataclasses
import os
import unicodedata
from collections.abc import Collection, Iterator

import numpy as np
from absl import logging

from alexnet_jax.data import image_files, image_io
from alexnet_jax.data.imagenet_classes import wordnet_ids
from alexnet_jax.prepare import ground_truth, label_files, parquet, split_folders, tar, tfds
from alexnet_jax.prepare.class_lists import CLASS_LISTS, in_label_order
from alexnet_jax.prepare.image_ref import ImageRef, Listing
from alexnet_jax.utils.errors import UserError, listed
from alexnet_jax.utils.files import as_path, as_utf8

_ANNOTATIONS = 'val_annotations.txt'  # of Tiny ImageNet: NAME<tab>CLASS<tab>... for the images in images/


@dataclasses.dataclass
class _Search:
    """A search for images in a folder."""

    root: str  # the input
    counts: image_files.FileCounts
    nested_classes: bool = False
    all_classes: tuple[str, ...] = ()  # if known, as for ILSVRC-2010: classes without an image keep their labels


def find_images(path: str, *, labels: str | os.PathLike | None = None, nested_classes: bool = False) -> Listing:
    """Lists the images at `path` by split, in a fixed order. Raises UserError for unsupported or empty inputs.

    Logs which folders are which splits, and counts what is skipped. Labels follow the names of the classes in
    alphabetical order, or in numerical order if all are numbers.

    Args:
      path: `ILSVRC2012_img_train.tar` or `ILSVRC2012_img_val.tar`; a folder with one or both, or with their extracted
        contents; a folder of SPLIT/CLASS/images or CLASS/images (all in the train split), which other folders may wrap;
        a parquet file or a folder of such files, see `parquet.list_images`; or `tfds:NAME`.
      labels: a table of the classes of the images in a folder, see `label_files.list_images`.
      nested_classes: whether classes are in groups, as in GROUP/CLASS/images. The name of a class is then the path of
        the folder that holds its images, relative to the split: 'GROUP/CLASS'.
    """
    if labels and nested_classes:
        raise UserError('--nested_classes: the classes are those of --labels; use one of the two.')
    flag = f'--labels={as_path(labels)!r}' if labels else '--nested_classes' if nested_classes else ''
    files = [] if flag else _parquet_files(path)
    if flag and (path.startswith(tfds.PREFIX) or os.path.isfile(path)):
        raise UserError(f'{flag}: expected a folder of images as the input, got {path!r}.')
    if path.startswith(tfds.PREFIX):
        listing = tfds.list_images(path)
    elif files:
        listing = parquet.list_images(path, files)
    else:
        listing = _list_images(path, as_path(labels) if labels else None, nested_classes)
    if len(listing.class_names) < 2:
        raise UserError(
            f'{path!r}: expected at least two classes, got only {listing.class_names[0]!r}; use the folder that '
            'contains the class folders (are they one level further up or down?), --nested_classes if they are in '
            'groups, or --labels=FILE if a table names the classes.'
        )
    return listing


def _parquet_files(path: str) -> list[str]:
    """Returns the parquet files of an input that holds no image files."""
    if not os.path.exists(path) or (os.path.isdir(path) and any(True for _ in image_files.iter_image_files(path))):
        return []
    return parquet.list_files(path)


def _list_images(path: str, labels_file: str | None, nested_classes: bool) -> Listing:
    """Lists the images of an archive or a folder."""
    if not os.path.exists(path):
        raise UserError(
            f'input {path!r} does not exist; expected an ImageNet archive, an image folder, parquet files or tfds:NAME.'
        )
    folder, counts = path, image_files.FileCounts()
    search = _Search(path, counts, nested_classes)
    if labels_file:
        images = label_files.list_images(path, labels_file, counts)
        counts.log(path)
    elif os.path.isfile(path):
        images = list(tar.list_images(path))
    else:
        folder = split_folders.data_folder(path)
        if folder != path:
            logging.info('reading the images in %s', as_utf8(folder))
            _count_stray_files(path, image_files.partition(image_files.list_entries(path, counts))[1], counts)
        images = list(_list_folder(folder, search))
        counts.log(path)
    official = not labels_file and any(
        ref.path.endswith('.tar') or ref.name.startswith(tar.VAL_PREFIX) for ref, _ in images
    )
    if not images:
        if os.path.isdir(path) and any(True for _ in image_files.iter_image_files(path)):
            raise UserError(
                f'{path!r}: the images are in no class folders; expected SPLIT/CLASS/*.jpg or CLASS/*.jpg, or give '
                '--labels=FILE, a table of their classes.'
            )
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
    all_classes = wordnet_ids() if official else search.all_classes
    class_names = all_classes or in_label_order({class_name for _, class_name in images})
    challenge = f'ILSVRC-{2012 if official else 2010}'
    labels = {name: i for i, name in enumerate(class_names)}
    train_classes = {class_name for ref, class_name in images if ref.split == 'train'}
    splits: dict[str, list[ImageRef]] = {}
    for ref, class_name in images:
        if class_name not in labels:
            raise UserError(f'{ref.name!r}: class {class_name!r} is not one of the {len(labels)} of {challenge}.')
        if train_classes and not all_classes and class_name not in train_classes:
            raise UserError(f'{ref.name!r}: class {class_name!r} has no training images.')
        splits.setdefault(ref.split, []).append(ref._replace(label=labels[class_name]))
    ordered = {name: sorted(splits[name], key=lambda r: r.name) for name in sorted(splits)}
    return Listing(ordered, class_names, folder, bool(labels_file))


def _list_folder(path: str, search: _Search) -> Iterator[tuple[ImageRef, str]]:
    """Yields (image, class name) for the images below a folder. Warns about skipped images and folders."""
    folders, files = image_files.partition(image_files.list_entries(path))
    for file in files:
        if tar.is_archive(file.name) and os.path.isfile(file.path):
            yield from tar.list_images(file.path)
    splits = split_folders.find_splits(folders)
    if not splits:
        split_folders.check_not_flat(path, folders)
        yield from _list_split(path, None, search)
        return
    split_folders.log_splits(search.root, splits)
    split_folders.warn_of_links([entry for entry, _ in splits])
    image_files.list_entries(path, search.counts)  # counts what is left out; `_list_split` does so for other folders
    train_classes: set[str] = set()
    # Training images first: they tell whether a folder of another split is a class.
    for entry, split in sorted(splits, key=lambda item: item[1] != 'train'):
        parent = split_folders.class_parent(entry.path)
        for ref, class_name in _list_split(parent, split, search, train_classes):
            if ref.split == 'train':
                train_classes.add(class_name)
            yield ref, class_name
    split_entries = {entry for entry, _ in splits}
    if others := [entry for entry in folders if entry not in split_entries]:
        numbers = [sum(1 for _ in image_files.iter_image_files(entry.path)) for entry in others]
        named = [f'{as_utf8(entry.name)} ({number} images)' for entry, number in zip(others, numbers, strict=True)]
        logging.warning('skipped %d folders that are not splits with class folders: %s', len(others), listed(named, 10))
    _count_stray_files(path, [file for file in files if not tar.is_archive(file.name)], search.counts)


def _list_split(
    folder: str, split: str | None, search: _Search, train_classes: Collection[str] = ()
) -> Iterator[tuple[ImageRef, str]]:
    """Yields (image, class name) from CLASS/**/images, one-class archives, or a flat folder with a ground truth."""
    folders, files = image_files.partition(image_files.list_entries(folder, search.counts))
    only = folders[0] if len(folders) == 1 and split else None
    if only and os.path.isfile(os.path.join(folder, _ANNOTATIONS)):
        yield from _list_annotated(folder, only.path, split, search)
        return
    is_class = split == 'train' or not only or only.name in train_classes
    if only and not is_class and split_folders.is_generic(only.name, os.path.basename(folder)):
        count = sum(1 for _ in image_files.iter_image_files(only.path))
        logging.warning(
            'skipped the %s split: nothing says the classes of the %d images in %s', split, count, only.path
        )
        return
    yield from _list_classes(folders, split or 'train', search)
    flat = [file for file in files if file.name.startswith(ground_truth.PREFIXES)]
    flat = [file for file in flat if image_files.is_image(file, image_files.FileCounts())]
    classes, known = ground_truth.classes_of(folder, [file.name for file in flat])
    search.all_classes = tuple(sorted({*search.all_classes, *known}))
    for file in flat:
        if file.name in classes:
            yield _ref(file.path, folder, split or ground_truth.split_of(file.name)), classes[file.name]
    stray, flat_names = [], {file.name for file in flat}
    for file in files:
        if file.name in flat_names:  # those without a class have been counted
            continue
        if split and tar.is_archive(file.name) and (split == 'train' or not tar.class_of_tar(file.name)):
            yield from tar.list_images(file.path)
        elif split or not tar.is_archive(file.name):  # those of the root have been read
            stray.append(file)
    _count_stray_files(folder, stray, search.counts)


def _list_classes(folders, split: str, search: _Search) -> Iterator[tuple[ImageRef, str]]:
    """Yields (image, class name) from CLASS/**/images. Names are compared in Unicode's normal form NFC.

    With nested classes, the class is the folder that holds the image.
    """
    empty: list[str] = []
    groups: list[str] = []
    folder_of: dict[str, str] = {}  # by class name
    split_folders.warn_of_links(folders)
    for entry in folders:
        paths = list(image_files.iter_image_files(entry.path, search.counts))
        if not paths:
            empty.append(as_utf8(entry.name))
        parent = os.path.dirname(entry.path)
        by_path: dict[str, list[str]] = {}
        for path in paths:
            by_path.setdefault(os.path.dirname(path), []).append(path)
        by_folder = {os.path.relpath(path, parent): members for path, members in by_path.items()}
        if len(by_folder) > 1 and (not search.nested_classes or entry.name in by_folder):
            groups.append(entry.name)
        if not search.nested_classes:
            by_folder = {entry.name: paths} if paths else {}
        for folder, members in by_folder.items():
            name = _class_name(os.path.join(parent, folder), folder, folder_of)
            yield from ((_ref(image, search.root, split), name) for image in members)
    if empty:
        suffixes = ', '.join(image_io.suffixes())
        logging.warning('skipped %d folders without images (%s): %s', len(empty), suffixes, listed(empty, 10))
    if groups:
        logging.warning(
            '%d class folders hold images in several folders, such as %s: %s.',
            *(len(groups), as_utf8(groups[0]), _GROUPS[search.nested_classes]),
        )


_GROUPS = ('each is one class; with --nested_classes, every folder of images is one', 'each also is a class of its own')


def _class_name(path: str, folder: str, folder_of: dict[str, str]) -> str:
    """Returns the class name of a folder, and notes it in `folder_of`. Raises UserError if another folder has it."""
    name = unicodedata.normalize('NFC', as_utf8(folder))
    if as_utf8(folder) != folder:
        logging.warning('the name of the folder %r is not UTF-8; its class is %r.', path, name)
    other = folder_of.setdefault(name, folder)
    if other != folder:
        if as_utf8(folder) != folder or as_utf8(other) != other:
            raise UserError(f'{path!r}: another folder has the same class name {name!r}; rename one of them.')
        logging.warning('two folders are the class %r: %r and %r.', name, other, folder)
    return name


def _list_annotated(folder: str, images: str, split: str | None, search: _Search) -> Iterator[tuple[ImageRef, str]]:
    """Yields (image, class name) for a split of Tiny ImageNet whose classes are in `val_annotations.txt`."""
    with open(os.path.join(folder, _ANNOTATIONS), encoding='utf-8-sig', errors='replace') as file:
        classes = {cells[0]: cells[1].strip() for line in file if len(cells := line.split('\t')) > 1}
    missing, num_unlabeled = set(classes), 0
    for path in image_files.iter_image_files(images, search.counts):
        name = os.path.basename(path)
        missing.discard(name)
        if name in classes:
            yield _ref(path, search.root, split or 'val'), classes[name]
        else:
            num_unlabeled += 1
    if num_unlabeled or missing:
        logging.warning(
            '%s: %d images are not in %s and are skipped; %d of its files are missing.',
            *(images, num_unlabeled, _ANNOTATIONS, len(missing)),
        )


def _count_stray_files(folder: str, files: list[os.DirEntry], counts: image_files.FileCounts) -> None:
    """Counts files outside class folders, and warns of images among them."""
    count = sum(
        image_files.is_image(file, counts)
        for file in files
        if file.name not in (_ANNOTATIONS, ground_truth.KAGGLE_LIST, *CLASS_LISTS)
    )
    if count:
        logging.warning('skipped %d images outside class folders in %s', count, folder)


def _ref(path: str, root: str, split: str) -> ImageRef:
    return ImageRef(path, 0, -1, as_utf8(image_files.relative_to(root, path)), -1, split)


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
    if ref.path.startswith(parquet.PREFIX):
        return parquet.read_image(ref), ref.label
    return image_io.read_bytes(ref.path, ref.offset, ref.length), ref.label
