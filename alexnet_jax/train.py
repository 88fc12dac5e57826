"""train_and_evaluate(config, workdir): where a config becomes a dataset, a network, a mesh, an optimiser and a loop."""

import functools
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from alexnet_jax import augment, checkpoint, data, evaluate, model, optim, sharding, sources, steps, writers
from alexnet_jax.errors import UserError

# What may differ when a run is taken up again: where and how it computes, how often it reports, how long it goes on.
_MAY_DIFFER = {
    'log_every_steps', 'eval_every_steps', 'checkpoint_every_steps', 'num_epochs', 'num_steps', 'debug', 'on_nonfinite',
    'mesh', 'data.path', 'data.num_workers', 'data.num_threads',
}  # fmt: skip


class Run(NamedTuple):
    """A config's objects, ready to call; a notebook can take them from here."""

    dataset: sources.Dataset
    network: model.AlexNet
    mesh: Mesh
    optimizer: optim.Optimizer
    statistics: Any  # Statistics, on the mesh
    state_shapes: steps.TrainState  # ShapeDtypeStructs with shardings
    init: Callable  # key -> TrainState
    train_step: Callable  # (state, batch, statistics, key) -> (state, report); takes the state over
    eval_step: Callable  # (params, batch, statistics) -> sums, of the centre crop
    after_validation: Callable  # (opt_state, error) -> opt_state
    examples: int  # in the train split
    total_steps: int


def build(config: ConfigDict) -> Run:
    """Turns a config into objects, checking all that can be checked before anything is compiled.

    Raises:
      UserError: the config does not fit the data, the devices or itself.
    """
    _check_ranges(config)
    network = model.from_config(config.model)
    dataset = sources.open_dataset(config.data.path)
    if dataset.statistics is None or 'train' not in dataset.splits:
        raise UserError(f'{config.data.path!r} has no train split; prepare training images too.')
    if len(dataset.class_names) != network.num_classes:
        raise UserError(
            f'the data have {len(dataset.class_names)} classes, the model {network.num_classes}; '
            f'use --config.model.num_classes={len(dataset.class_names)}.'
        )
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch(mesh, config.batch_size)
    image_size = config.data.image_size
    augment.positions(dataset.record_size, image_size)
    model.check(network, image_size=image_size, towers=mesh.shape['tower'])

    examples = len(dataset.splits['train'])
    steps_per_epoch = examples / config.batch_size
    optimizer = optim.make_optimizer(**config.optim, steps_per_epoch=steps_per_epoch)
    forward = sharding.forward(network, mesh)
    init = functools.partial(steps.init_state, network, optimizer, image_size=image_size)
    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = sharding.state_sharding(mesh, shapes)
    everywhere = sharding.replicated(mesh)
    return Run(
        dataset=dataset,
        network=network,
        mesh=mesh,
        optimizer=optimizer,
        statistics=jax.device_put(dataset.statistics, everywhere),
        state_shapes=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings),
        init=jax.jit(init, out_shardings=shardings),
        train_step=jax.jit(
            functools.partial(steps.train_step, network=network, forward=forward, optimizer=optimizer),
            out_shardings=(shardings, everywhere),
            donate_argnums=() if config.debug else 0,  # a NaN check runs the step a second time
        ),
        eval_step=jax.jit(
            functools.partial(steps.eval_step, forward=forward, image_size=image_size, views=1),
            out_shardings=everywhere,
        ),
        after_validation=jax.jit(optimizer.after_validation, out_shardings=shardings.opt_state),
        examples=examples,
        total_steps=config.num_steps or math.ceil(config.num_epochs * steps_per_epoch),
    )


def _check_ranges(config: ConfigDict) -> None:
    if config.on_nonfinite not in ('stop', 'skip'):
        raise UserError(f"on_nonfinite={config.on_nonfinite!r}; expected 'stop' or 'skip'.")
    if not 0 <= config.seed < 2**31:
        raise UserError(f'seed={config.seed}; expected 0 to 2^31 - 1.')
    if config.num_steps <= 0 and not config.num_epochs > 0:
        raise UserError(f'num_epochs={config.num_epochs}, num_steps={config.num_steps}; nothing to train for.')
    sizes = {key: config[key] for key in ('num_steps', 'log_every_steps', 'eval_every_steps', 'checkpoint_every_steps')}
    sizes |= {f'data.{key}': config.data[key] for key in ('num_workers', 'num_threads', 'colour_std')}
    for key, value in sizes.items():
        if value < 0:
            raise UserError(f'{key}={value}; expected 0 or more.')


def train_and_evaluate(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Trains to the end, from the beginning or from the workdir's last checkpoint.

    At a step: update, evaluate, decide the rate, save; so what was decided is what is saved. A run that is stopped and
    started again with the same config ends as one that never stopped.

    Args:
      config: see configs/paper.py; it is not changed.
      workdir: gets config.json, environment.json, metrics.jsonl, TensorBoard events and checkpoints/.

    Returns:
      the last validation's numbers (see `evaluate.one_pass`); empty without a val split, or if all was done before.

    Raises:
      UserError: the config, the data or the workdir do not fit together.
      DivergedError: loss or gradient stopped being finite; names the step.
    """
    run = build(config)
    _check_workdir(config, workdir)
    val = run.dataset.splits.get('val')
    if val is None:
        writers.warn('no val split: nothing is evaluated, and the learning rate does not follow the validation error.')
    key = jax.device_put(jax.random.key(config.seed), sharding.replicated(run.mesh))
    meta = {
        'config': checkpoint.config_to_json(config),
        'class_names': run.dataset.class_names,
        'image_size': config.data.image_size,
        'record_size': run.dataset.record_size,
        'examples': run.examples,
    }
    result = {}
    debug_nans = jax.debug_nans(config.debug or jax.config.jax_debug_nans)
    with checkpoint.open_manager(workdir) as manager, debug_nans:
        state = _restore_or_init(manager, run, config, key, workdir)
        step = int(state.step)
        if step >= run.total_steps:
            print(f'{workdir} is finished: step {step} of {run.total_steps}. Raise num_epochs to go on.', flush=True)
            return result
        _write_json(workdir, {'config': meta['config'], 'environment': writers.environment()})
        writer = writers.RunWriter(workdir, step)
        log = writers.TrainLog(
            writer,
            batch_size=config.batch_size,
            examples=run.examples,
            total_steps=run.total_steps,
            on_nonfinite=config.on_nonfinite,
        )
        batches = data.train_batches(
            run.dataset.splits['train'],
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=step,
            record_size=run.dataset.record_size,
            image_size=config.data.image_size,
            reflect=config.data.reflect,
            colour_std=config.data.colour_std,
            shard=sharding.data_shard(run.mesh),
            num_workers=config.data.num_workers,
            num_threads=config.data.num_threads,
        )
        try:
            while step < run.total_steps:
                began = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - began
                state, report = run.train_step(state, sharding.to_mesh(run.mesh, batch), run.statistics, key)
                step += 1
                due = functools.partial(_due, step, config, run)
                saves, validates = due('checkpoint_every_steps'), val is not None and due('eval_every_steps')
                # A line before each save, so that no mean reaches back over a restart.
                log.add(step, report, waited=waited, log=saves or due('log_every_steps'))
                if not (saves or validates):
                    continue
                with log.pause():
                    if validates:
                        result = _validate(run, config, state, step, val, writer)
                        opt_state = run.after_validation(state.opt_state, result['top1_error'])
                        state = state._replace(opt_state=opt_state)
                    if saves:
                        error = result['top1_error'] if validates else None
                        checkpoint.save(manager, state, run.dataset.statistics, meta, error)
        finally:
            batches.close()
            writer.close()
    return result


def _due(step: int, config: ConfigDict, run: Run, cadence: str) -> bool:
    """Whether something that happens every `config[cadence]` steps (0: once an epoch; and at the end) happens now."""
    if step == run.total_steps:
        return True
    if every := config[cadence]:
        return step % every == 0
    return step * config.batch_size // run.examples > (step - 1) * config.batch_size // run.examples


def _validate(run: Run, config: ConfigDict, state, step: int, val, writer) -> dict[str, float]:
    result = evaluate.one_pass(
        run.eval_step,
        state.params,
        run.statistics,
        val,
        run.mesh,
        batch_size=config.batch_size,
        num_workers=config.data.num_workers,
        num_threads=config.data.num_threads,
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


def _restore_or_init(manager, run: Run, config: ConfigDict, key, workdir: str) -> steps.TrainState:
    step = manager.latest_step()
    if step is not None:
        meta, statistics = checkpoint.read_meta(manager, step)
        same = meta['examples'] == run.examples and tuple(meta['class_names']) == run.dataset.class_names
        if not same or any((a != b).any() for a, b in zip(statistics, run.dataset.statistics, strict=True)):
            raise UserError(
                f'{workdir} was trained on other data than {config.data.path!r} (images, classes or mean differ); '
                'give the same data, or another --workdir.'
            )
        print(f'Going on from step {step} of {run.total_steps} in {workdir}.', flush=True)
        return checkpoint.restore(manager, step, run.state_shapes)
    state = run.init(key)
    if config.init_from:
        state = state._replace(params=_take_over(checkpoint.load_checkpoint(config.init_from), state.params))
    return state


def _take_over(source: checkpoint.Checkpoint, params):
    """The source's parameters on the mesh of `params`; a classifier for other classes stays as it was drawn."""
    classifier = list(params)[-1]
    taken = {}
    for name, fresh in params.items():
        old = source.params.get(name)
        if old is not None and all(old[part].shape == fresh[part].shape for part in fresh):
            taken[name] = jax.tree.map(lambda a, b: jax.device_put(jnp.asarray(a), b.sharding), old, fresh)
        elif name == classifier:
            print(f'{name} starts afresh: it has {fresh["bias"].shape[0]} classes.', flush=True)
            taken[name] = fresh
        else:
            found = 'nothing' if old is None else f'a kernel of shape {old["kernel"].shape}'
            raise UserError(f'init_from: {name} needs a kernel of shape {fresh["kernel"].shape}; found {found}.')
    return taken


def _check_workdir(config: ConfigDict, workdir: str) -> None:
    """Makes the workdir; raises UserError where it cannot be written or holds a run of another config."""
    path = os.path.join(workdir, 'config.json')
    try:
        os.makedirs(workdir, exist_ok=True)
        if not os.access(workdir, os.W_OK):
            raise PermissionError('not writable')
        if not os.path.exists(path):
            return
        with open(path, encoding='utf-8') as file:
            old = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f'the workdir {workdir!r} cannot be used: {error}') from error
    if differences := _differences(old, checkpoint.config_to_json(config)):
        raise UserError(
            f'{workdir} holds a run of another config: {"; ".join(differences)}. '
            'Give the same config, or another --workdir.'
        )


def _write_json(workdir: str, files: dict[str, dict]) -> None:
    """Process 0 replaces each file in one move."""
    for name, content in files.items() if jax.process_index() == 0 else ():
        path = os.path.join(workdir, f'{name}.json')
        with open(path + '.tmp', 'w', encoding='utf-8') as file:
            json.dump(content, file, indent=2)
        os.replace(path + '.tmp', path)


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
