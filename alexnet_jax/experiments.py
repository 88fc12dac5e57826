"""The paper's experiments: networks that differ in one thing, trained, and a table beside the paper's numbers.

    python -m alexnet_jax.experiments SUITE --data=PATH --output=DIR [--base=configs/paper.py] [--seeds=N] [--scale=F]

SUITE is figure1, ablations, cifar10, ensemble or views (see suites.py). PATH is a prepared directory, or images as
`alexnet_jax.prepare` takes them. Every run is one of `alexnet_jax.main`; a suite that was stopped goes on where it was.
DIR gets results.csv, report.html and runs/. --scale=0.2 trains on a fifth of the images, always the same; --dry_run
shows the runs and how long they may take.
"""

import contextlib
import json
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from alexnet_jax import (
    assemble,
    augment,
    benchmark,
    checkpoint,
    cifar,
    cli,
    evaluate,
    figures,
    layers,
    listing,
    model,
    prepare,
    report,
    results,
    sharding,
    sources,
    suites,
    train,
    writers,
)
from alexnet_jax.errors import DivergedError, UserError, did_you_mean
from alexnet_jax.suites import Arm

FIGURE1, AVERAGED = 'figure1', ('ensemble', 'views')
RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)  # of figure 1's search, for each activation


class Trial(NamedTuple):
    """One run of a suite."""

    arm: Arm
    seed: int
    config: ConfigDict
    workdir: str


def trials(arms: Sequence[Arm], base: ConfigDict, seeds: int, output: str) -> list[Trial]:
    """Every arm with every seed, and where each lies: the same arm of two suites is the same run."""
    found = []
    for arm in arms:
        for seed in range(seeds):
            config = suites.changed(base, arm.changes)
            config.seed = base.seed + seed
            folder = f'{arm.name.replace(",", "").replace(" ", "_")}-{config.seed}'
            found.append(Trial(arm, config.seed, config, os.path.join(output, 'runs', folder)))
    return found


def run(trial: Trial, suite: str, dataset: sources.Dataset) -> dict[str, Any]:
    """Trains one network to its end, or what is left of it, and measures it: a row of results.csv.

    A network that diverges is a result, too. What was measured before is read, not measured again.
    """
    path = os.path.join(trial.workdir, 'result.json')
    diverged = False
    try:
        train.train_and_evaluate(trial.config, trial.workdir)  # says where it is of another config
    except DivergedError as error:
        print(f'{trial.arm.name}, seed {trial.seed}: {error}', flush=True)
        diverged = True
    with checkpoint.Checkpoints(trial.workdir, read_only=True) as saved:
        step = saved.latest()
    found = None
    if os.path.exists(path):
        with open(path, encoding='utf-8') as file:
            found = json.load(file)
    if found is None or found['step'] != step:  # a run that was made longer is measured again
        found = {'step': step, 'diverged': diverged, **({} if diverged else measure(trial, dataset))}
        writers.write_json(trial.workdir, {'result': found})
    jax.clear_caches()  # the next network is another program
    return {'suite': suite, 'arm': trial.arm.name, 'seed': trial.seed, **found}


def measure(trial: Trial, dataset: sources.Dataset) -> dict[str, Any]:
    """Errors of a finished run's last checkpoint in percent: of its last pass, and on the test images."""
    config = trial.config
    trained, passes = results.last(trial.workdir), figures.curves(trial.workdir)['train']
    error = float(passes.top1_error[-1])
    found = {
        'data': config.data.path,
        'train_images': len(sources.part(dataset.splits['train'], config.data.fraction)),
        'epochs': float(passes.epoch[-1]),
        'learning_rate': config.optim.learning_rate,
        'train_error': error,
        'reached': 0 < error <= config.stop_at_error,
    }
    if name := results.tested_on(dataset):
        split = dataset.splits[name]
        mesh = sharding.make_mesh(data=len(jax.devices()), tower=1)
        found['test_images'] = len(split)
        ten = dataset.record_size > config.data.image_size  # else all ten are the same two
        for views, (top1, top5) in {1: ('top1_error', 'top5_error'), 10: ('top1_ten', 'top5_ten')}.items():
            if views == 1 or ten:
                result = evaluate.evaluate(trained, split, mesh, views=views)
                found[top1], found[top5] = result['top1_error'], result['top5_error']
    if trained.network.table()['conv1'].features % 2 == 0:
        halves = np.split(figures.colour_share(trained.params['conv1']['kernel']), 2)
        found['colour_0'], found['colour_1'] = (float(half.mean()) for half in halves)
    return found


def search(activation: str, base: ConfigDict, output: str, dataset: sources.Dataset) -> tuple[float, list[dict]]:
    """Figure 1's rate for an activation: with which seed 0 needs the fewest passes.

    From the middle of `RATES` towards whichever side is quicker, until both neighbours of the best are slower. A rate
    is given up when it has had as many passes as the best.

    Returns (rate, a row for each that was tried).
    """
    rows, passes, best = {}, {}, len(RATES) // 2
    while True:
        for i in (best, best + 1, best - 1):  # a higher rate is quicker, or soon out of the question
            if 0 <= i < len(RATES) and i not in rows:
                changes = cifar.figure1(activation, RATES[i])
                limit = min((*passes.values(), changes['num_epochs']))
                arm = Arm(f'{activation} {RATES[i]:g}', {**changes, 'num_epochs': float(limit)})
                (trial,) = trials([arm], base, 1, output)
                rows[i] = run(trial, FIGURE1, dataset)
                if rows[i].get('reached'):
                    passes[i] = math.ceil(rows[i]['epochs'])
            quickest = min(passes, key=passes.get, default=best)
            if quickest != best:
                break
        if quickest == best:
            return RATES[best], list(rows.values())
        best = quickest


def figure1(base: ConfigDict, seeds: int, output: str, dataset: sources.Dataset) -> tuple[list[Trial], list[dict]]:
    """ReLU against tanh, each with its own best rate, to 25% training error: the trials that count, and all rows."""
    found, rows = [], []
    for activation in ('relu', 'tanh'):
        rate, tried = search(activation, base, output, dataset)
        print(f'{activation}: the rate {rate:g} is the quickest of {len(tried)} that were tried.', flush=True)
        arm = Arm(f'{activation} {rate:g}', cifar.figure1(activation, rate))
        best = trials([arm], base, seeds, output)
        rows += [row for row in tried if row['arm'] != arm.name] + [run(trial, FIGURE1, dataset) for trial in best]
        found += best
    return found, rows


def averaged(suite: str, found: Sequence[Trial], dataset: sources.Dataset) -> report.Table:
    """`views`: the centre against ten views; `ensemble`: one network against the average of all, over ten views."""
    split, mesh = dataset.splits[results.tested_on(dataset)], sharding.make_mesh(data=len(jax.devices()), tower=1)
    loaded = [results.last(trial.workdir) for trial in found]
    keys, tested = ('top1_error', 'top5_error'), {}
    for views in (1, 10):
        tested[views] = [evaluate.evaluate(one, split, mesh, views=views) for one in loaded]
    if suite == 'views':
        names, before, after = ('centre', 'ten views'), tested[1], tested[10]
        paper, log = (-1.5, -1.3), (-1.55, -1.30)
        source = 'section 6: 39.0 / 18.3 against 37.5 / 17.0, ILSVRC-2010 test; net 145'
    else:
        names, before = ('one network', f'{len(loaded)} networks averaged'), tested[10]
        after = [evaluate.evaluate_ensemble(loaded, split, mesh, views=10)] * len(loaded)
        paper, log = (-2.6, -1.8), (None, None)
        source = 'table 2: 40.7 / 18.2 against 38.1 / 16.4 with five, ILSVRC-2012 validation'
    gains = [[b[key] - a[key] for a, b in zip(before, after, strict=True)] for key in keys]
    ours = ' / '.join(results.said(gain, signed=True) for gain in gains)
    claims = (results.points(paper, signed=True), results.points(log, signed=True))
    lines = [
        (name, f'{len(loaded)}', *(results.said([one[key] for one in found]) for key in keys))
        for name, found in zip(names, (before, after if suite == 'views' else after[:1]), strict=True)
    ]
    table = [(*lines[0], '', '', '', '', ''), (*lines[1], ours, *claims, results.verdict(gains[0], -1), source)]
    columns = ('tested as', 'networks', 'top-1', 'top-5', 'difference', 'paper', "authors' log", 'sign', 'source')
    note = 'Errors in percent on the same images, mean and standard deviation over networks of other seeds.'
    return report.Table(f'{suite}: beside the paper', columns, table, note)


def plan(found: Sequence[Trial], examples: int) -> str:
    """The runs of a suite, their images, and hours predicted from a few updates of the first network."""
    first = found[0].config
    with contextlib.ExitStack() as stack:
        built = assemble.build(suites.changed(first, {'data.fraction': 1.0}), benchmark.synthetic(first))
        side, _ = benchmark.our_training(built, first, 1, stack, name='', batches=False)
        rate = side.turn()
    costs = [products(trial.config) for trial in found]
    printed, total = [], 0.0
    for trial, cost in zip(found, costs, strict=True):
        config = trial.config
        images = config.num_steps * config.batch_size or config.num_epochs * examples
        hours = images / rate * cost / costs[0] / 3600
        total += hours
        printed.append(f'{trial.arm.name:28} seed {trial.seed}  {images:12,.0f} images  {hours:9.2f} h')
    printed.append(
        f'{len(found)} runs, {total:.2f} hours, predicted from {rate:.0f} images/s of the first network here (without '
        'reading, testing and compiling) and the products of the others.'
    )
    return '\n'.join(printed)


def products(config: ConfigDict) -> int:
    """Of a network, for one image."""
    sizes = layers.sizes(model.from_config(config.model), config.data.image_size)
    return sum(size.flops for size in sizes.values())


def _prepared(path: str) -> str:
    """`path`, where it holds prepared data already."""
    return path if path == sources.DIGITS or os.path.exists(os.path.join(path, 'dataset_info.json')) else ''


def prepared(path: str, output: str, size: int) -> str:
    """A directory in the output with what `path` holds, prepared."""
    folder = os.path.join(output, f'data-{size}')
    if not os.path.exists(folder):
        prepare.prepare(path, folder, size=size, format='raw' if size <= 64 else 'jpeg')
    return folder


def _show(suite: str, base: ConfigDict, seeds: int, args) -> None:
    """--dry_run: nothing is written, nothing prepared."""
    if _prepared(args.data):
        dataset = sources.open_dataset(args.data)
        count, classes = len(dataset.split('train')), len(dataset.class_names)
    else:
        listed = listing.find(args.data)
        count, classes = len(listed.splits.get('train', ())), len(listed.class_names)
    base.model.num_classes = classes
    if suite == FIGURE1:
        print('At most: a rate slower than the best is given up, and what reaches 25% ends there.')
        arms = [Arm(f'{a} {rate:g}', cifar.figure1(a, rate)) for a in ('relu', 'tanh') for rate in RATES]
    else:
        arms = suites.SUITES[suite](base)
    print(plan(trials(arms, base, seeds, args.output), round(count * args.scale)))


def main(words: Sequence[str]) -> None:
    args = flags.FLAGS
    suite, *rest = words
    names = [FIGURE1, *suites.SUITES]
    if rest or suite not in names:
        raise UserError(f'{" ".join(words)!r} is no suite.{did_you_mean(words[-1], names)}')
    seeds = args.seeds or (5 if suite == 'ensemble' else 3)
    if seeds < 1 or not 0 < args.scale <= 1:
        raise UserError(f'--seeds={args.seeds}, --scale={args.scale}; expected 1 or more, and a number up to 1.')
    from alexnet_jax import drawing  # noqa: F401  (says now, not after days, that matplotlib is missing)

    cli.set_up_jax()
    base = ConfigDict(args.base.to_dict())
    small = suite in (FIGURE1, 'cifar10')
    size = 32 if small else augment.record_size(base.data.image_size)
    base.data.fraction, base.log_every_steps = args.scale, 0
    if args.dry_run:
        _show(suite, base, seeds, args)
        return
    os.makedirs(args.output, exist_ok=True)
    base.data.path = _prepared(args.data) or prepared(args.data, args.output, size)
    dataset = sources.open_dataset(base.data.path)
    if small and dataset.record_size != size:
        raise UserError(f'{args.data!r} is prepared at {dataset.record_size} px; {suite} takes --size={size}.')
    base.model.num_classes = len(dataset.class_names)
    arms = [] if suite == FIGURE1 else suites.SUITES[suite](base)
    csv = os.path.join(args.output, 'results.csv')
    if suite == FIGURE1:
        found, rows = figure1(base, seeds, args.output, dataset)
    else:
        if not results.tested_on(dataset):
            raise UserError(f'{args.data!r} has no val and no test images to measure on; prepare with --val_fraction.')
        found, rows = trials(arms, base, seeds, args.output), []
        for i, trial in enumerate(found):
            print(f'{i + 1}/{len(found)}  {trial.arm.name}, seed {trial.seed}', flush=True)
            rows.append(run(trial, suite, dataset))
            results.write_csv(csv, rows)
    results.write_csv(csv, rows)
    diverged = {(row['arm'], row['seed']) for row in rows if row['diverged']}
    whole = [trial for trial in found if (trial.arm.name, trial.seed) not in diverged]
    if not whole:
        raise UserError(f'all networks of {suite} diverged; lower --base.optim.learning_rate, in another --output.')
    if suite == FIGURE1:
        tables = [results.figure1_table(rows, list(dict.fromkeys(trial.arm.name for trial in found)), RATES)]
    elif suite in AVERAGED:
        tables = [averaged(suite, whole, dataset)]
    else:
        tables = [results.comparison(suite, rows, arms), results.colours(rows, arms)]
    print('\n\n'.join(map(results.text, tables)))
    results.publish(suite, args.output, tables, {trial.workdir: trial.arm.name for trial in whole}, rows, dataset)
    print(f'{args.output}/results.csv and {args.output}/report.html are written.')


if __name__ == '__main__':
    flags.DEFINE_string('data', None, 'A prepared directory, or images as alexnet_jax.prepare takes them.')
    flags.DEFINE_string('output', None, 'Directory for runs/, results.csv and report.html.')
    cli.define_config('base', 'configs/paper.py', 'The config that the networks differ from.')
    flags.DEFINE_integer('seeds', 0, 'Networks of each kind; 0: 3, and 5 for ensemble.')
    flags.DEFINE_float('scale', 1.0, 'Part of the training images to train on, always the same.')
    flags.DEFINE_boolean('dry_run', False, 'Only show the runs, their images and predicted hours.')
    cli.define_cpu_devices()
    cli.run(main, required=('data', 'output', 'base'), arguments='SUITE')
