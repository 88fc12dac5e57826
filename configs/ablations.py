"""The paper's network with one thing changed, as the paper or the authors' release compares it.

    alexnet_jax train --config=ablations:one_gpu --workdir=runs/one_gpu --config.data.path=DIR

The argument is one of these; after a comma `init=authors` may follow, as for paper.py: `one_gpu,init=authors`.

no_normalization: no response normalization. Section 3.3; `layers-148.cfg` of the authors' release, which drops both of
  net 145's normalizations. The paper: 1.4 points of top-1 and 1.2 of top-5 error worse. The authors' log: 42.03% top-1
  and 19.36% top-5 error against 40.66% and 18.21%.
non_overlapping: pooling windows of 2x2, stride 2. Section 3.4; `layers-147.cfg`, which takes a pixel of padding from
  conv 2 and conv 5 so that the maps stay 13x13 and 6x6, and the number of parameters what it was. The paper: 0.4 and
  0.3 points worse. The authors' log: 41.06% and 18.51% against 40.66% and 18.21%.
one_gpu: half the kernels in each convolutional layer but the last, and nothing to split. Section 3.2 and its footnote
  2; `layers-145-half.cfg`; 59,798,312 parameters. The paper: 1.7 and 1.2 points worse. The authors' log (ILSVRC-2010
  test set): 39.17% and 18.23% against 37.47% and 17.00%.
no_communication: two towers that do not talk before the classifier; over two devices the forward pass communicates
  once. Not in the paper, which calls the pattern a choice (section 3.2). Net 150: conv 2 widened to 160 maps a tower,
  fc 6 to 4096 units a tower, fc 7 2048; 60,714,408 parameters. The authors' log: 41.83% and 19.33% against 40.66% and
  18.21%.

The logs are of ten views on the ILSVRC-2012 validation set, where nothing else is said, and against net 145.
Here: parameters, shapes, products and collectives are counted; none was trained at this size.
"""

import ml_collections

import alexnet_jax
from alexnet_jax.experiments import ablations

_CHANGES = {
    'no_normalization': ablations.NO_NORMALIZATION,
    'non_overlapping': ablations.NON_OVERLAPPING,
    'one_gpu': ablations.ONE_GPU,
    'no_communication': ablations.NO_COMMUNICATION,
}


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    name, _, init = arg.partition(',')
    if name not in _CHANGES:
        raise ValueError(f'configs/ablations.py has no variant {name!r}; expected one of {", ".join(_CHANGES)}.')
    return ablations.with_changes(alexnet_jax.get_config(f'paper:{init}' if init else 'paper'), _CHANGES[name])
