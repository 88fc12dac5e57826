"""Options of XLA's compiler."""

import functools
import platform

import jax

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
