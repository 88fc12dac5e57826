"""What a kill or a bad disk leaves of a run's checkpoints, put right before the run goes on."""

import os
import re
import shutil

from alexnet_jax import digests
from alexnet_jax.errors import UserError

REPLACED = '.replaced'  # a step that is saved again, until the new one is sealed
REMOVED = 'removed'  # where a step goes before it is deleted: file by file a kill would leave half of it


def numbers(folder: str) -> list[int]:
    """Steps that have a folder in `checkpoints/`, finished or not, in order."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(int(name) for name in names if re.fullmatch('[0-9]+', name))


def repair(folder: str) -> list[str]:
    """Removes what a kill has left half done, and moves damaged steps aside, to `STEP.damaged`.

    Returns:
      what was wrong, a line for each.

    Raises:
      UserError: no step is whole.
      OSError: the folder cannot be used.
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
            if digests.has(step):
                shutil.rmtree(path)
            else:
                shutil.rmtree(step, ignore_errors=True)
                os.rename(path, step)
    steps = numbers(folder)
    found, good, unsealed = {}, 0, None
    for step in steps:
        path = os.path.join(folder, str(step))
        if step == steps[-1] and not digests.has(path):
            unsealed = path  # a kill can leave no other: each save waits for the one before
        elif problems := digests.problems(path):
            found[path] = problems[0]
        else:
            good += 1
    if found and not good:
        raise UserError(
            f'no checkpoint in {folder!r} is whole: {"; ".join(found.values())}. Put the files back, or begin anew in '
            f'another --workdir. (Versions of alexnet_jax before this one wrote no {digests.FILE_NAME}.)'
        )
    if unsealed:
        shutil.rmtree(unsealed)
        half_written.append(unsealed)
    for path in found:
        aside = f'{path}.damaged'
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
    return [f'{path}: half written, without {digests.FILE_NAME}; it is removed' for path in half_written] + [
        f'{problem}; it is now in {path}.damaged' for path, problem in found.items()
    ]
