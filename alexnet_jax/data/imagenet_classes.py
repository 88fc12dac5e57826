"""WordNet IDs and names of the ILSVRC-2012 classes, in label order."""

import functools
from collections.abc import Sequence
from importlib import resources

_MAX_DIGITS = 100  # of a class that is a number; Python reads at most 4,300


@functools.cache
def names() -> dict[str, str]:
    """Returns {WordNet ID: name} for the 1,000 classes, for example {'n01440764': 'tench', ...}."""
    text = resources.files('alexnet_jax.data').joinpath('imagenet_classes.tsv').read_text(encoding='utf-8')
    return dict(line.split('\t')[1:3] for line in text.splitlines())  # columns: label, WordNet ID, name


def wordnet_ids() -> tuple[str, ...]:
    """Returns the 1,000 WordNet IDs; the first is 'n01440764'."""
    return tuple(names())


def with_meaning(name: str) -> str:
    """Returns the name of a class, after its meaning if it is a WordNet id of ILSVRC-2012.

    >>> with_meaning('n01440764'), with_meaning('my cat')
    ('tench, n01440764', 'my cat')
    """
    meaning = names().get(name)
    return f'{meaning}, {name}' if meaning else name


def are_numbers(class_names: Sequence[str]) -> bool:
    """Returns whether all class names are decimal numbers, as the folders of ImageNet-V2 are."""
    return all(name.isascii() and name.isdecimal() and len(name) <= _MAX_DIGITS for name in class_names)
