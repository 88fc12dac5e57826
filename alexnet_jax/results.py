"""A suite's measurements: rows of results.csv, means and spreads over seeds, tables beside the paper's, the page."""

import csv
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from alexnet_jax import checkpoint, data, evaluate, figures, report, sharding, sources, suites, writers
from alexnet_jax.suites import Arm

COLUMNS = (
    'suite', 'arm', 'seed', 'data', 'train_images', 'test_images', 'epochs', 'learning_rate', 'train_error',
    'top1_error', 'top5_error', 'top1_ten', 'top5_ten', 'colour_0', 'colour_1', 'reached', 'diverged',
)  # fmt: skip


class Spread(NamedTuple):
    """Mean and standard deviation over seeds; nan for the deviation of one."""

    mean: float
    deviation: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation; of a single value the latter is not a number."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Spread(statistics.fmean(values), deviation, len(values))


def differences(rows: Sequence[dict], arm: str, against: str, key: str) -> list[float]:
    """`arm` minus `against` in the measure `key`, for each seed that both have."""
    values = {(row['arm'], row['seed']): row.get(key) for row in rows}
    pairs = [(values.get((arm, seed)), values.get((against, seed))) for name, seed in values if name == arm]
    return [a - b for a, b in pairs if a is not None and b is not None]


def verdict(found: Sequence[float], sign: int) -> str:
    """Whether measured differences have the sign claimed: all do, none does, or it depends on the seed."""
    if not found or not sign:
        return ''
    agreeing = sum(value * sign > 0 for value in found)
    return {len(found): 'agrees', 0: 'disagrees'}.get(agreeing, f'undecided ({agreeing} of {len(found)} seeds agree)')


def write_csv(path: str, rows: Sequence[dict], *, whole: bool) -> None:
    """Replaces a suite's rows, all of them (`whole`) or those of the same arms and seeds; other suites' stay."""
    suite, runs = rows[0]['suite'], {(row['arm'], str(row['seed'])) for row in rows}
    others = []
    if os.path.exists(path):
        with open(path, encoding='utf-8', newline='') as file:
            for row in csv.DictReader(file):
                if row['suite'] != suite or not (whole or (row['arm'], row['seed']) in runs):
                    others.append(row)
    with open(path + '.tmp', 'w', encoding='utf-8', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction='ignore')
        writer.writeheader()
        writer.writerows([*others, *rows])
    os.replace(path + '.tmp', path)


def comparison(suite: str, rows: list[dict], arms: Sequence[Arm]) -> report.Table:
    """What was measured beside what the paper and the authors' log say, an arm a row."""
    table = []
    for arm in arms:
        own = [row for row in rows if row['arm'] == arm.name and not row['diverged']]
        key = arm.measure
        if key == 'top1_error' and all(row.get('top1_ten') is not None for row in own):
            key = 'top1_ten'
        found = differences(rows, arm.name, arm.against, key) if arm.against else []
        table.append(
            (
                arm.name,
                f'{len(own)}',
                *(said([row.get(name) for row in own]) for name in ('train_error', 'top1_error', 'top5_error')),
                *(said([row.get(name) for row in own]) for name in ('top1_ten', 'top5_ten')),
                said(found, signed=True),
                points(arm.paper, signed=bool(arm.against)),
                points(arm.log, signed=bool(arm.against)),
                verdict(found, arm.sign),
                arm.source,
            )
        )
    columns = (
        'network', 'seeds', 'training error', 'top-1', 'top-5', 'top-1, ten views', 'top-5, ten views',
        'difference', 'paper', "authors' log", 'sign', 'source',
    )  # fmt: skip
    note = (
        'Errors in percent, mean and standard deviation over the seeds; the last checkpoint, the centre crop unless '
        'ten views are named; training errors are those of the last pass, with dropout and augmentation on. '
        'Differences are points of error against "base" (13pct for 11pct), seed by seed, in the ten-view top-1 error '
        "where there is one, for weight decay in the training error. The paper's and the authors' numbers "
        '(top-1 / top-5) are for all of their data and all of their passes.'
    )
    return report.Table(f'{suite}: beside the paper', columns, table, note)


def said(values: Sequence[float | None], signed: bool = False) -> str:
    """Mean and standard deviation: '41.20 ± 0.31'; of one value itself, of none nothing."""
    values = [value for value in values if value is not None]
    if not values:
        return ''
    mean, deviation, count = spread(values)
    return f'{mean:{"+" if signed else ""}.2f}' + (f' ± {deviation:.2f}' if count > 1 else '')


def points(pair: suites.Points, signed: bool) -> str:
    """A pair (top-1, top-5) as text, without what is not stated: '1.40 / 1.20'."""
    return ' / '.join(f'{x:{"+" if signed else ""}.2f}' for x in pair if x is not None)


def colours(rows: Sequence[dict], arms: Sequence[Arm]) -> report.Table:
    """How coloured the first layer's kernels are in the more and in the less coloured tower (section 6.1)."""
    table = []
    for arm in arms:
        pairs = [(row['colour_0'], row['colour_1']) for row in rows if row['arm'] == arm.name and 'colour_0' in row]
        more, less = [max(pair) for pair in pairs], [min(pair) for pair in pairs]
        table.append((arm.name, said(more), said(less), said([a - b for a, b in zip(more, less, strict=True)])))
    columns = ('network', 'more coloured half', 'less coloured half', 'difference')
    note = (
        "Mean share of a kernel's energy that is not grey, in each half of the first layer (a tower each, but with one "
        'GPU, which is the control). The paper: one tower is largely without colour, the other coloured, in every run.'
    )
    return report.Table('The towers specialise?', columns, table, note)


def figure1_table(rows: Sequence[dict], arms: Sequence[str], rates: Sequence[float]) -> report.Table:
    """Passes to 25% training error of ReLU and tanh, and their ratio, beside the paper's six."""
    reached = [row for row in rows if row.get('reached')]
    own = [{row['seed']: row['epochs'] for row in reached if row['arm'] == arm} for arm in arms]
    shared = sorted(own[0].keys() & own[1].keys())
    ratios = [own[1][seed] / own[0][seed] for seed in shared]
    table = []
    for arm, epochs in zip(arms, own, strict=True):
        count = sum(row['arm'] == arm for row in rows)
        table.append((arm, f'{len(epochs)} of {count}', said(list(epochs.values())), ''))
    table.append(('tanh / ReLU', f'{len(shared)}', said(ratios), '6'))
    note = (
        'Passes through the training images until the training error of a whole pass is 25% or less. Each activation '
        f'has the rate, of {", ".join(f"{rate:g}" for rate in rates)}, with which the first seed is quickest. The '
        'release does not name the network: three convolutions of 5x5 (32, 32, 64) and a classifier are taken.'
    )
    return report.Table(
        'Figure 1: ReLU against tanh', ('network', 'seeds that reach it', 'passes', 'paper'), table, note
    )


def averaged(suite: str, workdirs: Sequence[str], dataset: sources.Dataset, max_bad: int = 0) -> report.Table:
    """`views`: the centre against ten views; `ensemble`: one network against the average of all, over ten views.

    max_bad: images that may be unreadable, as in training.
    """
    split, mesh = dataset.splits[tested_on(dataset)], sharding.make_mesh(data=len(jax.devices()), tower=1)
    loaded = [last(workdir) for workdir in workdirs]
    keys, tested = ('top1_error', 'top5_error'), {}
    for views in (1, 10) if suite == 'views' else (10,):
        tested[views] = [evaluate.evaluate(one, split, mesh, views=views, max_bad=max_bad) for one in loaded]
    if suite == 'views':
        names, before, after = ('centre', 'ten views'), tested[1], tested[10]
        paper, log = (-1.5, -1.3), (-1.55, -1.30)
        source = 'section 6: 39.0 / 18.3 against 37.5 / 17.0, ILSVRC-2010 test; net 145'
    else:
        names, before = ('one network', f'{len(loaded)} networks averaged'), tested[10]
        after = [evaluate.evaluate_ensemble(loaded, split, mesh, views=10, max_bad=max_bad)] * len(loaded)
        paper, log = (-2.6, -1.8), (None, None)
        source = 'table 2: 40.7 / 18.2 against 38.1 / 16.4 with five, ILSVRC-2012 validation'
    gains = [[b[key] - a[key] for a, b in zip(before, after, strict=True)] for key in keys]
    ours = ' / '.join(said(gain, signed=True) for gain in gains)
    claims = (points(paper, signed=True), points(log, signed=True))
    lines = [
        (name, f'{len(loaded)}', *(said([one[key] for one in found]) for key in keys))
        for name, found in zip(names, (before, after if suite == 'views' else after[:1]), strict=True)
    ]
    table = [(*lines[0], '', '', '', '', ''), (*lines[1], ours, *claims, verdict(gains[0], -1), source)]
    columns = ('tested as', 'networks', 'top-1', 'top-5', 'difference', 'paper', "authors' log", 'sign', 'source')
    note = 'Errors in percent on the same images, mean and standard deviation over networks of other seeds.'
    if suite == 'ensemble':
        note += ' There is one average: ± of the difference is that of the single networks, "agrees": it beats each.'
    return report.Table(f'{suite}: beside the paper', columns, table, note)


def text(table: report.Table) -> str:
    """A table for the terminal."""
    cells = [table.columns, *table.rows]
    widths = [max(len(str(row[i])) for row in cells) for i in range(len(table.columns))]
    rows = [
        '  '.join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    ]
    return '\n'.join([table.title, *rows, table.note])


def tested_on(dataset: sources.Dataset) -> str | None:
    """The split where errors are measured: val, or test where there is no val."""
    return next((name for name in ('val', 'test') if name in dataset.splits), None)


def last(workdir: str) -> checkpoint.Checkpoint:
    """A finished run's network as it was at the end, and not where it was best."""
    with checkpoint.Checkpoints(workdir, read_only=True) as saved:
        return saved.load(saved.latest())


_CAPTIONS = {
    'figure1': 'Training error of ReLU (solid) and tanh (dashed), each seed; the line is at 25%.',
    'error': 'Errors of the first network over its passes.',
    'architecture': 'As in figure 2: what each tower holds and reads.',
    'kernels': 'As in figure 3: the kernels of the first layer, the towers apart.',
    'predictions': 'As in figure 4, left: the five most probable labels.',
    'neighbours': 'As in figure 4, right: test images, and the training images nearest in the last hidden layer.',
    'confusion': 'What is taken for what.',
}


def publish(
    suite: str,
    output: str,
    tables: Sequence[report.Table],
    runs: Mapping[str, str],
    rows: Sequence[dict],
    dataset: sources.Dataset,
) -> None:
    """Writes report.html: tables, every run, curves, and the first network to look into.

    runs: the arm of each workdir, of those that did not diverge.
    """
    from alexnet_jax import drawing

    drawn, folder = [], os.path.join(output, 'figures')
    if suite == 'figure1':
        seeds = {}
        for workdir, arm in runs.items():
            curve = figures.curves(workdir)['train']
            seeds.setdefault(arm, []).append((curve.epoch, curve.top1_error))
        drawn.append(('figure1', drawing.learning_curves(seeds, threshold=25.0, y_label='Training error rate (%)'), []))
    workdir, split = next(iter(runs)), tested_on(dataset) or 'train'
    trained = last(workdir)
    drawn += figures.draw(trained, run=workdir, dataset=dataset, split=split)
    records = dataset.splits[split]
    picks = np.random.default_rng(0).permutation(len(records))[:6]
    pictures, labels = data.decode_some(records, picks, trained.record_size)
    pages = [
        report.Figure(name.capitalize(), drawing.save(figure, folder, name)[0], _CAPTIONS[name])
        for name, figure, _ in drawn
        if name in _CAPTIONS
    ]
    all_runs = report.Table(
        'Every run', COLUMNS[1:], [tuple(_cell(row.get(key)) for key in COLUMNS[1:]) for row in rows]
    )
    report.write(
        os.path.join(output, 'report.html'),
        title=f'alexnet_jax: {suite}',
        summary=summary(rows, dataset.record_size, writers.environment()),
        tables=[*tables, all_runs],
        figures=pages,
        checkpoint=trained,
        image_NHWC=pictures,
        captions=[dataset.class_names[label] for label in labels],
    )


def summary(rows: Sequence[dict], size: int, environment: dict) -> str:
    """What was trained on, and by what."""
    measured = next(row for row in rows if not row['diverged'])  # of the others nothing was measured
    return (
        f'{len(rows)} runs on {measured["train_images"]:,} training images of {size} px ({measured["data"]}), '
        f'{", ".join(environment["devices"][:8])}, jax {environment["versions"]["jax"]}, '
        f'commit {environment["commit"]}.'
    )


def _cell(value):
    return round(value, 4) if isinstance(value, float) else value
