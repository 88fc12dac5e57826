"""Converts parameters between the layout of this package and the layout of Caffe and PyTorch."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from alexnet_jax.convert.weight_file import LayerWeights
from alexnet_jax.core.architecture import ConvSpec, LocalSpec, infer_shapes
from alexnet_jax.core.model import AlexNet
from alexnet_jax.utils.errors import UserError

_TORCHVISION = ('features.0', 'features.3', 'features.6', 'features.8', 'features.10',
                'classifier.1', 'classifier.4', 'classifier.6')  # fmt: skip


def to_params(
    network: AlexNet, image_size: int, layers: Sequence[LayerWeights], *, bgr: bool = False
) -> dict[str, Any]:
    """Returns parameters in this package's layout: kernels HWIO or [inputs, outputs], maps flattened as (H, W, C).

    Args:
      network: network whose layers have the shapes of `layers`, see `fit.fit_config`.
      image_size: side of the network's input, pixels.
      layers: weights in the order of the network's layers.
      bgr: whether the first layer expects BGR, as Caffe's networks do.
    """
    params: dict[str, Any] = {}
    for (name, sizes), layer in zip(infer_shapes(network, image_size).items(), layers, strict=True):
        weight = layer.weight[:, ::-1] if bgr and not params else layer.weight
        if weight.ndim == 2:
            weight = weight.reshape(len(weight), -1, *sizes.inputs[:-1])  # [O, C / groups, H, W] for maps
        kernel = np.moveaxis(weight, (1, 0), (-2, -1))
        if layer.weight.ndim == 2:
            kernel = kernel.reshape(-1, kernel.shape[-1])
        params[name] = {'kernel': np.ascontiguousarray(kernel), 'bias': layer.bias}
    return params


def from_params(network: AlexNet, image_size: int, params: dict[str, Any]) -> list[LayerWeights]:
    """Inverse of `to_params` for RGB input. Raises UserError for local layers.

    Uses torchvision's layer names if the network has the structure of its AlexNet, else conv1 ... fc8.
    """
    specs = network.layers.values()
    if any(isinstance(spec, LocalSpec) for spec in specs):
        raise UserError('local layers cannot be converted: no other format has separate kernels at every position.')
    torchvision_ops = all(set(spec.ops) <= {'relu', 'pool', 'dropout'} for spec in specs)
    convs = sum(isinstance(spec, ConvSpec) for spec in specs)
    layers = []
    for i, (name, sizes) in enumerate(infer_shapes(network, image_size).items()):
        kernel, bias = np.asarray(params[name]['kernel']), np.asarray(params[name]['bias'])
        if dense := kernel.ndim == 2:
            kernel = kernel.reshape(*sizes.inputs[:-1], -1, kernel.shape[-1])  # [H, W, C / groups, O] for maps
        weight = np.moveaxis(kernel, (-2, -1), (1, 0))
        if dense:
            weight = weight.reshape(len(weight), -1)
        file_name = _TORCHVISION[i] if torchvision_ops and (convs, len(specs)) == (5, 8) else name
        layers.append(LayerWeights(file_name, np.ascontiguousarray(weight), bias))
    return layers
