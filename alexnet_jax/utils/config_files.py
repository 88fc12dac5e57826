"""Configs by name or path. A wheel holds configs/ as alexnet_jax/configs; else it lies beside the package."""

import inspect
import os
import pathlib
import runpy

from absl import logging
from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from alexnet_jax.utils.errors import UserError, did_you_mean, first_line


def config_names() -> dict[str, pathlib.Path]:
    """The files of the configs that come with the package, by name."""
    package = pathlib.Path(__file__).parents[1]
    folders = [
        folder for folder in (package / 'configs', package.parent / 'configs') if (folder / 'paper.py').is_file()
    ]
    return {path.stem: path for path in sorted(folders[0].glob('*.py'))} if folders else {}


def get_config(name: str | os.PathLike) -> ConfigDict:
    """A config: 'paper', 'paper:init=authors', or the path of a file with `get_config()`, also with an argument.

    Raises:
      UserError: there is no such config or variant, or the file cannot be loaded.
    """
    name = os.fspath(name)
    file, _, argument = (name, '', '') if os.path.isfile(name) else name.partition(':')
    path, own = pathlib.Path(file), config_names()
    if file in own and path.is_file():
        logging.info('%s is the file of that name in this folder, not the config that comes with alexnet_jax.', file)
    elif file in own:
        path = own[file]
    elif not path.is_file():
        beside = [str(other) for other in path.parent.glob('*.py')] if path.suffix == '.py' else []
        hint = did_you_mean(path.stem, own) if path.stem in own or not beside else did_you_mean(file, beside)
        raise UserError(f'there is no config file {file!r}.{hint}')
    try:
        function = runpy.run_path(str(path)).get('get_config')
        if not callable(function):
            raise UserError(f'{file!r} has no function get_config(); configs/paper.py shows one.')
        if argument and not inspect.signature(function).parameters:
            raise UserError(f'{file!r} has no variants; expected it without {":" + argument!r}.')
        config = function(*([argument] if argument else []))
    except ValueError as error:  # of the config's own making: no such variant
        raise error if isinstance(error, UserError) else UserError(f'{file!r}: {first_line(error)}') from error
    except Exception as error:
        raise UserError(f'{file!r} cannot be loaded ({type(error).__name__}: {first_line(error)}).') from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f'get_config() of {file!r} returns {type(config).__name__}; expected an ml_collections.ConfigDict.'
        )
    try:
        return ConfigDict(config.to_dict())  # also of a FrozenConfigDict
    except RequiredValueError as error:
        raise UserError(f'{file!r} leaves a required value open: {first_line(error)}') from error
