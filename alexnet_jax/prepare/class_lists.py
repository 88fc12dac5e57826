"""The order of classes, and their readable names from a list in the input."""

import collections
import csv
import os
import unicodedata
from collections.abc import Collection, Iterable, Sequence

from absl import logging

from alexnet_jax.data.imagenet_classes import are_numbers
from alexnet_jax.utils.errors import UserError

# The last two are those of ImageNet on Kaggle and of Caffe.
CLASS_LISTS = ('classes.tsv', 'words.txt', 'LOC_synset_mapping.txt', 'synset_words.txt')
_MAX_BYTES = 2**26  # read of a class list


def in_label_order(class_names: Collection[str]) -> tuple[str, ...]:
    """Sorts class names. If all are numbers, as in ImageNet-V2, sorts them by value: '2' comes before '10'."""
    names = tuple(sorted(class_names))
    if not are_numbers(names) or names == (by_value := tuple(sorted(names, key=lambda name: (int(name), name)))):
        return names
    logging.info('all class names are numbers: labels follow their values (%s, ...).', ', '.join(by_value[:3]))
    return by_value


def class_names(paths: Iterable[str], classes: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of classes from lists in folders, or the classes themselves. Makes equal names different.

    A line of a list has a class (the name of its folder) and its name, separated by a tab, a comma or a blank. A number
    may precede or follow the class. Of several names, separated by commas, the first counts. Warns of lists that do not
    name all classes, and of characters that are not UTF-8.
    """
    names_by_class: dict[str, str] = {}
    for path in (os.path.join(folder, name) for folder in dict.fromkeys(paths) for name in CLASS_LISTS):
        if os.path.isfile(path):
            found = _read_list(path, set(classes))
            if len(found) < len(classes):
                logging.warning(
                    '%s names %d of %d classes; the others keep the names of their folders. Expected lines are '
                    'CLASS<tab>NAME.',
                    *(path, len(found), len(classes)),
                )
            if damaged := sum('\ufffd' in name for name in found.values()):
                logging.warning('%s: %d names have characters that are not UTF-8; save it as UTF-8.', path, damaged)
            names_by_class |= found
    names = [names_by_class.get(name) or name for name in classes]
    counts = collections.Counter(names)
    names = [name if counts[name] == 1 else f'{name} ({folder})' for name, folder in zip(names, classes, strict=True)]
    for name in names:  # TFDS stores one stripped name per line and drops empty lines, which would shift labels
        if name.splitlines() != [name] or name != name.strip():
            raise UserError(f'class name {name!r}: expected one line without outer spaces; rename its folder.')
    return tuple(names)


def _read_list(path: str, classes: Collection[str]) -> dict[str, str]:
    """Returns the names of the classes that a list names. Reads UTF-8, and UTF-16 with a byte order mark."""
    with open(path, 'rb') as file:
        content = file.read(_MAX_BYTES)
    encoding = 'utf-16' if content.startswith((b'\xff\xfe', b'\xfe\xff')) else 'utf-8-sig'
    lines = unicodedata.normalize('NFC', content.decode(encoding, 'replace')).splitlines()
    names = {}
    for line in lines:
        # 'n01440764 tench, Tinca tinca' is separated by a blank: its first cell between commas is not a class.
        for cells in (line.split('\t'), _csv_cells(line, ','), _csv_cells(line, ';'), _blank_cells(line, classes)):
            cells = [cell.strip() for cell in cells]
            if cells[0].isdecimal() and cells[0] not in classes:
                cells = cells[1:]
            if len(cells) > 1 and cells[0] in classes:
                name = next((cell for cell in cells[1:] if cell and not cell.isdecimal()), '')
                if name := ' '.join(name.split(',')[0].split()):
                    names[cells[0]] = name
                break
    return names


def _blank_cells(line: str, classes: Collection[str]) -> list[str]:
    words = line.split(maxsplit=2)
    numbered = len(words) == 3 and (words[1].isdecimal() or (words[0].isdecimal() and words[0] not in classes))
    return words if numbered else line.split(maxsplit=1) or ['']


def _csv_cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), []) or ['']
    except csv.Error:
        return ['']
