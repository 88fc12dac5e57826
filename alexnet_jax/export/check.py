"""Compares exported files with the checkpoint, by loading them in a process that does not import this package."""

import functools
import hashlib
import importlib.util
import io
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.convert import safetensors
from alexnet_jax.core import augment, sharding
from alexnet_jax.utils.errors import UserError

# Largest difference of a probability, and of a logit relative to the largest logit. Errors of the export are much
# larger. Rounding errors on the CPU were 2e-6 or less.
_TOLERANCE = 1e-5
_LOW_PRECISION = 1e-2  # for bfloat16, and for a checkpoint computed on a GPU or TPU, which was not tried

# Reads the batches, calls `run` for each, and writes the outputs.
_MAIN = """
import io, sys
import numpy as np
sys.path.insert(0, '.')
{load}
batches = np.load(io.BytesIO(sys.stdin.buffer.read())).values()
outputs = [run(images) for images in batches]
found = {absent!r} & set(sys.modules)
assert not found, f'imports {{found}}'
results = {{key: np.concatenate([output[key] for output in outputs]) for key in outputs[0]}}
file = io.BytesIO()
np.savez(file, version=sys.modules[{module!r}].__version__, **results)
sys.stdout.buffer.write(file.getvalue())
"""


class _Proof(NamedTuple):
    """How another library loads the files of a format."""

    module: str  # the library; without it the files are written, but not checked
    name: str
    load: str  # code that defines run(images), which returns named arrays
    absent: frozenset[str] = frozenset({'alexnet_jax', 'jax'})  # modules that must not be imported


_PROOFS = {
    'stablehlo': _Proof(
        'jax',
        'JAX',
        """
import jax.export
with open('model.stablehlo', 'rb') as file:
    model = jax.export.deserialize(file.read())
run = lambda images: {'probabilities': model.call(images)}
""",
        absent=frozenset({'alexnet_jax'}),
    ),
    'onnx': _Proof(
        'onnxruntime',
        'ONNX Runtime',
        """
import onnxruntime
session = onnxruntime.InferenceSession('model.onnx', providers=['CPUExecutionProvider'])
names = ['probabilities', 'logits']
run = lambda images: dict(zip(names, session.run(names, {'image': images})))
""",
    ),
    'pytorch': _Proof(
        'torch',
        'PyTorch',
        """
import torch
import alexnet
model = alexnet.load()
@torch.no_grad()
def run(images):
    images = torch.from_numpy(images)
    logits = model(model.preprocess(images))
    if len(logits) > len(images):
        logits = logits.unflatten(0, (-1, len(images))).swapaxes(0, 1)
    return {'probabilities': model.probabilities(images).numpy(), 'logits': logits.numpy()}
""",
    ),
    'safetensors': _Proof(
        'safetensors',
        'safetensors',
        """
import hashlib
import safetensors.numpy
tensors = safetensors.numpy.load_file('model.safetensors')
lines = [f'{k} {v.dtype} {v.shape} {hashlib.sha256(v.tobytes()).hexdigest()}' for k, v in tensors.items()]
run = lambda images: {'tensors': np.array(lines)}
""",
    ),
}


def check(folder: str, formats: Iterable[str], checkpoint: Checkpoint, views: int) -> dict[str, str]:
    """Loads the files of each format in another process on the CPU. Returns a sentence with the result, by format.

    Uses batches of one and three random images. For 'safetensors', compares the tensors instead. Raises UserError if
    files cannot be loaded or if the results differ.
    """
    side = checkpoint.record_size
    images = np.random.default_rng(0).integers(0, 256, (4, side, side, 3), np.uint8)
    expected = functools.cache(lambda dtype: reference(checkpoint, images, views, dtype))
    results = {}
    for name in formats:
        proof = _PROOFS[name]
        if importlib.util.find_spec(proof.module) is None:
            results[name] = f'Not checked, because {proof.module} is not installed.'
            continue
        found = _run(folder, proof, images)
        library = f'{proof.name} {found.pop("version")}'
        if name == 'safetensors':
            if set(found['tensors']) != _describe_tensors(checkpoint):
                raise UserError('model.safetensors: the tensors differ from the checkpoint; nothing was written.')
            results[name] = f'{library} loads the same tensors, bit for bit.'
            continue
        library += " gives the checkpoint's"
        dtype = checkpoint.network.dtype if name == 'stablehlo' else 'float32'
        try:
            results[name] = f'{library} {compare(found, expected(dtype), dtype)}.'
        except UserError as error:
            raise UserError(f'--formats={name}: {library} {error}; nothing was written.') from error
    return results


def compare(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], dtype: str) -> str:
    """Returns the differences of probabilities and logits in words. Raises UserError if they are too large."""
    exact = dtype != 'bfloat16' and jax.default_backend() == 'cpu'
    tolerance = _TOLERANCE if exact else _LOW_PRECISION
    differences = []
    for key, values in found.items():
        if values.shape != expected[key].shape:
            raise UserError(f'{key} with the shape {values.shape}: expected {expected[key].shape}')
        largest = (np.abs(expected[key]).max() or 1) if key == 'logits' else 1
        difference = np.abs(values - expected[key]).max() / largest
        text = f'{key} to {difference:.1g}{" of the largest" if key == "logits" else ""}'
        if not difference <= tolerance:
            raise UserError(f'{text}: expected at most {tolerance}')
        differences.append(text)
    return ' and '.join(differences)


def reference(checkpoint: Checkpoint, images: np.ndarray, views: int, dtype: str) -> dict[str, np.ndarray]:
    """Returns the checkpoint's 'probabilities' [N, K] and 'logits', [N, K] or with ten views [N, 10, K].

    `images` is uint8 [N, S, S, 3] with S = `record_size`. `dtype` is that of the computation.
    """
    forward = sharding.forward(checkpoint.network.clone(dtype=dtype), sharding.make_mesh(data=1, tower=1))

    @jax.jit
    def outputs(params, images, image_stats):
        dtype = jax.tree.leaves(params)[0].dtype
        inputs = augment.views(images, image_stats, checkpoint.augmentation, count=views, dtype=dtype)
        logits = forward(params, jnp.concatenate(inputs)).reshape(views, len(images), -1).swapaxes(0, 1)
        return jax.nn.softmax(logits).mean(1), logits[:, 0] if views == 1 else logits

    with jax.default_matmul_precision('highest'):
        probabilities, logits = outputs(checkpoint.params, images, checkpoint.image_stats)
    return {'probabilities': np.asarray(probabilities), 'logits': np.asarray(logits)}


def _describe_tensors(checkpoint: Checkpoint) -> set[str]:
    """Returns the name, dtype, shape and digest of each tensor of model.safetensors, as the other process does."""
    return {
        f'{name} {value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}'
        for name, value in safetensors.tensors(checkpoint).items()
    }


def _run(folder: str, proof: _Proof, images: np.ndarray) -> dict[str, np.ndarray]:
    """Runs the code of a proof in another process, on one image and on the others. Returns its arrays."""
    inputs = io.BytesIO()
    np.savez(inputs, images[:1], images[1:])
    command = [sys.executable, '-B', '-c', _MAIN.format(load=proof.load, absent=set(proof.absent), module=proof.module)]
    environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
    result = subprocess.run(command, input=inputs.getvalue(), capture_output=True, cwd=folder, env=environment)
    if result.returncode:
        reason = (result.stderr.decode(errors='replace').strip().splitlines() or ['no reason given'])[-1]
        raise UserError(f'{proof.name} cannot load the exported files: {reason[:1000]}; nothing was written.')
    return dict(np.load(io.BytesIO(result.stdout)).items())
