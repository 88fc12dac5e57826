"""Writes a page to look inside a network: one HTML file, for people who would rather look than read.

    alexnet_jax report --checkpoint=PATH --data=DIR [--split=val] --output=page.html
    alexnet_jax report --checkpoint=PATH --images=FOLDER --output=page.html

The page shows the maps of every layer for up to 12 images, the patches that excite a unit most and its receptive field.
A filter of the first layer slides over an image. A network of up to 2 million parameters and 500 MFLOPs is computed in
the page, and units or towers can be silenced. The page needs no network connection. An existing page is replaced.

The patches are from up to 1,000 images, drawn at random but always the same. Image files are cropped as `alexnet_jax
predict` does.
"""

import os

from absl import flags

from alexnet_jax.commands.flag import CHECKPOINT, CPU_DEVICES, Flag, check_data_or_images
from alexnet_jax.utils.errors import UserError

FLAGS = (
    CHECKPOINT,
    Flag('data', None, "A prepared directory, or 'digits'."),
    Flag('split', 'val', 'Split of --data to take images from.'),
    Flag('images', [], 'An image file or a folder of images. May be repeated.', repeated=True),
    Flag('output', None, 'HTML file to write.', required=True),
    CPU_DEVICES,
)


def main(args: flags.FlagValues) -> None:
    from alexnet_jax.convert.loading import load_checkpoint
    from alexnet_jax.data import datasets
    from alexnet_jax.experiments import inside_page
    from alexnet_jax.inference import evaluate, predict

    check_data_or_images(args)
    if not os.path.isdir(os.path.dirname(args.output) or '.'):
        raise UserError(f'--output={args.output}: there is no folder {os.path.dirname(args.output)!r}; make it first.')
    dataset = datasets.open_dataset(args.data) if args.data else None
    records = dataset.split(args.split) if dataset else predict.list_image_files(args.images)
    checkpoint = load_checkpoint(args.checkpoint)
    if dataset:
        evaluate.check_record_size(checkpoint, dataset, args.checkpoint)  # the classes may differ
    names = dataset.class_names if dataset else ()
    images, captions = inside_page.read_images(checkpoint, records, names)
    source = f'{args.split} of {args.data}' if dataset else ', '.join(args.images)
    some = f'{len(images):,} of {len(records):,} images of {source}'
    source = f'{args.checkpoint} (step {checkpoint.step}); {some}.'
    inside_page.write(
        args.output, checkpoint, images, captions, source=source, log=lambda line: print(line, flush=True)
    )
    reason = inside_page.why_large(checkpoint)
    print(f'Wrote {args.output} ({os.path.getsize(args.output) / 1e6:.1f} MB): {some}.')
    if reason:
        print(f'Units cannot be silenced in the page, because {reason}.')
