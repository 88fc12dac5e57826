"""Orbax checkpoints: keeps the last two steps and the best one. Each suffices for evaluation and prediction.

The folder of a step has `params`, `training` (step and optimizer state), `image_stats` (mean image, color components),
`meta` (config, class names, sizes) and the digests of all its files. A step without digests is incomplete and ignored.
If the optimizer averages the parameters, `params` has the average, and `training` the parameters in its place.
Parameters are stored in the global layout and can be restored on any mesh.
"""

import contextlib
import functools
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from alexnet_jax.checkpoints import arrays, repair
from alexnet_jax.core import architecture, augment, model
from alexnet_jax.core.augment import Augmentation
from alexnet_jax.core.config import augmentation_from_config, model_from_config
from alexnet_jax.core.image_stats import ImageStats
from alexnet_jax.core.train_step import TrainState
from alexnet_jax.utils import checksums, distributed
from alexnet_jax.utils.errors import TerminatedError, UserError, as_user_error, first_line
from alexnet_jax.utils.files import absolute_local_path, as_utf8

FOLDER = 'checkpoints'
FORMAT = 3  # format version of checkpoints; version 1 did not state it
_METRICS = 'metrics'  # name of an item and of its file
_NUM_LAST = 2  # number of last steps to keep, besides the best
_WARN_SECONDS = 60  # of waiting for a save


class Checkpoint(NamedTuple):
    """A trained network with everything needed to use it."""

    step: int
    params: Any  # numpy, in the global layout
    network: model.AlexNet
    augmentation: Augmentation  # also the preprocessing for inference: input size and mean subtraction
    record_size: int  # side of the images that crops are taken from, pixels
    class_names: tuple[str, ...]
    image_stats: ImageStats
    config: dict[str, Any]

    @property
    def image_size(self) -> int:
        """Side of the network's input, pixels."""
        return self.augmentation.image_size

    def __repr__(self) -> str:
        layers, classes = ' '.join(self.network.layers), len(self.class_names)
        return f'Checkpoint(step={self.step}, {layers}, {classes} classes, {self.image_size} of {self.record_size} px)'


def check_workdir(path: str | os.PathLike) -> None:
    """Raises UserError if orbax cannot save in a folder, because it treats paths as UTF-8 glob patterns."""
    path = absolute_local_path(path)
    if re.search(r'[\[*?\\]', path) or as_utf8(path) != path:
        raise UserError(
            f'{path!r}: checkpoints cannot be saved below a name with [ * ? \\ or invalid UTF-8; rename it.'
        )


class CheckpointManager(contextlib.AbstractContextManager):
    """The steps saved in a workdir: the last two, and the one with the lowest val error.

    Saves in the background, then finalizes the step by writing the digests of all its files. The constructor removes
    steps without digests, moves damaged steps to `STEP.damaged` and lists both in `damaged`, so that `latest()` is
    always intact. Use the manager as a context manager; its exit waits for the save in progress.

    read_only: change nothing, not even an incomplete step, which another process may be saving. Required outside the
    training process. Raises UserError if every step is damaged or the folder cannot be used.
    """

    def __init__(self, workdir: str, *, read_only: bool = False):
        self.folder = absolute_local_path(os.path.join(workdir, FOLDER))
        self.damaged: list[str] = []
        if not read_only:
            check_workdir(workdir)
            with as_user_error(f'the checkpoints in {self.folder!r} cannot be opened'):
                self.damaged = distributed.broadcast_from_process_0(lambda: repair.repair(self.folder))
        # Orbax's CheckpointManager is not used: it reads all steps when it opens, including damaged ones; and if a save
        # fails in one of several processes, all processes wait for each other forever.
        trees = {name: ocp.StandardCheckpointHandler() for name in ('params', 'training', 'image_stats')}
        texts = {'meta': ocp.JsonCheckpointHandler(), _METRICS: ocp.JsonCheckpointHandler(filename=_METRICS)}
        handler = ocp.CompositeCheckpointHandler(**trees, **texts)
        # Create directories synchronously: an error in the background would never reach the threads that wait for it.
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        self._orbax = ocp.AsyncCheckpointer(handler, async_options=options)
        self._finalizer = futures.ThreadPoolExecutor(1)
        self._finalizing: futures.Future | None = None

    def __exit__(self, kind, *_) -> None:
        # After an error in one of several processes, closing would wait for the others forever.
        if kind in (None, TerminatedError) or jax.process_count() == 1:
            self.close()

    def close(self) -> None:
        """Waits for the save in progress and closes. Raises UserError if the save failed."""
        try:
            self.wait()
        finally:
            self._finalizer.shutdown()
            with contextlib.suppress(Exception):  # would raise the error of `wait` again
                self._orbax.close()

    def wait(self) -> None:
        """Waits until the save in progress is finalized, and warns each minute. Raises UserError if it failed."""
        if self._finalizing is not None:
            finalizing, self._finalizing = self._finalizing, None
            while not futures.wait([finalizing], _WARN_SECONDS).done:
                logging.warning(
                    'still waiting for a checkpoint to be saved in %r. Either its disk is slow, or the clock was set '
                    'back during the save, which then waits until the clock has caught up.',
                    self.folder,
                )
            finalizing.result()

    def poll(self) -> None:
        """Raises UserError if the save in progress has already failed. Does not wait."""
        if self._finalizing is not None and self._finalizing.done():
            self.wait()

    def steps(self) -> list[int]:
        """Returns the complete steps in ascending order."""
        return [step for step in repair.list_steps(self.folder) if checksums.present(self._path(step))]

    def latest(self) -> int | None:
        """Returns the last complete step, or None if there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Returns the step with the lowest val error, or None without one. Raises UserError if a step is damaged."""
        errors = self._val_errors()
        for step, error in errors.items():
            if isinstance(error, UserError) and os.path.isdir(self._path(step)):  # else the run has removed the step
                raise error
        return _lowest(errors)

    def _val_errors(self) -> dict[int, float | UserError | None]:
        """Returns {step: val error in percent}; the value is None without validation and a UserError if unreadable.

        Includes earlier steps without digests: they are damaged, because only the last step can be incomplete.
        """
        steps = repair.list_steps(self.folder)
        errors: dict[int, float | UserError | None] = {}
        for step in steps:
            folder = self._path(step)
            if not checksums.present(folder) and (step == steps[-1] or not os.path.isdir(folder)):
                continue
            path = os.path.join(folder, _METRICS, _METRICS)
            try:
                self.check(step, lambda name: name.startswith(f'{_METRICS}/'))
                errors[step] = None
                if os.path.exists(path):  # a step with correct digests and without this file was not validated
                    with self._read_errors(step), open(path, encoding='utf-8') as file:
                        errors[step] = float(json.load(file)['top1_error'])
            except UserError as error:
                errors[step] = error
        return errors

    def check(self, step: int, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Raises UserError if files of a step have changed. wanted: see `checksums.find_mismatches`."""
        if mismatches := checksums.find_mismatches(self._path(step), wanted):
            self._check_exists(step)
            others = ', '.join(str(s) for s in self.steps() if s != step)
            remedy = f'Other steps in {self.folder!r}: {others}.' if others else 'There is no other step.'
            raise UserError(f'the checkpoint is damaged: {mismatches[0]}. {remedy}')

    def _check_exists(self, step: int) -> None:
        if not os.path.isdir(path := self._path(step)):
            raise UserError(f'{path} was removed during reading, because its run saved newer steps; try again.')

    def save(self, state: TrainState, image_stats: ImageStats, meta: dict[str, Any], top1_error: float | None) -> None:
        """Starts saving a state under its step number, replacing an existing one. First waits for the save in progress.

        state: without an optimizer state (None), training cannot resume from the checkpoint.
        meta: JSON with 'config', 'class_names', 'record_size', 'fingerprint' and 'examples' (training images, or 0).
        top1_error: the val error at this step, percent; None without validation.

        Raises UserError if this or the previous state cannot be written. Steps saved earlier stay unchanged.
        """
        state = state.swap_average()  # the averaged parameters are those to evaluate
        trees: dict[str, Any] = {'params': state.params, 'image_stats': image_stats._asdict()}
        if state.opt_state is not None:
            trees['training'] = {'step': state.step, 'opt_state': state.opt_state}
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items['meta'] = ocp.args.JsonSave({**meta, 'format': FORMAT})
        if top1_error is not None:
            items[_METRICS] = ocp.args.JsonSave({'top1_error': top1_error})
        self.wait()
        step = int(state.step)
        with self._save_errors(step):
            path = self._path(step)
            distributed.broadcast_from_process_0(lambda: _move_aside(path))
            self._orbax.save(path, args=ocp.args.Composite(**items))
        shapes = {name: arrays.shapes_by_name(tree) for name, tree in trees.items()}
        self._finalizing = self._finalizer.submit(self._finalize, step, shapes)

    def _finalize(self, step: int, shapes: dict[str, arrays.Shapes]) -> None:
        with self._save_errors(step):
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                self._check_readable(step, shapes)
                checksums.write(self._path(step))
                removed = os.path.join(self.folder, repair.REMOVED)
                os.makedirs(removed, exist_ok=True)
                for old in self._steps_to_remove():
                    os.rename(self._path(old), os.path.join(removed, str(old)))
                for path in (self._path(step) + repair.REPLACED, removed):
                    shutil.rmtree(path, ignore_errors=True)

    def _check_readable(self, step: int, shapes: dict[str, arrays.Shapes]) -> None:
        """Reads back what a saved step declares: orbax has reported success for steps that could not be read."""
        try:
            for item, expected in shapes.items():
                arrays.check_declared(self._path(step, item), expected)
        except Exception as error:
            raise UserError(
                f'step {step} was saved in {self.folder!r}, but cannot be read ({first_line(error)}). Steps saved '
                'earlier are unchanged; run the same command again, in another directory if this repeats.'
            ) from error

    def _steps_to_remove(self) -> list[int]:
        """Returns all steps but the last two, the best and unreadable ones. Warns about unreadable steps."""
        errors = self._val_errors()
        unreadable = [step for step, error in errors.items() if isinstance(error, UserError)]
        for step in unreadable:
            logging.warning(str(errors[step]))
        kept = {*list(errors)[-_NUM_LAST:], *unreadable, _lowest(errors)}
        return [step for step in errors if step not in kept]

    def _save_errors(self, step: int):
        remedy = 'Steps saved earlier are unchanged; fix the problem and run the same command again.'
        return as_user_error(f'step {step} cannot be saved in {self.folder!r}', remedy)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Restores a training state. like: its shapes and shardings, as ShapeDtypeStructs. Raises UserError."""
        trees = {'params': like.params, 'training': {'step': like.step, 'opt_state': like.opt_state}}
        with self._read_errors(step):
            for item, tree in trees.items():
                arrays.check_declared(self._path(step, item), arrays.shapes_by_name(tree))
            args = {item: ocp.args.StandardRestore(tree) for item, tree in trees.items()}
            items = self._orbax.restore(self._path(step), args=ocp.args.Composite(**args))
        return TrainState(items.training['step'], items.params, items.training['opt_state']).swap_average()

    def read_meta(self, step: int) -> tuple[dict[str, Any], ImageStats]:
        """Returns (meta, image_stats) of a step. Raises UserError if they cannot be read."""
        with self._read_errors(step):
            meta = self._orbax.restore(self._path(step), args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
            if (number := meta.get('format', 1)) != FORMAT:
                raise UserError(f'its format is {number}, expected {FORMAT}; use the version that wrote it.')
            size = meta['record_size']
            shapes = {'mean_image': (size, size, 3), 'eigenvalues': (3,), 'eigenvectors': (3, 3)}
            like = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
            return meta, ImageStats(**self._load_arrays(step, 'image_stats', like))

    def load(self, step: int) -> Checkpoint:
        """Checks the files of a step and loads its network. Raises UserError if it cannot be read."""
        self.check(step, lambda name: not name.startswith('training/'))  # not needed, and two thirds of the bytes
        meta, image_stats = self.read_meta(step)
        with self._read_errors(step):
            config, record_size = meta['config'], meta['record_size']
            network = model_from_config(config['model'])
            augmentation = augmentation_from_config(config['data'])
            augment.crop_positions(record_size, augmentation.image_size)
            architecture.infer_shapes(network, augmentation.image_size)
            class_names = tuple(map(str, meta['class_names']))
            if len(class_names) != network.num_classes:
                raise ValueError(f'{len(class_names)} class names for {network.num_classes} classes')
            init = functools.partial(model.init_params, network, image_size=augmentation.image_size)
            params = self._load_arrays(step, 'params', jax.eval_shape(init, jax.random.key(0)))
        return Checkpoint(step, params, network, augmentation, record_size, class_names, image_stats, config)

    def _load_arrays(self, step: int, item: str, like: dict[str, Any]) -> dict[str, Any]:
        """Returns numpy arrays of a step. Compares declared shapes with `like`: orbax would allocate any shape."""
        arrays.check_declared(self._path(step, item), arrays.shapes_by_name(like))
        arrays.check_size(self._path(step, item), like)
        args = ocp.args.StandardRestore(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like))
        return self._orbax.restore(self._path(step), args=ocp.args.Composite(**{item: args}))[item]

    @contextlib.contextmanager
    def _read_errors(self, step: int):
        """Converts the many exception types of orbax and tensorstore for missing and damaged files to UserError."""
        try:
            yield
        except UserError as error:
            raise UserError(f'the checkpoint {self._path(step)} is from another version: {error}') from error
        except Exception as error:
            self._check_exists(step)
            reason = first_line(error).partition(' [tensorstore_spec=')[0][:300]
            raise UserError(
                f'the checkpoint {self._path(step)} cannot be read ({reason}); move that folder away to use '
                'the previous step.'
            ) from error

    def _path(self, step: int, *item: str) -> str:
        return os.path.join(self.folder, str(step), *item)


def _lowest(errors: dict[int, float | UserError | None]) -> int | None:
    """Returns the step with the lowest error, the latest of several; None if no step has an error."""
    known = {step: error for step, error in errors.items() if isinstance(error, float)}
    return min(known, key=lambda step: (known[step], -step), default=None)


def config_to_json(config) -> dict[str, Any]:
    """Converts a ConfigDict to plain JSON values (tuples become lists)."""
    return json.loads(config.to_json())


def _move_aside(path: str) -> None:
    if os.path.exists(path):
        os.rename(path, path + repair.REPLACED)
