"""Labels and probabilities for images in memory, and for image files of any size."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jax.sharding import Mesh

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.data import image_io
from alexnet_jax.inference.evaluate import Evaluator
from alexnet_jax.utils import processes
from alexnet_jax.utils.errors import UserError

_BATCH = 32


def predict(
    checkpoint: Checkpoint, image_NHWC, *, views: int = 1, batch_size: int = 128, mesh: Mesh | None = None
) -> np.ndarray:
    """Softmax outputs, float32 [N, K], of the center crop or averaged over the paper's ten views (section 4.1).

    See `Evaluator.predict` for the images, the columns and what is refused; `Evaluator` for the options.
    """
    return Evaluator(checkpoint, mesh, views=views, batch_size=batch_size).predict(image_NHWC)


def top_k(probabilities_NK, k: int) -> np.ndarray:
    """Indices of the k most probable classes, int [N, k], the most probable first; of equal ones the lower index."""
    return np.argsort(-np.asarray(probabilities_NK), axis=-1, kind='stable')[:, :k]


def list_image_files(paths: Sequence[str]) -> list[str]:
    """The image files at some paths, of a folder all below it, by name. Raises UserError for a path without any."""
    files = []
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f'there is no image or folder {path!r}.')
        found = list(image_io.iter_image_files(path)) if os.path.isdir(path) else [path]
        if not found:
            raise UserError(f'there are no images in {path!r}.')
        files += found
    return files


def predict_files(checkpoint: Checkpoint, files: Sequence[str], *, views: int, top: int) -> Iterator[dict]:
    """For each file, in order: {'file', 'top': [{'label', 'index', 'probability'}]}, the most probable first.

    Raises UserError after the others, if there were files that are no images.
    """
    problems = []
    evaluator = Evaluator(checkpoint, views=views, batch_size=_BATCH)
    for start in range(0, len(files), _BATCH):
        readable, squares, paths = [], [], files[start : start + _BATCH]
        with ThreadPoolExecutor(processes.cores()) as pool:
            reading = [pool.submit(_read_square, path, checkpoint.record_size) for path in paths]
        for path, square in zip(paths, reading, strict=True):
            try:
                squares.append(square.result())
                readable.append(path)
            except UserError as error:
                problems.append(str(error))
        if not readable:
            continue
        outputs = evaluator.predict(np.stack(squares))
        for path, probabilities, order in zip(readable, outputs, top_k(outputs, top), strict=True):
            best = [(checkpoint.class_names[i], int(i), float(probabilities[i])) for i in order]
            yield {'file': path, 'top': [{'label': name, 'index': i, 'probability': p} for name, i, p in best]}
    if problems:
        rest = f' (and {len(problems) - 1} more of {len(files)} files)' if len(problems) > 1 else ''
        raise UserError(f'{problems[0]}{rest}.')


def _read_square(path: str, size: int) -> np.ndarray:
    try:
        return image_io.resize_center_crop(image_io.read_bytes(path), size)
    except (OSError, ValueError) as error:
        raise UserError(f'{path!r} cannot be read as an image ({error})') from error
