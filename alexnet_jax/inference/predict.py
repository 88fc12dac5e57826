"""Predicts class probabilities for images in memory and for image files."""

import os
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import logging
from jax.sharding import Mesh
from PIL import Image

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.data import image_files, image_io
from alexnet_jax.inference.evaluate import Evaluator, check_images
from alexnet_jax.prepare import class_lists, split_folders
from alexnet_jax.utils import processes
from alexnet_jax.utils.errors import UserError, first_line, listed
from alexnet_jax.utils.files import as_utf8

Images = str | os.PathLike | Image.Image | np.ndarray | Sequence[str | os.PathLike | Image.Image | np.ndarray]
_BATCH = 32
_MAX_NAMED = 1000  # unreadable images that an error names


def predict(
    checkpoint: Checkpoint, images: Images, *, views: int = 1, batch_size: int = 128, mesh: Mesh | None = None
) -> np.ndarray:
    """Returns class probabilities for images of any size.

    Args:
      checkpoint: from `alexnet_jax.load_checkpoint`.
      images: one image or several. An image is a path, a PIL image, or an array uint8 [H, W, 3] (RGB). Several images
        are a list of these, or an array uint8 [N, H, W, 3]. Arrays may also be gray (1 channel), gray and alpha (2) or
        RGBA (4), and uint16. Each image is cropped to its central square and resized to `checkpoint.record_size`, as
        for training: transparent parts become white, and the EXIF rotation of paths and PIL images is applied.
      views: 1 uses the center crop; 10 averages over the paper's ten views (section 4.1).
      batch_size: images per batch; it does not change the results.
      mesh: from `sharding.make_mesh`; None uses one device.

    Returns:
      float32 [N, K], or [K] for a single image. Column i is the probability of `checkpoint.class_names[i]`.

    Raises:
      UserError: images cannot be read or have the wrong type or shape, or views is neither 1 nor 10. All images are
        tried, and the message names each one that failed, with the reason.
    """
    outputs = Evaluator(checkpoint, mesh, views=views, batch_size=batch_size).predict(to_records(checkpoint, images))
    return outputs[0] if _is_single(images) else outputs


def to_records(checkpoint: Checkpoint, images: Images) -> np.ndarray:
    """Converts images, given as for `predict`, to uint8 [N, S, S, 3] with S = `checkpoint.record_size`.

    Raises UserError if images cannot be read, and names all of them.
    """
    size = checkpoint.record_size
    if isinstance(images, np.ndarray) and images.shape[1:] == (size, size, 3) and images.dtype != np.uint16:
        return check_images(checkpoint, images)
    try:
        images_list: list[Any] = [images] if _is_single(images) else list(images)  # type: ignore[arg-type]
    except TypeError as error:
        found = type(images).__name__
        raise UserError(f'images are {found}: expected a path, a PIL image, an array or a list of these.') from error
    records, errors = [], []
    for image in images_list:
        try:
            records.append(_to_record(image, size))
        except UserError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(images_list) == 1 else unreadable(list(map(str, errors)), len(images_list))
    return np.stack(records) if records else np.zeros((0, size, size, 3), np.uint8)


def unreadable(
    reasons: Sequence[str],
    total: int,
    *,
    outcome: str = '',
    remedy: str = 'convert or remove them',
    max_named: int = _MAX_NAMED,
) -> UserError:
    """Returns an error that counts unreadable images among `total` and gives the first `max_named` reasons.

    reasons: one per unreadable image, with its name. outcome: a clause on what happened to the images.
    """
    more = f' and {len(reasons) - max_named} more' if len(reasons) > max_named else ''
    named = ', '.join(reasons[:max_named]) + more
    return UserError(f'{len(reasons)} of {total} images cannot be read{outcome}: {named}; {remedy}.')


def _is_single(images: Images) -> bool:
    return isinstance(images, str | os.PathLike | Image.Image) or getattr(images, 'ndim', 0) == 3


def _to_record(image: Image.Image | np.ndarray | str | os.PathLike, size: int) -> np.ndarray:
    if isinstance(image, str | os.PathLike):
        return _read_square(os.fspath(image), size)
    notes: list[str] = []
    name = f'an image is a PIL image of mode {image.mode}' if isinstance(image, Image.Image) else ''
    try:
        if not name:
            image = np.asarray(image)
            name = f'an image is {image.dtype} of shape {image.shape}'
        record = image_io.resize_center_crop(image, size, notes)
    except Exception as error:  # NumPy and other libraries raise different types for what is no array
        name = name or f'an image is {type(image).__name__}'
        raise UserError(f'{name}: expected uint8 of shape (H, W, 3) ({first_line(error)}).') from error
    for note in notes:
        logging.warning('%s, %s', name, note)
    return record


def top_k(probabilities_NK, k: int) -> np.ndarray:
    """Returns the indices of the k most probable classes, int [N, k], in descending order. Ties: lower index first.

    >>> top_k([[0.1, 0.7, 0.2]], 2)
    array([[1, 2]])
    """
    return np.argsort(-np.asarray(probabilities_NK), axis=-1, kind='stable')[:, :k]


def list_image_files(paths: Sequence[str | os.PathLike]) -> list[str]:
    """Returns the image files at the given paths; those of a folder are sorted by name.

    Folders are searched recursively. Raises UserError for a path that does not exist or contains no images.
    """
    files: list[str] = []
    for path in [os.fspath(path) for path in paths]:
        if not os.path.exists(path):
            raise UserError(f'{path!r} does not exist; give an image file or a folder.')
        counts = image_files.FileCounts()
        found = list(image_files.iter_image_files(path, counts)) if os.path.isdir(path) else [path]
        counts.log(path)
        if not found:
            raise UserError(f'{path!r} contains no images.')
        files += found
    return files


def class_folders(paths: Sequence[str | os.PathLike], files: Sequence[str]) -> tuple[list[int], tuple[str, ...]] | None:
    """Returns the labels and class names of the image files at `paths`, if these are one folder of class folders.

    The class of an image is the folder inside of `paths[0]` that holds it, as in `alexnet_jax prepare`. Returns None if
    there are several paths, images outside such folders, fewer than two of them, or folders that are named like splits.
    Logs what the classes are.

    files: result of `list_image_files(paths)`.
    """
    root = os.fspath(paths[0])
    relative = [image_files.relative_to(root, file).split(os.sep) for file in files]
    if len(paths) > 1 or any(len(parts) < 2 for parts in relative):
        return None
    folders = [unicodedata.normalize('NFC', as_utf8(parts[0])) for parts in relative]
    classes = set(folders)
    if len(classes) < 2:
        return None
    if all(map(split_folders.split_name, classes)):
        logging.info('%s holds splits (%s): no labels; give the folder of one split.', root, listed(sorted(classes), 5))
        return None
    class_names = class_lists.in_label_order(classes)
    logging.info('labels are the %d folders in %s: %s', len(classes), root, listed(class_names, 5))
    labels = {name: label for label, name in enumerate(class_names)}
    return [labels[folder] for folder in folders], class_names


def predict_files(
    checkpoint: Checkpoint, files: Sequence[str | os.PathLike], *, views: int, top: int
) -> Iterator[dict]:
    """Yields {'file', 'top': [{'label', 'index', 'probability'}, ...]} for each file, most probable class first.

    Warns of each file that cannot be read as an image, and raises UserError at the end if there were any.
    """
    num_unreadable = 0
    evaluator = Evaluator(checkpoint, views=views, batch_size=_BATCH)
    for start in range(0, len(files), _BATCH):
        readable, records, paths = [], [], [os.fspath(file) for file in files[start : start + _BATCH]]
        with ThreadPoolExecutor(processes.cores()) as pool:
            futures = [pool.submit(_read_square, path, checkpoint.record_size) for path in paths]
        for path, future in zip(paths, futures, strict=True):
            try:
                records.append(future.result())
                readable.append(path)
            except UserError as error:
                logging.warning('%s', error)
                num_unreadable += 1
        if not readable:
            continue
        outputs = evaluator.predict(np.stack(records))
        for path, probabilities, order in zip(readable, outputs, top_k(outputs, top), strict=True):
            best = [(checkpoint.class_names[i], int(i), float(probabilities[i])) for i in order]
            yield {'file': path, 'top': [{'label': name, 'index': i, 'probability': p} for name, i, p in best]}
    if num_unreadable:
        raise UserError(
            f'{num_unreadable} of {len(files)} files cannot be read as images (named above); repair or leave them out.'
        )


def _read_square(path: str, size: int) -> np.ndarray:
    if os.path.isdir(path):
        raise UserError(f'{path!r} is a folder; give its files, predict.list_image_files([{path!r}])')
    notes: list[str] = []
    try:
        record = image_io.resize_center_crop(image_io.read_bytes(path), size, notes)
    except (OSError, ValueError) as error:
        raise UserError(f'{path!r} cannot be read as an image ({error})') from error
    for note in notes:
        logging.warning('%r has %s', path, note)
    return record
