"""The data of the figures against the paper, brute force and values by hand, and the content of the plots."""

import json
import os
import re
import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pytest
from PIL import Image

import alexnet_jax
from alexnet_jax.convert import loading
from alexnet_jax.core import augment, model
from alexnet_jax.core.architecture import DenseSpec
from alexnet_jax.core.config import model_from_config
from alexnet_jax.data import datasets
from alexnet_jax.experiments import figures, plots
from alexnet_jax.inference import activations, predict
from alexnet_jax.utils.errors import UserError
from tests import ROOT, helpers


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    return helpers.save_untrained(tmp_path_factory.mktemp('figures') / 'run')


def _rows(name, towers, arg=None, **changes):
    config = alexnet_jax.get_config(f'{name}:{arg}' if arg else name)
    network = model_from_config({**config.model, **changes})
    return figures.architecture(network, config.data.image_size, towers)


OWN, BOTH = ((0,), (1,)), ((0, 1), (0, 1))


def test_architecture_of_the_paper():
    """Section 3.5 and the caption of figure 2, whose 253,440 for the first layer is not 55 x 55 x 96."""
    rows = _rows('paper', 2)
    assert [row.name for row in rows] == ['conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7', 'fc8']
    assert [row.neurons for row in rows] == [55 * 55 * 96, 186_624, 64_896, 64_896, 43_264, 4096, 4096, 1000]
    assert [row.size for row in rows] == [55, 27, 13, 13, 13, None, None, None]
    assert [row.read_size for row in rows] == [224, 27, 13, 13, 13, None, None, None]
    assert [row.maps for row in rows] == [(n, n) for n in (48, 128, 192, 192, 128, 2048, 2048, 500)]
    assert [row.kernel for row in rows] == [(11, 3), (5, 48), (3, 256), (3, 192), (3, 192), None, None, None]
    assert [row.stride for row in rows] == [4, 1, 1, 1, 1, None, None, None]
    assert [row.reads for row in rows] == [((), ()), OWN, BOTH, OWN, OWN, BOTH, BOTH, BOTH]
    assert rows[1].post == 'relu lrn pool' and sum(row.parameters for row in rows) == 60_965_224


def test_architecture_of_other_networks():
    one = _rows('paper', 1)
    assert [row.maps for row in one][:2] == [(96,), (256,)] and one[1].kernel == (5, 48) and one[1].groups == 2
    assert [row.reads for row in one] == [((),)] + [((0,),)] * 7
    apart = _rows('ablations:no_communication', 2)
    assert [row.reads for row in apart] == [((), ()), *[OWN] * 6, BOTH]
    six = _rows('sixth_conv', 2)
    assert six[5].name == 'conv6' and six[5].reads == BOTH and (six[5].size, six[5].read_size) == (6, 6)
    cifar = _rows('cifar10', 1, '13pct')
    assert [(row.name, row.size, row.maps) for row in cifar[2:]] == [('local3', 6, (32,)), ('local4', 6, (32,)),
                                                                     ('fc5', None, (10,))]  # fmt: skip
    assert cifar[2].kernel == (3, 64) and cifar[2].parameters == 36 * (9 * 64 * 32 + 32)
    odd = _rows('paper', 2, num_classes=21_843)
    assert odd[-1].maps == (10_922, 10_921) and odd[-1].neurons == 21_843
    with pytest.raises(UserError, match='no layer has groups=2'):
        _rows('ablations:one_gpu', 2)
    for name, towers in (('paper', 2), ('authors_2012', 2), ('ablations:one_gpu', 1), ('torchvision', 1), ('caffe', 1)):
        config = alexnet_jax.get_config(name)
        assert figures.towers_of(model_from_config(config.model), config.data.image_size) == towers, name


def test_kernel_pictures_show_checkpoint_kernels(path):
    kernel = np.asarray(loading.load_checkpoint(path).params['conv1']['kernel'])
    towers = figures.kernel_pictures(kernel, 2)
    assert [tower.shape for tower in towers] == [(4, 5, 5, 3)] * 2
    least, most = kernel.min(), kernel.max()
    assert min(t.min() for t in towers) == 0 and max(t.max() for t in towers) == 1
    for place in np.ndindex(5, 5, 3):
        for o in range(8):
            expected = (kernel[(*place, o)] - least) / (most - least)
            assert towers[o // 4][(o % 4, *place)] == pytest.approx(expected, abs=1e-6)
    assert np.array_equal(figures.kernel_pictures(kernel, 1)[0], np.concatenate(towers))
    assert not np.any(figures.kernel_pictures(np.full((3, 3, 3, 2), 7.0), 1)[0])
    with pytest.raises(UserError, match=r'kernels of shape \(3, 3, 48, 2\) are not RGB'):
        figures.kernel_pictures(np.zeros((3, 3, 48, 2)), 1)


def test_color_share_by_hand():
    kernels = np.zeros((2, 2, 3, 6))
    kernels[:, :, :, 0] = np.array([[1.0, -2.0], [3.0, 0.5]])[:, :, None]  # gray
    kernels[:, :, 0, 1] = [[1.0, -2.0], [3.0, 0.5]]  # red: 1 - 3 (1/3)^2
    kernels[:, :, 0, 2], kernels[:, :, 1, 2] = 1.0, -1.0  # red against green
    kernels[0, 0, :, 3] = 2.0, 1.0, 0.0  # mean 1: 1 - 3 / 5
    kernels[:, :, :, 4] = 1e-20  # gray with tiny values
    found = figures.color_share(kernels)
    np.testing.assert_allclose(found, [0, 2 / 3, 1, 0.4, 0, 0], atol=1e-12)
    gaussian = np.random.default_rng(0).normal(size=(11, 11, 3, 200))
    assert figures.color_share(gaussian).mean() == pytest.approx(2 / 3, abs=0.01)


def test_predictions(path):
    loaded, val = loading.load_checkpoint(path), datasets.open_dataset('digits').split('val')
    images, labels = np.stack([r['image'] for r in val[:20]]), [r['label'] for r in val[:20]]
    outputs = predict.predict(loaded, images, views=1)
    found = figures.predictions(loaded, images, labels, top=3)
    for prediction, p, label in zip(found, outputs, labels, strict=True):
        order = sorted(range(10), key=lambda i: -p[i])[:3]
        assert prediction.true == str(label) and prediction.names == tuple(map(str, order))
        np.testing.assert_allclose(prediction.probabilities, p[order], rtol=1e-5)
        assert prediction.place == (order.index(label) if label in order else None)
    assert len({prediction.place for prediction in found}) > 2  # all cases occur


@pytest.mark.parametrize('batch', [1, 7, 64, 300])
def test_nearest_matches_brute_force(batch):
    """Thousands of distances are tied, within and across batches: the lower index comes first."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, (200, 5)).astype(np.float32) * 1000 + 0.1
    query = rng.integers(0, 2, (4, 5)).astype(np.float32) * 1000 + 0.1
    distances = np.sqrt(((query.astype(np.float64)[:, None] - base.astype(np.float64)[None]) ** 2).sum(2))
    expected = np.array([sorted(range(200), key=lambda i: (row[i], i))[:6] for row in distances])
    parts = (base[i : i + batch].reshape(-1, 5, 1) for i in range(0, 200, batch))
    indices, found = figures.nearest(query[:, :, None], parts)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_allclose(found, np.take_along_axis(distances, expected, 1), rtol=1e-12)
    assert any(len(set(row)) < 6 for row in found)


def test_nearest_of_large_and_few_vectors():
    """Small differences of large vectors; fewer vectors than requested."""
    query = np.full((1, 3), 1e6, np.float32)
    base = query + np.array([[2.0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)
    indices, distances = figures.nearest(query, [base])
    assert indices.tolist() == [[2, 1, 0]] and distances.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize('split', ['train', 'val'])
def test_image_is_not_its_own_neighbor(split, path, monkeypatch):
    """Compares with a search over the other training images in fc7; in split train the query is one of them."""
    loaded, digits, drawn = loading.load_checkpoint(path), datasets.open_dataset('digits'), []
    records = {name: digits.splits[name][:30] for name in ('train', 'val')}
    images = {name: np.stack([record['image'] for record in part]) for name, part in records.items()}
    seen = {name: augment.center_crop(part, loaded.image_size) for name, part in images.items()}
    base, queries = (activations.activations(loaded, images[name], 'fc7')['fc7'] for name in ('train', split))
    monkeypatch.setattr(plots, 'neighbors', lambda *found: drawn.append(found))
    list(figures._image_figures(loaded, digits._replace(splits=records), split, shown=None, seed=0))
    ((shown, near, *_),) = drawn
    assert len(shown) == 5
    for image, found in zip(shown, near, strict=True):
        (own,) = (i for i in range(30) if np.array_equal(seen[split][i], image))
        distances = ((base.astype(np.float64) - queries[own]) ** 2).sum(1)
        order = [i for i in np.argsort(distances, kind='stable') if split == 'val' or i != own]
        np.testing.assert_array_equal(found, seen['train'][order[:6]])


def test_confusion_by_hand():
    matrix = figures.confusion([0, 0, 1, 2, 2, 2, 2], np.array([0, 1, 1, 0, 0, 1, 2]), 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [2, 1, 1, 0], [0, 0, 0, 0]]
    names = ('cat', 'dog', 'owl', 'yak')
    assert figures.most_confused(matrix, names) == [('owl', 'cat', 2, 0.5), ('cat', 'dog', 1, 0.5),
                                                    ('owl', 'dog', 1, 0.25)]  # fmt: skip
    assert figures.most_confused(matrix, names, count=1) == [('owl', 'cat', 2, 0.5)]
    assert matrix[0, 0] == 1  # the matrix is unchanged


def test_curves(tmp_path):
    lines = [
        {'step': 1, 'epoch': 0.5, 'split': 'train', 'loss': 2.5, 'top1_error': 90.0, 'top5_error': 50.0},
        {'step': 2, 'epoch': 1.0, 'split': 'train', 'loss': 2.0, 'top1_error': 80.0, 'top5_error': 40.0},
        {'step': 2, 'epoch': 1.0, 'split': 'val', 'loss': 2.2, 'top1_error': 85.0, 'top5_error': 45.0},
    ]
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n{"step": 3, "epo')
    found = figures.curves(str(tmp_path))
    assert found['train'].epoch.tolist() == [0.5, 1.0] and found['train'].loss.tolist() == [2.5, 2.0]
    assert found['train'].top1_error.tolist() == [90.0, 80.0]
    assert [values.tolist() for values in found['val']] == [[1.0], [85.0], [2.2]]
    (tmp_path / 'metrics.jsonl').write_text('')
    assert len(figures.curves(str(tmp_path))['val'].epoch) == 0
    with pytest.raises(UserError, match='metrics.jsonl. does not exist; use .* or --checkpoint instead of --run'):
        figures.curves(str(tmp_path / 'none'))


def test_norms_of_layers(tmp_path):
    """Validation lines and lines that were cut off have no norms."""
    lines = [
        {'epoch': 0.5, 'split': 'train', 'update_norms': {'conv1': 0.25, 'fc2': 2.0}},
        {'epoch': 0.5, 'split': 'val', 'loss': 2.2},
        {'epoch': 1.0, 'split': 'train', 'update_norms': {'conv1': 0.5, 'fc2': 1.0}},
    ]
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n{"epoch": 2.0, "upd')
    found = figures.norms(tmp_path, 'update_norms')
    assert {name: values.tolist() for name, (_, values) in found.items()} == {'conv1': [0.25, 0.5], 'fc2': [2.0, 1.0]}
    assert all(epochs.tolist() == [0.5, 1.0] for epochs, _ in found.values())
    assert figures.norms(tmp_path, 'gradient_norms') == {}
    axes = plots.learning_curves(found, log_scale=True).axes[0]
    assert axes.get_yscale() == 'log' and [line.get_label() for line in axes.lines] == ['conv1', 'fc2']


def _crossing(figure):
    return sum(line.get_color() == plots.VERMILION for line in figure.axes[0].lines)


def test_tower_connections_are_drawn():
    """In each direction, a convolution draws two lines for its window and a dense layer one."""
    assert _crossing(plots.architecture(_rows('paper', 2), 224)) == 2 * (2 + 3)
    assert _crossing(plots.architecture(_rows('sixth_conv', 2), 224)) == 2 * (2 + 2 + 3)
    assert _crossing(plots.architecture(_rows('ablations:no_communication', 2), 224)) == 2
    assert _crossing(plots.architecture(_rows('paper', 1), 224)) == 0
    said = [text.get_text() for text in plots.architecture(_rows('paper', 2), 224).axes[0].texts]
    for text in ('conv3', '55×55\n48 maps', '2,048', '290,400 neurons\n34,944 parameters'):  # noqa: RUF001
        assert text in said
    assert any(text.startswith('3×3×256, stride 1') for text in said)  # noqa: RUF001
    softmax = model.AlexNet(layers={'fc1': DenseSpec()}, num_classes=10)
    assert plots.architecture(figures.architecture(softmax, 8, 1), 8).axes[0].lines


def test_kernels_plot():
    """16 kernels per row with a 1 px gap, one tower above the other."""
    towers = [np.full((18, 3, 3, 3), 0.25), np.full((18, 3, 3, 3), 0.75)]
    figure = plots.kernels(towers, [0.1, 0.9])
    sheets = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    assert [sheet.shape for sheet in sheets] == [(2 * 4 + 1, 16 * 4 + 1, 3)] * 2
    assert [axes.get_title(loc='left') for axes in figure.axes] == [
        'tower 0: mean color share 0.10', 'tower 1: mean color share 0.90'
    ]  # fmt: skip
    for sheet, value in zip(sheets, (0.25, 0.75), strict=True):
        assert np.all(sheet[[0, 4, 8]] == 1) and np.all(sheet[:, ::4] == 1)
        assert np.all(sheet[1:4, 61:64] == value) and np.all(sheet[5:8, 5:8] == value)
        assert np.all(sheet[5:8, 9:] == 1)


def test_predictions_plot():
    found = [
        figures.Prediction('owl, night bird', ('cat', 'owl, night bird'), (0.75, 0.25), 1),
        figures.Prediction('yak', ('cat', 'dog'), (0.5, 0.125), None),
    ]
    figure = plots.predictions(np.zeros((2, 8, 8, 3), np.uint8), found)
    pictures, bars = figure.axes[:2], figure.axes[2:]
    assert [axes.get_title() for axes in pictures] == ['owl', 'yak']
    assert all(axes.get_xlim() == (0, 1) for axes in bars)
    assert [[bar.get_width() for bar in axes.patches] for axes in bars] == [[0.75, 0.25], [0.5, 0.125]]
    assert [[bool(bar.get_hatch()) for bar in axes.patches] for axes in bars] == [[False, True], [False, False]]
    assert [[text.get_text() for text in axes.texts] for axes in bars] == [['cat', 'owl'], ['cat', 'dog']]


def test_learning_curves():
    x = np.arange(4)
    seeds = [(x, 1 - 0.2 * x), (x, 1 - 0.25 * x)]
    axes = plots.learning_curves({'ReLU': seeds, 'tanh': (x, 1 - 0.1 * x)}, threshold=0.25).axes[0]
    assert [line.get_linestyle() for line in axes.lines] == ['-', '-', '--', '-']
    assert axes.lines[3].get_ydata() == [0.25, 0.25] and axes.lines[3].get_linewidth() < 1
    assert axes.lines[0].get_linewidth() < axes.lines[2].get_linewidth()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ['ReLU', 'tanh']
    assert (axes.get_xlabel(), axes.get_ylabel()) == ('Epochs', 'Training error rate')
    assert not plots.learning_curves({}).axes[0].lines


def test_many_curves_have_different_lines():
    curves = {f'variant {i}': ([0, 1], [1, i]) for i in range(16)}
    lines = plots.learning_curves(curves).axes[0].lines
    assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines}) == 16


def test_effects_plot_shows_every_seed_and_the_spread():
    axes = plots.effects({'worse': [1.0, 3.0], 'diverged': [], 'one seed': [-2.0]}).axes[0]
    seeds = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == 'o']
    means = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == 's']
    assert seeds == [[1, 3], [-2]] and means == [[2], [-2]]
    (segment,) = axes.collections[0].get_segments()
    assert [x for x, _ in segment] == pytest.approx([2 - 2**0.5, 2 + 2**0.5])  # sqrt(((-1)^2 + 1^2) / 1)


def test_plots_are_deterministic_and_leave_no_global_state(tmp_path):
    before = matplotlib.rcParams.copy()
    for name in ('a', 'b'):
        figure = plots.confusion(np.eye(3, dtype=int) * 4, ('cat', 'dog', 'owl'))
        written = plots.save(figure, str(tmp_path / name), 'confusion')
        assert written == [f'{tmp_path}/{name}/confusion.png', f'{tmp_path}/{name}/confusion.svg']
    for kind in ('png', 'svg'):
        assert (tmp_path / f'a/confusion.{kind}').read_bytes() == (tmp_path / f'b/confusion.{kind}').read_bytes()
    assert matplotlib.rcParams.copy() == before and 'matplotlib.pyplot' not in sys.modules
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='cannot be written'):
        plots.save(figure, str(tmp_path / 'file'), 'confusion')


def test_characters_that_the_font_lacks_are_named_once(tmp_path, capfd):
    figure = plots.confusion(np.eye(2, dtype=int), ('\U0001f33c', 'cat'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        plots.save(figure, tmp_path, 'confusion')
    said = capfd.readouterr().err
    assert said.count('\n') == 1 and 'characters that the font lacks are boxes: \U0001f33c;' in said


def test_confusion_matrix_merges_other_classes():
    matrix = np.arange(16).reshape(4, 4)
    merged = figures.merge_others(matrix, [3, 1])
    expected = [[15, 13, 12 + 14], [7, 5, 4 + 6], [3 + 11, 1 + 9, 0 + 2 + 8 + 10]]  # classes 3, 1, then 0 and 2
    assert merged.tolist() == expected


def _labeled(labels, names):
    arrays = {'image': np.zeros((len(labels), 32, 32, 3), np.uint8), 'label': labels}
    return alexnet_jax.in_memory({'train': arrays, 'val': arrays}, names)


def test_data_with_other_classes_are_matched(path, capsys):
    """Three of four classes are the network's: their images get its labels, the other images are left out."""
    checkpoint = loading.load_checkpoint(path)
    capsys.readouterr()
    data = _labeled([0, 1, 2, 3] * 2, ['7', 'three', '02', '5'])
    matched, shown = figures.match_dataset(checkpoint, data, 'val', path)
    said = ' '.join(capsys.readouterr())
    assert f"3 of 4 classes are classes of {path}, matched by name ('7' = '7', '02' = '2', '5' = '5')" in said
    assert all(f'three; 2 of 8 images of {split} are left out' in said for split in ('train', 'val'))
    assert [record['label'] for record in matched.split('val')] == [7, 2, 5] * 2 and shown == [2, 5, 7]
    same = _labeled([0, 1], [str(i) for i in range(10)])
    assert figures.match_dataset(checkpoint, same, 'val', path) == (same, None) and not any(capsys.readouterr())
    with pytest.raises(UserError, match='none of the 4 classes of the data'):
        figures.match_dataset(checkpoint, _labeled([0, 1], list('abcd')), 'val', path)
    with pytest.raises(UserError, match='no image of the val split has a class of '):
        figures.match_dataset(checkpoint, _labeled([0, 0], ['three', '1']), 'val', path)


@pytest.mark.slow
def test_confusion_matrix_of_a_subset(path):
    checkpoint = loading.load_checkpoint(path)
    matched, shown = figures.match_dataset(checkpoint, _labeled([0, 1, 2, 3] * 2, ['7', 'x', '2', '5']), 'val', path)
    drawn = {name: figure for name, figure, _ in figures.draw(checkpoint, dataset=matched, shown=shown)}
    labels = drawn['confusion'].axes[0].get_yticklabels()
    assert [text.get_text() for text in labels] == ['2', '5', '7', 'other classes']
    assert {axes.get_title() for axes in drawn['predictions'].axes} - {''} == {'2', '5', '7'}
    assert 'neighbors' in drawn


def _run(*words):
    return helpers.run_command('figures', '--cpu_devices=1', *words)


@pytest.mark.slow
def test_command(path, tmp_path):
    line = {'step': 1, 'epoch': 1.0, 'split': 'val', 'loss': 2.5, 'top1_error': 90.0}
    metrics = os.path.join(path, 'metrics.jsonl')
    with open(metrics, 'w') as file:
        file.write(json.dumps(line) + '\n')
    result = _run(f'--run={path}', '--data=digits', f'--output={tmp_path}/out')
    os.remove(metrics)
    assert result.returncode == 0 and not result.stderr, result.stderr
    names = ['architecture', 'classes', 'confusion', 'error', 'kernels', 'loss', 'neighbors', 'patches', 'predictions']
    names = [*names, 'receptive_fields', 'visualizations']
    assert sorted(os.listdir(tmp_path / 'out')) == [f'{name}.{kind}' for name in names for kind in ('png', 'svg')]
    for name in names:
        assert f'{tmp_path}/out/{name}.png\n{tmp_path}/out/{name}.svg\n' in result.stdout
        with Image.open(tmp_path / 'out' / f'{name}.png') as image:
            assert min(image.size) > 150 and len(image.convert('L').getcolors()) > 2
    kernel = loading.load_checkpoint(path).params['conv1']['kernel']
    share = figures.color_share(kernel)[:4].mean()
    assert f'conv1, tower 0: mean color share {share:.3f}, ' in result.stdout
    assert 'of 360 images correct (center crop); most frequent errors:' in result.stdout
    assert re.search(r'\n  \d predicted as \d: \d+ \([\d.]+% of class \d\)\n', result.stdout)
    assert 'nearest training images in fc7: ' in result.stdout
    assert len(re.search(r'maps of conv5.relu: (.*)\n', result.stdout)[1].split(', ')) == 8


@pytest.mark.slow
def test_command_errors(path, tmp_path):
    for arguments, message in (
        ([f'--output={tmp_path}/out'], 'give either --run=WORKDIR or --checkpoint=PATH'),
        ([f'--run={path}', f'--output={tmp_path}/out'], 'metrics.jsonl'),
    ):
        result = _run(*arguments)
        assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
    code = (
        'import sys; sys.modules["matplotlib"] = None\n'
        'from alexnet_jax.experiments import figures\nfrom alexnet_jax.utils import errors\n'
        'try:\n    import alexnet_jax.experiments.plots\n'
        'except errors.UserError as error:\n    print(error)'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "not installed: pip install 'alexnet_jax[figures]'" in result.stdout
    assert not os.path.exists(tmp_path / 'out')
