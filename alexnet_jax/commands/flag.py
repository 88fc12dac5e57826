"""Command-line flags, defined with absl, and configs as flags."""

import functools
import operator
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from alexnet_jax.utils.config_files import get_config
from alexnet_jax.utils.errors import UserError, did_you_mean

_DEFINE: dict[type, Callable] = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer, float: flags.DEFINE_float}


class Flag(NamedTuple):
    """A flag. Its type is that of the default; a default of None defines an optional string."""

    name: str
    default: Any
    help: str
    required: bool = False
    at_least: int | None = None
    choices: tuple = ()
    repeated: bool = False  # may be given several times; the value is a list of strings

    def define(self, values: flags.FlagValues, words: Sequence[str] | None = None) -> list[str]:
        """Defines the flag in `values`. Returns the words of the command line that are still to be parsed."""
        if self.repeated:
            flags.DEFINE_multi_string(self.name, self.default, self.help, flag_values=values)
        else:
            define: Callable = _DEFINE.get(type(self.default), flags.DEFINE_string)
            # Two paths or names are an error: the first would be dropped. A later number overrides an earlier one.
            number = type(self.default) in _DEFINE
            define(self.name, self.default, self.help, flag_values=values, allow_overwrite=number)
        if self.at_least is not None:
            self._check(values, lambda value: value >= self.at_least, f'{self.at_least} or more')
        if self.choices:
            self._check(values, lambda value: value in (None, *self.choices), ' or '.join(map(str, self.choices)))
        return list(words or ())

    def _check(self, values: flags.FlagValues, is_right, expected: str) -> None:
        flags.register_validator(self.name, is_right, message=f'expected {expected}.', flag_values=values)


class ConfigFlag(NamedTuple):
    """A flag for a config and flags for its keys: --config=NAME --config.KEY=VALUE, in any order."""

    name: str
    default: str | None  # name of the default config
    help: str
    required: bool = False
    defaults: Mapping[str, str] = types.MappingProxyType({})  # {first word of the command line: other default}

    def define(self, values: flags.FlagValues, words: Sequence[str] | None = None) -> list[str]:
        """Defines the flag, and a flag for each key in `words`. Returns the words that are still to be parsed.

        Raises UserError if the config cannot be loaded or does not have a key.
        """
        if words is None:  # for --help
            flags.DEFINE_string(self.name, self.default, self.help, flag_values=values)
            return []
        given, rest = self.split(words)
        is_key = re.compile(rf'--?(?:no)?{self.name}\.([^=]*)')
        keys = [match[1] for word in rest if (match := is_key.match(word))]
        spec = self.defaults.get(words[0] if words else '', self.default) if given is None else given
        if spec is None:
            if keys:
                raise UserError(f'--{self.name}.{keys[0]} requires --{self.name}=NAME.')
            flags.DEFINE_string(self.name, None, self.help, flag_values=values)
            return rest
        config = get_config(spec)
        known = list(flat_keys(config))
        for key in keys:
            if key not in known:
                raise UserError(f'unknown config key {key!r}.{did_you_mean(key, known)}')
        config_flags.DEFINE_config_dict(self.name, config, self.help, flag_values=values, sys_argv=rest)
        values[self.name].using_default_value = given is None  # absl sets it from `rest`, which lacks the config's name
        return rest

    def split(self, words: Sequence[str]) -> tuple[str | None, list[str]]:
        """Returns (name of the config or None, the other words)."""
        given, rest, remaining = None, [], iter(words)
        for word in remaining:
            flag, is_whole, value = word.lstrip('-').partition('=')
            if word.startswith('-') and flag == self.name:
                given = value if is_whole else next(remaining, '')
            else:
                rest.append(word)
        return given, rest


def overrides(args: flags.FlagValues, name: str) -> dict[str, Any]:
    """Returns the values of the keys that were given for a `ConfigFlag`, such as {'num_epochs': 10.0}."""
    config: Any = args[name].value
    keys = config_flags.get_override_values(args[name])
    return {key: functools.reduce(operator.getitem, key.split('.'), config) for key in keys}


def flat_keys(config: ConfigDict, prefix: str = '') -> Iterator[str]:
    """Yields the keys of all values, such as 'optim.momentum'."""
    for key, value in config.items():
        yield from flat_keys(value, f'{prefix}{key}.') if isinstance(value, ConfigDict) else [prefix + key]


CHECKPOINT = Flag(
    'checkpoint',
    None,
    'A workdir (best step, else latest), the folder of one step, an exported folder, published weights by name (see '
    'alexnet_jax weights), or hf:USER/REPO.',
    required=True,
)
CPU_DEVICES = Flag('cpu_devices', 0, 'Number of CPU devices to run on; 0: the devices that JAX finds.', at_least=0)
VIEWS = Flag('views', 1, '1: center crop; 10: mean softmax output of the ten views (section 4.1).', choices=(1, 10))


def check_data_or_images(args: flags.FlagValues) -> None:
    """Raises UserError unless exactly one of --data and --images is given, and --split only with --data."""
    if bool(args.data) == bool(args.images):
        raise UserError('expected either --data=DIR or --images=FOLDER_OR_FILE.')
    if args.images and not args['split'].using_default_value:
        raise UserError(
            f'--split={args.split}: --images has no splits; use --data=DIR, or give the folder of the split.'
        )
