"""The paper's network, narrow, for 64 px images: a base for experiments on a machine without a GPU.

    alexnet_jax prepare --input=tiny_imagenet_20 --output=data/tiny --size=64 --format=raw
    alexnet_jax train --config=tiny_imagenet --workdir=runs/tiny --config.data.path=data/tiny

Not of the paper or the authors: the network of quickstart.py (five convolutions in the paper's groups, a third of its
kernels and fewer, weights as wide as such narrow layers need), 20 classes, random windows of 56 px. Nobody reports an
error for it.
Here: 53.1% top-1 error from the center crop, 50.9% over ten views (20 classes, five seeds, last step;
docs/experiments.md).
"""

import math

import ml_collections

import alexnet_jax


def get_config() -> ml_collections.ConfigDict:
    config = alexnet_jax.get_config('quickstart')
    config.batch_size = 128
    config.num_epochs = 15.0
    config.log_every_steps = 0
    config.data.path = ''
    config.data.image_size = 56
    config.data.reflect = True
    layers = config.model.layers
    layers.conv1.stride = 2  # 56 - 28, pooled 14 - 7 - 3
    layers.fc6.features = layers.fc7.features = 512
    layers.fc7.init = f'normal({math.sqrt(2 / 512)})'  # as in quickstart.py
    layers.fc8.init = 'normal(0.01)'  # with 0.05 the first updates are so large that the ReLUs below die
    config.model.num_classes = 20
    config.optim.stages = ((0, 1.0, 1.0, ()), (10, 0.1, 0.1, ()), (13, 0.01, 0.01, ()))
    return config
