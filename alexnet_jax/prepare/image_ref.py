"""Locations of the images of a raw input."""

from typing import NamedTuple

SPLIT_NAMES = {'train': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'test': 'test'}


class ImageRef(NamedTuple):
    """The location of one image."""

    path: str  # a file, or 'tfds:NAME'
    offset: int  # bytes into the file; the record's index in a TFDS dataset
    length: int  # bytes; -1 for a whole file
    name: str  # path relative to the input, for messages and for the record
    label: int  # -1 for TFDS datasets, whose records contain it
    split: str = ''  # the split; for TFDS datasets, their own name for it


Splits = dict[str, list[ImageRef]]


class Listing(NamedTuple):
    """The images of a raw input; labels are indices into `class_names`."""

    splits: Splits
    class_names: tuple[str, ...]
    folder: str = ''  # the folder of the splits or classes, which may be inside the input
