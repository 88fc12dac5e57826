"""Checks the files of checkpoints and prepared data against their digests."""

import os
import re

from alexnet_jax.checkpoints import manager, repair
from alexnet_jax.utils import checksums
from alexnet_jax.utils.errors import UserError


def verify(path: str | os.PathLike) -> tuple[list[str], list[str]]:
    """Returns (folders checked, problems as 'FILE: PROBLEM'). Raises UserError if there is nothing to check."""
    path = os.path.abspath(path)
    if not os.path.isdir(path):
        raise UserError(f'there is no directory {path!r}; expected prepared data, a workdir or a checkpoint.')
    parents = (os.path.join(path, manager.FOLDER), path)
    folders = [os.path.join(parent, str(step)) for parent in parents for step in repair.list_steps(parent)]
    prepared = os.path.exists(os.path.join(path, 'dataset_info.json'))
    step = re.fullmatch('[0-9]+', os.path.basename(path)) and not folders
    if checksums.present(path) or prepared or step:  # a folder may be both prepared data and a workdir
        folders.append(path)
    if not folders:
        raise UserError(f'{path!r} contains nothing to verify; expected prepared data, a workdir or a checkpoint.')
    mismatches = {folder: checksums.find_mismatches(folder) for folder in folders}
    existing = [folder for folder in folders if os.path.isdir(folder)]  # a run may have removed its old steps
    return existing, [mismatch for folder in existing for mismatch in mismatches[folder]]
