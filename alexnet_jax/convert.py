"""Turns weights of Caffe, PyTorch or safetensors into a checkpoint, and a checkpoint into safetensors.

    python -m alexnet_jax.convert --input=FILE [--mean=FILE] --output=DIR [--config=FILE] [--classes=FILE]
    python -m alexnet_jax.convert --input=CHECKPOINT --output=DIR --to=safetensors

A file of weights gives features, groups and classes. What it does not say (strides, paddings, what follows a layer,
preprocessing) is taken from a config: configs/caffe.py for a .caffemodel, configs/torchvision.py for the others.
"""

import json
import os
import pathlib
import runpy
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import alexnet_jax
from alexnet_jax import augment, checkpoint, cli, layers, listing, model, processes, statistics, steps, weights
from alexnet_jax.errors import UserError, check_new
from alexnet_jax.layers import Conv, Dense
from alexnet_jax.statistics import Statistics
from alexnet_jax.weights import Layer

FILE_NAME = 'model.safetensors'
_RECORD_SIZE = 256  # pixels; where no mean image says another
_IMAGENET_MEAN = 255 * np.array([0.485, 0.456, 0.406])  # RGB; torchvision's transforms
_TORCHVISION = ('features.0', 'features.3', 'features.6', 'features.8', 'features.10',
                'classifier.1', 'classifier.4', 'classifier.6')  # fmt: skip
_PAPER = [(96, 11, 1), (256, 5, 2), (384, 3, 1), (384, 3, 2), (256, 3, 2)]  # features, kernel, groups


def to_params(network: model.AlexNet, image_size: int, found: Sequence[Layer], *, bgr: bool = False) -> dict[str, Any]:
    """Parameters in our layout: kernels HWIO or [inputs, outputs], maps flattened in (H, W, C) order, float32.

    Args:
      network: whose table has the shapes of `found`, see `fit`.
      image_size: side of its input, pixels.
      found: in the order of the table.
      bgr: whether the first layer reads blue first, as Caffe's do.
    """
    params = {}
    for (name, sizes), layer in zip(layers.sizes(network, image_size).items(), found, strict=True):
        weight = layer.weight[:, ::-1] if bgr and not params else layer.weight
        if weight.ndim == 2 and len(sizes.inputs) == 3:
            weight = weight.reshape(len(weight), -1, *sizes.inputs[:2])  # [O, C / groups, H, W]
            kernel = weight.transpose(2, 3, 1, 0).reshape(-1, len(weight))
        else:
            kernel = weight.T if weight.ndim == 2 else weight.transpose(2, 3, 1, 0)
        params[name] = {'kernel': np.ascontiguousarray(kernel), 'bias': layer.bias}
    return params


def from_params(network: model.AlexNet, image_size: int, params: dict[str, Any]) -> list[Layer]:
    """The inverse of `to_params`, RGB; named as torchvision does where it has such a network, else conv1 ... fc8."""
    if network.local:
        raise UserError('model.local: no other format has layers with kernels of their own at every place.')
    table = network.table()
    plain = all(set(row.then.split()) <= {'relu', 'pool', 'dropout'} for row in table.values())
    counts = (len(network.conv), len(network.dense))
    found = []
    for i, (name, sizes) in enumerate(layers.sizes(network, image_size).items()):
        kernel, bias = np.asarray(params[name]['kernel']), np.asarray(params[name]['bias'])
        if kernel.ndim == 2 and len(sizes.inputs) == 3:
            weight = kernel.reshape(*sizes.inputs[:2], -1, kernel.shape[1]).transpose(3, 2, 0, 1)
            weight = weight.reshape(kernel.shape[1], -1)
        else:
            weight = kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)
        named = _TORCHVISION[i] if plain and counts == (5, 2) else name
        found.append(Layer(named, np.ascontiguousarray(weight), bias))
    return found


def fit(config: dict[str, Any], found: Sequence[Layer]) -> dict[str, Any]:
    """A config (plain values) with the features, groups and classes that a file's weights have.

    Groups follow from the shapes: inputs of the layer below over inputs of the weight. Where a Caffe file names the
    steps behind a layer, theirs is the order (CaffeNet pools before it normalises).

    Args:
      found: convolutions and linear layers, each kind in the order of the network.

    Raises:
      UserError: the weights are not of such a network; says what was expected and found, layer by layer.
    """
    network = model.from_config(config['model'])
    sizes = layers.sizes(network, config['data']['image_size'])
    queues = {kind: [layer for layer in found if layer.weight.ndim == ndim] for kind, ndim in ((Conv, 4), (Dense, 2))}
    rows, report, channels, last = [], [], 3, list(sizes)[-1]
    for name, row in network.table().items():
        layer = queues[type(row)].pop(0) if queues.get(type(row)) else None
        inputs = sizes[name].inputs
        places = inputs[0] * inputs[1] if isinstance(row, Dense) and len(inputs) == 3 else 1
        groups = (1,) if name in ('conv1', last) else (1, 2) if isinstance(row, Dense) else None
        fitted, said = _fit_row(row, layer, channels, places, groups)
        rows.append(fitted)
        report.append(f'{name} {said}')
        channels = row.features if layer is None else layer.weight.shape[0]
    spare = [layer for queue in queues.values() for layer in queue]
    report += [f'expected no further layer, found {layer.weight.shape} in {layer.name!r}' for layer in spare]
    if spare or None in rows:
        raise UserError(
            f'the weights are not of the network expected: {"; ".join(report)}. Give --config=FILE of their network.'
        )
    fields = {
        'conv': [list(row) for row in rows if isinstance(row, Conv)],
        'dense': [list(row) for row in rows if isinstance(row, Dense)][:-1],
        'num_classes': rows[-1].features,
    }
    config = {**config, 'model': {**config['model'], **fields}}
    layers.sizes(model.from_config(config['model']), config['data']['image_size'])  # raises where it cannot be built
    return config


def _fit_row(row: Conv | Dense, layer: Layer | None, channels: int, places: int, allowed: tuple[int, ...] | None):
    """(the row with the file's features and groups, None where they do not fit; expected and found, in words).

    channels: of the maps or units below; places: of each map, where a dense layer reads maps.
    allowed: numbers of groups; None: any that divides (a convolution cannot be read otherwise).
    """
    inputs, window = channels * places, (row.kernel, row.kernel) if isinstance(row, Conv) else ()
    counts = f'{inputs} / groups' if allowed is None else ' or '.join(str(inputs // n) for n in allowed)
    expected = f'expected ({", ".join(["N", counts, *map(str, window)])})'
    if layer is None:
        return None, f'{expected}, found nothing'
    features, part, *sides = layer.weight.shape
    groups = inputs // part if part and inputs % part == 0 else 0
    if not (groups and features and tuple(sides) == window and (allowed is None or groups in allowed)):
        return None, f'{expected}, found {layer.weight.shape} in {layer.name!r}'
    if channels % groups or features % groups:
        return None, f'expected {channels} inputs and {features} features to divide into {groups} groups, found a rest'
    if layer.bias.shape != (features,):
        return None, f'expected ({features},) biases, found {layer.bias.shape} in {layer.name!r}'
    steps_here = [step for step in row.then.split() if step in ('relu', 'lrn', 'pool')]
    steps_there = layer.then.split() or steps_here
    if sorted(steps_here) != sorted(steps_there):
        return None, f"expected to be followed by '{' '.join(steps_here)}', found {layer.then!r} behind {layer.name!r}"
    if steps_here != steps_there:
        row = row._replace(then=' '.join(steps_there + [s for s in row.then.split() if s not in steps_here]))
    return row._replace(features=features, groups=groups), 'ok'


def convert(
    source: str,
    output: str,
    *,
    to: str = 'checkpoint',
    mean: str | None = None,
    config: Any = None,
    classes: str | None = None,
) -> None:
    """Writes the new directory `output`; prints what the network was taken for.

    Args:
      source: a .caffemodel; a PyTorch state_dict (.pth, .pt, .bin, .tar); a .safetensors file; for to='safetensors'
        what `load_checkpoint` takes.
      output: must not exist. Written as a sibling `.NAME.incomplete` and renamed when whole.
      to: 'checkpoint' or 'safetensors'.
      mean: a .binaryproto (Caffe: BGR), or a .npy [3, S, S], [S, S, 3] or [3] on the 0-255 scale, its channels in the
        order of the network's input. A checkpoint's records are of its side S. Caffe's networks need one.
      config: a ConfigDict of the network and preprocessing that the weights are of; see above for the default.
      classes: a text file of class names, one a line, in the order of the outputs. Default: WordNet ids of ILSVRC-2012
        for 1,000 outputs, else numbers.

    Raises:
      UserError: a file that is not what it should be, an option out of its range, no space. Nothing is written then.
    """
    if to not in ('checkpoint', 'safetensors'):
        raise UserError(f'--to={to!r}; expected checkpoint or safetensors.')
    check_new(output)
    if to == 'safetensors':
        if mean or config is not None or classes:
            raise UserError('--mean, --config and --classes are for --to=checkpoint; a checkpoint holds them already.')
        loaded = checkpoint.load_checkpoint(source)
        with processes.new_directory(output) as folder:
            write_safetensors(folder, loaded)
        return
    if not os.path.isfile(source):
        kind = 'a folder; for a checkpoint add --to=safetensors' if os.path.isdir(source) else 'nothing'
        raise UserError(f'--input={source!r}: expected a .caffemodel, .pth or .safetensors file, found {kind}.')
    found, own, bgr = weights.read(source)
    used = '--config'
    if config is not None:
        plain = checkpoint.config_to_json(config)
    elif own is not None:
        used = source
        with weights.checks_metadata(source):
            augment.from_config(own['config']['data'])
            plain = fit(own['config'], found)
    else:
        used, plain = _default_config('caffe.py' if bgr else 'torchvision.py')
    plain = fit(plain, found)
    network, image_size = model.from_config(plain['model']), plain['data']['image_size']
    found = sorted(found, key=lambda layer: -layer.weight.ndim)  # convolutions first, each kind in its order
    found = [_float32(name, layer) for name, layer in zip(network.table(), found, strict=True)]
    stats = _statistics(source, augment.from_config(plain['data']), mean, own, bgr)
    names = _class_names(network.num_classes, classes, own)
    meta = {
        'config': plain,
        'class_names': names,
        'record_size': len(stats.mean_image),
        'examples': 0,
        'fingerprint': '',
    }
    state = steps.TrainState(np.int32(0), to_params(network, image_size, found, bgr=bgr), None)
    with processes.new_directory(output) as folder, checkpoint.Checkpoints(folder) as checkpoints:
        checkpoints.save(state, stats, meta, None)
        checkpoints.wait()
    _describe(network, found, plain['data'], used)
    if used == 'configs/torchvision.py' and [row[:2] + row[4:5] for row in network.conv] == _PAPER:
        print(
            'The 2012 network has these widths too: if it was trained with response normalisation, convert it with '
            '--config=configs/caffe.py or configs/paper.py.'
        )
    print(f'{output} is ready.', flush=True)


def _describe(network: model.AlexNet, found: Sequence[Layer], data: dict[str, Any], used: str) -> None:
    for (name, row), layer in zip(network.table().items(), found, strict=True):
        window = f'{row.kernel}x{row.kernel} px' if isinstance(row, Conv) else ''
        print(f'{name:6}{row.features:6}  {window:9} groups {row.groups}  {row.then or "-":20} from {layer.name}')
    print(
        f'Strides, paddings, what follows each layer and preprocessing ({data["image_size"]} px, data.mean='
        f'{data["mean"]!r}) are those of {used}; another network is given with --config=FILE.'
    )


def _default_config(name: str) -> tuple[str, dict[str, Any]]:
    path = pathlib.Path(alexnet_jax.__file__).parent.parent / 'configs' / name
    if not path.is_file():
        raise UserError(f"there is no {path}; give --config=FILE, the repository's configs/{name} or another.")
    return f'configs/{name}', checkpoint.config_to_json(runpy.run_path(str(path))['get_config']())


def _float32(name: str, layer: Layer) -> Layer:
    arrays = []
    for kind, array in (('weight', layer.weight), ('bias', layer.bias)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f'{name} ({layer.name}.{kind}): expected floating-point numbers, found {array.dtype}.')
        with np.errstate(over='ignore'):
            arrays.append(array.astype(np.float32))
        if not np.isfinite(arrays[-1]).all():
            raise UserError(f'{name} ({layer.name}.{kind}): expected finite numbers, found NaN or infinity.')
    return layer._replace(weight=arrays[0], bias=arrays[1])


def _statistics(path, augmentation: augment.Augmentation, mean: str | None, own: dict | None, bgr: bool) -> Statistics:
    """Preprocessing: of --mean, else beside a file written here, else ImageNet's mean colour for PyTorch's files."""
    size = augmentation.image_size
    stats = None if own is None else statistics.load(os.path.dirname(os.path.abspath(path)))
    if mean:
        image = weights.read_mean(mean, bgr)
    elif own is not None:
        if stats is None or len(stats.mean_image) != own['record_size']:
            raise UserError(
                f'expected {statistics.FILE_NAME} of {own["record_size"]} px beside {path!r}, as it was written, found '
                f'{"none" if stats is None else f"one of {len(stats.mean_image)} px"}; or give --mean=FILE.'
            )
        image = stats.mean_image
    elif bgr or augmentation.mean != 'channel':
        what = 'a .caffemodel holds no mean image' if bgr else f'data.mean={augmentation.mean!r} takes a mean image'
        raise UserError(f'{what}, expected --mean=FILE: a .binaryproto, or a .npy of shape [3, S, S] or [3].')
    else:
        image = _IMAGENET_MEAN
    if image.ndim == 1:
        image = np.broadcast_to(image, (_RECORD_SIZE, _RECORD_SIZE, 3))
    if len(image) < size:
        raise UserError(f'the mean image is of {len(image)} px, expected at least data.image_size={size}; see --mean.')
    image = image.astype(np.float32)
    if stats is not None:
        return stats._replace(mean_image=image)
    # No file says anything of colour components: without length they shift nothing.
    return Statistics(image, np.zeros(3, np.float32), np.eye(3, dtype=np.float32))


def _class_names(count: int, path: str | None, own: dict | None) -> list[str]:
    where = '--classes'
    if path:
        try:
            names = [line.strip() for line in pathlib.Path(path).read_text(encoding='utf-8-sig').strip().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'--classes={path!r} cannot be read: {error}.') from error
        where = f'--classes={path!r}'
    elif own is not None:
        where, names = "the file's metadata", list(own['class_names'])
    else:
        names = list(listing.imagenet_classes()) if count == 1000 else [str(i) for i in range(count)]
    if len(names) != count:
        raise UserError(f'{where}: expected {count} class names, one for each output, found {len(names)}.')
    return names


def write_safetensors(folder: str, loaded: checkpoint.Checkpoint) -> None:
    """Writes `FILE_NAME`, as PyTorch lays weights out, and the statistics beside it, into a folder."""
    import safetensors.numpy

    tensors = {}
    for layer in from_params(loaded.network, loaded.image_size, loaded.params):
        tensors[f'{layer.name}.weight'], tensors[f'{layer.name}.bias'] = layer.weight, layer.bias
    own = {'config': loaded.config, 'class_names': loaded.class_names, 'record_size': loaded.record_size}
    data = safetensors.numpy.save(tensors, metadata={'format': 'pt', weights.METADATA_KEY: json.dumps(own)})
    pathlib.Path(folder, FILE_NAME).write_bytes(data)
    statistics.save(folder, loaded.statistics)


def main() -> None:
    args = flags.FLAGS
    jax.config.update('jax_platforms', 'cpu')  # there is nothing to compute
    convert(args.input, args.output, to=args.to, mean=args.mean, config=args.config, classes=args.classes)


if __name__ == '__main__':
    flags.DEFINE_string('input', None, 'A .caffemodel, .pth or .safetensors file; for --to=safetensors a checkpoint.')
    flags.DEFINE_string('output', None, 'Directory to write; must not exist.')
    flags.DEFINE_string('to', 'checkpoint', 'checkpoint or safetensors.')
    flags.DEFINE_string('mean', None, 'Mean image: .binaryproto, or .npy of shape [3, S, S] or [3], 0 to 255.')
    flags.DEFINE_string('classes', None, 'Text file of class names, one a line, in the order of the outputs.')
    cli.define_config('config', None, 'The config whose network and preprocessing the weights are of.')
    cli.run(main, required=('input', 'output'))
