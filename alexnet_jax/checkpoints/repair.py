"""Repairs the checkpoint folder after a crash or a disk error."""

import os
import re
import shutil

from alexnet_jax.utils import checksums
from alexnet_jax.utils.errors import UserError

REPLACED = '.replaced'  # a step that is saved again, until the new one is finalized
REMOVED = 'removed'  # where a step goes before it is deleted: file by file a kill would leave half of it


def list_steps(folder: str) -> list[int]:
    """Steps that have a folder in `checkpoints/`, finished or not, in order."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(int(name) for name in names if re.fullmatch('[0-9]+', name))


def repair(folder: str) -> list[str]:
    """Removes what a kill has left half done, and moves damaged steps aside, to `STEP.damaged`.

    Returns a line for each thing wrong. Raises UserError if no step is whole, OSError if the folder cannot be used.
    """
    os.makedirs(folder, exist_ok=True)
    half_written = []
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name == REMOVED or '.orbax-checkpoint-tmp' in name:
            shutil.rmtree(path)
            half_written += [path] * (name != REMOVED)
        elif name.endswith(REPLACED):  # the step that was to take its place counts only with its digests
            step = path.removesuffix(REPLACED)
            if checksums.present(step):
                shutil.rmtree(path)
            else:
                shutil.rmtree(step, ignore_errors=True)
                os.rename(path, step)
    paths = [os.path.join(folder, str(step)) for step in list_steps(folder)]
    # A kill can leave no other unfinished: each save waits for the one before.
    unfinished = [path for path in paths[-1:] if not checksums.present(path)]
    mismatches = {path: checksums.find_mismatches(path) for path in paths if path not in unfinished}
    damaged = {path: found[0] for path, found in mismatches.items() if found}
    if damaged and len(damaged) == len(mismatches):
        raise UserError(
            f'no checkpoint in {folder!r} is whole: {"; ".join(damaged.values())}. Put the files back, or begin anew '
            f'in another --workdir. (Versions of alexnet_jax before this one wrote no {checksums.FILE_NAME}.)'
        )
    for path in unfinished:
        shutil.rmtree(path)
    half_written += unfinished
    for path in damaged:
        aside = f'{path}.damaged'
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
    removed = [f'{path}: half written, without {checksums.FILE_NAME}; it is removed' for path in half_written]
    return removed + [f'{problem}; it is now in {path}.damaged' for path, problem in damaged.items()]
