"""Fits a config to the shapes of the weights in a file."""

import dataclasses
import math
from typing import Any

from alexnet_jax.convert.weight_file import LayerWeights, WeightFile
from alexnet_jax.core.architecture import ConvSpec, DenseSpec, LayerSpec, LocalSpec, infer_shapes
from alexnet_jax.core.config import model_from_config
from alexnet_jax.utils.errors import UserError


class _MismatchError(Exception):
    """A layer's weights do not fit its spec. The message gives the expected and the found shape."""


def fit_config(config: dict[str, Any], weights: WeightFile) -> dict[str, Any]:
    """Returns a copy of a plain config with features, groups and number of classes taken from the weights.

    The number of groups is the number of input channels divided by the input channels of the weight. If a Caffe file
    lists the operations after a layer, their order is used (CaffeNet pools before it normalizes).

    Raises UserError if the weights do not fit the network; the message lists expected and found shapes by layer.
    """
    network = model_from_config(config['model'])
    shapes = infer_shapes(network, config['data']['image_size'])
    unread = {ConvSpec: weights.of_rank(4), LocalSpec: [], DenseSpec: weights.of_rank(2)}
    specs, report, channels, names = {}, [], 3, list(shapes)
    for name, spec in network.layers.items():
        layer = unread[type(spec)].pop(0) if unread[type(spec)] else None
        groups = (1,) if name in (names[0], names[-1]) else (1, 2) if isinstance(spec, DenseSpec) else None
        try:
            specs[name] = _fit_layer(spec, layer, channels, shapes[name].inputs, groups)
            report.append(f'{name} ok')
        except _MismatchError as error:
            report.append(f'{name} {error}')
        channels = spec.features if layer is None else layer.weight.shape[0]
    spare = [*unread[ConvSpec], *unread[DenseSpec]]
    report += [f'expected no further layer, found {layer.weight.shape} in {layer.name!r}' for layer in spare]
    if spare or len(specs) < len(shapes):
        raise UserError(
            f'the weights are not of the network expected: {"; ".join(report)}. Give --config=FILE of their network.'
        )
    layers = {name: dataclasses.asdict(spec) for name, spec in specs.items()}
    fields = {'layers': layers, 'num_classes': layers[names[-1]].pop('features')}
    config = {**config, 'model': {**config['model'], **fields}}
    infer_shapes(model_from_config(config['model']), config['data']['image_size'])  # raises if the network is invalid
    return config


def _fit_layer(
    spec: LayerSpec,
    layer: LayerWeights | None,
    channels: int,
    inputs: tuple[int, ...],
    allowed: tuple[int, ...] | None,
) -> LayerSpec:
    """Returns the layer spec with the features and groups of the file's weights.

    Args:
      spec: layer of the config.
      layer: weights of the file; None if the file has no more layers of this kind.
      channels: number of channels or units of the layer below.
      inputs: input shape of the layer in the config, (H, W, C) or (F,).
      allowed: permitted numbers of groups; None permits any divisor (for convolutions, whose shape is unambiguous).

    Raises:
      _MismatchError: the weights do not fit.
    """
    if isinstance(spec, ConvSpec):
        window: tuple[int, ...] = (spec.kernel, spec.kernel)
        ungrouped = channels
    else:
        window, ungrouped = (), channels * math.prod(inputs[:-1])
    counts = f'{ungrouped} / groups' if allowed is None else ' or '.join(str(ungrouped // n) for n in allowed)
    expected = f'expected ({", ".join(["N", counts, *map(str, window)])})'
    if layer is None:
        raise _MismatchError(f'{expected}, found nothing')
    features, part, *sides = layer.weight.shape
    groups = ungrouped // part if part and ungrouped % part == 0 else 0
    if not (groups and features and tuple(sides) == window and (allowed is None or groups in allowed)):
        raise _MismatchError(f'{expected}, found {layer.weight.shape} in {layer.name!r}')
    if channels % groups or features % groups:
        raise _MismatchError(
            f'expected {channels} inputs and {features} features to divide into {groups} groups, found a remainder'
        )
    if layer.bias.shape != (features,):
        raise _MismatchError(f'expected ({features},) biases, found {layer.bias.shape} in {layer.name!r}')
    ours = [op for op in spec.ops if op in ('relu', 'lrn', 'pool')]
    theirs = layer.post.split() or ours
    if sorted(ours) != sorted(theirs):
        raise _MismatchError(
            f"expected to be followed by '{' '.join(ours)}', found {layer.post!r} after {layer.name!r}"
        )
    if ours != theirs:
        spec = dataclasses.replace(spec, post=' '.join(theirs + [op for op in spec.ops if op not in ours]))
    return dataclasses.replace(spec, features=features, groups=groups)
