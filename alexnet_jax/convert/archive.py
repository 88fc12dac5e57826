"""Finds and unpacks one file of a zip or tar archive."""

import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from typing import IO

from alexnet_jax.convert.weight_file import printable
from alexnet_jax.utils.errors import UserError


def find(path: str, wanted: Callable[[str], bool]) -> str | None:
    """Returns the name of the only file in an archive whose base name is wanted.

    Returns None if there are none or several, or if the path is no readable archive.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
        else:
            with tarfile.open(path) as archive:
                names = [entry.name for entry in archive if entry.isfile()]
    except Exception:  # damaged archives raise many types
        return None
    found = [name for name in names if wanted(os.path.basename(name))]
    return found[0] if len(found) == 1 else None


def unpack(path: str, name: str, folder: str) -> str:
    """Writes one file of an archive into a folder, under its base name, and returns its path.

    Raises UserError if the file declares an implausible size, and an exception of any type if the archive is damaged.
    """
    target = os.path.join(folder, os.path.basename(name))
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive, archive.open(name) as content:
            _copy(path, name, content, archive.getinfo(name).file_size, target)
    else:
        with tarfile.open(path) as tar:
            entry = tar.extractfile(name)
            assert entry is not None  # `find` returns regular files only
            with entry:
                _copy(path, name, entry, tar.getmember(name).size, target)
    return target


def _copy(path: str, name: str, content: IO[bytes], size: int, target: str) -> None:
    if size > 2**26 + 100 * os.path.getsize(path):  # weights and images hardly compress
        raise UserError(f'{path!r}: {printable(name)} declares {size:,} bytes, but the archive is too small for them.')
    with open(target, 'wb') as file:
        shutil.copyfileobj(content, file, 2**20)
