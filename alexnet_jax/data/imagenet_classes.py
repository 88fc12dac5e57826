"""WordNet IDs and names of the ILSVRC-2012 classes, in label order."""

import functools
from importlib import resources


@functools.cache
def names() -> dict[str, str]:
    """Returns {WordNet ID: name} for the 1,000 classes, for example {'n01440764': 'tench', ...}."""
    text = resources.files('alexnet_jax.data').joinpath('imagenet_classes.tsv').read_text(encoding='utf-8')
    return dict(line.split('\t')[1:3] for line in text.splitlines())  # columns: label, WordNet ID, name


def wordnet_ids() -> tuple[str, ...]:
    """Returns the 1,000 WordNet IDs; the first is 'n01440764'."""
    return tuple(names())
