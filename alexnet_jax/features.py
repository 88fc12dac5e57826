"""Writes a layer's activations for every image of a split, in the split's order, as safetensors or npz.

    python -m alexnet_jax.features --checkpoint=PATH --data=DIR --layer=fc7 --output=fc7.safetensors [--split=val]

Test mode, centre crop. A layer's name stands for its output as a dropout step finds it, else for its last step;
NAME_STEP is one step of it: conv1_linear, conv1_pool. The file holds `features` float32 [N, ...] and `labels` int32
[N].
"""

import contextlib
import functools
import json
import math
import os
import struct
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from alexnet_jax import augment, cli, data, evaluate, sharding, sources
from alexnet_jax.checkpoint import Checkpoint, load_checkpoint
from alexnet_jax.errors import UserError, as_user_error, check_new, did_you_mean
from alexnet_jax.model import AlexNet

ENDINGS = ('.safetensors', '.npz')
Part = tuple[np.ndarray, np.ndarray]  # features float32 [n, ...], labels int32 [n]


def names(network: AlexNet) -> dict[str, tuple[str, int]]:
    """What can be asked for: {name: (the network's intermediate, which of those with that name)}."""
    found = {}
    for layer, row in network.table().items():
        steps = ['linear', *row.then.split()]
        found |= {f'{layer}_{step}': (f'{layer}_{step}', -1) for step in steps}
        until = steps[: steps.index('dropout')] if 'dropout' in steps else steps
        found[layer] = f'{layer}_{until[-1]}', until.count(until[-1]) - 1
    return found


def activations(
    checkpoint: Checkpoint, image_NHWC, layers: Sequence[str] | str, *, batch_size: int = 128
) -> dict[str, np.ndarray]:
    """Outputs of some layers for the centre crops of images, dropout off.

    Args:
      checkpoint: from `load_checkpoint`.
      image_NHWC: uint8 [N, S, S, 3] with S = `checkpoint.record_size`, prepared as the training images were.
      layers: some of `names`.
      batch_size: images at a time, at most.

    Returns:
      float32 [N, ...] for each name: [N, H, W, C] of maps, [N, F] of units.

    Raises:
      UserError: an unknown layer, or images of another shape or type.
    """
    asked = [layers] if isinstance(layers, str) else list(layers)
    function = _function(checkpoint, asked)
    image_NHWC, side = np.asarray(image_NHWC), checkpoint.record_size
    if image_NHWC.dtype != np.uint8 or image_NHWC.shape[1:] != (side, side, 3):
        raise UserError(
            f'images are {image_NHWC.dtype} of shape {image_NHWC.shape}; expected uint8 of (N, {side}, {side}, 3).'
        )
    count = len(image_NHWC)
    batch_size = max(1, min(batch_size, count))
    params = jax.device_put(checkpoint.params)
    found = [np.zeros((count, *shape), np.float32) for shape in _shapes(checkpoint, function)]
    for start in range(0, count, batch_size):
        part = image_NHWC[start : start + batch_size]
        missing = batch_size - len(part)  # fill the last batch up: one shape, one compilation
        full = np.concatenate([part, np.zeros((missing, *part.shape[1:]), np.uint8)])
        for array, values in zip(found, function(params, full, checkpoint.statistics), strict=True):
            array[start : start + len(part)] = values[: len(part)]
    return dict(zip(asked, found, strict=True))


def stream(checkpoint: Checkpoint, source: Sequence, layer: str, batch_size: int = 128) -> Iterator[Part]:
    """The activations of one layer for all records of a source, in their order, a batch at a time.

    Args:
      checkpoint: from `load_checkpoint`.
      source: records of its `record_size` (see sources.py).
      layer: one of `names`.
      batch_size: images at a time; changes nothing in the result.

    Yields:
      (float32 [n, ...], int32 labels [n]).

    Raises:
      UserError: an unknown layer; at the end, if records could not be read: all of them are named before.
    """
    return _stream(checkpoint, source, _function(checkpoint, [layer]), batch_size)


def _stream(checkpoint, source, function, batch_size) -> Iterator[Part]:
    params, statistics = jax.device_put((checkpoint.params, checkpoint.statistics))
    batches = data.eval_batches(source, batch_size=batch_size, record_size=checkpoint.record_size)
    count = 0
    with contextlib.closing(batches):
        for batch in batches:
            there = data.warn_unreadable(batch)['weight'] > 0
            (found,) = function(params, batch['image'], statistics)
            count += int(there.sum())
            yield np.asarray(found)[there], batch['label'][there]
    if count < len(source):
        raise UserError(
            f'{len(source) - count} of {len(source)} images cannot be read (named above); prepare them again.'
        )


def _function(checkpoint: Checkpoint, asked: Sequence[str]):
    """Jitted: (params, uint8 [N, S, S, 3], statistics) -> a list of float32 [N, ...]; reused between calls."""
    known = names(checkpoint.network)
    for name in asked:
        if name not in known:
            raise UserError(f'there is no layer {name!r} in this network.{did_you_mean(name, known)}')
    return _compiled(checkpoint.network, checkpoint.augmentation, tuple(known[name] for name in asked))


@functools.lru_cache(maxsize=8)
def _compiled(network, augmentation, wanted):
    def outputs(params, image_NHWC, statistics):
        (x_NHWC,) = augment.views(image_NHWC, statistics, augmentation, count=1)
        _, state = network.apply({'params': params}, x_NHWC, mutable='intermediates')
        return [state['intermediates'][key][which].astype(jnp.float32) for key, which in wanted]

    return jax.jit(outputs)  # XLA leaves out the layers above


def _shapes(checkpoint: Checkpoint, function) -> list[tuple[int, ...]]:
    """Of one image's activations."""
    side = checkpoint.record_size
    image = jax.ShapeDtypeStruct((1, side, side, 3), np.uint8)
    return [x.shape[1:] for x in jax.eval_shape(function, checkpoint.params, image, checkpoint.statistics)]


def save(
    output: str, checkpoint: Checkpoint, source: Sequence, layer: str, *, batch_size: int = 128
) -> tuple[int, ...]:
    """Writes `stream` to a new file, holding one batch in memory; returns the shape of its `features`.

    output: ends in .safetensors or .npz. Written as a sibling `.NAME.incomplete` and renamed when whole.

    Raises:
      UserError: see `check_output` and `stream`; the file cannot be written. Nothing half-written stays.
    """
    check_output(output)
    parts = stream(checkpoint, source, layer, batch_size)
    shape = (len(source), *_shapes(checkpoint, _function(checkpoint, [layer]))[0])
    write = _write_npz if output.endswith('.npz') else _write_safetensors
    folder, name = os.path.split(os.path.abspath(output))
    partial = os.path.join(folder, f'.{name}.incomplete')
    with as_user_error(f'{output!r} cannot be written'), contextlib.closing(parts):
        try:
            with open(partial, 'wb') as file:
                write(file, shape, _telling_progress(parts, len(source)))
            os.rename(partial, output)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(partial)
    return shape


def check_output(output: str) -> None:
    """Raises UserError where `output` has another ending, or is there already."""
    if not output.endswith(ENDINGS):
        raise UserError(f'--output={output!r}; expected a name ending in {" or ".join(ENDINGS)}.')
    check_new(output)


def _write_safetensors(file, shape: tuple[int, ...], parts: Iterable[Part]) -> None:
    """The format: length of the header (8 bytes), the header as JSON, the arrays one after the other."""
    middle = 4 * math.prod(shape)
    header = json.dumps({
        'features': {'dtype': 'F32', 'shape': shape, 'data_offsets': [0, middle]},
        'labels': {'dtype': 'I32', 'shape': shape[:1], 'data_offsets': [middle, middle + 4 * shape[0]]},
    }).encode()  # fmt: skip
    header += b' ' * (-len(header) % 8)  # so that the arrays are aligned
    file.write(struct.pack('<Q', len(header)) + header)
    file.write(_write_rows(file, parts))


def _write_npz(file, shape: tuple[int, ...], parts: Iterable[Part]) -> None:
    with zipfile.ZipFile(file, 'w') as archive:
        with archive.open(zipfile.ZipInfo('features.npy'), 'w', force_zip64=True) as member:
            _npy_header(member, '<f4', shape)
            labels = _write_rows(member, parts)
        with archive.open(zipfile.ZipInfo('labels.npy'), 'w') as member:
            _npy_header(member, '<i4', shape[:1])
            member.write(labels)


def _npy_header(file, kind: str, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {'descr': kind, 'fortran_order': False, 'shape': shape})


def _write_rows(file, parts: Iterable[Part]) -> bytes:
    """Appends the features; returns the labels."""
    labels = []
    for features, own in parts:
        file.write(features.astype('<f4', copy=False).tobytes())
        labels.append(own.astype('<i4', copy=False).tobytes())
    return b''.join(labels)


def _telling_progress(parts: Iterable[Part], total: int) -> Iterator[Part]:
    """Passes on, with a line every ten seconds."""
    done, began = 0, time.perf_counter()
    told = began
    for part in parts:
        yield part
        done, now = done + len(part[1]), time.perf_counter()
        if now - told >= 10:
            speed, told = done / (now - began), now
            print(f'{done}/{total} images  {speed:.0f} images/s  ETA {(total - done) / speed:.0f} s', flush=True)


def main() -> None:
    args = flags.FLAGS
    if args.batch_size < 1:
        raise UserError(f'--batch_size={args.batch_size}; expected at least 1.')
    check_output(args.output)
    cli.set_up_jax()
    sharding.make_mesh(data=1, tower=1)  # for its warning where JAX has found no GPU
    dataset = sources.open_dataset(args.data)
    source, checkpoint = dataset.split(args.split), load_checkpoint(args.checkpoint)
    evaluate.check_record_size(checkpoint, dataset, args.checkpoint)  # the classes may be others
    shape = save(args.output, checkpoint, source, args.layer, batch_size=args.batch_size)
    print(
        f'{args.output}: features float32 {list(shape)}, labels int32 {list(shape[:1])}; {args.layer} of '
        f'{args.checkpoint} (step {checkpoint.step}), {args.split} of {args.data}, centre crop.'
    )


if __name__ == '__main__':
    flags.DEFINE_string('checkpoint', None, "A workdir (its best step, else its latest) or one step's folder.")
    flags.DEFINE_string('data', None, "A prepared directory, or 'digits'.")
    flags.DEFINE_string('layer', None, 'A layer (fc7: before dropout, after its other steps), or one step: conv1_pool.')
    flags.DEFINE_string('output', None, f'The file to write, ending in {" or ".join(ENDINGS)}; must not exist.')
    flags.DEFINE_string('split', 'val', 'The split to go through.')
    flags.DEFINE_integer('batch_size', 128, 'Images at a time.')
    cli.define_cpu_devices()
    cli.run(main, required=('checkpoint', 'data', 'layer', 'output'))
