"""Turns weights of Caffe, PyTorch or safetensors into a checkpoint, and a checkpoint into safetensors."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from alexnet_jax.checkpoints import loading, manager
from alexnet_jax.convert import caffe, layout, pytorch, safetensors
from alexnet_jax.convert.fit import fit_config
from alexnet_jax.convert.weight_file import LayerWeights, WeightFile, reading_metadata, unreadable
from alexnet_jax.core.architecture import ConvSpec
from alexnet_jax.core.augment import Augmentation
from alexnet_jax.core.config import augmentation_from_config, model_from_config
from alexnet_jax.core.image_stats import ImageStats
from alexnet_jax.core.model import AlexNet
from alexnet_jax.core.train_step import TrainState
from alexnet_jax.data import image_stats_file
from alexnet_jax.data.imagenet_classes import wordnet_ids
from alexnet_jax.utils.config_files import get_config
from alexnet_jax.utils.errors import UserError
from alexnet_jax.utils.files import atomic_directory, check_new

_READERS = {
    '.caffemodel': caffe.read,
    '.safetensors': safetensors.read,
    **dict.fromkeys(('.pth', '.pt', '.bin', '.tar'), pytorch.read),  # .pth.tar: PyTorch's ImageNet example
}
_RECORD_SIZE = 256  # pixels; where no mean image says another
_IMAGENET_MEAN = 255 * np.array([0.485, 0.456, 0.406])  # RGB; torchvision's transforms
_PAPER = [(96, 11, 1), (256, 5, 2), (384, 3, 1), (384, 3, 2), (256, 3, 2)]  # features, kernel, groups


def convert(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    to: str = 'checkpoint',
    mean: str | os.PathLike | None = None,
    config: ConfigDict | None = None,
    classes: str | os.PathLike | None = None,
) -> None:
    """Writes the new directory `output`; logs what the network was taken for.

    Args:
      source: a .caffemodel; a PyTorch state_dict (.pth, .pt, .bin, .tar); a .safetensors file; for to='safetensors'
        what `load_checkpoint` takes.
      output: must not exist. Written as a sibling `.NAME.incomplete` and renamed when whole.
      to: 'checkpoint' or 'safetensors'.
      mean: a .binaryproto (Caffe: BGR), or a .npy [3, S, S], [S, S, 3] or [3] on the 0-255 scale, its channels in the
        order of the network's input. A checkpoint's records are of its side S. Caffe's networks need one.
      config: a ConfigDict of the network and preprocessing that the weights are of; see above for the default.
      classes: a text file of class names, one a line, in the order of the outputs. Default: WordNet ids of ILSVRC-2012
        for 1,000 outputs, else numbers.

    Raises:
      UserError: a file that is not what it should be, an option out of its range, no space. Nothing is written then.
    """
    source, output = os.fspath(source), os.fspath(output)
    mean = None if mean is None else os.fspath(mean)
    classes = None if classes is None else os.fspath(classes)
    if to not in ('checkpoint', 'safetensors'):
        raise UserError(f'--to={to!r}; expected checkpoint or safetensors.')
    check_new(output)
    if to == 'safetensors':
        if mean or config is not None or classes:
            raise UserError('--mean, --config and --classes are for --to=checkpoint; a checkpoint holds them already.')
        checkpoint = loading.load_checkpoint(source)
        with atomic_directory(output) as folder:
            safetensors.write(folder, checkpoint)
        return
    if not os.path.isfile(source):
        kind = 'a folder; for a checkpoint add --to=safetensors' if os.path.isdir(source) else 'nothing'
        raise UserError(f'--input={source!r}: expected a .caffemodel, .pth or .safetensors file, found {kind}.')
    suffix = os.path.splitext(source)[1].lower()
    if suffix not in _READERS:
        raise UserError(
            f'--input={source!r}; expected a name ending in .caffemodel, .pth or .safetensors, found {suffix!r}.'
        )
    weights = _READERS[suffix](source)
    used, plain = _choose_config(weights, config)
    plain = fit_config(plain, weights)
    network, image_size = model_from_config(plain['model']), plain['data']['image_size']
    layers = [*weights.of_rank(4), *weights.of_rank(2)]
    layers = [_to_float32(name, layer) for name, layer in zip(network.layers, layers, strict=True)]
    stats = _image_stats(weights, augmentation_from_config(plain['data']), mean)
    meta = {
        'config': plain,
        'class_names': _class_names(network.num_classes, classes, weights.metadata),
        'record_size': len(stats.mean_image),
        'examples': 0,
        'fingerprint': '',
    }
    state = TrainState(jnp.int32(0), layout.to_params(network, image_size, layers, bgr=weights.bgr), None)
    with atomic_directory(output) as folder, manager.CheckpointManager(folder) as checkpoints:
        checkpoints.save(state, stats, meta, None)
        checkpoints.wait()
    _describe(network, layers, plain['data'], used)
    logging.info('%s is ready.', output)


def _choose_config(weights: WeightFile, config: ConfigDict | None) -> tuple[str, dict[str, Any]]:
    """(where it is from, plain values): the config given, that in the file, or the default of its format."""
    if config is not None:
        return '--config', manager.config_to_json(config)
    if weights.metadata is not None:
        with reading_metadata(weights.path):
            augmentation_from_config(weights.metadata['config']['data'])
            return weights.path, fit_config(weights.metadata['config'], weights)
    name = 'caffe' if weights.bgr else 'torchvision'
    return name, manager.config_to_json(get_config(name))


def _describe(network: AlexNet, layers: Sequence[LayerWeights], data: dict[str, Any], used: str) -> None:
    """Logs what the network was taken for."""
    for (name, spec), layer in zip(network.layers.items(), layers, strict=True):
        window = f'{spec.kernel}x{spec.kernel} px' if isinstance(spec, ConvSpec) else ''
        logging.info(
            f'{name:6}{spec.features:6}  {window:9} groups {spec.groups}  {spec.post or "-":20} from {layer.name}'
        )
    convs = [
        (spec.features, spec.kernel, spec.groups) for spec in network.layers.values() if isinstance(spec, ConvSpec)
    ]
    logging.info(
        f'Strides, paddings, what follows each layer and preprocessing ({data["image_size"]} px, data.mean='
        f'{data["mean"]!r}) are those of {used}; another network is given with --config=NAME.'
    )
    if used == 'torchvision' and convs == _PAPER:
        logging.info(
            'The 2012 network has these widths too: if it was trained with response normalization, convert it with '
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
    """Preprocessing: of --mean, else beside a file written here, else ImageNet's mean color for PyTorch's files."""
    size, own, path = augmentation.image_size, weights.metadata, weights.path
    stats = None if own is None else image_stats_file.load(os.path.dirname(os.path.abspath(path)))
    if mean:
        image = read_mean(mean, weights.bgr)
    elif own is not None:
        if stats is None or len(stats.mean_image) != own['record_size']:
            raise UserError(
                f'expected {image_stats_file.FILE_NAME} of {own["record_size"]} px beside {path!r}, as it was written, '
                f'found {"none" if stats is None else f"one of {len(stats.mean_image)} px"}; or give --mean=FILE.'
            )
        image = stats.mean_image
    elif weights.bgr or augmentation.mean != 'channel':
        reason = f'data.mean={augmentation.mean!r} takes a mean image'
        reason = 'a .caffemodel holds no mean image' if weights.bgr else reason
        raise UserError(f'{reason}, expected --mean=FILE: a .binaryproto, or a .npy of shape [3, S, S] or [3].')
    else:
        image = _IMAGENET_MEAN
    if image.ndim == 1:
        image = np.broadcast_to(image, (_RECORD_SIZE, _RECORD_SIZE, 3))
    if len(image) < size:
        raise UserError(f'the mean image is of {len(image)} px, expected at least data.image_size={size}; see --mean.')
    image = image.astype(np.float32)
    if stats is not None:
        return stats._replace(mean_image=image)
    # No file says anything of color components: without length they shift nothing.
    return ImageStats(image, np.zeros(3, np.float32), np.eye(3, dtype=np.float32))


def read_mean(path: str, bgr: bool) -> np.ndarray:
    """The mean in RGB, [S, S, 3] or [3]. bgr: the file stores blue first. Raises UserError where it holds no mean."""
    if not os.path.isfile(path):
        raise UserError(f'there is no --mean={path!r}; expected a .binaryproto or .npy file.')
    if path.endswith('.binaryproto'):
        array, bgr = caffe.blob_array(path, 'mean', caffe.parse_message(path, 'BlobProto')), True
    elif path.endswith('.npy'):
        try:
            # Mapped: else it would allocate what the header declares before it looks how much there is.
            array = np.load(path, mmap_mode='r', allow_pickle=False)
            if array.dtype.kind not in 'fiu':
                raise TypeError(f'values of type {array.dtype}')
            if array.size > 3 * 4096**2:
                raise ValueError(f'an array of shape {array.shape}')
            with np.errstate(over='ignore'):
                array = np.array(array, np.float32)
        except Exception as error:  # ValueError, OSError, EOFError, AttributeError of an archive
            raise unreadable(path, 'an array written by numpy.save', error) from error
    else:
        raise UserError(f'--mean={path!r}; expected a name ending in .binaryproto or .npy.')
    shape = array.shape
    if array.ndim == 4 and shape[0] == 1:
        array = array[0]
    if array.size == 3:
        array = array.reshape(3)
    elif array.ndim == 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    side = array.shape[0] if array.ndim else 0
    if not side or array.shape not in ((3,), (side, side, 3)):
        raise UserError(f'--mean={path!r}: expected a shape [3, S, S], [S, S, 3] or [3], found {shape}.')
    low, high = array.min(), array.max()
    if not (0 <= low <= high <= 255 and high > 1):
        raise UserError(f'--mean={path!r}: expected gray levels of 0 to 255, found {low:g} to {high:g}.')
    return array[..., ::-1] if bgr else array


def _class_names(count: int, path: str | None, own: dict | None) -> list[str]:
    if path:
        where = f'--classes={path!r}'
        try:
            names = [line.strip() for line in pathlib.Path(path).read_text(encoding='utf-8-sig').strip().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'{where} cannot be read: {error}.') from error
    elif own is not None:
        where, names = "the file's metadata", list(own['class_names'])
    else:
        return list(wordnet_ids()) if count == 1000 else [str(i) for i in range(count)]
    if len(names) != count:
        raise UserError(f'{where}: expected {count} class names, one for each output, found {len(names)}.')
    return names
