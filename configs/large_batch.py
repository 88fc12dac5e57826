"""The paper's network in large batches: the rate grows with the batch, warm-up, LARS.

Sources: linear scaling and warm-up, Goyal et al. 2017; layer-wise rates (LARS), You, Gitman and Ginsburg 2017.

    python -m alexnet_jax.main --config=configs/large_batch.py:4096 --workdir=runs/large --config.data.path=DIR

The argument is the batch, a multiple of 128; --config.accumulate=8 computes it in eight parts where memory is short,
with the same update. Weights of conv 3-5 are drawn as in the authors' code (`paper.py:init=authors`).
Reported elsewhere (top-1, centre crop): LARS's paper claims batches of 8,192 without loss of accuracy for AlexNet.
Here: the update, the warm-up and the parts are held against optax and against the whole batch; it was not trained.
"""

import os
import runpy

import ml_collections

_PAPER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'paper.py')


def get_config(arg: str = '4096') -> ml_collections.ConfigDict:
    if not arg.isdigit() or int(arg) < 128 or int(arg) % 128:
        raise ValueError(f'configs/large_batch.py has no variant {arg!r}; expected a multiple of 128, such as 4096.')
    config = runpy.run_path(_PAPER)['get_config']('init=authors')
    config.batch_size = int(arg)
    config.optim.learning_rate = 0.01 * config.batch_size / 128  # linear scaling
    config.optim.warmup_epochs = 5.0
    config.optim.trust = 0.001
    return config
