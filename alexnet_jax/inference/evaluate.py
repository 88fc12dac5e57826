"""Evaluates a checkpoint, or several as an ensemble, on a split, with the center crop or the paper's ten views."""

import contextlib
import functools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.core import metrics, sharding, train_step
from alexnet_jax.core.architecture import infer_shapes
from alexnet_jax.core.image_stats import ImageStats
from alexnet_jax.data import pipeline
from alexnet_jax.data.cache import Batch
from alexnet_jax.data.datasets import Dataset
from alexnet_jax.inference import class_map, ensemble
from alexnet_jax.utils import compiler
from alexnet_jax.utils.errors import TerminatedError, UserError, check_type


def evaluate_batches(
    eval_step: Callable,
    params,
    image_stats: ImageStats,
    batches: Iterator[Batch],
    mesh: Mesh,
    *,
    examples: int,
    max_unreadable: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Computes loss and errors over a split. Every record counts once.

    Args:
      eval_step, params, image_stats: the jitted `train_step.eval_step` and its arguments on the mesh.
      batches: one pass of `pipeline.eval_batches`. The batch size does not change the result.
      mesh: device mesh.
      examples: number of records in the pass.
      max_unreadable: allowed number of unreadable records. Warnings name them; 'count' excludes them.
      should_stop: called before every batch; if it returns True, TerminatedError is raised.

    Returns 'loss' (nats), 'top1_error' and 'top5_error' (percent), 'count' (images), 'images_per_second' and
    'data_wait' (0 to 1), and 'per_class' if the step is that of `evaluate` with `per_class`. Raises UserError if more
    than `max_unreadable` records are unreadable.
    """
    total: Any = None
    previous: Any = None
    began, waited = time.perf_counter(), 0.0
    for batch, seconds in pipeline.prefetch_to_device(batches, functools.partial(_to_mesh, mesh)):
        if should_stop():
            raise TerminatedError
        waited += seconds
        sums = eval_step(params, batch, image_stats)
        if previous is not None:
            total = metrics.merge(total, _to_floats(previous))  # fetched one step late, so the device is never idle
        previous = sums
    total = metrics.merge(total, _to_floats(previous))
    elapsed, count = time.perf_counter() - began, round(total['weight'])
    _check_count(count, examples, max_unreadable)
    return {**_means(total), 'count': count, 'images_per_second': count / elapsed, 'data_wait': waited / elapsed}


def _to_mesh(mesh: Mesh, batch: Batch) -> dict[str, jax.Array]:
    return sharding.to_mesh(mesh, pipeline.warn_unreadable(batch))


def _to_floats(sums: metrics.Sums) -> dict[str, Any]:
    return {key: np.float64(value) for key, value in jax.device_get(sums).items()}


def _means(total: dict[str, Any]) -> dict[str, Any]:
    """Returns `metrics.means`, and the means of each class if `_sums_per_class` computed the sums."""
    if 'per_class' not in total:
        return metrics.means(total)
    count_K, top1_K, top5_K = total['per_class'].T
    with np.errstate(invalid='ignore'):  # 0 / 0 for a class without images
        errors = {'top1_error': 100 * top1_K / count_K, 'top5_error': 100 * top5_K / count_K}
    return {**metrics.means(total), 'per_class': {'count': count_K.astype(int), **errors}}


def _check_count(count: int, expected: int, max_unreadable: int) -> None:
    if expected - count > max_unreadable or not count:
        raise UserError(
            f'{expected - count} of {expected} images cannot be read (named above): expected at most '
            f'max_unreadable={max_unreadable}; prepare the data again.'
        )


class Evaluator:
    """Runs a checkpoint's network on images. Raises UserError if it cannot be split over the mesh's towers.

    Args:
      checkpoint: from `load_checkpoint`.
      mesh: from `sharding.make_mesh`; None uses one device.
      views: 1 for the center crop, or 10 to average the softmax outputs of the paper's ten views (section 4.1).
      batch_size: maximum number of images per batch; it does not change the results.
    """

    def __init__(self, checkpoint: Checkpoint, mesh: Mesh | None = None, *, views: int = 1, batch_size: int = 128):
        check_type('checkpoint', checkpoint, Checkpoint, 'a Checkpoint; use alexnet_jax.load_checkpoint(PATH)')
        if not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise UserError(f'batch_size={batch_size!r}: expected a positive integer.')
        mesh = sharding.make_mesh(data=1, tower=1) if mesh is None else mesh
        check_type('mesh', mesh, Mesh, 'a Mesh; use sharding.make_mesh')
        infer_shapes(checkpoint.network, checkpoint.image_size, towers=mesh.shape['tower'])  # raises UserError
        self.checkpoint, self.mesh, self.views = checkpoint, mesh, views
        self._batch_size = batch_size
        self._params = jax.device_put(checkpoint.params, sharding.state_sharding(mesh, checkpoint.params))
        self._image_stats = jax.device_put(checkpoint.image_stats, sharding.replicated(mesh))

    def evaluate(self, records: Sequence, *, max_unreadable: int = 0, per_class: bool = False) -> dict[str, Any]:
        """Returns loss and errors on the records of a split. See `evaluate`."""
        function = self._jitted(_eval_step_per_class if per_class else train_step.eval_step)
        options: dict[str, Any] = {'examples': len(records), 'max_unreadable': max_unreadable}
        with contextlib.closing(self._batches(records)) as batches:
            return evaluate_batches(function, self._params, self._image_stats, batches, self.mesh, **options)

    def probabilities(self, records: Sequence, *, max_unreadable: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Returns (softmax outputs float32 [N, K], labels int [N]) of the records, without unreadable ones."""
        function = functools.partial(self._jitted(_outputs), self._params, image_stats=self._image_stats)
        with contextlib.closing(self._batches(records)) as batches:
            parts = [jax.device_get(function(_to_mesh(self.mesh, batch))) for batch in batches]
        outputs, labels, weights = (np.concatenate(part) for part in zip(*parts, strict=True))
        _check_count(int(np.count_nonzero(weights)), len(records), max_unreadable)
        return outputs[weights > 0], labels[weights > 0]

    def predict(self, image_NHWC) -> np.ndarray:
        """Returns softmax outputs for images in memory, float32 [N, K]. Column i is `checkpoint.class_names[i]`.

        image_NHWC: uint8 [N, S, S, 3] with S = `checkpoint.record_size`, prepared as the training images were. Raises
        UserError if shape or type of the images, or the number of views, is invalid.
        """
        parts = [np.exp(part) for part in self.map_images(self._jitted(train_step.log_probabilities), image_NHWC)]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.checkpoint.class_names)), np.float32)

    def map_images(self, function: Callable, image_NHWC) -> Iterator[Any]:
        """Applies a jitted function (params, uint8 [n, S, S, 3], image_stats) -> tree of [n, ...] to images in memory.

        Yields its results in order, one batch at a time, as numpy arrays. Raises UserError as `check_images` does.
        """
        image_NHWC = check_images(self.checkpoint, image_NHWC)
        batch_size = self._fitting_batch_size(len(image_NHWC))
        for start in range(0, len(image_NHWC), batch_size):
            part = image_NHWC[start : start + batch_size]
            count = len(part)
            # Pad the last batch: one shape means one compilation.
            part = np.pad(part, ((0, batch_size - count), (0, 0), (0, 0), (0, 0)))
            results = function(self._params, part, self._image_stats)
            yield jax.tree.map(lambda x, count=count: np.asarray(x)[:count], results)

    def map_records(self, function: Callable, records: Sequence) -> Generator[tuple[Any, np.ndarray], None, None]:
        """Applies a function, as `map_images` takes it, to the records of a split. Runs on one device.

        Yields (result, int32 labels [n]) in order, one batch at a time, without unreadable records; warnings name them.
        """
        with contextlib.closing(self._batches(records)) as batches:
            for batch in batches:
                readable = pipeline.warn_unreadable(batch)['weight'] > 0
                results = function(self._params, batch['image'], self._image_stats)
                yield jax.tree.map(lambda x, keep=readable: np.asarray(x)[keep], results), batch['label'][readable]

    def _jitted(self, function: Callable):
        return _jit(function, self.checkpoint.network, self.checkpoint.augmentation, self.mesh, self.views)

    def _batches(self, records: Sequence) -> Generator[Batch, None, None]:
        if not len(records):
            raise UserError('there are no images to evaluate.')
        options: dict[str, Any] = {'record_size': self.checkpoint.record_size, 'shard': sharding.data_shard(self.mesh)}
        return pipeline.eval_batches(records, batch_size=self._fitting_batch_size(len(records)), **options)

    def _fitting_batch_size(self, images: int) -> int:
        """Limits the batch size to the number of images, then rounds it up to a multiple of the mesh's data axis."""
        parts = self.mesh.shape['data']
        return -(-max(1, min(self._batch_size, images)) // parts) * parts


@functools.lru_cache(maxsize=8)  # a second evaluator with equal arguments compiles nothing
def _jit(function: Callable, network, augmentation, mesh: Mesh, views: int):
    """Jits a function of `train_step`, or `_outputs`, for a network, its preprocessing and a number of views."""
    forward = sharding.forward(network, mesh)
    bound = functools.partial(function, forward=forward, augmentation=augmentation, views=views)
    options = compiler.compiler_options(mesh.devices.flat[0].platform)
    return jax.jit(bound, out_shardings=sharding.replicated(mesh), compiler_options=options)


def _outputs(params, batch, image_stats, **options):
    """Returns softmax outputs, labels and weights of the global batch, replicated so that every process has them."""
    log_outputs = train_step.log_probabilities(params, batch['image'], image_stats, **options)
    return jnp.exp(log_outputs), batch['label'], batch['weight']


def _eval_step_per_class(params, batch, image_stats, **options) -> metrics.Sums:
    score_NK = train_step.log_probabilities(params, batch['image'], image_stats, **options)
    return _sums_per_class(score_NK, batch['label'], batch['weight'])


def _sums_per_class(score_NK, label_N, weight_N) -> metrics.Sums:
    """Returns the sums of `train_step.eval_step` and 'per_class' [K, 3]: images, top-1 and top-5 errors by label."""
    top1_N, top5_N = (metrics.top_k_error(score_NK, label_N, k) for k in (1, 5))
    row_N3 = jnp.stack([jnp.ones_like(top1_N), top1_N, top5_N], axis=1) * weight_N[:, None]
    per_class_K3 = jnp.zeros((score_NK.shape[1], 3), row_N3.dtype).at[label_N].add(row_N3)
    sums = metrics.sums(metrics.take_label(score_NK, label_N), score_NK, label_N, weight_N)
    return {**sums, 'per_class': per_class_K3}


def evaluate(
    checkpoint: Checkpoint,
    records: Sequence,
    mesh: Mesh | None = None,
    *,
    views: int = 1,
    batch_size: int = 128,
    max_unreadable: int = 0,
    per_class: bool = False,
) -> dict[str, Any]:
    """Returns loss and errors of a checkpoint on the records of a split. See `Evaluator` and `evaluate_batches`.

    per_class: adds 'per_class': arrays [K] of 'count', 'top1_error' and 'top5_error'; NaN for a class without images.
    """
    evaluator = Evaluator(checkpoint, mesh, views=views, batch_size=batch_size)
    return evaluator.evaluate(records, max_unreadable=max_unreadable, per_class=per_class)


def evaluate_ensemble(
    checkpoints: Sequence[Checkpoint],
    records: Sequence,
    mesh: Mesh | None = None,
    *,
    weights: Sequence[float] | None = None,
    tune_on: Sequence | None = None,
    views: int = 1,
    batch_size: int = 128,
    max_unreadable: int = 0,
    per_class: bool = False,
) -> dict[str, Any]:
    """Evaluates the weighted average of several checkpoints' softmax outputs (section 6, "averaging the predictions").

    Args:
      checkpoints: checkpoints with the same record size and the same classes. Labels are those of the first; classes
        of the others may have another order or other names that `class_map.match_classes` can match.
      records: records to evaluate on. The outputs of every network for all records are held in memory.
      mesh, views, batch_size, max_unreadable, per_class: as for `evaluate`.
      weights: one per checkpoint; None weights all equally.
      tune_on: records on which to search for the weights instead. See `ensemble.tune_weights`.

    Returns 'loss', 'top1_error', 'top5_error' and 'count' as `evaluate_batches`, and 'weights', which sum to 1. Raises
    UserError if the weights are invalid, the classes differ or too many records are unreadable.
    """
    orders = class_map.align(checkpoints)

    def outputs(records):
        evaluators = (Evaluator(one, mesh, views=views, batch_size=batch_size) for one in checkpoints)
        results = [evaluator.probabilities(records, max_unreadable=max_unreadable) for evaluator in evaluators]
        pairs = zip(results, orders, strict=True)
        return [found if order is None else found[:, order] for (found, _), order in pairs], results[0][1]

    tested = outputs(records)
    if tune_on is not None:
        weights = ensemble.tune_weights(*(tested if tune_on is records else outputs(tune_on)))
    elif weights is None:
        weights = [1.0] * len(checkpoints)
    averaged, labels = ensemble.average(tested[0], weights), tested[1]
    scores = np.log(np.maximum(averaged, np.finfo(np.float32).tiny))
    total: Any = None
    for start in range(0, len(labels), 4096):  # in chunks, because the metrics allocate arrays of the scores' size
        score_NK, label_N = scores[start : start + 4096], labels[start : start + 4096]
        weight_N = np.ones(len(label_N), np.float32)
        total = metrics.merge(total, _to_floats(_sums_per_class(score_NK, label_N, weight_N)))
    if not per_class:
        del total['per_class']
    return {**_means(total), 'count': len(labels), 'weights': [float(w / sum(weights)) for w in weights]}


def check_images(checkpoint: Checkpoint, image_NHWC) -> np.ndarray:
    """Returns images as an array. Raises UserError if not uint8 [N, S, S, 3] with S = `checkpoint.record_size`."""
    image_NHWC, side = np.asarray(image_NHWC), checkpoint.record_size
    if image_NHWC.dtype != np.uint8 or image_NHWC.shape[1:] != (side, side, 3):
        found = f'{image_NHWC.dtype} of shape {image_NHWC.shape}'
        raise UserError(f'images are {found}: expected uint8 of shape (N, {side}, {side}, 3).')
    return image_NHWC


def check_record_size(checkpoint: Checkpoint, dataset: Dataset, path: str) -> None:
    """Raises UserError if the data's record size differs from the checkpoint's. path: for the message."""
    if dataset.record_size != checkpoint.record_size:
        raise UserError(
            f'the data are prepared at {dataset.record_size} px, but {path} was trained on images of '
            f'{checkpoint.record_size} px; prepare the data with --size={checkpoint.record_size}.'
        )
