"""A config's objects: dataset, network, mesh, optimiser, and the jitted steps over them."""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from alexnet_jax import augment, data, layers, model, optim, processes, sharding, sources, steps
from alexnet_jax.errors import UserError, did_you_mean
from alexnet_jax.statistics import FILE_NAME

_KEYS = {  # of every config; the values are explained in configs/paper.py
    '': (
        'seed', 'batch_size', 'accumulate', 'num_epochs', 'num_steps', 'log_every_steps', 'eval_every_steps',
        'checkpoint_every_steps', 'stop_at_error', 'init_from', 'init_fresh', 'on_nonfinite', 'max_nonfinite', 'debug',
        'deterministic', 'data', 'model', 'mesh', 'optim',
    ),
    'data.': ('path', 'fraction', 'num_workers', 'num_threads', 'cache', 'max_bad', *augment.Augmentation._fields),
    'mesh.': ('data', 'tower'),
    'optim.': [  # but for what follows from the data and the network
        name for name in inspect.signature(optim.make_optimizer).parameters if name not in ('steps_per_epoch', 'layers')
    ],
}  # fmt: skip


class Run(NamedTuple):
    """A config's objects, ready to call; a notebook can take them from here."""

    dataset: sources.Dataset
    network: model.AlexNet
    augmentation: augment.Augmentation
    mesh: Mesh
    optimizer: optim.Optimizer
    statistics: Any  # Statistics, on the mesh
    batches: Callable  # first step -> iterator over training batches on the host; close() it
    val_batches: Callable  # () -> the same of the val split, pass after pass
    to_mesh: Callable  # host batch -> global arrays; names the images in it that cannot be read
    state_shapes: steps.TrainState  # ShapeDtypeStructs with shardings
    init: Callable  # key -> TrainState
    train_step: Callable  # (state, batch, statistics, key) -> (state, report); takes the state over
    eval_step: Callable  # (params, batch, statistics) -> sums, of the centre crop
    after_validation: Callable  # (opt_state, error) -> opt_state
    num_workers: int  # processes that decode; 0: threads
    examples: int  # in the train split
    total_steps: int


def build(config: ConfigDict, dataset: sources.Dataset | None = None, devices: list | None = None) -> Run:
    """Turns a config into objects, checking all that can be checked before anything is compiled.

    Args:
      config: see configs/paper.py.
      dataset: None opens that at `config.data.path`.
      devices: None takes those of this machine. With devices that are only described (`traffic.topology_devices`) the
        steps can be compiled, and `statistics` has shapes alone.

    Raises:
      UserError: the config does not fit the data, the devices or itself.
    """
    network, augmentation = network_of(config)
    dataset = sources.open_dataset(config.data.path) if dataset is None else dataset
    if dataset.statistics is None or 'train' not in dataset.splits:
        missing = 'no train split' if 'train' not in dataset.splits else f'no {FILE_NAME}'
        raise UserError(f'{config.data.path!r} has {missing}; prepare training images with alexnet_jax.prepare.')
    if len(dataset.class_names) != network.num_classes:
        raise UserError(
            f'the data have {len(dataset.class_names)} classes, the model {network.num_classes}; '
            f'use --config.model.num_classes={len(dataset.class_names)}.'
        )
    image_size = augmentation.image_size
    augment.crop_positions(dataset.record_size, image_size)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    if network.dtype == 'bfloat16' and mesh.shape['tower'] == 2 and mesh.devices.flat[0].platform == 'cpu':
        raise UserError(  # XLA's AllReducePromotion takes the whole process down
            "XLA's CPU compiler crashes on model.dtype='bfloat16' over two towers; use --config.mesh.tower=1 "
            'or --config.model.dtype=float32.'
        )
    layers.sizes(network, image_size, towers=config.mesh.tower)  # also where a single device holds both
    sharding.check_batch(mesh, config.batch_size, config.accumulate)

    shard = sharding.data_shard(mesh)
    num_workers = _workers(config, dataset, mesh, config.batch_size // shard[1])
    part = sources.subset(dataset.splits['train'], config.data.fraction)
    train, in_memory, on_device = _cached(config.data, part, dataset, mesh, num_workers)
    pipeline = dict(
        batch_size=config.batch_size,
        record_size=dataset.record_size,
        shard=shard,
        num_threads=config.data.num_threads,
    )

    def batches(start_step: int):
        return data.train_batches(
            train,
            seed=config.seed,
            start_step=start_step,
            augmentation=augmentation,
            records_on_device=bool(on_device),
            in_memory=in_memory,
            num_workers=0 if config.data.cache else num_workers,  # then nothing is left to decode
            **pipeline,
        )

    def val_batches():
        return data.eval_batches(dataset.splits.get('val', ()), repeat=True, num_workers=num_workers, **pipeline)

    examples = len(train)
    steps_per_epoch = examples / config.batch_size
    optimizer = optim.make_optimizer(**config.optim, steps_per_epoch=steps_per_epoch, layers=list(network.table()))
    forward = sharding.forward(network, mesh)
    init = functools.partial(steps.init_state, network, optimizer, image_size=image_size)
    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = sharding.state_sharding(mesh, shapes)
    everywhere = sharding.replicated(mesh)
    place = jax.device_put if devices is None else sharding.shape_structs
    # With the first alone XLA of JAX 0.11 makes products for Triton, may not use it then, and finds no other for some.
    fixed = {'xla_gpu_deterministic_ops': True, 'xla_gpu_enable_triton_gemm': False}
    options = fixed if config.deterministic else {}
    jit = functools.partial(jax.jit, compiler_options=options)
    return Run(
        dataset=dataset,
        network=network,
        augmentation=augmentation,
        mesh=mesh,
        optimizer=optimizer,
        statistics=place(dataset.statistics, everywhere),
        batches=batches,
        val_batches=val_batches,
        to_mesh=lambda batch: {**sharding.to_mesh(mesh, data.warn_unreadable(batch)), **on_device},
        state_shapes=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings),
        # It runs once: LLVM's optimisation of its random draws takes seconds on a CPU, and is left out.
        init=jit(init, out_shardings=shardings, compiler_options={**options, 'xla_backend_optimization_level': 1}),
        train_step=jit(
            functools.partial(
                steps.train_step,
                network=network,
                forward=forward,
                optimizer=optimizer,
                augmentation=augmentation,
                colour_steps=round(augmentation.colour_epochs * steps_per_epoch)
                if augmentation.colour_epochs
                else None,
                accumulate=config.accumulate,
                data_parts=mesh.shape['data'],
            ),
            out_shardings=(shardings, everywhere),
            donate_argnums=() if config.debug else 0,  # a NaN check runs the step a second time
        ),
        eval_step=jit(
            functools.partial(steps.eval_step, forward=forward, augmentation=augmentation, views=1),
            out_shardings=everywhere,
        ),
        after_validation=jit(optimizer.after_validation, out_shardings=shardings.opt_state),
        num_workers=num_workers,
        examples=examples,
        total_steps=config.num_steps or math.ceil(config.num_epochs * steps_per_epoch),
    )


def network_of(config: ConfigDict) -> tuple[model.AlexNet, augment.Augmentation]:
    """A config's network and augmentation, without looking at data or devices. Raises UserError."""
    _check_keys(config)
    _check_ranges(config)
    return model.from_config(config.model), augment.from_config(config.data)


def _workers(config: ConfigDict, dataset: sources.Dataset, mesh: Mesh, rows: int) -> int:
    """`data.num_workers`, or for -1: none where the step needs the cores, or where nothing has to be decoded."""
    script = processes.script_without_guard()
    if config.data.num_workers > 0 and script:
        raise UserError(
            f'data.num_workers={config.data.num_workers}: each of these processes would run {script!r} once more; put '
            "what it does under if __name__ == '__main__':, or decode in threads (0)."
        )
    if config.data.num_workers >= 0:
        return config.data.num_workers
    if mesh.devices.flat[0].platform == 'cpu' or script or isinstance(dataset.splits['train'], list):
        return 0
    row_bytes = 3 * (config.data.image_size**2 + dataset.record_size**2)
    return data.default_workers(rows, row_bytes, len(mesh.local_devices))


def _cached(
    config: ConfigDict, train: Sequence, dataset: sources.Dataset, mesh: Mesh, num_workers: int
) -> tuple[Sequence, np.ndarray | None, dict[str, jax.Array]]:
    """(the training records, their pixels in memory, what is on the devices for each batch), as `data.cache` says."""
    if not config.cache:
        return train, None, {}
    where, size = config.cache, dataset.record_size
    host = device = len(train) * 3 * size**2
    limit = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit') if where == 'device' else None
    if where == 'device' and not limit:  # a CPU's devices share its memory with the array that is read into
        host *= 1 + len(mesh.local_devices)
    for needed, memory in ((host, processes.memory()), (device, limit)):
        if memory and needed > 0.8 * memory:
            raise UserError(
                f'data.cache={where!r}: the {len(train)} training images take {needed / 2**30:.1f} GiB, more than 80% '
                f"of the {memory / 2**30:.1f} GiB of memory; use --config.data.cache=''."
            )
    images, labels = data.decode_all(train, size, num_workers)
    known = [{'label': label} for label in labels]
    if where == 'host' and config.crop_area:  # what has to be resized is cut out here
        return [{'image': image, **record} for image, record in zip(images, known, strict=True)], None, {}
    if where == 'host':
        return known, images, {}
    everywhere = sharding.replicated(mesh)
    records = jax.make_array_from_callback(images.shape, everywhere, lambda part: images[part])
    return known, None, {'records': records}


def _check_keys(config: ConfigDict) -> None:
    """Raises UserError for a key that nothing reads, or that is missing (for model's keys see `model.from_config`)."""
    for prefix, known in _KEYS.items():
        given = config[prefix[:-1]].keys() if prefix else config.keys()
        for key in given:
            if key not in known:
                raise UserError(f'the config has a key {prefix + key!r} that means nothing.{did_you_mean(key, known)}')
        for key in known:
            if key not in given:
                raise UserError(f'the config has no {prefix + key!r}; take it over from configs/paper.py.')


def _check_ranges(config: ConfigDict) -> None:
    if config.init_fresh and not config.init_from:
        raise UserError(
            f'init_fresh={config.init_fresh} names layers to draw anew, but init_from is empty; set it, or drop '
            'init_fresh.'
        )
    if config.on_nonfinite not in ('stop', 'skip'):
        raise UserError(f"on_nonfinite={config.on_nonfinite!r}; expected 'stop' or 'skip'.")
    cache = config.data.cache
    if cache not in ('', 'host', 'device'):
        raise UserError(f"data.cache={cache!r}; expected '', 'host' or 'device'.")
    if cache == 'device' and config.data.crop_area:
        raise UserError("data.cache='device' cannot resize; use data.cache='host' with data.crop_area.")
    if not 0 < config.data.fraction <= 1:
        raise UserError(f'data.fraction={config.data.fraction}; expected a number above 0, at most 1.')
    if not 0 <= config.stop_at_error < 100:
        raise UserError(f'stop_at_error={config.stop_at_error}; expected percent: 0 (never), or up to, not with, 100.')
    if not 0 <= config.seed < 2**31:
        raise UserError(f'seed={config.seed}; expected 0 to 2^31 - 1.')
    if config.num_steps <= 0 and not 0 < config.num_epochs < math.inf:
        raise UserError(
            f'num_epochs={config.num_epochs}, num_steps={config.num_steps}; expected one of them above 0, and finite.'
        )
    if config.mesh.tower not in (1, 2):
        raise UserError(f'mesh.tower={config.mesh.tower}; the network has 1 tower or 2.')
    if config.batch_size < 1:
        raise UserError(f'batch_size={config.batch_size}; expected 1 or more.')
    sizes = {key: config[key] for key in ('num_steps', 'log_every_steps', 'eval_every_steps', 'checkpoint_every_steps')}
    sizes |= {f'data.{key}': config.data[key] for key in ('num_threads', 'max_bad')}
    sizes['max_nonfinite'] = config.max_nonfinite
    for key, value in sizes.items():
        if value < 0:
            raise UserError(f'{key}={value}; expected 0 or more.')
    if config.data.num_workers < -1:
        raise UserError(f'data.num_workers={config.data.num_workers}; expected -1 or more.')
