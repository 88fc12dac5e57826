"""Paths, and files and folders that appear whole or not at all."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from typing import IO

from alexnet_jax.utils.errors import UserError, first_line


def absolute_local_path(path: str | os.PathLike) -> str:
    """A path made absolute, without a slash at its end; raises UserError for gs://bucket/run, and for ~ in it."""
    path = os.fspath(path)
    if path.startswith('~/'):
        raise UserError(f'{path!r}: the shell has left ~ as it is, behind a =; write $HOME{path[1:]} instead.')
    if '://' in path:
        raise UserError(
            f'{path!r} is a remote path, which is not supported: download it, or mount the bucket (gcsfuse, '
            'mountpoint-s3), and give the path there.'
        )
    return os.path.abspath(path)


def check_new(path: str) -> None:
    """Raises UserError where the file or folder that a command is to write exists already, be it as a dangling link."""
    if os.path.lexists(path):
        raise UserError(f'{path!r} exists already; remove it or choose another --output.')


def check_declared_size(path: str, declared: int) -> None:
    """Raises ValueError where a file declares more bytes than it has: what grows when it is read was made to."""
    if declared > (size := os.path.getsize(path)):
        raise ValueError(f'{size} bytes that declare {declared}')


@contextlib.contextmanager
def atomic_file(path: str, mode: str = 'w', *, newline: str | None = None) -> Iterator[IO]:
    """A file to write that takes the place of `path`, in one move, when the context ends without an error.

    Its bytes are on the disk before. Text is UTF-8. Raises OSError; what was at `path` stays then.
    """
    partial = f'{path}.tmp'
    try:
        with open(partial, mode, encoding=None if 'b' in mode else 'utf-8', newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise


@contextlib.contextmanager
def file_lock(path: str, doing: str):
    """Holds a lock file, which the system frees however that ends. Raises UserError if another process holds it."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, 'a'))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f'another process is {doing}; wait for it, or stop it.') from error
        except OSError as error:
            raise UserError(f'the lock {path!r} cannot be taken: {error.strerror}.') from error
        if not os.path.exists(path) or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise UserError(f'another process was just {doing}; try again.')  # and has removed the file
        yield


@contextlib.contextmanager
def atomic_directory(output: str | os.PathLike) -> Iterator[str]:
    """A sibling of `output` for one process to write into; renamed to it at the end, removed where that is not reached.

    Raises UserError where it cannot be written, or another process is at it.
    """
    output = absolute_local_path(output)
    partial = os.path.join(os.path.dirname(output), f'.{os.path.basename(output)}.incomplete')
    try:
        os.makedirs(partial, exist_ok=True)
        # Not inside: it is removed, and a folder that another process has taken away meanwhile must not count.
        with file_lock(f'{partial}.lock', f'writing {output!r}'):
            try:
                shutil.rmtree(partial)  # of a run that was killed
                os.makedirs(partial)
                yield partial
                os.rename(partial, output)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                os.remove(f'{partial}.lock')
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # array_record, orbax and tensorstore: each its own kind
        reason = getattr(error, 'strerror', None) or first_line(error)
        raise UserError(f'cannot write {output!r}: {reason}.') from error


def as_utf8(name: str) -> str:
    """A file name as valid UTF-8: what is not is replaced."""
    return os.fsencode(name).decode('utf-8', 'replace')
