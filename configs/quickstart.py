"""A small instance of the same network on embedded real data: 1,797 handwritten digits, enlarged from 8 to 32 px.

    alexnet_jax train --config=configs/quickstart.py --workdir=runs/quickstart --cpu_devices=2

Two towers where there are two devices. 1,437 images for training, 360 for validation; no reflections (a mirrored digit
is no digit).
"""

import math
import os
import runpy

import ml_collections

_PAPER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'paper.py')


def he(inputs: int) -> float:
    """Standard deviation that keeps the scale of activations through ReLU layers (He et al. 2015).

    The paper's 0.01 suits its width; these layers are an order of magnitude narrower.
    """
    return math.sqrt(2 / inputs)


def get_config() -> ml_collections.ConfigDict:
    config = runpy.run_path(_PAPER)['get_config']()
    config.batch_size = 64
    config.num_epochs = 20.0
    config.log_every_steps = 25
    config.data.path = 'digits'
    config.data.image_size = 28
    config.data.reflect = False
    config.model.conv = (
        (32, 5, 1, (2, 2), 1, he(5 * 5 * 3) / 64, 0.0, 'relu lrn pool'),  # pixels have a scale of about 64
        (64, 5, 1, (2, 2), 2, he(5 * 5 * 16), 0.0, 'relu lrn pool'),
        (96, 3, 1, (1, 1), 1, he(3 * 3 * 64), 0.0, 'relu'),
        (96, 3, 1, (1, 1), 2, he(3 * 3 * 48), 0.0, 'relu'),
        (64, 3, 1, (1, 1), 2, he(3 * 3 * 48), 0.0, 'relu pool'),
    )
    config.model.dense = (
        (256, 1, he(3 * 3 * 64), 0.0, 'relu dropout'),
        (256, 1, he(256), 0.0, 'relu dropout'),
    )
    config.model.num_classes = 10
    config.model.classifier = (0.05, 0.0)
    config.optim.schedule = 'epochs'
    config.optim.stages = ((0, 1.0, 1.0, ()), (14, 0.1, 0.1, ()))
    return config
