"""Runs a suite: trains its network variants, measures them and writes the report. Resumes a stopped suite."""

import contextlib
import json
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from alexnet_jax.benchmark import throughput
from alexnet_jax.checkpoints.manager import CheckpointManager, check_workdir, config_to_json
from alexnet_jax.core import sharding
from alexnet_jax.core.architecture import ConvSpec, infer_shapes
from alexnet_jax.core.augment import default_record_size
from alexnet_jax.core.config import model_from_config, optimizer_from_config
from alexnet_jax.data import datasets
from alexnet_jax.experiments import ablations, figures, tables
from alexnet_jax.experiments.ablations import Variant
from alexnet_jax.experiments.cifar10 import RATES, figure1_changes
from alexnet_jax.inference import evaluate
from alexnet_jax.prepare import discovery, prepare
from alexnet_jax.prepare.image_ref import Listing
from alexnet_jax.training import build, metric_writer, train
from alexnet_jax.training.check_config import network_and_augmentation
from alexnet_jax.utils.errors import DivergedError, UserError, as_user_error, did_you_mean

FIGURE1 = 'figure1'
SUITES = (FIGURE1, *ablations.SUITES)
_SMALL = (FIGURE1, 'cifar10')  # suites with 32 px images


class Suite(NamedTuple):
    """Settings of a suite."""

    name: str  # one of `SUITES`
    base: ConfigDict  # the config that the variants change
    seeds: int
    output: str  # directory of results.csv, report.html and runs/
    scale: float  # fraction of the training images to use, the same images in every run
    only: tuple[str, ...] = ()  # names of the variants to run, with their baselines; (): all

    def variants(self) -> list[Variant]:
        """Returns the variants to run. Raises UserError if `only` has an unknown name."""
        known = {variant.name: variant for variant in ablations.SUITES.get(self.name, lambda base: [])(self.base)}
        if self.only and len(known) < 2:
            raise UserError(f'--only={",".join(self.only)}: expected no names, because {self.name} needs all its runs.')
        for name in self.only:
            if name not in known:
                raise UserError(f'--only={name}: expected one of {", ".join(known)}.{did_you_mean(name, known)}')
        wanted = {*self.only, *(known[name].baseline for name in self.only)} or set(known)
        return [variant for name, variant in known.items() if name in wanted]

    @property
    def record_size(self) -> int:
        """Side of the training records in pixels."""
        return 32 if self.name in _SMALL else default_record_size(self.base.data.image_size)


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


def run_suite(suite: Suite, data: str) -> list[str]:
    """Runs the unfinished trials of a suite and writes the results. Returns its tables as text.

    Writes results.csv, report.html, figures/ and runs/ to `suite.output`. data: a prepared directory, or any input of
    `alexnet_jax prepare`. Raises UserError if the images are unsuitable or if all networks diverged.
    """
    check_workdir(suite.output)
    with as_user_error(f'--output={suite.output!r} cannot be used', 'Give another directory.'):
        os.makedirs(suite.output, exist_ok=True)
    path = data if _is_prepared(data) else prepare_images(data, suite)
    dataset = datasets.open_dataset(path)
    hint = f' (remove it if {data!r} has changed)' if path != data else ''
    _check_splits(dataset, suite.name, f'{path!r}{hint}')
    if suite.name in _SMALL and dataset.record_size != suite.record_size:
        raise UserError(
            f'--data={data!r}: expected images of {suite.record_size} px for {suite.name}, got {dataset.record_size} '
            f'px; prepare them with --size={suite.record_size}.'
        )
    suite = _with_data(suite, path, dataset)
    trials, rows = run_figure1(suite, dataset) if suite.name == FIGURE1 else run_variants(suite, dataset)
    tables.write_csv(os.path.join(suite.output, 'results.csv'), rows, whole=not suite.only)
    diverged = {(row['variant'], row['seed']) for row in rows if row['diverged']}
    runs = {trial.workdir: trial.variant.name for trial in trials if (trial.variant.name, trial.seed) not in diverged}
    if not runs:
        remedy = 'use a lower --base.optim.learning_rate and another --output.'
        if suite.name in _SMALL:
            remedy = 'the suite sets the learning rates itself, so check the images (docs/trouble.md).'
        raise UserError(f'all networks of {suite.name} diverged; {remedy}')
    effects: dict[str, list[float]] = {}
    if suite.name == FIGURE1:
        names = list(dict.fromkeys(trial.variant.name for trial in trials))
        results = [tables.figure1_table(rows, names, RATES)]
    elif suite.name in ('ensemble', 'views'):
        results = [tables.averaged_table(suite.name, list(runs), dataset, suite.base.data.max_unreadable)]
    else:
        variants = suite.variants()
        results = [tables.comparison_table(suite.name, rows, variants), tables.color_table(rows, variants)]
        effects = {variant.name: tables.deltas(rows, variant) for variant in variants if variant.baseline}
    tables.publish(suite.name, suite.output, results, runs, rows, dataset, effects)
    networks = {trial.variant.name: trial.variant.baseline for trial in trials}
    environment = next(filter(None, (_read_json(trial, 'environment') for trial in trials)))  # of the training
    tables.write_json(suite.output, suite.name, networks, rows, environment)
    return [tables.as_text(table) for table in results]


def _with_data(suite: Suite, path: str, source: datasets.Dataset | Listing) -> Suite:
    """Returns the suite with the data path and the number of classes set in its base config."""
    changes = {'data.path': path, 'data.fraction': suite.scale, 'log_every_steps': 0}
    changes['model.num_classes'] = len(source.class_names)
    return suite._replace(base=ablations.with_changes(suite.base, changes))


def run_trial(trial: Trial, suite: str, dataset: datasets.Dataset) -> dict[str, Any]:
    """Trains a network, measures it and updates results.csv. Returns the row.

    A diverged run is recorded as a result. Existing measurements are loaded, not repeated.
    """
    result = _read_json(trial, 'result')
    ended = result and result['diverged'] and result['step'] == _latest_step(trial)
    # `train` cannot detect a changed config if the run diverged before its first checkpoint.
    if ended and _read_json(trial, 'config') == config_to_json(trial.config):
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


def _read_json(trial: Trial, name: str) -> dict[str, Any] | None:
    """Returns the content of NAME.json in the run directory, or None if there is no such file."""
    path = pathlib.Path(trial.workdir, f'{name}.json')
    return json.loads(path.read_text(encoding='utf-8')) if path.exists() else None


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


def search_rate(activation: str, suite: Suite, dataset: datasets.Dataset) -> tuple[float, list[dict]]:
    """Finds the learning rate with which the first seed needs the fewest epochs (figure 1).

    The search starts in the middle of `RATES` and moves to the faster neighbor until both neighbors are slower. A run
    ends early once it has trained for as many epochs as the fastest one. Returns (rate, rows of all tried rates).
    """
    rows: dict[int, dict[str, Any]] = {}
    epochs: dict[int, int] = {}
    best = len(RATES) // 2
    while True:
        for i in (best, best + 1, best - 1):  # the higher rate first: it is faster or diverges early
            if 0 <= i < len(RATES) and i not in rows:
                changes = figure1_changes(activation, RATES[i])
                changes['num_epochs'] = float(min((*epochs.values(), changes['num_epochs'])))
                variant = Variant(f'{activation} {RATES[i]:g}', changes)
                (trial,) = make_trials([variant], suite.base, 1, suite.output)
                rows[i] = run_trial(trial, FIGURE1, dataset)
                if rows[i].get('reached'):
                    epochs[i] = max(1, int(rows[i]['epochs']))  # the last batch of an epoch extends into the next epoch
            fastest = min(epochs, key=lambda i: epochs[i], default=best)
            if fastest != best:
                best = fastest
                break
        else:
            return RATES[best], list(rows.values())


def run_figure1(suite: Suite, dataset: datasets.Dataset) -> tuple[list[Trial], list[dict]]:
    """Trains ReLU and tanh networks, each with its best learning rate. Returns (trials to compare, all rows)."""
    trials, rows = [], []
    for activation in ('relu', 'tanh'):
        rate, tried = search_rate(activation, suite, dataset)
        logging.info('%s: learning rate %g is the fastest of %d tried.', activation, rate, len(tried))
        variant = Variant(f'{activation} {rate:g}', figure1_changes(activation, rate))
        best = make_trials([variant], suite.base, suite.seeds, suite.output)
        rows += [row for row in tried if row['variant'] != variant.name]
        rows += [run_trial(trial, FIGURE1, dataset) for trial in best]
        trials += best
    return trials, rows


def run_variants(suite: Suite, dataset: datasets.Dataset) -> tuple[list[Trial], list[dict]]:
    """Runs the variants of a suite one after the other. Returns (trials, rows), one row per trial."""
    trials = make_trials(suite.variants(), suite.base, suite.seeds, suite.output)
    rows = []
    for i, trial in enumerate(trials):
        logging.info('%d/%d  %s', i + 1, len(trials), trial.title)
        rows.append(run_trial(trial, suite.name, dataset))
    return trials, rows


def plan_suite(suite: Suite, data: str) -> str:
    """Returns the runs of a suite, their images and their predicted durations as text. Writes nothing.

    The prediction is based on the measured speed of a few updates of the first network and the FLOPs of all networks.
    """
    source = datasets.open_dataset(data) if _is_prepared(data) else discovery.find_images(data)
    _check_splits(source, suite.name, repr(data))
    suite = _with_data(suite, data, source)
    examples = round(len(source.splits['train']) * suite.scale)
    lines = []
    if suite.name == FIGURE1:
        lines.append('Upper bound: slow learning rates are stopped early, and a run ends at 25% training error.')
        trials = max_trials(suite.base, suite.seeds, suite.output)
    else:
        trials = make_trials(suite.variants(), suite.base, suite.seeds, suite.output)
    first = trials[0].config
    with contextlib.ExitStack() as stack:
        dataset = datasets.synthetic(first.data.image_size, first.model.num_classes)
        setup = build.build(ablations.with_changes(first, {'data.fraction': 1.0}), dataset)
        options = throughput.Options(torch_baseline=None, steps=0, precision='float32')
        contender, _ = throughput.our_updates(setup, options, stack, name='', on_batches=False)
        rate = contender.measure()
    flops: list[int] = []
    total = 0.0
    for trial in trials:
        layers = infer_shapes(model_from_config(trial.config.model), trial.config.data.image_size)
        flops.append(sum(layer.flops for layer in layers.values()))
        images = trial.config.num_steps * trial.config.batch_size or trial.config.num_epochs * examples
        hours = images / rate * flops[-1] / flops[0] / 3600
        total += hours
        lines.append(f'{trial.variant.name:28} seed {trial.seed}  {images:12,.0f} images  {format_hours(hours):>8}')
    lines.append(
        f'{len(trials)} runs, {format_hours(total)}, predicted from {rate:.0f} images/s of the first network on this '
        'machine and the FLOPs of the others. Data loading, evaluation and compilation are not included.'
    )
    return '\n'.join(lines)


def format_hours(hours: float) -> str:
    """Returns a duration as text, in minutes if it is below an hour."""
    return f'{hours:.1f} h' if hours >= 1 else f'{math.ceil(60 * hours)} min'


def max_trials(base: ConfigDict, seeds: int, output: str) -> list[Trial]:
    """Returns the most trials that figure 1 can need: all rates with the first seed, one rate with the other seeds."""
    trials = []
    for activation in ('relu', 'tanh'):
        variants = [Variant(f'{activation} {rate:g}', figure1_changes(activation, rate)) for rate in RATES]
        best = Variant(f'{activation}, best rate', figure1_changes(activation, RATES[0]))
        trials += make_trials(variants, base, 1, output) + make_trials([best], base, seeds, output)[1:]
    return trials


def _is_prepared(path: str) -> bool:
    return path == datasets.DIGITS or os.path.exists(os.path.join(path, 'dataset_info.json'))


def prepare_images(path: str, suite: Suite) -> str:
    """Prepares the images at `path` into DIR/data-SIZE unless it exists. Returns that directory."""
    size = suite.record_size
    folder = os.path.join(suite.output, f'data-{size}')
    listing = None
    if not os.path.exists(folder):
        listing = discovery.find_images(path)
        _check_splits(listing, suite.name, repr(path))
    prepare.prepare_if_needed(path, folder, size=size, format='raw' if size <= 64 else 'jpeg', listing=listing)
    return folder


def _check_splits(source: datasets.Dataset | Listing, suite: str, name: str) -> None:
    """Raises UserError if the suite has no images to train on or to evaluate on."""
    if 'train' not in source.splits:
        raise UserError(f'{name} has no train split, only {" and ".join(source.splits)}; add one.')
    if suite != FIGURE1 and not {'val', 'test'} & source.splits.keys():
        raise UserError(
            f'{name} has no val or test split to evaluate on; add one, or prepare the images with --val_fraction.'
        )
