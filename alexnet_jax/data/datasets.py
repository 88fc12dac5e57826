"""Opens datasets: prepared directories, the embedded digits, and images in memory.

A split is a random-access sequence of {'image': encoded bytes or uint8 [S, S, 3], 'label': int}, for example a list.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import pickle
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from alexnet_jax.core import augment, image_stats
from alexnet_jax.data import image_stats_file
from alexnet_jax.utils import checksums
from alexnet_jax.utils.errors import UnreadableError, UserError, as_user_error, check_type, first_line
from alexnet_jax.utils.files import is_special

DIGITS = 'digits'  # value of data.path for the embedded digits
_MAX_FEATURES_CHARS = 1 << 24  # longest accepted features.json
_MAX_UNNAMED = 1_000_000  # classes
_MAX_SIDE = 4096  # of prepared images, pixels
_SPLITS = ('train', 'val', 'test')


class Dataset(NamedTuple):
    """The splits of a dataset and their common metadata."""

    splits: dict[str, Sequence[dict[str, Any]]]  # a subset of 'train', 'val' and 'test'
    class_names: tuple[str, ...]
    record_size: int  # side of the square images, pixels
    image_stats: image_stats.ImageStats | None  # None without a train split
    fingerprint: str = ''  # hash of all records in order, computed by `prepare`; '' for data not written by `prepare`

    def split(self, name: str) -> Sequence[dict[str, Any]]:
        """Returns the records of a split. Raises UserError if the split does not exist."""
        if name not in self.splits:
            raise UserError(f'no split {name!r} in this dataset; choose from: {", ".join(sorted(self.splits))}.')
        return self.splits[name]


def open_dataset(path: str | os.PathLike) -> Dataset:
    """Opens a directory written by `alexnet_jax prepare`, or 'digits'. Raises UserError if it cannot be opened."""
    path = os.fspath(path)
    if path == DIGITS:
        return _digits()
    if not path:
        raise UserError(f'no dataset given; use --config.data.path=DIR (prepared data) or --config.data.path={DIGITS}.')
    if not os.path.isdir(path):
        raise UserError(f'there is no data directory {path!r}; run alexnet_jax prepare --input=IMAGES --output={path}')
    with as_user_error(f'the data directory {path!r} cannot be used'):
        names = os.listdir(path)
    if 'dataset_info.json' not in names:
        raise UserError(
            f'{path!r} is not prepared data (no dataset_info.json); if it contains images, prepare them: '
            f'alexnet_jax prepare --input={path} --output=DIR'
        )
    return _prepared(path)


class _Subset(Sequence):
    """The records at given indices of a split."""

    def __init__(self, records: Sequence, indices: np.ndarray):
        self._records, self._indices = records, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        return self._records[int(self._indices[index])]


def subset(records: Sequence, fraction: float) -> Sequence:
    """Returns a fixed random subset of a split, in the split's order. Larger fractions contain the smaller subsets."""
    if fraction == 1:
        return records
    count = max(1, round(fraction * len(records)))
    return _Subset(records, np.sort(np.random.default_rng(0).permutation(len(records))[:count]))


def _prepared(path: str) -> Dataset:
    import tensorflow_datasets as tfds

    if checksums.present(path):  # array_record files have their own checksums; all other files do not
        if mismatches := checksums.find_mismatches(path, lambda name: 'array_record' not in name):
            raise UserError(f'the prepared data is damaged: {mismatches[0]}; prepare it again.')
    check_features(path)
    try:
        builder = tfds.builder_from_directory(path)
        features = builder.info.features
        label, image = features['label'], features['image']
        _check_declared(path, builder.info.splits.values(), label.num_classes)
        decoders = {'image': tfds.decode.SkipDecoding()} if isinstance(image, tfds.features.Image) else None
        splits: dict[str, Sequence[dict[str, Any]]] = {
            name: _Records(builder.as_data_source(name, decoders=decoders), f'{name} of {path}', split.filepaths)
            for name, split in builder.info.splits.items()
            if split.num_examples
        }
        class_names, (side, width, channels) = tuple(label.names), image.shape
        fingerprint = (builder.info.metadata or {}).get('fingerprint', '')
    except UserError:
        raise
    except Exception as error:  # TFDS and array_record raise many exception types for damaged files
        raise UserError(f'{path!r} cannot be opened as a prepared dataset: {first_line(error)}') from error
    if fingerprint and not checksums.present(path):  # `prepare` writes both
        raise UserError(f'the prepared data is damaged: {path}/{checksums.FILE_NAME} is missing; prepare it again.')
    if side is None or (side, channels) != (width, 3) or not 0 < side <= _MAX_SIDE:
        raise UserError(
            f'{path!r} has images of shape {image.shape}; expected squares of one size, at most {_MAX_SIDE} px, with 3 '
            'channels.'
        )
    return Dataset(splits, class_names, side, image_stats_file.load(path), fingerprint)


def _check_declared(path: str, splits: Iterable[Any], classes: int) -> None:
    """Raises UserError if files outside the directory, or impossible numbers of classes or records, are declared."""
    if classes > _MAX_UNNAMED:
        raise UserError(f'{path!r} declares {classes:,} classes; expected at most {_MAX_UNNAMED:,}.')
    for split in splits:
        files = list(map(os.fspath, split.filepaths))
        for file in files:
            if os.path.dirname(os.path.abspath(file)) != os.path.abspath(path) or '\0' in file:
                raise UserError(f'{path!r}: dataset_info.json names the file {file!r}, which is not in this directory.')
        if all(map(os.path.exists, files)) and split.num_examples > (size := sum(map(os.path.getsize, files))):
            raise UserError(f'{path!r} declares {split.num_examples:,} {split.name} records in {size:,} bytes.')
        for file in filter(os.path.exists, files):
            _check_shard(file)


def _check_shard(file: str) -> None:
    """Raises UserError if the first record is compressed: a small one may decode to any size."""
    with open(file, 'rb') as opened:
        start = opened.read(105)
    # Riegeli: 24 bytes of block header, 40 of signature, 40 of chunk header, compression type.
    transposed, compression = start[88:89] == b't', start[104:105]
    if transposed or compression in (b'b', b's', b'z'):
        raise UserError(f'{file!r} has compressed records; expected those of alexnet_jax prepare, which are not.')


def check_features(path: str) -> None:
    """Raises UserError if TFDS cannot read a directory safely.

    That is, if a file in it is a pipe or a device, or if features.json names a class that is not part of TFDS, which
    TFDS would import and call.
    """
    classes: list[str] = []

    def collect(node: dict[str, Any]) -> None:
        """Collects class names from a JSON object. TFDS has two spellings of the key, and 'type' in its old format."""
        keys = ('pythonClassName', 'python_class_name', 'type', 'proto_cls')
        classes.extend(name for key, name in node.items() if key in keys and isinstance(name, str))

    try:
        if special := [name for name in os.listdir(path) if is_special(os.path.join(path, name))]:
            raise ValueError(f'{special[0]!r} is not a regular file')
        with open(os.path.join(path, 'features.json'), encoding='utf-8') as file:
            text = file.read(_MAX_FEATURES_CHARS)
        if len(text) == _MAX_FEATURES_CHARS:
            raise ValueError(f'features.json has {_MAX_FEATURES_CHARS} characters or more')
        json.loads(text, object_hook=collect)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{path!r} cannot be opened as a prepared dataset: {first_line(error)}') from error
    for name in classes:
        if not name.startswith('tensorflow_datasets.core.features.'):
            raise UserError(f'{path!r}: features.json names the class {name!r}; expected only TFDS features.')


class _Records(Sequence):
    """A TFDS data source whose errors name the unreadable record or the missing file."""

    def __init__(self, source, name: str, files: Sequence[os.PathLike]):
        self._name, self._files, self._count = name, [os.fspath(file) for file in files], len(source)
        self._source, self._pickled_source = source, pickle.dumps(source)

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_source': None}  # a worker process opens its own source on its first read

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):  # IndexError ends a loop over the records
            raise IndexError(f'record {index} of {len(self)} in {self._name}')
        with contextlib.suppress(Exception):  # array_record and TFDS raise RuntimeError, DecodeError and others
            return self._source[index]
        try:  # retry with a new source: a reader that failed to open its file never recovers
            source = pickle.loads(self._pickled_source)
            record = source[index]
        except Exception as error:
            with as_user_error(f'lost access to the data files of {self._name}', 'Restore them and try again.'):
                for file in self._files:
                    open(file, 'rb').close()
            raise UnreadableError(
                f'record {index} in {self._name} cannot be read ({first_line(error)[:200]}); prepare the data again.'
            ) from error
        self._source = source
        return record


def _digits() -> Dataset:
    """Returns scikit-learn's 1,797 handwritten digits, enlarged from 8 to 32 px; 360 of them are the val split."""
    # Only its file is read, because importing scikit-learn takes longer than preparing the digits.
    if (found := importlib.util.find_spec('sklearn')) is None or found.origin is None:
        raise UserError(f"the {DIGITS} dataset needs scikit-learn: pip install 'alexnet_jax[quickstart]'")
    table = np.loadtxt(pathlib.Path(found.origin).parent / 'datasets' / 'data' / 'digits.csv.gz', delimiter=',')
    records = []
    for image, label in zip(table[:, :-1].reshape(-1, 8, 8), table[:, -1], strict=True):
        gray = Image.fromarray(np.uint8(np.round(image * (255 / 16)))).resize((32, 32), Image.Resampling.BILINEAR)
        records.append({'image': np.repeat(np.asarray(gray)[:, :, None], 3, axis=2), 'label': int(label)})
    order = np.random.default_rng(0).permutation(len(records))
    val, train = ([records[i] for i in part] for part in (order[:360], order[360:]))
    return in_memory({'train': train, 'val': val}, tuple(str(i) for i in range(10)), DIGITS)


def synthetic(image_size: int, num_classes: int) -> Dataset:
    """Returns 16 random images (256 px for image_size 224) for benchmarks; their speed does not depend on pixels."""
    size = augment.default_record_size(image_size)
    images = np.random.default_rng(0).integers(0, 256, (16, size, size, 3), np.uint8)
    names = tuple(str(i) for i in range(num_classes))
    return in_memory({'train': [{'image': image, 'label': i % len(names)} for i, image in enumerate(images)]}, names)


def _to_records(split: Sequence[dict[str, Any]] | Mapping[str, np.ndarray]) -> Sequence[dict[str, Any]]:
    """Converts a split given as arrays to a list of records; returns records unchanged. Raises UserError for others."""
    expected = "a dict of arrays 'image' and 'label', or a list of such dicts for one image each"
    if not isinstance(split, Mapping):
        if isinstance(split, np.ndarray) or not (hasattr(split, '__len__') and hasattr(split, '__getitem__')):
            raise UserError(f'a split is {_describe(split)}: expected {expected}.')
        for record in split:
            if not isinstance(record, Mapping) or not {'image', 'label'} <= set(record):
                raise UserError(f'a split holds {_describe(record)}: expected {expected}.')
        return split
    images: Any = split.get('image')
    try:
        labels = np.asarray(split.get('label'))
    except ValueError:  # rows of different lengths
        labels = np.array(None)
    if labels.ndim != 1 or not hasattr(images, '__len__') or getattr(images, 'shape', None) == ():
        raise UserError(f'a split is {_describe(split)}: expected {expected} of shapes (N, S, S, 3) and (N,).')
    if len(images) != len(labels):
        raise UserError(f'{len(images)} images and {len(labels)} labels; expected one label per image.')
    if len(labels) and labels.dtype.kind not in 'iu':
        raise UserError(f'the labels are {labels.dtype}; expected integers.')
    return [{'image': image, 'label': int(label)} for image, label in zip(images, labels, strict=True)]


def _describe(value: Any) -> str:
    """Returns the type of a value; for a dict also the shapes of its items."""
    if not isinstance(value, Mapping):
        return type(value).__name__
    shapes = [f'{key!r}: {getattr(item, "shape", type(item).__name__)}' for key, item in value.items()]
    return f'{{{", ".join(shapes)}}}'


def in_memory(
    splits: Mapping[str, Sequence[dict[str, Any]] | Mapping[str, np.ndarray]],
    class_names: Sequence[str] | None = None,
    fingerprint: str = '',
) -> Dataset:
    """Returns a dataset of images in memory. Computes the mean image and the color components of the train split.

    Args:
      splits: 'train' and optionally 'val' and 'test', each {'image': uint8 [N, S, S, 3], 'label': int [N]} or a list
        of {'image': uint8 [S, S, 3], 'label': int}. Empty splits are dropped.
      class_names: the names of labels 0, 1, ...; by default '0', '1', ... up to the highest label.
      fingerprint: an identifier of the images, with which a resumed run detects changed data.

    Raises:
      UserError: there are no training images, images differ in type or size, or a label has no name.

    >>> black, white = np.zeros((1, 8, 8, 3), np.uint8), np.full((1, 8, 8, 3), 255, np.uint8)
    >>> images = {'image': np.concatenate([black, white]), 'label': np.array([0, 1])}
    >>> dataset = in_memory({'train': images, 'val': images}, ['black', 'white'])
    >>> len(dataset.split('val')), dataset.record_size, float(dataset.image_stats.mean_image[0, 0, 0])
    (2, 8, 127.5)
    """
    check_type('splits', splits, Mapping, "a dict of 'train' and, optionally, 'val' and 'test'")
    if unknown := [name for name in splits if name not in _SPLITS]:
        raise UserError(f'split {unknown[0]!r}: expected one of {", ".join(_SPLITS)}.')
    given = {name: _to_records(split) for name, split in splits.items() if split is not None}
    if not given.get('train'):
        raise UserError(f"splits={list(given)}: expected a split 'train' with images.")
    given = {name: records for name, records in given.items() if records}
    all_records = list(itertools.chain(*given.values()))
    if class_names is None:
        labels = [record['label'] for record in all_records if isinstance(record['label'], int | np.integer)]
        if (highest := int(max(labels, default=0))) > _MAX_UNNAMED:
            raise UserError(f'the highest label is {highest}; give class_names for more than {_MAX_UNNAMED} classes.')
        class_names = [str(i) for i in range(1 + highest)]
    if isinstance(class_names, str) or not isinstance(class_names, Iterable):
        raise UserError(f'class_names={class_names!r}: expected a list of names.')
    class_names = tuple(str(name) if isinstance(name, int | np.integer) else name for name in class_names)
    for name in class_names:
        check_type('a class name', name, str, 'str')
    size = max(1, (*getattr(given['train'][0]['image'], 'shape', ()), 0)[0])
    for record in all_records:
        image, label = record['image'], record['label']
        if getattr(image, 'dtype', None) != np.uint8 or image.shape != (size, size, 3):
            found = f'{getattr(image, "dtype", type(image).__name__)} of shape {getattr(image, "shape", "?")}'
            raise UserError(
                f'an image is {found}; expected uint8 of shape ({size}, {size}, 3), like the first training image.'
            )
        if not isinstance(label, int | np.integer) or not 0 <= label < len(class_names):
            raise UserError(f'an image has the label {label!r}; expected an integer from 0 to {len(class_names) - 1}.')
    moments = image_stats.Moments.zeros(size)
    for record in given['train']:
        moments = moments.add(record['image'])
    return Dataset(given, class_names, size, image_stats.from_moments(moments), fingerprint)
