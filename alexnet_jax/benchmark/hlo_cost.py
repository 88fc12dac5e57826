"""Computes FLOPs, memory traffic and roofline time of a compiled step per layer, also for GPUs that are not present."""

import math
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from alexnet_jax.core import architecture, sharding
from alexnet_jax.training import build
from alexnet_jax.utils.errors import UserError

OTHER = 'other'  # scope of operations that belong to none of the requested scopes
# By JAX's device kind: peak FLOP/s of matrix products by precision, and memory bytes/s. Data sheet, without sparsity.
_HOPPER = {'bfloat16': 989e12, 'tf32': 494e12, 'float32': 67e12}
PEAKS = {'NVIDIA H100 80GB HBM3': {**_HOPPER, 'bytes': 3.35e12}, 'NVIDIA H200': {**_HOPPER, 'bytes': 4.8e12}}
# Device descriptions for XLA, from the data sheet and the CUDA programming guide (compute capability 9).
_DESCRIPTION = """
    gpu_device_info {{
      cuda_compute_capability {{ major: 9 }} core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
      memory_bandwidth: {bandwidth} device_memory_size: {memory} l2_cache_size: 52428800
      threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
      registers_per_block_limit: 65536 registers_per_core_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
    }}
    platform_name: "CUDA" device_description_str: "{name}"
    dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 8 }}
"""
_DESCRIPTIONS = {
    'h100': _DESCRIPTION.format(name='NVIDIA H100 80GB HBM3', bandwidth=3_350_000_000_000, memory=85_520_809_984),
    'h200': _DESCRIPTION.format(name='NVIDIA H200', bandwidth=4_800_000_000_000, memory=150_754_820_096),
}


def topology_devices(target: str) -> list:
    """Returns the devices of a host for compilation only. They need not exist and cannot hold arrays.

    If there is no GPU, set `jax_platforms` to 'cpu' first: otherwise JAX finds no GPU and unloads the CUDA compiler.

    target: a device ('h100', 'h200'), or a count and a device ('2xh200'). Raises UserError if the device is unknown or
    if the compiler, part of the extras `cuda12` and `cuda13`, is not installed.
    """
    from jax.experimental import topologies

    match = re.fullmatch(r'(?:([1-9][0-9]{0,3})x)?(\w+)', target)
    if not match or match[2] not in _DESCRIPTIONS:
        raise UserError(f'--compile_for={target}: expected {" or ".join(_DESCRIPTIONS)}, or several such as 2xh200.')
    options = {'topology': f'1x1x{match[1] or 1}', 'target_config': _DESCRIPTIONS[match[2]]}
    try:
        return list(topologies.get_topology_desc(platform='cuda', **options).devices)
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"--compile_for={target} needs JAX's compiler for NVIDIA GPUs: pip install -e '.[cuda12]' ({error})."
        ) from error


def compile_step(setup, precision: str, arguments: Sequence) -> tuple[Any, dict[str, Any]]:
    """Compiles the training step of `setup`, from `build.build`, without running it. Returns (compiled step, facts).

    The facts are 'compile_seconds', 'flops' (matrix products, per image), 'bytes' (device memory planned for arguments
    and temporaries), 'collectives' (see `collective_bytes`) and 'layers' (see `by_layer`).

    precision: 'float32', 'tf32' or 'bfloat16', of matrix products. arguments: arguments of the step, or their shapes.
    """
    began = time.perf_counter()
    compiled = setup.steps.train_step.lower(*arguments).compile()
    seconds = time.perf_counter() - began
    text, memory = compiled.as_text(), compiled.memory_analysis()
    layers = by_layer(setup, text, precision)
    return compiled, {
        'compile_seconds': round(seconds, 1),
        'flops': layers['all']['flops'] * setup.mesh.size / setup.config.batch_size,
        'bytes': memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory else None,
        'collectives': collective_bytes(text, setup.mesh.size) if setup.mesh.size > 1 else {},
        'layers': layers,
    }


def compile_step_for(config, dataset, precision: str, target: str) -> dict[str, Any]:
    """Returns the facts of `compile_step` for devices that need not exist, with 'device' (kind) and 'devices' (count).

    config, dataset: as for `build.build`. target: as for `topology_devices`. Raises UserError as they do, and if the
    config caches images on a device.
    """
    if config.data.cache == 'device':
        raise UserError("--config.data.cache=device is not possible with --compile_for; use --config.data.cache=''.")
    devices = topology_devices(target)
    setup = build.build(config, dataset, devices=devices)
    batches = setup.train_batches(0)
    batch = sharding.shape_structs(next(batches), sharding.batch_sharding(setup.mesh))
    batches.close()
    key = sharding.shape_structs(jax.eval_shape(jax.random.key, 0), sharding.replicated(setup.mesh))
    _, facts = compile_step(setup, precision, (setup.steps.state_shapes, batch, setup.image_stats, key))
    return {**facts, 'device': devices[0].device_kind, 'devices': setup.mesh.size}


class HloOp(NamedTuple):
    """An operation that a compiled program runs as one unit: a fusion, a library call or a single instruction."""

    scope: str  # outermost of the requested `jax.named_scope` names, or `OTHER`
    product: bool  # whether it is a convolution or a matrix product
    bytes: float  # bytes read and written


def hlo_ops(compiled_text: str, scopes: Sequence[str]) -> list[HloOp]:
    """Returns the operations of a compiled program with their memory traffic, if nothing stays in a cache.

    Slices count with the size of the slice, in-place updates with the size of the whole array. Loop bodies count once
    per iteration if XLA knows the trip count. Branches are not analyzed.

    compiled_text: `jit(f).lower(...).compile().as_text()`. scopes: names of `jax.named_scope` to distinguish.
    """
    return list(_hlo_ops(*_parse_computations(compiled_text), scopes, 1))


class _Instruction(NamedTuple):
    name: str
    shape: str
    bytes: int  # of the output
    kind: str
    operands: list[str]
    rest: str  # rest of the line: attributes and metadata


_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(.*)$')
# Instructions without memory traffic.
_FREE = {'parameter', 'get-tuple-element', 'bitcast', 'tuple', 'constant', 'after-all', 'partition-id', 'replica-id'}
_SLICES = {'slice', 'dynamic-slice', 'gather'}
_PRODUCTS = {'convolution', 'dot'}
_PRODUCT_CALL = re.compile('custom_call_target="[^"]*(conv|gemm|matmul|dot)')


def _parse_computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Returns the instructions of every computation by name, and the name of the entry computation."""
    programs: dict[str, list[_Instruction]] = {}
    current, entry = None, ''
    for line in text.splitlines():
        if head := re.match(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$', line):
            current = programs.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (parts := _INSTRUCTION.match(line)):
            name, shape, kind, operands, rest = parts.groups()
            names = re.findall(r'%([\w.\-]+)', operands) or [operands]  # a parameter has its number as operand
            current.append(_Instruction(name, shape, sum(array_bytes(shape)), kind, names, rest))
    return programs, entry


def _hlo_ops(programs, name: str, scopes: Sequence[str], times: int) -> Iterator[HloOp]:
    sizes = {op.name: op.bytes for op in programs[name]}
    for op in programs[name]:
        called = re.findall(r'(?:calls|body|to_apply)=%?([\w.\-]+)', op.rest)
        if op.kind in _FREE or op.kind.endswith('-done'):
            continue
        if op.kind in ('while', 'call'):
            trip_count = re.search(r'"known_trip_count":\{"n":"(\d+)"', op.rest)
            yield from _hlo_ops(programs, called[0], scopes, times * int(trip_count[1] if trip_count else 1))
            continue
        inside = programs.get(called[0], []) if op.kind == 'fusion' else []
        read = [_bytes_read(sizes.get(operand, 0), i, inside) for i, operand in enumerate(op.operands)]
        # The scopes of the instruction itself come before those of the instructions inside.
        paths = [path for part in (op, *inside) for path in re.findall(r'op_name="([^"]*)"', part.rest)]
        matches = [word for path in paths for word in re.split(r'[/()]', path) if word in scopes]
        product = any(part.kind in _PRODUCTS for part in (op, *inside)) or bool(_PRODUCT_CALL.search(op.rest))
        written = op.bytes
        if op.kind.endswith('-start') and op.kind != 'all-reduce-start' and op.shape.startswith('('):
            written -= sum(sizes.get(operand, 0) for operand in op.operands)  # the output repeats the operands
        yield HloOp(matches[0] if matches else OTHER, product, times * (written + sum(read)))


def _bytes_read(size: int, number: int, inside: list[_Instruction]) -> int:
    """Returns the bytes that a fusion reads of operand `number`. They are fewer than its size if it is only sliced."""
    aliases = {op.name for op in inside if op.kind == 'parameter' and op.operands == [str(number)]}
    cut = 0
    for op in inside:
        if not aliases & set(op.operands):
            continue
        if op.kind == 'bitcast':
            aliases.add(op.name)
        elif op.kind in _SLICES and op.operands[0] in aliases:
            cut += op.bytes
        else:
            return size
    return min(size, cut) if cut else size


def by_layer(setup, compiled_text: str, precision: str) -> dict[str, dict[str, float]]:
    """Returns the cost per device of each layer, of 'masks', 'input', 'update' and 'other', and of 'all' together.

    If the peaks of the device are known, each row has 'roofline_us': the time for the products (limited by compute or
    by memory) plus the time for all other memory traffic.
    """
    costs = architecture.infer_shapes(setup.network, setup.augmentation.image_size)
    first = next(iter(costs))  # the first layer needs no gradient of its input
    images = setup.config.batch_size / setup.mesh.size
    flops = {name: (2 if name == first else 3) * cost.flops * images for name, cost in costs.items()}
    products: defaultdict[str, float] = defaultdict(float)
    rest: defaultdict[str, float] = defaultdict(float)
    for op in hlo_ops(compiled_text, [*costs, 'masks', 'input', 'update']):
        (products if op.product else rest)[op.scope] += op.bytes
    peaks, rows = PEAKS.get(setup.mesh.devices.flat[0].device_kind), {}
    for name in [*costs, *sorted({*products, *rest} - set(costs))]:
        row = {'flops': flops.get(name, 0.0), 'product_bytes': products[name], 'other_bytes': rest[name]}
        if peaks:
            compute = max(row['flops'] / peaks[precision], products[name] / peaks['bytes'])
            row['roofline_us'] = 1e6 * (compute + rest[name] / peaks['bytes'])
        rows[name] = row
    return {**rows, 'all': {key: sum(row[key] for row in rows.values()) for key in rows[first]}}


_COLUMNS = (  # key of a row, title, unit
    ('flops', 'GFLOP', 1e9), ('product_bytes', 'MB, products', 1e6), ('other_bytes', 'MB, other', 1e6),
    ('roofline_us', 'roofline us', 1),
)  # fmt: skip


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    """Formats the rows of `by_layer` as lines of text."""
    columns = [column for column in _COLUMNS if column[0] in rows['all']]
    lines = [f'{"":8}' + ''.join(f'{title:>14}' for _, title, _ in columns)]
    for name, row in rows.items():
        lines.append(f'{name:8}' + ''.join(f'{row[key] / unit:14,.1f}' for key, _, unit in columns))
    return lines


_COLLECTIVE = r'= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\((.*)'


def collective_bytes(compiled_text: str, devices: int) -> dict[str, tuple[int, float]]:
    """Returns the communication of a compiled program: {operation: (count, bytes received per device)}.

    Assumes ring algorithms, which need the least communication: with n devices, an all-gather or a reduce-scatter
    receives (n - 1) / n of the full array, and an all-reduce twice as much.

    compiled_text: as for `hlo_ops`. devices: number of devices the program runs on.
    """
    collectives: dict[str, tuple[int, float]] = {}
    for match in re.finditer(_COLLECTIVE, compiled_text):
        shapes, name, asynchronous, rest = match.groups()
        arrays = array_bytes(shapes)
        if asynchronous and name == 'collective-permute':
            arrays = arrays[1:2]  # (input, output, two counters)
        elif asynchronous and name != 'all-reduce':
            arrays = arrays[len(arrays) // 2 :]  # (inputs, outputs)
        group = _group_size(rest, devices)
        share = {'all-reduce': 2 * (group - 1) / group, 'reduce-scatter': group - 1, 'collective-permute': 1.0}
        count, total = collectives.get(name, (0, 0.0))
        collectives[name] = (count + 1, total + sum(arrays) * share.get(name, (group - 1) / group))
    return collectives


def array_bytes(shape: str) -> list[int]:
    """Returns the bytes of each array in an HLO shape, such as 'f32[2,3]{1,0}' or a tuple of shapes."""
    return [
        (1 if kind == 'pred' else int(bits or 0) // 8) * math.prod(map(int, re.findall(r'\d+', sides)))
        for kind, bits, sides in re.findall(r'\b([a-z]+)(\d*)\[([\d,]*)\]', shape)
    ]


def _group_size(line: str, devices: int) -> int:
    if groups := re.search(r'replica_groups=\{\{([\d,]*)\}', line):
        return len(groups[1].split(','))
    if groups := re.search(r'replica_groups=\[\d+,(\d+)\]', line):
        return int(groups[1])
    if groups := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', line):
        sizes = dict(axis.split('=') for axis in groups[1].replace("'", '').split(','))
        return math.prod(int(sizes[axis.strip()]) for axis in groups[2].replace("'", '').split(','))
    return devices
