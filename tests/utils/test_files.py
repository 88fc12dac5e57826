"""Locks, and folders that are written whole."""

import errno
import os
import pathlib

import pytest

from alexnet_jax.utils.errors import UserError
from alexnet_jax.utils.files import atomic_directory, file_lock


def test_only_one_at_a_time(tmp_path):
    lock = str(tmp_path / 'lock')
    with file_lock(lock, 'training'):
        with pytest.raises(UserError, match='another process is training'):
            with file_lock(lock, 'training'):
                raise AssertionError
    with file_lock(lock, 'training'):
        pass


def test_a_directory_is_written_whole_and_by_one(tmp_path):
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
