"""Writes the activations of layers for a split or for image files to a safetensors or npz file.

    alexnet_jax activations --checkpoint=PATH --data=DIR [--split=val] --layers=conv3,fc7 --output=f.npz
    alexnet_jax activations --checkpoint=PATH --images=FOLDER_OR_FILE --layers=conv3,fc7 --output=f.safetensors
    alexnet_jax activations --checkpoint=PATH --data=DIR --layers=conv3,fc7 --output=f/{layer}.npz

The activations are computed from center crops, without dropout. `conv3` is the output of the layer after its last
operation before dropout. `conv3.linear` is its convolution plus bias. `conv3.relu` and `conv1.pool` are the outputs of
single operations. A network of torchvision's layout also has torchvision's names, such as `features.6`.

The file holds one array for each layer, under its name: float32 [N, ...], with --pool [N, C] for feature maps. It also
holds `files`, the names of the images, and, if they are known, `labels` int32 [N] and `class_names`. With {layer} in
the file name, each layer gets a file in a new folder.

Rows are in the order of the split. Image files are cropped as `alexnet_jax predict` does; those of a folder, which is
searched recursively, are in the order of their names. They have labels if --images is one folder of class folders.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from alexnet_jax.commands.flag import CHECKPOINT, CPU_DEVICES, Flag, check_data_or_images

FLAGS = (
    CHECKPOINT,
    Flag('data', None, "A prepared directory, or 'digits'."),
    Flag('split', 'val', 'Split of --data to read.'),
    Flag('images', [], 'An image file or a folder of images. May be repeated.', repeated=True),
    Flag(
        'layers', [], "Layers or operations, such as 'conv3,conv1.pool'. May be repeated.", required=True, repeated=True
    ),
    Flag('output', None, 'New file, ending in .safetensors or .npz, or FOLDER/{layer}.npz.', required=True),
    Flag('pool', None, 'Mean or maximum over the positions of feature maps.', choices=('mean', 'max')),
    Flag('batch_size', 128, 'Images per batch.', at_least=1),
    CPU_DEVICES,
)


def main(args: flags.FlagValues) -> None:
    from alexnet_jax.convert.loading import load_checkpoint
    from alexnet_jax.data import datasets
    from alexnet_jax.inference import activation_files, activations, evaluate, predict

    check_data_or_images(args)
    activation_files.check_output(args.output)
    layers = [name.strip() for names in args.layers for name in names.split(',') if name.strip()]
    images: Sequence
    labels: Sequence[int] | None = None
    class_names: Sequence[str] = ()
    if args.images:
        source, images = ', '.join(args.images), predict.list_image_files(args.images)
        if found := predict.class_folders(args.images, images):
            labels, class_names = found
        checkpoint = load_checkpoint(args.checkpoint)
    else:
        dataset = datasets.open_dataset(args.data)
        class_names = dataset.class_names
        source, images = f'{args.split} of {args.data}', dataset.split(args.split)
        checkpoint = load_checkpoint(args.checkpoint)
        evaluate.check_record_size(checkpoint, dataset, args.checkpoint)  # the classes may differ
    options: dict[str, Any] = {
        'batch_size': args.batch_size,
        'pool': args.pool,
        'labels': labels,
        'class_names': class_names,
    }
    arrays = activations.write_activations(args.output, checkpoint, images, layers, **options)
    contents = ', '.join(f'{name} {dtype} {list(shape)}' for name, (dtype, shape) in arrays.items())
    print(f'{args.output}: {contents}; {args.checkpoint} (step {checkpoint.step}), {source}, center crop.')
