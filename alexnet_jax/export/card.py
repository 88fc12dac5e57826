"""Writes the model card of an exported folder."""

import os
from typing import Any

import jax

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.core.architecture import infer_shapes
from alexnet_jax.export.stablehlo import PLATFORMS

_CARD = """---
library_name: {library}
pipeline_tag: image-classification
tags: [{tags}]
---

# AlexNet, {parameters:,} parameters, {classes} classes

Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural Networks" (2012),
{origin}.
No accuracy is stated here: measure it on your own data. No license is stated: it depends on the origin of the weights
and the data. Add one before publishing.

- Input: uint8 RGB [N, {side}, {side}, 3]: shorter side resized to {side} (bilinear, antialiased), central square.
- Preprocessing in the model: {crop} px crops ({crops}), {pixels}.
- Output: float32 probabilities [N, {classes}]; names in `config.json`, `id2label`.
{sections}"""

_SECTIONS = {
    'safetensors': """
## Weights: `model.safetensors`

The weights in PyTorch's layout. `alexnet_jax convert` converts the file back to a checkpoint.

{result}
""",
    'pytorch': """
## PyTorch: `alexnet.py`

Needs the packages torch and safetensors, and `model.safetensors` and `preprocessing.safetensors` beside it.

```python
import alexnet, torch
model = alexnet.load()
probabilities = model.probabilities(torch.tensor(images))
```

{result}
""",
    'onnx': """
## ONNX: `model.onnx`

Input `image`, outputs `probabilities` and `logits`, float32 {logits}.

```python
import onnxruntime
session = onnxruntime.InferenceSession('model.onnx')
probabilities, logits = session.run(['probabilities', 'logits'], {{'image': images}})
```

{result}
""",
    'stablehlo': """
## JAX: `model.stablehlo`

```python
import jax.export
model = jax.export.deserialize(open('model.stablehlo', 'rb').read())
probabilities = model.call(images)
```

Platforms: {platforms}. Written with JAX {version}. This file expires: JAX guarantees that it can be loaded by versions
up to 6 months newer, and up to 3 weeks older, than {version}. From 0.11.1 on, JAX refuses expired files.

{result}
""",
}
_LIBRARIES = {'stablehlo': 'jax', 'pytorch': 'pytorch', 'onnx': 'onnx', 'safetensors': 'jax'}  # library_name, by format


def card(checkpoint: Checkpoint, views: int, results: dict[str, str]) -> str:
    """Returns the model card (README.md): the model, its input and output, and how to load each format.

    `results` maps the formats to the results of `check.check`. No license is stated, because none is known.
    """
    augmentation, classes = checkpoint.augmentation, len(checkpoint.class_names)
    logits = f'[N, {classes}]' if views == 1 else f'[N, 10, {classes}], of each crop'
    values: dict[str, Any] = {'logits': logits, 'platforms': ', '.join(PLATFORMS), 'version': jax.__version__}
    layers = infer_shapes(checkpoint.network, checkpoint.image_size)
    scaled = any(std != 1 for std in augmentation.pixel_std)
    return _CARD.format(
        library=next(library for name, library in _LIBRARIES.items() if name in results),
        tags=', '.join(('alexnet', 'image-classification', *results)),
        parameters=sum(layer.parameters for layer in layers.values()),
        classes=classes,
        origin=_origin(checkpoint),
        side=checkpoint.record_size,
        crop=checkpoint.image_size,
        crops='the center crop' if views == 1 else 'ten crops (corners and center, with reflections), averaged',
        pixels=f"the training set's mean subtracted{', divided by a standard deviation per color' if scaled else ''}",
        sections=''.join(_SECTIONS[name].format(result=result, **values) for name, result in results.items()),
    )


def _origin(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    data, start = map(_last_part, (config['data'].get('path'), config.get('init_from')))
    if not checkpoint.step:
        return f'with weights that alexnet_jax derived from {start}' if start else 'with weights read from a file'
    size = config.get('batch_size')
    batches = f'{checkpoint.step:,} updates' + (f' on batches of {size}' if isinstance(size, int) else '')
    start = f', starting from {start}' if start else ''
    return f'trained with alexnet_jax for {batches}{start}; data: {data or "not recorded"}'


def _last_part(path: Any) -> str:
    """Returns the last part of a path of the config, as code. The others say where it is on this machine."""
    name = ' '.join(os.path.basename(str(path or '').rstrip('/')).split())
    return f'`{name.replace("`", "")}`' if name else ''
