"""Activation maximization: images that excite a unit, by gradient ascent."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.core.augment import Augmentation
from alexnet_jax.core.model import AlexNet
from alexnet_jax.utils import checks
from alexnet_jax.utils.errors import UserError
from alexnet_jax.visualize import forward
from alexnet_jax.visualize.forward import Position

_CHECKS: list[checks.Check] = [
    ('steps blur_every', checks.is_positive_int, 'a positive integer'),
    ('seed jitter', checks.is_nonnegative_int, 'an integer of at least 0'),
    ('learning_rate', lambda value: checks.is_nonnegative(value) and value > 0, 'a positive number'),
    ('start_std blur tv', checks.is_nonnegative, 'a number of at least 0'),
    ('decay', checks.is_fraction, 'a number of at least 0 and below 1'),
]


class Maximized(NamedTuple):
    """An image that excites a unit."""

    image: np.ndarray  # float32 [s, s, 3], pixels from 0 to 255
    activations: np.ndarray  # float32 [steps + 1]: before each step, of the shifted image; then of `image`


def maximize_activation(
    checkpoint: Checkpoint,
    layer: str,
    unit: int,
    position: Position = None,
    *,
    steps: int = 200,
    learning_rate: float = 1.0,
    seed: int = 0,
    start_std: float = 10.0,
    decay: float = 1e-4,
    blur: float = 0.5,
    blur_every: int = 4,
    jitter: int = 2,
    tv: float = 0.02,
) -> Maximized:
    """Finds an image that excites a unit, by gradient ascent from noise around the mean image.

    Let d be the image minus the mean image, in gray levels, and a(d) the activation. A step is

        1. g = da/dd, at the image shifted by the jitter and shifted back
        2. d = d + learning_rate (g / m - tv dR/dd), m = mean of |g| over the values that are not zero
        3. d = (1 - decay) d
        4. in steps blur_every, 2 blur_every, ...: d = d, blurred
        5. pixels are clipped to 0 to 255

    with the total variation R = sum of the squared differences of neighboring pixels, in both directions. Dividing by m
    gives the learning rate a unit, gray levels, that does not depend on the layer; the papers do it in other ways.

    The defaults of the regularizers were chosen by eye, on a network that was trained on images of 56 px. The same
    arguments give the same bits on the same machine.

    Sources: Yosinski et al., "Understanding neural networks through deep visualization", 2015 (arXiv:1506.06579; decay,
    blur). Mordvintsev, Olah and Tyka, "Inceptionism", Google Research blog, 2015, with the code (jitter). Mahendran and
    Vedaldi, "Understanding deep image representations by inverting them", CVPR 2015 (arXiv:1412.0035; total variation,
    with beta = 2).

    Args:
      checkpoint: from `alexnet_jax.load_checkpoint`.
      layer: the name of an activation, as for `alexnet_jax.activations`. 'conv5.linear' always has a gradient; that of
        'conv5.relu' is zero wherever the unit is not active. Use the logits, 'fc8', for classes.
      unit: index of the feature map, or of the unit of a dense layer.
      position: (row, column) in the map; None: its center, (rows // 2, columns // 2).
      steps: number of steps.
      learning_rate: mean change of the values that matter to the unit, gray levels per step.
      seed: of the noise and the shifts.
      start_std: standard deviation of the noise, gray levels.
      decay: L2 decay, a fraction per step; 0: off.
      blur: standard deviation of a Gaussian blur, pixels, cut at three of them; the edge is repeated. 0: off.
      blur_every: steps from one blur to the next.
      jitter: largest shift in each direction, pixels; the image wraps around. 0: off.
      tv: weight of the total variation, per gray level. learning_rate * tv above 1/8 is unstable. 0: off.

    Returns:
      A `Maximized`.

    Raises:
      UserError: the layer is unknown, unit or position is out of range, an option is out of range, or the gradient is
        zero at the start.
    """
    options = dict(steps=steps, learning_rate=learning_rate, seed=seed, start_std=start_std, decay=decay, blur=blur)
    checks.check_values(_CHECKS, {**options, 'blur_every': blur_every, 'jitter': jitter, 'tv': tv}, '{}={!r}')
    found = forward.find_unit(checkpoint, layer, unit, position)
    if position is None and len(found.shape) == 3:
        rows, columns, _ = found.shape
        found = forward.find_unit(checkpoint, layer, unit, (rows // 2, columns // 2))
    step = _jit_step(checkpoint.network, checkpoint.augmentation, found.stop)
    mean_1HWC, params = _mean_image(checkpoint), jax.device_put(checkpoint.params)
    rng, side = np.random.default_rng(seed), checkpoint.image_size
    start = rng.normal(0, start_std, (1, side, side, 3))
    d_1HWC = jnp.asarray(np.clip(start, -mean_1HWC, 255 - mean_1HWC), mean_1HWC.dtype)
    shifts, kernel = rng.integers(-jitter, jitter, (steps, 2), endpoint=True), _gaussian(blur)
    unblurred = np.eye(len(kernel))[len(kernel) // 2]
    activations = []
    for i, shift in enumerate(shifts, 1):
        weights = unblurred if i % blur_every else kernel
        options = dict(learning_rate=learning_rate, decay=decay, tv=tv)
        d_1HWC, activation, scale = step(params, d_1HWC, mean_1HWC, found.unit, found.position, shift, weights, options)
        activations.append(activation)
        if i == 1 and not scale > 0:
            raise UserError(
                f'unit {unit} of {layer} has no gradient at the start, because it or all that it reads is not active; '
                f"use a layer's linear output, such as '{layer.split('.')[0]}.linear', or another seed."
            )
    last = step(params, d_1HWC, mean_1HWC, found.unit, found.position, np.zeros(2, int), unblurred, options)[1]
    image = np.clip(np.asarray(d_1HWC + mean_1HWC)[0], 0, 255).astype(np.float32)
    return Maximized(image, np.array([*activations, last], np.float32))


def _mean_image(checkpoint: Checkpoint) -> np.ndarray:
    """Returns what the preprocessing subtracts from the center crop, [1, s, s, 3], gray levels."""
    side, augmentation = checkpoint.record_size, checkpoint.augmentation
    black = np.zeros((1, side, side, 3), np.uint8)
    network_input = jax.jit(forward.network_input, static_argnums=(0, 1))
    x = network_input(checkpoint.network, augmentation, black, checkpoint.image_stats)
    return -np.asarray(x) * np.asarray(augmentation.pixel_std, x.dtype)


def _gaussian(std: float) -> np.ndarray:
    """Returns the weights of a Gaussian, float [2 r + 1], which sum to 1; r is three standard deviations, rounded up.

    A standard deviation of 0 gives [1].
    """
    if std == 0:
        return np.ones(1)
    radius = math.ceil(3 * std)
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * std**2))
    return weights / weights.sum()


@functools.lru_cache(maxsize=8)
def _jit_step(network: AlexNet, augmentation: Augmentation, stop: int) -> Callable:
    def step(params, d_1HWC, mean_1HWC, unit, position, shift, kernel, options):
        """Returns the next d, the activation before the step, and the mean of the gradient's absolute values."""

        def activation(d_1HWC: Array) -> Array:
            shifted = jnp.roll(d_1HWC, shift, axis=(1, 2))
            std = jnp.asarray(augmentation.pixel_std, d_1HWC.dtype)
            y = forward.run(network, params, shifted / std[None, None, None], 0, stop)
            return forward.select(y, unit, position)[0][0]

        value, gradient = jax.value_and_grad(activation)(d_1HWC)
        scale = jnp.abs(gradient).sum() / jnp.maximum(1, jnp.count_nonzero(gradient))
        direction = gradient / jnp.where(scale > 0, scale, 1) - options['tv'] * jax.grad(_total_variation)(d_1HWC)
        d_1HWC = (1 - options['decay']) * (d_1HWC + options['learning_rate'] * direction)
        d_1HWC = _blur(d_1HWC, kernel.astype(d_1HWC.dtype))
        return jnp.clip(d_1HWC, -mean_1HWC, 255 - mean_1HWC), value, scale

    return forward.jit(step)


def _total_variation(x_1HWC: Array) -> Array:
    return sum((jnp.square(jnp.diff(x_1HWC, axis=axis)).sum() for axis in (1, 2)), jnp.zeros((), x_1HWC.dtype))


def _blur(x_1HWC: Array, kernel: Array) -> Array:
    """Convolves with a symmetric kernel [2 r + 1] along rows and columns. The edge is repeated."""
    radius = len(kernel) // 2
    for axis in (1, 2):
        side = x_1HWC.shape[axis]
        x = jnp.pad(x_1HWC, [(radius, radius) if i == axis else (0, 0) for i in range(4)], mode='edge')
        parts = [kernel[i] * lax.slice_in_dim(x, i, i + side, axis=axis) for i in range(2 * radius + 1)]
        x_1HWC = functools.reduce(jnp.add, parts)
    return x_1HWC
