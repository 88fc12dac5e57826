"""Two convolutions and two dense layers: most of a run is the start of Python and JAX, and a fault takes seconds."""

from tests import helpers


def get_config():
    config = helpers.resume_config(num_steps=60)
    layers = config.model.layers
    for name in ('conv3', 'conv4', 'conv5', 'fc7'):
        del layers[name]
    layers.conv1.stride = 2
    return config
