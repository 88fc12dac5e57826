"""Computes the activations of any layers: for images in memory, for image files, or for a whole split."""

import contextlib
import functools
import math
import os
import re
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.core import sharding
from alexnet_jax.core.augment import Augmentation, views
from alexnet_jax.core.model import AlexNet, Edits
from alexnet_jax.inference import activation_files, image_source
from alexnet_jax.inference.evaluate import Evaluator
from alexnet_jax.inference.image_source import ImageSource
from alexnet_jax.inference.predict import Images
from alexnet_jax.utils import compiler
from alexnet_jax.utils.errors import UserError, as_user_error, check_type, did_you_mean
from alexnet_jax.utils.logs import Progress

_MAX_NAMED = 10  # unreadable images that an error names after warnings have named all
# The operations after each layer of torchvision's AlexNet. `classifier` starts with the dropout before its first layer.
_TORCHVISION = ['relu pool', 'relu pool', 'relu', 'relu', 'relu pool dropout', 'relu dropout', 'relu', '']
_TORCHVISION_NAME = re.compile(r'(features|classifier)\.\d+|avgpool')


def activation_names(network: AlexNet) -> dict[str, tuple[str, int]]:
    """Returns the names of a network's activations: {name: (key in Flax's intermediates, index within that key)}.

    If the network has the layers and operations of torchvision's, torchvision's names are included ('features.6').
    """
    names: dict[str, tuple[str, int]] = {}
    for layer, spec in network.layers.items():
        ops = ['linear', *spec.ops]
        names |= {f'{layer}.{op}': (f'{layer}.{op}', -1) for op in ops}
        before_dropout = ops[: ops.index('dropout')] if 'dropout' in ops else ops
        names[layer] = f'{layer}.{before_dropout[-1]}', before_dropout.count(before_dropout[-1]) - 1
    if [' '.join(spec.ops) for spec in network.layers.values()] == _TORCHVISION:
        outputs = [names[name] for name in names if '.' in name]
        names |= {f'features.{i}': output for i, output in enumerate(outputs[:13])}
        names |= {f'classifier.{i}': output for i, output in enumerate(outputs[13:])}
        names['avgpool'] = names['features.12']  # the adaptive pooling does not change 6 x 6 maps
    return names


def activations(
    checkpoint: Checkpoint,
    images: Images,
    layers: Sequence[str] | str,
    *,
    batch_size: int = 128,
    mesh: Mesh | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Returns the outputs of layers for the center crops of images. Dropout is off.

    Args:
      checkpoint: from `alexnet_jax.load_checkpoint`.
      images: as for `alexnet_jax.predict`; a path may also be a folder, which stands for its image files in the order
        of `predict.list_image_files`. Files are read one batch at a time.
      layers: one name or several. 'conv3' is the output of the layer's last operation (of the last before dropout).
        'conv3.linear' is its convolution plus bias, before all other operations (torchvision's `features.6`).
        'conv3.relu', 'conv1.lrn', 'conv1.pool', ... are the outputs of single operations. `activation_names` lists all.
      batch_size: images per batch; it does not change the results.
      mesh: from `sharding.make_mesh`; None uses one device.
      **options: `pool`, `units` and `edit`:
      pool: 'mean' or 'max' over the positions of feature maps.
      units: {name: channels [U]}, or {name: [(row, column, channel), ...]} for single units of feature maps. Other
        units of the layer are not returned.
      edit: {name: function}. The function replaces the output of the operation, float [n, H, W, C] or [n, F] for a
        batch of images, before the next operation reads it: it ablates, scales or exchanges units. It is traced by
        `jax.jit`. The outputs that are returned are the edited ones.

    Returns:
      {name: float32 [N, H, W, C] for feature maps, or [N, F] for dense layers}; with `pool` [N, C]; with `units`
      [N, H, W, U], or [N, U] for single units, dense layers and with `pool`.

    Raises:
      UserError: a layer is unknown, an option is invalid, images cannot be read (the message names all), or a folder
        has no images.
    """
    evaluator = Evaluator(checkpoint, mesh, batch_size=batch_size)
    names = as_list(layers)
    function = layer_outputs(checkpoint, names, mesh, **options)
    return dict(zip(names, image_source.compute(evaluator, function, images), strict=True))


def iter_activations(
    checkpoint: Checkpoint,
    records: Sequence,
    layers: Sequence[str] | str,
    batch_size: int = 128,
    *,
    mesh: Mesh | None = None,
    **options: Any,
) -> Generator[dict[str, np.ndarray], None, None]:
    """Yields the activations of layers for all records of a split, in order, one batch at a time.

    Yields {name: float32 [n, ...]}. Other arguments: as for `activations`. Raises UserError as it does and, at the end,
    if records could not be read; warnings have named them.
    """
    names, evaluator = as_list(layers), Evaluator(checkpoint, mesh, batch_size=batch_size)
    function, source = layer_outputs(checkpoint, names, mesh, **options), ImageSource(checkpoint, records)

    def batches():
        for parts, _ in source.map(function, evaluator):
            yield dict(zip(names, parts, strict=True))
        source.check(max_named=_MAX_NAMED)

    return batches()


def as_list(layers: Sequence[str] | str) -> list[str]:
    """Returns the names of layers without repetitions. Raises UserError if they are no names."""
    names = [layers] if isinstance(layers, str) else list(layers) if isinstance(layers, Iterable) else [layers]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"layers is {type(layers).__name__}: expected a name or several, such as 'conv1'.")
    return list(dict.fromkeys(names))


def layer_outputs(
    checkpoint: Checkpoint,
    names: Sequence[str],
    mesh: Mesh | None = None,
    *,
    pool: str | None = None,
    units: Mapping[str, Any] | None = None,
    edit: Edits | None = None,
) -> Callable:
    """Returns a cached jitted function (params, uint8 [N, S, S, 3], image_stats) -> list of float32 [N, ...].

    Arguments and errors: as for `activations`.
    """
    network = checkpoint.network
    keys = tuple(find_outputs(network, names))
    if pool not in (None, 'mean', 'max'):
        raise UserError(f"pool={pool!r}: expected 'mean', 'max' or None.")
    mesh = sharding.make_mesh(data=1, tower=1) if mesh is None else mesh
    common = (network, checkpoint.augmentation, mesh, keys, checked_edits(network, edit))
    chosen: tuple = (None,) * len(names)
    if units is not None:
        shapes = image_source.output_shapes(checkpoint, _jit(*common, None, chosen))
        chosen = _checked_units(units, dict(zip(names, shapes, strict=True)))
    return _jit(*common, pool, chosen)


def find_outputs(network: AlexNet, names: Sequence[str]) -> list[tuple[str, int]]:
    """Returns the values of `activation_names` for these names. Raises UserError for none or an unknown one."""
    known = activation_names(network)
    if not names:
        raise UserError(f'no layers given; choose from: {", ".join(known)}.')
    for name in names:
        if name not in known and 'features.0' not in known and _TORCHVISION_NAME.fullmatch(name):
            own = ', '.join(name for name in known if '.' not in name)
            raise UserError(f"unknown layer {name!r}: the network does not have torchvision's layout; use {own}.")
        if name not in known:
            raise UserError(f'unknown layer {name!r}.{did_you_mean(name, known)}')
    return [known[name] for name in names]


def checked_edits(network: AlexNet, edit: Edits | None) -> tuple[tuple[str, Callable], ...]:
    """Returns edits as hashable pairs (operation, function). Raises UserError if they are invalid."""
    found: dict[str, Callable] = {}
    for name, function in ({} if edit is None else _check_mapping('edit', edit)).items():
        ((key, index),) = find_outputs(network, [name])
        layer, _, op = key.partition('.')
        if index not in (-1, network.layers[layer].ops.count(op) - 1) and op != 'linear':
            raise UserError(f'edit[{name!r}]: only the last {op} of {layer} can be edited; use {key!r}.')
        if key in found:
            raise UserError(f'edit has two functions for {key!r}.')
        if not callable(function):
            raise UserError(f'edit[{name!r}] is {type(function).__name__}: expected a function of the output.')
        found[key] = function
    return tuple(found.items())


def _check_mapping(name: str, value: Any) -> Mapping[str, Any]:
    check_type(name, value, Mapping, "a dict by layer, such as {'conv3': ...}")
    return value


def _checked_units(units: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple:
    """Returns the units of each layer as hashable tuples, or None. shapes: of one image's outputs."""
    if unknown := [name for name in _check_mapping('units', units) if name not in shapes]:
        raise UserError(f'units[{unknown[0]!r}]: not one of the layers {", ".join(shapes)}.')
    return tuple(
        units_of(f'units[{name!r}]', units[name], shape) if name in units else None for name, shape in shapes.items()
    )


def units_of(what: str, units: Any, shape: tuple[int, ...]) -> tuple:
    """Returns channels or (row, column, channel) triples as tuples. Raises UserError if they are not of a shape."""
    try:
        array = np.asarray(units)
    except ValueError:  # lists of different lengths
        array = np.zeros(0)
    single = array.ndim == 2 and len(shape) == 3 and array.shape[1] == 3
    limits = shape if single else shape[-1:]
    valid = array.dtype.kind in 'iu' and array.size and (single or array.ndim == 1)
    if not valid or (array < 0).any() or (array >= np.array(limits)).any():
        positions = f' or (row, column, channel) below {shape}' if len(shape) == 3 else ''
        raise UserError(f'{what}={units!r}: expected a list of channels from 0 to {shape[-1] - 1}{positions}.')
    return tuple(map(tuple, array.tolist())) if single else tuple(array.tolist())


@functools.lru_cache(maxsize=8)
def _jit(network: AlexNet, augmentation: Augmentation, mesh: Mesh, keys: tuple, edit: tuple, pool: str | None, units):
    forward = sharding.forward(network, mesh)

    def outputs(params, image_NHWC, image_stats):
        (x_NHWC,) = views(image_NHWC, image_stats, augmentation, count=1)
        found = forward(params, x_NHWC, edit=dict(edit), outputs=keys)
        return [_select(x, pool, chosen).astype(jnp.float32) for x, chosen in zip(found, units, strict=True)]

    options = compiler.compiler_options(mesh.devices.flat[0].platform)
    # XLA removes the layers that the requested outputs do not need.
    return jax.jit(outputs, out_shardings=sharding.replicated(mesh), compiler_options=options)


def _select(x: jax.Array, pool: str | None, units: tuple | None) -> jax.Array:
    """Returns the chosen units of an output [N, ...], and pools over the positions of what are feature maps then."""
    if units is not None:
        index = np.array(units)
        x = x[..., index] if index.ndim == 1 else x[:, index[:, 0], index[:, 1], index[:, 2]]
    if pool is None or x.ndim < 4:
        return x
    return x.max((1, 2)) if pool == 'max' else x.mean((1, 2))


def write_activations(
    output: str | os.PathLike,
    checkpoint: Checkpoint,
    images: Sequence,
    layers: Sequence[str] | str,
    *,
    batch_size: int = 128,
    labels: Sequence[int] | None = None,
    class_names: Sequence[str] = (),
    mesh: Mesh | None = None,
    **options: Any,
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Writes the activations of layers for a split or for image files, with their names and labels, to a new file.

    The file has one array for each layer, under its name: float32 [N, ...]. `files` holds the name of each image, or
    its index if it has none: strings in .npz; in .safetensors, which has no strings, UTF-8 bytes uint8 [N, L] padded
    with zeros. `labels` int32 [N] is left out if no image has a label; -1 stands for a missing one. `class_names` [K]
    holds strings as `files` does; it is left out without labels.

    One batch is held in memory. The rows of each layer are collected in a temporary file beside the output, so the
    disk must have space for twice the output. An error leaves no file, except for unreadable images: see `Raises`.

    Args:
      output: path that ends in .safetensors or .npz. With '{layer}' in the file name, as in 'f/{layer}.npz', each layer
        gets a file with its names and labels; their folder must be new, and appears when all files are complete.
      checkpoint: from `alexnet_jax.load_checkpoint`.
      images: the records of a split, or a list of images as `predict` takes them, such as paths.
      layers: one name or several, as for `activations`.
      batch_size: images per batch; it does not change the results.
      labels: of images that are not records, int [N].
      class_names: names of the classes, in label order.
      mesh, **options: as for `activations`.

    Returns:
      {array: (dtype, shape)} of the arrays that are written.

    Raises:
      UserError: as for `activation_files.check_output`; a layer is unknown; there are no images; the file cannot be
        written; or images could not be read. In the last case the file holds all other images, if there are any.
    """
    output, names = os.fspath(output), as_list(layers)
    activation_files.check_output(output)
    function, source = layer_outputs(checkpoint, names, mesh, **options), ImageSource(checkpoint, images, labels)
    evaluator = Evaluator(checkpoint, mesh, batch_size=batch_size)
    shapes, folder = image_source.output_shapes(checkpoint, function), activation_files.existing_folder(output)
    with as_user_error(f'{output!r} cannot be written'), contextlib.ExitStack() as stack:
        activation_files.check_space(folder, output, 4 * len(source) * sum(map(math.prod, shapes)))
        files = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in names]
        progress = Progress(len(source), seconds=10)
        for parts, indices in stack.enter_context(contextlib.closing(source.map(function, evaluator))):
            for file, part in zip(files, parts, strict=True):
                file.write(part.astype('<f4', copy=False).tobytes())
            progress.update(int(indices[-1]) + 1 if len(indices) else 0)
        rows = np.flatnonzero(source.readable)
        if not len(rows):
            source.check(max_named=_MAX_NAMED)
        arrays: dict[str, np.ndarray] = {}
        for name, file, shape in zip(names, files, shapes, strict=True):
            file.flush()
            arrays[name] = np.memmap(file, '<f4', 'r', shape=(len(rows), *shape))
        about = {'files': np.array([source.files[row] for row in rows])}
        if np.any(source.labels >= 0):
            about = {'labels': source.labels[rows], **about}
            if class_names:
                about['class_names'] = np.array(class_names)
        activation_files.write(output, arrays, about)
    source.check(outcome=f' and have no row in {output!r}', max_named=_MAX_NAMED)
    arrays |= about
    return {name: ('names' if a.dtype.kind == 'U' else a.dtype.name, a.shape) for name, a in arrays.items()}
