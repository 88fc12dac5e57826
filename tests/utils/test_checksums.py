"""Checksums of a folder, and the damage they detect."""

import os
import re
import shutil
import subprocess

import pytest

from alexnet_jax.utils import checksums


def test_named_pipe_does_not_block(tmp_path):
    folder = _folder(tmp_path)
    (folder / 'one').unlink()
    os.mkfifo(folder / 'one')
    (problem,) = checksums.find_mismatches(str(folder))
    assert problem.endswith('/one: not a file')


@pytest.mark.parametrize(
    ('module', 'name'), [(os.path, 'isfile'), (re, 'fullmatch'), (checksums, '_files'), (checksums, 'sha256')]
)
def test_folder_removed_during_the_check(module, name, tmp_path, monkeypatch):
    """At any point of the check: files are reported missing, nothing is raised."""
    folder, before = _folder(tmp_path / 'step'), getattr(module, name)

    def call_then_remove(*args):
        found = before(*args)
        shutil.rmtree(folder, ignore_errors=True)
        return found

    monkeypatch.setattr(module, name, call_then_remove)
    found = checksums.find_mismatches(str(folder))
    monkeypatch.undo()
    assert found and not folder.exists()


def _folder(tmp_path):
    (tmp_path / 'a' / 'b').mkdir(parents=True)
    for name in ('one', 'a/two words', 'a/b/three'):
        (tmp_path / name).write_text(name)
    checksums.write(str(tmp_path))
    return tmp_path


def test_checksum_file_is_read_by_sha256sum(tmp_path):
    folder = _folder(tmp_path)
    theirs = subprocess.run(['sha256sum', '--strict', '-c', 'SHA256SUMS'], cwd=folder, capture_output=True, text=True)
    assert theirs.returncode == 0, theirs.stderr
    assert sorted(theirs.stdout.splitlines()) == ['a/b/three: OK', 'a/two words: OK', 'one: OK']
    assert not checksums.find_mismatches(str(folder))


@pytest.mark.parametrize(
    ('damage', 'problem'),
    [
        (lambda f: (f / 'one').write_text('oNe'), 'one: its content has changed'),
        (lambda f: (f / 'a' / 'two words').unlink(), 'a/two words: missing'),
        (lambda f: (f / 'SHA256SUMS').unlink(), 'SHA256SUMS: missing'),
        (lambda f: (f / 'SHA256SUMS').write_text('x' * 70 + '\n'), 'SHA256SUMS: not a list of SHA-256 digests'),
        # Truncated at the end of a line, as on a full disk.
        (lambda f: (f / 'SHA256SUMS').write_text((f / 'SHA256SUMS').read_text()[:-30]), 'SHA256SUMS: not a list'),
        (lambda f: os.truncate(f / 'SHA256SUMS', 10 + 64 + 2 + len('a/b/three') + 1), 'SUMS: it lists 1 of 3 files'),
        (lambda f: os.truncate(f / 'SHA256SUMS', 0), 'a/b/three: not in SHA256SUMS'),
        # A truncated list of an earlier version, which does not record the number of files.
        (
            lambda f: (f / 'SHA256SUMS').write_text((f / 'SHA256SUMS').read_text().split('\n', 2)[1] + '\n'),
            'a/two words: not in SHA256SUMS',
        ),
    ],
    ids=['changed', 'missing', 'no list', 'no digests', 'cut line', 'cut list', 'empty list', 'earlier version'],
)
def test_damage_is_named(tmp_path, damage, problem):
    folder = _folder(tmp_path)
    damage(folder)
    found = checksums.find_mismatches(str(folder))
    assert found and found[0].startswith(str(folder)) and problem in found[0], found


def test_hidden_files_of_others_are_ignored(tmp_path):
    """Such as those of a file manager."""
    folder = _folder(tmp_path)
    (folder / 'a' / '.DS_Store').write_text('')
    assert not checksums.find_mismatches(str(folder))
