"""Predicts labels and probabilities for image files of any size.

    alexnet_jax predict [--checkpoint=PATH] IMAGE_OR_FOLDER... [--views=10] [--top=5] [--lines | --json]

Without --checkpoint, torchvision's published weights are used; they are fetched once (233 MiB).
Each image is cropped to its central square and resized as `alexnet_jax prepare` does, but not re-encoded as JPEG.
Folders are searched recursively. Their images are sorted by name.
"""

import json
from collections.abc import Sequence

from absl import flags, logging

from alexnet_jax.commands.flag import CHECKPOINT, CPU_DEVICES, VIEWS, Flag
from alexnet_jax.data.imagenet_classes import with_meaning
from alexnet_jax.utils.errors import UserError
from alexnet_jax.utils.files import as_utf8

FLAGS = (
    CHECKPOINT._replace(help=f"{CHECKPOINT.help} Default: torchvision's published weights.", required=False),
    VIEWS,
    Flag('top', 5, 'Number of labels per image; the default is limited to the number of classes.'),
    Flag('lines', False, 'Print one line per file: its name, the best label and its probability.'),
    Flag('json', False, 'Print one JSON object per file.'),
    CPU_DEVICES,
)
ARGUMENTS = 'one IMAGE_OR_FOLDER or more'


def main(args: flags.FlagValues, paths: Sequence[str]) -> None:
    from alexnet_jax.convert import loading, published
    from alexnet_jax.inference import predict
    from alexnet_jax.utils import logs

    logs.configure(to_stdout=False)  # stdout is one line or one JSON object per file
    files = predict.list_image_files(paths)
    if args.checkpoint:
        checkpoint = loading.load_checkpoint(args.checkpoint)
    else:
        top1, top5 = published.PUBLISHED[published.DEFAULT].errors
        name = f'published weights {published.DEFAULT!r} (published errors: {top1}% top-1, {top5}% top-5)'
        logging.info('No --checkpoint: using the %s.', name)
        checkpoint = loading.load_published(published.DEFAULT)
    classes = len(checkpoint.class_names)
    top = min(args.top, classes) if args['top'].using_default_value else args.top
    if not 1 <= top <= classes:
        raise UserError(f'--top={top}: expected 1 to {classes}, the number of classes.')
    for line in predict.predict_files(checkpoint, files, views=args.views, top=top):
        if args.json:
            print(json.dumps(line), flush=True)
            continue
        named = [f'{logs.one_line(with_meaning(row["label"]))} ({row["index"]})' for row in line['top']]
        rows = [f'{100 * row["probability"]:6.2f}%  {name}' for name, row in zip(named, line['top'], strict=True)]
        text = f': {rows[0].strip()}' if args.lines else ''.join(f'\n  {row}' for row in rows)
        print(logs.one_line(as_utf8(line['file'])) + text, flush=True)
