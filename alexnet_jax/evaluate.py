"""Evaluates a checkpoint, or several as an ensemble, on a split of prepared data.

    python -m alexnet_jax.evaluate --checkpoint=runs/paper --data=DIR [--split=val] [--views=10] [--json]

--checkpoint given several times averages their softmax outputs (section 6); --weights=2,1,1 weighs them, and
--weights=tuned looks for the weights with the lowest top-5 error on the val split.
"""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from alexnet_jax import cli, data, ensemble, layers, metrics, sharding, sources, steps
from alexnet_jax.checkpoint import Checkpoint, load_checkpoint
from alexnet_jax.errors import TerminatedError, UserError, warn
from alexnet_jax.statistics import Statistics


def one_pass(
    eval_step: Callable,
    params,
    statistics: Statistics,
    batches: Iterator[data.Batch],
    mesh,
    *,
    examples: int,
    max_bad: int = 0,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Counts every record of a split once.

    Args:
      eval_step: jitted `steps.eval_step`.
      params, statistics: on the mesh.
      batches: of `data.eval_batches`, one pass; their size changes nothing in the result.
      examples: records in that pass.
      max_bad: records that may be unreadable; they are named, and not among 'count'.
      asked_to_stop: asked before every batch.

    Returns:
      'loss' (nats), 'top1_error', 'top5_error' (percent), 'count' (images), 'images_per_second', 'data_wait' (0 to 1).

    Raises:
      UserError: more records than that are unreadable.
      TerminatedError: asked to stop.
    """
    total = previous = None
    began, waited = time.perf_counter(), 0.0

    def send(batch):
        return sharding.to_mesh(mesh, data.warn_unreadable(batch))

    for batch, seconds in sharding.prefetch_to_device(batches, send):
        if asked_to_stop():
            raise TerminatedError
        waited += seconds
        sums = eval_step(params, batch, statistics)
        if previous is not None:
            total = metrics.merge(total, _host(previous))  # fetched one late: the device is never idle
        previous = sums
    total = metrics.merge(total, _host(previous))
    elapsed, count = time.perf_counter() - began, round(total['weight'])
    _check_count(count, examples, max_bad)
    return {
        **metrics.means(total),
        'count': count,
        'images_per_second': count / elapsed,
        'data_wait': waited / elapsed,
    }


def _host(sums) -> dict[str, float]:
    return {key: float(value) for key, value in jax.device_get(sums).items()}


def evaluate(
    checkpoint: Checkpoint, source: Sequence, mesh, *, views: int = 1, batch_size: int = 128, max_bad: int = 0
) -> dict[str, float]:
    """Errors of a checkpoint on a source, from the centre (views=1) or ten views: see `one_pass`."""
    eval_step, params, statistics, batch_size = _ready(
        steps.eval_step, checkpoint, mesh, views, batch_size, len(source)
    )
    with contextlib.closing(_batches(checkpoint, source, mesh, batch_size)) as batches:
        return one_pass(eval_step, params, statistics, batches, mesh, examples=len(source), max_bad=max_bad)


def _ready(function: Callable, checkpoint: Checkpoint, mesh, views: int, batch_size: int, images: int):
    """(the function of `_jitted`, parameters and statistics on the mesh, a batch size that divides into its parts)."""
    layers.sizes(checkpoint.network, checkpoint.image_size, towers=mesh.shape['tower'])  # says what does not divide
    jitted = _jitted(function, checkpoint.network, checkpoint.augmentation, mesh, views)
    params = jax.device_put(checkpoint.params, sharding.state_sharding(mesh, checkpoint.params))
    statistics = jax.device_put(checkpoint.statistics, sharding.replicated(mesh))
    parts = mesh.shape['data']
    return jitted, params, statistics, -(-max(1, min(batch_size, images)) // parts) * parts


@functools.lru_cache(maxsize=8)  # so that a second call of the same kind compiles nothing
def _jitted(function: Callable, network, augmentation, mesh, views: int):
    """`steps.eval_step`, `steps.log_probabilities` or `_outputs`, for this network and what it sees of an image."""
    forward = sharding.forward(network, mesh)
    test = functools.partial(function, forward=forward, augmentation=augmentation, views=views)
    return jax.jit(test, out_shardings=sharding.replicated(mesh))


def _batches(checkpoint: Checkpoint, source: Sequence, mesh, batch_size: int) -> Iterator[data.Batch]:
    if not len(source):
        raise UserError('there are no images to evaluate on.')
    shard = sharding.data_shard(mesh)
    return data.eval_batches(source, batch_size=batch_size, record_size=checkpoint.record_size, shard=shard)


def _outputs(params, batch, statistics, **test):
    """Softmax outputs, labels and weights of the global batch: replicated, so that every process has all of them."""
    return jnp.exp(steps.log_probabilities(params, batch['image'], statistics, **test)), batch['label'], batch['weight']


def probabilities(
    checkpoint: Checkpoint, source: Sequence, mesh, *, views: int = 1, batch_size: int = 128, max_bad: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A checkpoint's softmax outputs for all of a source, averaged over the views: (float32 [N, K], int labels [N]).

    Up to max_bad records may be unreadable; they are named, and left out.
    """
    function, params, statistics, batch_size = _ready(_outputs, checkpoint, mesh, views, batch_size, len(source))
    found = []
    for batch in _batches(checkpoint, source, mesh, batch_size):
        batch = sharding.to_mesh(mesh, data.warn_unreadable(batch))
        part, labels, weights = jax.device_get(function(params, batch, statistics))
        found.append((part[weights > 0], labels[weights > 0]))
    outputs, labels = (np.concatenate(parts) for parts in zip(*found, strict=True))
    _check_count(len(labels), len(source), max_bad)
    return outputs, labels


def _check_count(count: int, expected: int, max_bad: int) -> None:
    if expected - count > max_bad or not count:
        raise UserError(
            f'{expected - count} of {expected} images cannot be read (named above), max_bad={max_bad}; prepare the '
            'data again.'
        )


def evaluate_ensemble(
    checkpoints: Sequence[Checkpoint],
    source: Sequence,
    mesh,
    *,
    weights: Sequence[float] | None = None,
    tune_on: Sequence | None = None,
    views: int = 1,
    batch_size: int = 128,
    max_bad: int = 0,
) -> dict[str, Any]:
    """Errors of the weighted average of several checkpoints' softmax outputs (section 6, "averaging the predictions").

    Args:
      checkpoints: of the same classes and record size.
      source: records to test on; every network's outputs for all of them are held in memory.
      mesh: from `sharding.make_mesh`.
      weights: one for each; equal ones by default.
      tune_on: records on which to look for the weights instead, see `ensemble.tune`.
      views: 1 or 10.
      batch_size: images at a time.
      max_bad: records that may be unreadable, as in `one_pass`.

    Returns:
      'loss', 'top1_error', 'top5_error', 'count' as `one_pass`, and 'weights', which add up to 1.

    Raises:
      UserError: weights that do not fit.
    """

    def outputs(source):
        test = {'views': views, 'batch_size': batch_size, 'max_bad': max_bad}
        found = [probabilities(checkpoint, source, mesh, **test) for checkpoint in checkpoints]
        return [p for p, _ in found], found[0][1]

    tested = outputs(source)
    if tune_on is not None:
        weights = ensemble.tune(*(tested if tune_on is source else outputs(tune_on)))
    elif weights is None:
        weights = [1.0] * len(checkpoints)
    averaged, labels = ensemble.average(tested[0], weights), tested[1]
    scores = np.log(np.maximum(averaged, np.finfo(np.float32).tiny))
    total = None
    for start in range(0, len(labels), 4096):  # metrics sorts nothing, but it compares: some at a time
        part, own = scores[start : start + 4096], labels[start : start + 4096]
        sums = metrics.sums(metrics.take_label(part, own), part, own, np.ones(len(own), np.float32))
        total = metrics.merge(total, _host(sums))
    return {**metrics.means(total), 'count': len(labels), 'weights': [float(w / sum(weights)) for w in weights]}


def predict(checkpoint: Checkpoint, image_NHWC, *, views: int = 1, batch_size: int = 128, mesh=None) -> np.ndarray:
    """Softmax outputs of the centre crop, or averaged over the paper's ten views (section 4.1).

    Args:
      checkpoint: from `load_checkpoint`.
      image_NHWC: uint8 [N, S, S, 3] with S = `checkpoint.record_size`, prepared as the training images were.
      views: 1 for the centre alone, or 10.
      batch_size: images at a time, at most.
      mesh: from `sharding.make_mesh`; None computes on one device.

    Returns:
      float32 [N, K]; column i is `checkpoint.class_names[i]`.

    Raises:
      UserError: images of another shape or type, or another number of views.
    """
    image_NHWC = np.asarray(image_NHWC)
    side = checkpoint.record_size
    if image_NHWC.dtype != np.uint8 or image_NHWC.shape[1:] != (side, side, 3):
        raise UserError(
            f'images are {image_NHWC.dtype} of shape {image_NHWC.shape}; expected uint8 of (N, {side}, {side}, 3).'
        )
    mesh = mesh or sharding.make_mesh(data=1, tower=1)
    function, params, statistics, batch_size = _ready(
        steps.log_probabilities, checkpoint, mesh, views, batch_size, len(image_NHWC)
    )
    parts = []
    for start in range(0, len(image_NHWC), batch_size):
        part = image_NHWC[start : start + batch_size]
        missing = batch_size - len(part)  # fill the last batch up: one shape, one compilation
        part = np.concatenate([part, np.zeros((missing, *part.shape[1:]), np.uint8)])
        parts.append(np.exp(function(params, part, statistics))[: batch_size - missing])
    return np.concatenate(parts) if parts else np.zeros((0, len(checkpoint.class_names)), np.float32)


def check_data(checkpoint: Checkpoint, dataset: sources.Dataset, path: str) -> None:
    """Raises UserError where classes or record size of the data are not the checkpoint's; path: for the message."""
    if len(dataset.class_names) != len(checkpoint.class_names):
        raise UserError(f'the data have {len(dataset.class_names)} classes, {path} has {len(checkpoint.class_names)}.')
    if dataset.class_names != checkpoint.class_names:
        pair = next(p for p in zip(dataset.class_names, checkpoint.class_names, strict=True) if p[0] != p[1])
        raise UserError(f'the data call a class {pair[0]!r} where {path} has {pair[1]!r}; labels would not match.')
    check_record_size(checkpoint, dataset, path)


def check_record_size(checkpoint: Checkpoint, dataset: sources.Dataset, path: str) -> None:
    """Raises UserError where the images of these data are not of the size that a checkpoint was trained on."""
    if dataset.record_size != checkpoint.record_size:
        raise UserError(
            f'the data are prepared at {dataset.record_size} px, those of {path} at {checkpoint.record_size}; '
            f'prepare them with --size={checkpoint.record_size}.'
        )


def main() -> None:
    args = flags.FLAGS
    if args.batch_size < 1 or args.tower not in (1, 2) or args.max_bad < 0:
        raise UserError(
            f'--batch_size={args.batch_size}, --tower={args.tower}, --max_bad={args.max_bad}; expected at least 1, 1 '
            'or 2, and at least 0.'
        )
    weights = _weights(args.weights, len(args.checkpoint))
    cli.set_up_jax()
    dataset = sources.open_dataset(args.data)
    source = dataset.split(args.split)
    tune_on = dataset.split('val') if args.weights == 'tuned' else None
    checkpoints = [load_checkpoint(path) for path in args.checkpoint]
    for path, checkpoint in zip(args.checkpoint, checkpoints, strict=True):
        check_data(checkpoint, dataset, path)
        layers.sizes(checkpoint.network, checkpoint.image_size, towers=args.tower)
        if args.views == 10 and not checkpoint.augmentation.reflect:
            warn(f'{path} was trained without reflections; five of the ten views are reflections.')
    mesh = sharding.make_mesh(data=max(1, len(jax.devices()) // args.tower), tower=args.tower)
    test = {'views': args.views, 'batch_size': args.batch_size, 'max_bad': args.max_bad}
    keys = ['top1_error', 'top5_error', 'loss', 'count']
    if len(checkpoints) == 1:
        result = evaluate(checkpoints[0], source, mesh, **test)
        name = f'{args.checkpoint[0]} (step {checkpoints[0].step})'
    else:
        result = evaluate_ensemble(checkpoints, source, mesh, weights=weights, tune_on=tune_on, **test)
        keys.append('weights')
        said = ', '.join(
            f'{path} {weight:.3f}' for path, weight in zip(args.checkpoint, result['weights'], strict=True)
        )
        how = {'': 'equal', 'tuned': 'tuned for the top-5 error on val'}.get(args.weights, 'given')
        if tune_on is not None and args.split == 'val':
            how += ', the images they are tested on here'
        name = f'{len(checkpoints)} networks (weights {said}; {how})'
    crops = 'centre crop' if args.views == 1 else 'ten views'
    print(
        f'{name}, {args.split} of {args.data}, {result["count"]} images, {crops}: '
        f'top-1 error {result["top1_error"]:.2f}%, top-5 error {result["top5_error"]:.2f}%, loss {result["loss"]:.4f}'
    )
    if args.json:
        print(json.dumps({**{key: result[key] for key in keys}, 'views': args.views}))


def _weights(text: str, count: int) -> list[float] | None:
    """--weights as numbers; None where they are equal or to be tuned."""
    if count == 1 and text:
        raise UserError(f'--weights={text} for one checkpoint; give --checkpoint several times.')
    if text in ('', 'tuned'):
        return None
    try:
        weights = [float(word) for word in text.split(',')]
    except ValueError:
        raise UserError(f"--weights={text}; expected numbers with commas between them, or 'tuned'.") from None
    if len(weights) != count or not all(w >= 0 for w in weights) or not 0 < sum(weights) < np.inf:
        raise UserError(f'--weights={text} for {count} checkpoints; expected one of 0 or more for each, not all 0.')
    return weights


if __name__ == '__main__':
    flags.DEFINE_multi_string(
        'checkpoint', None, "A workdir (its best step, else its latest) or one step's folder; several: an ensemble."
    )
    flags.DEFINE_string('data', None, "A prepared directory, or 'digits'.")
    flags.DEFINE_string('split', 'val', 'The split to evaluate on.')
    cli.define_views()
    flags.DEFINE_string('weights', '', "Of an ensemble: numbers with commas, or 'tuned' on the val split; else equal.")
    flags.DEFINE_integer('batch_size', 128, 'Images at a time.')
    flags.DEFINE_integer('tower', 1, 'Devices a network is split over: 1, or 2.')
    flags.DEFINE_integer('max_bad', 0, 'Unreadable images to leave out before giving up.')
    flags.DEFINE_boolean('json', False, 'Print one JSON object as the last line.')
    cli.define_cpu_devices()
    cli.run(main, required=('checkpoint', 'data'))
