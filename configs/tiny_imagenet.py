"""The paper's network, narrow, for 64 px images: a base for experiments on a machine without a GPU.

    alexnet_jax prepare --input=tiny_imagenet_20 --output=data/tiny --size=64 --format=raw
    alexnet_jax train --config=configs/tiny_imagenet.py --workdir=runs/tiny --config.data.path=data/tiny

Not of the paper or the authors: the network of quickstart.py (five convolutions in the paper's groups, a third of its
kernels and fewer, weights as wide as such narrow layers need), 20 classes, random windows of 56 px. Nobody reports an
error for it.
Here: 53.1% top-1 error from the center crop, 50.9% over ten views (20 classes, five seeds, last step;
docs/experiments.md).
"""

import os
import runpy

import ml_collections

_QUICKSTART = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'quickstart.py')


def get_config() -> ml_collections.ConfigDict:
    quickstart = runpy.run_path(_QUICKSTART)
    config, he = quickstart['get_config'](), quickstart['he']
    config.batch_size = 128
    config.num_epochs = 15.0
    config.log_every_steps = 0
    config.data.path = ''
    config.data.image_size = 56
    config.data.reflect = True
    first, *rest = config.model.conv
    config.model.conv = ((*first[:2], 2, *first[3:]), *rest)  # a stride of 2: 56 - 28, pooled 14 - 7 - 3
    config.model.dense = tuple((512, 1, he(n), 0.0, 'relu dropout') for n in (3 * 3 * 64, 512))
    config.model.classifier = (0.01, 0.0)  # with 0.05 the first updates are so large that the ReLUs below die
    config.model.num_classes = 20
    config.optim.stages = ((0, 1.0, 1.0, ()), (10, 0.1, 0.1, ()), (13, 0.01, 0.01, ()))
    return config
