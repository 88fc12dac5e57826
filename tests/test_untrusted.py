"""What fuzzing and reading the code found in files of others: each case once ran code, crashed, hung or was printed."""

import contextlib
import gzip
import io
import os
import pathlib
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from absl import logging
from array_record.python import array_record_module
from pyarrow import parquet as pq
from safetensors.numpy import save as save_safetensors

from alexnet_jax.commands import app
from alexnet_jax.convert import archive, convert, loading, npy, pytorch, safetensors, unpickle
from alexnet_jax.core.config import model_from_config
from alexnet_jax.data import datasets, image_stats_file
from alexnet_jax.experiments import output_folders, plots, tables, trials
from alexnet_jax.export import card
from alexnet_jax.inference.image_source import ImageSource
from alexnet_jax.prepare import class_lists, discovery, ground_truth, label_files, parquet, parts, prepare, tfds
from alexnet_jax.training import metric_writer, restore
from alexnet_jax.utils import checksums, environment, logs
from alexnet_jax.utils.errors import UserError, first_line
from alexnet_jax.utils.files import atomic_file, file_lock
from alexnet_jax.utils.text import to_nfc
from tests import ROOT, helpers
from tests import test_fuzz as made
from tests.fuzz import campaign, readers


@pytest.mark.slow
@pytest.mark.parametrize('reader', readers.READERS)
def test_seeds_and_a_few_changes(reader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, 'tempdir', None)
    fuzz, rng = campaign.Campaign(reader, tmp_path / 'files'), random.Random(0)
    count = 1 if reader in ('checkpoints', 'meta.mat') else 8  # those are slow
    for case in (*fuzz.seeds, *(campaign.mutate(rng.choice(fuzz.seeds), rng) for _ in range(count))):
        fuzz.run(case)
    assert fuzz.accepted and not fuzz.findings


def test_a_finding_is_noticed(tmp_path, monkeypatch):
    """The oracle of the fuzzing: other errors, several lines, warnings, and files elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, 'tempdir', None)

    def read(folder, name):
        match (folder / name).read_bytes():
            case b'bug':
                raise KeyError('x')
            case b'lines':
                raise ValueError('a\x1bb')
            case b'warning':
                warnings.warn('careful', stacklevel=1)
            case b'elsewhere':
                pathlib.Path('x').write_bytes(b'')
            case b'memory':
                try:
                    raise MemoryError
                except MemoryError as error:
                    raise UserError('damaged') from error

    monkeypatch.setitem(readers.READERS, 'x', readers.Reader(lambda folder: [('a', b'fine')], read, ValueError))
    fuzz = campaign.Campaign('x', tmp_path / 'files')
    for content in (b'fine', b'bug', b'lines', b'warning', b'elsewhere', b'memory'):
        fuzz.run(b'\0' + content)
    assert fuzz.executions == 6 and [case[1:] for _, case in fuzz.findings.values()] == [
        *(b'bug', b'lines', b'warning', b'elsewhere'),
        b'memory',
    ]


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('prepared')
    raw = {f'{c}/{i}.jpg': helpers.encode(helpers.picture(i, 16, 16)) for c in ('cat', 'dog') for i in range(2)}
    prepare.prepare(helpers.write_files(folder / 'raw', raw), str(folder / 'data'), size=8, workers=1)
    return folder / 'data'


# Code.


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """The current folder has files with the names of configs; running one leaves a file."""
    monkeypatch.chdir(tmp_path)
    for name in ('paper', 'caffe', 'torchvision', 'paper.py', 'torchvision:x'):
        (tmp_path / name).write_text(f'open({str(tmp_path / "ran")!r}, "w")\nraise ValueError("ran")\n')
    yield
    assert not (tmp_path / 'ran').exists()


def test_files_named_like_a_config_are_not_run(trap, tmp_path):
    (tmp_path / 'w.safetensors').write_bytes(save_safetensors(made._tensors()))
    convert.read('w.safetensors')
    assert restore._with_new_keys({})['model']
    loading.converted_path('caffenet')


def test_features_of_an_unknown_tfds_dataset(prepared, tmp_path, monkeypatch):
    """TFDS loads a dataset that it has no code of from its files, and imports the classes that they name."""
    (tmp_path / 'modules').mkdir()
    (tmp_path / 'modules' / 'trap_of_others.py').write_text(f'open({str(tmp_path / "ran")!r}, "w")')
    monkeypatch.syspath_prepend(tmp_path / 'modules')
    data = tmp_path / 'tfds' / 'images' / '1.0.0'
    shutil.copytree(prepared, data)
    text = (data / 'features.json').read_text()
    (data / 'features.json').write_text(
        text.replace('tensorflow_datasets.core.features.text_feature', 'trap_of_others')
    )
    monkeypatch.setattr('tensorflow_datasets.core.utils.file_utils.list_data_dirs', lambda **_: [tmp_path / 'tfds'])
    with pytest.raises(UserError, match='trap_of_others'):
        tfds.open_builder('tfds:images')
    assert not (tmp_path / 'ran').exists()


# Crashes, time and memory.


@contextlib.contextmanager
def _limits(seconds=10, memory=2**28):
    before, began = made._peak(), time.monotonic()
    yield
    assert time.monotonic() - began < seconds and made._peak() - before < memory


def test_pickle_whose_key_takes_exponential_time():
    """Each tuple holds the one before it twice."""
    with _limits():
        assert unpickle.load(io.BytesIO(b'\x80\x02}K\x01\x85' + b'2\x86' * 60 + b'K\x01s.'))


def test_pickle_of_deeply_nested_tuples():
    """Hashing them ended the process."""
    pickled = "b'\\x80\\x02}K\\x01' + b'\\x85' * 300_000 + b'K\\x01s.'"
    code = f'import io; from alexnet_jax.convert import unpickle; unpickle.load(io.BytesIO({pickled}))'
    assert not subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': str(ROOT)}).returncode


@pytest.mark.parametrize('opcode', [pickle.BYTEARRAY8, pickle.BINBYTES8, pickle.BINUNICODE8, pickle.FRAME])
def test_pickle_that_declares_a_huge_size(tmp_path, opcode):
    path = tmp_path / 'x'
    path.write_bytes(b'\x80\x05' + opcode + struct.pack('<Q', 2**34) + b'abc.')
    with path.open('rb') as file, _limits(), pytest.raises((pickle.UnpicklingError, EOFError, IndexError)):
        unpickle.load(file)


def test_checksum_of_a_shared_storage_is_computed_once(tmp_path, monkeypatch):
    state = readers._legacy().partition(b'\x88s.')[2].partition(b'\x80\x02]')[0]
    with zipfile.ZipFile(tmp_path / 'w.pth', 'w') as file:
        file.writestr('a/data.pkl', state)
        file.writestr('a/data/0', bytes(16))
    sizes = []
    monkeypatch.setattr(zlib, 'crc32', lambda data, *_, original=zlib.crc32: sizes.append(len(data)) or original(data))
    assert {*pytorch.read_tensors(str(tmp_path / 'w.pth'))} == {'fc1.weight', 'fc1.bias'}
    assert sizes.count(16) == 1


def _val_tar(tmp_path, content):
    path = tmp_path / 'ILSVRC2012_img_val.tar'
    path.write_bytes(content + made._entry(made._val(1), b'x') + made._entry(made._val(2), b'x') + bytes(1024))
    return str(path)


@pytest.mark.parametrize(
    'content, problem',
    [
        (made._entry('x', b'1' * 20_000, b'x'), 'declares its own size'),  # a regular expression took its square
        (made._entry('g', b''.join(made._pax(f'comment{i}', 'x') for i in range(200)), b'g'), 'unsupported'),  # copies
        (made._header(made._val(3), 1, b'S') + bytes(512), 'unsupported'),  # its size is not that in the archive
    ],
)
def test_archives(tmp_path, content, problem):
    with _limits(), pytest.raises(UserError, match=problem):
        discovery.find_images(_val_tar(tmp_path, content))
    assert len(discovery.find_images(_val_tar(tmp_path, b'')).splits['val']) == 2


@pytest.mark.parametrize(
    'content',
    [
        made._entry('x', b'1' * 40_000, b'x'),
        made._entry('g', b''.join(made._pax(f'comment{i}', 'x') for i in range(200)), b'g'),
    ],
    ids=['long', 'many'],
)
def test_headers_of_an_archive_of_weights(tmp_path, content):
    path = tmp_path / 'x.tar'
    path.write_bytes(content + made._entry('y', bytes(2**14)) + bytes(1024))
    with _limits(seconds=1):
        assert archive.find(str(path), lambda name: True) is None
    path.write_bytes(made._entry('y', bytes(2**14)) + bytes(1024))
    assert (
        pathlib.Path(archive.unpack(str(path), archive.find(str(path), 'y'.__eq__), tmp_path)).stat().st_size == 2**14
    )


def test_compressed_archive_that_unpacks_to_anything(tmp_path):
    path, header = tmp_path / 'x.tar.gz', made._header('long', 2**29, b'L')
    with gzip.open(path, 'wb', 1) as file:
        file.write(header)
        for _ in range(512):
            file.write(bytes(2**20))
    with _limits():
        assert archive.find(str(path), lambda name: True) is None


def test_matlab_file_that_declares_a_huge_array(tmp_path):
    def element(kind, content):
        return struct.pack('<II', kind, len(content)) + content + bytes(-len(content) % 8)

    fields = element(1, b'ILSVRC2010_ID'.ljust(32, b'\0') + b'WNID'.ljust(32, b'\0'))
    parts = element(6, struct.pack('<II', 2, 0)) + element(5, struct.pack('<ii', 2**29, 1)) + element(1, b'synsets')
    head = b'MATLAB 5.0'.ljust(116) + bytes(8) + struct.pack('<H', 0x100) + b'IM'
    path = tmp_path / 'meta.mat'
    path.write_bytes(head + element(14, parts + element(5, struct.pack('<i', 32)) + fields))
    with _limits(), pytest.raises(UserError, match='expected synsets'):
        ground_truth._read_mat(str(path))


def _write_parquet(path, images, labels, name=''):
    """Writes rows whose labels and names are each stored once."""

    def repeated(text, count):
        return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([text]))

    structs = pa.StructArray.from_arrays([pa.array(images), repeated(name, len(images))], names=['bytes', 'path'])
    pq.write_table(pa.table({'image': structs, 'label': labels(repeated)}), path, store_schema=False)
    return str(path)


def test_parquet_file_with_more_rows_than_bytes(tmp_path):
    path = _write_parquet(tmp_path / 'a.parquet', [b'x'] * 10_000, lambda _: pa.array([1] * 10_000))
    with pytest.raises(UserError, match='declares 10,000 rows'):
        discovery.find_images(path)


@pytest.mark.parametrize('count', [50, 2**31 - 1, 2**62])
def test_parquet_file_whose_row_group_declares_other_rows(tmp_path, count):
    """A few bytes would take 16 GiB, and rows that are not declared would be left out silently."""
    path = _write_parquet(tmp_path / 'a.parquet', [b'%064d' % i for i in range(100)], lambda _: pa.array(range(100)))
    content = pathlib.Path(path).read_bytes()
    size = int.from_bytes(content[-8:-4], 'little')
    body, footer = content[: -8 - size], content[-8 - size : -8]
    at = footer.rindex(b'\x16' + _varint(200)) + 1  # of the row group; before it are those of the file and the columns
    footer = footer[:at] + _varint(2 * count) + footer[at + 2 :]
    pathlib.Path(path).write_bytes(body + footer + len(footer).to_bytes(4, 'little') + b'PAR1')
    with _limits(memory=2**29), pytest.raises(UserError, match=f'declares 100 rows, but {count:,} in its row groups'):
        discovery.find_images(path)


def _varint(number):
    """Returns a number as Thrift's compact protocol stores it. Positive numbers are stored twice as large."""
    content = b''
    while number >= 128:
        content += bytes([number % 128 + 128])
        number //= 128
    return content + bytes([number])


def test_parquet_file_that_stores_a_long_label_once(tmp_path):
    images = [b'%064d' % i for i in range(1000)]
    path = _write_parquet(tmp_path / 'a.parquet', images, lambda repeat: repeat('x' * 10**6, 1000), 'y' * 10**5)
    with _limits(memory=2**29), pytest.raises(UserError, match='expected at least two classes'):
        discovery.find_images(path)


def test_parquet_file_whose_columns_have_different_lengths(tmp_path, monkeypatch):
    path = _write_parquet(tmp_path / 'a.parquet', [b'%064d' % i for i in range(9)], lambda _: pa.array(range(9)), 'y')
    monkeypatch.setattr(parquet, '_to_list', lambda array, convert: list(range(7)))  # as pyarrow reads damaged pages
    with pytest.raises(UserError, match='7 labels, but 9 names'):
        discovery.find_images(path)


@pytest.mark.parametrize('marks', ['\u0300\u0327' * 25_000, 'a' + '\u0327\u0300' * 25_000])
def test_marks_that_take_quadratic_time(tmp_path, marks):
    (tmp_path / 'labels.csv').write_text(f'file,label\na.jpg,{marks}\n', encoding='utf-8')
    with _limits(seconds=2):
        with pytest.raises(UserError, match='combining marks'):
            to_nfc(marks)
        with pytest.raises(UserError, match='combining marks'):
            label_files.read_rows(str(tmp_path / 'labels.csv'))
    assert to_nfc('e\u0301' * 1000) == '\u00e9' * 1000 and len(to_nfc('\u4e00' * 10_000)) == 10_000


def test_class_that_is_a_number_of_many_digits():
    assert class_lists.in_label_order(['9' * 5000, '10', '2'])[0] == '10'


@pytest.mark.parametrize(
    'file, old, new, problem',
    [
        ('features.json', '"numClasses": "2"', '"numClasses": "2000000"', '2,000,000 classes'),
        ('features.json', '"8"', '"8192"', 'at most 4096 px'),
        (
            'dataset_info.json',
            '"shardLengths": [\n        "1"',
            '"shardLengths": [\n        "1000000000"',
            'records in',
        ),
        ('dataset_info.json', '{DATASET}-', '../{DATASET}-', 'not in this directory'),
        ('dataset_info.json', '"images"', r'"\u0000"', 'not in this directory'),
    ],
)
def test_sizes_and_files_that_prepared_data_declares(prepared, tmp_path, file, old, new, problem):
    data = shutil.copytree(prepared, tmp_path / 'data')
    text = (data / file).read_text()
    assert old in text
    (data / file).write_text(text.replace(old, new))
    if 'Classes' in old:
        (data / 'label.labels.txt').unlink()
    checksums.write(str(data))
    with _limits(), pytest.raises(UserError, match=problem):
        datasets.open_dataset(str(data))


@pytest.mark.parametrize('options', ['brotli:2', 'zstd', 'snappy', 'transpose,uncompressed'])
def test_compressed_records(prepared, tmp_path, options):
    """A shard of 128 KiB had a record of 100 MiB."""
    data = shutil.copytree(prepared, tmp_path / 'data')
    shard = min(data.glob('*train*array_record*'))
    (record,) = array_record_module.ArrayRecordReader(str(shard)).read_all()
    writer = array_record_module.ArrayRecordWriter(str(shard), f'group_size:1,{options}')
    writer.write(record + bytes(10**6))
    writer.close()
    with pytest.raises(UserError, match=f'{shard.name}. has compressed records; expected'):
        datasets.open_dataset(data)


def test_pipe_instead_of_a_shard(prepared, tmp_path):
    data = shutil.copytree(prepared, tmp_path / 'data')
    shard = min(data.glob('*train*array_record*'))
    shard.unlink()
    checksums.write(str(data))  # a list without the shard
    os.mkfifo(shard)
    with pytest.raises(UserError, match=f'{shard.name}: not a file'):
        datasets.open_dataset(data)


def test_long_name_in_a_record():
    """An array of names takes the space of the longest for each."""
    record = {'image': np.zeros((4, 4, 3), np.uint8), 'label': 0, 'file_name': b'x' * 10**6}
    source = ImageSource(None, [record])
    assert source[0]['label'] == 0 and len(source.files[0]) == 4096


@pytest.mark.parametrize('name', ['lrn_n', 'spatial_n'])
def test_window_of_a_config_that_takes_forever(name):
    """The sums over a window are one operation for each of its positions."""
    with _limits(), pytest.raises(UserError, match='an integer from 1 to 999'):
        model_from_config({**made.get_config('paper').model, name: 2**31})


def test_layers_without_weights(tmp_path):
    layers = {
        'conv1': [np.zeros((3, 3, 3, 4), 'f4'), np.zeros(4, 'f4')],
        'fc': [np.zeros((0, 5), 'f4'), np.zeros(5, 'f4')],
    }
    np.save(tmp_path / 'w.npy', np.array(layers, object))
    with pytest.raises(UserError, match='cannot reshape'):
        npy.read(str(tmp_path / 'w.npy'))


# What is written and printed.


def test_names_cannot_control_the_terminal(tmp_path, capfd, monkeypatch):
    fine, damaged = tmp_path / 'a\x1b[2J\u202eb', tmp_path / 'c'
    for folder in (fine, damaged):
        helpers.write_files(folder, {'x': b'1'})
        checksums.write(str(folder))
    (damaged / checksums.FILE_NAME).write_bytes(f'# 1 files\n{"0" * 64}  y\x1b]0;\x07\r\n'.encode())
    done = helpers.run_command('verify', fine, damaged)
    assert done.returncode == 1 and r'a\x1b[2J\u202eb: all digests match' in done.stdout
    assert 'missing' in done.stderr and done.stderr.replace('\n', '').isprintable()
    monkeypatch.setattr(app.threading, 'Timer', mock.Mock())  # it would end this process
    with pytest.raises(SystemExit):
        app._fail('no file \x1b[2J', 2)
    assert capfd.readouterr().err == 'error: no file \\x1b[2J\n'
    logging.warning('%s cannot be read', 'a\x1b[2J')
    assert capfd.readouterr().err == 'warning: a\\x1b[2J cannot be read\n'
    assert logs.one_line('a\nerror: b') == 'a\\nerror: b'
    assert first_line(ValueError('a\x0fb')) == 'a?b' and str(UserError('a\x1b\nb')) == 'a? b'


def test_links_in_a_workdir_of_others_are_not_followed(tmp_path):
    victim, run = tmp_path / 'victim', tmp_path / 'run'
    victim.write_text('precious')
    run.mkdir()
    os.symlink(victim, run / 'a.json.tmp')
    with atomic_file(str(run / 'a.json')) as file:
        file.write('{}')
    os.symlink(victim, run / 'events.out.tfevents.1')
    with pytest.raises(UserError, match='is a link'):
        metric_writer.MetricWriter(str(run), 0)
    assert victim.read_text() == 'precious' and (run / 'a.json').read_text() == '{}'


_READERS_OF_TEXT = {
    'metrics.jsonl': lambda path: metric_writer.last_step(str(path.parent)),
    'environment.json': lambda path: environment.warn_of_changes(str(path.parent), {'versions': {}}),
    'events.out.tfevents.1': lambda path: metric_writer.MetricWriter(str(path.parent), 0),
    'metrics.jsonl.tmp': lambda path: metric_writer.MetricWriter(str(path.parent), 0).close(),
    'image_stats.npz': lambda path: image_stats_file.load(str(path.parent)),
    'dataset_info.json': lambda path: datasets.open_dataset(path.parent),
    'features.json': lambda path: datasets.open_dataset(path.parent),
    'labels.csv': lambda path: label_files.read_rows(str(path)),
    'LOC_val_solution.csv': lambda path: ground_truth._read_kaggle_list(str(path)),
    'ground_truth.txt': lambda path: ground_truth._read_ids(str(path)),
    'meta.txt': lambda path: ground_truth._read_meta(str(path.parent / 'x'), str(path.parent)),
    'meta.mat': lambda path: ground_truth._read_mat(str(path)),
    'names.txt': lambda path: convert._class_names(3, str(path), None),
    'a.parquet': lambda path: discovery.find_images(str(path.parent)),
    'plan.json': lambda path: parts._read_plan(str(path.parent)),
    'data.source': lambda path: prepare.prepare_if_needed('raw', str(path.parent / 'data'), size=8),
    'run.json': lambda path: output_folders._read_description(str(path.parent / 'run')),
    'results.csv': lambda path: tables.write_csv(str(path), [{'suite': '', 'variant': '', 'seed': 0}], whole=True),
    'result.json': lambda path: trials.read_json(mock.Mock(workdir=path.parent), 'result'),
}


@pytest.mark.parametrize('name', _READERS_OF_TEXT)
def test_pipes_do_not_block(name, tmp_path):
    """Opening a pipe waits for its other end."""
    helpers.write_files(tmp_path, {'data/a': b'', 'run/a': b'', 'dataset_info.json': b'{}', 'features.json': b'{}'})
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with _interrupted_after(5), contextlib.suppress(UserError):
        _READERS_OF_TEXT[name](tmp_path / name)


@contextlib.contextmanager
def _interrupted_after(seconds):
    def interrupt(*_):
        raise SystemExit('it waits')  # no Exception, which readers turn into UserError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_pipes_in_folders_with_digests_are_reported(tmp_path):
    """Orbax and TFDS open files by their names, also files that the list does not name."""
    helpers.write_files(tmp_path, {'a': b'1', checksums.FILE_NAME: b'# 0 files\n'})
    assert not checksums.find_mismatches(str(tmp_path))
    (tmp_path / 'metrics').mkdir()
    os.mkfifo(tmp_path / 'metrics' / 'metrics')
    assert checksums.find_mismatches(str(tmp_path)) == [f'{tmp_path}/metrics/metrics: not a file']


def test_lock_is_no_link_and_no_pipe(tmp_path):
    os.symlink(tmp_path / 'elsewhere', tmp_path / 'link')
    os.mkfifo(tmp_path / 'pipe')
    for name in ('link', 'pipe'):
        with pytest.raises(UserError, match='cannot lock'), file_lock(str(tmp_path / name), 'training'):
            raise AssertionError
    assert not (tmp_path / 'elsewhere').exists()


def test_json_of_a_workdir(tmp_path):
    deep = '[' * 10**5
    lines = f'{deep}\n{{"step": Infinity, "split": "val"}}\n{{"step": 3, "split": "val"}}\n'
    (tmp_path / 'metrics.jsonl').write_text(lines)
    (tmp_path / 'environment.json').write_text(deep)
    assert metric_writer.last_step(str(tmp_path)) == 3
    environment.warn_of_changes(str(tmp_path), {'versions': {}})


@pytest.mark.parametrize('settings', ['[' * 10**5, '{"alexnet_jax": {"step": Infinity, "config": {}}}', '[]', '5'])
def test_settings_of_an_exported_folder(tmp_path, settings):
    readers._safetensors(tmp_path)
    (tmp_path / 'config.json').write_text(settings)
    with pytest.raises(UserError, match='is not as alexnet_jax export wrote it'):
        loading.load_checkpoint(str(tmp_path))


def test_card_of_a_checkpoint_with_any_config(tmp_path):
    readers._safetensors(tmp_path)
    checkpoint = convert.read(str(tmp_path / safetensors.FILE_NAME))
    for path in ({}, 3, None, 'a/b\n# [x](y)`z'):
        config = {**checkpoint.config, 'init_from': path, 'data': {**checkpoint.config['data'], 'path': path}}
        text = card.card(checkpoint._replace(step=5, config=config), 1, {'onnx': ''})
    assert 'starting from `b # [x](y)z`; data: `b # [x](y)z`.' in text
    for size, expected in ((8, '5 updates on batches of 8, starting'), ('8', '5 updates, starting')):
        text = card.card(checkpoint._replace(step=5, config={**config, 'batch_size': size}), 1, {'onnx': ''})
        assert expected in text


def test_files_that_cause_warnings(tmp_path):
    readers._npy(tmp_path)
    stats = [
        ('mean_image', np.ones((2, 2, 3), complex)),
        ('eigenvalues', np.full(3, 1e300)),
        ('eigenvectors', np.eye(3)),
    ]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        for replaced in (0, 1):
            arrays = {name: array for i, (name, array) in enumerate(stats) if i == replaced}
            np.savez(tmp_path / image_stats_file.FILE_NAME, **{**_fine_stats(), **arrays})
            with pytest.raises(UserError, match='is damaged'):
                image_stats_file.load(str(tmp_path))
        (tmp_path / 'names.txt').write_text(r"{0: 'a\d', 1: 'b'}")
        assert convert._class_names(2, str(tmp_path / 'names.txt'), None) == ['a\\d', 'b']
    assert not [warning for warning in warned if 'invalid escape' in str(warning.message)] and not warned


def _fine_stats():
    return {'mean_image': np.ones((2, 2, 3), 'f4'), 'eigenvalues': np.zeros(3, 'f4'), 'eigenvectors': np.eye(3)}


def test_file_of_class_names_that_is_too_long(tmp_path):
    (tmp_path / 'names.txt').write_text('[' + '1,' * 2**20 + ']')
    with _limits(), pytest.raises(UserError, match='more than'):
        convert._class_names(3, str(tmp_path / 'names.txt'), None)


def test_class_names_are_no_formulas(tmp_path):
    pytest.importorskip('matplotlib')
    figure = plots.confusion(np.eye(2, dtype=int), ['$x^$', '$\\frac$'])
    figure.savefig(tmp_path / 'a.svg')
