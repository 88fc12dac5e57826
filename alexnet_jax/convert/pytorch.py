"""PyTorch's state_dict files; nothing in them is executed."""

import contextlib
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator

from alexnet_jax.convert.weight_file import WeightFile, pair_tensors, printable, unreadable
from alexnet_jax.utils.errors import UserError
from alexnet_jax.utils.files import check_declared_size

# What a state_dict in a trainer's dict is made of. PyTorch's own list is longer, with some that allocate at will.
_HARMLESS = re.compile(
    r'collections\.(OrderedDict|Counter)|(__builtin__|builtins)\.set|torch\.([a-z]\w*|\w+Storage|Size)'
    r'|torch\.storage\.\w+|torch\.nn\.parameter\.Parameter|torch\._utils\._rebuild_(tensor|parameter)\w*'
)


def read(path: str) -> WeightFile:
    """Reads the tensors, in the order of the file; `weights_only` runs none of its code.

    Raises UserError where PyTorch is missing, or the file is no state_dict.
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
                # A tensor may repeat one number along an axis for ever.
                check_declared_size(path, sum(v.numel() * v.element_size() for v in tensors.values()))
                arrays = {k: (v.float() if v.is_floating_point() else v).numpy() for k, v in tensors.items()}
                return WeightFile(path, pair_tensors(path, arrays))
    except UserError:
        raise
    except Exception as error:  # torch has a kind for every way in which a file can be wrong
        raise unreadable(path, 'a state_dict written by torch.save', error) from error
    what = type(loaded).__name__
    if isinstance(loaded, dict):
        kinds = [f'{printable(str(key))} ({type(value).__name__})' for key, value in list(loaded.items())[:8]]
        what = 'a dict with ' + ', '.join(kinds)
    raise UserError(f'{path!r}: expected a state_dict (names and tensors), found {what}.')


def _pickled_names(path: str) -> Iterator[str]:
    """What the pickles of a PyTorch file would import, as 'module.name'; nothing is loaded."""
    with open(path, 'rb') as file:
        if file.read(4) != b'PK\3\4':  # as before PyTorch 1.6: five pickles, then numbers
            file.seek(0)
            for _ in range(5):
                yield from _names_in(file)
            return
        with zipfile.ZipFile(file) as archive:
            # `torch.save` does not compress.
            check_declared_size(path, sum(entry.file_size for entry in archive.infolist()))
            for entry in archive.infolist():
                if entry.filename.lower().endswith('.pkl'):
                    with archive.open(entry) as pickled:
                        yield from _names_in(pickled)


def _names_in(file) -> Iterator[str]:
    with contextlib.suppress(Exception):  # no pickle, or a damaged one: torch will say so
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ('GLOBAL', 'INST') and argument:
                yield argument.replace(' ', '.', 1)
            elif opcode.name == 'STACK_GLOBAL':
                yield 'unknown'
