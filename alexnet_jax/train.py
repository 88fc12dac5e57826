"""train_and_evaluate(config, workdir): the loop - update, evaluate, decide the rate, save."""

import contextlib
import itertools
import json
import math
import os
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax import (
    assemble,
    augment,
    checkpoint,
    data,
    evaluate,
    model,
    processes,
    sharding,
    steps,
    trainlog,
    writers,
)
from alexnet_jax.assemble import Run
from alexnet_jax.augment import Augmentation
from alexnet_jax.errors import DivergedError, TerminatedError, UserError, did_you_mean, local

# What may differ when a run is taken up again: where and how it computes, how often it reports, how long it goes on.
_MAY_DIFFER = {
    'log_every_steps', 'eval_every_steps', 'checkpoint_every_steps', 'num_epochs', 'num_steps', 'stop_at_error',
    'accumulate', 'debug', 'deterministic', 'on_nonfinite', 'max_nonfinite', 'mesh', 'data.path', 'data.num_workers',
    'data.num_threads', 'data.cache', 'data.max_bad',
}  # fmt: skip
_META = {'config': dict, 'class_names': list, 'record_size': int, 'examples': int, 'fingerprint': str}
_DATA_KEYS = ('examples', 'class_names', 'record_size', 'fingerprint')


def train_and_evaluate(config: ConfigDict, workdir: str, *, profile: int = 0) -> dict[str, float]:
    """Trains to the end, from the beginning or from the workdir's last checkpoint.

    At a step: update, evaluate, decide the rate, save; so what was decided is what is saved. A run that is stopped and
    started again with the same config ends as one that never stopped.

    Args:
      config: see configs/paper.py; it is not changed.
      workdir: gets config.json, environment.json, metrics.jsonl, TensorBoard events and checkpoints/.
      profile: updates to trace, after two, into WORKDIR/profile (for TensorBoard or Perfetto); 0: none.

    Returns:
      the last validation's numbers (see `evaluate.one_pass`); empty without a val split, or if all was done before.

    Raises:
      UserError: the config, the data or the workdir do not fit together, or cannot be read and written any more.
      DivergedError: loss, gradient or update stopped being finite; names the step, the rate and the last checkpoint.
      TerminatedError: SIGTERM came; the step under way, and its validation given up, are saved.
    """
    run = assemble.build(config)
    _check_workdir(workdir)
    val = run.dataset.splits.get('val')
    if val is None:
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
    result = {}
    with (
        _alone(workdir),
        checkpoint.Checkpoints(workdir) as checkpoints,
        jax.debug_nans(config.debug or jax.config.jax_debug_nans),
        processes.termination() as asked_to_stop,
    ):
        for problem in checkpoints.damaged:
            writers.warn(f'a checkpoint is not used: {problem}.')
        state, saved = _restore_or_init(checkpoints, run, config, key, meta, workdir)
        step, unfinished = int(state.step), saved.get('unfinished', False)
        reached = trainlog.reached(saved.get('log'), config.stop_at_error)
        if (step >= run.total_steps or reached) and not unfinished:
            if jax.process_index() == 0:
                how = 'Lower stop_at_error' if reached else 'Raise num_epochs'
                print(f'{workdir} is finished: step {step} of {run.total_steps}. {how} to go on.', flush=True)
            return result
        if step and jax.process_index() == 0:
            print(f'Going on from step {step} of {run.total_steps} in {workdir}.', flush=True)
        writers.write_json(workdir, {'config': meta['config'], 'environment': writers.environment()})
        writer = writers.RunWriter(workdir, step, validated=not unfinished)
        log = trainlog.TrainLog(
            writer,
            batch_size=config.batch_size,
            examples=run.examples,
            total_steps=run.total_steps,
            num_classes=len(run.dataset.class_names),
            budget=trainlog.Budget(config.on_nonfinite, config.max_nonfinite, config.data.max_bad),
            saved=saved.get('log'),
        )

        def save(error: float | None, *, unfinished: bool = False) -> None:
            writer.flush()
            so_far = {**meta, 'log': log.state(), 'unfinished': unfinished}
            checkpoints.save(state, run.dataset.statistics, so_far, error)

        batches, traced = run.batches(step), range(step + 2, step + 2 + profile)
        val_batches = run.val_batches()  # kept from one validation to the next: worker processes take seconds to start
        try:
            while step < run.total_steps or unfinished:
                if not unfinished:
                    if profile and step == traced.start:
                        jax.profiler.start_trace(os.path.join(workdir, 'profile'))
                    began = time.perf_counter()
                    batch = next(batches)
                    waited = time.perf_counter() - began
                    state, report = run.train_step(state, run.to_mesh(data.tell_unreadable(batch)), run.statistics, key)
                    step += 1
                    if profile and step == min(traced.stop, run.total_steps) and step > traced.start:
                        jax.block_until_ready(state)
                        jax.profiler.stop_trace()
                logs, saves = (_due(step, config, run, f'{what}_every_steps') for what in ('log', 'checkpoint'))
                last = step == run.total_steps
                decides = val is not None and _due(step, config, run, 'eval_every_steps')
                if not unfinished:
                    # A line before each save, so that no mean reaches back over a restart.
                    log.add(step, report, waited=waited, log=logs or saves or last)
                    checkpoints.poll()
                if config.stop_at_error and (logs or unfinished):
                    last = last or log.reached(config.stop_at_error)
                saves = saves or last
                again, unfinished = unfinished, False
                stops = asked_to_stop()
                if not (saves or decides or stops):
                    continue
                with log.pause():
                    error = None
                    try:
                        if stops:
                            raise TerminatedError
                        if val is not None and (decides or last):
                            result = _validate(run, config, state, step, val_batches, writer, asked_to_stop)
                            error = result['top1_error']
                    except TerminatedError:  # what belongs to this step after its update comes first the next time
                        if not again:  # else it lies there so
                            save(None, unfinished=True)
                            checkpoints.wait()
                        raise TerminatedError(
                            f'SIGTERM: step {step} of {run.total_steps} is saved; the same command goes on from there.'
                        ) from None
                    if decides:  # not at an end between: the run may be made longer, and should not show it
                        state = state._replace(opt_state=run.after_validation(state.opt_state, error))
                    if saves:
                        save(error)
                if last:
                    break
        except DivergedError as error:
            checkpoints.wait()
            good = checkpoints.latest()
            kept = f'The last good checkpoint is step {good}' if good is not None else 'There is no checkpoint'
            raise DivergedError(f'{error} {kept} in {workdir}.') from None
        finally:
            batches.close()
            val_batches.close()
            writer.close()
            with contextlib.suppress(RuntimeError):  # there is none any more
                if profile:
                    jax.profiler.stop_trace()
    return result


@contextlib.contextmanager
def _alone(workdir: str):
    """Refuses a second run on a workdir. Of several processes the first holds the lock."""
    with contextlib.ExitStack() as stack:
        lock = os.path.join(workdir, '.lock')
        held = processes.alone(lock, f'training in {workdir!r}')
        processes.first_decides(lambda: stack.enter_context(held))
        yield


def _due(step: int, config: ConfigDict, run: Run, cadence: str) -> bool:
    """Whether something that happens every `config[cadence]` steps (0: once an epoch) happens now."""
    if every := config[cadence]:
        return step % every == 0
    return step * config.batch_size // run.examples > (step - 1) * config.batch_size // run.examples


def _validate(run: Run, config: ConfigDict, state, step: int, batches, writer, asked_to_stop) -> dict[str, float]:
    examples = len(run.dataset.splits['val'])
    result = evaluate.one_pass(
        run.eval_step,
        state.params,
        run.statistics,
        itertools.islice(batches, math.ceil(examples / config.batch_size)),
        run.mesh,
        examples=examples,
        max_bad=config.data.max_bad,
        asked_to_stop=asked_to_stop,
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
    writer.write(line)
    writers.progress(line, run.total_steps)
    return result


def _restore_or_init(
    checkpoints, run: Run, config: ConfigDict, key, meta: dict, workdir: str
) -> tuple[steps.TrainState, dict[str, Any]]:
    """The last checkpoint's state and meta, after making sure that it is of this config and these data; else a fresh
    state and nothing."""
    step = checkpoints.latest()
    if step is not None:
        old, statistics = checkpoints.read_meta(step)
        whole = all(isinstance(old.get(name), kind) for name, kind in _META.items())
        if not whole or not trainlog.fits(old.get('log')):
            raise UserError(f'{workdir}: step {step} is of no run of alexnet_jax; give another directory.')
        if not old['examples']:
            raise UserError(
                f'{workdir} holds converted weights and no run; to train from them give another --workdir and '
                f'--config.init_from={workdir}.'
            )
        try:
            differences = _differences(_completed(old['config']), _completed(meta['config']))
        except (UserError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f'{workdir} holds a run of another version of alexnet_jax: {error}') from error
        if differences:
            raise UserError(
                f'{workdir} holds a run of another config: {"; ".join(differences)}. '
                'Give the same config, or another directory.'
            )
        same = all(old[name] == meta[name] for name in _DATA_KEYS)
        if not same or not all(np.array_equal(a, b) for a, b in zip(statistics, run.dataset.statistics, strict=True)):
            raise UserError(
                f'{workdir} was trained on other data than {config.data.path!r} (other images, or prepared otherwise); '
                'give the same data, or another directory.'
            )
        return checkpoints.restore(step, run.state_shapes), old
    if made := writers.last_step(workdir):
        writers.warn(f'{workdir} has no checkpoint; the {made} steps of its metrics.jsonl are made again.')
    state = run.init(key)
    if config.init_from:
        source = checkpoint.load_checkpoint(config.init_from)
        theirs, ours = (_meaning(x.network, x.augmentation) for x in (source, run))
        for name in sorted(theirs.keys() & ours.keys() - set(config.init_fresh)):
            if theirs[name] != ours[name]:
                writers.warn(
                    f'{config.init_from} was trained with {name} {theirs[name]}, this config has {ours[name]}.'
                )
        state = state._replace(params=_take_over(source, state.params, config, run))
    return state, {}


def _meaning(network: model.AlexNet, augmentation: Augmentation) -> dict[str, Any]:
    """What the same weights would compute something else with: preprocessing, norms, what a layer does."""
    found = {f'data.{name}': getattr(augmentation, name) for name in ('image_size', 'mean', 'pixel_std')}
    for name in model.AlexNet.__dataclass_fields__:
        if name.startswith(('lrn_', 'norm_', 'spatial_', 'pool_')) or name == 'dropout_inverted':
            found[f'model.{name}'] = getattr(network, name)
    for name, row in network.table().items():
        shape = row._asdict()
        found[name] = {key: shape[key] for key in ('stride', 'padding', 'groups', 'then') if key in shape}
    return found


def _take_over(source: checkpoint.Checkpoint, params, config: ConfigDict, run: Run):
    """The source's parameters on the mesh of `params`; `fresh` ones, and a classifier of other classes, stay as drawn.

    All start with velocity zero, as in the authors' `layer.py`.
    """
    classifier, fresh = list(run.network.table())[-1], config.init_fresh
    same_classes = source.class_names == tuple(run.dataset.class_names)
    for name in fresh:
        if name not in params:
            raise UserError(f'init_fresh names a layer {name!r}.{did_you_mean(name, params)}')
    taken = {}
    for name, drawn in params.items():
        old = source.params.get(name)
        fits = old is not None and all(old[part].shape == drawn[part].shape for part in drawn)
        if name in fresh or (name == classifier and not (fits and same_classes)):
            why = '' if name in fresh or not fits else f', as the classes of {config.init_from} are others'
            print(f'{name} starts afresh: {drawn["kernel"].shape}{why}.', flush=True)
            taken[name] = drawn
        elif fits:
            taken[name] = jax.tree.map(lambda a, b: jax.device_put(np.asarray(a), b.sharding), old, drawn)
        else:
            found = 'nothing' if old is None else f'a kernel of shape {old["kernel"].shape}'
            raise UserError(
                f'init_from: {name} needs a kernel of shape {drawn["kernel"].shape}; found {found}. To let it start '
                f'afresh, name it: --config.init_fresh="(\'{name}\',)".'
            )
    return taken


def _check_workdir(workdir: str) -> None:
    """Makes the workdir; raises UserError where it cannot be written."""
    try:
        os.makedirs(local(workdir), exist_ok=True)
        if not os.access(workdir, os.W_OK):
            raise PermissionError('not writable')
    except OSError as error:
        raise UserError(f'the workdir {workdir!r} cannot be used: {error}') from error


def _completed(config: dict) -> dict:
    """A config as JSON has it, with the defaults of the keys that an older version had not got."""
    network, augmentation = model.from_config(config['model']), augment.from_config(config['data'])
    return json.loads(
        json.dumps(
            {
                **{'init_fresh': (), 'stop_at_error': 0.0, 'accumulate': 1},
                **config,
                'optim': {'layer_decays': (), 'trust': 0.0, 'warmup_epochs': 0.0, **config['optim']},
                'model': {key: getattr(network, key) for key in model.FIELDS},
                'data': {'fraction': 1.0, **config['data'], **augmentation._asdict()},
            }
        )
    )


def _differences(old: dict, new: dict, prefix: str = '') -> list[str]:
    """'key: old -> new' for each key in which two configs differ and a run taken up again may not."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        name, a, b = prefix + key, old.get(key), new.get(key)
        if name in _MAY_DIFFER or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, name + '.')
        else:
            found.append(f'{name}: {a} -> {b}')
    return found
