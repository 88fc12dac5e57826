"""A later training recipe for any network: warm-up and cosine, label smoothing, mixup, an average of the parameters.

    alexnet_jax train --config=modern --workdir=runs/modern --config.data.path=DIR
    alexnet_jax train --config=modern:tiny_imagenet --workdir=runs/tiny_modern --config.data.path=data/tiny

The argument is the config of the network, by default `paper:init=authors`, trained for 120 epochs. Everything but the
recipe is that config's own: also the batch size, the learning rate and the momentum.

Sources: the best published results of AlexNet (`osmr/imgclsmob`: 61.93% top-1 accuracy for the center crop, without
groups) used a cosine over 120 epochs, a weight decay of 1e-4, and optionally label smoothing and mixup. Goyal et al.
2017: warm-up. Polyak and Juditsky 1992: averaging. No source reports an error for this recipe with the grouped network;
its best published top-1 accuracy is 58.6% (center crop, `NVIDIA/caffe`). Here: not trained on ImageNet.
"""

import ml_collections

import alexnet_jax
from alexnet_jax.experiments.ablations import MODERN, with_changes


def get_config(arg: str = 'paper:init=authors') -> ml_collections.ConfigDict:
    """Returns the config named by `arg`, with the recipe."""
    config = alexnet_jax.get_config(arg)
    if arg.startswith('paper'):
        config.num_epochs = 120.0
    return with_changes(config, MODERN)
