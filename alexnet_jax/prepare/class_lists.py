"""The order of classes, and their readable names from a list in the input."""

import collections
import csv
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence

from absl import logging

from alexnet_jax.data.imagenet_classes import are_numbers
from alexnet_jax.utils.errors import UserError, first_line
from alexnet_jax.utils.text import to_nfc

CLASS_LISTS = (
    'classes.tsv', 'words.txt', 'classes.json', 'labels.json',
    'LOC_synset_mapping.txt', 'Labels.json',  # ImageNet and ImageNet-100 on Kaggle
    'synset_words.txt', 'imagenet_class_index.json',  # Caffe and Keras
    'id2label.json', 'imagenet-1k-id2label.json',  # Hugging Face
)  # fmt: skip
_EXPECTED = ('lines are CLASS<tab>NAME', '{"CLASS": "NAME", ...}')
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
    may precede or follow the class. Of several names, separated by commas, the first counts. A JSON file holds
    {CLASS: NAME}, {NUMBER: [CLASS, NAME]}, {"id2label": {...}}, or a list of names for classes that are numbers.
    Warns of lists that do not name all classes, and of characters that are not UTF-8.
    """
    names_by_class: dict[str, str] = {}
    for path in (os.path.join(folder, name) for folder in dict.fromkeys(paths) for name in CLASS_LISTS):
        if os.path.isfile(path):
            found = _read_list(path, set(classes))
            if len(found) < len(classes):
                logging.warning(
                    '%s names %d of %d classes; the others keep the names of their folders. Expected %s.',
                    *(path, len(found), len(classes), _EXPECTED[path.endswith('.json')]),
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
    text = to_nfc(content.decode(encoding, 'replace'))
    if path.endswith('.json'):
        return _read_json(path, text, classes)
    names = {}
    for line in text.splitlines():
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


def _read_json(path: str, text: str, classes: Collection[str]) -> dict[str, str]:
    """Returns the names of the classes that a JSON file names. See `class_names` for its forms."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        logging.warning('%s is not JSON: %s', path, first_line(error))
        return {}
    if isinstance(content, dict) and isinstance(content.get('id2label'), dict):
        content = content['id2label']
    if isinstance(content, list):
        numbers = {int(name): name for name in classes} if are_numbers(tuple(classes)) else {}
        first = int(bool(numbers) and min(numbers) > 0 and max(numbers) == len(content))
        if first:
            logging.info('%s: its first name is that of class 1.', path)
        content = {numbers.get(i, str(i)): name for i, name in enumerate(content, first)}
    names = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        values = value if isinstance(value, list) else [value]
        cells = [key, *(str(cell).strip() for cell in values if isinstance(cell, str | int))]
        if cells[0] not in classes and len(cells) == 2 and isinstance(value, int):  # {NAME: NUMBER}
            cells.reverse()
        position = next((i for i, cell in enumerate(cells) if cell in classes), len(cells))
        others = [cell for cell in cells[position + 1 :] if cell and not cell.isdecimal()]
        # Keras's list has {NUMBER: [WNID, NAME]}, also for classes that are numbers.
        others.sort(key=lambda cell: re.fullmatch(r'n\d{8}', cell) is not None)
        if name := ' '.join(others[0].split(',')[0].split()) if others else '':
            names[cells[position]] = name
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
