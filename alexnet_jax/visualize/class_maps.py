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
from alexnet_jax.inference.predict import Images
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
    stop = forward.stop_after(checkpoint, _last_maps(checkpoint) if layer is None else layer)
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


def _last_maps(checkpoint: Checkpoint) -> str:
    """Returns the name of the last feature maps before the last pooling."""
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
        weights_NC = gradient_NHWC.mean((1, 2), keepdims=True)
        found_NHW = jax.nn.relu((weights_NC * maps_NHWC).sum(3))
        side = augmentation.image_size
        return found_NHW, jax.image.resize(found_NHW, (len(x), side, side), 'bilinear'), label_N

    return forward.jit(maps_and_labels)
