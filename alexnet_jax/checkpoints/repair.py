"""Repairs the checkpoint folder after a crash or a disk error."""

import os
import re
import shutil

from alexnet_jax.utils import checksums
from alexnet_jax.utils.errors import UserError

REPLACED = '.replaced'  # suffix of a step's old folder while the step is saved again
REMOVED = 'removed'  # folder for steps to be deleted: a crash may leave partially deleted steps
_STEP = '(?:0|[1-9][0-9]*)'  # the name of a step's folder


def list_steps(folder: str) -> list[int]:
    """Returns the sorted steps that have a folder in a `checkpoints` folder, including incomplete steps."""
    if not os.path.isdir(folder):
        return []
    return sorted(int(entry.name) for entry in os.scandir(folder) if re.fullmatch(_STEP, entry.name) and entry.is_dir())


def repair(folder: str) -> list[str]:
    """Removes incomplete steps, which a crash leaves, and moves damaged steps to `STEP.damaged`.

    Returns one line per problem. Raises UserError if all steps are damaged, OSError if the folder cannot be used.
    """
    os.makedirs(folder, exist_ok=True)
    incomplete = []
    for name in [entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]:
        path = os.path.join(folder, name)  # a folder that a run made, if its whole name is one of these:
        if name == REMOVED:
            shutil.rmtree(path)
        elif re.fullmatch(rf'{_STEP}\.orbax-checkpoint-tmp.*', name):
            incomplete.append(path)
        elif re.fullmatch(_STEP + re.escape(REPLACED), name):  # delete the old folder only if the new one is complete
            step = path.removesuffix(REPLACED)
            if checksums.present(step):
                shutil.rmtree(path)
            else:
                shutil.rmtree(step, ignore_errors=True)
                os.rename(path, step)
    paths = [os.path.join(folder, str(step)) for step in list_steps(folder)]
    # Only the last step can be incomplete: each save waits for the previous one.
    incomplete += [path for path in paths[-1:] if not checksums.present(path)]
    mismatches = {path: checksums.find_mismatches(path) for path in paths if path not in incomplete}
    damaged = {path: found[0] for path, found in mismatches.items() if found}
    if damaged and len(damaged) == len(mismatches):
        raise UserError(
            f'all checkpoints in {folder!r} are damaged: {"; ".join(damaged.values())}. Restore the files, or start '
            f'again in another --workdir. (Earlier versions of alexnet_jax did not write {checksums.FILE_NAME}.)'
        )
    for path in incomplete:
        shutil.rmtree(path)
    for path in damaged:
        shutil.rmtree(f'{path}.damaged', ignore_errors=True)
        os.rename(path, f'{path}.damaged')
    removed = [f'{path}: incomplete step (no {checksums.FILE_NAME}), removed' for path in incomplete]
    return removed + [f'{problem}; moved to {path}.damaged' for path, problem in damaged.items()]
