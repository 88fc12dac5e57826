"""SHA-256 of every file of a checkpoint's step or of prepared data, in a list that `sha256sum -c` reads too.

array_record sees damage in a record, JSON often; a bit flipped in an array's data is loaded without a word.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Container, Mapping

from alexnet_jax.utils.errors import UserError
from alexnet_jax.utils.files import atomic_file

FILE_NAME = 'SHA256SUMS'


def sha256(path: str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def write(folder: str, known: Mapping[str, str] | None = None) -> None:
    """Writes the list of all files below a folder, in one move. known: digests made before, by path below it."""
    known = known or {}
    names = _files(folder)
    lines = [f'# {len(names)} files\n']  # a comment for sha256sum; a list cut short would go unseen
    lines += [f'{known.get(name) or sha256(os.path.join(folder, name))}  {name}\n' for name in names]
    with atomic_file(os.path.join(folder, FILE_NAME)) as file:
        file.writelines(lines)


def present(folder: str) -> bool:
    """Whether a folder has a list. Raises OSError where it cannot be told."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.stat(os.path.join(folder, FILE_NAME))
        return True
    return False


def find_mismatches(folder: str, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
    """Files that have changed since the list was written, as 'PATH: what is wrong'; empty if none have.

    A file that is not in the list does not matter, unless the list does not say how many there are. wanted: which files
    to read, by their path below the folder; those that are missing are always reported. Raises UserError where a file
    may not be read.
    """
    path = os.path.join(folder, FILE_NAME)
    try:
        listed, complete = _read_list(path)
        there = set(_files(folder))
        names = sorted(listed if complete else listed.keys() | there)
        problems = {name: _mismatch(folder, name, listed, there, wanted) for name in names}
        return [f'{os.path.join(folder, name)}: {problem}' for name, problem in problems.items() if problem]
    except PermissionError as error:
        raise UserError(f'{error.filename!r} may not be read: {error.strerror}.') from error
    except ValueError as error:
        return [f'{path}: {error}']


def _read_list(path: str) -> tuple[dict[str, str], bool]:
    """(digests by path below the folder, whether the list says how many there are). Raises ValueError."""
    try:
        if not os.path.isfile(path):
            raise FileNotFoundError
        with open(path, encoding='utf-8', errors='replace') as file:
            match = re.fullmatch(r'(?:# ([0-9]+) files\n)?((?:[0-9a-f]{64}  .+\n)*)', file.read())
    except FileNotFoundError:
        raise ValueError('missing') from None
    if not match:
        raise ValueError('not a list of digests')
    listed = {name: digest for digest, name in re.findall('(.{64})  (.+)\n', match[2])}
    if match[1] and int(match[1]) != len(listed):
        raise ValueError(f'it lists {len(listed)} of {int(match[1])} files')
    return listed, match[1] is not None


def _mismatch(folder: str, name: str, listed: Mapping[str, str], there: Container[str], wanted) -> str | None:
    """What is wrong with one file; None if nothing is. Raises PermissionError."""
    path = os.path.join(folder, name)
    try:
        if name not in there:
            return 'missing'
        if name not in listed:
            return f'not in {FILE_NAME} (remove it if it does not belong there)'
        if not os.path.isfile(path):  # reading a pipe would wait for ever
            return 'not a file'
        if wanted(name) and sha256(path) != listed[name]:
            return 'its bytes have changed (SHA-256)'
    except PermissionError:
        raise
    except OSError as error:
        return f'cannot be read ({error.strerror})'
    return None


def _files(folder: str) -> list[str]:
    """Paths of all files below a folder, but for the list, in a fixed order; none where it is gone."""

    def fail(error):
        if not isinstance(error, FileNotFoundError):
            raise error

    paths = (os.path.join(root, name) for root, _, names in os.walk(folder, onerror=fail) for name in names)
    return sorted({os.path.relpath(path, folder) for path in paths} - {FILE_NAME, f'{FILE_NAME}.tmp'})
