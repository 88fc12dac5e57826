"""Where a run begins: at its last checkpoint, if that is of this config and these data, else with fresh weights."""

import json
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax import augment, checkpoint, model, processes, steps, trainlog, writers
from alexnet_jax.assemble import Run
from alexnet_jax.augment import Augmentation
from alexnet_jax.errors import UserError, did_you_mean

# What may differ when a run is taken up again: where and how it computes, how often it reports, how long it goes on.
_MAY_DIFFER = {
    'log_every_steps', 'eval_every_steps', 'checkpoint_every_steps', 'num_epochs', 'num_steps', 'stop_at_error',
    'accumulate', 'debug', 'deterministic', 'on_nonfinite', 'max_nonfinite', 'mesh', 'data.path', 'data.num_workers',
    'data.num_threads', 'data.cache', 'data.max_bad',
}  # fmt: skip
_META = {'config': dict, 'class_names': list, 'record_size': int, 'examples': int, 'fingerprint': str}
_DATA_KEYS = ('examples', 'class_names', 'record_size', 'fingerprint')


def restore_or_init(
    checkpoints: checkpoint.Checkpoints, run: Run, config: ConfigDict, key, meta: dict, workdir: str
) -> tuple[steps.TrainState, dict[str, Any]]:
    """The last checkpoint's state and meta, after making sure that it is of this config and these data.

    Args:
      checkpoints: of the workdir, open for training.
      run: of the config.
      config: of this run.
      key: of the fresh state that is drawn where there is no checkpoint.
      meta: of this run, as its checkpoints will hold it.
      workdir: for what is said.

    Returns:
      (state, meta); without a checkpoint a fresh state, with the parameters of `config.init_from`, and nothing.

    Raises:
      UserError: the checkpoint is of another config, of other data or of no run; or `init_from` does not fit.
    """
    # One for all: on a shared disk the others may not see yet what the first has written or moved away.
    step = processes.first_process_decides(checkpoints.latest)
    if step is not None:
        old, statistics = checkpoints.read_meta(step)
        _check_is_this_run(old, statistics, meta, run, config, workdir, step)
        state = checkpoints.restore(step, run.state_shapes)
        if int(state.step) != step:
            raise UserError(
                f'{checkpoints.folder}/{step} holds the state of step {int(state.step)}; give that folder its own name.'
            )
        return state, old
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


def _check_is_this_run(
    old: dict, statistics, meta: dict, run: Run, config: ConfigDict, workdir: str, step: int
) -> None:
    """Raises UserError where a checkpoint, by its meta and statistics, is not of this config and these data."""
    whole = all(isinstance(old.get(name), kind) for name, kind in _META.items())
    if not whole or not trainlog.fits(old.get('log')):
        raise UserError(f'{workdir}: step {step} was not written by alexnet_jax.main; use another --workdir.')
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


def _meaning(network: model.AlexNet, augmentation: Augmentation) -> dict[str, Any]:
    """Settings that change what the same weights compute: preprocessing, norms and pools, what each layer does."""
    found = {f'data.{name}': getattr(augmentation, name) for name in ('image_size', 'mean', 'pixel_std')}
    for name in model.FIELDS:
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
