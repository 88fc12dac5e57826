"""Result files of docs/results that programs of this folder write."""

import datetime
import json
import pathlib
import shlex
import sys
from typing import Any

from alexnet_jax.benchmark import record


def write(path: str, mode: str, found: dict[str, Any], environment: dict[str, Any]) -> None:
    """Writes what was measured and where, in the form of `alexnet_jax benchmark --output`.

    environment: from `describe_environment`, at the start of the program.
    """
    words = [f'tests.faults.{mode}', *sys.argv[1:]]
    facts = {
        'mode': mode,
        'name': mode,
        'command': f'python -m {shlex.join(words)}',
        'date': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d'),
        **{key: environment[key] for key in ('commit', 'python', 'devices')},
        'versions': {name: version for name, version in environment['versions'].items() if version},
        'machine': {key: environment[key] for key in ('cpu', 'cores', 'memory_gib')},
    }
    rounded = json.loads(json.dumps({**facts, **found}), parse_float=lambda number: float(f'{float(number):.6g}'))
    pathlib.Path(path).write_text(record._text(rounded) + '\n', encoding='utf-8')
