"""A dataset prepared in parts is that of a run in one piece, byte for byte; a stopped part goes on where it was."""

import io
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from array_record.python import array_record_module

from alexnet_jax.core import image_stats
from alexnet_jax.data import datasets
from alexnet_jax.prepare import dataset_writer, parts, prepare, record_writer
from alexnet_jax.utils.errors import UserError
from alexnet_jax.utils.files import file_lock
from tests import ROOT, helpers


@pytest.fixture
def in_process(monkeypatch):
    """Writes shards in this process, the last one first. Returns the names of the files."""
    written = []

    def write_shards(shards, workers, write=record_writer.write_shard):
        written.extend(os.path.basename(shard.path) for shard in shards)
        return list(dataset_writer.warn_of_unreadable([write(shard) for shard in reversed(shards)][::-1]))

    monkeypatch.setattr(dataset_writer, 'write_shards', write_shards)
    return written


@pytest.fixture
def folder(tmp_path):
    """Twenty images in three classes, of which one cannot be read and one is fully transparent."""
    files = {f'{c}/{i}.png': helpers.encode(helpers.picture(i, 18, 20), 'PNG') for c in 'abc' for i in range(6)}
    files |= {'a/bad.png': b'hello', 'b/blank.png': helpers.encode(np.zeros((16, 16, 4), np.uint8), 'PNG')}
    return helpers.write_files(tmp_path / 'in', files)


def _contents(folder):
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


def _prepare_in_parts(source, output, n, **options):
    for i in range(n, 0, -1):
        prepare.prepare(source, output, workers=1, part=f'{i}/{n}', **options)
        assert not output.exists()


@pytest.mark.parametrize('n', [1, 2, 3, 7, 40])
def test_any_number_of_parts_gives_the_same_files(folder, tmp_path, in_process, capfd, n):
    """Forty parts are more than there are shards: 16 for train and 5 for val."""
    options = {'size': 16, 'val_fraction': 0.25, 'seed': 3, 'format': 'raw' if n == 3 else 'jpeg'}
    prepare.prepare(folder, tmp_path / 'whole', max_unreadable=1, workers=1, **options)
    shards, said = list(in_process), capfd.readouterr().err
    in_process.clear()
    _prepare_in_parts(folder, tmp_path / 'out', n, **options)
    assert sorted(in_process) == sorted(shards) and len(shards) == 15 + 5
    capfd.readouterr()
    parts.join(tmp_path / 'out', max_unreadable=1)
    assert _contents(tmp_path / 'out') == _contents(tmp_path / 'whole')
    assert capfd.readouterr().err == said and 'unreadable image: a/bad.png' in said and 'fully transparent' in said
    assert sorted(os.listdir(tmp_path)) == ['in', 'out', 'whole']


def test_parts_of_the_official_archive_are_joined(tmp_path, in_process):
    """Two machines have copies of the archive at different paths."""
    copies = []
    for name in ('one', 'two'):
        copies.append(tmp_path / name / 'ILSVRC2012_img_train.tar')
        copies[-1].parent.mkdir()
        with tarfile.open(copies[-1], 'w') as archive:
            for wnid in ('n01440764', 'n01443537'):
                images = {f'{wnid}_{i}.JPEG': helpers.encode(helpers.picture(i)) for i in range(3)}
                _add(archive, f'{wnid}.tar', _tar(images))
    prepare.prepare(copies[0], tmp_path / 'whole', size=16, workers=1)
    for i, copy in enumerate(copies):
        prepare.prepare(copy, tmp_path / 'out', size=16, workers=1, part=f'{i + 1}/2')
    parts.join(tmp_path / 'out')
    assert _contents(tmp_path / 'out') == _contents(tmp_path / 'whole')
    assert len(datasets.open_dataset(str(tmp_path / 'out')).splits['train']) == 6


def _add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _tar(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as archive:
        for name, content in files.items():
            _add(archive, name, content)
    return buffer.getvalue()


def test_labels_in_a_file_count_in_the_fingerprint_of_parts(folder, tmp_path, in_process):
    """Names are no folders here, so the fingerprint begins with the classes; one has a name that is not ASCII."""
    os.remove(os.path.join(folder, 'a', 'bad.png'))
    images = [os.path.join(c, name) for c in 'abc' for name in sorted(os.listdir(os.path.join(folder, c)))]
    table = tmp_path / 'labels.csv'
    table.write_text('file,label\n' + ''.join(f'{name},{("é", "b")[i % 2]}\n' for i, name in enumerate(images)))
    prepare.prepare(folder, tmp_path / 'whole', size=16, workers=1, labels=table)
    _prepare_in_parts(folder, tmp_path / 'out', 2, size=16, labels=table)
    parts.join(tmp_path / 'out')
    assert _contents(tmp_path / 'out') == _contents(tmp_path / 'whole')


def test_stopped_part_goes_on_with_its_unfinished_shards(folder, tmp_path, in_process, monkeypatch):
    """The third shard of the part fails halfway, and what it left is not taken for a shard."""
    write_shard, out = record_writer.write_shard, tmp_path / 'out'

    def fail_at_third(shard):
        if len(os.listdir(tmp_path / 'out.parts' / 'results')) == 2:
            write_shard(shard)
            raise OSError(28, 'No space left on device')
        return write_shard(shard)

    monkeypatch.setattr(record_writer, 'write_shard', fail_at_third)
    with pytest.raises(UserError, match=r"cannot write '.*out.parts': No space left on device"):
        prepare.prepare(folder, out, size=16, workers=1, part='1/2')
    monkeypatch.setattr(record_writer, 'write_shard', write_shard)
    assert len(os.listdir(tmp_path / 'out.parts' / 'part-1-of-2')) == 1
    in_process.clear()
    prepare.prepare(folder, out, size=16, workers=1, part='1/2')
    assert len(in_process) == 8 - 2
    in_process.clear()
    prepare.prepare(folder, out, size=16, workers=1, part='1/2')
    assert not in_process
    prepare.prepare(folder, out, size=16, workers=1, part='2/2')
    parts.join(out, max_unreadable=1)
    prepare.prepare(folder, tmp_path / 'whole', size=16, workers=1, max_unreadable=1)
    assert _contents(out) == _contents(tmp_path / 'whole')


def test_join_that_was_stopped_can_be_repeated(folder, tmp_path, in_process, monkeypatch):
    out, left = tmp_path / 'out', tmp_path / 'out.parts'
    os.remove(os.path.join(folder, 'a', 'bad.png'))
    prepare.prepare(folder, tmp_path / 'whole', size=16, workers=1)
    _prepare_in_parts(folder, out, 2, size=16)
    shutil.copytree(left, tmp_path / 'copy')
    for name in ('dataset_info.json.incomplete.1234', 'SHA256SUMS', 'image_stats.npz'):  # stopped before the renaming
        (left / 'dataset' / name).write_text('x')
    monkeypatch.setattr(shutil, 'rmtree', lambda *args, **options: None)  # stopped after the renaming
    parts.join(out)
    monkeypatch.undo()
    assert _contents(out) == _contents(tmp_path / 'whole') and left.exists()
    parts.join(out)
    assert _contents(out) == _contents(tmp_path / 'whole') and not left.exists()
    with pytest.raises(UserError, match='already exists'):
        parts.join(out)
    (tmp_path / 'copy').rename(left)  # not what this output was made of
    with pytest.raises(UserError, match='already exists'):
        parts.join(out)
    assert left.exists()


def test_folder_that_is_only_named_like_that_of_parts_is_kept(tmp_path):
    """Once, its name sufficed for `join` to remove it."""
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out.parts').mkdir()
    (tmp_path / 'out.parts' / 'notes.txt').write_text('')
    with pytest.raises(UserError, match='already exists'):
        parts.join(tmp_path / 'out')
    assert (tmp_path / 'out.parts' / 'notes.txt').exists()


def test_unfinished_parts_are_named(folder, tmp_path, in_process):
    out = tmp_path / 'out'
    with pytest.raises(UserError, match=r"out.parts' does not exist; first write the parts: --part=1/n to --part=n/n"):
        parts.join(out)
    prepare.prepare(folder, out, size=16, workers=1, part='2/3')
    left = tmp_path / 'out.parts'
    result = sorted((left / 'results').iterdir())[0]
    content = result.read_bytes()
    result.unlink()
    with pytest.raises(
        UserError, match=r'3 of 3 parts are not finished; run --part=1/3 \(6 of 6 .* --part=2/3 \(1 of 5'
    ):
        parts.join(out)
    for i in (1, 3):
        prepare.prepare(folder, out, size=16, workers=1, part=f'{i}/3')
    with pytest.raises(UserError, match=r'1 of 3 parts are not finished; run --part=2/3 \(1 of 5 shards are missing\)'):
        parts.join(out)
    result.write_bytes(content[:-100])
    with pytest.raises(UserError, match=f'{result.name}. is damaged .*; run the parts again, then join them'):
        parts.join(out, max_unreadable=1)
    in_process.clear()
    prepare.prepare(folder, out, size=16, workers=1, part='2/3')
    assert in_process == [result.name.removesuffix('.npz')]
    (left / 'plan.json').write_text('{}')
    with pytest.raises(UserError, match=r"plan.json' cannot be read .*; remove '.*out.parts' to begin anew"):
        parts.join(out)
    assert not out.exists()


def test_unreadable_images_are_counted_by_join(folder, tmp_path, in_process):
    """A repaired image is read again; nothing else is."""
    out = tmp_path / 'out'
    with pytest.raises(UserError, match='--max_unreadable=1: use it with --join'):
        prepare.prepare(folder, out, size=16, workers=1, part='1/2', max_unreadable=1)
    _prepare_in_parts(folder, out, 2, size=16)
    with pytest.raises(UserError, match=r'1 of 20 images cannot be read .* --max_unreadable=1\.'):
        parts.join(out)
    in_process.clear()
    _prepare_in_parts(folder, out, 2, size=16)
    assert not in_process
    helpers.write_files(tmp_path / 'in', {'a/bad.png': helpers.encode(helpers.picture(9), 'PNG')})
    _prepare_in_parts(folder, out, 2, size=16)
    assert len(in_process) == 1
    parts.join(out)
    prepare.prepare(folder, tmp_path / 'whole', size=16, workers=1)
    assert _contents(out) == _contents(tmp_path / 'whole')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'size': 24}, '--size is 24, but it was 16'),
        ({'format': 'raw'}, '--format is raw, but it was jpeg'),
        ({'seed': 1}, '--seed is 1, but it was 0'),
        ({'val_fraction': 0.1}, '--val_fraction is 0.1, but it was 0.0'),
        ({'part': '2/3'}, 'the number of parts is 3, but it was 2'),
        ('fewer', 'the number of train images is 19, but it was 20'),
        ('renamed', 'the digest of the names and labels of the images is '),
        ('other classes', 'the digest of the class names is '),
        ('other version', 'the version of alexnet_jax is 1.0, but it was '),
    ],
)
def test_parts_of_other_conditions_are_refused(folder, tmp_path, in_process, monkeypatch, change, message):
    prepare.prepare(folder, tmp_path / 'out', size=16, workers=1, part='1/2')
    options = {'size': 16, 'part': '2/2'}
    if change == 'fewer':
        os.remove(os.path.join(folder, 'a', '0.png'))
    elif change == 'renamed':
        os.rename(os.path.join(folder, 'a', '0.png'), os.path.join(folder, 'a', '00.png'))
    elif change == 'other classes':
        helpers.write_files(tmp_path / 'in', {'words.txt': b'a\tant\nb\tbee\nc\tcat\n'})
    elif change == 'other version':
        monkeypatch.setattr(parts, '_version', lambda package: '1.0')
    else:
        options |= change
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(UserError, match=f'part 2/[23]: {message}.* when .*out.parts. was begun; use the same images'):
        prepare.prepare(folder, tmp_path / 'out', workers=1, **options)
    assert sorted(tmp_path.rglob('*')) == before


def test_second_process_on_a_part_is_refused(folder, tmp_path, in_process):
    """Other parts can be written at the same time, and the parts cannot be joined meanwhile."""
    out = tmp_path / 'out'
    _prepare_in_parts(folder, out, 2, size=16)
    with file_lock(str(tmp_path / 'out.parts' / 'part-2-of-2.lock'), 'testing'):
        with pytest.raises(UserError, match=r"another process is writing part 2/2 of '.*out'; wait for it, or stop it"):
            prepare.prepare(folder, out, size=16, workers=1, part='2/2')
        prepare.prepare(folder, out, size=16, workers=1, part='1/2')
        with pytest.raises(UserError, match=r"another process is writing part 2/2 of '.*out', or joining the parts;"):
            parts.join(out, max_unreadable=1)
    parts.join(out, max_unreadable=1)


@pytest.mark.parametrize(
    'part', ['', '0/2', '3/2', '1', '1/0', '-1/2', '1/2/3', 'a/b', '1/501', '1/99999999999', '٣/٤']
)
def test_parts_that_do_not_exist_are_refused(folder, tmp_path, part):
    with pytest.raises(UserError, match=f'--part={re.escape(part)}: expected i/n with i from 1 to n, such as 1/4'):
        prepare.prepare(folder, tmp_path / 'out', part=part)
    assert os.listdir(tmp_path) == ['in']


def test_other_rounding_in_a_part_is_reported(folder, tmp_path, in_process, monkeypatch, capfd):
    """Another type of processor sums the products of the pixels in another order."""
    out = tmp_path / 'out'
    prepare.prepare(folder, out, size=16, workers=1, part='1/2')
    monkeypatch.setattr(parts, '_rounding', lambda size: 'other')
    prepare.prepare(folder, out, size=16, workers=1, part='2/2')
    parts.join(out, max_unreadable=1)
    assert capfd.readouterr().err.count('processors that round differently: the color statistics may differ') == 1


def test_sums_of_shards_are_merged_in_their_order(tmp_path):
    """Numbers whose float64 sum depends on the order."""
    moments = [image_stats.Moments(1, np.full((8, 8, 3), x), np.eye(3) * x) for x in (1e16, 1.0, -1e16, 1.0)]
    plan = dataset_writer.Plan(8, 'raw', ['a', 'b'], {'train': [1] * 4}, {'train': [0, 1]}, '')
    results = [record_writer.ShardResult('d', 's', 2, {0: 1, 1: 1}, 1, m, [], []) for m in moments]
    for path in dataset_writer.shard_paths(str(tmp_path), plan):
        pathlib.Path(path).touch()
    dataset_writer.finish(str(tmp_path), plan, results, 0)
    with np.load(tmp_path / 'image_stats.npz') as archive:
        assert (archive['mean_image'] == 0.25).all()  # ((1e16 + 1) - 1e16) + 1 is 1, not 2


def test_fields_of_records_have_one_order(folder, tmp_path, in_process):
    """Protobuf's own order is random in each process, so files of different machines would differ."""
    prepare.prepare(folder, tmp_path / 'out', size=16, workers=1, format='raw', max_unreadable=1)
    reader = array_record_module.ArrayRecordReader(str(min((tmp_path / 'out').glob('images-train*'))))
    record = reader.read([0])[0]
    assert record.index(b'file_name') < record.index(b'image') < record.index(b'label')


@pytest.mark.slow
def test_killed_part_and_parts_at_once(tmp_path):
    """Two commands at once, of which one is killed and started again."""
    files = {f'{c}/{i}.jpg': helpers.encode(helpers.picture(i, 300, 300)) for c in 'ab' for i in range(200)}
    source, out = helpers.write_files(tmp_path / 'in', files), tmp_path / 'out'
    prepare.prepare(source, tmp_path / 'whole', size=128, val_fraction=0.2)
    options = [f'--input={source}', f'--output={out}', '--size=128', '--val_fraction=0.2']
    prepare_command = [sys.executable, '-m', 'alexnet_jax', 'prepare']
    words = [[*prepare_command, *options, f'--part={i}/2'] for i in (1, 2)]
    running = [subprocess.Popen(command, cwd=ROOT) for command in words]
    results = tmp_path / 'out.parts' / 'results'
    deadline = time.monotonic() + 60
    while not (results.exists() and os.listdir(results)) and time.monotonic() < deadline:
        time.sleep(0.01)
    running[0].kill()
    assert [process.wait() for process in running] == [-9, 0]
    subprocess.run(words[0], cwd=ROOT, check=True)
    subprocess.run([*prepare_command, f'--output={out}', '--join'], cwd=ROOT, check=True)
    assert _contents(out) == _contents(tmp_path / 'whole')
    assert sorted(os.listdir(tmp_path)) == ['in', 'out', 'whole']
