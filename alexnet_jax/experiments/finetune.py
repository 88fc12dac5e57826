"""From pictures in class folders to a network: prepares them, trains or tunes, and counts what is confused."""

import math
import os
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from alexnet_jax.checkpoints.loading import load_checkpoint
from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.core import sharding
from alexnet_jax.core.augment import Augmentation, default_record_size
from alexnet_jax.core.config import MODEL_FIELDS, to_tuples
from alexnet_jax.data.datasets import Dataset, open_dataset
from alexnet_jax.experiments import figures
from alexnet_jax.inference.evaluate import Evaluator
from alexnet_jax.prepare import prepare
from alexnet_jax.training import train
from alexnet_jax.training.check_config import network_and_augmentation
from alexnet_jax.utils import distributed
from alexnet_jax.utils.errors import UserError

_MIN_UPDATES = 100  # in fewer no network was seen to learn from scratch


class FinetuneResult(NamedTuple):
    """A finished run, and its best checkpoint on the val images."""

    workdir: str
    step: int  # of the best checkpoint
    class_names: tuple[str, ...]
    confusion: np.ndarray  # int [K, K], see `figures.confusion`
    crops: str  # 'ten views' or 'center crop'
    figure: str  # path of the drawn confusion matrix, or why there is none


def finetune(
    config: ConfigDict,
    pictures: str | os.PathLike,
    output: str | os.PathLike,
    *,
    init_from: str | os.PathLike,
    val_fraction: float,
    max_unreadable: int,
) -> FinetuneResult:
    """Trains a classifier of pictures in class folders, or goes on where it was stopped.

    Args:
      config: rates and length; without `init_from` the network, too.
      pictures: as for `prepare.prepare`.
      output: gets data/, run/ and figures/.
      init_from: a checkpoint to begin with; '': from scratch.
      val_fraction: part of the pictures set aside where there is no val split.
      max_unreadable: pictures to leave out before giving up.

    Raises:
      UserError: the pictures do not suit; or see `train.train_and_evaluate`.
    """
    pictures, output, init_from = (os.fspath(path) for path in (pictures, output, init_from))
    source = load_checkpoint(init_from) if init_from else None
    size = source.record_size if source else default_record_size(config.data.image_size)
    data, workdir = (os.path.join(output, name) for name in ('data', 'run'))
    dataset = prepare_pictures(pictures, data, size, val_fraction, max_unreadable)
    config = finetune_config(config, source, data, len(dataset.class_names))
    config.init_from = init_from
    network_and_augmentation(config)  # its numbers are in their ranges
    updates = config.num_steps or math.ceil(config.num_epochs * len(dataset.split('train')) / config.batch_size)
    if not source and updates < _MIN_UPDATES:
        distributed.warn(
            f'{updates} updates in all, too few to learn from scratch: give more pictures, more epochs '
            f'(--config.num_epochs={config.num_epochs:g}) or smaller batches (--config.batch_size={config.batch_size}).'
        )
    train.train_and_evaluate(config, workdir)

    best = load_checkpoint(workdir)
    views, crops = (10, 'ten views') if config.data.reflect else (1, 'center crop')  # half of the ten are reflections
    evaluator = Evaluator(best, sharding.make_mesh(data=0, tower=1), views=views)
    outputs, labels = evaluator.probabilities(dataset.split('val'), max_unreadable=config.data.max_unreadable)
    matrix = figures.confusion(labels, outputs.argmax(1), len(best.class_names))
    try:
        from alexnet_jax.experiments import plots  # matplotlib is an extra

        figure = plots.save(plots.confusion(matrix, best.class_names), os.path.join(output, 'figures'), 'confusion')[0]
    except UserError as error:
        figure = str(error)
    return FinetuneResult(workdir, best.step, best.class_names, matrix, crops, figure)


def finetune_config(config: ConfigDict, source: Checkpoint | None, path: str, classes: int) -> ConfigDict:
    """A copy of a config for the data at `path` with so many classes, to start from a checkpoint or afresh.

    From a checkpoint its network and preprocessing are taken over, and the new classifier learns ten times as fast as
    the rest; `optim.layer_rates` of one's own stay.
    """
    config = ConfigDict(config.to_dict())
    if source is not None:
        for section, fields in (('model', MODEL_FIELDS), ('data', Augmentation._fields)):
            theirs = source.config[section]
            for key in fields:
                if key in theirs:
                    config[section][key] = to_tuples(theirs[key])
        if not config.optim.layer_rates:
            config.optim.layer_rates = ((list(source.network.layers)[-1], 10.0),)
    config.data.path, config.model.num_classes = path, classes
    return config


def prepare_pictures(pictures: str, folder: str, size: int, val_fraction: float, max_unreadable: int) -> Dataset:
    """The pictures as training reads them, prepared into `folder` unless they lie there already.

    Raises:
      UserError: other pictures, or squares of another size, lie there.
    """
    prepare.prepare_if_needed(pictures, folder, size=size, val_fraction=val_fraction, max_unreadable=max_unreadable)
    dataset = open_dataset(folder)
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
