"""The paper's network, narrow, for 64 px images: a base for experiments on a machine without a GPU.

    python -m alexnet_jax.prepare --input=tiny_imagenet_20 --output=data/tiny --size=64 --format=raw
    python -m alexnet_jax.main --config=configs/tiny_imagenet.py --workdir=runs/tiny --config.data.path=data/tiny

Not of the paper or the authors: five convolutions in the same groups, a third of the kernels, weights drawn as wide as
such narrow layers need (He et al. 2015), 20 classes, random windows of 56 px. Nobody reports an error for it.
Here: docs/experiments.md has what was measured (top-1 error, centre crop and ten views).
"""

import math
import os
import runpy

import ml_collections

_PAPER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'paper.py')


def _he(inputs: int) -> float:
    return math.sqrt(2 / inputs)


def get_config() -> ml_collections.ConfigDict:
    config = runpy.run_path(_PAPER)['get_config']()
    config.num_epochs = 30.0
    config.log_every_steps = 0
    config.data.image_size = 56
    config.model.conv = (
        (32, 5, 2, (2, 2), 1, _he(5 * 5 * 3) / 64, 0.0, 'relu lrn pool'),  # pixels have a scale of about 64
        (64, 5, 1, (2, 2), 2, _he(5 * 5 * 16), 0.0, 'relu lrn pool'),
        (96, 3, 1, (1, 1), 1, _he(3 * 3 * 64), 0.0, 'relu'),
        (96, 3, 1, (1, 1), 2, _he(3 * 3 * 48), 0.0, 'relu'),
        (64, 3, 1, (1, 1), 2, _he(3 * 3 * 48), 0.0, 'relu pool'),
    )
    config.model.dense = (
        (512, 1, _he(3 * 3 * 64), 0.0, 'relu dropout'),
        (512, 1, _he(512), 0.0, 'relu dropout'),
    )
    config.model.num_classes = 20
    config.model.classifier = (0.05, 0.0)
    config.optim.schedule = 'epochs'
    config.optim.stages = ((0, 1.0, 1.0, ()), (20, 0.1, 0.1, ()), (26, 0.01, 0.01, ()))
    return config
