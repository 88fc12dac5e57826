"""Trains a classifier on your own images, says whether it is better than guessing, and which classes are confused.

    alexnet_jax finetune --input=IMAGES --output=DIR [--init_from=CHECKPOINT] [--mode=full] [--config.KEY=VALUE]

IMAGES is an input of `alexnet_jax prepare`: CLASS/*.jpg, or train/CLASS/*.jpg and val/CLASS/*.jpg. Without a val
folder, some images are set aside for validation.

It starts from torchvision's weights, or from those of --init_from: the network and its preprocessing are theirs. With
few images only a new last layer is fitted to the frozen features (--mode=features, seconds); with more, or with
--mode=full, all layers are trained. --init_from=none trains from scratch. All settings follow from the number of
images; each is printed with its reason, and --config.KEY=VALUE replaces it. --config=NAME takes all of them from a
config and, unless --init_from is given, trains its network from scratch.

DIR receives data/, run/ and figures/. The same command resumes a stopped run. With other settings, the run gets a new
folder (run-2/, ...) and uses the prepared images again.
"""

from absl import flags

from alexnet_jax.commands.flag import CPU_DEVICES, ConfigFlag, Flag, overrides
from alexnet_jax.utils.errors import UserError

FLAGS = (
    Flag('input', None, 'Images in class folders, or another input of alexnet_jax prepare.', required=True),
    Flag('labels', None, 'A table of rows FILE,LABEL[,SPLIT] for the images in --input.'),
    Flag('nested_classes', False, 'Classes are in groups: each folder that holds images is a class, GROUP/CLASS.'),
    Flag('output', None, 'Directory for data/, run/ and figures/.', required=True),
    ConfigFlag('config', 'finetune', 'Config of all settings; default: they follow from the number of images.'),
    Flag('init_from', None, "Weights to start from: a name, a workdir, the output of alexnet_jax convert, or 'none'."),
    Flag(
        'mode', 'auto', 'features: fit a new last layer; full: train all layers.', choices=('auto', 'features', 'full')
    ),
    Flag('val_fraction', 0.0, 'Fraction of the images set aside for validation if there is no val folder; 0: chosen.'),
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

    if not 0 <= args.val_fraction < 1:
        raise UserError(f'--val_fraction={args.val_fraction}: expected a number between 0 and 1.')
    result = finetune.finetune(
        None if args['config'].using_default_value else args.config,
        args.input,
        args.output,
        init_from=args.init_from,
        val_fraction=args.val_fraction or None,
        max_unreadable=args.max_unreadable,
        mode=args.mode,
        overrides=overrides(args, 'config'),
        labels=args.labels,
        nested_classes=args.nested_classes,
    )
    print(f'{result.workdir}, step {result.step}, {result.crops}:')
    print(*result.verdict, sep='\n')
    for true, predicted, number, share in figures.most_confused(result.confusion, result.class_names):
        print(f'  {true} predicted as {predicted}: {number} ({100 * share:.0f}% of class {true})')
    print(result.figure)
    print(f'Next: alexnet_jax predict --checkpoint={result.workdir} IMAGE_OR_FOLDER')
