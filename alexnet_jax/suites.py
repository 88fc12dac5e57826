"""The paper's comparisons as plain lists of config differences. Add your own: a list of arms, and its name in `SUITES`.

An arm's `changes` are {config key: value}; where a value is a function, it is called with the base config. Numbers of
the paper and of the authors' log are points of (top-1, top-5) error by which the arm is worse than the one it stands
against; None: not stated. `sign` is what the paper or the log says: +1, the arm is worse.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from alexnet_jax import cifar

Points = tuple[float | None, float | None]


class Arm(NamedTuple):
    """One network, trained with several seeds."""

    name: str
    changes: dict[str, Any]
    against: str = ''  # the arm it is compared with
    paper: Points = (None, None)  # differences, or where `against` is empty: the error itself
    log: Points = (None, None)  # the same of the authors' training diaries
    sign: int = 0  # of the difference, where one is claimed
    measure: str = 'top1_error'  # what the sign is about
    source: str = ''


def changed(base: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """A copy of a config with an arm's changes."""
    config = ConfigDict(base.to_dict())
    values = {key: value(base) if callable(value) else value for key, value in changes.items()}
    config.update_from_flattened_dict(values)
    return config


def _without(*steps: str) -> Callable[[ConfigDict], tuple]:
    """The convolutions without some of what follows them."""

    def rows(base):
        return tuple((*row[:-1], ' '.join(s for s in row[-1].split() if s not in steps)) for row in base.model.conv)

    return rows


def _halved(base: ConfigDict) -> tuple:
    *lower, last = base.model.conv
    return (*((row[0] // 2, *row[1:4], 1, *row[5:]) for row in lower), (*last[:4], 1, *last[5:]))


def _closer(base: ConfigDict) -> tuple:
    """`layers-147.cfg`: later layers that pool lose a pixel of padding, so that the maps keep their sizes."""
    first, *rest = base.model.conv
    less = lambda row: (*row[:3], tuple(max(0, px - 1) for px in row[3]), *row[4:])  # noqa: E731
    return (first, *(less(row) if 'pool' in row[-1].split() else row for row in rest))


def _apart(base: ConfigDict) -> tuple:
    """Net 150: the second layer a quarter wider, all but the first in two groups."""
    first, second, *rest = base.model.conv
    second = (second[0] * 5 // 4, *second[1:])
    return (first, *((*row[:4], 2, *row[5:]) for row in (second, *rest)))


def _dense_apart(base: ConfigDict) -> tuple:
    """Net 150: the first fully-connected layer twice as wide."""
    return tuple((row[0] * (1 if i else 2), 2, *row[2:]) for i, row in enumerate(base.model.dense))


def _six(base: ConfigDict) -> tuple:
    last = base.model.conv[-1]
    return (*base.model.conv, (last[0], 3, 1, (1, 1), 1, last[5], last[6], 'relu'))


def without_layer(index: int) -> Callable[[ConfigDict], tuple]:
    """The convolutions without one. Its stride goes to the layer after it, its pooling to the one before it.

    So maps keep their sizes above; of the first layer both go to the second, and the spread of the weights that suits
    pixels. Without the third layer no convolution reads both towers. The paper does not say how it was done.
    """

    def rows(base):
        rows = [list(row) for row in base.model.conv]
        gone = rows.pop(index)
        if index < len(rows):
            rows[index][2] *= gone[2]
        rows[0][4] = 1  # the image is not in two groups
        if index == 0:
            rows[0][5] = gone[5]
        heir = rows[max(index - 1, 0)]
        heir[-1] = ' '.join([heir[-1], *(['pool'] * gone[-1].split().count('pool'))])
        return tuple(tuple(row) for row in rows)

    return rows


def _removed(index: int, middle: bool) -> Arm:
    paper, source = ((2.0, None), 'section 7, "about 2%"') if middle else ((None, None), 'section 1, "inferior"')
    return Arm(f'without conv {index + 1}', {'model.conv': without_layer(index)}, 'base', paper, sign=1, source=source)


NO_NORMALISATION = {'model.conv': _without('lrn', 'spatial_norm')}
NON_OVERLAPPING = {'model.pool_window': lambda base: base.model.pool_stride, 'model.conv': _closer}
ONE_GPU = {'model.conv': _halved, 'model.norm_groups': 1, 'mesh.tower': 1}
NO_COMMUNICATION = {'model.conv': _apart, 'model.dense': _dense_apart}
SIXTH_CONV = {'model.conv': _six}


def ablations(base: ConfigDict) -> list[Arm]:
    """What the paper says each of its parts is worth, and the network without it."""
    return [
        Arm('base', {}, paper=(40.7, 18.2), log=(40.66, 18.21), source='table 2, ten views, all of ImageNet'),
        Arm('no normalisation', NO_NORMALISATION, 'base', (1.4, 1.2), (1.37, 1.15), 1, source='section 3.3; net 148'),
        Arm('non-overlapping pooling', NON_OVERLAPPING, 'base', (0.4, 0.3), (0.39, 0.30), 1, source='3.4; net 147'),
        Arm('one GPU, half the kernels', ONE_GPU, 'base', (1.7, 1.2), (1.70, 1.23), 1, source='3.2; net 145-half'),
        Arm('towers that do not talk', NO_COMMUNICATION, 'base', log=(1.16, 1.12), sign=1, source='net 150'),
        Arm('no dropout', {'model.dropout_rate': 0.0}, 'base', sign=1, source='section 4.2, "substantial overfitting"'),
        Arm(
            'no crops or reflections',
            {'data.random_crop': False, 'data.reflect': False},
            'base',
            sign=1,
            source='section 4.1, "substantial overfitting"',
        ),
        Arm('no colour', {'data.colour_std': 0.0}, 'base', (1.0, None), sign=1, source='section 4.1, "over 1%"'),
        *(_removed(i, middle=0 < i < len(base.model.conv) - 1) for i in range(len(base.model.conv))),
        Arm('sixth conv layer', SIXTH_CONV, 'base', source='section 6, with pre-training only'),
        Arm(
            'no weight decay',
            {'optim.weight_decay': 0.0},
            'base',
            sign=1,
            measure='train_error',
            source='section 5, "reduces the training error"',
        ),
    ]  # fmt: skip


def cifar10(base: ConfigDict) -> list[Arm]:
    """The CIFAR-10 networks with the errors that their files promise, in percent."""
    without = 'section 3.3, 13% without normalisation; the name layers-conv-local-13pct.cfg'
    pair = 'section 3.3, 11% with normalisation; local 3 is wider, and fc 5 has another decay, too'
    return [
        Arm('80sec', cifar.NETS['80sec'], log=(26.0, None), source='the head of layers-80sec.cfg'),
        Arm('19pct', cifar.NETS['19pct'], log=(19.0, None), source='the name layers-19pct.cfg'),
        Arm('18pct', cifar.NETS['18pct'], log=(18.0, None), source='the name layers-18pct.cfg'),
        Arm('13pct', cifar.NETS['13pct'], paper=(13.0, None), log=(13.0, None), source=without),
        Arm('11pct', cifar.NETS['11pct'], '13pct', paper=(-2.0, None), sign=-1, source=pair),
    ]


def base_alone(base: ConfigDict) -> list[Arm]:
    """The base as the only arm, of `ensemble` and `views`: they differ in what is done with its outputs."""
    return [Arm('base', {}, paper=(40.7, 18.2), log=(40.66, 18.21), source='table 2, ten views, all of ImageNet')]


SUITES: dict[str, Callable[[ConfigDict], list[Arm]]] = {
    'ablations': ablations,
    'cifar10': cifar10,
    'ensemble': base_alone,
    'views': base_alone,
}
