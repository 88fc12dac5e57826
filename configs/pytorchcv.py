"""The AlexNet of pytorchcv: `pytorchcv/models/alexnet.py` of osmr/imgclsmob.

    alexnet_jax train --config=pytorchcv --workdir=runs/pytorchcv --config.data.path=DIR

To convert weights trained with pytorchcv:

    alexnet_jax convert --config=pytorchcv --input=alexnet-1664-2768cdb3.pth.zip --output=runs/pytorchcv

The argument selects one of its two networks:
  net=a  (default) `alexnet`: the paper's widths without groups, and normalization after the ReLU of layers 1 and 2
         (k = 2, alpha / n, across all maps). 62,378,344 parameters. Conv 1 has no padding: its maps are 54x54.
  net=b  `alexnetb`: torchvision's network with dropout after fc 6 and fc 7. 61,100,840 parameters.

Input: 224 px of 256, ImageNet's mean color and standard deviation, as in torchvision. Initial weights and all settings
of training are torchvision's. In the source, initial weights are from Kaiming's uniform distribution, and the published
weights were trained in MXNet with another recipe (configs/modern.py) and converted.

Reported by the source, ILSVRC-2012 validation set, center crop: net=a 38.50% top-1 and 16.64% top-5 error, net=b 39.74%
and 17.47%. (For the MXNet originals it reports 38.07% and 16.10%, 39.30% and 17.05%.) Here: the outputs agree with
PyTorch (tests/convert/test_convert.py). It was not trained.
"""

import ml_collections

import alexnet_jax


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config. arg: 'net=a' (default) or 'net=b'."""
    if arg not in (None, 'net=a', 'net=b'):
        raise ValueError(f"unknown variant {arg!r}; expected 'net=a' or 'net=b'.")
    config = alexnet_jax.get_config('torchvision')
    layers = config.model.layers
    layers.conv5.post = 'relu pool'
    layers.fc6.post = layers.fc7.post = 'relu dropout'
    if arg == 'net=b':
        return config
    layers.conv1.update(features=96, padding=(0, 0), post='relu lrn pool')
    layers.conv2.update(features=256, post='relu lrn pool')
    layers.conv4.features = 384
    config.model.lrn_alpha_over_n = True
    config.model.norm_groups = 1
    return config
