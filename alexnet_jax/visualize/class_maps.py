"""Maps of where a network sees a class in an image: Grad-CAM, and occlusion."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.core.architecture import ConvSpec
from alexnet_jax.core.augment import Augmentation
from alexnet_jax.core.model import AlexNet
from alexnet_jax.inference.predict import Images, to_records
from alexnet_jax.utils.errors import UserError
from alexnet_jax.visualize import forward

_PREDICTED = -1  # the label that stands for the most probable class of each image


class GradCam(NamedTuple):
    """Grad-CAM of images."""

    maps: np.ndarray  # float32 [N, H, W], at least 0, at the resolution of the layer
    resized: np.ndarray  # float32 [N, s, s]: the maps, resized to the center crops that the network reads
    labels: np.ndarray  # int [N], the classes that they explain


def grad_cam(
    checkpoint: Checkpoint,
    images: Images,
    label: int | None = None,
    layer: str | None = None,
    *,
    batch_size: int = 32,
) -> GradCam:
    """Shows where in images a layer supports a class (gradient-weighted class activation mapping).

        map = ReLU(sum over k of w_k A_k),  w_k = mean over the positions of d logit / d A_k

    A_k are the feature maps of the layer. The logit is the output of the last layer, before the softmax.

    Source: Selvaraju et al., "Grad-CAM: visual explanations from deep networks via gradient-based localization", ICCV
    2017, section 3 (arXiv:1610.02391).

    Args:
      checkpoint: from `alexnet_jax.load_checkpoint`.
      images: as for `alexnet_jax.predict`, or prepared uint8 [N, S, S, 3]. Their center crops are used.
      label: index of a class; None takes the most probable class of each image.
      layer: the name of an activation with feature maps. None takes the last convolutional layer after its ReLU (its
        linear output, if it has none) and before its pooling: 'conv5.relu'.
      batch_size: images per batch; it does not change the results.

    Returns:
      A `GradCam`. The maps are as in the formula, not scaled to a range. They are resized bilinearly, as by
      `jax.image.resize`.

    Raises:
      UserError: the layer is unknown or has no feature maps, the label is out of range, or images cannot be read.
    """
    stop = forward.stop_after(checkpoint, last_maps(checkpoint) if layer is None else layer)
    shape, side = forward.shape_after(checkpoint, stop), checkpoint.image_size
    if len(shape) == 1:
        raise UserError(f'layer={layer!r} has no feature maps; use a convolutional layer.')
    label = _PREDICTED if label is None else _check_label(checkpoint, label)
    function = _jit_grad_cam(checkpoint.network, checkpoint.augmentation, stop)
    parts = forward.map_images(checkpoint, function, images, label, batch_size=batch_size)
    if not parts:
        return GradCam(np.zeros((0, *shape[:2]), np.float32), np.zeros((0, side, side), np.float32), np.zeros(0, int))
    maps, resized, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return GradCam(maps.astype(np.float32), resized.astype(np.float32), labels.astype(int))


def last_maps(checkpoint: Checkpoint) -> str:
    """Returns the name of the last feature maps before the last pooling. Raises UserError if there are none."""
    layers = checkpoint.network.layers
    convolutional = [name for name, spec in layers.items() if isinstance(spec, ConvSpec)]
    if not convolutional:
        raise UserError('the network has no convolutional layer, so it has no feature maps to weight.')
    return f'{convolutional[-1]}.{"relu" if "relu" in layers[convolutional[-1]].ops else "linear"}'


def _check_label(checkpoint: Checkpoint, label: int) -> int:
    return forward.check_index('label', label, checkpoint.network.num_classes, 'the classes')


@functools.lru_cache(maxsize=8)
def _jit_grad_cam(network: AlexNet, augmentation: Augmentation, stop: int) -> Callable:
    def maps_and_labels(params, image_NHWC, image_stats, label):
        x = forward.network_input(network, augmentation, image_NHWC, image_stats)
        maps_NHWC = forward.run(network, params, x, 0, stop)

        def logits_of(maps_NHWC: Array) -> tuple[Array, Array]:
            logits_NK = forward.run(network, params, maps_NHWC, stop)
            label_N = jnp.where(label == _PREDICTED, jnp.argmax(logits_NK, axis=1), label)
            return jnp.take_along_axis(logits_NK, label_N[:, None], axis=1).sum(), label_N

        gradient_NHWC, label_N = jax.grad(logits_of, has_aux=True)(maps_NHWC)
        weights_N11C = gradient_NHWC.mean((1, 2), keepdims=True)
        found_NHW = jax.nn.relu((weights_N11C * maps_NHWC).sum(3))
        side = augmentation.image_size
        return found_NHW, jax.image.resize(found_NHW, (len(x), side, side), 'bilinear'), label_N

    return forward.jit(maps_and_labels)


class OcclusionMap(NamedTuple):
    """The probability of a class with each part of an image covered."""

    probability: np.ndarray  # float32 [rows, columns]; [i, j] with the square at row starts[i], column starts[j]
    baseline: float  # the probability with nothing covered
    label: int  # the class
    starts: np.ndarray  # int [rows] = [columns]: first row, or column, of each square, pixels of the center crop
    size: int  # side of the square, pixels


def occlusion_map(
    checkpoint: Checkpoint,
    image: Images,
    label: int | None = None,
    *,
    size: int | None = None,
    stride: int | None = None,
    batch_size: int = 128,
) -> OcclusionMap:
    """Covers an image with a gray square at each position in turn, and returns the probabilities of a class.

    The square has the colors of the mean image, so it is zero in the network's input. Squares lie inside the center
    crop that the network reads: at 0, stride, 2 stride, ... in both directions. If the last one does not reach the
    edge, fewer than `stride` pixels there are never covered.

    Source: Zeiler and Fergus, "Visualizing and understanding convolutional networks", ECCV 2014, section 4.2
    (arXiv:1311.2901). They do not give the size of their square.

    Args:
      checkpoint: from `alexnet_jax.load_checkpoint`.
      image: one image as for `alexnet_jax.predict`.
      label: index of the class; None takes the most probable class of the whole image.
      size: side of the square in pixels of the center crop; None: a fifth of the crop, rounded down, at least 1.
      stride: step between positions in pixels; None: the crop's side divided by 28 and rounded down, at least 1 (8 for
        224 px, which makes 23 x 23 positions).
      batch_size: covered images per batch; it does not change the results.

    Returns:
      An `OcclusionMap`, with the probabilities of the center crop.

    Raises:
      UserError: there is not exactly one image, it cannot be read, the label is out of range, or size, stride or
        batch_size is not positive or the square is larger than the center crop.
    """
    image_NHWC, side = to_records(checkpoint, image), checkpoint.image_size
    if len(image_NHWC) != 1:
        raise UserError(f'there are {len(image_NHWC)} images: expected one; call occlusion_map for each image.')
    size = max(1, side // 5) if size is None else size
    stride = max(1, side // 28) if stride is None else stride
    for name, value, most in (('size', size, side), ('stride', stride, side), ('batch_size', batch_size, None)):
        forward.check_count(name, value, most)
    if label is not None:
        label = _check_label(checkpoint, label)
    starts = np.arange(0, side - size + 1, stride)
    corners = [(side, side), *((top, left) for top in starts for left in starts)]  # the first one covers nothing
    function = _jit_occluded(checkpoint.network, checkpoint.augmentation)
    params = jax.device_put(checkpoint.params)
    batch_size, parts = min(batch_size, len(corners)), []
    for start in range(0, len(corners), batch_size):
        part = np.resize(np.array(corners[start : start + batch_size]), (batch_size, 2))  # one shape: one compilation
        parts.append(np.asarray(function(params, image_NHWC, checkpoint.image_stats, part, size)))
    outputs = np.concatenate(parts)[: len(corners)]
    label = int(np.argmax(outputs[0])) if label is None else label
    baseline, *covered = outputs[:, label].tolist()
    return OcclusionMap(np.array(covered, np.float32).reshape(len(starts), -1), baseline, label, starts, size)


@functools.lru_cache(maxsize=8)
def _jit_occluded(network: AlexNet, augmentation: Augmentation) -> Callable:
    def probabilities(params, image_NHWC, image_stats, corner_N2, size):
        """Returns the softmax outputs [N, K] for one image, covered from each corner on."""
        x_1HWC = forward.network_input(network, augmentation, image_NHWC, image_stats)
        offset_N2P = jnp.arange(augmentation.image_size)[None, None] - corner_N2[:, :, None]
        inside_N2P = (offset_N2P >= 0) & (offset_N2P < size)
        covered_NHW = inside_N2P[:, 0, :, None] & inside_N2P[:, 1, None, :]
        return jax.nn.softmax(forward.run(network, params, jnp.where(covered_NHW[..., None], 0, x_1HWC)))

    return forward.jit(probabilities)
