"""Runs a suite: trains its networks and writes the report. Resumes a stopped suite."""

import contextlib
import math
import os

from absl import logging

from alexnet_jax.benchmark import throughput
from alexnet_jax.checkpoints.manager import check_workdir
from alexnet_jax.core.architecture import infer_shapes, sort_layers
from alexnet_jax.core.config import model_from_config
from alexnet_jax.data import datasets
from alexnet_jax.experiments import ablations, figure1, tables, trials
from alexnet_jax.experiments.cifar10 import RATES
from alexnet_jax.experiments.trials import FIGURE1, SMALL, Suite, Trial
from alexnet_jax.prepare import discovery, prepare
from alexnet_jax.prepare.image_ref import Listing
from alexnet_jax.training import build
from alexnet_jax.utils.errors import UserError, as_user_error


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
    if suite.name in SMALL and dataset.record_size != suite.record_size:
        raise UserError(
            f'--data={data!r}: expected images of {suite.record_size} px for {suite.name}, got {dataset.record_size} '
            f'px; prepare them with --size={suite.record_size}.'
        )
    suite = _with_data(suite, path, dataset)
    done, rows = figure1.run(suite, dataset) if suite.name == FIGURE1 else run_variants(suite, dataset)
    tables.write_csv(os.path.join(suite.output, 'results.csv'), rows, whole=not suite.only)
    diverged = {(row['variant'], row['seed']) for row in rows if row['diverged']}
    runs = {trial.workdir: trial.variant.name for trial in done if (trial.variant.name, trial.seed) not in diverged}
    if not runs:
        remedy = 'use a lower --base.optim.learning_rate and another --output.'
        if suite.name == FIGURE1:
            remedy = 'the suite sets the learning rates itself, so check the images (docs/trouble.md).'
        raise UserError(f'all networks of {suite.name} diverged; {remedy}')
    effects: dict[str, list[float]] = {}
    if suite.name == FIGURE1:
        names = list(dict.fromkeys(trial.variant.name for trial in done))
        results = [tables.figure1_table(rows, names, RATES, sort_layers(suite.base.model.layers))]
    elif suite.name in ('ensemble', 'views'):
        results = [tables.averaged_table(suite.name, list(runs), dataset, suite.base.data.max_unreadable)]
    else:
        variants = suite.variants()
        results = [tables.comparison_table(suite.name, rows, variants), tables.color_table(rows, variants)]
        effects = {variant.name: tables.deltas(rows, variant) for variant in variants if variant.baseline}
    tables.publish(suite.name, suite.output, results, runs, rows, dataset, effects)
    environment = next(filter(None, (trials.read_json(trial, 'environment') for trial in done)))  # of the training
    tables.write_json(suite.output, suite.name, [trial.variant for trial in done], rows, environment)
    return [tables.as_text(table) for table in results]


def _with_data(suite: Suite, path: str, source: datasets.Dataset | Listing) -> Suite:
    """Returns the suite with the settings of `trials.SET` in its base config."""
    values = (path, suite.scale, len(source.class_names), 0)
    return suite._replace(base=ablations.with_changes(suite.base, dict(zip(trials.SET, values, strict=True))))


def run_variants(suite: Suite, dataset: datasets.Dataset) -> tuple[list[Trial], list[dict]]:
    """Runs the variants of a suite one after the other. Returns (trials, rows), one row per trial."""
    planned = trials.make_trials(suite.variants(), suite.base, suite.seeds, suite.output)
    rows = []
    for i, trial in enumerate(planned):
        logging.info('%d/%d  %s', i + 1, len(planned), trial.title)
        rows.append(trials.run_trial(trial, suite.name, dataset))
    return planned, rows


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
        planned = figure1.max_trials(suite)
    else:
        planned = trials.make_trials(suite.variants(), suite.base, suite.seeds, suite.output)
    first = planned[0].config
    with contextlib.ExitStack() as stack:
        dataset = datasets.synthetic(first.data.image_size, first.model.num_classes)
        setup = build.build(ablations.with_changes(first, {'data.fraction': 1.0}), dataset)
        options = throughput.Options(torch_baseline=None, steps=0, precision='float32')
        contender, _ = throughput.our_updates(setup, options, stack, name='', on_batches=False)
        rate = contender.measure()
    flops: list[int] = []
    total = 0.0
    for trial in planned:
        layers = infer_shapes(model_from_config(trial.config.model), trial.config.data.image_size)
        flops.append(sum(layer.flops for layer in layers.values()))
        images = trial.config.num_steps * trial.config.batch_size or trial.config.num_epochs * examples
        hours = images / rate * flops[-1] / flops[0] / 3600
        total += hours
        lines.append(f'{trial.variant.name:28} seed {trial.seed}  {images:12,.0f} images  {format_hours(hours):>8}')
    lines.append(
        f'{len(planned)} runs, {format_hours(total)}, predicted from {rate:.0f} images/s of the first network on this '
        'machine and the FLOPs of the others. Data loading, evaluation and compilation are not included.'
    )
    return '\n'.join(lines)


def format_hours(hours: float) -> str:
    """Returns a duration as text, in minutes if it is below an hour."""
    return f'{hours:.1f} h' if hours >= 1 else f'{math.ceil(60 * hours)} min'


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
