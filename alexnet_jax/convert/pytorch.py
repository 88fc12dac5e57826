"""Reads PyTorch state_dict files without executing code from them."""

import contextlib
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator

from alexnet_jax.convert.weight_file import WeightFile, pair_tensors, printable, unreadable
from alexnet_jax.utils.errors import UserError
from alexnet_jax.utils.files import check_declared_size

# Classes that occur in state_dicts and training checkpoints. PyTorch's own list of safe names is longer, and some of
# its entries can allocate any amount of memory.
_HARMLESS = re.compile(
    r'collections\.(OrderedDict|Counter)|(__builtin__|builtins)\.set|torch\.([a-z]\w*|\w+Storage|Size)'
    r'|torch\.storage\.\w+|torch\.nn\.parameter\.Parameter|torch\._utils\._rebuild_(tensor|parameter)\w*'
)


def read(path: str) -> WeightFile:
    """Reads the tensors in the order of the file. `weights_only` keeps PyTorch from running the file's code.

    Raises UserError if PyTorch is not installed or the file is not a state_dict.
    """
    try:
        import torch
    except ImportError:
        raise UserError(f"reading {path!r} takes PyTorch: pip install 'alexnet_jax[oracle]'.") from None
    try:
        for name in _pickled_names(path):
            if not _HARMLESS.fullmatch(name):
                raise UserError(
                    f'{path!r} holds a pickled Python object ({printable(name)}), and loading it could run code: '
                    'it is refused. Expected a state_dict: torch.save(model.state_dict(), FILE).'
                )
        with warnings.catch_warnings(action='ignore'):
            loaded = torch.load(path, map_location='cpu', weights_only=True)
            for key in ('state_dict', 'model_state_dict', 'model'):
                if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
                    loaded = loaded[key]
            if isinstance(loaded, dict) and all(isinstance(value, torch.Tensor) for value in loaded.values()):
                tensors = {str(key): value.detach() for key, value in loaded.items()}
                # A tensor with stride 0 can declare any size with a single stored number.
                check_declared_size(path, sum(v.numel() * v.element_size() for v in tensors.values()))
                arrays = {k: (v.float() if v.is_floating_point() else v).numpy() for k, v in tensors.items()}
                return WeightFile(path, pair_tensors(path, arrays))
    except UserError:
        raise
    except Exception as error:  # torch raises many types for damaged files
        raise unreadable(path, 'a state_dict written by torch.save', error) from error
    what = type(loaded).__name__
    if isinstance(loaded, dict):
        kinds = [f'{printable(str(key))} ({type(value).__name__})' for key, value in list(loaded.items())[:8]]
        what = 'a dict with ' + ', '.join(kinds)
    raise UserError(f'{path!r}: expected a state_dict (names and tensors), found {what}.')


def _pickled_names(path: str) -> Iterator[str]:
    """Yields the names that the pickles of a PyTorch file would import, as 'module.name'. Loads nothing."""
    with open(path, 'rb') as file:
        if file.read(4) != b'PK\3\4':  # format before PyTorch 1.6: five pickles, then the values
            file.seek(0)
            for _ in range(5):
                yield from _names_in(file)
            return
        with zipfile.ZipFile(file) as archive:
            # torch.save does not compress, so a much larger declared size is an attack or damage.
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
