"""Matches the classes of a dataset with the classes of a network by name, by WordNet id or by index."""

import collections
import functools
import re
import unicodedata
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from alexnet_jax.data import imagenet_classes
from alexnet_jax.data.imagenet_classes import are_numbers, with_meaning
from alexnet_jax.utils.errors import UnreadableError, UserError, listed

_WORDNET_ID = re.compile(r'(?<![A-Za-z0-9])n[0-9]{8}(?![0-9])')
_EXAMPLES = 3  # classes that a message names


class ClassMap(NamedTuple):
    """The class of a network for each class of a dataset."""

    names: tuple[str, ...]  # of the dataset
    network_names: tuple[str, ...]
    labels: np.ndarray  # int [len(names)]: indices into `network_names`; -1 if the network has no such class
    method: str  # '' if both have the same classes in the same order; otherwise such as 'WordNet id' or 'index'

    @property
    def missing(self) -> list[str]:
        """The classes of the dataset that the network does not have."""
        return [name for name, label in zip(self.names, self.labels, strict=True) if label < 0]

    def describe(self, path: str) -> str:
        """Returns "2 of 3 classes are classes of PATH, matched by name ('cat' = 'Cat', 'dog' = 'Dog')", for example."""
        pairs = [(name, self.network_names[k]) for name, k in zip(self.names, self.labels, strict=True) if k >= 0]
        shown = [f'{name!r} = {with_meaning(own)!r}' for name, own in pairs[: _EXAMPLES + 1]]
        matched = f'{len(pairs)} of {len(self.names)} classes are classes of {path}'
        return f'{matched}, matched by {self.method} ({listed(shown, _EXAMPLES)})'


def match_classes(names: Sequence[str], network_names: Sequence[str], path: str) -> ClassMap:
    """Matches each class of a dataset with a class of a network.

    Two classes match if they have the same name; if they have the same WordNet id, which is part of the name, as in
    'n01440764 tench', or belongs to the ILSVRC-2012 class of this name; or if the names differ only in case, blanks,
    '_', '-' or the text after a comma. A name that fits several classes matches none. If no class matches, names that
    are numbers are indices, and a network without names ('0', '1', ...) takes as many classes of any name in order.

    Args:
      names: class names of the dataset, in label order.
      network_names: class names of the network, in label order.
      path: of the network, for the messages.

    Raises:
      UserError: no class matches, two match the same class, or they are numbers that cannot be the network's indices.

    >>> match_classes(['Dog', 'car', 'tabby_cat'], ['tabby cat', 'dog'], 'runs/pets').labels
    array([ 1, -1,  0])
    """
    names, network_names = tuple(names), tuple(network_names)
    if names == network_names:
        return ClassMap(names, network_names, np.arange(len(names)), '')
    labels = _match_names(names, network_names)
    pairs = [(name, network_names[label]) for name, label in zip(names, labels, strict=True) if label >= 0]
    methods = ['WordNet id' if any(map(_WORDNET_ID.search, pair)) else 'name' for pair in pairs]
    if are_numbers(names) and are_numbers(network_names) and len(pairs) < len(names) == len(network_names):
        raise _numbers_differ(names, network_names, path)
    if not pairs:
        labels, methods = _match_indices(names, network_names, path), ['index']
    if not (labels >= 0).any():
        raise UserError(
            f'none of the {len(names)} classes of the data ({_some(names)}) is one of the {len(network_names)} of '
            f'{path} ({_some(network_names)}); name the class folders by WordNet id, name or index of its classes.'
        )
    _check_unique(names, network_names, labels, path)
    return ClassMap(names, network_names, labels, ' and '.join(dict.fromkeys(methods)))


def _match_names(names: Sequence[str], network_names: Sequence[str]) -> np.ndarray:
    """Returns the label of the network for each name, int [len(names)]; -1 where no name or WordNet id matches."""
    labels = [-1] * len(names)
    for key in (_exact, _wordnet_id, _simple):
        known = _unique(network_names, key)
        for i, name in enumerate(names):
            label = known.get(key(name), -1) if labels[i] < 0 else -1
            # 'Cardigan' (a dog) and 'cardigan' are two classes of ILSVRC-2012.
            if label >= 0 and len({_wordnet_id(name), _wordnet_id(network_names[label])} - {None}) <= 1:
                labels[i] = label
    return np.array(labels)


def _match_indices(names: Sequence[str], network_names: Sequence[str], path: str) -> np.ndarray:
    """Returns the labels of names that are indices, or of the outputs of a network without names; otherwise -1s."""
    count = len(network_names)
    if are_numbers(names) and not are_numbers(network_names):
        if max(map(int, names)) >= count:
            raise _numbers_differ(names, network_names, path)
        return np.array([int(name) for name in names])
    unnamed = len(names) == count and tuple(network_names) == tuple(map(str, range(count)))
    return np.arange(count) if unnamed else np.full(len(names), -1)


def _numbers_differ(names: Sequence[str], network_names: Sequence[str], path: str) -> UserError:
    numbers = sorted(map(int, names))
    return UserError(
        f'the classes of the data are the numbers {numbers[0]} to {numbers[-1]}, but {path} has {network_names[0]!r} '
        f'to {network_names[-1]!r} (indices 0 to {len(network_names) - 1}); rename the class folders to its classes.'
    )


def relabel(records: Sequence, labels: np.ndarray) -> tuple[Sequence, int]:
    """Returns the records of a split with labels of the network, and the number of images that were left out.

    `labels` is that of a ClassMap. An image of a class with label -1 is left out; to find these, all labels are read.
    """
    kept = np.arange(len(records))
    if (labels < 0).any():
        kept = np.array([i for i in range(len(records)) if _has_class(records, i, labels)], int)
    return _Relabeled(records, labels, kept), len(records) - len(kept)


def log_method(classes: ClassMap, path: str) -> None:
    """Logs how the classes of a dataset match those of the network at `path`; matches by index as a warning."""
    log = logging.warning if classes.method == 'index' else logging.info
    log('data: %s.', classes.describe(path))


def relabel_split(records: Sequence, classes: ClassMap, split: str, path: str) -> tuple[Sequence, int]:
    """Calls `relabel`. Warns of classes that the network at `path` does not have, and counts their images."""
    kept, left_out = relabel(records, classes.labels)
    if missing := classes.missing:
        logging.warning(
            f'{len(missing)} of {len(classes.names)} classes of the data have no match in {path}: '
            f'{listed(missing, 10)}; {left_out} of {len(records)} images of '
            f'{split} are left out. Name class folders by WordNet id, name or index of its classes.'
        )
    return kept, left_out


def align(checkpoints: Sequence[Any]) -> list[np.ndarray | None]:
    """Returns for each checkpoint the order in which its outputs have the classes of the first; None: as they are.

    Raises UserError if a checkpoint has other classes than the first.
    """
    orders: list[np.ndarray | None] = []
    names = checkpoints[0].class_names
    for number, checkpoint in enumerate(checkpoints, start=1):
        name = f'network {number} of the ensemble'
        matched = match_classes(names, checkpoint.class_names, name)
        if matched.missing or len(names) != len(checkpoint.class_names):
            raise UserError(
                f'{name} has {len(checkpoint.class_names)} classes, the first {len(names)}; '
                f'{len(matched.missing)} of these have no match ({_some(matched.missing)}): expected the same classes.'
            )
        if matched.method:
            logging.warning('first network: %s.', matched.describe(name))
        orders.append(matched.labels if matched.method else None)
    return orders


class _Relabeled(Sequence):
    """Some records of a split, with labels of the network. (Worker processes can load it.)"""

    def __init__(self, records: Sequence, labels: np.ndarray, indices: np.ndarray):
        self._records, self._labels, self._indices = records, labels, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        record = self._records[int(self._indices[index])]
        return {**record, 'label': int(self._labels[record['label']])}


def _has_class(records: Sequence, index: int, labels: np.ndarray) -> bool:
    try:
        return labels[records[index]['label']] >= 0
    except UnreadableError:
        return True  # the evaluation names and counts it


def _exact(name: str) -> str:
    return unicodedata.normalize('NFC', name)


def _simple(name: str) -> str | None:
    """Returns 'great white shark' for 'Great_white-shark, Carcharodon carcharias', and '7' for '007'."""
    words = re.split(r'[\s_-]+', _exact(name).casefold().split(',')[0])
    text = ' '.join(filter(None, words))
    return str(int(text)) if are_numbers([text]) else text or None


def _wordnet_id(name: str) -> str | None:
    """Returns the WordNet id in a name, or of the ILSVRC-2012 class with this name; None if there are none or two."""
    if found := _WORDNET_ID.search(name):
        return found[0]
    ids, exact, simple = _imagenet()
    index = exact.get(_exact(name), simple.get(_simple(name)))
    return None if index is None else ids[index]


@functools.cache
def _imagenet() -> tuple[tuple[str, ...], dict, dict]:
    ids, names = zip(*imagenet_classes.names().items(), strict=True)
    return ids, _unique(names, _exact), _unique(names, _simple)


def _unique(names: Sequence[str], key: Callable[[str], Hashable]) -> dict[Hashable, int]:
    """Returns {key of a name: its index}, without keys that are None or that several names have."""
    keys = [key(name) for name in names]
    counts = collections.Counter(keys)
    return {key: i for i, key in enumerate(keys) if key is not None and counts[key] == 1}


def _check_unique(names: Sequence[str], network_names: Sequence[str], labels: np.ndarray, path: str) -> None:
    first: dict[int, str] = {}
    for name, label in zip(names, labels.tolist(), strict=True):
        if label >= 0 and first.setdefault(label, name) != name:
            raise UserError(
                f'the classes {first[label]!r} and {name!r} of the data both match the class {network_names[label]!r} '
                f'of {path}; rename one of them, or merge their folders.'
            )


def _some(names: Sequence[str]) -> str:
    return listed(list(map(repr, names)), _EXAMPLES)
