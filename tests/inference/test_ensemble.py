"""Averaged networks and the predict command on files, with small untrained networks on the digits."""

import itertools
import json
import os
import subprocess
import sys

import chex
import numpy as np
import pytest
from PIL import Image

from alexnet_jax.convert import loading
from alexnet_jax.core import sharding
from alexnet_jax.data import datasets, image_io
from alexnet_jax.inference import ensemble, evaluate, predict
from alexnet_jax.training import train
from alexnet_jax.utils.errors import UserError
from tests import ROOT, helpers


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """Paths of three checkpoints initialized with three seeds."""
    folder = tmp_path_factory.mktemp('checkpoints')
    return [helpers.save_untrained(folder / str(seed), seed) for seed in range(3)]


def _outputs(paths, views=1):
    digits = datasets.open_dataset('digits').split('val')
    pixels, labels = np.stack([r['image'] for r in digits]), np.array([r['label'] for r in digits])
    return [predict.predict(loading.load_checkpoint(p), pixels, views=views) for p in paths], labels


def test_weighted_average():
    p = [np.array([[0.9, 0.1]], np.float32), np.array([[0.3, 0.7]], np.float32)]
    chex.assert_trees_all_close(ensemble.average(p, [1, 1]), np.array([[0.6, 0.4]], np.float32), rtol=1e-6)
    chex.assert_trees_all_close(ensemble.average(p, [1, 3]), np.array([[0.45, 0.55]], np.float32), rtol=1e-6)
    for weights in ([0, 0], [1], [-1, 2], [1e308, 1e308], [float('nan'), 1]):
        with pytest.raises(UserError, match='weights .* for 2 networks'):
            ensemble.average(p, weights)


def _top5_errors(scores, labels):
    """As the authors' tool, by five successive arg-maxes."""
    scores, missed = scores.astype(np.float64).copy(), np.ones(len(labels), bool)
    for _ in range(5):
        best = scores.argmax(1)
        missed &= best != labels
        scores[np.arange(len(labels)), best] = -1
    return missed.sum()


def test_tuned_weights_match_coordinate_search():
    """The search of section 7 written out: weights 0 to 1 in steps of 0.05, from 0.5, five passes, top-5 error."""
    rng = np.random.default_rng(6)  # a problem that needs a second pass
    labels = rng.integers(0, 20, 300)
    p = []
    for strength in (1.0, 0.2, 0.6):  # one of the networks is almost uninformed
        logits = rng.normal(size=(300, 20))
        logits[np.arange(300), labels] += strength
        p.append((np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32))
    weights = [0.5] * 3
    score = lambda w: _top5_errors(sum(np.float32(a) * b for a, b in zip(w, p, strict=True)), labels)  # noqa: E731
    lowest = score(weights)
    for _, i in itertools.product(range(5), range(3)):
        for step in range(21):
            tried = [*weights[:i], step * 0.05, *weights[i + 1 :]]
            if score(tried) < lowest:
                lowest, weights = score(tried), tried
    found = ensemble.tune_weights(p, labels)
    chex.assert_trees_all_close(np.array(found), np.array(weights), atol=1e-9)
    assert found != [0.5] * 3 and lowest < score([0.5] * 3)


def test_tuned_weights_are_not_all_zero():
    """The first network is best left out, and with all weights 0 the labels 0 and 1 would be among the top five."""
    first = np.array([[0, 0.2, 0.2, 0.2, 0.2, 0.2], [0.2, 0, 0.2, 0.2, 0.2, 0.2]], np.float32)
    second = np.array([[0.1, 0.2, 0.2, 0.2, 0.25, 0.05], [0.2, 0, 0.2, 0.2, 0.2, 0.2]], np.float32)
    assert ensemble.tune_weights([first, second], np.array([0, 1])) == [0, 0.5]


@pytest.mark.parametrize('views', [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize('weights', [None, (3.0, 1.0, 0.0)], ids=['equal', 'weighted'])
def test_evaluate_ensemble(checkpoints, views, weights):
    outputs, labels = _outputs(checkpoints, views)
    loaded = [loading.load_checkpoint(path) for path in checkpoints]
    mesh = sharding.make_mesh(data=2, tower=2)
    val = datasets.open_dataset('digits').split('val')
    found = evaluate.evaluate_ensemble(loaded, val, mesh, weights=weights, views=views, batch_size=100)
    share = np.array(weights or (1, 1, 1)) / sum(weights or (1, 1, 1))
    mean = np.einsum('i,ink->nk', share, np.stack(outputs).astype(np.float64))
    assert found['count'] == 360 and found['weights'] == pytest.approx(share.tolist())
    np.testing.assert_allclose(found['top1_error'], 100 * (mean.argmax(1) != labels).mean(), atol=1e-4)
    np.testing.assert_allclose(found['top5_error'], 100 * _top5_errors(mean, labels) / 360, atol=1e-4)
    np.testing.assert_allclose(found['loss'], -np.log(mean[np.arange(360), labels]).mean(), rtol=1e-4)


def test_unreadable_images_are_excluded(checkpoints):
    """Evaluation continues while there are at most max_unreadable of them."""
    loaded, mesh = [loading.load_checkpoint(path) for path in checkpoints[:2]], sharding.make_mesh(data=2, tower=1)
    records = datasets.open_dataset('digits').split('val')[:40]
    spoilt = [{**r, 'image': b'no image', 'file_name': b''} if i in (3, 30) else r for i, r in enumerate(records)]
    whole = [r for i, r in enumerate(records) if i not in (3, 30)]
    for call in (
        lambda source, **allowed: evaluate.evaluate(loaded[0], source, mesh, batch_size=16, **allowed),
        lambda source, **allowed: evaluate.evaluate_ensemble(loaded, source, mesh, batch_size=16, **allowed),
    ):
        expected, found = call(whole), call(spoilt, max_unreadable=2)
        for name in ('loss', 'top1_error', 'top5_error', 'count'):
            assert found[name] == pytest.approx(expected[name], rel=1e-6)
        with pytest.raises(
            UserError, match=r'2 of 40 images cannot be read \(named above\): expected at most max_unreadable=1'
        ):
            call(spoilt, max_unreadable=1)
        with pytest.raises(UserError, match='there are no images'):
            call([])


@pytest.mark.slow
def test_evaluate_command_with_several_checkpoints(checkpoints):
    each = [f'--checkpoint={path}' for path in checkpoints]
    outputs, labels = _outputs(checkpoints)
    result = helpers.run_command('evaluate', *each, '--data=digits', '--weights=tuned', '--json')
    assert result.returncode == 0, result.stderr
    said, line = result.stdout.splitlines()[-2:]
    assert 'tuned for the top-5 error on val, which is also the split evaluated here' in said
    found = json.loads(line)
    assert set(found) == {'top1_error', 'top5_error', 'loss', 'count', 'views', 'weights'}
    tuned = np.array(ensemble.tune_weights(outputs, labels))
    assert found['weights'] == pytest.approx((tuned / tuned.sum()).tolist())
    # On another split the weights are still tuned on val.
    result = helpers.run_command('evaluate', *each, '--data=digits', '--weights=tuned', '--split=train', '--json')
    said, line = result.stdout.splitlines()[-2:]
    assert 'tuned for the top-5 error on val)' in said and json.loads(line)['count'] == 1437
    assert json.loads(line)['weights'] == found['weights']
    given = helpers.run_command('evaluate', *each, '--data=digits', '--weights=1,2,1')
    assert '(weights ' in given.stdout and '0.500' in given.stdout and '; given)' in given.stdout
    for weights, message in (('1,2', 'expected 3 weights'), ('a,b,c', 'expected comma-separated numbers')):
        wrong = helpers.run_command('evaluate', *each, '--data=digits', f'--weights={weights}')
        assert wrong.returncode == 2 and message in wrong.stderr and len(wrong.stderr.splitlines()) == 1


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('photos')
    (folder / 'more').mkdir()
    rng = np.random.default_rng(0)
    for name, shape in (('b.png', (50, 70, 3)), ('a.jpg', (90, 40, 3)), ('more/c.JPEG', (20, 20, 3))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / name)
    Image.fromarray(rng.integers(0, 256, (40, 40), np.uint8)).save(folder / 'gray.png')
    (folder / 'notes.txt').write_text('no image')
    return folder


@pytest.mark.parametrize('views', [1, pytest.param(10, marks=pytest.mark.slow)])
def test_predict_command(checkpoints, photos, views):
    """Results follow the order of the arguments, with probabilities of the squares that `prepare` would make."""
    result = helpers.run_command(
        'predict', f'--checkpoint={checkpoints[0]}', f'{photos}/gray.png', str(photos), f'--views={views}', '--top=3',
        '--json',
    )  # fmt: skip
    skipped = f'warning: {photos}: skipped files that are not images of a known format: 1 .txt\n'
    assert (result.returncode, result.stderr) == (0, skipped)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    names = ['gray.png', 'a.jpg', 'b.png', 'gray.png', 'more/c.JPEG']
    assert [line['file'] for line in lines] == [f'{photos}/{name}' for name in names]
    loaded = loading.load_checkpoint(checkpoints[0])
    squares = np.stack([image_io.resize_center_crop((photos / name).read_bytes(), 32) for name in names])
    expected = predict.predict(loaded, squares, views=views)
    for line, p in zip(lines, expected, strict=True):
        order = np.argsort(-p)[:3]
        assert [row['index'] for row in line['top']] == order.tolist()
        assert [row['label'] for row in line['top']] == [str(i) for i in order]
        np.testing.assert_allclose([row['probability'] for row in line['top']], p[order], rtol=1e-5)


@pytest.mark.slow
def test_predict_table_and_errors(checkpoints, photos, tmp_path):
    table = helpers.run_command('predict', f'--checkpoint={checkpoints[0]}', f'{photos}/a.jpg').stdout.splitlines()
    assert table[0] == f'{photos}/a.jpg' and len(table) == 6
    percent = [float(line.split('%')[0]) for line in table[1:]]
    assert percent == sorted(percent, reverse=True) and sum(percent) <= 100.01
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'bad.jpg').write_text('no image')
    fixed = f'--checkpoint={checkpoints[0]}'
    for arguments, message in (
        ([fixed], 'missing argument: give one IMAGE_OR_FOLDER or more'),
        ([fixed, '/nowhere.jpg'], "'/nowhere.jpg' does not exist"),
        ([fixed, f'{tmp_path}/empty'], 'contains no images'),
        ([fixed, f'{photos}/a.jpg', '--top=11'], '--top=11: expected 1 to 10'),
        ([fixed, f'{photos}/a.jpg', '--views=2'], '--views=2: expected 1'),
        (['--checkpoint=/nowhere', f'{photos}/a.jpg'], "there is no checkpoint at"),
    ):  # fmt: skip
        result = helpers.run_command('predict', *arguments)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
        assert message in result.stderr


def test_predict_continues_after_unreadable_file(checkpoints, photos, tmp_path):
    """All readable files are predicted before the error is raised; cyclic links are ignored."""
    for name in ('a.jpg', 'z.jpg'):
        (tmp_path / name).write_bytes((photos / 'a.jpg').read_bytes())
    (tmp_path / 'b.jpg').write_text('no image')
    (tmp_path / 'c.png').write_bytes((photos / 'b.png').read_bytes()[:500])
    os.symlink('.', tmp_path / 'circle')
    os.symlink('itself', tmp_path / 'itself')
    result = helpers.run_command('predict', f'--checkpoint={checkpoints[0]}', str(tmp_path), '--json')
    assert [json.loads(line)['file'] for line in result.stdout.splitlines()] == [f'{tmp_path}/{n}.jpg' for n in 'az']
    *_, first, second, last = result.stderr.splitlines()
    assert result.returncode == 2 and first.endswith("b.jpg' cannot be read as an image (unknown image format)")
    assert second.startswith(f"warning: '{tmp_path}/c.png' cannot be read as an image (damaged: ")
    assert last.startswith('error: 2 of 4 files cannot be read as images (named above)')


def test_files_pil_images_and_arrays_predict_the_same(checkpoints, tmp_path):
    """Also with transparency; dark 16-bit pixels are warned of in each."""
    loaded = loading.load_checkpoint(checkpoints[0])
    rgba = np.random.default_rng(0).integers(0, 256, (40, 50, 4), np.uint8)
    rgba[:20, :, 3] = 0
    dark = rgba[..., 0].astype(np.uint16) * 16
    for name, array in (('rgba.png', rgba), ('dark.png', dark)):
        Image.fromarray(array).save(tmp_path / name)
        given = (tmp_path / name, Image.open(tmp_path / name), np.atleast_3d(array))
        records = [predict.to_records(loaded, image) for image in given]
        np.testing.assert_array_equal(records[0], records[1])
        np.testing.assert_array_equal(records[0], records[2])
    white = predict.to_records(loaded, tmp_path / 'rgba.png')[0, :15]
    assert white.min() == 255


def test_closed_stdout_is_not_an_error(checkpoints, photos):
    """As in `predict ... | head -1`."""
    command = [sys.executable, '-m', 'alexnet_jax', 'predict', f'--checkpoint={checkpoints[0]}', str(photos)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as child:
        child.stdout.close()
        assert [line.split(': ')[0] for line in child.stderr] == ['warning']  # of the file that is not an image


@pytest.mark.slow
def test_converted_weights_cannot_be_resumed(checkpoints, tmp_path):
    """A workdir without optimizer state is distinguished from a run."""

    with pytest.raises(UserError, match='contains converted or fitted weights, not a run; .*--config.init_from='):
        train.train_and_evaluate(helpers.digits_config(num_steps=1), checkpoints[0])
    config = helpers.digits_config(**{'num_steps': 1, 'init_from': checkpoints[0], 'optim.learning_rate': 0.0})
    train.train_and_evaluate(config, str(tmp_path))
    before, after = (loading.load_checkpoint(path).params for path in (checkpoints[0], str(tmp_path)))
    chex.assert_trees_all_equal(before, after)
