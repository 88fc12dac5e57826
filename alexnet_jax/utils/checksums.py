"""Lists of SHA-256 digests of the files of a checkpoint or of prepared data, in the format of `sha256sum -c`.

array_record detects damaged records, and damaged JSON often does not parse, but arrays with flipped bits load.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Container, Mapping

from alexnet_jax.utils.errors import UserError, printable
from alexnet_jax.utils.files import atomic_file, is_special, sync

FILE_NAME = 'SHA256SUMS'
_MAX_SHOWN = 4096  # characters of a path in messages


def sha256(path: str) -> str:
    """Returns the hexadecimal SHA-256 digest of a file."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def write(folder: str, known: Mapping[str, str] | None = None) -> None:
    """Forces a folder to disk, then atomically writes the digests of all its files.

    After a power failure, a folder with a list of digests is therefore complete. known: digests already computed, by
    relative path.
    """
    known = known or {}
    names = _files(folder)
    for name in names:
        sync(os.path.join(folder, name))
    for parent, _, _ in os.walk(folder, topdown=False):
        sync(parent)
    sync(os.path.dirname(os.path.abspath(folder)))  # which contains the name of the folder
    lines = [f'# {len(names)} files\n']  # a comment for sha256sum; reveals a truncated list
    lines += [f'{known.get(name) or sha256(os.path.join(folder, name))}  {name}\n' for name in names]
    with atomic_file(os.path.join(folder, FILE_NAME)) as file:
        file.writelines(lines)


def present(folder: str) -> bool:
    """Returns whether a folder has a list of digests. Raises OSError if the folder cannot be read."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.stat(os.path.join(folder, FILE_NAME))
        return True
    return False


def find_mismatches(folder: str, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
    """Returns 'PATH: problem' for each file that has changed since the list was written.

    Files that are not in the list are reported only if the list does not state the number of files, or if a reader of
    the folder might wait for them forever. wanted: selects, by relative path, the files whose digests are checked;
    missing files are always reported. Raises UserError if the permission to read a file is missing.
    """
    path = os.path.join(folder, FILE_NAME)
    try:
        listed, complete = _read_list(path)
        existing = set(_files(folder))
        special = {name for name in existing if is_special(os.path.join(folder, name))}
        names = sorted(listed.keys() | (special if complete else existing))
        problems = {name: _mismatch(folder, name, listed, existing, wanted) for name in names}
        paths = {name: printable(os.path.join(folder, name), _MAX_SHOWN) for name in names}
        return [f'{paths[name]}: {problem}' for name, problem in problems.items() if problem]
    except PermissionError as error:
        raise UserError(f'cannot read {error.filename!r}: {error.strerror}.') from error
    except ValueError as error:
        return [f'{path}: {error}']


def _read_list(path: str) -> tuple[dict[str, str], bool]:
    """Returns (digests by relative path, whether the list states the number of files). Raises ValueError."""
    try:
        if not os.path.isfile(path):
            raise FileNotFoundError
        with open(path, encoding='utf-8', errors='replace') as file:
            match = re.fullmatch(r'(?:# ([0-9]+) files\n)?((?:[0-9a-f]{64}  .+\n)*)', file.read())
    except FileNotFoundError:
        raise ValueError('missing') from None
    if not match:
        raise ValueError('not a list of SHA-256 digests')
    listed = {name: digest for digest, name in re.findall('(.{64})  (.+)\n', match[2])}
    if match[1] and int(match[1]) != len(listed):
        raise ValueError(f'it lists {len(listed)} of {int(match[1])} files')
    return listed, match[1] is not None


def _mismatch(folder: str, name: str, listed: Mapping[str, str], existing: Container[str], wanted) -> str | None:
    """Returns the problem of one file, or None. Raises PermissionError."""
    path = os.path.join(folder, name)
    try:
        if name not in existing:
            return 'missing'
        if not os.path.isfile(path):  # reading a pipe would block forever
            return 'not a file'
        if name not in listed:
            return f'not in {FILE_NAME} (remove it if it is not needed)'
        if wanted(name) and sha256(path) != listed[name]:
            return 'its content has changed (SHA-256 mismatch)'
    except PermissionError:
        raise
    except OSError as error:
        return f'cannot be read ({error.strerror})'
    return None


def _files(folder: str) -> list[str]:
    """Returns the sorted relative paths of all files below a folder, except the list; none if there is no folder."""

    def fail(error):
        if not isinstance(error, FileNotFoundError):
            raise error

    paths = (os.path.join(root, name) for root, _, names in os.walk(folder, onerror=fail) for name in names)
    return sorted({os.path.relpath(path, folder) for path in paths} - {FILE_NAME, f'{FILE_NAME}.tmp'})
