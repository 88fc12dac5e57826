"""Exported files, read with jax.export in another process, safetensors and JSON only."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from jax import export as jax_export

from alexnet_jax.convert import loading
from alexnet_jax.data import datasets
from alexnet_jax.export import hub, stablehlo
from alexnet_jax.inference import predict
from alexnet_jax.utils.errors import UserError
from tests import ROOT, helpers


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


def test_classes_with_equal_names_have_distinct_labels(tmp_path):
    source = loading.load_checkpoint(helpers.save_untrained(tmp_path / 'run', **{'mesh.tower': 1}))
    names = ('crane', 'kite', 'crane', *source.class_names[3:])
    config = hub.hub_config(source._replace(class_names=names), 1)
    assert config['label2id']['kite'] == 1 and len(config['label2id']) == config['num_labels'] == 10
    assert {int(i): config['label2id'][name] for i, name in config['id2label'].items()} == {i: i for i in range(10)}


@pytest.mark.slow
@pytest.mark.parametrize('views', [1, 10])
def test_export_command(views, images, tmp_path):
    path, out = helpers.save_untrained(tmp_path / 'run', **{'mesh.tower': 1}), tmp_path / 'out'
    said = _run('export', f'--checkpoint={path}', f'--output={out}', f'--views={views}', '--cpu_devices=1')
    assert 'Without this package it reproduces' in said
    loaded = loading.load_checkpoint(path)
    model = jax_export.deserialize((out / 'model.stablehlo').read_bytes())
    assert {'cpu', 'cuda', 'tpu'} <= set(model.platforms)
    for count in (1, 7):  # the batch size is free
        expected = predict.predict(loaded, images[:count], views=views)
        np.testing.assert_allclose(model.call(images[:count]), expected, atol=1e-6)
    config = json.loads((out / 'config.json').read_text())
    assert config['id2label'] == {str(i): str(i) for i in range(10)} and config['num_labels'] == 10
    card = (out / 'README.md').read_text()
    assert card.startswith('---\nlibrary_name: jax\n') and 'uint8 RGB [N, 32, 32, 3]' in card
    assert (
        'mean subtracted.' in card and 'converted by alexnet_jax from a file of another framework' in card
    )  # it has no step
    scaled = loaded._replace(step=7, augmentation=loaded.augmentation._replace(pixel_std=(58.0, 57.0, 57.0)))
    card = hub.card(scaled, views)
    assert 'for 7 updates on batches of' in card and 'divided by a standard deviation per color.' in card
    # The weights convert back to a checkpoint with the same predictions.
    _run('convert', f'--input={out}/model.safetensors', f'--output={tmp_path}/back')
    again = predict.predict(loading.load_checkpoint(str(tmp_path / 'back')), images, views=views)
    np.testing.assert_allclose(again, predict.predict(loaded, images, views=views), atol=1e-6)
    assert 'already exists' in _run('export', f'--checkpoint={path}', f'--output={out}', code=2)


def test_export_with_other_probabilities_is_rejected(tmp_path):
    loaded = loading.load_checkpoint(helpers.save_untrained(tmp_path / 'run', **{'mesh.tower': 1}))
    path = tmp_path / 'model.stablehlo'
    path.write_bytes(stablehlo.stablehlo(loaded))
    assert stablehlo.check(str(path), loaded, 1) < 1e-6
    other = {
        name: {**parts, 'bias': parts['bias'] + 0.5 * (np.arange(len(parts['bias'])) == 0)}
        for name, parts in loaded.params.items()
    }
    with pytest.raises(UserError, match='probabilities of the exported file differ by '):
        stablehlo.check(str(path), loaded._replace(params=other), 1)
    path.write_bytes(b'nothing')
    with pytest.raises(UserError, match='cannot be loaded'):
        stablehlo.check(str(path), loaded, 1)
