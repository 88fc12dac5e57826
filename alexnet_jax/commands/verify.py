"""Verifies the files of checkpoints and prepared data against their SHA-256 digests.

    alexnet_jax verify DIR...

DIR is a prepared directory, a workdir (all its steps) or the folder of one step. If a file is damaged, missing or
incomplete, the command names it and ends with exit code 1. A step is incomplete while it is being saved.
"""

import sys
from collections.abc import Sequence

from absl import flags

from alexnet_jax.utils import logs

FLAGS = ()
ARGUMENTS = 'one directory or more'


def main(args: flags.FlagValues, paths: Sequence[str]) -> None:
    from alexnet_jax.checkpoints.verify import verify

    damaged = False
    for path in paths:
        folders, mismatches = verify(path)
        for mismatch in mismatches:
            print(logs.escape_controls(f'damaged: {mismatch}'), file=sys.stderr, flush=True)
        if not mismatches:
            print(f'{path}: all digests match (folders: {len(folders)}).', flush=True)
        damaged |= bool(mismatches)
    if damaged:
        sys.exit(1)
