"""Locations of the images of a raw input."""

from typing import NamedTuple

SPLIT_NAMES = {'train': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'test': 'test'}


class ImageRef(NamedTuple):
    """The location of one image."""

    path: str  # a file, 'parquet:FILE' or 'tfds:NAME'
    offset: int  # in the file, bytes; for parquet files and TFDS datasets, the index of the row or record
    length: int  # bytes; -1 for a whole file
    name: str  # path relative to the input, for messages and for the record
    label: int  # -1 for TFDS datasets, whose records contain the label
    split: str = ''  # for TFDS datasets, the dataset's own name of the split


Splits = dict[str, list[ImageRef]]


class Listing(NamedTuple):
    """The images of a raw input; labels are indices into `class_names`."""

    splits: Splits
    class_names: tuple[str, ...]
    folder: str = ''  # the folder of the splits or classes, which may be inside the input
    in_files: bool = False  # whether files contain the labels, so that the names of the images do not tell the classes
