"""Converts Caffe, PyTorch or safetensors weights to a checkpoint, or a checkpoint to safetensors.

    alexnet_jax convert --input=FILE [--mean=FILE] --output=DIR [--config=FILE] [--classes=FILE]
        [--color_order=bgr]
    alexnet_jax convert --input=CHECKPOINT --output=DIR --to=safetensors

The weights determine features, groups and number of classes. Strides, paddings, the operations after each layer and the
preprocessing come from a config. The default config is 'caffe' for a .caffemodel, a .npy and --color_order=bgr, and
'torchvision' otherwise.
"""

from absl import flags

from alexnet_jax.commands.flag import ConfigFlag, Flag

FLAGS = (
    Flag(
        'input',
        None,
        'Weights: .caffemodel, .pth, .npy, .safetensors, or a .zip of one; for --to=safetensors a checkpoint.',
        required=True,
    ),
    Flag('output', None, 'New directory to write.', required=True),
    Flag('to', 'checkpoint', 'checkpoint or safetensors.'),
    Flag('mean', None, 'Mean image: .binaryproto, or .npy of shape [3, S, S] or [3], 0 to 255.'),
    Flag('classes', None, 'Class names in the order of the outputs: a text file with one per line, or JSON.'),
    Flag(
        'color_order',
        None,
        'Order of channels that the network expects, rgb or bgr. Default: bgr for .caffemodel and .npy.',
        choices=('rgb', 'bgr'),
    ),
    ConfigFlag('config', None, 'Config with the network and preprocessing of the weights.'),
)


def main(args: flags.FlagValues) -> None:
    import jax

    from alexnet_jax.convert import convert
    from alexnet_jax.convert.loading import load_checkpoint
    from alexnet_jax.utils.files import check_new

    jax.config.update('jax_platforms', 'cpu')  # conversion needs no accelerator
    check_new(args.output)
    options = (args.mean, args.config, args.classes, args.color_order)
    # With other options, `convert` reports the error before anything is fetched.
    source = load_checkpoint(args.input) if args.to == 'safetensors' and not any(options) else args.input
    convert.convert(
        source, args.output, to=args.to, mean=args.mean, config=args.config, classes=args.classes,
        color_order=args.color_order,
    )  # fmt: skip
