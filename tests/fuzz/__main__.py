"""Fuzzes a reader: `python -m tests.fuzz READER [--seconds=600] [--output=FILE]`.

Changes valid files at random. If atheris is installed, the code that they reach guides it (pip install atheris).
Prints what must not happen: any error but one of one line, a warning, a file written elsewhere, 20 s for a case, or
more memory than `Reader.memory` plus 100 times its size. Exits with 1 then. --output adds the number of cases to a JSON
file, see docs/results/fuzz.json, and writes the cases that were found beside it.
"""

import argparse
import json
import os
import pathlib
import random
import resource
import shutil
import sys
import tempfile
import time

try:
    import atheris
except ImportError:
    atheris = None

_SPACE = 8 * 2**30  # of addresses, beyond those in use after the seeds: a case that asks for all memory ends nothing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('reader')
    parser.add_argument('--seconds', type=float, default=600)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', type=os.path.abspath)
    args = parser.parse_args()
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    if atheris:
        with atheris.instrument_imports(include=['alexnet_jax']):
            from tests.fuzz import campaign
    else:
        from tests.fuzz import campaign
    if args.reader not in campaign.READERS:
        parser.error(f'{args.reader!r}: expected one of {", ".join(campaign.READERS)}.')
    from absl import logging

    logging.set_verbosity(logging.FATAL)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        fuzz = campaign.Campaign(args.reader, root / 'files')
        for case in fuzz.seeds:
            fuzz.run(case)
        used = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _SPACE, used + _SPACE))
        rng, began = random.Random(args.seed), time.monotonic()

        def finish() -> None:
            seconds = time.monotonic() - began
            engine = 'atheris' if atheris else 'random'
            print(f'{args.reader}: {fuzz.executions:,} cases, {fuzz.accepted:,} accepted, {seconds:.0f} s, {engine}, '
                  f'findings: {len(fuzz.findings)}', flush=True)  # fmt: skip
            if args.output:
                _record(args, fuzz, round(seconds), engine)
                for i, (_, case) in enumerate(fuzz.findings.values(), start=1):
                    pathlib.Path(f'{args.output}.{args.reader}.{i}').write_bytes(case)
            shutil.rmtree(root)
            os._exit(bool(fuzz.findings))  # libFuzzer has no other end

        def test(case: bytes) -> None:
            fuzz.run(case)
            if time.monotonic() - began > args.seconds:
                finish()

        if not atheris:
            while True:
                test(campaign.mutate(rng.choice(fuzz.seeds), rng))
        corpus = root / 'corpus'
        corpus.mkdir()
        for i, case in enumerate(fuzz.seeds):
            (corpus / str(i)).write_bytes(case)

        def mutator(case: bytes, most: int, seed: int) -> bytes:
            draw = random.Random(seed)
            if not case or draw.random() < 0.5:  # libFuzzer keeps only one of the seeds that run the same code
                case = draw.choice(fuzz.seeds)
            return campaign.mutate(case, draw, lambda part: atheris.Mutate(part, most))[:most]

        options = [f'-seed={args.seed + 1}', '-timeout=60', '-rss_limit_mb=8192', '-max_len=200000', '-verbosity=0']
        options += [f'-artifact_prefix={root}/', '-len_control=0']
        atheris.Setup([sys.argv[0], *options, str(corpus)], test, custom_mutator=mutator)
        atheris.Fuzz()


def _record(args: argparse.Namespace, fuzz, seconds: int, engine: str) -> None:
    from alexnet_jax.utils.environment import describe_environment

    path, facts = pathlib.Path(args.output), describe_environment()
    found = json.loads(path.read_text()) if path.exists() else {'name': 'fuzz', 'readers': {}}
    versions = {name: version for name, version in facts['versions'].items() if version}
    found |= {'command': 'python -m tests.fuzz READER', 'python': facts['python'], 'versions': versions}
    found['machine'] = {key: facts[key] for key in ('cpu', 'cores', 'memory_gib')}
    row = {'cases': fuzz.executions, 'accepted': fuzz.accepted, 'seconds': seconds, 'engine': engine}
    row |= {'findings': len(fuzz.findings), 'commit': facts['commit']}
    found['readers'].setdefault(args.reader, []).append(row)
    path.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
    main()
