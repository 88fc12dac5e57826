"""The file of one measurement, from which docs/tables.py writes tables. It names no folder of the machine."""

import datetime
import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from alexnet_jax.checkpoints.manager import config_to_json
from alexnet_jax.utils.errors import UserError
from alexnet_jax.utils.files import atomic_file

_BATCHES = ('step', 'train', 'input', 'loop')  # modes that use the batch size and the mesh of the config
_WIDTH = 100  # of lines, if possible


def check_output(path: str | None) -> None:
    """Raises UserError if a file cannot be written, before anything is measured."""
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise UserError(f'--output={path}: expected a file in an existing folder that can be written.')


def config_digest(config: ConfigDict) -> str:
    """Returns 12 hexadecimal digits that are equal for equal configs. Of `data.path`, only the last part counts."""
    values = config_to_json(config)
    values['data']['path'] = _last_part(values['data']['path'])
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def command(words: Sequence[str]) -> str:
    """Returns a command line, from the words after the program's name, with only the last part of each path."""
    return shlex.join(['alexnet_jax', *map(_without_folders, words)])


def _without_folders(word: str) -> str:
    """Returns PATH or --NAME=PATH with only the last part of the path."""
    name, equals, value = word.partition('=')
    return name + equals + _last_part(value) if equals else _last_part(name)


def _last_part(path: str) -> str:
    return path.rstrip('/').rpartition('/')[2]


def write(path: str, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """Writes a JSON file atomically, with every list on one line and floats with six digits.

    settings: from `describe_environment` and of the measurement. results: added as they are.
    """
    versions = {**settings['versions'], **settings.get('peers', {})}
    if 'torch' in settings:
        versions['torch'] = settings['torch']
    flags = ' '.join(map(_without_folders, (settings['xla_flags'] or '').split()))
    found = {
        'mode': settings['mode'],
        'command': command(settings['command'][1:]),
        'config': _last_part(settings['config_name']),
        'config_digest': settings['config_digest'],
        'precision': settings['precision'],
        'n': settings['repeats'],
        'date': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d'),
        'commit': settings['commit'],
        'python': settings['python'],
        'versions': {name: version for name, version in versions.items() if version},
        'machine': {key: settings[key] for key in ('cpu', 'cores', 'memory_gib')},
        'devices': settings['devices'],
        **{key: settings[key] for key in ('peak_host_bytes', 'device_memory') if settings.get(key)},
        **({'xla_flags': flags} if flags else {}),
        **({key: settings['config'][key] for key in ('batch_size', 'mesh')} if settings['mode'] in _BATCHES else {}),
        **results,
    }
    rounded = json.loads(json.dumps(found), parse_float=lambda number: float(f'{float(number):.6g}'))
    with atomic_file(path) as file:
        file.write(_text(rounded) + '\n')


def _text(value: Any, indent: str = '') -> str:
    """Formats JSON. A dict that does not fit on a line has one line for each key."""
    line = json.dumps(value)
    if not isinstance(value, dict) or len(indent + line) <= _WIDTH:
        return line
    inner = f'{indent} '
    lines = [f'{inner}{json.dumps(key)}: {_text(part, inner)}' for key, part in value.items()]
    return '{\n' + ',\n'.join(lines) + f'\n{indent}}}'
