"""Decides how to train on a set of pictures from their number: pure functions. Every setting has a reason.

docs/own_pictures.md has the resulting table.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

MODES = ('auto', 'features', 'full')
_FEW = 1000  # training pictures up to which a linear classifier is the default
TEN_VIEWS = 200  # training pictures up to which features are of ten views; beyond, the fit would take minutes
_NARROW = 10_000  # training pictures below which a network from scratch is narrow
_ONE_SAVE = 500  # training pictures below which a run is saved and validated only at its end
_VAL_PICTURES = 40  # with fewer, an error of 20% has a confidence interval of more than 25 percentage points
_UPDATES = 500
_STAGES = ((0.0, 1.0), (2 / 3, 0.1), (13 / 15, 0.01))  # (fraction of the epochs, factor of the learning rate)


class Setting(NamedTuple):
    """A decision and its reason."""

    key: str  # of the config, or the name of a flag
    value: Any
    reason: str

    def __str__(self) -> str:
        prefix = '--' if self.key in ('mode', 'config', 'val_fraction') else '--config.'
        return f'{prefix}{self.key}={self.value}: {self.reason}'


def val_fraction(pictures: int) -> Setting:
    """Returns the fraction to set aside for validation: a tenth, more of a small set, and at most a third."""
    fraction = round(min(1 / 3, max(0.1, _VAL_PICTURES / pictures)), 3)
    return Setting('val_fraction', fraction, f'{pictures} pictures; with few val pictures the error says little')


def network(train: int) -> Setting:
    """Returns the config for training from scratch."""
    if train < _NARROW:
        return Setting('config', 'tiny_imagenet', f'a narrow network for 64 px, because {train} pictures are few')
    reason = f"the paper's network, because there are {train} training pictures; it needs a GPU"
    return Setting('config', 'finetune:scratch', reason)


def mode(wanted: str, train: int, *, trained: bool, given: Collection[str]) -> Setting:
    """Returns 'features' or 'full'.

    Args:
      wanted: one of `MODES`.
      train: number of training pictures.
      trained: whether there are trained weights to start from.
      given: config options on the command line, which only 'full' can follow.
    """
    if wanted != 'auto':
        return Setting('mode', wanted, 'as given')
    if not trained:
        return Setting('mode', 'full', 'there are no trained weights')
    if given:
        return Setting('mode', 'full', f'--{min(given)} is for training all layers')
    if train <= _FEW:
        return Setting(
            'mode', 'features', f'{train} training pictures are few: only a new last layer is fitted; --mode=full '
            'trains all layers'
        )  # fmt: skip
    return Setting('mode', 'full', f'{train} training pictures suffice to train all layers')


def schedule(train: int, *, trained: bool, given: Mapping[str, Any]) -> list[Setting]:
    """Returns the settings of a run that trains all layers, without those in `given`, which the others follow.

    Args:
      train: number of training pictures.
      trained: whether the run starts from trained weights.
      given: values of config keys, such as {'num_epochs': 10.0}.
    """
    found: list[Setting] = []

    def choose(key: str, value: Any, reason: str) -> Any:
        if key in given:
            return given[key]
        found.append(Setting(key, value, reason))
        return value

    largest, rate = (64, 0.001) if trained else (128, 0.01)
    batch = choose(
        'batch_size', _batch_size(train, largest), f'a power of two up to an eighth of the pictures, but 8 to {largest}'
    )
    per_epoch = train / max(1, batch)  # values below 1 are refused later
    choose(
        'optim.learning_rate', rate * batch / largest, f'{rate:g} for batches of {largest}, in proportion to the batch'
    )
    if given.get('num_steps'):
        epochs = given['num_steps'] / per_epoch
    else:
        least = 30 if trained else 60
        epochs = float(max(least, math.ceil(_UPDATES / per_epoch)))
        epochs = choose('num_epochs', epochs, f'{_UPDATES} updates, but at least {least} epochs')
    epochs = epochs if 0 < epochs < 1e9 else 1.0  # other values are refused later
    total = math.ceil(epochs * per_epoch)
    if given.get('optim.schedule', 'epochs') == 'epochs':
        stages = tuple((round(part * epochs, 2), factor, factor, ()) for part, factor in _STAGES)
        choose('optim.stages', stages, 'the rate drops after 2/3 and 13/15 of the epochs')
    if train < _ONE_SAVE:
        every, reason = total, 'once, at the end: no step is chosen by its error on few val pictures'
    else:
        every = max(math.ceil(per_epoch), math.ceil(total / 20))
        reason = 'once per epoch, but at most 20 times'
    choose('eval_every_steps', every, reason)
    choose('checkpoint_every_steps', every, 'as often as validated')
    choose('log_every_steps', max(math.ceil(per_epoch), math.ceil(total / 20)), 'once per epoch, but at most 20 times')
    return found


def _batch_size(train: int, largest: int) -> int:
    """Returns the largest power of two that makes at least 8 batches, within 8 and `largest`."""
    return min(largest, max(8, 2 ** int(math.log2(max(1, train / 8)))))
