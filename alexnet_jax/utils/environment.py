"""Describes the environment of a run: versions, devices, commit."""

import contextlib
import functools
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

import jax
from absl import logging

from alexnet_jax.utils import distributed, processes
from alexnet_jax.utils.files import open_regular


def describe_environment() -> dict[str, Any]:
    """Returns versions, devices, machine and commit, for environment.json and for published measurements."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    # The ceiling prevents git from describing another repository that contains the virtual environment.
    git_env = {**os.environ, 'GIT_CEILING_DIRECTORIES': os.path.dirname(root)}
    describe = ['git', 'describe', '--always', '--dirty', '--abbrev=40']
    commit = None
    with contextlib.suppress(OSError):  # no git
        commit = subprocess.run(describe, cwd=root, env=git_env, capture_output=True, text=True).stdout.strip()
    compilers = ('jax-cuda12-plugin', 'jax-cuda13-plugin', 'nvidia-cudnn-cu12', 'nvidia-cudnn-cu13', 'libtpu')
    packages = ('alexnet_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'pillow')
    versions = dict.fromkeys(packages)  # None: not installed, for example alexnet_jax in a source folder
    for name in packages + compilers:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        'python': platform.python_version(),
        'machine': platform.platform(),
        'cpu': _cpu_model(),
        'cores': processes.cores() * processes.local_processes(),  # for all processes of the run on this machine
        'memory_gib': round(processes.memory() * processes.local_processes() / 2**30, 1),
        'versions': versions,
        'devices': [f'{d.platform}:{d.id} {d.device_kind}' for d in jax.devices()],
        'xla_flags': os.environ.get('XLA_FLAGS'),
        'commit': commit or None,
        'command': sys.argv,
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError), open('/proc/cpuinfo', encoding='utf-8') as file:  # Linux
        for line in file:
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def warn_if_no_accelerator(platform: str) -> None:
    """Warns if JAX has an accelerator plugin but found no accelerator and computes on the CPU."""
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]  # jax defines its options at run time
    if platform != 'cpu' or platforms == 'cpu' or os.path.exists('/dev/nvidia0'):
        return  # JAX itself warns about an NVIDIA GPU that it cannot use
    if plugins := sorted({point.name for point in metadata.entry_points(group='jax_plugins')}):
        logging.warning(
            f'JAX found no device for {", ".join(plugins)} and computes on the CPU; run `python -c "import jax; '
            'jax.devices()"` to see why, or pass --cpu_devices=1 to compute on the CPU without this warning.'
        )


def warn_of_changes(workdir: str, now: dict[str, Any]) -> None:
    """Warns if software versions or the number of cores differ from environment.json of a resumed run."""
    try:
        with open_regular(os.path.join(workdir, 'environment.json'), encoding='utf-8') as file:
            before = json.load(file)
        before = {**before, **before.pop('versions')}
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return
    changes = [
        f'{key} {before.get(key)} -> {value}'
        for key, value in {**now, **now['versions']}.items()
        if key in ('cores', 'xla_flags', *now['versions']) and before.get(key) != value
    ]
    if changes:
        distributed.warn(f'{"; ".join(changes)}: the run continues; results may differ in the last bits.')
