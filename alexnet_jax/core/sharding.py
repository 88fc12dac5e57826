"""Two towers on two devices: the ('data', 'tower') mesh, and the shardings of state and batch.

This is the only file that uses PartitionSpec. The mesh is always passed explicitly.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

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


def forward(model: AlexNet, mesh: Mesh) -> Callable[..., Array]:
    """Returns the network mapped over the mesh: `f(params, x_NHWC, masks=None) -> logits_NK`, with global shapes.

    `f(..., edit=EDITS, outputs=[('conv1.relu', -1), ...])` returns sown outputs, by name and index, not the logits. An
    edit (see `AlexNet`) reads one shard's images, and a last class of 0 if two towers hold an odd number of classes.

    Each device computes its tower for its shard of the batch. The logits are split over both axes. In the forward pass
    devices communicate only where `AlexNet` gathers: before conv3, fc6, fc7 and fc8 in the paper's network. (If the
    number of classes is odd, every device holds the whole classifier, which costs some more communication.)

    Take `jax.grad` of a loss of these logits, outside `shard_map`. (Inside, gradients taken after a gather would be
    exactly two times too large, without an error.)
    """
    towers = mesh.shape['tower']
    padding = -model.num_classes % towers
    local_model = model.clone(tower_axis='tower' if towers > 1 else None, num_classes=model.num_classes + padding)
    classifier = list(model.layers)[-1]

    # Axes of size 1 are left out: XLA's CPU backend would copy all gradients to sum over a single device.
    axes = {axis for axis, size in mesh.shape.items() if size > 1}

    def spec(*names: str | None) -> P:
        return P(*[name if name in axes else None for name in names])

    def local_forward(params: Any, x_nHWC: Array, masks: Masks | None, edit: Edits | None, outputs: Any) -> Any:
        # The parameters' gradients are partial sums over the batch; the image's gradients are partial sums over towers.
        # Mark both inputs as varying: JAX does not do it implicitly for `custom_vjp` functions, which `ops` uses.
        if 'data' in axes:
            params = lax.pcast(params, 'data', to='varying')
        if 'tower' in axes:
            x_nHWC = lax.pcast(x_nHWC, 'tower', to='varying')
        call = functools.partial(local_model.apply, {'params': params}, x_nHWC, masks, edit=edit)
        sown = call(mutable='intermediates')[1]['intermediates'] if outputs else {}
        return [sown[name][index] for name, index in outputs] or [call()]

    def apply(
        params: Any, x: Array, masks: Masks | None = None, *, edit: Edits | None = None, outputs: Sequence[Any] = ()
    ) -> Any:
        if padding:  # an odd number of classes: add a class here, and remove its outputs below
            padded = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)]), params[classifier])
            params = {**params, classifier: padded}
        local = functools.partial(local_forward, edit=edit, outputs=outputs)
        layers = [name.partition('.')[0] for name, _ in outputs] or [classifier]
        in_specs = (
            jax.tree.map(lambda p: spec(*_tower_spec(p)), params),
            spec('data'),
            jax.tree.map(lambda m: spec('data', *[None] * (m.ndim - 2), 'tower'), masks),
        )
        out_specs = [spec('data', *[None] * 2 * (not name.startswith('fc')), 'tower') for name in layers]
        mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axes)
        results = (mapped if axes else local)(params, x, masks)
        if padding:
            results = [y[:, :-padding] if name == classifier else y for name, y in zip(layers, results, strict=True)]
        return results if outputs else results[0]

    return apply


def _tower_spec(array: Array) -> P:
    """Returns the spec that splits kernels and biases along the output channels (last axis) and replicates scalars."""
    return P(*[None] * (array.ndim - 1), 'tower') if array.ndim else P()


def state_sharding(mesh: Mesh, state: Any) -> Any:
    """Returns a NamedSharding for every leaf of a training state. All leaves are scalars or shaped like parameters."""

    def leaf_sharding(leaf: Array) -> NamedSharding:
        # With an odd number of classes the classifier is replicated.
        is_odd = leaf.ndim and leaf.shape[-1] % mesh.shape['tower']
        return NamedSharding(mesh, P() if is_odd else _tower_spec(leaf))

    return jax.tree.map(leaf_sharding, state)


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
