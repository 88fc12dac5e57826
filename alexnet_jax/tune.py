"""Trains a classifier of your own pictures: from a folder of class folders to a network, its errors and confusions.

    python -m alexnet_jax.tune --input=PICTURES --output=DIR [--init_from=CHECKPOINT] [--config=configs/finetune.py]

PICTURES is what `alexnet_jax.prepare` takes: CLASS/*.jpg, or train/CLASS/*.jpg and val/CLASS/*.jpg; without val a
tenth is set aside. With --init_from a trained network is tuned: its table and preprocessing are taken over with all
layers but the classifier. DIR gets data/, run/ and figures/; started again the command goes on where it was.
"""

import math
import os

import jax
from absl import flags
from ml_collections import ConfigDict

from alexnet_jax import assemble, augment, cli, evaluate, figures, model, prepare, sharding, sources, train, writers
from alexnet_jax.checkpoint import Checkpoint, load_checkpoint
from alexnet_jax.errors import UserError

_FEW = 100  # updates in which no network was seen to learn from scratch


def tuned(config: ConfigDict, source: Checkpoint | None, path: str, classes: int) -> ConfigDict:
    """A copy of a config for the data at `path` with so many classes, to start from a checkpoint or afresh.

    From a checkpoint its network and preprocessing are taken over, and the new classifier learns ten times as fast as
    the rest; `optim.layer_rates` of one's own stay.
    """
    config = ConfigDict(config.to_dict())
    if source is not None:
        for section, fields in (('model', model.FIELDS), ('data', augment.Augmentation._fields)):
            theirs = source.config[section]
            config[section].update({key: model.tuples(theirs[key]) for key in fields if key in theirs})
        if not config.optim.layer_rates:
            config.optim.layer_rates = ((list(source.network.table())[-1], 10.0),)
    config.data.path, config.model.num_classes = path, classes
    return config


def prepared(pictures: str, folder: str, size: int, val_fraction: float, max_bad: int) -> sources.Dataset:
    """The pictures as training reads them, prepared into `folder` unless they lie there already.

    Raises:
      UserError: other pictures, or squares of another size, lie there.
    """
    prepare.once(pictures, folder, size=size, val_fraction=val_fraction, max_bad=max_bad)
    dataset = sources.open_dataset(folder)
    if dataset.record_size != size:
        raise UserError(
            f'{folder} was prepared at {dataset.record_size} px, this network takes {size}; remove it, or give another '
            '--output.'
        )
    if len(dataset.class_names) == 1:
        raise UserError(
            f'{pictures!r} has one class only, {dataset.class_names[0]!r}; give a folder of class folders (are they '
            f'one level further down?), and remove {folder}.'
        )
    return dataset


def main() -> None:
    args = flags.FLAGS
    if not 0 < args.val_fraction < 1:
        raise UserError(f'--val_fraction={args.val_fraction}; expected a number between 0 and 1.')
    cli.set_up_jax()
    source = load_checkpoint(args.init_from) if args.init_from else None
    size = source.record_size if source else augment.default_record_size(args.config.data.image_size)
    data, run = (os.path.join(args.output, name) for name in ('data', 'run'))
    dataset = prepared(args.input, data, size, args.val_fraction, args.max_bad)
    config = tuned(args.config, source, data, len(dataset.class_names))
    config.init_from = args.init_from
    assemble.network_of(config)  # its numbers are in their ranges
    steps = config.num_steps or math.ceil(config.num_epochs * len(dataset.split('train')) / config.batch_size)
    if not source and steps < _FEW:
        writers.warn(
            f'{steps} updates in all, too few to learn from scratch: give more pictures, more epochs '
            f'(--config.num_epochs={config.num_epochs:g}) or smaller batches (--config.batch_size={config.batch_size}).'
        )
    train.train_and_evaluate(config, run)

    best, val = load_checkpoint(run), dataset.split('val')
    mesh = sharding.make_mesh(data=len(jax.devices()), tower=1)
    views, crops = (10, 'ten views') if config.data.reflect else (1, 'centre crop')  # half of the ten are reflections
    outputs, labels = evaluate.probabilities(best, val, mesh, views=views, max_bad=config.data.max_bad)
    matrix = figures.confusion(labels, outputs.argmax(1), len(best.class_names))
    print(
        f'step {best.step}, the best of {run}: top-1 error {100 * (1 - matrix.trace() / matrix.sum()):.2f}% of '
        f'{matrix.sum()} val images, {crops}. Most confused:'
    )
    for true, taken, number, share in figures.most_confused(matrix, best.class_names):
        print(f'  {true} taken for {taken}: {number} ({100 * share:.0f}% of {true})')
    try:
        from alexnet_jax import drawing

        paths = drawing.save(
            drawing.confusion(matrix, best.class_names), os.path.join(args.output, 'figures'), 'confusion'
        )
        print(paths[0])
    except UserError as error:  # without matplotlib the numbers above have to do
        print(error)
    print(f'Now: python -m alexnet_jax.predict --checkpoint={run} PICTURE_OR_FOLDER')


if __name__ == '__main__':
    flags.DEFINE_string('input', None, 'Pictures in class folders, or what else alexnet_jax.prepare takes.')
    flags.DEFINE_string('output', None, 'Directory for data/, run/ and figures/.')
    cli.define_config('config', 'configs/finetune.py', 'Rates and length; from scratch the network, too.')
    flags.DEFINE_string('init_from', '', 'A checkpoint to begin with: a workdir, or what convert wrote.')
    flags.DEFINE_float('val_fraction', 0.1, 'Part of the pictures set aside where there is no val folder.')
    flags.DEFINE_integer('max_bad', 0, 'Unreadable pictures to leave out before giving up.')
    cli.define_cpu_devices()
    cli.run(main, required=('input', 'output', 'config'))
