"""Training state, training step and evaluation step, as pure functions without I/O or config."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from alexnet_jax.core import augment, metrics, model
from alexnet_jax.core.augment import Augmentation, Batch
from alexnet_jax.core.image_stats import ImageStats
from alexnet_jax.core.optim import Optimizer

Forward = Callable[..., Array]  # result of `sharding.forward`


class TrainState(NamedTuple):
    """The state of training, which an update changes and a checkpoint stores."""

    step: Array  # int32: number of batches used so far, which is the index of the next batch in the stream
    params: Any
    opt_state: Any

    def swap_average(self) -> 'TrainState':
        """Exchanges the parameters and their average, if the optimizer keeps one: `params` are then to be evaluated."""
        if self.opt_state is None or self.opt_state.average is None:
            return self
        opt_state = optax.tree.set(self.opt_state, average=self.params)
        return self._replace(params=self.opt_state.average, opt_state=opt_state)


def init_state(network: model.AlexNet, optimizer: Optimizer, key: Array, image_size: int) -> TrainState:
    """Returns an initial state with parameters drawn from `key`. Jit it with `out_shardings` to place it on a mesh."""
    params = model.init_params(network, key, image_size)
    return TrainState(jnp.int32(0), params, optimizer.tx.init(params))


def loss_and_sums(
    params: Any,
    x_NHWC: Array,
    batch: Batch,
    masks: model.Masks | None,
    *,
    forward: Forward,
    total: Array | None = None,
    likelihood: Callable[[Array, Batch], Array] | None = None,
) -> tuple[Array, metrics.Sums]:
    """Returns the mean negative log-likelihood over the batch (section 3.5), and the metric sums.

    `x_NHWC` is float [N, s, s, 3] from `augment.preprocess`; `batch` has 'label' and 'weight', [N]. For a microbatch,
    `total` is the total weight of the whole batch; the loss is divided by it. `likelihood`, if given, replaces the
    log-likelihood: it maps logits and batch to float [N].
    """
    logits = forward(params, x_NHWC, masks)
    values = likelihood(logits, batch) if likelihood else metrics.log_likelihood(logits, batch['label'])
    sums = metrics.sums(values, logits, batch['label'], batch['weight'])
    return sums['loss'] / (jnp.maximum(sums['weight'], 1) if total is None else total), sums


def _split_microbatches(x_N: Array, parts: int, shards: int) -> Array:
    """Splits x into [parts, N / parts, ...]. Each part has the same number of rows of every shard: no data moves."""
    rows = x_N.reshape(shards, parts, -1, *x_N.shape[1:]).swapaxes(0, 1)
    return rows.reshape(parts, -1, *x_N.shape[1:])


def train_step(
    state: TrainState,
    batch: Batch,
    image_stats: ImageStats,
    key: Array,
    *,
    network: model.AlexNet,
    forward: Forward,
    optimizer: Optimizer,
    augmentation: Augmentation,
    color_steps: int | None = None,
    grad_accum_steps: int = 1,
    data_shards: int = 1,
    mix: Callable[[Array, Batch, Array], tuple[Array, Batch]] | None = None,
    likelihood: Callable[[Array, Batch], Array] | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """Trains on one batch: forward pass, backward pass, update.

    If the loss, the gradient norm or the update norm is not finite, parameters and optimizer state are unchanged.
    `step`, the position in the data, still increases.

    Args:
      state: the state on the mesh; donate it to save memory.
      batch: from `pipeline.train_batches`, on the mesh. Instead of 'image' it may have 'whole', or 'index' and
        'records' (see `augment.crop_on_device`).
      image_stats: statistics of the training set.
      key: random key of the run. The dropout masks depend only on this key and the step.
      network: gives the shapes of the dropout masks.
      forward: `sharding.forward(network, mesh)`.
      optimizer: from `optim.make_optimizer`.
      augmentation: settings of `augment.preprocess`.
      color_steps: number of updates with color augmentation, not counting skipped updates; None: always on.
      grad_accum_steps: number of microbatches, computed one after the other. Their gradients are added: the update is
        the same, and activations take the memory of one microbatch.
      data_shards: size of the mesh's data axis.
      mix: changes preprocessed images and batch, from (x, batch, key of the step); None: nothing.
      likelihood: see `loss_and_sums`.

    Returns:
      The new state and a report: the sums of `metrics.sums`, 'gradient_norm', 'gradient_norms' and 'update_norms' (by
      layer), 'learning_rate' (of this update) and 'finite'.
    """
    count, image_size = len(batch['label']), augmentation.image_size
    if 'image' not in batch:
        with jax.named_scope('input'):
            batch = augment.crop_on_device(batch, image_size)
    with jax.named_scope('masks'):
        step_key = jax.random.fold_in(key, state.step)
        masks = model.dropout_masks(network, step_key, count, image_size)
    color = True if color_steps is None else state.opt_state.count < color_steps
    dtype = jnp.promote_types(network.dtype, jnp.float32)
    total = jnp.maximum(batch['weight'].sum(), 1) if grad_accum_steps > 1 else None

    loss = functools.partial(loss_and_sums, forward=forward, total=total, likelihood=likelihood)

    def gradient(batch: Batch, masks: model.Masks) -> tuple[Any, metrics.Sums]:
        with jax.named_scope('input'):
            x = augment.preprocess(batch, image_stats, augmentation, color=color, dtype=dtype)
            if mix is not None:
                x, batch = mix(x, batch, jax.random.fold_in(step_key, len(network.layers)))  # masks use lower numbers
        return jax.grad(loss, has_aux=True)(state.params, x, batch, masks)

    def accumulate(sums: Any, microbatch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, gradient(*microbatch)), None

    if grad_accum_steps == 1:
        grads, sums = gradient(batch, masks)
    else:
        microbatches = jax.tree.map(lambda x: _split_microbatches(x, grad_accum_steps, data_shards), (batch, masks))
        shapes = jax.eval_shape(gradient, *jax.tree.map(lambda x: x[0], microbatches))
        (grads, sums), _ = lax.scan(accumulate, jax.tree.map(jnp.zeros_like, shapes), microbatches)
    with jax.named_scope('update'):
        norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.tx.update(grads, state.opt_state, state.params)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums['loss']) & jnp.isfinite(optax.tree.norm(updates))
        new = (optax.apply_updates(state.params, updates), opt_state)
        params, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (state.params, state.opt_state))
        report = {
            **sums,
            'gradient_norm': norm,
            'gradient_norms': {name: optax.tree.norm(layer) for name, layer in grads.items()},
            'update_norms': {name: optax.tree.norm(layer) for name, layer in updates.items()},
            'learning_rate': optimizer.learning_rate(state.opt_state),
            'finite': finite,
        }
    return TrainState(state.step + 1, params, opt_state), report


def log_probabilities(
    params: Any, image_NHWC: Array, image_stats: ImageStats, *, forward: Forward, augmentation: Augmentation, views: int
) -> Array:
    """Returns the log of the softmax outputs averaged over views (section 4.1), float32 [N, K], without dropout.

    `image_NHWC` is uint8 [N, S, S, 3], whole images. `views` is 1 (center crop) or 10 (the paper's ten views); other
    values raise UserError.
    """
    dtype = jax.tree.leaves(params)[0].dtype
    inputs = augment.views(image_NHWC, image_stats, augmentation, count=views, dtype=dtype)
    log_softmax_VNK = jnp.stack([jax.nn.log_softmax(forward(params, x)) for x in inputs])
    return jax.nn.logsumexp(log_softmax_VNK, axis=0) - jnp.log(views)


def eval_step(
    params: Any, batch: Batch, image_stats: ImageStats, *, forward: Forward, augmentation: Augmentation, views: int
) -> metrics.Sums:
    """Returns the metric sums of one batch from `pipeline.eval_batches`; other arguments as for `log_probabilities`."""
    scores = log_probabilities(
        params, batch['image'], image_stats, forward=forward, augmentation=augmentation, views=views
    )
    return metrics.sums(metrics.take_label(scores, batch['label']), scores, batch['label'], batch['weight'])
