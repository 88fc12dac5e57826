"""The authors' released code as it ran: net 145, `layers-145.cfg` and `layer-params-145*.cfg`.

Source: the Computer History Museum's release (github.com/computerhistory/AlexNet-Source-Code).

    alexnet_jax train --config=authors_2012 --workdir=runs/authors --config.data.path=DIR

Arguments: the rates, as their training diaries tell them (the diary's "epoch N" is read as after N - 1 passes):
  schedule=2010  (the default) ILSVRC-2010, 93 epochs. Their log: test set, ten views 37.47% top-1, 17.00% top-5 error;
                 center crop 39.02% and 18.30%.
  schedule=2012  ILSVRC-2012, 91 epochs. Their log: validation set, ten views, 40.66% and 18.21%.
  schedule=170   net 170 of January 2013, which nobody had to watch: 95 epochs, ILSVRC-2012. Their log: validation set,
                 ten views, 40.53% and 18.05%; center crop 42.34% and 19.58%.

Here: forward pass, update, augmentation and ten-view test agree with numpy written from the released code's formulas
(tests/configs/test_authors.py); it was not trained.

Deviation: the images are shuffled anew on every pass, where theirs came in one order; a batch goes on into the next
pass, where theirs ended with a short one; biases' rates in the 2010 run are those of the one plan that is written out
(`run4.sh`), since the run's own are lost, and in the 2012 run their last value, all that is known; where values tie
under a pooling window the gradient is shared among them, theirs went to each.
"""

import ml_collections

import alexnet_jax

_SLOW = ('conv1', 0.001, 0.1)  # layer, factors of the rates of its weights and biases
_FROZEN = ('conv1', 0.0, 0.0)

# num_epochs, epochs with color, rows of `optim.stages`: from epoch, factors of weights' and of biases' rates, layers.
_SCHEDULES = {
    'schedule=2010': (
        93.0,
        67.0,
        (
            (0, 1.0, 1.0, ()),
            (22, 0.1, 0.1, ()),
            (50, 0.01, 0.1, ()),
            (67, 0.01, 0.1, (_SLOW,)),
            (71, 0.01, 0.1, (_FROZEN,)),
            (77, 0.001, 0.1, (_FROZEN,)),
        ),
    ),
    'schedule=2012': (  # the last value of its biases' rates is the first one
        91.0,
        66.0,
        (
            (0, 1.0, 1.0, ()),
            (24, 0.1, 1.0, ()),
            (50, 0.01, 1.0, ()),
            (66, 0.01, 1.0, (('conv1', 0.001, 1.0),)),
            (71, 0.01, 1.0, (_FROZEN,)),
            (78, 0.001, 1.0, (_FROZEN,)),
        ),
    ),
    'schedule=170': (  # four equal stages of 250^(-i/3); "about" 61 to 68, and 74
        95.0,
        64.0,
        (
            (0, 1.0, 1.0, ()),
            (23.75, 250 ** (-1 / 3), 1.0, ()),
            (47.5, 250 ** (-2 / 3), 0.1, ()),
            (71.25, 250**-1, 0.1, ()),
            (73, 250**-1, 0.1, (_FROZEN,)),
        ),
    ),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """arg: None, 'schedule=2010' (the same), 'schedule=2012' or 'schedule=170'."""
    arg = arg or 'schedule=2010'
    if arg not in _SCHEDULES:
        raise ValueError(f'configs/authors_2012.py has no variant {arg!r}; expected one of {", ".join(_SCHEDULES)}.')
    config = alexnet_jax.get_config('paper:init=authors')
    config.num_epochs, config.data.color_epochs, stages = _SCHEDULES[arg]

    config.data.all_positions = True  # 33 x 33 x 2
    config.data.draw_every = 32  # crop_chunk in convdata_jpeg.py
    config.data.mean = 'center'
    config.data.color_scale = 'std'
    config.data.color_divide = True

    layers = config.model.layers
    layers.conv1.post = 'lrn pool relu'  # normalized before the ReLU
    layers.conv2.post = 'relu lrn spatial_norm pool'
    layers.conv5.post = 'pool relu'
    config.model.lrn_alpha_over_n = True  # 2e-5 on the sum

    config.optim.bias_rate = 2.0  # epsB 0.02 beside epsW 0.01
    config.optim.schedule = 'epochs'
    config.optim.stages = stages
    return config
