"""The paper's network with large batches and LARS.

Sources: You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks" 2017 (LARS). Learning rates, decay
and number of epochs are from the third author's Caffe files (`borisgin/nvcaffe`,
`models/bvlc_alexnet/solver*.prototxt`).

    alexnet_jax train --config=large_batch:4096 --workdir=runs/large --config.data.path=DIR

The argument is the batch size: 1024, 4096, 8192 or 16384. If memory is short, --config.grad_accum_steps=8 computes the
same update in eight microbatches. Initial weights of conv 3-5 are those of the authors' code (`paper.py:init=authors`).

Deviations from these files: the learning rate rises linearly over five epochs and then decreases once per epoch; theirs
rises with the square of the step over four or five epochs and decreases at every update. Their files for 8,192 and
16,384 clip the LARS learning rates; this config does not.
Reported elsewhere (top-1, center crop): the LARS paper claims batches of 8,192 without loss of accuracy for AlexNet.
Here: update and warmup agree with NumPy, microbatches with the whole batch. It was not trained.
"""

import ml_collections

import alexnet_jax

_RATES = {'1024': 2.0, '4096': 10.0, '8192': 10.0, '16384': 16.0}  # multiplied by trust_coefficient * |w| / |gradient|
_EPOCHS = 100


def get_config(arg: str = '4096') -> ml_collections.ConfigDict:
    if arg not in _RATES:
        raise ValueError(f'unknown variant {arg!r}; expected a batch of {", ".join(_RATES)}.')
    config = alexnet_jax.get_config('paper:init=authors')
    config.batch_size = int(arg)
    config.num_epochs = float(_EPOCHS)
    config.optim.learning_rate = _RATES[arg]
    config.optim.trust_coefficient = 0.001
    config.optim.warmup_epochs = 5.0
    config.optim.schedule = 'epochs'  # (1 - progress)^2, Caffe's "poly"
    falls = [(1 - epoch / _EPOCHS) ** 2 for epoch in range(_EPOCHS)]
    config.optim.stages = tuple((float(epoch), fall, fall, ()) for epoch, fall in enumerate(falls))
    return config
