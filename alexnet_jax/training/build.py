"""Builds the objects of a training run from a config: dataset, mesh, storage and jitted steps."""

import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from alexnet_jax.core import architecture, augment, optim, sharding, train_step
from alexnet_jax.core.augment import Augmentation
from alexnet_jax.core.config import optimizer_from_config
from alexnet_jax.core.image_stats import ImageStats
from alexnet_jax.core.metrics import Sums
from alexnet_jax.core.model import AlexNet
from alexnet_jax.core.train_step import TrainState
from alexnet_jax.data import datasets, pipeline, random_crops
from alexnet_jax.data.cache import Batch, DeviceCache, HostCache, Records, Storage
from alexnet_jax.data.image_stats_file import FILE_NAME
from alexnet_jax.training import recipes
from alexnet_jax.training.check_config import network_and_augmentation
from alexnet_jax.utils import compiler, processes
from alexnet_jax.utils.errors import UserError, check_type, first_line

DeviceBatch = dict[str, jax.Array]  # batch on the mesh; global shapes


@dataclasses.dataclass(frozen=True)
class TrainingSteps:
    """Jitted functions of a training run, and its optimizer."""

    optimizer: optim.Optimizer
    state_shapes: TrainState  # ShapeDtypeStructs with shardings
    init: Callable[[jax.Array], TrainState]  # key -> state
    # (state, batch, image_stats, key) -> (state, report). The input state is donated. See `train_step.train_step`.
    train_step: Callable[[TrainState, DeviceBatch, ImageStats, jax.Array], tuple[TrainState, dict[str, Any]]]
    # (params, batch, image_stats) -> metric sums for the center crop. See `train_step.eval_step`.
    eval_step: Callable[[Any, DeviceBatch, ImageStats], Sums]
    # (opt_state, top-1 error in percent) -> opt_state. See `optim.Optimizer`.
    after_validation: Callable[[optim.SgdState, float], optim.SgdState]


@dataclasses.dataclass(frozen=True)
class TrainingSetup:
    """Objects built from a config, for `train_and_evaluate` or for your own loop.

    `image_stats` is replicated on the mesh. `storage` holds the training images: the train split, or the subset that
    `data.fraction` selects. `num_workers` processes decode them (0: threads of this process). `total_steps` is the
    number of updates in a complete run.
    """

    config: ConfigDict
    dataset: datasets.Dataset
    network: AlexNet
    augmentation: Augmentation
    mesh: Mesh
    image_stats: ImageStats
    storage: Storage
    num_workers: int
    steps: TrainingSteps
    total_steps: int

    def init(self, key: jax.Array) -> TrainState:
        """Returns an initial state on the mesh (`.step`, `.params`, `.opt_state`). key: such as `jax.random.key(0)`."""
        return self.steps.init(key)

    def train_step(self, state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        """Runs one update on a batch of arrays, for your own loop in a single process.

        Crop, reflection, color and dropout are drawn from (`config.seed`, `state.step`). For `config.batch_size` images
        these are the draws of `train_and_evaluate` in that step. Reading `state.step` waits for the previous update.

        Args:
          state: from `init` or the previous update. It is donated: use the returned state afterwards.
          batch: arrays 'image' uint8 [N, S, S, 3], 'label' int [N] and, optionally, 'weight' [N] (0 excludes an image,
            1 includes it). S is the record size of the dataset, or the input size of the network; the latter images are
            not cropped.

        Returns:
          (state, metrics). The metrics are scalars on the device: 'loss' (mean, nats), 'top1_error' and 'top5_error'
          (percent), 'gradient_norm', 'learning_rate' (of this update) and 'finite' (False: the update was skipped).

        Raises:
          UserError: a shape or type is wrong, a label is not a class index, or N does not fit the mesh.
        """
        check_type('the state', state, TrainState, 'a TrainState; use that of init or of the previous update')
        images, labels, weight = _batch_arrays(batch, self.network.num_classes)
        _check_batch_size(self.config, self.mesh, len(labels))
        options = {'seed': self.config.seed, 'step': int(state.step), 'record_size': self.dataset.record_size}
        arrays = random_crops.augment_arrays(images, self.augmentation, **options)
        arrays |= {'label': labels.astype(np.int32), 'weight': weight}
        on_mesh = sharding.to_mesh(self.mesh, arrays)
        state, report = self.steps.train_step(state, on_mesh, self.image_stats, self.key)
        count = jnp.maximum(report['weight'], 1)
        means = {f'{name}_error': 100 * report[name] / count for name in ('top1', 'top5')}
        rest = {name: report[name] for name in ('gradient_norm', 'learning_rate', 'finite')}
        return state, {'loss': report['loss'] / count, **means, **rest}

    @functools.cached_property
    def key(self) -> jax.Array:
        """Random key of the run, on the mesh."""
        return sharding.random_key(self.mesh, self.config.seed)

    @property
    def num_examples(self) -> int:
        """Number of images in one pass through the training data."""
        return len(self.storage.records)

    def train_batches(self, start_step: int) -> Generator[Batch, None, None]:
        """Yields train batches on the host, endlessly (see `pipeline.train_batches`). Close the generator after use."""
        return pipeline.train_batches(
            self.storage,
            seed=self.config.seed,
            start_step=start_step,
            augmentation=self.augmentation,
            num_workers=0 if self.config.data.cache else self.num_workers,  # cached images are decoded
            **self._input_options,
        )

    def val_batches(self) -> Generator[Batch, None, None]:
        """Yields val batches on the host, endlessly (see `pipeline.eval_batches`). Close the generator after use."""
        return pipeline.eval_batches(
            self.dataset.splits.get('val', ()),
            record_size=self.dataset.record_size,
            repeat=True,
            num_workers=self.num_workers,
            **self._input_options,
        )

    def to_mesh(self, batch: Batch) -> DeviceBatch:
        """Copies a training batch to the devices. Logs a warning for each image that could not be read."""
        return {**sharding.to_mesh(self.mesh, pipeline.warn_unreadable(batch)), **self.storage.on_device}

    def prefetch(self, batches: Iterator[Batch]) -> Iterator[tuple[DeviceBatch, float]]:
        """Yields (batch on the mesh, seconds waited), from `train_batches`. See `pipeline.prefetch_groups`."""
        return pipeline.prefetch_groups(batches, self._send, pipeline.batches_at_once(self.storage))

    def _send(self, batches: list[Batch]) -> list[DeviceBatch]:
        if len(batches) == 1 or len(batches) < pipeline.batches_at_once(self.storage):  # the end of a run
            return [self.to_mesh(batch) for batch in batches]
        return [{**batch, **self.storage.on_device} for batch in pipeline.to_mesh_at_once(self.mesh, batches)]

    @property
    def _input_options(self) -> dict[str, Any]:
        return {
            'batch_size': self.config.batch_size,
            'shard': sharding.data_shard(self.mesh),
            'num_threads': self.config.data.num_threads,
        }


def build(config: ConfigDict, dataset: datasets.Dataset | None = None, devices: list | None = None) -> TrainingSetup:
    """Builds all objects of a training run from a config. Checks the config before anything is compiled.

    Args:
      config: from `alexnet_jax.get_config`. configs/paper.py explains every key.
      dataset: for example from `alexnet_jax.in_memory`. None opens the dataset at `config.data.path`.
      devices: None uses `jax.devices()`. Steps for devices that this machine lacks (`topologies.topology_devices`)
        can be compiled but not run; `image_stats` then holds only shapes.

    Returns:
      A `TrainingSetup`. Its `init` and `train_step` are enough for a training loop:

        setup = alexnet_jax.build(config, dataset)
        state = setup.init(jax.random.key(0))
        state, metrics = setup.train_step(state, {'image': images, 'label': labels})

    Raises:
      UserError: the config is inconsistent or does not fit the data or the devices, or the images do not fit into the
        memory that `data.cache` selects.
    """
    if devices is not None:
        check_type('devices', devices, list | tuple | np.ndarray, 'a list, such as jax.devices()')
    network, augmentation = network_and_augmentation(config)
    dataset = datasets.open_dataset(config.data.path) if dataset is None else dataset
    check_type('the dataset', dataset, datasets.Dataset, 'a Dataset; use alexnet_jax.in_memory, or None for data.path')
    _check_dataset(dataset, config.data.path, network)
    augment.crop_positions(dataset.record_size, augmentation.image_size)
    mesh = sharding.make_mesh(data=config.mesh.data, tower=config.mesh.tower, devices=devices)
    gathers = mesh.shape['tower'] == 2 or (config.mesh.dense == 'split' and mesh.shape['data'] > 1)
    if network.dtype == 'bfloat16' and gathers and mesh.devices.flat[0].platform == 'cpu':
        raise UserError(  # XLA's AllReducePromotion pass would crash the process
            "model.dtype='bfloat16' with mesh.tower=2 or mesh.dense='split': XLA's CPU compiler crashes; use "
            '--config.mesh.tower=1 with --config.mesh.dense=replicated, or --config.model.dtype=float32.'
        )
    # Check the config's number of towers, even if a single device holds both.
    architecture.infer_shapes(network, augmentation.image_size, towers=config.mesh.tower)
    _check_batch_size(config, mesh, config.batch_size)
    num_workers = _num_workers(config, dataset, mesh, config.batch_size // sharding.data_shard(mesh)[1])
    records = datasets.subset(dataset.splits['train'], config.data.fraction)
    storage = _make_storage(config.data, records, dataset.record_size, mesh, num_workers)
    steps_per_epoch = len(storage.records) / config.batch_size
    total_steps = config.num_steps or math.ceil(config.num_epochs * steps_per_epoch)
    put = jax.device_put if devices is None else sharding.shape_structs
    return TrainingSetup(
        config=config,
        dataset=dataset,
        network=network,
        augmentation=augmentation,
        mesh=mesh,
        image_stats=put(dataset.image_stats, sharding.replicated(mesh)),
        storage=storage,
        num_workers=num_workers,
        steps=make_steps(config, network, augmentation, mesh, steps_per_epoch, total_steps),
        total_steps=total_steps,
    )


def make_steps(
    config: ConfigDict,
    network: AlexNet,
    augmentation: Augmentation,
    mesh: Mesh,
    steps_per_epoch: float,
    total_steps: int,
) -> TrainingSteps:
    """Jits the functions of a run. Raises UserError if a value in `optim` is out of range."""
    hooks = recipes.optimizer_hooks(config.optim, steps_per_epoch, total_steps)
    layers = list(network.layers)
    optimizer = optimizer_from_config(config.optim, steps_per_epoch=steps_per_epoch, layers=layers, **hooks)
    split = {'split_dense': config.mesh.dense == 'split'}
    forward = sharding.forward(network, mesh, **split)
    init = functools.partial(train_step.init_state, network, optimizer, image_size=augmentation.image_size)
    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings, replicated = sharding.state_sharding(mesh, shapes, **split), sharding.replicated(mesh)
    # With the first option alone, XLA (JAX 0.11) lowers products to Triton, which that option forbids, and fails.
    options: dict[str, Any] = compiler.compiler_options(mesh.devices.flat[0].platform)
    if config.deterministic:
        options |= {'xla_gpu_deterministic_ops': True, 'xla_gpu_enable_triton_gemm': False}
    jit = functools.partial(jax.jit, compiler_options=options)
    update = functools.partial(
        train_step.train_step,
        network=network,
        forward=forward,
        optimizer=optimizer,
        augmentation=augmentation,
        color_steps=round(augmentation.color_epochs * steps_per_epoch) if augmentation.color_epochs else None,
        grad_accum_steps=config.grad_accum_steps,
        data_shards=mesh.shape['data'],
        **recipes.step_hooks(config),
    )
    evaluate = functools.partial(train_step.eval_step, forward=forward, augmentation=augmentation, views=1)
    return TrainingSteps(
        optimizer=optimizer,
        state_shapes=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings),
        # `init` runs once, so skip LLVM's optimization of the random draws, which takes seconds on a CPU.
        init=jit(init, out_shardings=shardings, compiler_options={**options, 'xla_backend_optimization_level': 1}),
        # jax_debug_nans reruns a step that produced NaN, so with `debug` the old state must not be donated.
        train_step=jit(update, out_shardings=(shardings, replicated), donate_argnums=() if config.debug else 0),
        eval_step=jit(evaluate, out_shardings=replicated),
        after_validation=jit(optimizer.after_validation, out_shardings=shardings.opt_state),
    )


def _batch_arrays(batch: Mapping[str, Any], num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the images, labels and weights of `TrainingSetup.train_step`. Raises UserError if they are invalid."""
    check_type('the batch', batch, Mapping, "a dict of 'image', 'label' and, optionally, 'weight'")
    if missing := {'image', 'label'} - set(batch):
        raise UserError(f"the batch has no {min(missing)!r}: expected 'image', 'label' and, optionally, 'weight'.")
    arrays: dict[str, np.ndarray] = {}
    for name in ('image', 'label', 'weight'):
        try:
            arrays[name] = np.asarray(batch[name]) if name in batch else np.ones(len(arrays['image']))
        except (TypeError, ValueError) as error:
            raise UserError(f'{name!r} of the batch is not one array: {first_line(error)}.') from error
        if not arrays[name].ndim or (name != 'image' and arrays[name].ndim > 1):
            expected = '[N, S, S, 3]' if name == 'image' else '[N]'
            raise UserError(f'{name!r} of the batch has the shape {arrays[name].shape}: expected {expected}.')
    images, labels, weight = arrays.values()
    if not 0 < len(images) == len(labels) == len(weight):
        found = f'{len(images)} images, {len(labels)} labels and {len(weight)} weights'
        raise UserError(f'the batch has {found}: expected equal numbers, at least 1.')
    if labels.dtype.kind not in 'iu' or labels.min() < 0 or labels.max() >= num_classes:
        limits = f' from {labels.min()} to {labels.max()}' if labels.dtype.kind in 'iuf' else ''
        raise UserError(f'the labels are {labels.dtype}{limits}: expected integers from 0 to {num_classes - 1}.')
    if weight.dtype.kind not in 'biuf' or not (np.isfinite(weight) & (weight >= 0)).all():
        raise UserError(f'the weights are {weight.dtype}: expected finite numbers of 0 or more.')
    return images, labels, weight.astype(np.float32)


def _check_batch_size(config: ConfigDict, mesh: Mesh, size: int) -> None:
    """Raises UserError if a batch does not divide into the mesh's shards and microbatches, for mixup into pairs."""
    sharding.check_batch(mesh, size, config.grad_accum_steps)
    if config.data.mixup_alpha and (size // config.grad_accum_steps // mesh.shape['data']) % 2:
        raise UserError(
            f'batch_size={size}, grad_accum_steps={config.grad_accum_steps}, mesh.data={mesh.shape["data"]}: expected '
            'an even number of images per device and microbatch, because data.mixup_alpha mixes pairs.'
        )


def _check_dataset(dataset: datasets.Dataset, path: str, network: AlexNet) -> None:
    """Raises UserError if a dataset has no training data, or not as many classes as the network has outputs."""
    if dataset.image_stats is None or 'train' not in dataset.splits:
        missing = 'no train split' if 'train' not in dataset.splits else f'no {FILE_NAME}'
        raise UserError(f'{path!r} has {missing}; prepare training images with alexnet_jax prepare.')
    if len(dataset.class_names) != network.num_classes:
        raise UserError(
            f'model.num_classes={network.num_classes}: the data have {len(dataset.class_names)} classes; use '
            f'--config.model.num_classes={len(dataset.class_names)}.'
        )


def _num_workers(config: ConfigDict, dataset: datasets.Dataset, mesh: Mesh, rows: int) -> int:
    """Resolves `data.num_workers`. -1 becomes 0 if the step needs the CPU cores or the images are already decoded."""
    script = processes.script_without_guard()
    if config.data.num_workers > 0 and script:
        raise UserError(
            f'data.num_workers={config.data.num_workers}: each worker process would run {script!r} again; move its '
            "code under if __name__ == '__main__':, or use --config.data.num_workers=0 (threads)."
        )
    if config.data.num_workers >= 0:
        return config.data.num_workers
    if mesh.devices.flat[0].platform == 'cpu' or script or isinstance(dataset.splits['train'], list):
        return 0
    row_bytes = 3 * (config.data.image_size**2 + dataset.record_size**2)
    return pipeline.default_workers(rows, row_bytes, len(mesh.local_devices))


def _make_storage(config: ConfigDict, records: Sequence, record_size: int, mesh: Mesh, num_workers: int) -> Storage:
    """Stores the training images as `data.cache` selects. Raises UserError if they need too much memory."""
    if not config.cache:
        return Records(records, record_size)
    _check_memory(config.cache, len(records), record_size, mesh)
    images, labels = pipeline.decode_all(records, record_size, num_workers)
    if config.cache == 'host' and config.crop_area:  # crops of varying size are resized on the host, not in the step
        pairs = zip(images, labels, strict=True)
        return Records([{'image': image, 'label': int(label)} for image, label in pairs], record_size)
    if config.cache == 'host':
        return HostCache(images, labels)
    replicated = sharding.replicated(mesh)
    return DeviceCache(jax.make_array_from_callback(images.shape, replicated, lambda part: images[part]), labels)


def _check_memory(cache: str, count: int, record_size: int, mesh: Mesh) -> None:
    """Raises UserError if the decoded images need more than 80% of the memory of the host or of a device."""
    host = device = count * 3 * record_size**2
    limit = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit') if cache == 'device' else None
    if cache == 'device' and not limit:  # CPU devices: each copy shares the host's memory with the decoded array
        host *= 1 + len(mesh.local_devices)
    for needed, memory in ((host, processes.memory()), (device, limit)):
        if memory and needed > 0.8 * memory:
            raise UserError(
                f'data.cache={cache!r}: the {count} training images need {needed / 2**30:.1f} GiB, more than 80% '
                f"of the {memory / 2**30:.1f} GiB of memory; use --config.data.cache=''."
            )
