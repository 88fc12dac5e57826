"""Results of a suite: results.csv, mean and spread over seeds, tables that compare with the paper, report.html."""

import collections
import csv
import itertools
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alexnet_jax.checkpoints import manager
from alexnet_jax.core import sharding
from alexnet_jax.data import pipeline
from alexnet_jax.data.datasets import Dataset
from alexnet_jax.experiments import ablations, figures, report
from alexnet_jax.inference import evaluate
from alexnet_jax.utils.environment import describe_environment
from alexnet_jax.utils.files import atomic_file

COLUMNS = (
    'suite', 'variant', 'seed', 'data', 'train_images', 'test_images', 'epochs', 'learning_rate', 'train_error',
    'top1_error', 'top5_error', 'top1_ten', 'top5_ten', 'color_0', 'color_1', 'reached', 'diverged',
)  # fmt: skip


def differences(rows: Sequence[dict], variant: str, baseline: str, key: str) -> list[float]:
    """Returns `variant` minus `baseline` in column `key` for every seed that both have."""
    values = {(row['variant'], row['seed']): row.get(key) for row in rows}
    pairs = [(values.get((variant, seed)), values.get((baseline, seed))) for name, seed in values if name == variant]
    return [a - b for a, b in pairs if a is not None and b is not None]


def sign_agreement(values: Sequence[float], sign: int) -> str:
    """Compares the sign of all differences with the claim: 'agrees', 'disagrees', 'undecided (...)' or ''."""
    if not values or not sign:
        return ''
    agreeing = sum(value * sign > 0 for value in values)
    return {len(values): 'agrees', 0: 'disagrees'}.get(agreeing, f'undecided ({agreeing} of {len(values)} seeds agree)')


def write_csv(path: str, rows: Sequence[dict], *, whole: bool) -> None:
    """Replaces a suite's rows in results.csv: all of them (`whole`), or those with the same variant and seed."""
    suite, runs, old = rows[0]['suite'], {(row['variant'], str(row['seed'])) for row in rows}, []
    if os.path.exists(path):
        with open(path, encoding='utf-8', newline='') as file:
            old = list(csv.DictReader(file))
    others = [row for row in old if row['suite'] != suite or not (whole or (row['variant'], row['seed']) in runs)]
    with atomic_file(path, newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction='ignore')
        writer.writeheader()
        writer.writerows([*others, *rows])


def comparison_table(suite: str, rows: list[dict], variants: Sequence[ablations.Variant]) -> report.Table:
    """Returns the measured errors next to those of the paper and the authors' log, one row per variant."""
    table = []
    for variant in variants:
        own = [row for row in rows if row['variant'] == variant.name and not row['diverged']]
        key = variant.measure
        if key == 'top1_error' and all(row.get('top1_ten') is not None for row in own):
            key = 'top1_ten'
        differing = differences(rows, variant.name, variant.baseline, key) if variant.baseline else []
        measures = ('train_error', 'top1_error', 'top5_error', 'top1_ten', 'top5_ten')
        means = [format_mean_std([row.get(name) for row in own]) for name in measures]
        claims = [format_error_pair(pair, signed=bool(variant.baseline)) for pair in (variant.paper, variant.log)]
        compared = (format_mean_std(differing, signed=True), *claims, sign_agreement(differing, variant.sign))
        table.append((variant.name, f'{len(own)}', *means, *compared, variant.source))
    columns = (
        'network', 'seeds', 'training error', 'top-1', 'top-5', 'top-1, ten views', 'top-5, ten views',
        'difference', 'paper', "authors' log", 'sign', 'source',
    )  # fmt: skip
    note = (
        'Errors in percent, mean and standard deviation over the seeds; the last checkpoint, the center crop unless '
        'ten views are named; training errors are those of the last pass, with dropout and augmentation on. '
        'Differences are points of error against "base" (13pct for 11pct), seed by seed, in the ten-view top-1 error '
        "where there is one, for weight decay in the training error. The paper's and the authors' numbers "
        '(top-1 / top-5) are for all of their data and all of their passes.'
    )
    return report.Table(f'{suite}: beside the paper', columns, table, note)


def format_mean_std(values: Sequence[float | None], signed: bool = False) -> str:
    """Returns mean and sample standard deviation: '41.20 ± 0.31'; of one value the value, of none ''."""
    known = [value for value in values if value is not None]
    if not known:
        return ''
    mean = f'{statistics.fmean(known):{"+" if signed else ""}.2f}'
    return f'{mean} ± {statistics.stdev(known):.2f}' if len(known) > 1 else mean


def format_error_pair(pair: ablations.Points, signed: bool) -> str:
    """Returns a (top-1, top-5) pair as text: '1.40 / 1.20'. Values that are not stated are left out."""
    return ' / '.join(f'{x:{"+" if signed else ""}.2f}' for x in pair if x is not None)


def color_table(rows: Sequence[dict], variants: Sequence[ablations.Variant]) -> report.Table:
    """Returns the color shares of the first-layer kernels in the more and the less colored tower (section 6.1)."""
    table = []
    for variant in variants:
        own = [row for row in rows if row['variant'] == variant.name and 'color_0' in row]
        pairs = [sorted((row['color_0'], row['color_1'])) for row in own]
        shares = ([more for _, more in pairs], [less for less, _ in pairs], [more - less for less, more in pairs])
        table.append((variant.name, *map(format_mean_std, shares)))
    columns = ('network', 'more colored half', 'less colored half', 'difference')
    note = (
        "Mean share of a kernel's energy that is not gray, in each half of the first layer (a tower each, but with one "
        'GPU, which is the control). The paper: one tower is largely without color, the other colored, in every run.'
    )
    return report.Table('The towers specialize?', columns, table, note)


def figure1_table(rows: Sequence[dict], variants: Sequence[str], rates: Sequence[float]) -> report.Table:
    """Returns the epochs that ReLU and tanh need for 25% training error, and their ratio; the paper's is 6."""
    table, epochs = [], []  # for each variant: {seed: epochs}
    for variant in variants:
        own = [row for row in rows if row['variant'] == variant]
        epochs.append({row['seed']: row['epochs'] for row in own if row.get('reached')})
        reached = list(epochs[-1].values())
        table.append((variant, f'{len(reached)} of {len(own)}', format_mean_std(reached), ''))
    relu, tanh = epochs
    ratios = [tanh[seed] / relu[seed] for seed in relu.keys() & tanh.keys()]
    table.append(('tanh / ReLU', f'{len(ratios)}', format_mean_std(ratios), '6'))
    note = (
        'Passes through the training images until the training error of a whole pass is 25% or less. Each activation '
        f'has the rate, of {", ".join(f"{rate:g}" for rate in rates)}, with which the first seed is quickest. The '
        'release does not name the network: three convolutions of 5x5 (32, 32, 64) and a classifier are taken.'
    )
    columns = ('network', 'seeds that reach it', 'passes', 'paper')
    return report.Table('Figure 1: ReLU against tanh', columns, table, note)


def averaged_table(suite: str, workdirs: Sequence[str], dataset: Dataset, max_unreadable: int = 0) -> report.Table:
    """Returns the table of 'views' (center or ten views) or 'ensemble' (one network or the average of all)."""
    split = dataset.splits[str(eval_split(dataset))]
    options: dict[str, Any] = {'mesh': sharding.make_mesh(data=0, tower=1), 'max_unreadable': max_unreadable}
    networks = [load_last(workdir) for workdir in workdirs]
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
    claims = [' / '.join(format_mean_std(gain, signed=True) for gain in gains)]
    claims += [format_error_pair(pair, signed=True) for pair in (paper, log)]
    empty, compared = ('', '', '', '', ''), (*claims, sign_agreement(gains[0], -1), source)
    table = [
        (name, f'{len(networks)}', *(format_mean_std([result[key] for result in results]) for key in keys), *others)
        for name, results, others in zip(names, (before, after), (empty, compared), strict=True)
    ]
    columns = ('tested as', 'networks', 'top-1', 'top-5', 'difference', 'paper', "authors' log", 'sign', 'source')
    note = 'Errors in percent on the same images, mean and standard deviation over networks of other seeds.'
    if suite == 'ensemble':
        note += ' There is one average: ± of the difference is that of the single networks, "agrees": it beats each.'
    return report.Table(f'{suite}: beside the paper', columns, table, note)


def as_text(table: report.Table) -> str:
    """Formats a table for the terminal."""
    rows = [table.columns, *table.rows]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    lines = ['  '.join(f'{cell!s:{width}}' for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return '\n'.join([table.title, *lines, table.note])


def eval_split(dataset: Dataset) -> str | None:
    """Returns the split to evaluate on: 'val', otherwise 'test', otherwise None."""
    return next((name for name in ('val', 'test') if name in dataset.splits), None)


def load_last(workdir: str) -> manager.Checkpoint:
    """Loads the last checkpoint of a run, not the best one."""
    with manager.CheckpointManager(workdir, read_only=True) as saved:
        return saved.load(saved.latest())


_CAPTIONS = {
    'figure1': 'Training error of ReLU (solid) and tanh (dashed), each seed; the line is at 25%.',
    'error': 'Errors of the first network over its passes.',
    'architecture': 'As in figure 2: what each tower holds and reads.',
    'kernels': 'As in figure 3: the kernels of the first layer, the towers apart.',
    'predictions': 'As in figure 4, left: the five most probable labels.',
    'confusion': 'What is taken for what.',
    'neighbors': 'As in figure 4, right: test images, and the training images nearest in the last hidden layer.',
}


def publish(
    suite: str, output: str, tables: list[report.Table], runs: Mapping[str, str], rows: Sequence[dict], dataset: Dataset
) -> None:
    """Writes report.html: tables, all runs, curves, the first network. runs: {workdir: variant}, none diverged."""
    from alexnet_jax.experiments import plots  # matplotlib is an extra

    workdir, split = next(iter(runs)), eval_split(dataset) or 'train'
    trained = load_last(workdir)
    drawn = {name: figure for name, figure, _ in figures.draw(trained, run=workdir, dataset=dataset, split=split)}
    if suite == 'figure1':
        seeds = collections.defaultdict(list)
        for run, variant in runs.items():
            curve = figures.curves(run)['train']
            seeds[variant].append((curve.epoch, curve.top1_error))
        drawn['figure1'] = plots.learning_curves(seeds, threshold=25.0, y_label='Training error rate (%)')
    pages = []
    for name, caption in _CAPTIONS.items():
        if name in drawn:
            path, _ = plots.save(drawn[name], os.path.join(output, 'figures'), name)
            pages.append(report.Figure(name.capitalize(), path, caption))
    records = dataset.splits[split]
    picks = np.random.default_rng(0).permutation(len(records))[:6]
    pictures, labels = pipeline.decode_some(records, picks, trained.record_size)
    columns = COLUMNS[1:]
    cells = [tuple(round(x, 4) if isinstance(x := row.get(key), float) else x for key in columns) for row in rows]
    head: dict[str, Any] = {
        'title': f'alexnet_jax: {suite}',
        'summary': summary(rows, dataset.record_size, describe_environment()),
    }
    shown: dict[str, Any] = {'image_NHWC': pictures, 'captions': [dataset.class_names[label] for label in labels]}
    tables = [*tables, report.Table('Every run', columns, cells)]
    path = os.path.join(output, 'report.html')
    report.write(path, **head, tables=tables, figures=pages, checkpoint=trained, **shown)


def summary(rows: Sequence[dict], size: int, environment: dict) -> str:
    """Describes the runs, the training data and the hardware in one sentence."""
    measured = next(row for row in rows if not row['diverged'])  # diverged runs have no measurements
    images = f'{measured["train_images"]:,} training images of {size} px ({measured["data"]})'
    devices, jax = ', '.join(environment['devices'][:8]), environment['versions']['jax']
    return f'{len(rows)} runs on {images}, {devices}, jax {jax}, commit {environment["commit"]}.'
