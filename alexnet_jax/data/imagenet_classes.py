"""The classes of ILSVRC-2012 in the order of their labels: WordNet ids and names."""

import functools
from importlib import resources


@functools.cache
def wordnet_ids() -> tuple[str, ...]:
    """The 1,000 WordNet ids, 'n01440764' first."""
    text = resources.files('alexnet_jax.data').joinpath('imagenet_classes.tsv').read_text(encoding='utf-8')
    return tuple(line.split('\t')[1] for line in text.splitlines())  # label, WordNet id, name
