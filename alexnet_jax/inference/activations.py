"""Computes the activations of any layer, for images in memory or for a whole split."""

import contextlib
import functools
import json
import math
import os
import struct
import zipfile
from collections.abc import Generator, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.core.augment import Augmentation, views
from alexnet_jax.core.model import AlexNet
from alexnet_jax.inference.evaluate import Evaluator
from alexnet_jax.inference.predict import Images, to_records
from alexnet_jax.utils.errors import UserError, as_user_error, did_you_mean
from alexnet_jax.utils.files import atomic_file, check_new
from alexnet_jax.utils.logs import Progress

SUFFIXES = ('.safetensors', '.npz')
FeatureBatch = tuple[np.ndarray, np.ndarray]  # features float32 [n, ...], labels int32 [n]


def activation_names(network: AlexNet) -> dict[str, tuple[str, int]]:
    """Returns the names of a network's activations: {name: (key in Flax's intermediates, index within that key)}."""
    names: dict[str, tuple[str, int]] = {}
    for layer, spec in network.layers.items():
        ops = ['linear', *spec.ops]
        names |= {f'{layer}.{op}': (f'{layer}.{op}', -1) for op in ops}
        before_dropout = ops[: ops.index('dropout')] if 'dropout' in ops else ops
        names[layer] = f'{layer}.{before_dropout[-1]}', before_dropout.count(before_dropout[-1]) - 1
    return names


def activations(
    checkpoint: Checkpoint, images: Images, layers: Sequence[str] | str, *, batch_size: int = 128
) -> dict[str, np.ndarray]:
    """Returns the outputs of layers for the center crops of images. Dropout is off.

    Args:
      checkpoint: from `alexnet_jax.load_checkpoint`.
      images: as for `alexnet_jax.predict`.
      layers: one name or several. 'conv3' is the output of the layer's last operation (of the last before dropout).
        'conv3.linear' is its convolution plus bias, before all other operations (torchvision's `features.6`).
        'conv3.relu', 'conv1.lrn', 'conv1.pool', ... are the outputs of single operations. `activation_names` lists all.
      batch_size: images per batch; it does not change the results.

    Returns:
      {name: float32 [N, H, W, C] for feature maps, or [N, F] for dense layers}.

    Raises:
      UserError: a layer is unknown or an image cannot be read.
    """
    names = [layers] if isinstance(layers, str) else list(layers)
    function, evaluator = _layer_outputs(checkpoint, names), Evaluator(checkpoint, batch_size=batch_size)
    image_NHWC = to_records(checkpoint, images)
    arrays = [np.zeros((len(image_NHWC), *shape), np.float32) for shape in _shapes(checkpoint, function)]
    start = 0
    for parts in evaluator.map_images(function, image_NHWC):
        for array, part in zip(arrays, parts, strict=True):
            array[start : start + len(part)] = part
        start += len(parts[0])
    return dict(zip(names, arrays, strict=True))


def iter_activations(
    checkpoint: Checkpoint, records: Sequence, layer: str, batch_size: int = 128
) -> Generator[FeatureBatch, None, None]:
    """Yields the activations of one layer for all records of a split, in order, one batch at a time.

    Yields (float32 [n, ...], int32 labels [n]). layer: one of `activation_names`. Raises UserError for an unknown
    layer, and after the last batch if some records could not be read; a warning names each of them.
    """
    function = _layer_outputs(checkpoint, [layer])
    evaluator = Evaluator(checkpoint, batch_size=batch_size)
    return evaluator.map_records(lambda *arguments: function(*arguments)[0], records)


def _layer_outputs(checkpoint: Checkpoint, names: Sequence[str]):
    """Returns a cached jitted function (params, uint8 [N, S, S, 3], image_stats) -> list of float32 [N, ...]."""
    known = activation_names(checkpoint.network)
    for name in names:
        if name not in known:
            raise UserError(f'unknown layer {name!r}.{did_you_mean(name, known)}')
    return _jit(checkpoint.network, checkpoint.augmentation, tuple(known[name] for name in names))


@functools.lru_cache(maxsize=8)
def _jit(network: AlexNet, augmentation: Augmentation, keys: tuple[tuple[str, int], ...]):
    def outputs(params, image_NHWC, image_stats):
        (x_NHWC,) = views(image_NHWC, image_stats, augmentation, count=1)
        _, state = network.apply({'params': params}, x_NHWC, mutable='intermediates')
        return [state['intermediates'][key][index].astype(jnp.float32) for key, index in keys]

    return jax.jit(outputs)  # XLA removes the layers that the requested outputs do not need


def _shapes(checkpoint: Checkpoint, function) -> list[tuple[int, ...]]:
    """Returns the shapes of the activations of one image."""
    side = checkpoint.record_size
    image = jax.ShapeDtypeStruct((1, side, side, 3), np.uint8)
    return [x.shape[1:] for x in jax.eval_shape(function, checkpoint.params, image, checkpoint.image_stats)]


def write_activations(
    output: str | os.PathLike, checkpoint: Checkpoint, records: Sequence, layer: str, *, batch_size: int = 128
) -> tuple[int, ...]:
    """Writes `iter_activations` to a new file, one batch at a time, and returns the shape of its `features`.

    output: path that ends in .safetensors or .npz. It is written as OUTPUT.tmp and renamed when it is complete, so no
    partial file remains. Raises UserError as `check_output` and `iter_activations` do, or if writing fails.
    """
    output = os.fspath(output)
    check_output(output)
    parts = iter_activations(checkpoint, records, layer, batch_size)
    shape = (len(records), *_shapes(checkpoint, _layer_outputs(checkpoint, [layer]))[0])
    write = _write_npz if output.endswith('.npz') else _write_safetensors
    with as_user_error(f'{output!r} cannot be written'), contextlib.closing(parts), atomic_file(output, 'wb') as file:
        write(file, shape, parts)
    return shape


def check_output(output: str) -> None:
    """Raises UserError if `output` does not end in .safetensors or .npz, or already exists."""
    if not output.endswith(SUFFIXES):
        raise UserError(f'--output={output!r}: expected a name ending in {" or ".join(SUFFIXES)}.')
    check_new(output)


def _write_safetensors(file, shape: tuple[int, ...], parts: Iterable[FeatureBatch]) -> None:
    """Writes the safetensors format: header length (8 bytes), header (JSON), then the arrays one after another."""
    features_size = 4 * math.prod(shape)
    header = json.dumps({
        'features': {'dtype': 'F32', 'shape': shape, 'data_offsets': [0, features_size]},
        'labels': {'dtype': 'I32', 'shape': shape[:1], 'data_offsets': [features_size, features_size + 4 * shape[0]]},
    }).encode()  # fmt: skip
    header += b' ' * (-len(header) % 8)  # so that the arrays are aligned
    file.write(struct.pack('<Q', len(header)) + header)
    file.write(_write_rows(file, shape[0], parts).tobytes())


def _write_npz(file, shape: tuple[int, ...], parts: Iterable[FeatureBatch]) -> None:
    with zipfile.ZipFile(file, 'w') as archive:
        with archive.open('features.npy', 'w', force_zip64=True) as member:
            header = {'descr': '<f4', 'fortran_order': False, 'shape': shape}
            np.lib.format.write_array_header_1_0(member, header)
            labels = _write_rows(member, shape[0], parts)
        with archive.open('labels.npy', 'w') as member:
            np.save(member, labels)


def _write_rows(file, total: int, parts: Iterable[FeatureBatch]) -> np.ndarray:
    """Appends the features to a file and logs progress. Returns the labels, little-endian int32 [total]."""
    labels: list[int] = []
    progress = Progress(total, seconds=10)
    for features, part_labels in parts:
        file.write(features.astype('<f4', copy=False).tobytes())
        labels.extend(part_labels)
        progress.update(len(labels))
    return np.array(labels, '<i4')
