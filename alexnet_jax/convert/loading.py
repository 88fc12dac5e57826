"""Loads a network by the path of a checkpoint or of an exported folder, by a published name, or from the Hub."""

import hashlib
import json
import os
import re

from absl import logging

from alexnet_jax.checkpoints import loading, manager
from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.convert import convert, published, safetensors
from alexnet_jax.data import image_stats_file
from alexnet_jax.utils.config_files import get_config
from alexnet_jax.utils.errors import UserError, did_you_mean, first_line
from alexnet_jax.utils.files import as_path

_CONVERSION = 1  # increase it when published weights would be converted to other parameters or names
_HUB = 'hf:'


def load_checkpoint(source: str | os.PathLike) -> Checkpoint:
    """Loads a network for evaluation, prediction or fine-tuning.

    Args:
      source: one of these:

        - the folder of a step, or a workdir or its `checkpoints` folder (loads the best step, else the latest);
        - a folder written by `alexnet_jax export` or `alexnet_jax convert --to=safetensors`;
        - the name of published weights (`published.PUBLISHED`), such as 'torchvision', which are fetched and converted
          once. A checkpoint in a folder of that name is preferred, which is logged;
        - 'hf:USER/REPO' or 'hf:USER/REPO@REVISION': such an exported folder on the Hugging Face Hub.

    Returns:
      A `Checkpoint`: the network, its parameters (numpy), class names, image statistics and config.

    Raises:
      UserError: there is no checkpoint, or it cannot be fetched or read.
    """
    source = as_path(source)
    if source.startswith(_HUB):
        return _load_exported(_fetch_from_hub(source))
    saved = os.path.isdir(os.path.join(source, manager.FOLDER))
    exported = not saved and os.path.isfile(os.path.join(source, safetensors.FILE_NAME))
    if source in published.PUBLISHED:
        if not saved and not exported:
            return load_published(source)
        logging.info('Using the folder %s here, not the published weights of that name.', source)
    if exported:
        return _load_exported(source)
    if os.sep not in source and not os.path.exists(source):
        hint = did_you_mean(source, published.PUBLISHED)
        raise UserError(f'there is no checkpoint at {source!r}, and no published weights have this name.{hint}')
    return loading.load_saved(source)


def load_published(name: str) -> Checkpoint:
    """Loads published weights by name. Fetches and converts them on first use. Raises UserError."""
    path, entry = converted_path(name), published.PUBLISHED[name]
    if not os.path.isdir(path):
        with published.lock_cache():
            if not os.path.isdir(path):  # else another process has just converted them
                mean = None if entry.mean is None else published.fetch(entry.mean)
                weights = published.fetch(entry.weights)
                convert.save(convert.read(weights, mean=mean, config=get_config(entry.config, packaged=True)), path)
                logging.info('The converted weights are in %s.', path)
    try:
        return loading.load_saved(path)
    except UserError as error:
        raise UserError(f'{error} Remove {path!r} to convert {name} again.') from error


def converted_path(name: str) -> str:
    """Returns the folder of converted published weights. It may not exist.

    Its name depends on everything that determines the checkpoint: the digests of the files, the config and the format.
    """
    entry = published.PUBLISHED[name]
    config = manager.config_to_json(get_config(entry.config, packaged=True))
    digests = [file.digest for file in (entry.weights, entry.mean) if file]
    contents = [_CONVERSION, manager.FORMAT, digests, config['model'], config['data']]
    key = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    return os.path.join(published.cache(), f'{name}-{key[:12]}')


def _load_exported(folder: str) -> Checkpoint:
    """Loads the folder that `export` or `convert --to=safetensors` writes."""
    path = os.path.join(folder, safetensors.FILE_NAME)
    metadata = safetensors.read_metadata(path)
    if metadata is None:
        raise UserError(f'{path!r} was not written by alexnet_jax; use alexnet_jax convert --input={path}.')
    checkpoint, settings = convert.read(path), os.path.join(folder, 'config.json')
    if os.path.isfile(settings):
        try:
            with open(settings, encoding='utf-8') as file:
                own = json.load(file)['alexnet_jax']
            step, config = int(own['step']), own['config']
        except (OSError, ArithmeticError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f'{settings!r} is not as alexnet_jax export wrote it ({first_line(error)}).') from error
        if config != metadata['config']:
            raise UserError(f'{settings!r} and {path!r} state different configs; export the network again.')
        checkpoint = checkpoint._replace(step=step)
    return checkpoint


def _fetch_from_hub(source: str) -> str:
    """Downloads an exported folder from the Hugging Face Hub, or finds it in the Hub's cache. Returns its path."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"{source}: needs huggingface_hub; pip install 'alexnet_jax[hub]'.") from error
    repository, _, revision = source.removeprefix(_HUB).partition('@')
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', repository):
        raise UserError(f'{source}: expected hf:USER/REPO or hf:USER/REPO@REVISION.')
    files = [safetensors.FILE_NAME, 'config.json', image_stats_file.FILE_NAME]
    try:
        folder = huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=files)
    except Exception as error:  # of many types, also from the libraries below
        remedy = 'check the name and the connection, or download its files by hand and give their folder'
        raise UserError(f'{source} cannot be fetched ({first_line(error)}); {remedy}.') from error
    if not os.path.isfile(os.path.join(folder, safetensors.FILE_NAME)):
        raise UserError(f'{source} has no {safetensors.FILE_NAME}, which alexnet_jax export writes.')
    return folder
