"""Digests of a folder, and the damage they show."""

import os
import re
import shutil
import subprocess

import pytest

from alexnet_jax.utils import checksums


def test_a_pipe_is_not_waited_for(tmp_path):
    folder = _folder(tmp_path)
    (folder / 'one').unlink()
    os.mkfifo(folder / 'one')
    (problem,) = checksums.find_mismatches(str(folder))
    assert problem.endswith('/one: not a file')


@pytest.mark.parametrize(
    ('module', 'name'), [(os.path, 'isfile'), (re, 'fullmatch'), (checksums, '_files'), (checksums, 'sha256')]
)
def test_a_folder_that_goes_away_while_it_is_looked_through(module, name, tmp_path, monkeypatch):
    """At every turn: files are missing, nothing is raised."""
    folder, before = _folder(tmp_path / 'step'), getattr(module, name)

    def gone(*args):
        found = before(*args)
        shutil.rmtree(folder, ignore_errors=True)
        return found

    monkeypatch.setattr(module, name, gone)
    found = checksums.find_mismatches(str(folder))
    monkeypatch.undo()
    assert found and not folder.exists()


def _folder(tmp_path):
    (tmp_path / 'a' / 'b').mkdir(parents=True)
    for name in ('one', 'a/two words', 'a/b/three'):
        (tmp_path / name).write_text(name)
    checksums.write(str(tmp_path))
    return tmp_path


def test_the_list_is_that_of_sha256sum(tmp_path):
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
        # Cut short at the end of a line, as a full disk may.
        (lambda f: (f / 'SHA256SUMS').write_text((f / 'SHA256SUMS').read_text()[:-30]), 'SHA256SUMS: not a list'),
        (lambda f: os.truncate(f / 'SHA256SUMS', 10 + 64 + 2 + len('a/b/three') + 1), 'SUMS: it lists 1 of 3 files'),
        (lambda f: os.truncate(f / 'SHA256SUMS', 0), 'a/b/three: not in SHA256SUMS'),
        # A list of an earlier version, which does not say how many there are, and was cut short.
        (
            lambda f: (f / 'SHA256SUMS').write_text((f / 'SHA256SUMS').read_text().split('\n', 2)[1] + '\n'),
            'a/two words: not in SHA256SUMS',
        ),
    ],
)
def test_damage_is_named(tmp_path, damage, problem):
    folder = _folder(tmp_path)
    damage(folder)
    found = checksums.find_mismatches(str(folder))
    assert found and found[0].startswith(str(folder)) and problem in found[0], found


def test_files_that_others_leave_are_no_matter(tmp_path):
    """A file manager's, or a note."""
    folder = _folder(tmp_path)
    (folder / 'a' / '.DS_Store').write_text('')
    assert not checksums.find_mismatches(str(folder))
