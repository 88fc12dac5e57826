"""Exports a checkpoint as files that load without this package, in the layout of the Hugging Face Hub."""

import collections
import json
import os
import pathlib
from typing import Any

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.convert import safetensors
from alexnet_jax.core.architecture import infer_shapes
from alexnet_jax.export import stablehlo
from alexnet_jax.utils.files import atomic_directory


def export(checkpoint: Checkpoint, output: str | os.PathLike, views: int) -> tuple[int, float]:
    """Writes the new directory `output`: StableHLO, safetensors, config.json and a model card.

    The StableHLO file is loaded in a separate process and its probabilities are compared with the checkpoint's.
    Returns (size of the StableHLO file in bytes, largest difference of a probability).
    Raises UserError if the files cannot be written or loaded, or if the probabilities differ. Nothing is written then.
    """
    with atomic_directory(output) as folder:
        safetensors.write(folder, checkpoint)
        pathlib.Path(folder, 'config.json').write_text(json.dumps(hub_config(checkpoint, views), indent=2))
        pathlib.Path(folder, 'README.md').write_text(card(checkpoint, views), encoding='utf-8')
        path = pathlib.Path(folder, stablehlo.FILE_NAME)
        size = path.write_bytes(stablehlo.stablehlo(checkpoint, views))
        return size, stablehlo.check(str(path), checkpoint, views)


def hub_config(checkpoint: Checkpoint, views: int) -> dict[str, Any]:
    """Returns config.json: the keys of a classifier on the Hub, and this package's settings under 'alexnet_jax'."""
    counts = collections.Counter(checkpoint.class_names)  # ImageNet has two classes named 'crane'
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
    """Returns the model card (README.md): the model, its inputs and outputs, and how to load it."""
    parameters = sum(s.parameters for s in infer_shapes(checkpoint.network, checkpoint.image_size).values())
    side, crop = checkpoint.record_size, checkpoint.image_size
    crops = 'the center crop' if views == 1 else 'ten crops (corners and center, with reflections), averaged'
    origin = 'with weights converted by alexnet_jax from a file of another framework'
    if checkpoint.step:
        data = os.path.basename(checkpoint.config['data']['path'].rstrip('/')) or 'not recorded'
        batches = f'{checkpoint.step:,} updates on batches of {checkpoint.config["batch_size"]}'
        origin = f'trained with alexnet_jax for {batches}; data: {data}'
    scaled = any(std != 1 for std in checkpoint.augmentation.pixel_std)
    pixels = f"the training set's mean subtracted{', divided by a standard deviation per color' if scaled else ''}"
    return f"""---
library_name: jax
pipeline_tag: image-classification
tags: [alexnet, image-classification]
---

# AlexNet, {parameters:,} parameters, {len(checkpoint.class_names)} classes

Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural Networks" (2012),
{origin}.
No accuracy is stated here: measure it on your own data.

- Input: uint8 RGB [N, {side}, {side}, 3]: shorter side resized to {side} (bilinear, antialiased), central square.
- Preprocessing in the model: {crop} px crops ({crops}), {pixels}.
- Output: float32 probabilities [N, {len(checkpoint.class_names)}]; names in `config.json`, `id2label`.

```python
import jax.export
model = jax.export.deserialize(open('{stablehlo.FILE_NAME}', 'rb').read())
probabilities = model.call(images)
```

`{safetensors.FILE_NAME}` has the weights in PyTorch's layout; `alexnet_jax convert` converts it back to a checkpoint.
Platforms: {', '.join(stablehlo.PLATFORMS)}.
"""
