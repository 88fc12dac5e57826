"""The authors' released code as they ran it: net 145, `layers-145.cfg` and `layer-params-145*.cfg`.

Source: the Computer History Museum's release (github.com/computerhistory/AlexNet-Source-Code).

    alexnet_jax train --config=authors_2012 --workdir=runs/authors --config.data.path=DIR

The argument selects the schedule of one training log ("epoch N" of a log is taken as after N - 1 epochs):
  schedule=2010  (default) ILSVRC-2010, 93 epochs. Their log: test set, ten views, 37.47% top-1 and 17.00% top-5 error;
                 center crop 39.02% and 18.30%.
  schedule=2012  ILSVRC-2012, 91 epochs. Their log: validation set, ten views, 40.66% and 18.21%.
  schedule=170   net 170 of January 2013, which ran without manual changes: ILSVRC-2012, 95 epochs. Their log:
                 validation set, ten views, 40.53% and 18.05%; center crop 42.34% and 19.58%.

Here: forward pass, update, augmentation and ten-view test agree with a NumPy implementation of the released code's
formulas (tests/configs/test_authors.py). It was trained for 3,000 updates on 20 classes (docs/initialization.md), not
on ImageNet.

Deviations:
- Images are reshuffled in every epoch; the authors used a fixed order.
- A batch may span two epochs; in the authors' code, the last batch of an epoch was smaller.
- The bias learning rates of the 2010 run are unknown. Those of `run4.sh`, the only complete schedule, are used. For the
  2012 run only the last bias learning rate is known; it is used for the whole run.
- The gradient of max pooling is divided among equal maxima; in the authors' code, each receives the whole gradient.
"""

import ml_collections

import alexnet_jax

_SLOW = ('conv1', 0.001, 0.1)  # (layer, factor of its weight rate, factor of its bias rate)
_FROZEN = ('conv1', 0.0, 0.0)

# (num_epochs, color_epochs, optim.stages). A stage is (first epoch, factor of weight rates, of bias rates, layers).
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
    'schedule=2012': (  # only the last bias rate is known, which equals the initial one
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
    'schedule=170': (  # four equal stages, 250^(-i/3); "about": color until epoch 61 to 68, conv 1 frozen from epoch 74
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
    """Returns the config. arg: 'schedule=2010' (default), 'schedule=2012' or 'schedule=170'."""
    arg = arg or 'schedule=2010'
    if arg not in _SCHEDULES:
        raise ValueError(f'unknown variant {arg!r}; expected one of {", ".join(_SCHEDULES)}.')
    config = alexnet_jax.get_config('paper:init=authors')
    config.num_epochs, config.data.color_epochs, stages = _SCHEDULES[arg]

    config.data.all_positions = True  # 33 x 33 positions x 2 reflections
    config.data.draw_every = 32  # crop_chunk in convdata_jpeg.py
    config.data.mean = 'center'
    config.data.color_scale = 'std'
    config.data.color_divide = True

    layers = config.model.layers
    layers.conv1.post = 'lrn pool relu'  # normalization comes before the ReLU
    layers.conv2.post = 'relu lrn spatial_norm pool'
    layers.conv5.post = 'pool relu'
    config.model.lrn_alpha_over_n = True  # the sum is multiplied by 2e-5

    config.optim.bias_rate = 2.0  # epsB=0.02, epsW=0.01
    config.optim.schedule = 'epochs'
    config.optim.stages = stages
    return config
