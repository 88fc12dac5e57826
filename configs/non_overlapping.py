"""The paper's network with pooling windows of 2x2, stride 2, which do not overlap.

Source: section 3.4; `layers-147.cfg` of the authors' release, which takes a pixel of padding from conv 2 and conv 5 so
that the maps stay 13x13 and 6x6, and the number of parameters what it was.

    alexnet_jax train --config=configs/non_overlapping.py --workdir=runs/non_overlapping --config.data.path=DIR

The paper: 0.4 points of top-1 and 0.3 of top-5 error worse. The authors' log (ILSVRC-2012 validation set, ten views,
their net 145): 41.06% top-1 and 18.51% top-5 error against 40.66% and 18.21%.
Here: parameters, shapes and products are counted; it was not trained.

Argument: init=authors, as for paper.py.
"""

import os
import runpy

import ml_collections

from alexnet_jax.experiments import ablations

_PAPER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'paper.py')


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    return ablations.with_changes(runpy.run_path(_PAPER)['get_config'](arg), ablations.NON_OVERLAPPING)
