"""Computes FLOPs, memory traffic and roofline time of a compiled step, also for devices that are not present."""

import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from alexnet_jax.benchmark.collectives import array_bytes, bytes_by_link, collective_bytes, collectives
from alexnet_jax.benchmark.topologies import LINKS, MEMORY, PEAKS, topology_devices
from alexnet_jax.core import architecture, sharding
from alexnet_jax.data import pipeline
from alexnet_jax.training import build
from alexnet_jax.utils.errors import UserError, first_line

OTHER = 'other'  # scope of operations that belong to none of the requested scopes


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
    """Returns the facts of `compile_step` for devices that need not exist, and those of the devices together.

    These are 'target', 'device' (kind), 'devices' and 'hosts' (counts), 'mesh_shape', 'memory' (bytes of a device),
    'links' (see `bytes_by_link`) and 'floor_us' (see `floors`). No images are made, so the batch can have any size.

    config, dataset: as for `build.build`. target: as for `topology_devices`. Raises UserError as they do, if the
    precision has no known peak, if the config caches images on a device, and if the step does not compile.
    """
    if config.data.cache == 'device':
        raise UserError("--config.data.cache=device is not possible with --compile_for; use --config.data.cache=''.")
    devices = topology_devices(target)
    kind = devices[0].device_kind
    if precision not in PEAKS[kind]:
        raise UserError(f'--compile_for={target}: no peak is known for {precision}; use --precision=bfloat16.')
    setup = build.build(config, dataset, devices=devices)
    key = sharding.shape_structs(jax.eval_shape(jax.random.key, 0), sharding.replicated(setup.mesh))
    arguments = (setup.steps.state_shapes, _batch_shapes(setup), setup.image_stats, key)
    try:
        compiled, facts = compile_step(setup, precision, arguments)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f'--compile_for={target}: XLA cannot compile the step: {first_line(error)}') from error
    hosts = [device.process_index for device in setup.mesh.devices.flat]
    links = bytes_by_link(collectives(compiled.as_text(), setup.mesh.size), hosts, list(LINKS[kind]))
    return {
        'target': target,
        'device': kind,
        'devices': setup.mesh.size,
        'hosts': len(set(hosts)),
        'mesh_shape': dict(setup.mesh.shape),
        'memory': MEMORY[kind],
        **facts,
        'links': links if setup.mesh.size > 1 else {},
        'floor_us': floors(facts['layers']['all'], links, kind, precision),
    }


def _batch_shapes(setup: build.TrainingSetup) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch on the mesh, from a batch of one image."""
    batches = pipeline.train_batches(
        setup.storage, batch_size=1, seed=0, start_step=0, augmentation=setup.augmentation, num_threads=1
    )
    rows = next(batches)
    batches.close()
    whole = {name: jax.ShapeDtypeStruct((setup.config.batch_size, *x.shape[1:]), x.dtype) for name, x in rows.items()}
    return sharding.shape_structs(whole, sharding.batch_sharding(setup.mesh))


def floors(cost: dict[str, float], links: dict[str, dict[str, float]], kind: str, precision: str) -> dict[str, float]:
    """Returns the least microseconds of a step for 'compute', for 'memory' and for each kind of links, by data sheet.

    cost: the row 'all' of `by_layer`. links: from `bytes_by_link`. kind: of the devices, as in `PEAKS`.
    """
    peaks = PEAKS[kind]
    seconds = {
        'compute': cost['flops'] / peaks[precision],
        'memory': (cost['product_bytes'] + cost['other_bytes']) / peaks['bytes'],
        **{link: sum(row.get(link, 0.0) for row in links.values()) / rate for link, rate in LINKS[kind].items()},
    }
    return {name: 1e6 * value for name, value in seconds.items()}


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
    bytes: int  # of the output, in the memory of the device
    kind: str
    operands: list[str]
    rest: str  # rest of the line: attributes and metadata


_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(.*)$')
# Instructions without memory traffic.
_FREE = {'parameter', 'get-tuple-element', 'bitcast', 'tuple', 'constant', 'after-all', 'partition-id', 'replica-id'}
_ALLOCATION = 'custom_call_target="AllocateBuffer"'
# An array in the memory of a TPU core, not of the chip: its layout has tiles T(...), unless it is a scalar, and a space
# S(1), S(2), ...
_ON_CORE = re.compile(r'\w+\[[\d,]*\]\{(?:[^}]*T\([^}]*|:)S\([1-9]\d*\)\}')
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
            current.append(_Instruction(name, shape, _device_bytes(shape), kind, names, rest))
    return programs, entry


def _device_bytes(shape: str) -> int:
    return sum(array_bytes(_ON_CORE.sub('', shape)))


def _hlo_ops(programs, name: str, scopes: Sequence[str], times: int) -> Iterator[HloOp]:
    sizes = {op.name: op.bytes for op in programs[name]}
    for op in programs[name]:
        called = re.findall(r'(?:calls|body|to_apply)=%?([\w.\-]+)', op.rest)
        if op.kind in _FREE or op.kind.endswith('-done') or _ALLOCATION in op.rest:
            continue
        if op.kind in ('while', 'call'):
            trip_count = re.search(r'"known_trip_count":\{"n":"(\d+)"', op.rest)
            yield from _hlo_ops(programs, called[0], scopes, times * int(trip_count[1] if trip_count else 1))
            continue
        inside = programs.get(called[0], []) if op.kind == 'fusion' else []
        read = [_bytes_read(sizes.get(operand, 0), i, inside) for i, operand in enumerate(op.operands)]
        if op.kind == 'slice-start':  # of a TPU: ((input), output, counter)
            read = [min(size, array_bytes(op.shape)[1]) for size in read]
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
