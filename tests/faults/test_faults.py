"""One trial of each fault; `python -m tests.faults --trials=N` makes more."""

import os

import numpy as np
import pytest

from tests.faults import faults
from tests.faults.scene import NotHereError, Scene


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp('shared')


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.isdir('/proc/self'), reason='looks processes up in /proc, which this system has not got'
)
@pytest.mark.parametrize('fault', faults.ALL, ids=lambda fault: fault.__name__)
def test_survives(fault, shared, tmp_path):
    try:
        seed = int.from_bytes(os.urandom(4))
        print('seed', seed)
        fault(Scene(tmp_path, np.random.default_rng(seed), shared))
    except NotHereError as error:
        pytest.skip(str(error))
