"""Options of XLA's compiler, and the cache of compiled programs."""

import contextlib
import functools
import pathlib
import platform
import re
import warnings
import zlib

import jax
from absl import logging

# XLA's default on a CPU is the library YNN for convolutions and matrix products. On x86, Eigen is up to four times as
# fast for the convolutions of these networks (docs/performance.md).
_WITHOUT_YNN = {'xla_cpu_experimental_ynn_fusion_type': ''}


def compiler_options(backend: str) -> dict[str, str]:
    """Returns the `compiler_options` of `jax.jit` for programs that run a network on a backend, such as 'cpu'."""
    x86 = platform.machine().lower() in ('x86_64', 'amd64')
    return dict(_WITHOUT_YNN) if backend == 'cpu' and x86 and _known() else {}


@functools.cache
def _known() -> bool:
    """Returns whether this version of XLA has the option."""
    try:
        jax.jit(lambda: 0, compiler_options=_WITHOUT_YNN).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def cache_programs(folder: str) -> None:
    """Caches compiled programs in a folder.

    JAX writes an entry in place, so that a kill or a full disk can leave a part of it. It then warns, compiles the
    program, and keeps the damaged entry, each time. Here the entry is removed, so that JAX writes a new one.
    """
    jax.config.update('jax_compilation_cache_dir', folder)
    show_warning = warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None):
        found = re.match(r"Error reading persistent compilation cache entry for '(.+?)'", str(message))
        if not (removed := _remove_damaged(folder, found[1]) if found else 0):
            return show_warning(message, category, filename, lineno, file, line)
        logging.warning(f'removed damaged compiled programs from {folder!r} ({removed}); they are compiled again.')

    warnings.showwarning = show  # JAX warns before it compiles


def _remove_damaged(folder: str, module: str) -> int:
    """Removes the cached programs that zlib cannot read; if there are none, all of a module. Returns their number."""
    entries = list(pathlib.Path(folder).glob('*-cache'))
    damaged = [path for path in entries if _is_damaged(path)]
    damaged = damaged or [path for path in entries if path.name.startswith(f'{module}-')]
    removed = 0
    for path in damaged:
        with contextlib.suppress(OSError):  # of others, or already gone
            path.unlink()
            removed += 1
    return removed


def _is_damaged(path: pathlib.Path) -> bool:
    try:
        content = path.read_bytes()
        if not content.startswith(b'\x28\xb5\x2f\xfd'):  # JAX compresses with zstd if Python has it
            zlib.decompress(content)
    except (OSError, zlib.error):
        return True
    return False
