"""The paper's experiments: networks that differ in one thing, trained, and a table beside the paper's numbers.

    python -m alexnet_jax.experiments SUITE --data=PATH --output=DIR [--base=configs/paper.py] [--seeds=N] [--scale=F]

SUITE is figure1, ablations, cifar10, ensemble or views (see suites.py). PATH is a prepared directory, or images as
`alexnet_jax.prepare` takes them. Every run is one of `alexnet_jax.main`; a suite that was stopped goes on where it was.
DIR gets results.csv, report.html and runs/. --scale=0.2 trains on a fifth of the images, always the same; --dry_run
shows the runs and how long they may take.
"""

import contextlib
import json
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
    results,
    sharding,
    sources,
    suites,
    train,
    writers,
)
from alexnet_jax.errors import DivergedError, UserError, as_user_error, did_you_mean
from alexnet_jax.suites import Arm

FIGURE1, AVERAGED = 'figure1', ('ensemble', 'views')
SUITES = (FIGURE1, *suites.SUITES)
RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)  # of figure 1's search, for each activation


class Trial(NamedTuple):
    """One run of a suite."""

    arm: Arm
    seed: int
    config: ConfigDict
    output: str  # the suite's

    @property
    def workdir(self) -> str:
        return os.path.join(self.output, 'runs', f'{self.arm.name.replace(",", "").replace(" ", "_")}-{self.seed}')


def trials(arms: Sequence[Arm], base: ConfigDict, seeds: int, output: str) -> list[Trial]:
    """Every arm with every seed; the same arm of two suites is the same run."""
    found = []
    for arm in arms:
        for seed in range(seeds):
            config = suites.changed(base, arm.changes)
            config.seed = base.seed + seed
            found.append(Trial(arm, config.seed, config, output))
    return found


def run(trial: Trial, suite: str, dataset: sources.Dataset) -> dict[str, Any]:
    """Trains one network to its end, or what is left of it, and measures it: a row, put into results.csv, too.

    A network that diverges is a result, too. What was found before is read, not found again.
    """
    name, found = f'{trial.arm.name}, seed {trial.seed}', _read(trial, 'result')
    if found and found['diverged'] and found['step'] == _latest(trial) and _is_of(trial):
        print(f'{name}: diverged before.', flush=True)
    else:
        diverged = False
        try:
            train.train_and_evaluate(trial.config, trial.workdir)  # says where it is of another config
        except DivergedError as error:
            print(f'{name}: {error}', flush=True)
            diverged = True
        step = _latest(trial)
        if not found or (found['step'], found['diverged']) != (step, diverged):  # or it was made longer
            found = {'step': step, 'diverged': diverged, **({} if diverged else measure(trial, dataset))}
            writers.write_json(trial.workdir, {'result': found})
        jax.clear_caches()  # the next network is another program
    row = {'suite': suite, 'arm': trial.arm.name, 'seed': trial.seed, **found}
    results.write_csv(os.path.join(trial.output, 'results.csv'), [row], whole=False)
    return row


def _read(trial: Trial, name: str) -> dict[str, Any] | None:
    """NAME.json of a run; None where there is none."""
    path = os.path.join(trial.workdir, f'{name}.json')
    if not os.path.exists(path):
        return None
    with open(path, encoding='utf-8') as file:
        return json.load(file)


def _is_of(trial: Trial) -> bool:
    """Whether a run is of this config: of one that diverged before its first checkpoint `train` cannot say it."""
    return _read(trial, 'config') == checkpoint.config_to_json(trial.config)


def _latest(trial: Trial) -> int | None:
    with checkpoint.Checkpoints(trial.workdir, read_only=True) as saved:
        return saved.latest()


def measure(trial: Trial, dataset: sources.Dataset) -> dict[str, Any]:
    """Errors of a finished run's last checkpoint in percent: of its last pass, and on the test images."""
    config = trial.config
    trained, passes = results.last(trial.workdir), figures.curves(trial.workdir)['train']
    error = float(passes.top1_error[-1])
    found = {
        'data': config.data.path,
        'train_images': len(sources.subset(dataset.splits['train'], config.data.fraction)),
        'epochs': float(passes.epoch[-1]),
        'learning_rate': config.optim.learning_rate,
        'train_error': error,
    }
    if config.stop_at_error:
        found['reached'] = error <= config.stop_at_error
    if name := results.tested_on(dataset):
        split = dataset.splits[name]
        mesh = sharding.make_mesh(data=len(jax.devices()), tower=1)
        found['test_images'] = len(split)
        ten = dataset.record_size > config.data.image_size  # else all ten are the same two
        for views, (top1, top5) in {1: ('top1_error', 'top5_error'), 10: ('top1_ten', 'top5_ten')}.items():
            if views == 1 or ten:
                result = evaluate.evaluate(trained, split, mesh, views=views, max_bad=config.data.max_bad)
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
                    passes[i] = max(1, int(rows[i]['epochs']))  # the last batch of a pass reaches into the next
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


def each(
    suite: str, base: ConfigDict, seeds: int, output: str, dataset: sources.Dataset
) -> tuple[list[Trial], list[dict]]:
    """The arms of a suite, one after the other: the trials, and a row for each."""
    found, rows = trials(suites.SUITES[suite](base), base, seeds, output), []
    for i, trial in enumerate(found):
        print(f'{i + 1}/{len(found)}  {trial.arm.name}, seed {trial.seed}', flush=True)
        rows.append(run(trial, suite, dataset))
    return found, rows


def plan(found: Sequence[Trial], examples: int) -> str:
    """The runs of a suite, their images, and hours predicted from a few updates of the first network."""
    first = found[0].config
    with contextlib.ExitStack() as stack:
        dataset = sources.synthetic(first.data.image_size, first.model.num_classes)
        built = assemble.build(suites.changed(first, {'data.fraction': 1.0}), dataset)
        side, _ = benchmark.our_training(built, first, 0, 'float32', stack, name='', batches=False)
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
    """Floating-point operations of the forward products of a config's network, for one image."""
    sizes = layers.sizes(model.from_config(config.model), config.data.image_size)
    return sum(size.flops for size in sizes.values())


def _prepared(path: str) -> str:
    """`path` if it holds prepared data already, else ''."""
    return path if path == sources.DIGITS or os.path.exists(os.path.join(path, 'dataset_info.json')) else ''


def prepared(path: str, output: str, size: int, suite: str) -> str:
    """Prepares the images at `path` into a folder of the output, unless that was done before; returns that folder."""
    folder = os.path.join(output, f'data-{size}')
    listed = None
    if not os.path.exists(folder):
        listed = listing.find(path)
        _check_splits(listed, suite, repr(path))
    prepare.once(path, folder, size=size, format='raw' if size <= 64 else 'jpeg', listed=listed)
    return folder


def _check_splits(found: sources.Dataset | listing.Listing, suite: str, where: str) -> None:
    """Raises UserError where a suite would have nothing to train on, or nothing to measure on."""
    if 'train' not in found.splits:
        raise UserError(
            f'{where} has {" and ".join(found.splits)} but no training images; a suite takes a split train.'
        )
    if suite != FIGURE1 and not {'val', 'test'} & found.splits.keys():
        raise UserError(
            f'{where} has no val and no test images to measure on; add some, or prepare them with --val_fraction.'
        )


def at_most(base: ConfigDict, seeds: int, output: str) -> list[Trial]:
    """The runs that figure 1 can take: every rate with the first seed, one of them with the others."""
    found = []
    for activation in ('relu', 'tanh'):
        arms = [Arm(f'{activation} {rate:g}', cifar.figure1(activation, rate)) for rate in RATES]
        best = Arm(f'{activation}, the best rate', cifar.figure1(activation, RATES[0]))
        found += trials(arms, base, 1, output) + trials([best], base, seeds, output)[1:]
    return found


def _show(suite: str, base: ConfigDict, seeds: int, args) -> None:
    """--dry_run: nothing is written, nothing prepared."""
    found = sources.open_dataset(args.data) if _prepared(args.data) else listing.find(args.data)
    _check_splits(found, suite, repr(args.data))
    base.model.num_classes = len(found.class_names)
    if suite == FIGURE1:
        print('At most: a rate slower than the best is given up, and what reaches 25% ends there.')
        planned = at_most(base, seeds, args.output)
    else:
        planned = trials(suites.SUITES[suite](base), base, seeds, args.output)
    print(plan(planned, round(len(found.splits['train']) * args.scale)))


def main(words: Sequence[str]) -> None:
    args = flags.FLAGS
    suite, *rest = words
    if rest or suite not in SUITES:
        raise UserError(f'{" ".join(words)!r} is no suite.{did_you_mean(words[-1], SUITES)}')
    seeds = args.seeds or (5 if suite == 'ensemble' else 3)
    if seeds < 1 or not 0 < args.scale <= 1:
        raise UserError(f'--seeds={args.seeds}, --scale={args.scale}; expected 1 or more, and a number up to 1.')
    from alexnet_jax import drawing  # noqa: F401  (says now, not after days, that matplotlib is missing)

    cli.set_up_jax()
    base = ConfigDict(args.base.to_dict())
    small = suite in (FIGURE1, 'cifar10')
    size = 32 if small else augment.default_record_size(base.data.image_size)
    base.data.fraction, base.log_every_steps = args.scale, 0
    if args.dry_run:
        _show(suite, base, seeds, args)
        return
    with as_user_error(f'--output={args.output!r} cannot be used', 'Give another directory.'):
        os.makedirs(args.output, exist_ok=True)
    base.data.path = _prepared(args.data) or prepared(args.data, args.output, size, suite)
    dataset = sources.open_dataset(base.data.path)
    again = f' (remove it if {args.data!r} has changed)' if base.data.path != args.data else ''
    _check_splits(dataset, suite, f'{base.data.path!r}{again}')
    if small and dataset.record_size != size:
        raise UserError(f'{args.data!r} is prepared at {dataset.record_size} px; {suite} takes --size={size}.')
    base.model.num_classes = len(dataset.class_names)
    if suite == FIGURE1:
        found, rows = figure1(base, seeds, args.output, dataset)
    else:
        found, rows = each(suite, base, seeds, args.output, dataset)
    results.write_csv(os.path.join(args.output, 'results.csv'), rows, whole=True)
    diverged = {(row['arm'], row['seed']) for row in rows if row['diverged']}
    whole = [trial for trial in found if (trial.arm.name, trial.seed) not in diverged]
    if not whole:
        lower = 'lower --base.optim.learning_rate, in another --output.'
        remedy = 'it sets the rates itself: look at the images (docs/trouble.md).' if small else lower
        raise UserError(f'all networks of {suite} diverged; {remedy}')
    if suite == FIGURE1:
        tables = [results.figure1_table(rows, list(dict.fromkeys(trial.arm.name for trial in found)), RATES)]
    elif suite in AVERAGED:
        tables = [results.averaged(suite, [trial.workdir for trial in whole], dataset, base.data.max_bad)]
    else:
        arms = suites.SUITES[suite](base)
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
    cli.run(main, required=('data', 'output', 'base'), arguments=f'one SUITE ({", ".join(SUITES)})')
