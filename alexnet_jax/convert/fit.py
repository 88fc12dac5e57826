"""Fits a config to the shapes of the weights in a weight file."""

import dataclasses
import math
from typing import Any

from alexnet_jax.convert.weight_file import LayerWeights, WeightFile
from alexnet_jax.core.architecture import ConvSpec, DenseSpec, LayerSpec, LocalSpec, infer_shapes
from alexnet_jax.core.config import model_from_config
from alexnet_jax.utils.errors import UserError


def fit_config(config: dict[str, Any], weights: WeightFile) -> dict[str, Any]:
    """Returns a copy of a plain config with features, groups and number of classes taken from the weights.

    The number of groups of a layer is the number of its input channels divided by that of its weights. If a Caffe file
    lists the operations after a layer, their order is used (CaffeNet pools before it normalizes).

    Raises UserError with expected and found shapes by layer if the weights do not fit the network.
    """
    network = model_from_config(config['model'])
    shapes = infer_shapes(network, config['data']['image_size'])
    unread = {ConvSpec: weights.of_rank(4), LocalSpec: [], DenseSpec: weights.of_rank(2)}
    specs: dict[str, LayerSpec] = {}
    report, channels, names = [], 3, list(shapes)
    for name, spec in network.layers.items():
        layer = unread[type(spec)].pop(0) if unread[type(spec)] else None
        allowed_groups = (1,) if name in (names[0], names[-1]) else (1, 2) if isinstance(spec, DenseSpec) else None
        try:
            specs[name] = _fit_layer(spec, layer, channels, shapes[name].inputs, allowed_groups)
            report.append(f'{name} ok')
        except UserError as error:
            report.append(f'{name} {error}')
        channels = spec.features if layer is None else layer.weight.shape[0]
    extra = [*unread[ConvSpec], *unread[DenseSpec]]
    report += [f'expected no further layer, found {layer.weight.shape} in {layer.name!r}' for layer in extra]
    if extra or len(specs) < len(shapes):
        raise UserError(f'the weights do not fit the config: {"; ".join(report)}. Use --config=NAME of their network.')
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
    allowed_groups: tuple[int, ...] | None,
) -> LayerSpec:
    """Returns the layer spec with the features and groups of the weights in the file.

    Args:
      spec: layer of the config.
      layer: weights of the file; None if the file has no more layers of this kind.
      channels: number of output channels or units of the previous layer.
      inputs: input shape of the layer in the config, (H, W, C) or (F,).
      allowed_groups: allowed numbers of groups; None allows any divisor (for convolutions, whose shapes determine it).

    Raises:
      UserError: the weights do not fit. The message states the expected and the found shape.
    """
    window: tuple[int, ...] = (spec.kernel, spec.kernel) if isinstance(spec, ConvSpec) else ()
    fan_in = channels if window else channels * math.prod(inputs[:-1])
    sizes = [f'{fan_in} / groups'] if allowed_groups is None else [str(fan_in // n) for n in allowed_groups]
    expected = f'expected ({", ".join(["N", " or ".join(sizes), *map(str, window)])})'
    if layer is None:
        raise UserError(f'{expected}, found nothing')
    features, group_fan_in, *layer_window = layer.weight.shape
    groups = fan_in // group_fan_in if group_fan_in and fan_in % group_fan_in == 0 else 0
    allowed = groups > 0 and (allowed_groups is None or groups in allowed_groups)
    if not allowed or not features or tuple(layer_window) != window:
        raise UserError(f'{expected}, found {layer.weight.shape} in {layer.name!r}')
    if channels % groups or features % groups:
        raise UserError(f'expected {channels} inputs and {features} features to be divisible by {groups} groups')
    if layer.bias.shape != (features,):
        raise UserError(f'expected ({features},) biases, found {layer.bias.shape} in {layer.name!r}')
    config_ops = [op for op in spec.ops if op in ('relu', 'lrn', 'pool')]
    file_ops = layer.post.split() or config_ops
    if sorted(config_ops) != sorted(file_ops):
        raise UserError(f"expected operations '{' '.join(config_ops)}', found {layer.post!r} after {layer.name!r}")
    if config_ops != file_ops:
        spec = dataclasses.replace(spec, post=' '.join(file_ops + [op for op in spec.ops if op not in config_ops]))
    return dataclasses.replace(spec, features=features, groups=groups)
