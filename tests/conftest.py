"""Four CPU devices for every test, and the real images where they lie beside the project."""

import os
import pathlib
import signal
import tempfile

import jax
import pytest
from absl import flags

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Many tests build the same run: what one has compiled the others load, and the commands they start.
_CACHE = tempfile.TemporaryDirectory(prefix='alexnet_jax_tests_')
for _name, _value in (('compilation_cache_dir', _CACHE.name), ('persistent_cache_min_compile_time_secs', 0.2)):
    jax.config.update(f'jax_{_name}', _value)
    os.environ[f'JAX_{_name.upper()}'] = str(_value)
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background has it ignored
flags.FLAGS.mark_as_parsed()  # grain's worker processes ask for it; under the commands absl has done it

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / 'shared' / 'data'


@pytest.fixture(scope='session')
def imagenet_tar() -> pathlib.Path:
    path = SHARED_DATA / 'ILSVRC2012_img_train.tar'
    if not path.exists():
        pytest.skip(f'needs original ImageNet photos, which this machine has not got ({path.name})')
    return path
