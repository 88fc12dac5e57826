"""The settings of a suite, and its trials: training runs of one network with one seed, and their measurements."""

import json
import os
import pathlib
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from alexnet_jax.checkpoints.manager import CheckpointManager, config_to_json
from alexnet_jax.core import sharding
from alexnet_jax.core.architecture import ConvSpec, infer_shapes
from alexnet_jax.core.augment import default_record_size
from alexnet_jax.core.config import optimizer_from_config
from alexnet_jax.data import datasets
from alexnet_jax.experiments import ablations, figures, tables
from alexnet_jax.experiments.ablations import Variant
from alexnet_jax.inference import evaluate
from alexnet_jax.training import metric_writer, train
from alexnet_jax.training.check_config import network_and_augmentation
from alexnet_jax.utils.errors import DivergedError, UserError, did_you_mean
from alexnet_jax.utils.files import open_regular

FIGURE1 = 'figure1'
SMALL = (FIGURE1, 'cifar10')  # suites with 32 px images
SET = {  # settings of the base that follow from the data and the flags of a suite, and the remedy for who gives them
    'data.path': 'use --data',
    'data.fraction': 'use --scale',
    'model.num_classes': 'it follows from the data',
    'log_every_steps': 'suites log once per epoch',
}


class Suite(NamedTuple):
    """Settings of a suite."""

    name: str  # one of `ablations.SUITES`
    base: ConfigDict  # the config that the variants change
    seeds: int
    output: str  # directory of results.csv, report.html and runs/
    scale: float  # fraction of the training images to use, the same images in every run
    only: tuple[str, ...] = ()  # names of the variants to run, with their baselines; (): all
    overrides: Mapping[str, Any] = types.MappingProxyType({})  # {key: value}, settings of `base` that a user gave

    def variants(self) -> list[Variant]:
        """Returns the variants to run; of figure 1, all that may be run.

        Raises UserError if `only` has an unknown name, and for an override without effect.
        """
        known = {variant.name: variant for variant in ablations.SUITES[self.name](self.base)}
        if self.only and (len(known) < 2 or self.name == FIGURE1):
            raise UserError(f'--only={",".join(self.only)}: expected no names, because {self.name} needs all its runs.')
        for name in self.only:
            if name not in known:
                raise UserError(f'--only={name}: expected one of {", ".join(known)}.{did_you_mean(name, known)}')
        wanted = {*self.only, *(known[name].baseline for name in self.only)} or set(known)
        return self._override([variant for name, variant in known.items() if name in wanted])

    def _override(self, variants: Sequence[Variant]) -> list[Variant]:
        """Returns the variants with the overrides of settings that they share.

        The networks of `SMALL` change all settings, most of them to the same value, which an override replaces. In the
        other suites, a variant's own change is what the suite measures.
        """
        shared: dict[str, Any] = {}
        for key, value in self.overrides.items():
            said = f'--base.{key}={value}'
            if key in SET or (self.name, key) == (FIGURE1, 'stop_at_error'):
                raise UserError(f'{said}: {self.name} sets {key}; {SET.get(key, "it counts the epochs until 25%")}.')
            changes = [  # of each variant: those of the key and of the settings that contain it
                [change for name, change in variant.changes.items() if f'{key}.'.startswith(f'{name}.')]
                for variant in variants
            ]
            if not any(changes) or any(callable(change) for found in changes for change in found):
                continue  # the base's setting matters
            if self.name in SMALL and all(found == changes[0] for found in changes):
                shared[key] = value
            elif self.name in SMALL or all(changes):
                raise UserError(f'{said}: the networks of {self.name} have their own {key}; remove it.')
        return [variant._replace(changes={**variant.changes, **shared}) for variant in variants]

    @property
    def record_size(self) -> int:
        """Side of the training records in pixels."""
        return 32 if self.name in SMALL else default_record_size(self.base.data.image_size)


class Trial(NamedTuple):
    """One training run: a variant with one seed."""

    variant: Variant
    seed: int
    config: ConfigDict
    output: str  # of the suite
    ten_views: bool = True  # False: neither it nor the base is trained with reflections, as half of the views are

    @property
    def workdir(self) -> str:
        name = re.sub(r'[^\w. -]', '', self.variant.name).replace(' ', '_')
        return os.path.join(self.output, 'runs', f'{name}-{self.seed}')

    @property
    def title(self) -> str:
        return f'{self.variant.name}, seed {self.seed}'


def make_trials(variants: Sequence[Variant], base: ConfigDict, seeds: int, output: str) -> list[Trial]:
    """Returns a trial for every variant and seed. Suites with the same output share the runs of equal variants.

    Raises UserError before any training if a variant cannot be built from the base.
    """
    trials = []
    for variant in variants:
        config = ablations.with_changes(base, variant.changes)
        try:
            network, augmentation = network_and_augmentation(config)
            infer_shapes(network, augmentation.image_size, towers=config.mesh.tower)
            optimizer_from_config(config.optim, steps_per_epoch=1.0, layers=list(network.layers))
        except UserError as error:
            raise UserError(f'variant {variant.name!r} cannot be built from this base: {error}') from error
        reflect = base.data.reflect or config.data.reflect
        for seed in range(base.seed, base.seed + seeds):
            trials.append(Trial(variant, seed, ablations.with_changes(config, {'seed': seed}), output, reflect))
    return trials


def run_trial(trial: Trial, suite: str, dataset: datasets.Dataset) -> dict[str, Any]:
    """Trains a network, measures it and updates results.csv. Returns the row.

    A diverged run is recorded as a result. Existing measurements are loaded, not repeated.
    """
    result = read_json(trial, 'result')
    ended = result and result['diverged'] and result['step'] == _latest_step(trial)
    # `train` cannot detect a changed config if the run diverged before its first checkpoint.
    if ended and read_json(trial, 'config') == config_to_json(trial.config):
        logging.info('%s: diverged in an earlier run.', trial.title)
    else:
        diverged = False
        try:
            train.train_and_evaluate(trial.config, trial.workdir)  # raises UserError if the config changed
        except DivergedError as error:
            logging.info('%s: %s', trial.title, error)
            diverged = True
        step = _latest_step(trial)
        if not result or (result['step'], result['diverged']) != (step, diverged):  # new, or trained for longer
            result = {'step': step, 'diverged': diverged, **({} if diverged else measure(trial, dataset))}
            metric_writer.write_json(trial.workdir, {'result': result})
        jax.clear_caches()  # frees the compiled step: the next network has another one
    row = {'suite': suite, 'variant': trial.variant.name, 'seed': trial.seed, **(result or {})}
    tables.write_csv(os.path.join(trial.output, 'results.csv'), [row], whole=False)
    return row


def read_json(trial: Trial, name: str) -> dict[str, Any] | None:
    """Returns the content of NAME.json in the run directory, or None if there is no such file."""
    path = pathlib.Path(trial.workdir, f'{name}.json')
    if not path.exists():
        return None
    with open_regular(path, encoding='utf-8') as file:
        return json.load(file)


def _latest_step(trial: Trial) -> int | None:
    with CheckpointManager(trial.workdir, read_only=True) as checkpoints:
        return checkpoints.latest()


def measure(trial: Trial, dataset: datasets.Dataset) -> dict[str, Any]:
    """Measures a finished run: training error of the last epoch, and test errors of the last checkpoint, in percent."""
    config = trial.config
    checkpoint, curve = tables.load_last(trial.workdir), figures.curves(trial.workdir)['train']
    error = float(curve.top1_error[-1])
    row = {
        'data': config.data.path,
        'train_images': len(datasets.subset(dataset.splits['train'], config.data.fraction)),
        'epochs': float(curve.epoch[-1]),
        'learning_rate': config.optim.learning_rate,
        'train_error': error,
    }
    if config.stop_at_error:
        row['reached'] = error <= config.stop_at_error
    if name := tables.eval_split(dataset):
        row['test_images'] = len(dataset.splits[name])
        options = {'mesh': sharding.make_mesh(data=0, tower=1), 'max_unreadable': config.data.max_unreadable}
        ten = trial.ten_views and dataset.record_size > config.data.image_size  # else only two views differ
        for views, suffix in ((1, 'error'), (10, 'ten')) if ten else ((1, 'error'),):
            errors = evaluate.evaluate(checkpoint, dataset.splits[name], views=views, **options)
            row |= {f'top{k}_{suffix}': errors[f'top{k}_error'] for k in (1, 5)}
    name, first = next(iter(checkpoint.network.layers.items()))
    if type(first) is ConvSpec and first.features % 2 == 0:
        halves = np.split(figures.color_share(checkpoint.params[name]['kernel']), 2)
        row['color_0'], row['color_1'] = (float(half.mean()) for half in halves)
    return row
