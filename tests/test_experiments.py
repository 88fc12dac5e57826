"""Suites: differences and statistics by hand, each from end to end at toy size."""

import csv
import json
import os
import runpy
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from alexnet_jax import (
    checkpoint,
    cifar,
    evaluate,
    experiments,
    figures,
    layers,
    model,
    prepare,
    results,
    sources,
    suites,
    train,
)
from alexnet_jax.suites import Arm
from tests import small
from tests.conftest import ROOT, SHARED_DATA

BASE = """
from tests import small

def get_config():
    return small.digits_config(**{'num_epochs': 1.0, 'mesh.tower': 1, 'mesh.data': 1, 'log_every_steps': 0})
"""


def _paper():
    return runpy.run_path(str(ROOT / 'configs' / 'paper.py'))['get_config']()


def _then(config):
    return [row[-1] for row in config.model.conv]


def test_arms_change_what_they_say():
    base = _paper()
    arms = {arm.name: suites.changed(base, arm.changes) for arm in suites.ablations(base)}
    assert not any('lrn' in then for then in _then(arms['no normalisation']))
    assert arms['no dropout'].model.dropout_rate == arms['no colour'].data.colour_std == 0
    assert arms['no weight decay'].optim.weight_decay == 0
    assert (arms['no crops or reflections'].data.random_crop, arms['no crops or reflections'].data.reflect) == (
        False,
    ) * 2
    assert base.to_dict() == _paper().to_dict() == arms['base'].to_dict()  # the base is as it was
    for name, config in arms.items():
        layers.sizes(model.from_config(config.model), 224, towers=config.mesh.tower), name


def test_a_removed_layer_leaves_the_sizes_above_it():
    """The paper's 55 - 27 - 13 - 13 - 13 - 6, whichever is gone; its stride and pooling go to a neighbour."""
    base = _paper()
    last = {}
    for i in range(5):
        config = suites.changed(base, {'model.conv': suites.without_layer(i)})
        assert len(config.model.conv) == 4
        sizes = layers.sizes(model.from_config(config.model), 224)
        last[i] = sizes['conv4'].outputs[:2]
        strides, pools = (
            np.prod([row[2] for row in config.model.conv]),
            sum(t.split().count('pool') for t in _then(config)),
        )
        assert (strides, pools) == (4, 3)
    # Without conv 1, conv 2's window of 5 px fits in 56 times, not 55: 56 - 28 - 14 - 7.
    assert last == {0: (7, 7), **{i: (6, 6) for i in range(1, 5)}}


def test_the_layer_that_comes_to_the_pixels_gets_weights_for_pixels():
    """Weights that suit activations of about 1 would be a hundred times too wide for values up to 255."""
    base = small.digits_config()
    first, second, *_ = base.model.conv
    row = suites.changed(base, {'model.conv': suites.without_layer(0)}).model.conv[0]
    assert (row[0], row[2], row[5]) == (second[0], 1, 0.003) != (second[0], 1, second[5])
    kept = suites.changed(base, {'model.conv': suites.without_layer(1)}).model.conv[0]
    assert kept[5] == first[5] == 0.003


def test_arms_work_for_small_networks_too():
    base = small.digits_config()
    for arm in suites.ablations(base):
        config = suites.changed(base, arm.changes)
        layers.sizes(model.from_config(config.model), config.data.image_size, towers=config.mesh.tower)


def test_spread_by_hand():
    assert results.spread([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5), 3)  # ((-2)^2 + (-1)^2 + 3^2) / 2
    assert np.isnan(results.spread([4.0]).deviation)
    assert results.said([1.0, 2.0, 6.0], signed=True) == '+3.00 ± 2.65'
    assert results.said([4.0]) == '4.00' and results.said([None]) == ''


def test_differences_are_those_of_the_same_seed():
    rows = [
        {'arm': arm, 'seed': seed, 'top1_error': error}
        for arm, seed, error in (('a', 0, 10.0), ('b', 1, 13.0), ('a', 1, 12.0), ('b', 0, 14.0), ('b', 2, 50.0))
    ]
    assert sorted(results.differences(rows, 'b', 'a', 'top1_error')) == [1.0, 4.0]


def test_verdict():
    assert results.verdict([0.1, 2.0], 1) == 'agrees'
    assert results.verdict([-0.1, -2.0], 1) == 'disagrees'
    assert results.verdict([-0.1, 2.0, 3.0], 1) == 'undecided (2 of 3 seeds agree)'
    assert results.verdict([-0.1], -1) == 'agrees'
    assert results.verdict([1.0], 0) == results.verdict([], 1) == ''


def test_the_table_by_hand():
    arms = [Arm('base', {}, paper=(40.7, 18.2)), Arm('worse', {}, 'base', (1.4, 1.2), (1.37, None), 1)]
    rows = [
        {'arm': arm, 'seed': seed, 'diverged': False, 'train_error': 5.0, 'top1_error': error, 'top5_error': 1.0}
        for arm, seed, error in (('base', 0, 10.0), ('base', 1, 12.0), ('worse', 0, 13.0), ('worse', 1, 13.0))
    ]
    table = results.comparison('ablations', rows, arms)
    named = dict(zip(table.columns, table.rows[1], strict=True))
    assert (named['top-1'], named['difference']) == ('13.00 ± 0.00', '+2.00 ± 1.41')
    assert (named['paper'], named["authors' log"], named['sign']) == ('+1.40 / +1.20', '+1.37', 'agrees')
    assert dict(zip(table.columns, table.rows[0], strict=True))['paper'] == '40.70 / 18.20'
    assert 'ablations' in results.text(table) and '+1.40 / +1.20' in results.text(table)


def test_figure_1s_ratio_is_over_the_seeds_that_both_reach():
    arms = ['relu 0.01', 'tanh 0.003']
    rows = [
        {'arm': arm, 'seed': seed, 'epochs': epochs, 'reached': reached}
        for arm, seed, epochs, reached in (
            ('relu 0.01', 0, 4.0, True), ('relu 0.01', 1, 5.0, True), ('relu 0.01', 2, 5.0, True),
            ('tanh 0.003', 0, 24.0, True), ('tanh 0.003', 1, 25.0, True), ('tanh 0.003', 2, 100.0, False),
        )
    ]  # fmt: skip
    table = results.figure1_table(rows, arms, experiments.RATES)
    assert table.rows[0][1:3] == ('3 of 3', '4.67 ± 0.58')
    assert table.rows[2][1:] == ('2', '5.50 ± 0.71', '6')


def test_the_cifar_arms_name_the_files_they_are_of():
    """The names in layers/layers-cifar of the release, and section 3.3."""
    arms = {arm.name: arm for arm in suites.cifar10(_paper())}
    files = ('layers-80sec.cfg', 'layers-19pct.cfg', 'layers-18pct.cfg', 'layers-conv-local-13pct.cfg')
    for name, file in zip(('80sec', '19pct', '18pct', '13pct'), files, strict=True):
        assert file in arms[name].source
    assert arms['13pct'].paper == arms['13pct'].log == (13.0, None)
    assert arms['11pct'].paper == (-2.0, None) and '11%' in arms['11pct'].source


def test_the_search_stops_between_two_slower_rates(monkeypatch, tmp_path):
    """Passes as a made-up function of the rate; a rate gets no more of them than the best so far has taken."""
    needs, asked = {}, []

    def run(trial, suite, dataset):
        rate, limit = trial.config.optim.learning_rate, trial.config.num_epochs
        asked.append((rate, limit))
        return {'learning_rate': rate, 'epochs': min(needs[rate], limit), 'reached': needs[rate] <= limit}

    monkeypatch.setattr(experiments, 'run', run)
    needs.update({0.001: 30, 0.003: 12, 0.01: 9, 0.03: 11})
    best, rows = experiments.search('relu', _paper(), str(tmp_path), None)
    assert best == 0.01
    assert asked == [(0.003, 100.0), (0.01, 12.0), (0.03, 9.0)]  # the lower rates are not asked for
    assert [row['reached'] for row in rows] == [True, True, False]

    asked.clear()
    needs.update({0.0001: 9, 0.0003: 8, 0.001: 11, 0.01: 12})
    best, _ = experiments.search('relu', _paper(), str(tmp_path), None)
    assert best == 0.0003
    assert asked == [(0.003, 100.0), (0.01, 12.0), (0.001, 12.0), (0.0003, 11.0), (0.0001, 8.0)]


def _command(*words, code=0):
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(
        [sys.executable, '-m', 'alexnet_jax.experiments', *map(str, words), '--cpu_devices=1'],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('suite', ['ablations', 'cifar10', 'ensemble', 'views', 'figure1'])
def test_a_suite_from_end_to_end(suite, tmp_path):
    (tmp_path / 'base.py').write_text(BASE)
    out = tmp_path / 'out'
    words = (suite, '--data=digits', f'--output={out}', f'--base={tmp_path}/base.py', '--seeds=2', '--scale=0.25')
    if suite == 'ablations':  # most of the time is compiling, network by network
        words = (*words[:-2], '--seeds=1', '--scale=0.1')
    elif suite == 'figure1':
        words = (*words, '--base.num_steps=6')  # whatever the arms say of passes
    elif suite == 'cifar10':
        words = (*words[:-2], '--seeds=1', '--scale=0.1', '--base.num_steps=2')
    said = _command(*words)
    with open(out / 'results.csv') as file:
        rows = list(csv.DictReader(file))
    page = (out / 'report.html').read_text()
    assert '<html' in page and suite in page
    seen = {(row['arm'], row['seed']) for row in rows}
    if suite == 'ablations':
        assert len(seen) == len(suites.ablations(small.digits_config()))
        assert '+1.40 / +1.20' in said and 'no normalisation' in page
    elif suite == 'figure1':
        assert {row['arm'].split()[0] for row in rows} == {'relu', 'tanh'} and 'tanh / ReLU' in said
    else:
        assert len(seen) == (len(cifar.NETS) if suite == 'cifar10' else 2)
    assert all(row['diverged'] == 'True' or 0 <= float(row['train_error']) <= 100 for row in rows)
    # Again: nothing is trained, nothing changes but what is said of it.
    before = {path: path.read_bytes() for path in out.rglob('SHA256SUMS')}
    again = _command(*words)
    assert 'is finished' in again and before == {path: path.read_bytes() for path in out.rglob('SHA256SUMS')}
    with open(out / 'results.csv') as file:
        assert list(csv.DictReader(file)) == rows


@pytest.mark.slow
def test_a_row_is_what_evaluate_says(tmp_path):
    (tmp_path / 'base.py').write_text(BASE)
    _command('views', '--data=digits', f'--output={tmp_path}/out', f'--base={tmp_path}/base.py', '--seeds=1')
    with open(tmp_path / 'out' / 'results.csv') as file:
        (row,) = csv.DictReader(file)
    run = tmp_path / 'out' / 'runs' / 'base-0'
    last = figures.curves(str(run))['val'].top1_error[-1]
    assert float(row['top1_error']) == pytest.approx(last, abs=1e-9)
    trained = checkpoint.load_checkpoint(str(run))
    records = sources.open_dataset('digits').split('val')
    labels = np.array([record['label'] for record in records])
    found = evaluate.predict(trained, np.stack([record['image'] for record in records]), views=10)
    assert float(row['top1_ten']) == pytest.approx(100 * np.mean(found.argmax(1) != labels), abs=1e-6)


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (('ablation',), "Did you mean 'ablations'?"),
        (('views', '--scale=2'), '--scale=2.0'),
        (('views', '--base=configs/papr.py'), "there is no config file 'configs/papr.py'"),
    ],
)
@pytest.mark.slow
def test_what_is_wrong_is_one_line(words, message, tmp_path):
    said = _command(*words, '--data=digits', f'--output={tmp_path}/out', code=2)
    assert message in said and 'Traceback' not in said


@pytest.mark.slow
def test_a_dry_run_trains_nothing(tmp_path):
    (tmp_path / 'base.py').write_text(BASE)
    said = _command(
        'ablations', '--data=digits', f'--output={tmp_path}/out', f'--base={tmp_path}/base.py', '--seeds=1', '--dry_run'
    )
    assert '1,437 images' in said and f'{len(suites.ablations(small.digits_config()))} runs' in said
    assert not (tmp_path / 'out' / 'runs').exists()


def test_colours_by_hand():
    """The more coloured half is not always the first."""
    rows = [
        {'arm': 'a', 'colour_0': 0.2, 'colour_1': 0.6},
        {'arm': 'a', 'colour_0': 0.7, 'colour_1': 0.1},
        {'arm': 'b'},
    ]
    table = results.colours(rows, [Arm('a', {}), Arm('b', {})])
    assert table.rows == [('a', '0.65 ± 0.07', '0.15 ± 0.07', '0.50 ± 0.14'), ('b', '', '', '')]


@pytest.mark.slow
def test_a_run_that_diverges_at_once_is_a_result(tmp_path, capsys):
    """Before its first checkpoint, and told again from what was written."""
    base = small.digits_config(**{'optim.learning_rate': 1e30, 'num_steps': 4, 'mesh.tower': 1})
    (trial,) = experiments.trials([Arm('wild', {})], base, 1, str(tmp_path))
    digits = sources.open_dataset('digits')
    for _ in range(2):
        row = experiments.run(trial, 'ablations', digits)
        assert row['diverged'] and 'top1_error' not in row
    assert 'not finite' in capsys.readouterr().out
    table = results.comparison('ablations', [row], [trial.arm])
    assert table.rows[0][:4] == ('wild', '0', '', '')


@pytest.mark.slow
def test_the_base_for_64_pixels_learns(tmp_path):
    """One pass over 10,000 images: guessing is ln 20 = 3.00, where the network stays when its ReLUs have died."""
    archive = SHARED_DATA / 'tiny_imagenet_20.tar.gz'
    if not archive.exists():
        pytest.skip(f'needs {archive.name}, which this machine has not got')
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter='data')
    prepare.prepare(str(tmp_path / 'tiny_imagenet_20'), str(tmp_path / 'data'), size=64, format='raw')
    config = runpy.run_path(str(ROOT / 'configs' / 'tiny_imagenet.py'))['get_config']()
    config.data.path, config.num_epochs, config.mesh.tower = str(tmp_path / 'data'), 1.0, 1
    train.train_and_evaluate(config, str(tmp_path / 'run'))
    last = json.loads((tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()[-1])
    assert last['split'] == 'val' and last['count'] == 1000 and last['loss'] < 2.9
