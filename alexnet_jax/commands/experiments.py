"""Runs the paper's experiments and compares their results with the paper's numbers.

    alexnet_jax experiments SUITE --data=PATH --output=DIR [--base=paper] [--seeds=N] [--scale=F]

SUITE is figure1, ablations, recipe, large_batch, cifar10, ensemble or views (see docs/experiments.md). A suite trains
networks that differ in one setting. PATH is a prepared directory or any input of `alexnet_jax prepare`. Each network is
trained as with `alexnet_jax train`. --base.KEY=VALUE changes a setting of all networks. The same command resumes a
stopped suite. DIR receives results.csv, report.html and runs/. --scale=0.2 trains on a fixed fifth of the images.
--only='no dropout,no color' runs these networks and the one that they are compared with. --dry_run prints the runs and
their predicted durations.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from alexnet_jax.commands.flag import CPU_DEVICES, ConfigFlag, Flag, flat_keys, overrides
from alexnet_jax.utils.config_files import get_config
from alexnet_jax.utils.errors import UserError, did_you_mean

_FIGURE1_BASE = 'cifar10:19pct'  # the release does not name the network of figure 1; this one has four layers
FLAGS = (
    Flag('data', None, 'A prepared directory, or any input of alexnet_jax prepare.', required=True),
    Flag('output', None, 'Directory for runs/, results.csv and report.html.', required=True),
    ConfigFlag(
        'base',
        'paper',
        f'Config that all runs start from; default of figure1: {_FIGURE1_BASE}.',
        defaults={'figure1': _FIGURE1_BASE},
    ),
    Flag('seeds', 0, 'Runs of each network with different seeds; 0: 3, or 5 for ensemble.', at_least=0),
    Flag('scale', 1.0, 'Fraction of the training images to train on; always the same images.'),
    Flag('only', '', "Networks to run, separated by commas: 'no dropout,no crops or reflections'; empty: all."),
    Flag('dry_run', False, 'Only print the runs, their images and predicted durations.'),
    CPU_DEVICES,
)
ARGUMENTS = 'one SUITE (figure1, ablations, recipe, large_batch, cifar10, ensemble, views)'


def main(args: flags.FlagValues, words: Sequence[str]) -> None:
    from alexnet_jax.experiments import ablations, runner, trials

    name, *rest = words
    if rest or name not in ablations.SUITES:
        raise UserError(f'unknown suite {" ".join(words)!r}.{did_you_mean(words[-1], ablations.SUITES)}')
    seeds = args.seeds or (5 if name == 'ensemble' else 3)
    if not 0 < args.scale <= 1:
        raise UserError(f'--scale={args.scale}: expected a number above 0 and at most 1.')
    from alexnet_jax.experiments import plots  # noqa: F401  (raises UserError now, not after days, without matplotlib)

    only = tuple(word for part in args.only.split(',') if (word := part.strip()))
    base, given = args.base, overrides(args, 'base')
    if name == trials.FIGURE1 and args['base'].using_default_value:
        base = _figure1_base(given)  # again, in case SUITE is not the first word
    suite = trials.Suite(name, base, seeds, args.output, args.scale, only, given)
    suite.variants()  # checks --only and --base.KEY before anything is prepared
    if args.dry_run:
        print(runner.plan_suite(suite, args.data))
        return
    print('\n\n'.join(runner.run_suite(suite, args.data)))
    print(f'Wrote {args.output}/results.csv and {args.output}/report.html.')


def _figure1_base(given: dict[str, Any]) -> ConfigDict:
    """Returns the default base of figure 1 with the given settings."""
    base = get_config(_FIGURE1_BASE)
    for key in given.keys() - flat_keys(base):
        raise UserError(f'unknown config key {key!r} of {_FIGURE1_BASE}.')
    base.update_from_flattened_dict(given)
    return base
