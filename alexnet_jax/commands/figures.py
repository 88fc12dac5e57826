"""Draws the paper's figures from a run or a checkpoint, as PNG and SVG.

    alexnet_jax figures --run=WORKDIR --output=DIR [--data=DIR] [--split=val] [--seed=0]
    alexnet_jax figures --checkpoint=PATH --output=DIR [--data=DIR]

Draws the network (figure 2) and the kernels of its first layer (figure 3). With --run, also draws the training curves
(as figure 1). With --data, also draws predictions and nearest training images (figure 4) and the confusion matrix. The
classes of the data may be some of the network's, in any order: they are matched as `alexnet_jax evaluate` does.
"""

from absl import flags

from alexnet_jax.commands.flag import CPU_DEVICES, Flag
from alexnet_jax.utils.errors import UserError

FLAGS = (
    Flag('run', None, 'A workdir: draw its training curves and its best step, else its latest step.'),
    Flag('checkpoint', None, 'A checkpoint, instead of --run; without training curves.'),
    Flag('data', None, "A prepared directory, or 'digits', for the figures that show images."),
    Flag('output', None, 'Directory for the figures; created if missing.', required=True),
    Flag('split', 'val', 'Split whose images are shown.'),
    Flag('seed', 0, 'Random seed for the choice of the images shown.', at_least=0),
    CPU_DEVICES,
)


def main(args: flags.FlagValues) -> None:
    from alexnet_jax.checkpoints.loading import load_checkpoint
    from alexnet_jax.data import datasets
    from alexnet_jax.experiments import figures
    from alexnet_jax.inference import evaluate

    if bool(args.run) == bool(args.checkpoint):
        raise UserError('give either --run=WORKDIR or --checkpoint=PATH; see --help.')
    from alexnet_jax.experiments import plots  # raises UserError if matplotlib is missing

    path = args.run or args.checkpoint
    dataset = datasets.open_dataset(args.data) if args.data else None
    checkpoint = load_checkpoint(path)
    shown = None
    if dataset:
        dataset.split(args.split)
        evaluate.check_record_size(checkpoint, dataset, path)
        dataset, shown = figures.match_dataset(checkpoint, dataset, args.split, path)
    print(f'{path} (step {checkpoint.step})', flush=True)
    drawn = figures.draw(checkpoint, run=args.run, dataset=dataset, split=args.split, shown=shown, seed=args.seed)
    for name, figure, lines in drawn:
        print(*plots.save(figure, args.output, name), *lines, sep='\n', flush=True)
