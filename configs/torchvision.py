"""torchvision's AlexNet: `torchvision/models/alexnet.py`, trained by `references/classification/train.py --lr 1e-2`.

    alexnet_jax train --config=torchvision --workdir=runs/torchvision --config.data.path=DIR

To convert weights trained with PyTorch:

    alexnet_jax convert --input=alexnet.pth --output=runs/torchvision

This is the one-tower network of "One weird trick" (Krizhevsky 2014) with other widths: 61,100,840 parameters, no
groups, no normalization. Other differences from the paper: two pixels of padding in conv 1; dropout before the two
hidden dense layers instead of after them, scaled in training; initial values from U(-b, b) with b = inputs^-1/2; pixels
divided by their standard deviation; crops of 8 to 100% of the area; the update of torch.optim.SGD, which applies the
learning rate outside the velocity; weight decay of biases.

Reported by the source, ILSVRC-2012 validation set, center crop: 56.52% top-1 and 79.07% top-5 accuracy (43.48% and
20.93% error). Here: logits, gradients and ten updates agree with PyTorch (tests/core/test_oracle.py). It was not
trained.

Deviations: crops are taken from the prepared squares of 256 px, in torchvision from the whole image. The mean color is
that of the training data, in torchvision fixed: 123.7, 116.3, 103.5.
"""

import ml_collections

import alexnet_jax


def get_config() -> ml_collections.ConfigDict:
    config = alexnet_jax.get_config('paper')
    config.batch_size = 256  # 8 devices with 32 each
    config.num_epochs = 90.0

    config.data.crop_area = (0.08, 1.0)
    config.data.mean = 'channel'
    config.data.pixel_std = (58.395, 57.12, 57.375)  # 255 * (0.229, 0.224, 0.225)
    config.data.color_std = 0.0

    layers = config.model.layers
    for layer in layers.values():
        layer.update(groups=1, init='fan_in', bias=0.0)
    layers.conv1.update(features=64, padding=(2, 2), post='relu pool')
    layers.conv2.update(features=192, post='relu pool')
    layers.conv4.features = 256
    layers.conv5.post = 'relu pool dropout'
    layers.fc7.post = 'relu'
    config.model.dropout_inverted = True

    config.mesh.tower = 1

    config.optim.rate_in_velocity = False
    config.optim.weight_decay = 1e-4
    config.optim.bias_decay = 1e-4
    config.optim.schedule = 'epochs'
    config.optim.stages = ((0, 1.0, 1.0, ()), (30, 0.1, 0.1, ()), (60, 0.01, 0.01, ()))
    return config
