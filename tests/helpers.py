"""Helpers shared by several test modules: small networks and configs, files, readers."""

import dataclasses
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from alexnet_jax.checkpoints import manager
from alexnet_jax.core import model, optim, train_step
from alexnet_jax.core.architecture import ConvSpec, DenseSpec, LayerSpec
from alexnet_jax.core.config import model_from_config, optimizer_from_config
from alexnet_jax.data import datasets, random_crops
from alexnet_jax.training import build
from alexnet_jax.training.recipes import optimizer_hooks
from alexnet_jax.utils.config_files import get_config
from alexnet_jax.utils.errors import UnreadableError
from tests import ROOT

INIT = 'normal(0.1)'
# Five convolutions with the paper's groups on 35 px images: all-gathers, normalization, overlapping pooling, dropout.
SMALL = dict(
    layers={
        'conv1': ConvSpec(features=8, kernel=5, stride=2, padding=(0, 1), init=INIT, bias=0.1, post='relu lrn pool'),
        'conv2': ConvSpec(features=16, kernel=3, padding=(1, 1), groups=2, init=INIT, bias=0.5, post='relu lrn pool'),
        'conv3': ConvSpec(features=24, kernel=3, padding=(1, 1), init=INIT, post='relu'),
        'conv4': ConvSpec(features=24, kernel=3, padding=(1, 1), groups=2, init=INIT, bias=0.5, post='relu'),
        'conv5': ConvSpec(features=16, kernel=3, padding=(1, 1), groups=2, init=INIT, bias=0.5, post='relu pool'),
        'fc6': DenseSpec(features=32, init=INIT, bias=0.5, post='relu dropout'),
        'fc7': DenseSpec(features=32, init=INIT, bias=0.5, post='relu dropout'),
        'fc8': DenseSpec(init=INIT),
    },
    num_classes=12,
    lrn_alpha=1e-2,  # large enough to matter for activations of this scale
)
SIZE = 35
TIMINGS = ('images_per_second', 'data_wait')
COLLECTIVES = r' (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(?:-start)?\('


def network(**changes) -> model.AlexNet:
    return model.AlexNet(**{**SMALL, **changes})


def layers(**changes) -> dict[str, LayerSpec]:
    """Returns the layers of `SMALL` with changed fields, as in conv1={'groups': 2}."""
    return {name: dataclasses.replace(spec, **changes.get(name, {})) for name, spec in SMALL['layers'].items()}


def init(network: model.AlexNet, seed: int = 0, size: int = SIZE):
    return jax.jit(lambda key: model.init_params(network, key, size))(jax.random.key(seed))


def optimizer(network: model.AlexNet, **changes) -> optim.Optimizer:
    """Returns the optimizer of configs/paper.py with changed values; an epoch has ten updates."""
    config = get_config('paper')
    total_steps = changes.pop('total_steps', 100)
    options = {'steps_per_epoch': 10.0, 'layers': list(network.layers)}
    options |= {key: changes.pop(key) for key in options if key in changes}
    fields = {**config.optim, **changes}
    return optimizer_from_config(fields, **options, **optimizer_hooks(fields, options['steps_per_epoch'], total_steps))


def digits_config(**changes):
    """Returns a smaller configs/quickstart.py; `changes` by dotted key."""
    config = get_config('quickstart')
    layers = config.model.layers
    for name in ('conv1', 'conv2', 'conv3', 'conv4', 'conv5'):
        layers[name].features = 8
    for name, std in (('conv1', 0.003), ('conv2', 0.17), ('conv3', 0.17), ('conv4', 0.23), ('conv5', 0.23)):
        layers[name].init = f'normal({std})'
    layers.fc6.update(features=32, init='normal(0.17)')
    layers.fc7.update(features=32, init='normal(0.25)')
    config.log_every_steps = 1
    config.data.num_threads = 2
    config.update_from_flattened_dict(changes)
    return config


def run_config(**changes):
    """23 updates per epoch; validation and checkpoint intervals that do not divide an epoch."""
    return digits_config(**{'num_steps': 30, 'eval_every_steps': 12, 'checkpoint_every_steps': 8, **changes})


def resume_config(**changes):
    """Log lines are means of three updates; validations and saves fall between them and between epochs.

    Two convolutions and two dense layers: most of the time is the start of Python and JAX.
    """
    plateau = {'optim.schedule': 'plateau', 'optim.patience': 1, 'optim.min_delta': 50.0}
    config = run_config(**{'log_every_steps': 3, **plateau, 'mesh.data': 1, 'mesh.tower': 1})
    for name in ('conv3', 'conv4', 'conv5', 'fc7'):
        del config.model.layers[name]
    config.model.layers.conv1.stride = 2
    config.update_from_flattened_dict(changes)
    return config


def first_batch(run):
    return next(run.train_batches(0))


def save_untrained(path, seed=0, without=(), **changes):
    """Saves a small network with initial weights, without some layers, as a checkpoint in `path`; returns its path."""
    config, digits = digits_config(**changes), datasets.open_dataset('digits')
    for name in without:
        del config.model.layers[name]
    meta = {'config': manager.config_to_json(config), 'class_names': list(digits.class_names)}
    meta |= {'record_size': 32, 'examples': 0, 'fingerprint': ''}
    with manager.CheckpointManager(str(path)) as saved:
        params = init(model_from_config(config.model), seed, 28)
        saved.save(train_step.TrainState(jnp.int32(0), params, None), digits.image_stats, meta, None)
    return str(path)


def read_metrics(workdir):
    with open(os.path.join(workdir, 'metrics.jsonl')) as file:
        return [json.loads(line) for line in file]


def untimed_metrics(workdir):
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(workdir)]


def last_state(config, workdir):
    """Returns the whole state of the last checkpoint as NumPy arrays."""
    return read_state(workdir, build.build(config).steps.state_shapes)


def read_state(workdir, shapes):
    with manager.CheckpointManager(str(workdir), read_only=True) as saved:
        return jax.device_get(saved.restore(saved.latest(), shapes))


class Records:
    """`count` images filled with their index. (A module-level class, so that worker processes can load it.)"""

    def __init__(self, count, size=6, damaged=()):
        self.count, self.size, self.damaged = count, size, damaged

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i in self.damaged:
            raise UnreadableError(f'record {i}')
        return {'image': np.full((self.size, self.size, 3), i % 256, np.uint8), 'label': i}


def draw(augmentation, *, seed, position, record_size):
    """Returns the random parameters of one image: those of a batch of size 1."""
    drawn = random_crops.draw_batch(augmentation, seed=seed, first=position, count=1, record_size=record_size)
    return random_crops.AugmentParams(*(values[0] for values in drawn))


def picture(seed, height=40, width=48):
    """Returns a smooth image, which JPEG keeps within a few levels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(pixels, kind='JPEG', **options):
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, kind, **options)
    return buffer.getvalue()


def write_files(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(root)


def read_back(directory, split):
    """Returns {file name: (pixels, class name)}, read by TFDS."""
    import tensorflow_datasets as tfds  # slow, and few tests need it

    builder = tfds.builder_from_directory(directory)
    names = builder.info.features['label'].names
    raw = not isinstance(builder.info.features['image'], tfds.features.Image)
    decoders = None if raw else {'image': tfds.decode.SkipDecoding()}
    found = {}
    for record in builder.as_data_source(split, decoders=decoders):
        image = record['image']
        pixels = image if raw else np.asarray(Image.open(io.BytesIO(image)))
        found[record['file_name'].decode()] = (pixels, names[record['label']])
    return found


def write_pictures(folder, classes, count=40):
    """Writes digits as PNG files, in one folder per class."""
    taken = dict.fromkeys(classes, 0)
    for i, record in enumerate(datasets.open_dataset('digits').split('train')):
        if record['label'] in classes and taken[record['label']] < count:
            taken[record['label']] += 1
            path = folder / f'digit {record["label"]}' / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(record['image']).resize((50, 40)).save(path)
    return folder


def run_command(*words, **environment):
    """Runs an `alexnet_jax` command; `environment` overrides variables of this process, and None removes one."""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, '-m', 'alexnet_jax', *map(str, words)], capture_output=True, text=True, timeout=1800, cwd=ROOT,
        env={key: value for key, value in environment.items() if value is not None},
    )  # fmt: skip


def to_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def is_running(pid: int) -> bool:
    """Returns whether a process is alive (Linux)."""
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError:
        return False


_STORAGES = {'float16': 'Half', 'bfloat16': 'BFloat16', 'float32': 'Float', 'float64': 'Double'}


def write_pth(path, tensors):
    """Writes arrays by name as `torch.save` writes a state_dict, without PyTorch. Returns the path as str.

    Arrays are contiguous, in the order of C or of Fortran.
    """

    def pickled(value):
        return pickle.dumps(value, 2)[2:-1]  # without the protocol and the stop

    empty_dict = b'ccollections\nOrderedDict\n)R'
    data = b'\x80\x02' + empty_dict + b'('
    with zipfile.ZipFile(path, 'w') as archive:
        for i, (name, array) in enumerate(tensors.items()):
            class_ = f'ctorch\n{_STORAGES[array.dtype.name]}Storage\n'.encode()
            storage = b'(' + pickled('storage') + class_ + b''.join(map(pickled, (str(i), 'cpu', array.size))) + b'tQ'
            steps = tuple(step // array.itemsize for step in array.strides)
            shape = b''.join(map(pickled, (0, array.shape, steps, False)))
            data += pickled(name) + b'ctorch._utils\n_rebuild_tensor_v2\n(' + storage + shape + empty_dict + b'tR'
            archive.writestr(f'archive/data/{i}', array.tobytes('A'))
        for name, content in (('data.pkl', data + b'u.'), ('byteorder', b'little'), ('version', b'3\n')):
            archive.writestr(f'archive/{name}', content)
    return str(path)


def torchvision_tensors(rng, widths=(4, 6, 8, 6, 6), hidden=16, classes=3, side=1):
    """Returns the arrays of a narrow AlexNet in torchvision's layout. side: of the maps before the classifier."""
    sizes = dict(zip((0, 3, 6, 8, 10), zip(widths, (3, *widths), (11, 5, 3, 3, 3), strict=False), strict=True))
    shapes = {f'features.{i}': (outputs, inputs, size, size) for i, (outputs, inputs, size) in sizes.items()}
    rows = ((1, hidden, widths[-1] * side**2), (4, hidden, hidden), (6, classes, hidden))
    shapes |= {f'classifier.{i}': (outputs, inputs) for i, outputs, inputs in rows}
    tensors = {}
    for name, shape in shapes.items():
        scale = (2 / np.prod(shape[1:])) ** 0.5
        tensors[f'{name}.weight'] = (scale * rng.standard_normal(shape)).astype(np.float32)
        tensors[f'{name}.bias'] = (0.1 * rng.standard_normal(shape[0])).astype(np.float32)
    return tensors
