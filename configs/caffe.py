"""Caffe's AlexNet: `models/bvlc_alexnet` of BVLC/caffe, `train_val.prototxt` and `solver.prototxt`.

    alexnet_jax train --config=caffe --workdir=runs/caffe --config.data.path=DIR

To convert weights trained with Caffe:

    alexnet_jax convert --input=bvlc_alexnet.caffemodel --mean=imagenet_mean.binaryproto --output=runs/bvlc

The network has the paper's widths and groups, but a single tower, so normalization extends over all maps. Other
differences from the paper: normalization with k = 1 and alpha / n, crops of 227 px without padding, biases of 0.1 ("1
gave flat loss"), smaller initial weights in fc 6 and fc 7, no color augmentation, dropout scaled in training.

Reported by the source, ILSVRC-2012 validation set, center crop: 57.1% top-1 and 80.2% top-5 accuracy (42.9% and 19.8%
error). Here: logits, gradients and ten updates agree with PyTorch (tests/core/test_oracle.py). It was not trained.

`--config=caffe:net=caffenet` is `models/bvlc_reference_caffenet`, which pools before it normalizes and has biases of 1.
Reported: 57.4% top-1 and 80.4% top-5 accuracy (42.6% and 19.6% error).

Deviation: images are prepared as in the paper (shorter side 256, central square); Caffe's script resizes them to
256x256, ignoring the aspect ratio.
"""

import ml_collections

import alexnet_jax

_IMAGES, _BATCH = 1_281_167, 256


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config. arg: 'net=alexnet' (default) or 'net=caffenet'."""
    if arg not in (None, 'net=alexnet', 'net=caffenet'):
        raise ValueError(f"unknown variant {arg!r}; expected 'net=alexnet' or 'net=caffenet'.")
    caffenet = arg == 'net=caffenet'
    config = alexnet_jax.get_config('paper')
    config.batch_size = _BATCH
    config.num_epochs = 450_000 * _BATCH / _IMAGES  # max_iter

    config.data.image_size = 227
    config.data.all_positions = True
    config.data.color_std = 0.0

    layers = config.model.layers
    layers.conv1.padding = (0, 0)
    for name in ('conv2', 'conv4', 'conv5', 'fc6', 'fc7'):
        layers[name].bias = 1.0 if caffenet else 0.1
    if caffenet:
        layers.conv1.post = layers.conv2.post = 'relu pool lrn'
    layers.fc6.init = layers.fc7.init = 'normal(0.005)'
    config.model.lrn_k = 1.0
    config.model.lrn_alpha_over_n = True
    config.model.norm_groups = 1
    config.model.dropout_inverted = True

    config.mesh.tower = 1

    config.optim.bias_rate = 2.0  # lr_mult
    config.optim.schedule = 'epochs'
    config.optim.stages = tuple((i * 100_000 * _BATCH / _IMAGES, 0.1**i, 0.1**i, ()) for i in range(5))  # stepsize
    return config
