"""The one-GPU network that section 3.2 compares with: half the kernels in each convolutional layer but the last.

Source: footnote 2 of the paper; `layers-145-half.cfg` of the authors' release. 59,798,312 parameters; conv 3 reads
all of conv 2's 128 maps, and there is nothing to split.

    alexnet_jax train --config=configs/one_gpu.py --workdir=runs/one_gpu --config.data.path=DIR

The paper: 1.7 points of top-1 and 1.2 of top-5 error worse than two GPUs. The authors' log (ILSVRC-2010 test set, ten
views, their net 145): 39.17% top-1 and 18.23% top-5 error against 37.47% and 17.00%.
Here: parameters, shapes and products are counted; it was not trained.

Argument: init=authors, as for paper.py.
"""

import os
import runpy

import ml_collections

from alexnet_jax.experiments import ablations

_PAPER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'paper.py')


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    return ablations.with_changes(runpy.run_path(_PAPER)['get_config'](arg), ablations.ONE_GPU)
