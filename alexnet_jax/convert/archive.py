"""Finds and unpacks one file of a zip or tar archive."""

import contextlib
import gzip
import os
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, cast

from alexnet_jax.utils.errors import UserError, printable
from alexnet_jax.utils.files import MAX_PAX_HEADERS, MAX_TAR_HEADER_BYTES


def find(path: str, wanted: Callable[[str], bool]) -> str | None:
    """Returns the name of the only file in an archive whose base name is wanted.

    Returns None if there are none or several, or if the path is no readable archive.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
        else:
            with _open_tar(path) as (archive, _):
                names = list(_names(archive))
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
        with _open_tar(path) as (tar, window):
            entry = tar.extractfile(name)
            assert entry is not None  # `find` returns regular files only
            window.longest = sys.maxsize  # all headers have been read
            with entry:
                _copy(path, name, entry, tar.getmember(name).size, target)
    return target


def _names(archive: tarfile.TarFile) -> Iterator[str]:
    for entry in archive:
        if len(archive.pax_headers) > MAX_PAX_HEADERS:
            raise tarfile.ReadError('too many pax headers')
        if entry.isfile():
            yield entry.name


@contextlib.contextmanager
def _open_tar(path: str) -> Iterator[tuple[tarfile.TarFile, '_Bounded']]:
    """Opens a tar archive, which may be compressed by gzip."""
    with open(path, 'rb') as file:
        compressed = file.read(2) == b'\x1f\x8b'
    with (gzip.open if compressed else open)(path, 'rb') as file:
        window = _Bounded(cast(IO[bytes], file), _most_bytes(path))
        with tarfile.open(fileobj=cast(IO[bytes], window), mode='r:') as tar:
            yield tar, window


class _Bounded:
    """A file whose first `size` bytes can be read, for tarfile: little compressed data can unpack to any size.

    longest: the most bytes of one read, those of a header.
    """

    def __init__(self, file: IO[bytes], size: int):
        self._file, self._size, self.tell, self.seekable = file, size, file.tell, file.seekable
        self.longest = MAX_TAR_HEADER_BYTES

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.longest:
            raise tarfile.ReadError(f'a header of {size:,} bytes')
        self._check(self._file.tell() + size)
        return self._file.read(size)

    def seek(self, position: int) -> int:
        self._check(position)
        return self._file.seek(position)

    def _check(self, position: int) -> None:
        if position > self._size:
            raise tarfile.ReadError(f'it declares {position:,} bytes')


def _most_bytes(path: str) -> int:
    """Returns the most bytes that an archive may unpack to: weights and images hardly compress."""
    return 2**26 + 100 * os.path.getsize(path)


def _copy(path: str, name: str, content: IO[bytes], size: int, target: str) -> None:
    if size > _most_bytes(path):
        raise UserError(f'{path!r}: {printable(name)} declares {size:,} bytes, but the archive is too small for them.')
    with open(target, 'wb') as file:
        shutil.copyfileobj(content, file, 2**20)
