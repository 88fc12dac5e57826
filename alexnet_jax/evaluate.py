"""Evaluates a checkpoint on a split of prepared data.

python -m alexnet_jax.evaluate --checkpoint=runs/paper --data=DIR [--split=val] [--views=10] [--json]
"""

import functools
import json
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import flags

from alexnet_jax import cli, data, metrics, model, sharding, sources, steps
from alexnet_jax.checkpoint import Checkpoint, load_checkpoint
from alexnet_jax.errors import UserError
from alexnet_jax.statistics import Statistics


def one_pass(
    eval_step: Callable, params, statistics: Statistics, source: Sequence, mesh, *, batch_size: int, **pipeline
) -> dict[str, float]:
    """Counts every record of `source` once.

    Args:
      eval_step: jitted `steps.eval_step`.
      params, statistics: on the mesh.
      batch_size: images at a time; changes nothing in the result.
      pipeline: num_workers, num_threads of `data.eval_batches`.

    Returns:
      'loss' (nats), 'top1_error', 'top5_error' (percent), 'count' (images), 'images_per_second', 'data_wait' (0 to 1).
    """
    total = previous = None
    began, waited = time.perf_counter(), 0.0
    batches = data.eval_batches(source, batch_size=batch_size, shard=sharding.data_shard(mesh), **pipeline)
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        waited += time.perf_counter() - asked
        if batch is None:
            break
        sums = eval_step(params, sharding.to_mesh(mesh, batch), statistics)
        if previous is not None:
            total = metrics.merge(total, _host(previous))  # fetched one late: the device is never idle
        previous = sums
    total = metrics.merge(total, _host(previous))
    elapsed, count = time.perf_counter() - began, round(total['weight'])
    return {
        **metrics.finish(total),
        'count': count,
        'images_per_second': count / elapsed,
        'data_wait': waited / elapsed,
    }


def _host(sums) -> dict[str, float]:
    return {key: float(value) for key, value in jax.device_get(sums).items()}


def evaluate(
    checkpoint: Checkpoint, source: Sequence, mesh, *, views: int = 1, batch_size: int = 128
) -> dict[str, float]:
    """Errors of a checkpoint on a source, from the centre (views=1) or ten views: see `one_pass`."""
    model.check(checkpoint.network, image_size=checkpoint.image_size, towers=mesh.shape['tower'])
    parts = mesh.shape['data']
    batch_size = -(-batch_size // parts) * parts
    eval_step = jax.jit(
        functools.partial(
            steps.eval_step,
            forward=sharding.forward(checkpoint.network, mesh),
            image_size=checkpoint.image_size,
            views=views,
        ),
        out_shardings=sharding.replicated(mesh),
    )
    params = jax.device_put(checkpoint.params, sharding.state_sharding(mesh, checkpoint.params))
    statistics = jax.device_put(checkpoint.statistics, sharding.replicated(mesh))
    return one_pass(eval_step, params, statistics, source, mesh, batch_size=batch_size)


def predict(checkpoint: Checkpoint, image_NHWC, *, views: int = 10, batch_size: int = 128, mesh=None) -> np.ndarray:
    """Softmax outputs, averaged over the paper's ten views or of the centre crop (section 4.1).

    Args:
      checkpoint: from `load_checkpoint`.
      image_NHWC: uint8 [N, S, S, 3] with S = `checkpoint.record_size`, prepared as the training images were.
      views: 10, or 1 for the centre alone.
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
    if mesh is None:
        mesh = sharding.make_mesh(data=1, tower=1)
    divisor = mesh.shape['data']
    batch_size = -(-max(1, min(batch_size, len(image_NHWC))) // divisor) * divisor
    function = _log_probabilities(checkpoint.network, mesh, checkpoint.image_size, views)
    params = jax.device_put(checkpoint.params, sharding.state_sharding(mesh, checkpoint.params))
    parts = []
    for start in range(0, len(image_NHWC), batch_size):
        part = image_NHWC[start : start + batch_size]
        missing = batch_size - len(part)  # fill the last batch up: one shape, one compilation
        part = np.concatenate([part, np.zeros((missing, *part.shape[1:]), np.uint8)])
        parts.append(np.exp(function(params, part, checkpoint.statistics))[: batch_size - missing])
    return np.concatenate(parts) if parts else np.zeros((0, len(checkpoint.class_names)), np.float32)


@functools.lru_cache(maxsize=8)  # so that a second call of the same kind compiles nothing
def _log_probabilities(network, mesh, image_size, views):
    forward = sharding.forward(network, mesh)
    return jax.jit(functools.partial(steps.log_probabilities, forward=forward, image_size=image_size, views=views))


def check_data(checkpoint: Checkpoint, dataset: sources.Dataset) -> None:
    """Raises UserError where a checkpoint cannot be tested on these data."""
    if len(dataset.class_names) != len(checkpoint.class_names):
        raise UserError(
            f'the data have {len(dataset.class_names)} classes, the checkpoint has {len(checkpoint.class_names)}.'
        )
    if dataset.class_names != checkpoint.class_names:
        pair = next(p for p in zip(dataset.class_names, checkpoint.class_names, strict=True) if p[0] != p[1])
        raise UserError(
            f'the data call a class {pair[0]!r} where the checkpoint has {pair[1]!r}; labels would not match.'
        )
    if dataset.record_size != checkpoint.record_size:
        raise UserError(
            f'the data are prepared at {dataset.record_size} px, those of the checkpoint at {checkpoint.record_size}; '
            f'prepare them with --size={checkpoint.record_size}.'
        )


def main() -> None:
    args = flags.FLAGS
    if args.batch_size < 1 or args.tower not in (1, 2):
        raise UserError(f'--batch_size={args.batch_size}, --tower={args.tower}; expected at least 1, and 1 or 2.')
    if args.views not in (1, 10):
        raise UserError(f'--views={args.views}; expected 1 (centre) or 10 (corners and centre, with reflections).')
    cli.use_cpu_devices()
    dataset = sources.open_dataset(args.data)
    source = dataset.split(args.split)
    checkpoint = load_checkpoint(args.checkpoint)
    check_data(checkpoint, dataset)
    mesh = sharding.make_mesh(data=max(1, len(jax.devices()) // args.tower), tower=args.tower)
    result = evaluate(checkpoint, source, mesh, views=args.views, batch_size=args.batch_size)
    crops = 'centre crop' if args.views == 1 else 'ten views'
    print(
        f'{args.checkpoint} (step {checkpoint.step}), {args.split} of {args.data}, {result["count"]} images, {crops}: '
        f'top-1 error {result["top1_error"]:.2f}%, top-5 error {result["top5_error"]:.2f}%, loss {result["loss"]:.4f}'
    )
    if args.json:
        keys = ('top1_error', 'top5_error', 'loss', 'count')
        print(json.dumps({**{key: result[key] for key in keys}, 'views': args.views}))


if __name__ == '__main__':
    flags.DEFINE_string('checkpoint', None, "A workdir (its best step, else its latest) or one step's folder.")
    flags.DEFINE_string('data', None, "A prepared directory, or 'digits'.")
    flags.DEFINE_string('split', 'val', 'The split to evaluate on.')
    flags.DEFINE_integer('views', 1, '1: centre crop; 10: the ten views of section 4.1, softmax averaged.')
    flags.DEFINE_integer('batch_size', 128, 'Images at a time.')
    flags.DEFINE_integer('tower', 1, 'Devices a network is split over: 1, or 2.')
    flags.DEFINE_boolean('json', False, 'Print one JSON object as the last line.')
    cli.define_cpu_devices()
    cli.run(main, required=('checkpoint', 'data'))
