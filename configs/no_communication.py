"""Two towers that do not talk before the classifier. Not in the paper, which calls the pattern a choice (section 3.2).

Source: net 150 of the authors' release: conv 2 widened to 160 maps a tower, fc 6 to 4096 units a tower, fc 7 2048;
60,714,408 parameters. Over two devices the forward pass communicates once.

    alexnet_jax train --config=configs/no_communication.py --workdir=runs/apart --config.data.path=DIR

The authors' log (ILSVRC-2012 validation set, ten views, their net 145): 41.83% top-1 and 19.33% top-5 error against
40.66% and 18.21%.
Here: parameters, shapes, products and collectives are counted; it was not trained.

Argument: init=authors, as for paper.py.
"""

import os
import runpy

import ml_collections

from alexnet_jax.experiments import ablations

_PAPER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'paper.py')


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    return ablations.with_changes(runpy.run_path(_PAPER)['get_config'](arg), ablations.NO_COMMUNICATION)
