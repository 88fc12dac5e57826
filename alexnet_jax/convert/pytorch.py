"""Reads PyTorch state_dict files without executing code from them."""

import contextlib
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator

from alexnet_jax.convert.weight_file import WeightFile, pair_tensors, printable, reading
from alexnet_jax.utils.errors import UserError
from alexnet_jax.utils.files import check_declared_size

# Classes that occur in state_dicts and training checkpoints. Some entries of PyTorch's own, longer list of safe names
# can allocate any amount of memory.
_HARMLESS = re.compile(
    r'collections\.(OrderedDict|Counter)|(__builtin__|builtins)\.set|torch\.([a-z]\w*|\w+Storage|Size)'
    r'|torch\.storage\.\w+|torch\.nn\.parameter\.Parameter|torch\._utils\._rebuild_(tensor|parameter)\w*'
)


def read(path: str) -> WeightFile:
    """Reads the tensors in the order of the file. `weights_only` prevents PyTorch from running code in the file.

    Raises UserError if PyTorch is not installed or the file is not a state_dict.
    """
    try:
        import torch
    except ImportError:
        raise UserError(f"{path!r}: reading it requires PyTorch; use pip install 'alexnet_jax[oracle]'.") from None
    with reading(path, 'a state_dict written by torch.save'), warnings.catch_warnings(action='ignore'):
        for name in _pickled_names(path):
            if not _HARMLESS.fullmatch(name):
                raise UserError(
                    f'refused, because the file contains a pickled Python object ({printable(name)}) that could run '
                    'code when loaded; use torch.save(model.state_dict(), FILE).'
                )
        loaded = torch.load(path, map_location='cpu', weights_only=True)
        for key in ('state_dict', 'model_state_dict', 'model'):
            if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
                loaded = loaded[key]
        if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
            found = type(loaded).__name__
            if isinstance(loaded, dict):
                types = [f'{printable(str(key))} ({type(value).__name__})' for key, value in list(loaded.items())[:8]]
                found = 'a dict with ' + ', '.join(types)
            raise UserError(f'expected a state_dict (names and tensors), found {found}.')
        tensors = {str(key): value.detach() for key, value in loaded.items()}
        # A tensor with stride 0 can declare any size with a single stored number.
        check_declared_size(path, sum(v.numel() * v.element_size() for v in tensors.values()))
        arrays = {k: (v.float() if v.is_floating_point() else v).numpy() for k, v in tensors.items()}
        return WeightFile(path, pair_tensors(arrays))


def _pickled_names(path: str) -> Iterator[str]:
    """Yields the names ('module.name') that the pickles of a PyTorch file would import. Loads nothing."""
    with open(path, 'rb') as file:
        if file.read(4) != b'PK\3\4':  # before PyTorch 1.6: five pickles, then the values
            file.seek(0)
            for _ in range(5):
                yield from _names_in(file)
            return
        with zipfile.ZipFile(file) as archive:
            # torch.save does not compress, so a file with a larger declared size is damaged or an attack.
            check_declared_size(path, sum(entry.file_size for entry in archive.infolist()))
            for entry in archive.infolist():
                if entry.filename.lower().endswith('.pkl'):
                    with archive.open(entry) as pickled:
                        yield from _names_in(pickled)


def _names_in(file) -> Iterator[str]:
    with contextlib.suppress(Exception):  # not a pickle, or damaged: torch.load reports it
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ('GLOBAL', 'INST') and argument:
                yield argument.replace(' ', '.', 1)
            elif opcode.name == 'STACK_GLOBAL':
                yield 'unknown'
