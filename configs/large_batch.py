"""The paper's network with large batches: recipes of NVIDIA's Caffe, by one of the authors of LARS.

    alexnet_jax train --config=large_batch:4096 --workdir=runs/large --config.data.path=DIR

The argument is the batch size, 1024, 4096, 8192, 16384 or 32768, or 1024-sgd, without LARS. All train for 100 epochs
and multiply the learning rate by (1 - progress)^2. If memory is short, --config.grad_accum_steps=8 computes the same
update in eight microbatches.

Sources: You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks" 2017 (LARS). Learning rate, warm-up,
clipping and decay are those of a solver file of `borisgin/nvcaffe`:

    1024   bvlc_alexnet/solver_augment.prototxt   LARS, rate 2
    4096   bvlc_alexnet/solver.prototxt           LARS, rate 10, from 1 over 1,250 updates
    8192   bvlc_alexnet/solver_8K.prototxt        LARC (clipped), rate 10
    16384  bvlc_alexnet/solver_16K.prototxt       LARC (clipped), rate 16
    32768  alexnet_bn/solver_32k.prototxt         LARS, rate 32, from 1 over 400 updates

`bvlc_alexnet` is this network with other initial weights. `alexnet_bn` has batch normalization instead of local
response normalization: the recipe for 32,768 was made for another network. 1024-sgd has the rate 0.02 of a comment in
the file for 4,096 and of the logs of `NVIDIA/caffe`, models/bvlc_alexnet.

Deviations from these files: initial weights of conv 3-5 are those of the authors' code (`paper.py:init=authors`), and
crops, reflections and colors those of the paper. The file for 32,768 has 4,000 updates; 100 epochs are 3,910. Versions
of their solver differ: in an early one the rate rises linearly, here with the square of the update; later ones leave
the weight decay out of LARS's denominator, which this code does only with clipping.
Reported elsewhere (top-1, center crop): 58.6% for 1024-sgd (6,400 images); the LARS paper claims batches of 8,192
without loss of accuracy for AlexNet.
Here: updates, clipping and schedule agree with NumPy, microbatches with the whole batch. It was not trained.
"""

from typing import NamedTuple

import ml_collections

import alexnet_jax

_TRAIN_IMAGES = 1_281_167


class _Recipe(NamedTuple):
    learning_rate: float
    trust_coefficient: float = 0.001
    warmup_steps: int = 0  # from a rate of 1
    clip: bool = False


_RECIPES = {
    '1024-sgd': _Recipe(0.02, trust_coefficient=0.0),
    '1024': _Recipe(2.0),
    '4096': _Recipe(10.0, warmup_steps=1250),
    '8192': _Recipe(10.0, clip=True),
    '16384': _Recipe(16.0, clip=True),
    '32768': _Recipe(32.0, warmup_steps=400),
}


def get_config(arg: str = '4096') -> ml_collections.ConfigDict:
    if arg not in _RECIPES:
        raise ValueError(f'unknown variant {arg!r}; expected a batch of {", ".join(_RECIPES)}.')
    recipe = _RECIPES[arg]
    config = alexnet_jax.get_config('paper:init=authors')
    config.batch_size = int(arg.removesuffix('-sgd'))
    config.num_epochs = 100.0
    config.optim.schedule = 'poly'
    config.optim.learning_rate = recipe.learning_rate
    config.optim.trust_coefficient = recipe.trust_coefficient
    config.optim.trust_clip = recipe.clip
    config.optim.bias_decay = config.optim.weight_decay  # their files have no `decay_mult`
    if recipe.warmup_steps:
        config.optim.warmup_epochs = recipe.warmup_steps * config.batch_size / _TRAIN_IMAGES
        config.optim.warmup_start = 1 / recipe.learning_rate
    return config
