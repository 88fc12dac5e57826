"""Compares checkpoints and prepared data with the digests that were written with them.

    alexnet_jax verify DIR...

DIR is a directory of `prepare`, a workdir (all its steps), or one step's folder. Exit code 1, naming each file, where
anything is damaged, missing or half-written (as the last step of a run is while it saves).
"""

import sys
from collections.abc import Sequence

from absl import flags

FLAGS = ()
ARGUMENTS = 'one directory or more'


def main(args: flags.FlagValues, paths: Sequence[str]) -> None:
    from alexnet_jax.checkpoints.verify import verify

    damaged = False
    for path in paths:
        folders, mismatches = verify(path)
        for mismatch in mismatches:
            print(f'damaged: {mismatch}', file=sys.stderr, flush=True)
        if not mismatches:
            noun = 'folder' if len(folders) == 1 else 'folders'
            print(f'{path}: all as written ({len(folders)} {noun}).', flush=True)
        damaged |= bool(mismatches)
    if damaged:
        sys.exit(1)
