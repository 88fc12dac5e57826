"""Devices that are not present: their descriptions for XLA's compilers, and the rates of their data sheets."""

import importlib.util
import math
import os
import re

from alexnet_jax.utils.errors import UserError, first_line

# By JAX's device kind: peak FLOP/s of matrix products by precision, and memory bytes/s. Data sheet, without sparsity.
_HOPPER = {'bfloat16': 989e12, 'tf32': 494e12, 'float32': 67e12}
PEAKS = {
    'NVIDIA H100 80GB HBM3': {**_HOPPER, 'bytes': 3.35e12},
    'NVIDIA H200': {**_HOPPER, 'bytes': 4.8e12},
    # Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e", per chip. They state no float32 rate.
    'TPU v4': {'bfloat16': 275e12, 'bytes': 1.2e12},
    'TPU v5 lite': {'bfloat16': 197e12, 'bytes': 819e9},
    'TPU v5': {'bfloat16': 459e12, 'bytes': 2765e9},
    'TPU v6 lite': {'bfloat16': 918e12, 'bytes': 1638e9},
}
# Bytes of memory. For TPUs, from the same pages.
MEMORY = {
    'NVIDIA H100 80GB HBM3': 85_520_809_984, 'NVIDIA H200': 150_754_820_096,
    'TPU v4': 32 * 2**30, 'TPU v5 lite': 16 * 2**30, 'TPU v5': 95 * 2**30, 'TPU v6 lite': 32 * 2**30,
}  # fmt: skip
# Bytes/s that a device receives, by link: first from devices of the same host, last from other hosts. Hopper: half of
# NVLink's 900 GB/s in both directions, and one 400 Gb/s port for each GPU, as in DGX H100 and H200. TPUs: half of the
# bidirectional rate of all inter-chip links on the pages above; v4: 1.1 PB/s of all-reduce for a pod of 4,096 chips.
INSIDE, BETWEEN, ICI = 'inside a host', 'between hosts', 'ICI'
_HOPPER_LINKS = {INSIDE: 450e9, BETWEEN: 50e9}
LINKS = {
    'NVIDIA H100 80GB HBM3': _HOPPER_LINKS, 'NVIDIA H200': _HOPPER_LINKS,
    'TPU v4': {ICI: 1.1e15 / 4096}, 'TPU v5 lite': {ICI: 200e9}, 'TPU v5': {ICI: 600e9}, 'TPU v6 lite': {ICI: 400e9},
}  # fmt: skip
# Descriptions for XLA, from the data sheet and the CUDA programming guide (compute capability 9).
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
_GPUS = {'h100': 'NVIDIA H100 80GB HBM3', 'h200': 'NVIDIA H200'}
_TPUS = {'tpu_v4': (3, 4096), 'tpu_v5e': (2, 256), 'tpu_v5p': (3, 6144), 'tpu_v6e': (2, 256)}  # axes, chips of a slice
_MOST_GPUS = 16_384
_EXPECTED = (
    'expected h100 or h200, several in one host such as 2xh200, hosts such as h200:8x16 (8 GPUs in each of 16), or '
    'TPUs such as tpu_v5e:16x16, tpu_v6e:16x16, tpu_v5p:8x8x16 or tpu_v4:8x8x16'
)


def topology_devices(target: str) -> list:
    """Returns devices for compilation only, host by host. They need not exist and cannot hold arrays.

    Set `jax_platforms` to 'cpu' first. Otherwise JAX finds no GPU and unloads the CUDA compiler.

    target: 'h100' or 'h200'; '2xh200', two in one host; 'h200:8x16', 8 in each of 16 hosts; or a TPU slice,
    'tpu_v5e:16x16', as one device per chip. Raises UserError if there is no such device, or if the compiler (extras
    `cuda12`, `cuda13` and `tpu`) is not installed.
    """
    if match := re.fullmatch(r'(tpu_v\w+):([1-9]\d{0,3}(?:x[1-9]\d{0,3})+)', target):
        return _tpu_devices(target, match[1], match[2])
    match = re.fullmatch(r'(?:([1-9]\d{0,3})x)?(\w+)|(\w+):([1-9]\d{0,3})x([1-9]\d{0,3})', target)
    if not match or (name := match[2] or match[3]) not in _GPUS:
        raise UserError(f'--compile_for={target}: {_EXPECTED}.')
    return _gpu_devices(target, _GPUS[name], gpus=int(match[1] or match[4] or 1), hosts=int(match[5] or 1))


def _gpu_devices(target: str, kind: str, gpus: int, hosts: int) -> list:
    from jax.experimental import topologies

    if gpus * hosts > _MOST_GPUS:
        raise UserError(f'--compile_for={target}: expected at most {_MOST_GPUS:,} GPUs.')
    bandwidth, memory = round(PEAKS[kind]['bytes']), MEMORY[kind]
    options = {
        'topology': f'1x{hosts}x{gpus}',  # slices, hosts, devices
        'target_config': _DESCRIPTION.format(name=kind, bandwidth=bandwidth, memory=memory),
    }
    try:
        return list(topologies.get_topology_desc(platform='cuda', **options).devices)
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"--compile_for={target} needs JAX's compiler for NVIDIA GPUs: pip install -e '.[cuda12]' ({error})."
        ) from error


def _tpu_devices(target: str, name: str, shape: str) -> list:
    if name not in _TPUS:
        raise UserError(f'--compile_for={target}: {_EXPECTED}.')
    (axes, most), sides = _TPUS[name], list(map(int, shape.split('x')))
    if len(sides) != axes or math.prod(sides) > most:
        raise UserError(f'--compile_for={target}: expected {axes} sides, in all at most {most:,} chips.')
    if importlib.util.find_spec('libtpu') is None:
        raise UserError(f"--compile_for={target} needs the compiler for TPUs: pip install -e '.[tpu]'.")
    # libtpu reads these when it is loaded. Without them it asks the metadata server of a TPU machine and waits.
    variables = {
        'TPU_SKIP_MDS_QUERY': '1',
        'TPU_ACCELERATOR_TYPE': 'v5litepod-4',  # any
        'TPU_WORKER_HOSTNAMES': 'localhost',
        'TPU_WORKER_ID': '0',
        'TPU_LOG_DIR': 'disabled',
    }
    for variable, value in variables.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    # A v4 chip has two cores, which work as one device unless they are configured otherwise.
    options = {'chip_config_name': 'megacore'} if name == 'tpu_v4' else {}
    try:
        return list(
            topologies.get_topology_desc(platform='tpu', topology_name=f'{name[4:]}:{shape}', **options).devices
        )
    except RuntimeError as error:
        raise UserError(f'--compile_for={target}: {first_line(error)}.') from error
