"""Exports a network with its weights and preprocessing as StableHLO, which runs without this package."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.core import sharding, train_step

FILE_NAME = 'model.stablehlo'
PLATFORMS = ('cpu', 'cuda', 'tpu')


def stablehlo(checkpoint: Checkpoint, views: int = 1) -> bytes:
    """Returns a network with its weights and preprocessing, serialized by `jax.export` for `PLATFORMS`.

    The program maps uint8 images [N, S, S, 3] to float32 probabilities [N, K], for any N. S is the checkpoint's
    `record_size`; the images must be prepared like the training images. Probabilities are softmax outputs averaged
    over the views (1: center crop; 10: section 4.1).
    """
    forward = sharding.forward(checkpoint.network, sharding.make_mesh(data=1, tower=1))
    settings = {'forward': forward, 'augmentation': checkpoint.augmentation, 'views': views}

    def probabilities(images):
        return jnp.exp(train_step.log_probabilities(checkpoint.params, images, checkpoint.image_stats, **settings))

    side, (count,) = checkpoint.record_size, jax_export.symbolic_shape('N')
    images = jax.ShapeDtypeStruct((count, side, side, 3), np.uint8)
    return bytes(jax_export.export(jax.jit(probabilities), platforms=PLATFORMS)(images).serialize())
