"""What several test modules share: small instances (values of the same table, the same code), files, readers."""

import dataclasses
import io
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from alexnet_jax.checkpoints import manager
from alexnet_jax.core import model, optim, train_step
from alexnet_jax.core.architecture import ConvSpec, DenseSpec, LayerSpec
from alexnet_jax.core.config import model_from_config, optimizer_from_config
from alexnet_jax.data import datasets
from alexnet_jax.training import build
from alexnet_jax.training.large_batch import hooks_from_config
from alexnet_jax.utils.config_files import get_config
from alexnet_jax.utils.errors import UnreadableError

INIT = 'normal(0.1)'
# Five convolutions with the paper's groups on 35 px: every rule is there (gathers, norm, overlap, dropout).
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
    lrn_alpha=1e-2,  # so that the norm is felt at this scale of activations
)
SIZE = 35
TIMINGS = ('images_per_second', 'data_wait')
COLLECTIVES = r' (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(?:-start)?\('


def network(**changes) -> model.AlexNet:
    return model.AlexNet(**{**SMALL, **changes})


def layers(**changes) -> dict[str, LayerSpec]:
    """The layers of `SMALL` with other fields: conv1={'groups': 2}."""
    return {name: dataclasses.replace(spec, **changes.get(name, {})) for name, spec in SMALL['layers'].items()}


def init(network: model.AlexNet, seed: int = 0, size: int = SIZE):
    return jax.jit(lambda key: model.init_params(network, key, size))(jax.random.key(seed))


def optimizer(network: model.AlexNet, **changes) -> optim.Optimizer:
    """The update of configs/paper.py with other values; ten updates are an epoch."""
    config = get_config('paper')
    options = {'steps_per_epoch': 10.0, 'layers': list(network.layers)}
    options |= {key: changes.pop(key) for key in options if key in changes}
    fields = {**config.optim, **changes}
    return optimizer_from_config(fields, **options, **hooks_from_config(fields, options['steps_per_epoch']))


def digits_config(**changes):
    """configs/quickstart.py, smaller still; `changes` by dotted key."""
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
    """23 updates an epoch; validation and saving at other cadences than epochs, so that batches straddle them."""
    return digits_config(**{'num_steps': 30, 'eval_every_steps': 12, 'checkpoint_every_steps': 8, **changes})


def first_batch(run):
    return next(run.train_batches(0))


def untrained(path, **changes):
    """Saves a small network with drawn weights, of the digits, as a checkpoint in `path`."""
    config, digits = digits_config(**changes), datasets.open_dataset('digits')
    meta = {'config': manager.config_to_json(config), 'class_names': list(digits.class_names)}
    meta |= {'record_size': 32, 'examples': 0, 'fingerprint': ''}
    with manager.CheckpointManager(str(path)) as saved:
        params = init(model_from_config(config.model), 0, 28)
        saved.save(train_step.TrainState(jnp.int32(0), params, None), digits.image_stats, meta, None)
    return str(path)


def lines(workdir):
    with open(os.path.join(workdir, 'metrics.jsonl')) as file:
        return [json.loads(line) for line in file]


def untimed(workdir):
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines(workdir)]


def last_state(config, workdir):
    """Everything the last checkpoint holds, as numpy."""
    run = build.build(config)
    with manager.CheckpointManager(str(workdir)) as saved:
        return jax.device_get(saved.restore(saved.latest(), run.steps.state_shapes))


class Records:
    """`count` images that tell their own number. (A class, so that worker processes can load it.)"""

    def __init__(self, count, size=6, damaged=()):
        self.count, self.size, self.damaged = count, size, damaged

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i in self.damaged:
            raise UnreadableError(f'record {i}')
        return {'image': np.full((self.size, self.size, 3), i % 256, np.uint8), 'label': i}


def picture(seed, height=40, width=48):
    """A smooth picture: JPEG keeps it within a few levels."""
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
    """{file name: (pixels, class name)} by TFDS's own decoding-free reader."""
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
    """Digits as PNG, in folders named by words."""
    taken = dict.fromkeys(classes, 0)
    for i, record in enumerate(datasets.open_dataset('digits').split('train')):
        if record['label'] in classes and taken[record['label']] < count:
            taken[record['label']] += 1
            path = folder / f'digit {record["label"]}' / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(record['image']).resize((50, 40)).save(path)
    return folder


def to_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def running(pid: int) -> bool:
    """Whether a process is alive (Linux)."""
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError:
        return False
