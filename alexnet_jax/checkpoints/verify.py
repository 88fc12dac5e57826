"""Compares checkpoints and prepared data with the digests that were written with them."""

import os
import re

from alexnet_jax.checkpoints import manager, repair
from alexnet_jax.utils import checksums
from alexnet_jax.utils.errors import UserError


def verify(path: str | os.PathLike) -> tuple[list[str], list[str]]:
    """(folders looked through, what is wrong in them as 'FILE: what'). Raises UserError where nothing has digests."""
    path = os.path.abspath(path)
    if not os.path.isdir(path):
        raise UserError(f'there is no directory {path!r}; expected prepared data, a workdir or a checkpoint.')
    below = (os.path.join(path, manager.FOLDER), path)
    folders = [os.path.join(folder, str(step)) for folder in below for step in repair.list_steps(folder)]
    prepared = os.path.exists(os.path.join(path, 'dataset_info.json'))
    step = re.fullmatch('[0-9]+', os.path.basename(path)) and not folders
    if checksums.present(path) or prepared or step:  # it may be both, a workdir in its data
        folders.append(path)
    if not folders:
        raise UserError(
            f'{path!r} holds nothing to verify; expected prepared data, a workdir with checkpoints, or one of its '
            'steps.'
        )
    mismatches = {folder: checksums.find_mismatches(folder) for folder in folders}
    there = [folder for folder in folders if os.path.isdir(folder)]  # a run removes its old steps
    return there, [mismatch for folder in there for mismatch in mismatches[folder]]
