"""The flips of single bits: a few hundred of them, and what counts as silent."""

import os
import pathlib

import numpy as np
import pytest

from alexnet_jax.utils import checksums
from alexnet_jax.utils.errors import UserError
from tests.faults import flips


@pytest.fixture
def flip(tmp_path):
    (tmp_path / 'file').write_bytes(b'content')
    return flips.Flip(tmp_path, tmp_path / 'file', 3, 0, 0)


def test_flip_is_undone(flip):
    with flip:
        assert flip.path.read_bytes() == b'conuent'
    assert flip.path.read_bytes() == b'content'


def test_outcomes(flip):
    """Other values without a message are silent; a message must name the file."""

    def fail(error):
        def read(flip):
            raise error

        return read

    def outcome(*found):
        return flips.outcome(lambda flip: found, flip, 'same')[0]

    assert outcome('same', []) == 'harmless'
    assert outcome('other', []) == 'silent'
    assert outcome('other', [f'{flip.path}: changed']) == 'silent'
    assert outcome('same', [f'{flip.path}: changed']) == 'named'
    assert outcome('same', [f'{flip.folder}/another: changed']) == 'not named'
    assert flips.outcome(fail(UserError(f'{flip.path} is damaged')), flip, 'same') == ('named', '')
    assert flips.outcome(fail(UserError('damaged')), flip, 'same') == ('not named', 'damaged')
    assert flips.outcome(fail(ValueError('damaged')), flip, 'same')[0] == 'other error'


def test_message_about_records_names_them(flip):
    records = flips.Flip(flip.folder, flip.folder / 'images-train.array_record-00000-of-00002', 0, 0, 0)
    assert records.is_named(f'record 12 in train of {flip.folder} cannot be read')
    assert not records.is_named(f'a record of {flip.folder} cannot be read')
    assert not flip.is_named(f'record 12 in train of {flip.folder} cannot be read')
    digests = flips.Flip(flip.folder, flip.folder / checksums.FILE_NAME, 0, 0, 0)
    assert digests.is_named(f'{flip.folder}/file: changed')


def test_small_and_important_files_are_flipped_as_a_whole():
    folder = pathlib.Path('folder')
    sizes = {10: False, 100: True, 5000: False, 7000: False, 300: True}
    strata = [flips.Stratum(folder, folder, '', np.arange(size), whole) for size, whole in sizes.items()]
    assert flips.choose(strata, 1010) == [10, 100, 300, 300, 300]
    assert flips.choose(strata, 100) == [5, 42, 5, 5, 43]


@pytest.mark.slow
def test_no_flip_is_silent(monkeypatch):
    monkeypatch.setattr(flips, '_EVERY_BARE', 1000)
    seed = int.from_bytes(os.urandom(4))
    print('seed', seed)
    found = flips.run(200, seed, formats=('jpeg',))
    assert not found['problems']
    assert 150 <= found['flips'] <= 200
    assert all(row['readers']['verify'] == {'named': row['flips']} for row in found['kinds'].values() if row['flips'])
