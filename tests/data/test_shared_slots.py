"""Shared memory that is used again for the images of batches."""

import gc
import pickle

import jax
import numpy as np
import pytest

from alexnet_jax.data import shared_slots

SHAPE = (4, 2, 2, 3)

if not shared_slots.os.path.isdir(shared_slots.SHARED_MEMORY):
    pytest.skip('this system has no /dev/shm', allow_module_level=True)


@pytest.fixture
def pair(monkeypatch):
    """Slots as a parent and the second of two workers see them: two slots for each worker."""
    parent = shared_slots.SharedSlots(2, 2, SHAPE)
    monkeypatch.setattr(shared_slots, '_worker_index', 1)
    return parent, pickle.loads(pickle.dumps(parent))


def _build(rows, out=None):
    images = np.empty((len(rows), *SHAPE[1:]), np.uint8) if out is None else out
    images[:] = np.reshape(rows, (-1, 1, 1, 1))
    return {'image': images, 'label': np.array(rows)}


def _send(pair, value, count=4):
    """Returns a batch of `count` images of one value, built by the worker and opened by the parent."""
    parent, worker = pair
    return parent.open(pickle.loads(pickle.dumps(worker.build(_build, [value] * count))))['image']


def test_images_arrive_and_do_not_change_while_they_are_used(pair):
    kept = [_send(pair, value) for value in range(5)]  # three more than there are slots
    parts = [_send(pair, 5)[1:, :1] for _ in range(3)]
    for value, images in [*enumerate(kept), *((5, part) for part in parts)]:
        assert images.dtype == np.uint8 and (images == value).all()
    assert _send(pair, 7, count=3).shape == (3, 2, 2, 3)


def test_slot_is_used_again_once_its_images_are_deleted(pair):
    memory = pair[0]._memory
    first, second = _send(pair, 1), _send(pair, 2)
    address, part = first.ctypes.data, second[2:]
    del second
    assert memory[:4] == b'\0\0\1\1'
    del first
    assert memory[:4] == b'\0\0\0\1' and _send(pair, 3).ctypes.data == address
    assert (part == 2).all()
    del part
    assert memory[:4] == bytes(4)


def test_jax_array_keeps_its_slot():
    """On the CPU, JAX may use the memory of the array instead of a copy."""
    slots = shared_slots.SharedSlots(1, 1, (64, 8, 8, 3))
    images = slots.open({'image': shared_slots._Images(0, 64)})['image']
    slots._memory[0] = 1
    on_device = jax.block_until_ready(jax.device_put(images, may_alias=True))
    shares = on_device.unsafe_buffer_pointer() == images.ctypes.data
    del images
    assert slots._memory[0] == shares
    del on_device
    gc.collect()  # JAX deletes the references of its arrays later
    assert not slots._memory[0]


def test_without_access_to_the_parent_batches_are_copied(pair):
    for path in ('/proc/1/fd/999', __file__):  # missing, and another file
        parent, worker = pair[0], pickle.loads(pickle.dumps(pair[0]))
        worker._path = path
        assert (_send((parent, worker), 3) == 3).all() and parent._memory[:4] == bytes(4)


def test_slots_larger_than_shared_memory_are_refused():
    with pytest.raises(OSError, match='/dev/shm has less than'):
        shared_slots.SharedSlots(64, 8, (2**40, 1))
