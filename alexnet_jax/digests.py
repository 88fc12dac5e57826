"""SHA-256 of every file of a checkpoint's step or of prepared data, in a list that `sha256sum -c` reads too.

array_record sees damage in a record, JSON often; a bit flipped in an array's data is loaded without a word.
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping

from alexnet_jax.errors import UserError

FILE_NAME = 'SHA256SUMS'


def digest(path: str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def write(folder: str, known: Mapping[str, str] | None = None) -> None:
    """Writes the list of all files below a folder, in one move.

    known: digests made before, by path below the folder.
    """
    known = known or {}
    names = _files(folder)
    lines = [f'# {len(names)} files\n']  # a comment for sha256sum; a list cut short would go unseen
    lines += [f'{known.get(name) or digest(os.path.join(folder, name))}  {name}\n' for name in names]
    path = os.path.join(folder, FILE_NAME)
    with open(path + '.tmp', 'w', encoding='utf-8') as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + '.tmp', path)


def has(folder: str) -> bool:
    """Whether a folder has a list. Raises OSError where it cannot be told."""
    try:
        os.stat(os.path.join(folder, FILE_NAME))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def problems(folder: str, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
    """What is not as it was when the list was written, as 'PATH: what'; empty where all is well.

    A file that is not in the list is no matter, unless the list does not say how many there are, as none did once.

    wanted: which files to read, by their path below the folder; those that are missing are always told.

    Raises:
      UserError: a file may not be read.
    """
    try:
        return _problems(folder, wanted)
    except PermissionError as error:
        raise UserError(f'{error.filename!r} may not be read: {error.strerror}.') from error


def _problems(folder: str, wanted: Callable[[str], bool]) -> list[str]:
    path = os.path.join(folder, FILE_NAME)
    if not os.path.isfile(path):
        return [f'{path}: missing']
    listed, found, count = {}, [], None
    try:
        with open(path, encoding='utf-8', errors='replace') as file:
            lines = file.readlines()
    except FileNotFoundError:  # since then
        return [f'{path}: missing']
    if lines and (head := re.fullmatch(r'# ([0-9]+) files\n', lines[0])):
        count, lines = int(head[1]), lines[1:]
    for line in lines:
        if not (match := re.fullmatch(r'([0-9a-f]{64})  (.+)\n', line)):
            return [f'{path}: not a list of digests']
        listed[match[2]] = match[1]
    if count not in (None, len(listed)):
        return [f'{path}: it lists {len(listed)} of {count} files']
    there = set(_files(folder))
    for name in sorted(listed if count is not None else listed.keys() | there):
        file_path = os.path.join(folder, name)
        try:
            if name not in there:
                found.append(f'{file_path}: missing')
            elif name not in listed:
                found.append(f'{file_path}: not in {FILE_NAME} (remove it if it does not belong there)')
            elif not os.path.isfile(file_path):  # to read a pipe is to wait for ever
                found.append(f'{file_path}: not a file')
            elif wanted(name) and digest(file_path) != listed[name]:
                found.append(f'{file_path}: its bytes have changed (SHA-256)')
        except PermissionError:
            raise
        except OSError as error:
            found.append(f'{file_path}: cannot be read ({error.strerror})')
    return found


def _files(folder: str) -> list[str]:
    """Paths of all files below a folder, but for the list, with / and in a fixed order; none where it is gone."""
    found = []

    def fail(error):
        if not isinstance(error, FileNotFoundError):
            raise error

    for root, _, names in os.walk(folder, onerror=fail):
        found += [os.path.relpath(os.path.join(root, name), folder) for name in names]
    return sorted(name.replace(os.sep, '/') for name in found if name not in (FILE_NAME, FILE_NAME + '.tmp'))
