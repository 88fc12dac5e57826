"""LPIPS, the perceptual distance of two images, with AlexNet as its network.

Source: Zhang, Isola, Efros, Shechtman and Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric" (2018), and the authors' package `lpips`: `net='alex'`, `version='0.1'`. Version 0.0, which did not scale its
input, is not supported.
"""

import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.convert import pytorch
from alexnet_jax.convert.loading import load_checkpoint
from alexnet_jax.core import pooling
from alexnet_jax.core.architecture import ConvSpec
from alexnet_jax.core.config import model_from_config
from alexnet_jax.core.model import AlexNet
from alexnet_jax.utils import checksums
from alexnet_jax.utils.checks import is_number
from alexnet_jax.utils.config_files import get_config
from alexnet_jax.utils.errors import UserError, check_type
from alexnet_jax.utils.files import as_path

# The mean and the standard deviation of ImageNet's colors (RGB), on the scale from -1 to 1.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPSILON = 1e-10  # added to the norm of a feature vector
_MIN_SIZE = 31  # pixels; the maps of conv2 are then 3 x 3, the window of the pooling after it
_FILE = os.path.join('weights', 'v0.1', 'alex.pth')  # in the package `lpips`
_VERSION_0_0 = '18720f55913d0af89042f13faa7e536a6ce1444a0914e6db9461355ece1e8cd5'  # SHA-256 of its alex.pth


class LpipsWeights(NamedTuple):
    """The parameters of the distance. They are arguments of `jax.jit` like other arrays."""

    params: Mapping[str, Mapping[str, Any]]  # conv1 to conv5 of an AlexNet of torchvision's layout
    linear: Mapping[str, Any]  # for each of these layers the weights of its channels, float32 [C]


def load_lpips(
    backbone: Checkpoint | str | os.PathLike = 'torchvision', linear: str | os.PathLike | None = None
) -> LpipsWeights:
    """Loads the weights of `lpips`.

    Args:
      backbone: a checkpoint with torchvision's weights, or its path or name, as for `alexnet_jax.load_checkpoint`.
      linear: path of `lpips/weights/v0.1/alex.pth`. None: the file is in the installed package `lpips`, which is not
        imported and does not need PyTorch: `pip install --no-deps lpips==0.1.4`.

    Raises:
      UserError: a file cannot be read, the network does not have torchvision's layout, the linear weights do not fit
        it or are those of version 0.0.
    """
    checkpoint = backbone if isinstance(backbone, Checkpoint) else load_checkpoint(backbone)
    _check_layout(checkpoint.network)
    params = {name: checkpoint.params[name] for name in _convs(_torchvision())}
    return LpipsWeights(params, _read_linear(_find_linear() if linear is None else as_path(linear), params))


def lpips(
    weights: LpipsWeights, images0: Any, images1: Any, *, value_range: tuple[float, float] | None = None
) -> Array:
    """Returns the distance of each image in `images0` to the image in the same row of `images1`.

    The function can be differentiated in reverse mode, with respect to float images and to the weights, and used inside
    `jax.jit`.

    Args:
      weights: from `alexnet_jax.load_lpips`.
      images0: uint8 or float [N, H, W, 3] in RGB, at least 31 x 31 pixels.
      images1: the same shape.
      value_range: the values of black and white in float images, such as (-1, 1), (0, 1) or (0, 255). Required for
        float images; uint8 images are from 0 to 255.

    Returns:
      float32 [N]; 0 for equal images, except for rounding. float64 for images of float64 (with jax.enable_x64).

    Raises:
      UserError: the images have other types or shapes; value_range is missing or invalid; or, outside of `jax.jit`,
        values are far outside of the range or NaN.
    """
    check_type('weights', weights, LpipsWeights, 'the result of alexnet_jax.load_lpips')
    scales = [_check_images(f'images{i}', images, value_range) for i, images in enumerate((images0, images1))]
    if images0.shape != images1.shape:
        raise UserError(f'images0 is {images0.shape} and images1 is {images1.shape}: expected equal shapes.')
    if value_range is not None and images0.dtype == images1.dtype == np.uint8:
        raise UserError(f'value_range={value_range}: the images are uint8, from 0 to 255; remove value_range.')
    return _distance(weights, (images0, images1), scales)


@jax.jit
def _distance(weights: LpipsWeights, images: tuple[Array, Array], scales: list[tuple[float, float]]) -> Array:
    inputs = []
    for x, (low, high) in zip(images, scales, strict=True):
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x = x * (2 / (high - low)) - (high + low) / (high - low)  # from -1 to 1
        inputs.append((x - _by_channel(_SHIFT, x)) / _by_channel(_SCALE, x))
    total: Any = 0
    features = (_unit_features(weights.params, x) for x in inputs)
    for name, a, b in zip(weights.params, *features, strict=True):
        total += ((a - b) ** 2 * _by_channel(weights.linear[name], a)).sum(-1).mean((1, 2))
    return total


def _by_channel(values: Any, like: Array) -> Array:
    """Returns values [C] as an array [1, 1, 1, C] of the dtype of `like`."""
    return jnp.asarray(values, like.dtype).reshape(1, 1, 1, -1)


def _unit_features(params: Mapping[str, Any], x_NHWC: Array) -> Iterator[Array]:
    """Yields the features after each ReLU, [N, H, W, C], with the vector at each position divided by its norm."""
    x, pool = x_NHWC, False
    for name, spec in _convs(_torchvision()).items():
        if pool:
            x = _pool(x)
        # Not `ops.conv`, because GPUs compute it, and its gradient, in TF32.
        x = lax.conv_general_dilated(
            x, jnp.asarray(params[name]['kernel'], x.dtype), (spec.stride, spec.stride), (spec.padding, spec.padding),
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision=lax.Precision.HIGHEST,
        )  # fmt: skip
        x = jax.nn.relu(x + _by_channel(params[name]['bias'], x))
        # Where all features are 0, the gradient of the root is NaN; the gradient of the ReLU replaces it by 0.
        yield x / (jnp.sqrt((x**2).sum(-1, keepdims=True)) + _EPSILON)
        pool = 'pool' in spec.ops


def _pool(x_NHWC: Array) -> Array:
    """Pools as PyTorch does, which leaves out a truncated last window. Some sizes other than 224 have one."""
    window, stride = _torchvision().pool_window, _torchvision().pool_stride
    height, width = ((size - window) // stride * stride + window for size in x_NHWC.shape[1:3])
    return pooling.max_pool(x_NHWC[:, :height, :width], window=window, stride=stride)


def _check_images(name: str, images: Any, value_range: Any) -> tuple[float, float]:
    """Returns the values of black and white. Raises UserError for images of another type, shape or range."""
    check_type(name, images, np.ndarray | Array, 'an array uint8 or float [N, H, W, 3]')
    is_float = jnp.issubdtype(images.dtype, jnp.floating)
    if not (is_float or images.dtype == np.uint8) or images.shape[3:] != (3,) or min(images.shape[1:3]) < _MIN_SIZE:
        raise UserError(
            f'{name} is {images.dtype} of shape {images.shape}: expected uint8 or float [N, H, W, 3], with H and W of '
            f'{_MIN_SIZE} or more.'
        )
    if not is_float:
        return 0.0, 255.0
    valid = isinstance(value_range, tuple | list) and len(value_range) == 2 and all(map(is_number, value_range))
    if not valid or not value_range[0] < value_range[1]:
        raise UserError(
            f'value_range={value_range!r}: {name} is {images.dtype}; give the values of black and white, such as '
            '(-1, 1), (0, 1) or (0, 255).'
        )
    low, high = map(float, value_range)
    if images.size and not isinstance(images, jax.core.Tracer):
        least, most = float(images.min()), float(images.max())
        margin = (high - low) / 2  # images that are optimized may leave the range a little
        if not low - margin <= least <= most <= high + margin:
            raise UserError(f'{name} has values from {least:g} to {most:g}: expected value_range={value_range}.')
    return low, high


@functools.cache
def _torchvision() -> AlexNet:
    return model_from_config(get_config('torchvision', packaged=True).model)


def _convs(network: AlexNet) -> dict[str, ConvSpec]:
    return {name: spec for name, spec in network.layers.items() if isinstance(spec, ConvSpec)}


def _check_layout(network: AlexNet) -> None:
    """Raises UserError unless convolutions and poolings are torchvision's. The numbers of maps may differ."""

    def layout(network: AlexNet) -> list[tuple]:
        rows: list[tuple] = [(network.pool_window, network.pool_stride)]
        for name, spec in _convs(network).items():
            used = [op for op in spec.ops if op != 'dropout']
            rows.append((name, type(spec), spec.groups, spec.kernel, spec.stride, spec.padding, used))
        return rows

    if layout(network) != layout(_torchvision()):
        raise UserError(
            "LPIPS is defined for torchvision's AlexNet, and this network has other convolutions or poolings; use "
            'backbone=CHECKPOINT with a network converted from the weights of torchvision.'
        )


def _find_linear() -> str:
    spec = importlib.util.find_spec('lpips')  # does not import it
    for folder in (spec and spec.submodule_search_locations) or ():
        if os.path.isfile(path := os.path.join(folder, _FILE)):
            return path
    raise UserError(
        'the linear weights of LPIPS are in the package lpips, which is not installed; use pip install --no-deps '
        f'lpips==0.1.4, or linear=PATH of its file {_FILE}.'
    )


def _read_linear(path: str, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Reads the linear weights {layer: float32 [C]}. Raises UserError if they do not fit the parameters."""
    if not os.path.isfile(path):
        raise UserError(f'linear={path!r}: expected the file lpips/{_FILE} of the package lpips.')
    if checksums.sha256(path) == _VERSION_0_0:
        raise UserError(f'linear={path!r}: these are the weights of version 0.0; use those of 0.1, lpips/{_FILE}.')
    tensors, linear = pytorch.read_tensors(path), {}
    for i, (name, layer) in enumerate(params.items()):
        key, shape = f'lin{i}.model.1.weight', (1, len(layer['bias']), 1, 1)
        tensor = tensors.pop(key, None)
        if tensor is None or tensor.shape != shape or not np.isfinite(tensor.astype(np.float32)).all():
            found = 'no such tensor' if tensor is None else f'{tensor.shape}'
            raise UserError(f'linear={path!r}: expected {key} of shape {shape} with finite values, found {found}.')
        linear[name] = tensor.ravel().astype(np.float32)
    pytorch.log_ignored(path, list(tensors))
    return linear
