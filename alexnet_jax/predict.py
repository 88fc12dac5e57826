"""Labels and probabilities for image files of any size.

    python -m alexnet_jax.predict --checkpoint=PATH IMAGE_OR_FOLDER... [--views=10] [--top=5] [--json]

Each image becomes the central square that `alexnet_jax.prepare` would have made of it (but no JPEG in between); of a
folder all images are taken, those in folders below too, in the order of their names.
"""

# No other room imports this one: once it is loaded as a module, its name hides the function `alexnet_jax.predict`.

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from absl import flags

from alexnet_jax import cli, evaluate, images, listing, processes
from alexnet_jax.checkpoint import Checkpoint, load_checkpoint
from alexnet_jax.errors import UserError

_BATCH = 32


def files_in(arguments: Sequence[str]) -> list[str]:
    """The image files that the arguments name, in their order.

    Raises:
      UserError: one of them is not there, or a folder has no images.
    """
    files = []
    for path in arguments:
        if os.path.isdir(path):
            found = list(images.below(path))
            if not found:
                raise UserError(f'there are no images in {path!r}.')
            files += found
        elif os.path.exists(path):
            files.append(path)
        else:
            raise UserError(f'there is no image or folder {path!r}.')
    return files


def best(checkpoint: Checkpoint, files: Sequence[str], *, views: int, top: int) -> Iterator[dict]:
    """For each file, in order: {'file', 'top': [{'label', 'index', 'probability'}]}, the most probable first.

    Raises:
      UserError: after the others, if there were files that are no images.
    """
    wrong = []
    checkpoint = checkpoint._replace(params=jax.device_put(checkpoint.params))  # once, not for each batch
    for start in range(0, len(files), _BATCH):
        batch, squares, paths = [], [], files[start : start + _BATCH]
        with ThreadPoolExecutor(processes.cores()) as pool:
            reading = [pool.submit(_square, path, checkpoint.record_size) for path in paths]
        for path, square in zip(paths, reading, strict=True):
            try:
                squares.append(square.result())
                batch.append(path)
            except UserError as error:
                wrong.append(str(error))
        if not batch:
            continue
        found = evaluate.predict(checkpoint, np.stack(squares), views=views, batch_size=_BATCH)
        for path, probabilities in zip(batch, found, strict=True):
            order = np.argsort(-probabilities, kind='stable')[:top]
            rows = [(checkpoint.class_names[i], int(i), float(probabilities[i])) for i in order]
            names = ('label', 'index', 'probability')
            yield {'file': path, 'top': [dict(zip(names, row, strict=True)) for row in rows]}
    if wrong:
        rest = f' (and {len(wrong) - 1} more of {len(files)} files)' if len(wrong) > 1 else ''
        raise UserError(f'{wrong[0]}{rest}.')


def _square(path: str, size: int) -> np.ndarray:
    try:
        return images.square(images.read(path), size)
    except (OSError, ValueError) as error:
        raise UserError(f'{path!r} cannot be read as an image ({error})') from error


def main(arguments: Sequence[str]) -> None:
    args = flags.FLAGS
    cli.set_up_jax()
    files = files_in(arguments)
    checkpoint = load_checkpoint(args.checkpoint)
    if args['top'].using_default_value:
        args.top = min(args.top, len(checkpoint.class_names))
    if not 1 <= args.top <= len(checkpoint.class_names):
        raise UserError(f'--top={args.top}; expected 1 to {len(checkpoint.class_names)}, the number of classes.')
    for line in best(checkpoint, files, views=args.views, top=args.top):
        if args.json:
            print(json.dumps(line), flush=True)
            continue
        print(listing.text(line['file']))
        for row in line['top']:
            print(f'  {100 * row["probability"]:6.2f}%  {row["label"]} ({row["index"]})', flush=True)


if __name__ == '__main__':
    flags.DEFINE_string('checkpoint', None, "A workdir (its best step, else its latest) or one step's folder.")
    cli.define_views()
    flags.DEFINE_integer('top', 5, 'Labels an image; all, where there are fewer classes.')
    flags.DEFINE_boolean('json', False, 'Print one JSON object for each file.')
    cli.define_cpu_devices()
    cli.run(main, required=('checkpoint',), arguments='one IMAGE_OR_FOLDER or more')
