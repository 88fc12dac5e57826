"""Injects faults in turn and prints a table: `python -m tests.faults [--trials=N] [--seed=0] [--only=NAME]`.

--output=FILE adds each trial to a JSON file. The same command goes on where it was stopped, also on another machine.
Several campaigns can add to the same file at once, with different seeds and each with its own /dev/shm:

    unshare --mount sh -c 'mount -t tmpfs none /dev/shm && exec python -m tests.faults --trials=500 --output=FILE'
"""

import argparse
import fcntl
import json
import pathlib
import signal
import tempfile
import time

from absl import logging

from alexnet_jax.utils.environment import describe_environment
from alexnet_jax.utils.files import atomic_file
from tests.faults import faults, system_faults
from tests.faults.scene import TOO_LATE, NotPossibleError, SilentError, attempt

ALL = [*faults.ALL, *system_faults.ALL]
_OUTCOMES = ('trials', 'survived', 'lost', 'silent')


def run_trial(fault, shared: pathlib.Path, *seed: int) -> dict:
    """Returns the outcome of one trial: 'survived', 'lost', 'silent' or 'not made', the reason, and durations."""
    began, slowest, reason = time.monotonic(), 0.0, None
    with tempfile.TemporaryDirectory() as folder:
        try:
            slowest = attempt(fault, pathlib.Path(folder), shared, *seed).slowest_stop
            outcome = 'survived'
        except NotPossibleError as error:
            outcome, reason = 'not made', str(error)
        except SilentError as error:
            outcome, reason = 'silent', repr(error)
        except Exception as error:  # LostError, or an error from an unreadable workdir
            outcome, reason = 'lost', repr(error)
    seconds = round(time.monotonic() - began, 1)
    return {'fault': fault.__name__, 'outcome': outcome, 'reason': reason, 'seconds': seconds, 'slowest_stop': slowest}


def add(result: dict, trial: dict, seed: int, commit: str | None) -> dict:
    """Returns the sums of a campaign with one trial added."""
    kinds = {name: dict(row) for name, row in result.get('kinds', {}).items()}
    row = kinds.setdefault(trial['fault'], dict.fromkeys(_OUTCOMES, 0))
    if made := trial['outcome'] != 'not made':
        row['trials'] += 1
        row[trial['outcome']] += 1
    new = {key: sum(row[key] for row in kinds.values()) for key in _OUTCOMES}
    new['not_made'] = result.get('not_made', 0) + (not made)
    new['seconds'] = round(result.get('seconds', 0) + made * trial['seconds'], 1)
    new['seconds_per_trial'] = round(new['seconds'] / max(1, new['trials']), 1)
    new['slowest_stop'] = round(max(result.get('slowest_stop', 0), trial['slowest_stop']), 1)
    for key, value in (('seeds', str(seed)), ('commits', str(commit))):  # and their numbers of trials
        counts = result.get(key, {})
        new[key] = {**counts, value: counts.get(value, 0) + 1}
    told = [{key: trial[key] for key in ('fault', 'outcome', 'reason')}]
    new['failures'] = result.get('failures', []) + told * (trial['outcome'] in ('lost', 'silent'))
    new['reasons_not_made'] = result.get('reasons_not_made', []) + told * (not made)
    return {**result, **new, 'kinds': kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--trials', type=int, default=len(ALL))  # one of each kind
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', choices=[fault.__name__ for fault in ALL])
    parser.add_argument('--output', type=pathlib.Path)
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores SIGINT
    environment = describe_environment()
    chosen = [fault for fault in ALL if args.only in (None, fault.__name__)]
    command = 'python -m tests.faults --trials=N --seed=N --output=FILE'
    result: dict = {'name': 'faults', 'command': command, **{key: environment[key] for key in ('versions', 'cores')}}
    if args.output and args.output.exists():
        result = json.loads(args.output.read_text())
    with tempfile.TemporaryDirectory() as shared:
        for number in range(result.get('seeds', {}).get(str(args.seed), 0), args.trials):
            trial = run_trial(chosen[number % len(chosen)], pathlib.Path(shared), args.seed, number)
            if args.output:
                with open(f'{args.output}.lock', 'w') as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if args.output.exists():  # with the trials of other campaigns
                        result = json.loads(args.output.read_text())
                    result = add(result, trial, args.seed, environment['commit'])
                    with atomic_file(str(args.output)) as file:
                        file.write(json.dumps(result, indent=1) + '\n')
            else:
                result = add(result, trial, args.seed, environment['commit'])
            reason = f': {trial["reason"]}' if trial['reason'] else ''
            done = f'{number + 1}/{args.trials}  {trial["fault"]}: {trial["outcome"]}'
            print(f'{done}  ({trial["seconds"]:.0f} s){reason}', flush=True)
    print(f'\n| {"fault":38} | {" | ".join(_OUTCOMES)} |\n|{"-" * 40}|---|---|---|---|')
    for name, row in result['kinds'].items():
        print(f'| {name.replace("_", " "):38} | {" | ".join(str(row[key]) for key in _OUTCOMES)} |')
    counts = ', '.join(f'{result[key]} {key.replace("_", " ")}' for key in (*_OUTCOMES, 'not_made'))
    print(f'\n{counts}; {result["seconds_per_trial"]} s a trial; slowest end after SIGTERM {result["slowest_stop"]} s')
    too_late = [row['fault'] for row in result.get('reasons_not_made', []) if row['reason'] == TOO_LATE]
    if too_late:
        print(f'never in time, so that nothing was tested: {", ".join(too_late)}')
    raise SystemExit(1 if result['failures'] or too_late else 0)


if __name__ == '__main__':
    main()
