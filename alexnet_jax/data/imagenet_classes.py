"""WordNet ids and names of the ILSVRC-2012 classes, in label order."""

import functools
from importlib import resources


@functools.cache
def names() -> dict[str, str]:
    """Returns {WordNet id: name} of the 1,000 classes, for example {'n01440764': 'tench', ...}."""
    text = resources.files('alexnet_jax.data').joinpath('imagenet_classes.tsv').read_text(encoding='utf-8')
    return dict(line.split('\t')[1:3] for line in text.splitlines())  # columns: label, WordNet id, name


def wordnet_ids() -> tuple[str, ...]:
    """Returns the 1,000 WordNet ids; 'n01440764' is the first."""
    return tuple(names())
