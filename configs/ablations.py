"""The paper's network with one change, as compared in the paper or in the authors' release.

    alexnet_jax train --config=ablations:one_gpu --workdir=runs/one_gpu --config.data.path=DIR

The argument is one of the following variants. `,init=authors` may follow (see paper.py): `one_gpu,init=authors`.

no_normalization: no response normalization. Source: section 3.3; `layers-148.cfg` of the authors' release, which
  removes both normalization layers of net 145. Paper: top-1 error 1.4 and top-5 error 1.2 percentage points higher.
  Authors' log: 42.03% top-1 and 19.36% top-5 error against 40.66% and 18.21%.
non_overlapping: 2x2 pooling windows with stride 2. Source: section 3.4; `layers-147.cfg`, which removes one pixel of
  padding from conv 2 and conv 5, so that the maps stay 13x13 and 6x6 and the number of parameters does not change.
  Paper: 0.4 and 0.3 points higher. Authors' log: 41.06% and 18.51% against 40.66% and 18.21%.
one_gpu: half the kernels in each convolutional layer except the last; no towers. Source: section 3.2 and its
  footnote 2; `layers-145-half.cfg`. 59,798,312 parameters. Paper: 1.7 and 1.2 points higher. Authors' log (ILSVRC-2010
  test set): 39.17% and 18.23% against 37.47% and 17.00%.
no_communication: two towers that do not communicate before the classifier; on two devices the forward pass
  communicates once. Source: net 150. The paper does not report its error and calls the connectivity pattern a
  choice (section 3.2). Per tower, conv 2 has 160 maps, fc 6 4096 units and fc 7 2048 units; 60,714,408 parameters.
  Authors' log: 41.83% and 19.33% against 40.66% and 18.21%.

Unless stated otherwise, the logs state errors over ten views on the ILSVRC-2012 validation set, compared with net 145.
Here: parameters, shapes, FLOPs and collectives are tested; no variant was trained at this size.
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
        raise ValueError(f'unknown variant {name!r}; expected one of {", ".join(_CHANGES)}.')
    return ablations.with_changes(alexnet_jax.get_config(f'paper:{init}' if init else 'paper'), _CHANGES[name])
