"""The limits of a CPU, measured in turns with the programs: a large matrix product, and the rates of its memory."""

import concurrent.futures
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.benchmark.throughput import Contender
from alexnet_jax.core import architecture
from alexnet_jax.core.architecture import DenseSpec
from alexnet_jax.utils import processes

PRODUCT, COPY, READ = 'float32 product', 'copy', 'read'
_UNITS = {PRODUCT: 'GFLOP/s', COPY: 'GB/s', READ: 'GB/s'}
_SIDE = 2048  # of the matrices of the product
_BYTES = 2**28  # of the arrays that are copied and read; far more than the caches hold
_MIN_SECONDS = 0.3  # per measurement


def contenders() -> list[Contender]:
    """Returns measurements in GFLOP/s and GB/s, on all cores.

    They are the product of two float32 matrices; the copy of an array, which reads and writes; and the product of a
    vector and a large matrix, which only reads the matrix, as a dense layer does for a single image.
    """
    multiply = jax.jit(functools.partial(jnp.matmul, precision='float32'))
    square, weights = jnp.full((_SIDE, _SIDE), 0.5), jnp.full((_BYTES // 4 // 4096, 4096), 0.5)
    vector, cores = jnp.ones((1, len(weights))), processes.cores()
    source, target = (np.ones((cores, _BYTES // 4 // cores), np.float32) for _ in range(2))
    threads = concurrent.futures.ThreadPoolExecutor(cores)  # XLA copies in one thread
    runs: dict[str, tuple[Callable[[], Any], int]] = {
        PRODUCT: (lambda: jax.block_until_ready(multiply(square, square)), 2 * _SIDE**3),
        COPY: (lambda: list(threads.map(np.copyto, target, source)), source.nbytes + target.nbytes),
        READ: (lambda: jax.block_until_ready(multiply(vector, weights)), weights.nbytes),
    }
    return [Contender(name, _rate(*run)) for name, run in runs.items()]


def _rate(run: Callable[[], Any], amount: int) -> Callable[[], float]:
    """Returns a measurement of 10^9 operations or bytes per second. amount: of one call of `run`."""

    def measure() -> float:
        run()  # compiles; after a large step the first call takes 0.1 s longer
        calls, began, seconds = 0, time.perf_counter(), 0.0
        while seconds < _MIN_SECONDS:
            run()
            calls, seconds = calls + 1, time.perf_counter() - began
        return calls * amount / seconds / 1e9

    return measure


def summary(rates: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Returns {limit: {'unit', 'median', 'measurements'}} of the measurements of `contenders`."""
    return {
        name: {'unit': unit, 'median': statistics.median(rates[name]), 'measurements': list(rates[name])}
        for name, unit in _UNITS.items()
    }


def add_share(limits: dict[str, Any], images_per_second: float, flops: float) -> str:
    """Adds the 'share' of the product's FLOP/s that a program reaches. Returns a line of text. flops: per image."""
    limits['share'] = images_per_second * flops / 1e9 / limits[PRODUCT]['median']
    return f'machine: {_describe(limits)}; the step reaches {limits["share"]:.0%} of the product'


def add_bound(limits: dict[str, Any], images_per_second: float, network: Any, image_size: int, batch_size: int) -> str:
    """Adds the largest images/s of inference, 'bound', and the 'share' reached. Returns a line of text.

    A batch takes at least the time of its FLOPs at the rate of the product, and the time to read the weights of the
    dense layers at the rate of reading. Each of them is used once in a batch, and they fit in no cache if they are
    large. network, image_size: see `architecture.infer_shapes`.
    """
    costs = architecture.infer_shapes(network, image_size)
    dense = 4 * sum(costs[name].parameters for name, layer in network.layers.items() if isinstance(layer, DenseSpec))
    computing = batch_size * sum(cost.flops for cost in costs.values()) / 1e9 / limits[PRODUCT]['median']
    reading = dense / 1e9 / limits[READ]['median']
    limits['bound'] = batch_size / max(computing, reading)
    limits['bound_by'] = 'product' if computing >= reading else 'dense weights'
    limits['share'] = images_per_second / limits['bound']
    reason = 'the product' if computing >= reading else f'reading {dense / 1e6:.0f} MB of dense weights'
    return (
        f'batch {batch_size}: {_describe(limits)}; at most {limits["bound"]:,.0f} images/s by {reason}, '
        f'of which alexnet_jax reaches {limits["share"]:.0%}'
    )


def _describe(limits: dict[str, Any]) -> str:
    return ', '.join(f'{name} {limits[name]["median"]:.1f} {unit}' for name, unit in _UNITS.items())
