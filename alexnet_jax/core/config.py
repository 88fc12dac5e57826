"""From a config (see configs/paper.py) to the objects of the core, with a check of every key and value."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from alexnet_jax.core import optim
from alexnet_jax.core.architecture import FAN_IN, ConvSpec, DenseSpec, LocalSpec
from alexnet_jax.core.augment import Augmentation
from alexnet_jax.core.model import AlexNet
from alexnet_jax.utils.errors import UserError, did_you_mean

MODEL_FIELDS = tuple(f.name for f in dataclasses.fields(AlexNet) if f.name not in ('parent', 'name', 'tower_axis'))


_Check = tuple[str, Callable[[Any], bool], str]  # keys, what their values must satisfy, the same in words


def _is_number(value, least: float = -1e300, most: float = 1e300, kind=int | float) -> bool:
    """Whether a value is a finite number within bounds, of a kind: `int` for whole ones."""
    return isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most


def _are_numbers(values, count: int, **bounds) -> bool:
    """Whether there are `count` values, each a number within bounds."""
    is_row = isinstance(values, tuple | list) and len(values) == count
    return is_row and all(_is_number(value, **bounds) for value in values)


_from_0 = functools.partial(_is_number, least=0)
_is_count = functools.partial(_is_number, least=1, kind=int)


def _is_std(value) -> bool:
    return value == FAN_IN or _from_0(value)


def _is_bias(value) -> bool:
    return value == FAN_IN or _is_number(value)


def _is_crop_area(value) -> bool:
    return value == () or (_are_numbers(value, 2, most=1) and 0 < value[0] <= value[1])


_LAYER_CHECKS = (  # of a row of `conv`, `local` or `dense`
    ('features kernel stride groups', _is_count, 'a whole number above 0'),
    ('padding', lambda value: _are_numbers(value, 2, least=0, kind=int), 'a pair of pixels (before, after)'),
    ('init_std', _is_std, f'a number of 0 or more, or {FAN_IN!r}'),
    ('bias', _is_bias, f'a number or {FAN_IN!r}'),
    ('post', lambda value: isinstance(value, str), "words such as 'relu lrn pool'"),
)
_MODEL_CHECKS = (
    ('num_classes pool_window pool_stride lrn_n norm_groups spatial_n', _is_count, 'a whole number above 0'),
    (
        'classifier',
        lambda value: isinstance(value, tuple) and len(value) == 2 and _is_std(value[0]) and _is_bias(value[1]),
        f'(init std of 0 or more, bias), each a number or {FAN_IN!r}',
    ),
    ('lrn_k spatial_k', lambda value: _is_number(value) and value > 0, 'a number above 0'),
    ('lrn_alpha lrn_beta spatial_alpha spatial_beta', _is_number, 'a number'),
    ('dropout_rate', lambda value: _from_0(value) and value < 1, 'a number from 0 up to, not including, 1'),
    ('lrn_alpha_over_n dropout_inverted', lambda value: isinstance(value, bool), 'True or False'),
    ('dtype', ('float32', 'bfloat16', 'float64').__contains__, 'one of float32, bfloat16, float64'),
)
_AUGMENTATION_CHECKS = (
    ('image_size', _is_count, 'a whole number of pixels above 0'),
    ('draw_every', _is_count, 'a whole number of images above 0'),
    ('crop_area', _is_crop_area, '() or (least, most), 0 to 1'),
    ('mean', ('crop', 'center', 'channel').__contains__, "'crop', 'center' or 'channel'"),
    ('pixel_std', lambda value: _are_numbers(value, 3) and min(value) > 0, 'three numbers above 0'),
    ('color_std color_epochs', _from_0, 'a number of 0 or more'),
    ('color_scale', ('eigenvalue', 'std').__contains__, "'eigenvalue' or 'std'"),
)
_RUN_CHECKS = (
    ('on_nonfinite', ('stop', 'skip').__contains__, "'stop' or 'skip'"),
    ('stop_at_error', lambda value: 0 <= value < 100, 'percent: 0 (never), or up to, not with, 100'),
    ('seed', lambda value: 0 <= value < 2**31, '0 to 2^31 - 1'),
    ('batch_size', _is_count, '1 or more'),
    ('max_nonfinite num_steps log_every_steps eval_every_steps checkpoint_every_steps', _from_0, '0 or more'),
)
_DATA_CHECKS = (
    ('cache', ('', 'host', 'device').__contains__, "'', 'host' or 'device'"),
    ('fraction', lambda value: 0 < value <= 1, 'a number above 0, at most 1'),
    ('num_threads max_unreadable', _from_0, '0 or more'),
    ('num_workers', lambda value: value >= -1, '-1 or more'),
)
_OPTIM_CHECKS = (
    ('schedule', ('plateau', 'epochs').__contains__, "'plateau' or 'epochs'"),
    ('learning_rate bias_rate weight_decay bias_decay', _from_0, 'a number of 0 or more'),
    ('trust_coefficient warmup_epochs max_drops min_delta', _from_0, 'a number of 0 or more'),
    ('momentum', lambda value: 0 <= value < 1, 'a number from 0 up to, not including, 1'),
    ('drop_factor', lambda value: 0 < value <= 1, 'a number above 0, at most 1'),
    ('patience', lambda value: value >= 1, '1 or more'),
)


def _check_values(checks: Sequence[_Check], values: Mapping[str, Any], text: str) -> None:
    """Raises UserError for the first value that fails its check; text: of a key and its value, '{}={!r}'."""
    for keys, is_right, expected in checks:
        for key in keys.split():
            if key in values and not is_right(values[key]):
                raise UserError(f'{text.format(key, values[key])}; expected {expected}.')


def model_from_config(fields: dict[str, Any]) -> AlexNet:
    """The network a config's `model` describes, also when JSON has turned its tuples into lists.

    Raises:
      UserError: a key that is no attribute of the network, or a value that cannot be one.
    """
    for key in fields:
        if key not in MODEL_FIELDS:
            raise UserError(f'model.{key} is unknown.{did_you_mean(key, MODEL_FIELDS)}')
    network = AlexNet(**{key: to_tuples(value) for key, value in fields.items()})
    for name, kind in (('conv', ConvSpec), ('local', LocalSpec), ('dense', DenseSpec)):
        rows = getattr(network, name)
        if not isinstance(rows, tuple):
            raise UserError(f'model.{name}={rows!r}; expected a tuple of rows ({", ".join(kind._fields)}).')
        for row in rows:
            if not isinstance(row, tuple) or len(row) != len(kind._fields):
                raise UserError(f'model.{name} has the row {row!r}; expected {", ".join(kind._fields)}.')
            _check_values(_LAYER_CHECKS, kind(*row)._asdict(), f'{{}} in model.{name} is {{!r}}')
    _check_values(_MODEL_CHECKS, vars(network), 'model.{} is {!r}')
    if network.pool_stride > network.pool_window:
        raise UserError(
            f'model.pool_stride={network.pool_stride} leaves gaps between windows of {network.pool_window} px.'
        )
    if network.dtype == 'float64' and not jax.config.jax_enable_x64:
        raise UserError("model.dtype='float64' takes jax.enable_x64; expected float32 or bfloat16.")
    return network


def to_tuples(value):
    """Lists, as JSON gives them, as the tuples that they were."""
    return tuple(map(to_tuples, value)) if isinstance(value, list | tuple) else value


def augmentation_from_config(fields: dict[str, Any]) -> Augmentation:
    """The augmentation in a config's `data`, also when JSON has turned its tuples into lists; other keys are ignored.

    Raises:
      UserError: a value outside its range.
    """
    augmentation = Augmentation(**{key: to_tuples(fields[key]) for key in Augmentation._fields if key in fields})
    _check_values(_AUGMENTATION_CHECKS, augmentation._asdict(), 'data.{}={!r}')
    area = augmentation.crop_area
    if area and not augmentation.random_crop:
        raise UserError(f'data.crop_area={area} draws crops; use data.crop_area=() with data.random_crop=False.')
    if area and augmentation.mean != 'channel':
        raise UserError(
            f'data.mean={augmentation.mean!r}, but data.crop_area changes the scale, where no pixel has a mean of its '
            "own; use data.mean='channel'."
        )
    return augmentation


def _keys(checks: Sequence[_Check]) -> list[str]:
    return [key for keys, _, _ in checks for key in keys.split()]


_KEYS = {  # of every config; the values are explained in configs/paper.py
    '': (
        *_keys(_RUN_CHECKS), 'grad_accum_steps', 'num_epochs', 'init_from', 'init_fresh', 'debug', 'deterministic',
        'data', 'model', 'mesh', 'optim',
    ),
    'data.': ('path', *_keys(_DATA_CHECKS), *Augmentation._fields),
    'mesh.': ('data', 'tower'),
    'optim.': (*_keys(_OPTIM_CHECKS), 'rate_in_velocity', 'layer_rates', 'layer_decays', 'stages'),
}  # fmt: skip


def network_and_augmentation(config: ConfigDict) -> tuple[AlexNet, Augmentation]:
    """A config's network and augmentation, without looking at data or devices. Raises UserError."""
    _check_keys(config)
    _check_values(_RUN_CHECKS, config, '{}={!r}')
    _check_values(_DATA_CHECKS, config.data, 'data.{}={!r}')
    if config.num_steps == 0 and not 0 < config.num_epochs < math.inf:
        raise UserError(
            f'num_epochs={config.num_epochs}, num_steps={config.num_steps}; expected one of them above 0, and finite.'
        )
    if config.mesh.tower not in (1, 2):
        raise UserError(f'mesh.tower={config.mesh.tower}; the network has 1 tower or 2.')
    if config.init_fresh and not config.init_from:
        raise UserError(
            f'init_fresh={config.init_fresh} names layers to draw anew, but init_from is empty; set it, or drop '
            'init_fresh.'
        )
    if config.data.cache == 'device' and config.data.crop_area:
        raise UserError("data.cache='device' cannot resize; use data.cache='host' with data.crop_area.")
    return model_from_config(config.model), augmentation_from_config(config.data)


def _check_keys(config: ConfigDict) -> None:
    """Raises UserError for an unknown or a missing key. `model_from_config` checks those of `model`."""
    for prefix, known in _KEYS.items():
        given = config[prefix[:-1]].keys() if prefix else config.keys()
        for key in given:
            if key not in known:
                raise UserError(f'unknown config key {prefix + key!r}.{did_you_mean(key, known)}')
        for key in known:
            if key not in given:
                raise UserError(f'the config has no {prefix + key!r}; copy it from configs/paper.py.')


def optimizer_from_config(
    fields: dict[str, Any], *, steps_per_epoch: float, layers: Sequence[str], **hooks
) -> optim.Optimizer:
    """The update that a config's `optim` describes.

    Args:
      fields: the keys of `optim.make_optimizer`; others are left to the caller.
      steps_per_epoch: updates a pass takes; need not be whole.
      layers: names of the network's layers.
      **hooks: `trust_ratio` and `rate_factor` of `optim.make_optimizer`.

    Raises:
      UserError: an unknown schedule or layer, or a value outside its range.
    """
    _check_values(_OPTIM_CHECKS, fields, 'optim.{}={!r}')
    for key in ('layer_rates', 'layer_decays'):
        _check_rows(key, fields[key], 2, layers)
    if fields['schedule'] == 'epochs':
        stages, plateau = _check_stages(fields['stages'], layers), None
    else:
        factors = [fields['drop_factor'] ** i for i in range(fields['max_drops'] + 1)]
        stages = [optim.Stage(0.0, factor, factor) for factor in factors]
        plateau = optim.Plateau(*(fields[key] for key in optim.Plateau._fields))
    unchanged = ('learning_rate', 'bias_rate', 'momentum', 'rate_in_velocity', 'weight_decay', 'bias_decay')
    return optim.make_optimizer(
        stages,
        **{key: fields[key] for key in unchanged},
        layer_rates=dict(fields['layer_rates']),
        layer_decays=dict(fields['layer_decays']),
        steps_per_epoch=steps_per_epoch,
        plateau=plateau,
        **hooks,
    )


def _check_stages(stages, layers: Sequence[str]) -> list[optim.Stage]:
    for row in stages:
        if not isinstance(row, tuple | list) or len(row) != 4 or not _are_numbers(row[:3], 3, least=0):
            raise UserError(
                f'optim.stages has the row {row!r}; expected (first epoch, factor for weights, factor for biases, '
                'layers with factors of their own).'
            )
        _check_rows('stages', row[3], 3, layers)
    starts = [row[0] for row in stages]
    if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
        raise UserError(f'optim.stages begins at the epochs {starts}; expected rising ones from 0.')
    return [optim.Stage(*row) for row in stages]


def _check_rows(key: str, rows, length: int, layers: Sequence[str]) -> None:
    for row in rows if isinstance(rows, tuple | list) else [rows]:
        if not isinstance(row, tuple | list) or not _are_numbers(row[1:], length - 1, least=0):
            raise UserError(f'optim.{key} has {row!r}; expected a layer and {length - 1} factor(s) of 0 or more.')
        if row[0] not in layers:
            raise UserError(f'optim.{key} names a layer {row[0]!r}.{did_you_mean(str(row[0]), layers)}')
    names = [row[0] for row in rows]
    if len(set(names)) < len(names):
        raise UserError(f'optim.{key} names a layer twice: {", ".join(names)}.')
