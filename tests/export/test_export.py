"""Exported folders: their files, their comparison with the checkpoint in another process, refusals."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml
from jax import export as jax_export

from alexnet_jax.commands import export
from alexnet_jax.convert import convert, loading
from alexnet_jax.core.architecture import ConvSpec, DenseSpec, LocalSpec
from alexnet_jax.core.model import AlexNet
from alexnet_jax.data import datasets
from alexnet_jax.export import card, check, hub
from alexnet_jax.inference import predict
from alexnet_jax.utils.errors import UserError
from tests import ROOT, helpers
from tests.export import cases


def _run(module, *words, code=0):
    done = subprocess.run(
        [sys.executable, '-m', 'alexnet_jax', module, *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.fixture(scope='module')
def images():
    return np.stack([record['image'] for record in datasets.open_dataset('digits').split('val')])[:7]


def test_classes_with_equal_names_have_distinct_labels():
    config = hub.hub_config(cases.SMALL['tiny']()._replace(class_names=('crane', 'kite', 'crane')), 1)
    assert config['label2id']['kite'] == 1 and len(config['label2id']) == config['num_labels'] == 3
    assert {int(i): config['label2id'][name] for i, name in config['id2label'].items()} == {i: i for i in range(3)}


def test_card_has_valid_metadata_and_the_written_formats():
    source = cases.SMALL['tiny']()
    for results, library in (({'onnx': 'Equal.'}, 'onnx'), ({'safetensors': 'Equal.', 'stablehlo': 'Equal.'}, 'jax')):
        text = card.card(source, 1, results)
        metadata = yaml.safe_load(text.split('---\n')[1])
        assert metadata == {
            'library_name': library,
            'pipeline_tag': 'image-classification',
            'tags': ['alexnet', 'image-classification', *results],
        }  # no license is invented
        assert 'No license is stated' in text and text.count('Equal.') == len(results)
        named = {name for name in hub.FORMATS if f'`{hub.FORMATS[name]}`' in text}
        assert named == set(results)
        assert (
            ('up to 6 months newer' in text) == (f'Written with JAX {jax.__version__}.' in text) == (library == 'jax')
        )
    assert '[N, 10, 3], of each crop' in card.card(source, 10, {'onnx': ''})
    assert 'with weights read from a file.' in text  # it has no step
    assert 'mean subtracted.' in text
    scaled = source._replace(step=7, augmentation=source.augmentation._replace(pixel_std=(58.0, 57.0, 57.0)))
    text = card.card(scaled, 1, {'onnx': ''})
    assert 'for 7 updates on batches of 128; data: not recorded' in text
    assert 'divided by a standard deviation per color.' in text
    # A last layer that `finetune` has fitted, and all layers; no folder of this machine is named.
    config = {**source.config, 'init_from': '/home/me/runs/first/', 'data': {'path': '/home/me/data/cats'}}
    assert 'weights that alexnet_jax derived from `first`.' in card.card(
        source._replace(config=config), 1, {'onnx': ''}
    )
    text = card.card(scaled._replace(config={**config, 'batch_size': 8}), 1, {'onnx': ''})
    assert 'on batches of 8, starting from `first`; data: `cats`.' in text and '/home' not in text


def test_formats_are_checked_before_anything_is_written(tmp_path):
    source, out = cases.SMALL['tiny'](), tmp_path / 'out'
    with pytest.raises(UserError, match="--formats=onxx: 'onxx' is no format. Did you mean 'onnx'?"):
        hub.export(source, out, 1, ['onxx'])
    local = {'conv1': ConvSpec(features=4, kernel=3), 'local2': LocalSpec(features=4, kernel=3), 'fc3': DenseSpec()}
    source = source._replace(network=AlexNet(layers=local, num_classes=3))
    for names in (['safetensors'], ['pytorch'], ['onnx', 'stablehlo']):
        with pytest.raises(UserError, match='local2: locally connected layers cannot be written as .*--formats=stable'):
            hub.export(source, out, 1, names)
    layers = {'conv1': ConvSpec(features=4, kernel=3, post='swish'), 'fc2': DenseSpec()}
    with pytest.raises(UserError, match="conv1.post='swish': the operation 'swish' cannot be written as pytorch"):
        hub.export(source._replace(network=AlexNet(layers=layers, num_classes=3)), out, 1, ['pytorch'])
    assert not list(tmp_path.iterdir())
    default = {flag.name: flag.default for flag in export.FLAGS}['formats']
    assert tuple(default.split(',')) == hub.DEFAULT_FORMATS


def test_missing_packages_are_named(tmp_path, monkeypatch):
    source = cases.SMALL['tiny']()
    monkeypatch.setattr(check.importlib.util, 'find_spec', lambda name: None)
    files = hub.export(source, tmp_path / 'out', 1, ['pytorch'])
    assert [(file.name, file.result) for file in files] == [
        ('model.safetensors', 'Not checked, because safetensors is not installed.'),
        ('alexnet.py', 'Not checked, because torch is not installed.'),
    ]
    assert 'because torch is not installed' in (tmp_path / 'out' / 'README.md').read_text()
    compile((tmp_path / 'out' / 'alexnet.py').read_text(), 'alexnet.py', 'exec')
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(UserError, match=r"--formats=onnx: needs the package onnx; pip install 'alexnet_jax\[onnx\]'"):
        hub.export(source, tmp_path / 'other', 1, ['onnx'])
    assert [path.name for path in tmp_path.iterdir()] == ['out']


@pytest.mark.parametrize('name', ['safetensors', 'onnx', pytest.param('stablehlo', marks=pytest.mark.slow)])
def test_files_that_differ_or_cannot_be_loaded_are_rejected(name, tmp_path):
    if name == 'onnx':
        pytest.importorskip('onnxruntime')
    source = cases.SMALL['tiny']()
    hub.write(tmp_path, name, source, 1)
    (result,) = check.check(str(tmp_path), [name], source, 1).values()
    assert 'bit for bit' in result or "gives the checkpoint's probabilities to " in result
    other = {**source.params, 'fc2': {**source.params['fc2'], 'bias': source.params['fc2']['bias'] + [0.001, 0, 0]}}
    with pytest.raises(UserError, match='differ from the checkpoint|expected at most 1e-05.*nothing was written'):
        check.check(str(tmp_path), [name], source._replace(params=other), 1)
    (tmp_path / hub.FORMATS[name]).write_bytes(b'nothing')
    with pytest.raises(UserError, match='cannot load the exported files: .*nothing was written'):
        check.check(str(tmp_path), [name], source, 1)


def test_differences_of_any_output_are_rejected():
    expected = {'probabilities': np.array([[0.25, 0.75]]), 'logits': np.array([[-20.0, 10.0]])}
    assert check.compare(expected, expected, 'float32') == 'probabilities to 0 and logits to 0 of the largest'
    for key, value in (
        ('probabilities', [[0.25002, 0.74998]]),
        ('logits', [[-20.0, 10.0003]]),
        ('logits', [[-20, np.nan]]),
    ):
        with pytest.raises(UserError, match=f'{key} to .*: expected at most 1e-05'):
            check.compare({**expected, key: np.array(value)}, expected, 'float32')
    with pytest.raises(UserError, match=r'logits with the shape \(2,\): expected \(1, 2\)'):
        check.compare({'logits': np.array([-20.0, 10.0])}, expected, 'float32')
    assert check.compare({'logits': np.array([[-20.0, 10.003]])}, expected, 'bfloat16')


def test_a_proof_that_imports_this_package_fails(tmp_path, monkeypatch):
    load = 'import safetensors, alexnet_jax\nrun = lambda images: {"tensors": np.array(["a"])}'
    monkeypatch.setitem(check._PROOFS, 'safetensors', check._PROOFS['safetensors']._replace(load=load))
    with pytest.raises(UserError, match='alexnet_jax'):
        check.check(str(tmp_path), ['safetensors'], cases.SMALL['tiny'](), 1)


@pytest.mark.slow
@pytest.mark.parametrize('views', [1, 10])
def test_export_command(views, images, tmp_path):
    path, out = helpers.save_untrained(tmp_path / 'run', **{'mesh.tower': 1}), tmp_path / 'out'
    formats = '--formats=onnx,pytorch,stablehlo' if importlib.util.find_spec('onnx') else '--formats=pytorch,stablehlo'
    said = _run('export', f'--checkpoint={path}', f'--output={out}', f'--views={views}', formats, '--cpu_devices=1')
    torch = "gives the checkpoint's" if importlib.util.find_spec('torch') else 'Not checked'
    size = (out / 'model.safetensors').stat().st_size
    assert size < 2**20 and f'Wrote {out}/model.safetensors ({size / 1024:.1f} KiB). safetensors ' in said
    assert torch in said
    names = {'README.md', 'config.json', 'image_stats.npz', 'preprocessing.safetensors'}
    names |= {hub.FORMATS[name] for name in ('safetensors', *formats.split('=')[1].split(','))}
    assert {file.name for file in out.iterdir()} == names
    loaded = loading.load_checkpoint(path)
    model = jax_export.deserialize((out / 'model.stablehlo').read_bytes())
    assert {'cpu', 'cuda', 'tpu'} <= set(model.platforms)
    for count in (1, 7):  # the batch size is free
        expected = predict.predict(loaded, images[:count], views=views)
        np.testing.assert_allclose(model.call(images[:count]), expected, atol=1e-6)
    config = json.loads((out / 'config.json').read_text())
    assert config['id2label'] == {str(i): str(i) for i in range(10)} and config['num_labels'] == 10
    convert.convert(out / 'model.safetensors', tmp_path / 'back')
    back = loading.load_checkpoint(tmp_path / 'back')
    jax.tree.map(np.testing.assert_array_equal, back.params, loaded.params)
    assert 'already exists' in _run('export', f'--checkpoint={path}', f'--output={out}', code=2)
