"""Trains a new classifier on the frozen features of a network: multinomial logistic regression.

The classifier is the last layer of an ordinary checkpoint. All other layers and the preprocessing are unchanged.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.convert import convert
from alexnet_jax.core.augment import views
from alexnet_jax.inference.evaluate import Evaluator
from alexnet_jax.utils.errors import UserError

_FOLDS = 5
_L2 = tuple(10 ** (k / 2) for k in range(0, -11, -1))  # 1 to 1e-5, for features of mean square length 1
_MAX_STEPS = 500  # of L-BFGS
_TOLERANCE = 1e-5  # of the gradient's norm, at which L-BFGS stops
_ACCEPTED = 1e-4  # of the gradient's norm; a larger one after `_MAX_STEPS` is reported


class LinearClassifier(NamedTuple):
    """A classifier of features, and how well it did on pictures that it was not fitted to."""

    kernel: np.ndarray  # float32 [D, K]
    bias: np.ndarray  # float32 [K]
    l2: float  # chosen weight of the penalty
    folds: int  # of the cross-validation
    correct: int  # training pictures that the classifiers of the other folds label correctly, with this `l2`


def check_network(checkpoint: Checkpoint) -> None:
    """Raises UserError if the last layer is more than a matrix and a bias, or the only layer."""
    layers = checkpoint.network.layers
    name, layer = list(layers.items())[-1]
    if len(layers) == 1:
        raise UserError(f'--mode=features: {name} is the only layer, so there are no features; use --mode=full.')
    if layer.groups > 1 or layer.ops:
        raise UserError(f'--mode=features: {name} has groups or operations after it; use --mode=full.')


def features(
    checkpoint: Checkpoint, records: Sequence, count: int, max_unreadable: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the inputs of the last layer, float32 [N, V, D], and the labels, int [N], of readable records.

    Dropout is off: its test-time factor is part of the features, so a classifier of them needs no rescaling.

    count: 1 for the center crop, or 10 for the ten views; without `data.reflect` the five reflections are left out.
    """
    rows, labels = [], []
    for part, label in Evaluator(checkpoint).map_records(_feature_function(checkpoint, count), records):
        rows.append(part)
        labels.append(label)
    bad = len(records) - sum(map(len, labels))
    if bad > max_unreadable or bad == len(records):
        raise UserError(f'{bad} of {len(records)} images cannot be read (named above); prepare the data again.')
    return np.concatenate(rows), np.concatenate(labels)


def _feature_function(checkpoint: Checkpoint, count: int):
    """Returns a jitted function (params, uint8 [n, S, S, 3], image_stats) -> float32 [n, V, D]."""
    network, augmentation = checkpoint.network, checkpoint.augmentation
    name, layer = list(network.layers.items())[-2]
    key = f'{name}.{layer.ops[-1] if layer.ops else "linear"}'

    @jax.jit
    def function(params, image_NHWC, image_stats):
        inputs = views(image_NHWC, image_stats, augmentation, count=count)
        inputs = inputs if augmentation.reflect else inputs[: max(1, count // 2)]
        outputs = []
        for x_NHWC in inputs:
            _, state = network.apply({'params': params}, x_NHWC, mutable='intermediates')
            outputs.append(state['intermediates'][key][-1].astype(jnp.float32).reshape(len(x_NHWC), -1))
        return jnp.stack(outputs, axis=1)

    return function


def fit(feature_NVD: np.ndarray, label_N: np.ndarray, classes: int) -> LinearClassifier:
    """Fits a classifier to all views of all pictures, with the L2 penalty of the best cross-validation.

    Minimizes the mean negative log-likelihood + l2 / 2 * (|W|^2 + |b|^2) for features that are centered and divided by
    one number, so that their mean square length is 1. All views of a picture are in the same fold. The best penalty has
    the highest likelihood of the left-out pictures, with softmax outputs averaged over views as in `Evaluator`.

    Raises UserError if there are fewer than two pictures, or if a feature is NaN or infinite.
    """
    count, num_views, width = feature_NVD.shape
    if count < 2:
        raise UserError(f'--mode=features: expected two training pictures or more, found {count}; use --mode=full.')
    if not np.isfinite(feature_NVD).all():
        raise UserError('--mode=features: features of the network are NaN or infinite; use other weights.')
    mean_D = feature_NVD.mean((0, 1), dtype=np.float64).astype(np.float32)
    x_NVD = feature_NVD - mean_D
    scale = np.sqrt(np.square(x_NVD).sum(2, dtype=np.float64).mean()) or 1.0
    x_NVD = np.concatenate([x_NVD / np.float32(scale), np.ones((count, num_views, 1), np.float32)], axis=2)
    target_NK = np.eye(classes, dtype=np.float32)[label_N]

    fold_N = folds(label_N, _FOLDS)
    num_folds = fold_N.max() + 1
    # One problem without each fold, and one with all pictures.
    kept_FN = (fold_N != np.arange(num_folds + 1)[:, None]).astype(np.float32)
    w_FDK = jnp.zeros((num_folds + 1, width + 1, classes))
    tried = []
    for l2 in _L2:  # from strong to weak: each solution is the start of the next
        w_FDK, norm_F = _minimize_all(w_FDK, x_NVD, target_NK, kept_FN, l2)
        probability_NK = np.asarray(_left_out(w_FDK, x_NVD, fold_N))
        likelihood = np.log(np.maximum(probability_NK[np.arange(count), label_N], 1e-30)).mean()
        correct = int((probability_NK.argmax(1) == label_N).sum())
        tried.append((likelihood, l2, correct, np.asarray(w_FDK[-1], np.float64), float(norm_F.max())))
    _, l2, correct, w_DK, norm = max(tried, key=lambda result: result[:2])
    if norm > _ACCEPTED:
        logging.warning('The last layer is not fully fitted: after %d steps the gradient is %.1g.', _MAX_STEPS, norm)
    kernel = w_DK[:-1] / scale
    bias = w_DK[-1] - mean_D @ kernel
    return LinearClassifier(kernel.astype(np.float32), bias.astype(np.float32), l2, int(num_folds), correct)


def folds(label_N: np.ndarray, count: int) -> np.ndarray:
    """Returns the fold of each picture, int [N]: in turn within each class, so that folds have equal shares of it."""
    order = np.argsort(label_N, kind='stable')
    fold_N = np.empty(len(label_N), int)
    fold_N[order] = np.arange(len(label_N)) % min(count, len(label_N))
    return fold_N


@jax.jit
def _minimize_all(w_FDK, x_NVD, target_NK, kept_FN, l2):
    return jax.vmap(_minimize, in_axes=(0, None, None, 0, None))(w_FDK, x_NVD, target_NK, kept_FN, l2)


def _minimize(w_DK, x_NVD, target_NK, kept_N, l2):
    """Minimizes the penalized loss of the pictures with kept_N = 1 by L-BFGS. Returns (w_DK, norm of the gradient)."""

    def loss(w_DK):
        log_softmax_NVK = jax.nn.log_softmax(jnp.dot(x_NVD, w_DK, precision='highest'))
        likelihood_N = (log_softmax_NVK * target_NK[:, None]).sum(2).mean(1)
        return -(kept_N * likelihood_N).sum() / kept_N.sum() + l2 / 2 * (w_DK**2).sum()

    optimizer, value_and_grad = optax.lbfgs(), optax.value_and_grad_from_state(loss)

    def step(carry):
        w_DK, state, _, i = carry
        value, grad = value_and_grad(w_DK, state=state)
        updates, state = optimizer.update(grad, state, w_DK, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(w_DK, updates), state, optax.tree.norm(grad), i + 1

    def unfinished(carry):
        return (carry[2] > _TOLERANCE) & (carry[3] < _MAX_STEPS)

    start = (w_DK, optimizer.init(w_DK), jnp.float32(jnp.inf), 0)
    w_DK, _, norm, _ = jax.lax.while_loop(unfinished, step, start)
    return w_DK, norm


@jax.jit
def _left_out(w_FDK, x_NVD, fold_N):
    """Returns the softmax outputs of each picture, float32 [N, K], by the classifier that was fitted without it."""
    scores_FNVK = jnp.einsum('nvd,fdk->fnvk', x_NVD, w_FDK, precision='highest')
    return jax.nn.softmax(scores_FNVK).mean(2)[fold_N, jnp.arange(len(x_NVD))]


def save(
    workdir: str | os.PathLike,
    source: Checkpoint,
    classifier: LinearClassifier,
    class_names: Sequence[str],
    config: dict,
) -> None:
    """Writes a new workdir with the source's network and the new classifier as step 0.

    config: JSON; the source's config with the new number of classes. Raises UserError if it cannot be written.
    """
    last = {'kernel': classifier.kernel, 'bias': classifier.bias}
    params = {**source.params, list(source.network.layers)[-1]: last}
    fitted = source._replace(step=0, params=params, class_names=tuple(class_names), config=config)
    convert.save(fitted, workdir)
