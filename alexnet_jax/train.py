"""train_and_evaluate(config, workdir): the loop - update, evaluate, decide the rate, save."""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from alexnet_jax import assemble, checkpoint, data, evaluate, processes, resume, sharding, sources, trainlog, writers
from alexnet_jax.assemble import Run
from alexnet_jax.errors import DivergedError, TerminatedError, UserError, local
from alexnet_jax.steps import TrainState


def train_and_evaluate(
    config: ConfigDict, workdir: str, *, dataset: sources.Dataset | None = None, profile: int = 0
) -> dict[str, float]:
    """Trains to the end, from the beginning or from the workdir's last checkpoint.

    At a step: update, evaluate, decide the rate, save; so what was decided is what is saved. A run that is stopped and
    started again with the same config ends as one that never stopped.

    Args:
      config: see configs/paper.py; it is not changed.
      workdir: gets config.json, environment.json, metrics.jsonl, TensorBoard events and checkpoints/.
      dataset: from `sources.in_memory`, say; None opens what `config.data.path` names.
      profile: updates to trace, after two, into WORKDIR/profile (for TensorBoard or Perfetto); 0: none.

    Returns:
      the last validation's numbers (see `evaluate.one_pass`); empty without a val split, or if all was done before.

    Raises:
      UserError: the config, the data or the workdir do not fit together, or cannot be read and written any more.
      DivergedError: loss, gradient or update stopped being finite; names the step, the rate and the last checkpoint.
      TerminatedError: SIGTERM came; the step under way, and its validation given up, are saved.
    """
    run = assemble.build(config, dataset)
    _check_workdir(workdir)
    if 'val' not in run.dataset.splits:
        writers.warn('no val split: nothing is evaluated, and the learning rate does not follow the validation error.')
    if config.optim.schedule == 'plateau' and config.optim.stages:
        writers.warn("optim.stages are for optim.schedule='epochs'; 'plateau' does not follow them.")
    key = sharding.random_key(run.mesh, config.seed)
    meta = {
        'config': checkpoint.config_to_json(config),
        'class_names': list(run.dataset.class_names),
        'record_size': run.dataset.record_size,
        'examples': run.examples,
        'fingerprint': run.dataset.fingerprint,
    }
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(_alone(workdir))
        asked_to_stop = enter(processes.termination())  # to the end of the last save
        checkpoints = enter(checkpoint.Checkpoints(workdir))
        enter(jax.debug_nans(config.debug or jax.config.jax_debug_nans))
        for problem in checkpoints.damaged:
            writers.warn(f'a checkpoint is not used: {problem}.')
        state, saved = resume.restore_or_init(checkpoints, run, config, key, meta, workdir)
        step, unfinished = int(state.step), saved.get('unfinished', False)
        reached = trainlog.reached(saved.get('log'), config.stop_at_error)
        done = reached or step >= run.total_steps
        if done and not unfinished:
            if jax.process_index() == 0:
                how = 'Lower stop_at_error' if reached else f'Raise {"num_steps" if config.num_steps else "num_epochs"}'
                print(f'{workdir} is finished: step {step} of {run.total_steps}. {how} to go on.', flush=True)
            return {}
        if step and jax.process_index() == 0:
            print(f'Going on from step {step} of {run.total_steps} in {workdir}.', flush=True)
        environment = writers.environment()
        if step:
            writers.warn_of_changes(workdir, environment)
        writers.write_json(workdir, {'config': meta['config'], 'environment': environment})
        writer = enter(contextlib.closing(writers.RunWriter(workdir, step, validated=not unfinished)))
        log = trainlog.TrainLog(
            writer,
            batch_size=config.batch_size,
            examples=run.examples,
            total_steps=run.total_steps,
            num_classes=len(run.dataset.class_names),
            budget=trainlog.Budget(config.on_nonfinite, config.max_nonfinite, config.data.max_bad),
            saved=saved.get('log'),
        )
        # Kept from one validation to the next: worker processes take seconds to start.
        val_batches = enter(contextlib.closing(run.val_batches()))
        batches = enter(contextlib.closing(run.batches(step)))
        wanted = itertools.islice(batches, max(0, run.total_steps - step))  # a run may have been made shorter
        sent = sharding.prefetch_to_device(wanted, run.to_mesh)
        after = _AfterUpdate(config, run, meta, writer, log, checkpoints, val_batches, asked_to_stop)
        tracing, traced = enter(contextlib.ExitStack()), range(step + 2, step + 2 + profile)
        if profile and traced.start >= run.total_steps:
            left = run.total_steps - step
            writers.warn(f'--profile leaves two updates out, and there are {left} to come: nothing is traced.')
        result = {}
        try:
            if unfinished:  # SIGTERM came between this step's update and what belongs to it
                state, done, result = after(state, step, after.due(step), resumed=True)
            while not done:
                if profile and step == traced.start:
                    tracing.enter_context(jax.profiler.trace(os.path.join(workdir, 'profile')))
                batch, waited = next(sent)
                state, report = run.train_step(state, batch, run.statistics, key)
                step += 1
                if profile and step in (traced.stop, run.total_steps):
                    jax.block_until_ready(state)
                    tracing.close()
                # A line before each save, so that no mean reaches back over a restart.
                due = after.due(step)
                log.add(step, report, waited=waited, log=due.line)
                checkpoints.poll()
                state, done, found = after(state, step, due)
                result = found or result
        except DivergedError as error:
            checkpoints.wait()
            good = checkpoints.latest()
            kept = f'The last good checkpoint is step {good}' if good is not None else 'There is no checkpoint'
            raise DivergedError(f'{error} {kept} in {workdir}.') from None
    return result


class _Due(NamedTuple):
    """What belongs to a step, besides its update."""

    line: bool  # of metrics.jsonl
    decision: bool  # a validation, and what follows of it for the rate
    save: bool
    last: bool  # the run ends here, with a validation


class _AfterUpdate(NamedTuple):
    """Does what belongs to a step once it is updated: validates, decides the rate, saves."""

    config: ConfigDict
    run: Run
    meta: dict[str, Any]
    writer: writers.RunWriter
    log: trainlog.TrainLog
    checkpoints: checkpoint.Checkpoints
    val_batches: Iterator[data.Batch]
    asked_to_stop: Callable[[], bool]

    def due(self, step: int) -> _Due:
        def now(cadence: str) -> bool:
            """Whether what happens every `config[cadence]` steps (0: once an epoch) happens now."""
            if every := self.config[cadence]:
                return step % every == 0
            size, examples = self.config.batch_size, self.run.examples
            return step * size // examples > (step - 1) * size // examples

        last = step >= self.run.total_steps
        save = now('checkpoint_every_steps') or last
        decision = 'val' in self.run.dataset.splits and now('eval_every_steps')
        return _Due(now('log_every_steps') or save, decision, save, last)

    def __call__(
        self, state: TrainState, step: int, due: _Due, *, resumed: bool = False
    ) -> tuple[TrainState, bool, dict[str, float]]:
        """due: of this step. resumed: the checkpoint was saved as unfinished: of the step only the update is done.

        Returns:
          (state, whether the run ends here, the numbers of a validation or nothing).

        Raises:
          TerminatedError: SIGTERM has come. The update is saved; the rest of it will be done first the next time.
        """
        error, result = self.config.stop_at_error, {}
        if error and (due.line or resumed) and self.log.reached(error):
            due = due._replace(save=True, last=True)
        stops = self.asked_to_stop()
        if not (due.decision or due.save or stops):
            return state, False, result
        with self.log.pause():
            try:
                if stops:
                    raise TerminatedError
                if due.decision or (due.last and 'val' in self.run.dataset.splits):
                    result = self._validate(state, step)
            except TerminatedError:
                if not resumed:  # else it lies there so
                    self._save(state, None, unfinished=True)
                    self.checkpoints.wait()
                raise TerminatedError(
                    f'SIGTERM: step {step} of {self.run.total_steps} is saved; the same command goes on from there.'
                ) from None
            if due.decision:  # not at an end in between: the run may be made longer, and should not show it
                state = state._replace(opt_state=self.run.after_validation(state.opt_state, result['top1_error']))
            if due.save:
                self._save(state, result.get('top1_error'))
        return state, due.last, result

    def _save(self, state: TrainState, error: float | None, unfinished: bool = False) -> None:
        self.writer.flush()
        so_far = {**self.meta, 'log': self.log.state(), 'unfinished': unfinished}
        self.checkpoints.save(state, self.run.dataset.statistics, so_far, error)

    def _validate(self, state: TrainState, step: int) -> dict[str, float]:
        config, run = self.config, self.run
        examples = len(run.dataset.splits['val'])
        result = evaluate.one_pass(
            run.eval_step,
            state.params,
            run.statistics,
            itertools.islice(self.val_batches, math.ceil(examples / config.batch_size)),
            run.mesh,
            examples=examples,
            max_bad=config.data.max_bad,
            asked_to_stop=self.asked_to_stop,
        )
        if not math.isfinite(result['loss']):
            raise DivergedError(
                f'step {step}: the validation loss is {result["loss"]}, though every update was finite. Lower '
                'optim.learning_rate (in another directory, if this has a checkpoint).'
            )
        line = {
            'step': step,
            'epoch': step * config.batch_size / run.examples,
            'split': 'val',
            **result,
            'learning_rate': float(run.optimizer.learning_rate(state.opt_state)),
        }
        self.writer.write(line)
        writers.progress(line, run.total_steps)
        return result


@contextlib.contextmanager
def _alone(workdir: str):
    """Refuses a second run on a workdir. Of several processes the first holds the lock."""
    with contextlib.ExitStack() as stack:
        lock = os.path.join(workdir, '.lock')
        held = processes.locked(lock, f'training in {workdir!r}')
        processes.first_process_decides(lambda: stack.enter_context(held))
        yield


def _check_workdir(workdir: str) -> None:
    """Makes the workdir; raises UserError where it cannot be written."""
    try:
        os.makedirs(local(workdir), exist_ok=True)
        if not os.access(workdir, os.W_OK):
            raise PermissionError('not writable')
    except OSError as error:
        raise UserError(f'the workdir {workdir!r} cannot be used: {error}') from error
