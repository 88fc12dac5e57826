"""Computes the activations of any layers: for images in memory, for image files, or for a whole split."""

import contextlib
import functools
import itertools
import math
import os
import re
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.core.augment import Augmentation, views
from alexnet_jax.core.model import AlexNet
from alexnet_jax.inference import activation_files
from alexnet_jax.inference.evaluate import Evaluator
from alexnet_jax.inference.predict import Images, list_image_files, to_records, unreadable
from alexnet_jax.utils import compiler
from alexnet_jax.utils.errors import UnreadableError, UserError, as_user_error, check_type, did_you_mean
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
    checkpoint: Checkpoint, images: Images, layers: Sequence[str] | str, *, batch_size: int = 128
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

    Returns:
      {name: float32 [N, H, W, C] for feature maps, or [N, F] for dense layers}.

    Raises:
      UserError: a layer is unknown, images cannot be read (the message names all), or a folder has no images.
    """
    check_type('checkpoint', checkpoint, Checkpoint, 'a Checkpoint; use alexnet_jax.load_checkpoint(PATH)')
    names = _as_list(layers)
    function, source = _layer_outputs(checkpoint, names), None
    several: Any = [images] if _is_path(images) else images
    if isinstance(several, Sequence) and any(map(_is_path, several)):
        source = _Source(checkpoint, _expand_folders(several))
    batches: Iterator[list[np.ndarray]]
    if source:
        count, batches = len(source), (parts for parts, _ in source.map(function, batch_size))
    else:
        image_NHWC = to_records(checkpoint, images)
        count, batches = len(image_NHWC), Evaluator(checkpoint, batch_size=batch_size).map_images(function, image_NHWC)
    arrays = [np.zeros((count, *shape), np.float32) for shape in _shapes(checkpoint, function)]
    start = 0
    for parts in batches:
        for array, part in zip(arrays, parts, strict=True):
            array[start : start + len(part)] = part
        start += len(parts[0])
    if source:
        source.check()
    return dict(zip(names, arrays, strict=True))


def iter_activations(
    checkpoint: Checkpoint, records: Sequence, layers: Sequence[str] | str, batch_size: int = 128
) -> Generator[dict[str, np.ndarray], None, None]:
    """Yields the activations of layers for all records of a split, in order, one batch at a time.

    Yields {name: float32 [n, ...]}. layers: names as for `activations`. Raises UserError for an unknown layer and, at
    the end, if records could not be read; warnings have named them.
    """
    names = _as_list(layers)
    function, source = _layer_outputs(checkpoint, names), _Source(checkpoint, records)

    def batches():
        for parts, _ in source.map(function, batch_size):
            yield dict(zip(names, parts, strict=True))
        source.check(max_named=_MAX_NAMED)

    return batches()


class _Source(Sequence):
    """The records of a split, or images as `predict` takes them, as records whose label is their index.

    It keeps the name and the label of each record that is read. Labels may be missing.
    """

    def __init__(self, checkpoint: Checkpoint, items: Sequence, labels: Sequence[int] | None = None):
        self._checkpoint, self._items = checkpoint, items
        self._errors: dict[int, str] = {}  # of images that are not records
        self.files = [str(i) for i in range(len(items))]  # an image without a name has its index
        self.labels = np.full(len(items), -1, '<i4')  # -1: none
        if labels is not None:
            self.labels[:] = labels
        self.readable = np.zeros(len(items), bool)  # set by `map`

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        item = self._items[index]
        if isinstance(item, Mapping):
            self.labels[index] = item.get('label', -1)
            if name := item.get('file_name'):
                self.files[index] = os.fsdecode(name)
            return {**item, 'label': index}
        if _is_path(item):
            self.files[index] = os.fsdecode(item)
        try:
            return {'image': to_records(self._checkpoint, item)[0], 'label': index}
        except UserError as error:
            self._errors[index] = str(error)
            raise UnreadableError(str(error)) from error

    def map(self, function: Callable, batch_size: int) -> Generator[tuple[list[np.ndarray], np.ndarray], None, None]:
        """Yields (outputs of the function, indices) of the readable images, in order, one batch at a time."""
        evaluator = Evaluator(self._checkpoint, batch_size=batch_size)
        with contextlib.closing(evaluator.map_records(function, self)) as batches:
            for parts, indices in batches:
                self.readable[indices] = True
                yield parts, indices

    def check(self, **options: Any) -> None:
        """Raises the error of `unreadable`, which has these options, if images were unreadable."""
        if bad := np.flatnonzero(~self.readable).tolist():
            reasons = [self._errors.get(index, repr(self.files[index])) for index in bad]
            remedy = 'convert or remove the files' if self._errors else 'prepare the data again'
            raise unreadable(reasons, len(self), remedy=remedy, **options)


def _is_path(image: Any) -> bool:
    return isinstance(image, str | os.PathLike)


def _expand_folders(images: Iterable) -> list:
    """Replaces the folders among images by the image files below them."""
    lists = (list_image_files([image]) if _is_path(image) and os.path.isdir(image) else [image] for image in images)
    return list(itertools.chain.from_iterable(lists))


def _as_list(layers: Sequence[str] | str) -> list[str]:
    """Returns the names of layers without repetitions. Raises UserError if they are no names."""
    names = [layers] if isinstance(layers, str) else list(layers) if isinstance(layers, Iterable) else [layers]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"layers is {type(layers).__name__}: expected a name or several, such as 'conv1'.")
    return list(dict.fromkeys(names))


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


def _layer_outputs(checkpoint: Checkpoint, names: Sequence[str]):
    """Returns a cached jitted function (params, uint8 [N, S, S, 3], image_stats) -> list of float32 [N, ...]."""
    return _jit(checkpoint.network, checkpoint.augmentation, tuple(find_outputs(checkpoint.network, names)))


@functools.lru_cache(maxsize=8)
def _jit(network: AlexNet, augmentation: Augmentation, keys: tuple[tuple[str, int], ...]):
    def outputs(params, image_NHWC, image_stats):
        (x_NHWC,) = views(image_NHWC, image_stats, augmentation, count=1)
        _, state = network.apply({'params': params}, x_NHWC, mutable='intermediates')
        return [state['intermediates'][key][index].astype(jnp.float32) for key, index in keys]

    options = compiler.compiler_options(jax.default_backend())
    return jax.jit(outputs, compiler_options=options)  # XLA removes the layers that the requested outputs do not need


def _shapes(checkpoint: Checkpoint, function) -> list[tuple[int, ...]]:
    """Returns the shapes of the activations of one image."""
    side = checkpoint.record_size
    image = jax.ShapeDtypeStruct((1, side, side, 3), np.uint8)
    return [x.shape[1:] for x in jax.eval_shape(function, checkpoint.params, image, checkpoint.image_stats)]


def write_activations(
    output: str | os.PathLike,
    checkpoint: Checkpoint,
    images: Sequence,
    layers: Sequence[str] | str,
    *,
    batch_size: int = 128,
    labels: Sequence[int] | None = None,
    class_names: Sequence[str] = (),
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

    Returns:
      {array: (dtype, shape)} of the arrays that are written.

    Raises:
      UserError: as for `activation_files.check_output`; a layer is unknown; there are no images; the file cannot be
        written; or images could not be read. In the last case the file holds all other images, if there are any.
    """
    output, names = os.fspath(output), _as_list(layers)
    activation_files.check_output(output)
    function, source = _layer_outputs(checkpoint, names), _Source(checkpoint, images, labels)
    shapes, folder = _shapes(checkpoint, function), activation_files.existing_folder(output)
    with as_user_error(f'{output!r} cannot be written'), contextlib.ExitStack() as stack:
        activation_files.check_space(folder, output, 4 * len(source) * sum(map(math.prod, shapes)))
        files = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in names]
        progress = Progress(len(source), seconds=10)
        for parts, indices in stack.enter_context(contextlib.closing(source.map(function, batch_size))):
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
