"""Readers of files that others may have made, with seeds: valid files, made here, that fuzzing changes.

A case is a byte that selects one of the reader's files, then the content of that file.
"""

import dataclasses
import functools
import io
import json
import os
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Callable

import jax
import numpy as np
import pyarrow as pa
import tensorstore as ts
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from pyarrow import parquet as pq
from safetensors.numpy import save as save_safetensors
from scipy import io as scipy_io

from alexnet_jax.checkpoints import manager
from alexnet_jax.convert import convert, fit, loading, safetensors, weight_file
from alexnet_jax.core import architecture, augment, image_stats, model
from alexnet_jax.core.config import augmentation_from_config, model_from_config
from alexnet_jax.data import datasets, image_files, image_io, image_stats_file
from alexnet_jax.export import card, hub, onnx_model, portable, pytorch_module
from alexnet_jax.prepare import class_lists, discovery, ground_truth, label_files, prepare
from alexnet_jax.training import metric_writer
from alexnet_jax.utils import checksums, environment
from alexnet_jax.utils.config_files import get_config
from alexnet_jax.utils.errors import UserError
from tests import helpers
from tests import test_fuzz as made

_VALUES = 2**20  # parameters of a network that is built from a fuzzed config; a checkpoint must have them on disk


@dataclasses.dataclass(frozen=True)
class Reader:
    """A way to read files."""

    set_up: Callable[[pathlib.Path], list[tuple[str, bytes]]]  # fills a folder; returns seeds: (file, content)
    read: Callable[[pathlib.Path, str], object]  # reads a file in the folder; may raise UserError
    errors: type[Exception] = UserError  # what `read` may raise
    encode: Callable[[str, bytes], bytes] = lambda name, content: content  # from a case to the content of the file
    memory: int = 2**27  # bytes that a small case may take: readers grant 64 MiB, and may copy them


def _images(folder):
    return [('image', content) for content in made._pictures()]


def _read_image(folder, name):
    return image_io.resize_center_crop((folder / name).read_bytes(), 16, [])


def _archives(folder):
    image, end = made._pictures()[0], bytes(1024)
    val = b''.join(made._entry(made._val(i), image) for i in (1, 2)) + end
    one = b''.join(made._entry(f'n01440764_{i}.JPEG', image) for i in (1, 2)) + end
    pax = made._entry('x', made._pax('path', made._val(3)), b'x') + made._entry('y', image)
    pax += made._entry('g', made._pax('comment', 'a'), b'g') + made._entry(made._val(4), image) + end
    long = made._entry('././@LongLink', made._val(5).encode() + b'\0', b'L') + made._entry('y', image) + end
    sparse = made._entry('x', made._pax('GNU.sparse.map', '0,1'), b'x') + made._entry(made._val(6), image, b'S') + end
    train = made._entry('n01440764.tar', one) + end
    return [
        *(('ILSVRC2012_img_val.tar', content) for content in (val, pax, long, sparse)),
        ('ILSVRC2012_img_train.tar', train),
        ('n01440764.tar', one),
    ]


def _with_checksums(name, content):
    """Corrects the checksums of tar headers, without which hardly any change would be read."""
    blocks = bytearray(content)
    for at in range(0, len(blocks) - 511, 512):
        if blocks[at + 257 : at + 262] == b'ustar':
            blocks[at + 148 : at + 156] = b' ' * 8
            blocks[at + 148 : at + 156] = b'%06o\0 ' % sum(blocks[at : at + 512])
    return bytes(blocks)


def _read_archive(folder, name):
    refs = [ref for refs in discovery.find_images(str(folder / name)).splits.values() for ref in refs]
    for ref in refs[:4]:
        try:
            discovery.read_image(ref)
        except ValueError as error:
            made._one_line(error)
    return refs


_TABLE = 'file,label,split\na.jpg,cat,train\nb.jpg,dog,val\n'
_CLASSES = {
    'words.txt': 'n01440764\ttench, Tinca\nn01443537\tgoldfish\n',
    'classes.json': '{"0": ["n01440764", "tench"], "id2label": {"n01443537": "goldfish"}}',
    'names.txt': "{0: 'tench, Tinca tinca', 1: ['n1', 'goldfish']}",
    'names.json': '["tench", "goldfish"]',
}
_KITS = {
    'LOC_val_solution.csv': 'ImageId,PredictionString\nILSVRC2012_val_00000001,n01751748 1 2 3 4 \n',
    'ILSVRC2010_validation_ground_truth.txt': '1\n2\n',
    'meta.txt': '1 n01440764\n2 n01443537\n',
}


def _labels(folder):
    helpers.write_files(folder, {name: made._pictures()[0] for name in ('in/a.jpg', 'in/b.jpg', 'in/c/b.jpg')})
    helpers.write_files(folder, {name: text.encode() for name, text in _KITS.items() if name != 'LOC_val_solution.csv'})
    tables = [_TABLE, _TABLE.replace(',', '\t'), 'c/b.jpg cat\na 3\n', '"a.jpg";"1.0"\nb.jpg;2\n']
    texts = [('labels.csv', text) for text in tables] + [*_CLASSES.items(), *_KITS.items()]
    return [(name, text.encode()) for name, text in texts]


def _read_labels(folder, name):
    path, classes = folder / name, ('n01440764', 'n01443537')
    match name:
        case 'labels.csv':
            return label_files.list_images(str(folder / 'in'), str(path), image_files.FileCounts())
        case 'names.txt' | 'names.json':
            return convert._class_names(2, str(path), None)
        case 'words.txt' | 'classes.json':
            return class_lists.class_names([str(folder)], classes)
        case 'LOC_val_solution.csv':
            return ground_truth._read_kaggle_list(str(path))
    prefix = 'ILSVRC2010_val_'
    return ground_truth.classes_of(str(folder), [f'{prefix}0000000{i}.JPEG' for i in (1, 2)])


def _meta(folder):
    meta, file = np.array([(1, 'n01440764'), (2, 'n01443537')], [('ILSVRC2010_ID', 'O'), ('WNID', 'O')]), io.BytesIO()
    scipy_io.savemat(file, {'synsets': meta})
    return [('meta.mat', file.getvalue())]


def _read_meta(folder, name):
    return ground_truth._read_mat(str(folder / name))


def _parquet(folder):
    contents = [helpers.encode(helpers.picture(i, 8, 8)) for i in range(3)]
    features = {'image': {'_type': 'Image'}, 'label': {'names': ['cat', 'dog'], '_type': 'ClassLabel'}}
    files = []
    for labels, names, options in (
        ([0, 1, 1], True, {'compression': 'zstd'}),
        (['cat', 'dog', None], False, {'row_group_size': 1}),
        ([0, 1, -1], False, {'use_dictionary': False, 'compression': 'gzip', 'write_page_checksum': True}),
    ):
        images = [{'bytes': content, 'path': f'{i}.jpg'} for i, content in enumerate(contents)]
        table, file = pa.table({'image': images, 'label': labels}), io.BytesIO()
        if names:
            table = table.replace_schema_metadata({'huggingface': json.dumps({'info': {'features': features}})})
        pq.write_table(table, file, **options)
        files.append(('train.parquet', file.getvalue()))
    return files


def _weights_folder(folder):
    np.save(folder / 'mean.npy', np.full(3, 120.0))
    colors = image_stats.ImageStats(np.ones((230, 230, 3), np.float32), np.zeros(3), np.eye(3))
    image_stats_file.save(str(folder), colors)


def _read_weights(folder, name):
    mean = str(folder / 'mean.npy') if name.endswith(('.caffemodel', '.npy')) else None
    return convert.read(str(folder / name), mean=mean)


def _caffemodel(folder):
    _weights_folder(folder)
    blob = made.caffe._caffe_message('BlobProto')(num=1, channels=3, height=2, width=2, data=[120] * 12)
    return [('w.caffemodel', made._caffemodel().SerializeToString()), ('m.binaryproto', blob.SerializeToString())]


def _read_caffe(folder, name):
    return convert.read_mean(str(folder / name), False) if name[0] == 'm' else _read_weights(folder, name)


def _exported_config():
    config = manager.config_to_json(get_config('torchvision'))
    config = {key: config[key] for key in ('model', 'data', 'batch_size', 'init_from')}
    return fit.fit_config(config, weight_file.WeightFile('', weight_file.pair_tensors(made._tensors())))


def _safetensors(folder):
    _weights_folder(folder)
    own = {'config': _exported_config(), 'class_names': ['a', 'b', 'c'], 'record_size': 230}
    whole = save_safetensors(made._tensors(), metadata={safetensors.METADATA_KEY: json.dumps(own)})
    (folder / safetensors.FILE_NAME).write_bytes(whole)
    settings = json.dumps({'alexnet_jax': {'step': 3, 'config': own['config']}}).encode()
    (folder / 'config.json').write_bytes(settings)
    plain = ('w.safetensors', save_safetensors(made._tensors()))
    return [plain, (safetensors.FILE_NAME, whole), ('config.json', settings)]


def _read_safetensors(folder, name):
    return _read_weights(folder, name) if name[0] == 'w' else loading.load_checkpoint(str(folder))


@functools.cache
def _pth_parts():
    file = io.BytesIO()
    helpers.write_pth(file, made._tensors())
    with zipfile.ZipFile(file) as archive:
        return file.getvalue(), {name: archive.read(name) for name in archive.namelist()}


_LEGACY = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}X\r\x00\x00\x00little_endian\x88s.'


def _legacy():
    """Returns a file as PyTorch wrote it before 1.6, with one layer."""
    tensor = (
        b'ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQK\x00%s%s\x89}tR'
    )
    weight, bias = tensor % (b'K\x02K\x02\x86', b'K\x02K\x01\x86'), tensor % (b'K\x02\x85', b'K\x01\x85')
    state = b'\x80\x02}(U\nfc1.weight' + weight + b'U\x08fc1.bias' + bias + b'u.'
    return _LEGACY + state + b'\x80\x02]U\x010a.' + (4).to_bytes(8, 'little') + bytes(16)


def _pth(folder):
    whole, parts = _pth_parts()
    (pickled,) = [content for name, content in parts.items() if name.endswith('data.pkl')]
    fields = b''.join(b'U%c%s}' % (len(part), part) for part in (b'_parameters', b'_buffers', b'_modules'))
    module = b'\x80\x02ctorch.nn\nM\n)\x81}(' + fields + b'ub.'
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('a/w.pth', whole)
    return [
        ('pickle.pth', pickled),
        ('pickle.pth', module),
        ('w.pth', whole),
        ('w.pth', _legacy()),
        ('w.pth.zip', file.getvalue()),
    ]


def _zipped(name, content):
    if name != 'pickle.pth':
        return content
    file, parts = io.BytesIO(), _pth_parts()[1]
    with zipfile.ZipFile(file, 'w') as archive:
        for part, old in parts.items():
            archive.writestr(part, content if part.endswith('data.pkl') else old)
    return file.getvalue()


def _read_pth(folder, name):
    return convert.read(str(folder / name))


def _npy(folder):
    _weights_folder(folder)
    tensors, file, mean = made._tensors(), io.BytesIO(), io.BytesIO()
    np.save(file, {name: [tensors[f'{name}.weight'].T, tensors[f'{name}.bias']] for name in made._NAMES}, True)
    np.save(mean, np.full((2, 2, 3), 120, np.uint8))
    small = image_stats.ImageStats(np.ones((2, 2, 3), np.float32), np.zeros(3, np.float32), np.eye(3, dtype=np.float32))
    image_stats_file.save(str(folder), small)
    with zipfile.ZipFile(folder / image_stats_file.FILE_NAME) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    whole = ('image_stats.npz', (folder / image_stats_file.FILE_NAME).read_bytes())
    return [('w.npy', file.getvalue()), ('m.npy', mean.getvalue()), whole, *parts.items()]


def _in_npz(name, content):
    """Returns the npz of an array in it, which then has the right checksum."""
    if name not in ('mean_image.npy', 'eigenvalues.npy', 'eigenvectors.npy'):
        return content
    file = io.BytesIO()
    values = {'mean_image': np.ones((2, 2, 3), 'f4'), 'eigenvalues': np.zeros(3, 'f4'), 'eigenvectors': np.eye(3)}
    with zipfile.ZipFile(file, 'w') as archive:
        for key, value in values.items():
            array = io.BytesIO()
            np.save(array, value)
            archive.writestr(f'{key}.npy', content if f'{key}.npy' == name else array.getvalue())
    return file.getvalue()


def _read_npy(folder, name):
    if name == 'm.npy':
        return convert.read_mean(str(folder / name), False)
    if name == 'w.npy':
        return _read_weights(folder, name)
    os.replace(folder / name, folder / image_stats_file.FILE_NAME)
    return image_stats_file.load(str(folder))


_SHARD = 'images-train.array_record-00003-of-00004'
_PREPARED = ('features.json', 'dataset_info.json', 'metadata.json', 'label.labels.txt')


def _prepared(folder):
    raw = {f'{c}/{i}.jpg': helpers.encode(helpers.picture(i, 16, 16)) for c in ('cat', 'dog') for i in range(2)}
    prepare.prepare(helpers.write_files(folder / 'raw', raw), str(folder / 'data'), size=8, workers=1)
    whole = (folder / 'data' / _SHARD).read_bytes()
    reader = ArrayRecordReader(str(folder / 'data' / _SHARD))
    shards = [(_SHARD, whole), (_SHARD, _shard(bytes(2**27), 'brotli:2')), ('record', *reader.read([0]))]
    reader.close()
    return [(name, (folder / 'data' / name).read_bytes()) for name in _PREPARED] + shards


def _shard(record: bytes, compression: str = 'uncompressed') -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'shard')
        writer = ArrayRecordWriter(path, f'group_size:1,{compression}')
        writer.write(record)
        writer.close()
        return pathlib.Path(path).read_bytes()


def _in_shard(name, content):
    """Returns the shard of a record, which then has the right checksum."""
    return _shard(content) if name == 'record' else content


def _read_prepared(folder, name):
    data, source = folder / 'data', folder / name
    name = _SHARD if name == 'record' else name
    whole = (data / name).read_bytes()
    try:
        os.replace(source, data / name)
        checksums.write(str(data))
        found = datasets.open_dataset(str(data))
        for split in found.splits.values():
            try:
                split[len(split) - 1]
            except UserError as error:
                made._one_line(error)
        return found
    finally:
        (data / name).write_bytes(whole)


_CHECKPOINT = ('meta/metadata', 'params/_METADATA', '_CHECKPOINT_METADATA', 'params/_sharding')
_IN_ARRAYS = {'zarray': 'eigenvalues/.zarray', 'chunk': 'eigenvalues/0'}  # keys of the database of an item
_LARGE = {'large_chunk': 'eigenvalues/0'}  # for which .zarray declares 256 MiB


def _database(step):
    return ts.KvStore.open({'driver': 'ocdbt', 'base': f'file://{step}/image_stats/'}).result()


def _checkpoint(folder):
    helpers.save_untrained(folder / 'run')
    step = folder / 'run' / 'checkpoints' / '0'
    files = [(name, (step / name).read_bytes()) for name in _CHECKPOINT if (step / name).exists()]
    stored = {name: _database(step).read(key).result().value for name, key in _IN_ARRAYS.items()}
    return [*files, *stored.items(), ('large_chunk', pa.compress(bytes(2**28), 'zstd', asbytes=True))]


def _read_checkpoint(folder, name):
    step, kept = folder / 'run' / 'checkpoints' / '0', folder / 'kept'
    if key := (_IN_ARRAYS | _LARGE).get(name):
        shutil.copytree(step / 'image_stats', kept)
        try:
            database = _database(step)
            database.write(key, (folder / name).read_bytes()).result()
            if name in _LARGE:
                declared = json.loads(database.read(_IN_ARRAYS['zarray']).result().value)
                database.write(_IN_ARRAYS['zarray'], json.dumps({**declared, 'chunks': [2**26]}).encode()).result()
            checksums.write(str(step))
            return loading.load_checkpoint(str(step))
        finally:
            shutil.rmtree(step / 'image_stats')
            kept.rename(step / 'image_stats')
    whole = (step / name).read_bytes()
    try:
        os.replace(folder / name, step / name)
        checksums.write(str(step))
        return loading.load_checkpoint(str(step))
    finally:
        (step / name).write_bytes(whole)


def _digests(folder):
    helpers.write_files(folder, {'a': b'1', 'b/c': b'2', 'b/d e': b''})
    os.symlink('/etc/hostname', folder / 'b' / 'link')
    checksums.write(str(folder))
    whole = (folder / checksums.FILE_NAME).read_bytes()
    outside = whole.replace(b'b/c', b'../../../../etc/hostname')
    return [(checksums.FILE_NAME, content) for content in (whole, whole.partition(b'\n')[2], outside)]


def _read_digests(folder, name):
    for line in checksums.find_mismatches(str(folder)):
        made._one_line(line)
    return True


def _records(folder):
    line = '{"step": 3, "split": "train", "loss": 1.5}\n{"step": 4, "split": "val", "loss": 2}\n'
    (folder / 'run').mkdir()
    writer = metric_writer.MetricWriter(str(folder / 'run'), 0)
    writer.write(json.loads(line.split('\n')[0]))
    writer.close()
    (events,) = (folder / 'run').glob('events.*')
    content = events.read_bytes()
    events.unlink()
    old = {'cores': 1, 'versions': {'jax': '0'}, 'xla_flags': None}
    return [
        ('metrics.jsonl', line.encode()),
        ('environment.json', json.dumps(old).encode()),
        ('events.out.tfevents.1', content),
    ]


def _read_records(folder, name):
    run = str(folder / 'run')
    os.replace(folder / name, folder / 'run' / name)
    try:
        metric_writer.last_step(run)
        environment.warn_of_changes(run, {'cores': 2, 'xla_flags': None, 'versions': {'jax': '1'}})
        metric_writer.MetricWriter(run, 3).close()
    finally:
        for path in (folder / 'run').iterdir():
            path.unlink()
    return True


def _onnx(folder):
    config = manager.config_to_json(helpers.digits_config())
    own = {key: config[key] for key in ('model', 'data', 'batch_size', 'init_from')}
    several = {'config': own, 'class_names': list('0123456789'), 'record_size': 32}
    one = {'config': _exported_config(), 'class_names': ['a', 'b', 'c'], 'record_size': 230}
    return [('meta.json', json.dumps(meta).encode()) for meta in (several, one)]


def _read_onnx(folder, name):
    """Writes the ONNX model, the module and the card of a network as a checkpoint with this metadata may have it."""
    try:
        meta = json.loads((folder / name).read_bytes())
        config, side = meta['config'], meta['record_size']
        network, augmentation = model_from_config(config['model']), augmentation_from_config(config['data'])
        augment.crop_positions(side, augmentation.image_size)
        shapes = architecture.infer_shapes(network, augmentation.image_size)
        names = tuple(map(str, meta['class_names']))
        if len(names) != network.num_classes or sum(s.parameters for s in shapes.values()) + side**2 * 3 > _VALUES:
            return None
        init = functools.partial(model.init_params, network, image_size=augmentation.image_size)
        like = jax.eval_shape(init, jax.random.key(0))
        stats = image_stats.ImageStats(np.ones((side, side, 3), np.float32), np.zeros(3), np.eye(3))
    except Exception:  # `CheckpointManager.load` converts them; the reader 'checkpoints' tries this
        return None
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    checkpoint = manager.Checkpoint(0, params, network, augmentation, side, names, stats, config)
    portable.check_network(network, ['pytorch', 'onnx'])
    onnx_model.onnx_model(checkpoint, 1)
    compile(pytorch_module.pytorch_module(checkpoint, 10), 'alexnet.py', 'exec')
    json.dumps(hub.hub_config(checkpoint, 1))
    return [card.card(checkpoint._replace(step=step), 1, {'onnx': '', 'pytorch': ''}) for step in (0, 5)]


READERS = {
    'images': Reader(_images, _read_image, ValueError, memory=2**30),  # 256 MiB of pixels, and copies
    'archives': Reader(_archives, _read_archive, encode=_with_checksums),
    'labels': Reader(_labels, _read_labels),
    'meta.mat': Reader(_meta, _read_meta),
    'parquet': Reader(_parquet, _read_archive, memory=2**31),  # one page
    'safetensors': Reader(_safetensors, _read_safetensors),
    'caffemodel': Reader(_caffemodel, _read_caffe),
    'pth': Reader(_pth, _read_pth, encode=_zipped),
    'npy': Reader(_npy, _read_npy, encode=_in_npz),
    'features': Reader(_prepared, _read_prepared, encode=_in_shard),
    'checkpoints': Reader(_checkpoint, _read_checkpoint),
    'digests': Reader(_digests, _read_digests),
    'records': Reader(_records, _read_records),
    'onnx': Reader(_onnx, _read_onnx),
}
