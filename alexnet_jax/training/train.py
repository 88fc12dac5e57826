"""The training loop: update, evaluate, adjust the learning rate, save."""

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from absl import logging
from ml_collections import ConfigDict

from alexnet_jax.checkpoints.manager import CheckpointManager, check_workdir, config_to_json
from alexnet_jax.core import sharding
from alexnet_jax.core.train_step import TrainState
from alexnet_jax.data import datasets
from alexnet_jax.data.cache import Batch
from alexnet_jax.inference import evaluate
from alexnet_jax.training import build, metric_writer, published_curves, restore, train_log
from alexnet_jax.training.build import TrainingSetup
from alexnet_jax.utils import distributed
from alexnet_jax.utils.environment import describe_environment, warn_of_changes
from alexnet_jax.utils.errors import DivergedError, TerminatedError, UserError
from alexnet_jax.utils.files import absolute_local_path, as_path, file_lock


def train_and_evaluate(
    config: ConfigDict, workdir: str | os.PathLike, *, dataset: datasets.Dataset | None = None, profile: int = 0
) -> dict[str, float]:
    """Trains a network to the end of the config's schedule, starting from the workdir's last checkpoint if it has one.

    Each step runs in this order: update, evaluate, adjust the learning rate, save. On a CPU, a run that is stopped and
    resumed with the same config ends in the same state, bit for bit, as an uninterrupted run.

    Args:
      config: from `alexnet_jax.get_config`. configs/paper.py explains every key. The config is not modified.
      workdir: directory for config.json, environment.json, metrics.jsonl, TensorBoard events and checkpoints/.
      dataset: for example from `alexnet_jax.in_memory`. None opens the dataset at `config.data.path`.
      profile: number of updates to trace into WORKDIR/profile (for TensorBoard or Perfetto), after two warm-up updates.

    Returns:
      The metrics of the last validation: 'loss' (nats), 'top1_error' and 'top5_error' (percent), 'count' (images),
      'images_per_second' and 'data_wait' (0 to 1). {} if there is no val split or the run was already finished.

    Raises:
      UserError: config, data and workdir are incompatible, or a file cannot be read or written.
      DivergedError: a loss, gradient or update is not finite. Its message names the step and the last checkpoint.
      TerminatedError: SIGTERM was received. The current step is saved; an interrupted validation is repeated on resume.
    """
    workdir = as_path(workdir)
    return run(build.build(config, dataset), workdir, profile)


def run(setup: TrainingSetup, workdir: str, profile: int = 0) -> dict[str, float]:
    """Trains like `train_and_evaluate`, with the objects of `build.build`."""
    config = setup.config
    key = sharding.random_key(setup.mesh, config.seed)
    data = setup.dataset
    meta: dict[str, Any] = {'config': config_to_json(config), 'class_names': list(data.class_names)}
    sizes = {'record_size': data.record_size, 'examples': setup.num_examples}
    meta |= {**sizes, 'fingerprint': data.fingerprint}  # see `CheckpointManager.save`
    _check_same_in_all_processes(setup, meta)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_open_workdir(workdir))
        _describe_setup(setup)
        should_stop = stack.enter_context(distributed.defer_sigterm())  # until the last save is complete
        checkpoints = stack.enter_context(CheckpointManager(workdir))
        stack.enter_context(jax.debug_nans(config.debug or jax.config.jax_debug_nans))  # type: ignore[attr-defined]
        state, saved = restore.restore_or_init(checkpoints, setup, key, meta, workdir)
        start, unfinished = int(state.step), saved.get('unfinished', False)
        if not unfinished and _is_finished(setup, start, saved.get('log'), workdir):
            return {}
        environment = describe_environment()
        if start:
            logging.info('Resuming from step %d of %d in %s.', start, setup.total_steps, workdir)
            warn_of_changes(workdir, environment)
        metric_writer.write_json(workdir, {'config': meta['config'], 'environment': environment})
        writer = metric_writer.MetricWriter(workdir, start, validated=not unfinished)
        stack.callback(writer.close)
        counts = {'batch_size': config.batch_size, 'examples': setup.num_examples, 'total_steps': setup.total_steps}
        limits = {'on_nonfinite': config.on_nonfinite, 'max_nonfinite': config.max_nonfinite}
        limits['max_unreadable'] = config.data.max_unreadable
        log = train_log.TrainLog(writer, **counts, **limits, num_classes=len(data.class_names), saved=saved.get('log'))
        # One iterator serves all validations, because worker processes take seconds to start.
        val_batches = stack.enter_context(contextlib.closing(setup.val_batches()))
        batches = stack.enter_context(contextlib.closing(setup.train_batches(start)))
        profiler = stack.enter_context(_Profiler(os.path.join(workdir, 'profile'), start, profile, setup.total_steps))
        hooks = StepHooks(setup, meta, writer, log, checkpoints, val_batches, should_stop)
        try:
            if unfinished:  # SIGTERM was received between this step's update and its validation or save
                state = hooks.after_update(state, start, hooks.due(start), resumed=True)
            remaining = itertools.islice(batches, max(0, setup.total_steps - start))  # 0 if num_epochs was lowered
            prefetched = () if hooks.done else setup.prefetch(remaining)
            for step, (batch, waited) in enumerate(prefetched, start + 1):
                profiler.before_update(step)
                state, report = setup.steps.train_step(state, batch, setup.image_stats, key)
                profiler.after_update(step, state)
                due = hooks.due(step)
                log.add(step, report, waited=waited, log=due.log)
                checkpoints.poll()
                state = hooks.after_update(state, step, due)
                if hooks.done:
                    break
        except DivergedError as error:
            checkpoints.wait()
            latest = checkpoints.latest()
            location = 'There is no checkpoint' if latest is None else f'The last good checkpoint is step {latest}'
            raise DivergedError(f'{error} {location} in {workdir}.') from None
    command = f'alexnet_jax evaluate --checkpoint={workdir} --data={config.data.path or "DIR"}'
    logging.info('The run is in %s. Evaluate it: %s', workdir, command)
    return hooks.result


def _check_same_in_all_processes(setup: TrainingSetup, meta: dict[str, Any]) -> None:
    """Raises UserError if a process has another config or other data, which would train silently on a mixture."""
    config = {**meta['config'], 'data': {**meta['config']['data'], 'path': ''}}  # local disks may have other names
    stats = setup.dataset.image_stats
    distributed.check_equal(
        {
            'the config': config,
            'the fingerprint of the data': meta['fingerprint'],
            'the numbers of images': {split: len(records) for split, records in setup.dataset.splits.items()},
            'the class names': meta['class_names'],
            'the image statistics': [x.tobytes().hex() for x in stats] if stats else None,
        }
    )


class StepActions(NamedTuple):
    """Actions that follow the update of a step."""

    log: bool  # write a line to metrics.jsonl
    validate: bool  # evaluate the val split and adjust the learning rate
    save: bool
    last: bool  # end the run, with a validation


@dataclasses.dataclass
class StepHooks:
    """Validates, adjusts the learning rate and saves after the update of a step."""

    setup: TrainingSetup
    meta: dict[str, Any]  # saved with every checkpoint
    writer: metric_writer.MetricWriter
    log: train_log.TrainLog
    checkpoints: CheckpointManager
    val_batches: Iterator[Batch]
    should_stop: Callable[[], bool]
    done: bool = False  # whether the run has ended
    result: dict[str, float] = dataclasses.field(default_factory=dict)  # of the last validation; empty before the first

    def due(self, step: int) -> StepActions:
        """Returns the actions due at a step according to the config's `*_every_steps`."""
        size, examples = self.setup.config.batch_size, self.setup.num_examples
        ends_epoch = step * size // examples > (step - 1) * size // examples
        due = {}
        for name in ('log', 'eval', 'checkpoint'):
            every = self.setup.config[f'{name}_every_steps']  # 0: once per epoch
            due[name] = step % every == 0 if every else ends_epoch
        last = step >= self.setup.total_steps
        save = due['checkpoint'] or last
        validate = 'val' in self.setup.dataset.splits and due['eval']
        # Log before each save, so that no logged mean spans a restart.
        return StepActions(due['log'] or save, validate, save, last)

    def after_update(self, state: TrainState, step: int, due: StepActions, *, resumed: bool = False) -> TrainState:
        """Runs the due actions and returns the state with the adjusted learning rate.

        resumed: whether the state is from a checkpoint marked as unfinished, saved after the update but before its
        actions. Raises TerminatedError on SIGTERM: the update is saved, and its actions run first on resume.
        """
        error = self.setup.config.stop_at_error
        if error and (due.log or resumed) and self.log.reached(error):
            due = due._replace(save=True, last=True)
        terminated = self.should_stop()
        if not (due.validate or due.save or terminated):
            return state
        with self.log.pause():
            result = {}
            try:
                if terminated:
                    raise TerminatedError
                if due.validate or (due.last and 'val' in self.setup.dataset.splits):
                    result = self.result = self.validate(state, step)
            except TerminatedError:
                if not resumed:  # otherwise an unfinished checkpoint of this step exists
                    self.save(state, None, unfinished=True)
                    self.checkpoints.wait()
                saved = f'step {step} of {self.setup.total_steps} is saved'
                raise TerminatedError(f'SIGTERM: {saved}; run the same command to resume.') from None
            if due.validate:  # the extra validation at the end must not change a run that is extended later
                opt_state = self.setup.steps.after_validation(state.opt_state, result['top1_error'])
                state = state._replace(opt_state=opt_state)
            if due.save:
                self.save(state, result.get('top1_error'))
        self.done = due.last
        return state

    def save(self, state: TrainState, top1_error: float | None, *, unfinished: bool = False) -> None:
        """Starts saving the state and the metadata that resuming needs."""
        self.writer.sync()
        meta = {**self.meta, 'log': self.log.state(), 'unfinished': unfinished}
        image_stats = self.setup.dataset.image_stats
        assert image_stats is not None  # `build` refuses data without them
        self.checkpoints.save(state, image_stats, meta, top1_error)

    def validate(self, state: TrainState, step: int) -> dict[str, float]:
        """Evaluates the val split and writes the metrics. Raises DivergedError if the loss is not finite."""
        config, setup = self.setup.config, self.setup
        examples = len(setup.dataset.splits['val'])
        batches = itertools.islice(self.val_batches, math.ceil(examples / config.batch_size))
        arguments = (setup.steps.eval_step, state.swap_average().params, setup.image_stats, batches, setup.mesh)
        options = {'max_unreadable': config.data.max_unreadable, 'should_stop': self.should_stop}
        result = evaluate.evaluate_batches(*arguments, examples=examples, **options)
        if not math.isfinite(result['loss']):
            raise DivergedError(
                f'step {step}: the validation loss is {result["loss"]}, although all updates were finite. '
                f'{train_log.LOWER_RATE}'
            )
        epoch = step * config.batch_size / setup.num_examples
        rate = float(setup.steps.optimizer.learning_rate(state.opt_state))
        line = {'step': step, 'epoch': epoch, 'split': 'val', **result, 'learning_rate': rate}
        self.writer.write(line)
        on_imagenet = published_curves.is_imagenet(setup.dataset.class_names, setup.num_examples)
        beside = published_curves.compare(epoch, result['top1_error']) if on_imagenet else ''
        metric_writer.log_line(line, setup.total_steps, beside)
        return result


class _Profiler(contextlib.ExitStack):
    """Traces `count` updates into a folder, after two warm-up updates. A count of 0 traces nothing."""

    def __init__(self, folder: str, start: int, count: int, total_steps: int):
        super().__init__()
        self._folder, self._traced = folder, range(start + 3, min(start + 3 + count, total_steps + 1))
        if count and not self._traced:
            left = total_steps - start
            distributed.warn(f'--profile skips two warm-up updates, and only {left} remain: nothing is traced.')

    def before_update(self, step: int) -> None:
        if self._traced and step == self._traced[0]:
            self.enter_context(jax.profiler.trace(self._folder))

    def after_update(self, step: int, state: TrainState) -> None:
        if self._traced and step == self._traced[-1]:
            jax.block_until_ready(state)
            self.close()


def _describe_setup(setup: TrainingSetup) -> None:
    """Logs devices and mesh, and warns about probable mistakes in the config."""
    devices = setup.mesh.devices
    split = setup.config.mesh.dense == 'split'
    dense = ", mesh.dense='split'" if split and devices.shape[0] > 1 else ''
    logging.info(
        f'Training on {devices.size} x {devices.flat[0].device_kind}, mesh.data={devices.shape[0]}, '
        f'mesh.tower={devices.shape[1]}{dense}. Compiling the first update takes a while.'
    )
    if 'val' not in setup.dataset.splits:
        plateau = setup.config.optim.schedule == 'plateau'
        rate = ", and optim.schedule='plateau' never lowers the rate" if plateau else ''
        distributed.warn(f'no val split: nothing is evaluated{rate}.')
    if split and not dense:
        distributed.warn("mesh.dense='split' has no effect with mesh.data=1.")
    optim = setup.config.optim
    if optim.schedule != 'epochs' and optim.stages:
        distributed.warn(f"optim.stages has no effect with optim.schedule={optim.schedule!r}; use 'epochs'.")
    for key, needs in (('trust_clip', 'trust_coefficient'), ('warmup_start', 'warmup_epochs')):
        if optim[key] and not optim[needs]:
            distributed.warn(f'optim.{key}={optim[key]} has no effect with optim.{needs}=0.')


def _is_finished(setup: TrainingSetup, step: int, log: dict | None, workdir: str) -> bool:
    """Returns whether the run is finished. If so, logs the config key to change in order to continue."""
    reached = train_log.LogState(**(log or {})).reached(setup.config.stop_at_error)
    if not reached and step < setup.total_steps:
        return False
    remedy = 'Lower stop_at_error' if reached else f'Raise {"num_steps" if setup.config.num_steps else "num_epochs"}'
    logging.info('%s is finished: step %d of %d. %s to continue.', workdir, step, setup.total_steps, remedy)
    return True


@contextlib.contextmanager
def _open_workdir(workdir: str):
    """Creates the workdir; process 0 locks it against a second run. Raises UserError if either fails."""
    check_workdir(workdir)
    try:
        os.makedirs(absolute_local_path(workdir), exist_ok=True)
        if not os.access(workdir, os.W_OK):
            raise PermissionError('not writable')
    except OSError as error:
        raise UserError(f'the workdir {workdir!r} cannot be used: {error}') from error
    with contextlib.ExitStack() as stack:
        held = file_lock(os.path.join(workdir, '.lock'), f'training in {workdir!r}')
        distributed.broadcast_from_process_0(lambda: stack.enter_context(held))
        yield
