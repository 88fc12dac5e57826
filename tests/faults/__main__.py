"""Injects faults in turn and prints a table: `python -m tests.faults --trials=60 [--seed=0] [--only=NAME]`."""

import argparse
import collections
import pathlib
import signal
import tempfile
import time

from absl import logging

from tests.faults import faults
from tests.faults.scene import NotPossibleError, attempt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--trials', type=int, default=60)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', choices=[fault.__name__ for fault in faults.ALL])
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores SIGINT
    chosen = [fault for fault in faults.ALL if args.only in (None, fault.__name__)]
    counts = collections.defaultdict(collections.Counter)
    slowest, began = 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as shared:
        for trial in range(args.trials):
            fault = chosen[trial % len(chosen)]
            with tempfile.TemporaryDirectory() as folder:
                try:
                    scene = attempt(fault, pathlib.Path(folder), pathlib.Path(shared), args.seed, trial)
                    slowest, outcome = max(slowest, scene.slowest_stop), 'survived'
                except NotPossibleError as error:
                    outcome = 'not made'
                    print(f'trial {trial}, {fault.__name__}: {error}', flush=True)
                except Exception as error:  # LostError, or an error from an unreadable workdir
                    outcome = 'lost'
                    print(f'trial {trial}, {fault.__name__}: {error!r}', flush=True)
            counts[fault.__name__][outcome] += 1
            print(
                f'{trial + 1}/{args.trials}  {fault.__name__}: {outcome}  ({time.monotonic() - began:.0f} s)',
                flush=True,
            )
    print(f'\n| {"fault":34} | tried | survived | lost |\n|{"-" * 36}|---|---|---|')
    for name, count in counts.items():
        tried = count['survived'] + count['lost']
        print(f'| {name.replace("_", " "):34} | {tried} | {count["survived"]} | {count["lost"]} |')
    total = sum(counts.values(), collections.Counter())
    print(f'\n{total["survived"] + total["lost"]} tried, {total["survived"]} survived, {total["lost"]} lost, ', end='')
    print(f'{total["not made"]} not made here; slowest end after SIGTERM {slowest:.1f} s')
    raise SystemExit(1 if total['lost'] else 0)


if __name__ == '__main__':
    main()
