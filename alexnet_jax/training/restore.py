"""Where a run begins: at its last checkpoint, if that is of this config and these data, else with fresh weights."""

from typing import Any

import jax
import numpy as np
from absl import logging

from alexnet_jax.checkpoints import loading, manager
from alexnet_jax.core import train_step
from alexnet_jax.core.config import MODEL_FIELDS
from alexnet_jax.training import metric_writer, train_log
from alexnet_jax.training.build import TrainingSetup
from alexnet_jax.utils import distributed
from alexnet_jax.utils.errors import UserError, did_you_mean

# What may differ when a run is taken up again: where and how it computes, how often it reports, how long it goes on.
_MAY_DIFFER = {
    'log_every_steps', 'eval_every_steps', 'checkpoint_every_steps', 'num_epochs', 'num_steps', 'stop_at_error',
    'grad_accum_steps', 'debug', 'deterministic', 'on_nonfinite', 'max_nonfinite', 'mesh', 'data.path',
    'data.num_workers', 'data.num_threads', 'data.cache', 'data.max_unreadable',
}  # fmt: skip
_META = {'config': dict, 'class_names': list, 'record_size': int, 'examples': int, 'fingerprint': str}


def restore_or_init(
    checkpoints: manager.CheckpointManager, setup: TrainingSetup, key, meta: dict, workdir: str
) -> tuple[train_step.TrainState, dict[str, Any]]:
    """The last checkpoint's state and meta, after making sure that it is of this config and these data.

    Args:
      checkpoints: of the workdir, open for training.
      setup: of this run's config.
      key: of the fresh state that is drawn where there is no checkpoint.
      meta: of this run, as its checkpoints will hold it.
      workdir: for messages.

    Returns:
      (state, meta); without a checkpoint a fresh state, with the parameters of `config.init_from`, and nothing.

    Raises:
      UserError: the checkpoint is of another config, of other data or of no run; or `init_from` does not fit.
    """
    # One for all: on a shared disk the others may not see yet what the first has written or moved away.
    step = distributed.broadcast_from_process_0(checkpoints.latest)
    if step is not None:
        old, image_stats = checkpoints.read_meta(step)
        _check_is_this_run(old, image_stats, meta, setup, workdir, step)
        state = checkpoints.restore(step, setup.steps.state_shapes)
        if int(state.step) != step:
            raise UserError(
                f'{checkpoints.folder}/{step} holds the state of step {int(state.step)}; give that folder its own name.'
            )
        return state, old
    if made := metric_writer.last_step(workdir):
        distributed.warn(f'{workdir} has no checkpoint; the {made} steps of its metrics.jsonl are made again.')
    state, config = setup.steps.init(key), setup.config
    if config.init_from:
        source = loading.load_checkpoint(config.init_from)
        theirs, ours = _inference_settings(source), _inference_settings(setup)
        for name in sorted(theirs.keys() & ours.keys() - set(config.init_fresh)):
            if theirs[name] != ours[name]:
                distributed.warn(
                    f'{config.init_from} was trained with {name} {theirs[name]}, this config has {ours[name]}.'
                )
        state = state._replace(params=_load_pretrained(source, state.params, setup))
    return state, {}


def _check_is_this_run(old: dict, image_stats, meta: dict, setup: TrainingSetup, workdir: str, step: int) -> None:
    """Raises UserError where a checkpoint, by its meta and image statistics, is not of this config and these data."""
    whole = all(isinstance(old.get(name), kind) for name, kind in _META.items())
    if not whole or not train_log.is_valid_state(old.get('log')):
        raise UserError(f'{workdir}: step {step} was not written by alexnet_jax train; use another --workdir.')
    if not old['examples']:
        raise UserError(
            f'{workdir} holds converted weights and no run; to train from them give another --workdir and '
            f'--config.init_from={workdir}.'
        )
    if differences := _differences(old['config'], meta['config']):
        raise UserError(
            f'{workdir} holds a run of another config: {"; ".join(differences)}. '
            'Give the same config, or another directory.'
        )
    same = all(old[name] == meta[name] for name in _META.keys() - {'config'})
    own = setup.dataset.image_stats
    if own is None or not same or not all(np.array_equal(a, b) for a, b in zip(image_stats, own, strict=True)):
        raise UserError(
            f'{workdir} was trained on other data than {setup.config.data.path!r} (other images, or prepared '
            'otherwise); give the same data, or another directory.'
        )


def _inference_settings(source: TrainingSetup | manager.Checkpoint) -> dict[str, Any]:
    """Settings that change what the same weights compute: preprocessing, norms and pools, what each layer does."""
    settings = {f'data.{name}': getattr(source.augmentation, name) for name in ('image_size', 'mean', 'pixel_std')}
    for name in MODEL_FIELDS:
        if name.startswith(('lrn_', 'norm_', 'spatial_', 'pool_', 'dropout_inverted')):
            settings[f'model.{name}'] = getattr(source.network, name)
    keys = ('stride', 'padding', 'groups', 'post')
    for name, layer in source.network.layers.items():
        settings[name] = {key: getattr(layer, key) for key in keys if hasattr(layer, key)}
    return settings


def _load_pretrained(source: manager.Checkpoint, params, setup: TrainingSetup):
    """The source's parameters on the mesh of `params`; `fresh` ones, and a classifier of other classes, stay as drawn.

    All start with velocity zero, as in the authors' `layer.py`.
    """
    classifier, fresh = list(setup.network.layers)[-1], setup.config.init_fresh
    same_classes = source.class_names == tuple(setup.dataset.class_names)
    for name in fresh:
        if name not in params:
            raise UserError(f'init_fresh names a layer {name!r}.{did_you_mean(name, params)}')
    taken = {}
    for name, drawn in params.items():
        old = source.params.get(name)
        fits = old is not None and all(old[part].shape == drawn[part].shape for part in drawn)
        if name in fresh or (name == classifier and not (fits and same_classes)):
            why = '' if name in fresh or not fits else f', as the classes of {setup.config.init_from} are others'
            logging.info('%s starts afresh: %s%s.', name, drawn['kernel'].shape, why)
            taken[name] = drawn
        elif fits:
            taken[name] = jax.tree.map(lambda a, b: jax.device_put(np.asarray(a), b.sharding), old, drawn)
        else:
            given = 'nothing' if old is None else f'a kernel of shape {old["kernel"].shape}'
            raise UserError(
                f'init_from: {name} needs a kernel of shape {drawn["kernel"].shape}; found {given}. To let it start '
                f'afresh, name it: --config.init_fresh="(\'{name}\',)".'
            )
    return taken


def _differences(old: dict, new: dict, prefix: str = '') -> list[str]:
    """'key: old -> new' for each key in which two configs differ and a run taken up again may not."""
    differences = []
    for key in sorted(old.keys() | new.keys()):
        name, a, b = prefix + key, old.get(key), new.get(key)
        if name in _MAY_DIFFER or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            differences += _differences(a, b, name + '.')
        else:
            differences.append(f'{name}: {a} -> {b}')
    return differences
