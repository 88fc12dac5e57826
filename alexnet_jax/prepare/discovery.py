"""Lists and reads raw images: of an archive, an image folder or a TFDS dataset.

Archives are not unpacked: processes read each member at its offset in the uncompressed archive.
"""

import os
from collections.abc import Iterator

import numpy as np
from absl import logging

from alexnet_jax.data import image_io
from alexnet_jax.data.imagenet_classes import are_numbers, wordnet_ids
from alexnet_jax.prepare import tar, tfds
from alexnet_jax.prepare.image_ref import SPLIT_NAMES, ImageRef, Listing
from alexnet_jax.utils.errors import UserError
from alexnet_jax.utils.files import as_utf8


def find_images(path: str) -> Listing:
    """Lists the images at `path` by split, in a fixed order. Raises UserError for unsupported or empty inputs.

    path: `ILSVRC2012_img_train.tar` or `ILSVRC2012_img_val.tar`; a folder with one or both, or with their extracted
    contents; a folder of SPLIT/CLASS/images or CLASS/images (all in the train split); or `tfds:NAME`.
    """
    if path.startswith(tfds.PREFIX):
        return tfds.list_images(path)
    if not os.path.exists(path):
        raise UserError(f'input {path!r} does not exist; expected an ImageNet archive, an image folder or tfds:NAME.')
    images = list(tar.list_images(path) if os.path.isfile(path) else _list_folder(path))
    official = any(ref.path.endswith('.tar') or ref.name.startswith(tar.VAL_PREFIX) for ref, _ in images)
    if not images:
        raise UserError(
            f'{path!r} contains no images; expected {tar.TRAIN_TAR}, {tar.VAL_TAR}, SPLIT/CLASS/*.jpg or CLASS/*.jpg '
            f'({", ".join(image_io.SUFFIXES)}).'
        )
    for split in {ref.split for ref, _ in images}:  # images must not count twice
        paths = {ref.path.endswith('.tar'): ref.path for ref, _ in images if ref.split == split}
        if len(paths) == 2:
            raise UserError(
                f'the {split} images exist both in archives ({paths[True]}) and as files ({paths[False]}); '
                'remove one of the two from the input.'
            )
    class_names = wordnet_ids() if official else _in_label_order({class_name for _, class_name in images})
    labels = {name: i for i, name in enumerate(class_names)}
    train_classes = {class_name for ref, class_name in images if ref.split == 'train'}
    splits: dict[str, list[ImageRef]] = {}
    for ref, class_name in images:
        if class_name not in labels:
            raise UserError(f'{ref.name!r}: class {class_name!r} is not one of the {len(labels)} of ILSVRC-2012.')
        if train_classes and not official and class_name not in train_classes:
            raise UserError(f'{ref.name!r}: class {class_name!r} has no training images.')
        splits.setdefault(ref.split, []).append(ref._replace(label=labels[class_name]))
    return Listing({name: sorted(splits[name], key=lambda r: r.name) for name in sorted(splits)}, class_names)


def _in_label_order(class_names: set[str]) -> tuple[str, ...]:
    """Sorts class names. If all are numbers, as in ImageNet-V2, sorts them by value: '2' comes before '10'."""
    names = tuple(sorted(class_names))
    if not are_numbers(names) or names == (by_value := tuple(sorted(names, key=lambda name: (int(name), name)))):
        return names
    logging.info('all class names are numbers: labels follow their values (%s, ...).', ', '.join(by_value[:3]))
    return by_value


def _list_folder(path: str) -> Iterator[tuple[ImageRef, str]]:
    """Yields (image, class name) for the images below a folder. Warns about skipped images and folders."""
    entries = image_io.list_entries(path)
    for entry in entries:
        if entry.is_file() and (entry.name in (tar.TRAIN_TAR, tar.VAL_TAR) or tar.class_of_tar(entry.name)):
            yield from tar.list_images(entry.path)
    folders = [entry for entry in entries if entry.is_dir()]
    splits = [entry for entry in folders if _split_name(entry.name) and _holds_classes(entry.path)]
    for entry in splits:
        yield from _list_split(entry.path, path, _split_name(entry.name))
    if not splits:
        yield from _list_split(path, path, None)
        return
    if others := [entry.name for entry in folders if entry not in splits]:
        logging.warning('skipped folders that are not splits: %s', ', '.join(others))
    _warn_of_stray_images(path, sum(entry.is_file() and image_io.is_image(entry.name) for entry in entries))


def _holds_classes(folder: str) -> bool:
    """Returns whether a folder with the name of a split contains classes. If not, it is itself a class."""
    entries = image_io.list_entries(folder)
    return any(e.is_dir() or tar.class_of_tar(e.name) or e.name.startswith(tar.VAL_PREFIX) for e in entries)


def _split_name(folder: str) -> str | None:
    """Returns the split for a folder name: 'train' for 'train' and 'ILSVRC2012_img_train'; None for other names."""
    return SPLIT_NAMES.get(folder.lower().removeprefix('ilsvrc2012_img_'))


def _list_split(folder: str, root: str, split: str | None) -> Iterator[tuple[ImageRef, str]]:
    """Yields (image, class name) from CLASS/**/images, one-class archives, or the images of the ILSVRC-2012 val set."""
    empty, num_stray = [], 0
    for entry in image_io.list_entries(folder):
        if entry.is_dir():
            paths = list(image_io.iter_image_files(entry.path))
            yield from ((_ref(image, root, split or 'train'), as_utf8(entry.name)) for image in paths)
            empty += [] if paths else [entry.name]
        elif entry.name.startswith(tar.VAL_PREFIX) and image_io.is_image(entry.name):
            yield _ref(entry.path, folder, split or 'val'), tar.validation_class(entry.name)
        elif split == 'train' and tar.class_of_tar(entry.name):
            yield from tar.list_images(entry.path)
        else:
            num_stray += image_io.is_image(entry.name)
    _warn_of_stray_images(folder, num_stray)
    if empty:
        logging.warning(f'skipped folders without images ({", ".join(image_io.SUFFIXES)}): {", ".join(empty)}')


def _warn_of_stray_images(folder: str, count: int) -> None:
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
