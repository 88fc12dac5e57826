"""What the exports to ONNX and PyTorch share: which networks are refused, preprocessing, constants."""

from collections.abc import Sequence

import numpy as np

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.core import augment
from alexnet_jax.core.architecture import LocalSpec
from alexnet_jax.core.model import AlexNet
from alexnet_jax.utils.errors import UserError

_OPS = ('relu', 'tanh', 'dropout', 'lrn', 'spatial_norm', 'pool', 'avg_pool')


def check_network(network: AlexNet, formats: Sequence[str]) -> None:
    """Raises UserError, which names the layer, if a network cannot be written in one of the formats."""
    for target in [name for name in formats if name != 'stablehlo']:
        for name, spec in network.layers.items():
            problem = ''
            if isinstance(spec, LocalSpec):
                problem = f'{name}: locally connected layers cannot be written as {target}'
            elif target != 'safetensors' and (unknown := [op for op in spec.ops if op not in _OPS]):
                problem = f'{name}.post={spec.post!r}: the operation {unknown[0]!r} cannot be written as {target}'
            elif target == 'onnx' and 'lrn' in spec.ops and network.lrn_n % 2 == 0:
                problem = f'model.lrn_n={network.lrn_n}: {name} cannot be written as onnx, whose LRN has odd windows'
            if problem:
                raise UserError(f'--formats={",".join(formats)}: {problem}; use --formats=stablehlo.')


def lrn_alpha(network: AlexNet) -> float:
    """Returns alpha as ONNX and PyTorch define it: the factor of the mean, not the sum, over the window."""
    return network.lrn_alpha * (1 if network.lrn_alpha_over_n else network.lrn_n)


def mean_CHW(checkpoint: Checkpoint) -> np.ndarray:  # noqa: N802
    """Returns the mean to subtract, float32.

    It is [3, S, S] for mean='crop', to be subtracted from whole images of `record_size` S before cropping. For 'center'
    it is [3, s, s], and for 'channel' [3, 1, 1], to be subtracted from each crop.
    """
    mean = np.asarray(checkpoint.image_stats.mean_image)
    if checkpoint.augmentation.mean == 'center':
        (mean,) = augment.center_crop(mean[None], checkpoint.image_size)
    elif checkpoint.augmentation.mean == 'channel':
        mean = mean.mean((0, 1), dtype=np.float64, keepdims=True)
    return np.ascontiguousarray(mean.transpose(2, 0, 1), np.float32)


def crop_corners(checkpoint: Checkpoint, views: int) -> list[tuple[int, int]]:
    """Returns (top, left) of the crops: the center; with ten views also the corners, in the order of `ten_views`."""
    last = checkpoint.record_size - checkpoint.image_size
    corners = [(y, x) for y in (0, last) for x in (0, last)] if views == 10 else []
    return [(last // 2, last // 2), *corners]
