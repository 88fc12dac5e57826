"""Checks of the network's attributes, which are also those of a config's `model`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from alexnet_jax.core.architecture import INIT_PATTERN, KINDS, LayerSpec, parse_name
from alexnet_jax.utils.checks import are_numbers, check_values, is_fraction, is_number, is_positive_int
from alexnet_jax.utils.errors import UserError

LAYER_CHECKS = (
    ('features kernel stride groups', is_positive_int, 'a positive integer'),
    ('padding', lambda value: are_numbers(value, 2, minimum=0, kind=int), 'a pair of integers (before, after)'),
    ('bias', is_number, 'a number'),
    ('init', lambda value: INIT_PATTERN.fullmatch(str(value)) is not None, "'normal(STD)' with STD >= 0, or 'fan_in'"),
    ('post', lambda value: isinstance(value, str), "names of operations, such as 'relu lrn pool'"),
)
MODEL_CHECKS = (
    ('num_classes pool_window pool_stride norm_groups', is_positive_int, 'a positive integer'),
    ('lrn_n spatial_n', lambda value: is_positive_int(value) and value < 1000, 'an integer from 1 to 999'),
    ('lrn_k spatial_k', lambda value: is_number(value) and value > 0, 'a positive number'),
    ('lrn_alpha lrn_beta spatial_alpha spatial_beta', is_number, 'a number'),
    ('dropout_rate', is_fraction, 'a number of at least 0 and below 1'),
    ('lrn_alpha_over_n dropout_inverted', lambda value: isinstance(value, bool), 'True or False'),
    ('dtype', ('float32', 'bfloat16', 'float64').__contains__, 'one of float32, bfloat16, float64'),
)


def check_layers(layers: Any) -> None:
    """Raises UserError if `layers` are not layer specs by name."""
    if not isinstance(layers, Mapping) or not layers:
        raise UserError(f"model.layers={layers!r}: expected layers by name, such as {{'fc1': DenseSpec()}}.")
    for name, spec in layers.items():
        kind = KINDS[parse_name(name)[0]].__name__
        if not isinstance(spec, LayerSpec):
            raise UserError(f'model.layers.{name}={spec!r}: expected a {kind} of alexnet_jax.core.architecture.')


def check_network(network: Any) -> None:
    """Raises UserError for an invalid attribute of an `AlexNet` or of one of its layers."""
    check_values(MODEL_CHECKS, _plain(vars(network)), 'model.{}={!r}')
    for name, spec in network.layers.items():
        check_values(LAYER_CHECKS, _plain(vars(spec)), f'model.layers.{name}.{{}}={{!r}}')


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()}
