"""A narrow AlexNet for images of 64 px: a base for experiments on a machine without a GPU.

    alexnet_jax prepare --input=tiny_imagenet_20 --output=data/tiny --size=64 --format=raw
    alexnet_jax train --config=tiny_imagenet --workdir=runs/tiny --config.data.path=data/tiny

It is not from the paper or the authors. The network is that of quickstart.py (five convolutions with the paper's
groups, at most a third of its kernels, initial weights for narrow layers) with 20 classes and random crops of 56 px.
No source reports an error for it. Here: 53.1% top-1 error for the center crop, 50.9% over ten views (20 classes, five
seeds, last step; docs/experiments.md).
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
    layers.conv1.stride = 2  # map sizes: input 56, conv1 28, after pooling 14, 7, 3
    layers.fc6.features = layers.fc7.features = 512
    layers.fc7.init = f'normal({math.sqrt(2 / 512)})'  # as in quickstart.py
    layers.fc8.init = 'normal(0.01)'  # with 0.05 the first updates are too large: ReLUs of earlier layers die
    config.model.num_classes = 20
    config.optim.stages = ((0, 1.0, 1.0, ()), (10, 0.1, 0.1, ()), (13, 0.01, 0.01, ()))
    return config
