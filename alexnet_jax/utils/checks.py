"""Checks of numbers, and of many values at once."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alexnet_jax.utils.errors import UserError

Check = tuple[str, Callable[[Any], bool], str]  # (keys separated by spaces, predicate, description of a valid value)


def is_number(value: Any, minimum: float = -1e300, maximum: float = 1e300, kind: Any = int | float) -> bool:
    """Returns whether a value is a finite number (with kind=int: an integer) within bounds."""
    return isinstance(value, kind) and not isinstance(value, bool) and minimum <= value <= maximum


def are_numbers(values: Any, count: int, **bounds: Any) -> bool:
    """Returns whether `values` is a tuple or list of `count` numbers within bounds."""
    is_row = isinstance(values, tuple | list) and len(values) == count
    return is_row and all(is_number(value, **bounds) for value in values)


is_nonnegative = functools.partial(is_number, minimum=0)
is_nonnegative_int = functools.partial(is_number, minimum=0, kind=int)
is_positive_int = functools.partial(is_number, minimum=1, kind=int)


def is_fraction(value: Any) -> bool:
    """Returns whether a value is a number of at least 0 and below 1."""
    return is_nonnegative(value) and value < 1


def check_values(checks: Sequence[Check], values: Mapping[str, Any], template: str) -> None:
    """Raises UserError for the first invalid value. `template` formats key and value, such as 'optim.{}={!r}'."""
    for keys, is_valid, expected in checks:
        for key in keys.split():
            if key in values and not is_valid(values[key]):
                raise UserError(f'{template.format(key, values[key])}: expected {expected}.')
