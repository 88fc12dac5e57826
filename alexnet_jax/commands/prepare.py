"""Prepares raw images for training: squares of one size, their mean image and color statistics.

    alexnet_jax prepare --input=ILSVRC2012_img_train.tar --output=DIR [--size=256] [--format=jpeg|raw]

Each image is resized so that its shorter side has `size` pixels, and cropped to its central square (section 2). The
output is a TFDS dataset that `tfds.builder_from_directory(DIR)` opens. The same folder holds SHA256SUMS and, if there
are training images, image_stats.npz. Classes are folders, or come with --labels=FILE or --nested_classes.
"""

from typing import Any

from absl import flags

from alexnet_jax.commands.flag import Flag

FLAGS = (
    Flag(
        'input',
        None,
        'An ImageNet archive, a folder of archives or images, parquet files, or tfds:NAME.',
        required=True,
    ),
    Flag('output', None, 'New directory to write.', required=True),
    Flag('labels', None, 'A table of rows FILE,LABEL[,SPLIT] for the images in --input.'),
    Flag('nested_classes', False, 'Classes are in groups: each folder that holds images is a class, GROUP/CLASS.'),
    Flag('size', 256, 'Side of the prepared images, pixels.'),
    Flag('format', 'jpeg', 'jpeg: small files; raw: no decoding during training.'),
    Flag('val_fraction', 0.0, 'Fraction of the training images to set aside as the val split.'),
    Flag('seed', 0, 'Random seed for the order of the images and the choice of the val split.'),
    Flag('max_unreadable', 0, 'Allowed number of unreadable images.'),
)


def main(args: flags.FlagValues) -> None:
    from alexnet_jax.prepare import prepare

    names = ('labels', 'nested_classes', 'size', 'format', 'val_fraction', 'seed', 'max_unreadable')
    options: dict[str, Any] = {name: args[name].value for name in names}
    prepare.prepare(args.input, args.output, **options)
