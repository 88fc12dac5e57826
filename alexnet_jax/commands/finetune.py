"""Trains a classifier on your own images, and reports its errors and confusion matrix.

    alexnet_jax finetune --input=IMAGES --output=DIR [--init_from=CHECKPOINT] [--config=finetune]

IMAGES is an input of `alexnet_jax prepare`: CLASS/*.jpg, or train/CLASS/*.jpg and val/CLASS/*.jpg. Without a val
folder, a tenth of the images is set aside for validation. With --init_from, the network and its preprocessing come from
that checkpoint, and all layers except the classifier start from its weights. DIR receives data/, run/ and figures/.
The same command resumes a stopped run.
"""

from typing import Any

from absl import flags

from alexnet_jax.commands.flag import CPU_DEVICES, ConfigFlag, Flag
from alexnet_jax.utils.errors import UserError

FLAGS = (
    Flag('input', None, 'Images in class folders, or another input of alexnet_jax prepare.', required=True),
    Flag('labels', None, 'A table of rows FILE,LABEL[,SPLIT] for the images in --input.'),
    Flag('nested_classes', False, 'Classes are in groups: each folder that holds images is a class, GROUP/CLASS.'),
    Flag('output', None, 'Directory for data/, run/ and figures/.', required=True),
    ConfigFlag('config', 'finetune', 'Config of learning rates and length; without --init_from also of the network.'),
    Flag(
        'init_from',
        '',
        'Checkpoint to start from: a workdir, the output of alexnet_jax convert, or a name as torchvision.',
    ),
    Flag('val_fraction', 0.1, 'Fraction of the images set aside for validation if there is no val folder.'),
    Flag(
        'max_unreadable',
        0,
        'Allowed number of unreadable images in --input; --config.data.max_unreadable is for records in data/.',
        at_least=0,
    ),
    CPU_DEVICES,
)


def main(args: flags.FlagValues) -> None:
    from alexnet_jax.experiments import figures, finetune

    if not 0 < args.val_fraction < 1:
        raise UserError(f'--val_fraction={args.val_fraction}: expected a number between 0 and 1.')
    names = ('val_fraction', 'max_unreadable', 'labels', 'nested_classes')
    options: dict[str, Any] = {name: args[name].value for name in names}
    result = finetune.finetune(args.config, args.input, args.output, init_from=args.init_from, **options)
    matrix = result.confusion
    print(
        f'best step {result.step} of {result.workdir}: top-1 error '
        f'{100 * (1 - matrix.trace() / matrix.sum()):.2f}% of {matrix.sum()} val images, {result.crops}. Most confused:'
    )
    for true, predicted, number, share in figures.most_confused(matrix, result.class_names):
        print(f'  {true} predicted as {predicted}: {number} ({100 * share:.0f}% of {true})')
    print(result.figure)
    print(f'Next: alexnet_jax predict --checkpoint={result.workdir} IMAGE_OR_FOLDER')
