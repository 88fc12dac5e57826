"""A few thousand pictures of one's own: the paper's network, tuned from a checkpoint or, with `:scratch`, from scratch.

    alexnet_jax finetune --input=PICTURES --output=runs/mine --init_from=runs/torchvision

It is a config like any other:

    alexnet_jax train --config=finetune --workdir=runs/mine --config.data.path=DIR

Defaults that suit small sets, of nobody's paper: 30 passes in batches of 64, the rate a tenth of training's (from
scratch all of it, and 60 passes) and falling twice; `finetune` lets the new classifier learn ten times as fast.
Weights of conv 3-5 as in the authors' code. Nobody reports an error for it.
Here: a narrow network was tuned on 500 small pictures (docs/own_pictures.md has its top-1 error over ten views); the
paper's network was not.
"""

import ml_collections

import alexnet_jax


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """arg: None, or 'scratch'."""
    if arg not in (None, 'scratch'):
        raise ValueError(f"configs/finetune.py has no variant {arg!r}; expected 'scratch' or none.")
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
