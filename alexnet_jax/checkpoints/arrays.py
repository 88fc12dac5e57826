"""The arrays that the files of a checkpoint declare. They are checked before Orbax allocates memory for them."""

import json
import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore as ts


def check_stored(folder: str, like: Any) -> None:
    """Compares the arrays in the folder of an item, such as `params`, with a tree of arrays.

    Raises ValueError if a name or a shape differs, or if the files are too small for the arrays.
    """
    item = os.path.basename(folder)
    stored, wanted = (
        {_name(p): x.shape for p, x in jax.tree.leaves_with_path(t)} for t in (read_metadata(folder), like)
    )
    for name in {**wanted, **stored}:
        if stored.get(name) != wanted.get(name):
            found, expected = stored.get(name, 'missing'), wanted.get(name, 'nothing')
            raise ValueError(f'{item}/{name}: {found}; expected {expected}')
    size = sum(file.stat().st_size for file in pathlib.Path(folder).rglob('*'))
    if (num_bytes := sum(4 * x.size for x in jax.tree.leaves(like))) > 2**26 + 100 * size:  # not compressible
        raise ValueError(f'{item} declares {num_bytes:,} bytes, but its files have {size:,}')


def read_metadata(folder: str) -> Any:
    """Returns the array metadata of an item as a tree.

    Raises ValueError for chunks that tensorstore would allocate whatever their array declares: those that are
    larger, or compressed by blosc, which is decoded before the sizes are compared.
    """
    tree = ocp.StandardCheckpointHandler().metadata(pathlib.Path(folder)).tree
    for path, x in jax.tree.leaves_with_path(tree):
        name, chunk, zarr = f'{os.path.basename(folder)}/{_name(path)}', x.storage.chunk_shape, x.storage.zarr_metadata
        if any(c > max(1, side) for c, side in zip(chunk, x.shape, strict=True)):
            raise ValueError(f'{name}: chunks of {chunk}; expected at most {x.shape}')
        if zarr and (zarr.zarr_format != 2 or (zarr.compression and zarr.compression.algorithm != 'zstd')):
            raise ValueError(f'{name}: zarr {zarr.zarr_format}, {zarr.compression}; expected zarr 2, zstd')
    return tree


def read_shapes(folder: str) -> list[tuple[int, ...]]:
    """Returns the shapes of the arrays of an item, sorted. Raises ValueError if they cannot be read.

    For checkpoints of this run: nothing is checked. Unlike `read_metadata`, it leaks no memory. Orbax calls
    `tensorstore.Spec.to_json` for each array, which never frees its result (tensorstore 0.1.86).
    """
    files = {'driver': 'file', 'path': os.path.join(folder, '')}
    database = ts.KvStore.open({'driver': 'ocdbt', 'base': files}).result()
    keys = [key for key in database.list().result() if key.endswith(b'/.zarray')]
    return sorted(tuple(json.loads(database[key])['shape']) for key in keys)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='/')
