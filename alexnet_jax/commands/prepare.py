"""Prepares raw images for training: squares of one size, their mean image and color statistics.

    alexnet_jax prepare --input=ILSVRC2012_img_train.tar --output=DIR [--size=256] [--format=jpeg|raw]

Each image is resized so that its shorter side has `size` pixels, and cropped to its central square (section 2). The
output is a TFDS dataset that `tfds.builder_from_directory(DIR)` opens. The same folder holds SHA256SUMS and, if there
are training images, image_stats.npz. Classes are folders, or come with --labels=FILE or --nested_classes.

On n machines that share the folder of the output, for i from 1 to n; then, when all are finished, on any of them:

    alexnet_jax prepare --input=FOLDER --output=DIR --part=i/n
    alexnet_jax prepare --output=DIR --join

The dataset is the same as without parts. The same command continues a part that was stopped.
"""

from typing import Any

from absl import flags

from alexnet_jax.commands.flag import Flag
from alexnet_jax.utils.errors import UserError

FLAGS = (
    Flag('input', None, 'An ImageNet archive, a folder of archives or images, parquet files, or tfds:NAME.'),
    Flag('output', None, 'New directory to write.', required=True),
    Flag('labels', None, 'A table of rows FILE,LABEL[,SPLIT] for the images in --input.'),
    Flag('nested_classes', False, 'Classes are in groups: each folder that holds images is a class, GROUP/CLASS.'),
    Flag('size', 256, 'Side of the prepared images, pixels.'),
    Flag('format', 'jpeg', 'jpeg: small files; raw: no decoding during training.'),
    Flag('val_fraction', 0.0, 'Fraction of the training images to set aside as the val split.'),
    Flag('seed', 0, 'Random seed for the order of the images and the choice of the val split.'),
    Flag('max_unreadable', 0, 'Allowed number of unreadable images; with parts, an option of --join.'),
    Flag('part', None, 'Write only this part of the dataset, such as 1/4, into OUTPUT.parts.'),
    Flag('join', False, 'Join the parts in OUTPUT.parts. Further flags: --output and --max_unreadable.'),
)


def main(args: flags.FlagValues) -> None:
    from alexnet_jax.prepare import parts, prepare

    names = ('labels', 'nested_classes', 'size', 'format', 'val_fraction', 'seed', 'max_unreadable', 'part')
    if args.join:
        for name in ('input', *names):
            if name != 'max_unreadable' and not args[name].using_default_value:
                raise UserError(f'--{name}={args[name].value}: not used with --join, which takes it from the parts.')
        parts.join(args.output, max_unreadable=args.max_unreadable)
        return
    if not args.input:
        raise UserError('--input is missing; see --help.')
    options: dict[str, Any] = {name: args[name].value for name in names}
    prepare.prepare(args.input, args.output, **options)
