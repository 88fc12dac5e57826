"""Finds the folders of the splits in an image folder, by the names that people and public data sets use."""

import os
import re
from collections.abc import Sequence

from absl import logging

from alexnet_jax.data import image_files
from alexnet_jax.prepare import ground_truth, tar
from alexnet_jax.utils.errors import UserError, listed
from alexnet_jax.utils.files import as_utf8

_MAX_DEPTH = 4  # of folders that wrap the data
# The spellings that Hugging Face's `datasets` recognizes.
_SPELLINGS = {
    'train': ('train', 'training'),
    'val': ('val', 'valid', 'validation', 'dev'),
    'test': ('test', 'testing', 'eval', 'evaluation'),
}
_SPLITS = {spelling: split for split, spellings in _SPELLINGS.items() for spelling in spellings}
_FILLERS = ('set', 'sets', 'data', 'dataset', 'images', 'image', 'imgs', 'img', 'split', 'folder', 'ilsvrc', 'x')
_GENERIC = ('images', 'image', 'imgs', 'img', 'unlabeled', 'unlabelled', 'unknown', 'all')


def split_name(folder: str) -> str | None:
    """Returns the split that the name of a folder means, or None.

    >>> split_name('Validation_set'), split_name('TrainData'), split_name('photos')
    ('val', 'train', None)
    """
    words = _words(folder)
    splits = {_SPLITS.get(word) for word in words if word not in _FILLERS}
    return splits.pop() if len(splits) == 1 else None


def _words(name: str) -> list[str]:
    """Returns the words of a name in lower case, with 'trainset' and 'TrainData' as two words."""
    words = re.findall(r'[^\W\d_]+', name.lower())
    return [
        part
        for word in words
        for part in re.sub(rf'^({"|".join(_SPLITS)})({"|".join(_FILLERS)})$', r'\1 \2', word).split()
    ]


def loose_split_name(folder: str) -> str | None:
    """Returns the split if exactly one is among the words of a name, such as 'train' for 'asl_alphabet_train'."""
    splits = {_SPLITS[word] for word in _words(folder) if word in _SPLITS}
    return splits.pop() if len(splits) == 1 else None


def find_splits(folders: Sequence[os.DirEntry]) -> list[tuple[os.DirEntry, str]]:
    """Returns (folder, split) for the folders that are splits: their names say so, and they do not hold images only.

    A class may be named like a split. If no name is a split's name alone, names with further words count, provided
    that at least two splits are among them, including train, and that most of the folders have such names.
    """
    if splits := [(f, split) for f in folders if (split := split_name(f.name)) and _holds_classes(f.path)]:
        return splits
    splits = [(f, split) for f in folders if (split := loose_split_name(f.name))]
    holding = [(f, split) for f, split in splits if _holds_classes(f.path)]
    if 'train' in {s for _, s in holding} and len({s for _, s in splits}) > 1 and len(splits) > len(folders) / 2:
        return holding
    return []


def _holds_classes(folder: str) -> bool:
    """Returns whether a folder with the name of a split contains classes. If not, it is itself a class."""
    entries = image_files.list_entries(folder)
    return any(
        image_files.is_folder(e) or tar.is_archive(e.name) or e.name.startswith(ground_truth.PREFIXES) for e in entries
    )


def data_folder(path: str) -> str:
    """Returns the folder of the splits or classes: `path`, or a folder inside if folders only wrap it.

    Raises UserError if there are several such folders, or if splits are inside classes.
    """
    folders, files = image_files.partition(image_files.list_entries(path))
    if _are_splits(folders) or any(tar.is_archive(f.name) or f.name.startswith(ground_truth.PREFIXES) for f in files):
        return path
    found = [nested for folder in folders for nested in _split_parents(folder.path, _MAX_DEPTH)]
    if len(found) == 1:
        others = [f for f in folders if not os.path.join(found[0], '').startswith(os.path.join(f.path, ''))]
        if not any(_holds_images(folder.path) for folder in others):
            return found[0]
    if found:
        nested_folders = listed([repr(nested) for nested in found], 3)
        raise UserError(
            f'{path!r}: expected SPLIT/CLASS/images or CLASS/images, got train and test folders inside other folders; '
            f'use one of the folders that hold them as the input ({nested_folders}), or move them up.'
        )
    if len(folders) == 1 and _holds_classes(folders[0].path):
        return data_folder(folders[0].path)
    return path


def _are_splits(folders: Sequence[os.DirEntry]) -> bool:
    """Returns whether folders are splits, also if they hold images directly."""
    return bool(find_splits(folders)) or _are_flat_splits(folders)


def _are_flat_splits(folders: Sequence[os.DirEntry]) -> bool:
    names = {split_name(folder.name) for folder in folders} - {None}
    return 'train' in names and len(names) > 1


def _split_parents(folder: str, depth: int) -> list[str]:
    """Returns the folders that hold several splits with images: `folder`, or those inside.

    A class may have a single folder that is named like a split.
    """
    folders = [entry for entry in image_files.list_entries(folder) if image_files.is_folder(entry)]
    if len({split for _, split in find_splits(folders)}) > 1 or _are_flat_splits(folders):
        return [folder] if _holds_images(folder) else []
    return [nested for f in folders if depth > 1 for nested in _split_parents(f.path, depth - 1)]


def _holds_images(folder: str) -> bool:
    return any(True for _ in image_files.iter_image_files(folder))


def check_not_flat(path: str, folders: Sequence[os.DirEntry]) -> None:
    """Raises UserError if train and test folders hold images directly, so that nothing says their classes."""
    if _are_flat_splits(folders):
        names = ' and '.join(repr(as_utf8(folder.name)) for folder in folders if split_name(folder.name))
        raise UserError(f'{path!r}: {names} hold images outside class folders; expected SPLIT/CLASS/images.')


def class_parent(folder: str) -> str:
    """Returns the folder of a split's classes: train/train or train/images in place of train, if that holds folders."""
    entries = image_files.list_entries(folder)
    folders = [entry for entry in entries if image_files.is_folder(entry)]
    if len(folders) == 1 and is_generic(folders[0].name, os.path.basename(folder)):
        if any(map(image_files.is_folder, image_files.list_entries(folders[0].path))):
            return class_parent(folders[0].path)
    return folder


def is_generic(name: str, split_folder: str) -> bool:
    """Returns whether the name of a split's only subfolder says nothing about a class."""
    return name.lower() in (*_GENERIC, split_folder.lower()) or split_name(name) is not None


def warn_of_links(folders: Sequence[os.DirEntry]) -> None:
    """Warns if splits or classes are one folder by links: their images count twice, or are in train and val."""
    if not any(folder.is_symlink() for folder in folders):
        return
    name_of: dict[str, str] = {}
    pairs = []
    for folder in folders:
        other = name_of.setdefault(os.path.realpath(folder.path), folder.name)
        if other != folder.name:
            pairs.append(f'{as_utf8(folder.name)} and {as_utf8(other)}')
    if pairs:
        logging.warning('folders that link to the images of another one: %d (%s)', len(pairs), listed(pairs, 10))


def log_splits(root: str, splits: Sequence[tuple[os.DirEntry, str]]) -> None:
    """Logs which folder is which split."""
    for split in sorted({split for _, split in splits}):
        paths = [as_utf8(os.path.relpath(folder.path, root)) for folder, other in splits if other == split]
        logging.info('%s split: %s', split, ', '.join(f'{path}/' for path in paths))
