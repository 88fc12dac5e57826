"""The paper's network without response normalization.

Source: section 3.3; `layers-148.cfg` of the authors' release, which drops both of net 145's normalizations.

    alexnet_jax train --config=configs/no_normalization.py --workdir=runs/no_norm --config.data.path=DIR

The paper: 1.4 points of top-1 and 1.2 of top-5 error worse. The authors' log (ILSVRC-2012 validation set, ten views,
their net 145): 42.03% top-1 and 19.36% top-5 error against 40.66% and 18.21%.
Here: parameters, shapes and products are counted; it was not trained.

Argument: init=authors, as for paper.py.
"""

import os
import runpy

import ml_collections

from alexnet_jax.experiments import ablations

_PAPER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'paper.py')


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    return ablations.with_changes(runpy.run_path(_PAPER)['get_config'](arg), ablations.NO_NORMALIZATION)
