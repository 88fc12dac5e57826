"""Checkpoints with random weights, made in memory, for the tests of exports."""

import math

import jax
import numpy as np

import alexnet_jax
from alexnet_jax.checkpoints import manager
from alexnet_jax.core import model
from alexnet_jax.core.architecture import ConvSpec, DenseSpec
from alexnet_jax.core.augment import Augmentation
from alexnet_jax.core.config import augmentation_from_config, model_from_config
from alexnet_jax.core.image_stats import ImageStats
from tests import helpers


def checkpoint(network, augmentation, record_size, config=None):
    """Returns a checkpoint whose units have values of about one, so that each operation changes the logits."""
    rng, size = np.random.default_rng(0), augmentation.image_size
    shapes = jax.eval_shape(lambda: model.init_params(network, jax.random.key(0), size))
    params, scale = {}, 1 / 64 if augmentation.pixel_std[0] == 1 else 1.0  # of the first layer, which reads pixels
    for name in network.layers:
        kernel, bias = (shapes[name][key].shape for key in ('kernel', 'bias'))
        std = scale * math.sqrt(2 / math.prod(kernel[:-1]))
        params[name] = {
            'kernel': std * rng.standard_normal(kernel, np.float32),
            'bias': 0.1 * rng.standard_normal(bias, np.float32),
        }
        scale = 1.0
    mean = rng.uniform(90, 140, (record_size, record_size, 3)).astype(np.float32)
    stats = ImageStats(mean, np.ones(3, np.float32), np.eye(3, dtype=np.float32))
    names = tuple(f'class {i}' for i in range(network.num_classes))
    config = config or alexnet_jax.get_config('paper')
    return manager.Checkpoint(
        0, params, network, augmentation, record_size, names, stats, manager.config_to_json(config)
    )


def of_config(name):
    """Returns a checkpoint of a whole config, such as 'paper'."""
    config = alexnet_jax.get_config(name)
    augmentation = augmentation_from_config(config.data)
    record_size = 32 if name == 'quickstart' else 256
    return checkpoint(model_from_config(config.model), augmentation, record_size, config)


def images(source, count=3):
    side = source.record_size
    return np.random.default_rng(1).integers(0, 256, (count, side, side, 3), np.uint8)


def _authors():
    """Every operation, in the order of the authors' code where it has one; groups in a dense layer; uneven windows."""
    layers = helpers.layers(
        conv1={'post': 'lrn pool relu'},
        conv2={'post': 'relu lrn spatial_norm avg_pool'},
        conv3={'post': 'tanh'},
        conv5={'post': 'pool relu dropout'},
        fc7={'groups': 2},
    )
    network = helpers.network(layers=layers, spatial_n=4, spatial_alpha=0.5, lrn_alpha_over_n=True, lrn_alpha=0.5)
    return checkpoint(network, Augmentation(image_size=36, mean='center'), 41)


def _caffe():
    network = helpers.network(norm_groups=1, lrn_k=1.0, dropout_inverted=True)
    return checkpoint(network, Augmentation(image_size=helpers.SIZE), 40)


def _torchvision():
    """A network whose tensors get torchvision's names."""
    posts = {'conv1': 'relu pool', 'conv2': 'relu pool', 'conv5': 'relu pool dropout', 'fc7': 'relu'}
    layers = helpers.layers(**{name: {'post': post} for name, post in posts.items()})
    augmentation = Augmentation(image_size=helpers.SIZE, mean='channel', pixel_std=(58.0, 57.0, 56.0))
    return checkpoint(helpers.network(layers=layers, dropout_inverted=True), augmentation, 40)


def _tiny():
    """Two layers, for tests in which the network does not matter."""
    layers = {'conv1': ConvSpec(features=4, kernel=3, stride=2, post='relu lrn pool'), 'fc2': DenseSpec()}
    return checkpoint(model.AlexNet(layers=layers, num_classes=3), Augmentation(image_size=12), 16)


SMALL = {'authors': _authors, 'caffe': _caffe, 'torchvision': _torchvision, 'tiny': _tiny}
