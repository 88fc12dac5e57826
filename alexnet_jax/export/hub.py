"""A checkpoint as files that others load without this package, laid out as on the Hugging Face hub."""

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

    What was written is loaded in a process of its own and compared. Returns (bytes of the StableHLO file, the largest
    difference of its probabilities). Raises UserError where it cannot be written, cannot be loaded, or gives other
    probabilities; nothing is written then.
    """
    with atomic_directory(output) as folder:
        safetensors.write(folder, checkpoint)
        pathlib.Path(folder, 'config.json').write_text(json.dumps(hub_config(checkpoint, views), indent=2))
        pathlib.Path(folder, 'README.md').write_text(card(checkpoint, views), encoding='utf-8')
        path = pathlib.Path(folder, stablehlo.FILE_NAME)
        size = path.write_bytes(stablehlo.stablehlo(checkpoint, views))
        return size, stablehlo.check(str(path), checkpoint, views)


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
    parameters = sum(s.parameters for s in infer_shapes(checkpoint.network, checkpoint.image_size).values())
    side, crop = checkpoint.record_size, checkpoint.image_size
    seen = 'the central crop' if views == 1 else 'ten crops (corners and center, with reflections), averaged'
    origin = 'its weights converted by alexnet_jax from a file of others'
    if checkpoint.step:
        data = os.path.basename(checkpoint.config['data']['path'].rstrip('/')) or 'not recorded'
        batches = f'{checkpoint.step:,} updates on batches of {checkpoint.config["batch_size"]}'
        origin = f'trained with alexnet_jax for {batches}; data: {data}'
    scaled = any(std != 1 for std in checkpoint.augmentation.pixel_std)
    pixels = f"the training set's mean subtracted{', divided by a deviation for each color' if scaled else ''}"
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
model = jax.export.deserialize(open('{stablehlo.FILE_NAME}', 'rb').read())
probabilities = model.call(images)
```

`{safetensors.FILE_NAME}` holds the weights as PyTorch lays them out; `alexnet_jax convert` makes a checkpoint of it
again. Compiled for: {', '.join(stablehlo.PLATFORMS)}.
"""
