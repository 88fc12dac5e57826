"""Compares checkpoints and prepared data with the digests that were written with them.

    python -m alexnet_jax.verify DIR...

DIR is a directory of `prepare`, a workdir (all its steps), or one step's folder. Exit code 1, naming each file, where
anything is damaged, missing or half-written (as the last step of a run is while it saves).
"""

import os
import re
import sys
from collections.abc import Sequence

from alexnet_jax import checkpoint, cli, digests, recovery
from alexnet_jax.errors import UserError


def verify(path: str) -> tuple[list[str], list[str]]:
    """(folders that were looked through, what is wrong in them as 'FILE: what').

    Raises:
      UserError: there is nothing with digests.
    """
    path = os.path.abspath(path)
    if not os.path.isdir(path):
        raise UserError(f'there is no directory {path!r}; expected prepared data, a workdir or a checkpoint.')
    below = (os.path.join(path, checkpoint.FOLDER), path)
    folders = [os.path.join(folder, str(step)) for folder in below for step in recovery.numbers(folder)]
    prepared = os.path.exists(os.path.join(path, 'dataset_info.json'))
    step = re.fullmatch('[0-9]+', os.path.basename(path)) and not folders
    if digests.has(path) or prepared or step:  # it may be both, a workdir in its data
        folders.append(path)
    if not folders:
        raise UserError(
            f'{path!r} holds nothing to verify; expected prepared data, a workdir with checkpoints, or one of its '
            'steps.'
        )
    found = {folder: digests.problems(folder) for folder in folders}
    found = {folder: own for folder, own in found.items() if os.path.isdir(folder)}  # a run removes its old steps
    return list(found), [problem for own in found.values() for problem in own]


def main(paths: Sequence[str]) -> None:
    damaged = False
    for path in paths:
        folders, found = verify(path)
        for problem in found:
            print(f'damaged: {problem}', file=sys.stderr, flush=True)
        if not found:
            print(
                f'{path}: all as written ({len(folders)} {"folder" if len(folders) == 1 else "folders"}).', flush=True
            )
        damaged |= bool(found)
    if damaged:
        sys.exit(1)


if __name__ == '__main__':
    cli.run(main, required=(), arguments='one directory or more')
