"""A small AlexNet for the 1,797 handwritten digits of scikit-learn, enlarged from 8 to 32 px.

    alexnet_jax train --config=quickstart --workdir=runs/quickstart --cpu_devices=2

With two devices, each computes one tower. 1,437 images are for training and 360 for validation. Images are not
reflected, because a mirrored digit is not a digit.
"""

import math

import ml_collections

import alexnet_jax


def he(inputs: int) -> float:
    """Returns the standard deviation that preserves the scale of activations in ReLU layers (He et al. 2015).

    The paper's 0.01 suits its wide layers; these layers are an order of magnitude narrower.
    """
    return math.sqrt(2 / inputs)


def get_config() -> ml_collections.ConfigDict:
    config = alexnet_jax.get_config('paper')
    config.batch_size = 64
    config.num_epochs = 20.0
    config.log_every_steps = 25
    config.data.path = 'digits'
    config.data.image_size = 28
    config.data.reflect = False
    layers = config.model.layers
    for name, features, inputs in (
        ('conv1', 32, 5 * 5 * 3),
        ('conv2', 64, 5 * 5 * 16),
        ('conv3', 96, 3 * 3 * 64),
        ('conv4', 96, 3 * 3 * 48),
        ('conv5', 64, 3 * 3 * 48),
        ('fc6', 256, 3 * 3 * 64),
        ('fc7', 256, 256),
    ):
        layers[name].update(features=features, init=f'normal({he(inputs)})', bias=0.0)
    # The scale of the pixels is about 64.
    layers.conv1.update(kernel=5, stride=1, padding=(2, 2), init=f'normal({he(5 * 5 * 3) / 64})')
    layers.fc8.init = 'normal(0.05)'
    config.model.num_classes = 10
    config.optim.schedule = 'epochs'
    config.optim.stages = ((0, 1.0, 1.0, ()), (14, 0.1, 0.1, ()))
    return config
