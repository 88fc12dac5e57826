"""Restores a run from its last checkpoint, or initializes it with new or pretrained weights."""

from typing import Any

import jax
import numpy as np
from absl import logging

from alexnet_jax.checkpoints import manager
from alexnet_jax.convert import loading
from alexnet_jax.core import train_step
from alexnet_jax.core.config import MODEL_FIELDS
from alexnet_jax.training import metric_writer, train_log
from alexnet_jax.training.build import TrainingSetup
from alexnet_jax.utils import distributed
from alexnet_jax.utils.config_files import get_config
from alexnet_jax.utils.errors import UserError, did_you_mean

# Config keys that may change when a run is resumed: hardware, reporting intervals and length of the run.
_MAY_DIFFER = {
    'log_every_steps', 'eval_every_steps', 'checkpoint_every_steps', 'num_epochs', 'num_steps', 'stop_at_error',
    'grad_accum_steps', 'debug', 'deterministic', 'on_nonfinite', 'max_nonfinite', 'mesh', 'data.path',
    'data.num_workers', 'data.num_threads', 'data.cache', 'data.max_unreadable',
}  # fmt: skip
_META = {'config': dict, 'class_names': list, 'record_size': int, 'examples': int, 'fingerprint': str}


def restore_or_init(
    checkpoints: manager.CheckpointManager, setup: TrainingSetup, key, meta: dict, workdir: str
) -> tuple[train_step.TrainState, dict[str, Any]]:
    """Returns (state, meta) of the last checkpoint; without one, a new state and {}.

    A new state has the parameters of `config.init_from`, if set. Raises UserError if the checkpoint has another config
    or other data or is not of a run, or if `init_from` does not fit.

    Args:
      checkpoints: checkpoint manager of the workdir, opened for training.
      setup: built from this run's config.
      key: random key for a new state.
      meta: metadata of this run, as its checkpoints will store it.
      workdir: for messages.
    """
    for problem in checkpoints.damaged:
        distributed.warn(f'ignoring a checkpoint: {problem}.')
    # Process 0 decides for all: on a shared disk the others may not yet see files that it has written or moved.
    step = distributed.broadcast_from_process_0(checkpoints.latest)
    if step is not None:
        old, image_stats = checkpoints.read_meta(step)
        _check_same_run(old, image_stats, meta, setup, workdir, step)
        state = checkpoints.restore(step, setup.steps.state_shapes)
        if int(state.step) != step:
            raise UserError(
                f'{checkpoints.folder}/{step} contains the state of step {int(state.step)}; rename the folder to '
                f'{int(state.step)}.'
            )
        return state, old
    if last := metric_writer.last_step(workdir):
        distributed.warn(f'{workdir} has no checkpoint; the {last} steps in its metrics.jsonl are run again.')
    state, config = setup.steps.init(key), setup.config
    if config.init_from:
        source = loading.load_checkpoint(config.init_from)
        theirs, ours = _inference_settings(source), _inference_settings(setup)
        for name in sorted(theirs.keys() & ours.keys() - set(config.init_fresh)):
            if theirs[name] != ours[name]:
                distributed.warn(
                    f'{config.init_from} was trained with {name}={theirs[name]}; this config has {ours[name]}.'
                )
        # An average of the parameters needs no change: it forgets the initial ones.
        state = state._replace(params=_load_pretrained(source, state.params, setup))
    return state, {}


def _check_same_run(old: dict, image_stats, meta: dict, setup: TrainingSetup, workdir: str, step: int) -> None:
    """Raises UserError if a checkpoint's metadata or image statistics do not match this run's config and data."""
    written_by_train = all(isinstance(old.get(name), kind) for name, kind in _META.items())
    if not written_by_train or not train_log.is_valid_state(old.get('log')):
        raise UserError(f'{workdir}: step {step} was not written by alexnet_jax train; use another --workdir.')
    if not old['examples']:
        raise UserError(
            f'{workdir} contains converted or fitted weights, not a run; to start from them, use another --workdir and '
            f'--config.init_from={workdir}.'
        )
    if differences := config_differences(_with_new_keys(old['config']), meta['config']):
        raise UserError(
            f'{workdir} contains a run with another config ({"; ".join(differences)}); use the same config or another '
            '--workdir.'
        )
    same = all(old[name] == meta[name] for name in _META.keys() - {'config'})
    own = setup.dataset.image_stats
    if own is None or not same or not all(np.array_equal(a, b) for a, b in zip(image_stats, own, strict=True)):
        raise UserError(
            f'{workdir} was trained on other data than {setup.config.data.path!r} (other images or another '
            'preparation); use the same data or another --workdir.'
        )


def _with_new_keys(config: dict) -> dict:
    """Adds the keys that an older config lacks, with the values of configs/paper.py, which change nothing."""
    default = manager.config_to_json(get_config('paper', packaged=True))
    return {
        key: {**default[key], **value} if isinstance(value, dict) and key in default else value
        for key, value in {**default, **config}.items()
    }


def _inference_settings(source: TrainingSetup | manager.Checkpoint) -> dict[str, Any]:
    """Returns the settings that change the outputs for given weights: preprocessing, norms, pooling and layer ops."""
    settings = {f'data.{name}': getattr(source.augmentation, name) for name in ('image_size', 'mean', 'pixel_std')}
    for name in MODEL_FIELDS:
        if name.startswith(('lrn_', 'norm_', 'spatial_', 'pool_', 'dropout_inverted')):
            settings[f'model.{name}'] = getattr(source.network, name)
    keys = ('stride', 'padding', 'groups', 'post')
    for name, layer in source.network.layers.items():
        settings[name] = {key: getattr(layer, key) for key in keys if hasattr(layer, key)}
    return settings


def _load_pretrained(source: manager.Checkpoint, params, setup: TrainingSetup):
    """Returns `params` with the parameters of `source` copied in, on the same mesh.

    The layers in `init_fresh` keep their new values, and so does the classifier if the classes differ. The velocity of
    all layers starts at zero, as in the authors' `layer.py`.
    """
    classifier, fresh = list(setup.network.layers)[-1], setup.config.init_fresh
    same_classes = source.class_names == tuple(setup.dataset.class_names)
    for name in fresh:
        if name not in params:
            raise UserError(f'init_fresh: unknown layer {name!r}.{did_you_mean(name, params)}')
    loaded = {}
    for name, new in params.items():
        old = source.params.get(name)
        fits = old is not None and all(old[part].shape == new[part].shape for part in new)
        if name in fresh or (name == classifier and not (fits and same_classes)):
            reason = '' if name in fresh or not fits else f', because {setup.config.init_from} has other classes'
            logging.info('%s starts with new weights of shape %s%s.', name, new['kernel'].shape, reason)
            loaded[name] = new
        elif fits:
            loaded[name] = jax.tree.map(lambda a, b: jax.device_put(np.asarray(a), b.sharding), old, new)
        else:
            found = 'no such layer' if old is None else f'shape {old["kernel"].shape}'
            raise UserError(
                f'init_from={setup.config.init_from!r}: expected a kernel of shape {new["kernel"].shape} for {name}, '
                f'found {found}; use --config.init_fresh="(\'{name}\',)" to initialize this layer.'
            )
    return loaded


def config_differences(old: dict, new: dict) -> list[str]:
    """Returns 'key: old -> new' for each differing config key, except the keys that may change on resuming."""
    # These schedules depend on the length of the run: with another length, the steps so far had other rates.
    fixed = new.get('optim', {}).get('schedule') in ('cosine', 'poly')
    return _differences(old, new, _MAY_DIFFER - {'num_epochs', 'num_steps'} if fixed else _MAY_DIFFER)


def _differences(old: dict, new: dict, may_differ: set[str], prefix: str = '') -> list[str]:
    differences = []
    for key in sorted(old.keys() | new.keys()):
        name, a, b = prefix + key, old.get(key), new.get(key)
        if name in may_differ or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            differences += _differences(a, b, may_differ, name + '.')
        else:
            differences.append(f'{name}: {a} -> {b}')
    return differences
