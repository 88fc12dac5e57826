"""The folders in the output of `finetune`: data/ and run/, and data-2/, run-2/, ... for other settings."""

import hashlib
import itertools
import json
import os
from typing import Any, NamedTuple

from absl import logging

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.data.datasets import Dataset, open_dataset
from alexnet_jax.experiments import finetune_settings
from alexnet_jax.prepare import discovery, prepare
from alexnet_jax.prepare.image_ref import Listing
from alexnet_jax.training.restore import config_differences
from alexnet_jax.utils.errors import UserError, as_user_error
from alexnet_jax.utils.files import atomic_file, open_regular


class Pictures(NamedTuple):
    """The images to train on, before they are prepared."""

    listing: Listing | None  # None: they are gone, but were prepared before
    train: int  # number of training images
    val_fraction: float | None  # to set aside for validation; None: there is a val split, or the images are gone
    reason: str = ''  # for `val_fraction`, if it was not given


def list_pictures(pictures: str, output: str, val_fraction: float | None, **options: Any) -> Pictures:
    """Lists the images. val_fraction: None follows from their number. options: of `discovery.find_images`."""
    data = os.path.join(output, 'data')
    if not os.path.exists(pictures) and not pictures.startswith('tfds:') and os.path.isdir(data):
        logging.warning('%s is gone; the images in %s are used.', pictures, data)
        return Pictures(None, len(open_dataset(data).split('train')), val_fraction)
    listing = discovery.find_images(pictures, **options)
    train = len(listing.splits.get('train', ()))
    if 'val' in listing.splits or not train:
        return Pictures(listing, train, None)
    chosen = finetune_settings.val_fraction(train)
    fraction = chosen.value if val_fraction is None else val_fraction
    return Pictures(listing, train - round(fraction * train), fraction, chosen.reason)


def prepare_pictures(
    pictures: str, output: str, listed: Pictures, size: int, max_unreadable: int
) -> tuple[str, Dataset]:
    """Prepares the images below `output`, unless they are, and returns (folder, dataset).

    size: side of the prepared images, pixels. Raises UserError if `output` was made from another source.
    """
    source = pictures if pictures.startswith('tfds:') else os.path.abspath(pictures)
    description: dict[str, Any] = {'source': source, 'record_size': size}
    if listed.listing is not None:
        description['images'] = _digest(listed.listing)
    if listed.listing is not None or listed.val_fraction is not None:
        description['val_fraction'] = listed.val_fraction
    first = _read_description(os.path.join(output, 'data'))
    if first and first.get('source') != source:
        raise UserError(
            f'{output} was made from {first.get("source")}, not from {source}; use the same --input or another '
            '--output.'
        )
    folder = _choose(output, 'data', description)
    if listed.listing is not None:
        fraction, options = listed.val_fraction or 0.0, {'max_unreadable': max_unreadable}
        prepare.prepare_if_needed(pictures, folder, size=size, val_fraction=fraction, listing=listed.listing, **options)
    elif not os.path.isdir(folder):
        raise UserError(f'{pictures} does not exist, and {output} has no images of {size} px with these options.')
    return folder, open_dataset(folder)


def run_folder(output: str, config: dict, mode: str, source: Checkpoint | None, dataset: Dataset) -> str:
    """Returns the workdir of a run with these settings: a new one, or that of the run to resume. Raises UserError."""
    weights = 'none' if source is None else f'step {source.step} of {config["init_from"]}'
    folder = _choose(output, 'run', {**config, 'mode': mode, 'weights': weights, 'images': dataset.fingerprint})
    if mode == 'features' and os.path.exists(folder) and not _read_description(folder):
        raise UserError(f'the settings of {folder} are unknown: {folder}.json is missing; use another --output.')
    return folder


def _choose(output: str, name: str, description: dict[str, Any]) -> str:
    """Returns the first of the folders NAME, NAME-2, ... that does not exist or has this description.

    The description of a folder is in FOLDER.json beside it; for a new folder it is written here. Keys that may change
    when a run is resumed are not compared. A folder without a description is taken: `prepare` and `train` check it.
    """
    description = json.loads(json.dumps(description))  # tuples become lists
    for number in itertools.count(1):
        folder = os.path.join(output, name if number == 1 else f'{name}-{number}')
        if not os.path.exists(folder):
            break
        old = _read_description(folder)
        changes = old and config_differences({key: old.get(key) for key in description}, description)
        if not changes:
            return folder
        if name == 'run':  # a run's images are a digest
            changes = ['other images' if change.startswith('images: ') else change for change in changes]
        logging.info('%s has other settings (%s) and is kept.', folder, '; '.join(changes))
    with as_user_error(f'{output!r} cannot be written'):
        os.makedirs(output, exist_ok=True)
        with atomic_file(f'{folder}.json') as file:
            json.dump(description, file, indent=1)
    return folder


def _read_description(folder: str) -> dict[str, Any]:
    """Returns the description of a folder; {} if there is none. Raises UserError if it cannot be read."""
    path = f'{folder}.json'
    if not os.path.exists(folder) or not os.path.exists(path):
        return {}
    try:
        with open_regular(path, encoding='utf-8') as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f'{path!r} cannot be read ({error}); use another --output.') from error


def _digest(listing: Listing) -> str:
    """Returns the number of images and a hash of their names, classes and sizes."""
    digest, count = hashlib.sha256(), 0
    for split, refs in listing.splits.items():
        for ref in refs:
            name = listing.class_names[ref.label]  # -1 for the records of TFDS: the same name for all
            size = os.path.getsize(ref.path) if ref.length < 0 and os.path.exists(ref.path) else ref.length
            digest.update(f'{split}\0{ref.name}\0{name}\0{size}\n'.encode())
            count += 1
    return f'{count} images, {digest.hexdigest()[:12]}'
