"""Reads safetensors files, and writes checkpoints as safetensors with this package's metadata."""

import json
import operator
import pathlib
import re
from typing import Any

import numpy as np

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.convert import layout
from alexnet_jax.convert.weight_file import WeightFile, pair_tensors, reading
from alexnet_jax.data import image_stats_file

FILE_NAME = 'model.safetensors'
METADATA_KEY = 'alexnet_jax'  # key of this package's metadata in a file
METADATA_FORMAT = 'the metadata that alexnet_jax convert writes'  # for error messages


def read(path: str) -> WeightFile:
    """Reads tensors in natural order of their names (features.3 before features.10): the format has no order.

    Raises UserError if the file is damaged or its metadata under `METADATA_KEY` is invalid.
    """
    import safetensors

    with reading(path, 'a safetensors file'), safetensors.safe_open(path, 'numpy') as file:
        names = sorted(file.keys(), key=lambda n: [int(p) if p.isdigit() else p for p in re.split(r'(\d+)', n)])
        layers = pair_tensors({name: file.get_tensor(name) for name in names})
        text = (file.metadata() or {}).get(METADATA_KEY)
    if text is None:
        return WeightFile(path, layers)
    with reading(path, METADATA_FORMAT):
        metadata = json.loads(text)
        metadata['config']['model'], metadata['config']['data']['image_size'], metadata['config']['data']['mean']
        operator.index(metadata['record_size'])  # raises TypeError
        if not all(isinstance(name, str) for name in metadata['class_names']):
            raise TypeError('class names must be strings')
    return WeightFile(path, layers, metadata=metadata)


def read_metadata(path: str) -> dict[str, Any] | None:
    """Returns the metadata that this package has written into a file, or None. Raises UserError for a damaged file."""
    import safetensors

    with reading(path, 'a safetensors file'), safetensors.safe_open(path, 'numpy') as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
        return None if text is None else json.loads(text)


def tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Returns the weights in PyTorch's layout, by name."""
    named = {}
    for layer in layout.from_params(checkpoint.network, checkpoint.image_size, checkpoint.params):
        named[f'{layer.name}.weight'], named[f'{layer.name}.bias'] = layer.weight, layer.bias
    return named


def write(folder: str, checkpoint: Checkpoint) -> None:
    """Writes the weights in PyTorch's layout (`FILE_NAME`) and the image statistics to a folder."""
    own = {'config': checkpoint.config, 'class_names': checkpoint.class_names, 'record_size': checkpoint.record_size}
    write_tensors(pathlib.Path(folder, FILE_NAME), tensors(checkpoint), {METADATA_KEY: json.dumps(own)})
    image_stats_file.save(folder, checkpoint.image_stats)


def write_tensors(path: pathlib.Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes contiguous arrays and metadata to a file."""
    import safetensors.numpy

    path.write_bytes(safetensors.numpy.save(arrays, metadata={'format': 'pt', **(metadata or {})}))
