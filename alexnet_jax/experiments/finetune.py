"""Trains an image classifier from class folders: prepares the images, trains or fine-tunes, and evaluates."""

import math
import os
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from alexnet_jax.checkpoints.manager import Checkpoint, check_workdir
from alexnet_jax.convert.loading import load_checkpoint
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

_MIN_UPDATES = 100  # no network learned from scratch in fewer updates


class FinetuneResult(NamedTuple):
    """The best checkpoint of a finished run and its confusion matrix on the val images."""

    workdir: str
    step: int  # of the best checkpoint
    class_names: tuple[str, ...]
    confusion: np.ndarray  # int [K, K], see `figures.confusion`
    crops: str  # 'ten views' or 'center crop'
    figure: str  # path of the plotted confusion matrix, or the reason why there is none


def finetune(
    config: ConfigDict,
    pictures: str | os.PathLike,
    output: str | os.PathLike,
    *,
    init_from: str | os.PathLike,
    val_fraction: float,
    max_unreadable: int,
    labels: str | os.PathLike | None = None,
    nested_classes: bool = False,
) -> FinetuneResult:
    """Trains a classifier on images in class folders. Resumes a stopped run.

    Args:
      config: learning rates and length; without `init_from` also the network.
      pictures: raw images, as for `prepare.prepare`.
      output: directory for data/, run/ and figures/.
      init_from: checkpoint to start from; '' trains from scratch.
      val_fraction: fraction of the images used for validation if there is no val split.
      max_unreadable: allowed number of unreadable images in the preparation.
      labels, nested_classes: see `discovery.find_images`.

    Raises UserError if the images are unsuitable, and the errors of `train.train_and_evaluate`.
    """
    pictures, output, init_from = (os.fspath(path) for path in (pictures, output, init_from))
    check_workdir(output)
    source = load_checkpoint(init_from) if init_from else None
    size = source.record_size if source else default_record_size(config.data.image_size)
    data, workdir = (os.path.join(output, name) for name in ('data', 'run'))
    dataset = prepare_pictures(pictures, data, size, val_fraction, max_unreadable, labels, nested_classes)
    config = finetune_config(config, source, data, len(dataset.class_names))
    config.init_from = init_from
    network_and_augmentation(config)  # checks the config before training
    updates = config.num_steps or math.ceil(config.num_epochs * len(dataset.split('train')) / config.batch_size)
    if not source and updates < _MIN_UPDATES:
        distributed.warn(
            f'{updates} training steps are too few to learn from scratch: use more images, more epochs '
            f'(--config.num_epochs={config.num_epochs:g}) or smaller batches (--config.batch_size={config.batch_size}).'
        )
    train.train_and_evaluate(config, workdir)

    best = load_checkpoint(workdir)
    views, crops = (10, 'ten views') if config.data.reflect else (1, 'center crop')  # five views are reflections
    evaluator = Evaluator(best, sharding.make_mesh(data=0, tower=1), views=views)
    outputs, true_labels = evaluator.probabilities(dataset.split('val'), max_unreadable=config.data.max_unreadable)
    matrix = figures.confusion(true_labels, outputs.argmax(1), len(best.class_names))
    try:
        from alexnet_jax.experiments import plots  # matplotlib is an extra

        figure = plots.save(plots.confusion(matrix, best.class_names), os.path.join(output, 'figures'), 'confusion')[0]
    except UserError as error:
        figure = str(error)
    return FinetuneResult(workdir, best.step, best.class_names, matrix, crops, figure)


def finetune_config(config: ConfigDict, source: Checkpoint | None, path: str, classes: int) -> ConfigDict:
    """Returns a copy of a config for `classes` classes at `path`, to fine-tune a checkpoint or train from scratch.

    Network and preprocessing come from the checkpoint, if given. Then the learning rate of the classifier is ten times
    that of the other layers, unless `optim.layer_rates` is set.
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
    config.data.path = path
    config.model.num_classes = classes
    return config


def prepare_pictures(
    pictures: str,
    folder: str,
    size: int,
    val_fraction: float,
    max_unreadable: int,
    labels: str | os.PathLike | None = None,
    nested_classes: bool = False,
) -> Dataset:
    """Prepares the images into `folder` unless it exists, and returns the dataset.

    Raises UserError if `folder` holds other images or images of another size.
    """
    prepare.prepare_if_needed(
        pictures, folder, size=size, val_fraction=val_fraction, max_unreadable=max_unreadable, labels=labels,
        nested_classes=nested_classes,
    )  # fmt: skip
    dataset = open_dataset(folder)
    if dataset.record_size != size:
        raise UserError(
            f'{folder}: expected images of {size} px for this network, got {dataset.record_size} px; remove the '
            'directory or use another --output.'
        )
    return dataset
