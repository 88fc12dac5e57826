"""Checkpoints through orbax: the last two and the best are kept, and each alone can evaluate and predict.

A step's folder holds `params`, `training` (step and optimiser state), `statistics` (mean image, colour components) and
`meta` (config, class names, sizes). Parameters are stored in the global layout and restore on any mesh.
"""

import contextlib
import json
import os
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from alexnet_jax import augment, model
from alexnet_jax.augment import Augmentation
from alexnet_jax.errors import UserError
from alexnet_jax.statistics import Statistics
from alexnet_jax.steps import TrainState

FOLDER = 'checkpoints'
_ITEMS = ('params', 'training', 'statistics', 'meta')


class Checkpoint(NamedTuple):
    """A trained network with all it takes to use it."""

    step: int
    params: Any  # numpy, in the global layout
    network: model.AlexNet
    augmentation: Augmentation  # with it the size of the network's input, and what is subtracted from pixels
    record_size: int  # side of the images its cut-outs are taken from, pixels
    class_names: tuple[str, ...]
    statistics: Statistics
    config: dict[str, Any]

    @property
    def image_size(self) -> int:
        """Side of the network's input, pixels."""
        return self.augmentation.image_size


def open_manager(workdir: str, *, read_only: bool = False) -> ocp.CheckpointManager:
    """Asynchronous manager of a workdir's checkpoints; keeps the last two and the one with the lowest val error.

    read_only: for all but the training process; it touches nothing, also not a save under way in another process.
    """
    best = checkpoint_managers.BestN(
        get_metric_fn=lambda metrics: metrics['top1_error'], reverse=True, n=1, keep_checkpoints_without_metrics=False
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(2), best]),
        best_fn=lambda metrics: metrics['top1_error'],
        best_mode='min',
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
        create=not read_only,
        save_interval_steps=0 if read_only else 1,
    )
    return ocp.CheckpointManager(_path(os.path.join(workdir, FOLDER)), options=options, item_names=_ITEMS)


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    statistics: Statistics,
    meta: dict[str, Any],
    top1_error: float | None,
) -> None:
    """Starts saving a state under its step; waits first for a save still under way (orbax would skip this one).

    state: without optimiser state (None) the checkpoint can be used, but no run goes on from it.
    meta: see `Checkpoint`: 'config', 'class_names', 'image_size', 'record_size', 'examples', 'fingerprint'.
    top1_error: of the validation just made, percent; None where there was none.
    """
    items = {
        'params': ocp.args.StandardSave(state.params),
        'statistics': ocp.args.StandardSave(statistics._asdict()),
        'meta': ocp.args.JsonSave(meta),
    }
    if state.opt_state is not None:
        items['training'] = ocp.args.StandardSave({'step': state.step, 'opt_state': state.opt_state})
    manager.wait_until_finished()
    saved = manager.save(
        int(state.step),
        args=ocp.args.Composite(**items),
        metrics=None if top1_error is None else {'top1_error': top1_error},
    )
    if not saved:
        raise RuntimeError(f'orbax did not save step {int(state.step)}')


@contextlib.contextmanager
def _readable(manager: ocp.CheckpointManager, step: int):
    """Turns what orbax and tensorstore raise for missing and damaged files, of many kinds, into one UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f'the checkpoint {manager.directory / str(step)} is of another version: {error}') from error
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f'the checkpoint {manager.directory / str(step)} cannot be read ({reason}); move that folder away to '
            'use the one before it.'
        ) from error


def restore(manager: ocp.CheckpointManager, step: int, like: TrainState) -> TrainState:
    """Restores a training state; `like` has ShapeDtypeStructs with the shardings wanted. Raises UserError."""
    with _readable(manager, step):
        items = manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(like.params),
                training=ocp.args.StandardRestore({'step': like.step, 'opt_state': like.opt_state}),
            ),
        )
    return TrainState(items.training['step'], items.params, items.training['opt_state'])


def read_meta(manager: ocp.CheckpointManager, step: int) -> tuple[dict[str, Any], Statistics]:
    """What lies beside a step's arrays: (meta, statistics). Raises UserError."""
    with _readable(manager, step):
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = manager.restore(step, args=args).meta
        side = meta['record_size']
        like = Statistics(*(np.zeros(shape, np.float32) for shape in ((side, side, 3), (3,), (3, 3))))
        args = ocp.args.Composite(statistics=ocp.args.StandardRestore(like._asdict()))
        return meta, Statistics(**manager.restore(step, args=args).statistics)


def load_checkpoint(path: str) -> Checkpoint:
    """Loads a network for evaluation, prediction or fine-tuning.

    Args:
      path: a workdir or its `checkpoints` folder (the best step, else the latest), or one step's folder in there.

    Raises:
      UserError: there is no checkpoint, or it cannot be read.
    """
    root, step = _find(path)
    with open_manager(root, read_only=True) as manager:
        if step is None:
            step = manager.best_step()
        if step is None:
            step = manager.latest_step()
        if step is None:
            raise UserError(f'there is no checkpoint in {path!r} yet; train first with alexnet_jax.main.')
        meta, statistics = read_meta(manager, step)
        with _readable(manager, step):
            network = model.from_config(meta['config']['model'])
            augmentation = augment.from_config(meta['config']['data'])
        shapes = jax.eval_shape(lambda key: model.init(network, key, meta['image_size']), jax.random.key(0))
        like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        with _readable(manager, step):
            params = manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(like))).params
    return Checkpoint(
        step=step,
        params=params,
        network=network,
        augmentation=augmentation,
        record_size=meta['record_size'],
        class_names=tuple(meta['class_names']),
        statistics=statistics,
        config=meta['config'],
    )


def _find(path: str) -> tuple[str, int | None]:
    """(workdir, step) of what a user may call a checkpoint."""
    path = _path(path)
    parent, name = os.path.split(path)
    if name == FOLDER and os.path.isdir(path):
        return parent, None
    if name.isdigit() and os.path.basename(parent) == FOLDER and os.path.isdir(path):
        return os.path.dirname(parent), int(name)
    if os.path.isdir(os.path.join(path, FOLDER)):
        return path, None
    raise UserError(
        f'there is no checkpoint at {path!r}; expected a workdir of alexnet_jax.main or one of its '
        f'{FOLDER}/STEP folders.'
    )


def _path(path: str) -> str:
    """As orbax takes it: absolute, without a slash at the end."""
    return path.rstrip('/') if '://' in path else os.path.abspath(path)


def config_to_json(config) -> dict[str, Any]:
    """A ConfigDict as plain JSON values (tuples become lists)."""
    return json.loads(config.to_json())
