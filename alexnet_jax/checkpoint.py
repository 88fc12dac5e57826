"""Checkpoints through orbax: the last two and the best are kept, and each alone can evaluate and predict.

A step's folder holds `params`, `training` (step and optimiser state), `statistics` (mean image, colour components),
`meta` (config, class names, sizes) and the digests of all its files, without which it does not count. Parameters are
stored in the global layout and restore on any mesh.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from alexnet_jax import augment, digests, layers, model, processes, recovery
from alexnet_jax.augment import Augmentation
from alexnet_jax.errors import TerminatedError, UserError, as_user_error, first_line, local, warn
from alexnet_jax.statistics import Statistics
from alexnet_jax.steps import TrainState

FOLDER = 'checkpoints'
_METRICS = 'metrics'  # an item, and the file in it
_LAST = 2  # steps kept, besides the best


class Checkpoint(NamedTuple):
    """A trained network with all it takes to use it."""

    step: int
    params: Any  # numpy, in the global layout
    network: model.AlexNet
    augmentation: Augmentation  # with it the size of the network's input, and what is subtracted from pixels
    record_size: int  # side of the images its crops are taken from, pixels
    class_names: tuple[str, ...]
    statistics: Statistics
    config: dict[str, Any]

    @property
    def image_size(self) -> int:
        """Side of the network's input, pixels."""
        return self.augmentation.image_size


class Checkpoints:
    """The steps saved in a workdir: the last two, and the one with the lowest val error.

    A state is written in the background and then sealed: the digests of all its files are put beside them. A step
    without digests does not count. Opened for training, it removes such steps, moves damaged ones aside (to
    `STEP.damaged`) and names both in `damaged`, so that `latest()` is always good. Use it as a context; the end waits
    for what is being saved.

    read_only: for all but the training process; it touches nothing, also not a save under way in another process.

    Raises:
      UserError: every step is damaged, or the folder cannot be used.
    """

    def __init__(self, workdir: str, *, read_only: bool = False):
        self.folder = local(os.path.join(workdir, FOLDER))
        self.damaged: list[str] = []
        with as_user_error(f'the checkpoints in {self.folder!r} cannot be opened'):
            if not read_only:
                self.damaged = processes.first_process_decides(lambda: recovery.repair(self.folder))
        # Not orbax's CheckpointManager: it reads all steps when it opens, also those that are damaged; and when a save
        # fails in one of several processes, it waits for the others before it says so, and they for it.
        arrays = {name: ocp.StandardCheckpointHandler() for name in ('params', 'training', 'statistics')}
        texts = {'meta': ocp.JsonCheckpointHandler(), _METRICS: ocp.JsonCheckpointHandler(filename=_METRICS)}
        handler = ocp.CompositeCheckpointHandler(**arrays, **texts)
        # Synchronously: where that fails in the background, whoever waits for the folder never learns of it.
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        self._orbax = ocp.AsyncCheckpointer(handler, async_options=options)
        self._sealer, self._sealing = ThreadPoolExecutor(1), None

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, kind, *_) -> None:
        # After an error in one of several processes the others are elsewhere: closing would wait for them for ever.
        if kind in (None, TerminatedError) or jax.process_count() == 1:
            self.close()

    def close(self) -> None:
        """Waits for what is being saved. Raises UserError if it cannot be."""
        try:
            self.wait()
        finally:
            self._sealer.shutdown()
            with contextlib.suppress(Exception):  # it tells again what `wait` has told
                self._orbax.close()

    def wait(self) -> None:
        """Waits until the save under way is complete and sealed. Raises UserError if it cannot be."""
        if self._sealing is not None:
            sealing, self._sealing = self._sealing, None
            sealing.result()

    def poll(self) -> None:
        """Raises UserError if the state that was being saved could not be: now, not at the next save. Never waits."""
        if self._sealing is not None and self._sealing.done():
            self.wait()

    def steps(self) -> list[int]:
        """The steps that count, in ascending order."""
        return [step for step in recovery.numbers(self.folder) if digests.has(self._path(step))]

    def latest(self) -> int | None:
        """The last step that counts; None where there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the lowest val error; None where none was validated. Raises UserError where one is damaged."""
        errors = {}
        for step in self._expected():
            try:
                errors[step] = self._error(step)
            except UserError:
                if os.path.isdir(self._path(step)):  # else its run has removed it: it is not the best
                    raise
        return _lowest(errors)

    def _expected(self) -> list[int]:
        """Steps that count, and earlier ones without digests: they are damaged; only the last can be half written."""
        found = recovery.numbers(self.folder)
        return [s for s in found if digests.has(self._path(s)) or (s != found[-1] and os.path.isdir(self._path(s)))]

    def _error(self, step: int) -> float | None:
        self.check(step, lambda name: name.startswith(f'{_METRICS}/'))
        path = os.path.join(self._path(step), _METRICS, _METRICS)
        if not os.path.exists(path):  # the digests are right, so the step was saved without a validation
            return None
        with self._readable(step), open(path, encoding='utf-8') as file:
            return float(json.load(file)['top1_error'])

    def check(self, step: int, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Raises UserError unless the files of a step are as they were written; wanted: see `digests.problems`."""
        if found := digests.problems(self._path(step), wanted):
            self._check_is_there(step)
            others = ', '.join(str(s) for s in self.steps() if s != step)
            raise UserError(
                f'the checkpoint is damaged: {found[0]}. '
                + (f'Other steps in {self.folder!r}: {others}.' if others else 'There is no other step.')
            )

    def _check_is_there(self, step: int) -> None:
        if not os.path.isdir(self._path(step)):
            raise UserError(
                f'{self._path(step)} was removed while it was read: its run has saved newer steps; give the command '
                'again.'
            )

    def save(self, state: TrainState, statistics: Statistics, meta: dict[str, Any], top1_error: float | None) -> None:
        """Starts saving a state under its step, in place of what lies there; waits first for a save still under way.

        state: without optimiser state (None) the checkpoint can be used, but no run goes on from it.
        meta: JSON, with 'config', 'class_names', 'record_size', 'examples' (of train; 0: no run) and 'fingerprint'.
        top1_error: of the validation just made, percent; None where there was none.

        Raises:
          UserError: this state or the one before it cannot be written; steps saved earlier are as they were.
        """
        items = {
            'params': ocp.args.StandardSave(state.params),
            'statistics': ocp.args.StandardSave(statistics._asdict()),
            'meta': ocp.args.JsonSave(meta),
        }
        if state.opt_state is not None:
            items['training'] = ocp.args.StandardSave({'step': state.step, 'opt_state': state.opt_state})
        if top1_error is not None:
            items[_METRICS] = ocp.args.JsonSave({'top1_error': top1_error})
        self.wait()
        step = int(state.step)
        with self._saving(step):
            path = self._path(step)
            processes.first_process_decides(lambda: os.path.exists(path) and os.rename(path, path + recovery.REPLACED))
            self._orbax.save(path, args=ocp.args.Composite(**items))
        self._sealing = self._sealer.submit(self._seal, step)

    def _seal(self, step: int) -> None:
        with self._saving(step):
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                digests.write(self._path(step))
                removed = os.path.join(self.folder, recovery.REMOVED)
                os.makedirs(removed, exist_ok=True)
                for old in self._retired():
                    os.rename(self._path(old), os.path.join(removed, str(old)))
                for path in (self._path(step) + recovery.REPLACED, removed):
                    shutil.rmtree(path, ignore_errors=True)

    def _retired(self) -> list[int]:
        """Steps to remove: not the last, the best, nor one whose error cannot be read, which need not end a run."""
        steps, errors = self._expected(), {}
        kept = set(steps[-_LAST:])
        for step in steps:
            try:
                errors[step] = self._error(step)
            except UserError as error:
                warn(str(error))
                kept.add(step)
        kept.add(_lowest(errors))
        return [step for step in steps if step not in kept]

    def _saving(self, step: int):
        return as_user_error(
            f'step {step} cannot be saved in {self.folder!r}',
            'Steps saved earlier are as they were; put it right and give the same command again.',
        )

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Restores a training state; `like` has ShapeDtypeStructs with the shardings wanted. Raises UserError."""
        with self._readable(step):
            items = self._orbax.restore(
                self._path(step),
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(like.params),
                    training=ocp.args.StandardRestore({'step': like.step, 'opt_state': like.opt_state}),
                ),
            )
        return TrainState(items.training['step'], items.params, items.training['opt_state'])

    def read_meta(self, step: int) -> tuple[dict[str, Any], Statistics]:
        """What lies beside a step's arrays: (meta, statistics). Raises UserError."""
        with self._readable(step):
            meta = self._orbax.restore(self._path(step), args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
            shapes = ((meta['record_size'],) * 2 + (3,), (3,), (3, 3))
            like = Statistics(*(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes))
            return meta, Statistics(**self._arrays(step, 'statistics', like._asdict()))

    def load(self, step: int) -> Checkpoint:
        """All it takes to use a step's network, after checking its files. Raises UserError."""
        self.check(step, lambda name: not name.startswith('training/'))  # two thirds of the bytes, and not used
        meta, statistics = self.read_meta(step)
        with self._readable(step):
            network = model.from_config(meta['config']['model'])
            augmentation = augment.from_config(meta['config']['data'])
            augment.crop_positions(meta['record_size'], augmentation.image_size)
            layers.sizes(network, augmentation.image_size)
            class_names = tuple(map(str, meta['class_names']))
            if len(class_names) != network.num_classes:
                raise ValueError(f'it names {len(class_names)} classes and has {network.num_classes}')
            init = functools.partial(model.init, network, image_size=augmentation.image_size)
            params = self._arrays(step, 'params', jax.eval_shape(init, jax.random.key(0)))
        return Checkpoint(
            step=step,
            params=params,
            network=network,
            augmentation=augmentation,
            record_size=meta['record_size'],
            class_names=class_names,
            statistics=statistics,
            config=meta['config'],
        )

    def _arrays(self, step: int, item: str, like: dict[str, Any]) -> dict[str, Any]:
        """A step's arrays in numpy, of the shapes of `like`: orbax would take memory for whatever the files declare."""
        declared = ocp.StandardCheckpointHandler().metadata(pathlib.Path(self._path(step), item)).tree
        named = functools.partial(jax.tree_util.keystr, simple=True, separator='/')
        found, wanted = ({named(p): x.shape for p, x in jax.tree.leaves_with_path(t)} for t in (declared, like))
        for name in {**wanted, **found}:
            if found.get(name) != wanted.get(name):
                raise ValueError(f'{item}/{name}: {found.get(name, "missing")}; expected {wanted.get(name, "nothing")}')
        there = sum(file.stat().st_size for file in pathlib.Path(self._path(step), item).rglob('*'))
        if (taken := sum(4 * x.size for x in jax.tree.leaves(like))) > 2**26 + 100 * there:  # little is compressed
            raise ValueError(f'{item} says it has {taken:,} bytes, and holds {there:,}')
        args = ocp.args.StandardRestore(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like))
        return self._orbax.restore(self._path(step), args=ocp.args.Composite(**{item: args}))[item]

    @contextlib.contextmanager
    def _readable(self, step: int):
        """Turns what orbax and tensorstore raise for missing and damaged files, of many kinds, into one UserError."""
        try:
            yield
        except UserError as error:
            raise UserError(f'the checkpoint {self._path(step)} is of another version: {error}') from error
        except Exception as error:
            self._check_is_there(step)
            raise UserError(
                f'the checkpoint {self._path(step)} cannot be read ({first_line(error)}); move that folder away to use '
                'the one before it.'
            ) from error

    def _path(self, step: int) -> str:
        return os.path.join(self.folder, str(step))


def _lowest(errors: dict[int, float | None]) -> int | None:
    """The step with the lowest error, the last one of equals; None where no step has an error."""
    known = {step: error for step, error in errors.items() if error is not None}
    return min(known, key=lambda step: (known[step], -step), default=None)


def load_checkpoint(path: str) -> Checkpoint:
    """Loads a network for evaluation, prediction or fine-tuning.

    Args:
      path: a workdir or its `checkpoints` folder (the best step, else the latest), or one step's folder in there.

    Raises:
      UserError: there is no checkpoint, or it cannot be read.
    """
    with as_user_error(f'the checkpoint {path!r} cannot be read'):
        return _load(path, *_find(path))


def _load(path: str, root: str, step: int | None) -> Checkpoint:
    with Checkpoints(root, read_only=True) as checkpoints:
        for choose in (checkpoints.best, checkpoints.latest):
            step = choose() if step is None else step
        if step is None:
            raise UserError(f'there is no checkpoint in {path!r} yet; train first with alexnet_jax.main.')
        return checkpoints.load(step)


def _find(path: str) -> tuple[str, int | None]:
    """(workdir, step) of what a user may call a checkpoint."""
    path = local(path)
    parent, name = os.path.split(path)
    if name == FOLDER and os.path.isdir(path):
        return parent, None
    if re.fullmatch('[0-9]+', name) and os.path.basename(parent) == FOLDER and os.path.isdir(path):
        return os.path.dirname(parent), int(name)
    if os.path.isdir(os.path.join(path, FOLDER)):
        return path, None
    if os.path.isfile(path):
        raise UserError(f'there is no checkpoint at {path!r}, a file; of weights alexnet_jax.convert makes one.')
    if os.path.isdir(os.path.join(path, 'run', FOLDER)):
        raise UserError(f'there is no checkpoint at {path!r}. Did you mean {os.path.join(path, "run")!r}?')
    raise UserError(
        f'there is no checkpoint at {path!r}; expected a workdir of alexnet_jax.main or one of its '
        f'{FOLDER}/STEP folders.'
    )


def config_to_json(config) -> dict[str, Any]:
    """A ConfigDict as plain JSON values (tuples become lists)."""
    return json.loads(config.to_json())
