"""The commands that use a PyTorch file, where PyTorch cannot be imported."""

import importlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax.commands import app
from alexnet_jax.convert import loading, pytorch
from alexnet_jax.inference import evaluate
from tests import helpers

CONFIG = """
import alexnet_jax


def get_config():
    config = alexnet_jax.get_config('torchvision')
    config.data.image_size = 64
    return config
"""


class _WithoutTorch:
    """A finder of modules that does not find PyTorch, as if it were not installed."""

    def __init__(self, finder):
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, *options):
        return None if name.partition('.')[0] == 'torch' else self._finder.find_spec(name, *options)


@pytest.fixture
def no_torch(monkeypatch):
    monkeypatch.setenv('PYTHONSAFEPATH', '1')  # which the commands set
    for name in [name for name in sys.modules if name.partition('.')[0] == 'torch']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, 'meta_path', [_WithoutTorch(finder) for finder in sys.meta_path])
    with pytest.raises(ImportError):
        importlib.import_module('torch')


def _run(name, *words):
    """Runs a command in this process."""
    app._call(importlib.import_module(f'alexnet_jax.commands.{name}'), [str(word) for word in words])


@pytest.fixture
def files(tmp_path):
    """Returns (folder of a PyTorch file, its config, its classes and pictures; the tensors in the file)."""
    tensors = helpers.torchvision_tensors(np.random.default_rng(0))
    helpers.write_pth(tmp_path / 'alexnet.pth', tensors)
    (tmp_path / 'small.py').write_text(CONFIG)
    (tmp_path / 'classes.txt').write_text('cat\ndog\nfox\n')
    names = [f'{name}/{i}.png' for name in ('cat', 'dog') for i in range(3)]
    pictures = {name: helpers.encode(helpers.picture(i), 'PNG') for i, name in enumerate(names)}
    helpers.write_files(tmp_path / 'pictures', pictures)
    return tmp_path, tensors


def _convert(folder):
    words = (f'--input={folder}/alexnet.pth', f'--config={folder}/small.py', f'--classes={folder}/classes.txt')
    _run('convert', f'--output={folder}/net', *words)
    return folder / 'net'


def test_conversion_prediction_and_evaluation(no_torch, files, capsys):
    folder, tensors = files
    net = _convert(folder)
    checkpoint = loading.load_checkpoint(net)
    expected = tensors['features.3.weight'].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(checkpoint.params['conv2']['kernel'], expected)
    capsys.readouterr()
    _run('predict', f'--checkpoint={net}', folder / 'pictures', '--lines')
    assert len(capsys.readouterr().out.splitlines()) == 6
    images = np.stack([helpers.picture(i, 256, 256) for i in range(6)])
    data = alexnet_jax.in_memory({'train': {'image': images, 'label': np.arange(6) % 3}})
    assert evaluate.evaluate(checkpoint, data.split('train'))['count'] == 6
    assert 'torch' not in sys.modules


@pytest.mark.slow
def test_fine_tuning_and_export(no_torch, files, capsys):
    folder, _ = files
    _run('finetune', f'--input={folder}/pictures', f'--output={folder}/tuned', f'--init_from={_convert(folder)}')
    assert loading.load_checkpoint(folder / 'tuned' / 'run').class_names == ('cat', 'dog')
    capsys.readouterr()
    _run('evaluate', f'--checkpoint={folder}/net', f'--data={folder}/tuned/data', '--json')
    assert '"top1_error"' in capsys.readouterr().out
    _run('export', f'--checkpoint={folder}/tuned/run', f'--output={folder}/exported')
    assert (folder / 'exported' / 'model.safetensors').exists()
    assert 'torch' not in sys.modules


def test_values_are_mapped_not_copied(tmp_path):
    rng = np.random.default_rng(0)
    dtypes = (np.float32, np.float16, np.float64, jnp.bfloat16)
    arrays = {f'{i}.weight': rng.standard_normal((3, 2 + i)).astype(dtype) for i, dtype in enumerate(dtypes)}
    arrays['4.weight'] = arrays['0.weight'].T
    found = pytorch.read_tensors(helpers.write_pth(tmp_path / 'w.pth', arrays))
    assert list(found) == list(arrays)
    for name, array in found.items():
        assert array.dtype == arrays[name].dtype
        np.testing.assert_array_equal(array, arrays[name])
        while not isinstance(array, np.memmap):
            array = array.base  # a copy ends with None, which has no base
