"""Results of a suite: results.csv, mean and standard deviation over seeds, comparison with the paper, report.html."""

import collections
import csv
import itertools
import json
import os
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from alexnet_jax.checkpoints import manager
from alexnet_jax.core import sharding
from alexnet_jax.data import pipeline
from alexnet_jax.data.datasets import Dataset
from alexnet_jax.experiments import ablations, figures, report
from alexnet_jax.inference import evaluate
from alexnet_jax.utils.environment import describe_environment
from alexnet_jax.utils.files import atomic_file, open_regular

COLUMNS = (
    'suite', 'variant', 'seed', 'data', 'train_images', 'test_images', 'epochs', 'learning_rate', 'train_error',
    'top1_error', 'top5_error', 'top1_ten', 'top5_ten', 'color_0', 'color_1', 'reached', 'diverged',
)  # fmt: skip


def differences(rows: Sequence[dict], variant: str, baseline: str, key: str) -> list[float]:
    """Returns the differences in column `key` between `variant` and `baseline`, one for each seed that both have."""
    values = {(row['variant'], row['seed']): row.get(key) for row in rows}
    pairs = [(values.get((variant, seed)), values.get((baseline, seed))) for name, seed in values if name == variant]
    return [a - b for a, b in pairs if a is not None and b is not None]


def sign_agreement(values: Sequence[float], sign: int) -> str:
    """Compares the signs of differences with the claimed sign: 'agrees', 'disagrees', 'undecided (...)' or ''."""
    if not values or not sign:
        return ''
    agreeing = sum(value * sign > 0 for value in values)
    return {len(values): 'agrees', 0: 'disagrees'}.get(agreeing, f'undecided ({agreeing} of {len(values)} seeds agree)')


def write_csv(path: str, rows: Sequence[dict], *, whole: bool) -> None:
    """Replaces rows of a suite in results.csv: all of them if `whole`, else those with the same variant and seed."""
    suite, runs, old = rows[0]['suite'], {(row['variant'], str(row['seed'])) for row in rows}, []
    if os.path.exists(path):
        with open_regular(path, encoding='utf-8', newline='') as file:
            old = list(csv.DictReader(file))
    others = [row for row in old if row['suite'] != suite or not (whole or (row['variant'], row['seed']) in runs)]
    with atomic_file(path, newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction='ignore')
        writer.writeheader()
        writer.writerows([*others, *rows])


def deltas(rows: Sequence[dict], variant: ablations.Variant) -> list[float]:
    """Returns the differences of a variant from its baseline, in percentage points, one for each seed."""
    key, measured = variant.measure, [row for row in rows if row['variant'] == variant.name and not row['diverged']]
    if key == 'top1_error' and all(row.get('top1_ten') is not None for row in measured):
        key = 'top1_ten'
    return differences(rows, variant.name, variant.baseline, key)


def write_json(
    output: str,
    suite: str,
    variants: Iterable[ablations.Variant],
    rows: Sequence[dict],
    environment: dict[str, Any],
) -> None:
    """Writes SUITE.json: the command, the environment and all runs of a suite."""
    networks = {variant.name: variant for variant in variants}
    measured = [row for row in rows if not row['diverged']]
    result = {
        'name': suite,
        'command': ' '.join(map(shlex.quote, ['alexnet_jax', *sys.argv[1:]])),
        **{key: environment[key] for key in ('commit', 'versions', 'devices')},
        **{key: max(row[key] for row in measured) for key in ('train_images', 'epochs')},
        'seeds': len({row['seed'] for row in rows}),
        'networks': {name: variant.baseline for name, variant in networks.items()},
        'measures': {name: variant.measure for name, variant in networks.items()},
        'runs': list(rows),
    }
    with atomic_file(os.path.join(output, f'{suite}.json')) as file:
        json.dump(result, file, indent=1)


def comparison_table(suite: str, rows: list[dict], variants: Sequence[ablations.Variant]) -> report.Table:
    """Returns the measured errors and those of the paper and of the authors' log, one row per variant."""
    table = []
    for variant in variants:
        runs = [row for row in rows if row['variant'] == variant.name]
        measured = [row for row in runs if not row['diverged']]
        diverged = f', {len(runs) - len(measured)} diverged' if len(measured) < len(runs) else ''
        changes = deltas(rows, variant) if variant.baseline else []
        measures = ('top1_error', 'top5_error', 'top1_ten', 'top5_ten', 'train_error')
        means = [format_mean_std([row.get(name) for row in measured]) for name in measures]
        claims = [format_error_pair(pair, signed=bool(variant.baseline)) for pair in (variant.paper, variant.log)]
        comparison = (format_mean_std(changes, signed=True), *claims, sign_agreement(changes, variant.sign))
        table.append((variant.name, f'{len(measured)}{diverged}', *comparison, *means, variant.source))
    columns = (
        'network', 'seeds', 'difference', 'paper', "authors' log", 'sign', 'top-1', 'top-5', 'top-1, ten views',
        'top-5, ten views', 'training error', 'source',
    )  # fmt: skip
    note = (
        'Errors in percent: mean and standard deviation over the seeds, last checkpoint, center crop or ten views. '
        'Training errors are of the last epoch, with dropout and augmentation. "difference" is in percentage points '
        'against "base" (11pct: against 13pct) with the same seed, in the ten-view top-1 error if it was measured (not '
        'without reflections); for '
        '"no weight decay" it is in the training error. The numbers of the paper and of the authors\' log (top-1 / '
        'top-5) are from their full data and full training length.'
    )
    title = f'{suite}: comparison with the {"base" if suite in ("recipe", "large_batch") else "paper"}'
    if suite == 'recipe':
        note += ' With mixup, training errors count only the first label of each mixed image: do not compare them.'
    return report.Table(title, columns, table, note, verdict(rows, variants))


def verdict(rows: Sequence[dict], variants: Sequence[ablations.Variant]) -> str:
    """Describes the result of a comparison: how many claims agree, the largest differences, the diverged runs."""
    changes = {variant.name: deltas(rows, variant) for variant in variants if variant.baseline}
    signs = [sign_agreement(changes[variant.name], variant.sign) for variant in variants if variant.baseline]
    count = collections.Counter(sign.partition(' ')[0] for sign in signs if sign)
    sentences = []
    if total := count.total():
        sentences.append(
            f'Of {total} claimed signs, {count["agrees"]} agree in every seed, {count["disagrees"]} disagree in every '
            f'seed, and {count["undecided"]} are undecided.'
        )
    measured = {name: values for name, values in changes.items() if values}
    if measured:
        largest = sorted(measured, key=lambda name: -abs(statistics.fmean(measured[name])))[:3]
        texts = [f'{name} {format_mean_std(measured[name], signed=True)}' for name in largest]
        sentences.append(f'Largest differences from the baseline, in percentage points: {", ".join(texts)}.')
    diverged = collections.Counter(row['variant'] for row in rows if row['diverged'])
    seeds = collections.Counter(row['variant'] for row in rows)
    if diverged:
        texts = [f'{name} ({number} of {seeds[name]} seeds)' for name, number in diverged.items()]
        sentences.append(f'Diverged: {", ".join(texts)}.')
    return ' '.join(sentences)


def format_mean_std(values: Sequence[float | None], signed: bool = False) -> str:
    """Returns mean and sample standard deviation: '41.20 ± 0.31', '41.20' for one value, '' for none."""
    known = [value for value in values if value is not None]
    if not known:
        return ''
    mean = f'{statistics.fmean(known):{"+" if signed else ""}.2f}'
    return f'{mean} ± {statistics.stdev(known):.2f}' if len(known) > 1 else mean


def format_error_pair(pair: ablations.Points, signed: bool) -> str:
    """Returns a (top-1, top-5) pair as text: '1.40 / 1.20'. Values of None are omitted."""
    return ' / '.join(f'{x:{"+" if signed else ""}.2f}' for x in pair if x is not None)


def color_table(rows: Sequence[dict], variants: Sequence[ablations.Variant]) -> report.Table:
    """Returns the mean color share of the more and of the less colored half of the first layer (section 6.1)."""
    table = []
    for variant in variants:
        measured = [row for row in rows if row['variant'] == variant.name and 'color_0' in row]
        pairs = [sorted((row['color_0'], row['color_1'])) for row in measured]
        shares = ([more for _, more in pairs], [less for less, _ in pairs], [more - less for less, more in pairs])
        table.append((variant.name, *map(format_mean_std, shares)))
    columns = ('network', 'more colored half', 'less colored half', 'difference')
    note = (
        "Mean share of a kernel's energy that is not gray, in each half of the first layer. Each half is one tower; "
        'with one GPU, which has no towers, the halves are a control. In the paper, one tower is largely '
        'color-agnostic and the other color-specific in every run.'
    )
    return report.Table('Do the towers specialize?', columns, table, note)


def figure1_table(
    rows: Sequence[dict], variants: Sequence[str], rates: Sequence[float], layers: Sequence[str]
) -> report.Table:
    """Returns the epochs that ReLU and tanh need for 25% training error, and their ratio; the paper's is 6.

    layers: names of the network's layers.
    """
    table, epochs = [], []  # for each variant: {seed: epochs}
    for variant in variants:
        measured = [row for row in rows if row['variant'] == variant]
        epochs.append({row['seed']: row['epochs'] for row in measured if row.get('reached')})
        reached = list(epochs[-1].values())
        table.append((variant, f'{len(reached)} of {len(measured)}', format_mean_std(reached), ''))
    relu, tanh = epochs
    ratios = [tanh[seed] / relu[seed] for seed in relu.keys() & tanh.keys()]
    table.append(('tanh / ReLU', f'{len(ratios)}', format_mean_std(ratios), '6'))
    note = (
        'Epochs until the training error of a whole epoch is at most 25%. Each activation uses the learning rate, of '
        f'{", ".join(f"{rate:g}" for rate in rates)}, with which the first seed is fastest. The release does not name '
        f'the network; this one has the layers {", ".join(layers)}.'
    )
    columns = ('network', 'seeds that reach 25%', 'epochs', 'paper')
    result = 'No seed reaches 25% with both.'
    if ratios:
        result = f'tanh needs {format_mean_std(ratios)} times as many epochs as ReLU; the paper states 6.'
    return report.Table('Figure 1: ReLU against tanh', columns, table, note, result)


def averaged_table(suite: str, workdirs: Sequence[str], dataset: Dataset, max_unreadable: int) -> report.Table:
    """Returns the table of the suite 'views' (center crop, ten views) or 'ensemble' (one network, average of all)."""
    split = dataset.splits[str(eval_split(dataset))]
    options: dict[str, Any] = {'mesh': sharding.make_mesh(data=0, tower=1), 'max_unreadable': max_unreadable}
    networks = [load_last(workdir) for workdir in workdirs]
    if not networks[0].augmentation.reflect:
        logging.warning('%s: trained without reflections; five of the ten views are reflections.', suite)
    before = after = [evaluate.evaluate(network, split, views=10, **options) for network in networks]
    if suite == 'views':
        names = ('center', 'ten views')
        before = [evaluate.evaluate(network, split, views=1, **options) for network in networks]
        paper: ablations.Points = (-1.5, -1.3)
        log: ablations.Points = (-1.55, -1.30)
        source = 'section 6: 39.0 / 18.3 against 37.5 / 17.0, ILSVRC-2010 test; net 145'
    else:
        names = ('one network', f'{len(networks)} networks averaged')
        after = [evaluate.evaluate_ensemble(networks, split, views=10, **options)]
        paper, log = (-2.6, -1.8), (None, None)
        source = 'table 2: 40.7 / 18.2 against 38.1 / 16.4 with five, ILSVRC-2012 validation'
    keys = ('top1_error', 'top5_error')
    gains = [[new[key] - old[key] for old, new in zip(before, itertools.cycle(after), strict=False)] for key in keys]
    comparison = (
        ' / '.join(format_mean_std(gain, signed=True) for gain in gains),
        *(format_error_pair(pair, signed=True) for pair in (paper, log)),
        sign_agreement(gains[0], -1),
        source,
    )
    table = []
    for name, results, cells in ((names[0], before, ('',) * 5), (names[1], after, comparison)):
        errors = [format_mean_std([result[key] for result in results]) for key in keys]
        table.append((name, f'{len(networks)}', *errors, *cells))
    columns = ('evaluated as', 'networks', 'top-1', 'top-5', 'difference', 'paper', "authors' log", 'sign', 'source')
    note = 'Errors in percent on the same images: mean and standard deviation over networks with different seeds.'
    if suite == 'ensemble':
        note += ' There is only one average: ± of the difference is that of the single networks. "agrees" means '
        note += 'that the average is better than each of them.'
    change = format_mean_std(gains[0], signed=True)
    result = f'The top-1 error changes by {change} points; the paper states {paper[0]:+.2f}.'
    return report.Table(f'{suite}: comparison with the paper', columns, table, note, result)


def as_text(table: report.Table) -> str:
    """Formats a table for the terminal."""
    rows = [table.columns, *table.rows]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    lines = ['  '.join(f'{cell!s:{width}}' for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return '\n'.join(filter(None, [table.title, table.verdict, *lines, table.note]))


def eval_split(dataset: Dataset) -> str | None:
    """Returns the split to evaluate on: 'val', otherwise 'test', otherwise None."""
    return next((name for name in ('val', 'test') if name in dataset.splits), None)


def load_last(workdir: str) -> manager.Checkpoint:
    """Loads the last checkpoint of a run, not the best one."""
    with manager.CheckpointManager(workdir, read_only=True) as saved:
        return saved.load(saved.latest())


_CAPTIONS = {
    'effects': 'Differences from the baseline: each seed (dots), mean and standard deviation.',
    'validation': 'Validation error by epoch, mean over the seeds.',
    'figure1': 'Training error of ReLU (solid) and tanh (dashed) for every seed. The horizontal line is at 25%.',
    'error': 'Errors of the first network by epoch.',
    'architecture': 'Like figure 2: the maps of each tower and the maps that they read.',
    'kernels': 'Like figure 3: the kernels of the first layer, by tower.',
    'predictions': 'Like figure 4, left: the five most probable labels.',
    'confusion': 'Confusion matrix.',
    'neighbors': 'Like figure 4, right: test images and their nearest training images in the last hidden layer.',
}


def publish(
    suite: str,
    output: str,
    tables: list[report.Table],
    runs: Mapping[str, str],
    rows: Sequence[dict],
    dataset: Dataset,
    effects: Mapping[str, Sequence[float]],
) -> None:
    """Writes report.html: tables, curves, the first network, all runs.

    runs: {workdir: variant}, not diverged. effects: {variant: differences from its baseline, one for each seed}.
    """
    from alexnet_jax.experiments import plots  # matplotlib is an extra

    workdir, split = next(iter(runs)), eval_split(dataset) or 'train'
    trained = load_last(workdir)
    drawn = {name: figure for name, figure, _ in figures.draw(trained, run=workdir, dataset=dataset, split=split)}
    if suite == 'figure1':
        curves = collections.defaultdict(list)
        for run, variant in runs.items():
            train = figures.curves(run)['train']
            curves[variant].append((train.epoch, train.top1_error))
        drawn['figure1'] = plots.learning_curves(curves, threshold=25.0, y_label='Training error rate (%)')
    elif validation := mean_validation_curves(runs):
        drawn['validation'] = plots.learning_curves(validation, y_label='Validation top-1 error (%)')
    if any(effects.values()):
        drawn['effects'] = plots.effects(effects)
    pages = []
    for name, caption in _CAPTIONS.items():
        if name in drawn:
            path, _ = plots.save(drawn[name], os.path.join(output, 'figures'), name)
            pages.append(report.Figure(name.capitalize(), path, caption))
    records = dataset.splits[split]
    sample = np.random.default_rng(0).permutation(len(records))[:6]
    images, labels = pipeline.decode_some(records, sample, trained.record_size)
    columns = COLUMNS[1:]
    cells = [tuple(round(x, 4) if isinstance(x := row.get(key), float) else x for key in columns) for row in rows]
    report.write(
        os.path.join(output, 'report.html'),
        title=f'alexnet_jax: {suite}',
        summary=summary(rows, dataset.record_size, describe_environment()),
        tables=[*tables, report.Table('All runs', columns, cells, folded=True)],
        figures=pages,
        checkpoint=trained,
        image_NHWC=images,
        captions=[dataset.class_names[label] for label in labels],
    )


def mean_validation_curves(runs: Mapping[str, str]) -> dict[str, tuple]:
    """Returns {variant: (epochs, mean top-1 error over its seeds)} of the validations that all its runs have."""
    curves = collections.defaultdict(list)
    for run, variant in runs.items():
        if len((val := figures.curves(run)['val']).epoch):
            curves[variant].append(val)
    means = {}
    for variant, seeds in curves.items():
        length = min(len(curve.epoch) for curve in seeds)
        means[variant] = (seeds[0].epoch[:length], np.mean([curve.top1_error[:length] for curve in seeds], axis=0))
    return means


def summary(rows: Sequence[dict], size: int, environment: dict) -> str:
    """Describes the runs, the training data and the hardware in one sentence."""
    measured = next(row for row in rows if not row['diverged'])  # diverged runs have no measurements
    images = f'{measured["train_images"]:,} training images of {size} px ({measured["data"]})'
    devices, jax = ', '.join(environment['devices'][:8]), environment['versions']['jax']
    return f'{len(rows)} runs on {images}, {devices}, jax {jax}, commit {environment["commit"]}.'
