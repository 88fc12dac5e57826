"""Loads configs by name or path. In a wheel, configs/ is part of the package; in the repository, it is beside it."""

import contextvars
import inspect
import os
import pathlib
import runpy

from absl import logging
from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from alexnet_jax.utils.errors import UserError, did_you_mean, first_line
from alexnet_jax.utils.files import as_path

_in_package = contextvars.ContextVar('in_package', default=False)  # whether a config of the package calls `get_config`


def config_names() -> dict[str, pathlib.Path]:
    """Returns the files of the configs that are part of the package, by name."""
    package = pathlib.Path(__file__).parents[1]
    for folder in (package / 'configs', package.parent / 'configs'):
        if (folder / 'paper.py').is_file():
            return {path.stem: path for path in sorted(folder.glob('*.py'))}
    return {}


def get_config(name: str | os.PathLike, *, packaged: bool = False) -> ConfigDict:
    """Loads a config by its name ('paper') or by the path of a Python file that defines `get_config()`.

    A variant may follow after a colon: 'paper:init=authors'. A file of that name in the current folder goes before the
    config of the package, unless `packaged`, or if a config of the package asks for it. Raises UserError if there is no
    such config or variant, or if the file cannot be loaded.

    >>> config = get_config('paper')
    >>> config.optim.momentum, config.model.layers.conv1.features
    (0.9, 96)
    """
    name, packaged = as_path(name), packaged or _in_package.get()
    file, _, argument = (name, '', '') if os.path.isfile(name) and not packaged else name.partition(':')
    path, names = pathlib.Path(file), config_names()
    if file in names and path.is_file() and not packaged:
        logging.info('Using the file %s in this folder, not the config of that name in alexnet_jax.', file)
    elif file in names:
        path = names[file]
    elif not path.is_file():
        siblings = [str(other) for other in path.parent.glob('*.py')] if path.suffix == '.py' else []
        by_name = path.stem in names or not siblings
        hint = did_you_mean(path.stem, names) if by_name else did_you_mean(file, siblings)
        raise UserError(f'no config file {file!r}.{hint}')
    nested = _in_package.set(path == names.get(file))
    try:
        function = runpy.run_path(str(path)).get('get_config')
        if not callable(function):
            raise UserError(f'{file!r} has no function get_config(); see configs/paper.py for an example.')
        if argument and not inspect.signature(function).parameters:
            raise UserError(f'{file!r} has no variants; remove {":" + argument!r}.')
        config = function(*([argument] if argument else []))
    except ValueError as error:  # raised by configs for an unknown variant
        raise error if isinstance(error, UserError) else UserError(f'{file!r}: {first_line(error)}') from error
    except Exception as error:
        raise UserError(f'cannot load {file!r} ({type(error).__name__}: {first_line(error)}).') from error
    finally:
        _in_package.reset(nested)
    if not isinstance(config, ConfigDict):
        raise UserError(
            f'get_config() of {file!r} returns {type(config).__name__}: expected an ml_collections.ConfigDict.'
        )
    try:
        return ConfigDict(config.to_dict())  # a FrozenConfigDict becomes a ConfigDict
    except RequiredValueError as error:
        raise UserError(f'{file!r} does not set a required value: {first_line(error)}') from error
