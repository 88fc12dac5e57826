"""A tiny network with groups, normalization and truncated pooling windows, and its passes as NumPy loops."""

import jax
import numpy as np

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.core.architecture import ConvSpec, DenseSpec
from alexnet_jax.core.augment import Augmentation
from alexnet_jax.core.image_stats import ImageStats
from alexnet_jax.core.model import AlexNet

SIDE, RECORD = 19, 21
INIT = 'normal(0.3)'
LAYERS = {
    'conv1': ConvSpec(features=4, kernel=3, stride=2, padding=(0, 1), init=INIT, bias=0.1, post='relu lrn pool'),
    'conv2': ConvSpec(features=6, kernel=3, padding=(1, 1), groups=2, init=INIT, bias=0.1, post='relu pool'),
    'fc3': DenseSpec(features=8, init=INIT, bias=0.1, post='relu dropout'),
    'fc4': DenseSpec(init=INIT),
}  # maps of 9, 4 (pooled), 4 and 2 (pooled, last window truncated) pixels


def checkpoint(pixel_std=(60.0, 50.0, 40.0), **changes):
    """Returns an untrained checkpoint with random biases, in float64 where jax.enable_x64 is on."""
    dtype = 'float64' if jax.config.jax_enable_x64 else 'float32'
    options = {'layers': LAYERS, 'num_classes': 5, 'lrn_alpha': 0.05, 'dropout_rate': 0.25, 'dtype': dtype, **changes}
    network, rng = AlexNet(**options), np.random.default_rng(0)
    shapes = {'conv1': (3, 3, 3, 4), 'conv2': (3, 3, 2, 6), 'fc3': (24, 8), 'fc4': (8, 5)}
    params = {
        name: {'kernel': 0.5 * rng.standard_normal(shape), 'bias': 0.3 * rng.standard_normal(shape[-1])}
        for name, shape in shapes.items()
    }
    mean_image = rng.uniform(90, 150, (RECORD, RECORD, 3)).astype(np.float32)
    stats = ImageStats(mean_image, np.ones(3, np.float32), np.eye(3, dtype=np.float32))
    augmentation = Augmentation(image_size=SIDE, pixel_std=pixel_std)
    return Checkpoint(0, params, network, augmentation, RECORD, tuple('abcde'), stats, {})


def images(count, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (count, RECORD, RECORD, 3), np.uint8)


def network_input(checkpoint, image):
    """Returns the mean-subtracted center crop of one image, [SIDE, SIDE, 3]."""
    crop = (image.astype(np.float64) - checkpoint.image_stats.mean_image)[1:20, 1:20]
    return crop / checkpoint.augmentation.pixel_std


def operations(checkpoint):
    return [f'{layer}.{op}' for layer, spec in checkpoint.network.layers.items() for op in ('linear', *spec.ops)]


def forward(checkpoint, x, last, changed=None):
    """Returns the input of each operation up to `last` for one image, and the output, by NumPy loops.

    changed: {name: output to use instead of an operation's}.
    """
    inputs = {}
    for name in operations(checkpoint):
        inputs[name] = x
        x = _apply(checkpoint, name, x) if name not in (changed or {}) else changed[name]
        if name == last:
            return inputs, x
    raise KeyError(last)


def backward(checkpoint, inputs, signal, rules):
    """Takes a signal from the output of the last operation of `inputs` to the pixels.

    rules: {'relu': 'gradient', 'guided' or 'deconvnet', 'lrn': 'gradient' or 'unchanged'}.
    """
    for name in reversed(inputs):
        signal = reverse(checkpoint, name, inputs[name], signal, rules)
    return signal / checkpoint.augmentation.pixel_std


def _windows(network, side):
    count = 1 + -(-(side - network.pool_window) // network.pool_stride)
    starts = [i * network.pool_stride for i in range(count)]
    return [slice(start, min(side, start + network.pool_window)) for start in starts]


def _normalizer(network, x):
    """Returns k + alpha * (sum of x^2 over the window) for each value."""
    halves = np.split(x, network.norm_groups, axis=2)
    total = [
        np.stack([(half[:, :, max(0, i - 2) : i + 3] ** 2).sum(2) for i in range(half.shape[2])], axis=2)
        for half in halves
    ]
    return network.lrn_k + network.lrn_alpha * np.concatenate(total, axis=2)


def _linear_parts(checkpoint, layer, x):
    """Yields (channels of the input, channels of the output, kernel, bias) of each group."""
    spec, weights = checkpoint.network.layers[layer], checkpoint.params[layer]
    outputs = weights['bias'].size
    for i in range(spec.groups):
        ins, outs = (slice(i * n // spec.groups, (i + 1) * n // spec.groups) for n in (x.shape[-1], outputs))
        yield ins, outs, weights['kernel'][..., outs], weights['bias'][outs]


def _apply(checkpoint, name, x):
    network, (layer, op) = checkpoint.network, name.split('.')
    if op == 'relu':
        return np.maximum(x, 0)
    if op == 'dropout':
        return x * (1 - network.dropout_rate)
    if op == 'lrn':
        return x * _normalizer(network, x) ** -network.lrn_beta
    if op == 'pool':
        windows = _windows(network, len(x))
        return np.stack([np.stack([x[rows, columns].max((0, 1)) for columns in windows]) for rows in windows])
    spec = network.layers[layer]
    if isinstance(spec, DenseSpec):
        return x.reshape(-1) @ checkpoint.params[layer]['kernel'] + checkpoint.params[layer]['bias']
    padded = np.pad(x, (spec.padding, spec.padding, (0, 0)))
    side = (len(padded) - spec.kernel) // spec.stride + 1
    y = np.zeros((side, side, spec.features))
    for ins, outs, kernel, bias in _linear_parts(checkpoint, layer, x):
        for row, column in np.ndindex(side, side):
            top, left = row * spec.stride, column * spec.stride
            patch = padded[top : top + spec.kernel, left : left + spec.kernel, ins]
            y[row, column, outs] = np.einsum('ijc,ijco->o', patch, kernel) + bias
    return y


def reverse(checkpoint, name, x, signal, rules):
    network, (layer, op) = checkpoint.network, name.split('.')
    if op == 'relu':
        rectified = signal if rules['relu'] == 'gradient' else np.maximum(signal, 0)
        return rectified if rules['relu'] == 'deconvnet' else np.where(x > 0, rectified, 0)
    if op == 'dropout':
        return signal * (1 - network.dropout_rate)
    if op == 'lrn':
        return signal if rules['lrn'] == 'unchanged' else _lrn_gradient(network, x, signal)
    below = np.zeros_like(x)
    if op == 'pool':
        windows = _windows(network, len(x))
        for (i, rows), (j, columns) in _pairs(windows):
            for channel in range(x.shape[2]):
                patch = x[rows, columns, channel]
                row, column = np.unravel_index(np.argmax(patch), patch.shape)  # the first maximum
                below[rows.start + row, columns.start + column, channel] += signal[i, j, channel]
        return below
    spec = network.layers[layer]
    if isinstance(spec, DenseSpec):
        return (checkpoint.params[layer]['kernel'] @ signal).reshape(x.shape)
    before, after = spec.padding
    padded = np.zeros((len(x) + before + after, len(x) + before + after, x.shape[2]))
    for ins, outs, kernel, _ in _linear_parts(checkpoint, layer, x):
        for row, column in np.ndindex(*signal.shape[:2]):
            top, left = row * spec.stride, column * spec.stride
            patch = padded[top : top + spec.kernel, left : left + spec.kernel, ins]
            patch += kernel @ signal[row, column, outs]
    return padded[before : before + len(x), before : before + len(x)]


def _pairs(windows):
    return [(row, column) for row in enumerate(windows) for column in enumerate(windows)]


def _lrn_gradient(network, x, signal):
    """Returns the sum over j of signal_j * d(b_j)/d(x_i), with b_j = x_j d_j^-beta."""
    normalizer, beta = _normalizer(network, x), network.lrn_beta
    below = signal * normalizer**-beta
    size = x.shape[2] // network.norm_groups
    for i in range(x.shape[2]):
        for j in range(max(i // size * size, i - 2), min((i // size + 1) * size, i + 3)):
            inner = -beta * normalizer[:, :, j] ** (-beta - 1) * 2 * network.lrn_alpha * x[:, :, i]
            below[:, :, i] += signal[:, :, j] * x[:, :, j] * inner
    return below
