"""The classes of ILSVRC-2012 in the order of their labels: WordNet ids and names."""

import functools
from importlib import resources


@functools.cache
def names() -> dict[str, str]:
    """{WordNet id: name} of the 1,000 classes: 'n01440764' is 'tench'."""
    text = resources.files('alexnet_jax.data').joinpath('imagenet_classes.tsv').read_text(encoding='utf-8')
    return dict(line.split('\t')[1:3] for line in text.splitlines())  # label, WordNet id, name


def wordnet_ids() -> tuple[str, ...]:
    """The 1,000 WordNet ids, 'n01440764' first."""
    return tuple(names())
