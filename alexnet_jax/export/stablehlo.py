"""Exports a network with its weights and preprocessing as StableHLO, which runs without this package."""

import io
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.core import sharding, train_step
from alexnet_jax.inference import predict
from alexnet_jax.utils.errors import UserError

FILE_NAME = 'model.stablehlo'
PLATFORMS = ('cpu', 'cuda', 'tpu')
_LOAD = """import io, sys
import jax.export
import numpy as np
with open(sys.argv[1], 'rb') as file:
    model = jax.export.deserialize(file.read())
batches = np.load(io.BytesIO(sys.stdin.buffer.read())).values()
outputs = io.BytesIO()
np.savez(outputs, *(model.call(images) for images in batches))
assert 'alexnet_jax' not in sys.modules
sys.stdout.buffer.write(outputs.getvalue())
"""


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


def check(path: str, checkpoint: Checkpoint, views: int) -> float:
    """Runs the exported network in another process on the CPU. Returns the largest difference of a probability.

    Uses batch sizes 1 and 3. Raises UserError if the file cannot be loaded or its probabilities differ.
    """
    side, rng = checkpoint.record_size, np.random.default_rng(0)
    batches = [rng.integers(0, 256, (count, side, side, 3), np.uint8) for count in (1, 3)]
    inputs = io.BytesIO()
    np.savez(inputs, *batches)
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'} | {'JAX_PLATFORMS': 'cpu'}
    folder, name = os.path.split(path)
    command = [sys.executable, '-c', _LOAD, name]
    result = subprocess.run(command, input=inputs.getvalue(), capture_output=True, cwd=folder, env=environment)
    if result.returncode:
        raise UserError(f'the exported file cannot be loaded: {result.stderr.decode(errors="replace").strip()[-1000:]}')
    outputs = np.load(io.BytesIO(result.stdout))
    expected = [predict.predict(checkpoint, batch, views=views) for batch in batches]
    difference = max(float(np.abs(a - b).max()) for a, b in zip(outputs.values(), expected, strict=True))
    if not difference < (1e-5 if jax.default_backend() == 'cpu' else 1e-2):  # GPUs use TF32
        raise UserError(f'the probabilities of the exported file differ by {difference:.2g}; nothing was written.')
    return difference
