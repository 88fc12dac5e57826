"""Draws the paper's figures from a run or a checkpoint, as PNG and SVG.

    alexnet_jax figures --run=WORKDIR --output=DIR [--data=DIR] [--split=val] [--seed=0]
    alexnet_jax figures --checkpoint=PATH --output=DIR [--data=DIR]

Draws the network (figure 2) and the kernels of its first layer (figure 3). With --run, also draws the training curves
(as figure 1) and the norms of gradients and updates of each layer. With --data, also draws predictions and nearest
training images (figure 4), the confusion matrix, and pictures of what the network has learned (docs/inside.md). The
classes of the data may be some of the network's, in any order: they are matched as `alexnet_jax evaluate` does.
"""

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags

from alexnet_jax.commands.flag import CPU_DEVICES, Flag
from alexnet_jax.utils.errors import UserError, did_you_mean

FLAGS = (
    Flag('run', None, 'A workdir: draw its training curves and its best step, else its latest step.'),
    Flag('checkpoint', None, 'A checkpoint, instead of --run; without training curves.'),
    Flag('data', None, "A prepared directory, or 'digits', for the figures that show images."),
    Flag('output', None, 'Directory for the figures; created if missing.', required=True),
    Flag('beside', '', 'A published run on ImageNet, drawn beside the training curves: caffenet or nvcaffe.'),
    Flag('split', 'val', 'Split whose images are shown.'),
    Flag('seed', 0, 'Random seed for the choice of the images shown.', at_least=0),
    CPU_DEVICES,
)


def main(args: flags.FlagValues) -> None:
    from alexnet_jax.convert.loading import load_checkpoint
    from alexnet_jax.data import datasets
    from alexnet_jax.experiments import figures
    from alexnet_jax.inference import evaluate

    if bool(args.run) == bool(args.checkpoint):
        raise UserError('give either --run=WORKDIR or --checkpoint=PATH; see --help.')
    from alexnet_jax.experiments import plots  # raises UserError if matplotlib is missing

    if args.beside and not args.run:
        raise UserError(f'--beside={args.beside}: needs training curves; use --run=WORKDIR.')
    path = args.run or args.checkpoint
    dataset = datasets.open_dataset(args.data) if args.data else None
    checkpoint = load_checkpoint(path)
    shown = None
    if dataset:
        dataset.split(args.split)
        evaluate.check_record_size(checkpoint, dataset, path)
        dataset, shown = figures.match_dataset(checkpoint, dataset, args.split, path)
    if args.beside:
        images = _train_images(figures.log_lines(args.run), checkpoint.config.get('batch_size'))
        _check_beside(args.beside, checkpoint.class_names, images)
    print(f'{path} (step {checkpoint.step})', flush=True)
    options = {'split': args.split, 'shown': shown, 'seed': args.seed, 'beside': args.beside}
    drawn = figures.draw(checkpoint, run=args.run, dataset=dataset, **options)
    for name, figure, lines in drawn:
        print(*plots.save(figure, args.output, name), *lines, sep='\n', flush=True)


def _train_images(lines: Iterable[dict[str, Any]], batch_size: Any) -> int:
    """Returns the number of training images of a run, from the lines of metrics.jsonl; 0 if it is not recorded."""
    for line in lines:
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError):
            return round(line['step'] * batch_size / line['epoch'])
    return 0


def _check_beside(name: str, classes: Sequence[str], images: int) -> None:
    """Raises UserError if there is no published curve of a name, or if a run is not on all of ImageNet."""
    from alexnet_jax.data import imagenet_classes
    from alexnet_jax.training.published_curves import CURVES, is_imagenet

    if name not in CURVES:
        raise UserError(f'--beside={name}: expected one of {", ".join(CURVES)}.{did_you_mean(name, CURVES)}')
    if not is_imagenet(classes, images):
        other = '' if set(classes) == set(imagenet_classes.wordnet_ids()) else 'other '
        raise UserError(
            f'--beside={name}: expected a run on all of ImageNet, got {len(classes):,} {other}classes and {images:,} '
            'training images, whose epochs have another length.'
        )
