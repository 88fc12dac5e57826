"""Exports a checkpoint to files that load without this package: StableHLO, safetensors, a model card.

    alexnet_jax export --checkpoint=runs/paper --output=exported [--views=10]

`model.stablehlo` maps uint8 images [N, S, S, 3], for any N, to probabilities [N, K]. It includes mean subtraction,
crops and softmax. `model.safetensors`, `config.json` and `README.md` follow the layout of the Hugging Face Hub. A
separate process that does not import this package loads the exported model and compares its outputs.
"""

from absl import flags

from alexnet_jax.commands.flag import CHECKPOINT, CPU_DEVICES, VIEWS, Flag
from alexnet_jax.utils.files import check_new

FLAGS = (CHECKPOINT, Flag('output', None, 'New directory to write.', required=True), VIEWS, CPU_DEVICES)


def main(args: flags.FlagValues) -> None:
    from alexnet_jax.convert.loading import load_checkpoint
    from alexnet_jax.export import hub, stablehlo

    check_new(args.output)
    checkpoint = load_checkpoint(args.checkpoint)
    size, difference = hub.export(checkpoint, args.output, args.views)
    print(
        f'Wrote {args.output}/{stablehlo.FILE_NAME} ({size / 2**20:.0f} MiB). Without this package it reproduces the '
        f'probabilities of {args.checkpoint} (step {checkpoint.step}) to {difference:.1g}.'
    )
