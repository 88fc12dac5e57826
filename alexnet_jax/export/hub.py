"""Exports a checkpoint as files that load without this package, in the layout of the Hugging Face Hub."""

import collections
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.convert import safetensors
from alexnet_jax.export import card, check, onnx_model, portable, pytorch_module, stablehlo
from alexnet_jax.utils.errors import UserError, did_you_mean
from alexnet_jax.utils.files import atomic_directory

FORMATS = {  # and the main file of each
    'safetensors': safetensors.FILE_NAME,
    'pytorch': pytorch_module.FILE_NAME,
    'onnx': onnx_model.FILE_NAME,
    'stablehlo': stablehlo.FILE_NAME,
}
DEFAULT_FORMATS = ('safetensors', 'pytorch', 'stablehlo')  # those that need no further package


class File(NamedTuple):
    """The main file of a format, as written by `export`."""

    name: str
    size: int  # bytes
    result: str  # of the comparison with the checkpoint, a sentence


def export(
    checkpoint: Checkpoint, output: str | os.PathLike, views: int, formats: Sequence[str] = DEFAULT_FORMATS
) -> list[File]:
    """Writes the new directory `output`: the formats, config.json and a model card.

    Each format is loaded in a separate process and compared with the checkpoint, see `check.check`. 'pytorch' includes
    'safetensors'. Raises UserError if a format is unknown or cannot represent the network, if a file cannot be written
    or loaded, or if its results differ. Nothing is written then.
    """
    check_formats(formats)
    names = [name for name in FORMATS if name in formats or (name == 'safetensors' and 'pytorch' in formats)]
    portable.check_network(checkpoint.network, names)
    with atomic_directory(output) as path:
        folder = pathlib.Path(path)
        for name in names:
            write(folder, name, checkpoint, views)
        results = check.check(path, names, checkpoint, views)
        (folder / 'config.json').write_text(json.dumps(hub_config(checkpoint, views), indent=2))
        (folder / 'README.md').write_text(card.card(checkpoint, views, results), encoding='utf-8')
        return [File(FORMATS[name], (folder / FORMATS[name]).stat().st_size, results[name]) for name in names]


def check_formats(formats: Sequence[str]) -> None:
    """Raises UserError for an unknown format."""
    for name in formats:
        if name not in FORMATS:
            raise UserError(f'--formats={",".join(formats)}: {name!r} is no format.{did_you_mean(name, FORMATS)}')


def write(folder: pathlib.Path, name: str, checkpoint: Checkpoint, views: int) -> None:
    """Writes the files of one format into a folder."""
    path = folder / FORMATS[name]
    match name:
        case 'safetensors':
            safetensors.write(str(folder), checkpoint)
        case 'pytorch':
            path.write_text(pytorch_module.pytorch_module(checkpoint, views), encoding='utf-8')
            mean = {'mean': portable.mean_CHW(checkpoint)}
            safetensors.write_tensors(folder / pytorch_module.MEAN_FILE_NAME, mean)
        case 'onnx':
            path.write_bytes(onnx_model.onnx_model(checkpoint, views))
        case 'stablehlo':
            path.write_bytes(stablehlo.stablehlo(checkpoint, views))


def hub_config(checkpoint: Checkpoint, views: int) -> dict[str, Any]:
    """Returns config.json: the keys of a classifier on the Hub, and this package's settings under 'alexnet_jax'."""
    counts = collections.Counter(checkpoint.class_names)  # ImageNet has two classes named 'crane'
    names = [name if counts[name] == 1 else f'{name} ({i})' for i, name in enumerate(checkpoint.class_names)]
    return {
        'model_type': 'alexnet',
        'architectures': ['AlexNet'],
        'num_labels': len(names),
        'id2label': {str(i): name for i, name in enumerate(names)},
        'label2id': {name: i for i, name in enumerate(names)},
        'image_size': checkpoint.record_size,
        'crop_size': checkpoint.image_size,
        'views': views,
        'alexnet_jax': {'step': checkpoint.step, 'config': checkpoint.config},
    }
