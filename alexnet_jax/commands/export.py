"""Exports a checkpoint to files that load without this package: ONNX, PyTorch, StableHLO, safetensors.

    alexnet_jax export --checkpoint=runs/paper --output=exported [--formats=onnx,pytorch] [--views=10]

  safetensors  model.safetensors: the weights in PyTorch's layout
  pytorch      alexnet.py: the network as a PyTorch module; includes safetensors
  onnx         model.onnx: the network with its preprocessing; needs pip install 'alexnet_jax[onnx]'
  stablehlo    model.stablehlo: the same, for jax.export

The networks map uint8 images [N, S, S, 3], for any N, to probabilities [N, K], with mean subtraction, crops and
softmax. Each format is loaded in a separate process, without this package, and compared with the checkpoint.
`config.json` and `README.md` follow the layout of the Hugging Face Hub.
"""

from absl import flags

from alexnet_jax.commands.flag import CHECKPOINT, CPU_DEVICES, VIEWS, Flag
from alexnet_jax.utils.files import check_new

FLAGS = (
    CHECKPOINT,
    Flag('output', None, 'New directory to write.', required=True),
    Flag('formats', 'safetensors,pytorch,stablehlo', 'Some of safetensors, pytorch, onnx, stablehlo.'),
    VIEWS,
    CPU_DEVICES,
)


def main(args: flags.FlagValues) -> None:
    check_new(args.output)
    from alexnet_jax.convert.loading import load_checkpoint
    from alexnet_jax.export import hub

    formats = args.formats.split(',')
    hub.check_formats(formats)
    checkpoint = load_checkpoint(args.checkpoint)
    for file in hub.export(checkpoint, args.output, args.views, formats):
        size = f'{file.size / 2**20:.1f} MiB' if file.size >= 2**20 else f'{file.size / 2**10:.1f} KiB'
        print(f'Wrote {args.output}/{file.name} ({size}). {file.result}')
