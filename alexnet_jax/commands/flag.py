"""Flags of commands, as absl defines them; and what is wrong with those for config files in one line."""

import inspect
import os
import re
import runpy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from alexnet_jax.utils.errors import did_you_mean, first_line

_DEFINE = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer, float: flags.DEFINE_float}


class Flag(NamedTuple):
    """A flag, of the type of its default; None is text that is not given."""

    name: str
    default: Any
    help: str
    required: bool = False
    at_least: int | None = None
    choices: tuple = ()
    repeated: bool = False  # may be given several times: a list of texts

    def define(self, values: flags.FlagValues) -> None:
        """Adds the flag to those of a command."""
        if self.repeated:
            flags.DEFINE_multi_string(self.name, self.default, self.help, flag_values=values)
        else:
            define = _DEFINE.get(type(self.default), flags.DEFINE_string)
            define(self.name, self.default, self.help, flag_values=values)
        if self.at_least is not None:
            self._check(values, lambda value: value >= self.at_least, f'{self.at_least} or more')
        if self.choices:
            self._check(values, lambda value: value in (None, *self.choices), ' or '.join(map(str, self.choices)))

    def _check(self, values: flags.FlagValues, is_right, expected: str) -> None:
        flags.register_validator(self.name, is_right, message=f'expected {expected}.', flag_values=values)


class ConfigFlag(NamedTuple):
    """A flag for a config file, whose keys are flags, too: --config=FILE --config.KEY=VALUE, in any order."""

    name: str
    default: str | None  # the file where none is given
    help: str
    required: bool = False

    def define(self, values: flags.FlagValues) -> None:
        """Adds the flag to those of a command."""
        help = f'{self.help} Default: {self.default}.' if self.default else self.help
        config_flags.DEFINE_config_file(self.name, None, help, flag_values=values)


CHECKPOINT = Flag('checkpoint', None, "A workdir (its best step, else its latest) or one step's folder.", required=True)
CPU_DEVICES = Flag('cpu_devices', 0, 'Run on the CPU, as this many devices; 0 uses what JAX finds.', at_least=0)
VIEWS = Flag('views', 1, '1: center crop; 10: the ten views of section 4.1, softmax averaged.', choices=(1, 10))


def configs_first(words: Sequence[str], defaults: dict[str, str | None]) -> list[str]:
    """--config=FILE before all --config.KEY=VALUE, as absl wants it, and with its default where it is not given."""
    words = list(words)
    for name, default in defaults.items():
        for i in [i for i, word in enumerate(words[:-1]) if word in (f'-{name}', f'--{name}')][:1]:
            words[i : i + 2] = [f'{words[i]}={words[i + 1]}']
        first = [word for word in words if re.match(rf'--?{name}=', word)]
        if default and not first and f'--{name}' not in words:
            first = [f'--{name}={default}']
        words = [*first, *(word for word in words if word not in first)]
    return words


def one_line(text: str) -> str:
    """absl and ml_collections wrap a config file's own error in several lines: the innermost, without its kind."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        if found := re.match(r'(?:[\w.]+: )?\w+(?:Error|Exception): (.*)', line):
            return found[1]
    return ' '.join(lines)


def explain_config_error(argv: Sequence[str], names: Iterable[str]) -> str | None:
    """What is wrong with --config or a --config.KEY, with the nearest right name; None if that is not the matter."""
    words = [word.lstrip('-') for argument in argv[1:] for word in argument.split('=', 1)]
    flag = next((name for name in names if name in words[:-1]), None)
    if flag is None:
        return None
    path, _, variant = words[words.index(flag) + 1].partition(':')
    if not os.path.isfile(path):
        others = [os.path.join(os.path.dirname(path), n) for n in _python_files(os.path.dirname(path) or '.')]
        return f'there is no config file {path!r}.' + (did_you_mean(path, others) if others else '')
    try:
        get_config = runpy.run_path(path).get('get_config')
        if not callable(get_config):
            return f'{path!r} has no function get_config(); configs/paper.py shows one.'
        if variant and not inspect.signature(get_config).parameters:
            return f'{path!r} has no variants; expected --{flag}={path} without {":" + variant!r}.'
        config = get_config(*([variant] if variant else []))
    except ValueError as error:  # of the config's own making: no such variant
        return first_line(error)
    except Exception as error:
        return f'{path!r} cannot be loaded ({type(error).__name__}: {first_line(error)}).'
    if not isinstance(config, ConfigDict):
        return f'get_config() of {path!r} returns {type(config).__name__}; expected an ml_collections.ConfigDict.'
    known = []
    for key, value in config.items():
        known += [f'{key}.{name}' for name in value] if isinstance(value, ConfigDict) else [key]
    for word in words:
        key = word.removeprefix(f'{flag}.')
        if key != word and key not in known:
            return f'the config has no key {key!r}.{did_you_mean(key, known)}'
    return None


def _python_files(folder: str) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith('.py')] if os.path.isdir(folder) else []
