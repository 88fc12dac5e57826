"""Four CPU devices for every test, and the real images where they lie beside the project."""

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
# Many tests build the same run: what one has compiled the others load, pytest's other worker, and the commands they
# start. Like them the workers find the folder in their environment; it goes with the process that has made it.
if 'PYTEST_XDIST_WORKER' not in os.environ:
    # They compile much and run little: LLVM's costly passes are left out. Set, if only to '', it stays as it is.
    os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=1')
    _CACHE = tempfile.TemporaryDirectory(prefix='alexnet_jax_tests_')
    os.environ['JAX_COMPILATION_CACHE_DIR'] = _CACHE.name
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'
jax.config.update('jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR'])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background has it ignored
logs.configure()  # what a command prints
flags.FLAGS.mark_as_parsed()  # grain's worker processes ask for it; under the commands absl has done it


@pytest.fixture(scope='session')
def imagenet_tar() -> pathlib.Path:
    path = SHARED_DATA / 'ILSVRC2012_img_train.tar'
    if not path.exists():
        pytest.skip(f'needs original ImageNet photos, which this machine has not got ({path.name})')
    return path
