"""The files of activations: where they are written, their formats, and the space that they need."""

import json
import os
import shutil
import struct
from collections.abc import Mapping
from typing import IO

import numpy as np

from alexnet_jax.utils.errors import UserError
from alexnet_jax.utils.files import atomic_directory, atomic_file, check_new

SUFFIXES = ('.safetensors', '.npz')
LAYER = '{layer}'  # in a file name: one file for each layer


def check_output(output: str) -> None:
    """Raises UserError if `output` is no path for activations, or if it, or the folder of several files, exists."""
    folder, name = os.path.split(output)
    if not name.endswith(SUFFIXES):
        raise UserError(
            f'--output={output!r}: expected a name ending in {" or ".join(SUFFIXES)}; for one file a layer, use a new '
            f"folder and {LAYER}, as in 'f/{LAYER}.npz'."
        )
    if LAYER in name and not folder:
        raise UserError(f"--output={output!r}: expected a new folder for the files, as in 'f/{name}'.")
    check_new(folder if LAYER in name else output)


def existing_folder(output: str) -> str:
    """Returns the folder of the output file, or the parent of the new folder of several files."""
    folder, name = os.path.split(output)
    return (os.path.dirname(folder) if LAYER in name else folder) or '.'


def write(output: str, layers: Mapping[str, np.ndarray], about: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays of layers and those about their rows to one file, or to one for each layer; all or none."""
    folder, file_name = os.path.split(output)
    if LAYER not in file_name:
        with atomic_file(output, 'wb') as file:
            _write(file, {**layers, **about})
        return
    with atomic_directory(folder) as partial:
        for layer, array in layers.items():
            with open(os.path.join(partial, file_name.replace(LAYER, layer)), 'wb') as file:
                _write(file, {layer: array, **about})


def _write(file: IO, arrays: dict[str, np.ndarray]) -> None:
    if file.name.removesuffix('.tmp').endswith('.npz'):
        np.savez(file, **arrays)  # type: ignore[arg-type]
    else:
        _write_safetensors(file, arrays)


def check_space(folder: str, output: str, size: int) -> None:
    """Raises UserError if a folder has less space than it takes to write for `size` bytes of activations."""
    free = shutil.disk_usage(folder).free
    if free < 2 * size:
        raise UserError(
            f'{output!r} takes {size / 1e9:.1f} GB, and as much again while it is written, but {free / 1e9:.1f} GB are '
            'free; use another disk, fewer layers or fewer images.'
        )


def _write_safetensors(file: IO, arrays: dict[str, np.ndarray]) -> None:
    """Writes the safetensors format: header length (8 bytes), header (JSON), then the arrays one after another."""
    arrays = {name: _as_bytes(array) if array.dtype.kind == 'U' else array for name, array in arrays.items()}
    header, end = {}, 0
    for name, array in arrays.items():
        dtype = {'float32': 'F32', 'int32': 'I32', 'uint8': 'U8'}[array.dtype.name]
        header[name] = {'dtype': dtype, 'shape': array.shape, 'data_offsets': [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)  # so that the arrays are aligned
    file.write(struct.pack('<Q', len(text)) + text)
    for array in arrays.values():
        file.write(np.ascontiguousarray(array).data)


def _as_bytes(texts: np.ndarray) -> np.ndarray:
    """Converts strings to UTF-8, uint8 [N, L], padded with zeros."""
    encoded = np.array([os.fsencode(text) for text in texts])
    return encoded.view(np.uint8).reshape(len(encoded), -1)
