"""Writes a checkpoint as files that others load without this package: StableHLO, safetensors, a model card.

    python -m alexnet_jax.export --checkpoint=runs/paper --output=exported [--views=10]

`model.stablehlo` takes uint8 images [N, S, S, 3], N free, and gives probabilities [N, K]; the mean, the crops and the
softmax are inside. `model.safetensors`, `config.json` and `README.md` lie as on the Hugging Face hub. What was written
is loaded in a process of its own, which knows nothing of this package, and compared.
"""

import collections
import io
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import export as jax_export

from alexnet_jax import cli, convert, evaluate, layers, processes, sharding, steps
from alexnet_jax.checkpoint import Checkpoint, load_checkpoint
from alexnet_jax.errors import UserError, check_new

FILE_NAME = 'model.stablehlo'
PLATFORMS = ('cpu', 'cuda', 'tpu')
_LOAD = """import io, sys
import jax.export
import numpy as np
with open(sys.argv[1], 'rb') as file:
    model = jax.export.deserialize(file.read())
found = [np.asarray(model.call(images)) for images in np.load(io.BytesIO(sys.stdin.buffer.read())).values()]
assert 'alexnet_jax' not in sys.modules
answer = io.BytesIO()
np.savez(answer, *found)
sys.stdout.buffer.write(answer.getvalue())
"""


def stablehlo(checkpoint: Checkpoint, views: int = 1) -> bytes:
    """A network with its weights and its preprocessing, serialised by `jax.export` for `PLATFORMS`.

    It takes uint8 [N, S, S, 3] with S = `checkpoint.record_size`, for any N, prepared as the training images were, and
    gives float32 [N, K]: softmax outputs, averaged over the views (1: the centre; 10: section 4.1).
    """
    mesh = sharding.make_mesh(data=1, tower=1)
    forward = sharding.forward(checkpoint.network, mesh)

    def probabilities(image_NHWC):
        return jnp.exp(
            steps.log_probabilities(
                checkpoint.params,
                image_NHWC,
                checkpoint.statistics,
                forward=forward,
                augmentation=checkpoint.augmentation,
                views=views,
            )
        )

    (count,) = jax_export.symbolic_shape('N')
    side = checkpoint.record_size
    images = jax.ShapeDtypeStruct((count, side, side, 3), np.uint8)
    return jax_export.export(jax.jit(probabilities), platforms=PLATFORMS)(images).serialize()


def hub_config(checkpoint: Checkpoint, views: int) -> dict[str, Any]:
    """What the hub's tools read of a classifier, and under 'alexnet_jax' all that this package needs."""
    counts = collections.Counter(checkpoint.class_names)  # ImageNet has two classes 'crane'
    names = [name if counts[name] == 1 else f'{name} ({i})' for i, name in enumerate(checkpoint.class_names)]
    return {
        'model_type': 'alexnet',
        'architectures': ['AlexNet'],
        'num_labels': len(names),
        'id2label': {str(i): name for i, name in enumerate(names)},
        'label2id': {name: i for i, name in enumerate(names)},
        'image_size': checkpoint.record_size,
        'crop_size': checkpoint.image_size,
        'views': views,
        'alexnet_jax': {'step': checkpoint.step, 'config': checkpoint.config},
    }


def card(checkpoint: Checkpoint, views: int) -> str:
    """README.md: what the model is, what goes in and comes out, how it is loaded."""
    parameters = sum(s.parameters for s in layers.sizes(checkpoint.network, checkpoint.image_size).values())
    side, crop = checkpoint.record_size, checkpoint.image_size
    seen = 'the central crop' if views == 1 else 'ten crops (corners and centre, with reflections), averaged'
    config = checkpoint.config
    data = os.path.basename(config['data']['path'].rstrip('/')) or 'not recorded'
    origin = 'its weights converted by alexnet_jax from a file of others'
    if checkpoint.step:
        batch = config['batch_size']
        origin = f'trained with alexnet_jax for {checkpoint.step:,} updates on batches of {batch}; data: {data}'
    scaled = any(std != 1 for std in checkpoint.augmentation.pixel_std)
    pixels = f"the training set's mean subtracted{', divided by a deviation for each colour' if scaled else ''}"
    return f"""---
library_name: jax
pipeline_tag: image-classification
tags: [alexnet, image-classification]
---

# AlexNet, {parameters:,} parameters, {len(checkpoint.class_names)} classes

Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural Networks" (2012),
{origin}.
Its accuracy is not stated here: measure it on your own.

- In: uint8 RGB [N, {side}, {side}, 3]: the shorter side resized to {side} (bilinear, antialiased), its central square.
- Inside: {crop} px crops ({seen}), {pixels}.
- Out: float32 probabilities [N, {len(checkpoint.class_names)}]; names in `config.json`, `id2label`.

```python
import jax.export
model = jax.export.deserialize(open('{FILE_NAME}', 'rb').read())
probabilities = model.call(images)
```

`{convert.FILE_NAME}` holds the weights as PyTorch lays them out; `python -m alexnet_jax.convert` makes a checkpoint of
it again. Compiled for: {', '.join(PLATFORMS)}.
"""


def check(path: str, checkpoint: Checkpoint, views: int) -> float:
    """Loads what was written in another process, on its CPU, for batches of one and of three; the largest difference.

    Raises:
      UserError: it cannot be loaded there, or gives other probabilities.
    """
    side, rng = checkpoint.record_size, np.random.default_rng(0)
    batches = [rng.integers(0, 256, (count, side, side, 3), np.uint8) for count in (1, 3)]
    sent = io.BytesIO()
    np.savez(sent, *batches)
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    done = subprocess.run(
        [sys.executable, '-c', _LOAD, os.path.basename(path)],
        input=sent.getvalue(),
        capture_output=True,
        cwd=os.path.dirname(path),
        env={**environment, 'JAX_PLATFORMS': 'cpu'},
    )
    if done.returncode:
        raise UserError(f'what was exported cannot be loaded: {done.stderr.decode(errors="replace").strip()[-1000:]}')
    found = np.load(io.BytesIO(done.stdout))
    expected = [evaluate.predict(checkpoint, batch, views=views) for batch in batches]
    difference = max(float(np.abs(a - b).max()) for a, b in zip(found.values(), expected, strict=True))
    if not difference < (1e-5 if jax.default_backend() == 'cpu' else 1e-2):  # a GPU computes in TF32
        raise UserError(f'what was exported gives other probabilities, by {difference:.2g}; it is not written.')
    return difference


def main() -> None:
    args = flags.FLAGS
    check_new(args.output)
    cli.set_up_jax()
    checkpoint = load_checkpoint(args.checkpoint)
    with processes.new_directory(args.output) as folder:
        convert.write_safetensors(folder, checkpoint)
        for name, text in (
            ('config.json', json.dumps(hub_config(checkpoint, args.views), indent=2)),
            ('README.md', card(checkpoint, args.views)),
        ):
            with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
                file.write(text)
        path = os.path.join(folder, FILE_NAME)
        with open(path, 'wb') as file:
            file.write(stablehlo(checkpoint, args.views))
        difference = check(path, checkpoint, args.views)
        size = os.path.getsize(path) / 2**20
    print(
        f'{args.output}/{FILE_NAME} ({size:.0f} MiB) gives the probabilities of {args.checkpoint} (step '
        f'{checkpoint.step}) in a process without this package, to {difference:.1g}.'
    )


if __name__ == '__main__':
    flags.DEFINE_string('checkpoint', None, "A workdir (its best step, else its latest) or one step's folder.")
    flags.DEFINE_string('output', None, 'Directory to write; must not exist.')
    cli.define_views()
    cli.define_cpu_devices()
    cli.run(main, required=('checkpoint', 'output'))
