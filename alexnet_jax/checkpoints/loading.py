"""Loads the network of a saved checkpoint for inference or fine-tuning."""

import os
import re

from alexnet_jax.checkpoints.manager import FOLDER, Checkpoint, CheckpointManager
from alexnet_jax.utils.errors import UserError, as_user_error
from alexnet_jax.utils.files import absolute_local_path, as_path


def load_saved(path: str | os.PathLike) -> Checkpoint:
    """Loads a network that `alexnet_jax` has saved as a checkpoint.

    Args:
      path: the folder of a step, or a workdir or its `checkpoints` folder (loads the best step, else the latest).

    Returns:
      A `Checkpoint`: the network, its parameters (numpy), class names, image statistics and config.

    Raises:
      UserError: there is no checkpoint, or it cannot be read.
    """
    path = as_path(path)
    with as_user_error(f'the checkpoint {path!r} cannot be read'):
        workdir, step = _find(path)
        with CheckpointManager(workdir, read_only=True) as checkpoints:
            for choose in (checkpoints.best, checkpoints.latest):
                step = choose() if step is None else step
            if step is None:
                raise UserError(f'there is no checkpoint in {path!r} yet; train first: alexnet_jax train.')
            return checkpoints.load(step)


def _find(path: str) -> tuple[str, int | None]:
    """Splits a checkpoint path into (workdir, step); the step is None if the path does not contain one."""
    path = absolute_local_path(path)
    parent, name = os.path.split(path)
    if name == FOLDER and os.path.isdir(path):
        return parent, None
    if re.fullmatch('[0-9]+', name) and os.path.basename(parent) == FOLDER and os.path.isdir(path):
        return os.path.dirname(parent), int(name)
    if os.path.isdir(os.path.join(path, FOLDER)):
        return path, None
    if os.path.isfile(path):
        raise UserError(f'{path!r} is a file, not a checkpoint; use alexnet_jax convert to convert a file of weights.')
    if os.path.isdir(os.path.join(path, 'run', FOLDER)):
        raise UserError(f'there is no checkpoint at {path!r}. Did you mean {os.path.join(path, "run")!r}?')
    raise UserError(f'there is no checkpoint at {path!r}; expected a workdir or one of its {FOLDER}/STEP folders.')
