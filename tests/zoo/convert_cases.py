"""Weight files for `convert`. A build returns what the checkpoint must hold, as `Network`."""

import bz2
import collections
import functools
import gzip
import io
import json
import lzma
import struct
import tarfile
import zipfile
from typing import NamedTuple

import numpy as np
import safetensors.numpy

from tests.zoo import weights
from tests.zoo.case import Cases
from tests.zoo.images import _patched
from tests.zoo.weights import Global, Object, state_dict, torch_legacy, torch_zip

CASES = Cases('convert')
IMAGENET_MEAN = np.float32([123.675, 116.28, 103.53])  # RGB


class Network(NamedTuple):
    """The expected checkpoint."""

    bgr: bool = False  # whether the file expects BGR: then the first kernel is converted
    classes: tuple[str, ...] = ('0', '1', '2')
    mean: np.ndarray = IMAGENET_MEAN  # RGB, [3] or [S, S, 3]
    dtype: type = np.float32  # of the values in the file


MEAN = ('--mean=FOLDER/mean.npy',)
AS_IT_IS = Network()
COLOR = np.float32([10, 20, 30])
BGR = Network(bgr=True, mean=COLOR[::-1])


GOOD = 'a.pth', lambda: torch_zip(state_dict())  # a file that can be converted


def read(input, outcome, name, content, network=AS_IT_IS, words=(), says=(), **others):
    """A file with this content. others: further files, with `_` in place of the dot."""

    def build(folder):
        for other, data in {name: content, **{key.replace('_', '.'): data for key, data in others.items()}}.items():
            (folder / other).write_bytes(data() if callable(data) else data)
        return network

    CASES.read(input, outcome, words=[f'--input=FOLDER/{name}', *words], says=says)(build)


def refused(input, by, name, content, outcome='refused', words=(), **others):
    def build(folder):
        for other, data in {name: content, **{key.replace('_', '.'): data for key, data in others.items()}}.items():
            (folder / other).write_bytes(data() if callable(data) else data)

    CASES.refused(input, outcome, by=by, words=[f'--input=FOLDER/{name}', *words])(build)


def mean(array):
    return weights.npy(np.asarray(array))


def changed(**changes):
    """Returns the state_dict with changed entries: `features_0_weight=None` removes one."""
    state = state_dict()
    for key, value in changes.items():
        key = key.replace('_', '.')
        if value is None:
            del state[key]
        else:
            state[key] = value(state[key]) if callable(value) else value
    return state


def safetensors_of(state):
    return safetensors.numpy.save({key: np.ascontiguousarray(value) for key, value in state.items()})


# PyTorch.
read('state_dict of torchvision', "its weights, with torchvision's config", *GOOD)
read('state_dict of PyTorch before 1.6', 'the same', 'a.pth', lambda: torch_legacy(state_dict()))
read('state_dict of float16', 'as float32', 'a.pt', lambda: torch_zip(state_dict(dtype=np.float16)))
read(
    'state_dict of bfloat16',
    'as float32',
    'a.bin',
    lambda: torch_zip(state_dict(dtype=weights.bfloat16)),
    Network(dtype=weights.bfloat16),
)
read('state_dict of float64', 'as float32', 'a.pth', lambda: torch_zip(state_dict(dtype=np.float64)))
read(
    'training checkpoint with epoch, optimizer and arguments',
    'its network; the rest is listed',
    'checkpoint.pth.tar',
    lambda: torch_zip(
        {
            'epoch': 3,
            'arch': 'alexnet',
            'state_dict': state_dict(),
            'optimizer': {'state': {}},
            'args': Object(Global('argparse', 'Namespace'), (), {'lr': 0.1}),
        }
    ),
    says=("entry 'state_dict'", r'ignored 4 entries: epoch \(int\).*args \(argparse.Namespace\)'),
)
read(
    'names with `module.` of DataParallel',
    'the same weights',
    'a.pth',
    lambda: torch_zip(state_dict([f'module.{name}' for name in weights.TORCHVISION])),
)
read(
    'checkpoint of Lightning',
    'its network',
    'last.ckpt',
    lambda: torch_zip(
        {
            'pytorch-lightning_version': '2.5',
            'state_dict': state_dict([f'model.{name}' for name in weights.TORCHVISION]),
            'callbacks': {'k': Object(Global('pathlib', 'PosixPath'), ('a',))},
        }
    ),
    says='ignored 2 entries',
)
read(
    'layers in another order',
    'sorted by their numbers, which is said',
    'a.pth',
    lambda: torch_zip(dict(sorted(state_dict().items()))),
    says='order of the numbers in their names',
)
read(
    'two names for one layer',
    'once, which is said',
    'a.pth',
    lambda: torch_zip(
        {
            **(state := state_dict()),
            'head.weight': state['classifier.6.weight'],
            'head.bias': state['classifier.6.bias'],
        }
    ),
    says=r'head \(the same tensors as classifier.6\)',
)
read(
    'transposed view as a tensor',
    'its values',
    'a.pth',
    lambda: torch_zip(changed(classifier_4_weight=lambda w: np.ascontiguousarray(w.T).T)),
)
read(
    'checkpoint that would run a program',
    'its weights; nothing is run',
    'a.pth',
    lambda: torch_zip({'state_dict': state_dict(), 'hook': Object(Global('os', 'system'), ('touch ran',))}),
    says=r'hook \(posix.system|hook \(os.system',
)
read('.pth packed again without its folder', 'its weights', 'a.pth', lambda: _packed_again(without='archive/'))
read('PyTorch file without suffix', 'by content', 'alexnet', lambda: torch_zip(state_dict()))
read(
    'PyTorch file of a network that expects BGR',
    'the first kernel as RGB',
    *GOOD,
    BGR,
    ['--color_order=bgr', *MEAN],
    mean_npy=mean(COLOR),
)

# Other formats.
read('safetensors', 'its weights', 'a.safetensors', lambda: safetensors_of(state_dict()))
read(
    'safetensors in alphabetical order',
    'features.3 before features.10',
    'a.safetensors',
    lambda: safetensors_of(dict(sorted(state_dict().items()))),
)
read('.caffemodel', 'BGR becomes RGB', 'a.caffemodel', weights.caffemodel, BGR, MEAN, mean_npy=mean(COLOR))
read(
    '.caffemodel before 2014',
    'the same',
    'a.caffemodel',
    lambda: weights.caffemodel(old=True),
    BGR,
    MEAN,
    mean_npy=mean(COLOR),
)
read(
    '.npy dictionary',
    "TensorFlow's layout, BGR becomes RGB",
    'bvlc_alexnet.npy',
    lambda: weights.npy(weights.tensorflow_layers()),
    BGR,
    MEAN,
    mean_npy=mean(COLOR),
)

for _code, _dtype in {'BF16': weights.bfloat16, 'F16': np.float16, 'F64': np.float64}.items():
    read(
        f'safetensors of {_code}',
        'as float32',
        'a.safetensors',
        functools.partial(weights.safetensors_file, _code, _dtype),
        Network(dtype=_dtype),
    )

# Mean images and class lists.
SQUARE = np.arange(3 * 227 * 227, dtype=np.float32).reshape(3, 227, 227) % 251
read(
    "mean image in Caffe's format",
    'as RGB',
    'a.caffemodel',
    weights.caffemodel,
    Network(True, mean=SQUARE[::-1].transpose(1, 2, 0)),
    ['--mean=FOLDER/mean.binaryproto'],
    mean_binaryproto=lambda: weights.blob(SQUARE[None], old=True),
)
read(
    'mean image [3, S, S] as .npy',
    'as RGB',
    *GOOD,
    Network(mean=SQUARE.transpose(1, 2, 0)),
    MEAN,
    mean_npy=lambda: mean(SQUARE),
)
read(
    'mean image [S, S, 3] of uint8',
    'as RGB',
    *GOOD,
    Network(mean=SQUARE.transpose(1, 2, 0)),
    MEAN,
    mean_npy=lambda: mean(SQUARE.transpose(1, 2, 0).astype(np.uint8)),
)
read(
    'class list with a byte order mark and `\\r\\n`',
    'names of the outputs',
    *GOOD,
    Network(classes=('Katze', 'große Eule', 'ox')),
    ['--classes=FOLDER/names.txt'],
    names_txt='\ufeffKatze\r\ngroße Eule\r\nox\r\n'.encode(),
)
refused(
    'mean of two colors',
    r'expected a shape \[3, S, S\], \[S, S, 3\] or \[3\], found \(2,\)',
    *GOOD,
    words=MEAN,
    mean_npy=mean([9, 9]),
)
refused(
    'mean image that is no square',
    r'found \(230, 240, 3\)',
    *GOOD,
    words=MEAN,
    mean_npy=lambda: mean(np.full((230, 240, 3), 9)),
)
refused(
    'mean image smaller than the crop',
    'at least data.image_size=224 px, found 64 px',
    *GOOD,
    words=MEAN,
    mean_npy=lambda: mean(np.full((64, 64, 3), 9)),
)
refused(
    'mean color from 0 to 1',
    'expected values from 0 to 255, found',
    *GOOD,
    words=MEAN,
    mean_npy=mean([0.485, 0.456, 0.406]),
)
refused(
    'mean color with NaN', 'expected values from 0 to 255, found nan', *GOOD, words=MEAN, mean_npy=mean([np.nan, 9, 9])
)
refused('mean of complex numbers', 'complex128 array', *GOOD, words=MEAN, mean_npy=mean([1j, 9, 9]))
refused('mean file that declares 10^12 values', 'cannot be read', *GOOD, words=MEAN, mean_npy=lambda: _too_short())
refused(
    'mean file that is a text',
    r'expected an existing .binaryproto or .npy file',
    *GOOD,
    words=['--mean=FOLDER/mean.txt'],
    mean_txt=b'104 117 123',
)
refused(
    'damaged .binaryproto',
    "expected Caffe's BlobProto in binary",
    'a.caffemodel',
    weights.caffemodel,
    words=['--mean=FOLDER/mean.binaryproto'],
    mean_binaryproto=lambda: weights.blob(SQUARE[None], old=True)[:-7],
)
refused(
    '.caffemodel without a mean',
    'has no mean image, which .* needs; use --mean=FILE',
    'a.caffemodel',
    weights.caffemodel,
)
refused(
    'class list of two names for three outputs',
    'expected 3 class names, one per output, found 2',
    *GOOD,
    words=['--classes=FOLDER/names.txt'],
    names_txt=b'a\nb\n',
)
read(
    'class list with a name twice, as crane in ImageNet',
    'kept, with a warning',
    *GOOD,
    Network(classes=('crane', 'ox', 'crane')),
    ['--classes=FOLDER/names.txt'],
    '1 names stand for several outputs: crane',
    names_txt=b'crane\nox\ncrane\n',
)
read(
    'imagenet_class_index.json of Keras',
    'names of the outputs',
    *GOOD,
    Network(classes=('tench', 'goldfish', 'great_white_shark')),
    ['--classes=FOLDER/c.json'],
    c_json=b'{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"], "2": ["n01484850", "great_white_shark"]}',
)
read(
    'class list as a Python dict by output',
    'names of the outputs',
    *GOOD,
    Network(classes=('tench, Tinca tinca', "it's", 'c')),
    ['--classes=FOLDER/c.txt'],
    c_txt=b"{2: 'c',\n 0: 'tench, Tinca tinca',\n 1: \"it's\"}",
)
read(
    'class list as a JSON list',
    'names of the outputs',
    *GOOD,
    Network(classes=('a', 'b', 'c')),
    ['--classes=FOLDER/c.json'],
    c_json=b'["a", "b", "c"]',
)
refused(
    'class list with an empty line between names',
    'the name of output 1 is empty',
    *GOOD,
    words=['--classes=FOLDER/names.txt'],
    names_txt=b'a\n\nb\n',
)
refused(
    'class list by output with a gap',
    'c.json.* cannot be read',
    *GOOD,
    words=['--classes=FOLDER/c.json'],
    c_json=b'{"0": "a", "1": "b", "3": "c"}',
)
refused(
    'JSON class list that is cut',
    'c.json.* cannot be read',
    *GOOD,
    words=['--classes=FOLDER/c.json'],
    c_json=b'["a", "b", ',
)
refused(
    'class list in Latin-1',
    'names.txt.* cannot be read',
    *GOOD,
    words=['--classes=FOLDER/names.txt'],
    names_txt='a\né\nb'.encode('latin1'),
)
refused('class list that does not exist', 'none.txt.* cannot be read', *GOOD, words=['--classes=FOLDER/none.txt'])

# Files under the names of others.
refused(
    'Git LFS pointer',
    'is a Git LFS pointer, .*git lfs pull',
    'a.pth',
    b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n',
    'refused by its name',
)
refused('web page', 'is a web page', 'a.safetensors', b'<html><body>404</body></html>', 'refused by its name')
refused(
    'gzip', 'is compressed by gzip', 'a.pth.tar', lambda: gzip.compress(torch_zip(state_dict())), 'refused by its name'
)
refused('bzip2', 'is compressed by bzip2', 'a.caffemodel', lambda: bz2.compress(bytes(99)), 'refused by its name')
refused('xz', 'is compressed by xz', 'a.npy', lambda: lzma.compress(bytes(99)), 'refused by its name')
refused(
    'tar archive', 'is a tar archive', 'a.tar', lambda: _tar('a.pth', torch_zip(state_dict())), 'refused by its name'
)
refused('HDF5 file of Keras', 'is an HDF5 file', 'a.pth', b'\x89HDF\r\n\x1a\n' + bytes(60), 'refused by its name')
read(
    'ZIP archive of a .pth, named .pth',
    'as the file in it, with its name',
    'a.pth',
    lambda: weights.zipped([('a.pth', torch_zip(state_dict()))]),
    says=['reading a.pth'],
)
refused(
    'TorchScript',
    r'found TorchScript; use torch.save\(torch.jit.load',
    'a.pt',
    lambda: torch_zip(state_dict(), [('constants.pkl', b'\x80\2).')]),
    'refused, with the call that helps',
)
refused(
    'weights of Keras 3 (.keras)',
    'expected a|found a zip archive',
    'a.keras',
    lambda: weights.zipped([('config.json', b'{}')]),
)
refused('image', 'expected an existing .caffemodel, .pth', 'a.png', b'\x89PNG\r\n\x1a\n')
refused('empty file', 'found 0 bytes|cannot be read', 'a.pth', b'')
refused('.npy of one array', 'a float64 array of shape', 'a.npy', lambda: weights.npy(np.ones((3, 4))))
refused('.npz', 'expected', 'a.npz', lambda: weights.zipped([('a.npy', weights.npy(np.ones(3)))]))

# Damage.
refused(
    '.pth whose end is missing',
    'is truncated, damaged or of another format',
    'a.pth',
    lambda: torch_zip(state_dict())[:-500],
)
refused(
    '.pth whose start is missing',
    'is truncated, damaged or of another format',
    'a.pth',
    lambda: torch_zip(state_dict())[500:],
)
refused(
    '.pth with one wrong bit in a weight',
    'does not match its checksum',
    'a.pth',
    lambda: _flip(torch_zip(state_dict())),
)
refused('old .pth whose end is missing', 'values are missing', 'a.pth', lambda: torch_legacy(state_dict())[:-5])
refused(
    'old .pth cut in its pickle',
    'is truncated, damaged or of another format',
    'a.pth',
    lambda: torch_legacy(state_dict())[:200],
)
refused(
    '.safetensors cut in its header',
    'is truncated, damaged or of another format',
    'a.safetensors',
    lambda: safetensors_of(state_dict())[:50],
)
refused(
    '.safetensors cut in its values',
    'is truncated, damaged or of another format',
    'a.safetensors',
    lambda: safetensors_of(state_dict())[:-4],
)
refused(
    '.safetensors with a header of 10^18 bytes',
    'is truncated, damaged or of another format',
    'a.safetensors',
    lambda: struct.pack('<Q', 10**18) + b'{}',
)
refused(
    '.safetensors with overlapping tensors',
    'is truncated, damaged or of another format',
    'a.safetensors',
    lambda: _overlapping(),
)
refused(
    '.npy cut in its pickle',
    'is truncated, damaged or of another format',
    'a.npy',
    lambda: weights.npy(weights.tensorflow_layers())[:-40],
)
refused(
    '.caffemodel whose end is missing',
    'is truncated, damaged or of another format|expected .* numbers',
    'a.caffemodel',
    lambda: weights.caffemodel()[:-9],
)
refused(
    '.caffemodel as text (.prototxt)',
    'is truncated, damaged or of another format',
    'a.caffemodel',
    b'name: "AlexNet"\nlayer {\n}\n',
)

refused(
    '.pth packed again with compression',
    'its entries are compressed, .*zip -0 -r',
    'a.pth',
    lambda: _packed_again(compression=zipfile.ZIP_DEFLATED),
    'refused, with the command',
)
refused('.h5 of Keras', 'is an HDF5 file', 'a.h5', b'\x89HDF\r\n\x1a\n' + bytes(60), 'refused by its name')
refused('ONNX', 'expected an existing .caffemodel, .pth', 'a.onnx', b'\x08\x07\x12\x07pytorch')


@CASES.refused(
    'folder that a browser unpacked from a .pth',
    'refused, with the command',
    by='is an unpacked PyTorch file; .*zip -0 -r FILE.pth archive',
    words=['--input=FOLDER/archive/'],
)
def _(folder):
    with zipfile.ZipFile(io.BytesIO(torch_zip(state_dict()))) as archive:
        archive.extractall(folder)


# Other contents.
refused(
    'two networks',
    'expected one network, found 2: generator, critic',
    'a.pth',
    lambda: torch_zip({'generator': state_dict(), 'critic': state_dict()}),
)
refused(
    'optimizer only',
    'expected a state_dict .*, found a dict with optimizer',
    'a.pth',
    lambda: torch_zip({'optimizer': {'state': {0: {'momentum_buffer': np.ones(3, np.float32)}}}}),
)
refused('one tensor', 'expected a state_dict .*, found Tensor', 'a.pth', lambda: torch_zip(np.ones(3, np.float32)))
refused('empty state_dict', 'expected a state_dict', 'a.pth', lambda: torch_zip(collections.OrderedDict()))
refused(
    'weights of integers',
    'expected floating-point numbers, found int64',
    'a.pth',
    lambda: torch_zip(state_dict(dtype=np.int64)),
)
refused(
    'NaN in a weight',
    r'conv1 \(features.0.weight\): expected finite numbers, found NaN',
    'a.pth',
    lambda: torch_zip(changed(features_0_weight=lambda w: w * np.float32('nan'))),
)
refused(
    'float64 too large for float32',
    'expected finite numbers',
    'a.pth',
    lambda: torch_zip(changed(classifier_6_bias=np.full(3, 1e300))),
)
refused('big-endian file', 'expected little-endian numbers', 'a.pth', lambda: torch_zip(state_dict(), byteorder=b'big'))
refused(
    'quantized tensors',
    'unsupported kinds of tensors: features.0.weight',
    'a.pth',
    lambda: torch_zip(
        changed(
            features_0_weight=Object(Global('torch._utils', '_rebuild_qtensor'), (1,)),
            features_3_weight=Object(Global('torch._utils', '_rebuild_sparse_tensor'), (1,)),
        )
    ),
)
refused(
    'layer without bias',
    'unsupported tensors classifier.6.weight',
    'a.pth',
    lambda: torch_zip(changed(classifier_6_bias=None)),
)
refused(
    'batch normalization',
    r'unsupported tensors features.1.weight \(2,\)',
    'a.pth',
    lambda: torch_zip(
        {**state_dict(), 'features.1.weight': np.ones(2, np.float32), 'features.1.bias': np.ones(2, np.float32)}
    ),
)
refused(
    'wrong kernel size',
    r'conv1 expected \(N, 3, 11, 11\), found \(2, 3, 7, 7\)',
    'a.pth',
    lambda: torch_zip(changed(features_0_weight=np.ones((2, 3, 7, 7), np.float32))),
)
refused(
    'first dense layer of another input size',
    r'fc6 expected \(N, 72 or 36\), found \(4, 50\)',
    'a.pth',
    lambda: torch_zip(changed(classifier_1_weight=np.ones((4, 50), np.float32))),
)
refused(
    'biases of another length',
    r'expected \(3,\) biases, found \(5,\)',
    'a.pth',
    lambda: torch_zip(changed(classifier_6_bias=np.ones(5, np.float32))),
)
refused(
    'network without its classifier',
    r'fc8 expected \(N, 4\), found nothing',
    'a.pth',
    lambda: torch_zip(changed(classifier_6_weight=None, classifier_6_bias=None)),
)
refused(
    'network with a further layer',
    'expected no further layer, found',
    'a.pth',
    lambda: torch_zip({**state_dict(), 'z.9.weight': np.ones((5, 3), np.float32), 'z.9.bias': np.ones(5, np.float32)}),
)
refused(
    '.caffemodel without biases',
    r'expected weights \(4 or 2 axes\) and biases',
    'a.caffemodel',
    lambda: weights.caffemodel(blobs=1),
)
refused(
    '.npy dictionary of arrays',
    r'conv1: expected \[weights, biases\]',
    'a.npy',
    lambda: weights.npy({'conv1': np.ones((3, 4))}),
)

# Flags.
CASES.refused(
    'path that does not exist', 'refused', by='expected an existing .caffemodel, .pth', words=['--input=FOLDER/a.pth']
)(lambda f: None)
refused('`--color_order` of another name', 'expected rgb or bgr', *GOOD, words=['--color_order=gbr'])
refused('`--to` of another name', 'expected checkpoint or safetensors', *GOOD, words=['--to=onnx'])
refused('weight file with `--to=safetensors`', 'is a file, not a checkpoint', *GOOD, words=['--to=safetensors'])
refused('config of another network', 'the weights do not fit the config: conv1', *GOOD, words=['--config=quickstart'])
CASES.refused('output that exists', 'refused', by='already exists', words=['--input=FOLDER/a.pth', '--output=FOLDER'])(
    lambda f: (f / 'a.pth').write_bytes(torch_zip(state_dict()))
)
CASES.refused('folder', 'refused', by='expected an existing .caffemodel, .pth', words=['--input=FOLDER'])(
    lambda f: (f / 'a.pth').write_bytes(torch_zip(state_dict()))
)


def _tar(name, content):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def _packed_again(compression=zipfile.ZIP_STORED, without=''):
    """Returns a PyTorch file as a program packs its entries again. without: the start of names to remove."""
    with zipfile.ZipFile(io.BytesIO(torch_zip(state_dict()))) as archive:
        entries = [(name.removeprefix(without), archive.read(name)) for name in archive.namelist()]
    return weights.zipped(entries, compression)


def _flip(content):
    position = content.index(weights.layers()[0][0].tobytes()) + 8
    return _patched(content, position, content[position] ^ 1)


def _overlapping():
    entry = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}
    header = json.dumps({'a.weight': entry, 'a.bias': entry}).encode()
    return struct.pack('<Q', len(header)) + header + bytes(8)


def _too_short():
    """Returns a .npy whose header declares more values than it has."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {'descr': '<f4', 'fortran_order': False, 'shape': (3, 10**6, 10**6)})
    return file.getvalue() + bytes(12)
