"""Lists images whose classes are in a table: rows FILE,LABEL[,SPLIT] with commas, semicolons, tabs or blanks."""

import bisect
import collections
import csv
import functools
import io
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from absl import logging

from alexnet_jax.data import image_files, image_io
from alexnet_jax.data.imagenet_classes import are_numbers
from alexnet_jax.prepare.image_ref import ImageRef
from alexnet_jax.prepare.split_folders import split_name
from alexnet_jax.utils.errors import UserError, as_user_error
from alexnet_jax.utils.files import as_utf8, open_regular
from alexnet_jax.utils.text import to_nfc

_EXPECTED = 'expected rows file,label or file,label,split, or a header with these names'
# Names of columns in lower case, without blanks and punctuation. The first that is there counts.
_COLUMNS = {
    'file': 'file filename filepath path image imagename imagepath imagefile imagefilename img imageid id'.split(),
    'label': 'label labelname class classname category categoryname target species breed wnid synset labelid classid '
    'categoryid'.split(),
    'split': 'split set subset partition datasplit dataset usage'.split(),
}


class Row(NamedTuple):
    """A row of a table."""

    line: int  # of the file, from 1
    file: str
    label: str
    split: str


def list_images(folder: str, table: str, counts: image_files.FileCounts) -> list[tuple[ImageRef, str]]:
    """Returns (image, class name) for the rows of a table. Logs rows without an image and images without a row.

    Args:
      folder: the input. Paths in the table are relative to it, or absolute. A file that is not there may be found by
        the end of its path or without its suffix, if only one file has that name; such files are counted in the log.
      table: UTF-8, or UTF-16 with a byte order mark. The split is a spelling of `split_folders.split_name`. Without a
        split, the folders of the files tell it if all have the name of a split; else all images are training images.
      counts: receives the files that are no images.

    Raises UserError if the table cannot be understood, or if it gives an image two labels or splits.
    """
    if not os.path.exists(table) and os.path.exists(inside := os.path.join(folder, table)):
        raise UserError(f'--labels={table!r} does not exist; use --labels={inside!r}.')
    rows = read_rows(table)
    index = _Index(folder, counts)
    if _is_inside(table, folder):
        counts.skipped -= collections.Counter([as_utf8(os.path.splitext(table)[1].lower()) or 'without suffix'])
    found: dict[str, Row] = {}
    missing, repeated = [], 0
    for row in rows:
        if (path := index.find(row.file)) is None:
            missing.append(row.file)
            continue
        other = found.setdefault(path, row)
        if (other.label, other.split) != (row.label, row.split):
            values = [', '.join(filter(None, (r.label, r.split))) or 'nothing' for r in (other, row)]
            raise UserError(
                f'{table!r}: {row.file!r} is {values[0]} in line {other.line} and {values[1]} in line {row.line}; '
                'keep one of the two.'
            )
        repeated += other is not row
    if not found:
        raise UserError(
            f'{table!r}: none of its {len(rows)} files is an image in {folder!r}, such as {rows[0].file!r} in line '
            f'{rows[0].line}; {_EXPECTED}, with paths relative to that folder.'
        )
    labels = _labels({path: row.label for path, row in found.items()}, table)
    splits = _splits({path: found[path].split for path in labels}, folder)
    _log_rest(table, missing, repeated, index, found)
    return [(ImageRef(path, 0, -1, index.name(path), -1, splits[path]), label) for path, label in labels.items()]


def _log_rest(table: str, missing: Sequence[str], repeated: int, index: '_Index', found: dict[str, Row]) -> None:
    """Logs what a table has without an image, and the images that it does not list."""
    if index.guessed:
        file, path = next(iter(index.guessed.items()))
        logging.warning(
            '%s: %d files were found by the end of their paths, such as %s at %s.',
            *(table, len(index.guessed), as_utf8(file), index.name(path)),
        )
    if missing:
        logging.warning(
            '%s: skipped %d rows whose file is missing or no image, such as %s.',
            *(table, len(missing), as_utf8(missing[0])),
        )
    if repeated:
        logging.warning('%s: %d rows repeat another row.', table, repeated)
    if unlisted := [path for path in index.paths if path not in found]:
        logging.warning(
            '%s: skipped %d images that it does not list, such as %s.', table, len(unlisted), index.name(unlisted[0])
        )


def read_rows(path: str) -> list[Row]:
    """Reads a table. Raises UserError for rows without a file or with another number of cells than the first row."""
    with as_user_error(f'{path!r} cannot be read'), open_regular(path, 'rb') as file:
        content = file.read()
    try:
        text = content.decode('utf-16' if content.startswith((b'\xff\xfe', b'\xfe\xff')) else 'utf-8-sig')
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b'\n') + 1
        raise UserError(f'{path!r}, line {line}: not UTF-8; save the table as UTF-8.') from error
    rows = _split_cells(path, to_nfc(text))
    if not rows:
        raise UserError(f'{path!r} has no rows; {_EXPECTED}.')
    columns = _columns(rows[0][1])
    width = len(rows[0][1])
    if columns:
        rows = rows[1:]
    elif width in (2, 3):
        columns = dict(zip(('file', 'label', 'split'), range(width), strict=False))
    else:
        raise UserError(f'{path!r}, line {rows[0][0]}: {width} cells; {_EXPECTED}.')
    read = []
    for line, cells in rows:
        if len(cells) != width:
            raise UserError(f'{path!r}, line {line}: {len(cells)} cells, not {width} as in its first row; {_EXPECTED}.')
        values = {name: cells[i] for name, i in columns.items()}
        split = split_name(values['split']) if 'split' in values else ''
        if split is None or not values['file']:
            wrong = (
                'no file' if not values['file'] else f'{values["split"]!r} is not a split such as train, val or test'
            )
            raise UserError(f'{path!r}, line {line}: {wrong}; {_EXPECTED}.')
        read.append(Row(line, values['file'], values['label'], split))
    if not read:
        raise UserError(f'{path!r} has no rows below its header; {_EXPECTED}.')
    return read


def _split_cells(path: str, text: str) -> list[tuple[int, list[str]]]:
    """Returns (line, cells) of the rows that are not empty.

    The delimiter is the one that splits most of the first rows. Commas are tried last, because names contain them. If
    none does, the last blank of a line precedes the label, as in Caffe's lists.
    """

    def parse(delimiter: str, text: str) -> list[tuple[int, list[str]]]:
        reader = csv.reader(io.StringIO(text, newline=''), delimiter=delimiter)
        rows = ((reader.line_num, [cell.strip() for cell in cells]) for cells in reader)
        return [(line, cells) for line, cells in rows if any(cells)]

    try:
        head = ''.join(text.splitlines(keepends=True)[:100])
        best = max('\t;,', key=lambda delimiter: sum(len(cells) > 1 for _, cells in parse(delimiter, head)))
        if any(len(cells) > 1 for _, cells in parse(best, head)):
            return parse(best, text)
    except csv.Error as error:
        raise UserError(f'{path!r} cannot be read: {error}; {_EXPECTED}.') from error
    return [(i, line.rsplit(maxsplit=1)) for i, line in enumerate(text.splitlines(), 1) if line.strip()]


def _columns(cells: Sequence[str]) -> dict[str, int]:
    """Returns the columns that a header names, by the keys of `_COLUMNS`, or {} for other rows. Logs the columns."""
    keys = [re.sub(r'[^a-z0-9]', '', cell.lower()) for cell in cells]
    columns = {}
    for column, names in _COLUMNS.items():
        positions = (keys.index(key) for name in names for key in (name, f'{name}s') if key in keys)
        if (position := next(positions, None)) is not None:
            columns[column] = position
    if not {'file', 'label'} <= columns.keys():
        return {}
    used = ', '.join(f'{cells[i]} ({column})' for column, i in columns.items())
    ignored = ', '.join(cell for i, cell in enumerate(cells) if i not in columns.values())
    logging.info('columns of the labels: %s%s', used, f'; ignored: {ignored}' if ignored else '')
    return columns


def _labels(labels: dict[str, str], table: str) -> dict[str, str]:
    """Returns the labels of the images that have one, by path. '3.0' becomes '3' if all are such numbers."""
    values = set(labels.values()) - {'', '-1', '-1.0'}
    if values and all(re.fullmatch(r'\d+(\.0+)?', value, re.ASCII) for value in values):
        labels = {path: re.sub(r'\.0+$', '', label) for path, label in labels.items()}
        values = {re.sub(r'\.0+$', '', value) for value in values}
    unlabeled = ('', '-1') if are_numbers(tuple(values)) else ('',)
    labeled = {path: label for path, label in labels.items() if label not in unlabeled}
    if len(labeled) < len(labels):
        logging.warning('%s: skipped %d images without a label.', table, len(labels) - len(labeled))
    if not labeled:
        raise UserError(f'{table!r}: none of its {len(labels)} images has a label; {_EXPECTED}.')
    return labeled


def _splits(splits: dict[str, str], folder: str) -> dict[str, str]:
    """Returns the split of each image. Without splits in the table, takes the folders if all of them name a split."""
    if all(splits.values()):
        return splits
    by_folder = {}
    for parent in {os.path.dirname(path) for path in splits}:
        parts = os.path.relpath(parent, folder).split(os.sep)
        by_folder[parent] = next((split for part in parts if (split := split_name(part))), None)
    named = {path: by_folder[os.path.dirname(path)] for path in splits}
    known = {path: split for path, split in named.items() if split}
    if len(known) == len(named):
        logging.info('the folders of the images say their splits: %s.', ', '.join(sorted(set(known.values()))))
        return known
    if known:
        logging.warning(
            'all images are training images, although the folders of %d of %d are named like splits; add a column '
            'split to the labels to change this.',
            *(len(known), len(named)),
        )
    return dict.fromkeys(named, 'train')


def _is_inside(path: str, folder: str) -> bool:
    return os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), ''))


class _Index:
    """The images below a folder, by their paths and by the ends of their paths, with and without suffix."""

    def __init__(self, folder: str, counts: image_files.FileCounts):
        self._folder = folder
        self.paths = list(image_files.iter_image_files(folder, counts))
        self.guessed: dict[str, str] = {}  # path by the file in the table
        self._by_key = {_key(image_files.relative_to(folder, path)): path for path in self.paths}

    def name(self, path: str) -> str:
        """Returns the path relative to the folder, or the path of an image outside."""
        return as_utf8(image_files.relative_to(self._folder, path))

    def find(self, file: str) -> str | None:
        """Returns the path of a file of the table, or None. Raises UserError if several images may be meant."""
        key = _key(os.path.relpath(file, self._folder) if os.path.isabs(file) else file)
        if (path := self._by_key.get(key)) is not None:
            return path
        outside = os.path.join(self._folder, file)
        if key.startswith(os.pardir) and os.path.isfile(outside) and outside.lower().endswith(image_io.suffixes()):
            return os.path.normpath(outside)
        ends = self._find_end(_key(file))
        if len(ends) > 1:
            names = ' and '.join(sorted(map(self.name, ends)))
            raise UserError(f'{file!r} may be {names}; write paths relative to {self._folder!r} into the labels.')
        if ends:
            self.guessed[file] = path = ends.pop()
            return path
        return None

    @functools.cached_property
    def _reversed(self) -> list[tuple[str, str]]:
        """(key from the last part to the first, path) of all images, also without suffix, sorted."""
        names = ((name, path) for key, path in self._by_key.items() for name in {key, os.path.splitext(key)[0]})
        return sorted((_reverse(name), path) for name, path in names)

    def _find_end(self, key: str) -> set[str]:
        """Returns the paths of up to two images whose key ends with `key`, or is an end of it, also without suffix."""
        whole, end = _reverse(key.lstrip('/')), 0
        found: set[str] = set()
        while len(found) < 2 and (end := whole.find('/', end) + 1):
            part = whole[:end]
            for i in range(bisect.bisect_left(self._reversed, (part,)), len(self._reversed)):
                name, path = self._reversed[i]
                if len(found) > 1 or not (name.startswith(whole) if part == whole else name == part):
                    break
                found.add(path)
        return found


def _reverse(key: str) -> str:
    """Returns 'c/b/a/' for 'a/b/c': the images whose paths have one end are then neighbors in a sorted list."""
    return '/'.join(reversed(key.split('/'))) + '/'


def _key(file: str) -> str:
    """Returns a path in one form: '/' between folders, no './', NFC."""
    return to_nfc(os.path.normpath(file.replace('\\', '/')))
