"""Two towers on two devices: the ('data', 'tower') mesh, and the shardings of state and batch.

This is the only file that uses PartitionSpec. The mesh is always passed explicitly.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alexnet_jax.core.architecture import DenseSpec
from alexnet_jax.core.model import AlexNet, Edits, Masks
from alexnet_jax.utils import environment
from alexnet_jax.utils.errors import UserError


def make_mesh(*, data: int, tower: int, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of `data` x `tower` devices, such as 1x1 for one device or 1x2 as in the paper.

    `data` is the number of shards of a batch; 0 uses all devices. `tower` is 1, or the paper's 2 (section 3.2). A
    single device always holds both towers. Raises UserError if the mesh does not fit `devices` (default: all).
    """
    if devices is None:
        devices = jax.devices()
        environment.warn_if_no_accelerator(devices[0].platform)
    if data < 0 or tower not in (1, 2):
        raise UserError(f'mesh.data={data}, mesh.tower={tower}: expected data >= 0 (0: all devices) and tower 1 or 2.')
    if tower == 2 and len(devices) == 1:
        logging.info('One device: it computes both towers (mesh.tower=1).')
        tower = 1
    if data == 0 and len(devices) % tower:
        raise UserError(
            f'mesh.tower=2: {len(devices)} devices cannot be paired; use mesh.data={len(devices) // tower}, leaving '
            'one idle, or mesh.tower=1.'
        )
    data = data or len(devices) // tower
    if data * tower > len(devices):
        raise UserError(
            f'mesh.data={data}, mesh.tower={tower}: needs {data * tower} devices, but there are {len(devices)}; use a '
            'smaller mesh.data, or simulate devices on a CPU with --cpu_devices=N.'
        )
    # With Auto axes, XLA propagates the shardings to the code outside `shard_map` (loss, update). The devices keep the
    # order of JAX, host by host; `jax.make_mesh` rejects GPUs of several hosts.
    chosen = np.array(devices[: data * tower]).reshape(data, tower)
    return Mesh(chosen, ('data', 'tower'), axis_types=(AxisType.Auto,) * 2)


def forward(model: AlexNet, mesh: Mesh, *, split_dense: bool = False) -> Callable[..., Array]:
    """Returns the network mapped over the mesh: `f(params, x_NHWC, masks=None) -> logits_NK`, with global shapes.

    `f(..., edit=EDITS, outputs=[('conv1.relu', -1), ...])` returns sown outputs, by name and index, not the logits. An
    edit (see `AlexNet`) reads the images and channels that the layer's devices hold together, with classes of 0 added
    if the devices do not divide the classes.

    Each device computes its tower for its shard of the batch. The logits are split over both axes. In the forward pass
    devices communicate only where `AlexNet` gathers: before conv3, fc6, fc7 and fc8 in the paper's network. (If the
    devices do not divide the classes, every device holds the whole classifier, which costs more communication.)

    With `split_dense` all devices share each dense layer by its outputs, and compute them for the whole batch: their
    gradients are not summed over `data`. The first dense layer gathers the images, and an all-to-all returns the logits
    to the device of each image. This is scheme (a) of Krizhevsky, "One weird trick for parallelizing convolutional
    neural networks", 2014 (arXiv:1404.5997). Its (b) and (c) gather the same bytes in parts. Raises UserError if the
    devices cannot share a hidden dense layer.

    Take `jax.grad` of a loss of these logits, outside `shard_map`. (Inside, gradients taken after a gather would be
    exactly two times too large, without an error.)
    """
    # Axes of size 1 are left out: XLA's CPU backend would copy all gradients to sum over a single device.
    axes = {axis for axis, size in mesh.shape.items() if size > 1}
    tower_axis, batch_axis = ('tower' if 'tower' in axes else None), ('data' if 'data' in axes else None)
    dense_axis = batch_axis if split_dense else None
    classifier = list(model.layers)[-1]
    padding = -model.num_classes % (mesh.size if dense_axis else mesh.shape['tower'])
    local_model = model.clone(tower_axis=tower_axis, dense_axis=dense_axis, num_classes=model.num_classes + padding)
    if dense_axis:
        _check_dense(local_model, mesh, padding)

    def output_spec(name: str, rank: int) -> P:
        """Returns the spec of a layer's outputs, [N, ..., features]."""
        layer_axes = local_model.split_axes(name)
        images = None if dense_axis in layer_axes else batch_axis
        return P(images, *[None] * (rank - 2), layer_axes)

    def local_forward(params: Any, x_nHWC: Array, masks: Masks | None, edit: Edits | None, outputs: Any) -> Any:
        # The parameters' gradients are partial sums over the batch; the image's gradients are partial sums over towers.
        # Mark both inputs as varying: JAX does not do it implicitly for `custom_vjp` functions, which `ops` uses.
        if batch_axis:
            whole = {name: layer for name, layer in params.items() if dense_axis not in local_model.split_axes(name)}
            params = {**params, **lax.pcast(whole, batch_axis, to='varying')}
        if tower_axis:
            x_nHWC = lax.pcast(x_nHWC, 'tower', to='varying')
        call = functools.partial(local_model.apply, {'params': params}, x_nHWC, masks, edit=edit)
        sown = call(mutable='intermediates')[1]['intermediates'] if outputs else {}
        return [sown[name][index] for name, index in outputs] or [call()]

    def apply(
        params: Any, x: Array, masks: Masks | None = None, *, edit: Edits | None = None, outputs: Sequence[Any] = ()
    ) -> Any:
        if padding:  # the devices do not divide the classes: add some here, and remove their outputs below
            padded = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)]), params[classifier])
            params = {**params, classifier: padded}
            if masks and classifier in masks:
                masks = {**masks, classifier: jnp.pad(masks[classifier], [(0, 0), (0, padding)])}
        local = functools.partial(local_forward, edit=edit, outputs=outputs)
        layers = [name.partition('.')[0] for name, _ in outputs] or [classifier]
        in_specs = (
            {name: jax.tree.map(_last_axis(local_model.split_axes(name)), layer) for name, layer in params.items()},
            P(batch_axis),
            None if masks is None else {name: output_spec(name, mask.ndim) for name, mask in masks.items()},
        )
        out_specs = [output_spec(name, 2 if name.startswith('fc') else 4) for name in layers]
        out_specs = out_specs if outputs else [P(batch_axis, tower_axis)]
        mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axes)
        results = (mapped if axes else local)(params, x, masks)
        if padding:
            results = [y[:, :-padding] if name == classifier else y for name, y in zip(layers, results, strict=True)]
        return results if outputs else results[0]

    return apply


def _check_dense(model: AlexNet, mesh: Mesh, padding: int) -> None:
    """Raises UserError if the devices of a mesh cannot share the dense layers. padding: classes added to the last."""
    for name, layer in model.layers.items():
        if not isinstance(layer, DenseSpec):
            continue
        outputs = layer.features - padding * (name == list(model.layers)[-1])
        # Padding would move the boundary between two groups.
        groups = (1,) if outputs < layer.features else (1, mesh.shape['tower'])
        if layer.features % mesh.size or layer.groups not in groups:
            raise UserError(
                f"mesh.dense='split': {mesh.size} devices cannot share the {outputs} outputs of {name} (groups="
                f'{layer.groups}): expected devices that divide them, and one group or one for each tower '
                f"(mesh.tower={mesh.shape['tower']}); change mesh.data or use mesh.dense='replicated'."
            )


def _last_axis(axes: Sequence[str]) -> Callable[[Array], P]:
    """Returns a function that gives the spec for splitting an array by output channels, its last axis."""
    return lambda array: P(*[None] * (array.ndim - 1), tuple(axes)) if array.ndim else P()


def state_sharding(mesh: Mesh, state: Any, *, split_dense: bool = False) -> Any:
    """Returns a NamedSharding for every leaf of a training state. All leaves are scalars or shaped like parameters.

    split_dense: as for `forward`.
    """

    def leaf_sharding(path: Any, leaf: Array) -> NamedSharding:
        is_dense = any(str(getattr(key, 'key', '')).startswith('fc') for key in path)
        axes = ('tower', 'data') if split_dense and is_dense else ('tower',)
        # A classifier whose classes the devices do not divide is replicated.
        replicated = leaf.ndim and leaf.shape[-1] % math.prod(mesh.shape[axis] for axis in axes)
        return NamedSharding(mesh, P() if replicated else _last_axis(axes)(leaf))

    return jax.tree.map_with_path(leaf_sharding, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the first axis over `data`; both towers get the same images."""
    return NamedSharding(mesh, P('data'))


def random_key(mesh: Mesh, seed: int) -> Array:
    """Returns the random key of a run, replicated on all devices of all processes."""
    return jax.jit(lambda: jax.random.key(seed), out_shardings=replicated(mesh))()


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array of which every device holds a full copy."""
    return NamedSharding(mesh, P())


def check_batch(mesh: Mesh, batch_size: int, grad_accum_steps: int = 1) -> None:
    """Raises UserError if the batch size is not divisible by the data axis times `grad_accum_steps`."""
    multiple = mesh.shape['data'] * max(1, grad_accum_steps)
    if grad_accum_steps < 1 or batch_size % multiple:
        raise UserError(
            f'batch_size={batch_size}, grad_accum_steps={grad_accum_steps}: expected batch_size to be a multiple of '
            f'{multiple}, which is grad_accum_steps (at least 1) times mesh.data.'
        )


def shape_structs(arrays: Any, sharding: NamedSharding) -> Any:
    """Returns ShapeDtypeStructs with a sharding, which replace arrays as arguments of `jit(f).lower`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays)


def to_mesh(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, Array]:
    """Copies a NumPy batch, this process's shard of the data axis, to the devices. Returns global arrays."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)  # one call for all arrays takes half the time of one call each
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """Returns (index, count) of the shard of every batch that this process reads.

    The index follows from the position on the data axis, not from the process index: processes that hold the two towers
    of one shard read the same images. Raises UserError if this process's devices are not consecutive on that axis.
    """
    rows = [i for i, row in enumerate(mesh.devices) if any(d.process_index == jax.process_index() for d in row)]
    if not rows:
        raise UserError('the mesh has no device of this process; start fewer processes or raise mesh.data.')
    count, rest = divmod(mesh.shape['data'], len(rows))
    if rest or rows != list(range(rows[0], rows[0] + len(rows))) or rows[0] % len(rows):
        raise UserError(
            f"this process's devices are at positions {rows} of {mesh.shape['data']} on the data axis: expected "
            'equally many consecutive positions for each process; change mesh.data or the number of processes.'
        )
    return rows[0] // len(rows), count
