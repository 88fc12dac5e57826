"""Configures JAX with four CPU devices for all tests, and provides the ImageNet photos if they are available."""

import os
import pathlib
import signal
import tempfile

import jax
import pytest
from absl import flags

from alexnet_jax.utils import logs
from tests import SHARED_DATA

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Many tests compile the same programs. pytest's workers and the commands that tests start share one compilation
# cache. They find its folder in the environment; it is deleted when the process that created it exits.
if 'PYTEST_XDIST_WORKER' not in os.environ:
    # The tests compile much and compute little, so LLVM's costly passes are skipped. A value set by the user, even '',
    # is kept.
    os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=1')
    _CACHE = tempfile.TemporaryDirectory(prefix='alexnet_jax_tests_')
    os.environ['JAX_COMPILATION_CACHE_DIR'] = _CACHE.name
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'
jax.config.update('jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR'])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores SIGINT
logs.configure()  # as the commands do
flags.FLAGS.mark_as_parsed()  # grain's worker processes require parsed flags; in the commands absl parses them


@pytest.fixture(scope='session')
def imagenet_tar() -> pathlib.Path:
    path = SHARED_DATA / 'ILSVRC2012_img_train.tar'
    if not path.exists():
        pytest.skip(f'needs original ImageNet photos, which this machine has not got ({path.name})')
    return path
