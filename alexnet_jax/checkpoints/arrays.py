"""The arrays that the files of a checkpoint declare. They are checked before Orbax allocates memory for them."""

import json
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np
import tensorstore as ts

Shapes = dict[str, tuple[int, ...]]  # by the names in Orbax's files, such as `conv1.kernel`


def shapes_by_name(tree: Any) -> Shapes:
    """Returns the shapes of the arrays of a tree."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='.'): np.shape(x) for path, x in leaves}


def check_declared(folder: str, expected: Shapes) -> None:
    """Checks what the folder of an item, such as `params`, declares about its arrays.

    Orbax's `metadata` is not used: for each array it calls `tensorstore.Spec.to_json`, which never frees its result
    (tensorstore 0.1.86). Only the expected names are read, because a crafted database can list names without end.

    Args:
      folder: the folder of the item.
      expected: the names and shapes of its arrays, see `shapes_by_name`.

    Raises:
      ValueError: a name or a shape differs; or an array is stored in a way for which Orbax and tensorstore would
        allocate more memory than its shape and type need. These are: another driver; chunks larger than the array;
        elements that are arrays themselves; blosc, which is decoded before the sizes are compared.
    """
    item = os.path.basename(folder)
    tree = json.loads(pathlib.Path(folder, '_METADATA').read_bytes())
    if tree.get('use_zarr3') or tree.get('use_ocdbt', True) is not True:  # selects Orbax's driver
        raise ValueError(f'{item}/_METADATA: another driver; expected zarr 2 in OCDBT')
    entries = tree['tree_metadata'].values()
    entries = [x for x in entries if not x['value_metadata']['skip_deserialize']]  # skipped: empty nodes
    names = {'.'.join(key['key'] for key in x['key_metadata']) for x in entries}
    if unexpected := names - expected.keys():
        raise ValueError(f'{item}/{min(unexpected)}: unexpected; expected {len(expected)} other arrays')
    files = {'driver': 'file', 'path': os.path.join(folder, '')}
    database = ts.KvStore.open({'driver': 'ocdbt', 'base': files}).result()
    for name, shape in expected.items():
        stored = database.read(f'{name}/.zarray').result()
        if name not in names or stored.state != 'value':
            raise ValueError(f'{item}/{name}: missing; expected {shape}')
        declared = json.loads(stored.value)
        found, chunks, dtype = tuple(declared['shape']), tuple(declared['chunks']), declared['dtype']
        if found != shape:
            raise ValueError(f'{item}/{name}: {found}; expected {shape}')
        if any(c > max(1, side) for c, side in zip(chunks, shape, strict=True)):
            raise ValueError(f'{item}/{name}: chunks of {chunks}; expected at most {shape}')
        if (compressor := (declared['compressor'] or {}).get('id')) not in (None, 'zstd'):
            raise ValueError(f'{item}/{name}: compressed by {compressor!r}; expected zstd')
        if not re.fullmatch('bfloat16|[<>|][biuf][1248]', str(dtype)):
            raise ValueError(f'{item}/{name}: elements of type {dtype!r}; expected numbers')


def check_size(folder: str, like: Any) -> None:
    """Raises ValueError if the files of an item are too small for the float32 arrays of a tree.

    Only for arrays that cannot be compressed a hundred times: the optimizer state of an untrained network can.
    """
    size = sum(file.stat().st_size for file in pathlib.Path(folder).rglob('*'))
    if (num_bytes := sum(4 * x.size for x in jax.tree.leaves(like))) > 2**26 + 100 * size:
        raise ValueError(f'{os.path.basename(folder)} declares {num_bytes:,} bytes, but its files have {size:,}')
