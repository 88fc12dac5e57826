"""Writes a checkpoint as files that others load without this package: StableHLO, safetensors, a model card.

    alexnet_jax export --checkpoint=runs/paper --output=exported [--views=10]

`model.stablehlo` takes uint8 images [N, S, S, 3], N free, and gives probabilities [N, K]; the mean, the crops and the
softmax are inside. `model.safetensors`, `config.json` and `README.md` lie as on the Hugging Face hub. What was written
is loaded in a process of its own, which knows nothing of this package, and compared.
"""

from absl import flags

from alexnet_jax.commands.flag import CHECKPOINT, CPU_DEVICES, VIEWS, Flag
from alexnet_jax.utils.files import check_new

FLAGS = (CHECKPOINT, Flag('output', None, 'Directory to write; must not exist.', required=True), VIEWS, CPU_DEVICES)


def main(args: flags.FlagValues) -> None:
    from alexnet_jax.checkpoints.loading import load_checkpoint
    from alexnet_jax.export import hub, stablehlo

    check_new(args.output)
    checkpoint = load_checkpoint(args.checkpoint)
    size, difference = hub.export(checkpoint, args.output, args.views)
    print(
        f'{args.output}/{stablehlo.FILE_NAME} ({size / 2**20:.0f} MiB) gives the probabilities of {args.checkpoint} '
        f'(step {checkpoint.step}) in a process without this package, to {difference:.1g}.'
    )
