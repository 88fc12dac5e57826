"""Trains an image classifier from class folders: prepares the images, trains or fine-tunes, and evaluates."""

import copy
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from alexnet_jax.checkpoints.manager import FOLDER, Checkpoint, check_workdir, config_to_json
from alexnet_jax.convert.loading import load_checkpoint
from alexnet_jax.core import sharding
from alexnet_jax.core.augment import Augmentation, default_record_size
from alexnet_jax.core.config import MODEL_FIELDS, to_tuples
from alexnet_jax.data.datasets import Dataset
from alexnet_jax.experiments import figures, finetune_settings, linear_probe, output_folders, verdict
from alexnet_jax.inference.evaluate import Evaluator
from alexnet_jax.training import train
from alexnet_jax.training.check_config import network_and_augmentation
from alexnet_jax.utils import distributed
from alexnet_jax.utils.config_files import get_config
from alexnet_jax.utils.errors import UserError

DEFAULT_WEIGHTS = 'torchvision'
_SCRATCH = ('', 'none')  # values of `init_from` without trained weights
_MIN_UPDATES = 100  # no network learned from scratch in fewer updates


class FinetuneResult(NamedTuple):
    """The best checkpoint of a finished run and its confusion matrix on the val images."""

    workdir: str
    step: int  # of the best checkpoint
    class_names: tuple[str, ...]
    confusion: np.ndarray  # int [K, K], see `figures.confusion`
    crops: str  # 'ten views' or 'center crop'
    figure: str  # path of the plotted confusion matrix, or the reason why there is none
    verdict: list[str]  # lines: the error, whether guessing is as good, what to try next, each class


def finetune(
    config: ConfigDict | None,
    pictures: str | os.PathLike,
    output: str | os.PathLike,
    *,
    init_from: str | os.PathLike | None = None,
    val_fraction: float | None = None,
    max_unreadable: int = 0,
    mode: str = 'auto',
    overrides: Mapping[str, Any] | None = None,
    labels: str | os.PathLike | None = None,
    nested_classes: bool = False,
) -> FinetuneResult:
    """Trains a classifier on images in class folders. Resumes a stopped run.

    Settings that are not given follow from the number of images, see `finetune_settings`. A run with other settings
    than those in `output` gets a new folder beside them.

    Args:
      config: learning rates and length; without `init_from` also the network. None: they follow from the images.
      pictures: raw images, as for `prepare.prepare`.
      output: directory for data/, run/ and figures/.
      init_from: checkpoint to start from; 'none' or '' trains from scratch. None: `DEFAULT_WEIGHTS` without a config,
        'none' with one.
      val_fraction: fraction of the images used for validation if there is no val split; None: as the settings say.
      max_unreadable: allowed number of unreadable images in the preparation.
      mode: 'features' fits a new last layer to frozen features, 'full' trains all layers, 'auto' chooses.
      overrides: values of config keys, such as {'num_epochs': 10.0}; a given `config` already contains them.
      labels, nested_classes: see `discovery.find_images`.

    Raises UserError if the images or options are unsuitable, and the errors of `train.train_and_evaluate`.
    """
    pictures, output = os.fspath(pictures), os.fspath(output)
    if init_from is None:
        init_from = DEFAULT_WEIGHTS if config is None else 'none'
    init_from = '' if os.fspath(init_from) in _SCRATCH else os.fspath(init_from)
    overrides = dict(overrides or {})
    given = [*(['config'] if config is not None else []), *(f'config.{key}' for key in sorted(overrides))]
    _check_mode(mode, init_from, given)
    check_workdir(output)
    options = {'labels': labels, 'nested_classes': nested_classes}
    listed = output_folders.list_pictures(pictures, output, val_fraction, **options)
    source = _load_source(init_from) if init_from else None
    if listed.val_fraction is not None and val_fraction is None:
        _log([finetune_settings.Setting('val_fraction', listed.val_fraction, listed.reason)])
    follows = config is None
    if config is None:
        base = finetune_settings.network(listed.train)
        _log([] if source else [base])
        config = get_config('finetune' if source else base.value)
        config.update_from_flattened_dict(overrides)
    size = source.record_size if source else default_record_size(config.data.image_size)
    data, dataset = output_folders.prepare_pictures(pictures, output, listed, size, max_unreadable)
    num_train, num_val, classes = len(dataset.split('train')), len(dataset.split('val')), len(dataset.class_names)

    chosen = finetune_settings.mode(mode, num_train, trained=source is not None, given=given)
    _log([chosen])
    found: list[str] = []
    if chosen.value == 'features':
        assert source is not None  # checked by `_check_mode` and `finetune_settings.mode`
        workdir, found = _fit_last_layer(source, init_from, dataset, data, output, config.data.max_unreadable)
    else:
        if follows:
            settings = finetune_settings.schedule(num_train, trained=source is not None, given=overrides)
            _log(settings)
            config.update_from_flattened_dict({setting.key: setting.value for setting in settings})
        config = finetune_config(config, source, data, classes)
        config.init_from = init_from
        workdir = _train_all_layers(config, source, dataset, output, overrides, follows)

    best, matrix, crops = _evaluate(workdir, dataset, config.data.max_unreadable)
    steps = verdict.next_steps(
        mode=chosen.value, trained=source is not None, train=num_train, classes=classes, val=num_val
    )
    lines = [*found, *verdict.verdict(matrix, best.class_names, steps)]
    figure = _plot(matrix, best.class_names, output, os.path.basename(workdir))
    return FinetuneResult(workdir, best.step, best.class_names, matrix, crops, figure, lines)


def _evaluate(workdir: str, dataset: Dataset, max_unreadable: int) -> tuple[Checkpoint, np.ndarray, str]:
    """Returns the best checkpoint, its confusion matrix on the val images, and the crops that were averaged."""
    best = load_checkpoint(workdir)
    views, crops = (10, 'ten views') if best.augmentation.reflect else (1, 'center crop')  # five views are reflections
    evaluator = Evaluator(best, sharding.make_mesh(data=0, tower=1), views=views)
    outputs, labels = evaluator.probabilities(dataset.split('val'), max_unreadable=max_unreadable)
    return best, figures.confusion(labels, outputs.argmax(1), len(best.class_names)), crops


def _check_mode(mode: str, init_from: str, given: list[str]) -> None:
    if mode not in finetune_settings.MODES:
        raise UserError(f'--mode={mode}: expected one of {", ".join(finetune_settings.MODES)}.')
    if mode == 'features' and not init_from:
        raise UserError('--mode=features needs trained weights; use --init_from=CHECKPOINT or --mode=full.')
    if mode == 'features' and given:
        raise UserError(
            f'--mode=features has no --{given[0]}: only a last layer is fitted; remove it or use --mode=full.'
        )


def _load_source(init_from: str) -> Checkpoint:
    """Loads the weights to start from. Raises UserError if they cannot be had."""
    try:
        source = load_checkpoint(init_from)
    except UserError as error:
        default = f' finetune starts from {DEFAULT_WEIGHTS!r} by default.' if init_from == DEFAULT_WEIGHTS else ''
        raise UserError(f'{error}{default} To train from scratch, use --init_from=none.') from error
    logging.info(
        'starting from %s (%s classes); --init_from=none trains from scratch.', init_from, len(source.class_names)
    )
    return source


def _log(settings: list[finetune_settings.Setting]) -> None:
    for setting in settings:
        logging.info(str(setting))


def _fit_last_layer(
    source: Checkpoint, init_from: str, dataset: Dataset, data: str, output: str, max_unreadable: int
) -> tuple[str, list[str]]:
    """Fits the last layer to frozen features, unless that is done. Returns the workdir and a line on the fit."""
    linear_probe.check_network(source)
    config = copy.deepcopy(source.config)
    config['model']['num_classes'], config['data']['path'] = len(dataset.class_names), data
    config['init_from'], config['init_fresh'] = init_from, []
    workdir = output_folders.run_folder(output, config, 'features', source, dataset)
    if os.path.exists(os.path.join(workdir, FOLDER)):
        logging.info('%s is finished.', workdir)
        return workdir, []
    records = dataset.split('train')
    views = 10 if len(records) <= finetune_settings.TEN_VIEWS else 1
    features, labels = linear_probe.features(source, records, views, max_unreadable)
    classifier = linear_probe.fit(features, labels, len(dataset.class_names))
    linear_probe.save(workdir, source, classifier, dataset.class_names, config)
    error = verdict.error_with_interval(classifier.correct, len(labels))
    return workdir, [
        f'cross-validation on {len(labels)} training pictures ({classifier.folds} parts, L2 penalty '
        f'{classifier.l2:.2g}): top-1 error {error}'
    ]


def _train_all_layers(
    config: ConfigDict,
    source: Checkpoint | None,
    dataset: Dataset,
    output: str,
    overrides: Mapping[str, Any],
    follows: bool,
) -> str:
    """Trains, or resumes, and returns the workdir. follows: whether settings follow from the number of images."""
    network_and_augmentation(config)  # checks the config before training
    num_train = len(dataset.split('train'))
    updates = config.num_steps or math.ceil(config.num_epochs * num_train / config.batch_size)
    if not source and updates < _MIN_UPDATES:
        epochs = math.ceil(_MIN_UPDATES * config.batch_size / num_train)
        distributed.warn(
            f'{updates} updates are too few to learn from scratch; at least {_MIN_UPDATES} take '
            f'--config.num_epochs={epochs} with batches of {config.batch_size}.'
        )
    if not follows and 'num_epochs' in overrides and 'optim.stages' not in overrides and config.optim.stages:
        starts = ', '.join(f'{stage[0]:g}' for stage in config.optim.stages)
        distributed.warn(
            f'num_epochs={config.num_epochs:g}, but the rates still change at epochs {starts} of the config; set '
            '--config.optim.stages too.'
        )
    workdir = output_folders.run_folder(output, config_to_json(config), 'full', source, dataset)
    train.train_and_evaluate(config, workdir)
    return workdir


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


def _plot(matrix: np.ndarray, class_names: tuple[str, ...], output: str, run: str) -> str:
    """Plots the confusion matrix. Returns the path, or the reason why there is none."""
    name = 'confusion' + run.removeprefix('run')
    try:
        from alexnet_jax.experiments import plots  # matplotlib is an extra

        return plots.save(plots.confusion(matrix, class_names), os.path.join(output, 'figures'), name)[0]
    except UserError as error:
        return str(error)
