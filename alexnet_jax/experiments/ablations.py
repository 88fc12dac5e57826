"""Suites of network variants. A variant is a set of changes to a base config.

To add a suite, write a function that returns its variants and add it to `SUITES`. `Variant.changes` maps config keys to
values; a callable value is called with the base config. `paper` and `log` are the differences in (top-1, top-5) error
from the baseline that the paper and the authors' training logs state, in percentage points; None: not stated. `sign` is
the sign of the claimed difference: +1 if the variant has the larger error.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from alexnet_jax.core.architecture import parse_name, sort_layers
from alexnet_jax.experiments.cifar10 import ACTIVATIONS, NETS, RATES, Layers, figure1_changes
from alexnet_jax.utils.errors import UserError

Points = tuple[float | None, float | None]


class Variant(NamedTuple):
    """One network of a suite. It is trained with several seeds."""

    name: str
    changes: dict[str, Any]
    baseline: str = ''  # name of the variant to compare with; '': none
    paper: Points = (None, None)  # difference from the baseline; without a baseline, the error itself
    log: Points = (None, None)  # the same, from the authors' training logs
    sign: int = 0  # 0: no claim
    measure: str = 'top1_error'  # measurement that is compared
    source: str = ''


def with_changes(base: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """Returns a copy of the base config with the changes of a variant applied."""
    config = ConfigDict(base.to_dict())
    values = {key: value(base) if callable(value) else value for key, value in changes.items()}
    config.update_from_flattened_dict(values)
    return config


def _layers(base: ConfigDict) -> tuple[Layers, list[str]]:
    """Returns a copy of the config's layers and the names of its convolutions in order."""
    layers = base.model.layers.to_dict()
    return layers, [name for name in sort_layers(layers) if parse_name(name)[0] == 'conv']


def _without_ops(base: ConfigDict, *ops: str) -> Layers:
    """Returns the layers with the named operations removed from every `post`."""
    layers, _ = _layers(base)
    for layer in layers.values():
        layer['post'] = ' '.join(op for op in layer['post'].split() if op not in ops)
    return layers


def _half_kernels(base: ConfigDict) -> Layers:
    """Footnote 2 of the paper: half the kernels in every convolution except the last, and no groups."""
    layers, convs = _layers(base)
    for name in convs:
        layers[name] |= {'groups': 1, 'features': layers[name]['features'] // (1 if name == convs[-1] else 2)}
    return layers


def _less_padding(base: ConfigDict) -> Layers:
    """`layers-147.cfg`: one pixel less padding in pooled convolutions after conv1, which preserves the map sizes."""
    layers, convs = _layers(base)
    for name in convs[1:]:
        if 'pool' in layers[name]['post'].split():
            layers[name]['padding'] = tuple(max(0, px - 1) for px in layers[name]['padding'])
    return layers


def _separate_towers(base: ConfigDict) -> Layers:
    """Net 150: two groups in all layers but conv1 and the classifier; conv2 1.25 times and fc6 twice as wide."""
    layers, convs = _layers(base)
    hidden = sort_layers(layers)[len(convs) : -1]
    layers[convs[1]]['features'] = layers[convs[1]]['features'] * 5 // 4
    layers[hidden[0]]['features'] *= 2
    for name in (*convs[1:], *hidden):
        layers[name]['groups'] = 2
    return layers


def _sixth_conv(base: ConfigDict) -> Layers:
    """Adds a 3x3 convolution after the last pooling. It is as wide as the last convolution and reads both towers."""
    layers, convs = _layers(base)
    changes = {'kernel': 3, 'stride': 1, 'padding': (1, 1), 'groups': 1, 'post': 'relu'}
    layers[f'conv{parse_name(convs[-1])[1] + 1}'] = {**layers[convs[-1]], **changes}
    return layers


def without_layer(name: str) -> Callable[[ConfigDict], Layers]:
    """Returns a change that removes one convolution.

    Its stride moves to the next convolution and its pooling to the previous one, which preserves the map sizes of later
    layers. If the first convolution is removed, the second one gets both, and the first one's initializer, whose scale
    suits pixels. Without conv3, no convolution reads both towers. The paper does not say how layers were removed.
    """

    def change(base):
        layers, convs = _layers(base)
        index, removed = convs.index(name), layers.pop(name)
        convs.remove(name)
        first, previous = layers[convs[0]], layers[convs[max(index - 1, 0)]]
        if index < len(convs):
            layers[convs[index]]['stride'] *= removed['stride']
        first['groups'] = 1  # the image channels are not grouped
        if index == 0:
            first['init'] = removed['init']
        previous['post'] += ' pool' * removed['post'].split().count('pool')
        return layers

    return change


def _without_rates(name: str) -> dict[str, Callable[[ConfigDict], tuple]]:
    """Returns changes that remove a layer from the per-layer learning rates and weight decays."""

    def drop(rows):
        return tuple(row for row in rows if row[0] != name)

    return {
        'optim.layer_rates': lambda base: drop(base.optim.layer_rates),
        'optim.layer_decays': lambda base: drop(base.optim.layer_decays),
        'optim.stages': lambda base: tuple((*stage[:3], drop(stage[3])) for stage in base.optim.stages),
    }


BASE = Variant('base', {}, paper=(40.7, 18.2), log=(40.66, 18.21), source='table 2, ten views, all of ImageNet')
NO_NORMALIZATION = {'model.layers': lambda base: _without_ops(base, 'lrn', 'spatial_norm')}
NON_OVERLAPPING = {'model.pool_window': lambda base: base.model.pool_stride, 'model.layers': _less_padding}
ONE_GPU = {'model.layers': _half_kernels, 'model.norm_groups': 1, 'mesh.tower': 1}
NO_COMMUNICATION = {'model.layers': _separate_towers}
SIXTH_CONV = {'model.layers': _sixth_conv}

# Parts of a later recipe, see configs/modern.py.
COSINE = {
    'optim.schedule': 'cosine',
    'optim.stages': (),
    'optim.warmup_epochs': lambda base: base.num_epochs / 24,  # 5 of 120
}
MIXED_LABELS = {'data.mixup_alpha': 0.2, 'optim.label_smoothing': 0.1}
MODERN = {**COSINE, **MIXED_LABELS, 'optim.average_decay': 0.999, 'optim.weight_decay': 1e-4}


def ablations(base: ConfigDict) -> list[Variant]:
    """Returns the paper's comparisons: the base network, and networks without one of its parts."""
    layers, convs = _layers(base)
    if len(convs) < 2:
        raise UserError(
            f'ablations: expected a base with at least two convolutions, got {len(convs)}; use another --base.'
        )
    separate = Variant(
        'towers without communication', NO_COMMUNICATION, 'base', log=(1.16, 1.12), sign=1, source='net 150'
    )
    removed = []
    for name in convs:
        changes = {'model.layers': without_layer(name), **_without_rates(name)}
        claim: dict[str, Any] = {'paper': (2.0, None), 'source': 'section 7, "about 2%"'}
        if name in (convs[0], convs[-1]):
            claim = {'source': 'section 1, "inferior"'}
        removed.append(Variant(name.replace('conv', 'without conv '), changes, 'base', sign=1, **claim))
    no_crops = {'data.random_crop': False, 'data.reflect': False}
    no_decay = {'optim.weight_decay': 0.0}
    decay_claim = 'section 5, "reduces the training error"'
    return [
        BASE,
        Variant('no normalization', NO_NORMALIZATION, 'base', (1.4, 1.2), (1.37, 1.15), 1, source='3.3; net 148'),
        Variant('non-overlapping pooling', NON_OVERLAPPING, 'base', (0.4, 0.3), (0.39, 0.30), 1, source='3.4; net 147'),
        Variant('one GPU (half the kernels)', ONE_GPU, 'base', (1.7, 1.2), (1.70, 1.23), 1, source='3.2; net 145-half'),
        *([separate] if len(layers) > len(convs) + 1 else []),  # separate towers need a hidden layer
        Variant('no dropout', {'model.dropout_rate': 0.0}, 'base', sign=1, source='4.2, "substantial overfitting"'),
        Variant('no crops or reflections', no_crops, 'base', sign=1, source='section 4.1, "substantial overfitting"'),
        Variant('no color', {'data.color_std': 0.0}, 'base', (1.0, None), sign=1, source='section 4.1, "over 1%"'),
        *removed,
        Variant('sixth conv layer', SIXTH_CONV, 'base', source='section 6, with pre-training only'),
        Variant('no weight decay', no_decay, 'base', sign=1, measure='train_error', source=decay_claim),
    ]


def recipe(base: ConfigDict) -> list[Variant]:
    """Returns the base and the recipe of configs/modern.py, whole and in two parts."""
    return [
        BASE,
        Variant('cosine schedule', COSINE, 'base', source='configs/modern.py'),
        Variant('mixup and smoothed labels', MIXED_LABELS, 'base', source='configs/modern.py'),
        Variant('modern recipe', MODERN, 'base', source='configs/modern.py'),
    ]


def figure1(base: ConfigDict) -> list[Variant]:
    """Returns the base's network with ReLU and with tanh, each with several learning rates."""
    del base  # the changes of the layers are called with it
    return [
        Variant(f'{activation} {rate:g}', figure1_changes(activation, rate))
        for activation in ACTIVATIONS
        for rate in RATES
    ]


def cifar10(base: ConfigDict) -> list[Variant]:
    """Returns the CIFAR-10 networks of the authors' release, with the test errors that their files state."""
    without = 'section 3.3, 13% without normalization; the name layers-conv-local-13pct.cfg'
    with_norm = 'section 3.3, 11% with normalization; local3 is also wider, and fc5 has another weight decay'
    return [
        Variant('80sec', NETS['80sec'], log=(26.0, None), source='the head of layers-80sec.cfg'),
        Variant('19pct', NETS['19pct'], log=(19.0, None), source='the name layers-19pct.cfg'),
        Variant('18pct', NETS['18pct'], log=(18.0, None), source='the name layers-18pct.cfg'),
        Variant('13pct', NETS['13pct'], paper=(13.0, None), log=(13.0, None), source=without),
        Variant('11pct', NETS['11pct'], '13pct', paper=(-2.0, None), sign=-1, source=with_norm),
    ]


def _times_batch(base: ConfigDict, factor: int) -> dict[str, int]:
    return {'batch_size': factor * base.batch_size, 'grad_accum_steps': factor * base.grad_accum_steps}


def large_batch(base: ConfigDict) -> list[Variant]:
    """Returns the base and four recipes for batches 16 and 64 times as large, trained for as many epochs.

    All multiply their learning rate by (1 - progress)^2, so that they differ only in what a larger batch changes. Large
    batches are computed in microbatches of the base's size, so activations take no more memory than the base's.
    """
    poly = {'optim.schedule': 'poly', 'optim.stages': ()}
    large = {**poly, **_times_batch(base, 16), 'optim.warmup_epochs': base.num_epochs / 10}
    root = {**large, 'optim.learning_rate': 4 * base.optim.learning_rate, 'optim.warmup_start': 1 / 4}
    linear = {**large, 'optim.learning_rate': 16 * base.optim.learning_rate, 'optim.warmup_start': 1 / 16}
    lars = {**large, 'optim.learning_rate': 10.0, 'optim.trust_coefficient': 0.001, 'optim.warmup_start': 1 / 10}
    return [
        Variant('base', poly),
        Variant('batch x 16 rate x 4', root, 'base', source='square root of the batch, Krizhevsky 2014, section 5'),
        Variant('batch x 16 rate x 16', linear, 'base', source='linear scaling, Goyal et al. 2017'),
        Variant('batch x 16 LARS', lars, 'base', source='configs/large_batch.py'),
        Variant('batch x 64 LARS', {**lars, **_times_batch(base, 64)}, 'base', source='configs/large_batch.py'),
    ]


SUITES: dict[str, Callable[[ConfigDict], list[Variant]]] = {
    'figure1': figure1,
    'ablations': ablations,
    'recipe': recipe,
    'large_batch': large_batch,
    'cifar10': cifar10,
    'ensemble': lambda base: [BASE],  # 'ensemble' and 'views' evaluate the base network in different ways
    'views': lambda base: [BASE],
}
