"""Two towers on two devices: the ('data', 'tower') mesh, and the shardings of state and batch.

This is the only file that uses PartitionSpec. The mesh is always passed explicitly.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alexnet_jax.core.model import AlexNet, Masks
from alexnet_jax.utils import environment
from alexnet_jax.utils.errors import UserError


def make_mesh(*, data: int, tower: int, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of `data` x `tower` devices: 1x1 is a laptop, 1x2 the paper, Nx2 and Nx1 a cluster.

    `data` is the number of equal parts of a batch; 0 uses all devices. `tower` is 1, or the paper's 2 (section 3.2).
    A single device always holds both towers. Raises UserError if `devices` (default: all) do not fit the mesh.
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
    # With Auto axes XLA propagates the shardings outside the mapped function (loss, update). The devices stay in JAX's
    # order, host by host: `jax.make_mesh` rejects GPUs of several hosts.
    chosen = np.array(devices[: data * tower]).reshape(data, tower)
    return Mesh(chosen, ('data', 'tower'), axis_types=(AxisType.Auto,) * 2)


def forward(model: AlexNet, mesh: Mesh) -> Callable[..., Array]:
    """Returns the network mapped over the mesh, `f(params, x_NHWC, masks=None) -> logits_NK`, in global shapes.

    Each device computes its tower for its part of the batch. The logits are split over both axes. (If the number of
    classes is odd, every device holds the whole classifier, which costs some communication.) The only other
    communication is the gathers of `AlexNet`: before conv3, fc6, fc7 and fc8 in the paper's network.

    Differentiate outside: take `jax.grad` of a loss of these logits. (Inside the mapped function, after a gather,
    gradients are exactly two times too large, without an error.)
    """
    towers = mesh.shape['tower']
    padding = -model.num_classes % towers
    mapped = model.clone(tower_axis='tower' if towers > 1 else None, num_classes=model.num_classes + padding)
    classifier = list(model.layers)[-1]

    # Axes of one device are left out: XLA's CPU backend would copy all gradients to sum over a single device.
    axes = {axis for axis, size in mesh.shape.items() if size > 1}

    def spec(*names: str | None) -> P:
        return P(*[name if name in axes else None for name in names])

    def block(params: Any, x_nHWC: Array, masks: Masks | None) -> Array:
        # Gradients of the parameters are partial sums over the batch, those of the image partial sums over the towers.
        # Mark these inputs as varying explicitly: JAX does not do it for custom_vjp functions, as most of `ops` are.
        if 'data' in axes:
            params = lax.pcast(params, 'data', to='varying')
        if 'tower' in axes:
            x_nHWC = lax.pcast(x_nHWC, 'tower', to='varying')
        return cast(Array, mapped.apply({'params': params}, x_nHWC, masks))  # a pair only with `mutable`

    def apply(params: Any, x_NHWC: Array, masks: Masks | None = None) -> Array:
        if padding:  # an odd number of classes: pad by one class, which is cut off again below
            padded = {
                part: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)]) for part, x in params[classifier].items()
            }
            params = {**params, classifier: padded}
        if not axes:
            return block(params, x_NHWC, masks)
        logits = jax.shard_map(
            block,
            mesh=mesh,
            in_specs=(
                jax.tree.map(lambda p: spec(*_tower_spec(p)), params),
                spec('data'),
                jax.tree.map(lambda m: spec('data', *[None] * (m.ndim - 2), 'tower'), masks),
            ),
            out_specs=spec('data', 'tower'),
            axis_names=axes,
        )(params, x_NHWC, masks)
        return logits[:, : model.num_classes] if padding else logits

    return apply


def _tower_spec(array: Array) -> P:
    """Splits kernels and biases along their last axis, the output channels; replicates scalars."""
    return P(*[None] * (array.ndim - 1), 'tower') if array.ndim else P()


def state_sharding(mesh: Mesh, state: Any) -> Any:
    """Returns a NamedSharding for every leaf of a training state; leaves that are not scalars are like parameters."""

    def place(leaf: Array) -> NamedSharding:
        # With an odd number of classes the classifier is replicated.
        is_odd = leaf.ndim and leaf.shape[-1] % mesh.shape['tower']
        return NamedSharding(mesh, P() if is_odd else _tower_spec(leaf))

    return jax.tree.map(place, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the first axis over `data`; both towers get the same images."""
    return NamedSharding(mesh, P('data'))


def random_key(mesh: Mesh, seed: int) -> Array:
    """Returns the random key of a run, replicated on all devices of all processes."""
    return jax.jit(lambda: jax.random.key(seed), out_shardings=replicated(mesh))()


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
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
    """Returns ShapeDtypeStructs with a sharding, as arguments of `jit(f).lower` in place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays)


def to_mesh(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, Array]:
    """Puts a host batch (NumPy, this process's part of the data axis) on the devices; returns global arrays."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)  # one call for all arrays takes half the time of one call each
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """Returns (index, count) of the part of every batch that this process reads.

    It follows the position on the data axis, not the process index: processes that hold the two towers of one part read
    the same images. Raises UserError if the devices of this process are not consecutive on that axis.
    """
    rows = [i for i, row in enumerate(mesh.devices) if any(d.process_index == jax.process_index() for d in row)]
    if not rows:
        raise UserError('this process holds no device of the mesh; start fewer processes or raise mesh.data.')
    count, rest = divmod(mesh.shape['data'], len(rows))
    if rest or rows != list(range(rows[0], rows[0] + len(rows))) or rows[0] % len(rows):
        raise UserError(
            f"this process's devices are rows {rows} of {mesh.shape['data']} on mesh.data; each process needs the same "
            'number of consecutive rows. Change mesh.data or the number of processes.'
        )
    return rows[0] // len(rows), count
