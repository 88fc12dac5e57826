"""Writes a layer's activations for every image of a split to a safetensors or npz file.

    alexnet_jax activations --checkpoint=PATH --data=DIR --layer=fc7 --output=fc7.safetensors [--split=val]

The activations are computed from center crops, without dropout. `conv3` is the output of the last operation of the
layer before dropout. `conv3.linear` is its convolution plus bias. `conv3.relu` and `conv1.pool` are the outputs of
single operations. The file contains `features` float32 [N, ...] and `labels` int32 [N], in the order of the split.
"""

from absl import flags

from alexnet_jax.commands.flag import CHECKPOINT, CPU_DEVICES, Flag

FLAGS = (
    CHECKPOINT,
    Flag('data', None, "A prepared directory, or 'digits'.", required=True),
    Flag('layer', None, "A layer, such as 'fc7', or one of its operations, such as 'conv1.pool'.", required=True),
    Flag('output', None, 'New file, ending in .safetensors or .npz.', required=True),
    Flag('split', 'val', 'Split to read.'),
    Flag('batch_size', 128, 'Images per batch.', at_least=1),
    CPU_DEVICES,
)


def main(args: flags.FlagValues) -> None:
    from alexnet_jax.checkpoints.loading import load_checkpoint
    from alexnet_jax.data import datasets
    from alexnet_jax.inference import activations, evaluate

    activations.check_output(args.output)
    dataset = datasets.open_dataset(args.data)
    records, checkpoint = dataset.split(args.split), load_checkpoint(args.checkpoint)
    evaluate.check_record_size(checkpoint, dataset, args.checkpoint)  # the class names may differ
    shape = activations.write_activations(args.output, checkpoint, records, args.layer, batch_size=args.batch_size)
    print(
        f'{args.output}: features float32 {list(shape)}, labels int32 {list(shape[:1])}; {args.layer} of '
        f'{args.checkpoint} (step {checkpoint.step}), {args.split} of {args.data}, center crop.'
    )
