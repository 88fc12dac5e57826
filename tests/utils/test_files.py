"""Locks, and folders that are written atomically."""

import errno
import os
import pathlib

import pytest

from alexnet_jax.utils.errors import UserError
from alexnet_jax.utils.files import atomic_directory, check_new, file_lock


def test_lock_is_exclusive(tmp_path):
    lock = str(tmp_path / 'lock')
    with file_lock(lock, 'training'):
        with pytest.raises(UserError, match='another process is training'):
            with file_lock(lock, 'training'):
                raise AssertionError
    with file_lock(lock, 'training'):
        pass


def test_directory_is_written_atomically_and_by_one(tmp_path):
    output = tmp_path / 'deep' / 'out'
    with atomic_directory(str(output)) as folder:
        (pathlib.Path(folder) / 'file').write_text('first')
        with pytest.raises(UserError, match='another process is writing .*deep/out'):
            with atomic_directory(str(output)):
                raise AssertionError
        assert not output.exists()
    assert (output / 'file').read_text() == 'first' and os.listdir(output.parent) == ['out']
    with pytest.raises(UserError, match='cannot write .*other.: No space'):
        with atomic_directory(str(output.parent / 'other')) as folder:
            (pathlib.Path(folder) / 'file').write_text('half')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(output.parent) == ['out']


def test_new_outputs_are_valid_and_do_not_exist(tmp_path):
    check_new(str(tmp_path / 'ünï[1]*'))
    (tmp_path / 'link').symlink_to(tmp_path / 'nothing')
    with pytest.raises(UserError, match="link' already exists; remove it"):
        check_new(str(tmp_path / 'link'))
    with pytest.raises(UserError, match='is not valid UTF-8'):
        check_new(os.fsdecode(bytes(tmp_path) + b'/\xff'))
