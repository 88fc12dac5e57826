"""Converts weights of Caffe, PyTorch and others to a checkpoint, and a checkpoint to safetensors."""

import ast
import collections
import dataclasses
import json
import os
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from alexnet_jax.checkpoints import loading, manager
from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.convert import archive, caffe, layout, npy, pytorch, safetensors
from alexnet_jax.convert.fit import fit_config
from alexnet_jax.convert.weight_file import LayerWeights, WeightFile, check_kind, reading
from alexnet_jax.core.architecture import ConvSpec
from alexnet_jax.core.augment import Augmentation
from alexnet_jax.core.config import augmentation_from_config, model_from_config
from alexnet_jax.core.image_stats import ImageStats
from alexnet_jax.core.model import AlexNet
from alexnet_jax.core.train_step import TrainState
from alexnet_jax.data import image_stats_file
from alexnet_jax.data.imagenet_classes import wordnet_ids
from alexnet_jax.utils.config_files import get_config
from alexnet_jax.utils.errors import UserError, as_user_error, first_line, printable
from alexnet_jax.utils.files import atomic_directory, check_new, open_regular

_READERS = {
    '.caffemodel': caffe.read,
    '.safetensors': safetensors.read,
    '.npy': npy.read,
    # PyTorch's ImageNet example writes .pth.tar, Lightning .ckpt.
    **dict.fromkeys(('.pth', '.pt', '.bin', '.tar', '.ckpt'), pytorch.read),
}
# Readers of files with other suffixes, by the first bytes.
_CONTENTS = {b'PK\3\4': pytorch.read, b'\x80\2': pytorch.read, b'\x93NUMPY': npy.read}
_MAX_CHARS = 2**21  # of a file of class names; parsed as a literal, each may take 500 bytes
_RECORD_SIZE = 256  # record size in pixels without a mean image
_IMAGENET_MEAN = 255 * np.array([0.485, 0.456, 0.406])  # RGB; from torchvision's transforms
_PAPER_CONVS = [(96, 11, 1), (256, 5, 2), (384, 3, 1), (384, 3, 2), (256, 3, 2)]  # features, kernel, groups


def convert(
    source: str | os.PathLike | Checkpoint,
    output: str | os.PathLike,
    *,
    to: str = 'checkpoint',
    mean: str | os.PathLike | None = None,
    config: ConfigDict | None = None,
    classes: str | os.PathLike | None = None,
    color_order: str | None = None,
) -> None:
    """Writes the converted weights to a new directory. Logs the layers and the assumed preprocessing and config.

    Args:
      source: see `read`. With to='safetensors', a loaded checkpoint or the path of one.
      output: the directory to create. It is written as `.NAME.incomplete` beside it and renamed when complete.
      to: 'checkpoint' or 'safetensors'.
      mean, config, classes, color_order: see `read`.

    Raises:
      UserError: a file or option is invalid, or the disk is full. Then nothing is written.
    """
    if to not in ('checkpoint', 'safetensors'):
        raise UserError(f'--to={to!r}: expected checkpoint or safetensors.')
    check_new(os.fspath(output))
    if to == 'safetensors':
        if mean or config is not None or classes or color_order:
            raise UserError(
                '--to=safetensors: remove --mean, --config, --classes and --color_order; the checkpoint contains them.'
            )
        checkpoint = source if isinstance(source, Checkpoint) else loading.load_saved(source)
        with atomic_directory(output) as folder:
            safetensors.write(folder, checkpoint)
        return
    if isinstance(source, Checkpoint):
        raise UserError('source is a Checkpoint: expected the path of a file of weights; `save` writes checkpoints.')
    checkpoint = read(source, mean=mean, config=config, classes=classes, color_order=color_order, log=True)
    save(checkpoint, output)
    logging.info('%s is ready.', os.fspath(output))


def read(
    source: str | os.PathLike,
    *,
    mean: str | os.PathLike | None = None,
    config: ConfigDict | None = None,
    classes: str | os.PathLike | None = None,
    color_order: str | None = None,
    log: bool = False,
) -> Checkpoint:
    """Reads a file of weights as a checkpoint of step 0.

    Args:
      source: a .caffemodel, a PyTorch file that contains a state_dict (.pth, .pt, .bin, .tar, .ckpt), a .safetensors
        file, a .npy dictionary of layers, or a zip archive of one such file.
      mean: a .binaryproto (Caffe, BGR), or a .npy of shape [3, S, S], [S, S, 3] or [3] with values from 0 to 255 and
        the channel order of the network's input. S becomes the checkpoint's record size. Required for networks that
        expect BGR, such as Caffe's.
      config: network and preprocessing of the weights. Default: the config stored in the file, else 'caffe' for a
        .caffemodel, a .npy and color_order='bgr', and 'torchvision' otherwise.
      classes: a text file with one class name per line, in the order of the outputs; or a list or dict of names, see
        `_parse_class_names`. Default: the WordNet ids of ILSVRC-2012 for 1,000 outputs, else the class numbers.
      color_order: 'rgb' or 'bgr', the order of the channels that the network expects. Default: 'bgr' for a .caffemodel
        and a .npy, else 'rgb'.
      log: whether to log the layers and the assumed preprocessing and config.

    Raises:
      UserError: a file or option is invalid.
    """
    source = os.fspath(source)
    mean = None if mean is None else os.fspath(mean)
    classes = None if classes is None else os.fspath(classes)
    if color_order not in (None, 'rgb', 'bgr'):
        raise UserError(f'--color_order={color_order!r}: expected rgb or bgr.')
    weights = _read(source)
    default = 'caffe' if weights.bgr or color_order == 'bgr' else 'torchvision'
    if color_order:
        if weights.metadata is not None:
            raise UserError(f'--color_order={color_order}: {source!r} already states its order; remove the option.')
        weights = dataclasses.replace(weights, bgr=color_order == 'bgr')
    config_source, fitted = _choose_config(weights, config, default)
    network, augmentation = model_from_config(fitted['model']), augmentation_from_config(fitted['data'])
    layers = [*weights.of_rank(4), *weights.of_rank(2)]
    layers = [_to_float32(name, layer) for name, layer in zip(network.layers, layers, strict=True)]
    stats = _image_stats(weights, augmentation, mean)
    names = tuple(_class_names(network.num_classes, classes, weights.metadata))
    params = layout.to_params(network, augmentation.image_size, layers, bgr=weights.bgr)
    if log:
        _log_network(network, layers, fitted['data'], config_source)
    fitted = json.loads(json.dumps(fitted))  # lists instead of tuples, as in a saved checkpoint
    return Checkpoint(0, params, network, augmentation, len(stats.mean_image), names, stats, fitted)


def save(checkpoint: Checkpoint, output: str | os.PathLike) -> None:
    """Writes a checkpoint to a new directory. Raises UserError if it cannot be written; then nothing is written."""
    meta = {
        'config': checkpoint.config,
        'class_names': list(checkpoint.class_names),
        'record_size': checkpoint.record_size,
        'examples': 0,
        'fingerprint': '',
    }
    state = TrainState(jnp.int32(checkpoint.step), checkpoint.params, None)
    with atomic_directory(output) as folder, manager.CheckpointManager(folder) as checkpoints:
        checkpoints.save(state, checkpoint.image_stats, meta, None)
        checkpoints.wait()


def _read(source: str) -> WeightFile:
    """Reads a file in the format of its suffix, or of its first bytes if the suffix is unknown."""
    reader = _READERS.get(_suffix(source))
    if os.path.isfile(source) and not reader:
        with open(source, 'rb') as file:
            start = file.read(8)
        reader = next((reader for beginning, reader in _CONTENTS.items() if start.startswith(beginning)), None)
        if not reader:
            check_kind(source)
    if os.path.isfile(os.path.join(source, 'data.pkl')):
        folder = os.path.basename(os.path.normpath(source))
        raise UserError(
            f'--input={source!r} is an unpacked PyTorch file; pack it again without compression: zip -0 -r FILE.pth '
            f'{folder}.'
        )
    if not reader or not os.path.isfile(source):
        raise UserError(
            f'--input={source!r}: expected an existing .caffemodel, .pth, .npy or .safetensors file; for a checkpoint '
            'use --to=safetensors.'
        )
    inner = archive.find(source, lambda name: _suffix(name) in _READERS) if zipfile.is_zipfile(source) else None
    return _read_zipped(source, inner) if inner else reader(source)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _read_zipped(source: str, inner: str) -> WeightFile:
    """Reads the weights in a zip archive. Errors name them as a path in the archive."""
    logging.info('%s: reading %s, the only weights in this archive.', source, printable(inner))
    with tempfile.TemporaryDirectory() as folder:
        with reading(source, 'a zip archive'), as_user_error('it cannot be unpacked', 'Unpack it yourself.'):
            path = archive.unpack(source, inner, folder)
        try:
            weights = _READERS[_suffix(inner)](path)
        except UserError as error:
            raise UserError(str(error).replace(path, os.path.join(source, os.path.basename(path)))) from error
    return dataclasses.replace(weights, path=source)  # mapped files stay readable after their removal


def _choose_config(weights: WeightFile, config: ConfigDict | None, default: str) -> tuple[str, dict[str, Any]]:
    """Returns (name of its source, config fitted to the weights). Uses the given, stored, or default config."""
    if config is not None:
        return '--config', fit_config(manager.config_to_json(config), weights)
    if weights.metadata is not None:
        with reading(weights.path, safetensors.METADATA_FORMAT):
            augmentation_from_config(weights.metadata['config']['data'])
            return weights.path, fit_config(weights.metadata['config'], weights)
    return default, fit_config(manager.config_to_json(get_config(default, packaged=True)), weights)


def _log_network(network: AlexNet, layers: Sequence[LayerWeights], data: dict[str, Any], config_source: str) -> None:
    """Logs each layer, the source of the config, and a hint if this may be the 2012 network."""
    convs = []
    for (name, spec), layer in zip(network.layers.items(), layers, strict=True):
        window = ''
        if isinstance(spec, ConvSpec):
            window = f'{spec.kernel}x{spec.kernel} px'
            convs.append((spec.features, spec.kernel, spec.groups))
        post = spec.post or '-'
        logging.info(f'{name:6}{spec.features:6}  {window:9} groups {spec.groups}  {post:20} from {layer.name}')
    logging.info(
        f'Strides, padding, operations after each layer and preprocessing ({data["image_size"]} px, data.mean='
        f'{data["mean"]!r}) are from {config_source}; for another network use --config=NAME.'
    )
    if config_source == 'torchvision' and convs == _PAPER_CONVS:
        logging.info(
            'The 2012 network has the same widths: if the weights were trained with response normalization, use '
            '--config=caffe or --config=paper.'
        )


def _to_float32(name: str, layer: LayerWeights) -> LayerWeights:
    arrays = {}
    for field in ('weight', 'bias'):
        array, where = getattr(layer, field), f'{name} ({layer.name}.{field})'
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f'{where}: expected floating-point numbers, found {array.dtype}.')
        with np.errstate(over='ignore'):
            arrays[field] = array.astype(np.float32)
        if not np.isfinite(arrays[field]).all():
            raise UserError(f'{where}: expected finite numbers, found NaN or infinity.')
    return layer._replace(**arrays)


def _image_stats(weights: WeightFile, augmentation: Augmentation, mean: str | None) -> ImageStats:
    """Returns image statistics from --mean, else from the file that `convert` wrote, else ImageNet's mean color."""
    size, metadata, path = augmentation.image_size, weights.metadata, weights.path
    stats = None if metadata is None else image_stats_file.load(os.path.dirname(os.path.abspath(path)))
    if mean:
        image = read_mean(mean, weights.bgr)
    elif metadata is not None:
        if stats is None or len(stats.mean_image) != metadata['record_size']:
            found = 'none' if stats is None else f'one of {len(stats.mean_image)} px'
            raise UserError(
                f'{path!r}: expected {image_stats_file.FILE_NAME} of {metadata["record_size"]} px beside it, found '
                f'{found}; restore that file or use --mean=FILE.'
            )
        image = stats.mean_image
    elif weights.bgr or augmentation.mean != 'channel':
        raise UserError(
            f'{path!r} has no mean image, which data.mean={augmentation.mean!r} needs; use --mean=FILE with a '
            '.binaryproto, or a .npy of shape [3, S, S] or [3].'
        )
    else:
        image = _IMAGENET_MEAN
    if image.ndim == 1:
        image = np.broadcast_to(image, (_RECORD_SIZE, _RECORD_SIZE, 3))
    if len(image) < size:
        raise UserError(f'--mean: expected an image of at least data.image_size={size} px, found {len(image)} px.')
    image = image.astype(np.float32)
    if stats is not None:
        return stats._replace(mean_image=image)
    # Weight files have no color components. Zero eigenvalues disable the color shift.
    return ImageStats(image, np.zeros(3, np.float32), np.eye(3, dtype=np.float32))


def read_mean(path: str, bgr: bool) -> np.ndarray:
    """Reads a mean image or mean color as RGB [S, S, 3] or [3]. Raises UserError if the file contains neither.

    bgr: whether a .npy file stores blue first; a .binaryproto always does.
    """
    if not path.endswith(('.binaryproto', '.npy')) or not os.path.isfile(path):
        raise UserError(f'--mean={path!r}: expected an existing .binaryproto or .npy file.')
    if path.endswith('.binaryproto'):
        array, bgr = caffe.read_array(path), True
    else:
        with reading(path, 'an array written by numpy.save'), np.errstate(over='ignore'):
            # Memory-mapped, because np.load would allocate the declared size without checking the size of the file.
            array = np.load(path, mmap_mode='r', allow_pickle=False)
            if array.dtype.kind not in 'fiu' or array.size > 3 * 4096**2:
                raise ValueError(f'{array.dtype} array of shape {array.shape}')
            array = np.array(array, np.float32)
    shape = array.shape
    array = np.atleast_1d(array.squeeze())
    if array.ndim == 3 and len(array) == 3:
        array = array.transpose(1, 2, 0)
    if not array.size or array.shape not in ((3,), (len(array), len(array), 3)):
        raise UserError(f'--mean={path!r}: expected a shape [3, S, S], [S, S, 3] or [3], found {shape}.')
    low, high = array.min(), array.max()
    if not (0 <= low <= high <= 255 and high > 1):
        raise UserError(f'--mean={path!r}: expected values from 0 to 255, found {low:g} to {high:g}.')
    return array[..., ::-1] if bgr else array


def _class_names(count: int, path: str | None, metadata: dict | None) -> list[str]:
    if path:
        where = f'--classes={path!r}'
        try:
            with open_regular(path, encoding='utf-8-sig') as file:
                text = file.read(_MAX_CHARS + 1)
            if len(text) > _MAX_CHARS:
                raise ValueError(f'more than {_MAX_CHARS:,} characters')
            with warnings.catch_warnings(action='ignore'):  # of Python for a backslash in a name
                names = _parse_class_names(text.strip())
        except Exception as error:  # `ast.literal_eval` raises several types
            raise UserError(f'{where} cannot be read: {first_line(error)}.') from error
    elif metadata is not None:
        where, names = "the file's metadata", list(metadata['class_names'])
    else:
        return list(wordnet_ids()) if count == 1000 else [str(i) for i in range(count)]
    if len(names) != count:
        raise UserError(f'{where}: expected {count} class names, one per output, found {len(names)}.')
    if not all(names):
        raise UserError(f'{where}: the name of output {names.index("")} is empty; expected one name per line.')
    if repeated := [name for name, number in collections.Counter(names).items() if number > 1]:
        logging.warning('%s: %d names stand for several outputs: %s', where, len(repeated), ', '.join(repeated[:5]))
    return names


def _parse_class_names(text: str) -> list[str]:
    """Returns the names in a text with one per line, or in a list or dict {output: name or [WordNet id, name]}.

    The dict is the form of imagenet_class_index.json and imagenet1000_clsidx_to_labels.txt. Raises exceptions of
    several types for a damaged list or dict.
    """
    if not text.startswith(('{', '[')):
        return [line.strip() for line in text.splitlines()]
    values = ast.literal_eval(text)
    if isinstance(values, dict):
        values = {int(key): value for key, value in values.items()}
        values = [values[i] for i in range(len(values))]
    names = [value[-1] if isinstance(value, list | tuple) else value for value in values]
    if not all(isinstance(name, str) for name in names):
        raise TypeError('expected names')
    return [name.strip() for name in names]
