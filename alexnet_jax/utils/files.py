"""Path checks, locks, and atomic writes of files and folders."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from typing import IO, Any

from alexnet_jax.utils.errors import UserError, check_type, first_line

MAX_TAR_HEADER_BYTES = 2**13  # of a header with the member's name; older versions of tarfile need its square of time
MAX_PAX_HEADERS = 100  # for all members of a tar archive: tarfile copies them for each
# What servers and programs leave under the names of other files, by the first bytes in lower case.
_FOREIGN = {
    b'version https://git-lfs': 'a Git LFS pointer, not the file itself: use git lfs pull',
    b'<!doctype': 'a web page, not the file itself: download it again',
    b'<html': 'a web page, not the file itself: download it again',
    b'\x1f\x8b': 'compressed by gzip: unpack it with gunzip or tar -xzf',
    b'bzh': 'compressed by bzip2: unpack it with bunzip2 or tar -xjf',
    b'\xfd7zxz': 'compressed by xz: unpack it with unxz or tar -xJf',
}


def foreign_kind(start: bytes) -> str | None:
    """Returns what a file really is, with a remedy, from its first bytes; None for all but a few common kinds."""
    text = start.lstrip().lower()
    return next((kind for beginning, kind in _FOREIGN.items() if text.startswith(beginning)), None)


def describe_damage(path: str, error: Exception) -> str:
    """Returns a sentence on a file that a library failed to read with `error`: what the file is, or the reason."""
    try:
        with open(path, 'rb') as file:
            kind = foreign_kind(file.read(512))
    except OSError as lost:
        kind, error = None, lost
    reason = getattr(error, 'strerror', None) or first_line(error)
    return f'{path!r} is {kind}.' if kind else f'{path!r} cannot be read: {reason}.'


def as_path(path: str | os.PathLike[str]) -> str:
    """Returns a path as str. Raises UserError if it is not a path."""
    check_type('a path', path, str | os.PathLike, 'str or pathlib.Path')
    return os.fsdecode(path)


def absolute_local_path(path: str | os.PathLike[str]) -> str:
    """Returns an absolute path without a trailing slash. Raises UserError for remote paths and a leading ~/."""
    path = as_path(path)
    if path.startswith('~/'):
        raise UserError(f'{path!r}: the shell does not expand ~ after =; use $HOME{path[1:]} instead.')
    if '://' in path:
        raise UserError(
            f'{path!r}: remote paths are not supported; download it, or mount the bucket (gcsfuse, mountpoint-s3) and '
            'use the mounted path.'
        )
    return os.path.abspath(path)


def cache_folder() -> str:
    """Returns the folder for files that can be made or fetched again. It may not exist."""
    base = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    return os.path.join(base, 'alexnet_jax')


def check_new(path: str) -> None:
    """Raises UserError if the output of a command exists, even as a dangling link, or is not valid UTF-8."""
    if as_utf8(path) != path:
        raise UserError(
            f'{path!r} is not valid UTF-8, as array_record and tensorstore expect; choose another --output.'
        )
    if os.path.lexists(path):
        raise UserError(f'{path!r} already exists; remove it or choose another --output.')


def check_declared_size(path: str, declared: int) -> None:
    """Raises ValueError if a file declares more bytes than it has, as only manipulated or truncated files do."""
    if declared > (size := os.path.getsize(path)):
        raise ValueError(f'{size} bytes, but {declared} declared')


def is_special(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is a pipe, a socket or a device: opening it may block forever, and it may have no end."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def open_regular(path: str | os.PathLike[str], mode: str = 'r', **options: Any) -> IO[Any]:
    """Opens a file of others like `open`. Raises UserError if it is special."""
    if is_special(path):
        raise UserError(f'{os.fspath(path)!r} is not a regular file')
    return open(path, mode, **options)


def sync(path: str) -> None:
    """Forces a file, or the list of names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str, mode: str = 'w', *, newline: str | None = None) -> Iterator[IO[Any]]:
    """Opens a temporary file that atomically replaces `path` when the context exits without an error.

    The file is synced to disk before, and its folder after it replaces `path`. Text is UTF-8. If the context raises an
    error, `path` is unchanged.
    """
    partial = f'{path}.tmp'
    with contextlib.suppress(FileNotFoundError):  # in a folder of others, it may be a link to any file, or a pipe
        os.remove(partial)
    try:
        with open(partial, mode, encoding=None if 'b' in mode else 'utf-8', newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(os.path.dirname(path) or '.')
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise


def _open_here(path: str, flags: int) -> int:
    """Opens a file in a folder of others: a link may lead to any file, and a pipe would wait for its reader."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


@contextlib.contextmanager
def file_lock(path: str, doing: str) -> Iterator[None]:
    """Holds a lock on a file, which the system releases if the process dies. Raises UserError if it is locked."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, 'a', opener=_open_here))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f'another process is {doing}; wait for it, or stop it.') from error
        except OSError as error:
            raise UserError(f'cannot lock {path!r}: {error.strerror}.') from error
        if not os.path.exists(path) or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            # Another process has removed the file after it was opened here.
            raise UserError(f'another process was just {doing}; try again.')
        yield


@contextlib.contextmanager
def atomic_directory(output: str | os.PathLike[str]) -> Iterator[str]:
    """Yields a temporary folder that is renamed to `output` when the context exits, or removed after an error.

    Raises UserError if the folder cannot be written, or if another process is writing the same output.
    """
    output = absolute_local_path(output)
    partial = os.path.join(os.path.dirname(output), f'.{os.path.basename(output)}.incomplete')
    with as_write_error(output):
        os.makedirs(partial, exist_ok=True)
        # The lock file is outside the folder, because another process may remove the folder.
        with file_lock(f'{partial}.lock', f'writing {output!r}'):
            try:
                shutil.rmtree(partial)  # left by a run that was killed
                os.makedirs(partial)
                yield partial
                os.rename(partial, output)
                sync(os.path.dirname(output))
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                os.remove(f'{partial}.lock')


@contextlib.contextmanager
def as_write_error(output: str) -> Iterator[None]:
    """Converts the errors of a folder that cannot be written to UserError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # different types in array_record, orbax, tensorstore
        reason = getattr(error, 'strerror', None) or first_line(error)
        raise UserError(f'cannot write {output!r}: {reason}.') from error


def as_utf8(name: str) -> str:
    """Returns a file name as valid UTF-8, with invalid bytes replaced."""
    return os.fsencode(name).decode('utf-8', 'replace')
