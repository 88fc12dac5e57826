"""An example of the Python API with in-memory data: no flags, and no files except a checkpoint and two plots."""

import sys

import jax
import numpy as np

import alexnet_jax
from alexnet_jax.experiments import figures, plots


def main(folder: str) -> None:
    # A variant: tanh after conv2.
    config = alexnet_jax.get_config('quickstart')
    config.model.layers.conv2.post = 'tanh pool'

    # Arrays: bright and dark squares.
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 128)
    images = rng.integers(0, 128, (128, 32, 32, 3), np.uint8) + np.uint8(127 * labels)[:, None, None, None]
    config.model.num_classes, config.mesh.tower = 2, 1
    data = alexnet_jax.in_memory({'train': {'image': images, 'label': labels}}, ['dark', 'bright'])

    # Shapes of the parameters and of the logits.
    setup = alexnet_jax.build(config, data)
    params = alexnet_jax.init_params(setup.network, jax.random.key(0), image_size=28)
    print('parameters', {name: layer['kernel'].shape for name, layer in params.items()})
    x = np.zeros((2, 28, 28, 3), np.float32)
    logits = setup.network.apply({'params': params}, x)
    dropped = setup.network.apply({'params': params}, x, train=True, rng=jax.random.key(1))
    print('logits', logits.shape, dropped.shape)

    # A custom training loop.
    state = setup.init(jax.random.key(0))
    for step in range(50):
        rows = np.arange(64 * step, 64 * (step + 1)) % 128
        state, metrics = setup.train_step(state, {'image': images[rows], 'label': labels[rows]})
    print('loss', float(metrics['loss']), 'top-1 error', float(metrics['top1_error']))

    # A saved run; its probabilities and activations, and plots of kernels and feature maps.
    config.num_steps, config.log_every_steps = 4, 0
    alexnet_jax.train_and_evaluate(config, f'{folder}/run', dataset=data)
    checkpoint = alexnet_jax.load_checkpoint(f'{folder}/run')
    print(checkpoint)
    print('probabilities', alexnet_jax.predict(checkpoint, images[0]).shape)
    found = alexnet_jax.activations(checkpoint, images[:3], ['conv3', 'conv3.linear', 'conv2.tanh'])
    print('activations', {name: array.shape for name, array in found.items()})
    kernels = figures.kernel_pictures(checkpoint.params['conv1']['kernel'], towers=1)
    plots.save(plots.kernels(kernels), folder, 'kernels')
    plots.save(plots.maps(found['conv3'][0]), folder, 'maps')


if __name__ == '__main__':
    main(sys.argv[1])
