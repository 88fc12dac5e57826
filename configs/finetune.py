"""Trains on a few thousand images: fine-tunes a checkpoint or, as `finetune:scratch`, trains the paper's network.

    alexnet_jax finetune --input=PICTURES --output=runs/mine --config=finetune --init_from=runs/torchvision

It can also be used with `train`:

    alexnet_jax train --config=finetune --workdir=runs/mine --config.data.path=DIR

The defaults are for small datasets and not from a paper: batches of 64, 30 epochs, a tenth of the paper's learning
rate, which drops twice. From scratch: 60 epochs and the full learning rate. Without --config, the `finetune` command
uses batches and epochs that follow the number of images. The command trains the new classifier with ten times the
learning rate. Initial weights of conv 3-5 are those of the authors' code.
No source reports an error for it. Here: a narrow network was fine-tuned on 500 small images (top-1 error over ten views
in docs/own_pictures.md); the paper's network was not.
"""

import ml_collections

import alexnet_jax


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config. arg: None, or 'scratch'."""
    if arg not in (None, 'scratch'):
        raise ValueError(f"unknown variant {arg!r}; expected 'scratch' or none.")
    config = alexnet_jax.get_config('paper:init=authors')
    longer = 2 if arg == 'scratch' else 1
    config.batch_size = 64
    config.num_epochs = 30.0 * longer
    config.log_every_steps = 0
    config.mesh.tower = 1
    config.optim.learning_rate = 0.01 if arg == 'scratch' else 0.001
    config.optim.schedule = 'epochs'
    config.optim.stages = tuple(
        (epoch * longer, factor, factor, ()) for epoch, factor in ((0, 1.0), (20, 0.1), (26, 0.01))
    )
    return config
