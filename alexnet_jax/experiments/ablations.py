"""The paper's comparisons as plain lists of config differences.

Add your own: a list of variants, and its name in `SUITES`. A variant's `changes` are {config key: value}; where a value
is a function, it is called with the base config. Numbers of the paper and of the authors' log are points of (top-1,
top-5) error by which the variant is worse than its baseline; None: not stated. `sign` is what the paper or the log
says: +1, the variant is worse.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from alexnet_jax.core.architecture import ConvSpec
from alexnet_jax.experiments.cifar10 import NETS

Points = tuple[float | None, float | None]


class Variant(NamedTuple):
    """One network, trained with several seeds."""

    name: str
    changes: dict[str, Any]
    baseline: str = ''  # the variant it is compared with
    paper: Points = (None, None)  # differences, or where `baseline` is empty: the error itself
    log: Points = (None, None)  # the same of the authors' training diaries
    sign: int = 0  # of the difference, where one is claimed
    measure: str = 'top1_error'  # what the sign is about
    source: str = ''


def with_changes(base: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """A copy of a config with a variant's changes."""
    config = ConfigDict(base.to_dict())
    values = {key: value(base) if callable(value) else value for key, value in changes.items()}
    config.update_from_flattened_dict(values)
    return config


def _conv_specs(base: ConfigDict) -> list[ConvSpec]:
    return [ConvSpec(*row) for row in base.model.conv]


def _rows(specs: list[ConvSpec]) -> tuple:
    """Layers as a config holds them."""
    return tuple(map(tuple, specs))


def _without(base: ConfigDict, *ops: str) -> tuple:
    """The convolutions with some of their post operations removed."""
    specs = _conv_specs(base)
    posts = [' '.join(op for op in spec.post.split() if op not in ops) for spec in specs]
    return _rows([spec._replace(post=post) for spec, post in zip(specs, posts, strict=True)])


def _halved(base: ConfigDict) -> tuple:
    *lower, last = _conv_specs(base)
    return _rows([*(spec._replace(features=spec.features // 2, groups=1) for spec in lower), last._replace(groups=1)])


def _closer(base: ConfigDict) -> tuple:
    """`layers-147.cfg`: later layers that pool lose a pixel of padding, so that the maps keep their sizes."""
    specs = _conv_specs(base)
    for i, spec in enumerate(specs[1:], 1):
        if 'pool' in spec.post.split():
            specs[i] = spec._replace(padding=tuple(max(0, px - 1) for px in spec.padding))
    return _rows(specs)


def _apart(base: ConfigDict) -> tuple:
    """Net 150: the second layer a quarter wider, all but the first in two groups."""
    first, second, *rest = _conv_specs(base)
    second = second._replace(features=second.features * 5 // 4)
    return _rows([first, *(spec._replace(groups=2) for spec in (second, *rest))])


def _dense_apart(base: ConfigDict) -> tuple:
    """Net 150: the first fully-connected layer twice as wide."""
    return tuple((row[0] * (1 if i else 2), 2, *row[2:]) for i, row in enumerate(base.model.dense))


def _six(base: ConfigDict) -> tuple:
    *lower, last = _conv_specs(base)
    return _rows([*lower, last, last._replace(kernel=3, stride=1, padding=(1, 1), groups=1, post='relu')])


def without_layer(index: int) -> Callable[[ConfigDict], tuple]:
    """The convolutions without one. Its stride goes to the layer after it, its pooling to the one before it.

    So maps keep their sizes above; of the first layer both go to the second, and the spread of the weights that suits
    pixels. Without the third layer no convolution reads both towers. The paper does not say how it was done.
    """

    def rows(base):
        specs = _conv_specs(base)
        gone = specs.pop(index)
        if index < len(specs):
            specs[index] = specs[index]._replace(stride=specs[index].stride * gone.stride)
        specs[0] = specs[0]._replace(groups=1)  # the image is not in two groups
        if index == 0:
            specs[0] = specs[0]._replace(init_std=gone.init_std)
        heir = max(index - 1, 0)
        post = ' '.join([specs[heir].post, *['pool'] * gone.post.split().count('pool')])
        specs[heir] = specs[heir]._replace(post=post)
        return _rows(specs)

    return rows


BASE = Variant('base', {}, paper=(40.7, 18.2), log=(40.66, 18.21), source='table 2, ten views, all of ImageNet')
NO_NORMALIZATION = {'model.conv': lambda base: _without(base, 'lrn', 'spatial_norm')}
NON_OVERLAPPING = {'model.pool_window': lambda base: base.model.pool_stride, 'model.conv': _closer}
ONE_GPU = {'model.conv': _halved, 'model.norm_groups': 1, 'mesh.tower': 1}
NO_COMMUNICATION = {'model.conv': _apart, 'model.dense': _dense_apart}
SIXTH_CONV = {'model.conv': _six}


def ablations(base: ConfigDict) -> list[Variant]:
    """What the paper says each of its parts is worth, and the network without it."""
    middle = {'paper': (2.0, None), 'source': 'section 7, "about 2%"'}
    outer = {'source': 'section 1, "inferior"'}
    claims = [middle if 0 < i < len(base.model.conv) - 1 else outer for i in range(len(base.model.conv))]
    removed = [
        Variant(f'without conv {i + 1}', {'model.conv': without_layer(i)}, 'base', sign=1, **claim)
        for i, claim in enumerate(claims)
    ]
    uncropped = {'data.random_crop': False, 'data.reflect': False}
    overfitting = 'section 4.1, "substantial overfitting"'
    no_decay = {'optim.weight_decay': 0.0}
    decay = 'section 5, "reduces the training error"'
    return [
        BASE,
        Variant('no normalization', NO_NORMALIZATION, 'base', (1.4, 1.2), (1.37, 1.15), 1, source='3.3; net 148'),
        Variant('non-overlapping pooling', NON_OVERLAPPING, 'base', (0.4, 0.3), (0.39, 0.30), 1, source='3.4; net 147'),
        Variant('one GPU, half the kernels', ONE_GPU, 'base', (1.7, 1.2), (1.70, 1.23), 1, source='3.2; net 145-half'),
        Variant('towers that do not talk', NO_COMMUNICATION, 'base', log=(1.16, 1.12), sign=1, source='net 150'),
        Variant('no dropout', {'model.dropout_rate': 0.0}, 'base', sign=1, source='4.2, "substantial overfitting"'),
        Variant('no crops or reflections', uncropped, 'base', sign=1, source=overfitting),
        Variant('no color', {'data.color_std': 0.0}, 'base', (1.0, None), sign=1, source='section 4.1, "over 1%"'),
        *removed,
        Variant('sixth conv layer', SIXTH_CONV, 'base', source='section 6, with pre-training only'),
        Variant('no weight decay', no_decay, 'base', sign=1, measure='train_error', source=decay),
    ]


def cifar10(base: ConfigDict) -> list[Variant]:
    """The CIFAR-10 networks with the errors that their files promise, in percent."""
    without = 'section 3.3, 13% without normalization; the name layers-conv-local-13pct.cfg'
    pair = 'section 3.3, 11% with normalization; local 3 is wider, and fc 5 has another decay, too'
    return [
        Variant('80sec', NETS['80sec'], log=(26.0, None), source='the head of layers-80sec.cfg'),
        Variant('19pct', NETS['19pct'], log=(19.0, None), source='the name layers-19pct.cfg'),
        Variant('18pct', NETS['18pct'], log=(18.0, None), source='the name layers-18pct.cfg'),
        Variant('13pct', NETS['13pct'], paper=(13.0, None), log=(13.0, None), source=without),
        Variant('11pct', NETS['11pct'], '13pct', paper=(-2.0, None), sign=-1, source=pair),
    ]


def base_alone(base: ConfigDict) -> list[Variant]:
    """The base as the only variant, of `ensemble` and `views`: they differ in what is done with its outputs."""
    return [BASE]


SUITES: dict[str, Callable[[ConfigDict], list[Variant]]] = {
    'ablations': ablations,
    'cifar10': cifar10,
    'ensemble': base_alone,
    'views': base_alone,
}
