"""Where the images of a raw input lie."""

from typing import NamedTuple

SPLIT_NAMES = {'train': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'test': 'test'}


class ImageRef(NamedTuple):
    """Where one image lies."""

    path: str  # a file, or 'tfds:NAME'
    offset: int  # bytes into the file; for TFDS the index
    length: int  # bytes; -1 for a whole file
    name: str  # for messages and for the record: the path below the input
    label: int  # -1 where only the TFDS dataset's record says it
    split: str = ''  # a TFDS dataset's own name of it; of files, the split they were found in


Splits = dict[str, list[ImageRef]]


class Listing(NamedTuple):
    """The images of a raw input; labels are indices into `class_names`."""

    splits: Splits
    class_names: tuple[str, ...]
