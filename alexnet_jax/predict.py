"""Class probabilities for images, from a checkpoint alone."""

import functools

import jax
import numpy as np

from alexnet_jax import sharding, steps
from alexnet_jax.checkpoint import Checkpoint
from alexnet_jax.errors import UserError


def predict(checkpoint: Checkpoint, image_NHWC, *, views: int = 10, mesh=None) -> np.ndarray:
    """Softmax outputs, averaged over the paper's ten views or of the centre crop (section 4.1).

    Args:
      checkpoint: from `load_checkpoint`.
      image_NHWC: uint8 [N, S, S, 3] with S = `checkpoint.record_size`, prepared as the training images were.
      views: 10, or 1 for the centre alone.
      mesh: from `sharding.make_mesh`; None computes on one device.

    Returns:
      float32 [N, K]; column i is `checkpoint.class_names[i]`.

    Raises:
      UserError: images of another shape or type, or another number of views.
    """
    image_NHWC = np.asarray(image_NHWC)
    side = checkpoint.record_size
    if image_NHWC.dtype != np.uint8 or image_NHWC.shape[1:] != (side, side, 3):
        raise UserError(
            f'images are {image_NHWC.dtype} of shape {image_NHWC.shape}; expected uint8 of (N, {side}, {side}, 3).'
        )
    if mesh is None:
        mesh = sharding.make_mesh(data=1, tower=1)
    return np.exp(_log_probabilities(checkpoint.network, mesh, checkpoint.image_size, views)(
        checkpoint.params, image_NHWC, checkpoint.statistics
    ))


@functools.lru_cache(maxsize=8)  # so that a second call of the same kind compiles nothing
def _log_probabilities(network, mesh, image_size, views):
    forward = sharding.forward(network, mesh)
    return jax.jit(functools.partial(steps.log_probabilities, forward=forward, image_size=image_size, views=views))
