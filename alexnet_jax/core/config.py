"""Builds the objects of core/ from the sections of a config (see configs/paper.py) and checks every value."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from alexnet_jax.core import checks, optim
from alexnet_jax.core.architecture import KINDS, LayerSpec, parse_name, sort_layers
from alexnet_jax.core.augment import Augmentation
from alexnet_jax.core.model import AlexNet
from alexnet_jax.utils.checks import (
    are_numbers,
    check_values,
    is_fraction,
    is_nonnegative,
    is_nonnegative_int,
    is_number,
    is_positive_int,
)
from alexnet_jax.utils.errors import UserError, did_you_mean

_NOT_KEYS = ('parent', 'name', 'tower_axis', 'dense_axis')
MODEL_FIELDS = tuple(f.name for f in dataclasses.fields(AlexNet) if f.name not in _NOT_KEYS)


def _is_crop_area(value: Any) -> bool:
    return value == () or (are_numbers(value, 2, maximum=1) and 0 < value[0] <= value[1])


_AUGMENTATION_CHECKS = (
    ('image_size draw_every', is_positive_int, 'a positive integer'),
    ('crop_area', _is_crop_area, '() or (min, max), with 0 < min <= max <= 1'),
    ('mean', ('crop', 'center', 'channel').__contains__, "'crop', 'center' or 'channel'"),
    ('pixel_std', lambda value: are_numbers(value, 3) and min(value) > 0, 'three positive numbers'),
    ('color_std color_epochs', is_nonnegative, 'a number of 0 or more'),
    ('color_scale', ('eigenvalue', 'std').__contains__, "'eigenvalue' or 'std'"),
)
OPTIM_CHECKS = (
    ('schedule', ('plateau', 'epochs', 'cosine', 'poly').__contains__, "'plateau', 'epochs', 'cosine' or 'poly'"),
    ('learning_rate bias_rate weight_decay bias_decay', is_nonnegative, 'a number of 0 or more'),
    ('trust_coefficient warmup_epochs min_delta', is_nonnegative, 'a number of 0 or more'),
    ('max_drops', is_nonnegative_int, 'an integer of 0 or more'),
    ('momentum label_smoothing average_decay warmup_start', is_fraction, 'a number of at least 0 and below 1'),
    ('drop_factor', lambda value: is_number(value, maximum=1) and value > 0, 'a number above 0 and at most 1'),
    ('patience', is_positive_int, 'a positive integer'),
)


def model_from_config(fields: Mapping[str, Any] | ConfigDict) -> AlexNet:
    """Returns the network described by a config's `model`. Tuples may be lists, as in a config read from JSON.

    Raises UserError for a key that is not an attribute of `AlexNet`, or for an invalid value.
    """
    for key in fields:
        if key not in MODEL_FIELDS:
            raise UserError(f"unknown config key 'model.{key}'.{did_you_mean(key, MODEL_FIELDS)}")
    check_values(checks.MODEL_CHECKS, fields, 'model.{}={!r}')
    fields = {**fields}  # not `dict(fields)`: a list is no config
    if 'layers' in fields:
        fields['layers'] = _layers_from_config(fields['layers'])
    network = AlexNet(**fields)
    if network.pool_stride > network.pool_window:
        raise UserError(
            f'model.pool_stride={network.pool_stride}: expected at most model.pool_window={network.pool_window}; a '
            'larger stride leaves gaps between windows.'
        )
    if network.dtype == 'float64' and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]  # set at run time
        raise UserError("model.dtype='float64': needs jax.enable_x64; set it, or use float32 or bfloat16.")
    return network


def _layers_from_config(layers: Mapping[str, Mapping[str, Any]] | ConfigDict) -> dict[str, LayerSpec]:
    layers = layers.to_dict() if isinstance(layers, ConfigDict) else layers
    if not isinstance(layers, dict) or not layers or not all(isinstance(layer, dict) for layer in layers.values()):
        raise UserError(f'model.layers={layers!r}: expected a dict of layers by name, see configs/paper.py.')
    specs, names = {}, sort_layers(layers)
    for name in names:
        if name == names[-1] and parse_name(name)[0] != 'fc':
            raise UserError(f'model.layers ends with {name}: expected a fully connected classifier, such as fc8.')
        kind, given = KINDS[parse_name(name)[0]], layers[name]
        known = {field.name: field for field in dataclasses.fields(kind)}
        if name == names[-1]:
            del known['features']  # `num_classes` is used instead
        for key in given.keys() - known.keys():
            hint = ' Use model.num_classes.' if key == 'features' else did_you_mean(key, known)
            raise UserError(f"unknown config key 'model.layers.{name}.{key}'.{hint}")
        for key in {'features', 'kernel'} & known.keys() - given.keys():
            raise UserError(f"missing config key 'model.layers.{name}.{key}'; see configs/paper.py.")
        check_values(checks.LAYER_CHECKS, given, f'model.layers.{name}.{{}}={{!r}}')
        specs[name] = kind(**{key: to_tuples(value) for key, value in given.items()})
    return specs


def to_tuples(value: Any) -> Any:
    """Converts lists to tuples, recursively: JSON stores tuples as lists."""
    if isinstance(value, dict):
        return {key: to_tuples(part) for key, part in value.items()}
    return tuple(map(to_tuples, value)) if isinstance(value, list | tuple) else value


def augmentation_from_config(fields: dict[str, Any]) -> Augmentation:
    """Returns the augmentation in a config's `data`; ignores other keys. Raises UserError for an invalid value."""
    augmentation = Augmentation(**{key: to_tuples(x) for key, x in fields.items() if key in Augmentation._fields})
    check_values(_AUGMENTATION_CHECKS, augmentation._asdict(), 'data.{}={!r}')
    area = augmentation.crop_area
    if area and not augmentation.random_crop:
        raise UserError(f'data.crop_area={area}: expected () because of data.random_crop=False.')
    if area and augmentation.mean != 'channel':
        raise UserError(
            f"data.mean={augmentation.mean!r}: expected 'channel' with data.crop_area, because rescaled crops do not "
            'match the pixels of the mean image.'
        )
    return augmentation


def optimizer_from_config(
    fields: dict[str, Any],
    *,
    steps_per_epoch: float,
    layers: Sequence[str],
    decay: Callable[[optim.DecayTable], Any] = optim.add_decays,
    factor: Callable[[jax.Array], jax.Array] | None = None,
    average: Any = None,
) -> optim.Optimizer:
    """Returns the optimizer described by a config's `optim`. Raises UserError for an invalid value.

    Args:
      fields: see configs/paper.py; keys that this function does not read are ignored.
      steps_per_epoch: updates per epoch; may be fractional.
      layers: names of the network's layers.
      decay: makes the transformation before the learning rate, see `optim.make_optimizer`.
      factor: maps the number of updates so far to a factor of every rate; None: 1.
      average: see `optim.make_optimizer`.
    """
    check_values(OPTIM_CHECKS, fields, 'optim.{}={!r}')
    for key in ('layer_rates', 'layer_decays'):
        _check_layer_rows(key, fields[key], 2, layers)
    if fields['schedule'] == 'epochs':
        stages, plateau = _check_stages(fields['stages'], layers), None
    elif fields['schedule'] in ('cosine', 'poly'):  # `factor` has the schedule
        stages, plateau = [optim.Stage(0.0, 1.0, 1.0)], None
    else:
        factors = [fields['drop_factor'] ** i for i in range(fields['max_drops'] + 1)]
        stages = [optim.Stage(0.0, factor, factor) for factor in factors]
        plateau = optim.Plateau(*(fields[key] for key in optim.Plateau._fields))
    rates = optim.RateTable(
        stages,
        fields['learning_rate'],
        steps_per_epoch,
        bias_rate=fields['bias_rate'],
        layer_rates=dict(fields['layer_rates']),
        plateau=plateau,
        factor=factor,
    )
    decays = optim.DecayTable(fields['weight_decay'], fields['bias_decay'], dict(fields['layer_decays']))
    options = {'momentum': fields['momentum'], 'rate_in_velocity': fields['rate_in_velocity'], 'average': average}
    return optim.make_optimizer(rates, decay(decays), **options)


def _check_stages(stages: Any, layers: Sequence[str]) -> list[optim.Stage]:
    for row in stages if isinstance(stages, tuple | list) else [stages]:
        if not isinstance(row, tuple | list) or len(row) != 4 or not are_numbers(row[:3], 3, minimum=0):
            raise UserError(
                f'optim.stages has the row {row!r}: expected (first epoch, factor for weights, factor for biases, '
                'overrides by layer).'
            )
        _check_layer_rows('stages', row[3], 3, layers)
    starts = [row[0] for row in stages]
    if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
        raise UserError(f'optim.stages starts at epochs {starts}: expected increasing epochs, the first of them 0.')
    return [optim.Stage(*row) for row in stages]


def _check_layer_rows(key: str, rows: Any, length: int, layers: Sequence[str]) -> None:
    for row in rows if isinstance(rows, tuple | list) else [rows]:
        if not isinstance(row, tuple | list) or not are_numbers(row[1:], length - 1, minimum=0):
            raise UserError(f'optim.{key} has {row!r}: expected a layer and {length - 1} factor(s) of 0 or more.')
        if row[0] not in layers:
            raise UserError(f'optim.{key} has an unknown layer {row[0]!r}.{did_you_mean(str(row[0]), layers)}')
    names = [row[0] for row in rows]
    if len(set(names)) < len(names):
        raise UserError(f'optim.{key} has a layer twice: {", ".join(names)}.')
