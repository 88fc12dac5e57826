"""Lists and reads images in parquet files, as Hugging Face serves datasets.

A reference to an image is its file and the index of its row. A process decodes one page of rows at a time, which in
files of pyarrow is at most 1,024 rows. Rows in ascending order are decoded once, so `prepare` keeps the order of files.
"""

import bisect
import collections
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from absl import logging

from alexnet_jax.data import image_files, image_io
from alexnet_jax.prepare import split_folders
from alexnet_jax.prepare.class_lists import in_label_order
from alexnet_jax.prepare.image_ref import ImageRef, Listing
from alexnet_jax.utils.errors import UserError
from alexnet_jax.utils.files import as_utf8, describe_damage, open_regular
from alexnet_jax.utils.text import to_nfc

PREFIX = 'parquet:'  # of `ImageRef.path`
_SUFFIX = '.parquet'
_MAX_DEPTH = 6  # of folders with parquet files
_SHARD = re.compile(
    r'-(\d+)-of-(\d+)(-[0-9a-f]+)?$'
)  # the end of train-00000-of-00294 and of valid-00000-of-00001-9a8f
# Names of columns. The first that is there counts.
_IMAGES = ('image', 'img', 'images', 'picture', 'photo', 'jpg', 'png')
_LABELS = ('label', 'labels', 'fine_label', 'class', 'target', 'category', 'cls')
_MAX_CLASSES = 100_000  # without names; larger numbers are identifiers of something else
_BATCH_ROWS = 16
_MIN_ROW_BYTES = 8  # of an image and its label, after compression
_BATCH_NAMES = 64  # read at once; a file may store a long one once
_MAX_NAME = 255  # characters of an image's name
_BUFFER_BYTES = 2**20


class _Columns(NamedTuple):
    """What a file's schema says."""

    image: str  # name of the column
    leaf: str  # of the bytes of the images: 'image.bytes', or 'image' for a column of bytes
    path: str  # of the images' names: 'image.path', or '' if there are none
    label: str
    names: tuple[str, ...] | None  # of the classes
    ignored: tuple[str, ...]  # other columns


def list_files(path: str, _depth: int = 0) -> list[str]:
    """Returns the parquet files at a path: a file, or all files below a folder, sorted by name."""
    if not os.path.isdir(path):
        return [path] if path.lower().endswith(_SUFFIX) else []
    if _depth > _MAX_DEPTH:
        return []
    return [file for entry in image_files.list_entries(path) for file in list_files(entry.path, _depth + 1)]


def list_images(path: str, files: list[str]) -> Listing:
    """Lists the rows of parquet files that have a label, in the order of the files.

    Splits are told by the names of files, else by their folders; else the images are training images. The order of the
    labels is that of the names in the file's metadata. Labels that are text are sorted, and numbers without names are
    the names of their classes.

    Raises UserError for files without one column of images and one of labels, or whose splits are not clear.
    """
    root = os.path.dirname(path) if os.path.isfile(path) else path
    by_split = _by_split(root, files)
    rows: dict[str, list[tuple[ImageRef, Any]]] = {}
    names: set[tuple[str, ...] | None] = set()
    columns: dict[_Columns, str] = {}
    for split, members in by_split.items():
        rows[split] = []
        for file in members:
            found, labeled = _read_labels(file, root, split)
            columns.setdefault(found, file)
            names.add(found.names)
            rows[split].extend(labeled)
        total = len(rows[split])
        rows[split] = [(ref, label) for ref, label in rows[split] if label not in (None, -1, '')]
        if unlabeled := total - len(rows[split]):
            logging.warning('%s split: skipped %d of %d images, which have no label.', split, unlabeled, total)
    for found, file in columns.items():
        ignored = f'; ignored columns: {", ".join(found.ignored)}' if found.ignored else ''
        logging.info('%s: images in column %s, labels in column %s%s', file, found.image, found.label, ignored)
    if len(names) > 1:
        raise UserError(f'{path!r}: its parquet files have different lists of class names; use files of one dataset.')
    rows = {split: labeled for split, labeled in rows.items() if labeled}
    if not rows:
        raise UserError(f'{path!r}: no image in its parquet files has a label.')
    return _listing(path, rows, names.pop())


def _listing(path: str, rows: dict[str, list[tuple[ImageRef, Any]]], names: tuple[str, ...] | None) -> Listing:
    """Returns the listing of labeled rows. Raises UserError for labels that are no class."""
    index: dict[Any, int]
    labels = {label for labeled in rows.values() for _, label in labeled}
    if len({type(label) for label in labels}) > 1:
        raise UserError(f'{path!r}: expected labels that are all numbers or all text.')
    if isinstance(next(iter(labels)), str):
        names = in_label_order(labels)
        index = {name: i for i, name in enumerate(names)}
    else:
        if names is None:
            if max(labels) >= _MAX_CLASSES:
                raise UserError(f'{path!r}: label {max(labels)}, but no class names; expected labels from 0.')
            names = tuple(map(str, range(max(labels) + 1)))
            logging.info('the parquet files have no class names: classes are the numbers 0 to %d.', max(labels))
        index = {i: i for i in range(len(names))}
    if wrong := labels - index.keys():
        raise UserError(f'{path!r}: label {min(wrong)} is not one of the {len(names)} classes, 0 to {len(names) - 1}.')
    counts = collections.Counter(' '.join(name.split()) for name in names)
    if any(count > 1 for count in counts.values()):
        logging.warning('class names that occur several times get their label: %s', max(counts, key=counts.__getitem__))
    unique = (' '.join(name.split()) for name in names)
    class_names = tuple(name if counts[name] == 1 else f'{name} ({i})' for i, name in enumerate(unique))
    splits = {
        split: [ref._replace(label=index[label]) for ref, label in labeled] for split, labeled in sorted(rows.items())
    }
    return Listing(splits, class_names, path if os.path.isdir(path) else '', True)


def _by_split(root: str, files: list[str]) -> dict[str, list[str]]:
    """Returns the files of each split and logs them. Raises UserError if folders may be different datasets."""
    by_split: dict[str, list[str]] = {}
    folders: dict[str, str] = {}  # an example by folder, without the folders of splits
    for file in files:
        *parents, name = os.path.relpath(file, root).split(os.sep)
        stem = _SHARD.sub('', name[: -len(_SUFFIX)])
        words = [stem, *reversed(parents)]
        found = [split_folders.split_name(word) or split_folders.loose_split_name(word) for word in words]
        by_split.setdefault(next(filter(None, found), 'train'), []).append(file)
        folders.setdefault(os.sep.join(p for p in parents if not split_folders.split_name(p)), file)
    if len(folders) > 1:
        listed = ' and '.join(repr(os.path.join(root, folder)) for folder in sorted(folders)[:3])
        raise UserError(f'{root!r} has parquet files in several folders; use one of them as the input: {listed}.')
    for split, members in sorted(by_split.items()):
        logging.info('%s split: %d parquet files, such as %s', split, len(members), as_utf8(members[0]))
        _check_shards(split, members)
    return by_split


def _check_shards(split: str, files: list[str]) -> None:
    """Warns of shards that are missing. Raises UserError for shards of several versions, which have the same images."""
    shards: dict[str, list[tuple[int, int]]] = {}  # (number of a shard, total) by the start of the names of the files
    for file in files:
        if match := _SHARD.search(file[: -len(_SUFFIX)]):
            shards.setdefault(file[: match.start()], []).append((int(match[1]), int(match[2])))
    for start, members in shards.items():
        if len({total for _, total in members}) > 1 or len(set(members)) < len(members):
            raise UserError(
                f'{start}-*.parquet are shards of several versions, whose images would count twice; keep one version.'
            )
    found, expected = sum(map(len, shards.values())), sum(members[0][1] for members in shards.values())
    if found < expected:
        logging.warning('%s split: only %d of %d parquet files are there.', split, found, expected)


def _read_labels(file: str, root: str, split: str) -> tuple[_Columns, list[tuple[ImageRef, Any]]]:
    """Returns the columns of a file, and (image, label) for its rows. Reads no images. Raises UserError."""
    try:
        opened = _open(file)
        columns = _columns(file, opened.schema_arrow)
        _check_rows(file, opened.metadata)
        labels, paths = _read_texts(file, columns)
    except UserError:
        raise
    except Exception as error:  # pyarrow's types, for damaged files
        raise UserError(describe_damage(file, error)) from error
    name = as_utf8(os.path.relpath(file, root))
    digits = len(str(len(labels)))
    rows = []
    for i, (label, path) in enumerate(zip(labels, paths, strict=True)):
        row_name = f'{name}/{i:0{digits}}' + (f'/{path}' if path else '')
        rows.append((ImageRef(PREFIX + file, i, -1, row_name, -1, split), label))
    return columns, rows


def _check_rows(file: str, metadata: Any) -> None:
    """Raises UserError if row groups do not add up to the rows of their file, or if the file is too small for these.

    A run of equal labels takes a few bytes. pyarrow allocates the rows that a row group declares, and returns no more
    than these.
    """
    rows, groups = metadata.num_rows, [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if sum(groups) != rows or min(groups, default=0) < 0:
        raise UserError(f'{file!r} is damaged: it declares {rows:,} rows, but {sum(groups):,} in its row groups.')
    if rows * _MIN_ROW_BYTES > (size := os.path.getsize(file)):
        raise UserError(f'{file!r} declares {rows:,} rows with an image each, but has {size:,} bytes.')


def _read_texts(file: str, columns: _Columns) -> tuple[list[Any], list[str | None]]:
    """Returns the labels and the names of the images. Equal labels, which a file may store once, are one object."""
    labels: list[Any] = []
    opened = _open(file, read_dictionary=[columns.label])
    for chunk in opened.read(columns=[columns.label], use_threads=False)[columns.label].chunks:
        labels += _to_list(chunk, lambda label: to_nfc(label) if isinstance(label, str) else label)
    if not columns.path:
        return labels, [None] * len(labels)
    paths: list[str | None] = []
    for batch in opened.iter_batches(_BATCH_NAMES, columns=[columns.path], use_threads=False):
        items = batch.column(columns.image).to_pylist()
        paths += [os.path.basename(item['path'])[:_MAX_NAME] if item and item['path'] else None for item in items]
    if len(paths) != len(labels):
        raise ValueError(f'{len(labels)} labels, but {len(paths)} names')
    return labels, paths


def _to_list(array, convert: Callable[[Any], Any]) -> list[Any]:
    from pyarrow import types

    if not types.is_dictionary(array.type):
        return list(map(convert, array.to_pylist()))
    values = list(map(convert, array.dictionary.to_pylist()))
    return [None if i is None else values[i] for i in array.indices.to_pylist()]


def _open(file: str, **options: Any):
    """Opens a file so that reading a batch of rows keeps little more than these rows in memory."""
    from pyarrow import parquet

    open_regular(file, 'rb').close()
    options |= {'pre_buffer': False, 'buffer_size': _BUFFER_BYTES, 'page_checksum_verification': True}
    return parquet.ParquetFile(file, **options)


def _columns(file: str, schema) -> _Columns:
    """Returns the columns of images and labels. Raises UserError if they are not clear."""
    from pyarrow import types

    try:
        features = json.loads((schema.metadata or {})[b'huggingface'])['info']['features']
        features = {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        features = {}

    def is_image(field) -> bool:
        if types.is_struct(field.type):
            return field.type.get_field_index('bytes') >= 0
        return types.is_binary(field.type) or types.is_large_binary(field.type)

    def is_label(field) -> bool:
        kind = field.type.value_type if types.is_dictionary(field.type) else field.type
        return types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)

    def choose(candidates: list[str], preferred: tuple[str, ...], marked: list[str], what: str) -> str:
        for name in preferred:
            if name in candidates:
                return name
        if len(marked) == 1:
            return marked[0]
        listed = ', '.join(f'{field.name} ({str(field.type)[:40]})' for field in schema)
        raise UserError(f'{file!r}: expected one column of {what}, such as {preferred[0]}; its columns are: {listed}.')

    images, labels = ([field.name for field in schema if is_kind(field)] for is_kind in (is_image, is_label))
    image = choose(images, _IMAGES, images, 'encoded images')
    label = choose(labels, _LABELS, [n for n in labels if features.get(n, {}).get('_type') == 'ClassLabel'], 'labels')
    kind = schema.field(image).type
    leaf, path = image, ''
    if types.is_struct(kind):
        leaf, path = f'{image}.bytes', f'{image}.path' if kind.get_field_index('path') >= 0 else ''
    names = features.get(label, {}).get('names')
    ignored = tuple(name for name in schema.names if name not in (image, label))
    return _Columns(image, leaf, path, label, tuple(map(str, names)) if names else None, ignored)


def read_image(ref: ImageRef) -> bytes:
    """Returns the encoded image of a row. Raises ValueError if the row has none, and pyarrow's errors for damage."""
    content = _open_rows(ref.path.removeprefix(PREFIX)).read(ref.offset)
    if content is None:
        raise ValueError('the row holds no image, or only the path of one')
    if len(content) > image_io.MAX_BYTES:
        raise ValueError(f'{len(content):,} bytes; expected at most {image_io.MAX_BYTES:,}')
    return content


@functools.lru_cache(maxsize=1)  # rows are read in the order of the files
def _open_rows(file: str) -> '_Rows':
    return _Rows(file)


class _Rows:
    """The images of a file by row. Rows in ascending order are decoded once; others start their row group again."""

    def __init__(self, file: str):
        self._file = _open(file)
        self._columns = _columns(file, self._file.schema_arrow)
        metadata = self._file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._starts = list(itertools.accumulate(sizes, initial=0))  # first row of each row group
        self._group, self._first = -1, 0
        self._batch: Any = ()
        self._batches: Iterator[Any] = iter(())

    def read(self, row: int) -> bytes | None:
        group = bisect.bisect_right(self._starts, row) - 1
        if group != self._group or row < self._first:
            self._batches = self._file.iter_batches(
                _BATCH_ROWS, row_groups=[group], columns=[self._columns.leaf], use_threads=False
            )
            self._group, self._first, self._batch = group, self._starts[group], ()
        try:
            while row >= self._first + len(self._batch):
                self._first += len(self._batch)
                self._batch = next(self._batches).column(self._columns.image)
        except Exception:
            self._group = -1  # the next row starts again
            raise
        value = self._batch[row - self._first].as_py()
        return value['bytes'] if isinstance(value, dict) else value
