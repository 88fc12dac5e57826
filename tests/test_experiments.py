"""Suites: differences and statistics by hand, each from end to end at toy size."""

import csv
import json
import math
import os
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest

import alexnet_jax
from alexnet_jax.checkpoints import loading, manager
from alexnet_jax.commands import experiments
from alexnet_jax.core import architecture
from alexnet_jax.core.config import model_from_config
from alexnet_jax.data import datasets
from alexnet_jax.experiments import ablations, cifar10, figures, runner, tables
from alexnet_jax.experiments.ablations import Variant
from alexnet_jax.inference import evaluate, predict
from alexnet_jax.prepare import prepare
from alexnet_jax.training import train
from alexnet_jax.utils.errors import DivergedError, UserError
from tests import ROOT, SHARED_DATA, small

BASE = """
from tests import small

def get_config():
    return small.digits_config(**{'num_epochs': 1.0, 'mesh.tower': 1, 'mesh.data': 1, 'log_every_steps': 0})
"""


def _suite(name, base, seeds, output):
    return runner.Suite(name, base, seeds, str(output), 1.0)


def _paper():
    return alexnet_jax.get_config('paper')


def _post_ops(config):
    return [layer.post for layer in config.model.layers.values()]


def test_arms_change_what_they_say():
    base = _paper()
    variants = {variant.name: ablations.with_changes(base, variant.changes) for variant in ablations.ablations(base)}
    assert not any('lrn' in post for post in _post_ops(variants['no normalization']))
    assert variants['no dropout'].model.dropout_rate == variants['no color'].data.color_std == 0
    assert variants['no weight decay'].optim.weight_decay == 0
    assert (variants['no crops or reflections'].data.random_crop, variants['no crops or reflections'].data.reflect) == (
        False,
    ) * 2
    assert base.to_dict() == _paper().to_dict() == variants['base'].to_dict()  # the base is as it was
    for name, config in variants.items():
        architecture.infer_shapes(model_from_config(config.model), 224, towers=config.mesh.tower), name


def test_a_removed_layer_leaves_the_sizes_above_it():
    """The paper's 55 - 27 - 13 - 13 - 13 - 6, whichever is gone; its stride and pooling go to a neighbor."""
    base = _paper()
    last = {}
    convs = ['conv1', 'conv2', 'conv3', 'conv4', 'conv5']
    for name in convs:
        config = ablations.with_changes(base, {'model.layers': ablations.without_layer(name)})
        left = [other for other in convs if other != name]
        sizes = architecture.infer_shapes(model_from_config(config.model), 224)
        assert list(sizes) == [*left, 'fc6', 'fc7', 'fc8']
        last[name] = sizes[left[-1]].outputs[:2]
        strides = math.prod(config.model.layers[other].stride for other in left)
        assert (strides, sum(post.split().count('pool') for post in _post_ops(config))) == (4, 3)
    # Without conv 1, conv 2's window of 5 px fits in 56 times, not 55: 56 - 28 - 14 - 7.
    assert last == {'conv1': (7, 7), **dict.fromkeys(convs[1:], (6, 6))}


def test_the_layer_that_comes_to_the_pixels_gets_weights_for_pixels():
    """Weights that suit activations of about 1 would be a hundred times too wide for values up to 255."""
    base = small.digits_config()
    base.model.layers.conv2.features = 16
    changed = ablations.with_changes(base, {'model.layers': ablations.without_layer('conv1')}).model.layers
    assert base.model.layers.conv2.init == 'normal(0.17)'
    assert (changed.conv2.features, changed.conv2.stride, changed.conv2.init) == (16, 1, 'normal(0.003)')
    kept = ablations.with_changes(base, {'model.layers': ablations.without_layer('conv2')}).model.layers
    assert kept.conv1.init == 'normal(0.003)'


def test_arms_work_for_small_networks_too():
    base = small.digits_config()
    for variant in ablations.ablations(base):
        config = ablations.with_changes(base, variant.changes)
        architecture.infer_shapes(model_from_config(config.model), config.data.image_size, towers=config.mesh.tower)


@pytest.mark.parametrize('name', ['authors_2012', 'sixth_conv:finetune', 'cifar10:11pct', 'cifar10:18pct', 'caffe'])
def test_every_shipped_config_is_a_base(name, tmp_path):
    """Also one that freezes a layer which a variant takes out, and one without hidden layers: all can be built."""
    base = alexnet_jax.get_config(name)
    base.init_from = 'somewhere'  # where init_fresh is set it wants one
    trials = runner.make_trials(ablations.ablations(base), base, 1, str(tmp_path))
    names = [trial.variant.name for trial in trials]
    assert 'without conv 1' in names and ('towers that do not talk' in names) == (name != 'cifar10:18pct')


def test_what_cannot_be_built_is_said_before_anything_is_trained(tmp_path):
    base = small.digits_config()
    variants = [Variant('fine', {}), Variant('broken', {'model.pool_window': 1})]
    with pytest.raises(UserError, match="variant 'broken' cannot be built from this base: model.pool_stride=2"):
        runner.make_trials(variants, base, 1, str(tmp_path))


@pytest.mark.slow
def test_the_network_without_its_first_layer_is_measured(tmp_path):
    base = small.digits_config(**{'num_steps': 2, 'mesh.tower': 1, 'optim.layer_rates': (('conv1', 0.1),)})
    variants = [variant for variant in ablations.ablations(base) if variant.name == 'without conv 1']
    (trial,) = runner.make_trials(variants, base, 1, str(tmp_path))
    row = runner.run_trial(trial, 'ablations', datasets.open_dataset('digits'))
    assert not row['diverged'] and 0 <= row['color_0'] and row['test_images'] == 360


def test_spread_by_hand():
    deviation = 7**0.5  # ((-2)^2 + (-1)^2 + 3^2) / 2
    assert tables.format_mean_std([1.0, 2.0, 6.0], signed=True) == f'+3.00 ± {deviation:.2f}' == '+3.00 ± 2.65'
    assert tables.format_mean_std([4.0]) == '4.00' and tables.format_mean_std([None]) == ''


def test_differences_are_those_of_the_same_seed():
    rows = [
        {'variant': variant, 'seed': seed, 'top1_error': error}
        for variant, seed, error in (('a', 0, 10.0), ('b', 1, 13.0), ('a', 1, 12.0), ('b', 0, 14.0), ('b', 2, 50.0))
    ]
    assert sorted(tables.differences(rows, 'b', 'a', 'top1_error')) == [1.0, 4.0]


def test_verdict():
    assert tables.sign_agreement([0.1, 2.0], 1) == 'agrees'
    assert tables.sign_agreement([-0.1, -2.0], 1) == 'disagrees'
    assert tables.sign_agreement([-0.1, 2.0, 3.0], 1) == 'undecided (2 of 3 seeds agree)'
    assert tables.sign_agreement([-0.1], -1) == 'agrees'
    assert tables.sign_agreement([1.0], 0) == tables.sign_agreement([], 1) == ''


def test_the_table_by_hand():
    variants = [Variant('base', {}, paper=(40.7, 18.2)), Variant('worse', {}, 'base', (1.4, 1.2), (1.37, None), 1)]
    rows = [
        {
            'variant': variant,
            'seed': seed,
            'diverged': False,
            'train_error': 5.0,
            'top1_error': error,
            'top5_error': 1.0,
        }
        for variant, seed, error in (('base', 0, 10.0), ('base', 1, 12.0), ('worse', 0, 13.0), ('worse', 1, 13.0))
    ]
    table = tables.comparison_table('ablations', rows, variants)
    named = dict(zip(table.columns, table.rows[1], strict=True))
    assert (named['top-1'], named['difference']) == ('13.00 ± 0.00', '+2.00 ± 1.41')
    assert (named['paper'], named["authors' log"], named['sign']) == ('+1.40 / +1.20', '+1.37', 'agrees')
    assert dict(zip(table.columns, table.rows[0], strict=True))['paper'] == '40.70 / 18.20'
    assert 'ablations' in tables.as_text(table) and '+1.40 / +1.20' in tables.as_text(table)


def test_figure_1s_ratio_is_over_the_seeds_that_both_reach():
    variants = ['relu 0.01', 'tanh 0.003']
    rows = [
        {'variant': variant, 'seed': seed, 'epochs': epochs, 'reached': reached}
        for variant, seed, epochs, reached in (
            ('relu 0.01', 0, 4.0, True), ('relu 0.01', 1, 5.0, True), ('relu 0.01', 2, 5.0, True),
            ('tanh 0.003', 0, 24.0, True), ('tanh 0.003', 1, 25.0, True), ('tanh 0.003', 2, 100.0, False),
        )
    ]  # fmt: skip
    table = tables.figure1_table(rows, variants, runner.RATES)
    assert table.rows[0][1:3] == ('3 of 3', '4.67 ± 0.58')
    assert table.rows[2][1:] == ('2', '5.50 ± 0.71', '6')


def test_the_ensembles_gain_by_hand(averaging):
    table = tables.averaged_table('ensemble', ['10', '14'], averaging, max_unreadable=3)
    one, average = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    # Ten views of each network have a point less than its center: 9 / 5 and 13 / 9, together 8 / 6.
    assert (one['evaluated as'], one['networks'], one['top-1'], one['top-5']) == (
        'one network', '2', '11.00 ± 2.83', '7.00 ± 2.83',
    )  # fmt: skip
    assert (average['evaluated as'], average['top-1'], average['top-5']) == ('2 networks averaged', '8.00', '6.00')
    # 8 - 9, 8 - 13 and 6 - 5, 6 - 9
    assert average['difference'] == '-3.00 ± 2.83 / -1.00 ± 2.83' and average['sign'] == 'agrees'
    assert (average['paper'], average["authors' log"]) == ('-2.60 / -1.80', '')
    assert one['difference'] == one['sign'] == '' and 'There is only one average' in table.note


def test_the_gain_of_ten_views_by_hand(averaging):
    table = tables.averaged_table('views', ['10', '14'], averaging, max_unreadable=3)
    center, ten = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert (center['evaluated as'], center['top-1'], center['top-5']) == ('center', '12.00 ± 2.83', '7.00 ± 2.83')
    assert (ten['evaluated as'], ten['top-1'], ten['top-5']) == ('ten views', '11.00 ± 2.83', '7.00 ± 2.83')
    assert ten['difference'] == '-1.00 ± 0.00 / +0.00 ± 0.00' and ten['sign'] == 'agrees'
    assert ten['paper'] == '-1.50 / -1.30' and 'There is only one average' not in table.note


@pytest.fixture
def averaging(monkeypatch):
    """Networks called by their top-1 error from the center; top-5 is 5 less, ten views a point of top-1 better."""

    def evaluated(network, split, mesh, views, max_unreadable):
        assert split == ['of val'] and views in (1, 10) and max_unreadable == 3
        return {'top1_error': network - (views == 10), 'top5_error': network - 5.0}

    def together(networks, split, mesh, views, max_unreadable):
        assert (networks, split, views, max_unreadable) == ([10.0, 14.0], ['of val'], 10, 3)
        return {'top1_error': 8.0, 'top5_error': 6.0}

    monkeypatch.setattr(tables, 'load_last', float)
    monkeypatch.setattr(evaluate, 'evaluate', evaluated)
    monkeypatch.setattr(evaluate, 'evaluate_ensemble', together)
    return datasets.Dataset({'train': [], 'val': ['of val'], 'test': ['of test']}, ('a',), 32, None)


def test_the_cifar_arms_name_the_files_they_are_of():
    """The names in layers/layers-cifar of the release, and section 3.3."""
    variants = {variant.name: variant for variant in ablations.cifar10(_paper())}
    files = ('layers-80sec.cfg', 'layers-19pct.cfg', 'layers-18pct.cfg', 'layers-conv-local-13pct.cfg')
    for name, file in zip(('80sec', '19pct', '18pct', '13pct'), files, strict=True):
        assert file in variants[name].source
    assert variants['13pct'].paper == variants['13pct'].log == (13.0, None)
    assert variants['11pct'].paper == (-2.0, None) and '11%' in variants['11pct'].source


def test_rows_stay_until_they_are_replaced(tmp_path):
    path = str(tmp_path / 'results.csv')
    a, b = ({'suite': 'views', 'variant': 'base', 'seed': seed, 'epochs': 1.0} for seed in (0, 1))
    tables.write_csv(path, [{**a, 'suite': 'ensemble'}], whole=True)
    tables.write_csv(path, [a, b], whole=True)

    def rows():
        with open(path) as file:
            return sorted((row['suite'], int(row['seed']), float(row['epochs'])) for row in csv.DictReader(file))

    tables.write_csv(path, [{**b, 'epochs': 2.0}], whole=False)
    assert rows() == [('ensemble', 0, 1.0), ('views', 0, 1.0), ('views', 1, 2.0)]
    tables.write_csv(path, [a], whole=True)
    assert rows() == [('ensemble', 0, 1.0), ('views', 0, 1.0)]


def test_the_page_says_what_was_measured():
    rows = [{'diverged': True}, {'diverged': False, 'data': 'tiny', 'train_images': 10_000}]
    environment = {'devices': ['cpu:0'], 'versions': {'jax': '1.2'}, 'commit': 'abc'}
    expected = '2 runs on 10,000 training images of 64 px (tiny), cpu:0, jax 1.2, commit abc.'
    assert tables.summary(rows, 64, environment) == expected


def test_the_search_stops_between_two_slower_rates(monkeypatch, tmp_path):
    """Passes as a made-up function of the rate; a rate gets no more of them than the best so far has taken.

    The last batch of a pass reaches a little into the next.
    """
    needs, asked = {}, []

    def run(trial, suite, dataset):
        rate, limit = trial.config.optim.learning_rate, trial.config.num_epochs
        asked.append((rate, limit))
        return {'learning_rate': rate, 'epochs': min(needs[rate], limit) + 0.0016, 'reached': needs[rate] <= limit}

    monkeypatch.setattr(runner, 'run_trial', run)
    needs.update({0.001: 30, 0.003: 12, 0.01: 9, 0.03: 11})
    best, rows = runner.search_rate('relu', _suite('figure1', _paper(), 1, tmp_path), None)
    assert best == 0.01
    assert asked == [(0.003, 100.0), (0.01, 12.0), (0.03, 9.0)]  # the lower rates are not asked for
    assert [row['reached'] for row in rows] == [True, True, False]

    asked.clear()
    needs.update({0.0001: 9, 0.0003: 8, 0.001: 11, 0.01: 12})
    best, _ = runner.search_rate('relu', _suite('figure1', _paper(), 1, tmp_path), None)
    assert best == 0.0003
    assert asked == [(0.003, 100.0), (0.01, 12.0), (0.001, 12.0), (0.0003, 11.0), (0.0001, 8.0)]


class _Killed(BaseException):
    pass


@pytest.fixture
def fakes(monkeypatch):
    """Training that takes no time, dies before the update that `left` counts down to, and knows what it has done."""
    state = SimpleNamespace(left=1000, trained=[], measured=[])

    def train_and_evaluate(config, workdir):
        if workdir in state.trained:
            return  # is finished
        state.left -= 1
        if not state.left:
            raise _Killed
        state.trained.append(workdir)
        os.makedirs(workdir)

    def measure(trial, dataset):
        state.measured.append(trial.workdir)
        needs = {0.001: 30, 0.003: 12, 0.01: 9, 0.03: 11}.get(trial.config.optim.learning_rate, 100)
        epochs = min(needs, trial.config.num_epochs) + 0.0016
        return {'epochs': epochs, 'learning_rate': trial.config.optim.learning_rate, 'reached': needs < epochs}

    monkeypatch.setattr(train, 'train_and_evaluate', train_and_evaluate)
    monkeypatch.setattr(runner, 'measure', measure)
    monkeypatch.setattr(runner, '_latest_step', lambda trial: 7)
    return state


def _csv(folder):
    with open(folder / 'results.csv') as file:
        return [(row['variant'], int(row['seed']), row['epochs'], row['reached']) for row in csv.DictReader(file)]


@pytest.mark.parametrize('suite', ['figure1', 'cifar10'])
def test_a_suite_that_is_killed_anywhere_goes_on_where_it_was(suite, fakes, tmp_path):
    """Also in the middle of a search: each network is trained and measured once, the rows are as those of one go."""

    def go(folder):
        run = runner.run_figure1 if suite == 'figure1' else runner.run_variants
        return run(_suite(suite, small.digits_config(), 2, tmp_path / folder), None)[1]

    expected, count = go('whole'), len(fakes.trained)
    assert len(expected) == count == len(_csv(tmp_path / 'whole')) > 6
    for kill in range(1, count + 1):
        fakes.trained.clear(), fakes.measured.clear()
        fakes.left, folder = kill, tmp_path / f'killed-{kill}'
        with pytest.raises(_Killed):
            go(folder)
        assert len(fakes.trained) == kill - 1 == (len(_csv(folder)) if kill > 1 else 0), 'each has its row at once'
        fakes.left = 1000
        assert go(folder) == expected
        assert len(set(fakes.trained)) == len(fakes.trained) == count and fakes.measured == fakes.trained
        assert sorted(_csv(folder)) == sorted(_csv(tmp_path / 'whole'))


def test_a_finished_suite_that_is_killed_again_keeps_its_rows(fakes, tmp_path, monkeypatch):
    more = (_suite('views', small.digits_config(), 3, tmp_path), None)
    runner.run_variants(*more)
    before = _csv(tmp_path)

    def killed(config, workdir):
        if workdir.endswith('-2'):
            raise _Killed

    monkeypatch.setattr(train, 'train_and_evaluate', killed)
    with pytest.raises(_Killed):
        runner.run_variants(*more)
    assert sorted(_csv(tmp_path)) == sorted(before) and len(before) == 3


def test_a_run_that_diverged_is_not_trained_again(fakes, tmp_path, monkeypatch, capsys):
    """But by another config, which can only be seen in config.json where there is no checkpoint."""
    asked = []

    def diverges(config, workdir):
        os.makedirs(workdir, exist_ok=True)
        with open(os.path.join(workdir, 'config.json'), 'w') as file:
            json.dump(manager.config_to_json(config), file)
        asked.append(config.optim.learning_rate)
        raise DivergedError('step 1: not finite.')

    monkeypatch.setattr(train, 'train_and_evaluate', diverges)
    monkeypatch.setattr(runner, '_latest_step', lambda trial: None)
    for rate in (9.0, 9.0, 8.0):
        base = small.digits_config(**{'optim.learning_rate': rate})
        (trial,) = runner.make_trials([Variant('wild', {})], base, 1, str(tmp_path))
        assert runner.run_trial(trial, 'ablations', None)['diverged']
    assert asked == [9.0, 8.0]
    first, again, other = capsys.readouterr().out.splitlines()
    assert first == other == f'wild, seed {base.seed}: step 1: not finite.'
    assert again == f'wild, seed {base.seed}: diverged in an earlier run.'


@pytest.mark.parametrize(('threshold', 'error', 'reached'), [(25.0, 0.0, True), (25.0, 25.1, False), (0.0, 0.0, None)])
def test_reached(threshold, error, reached, monkeypatch, tmp_path):
    """No error at all is below any threshold; where there is none, nothing is said."""
    curve = figures.Curve(*np.array([[1.0], [error], [0.1]]))
    network = SimpleNamespace(layers={'conv1': SimpleNamespace(features=3)})
    monkeypatch.setattr(tables, 'load_last', lambda workdir: SimpleNamespace(network=network))
    monkeypatch.setattr(figures, 'curves', lambda workdir: {'train': curve})
    (trial,) = runner.make_trials([Variant('a', {'stop_at_error': threshold})], small.digits_config(), 1, str(tmp_path))
    found = runner.measure(trial, datasets.Dataset({'train': [0] * 4}, ('a',), 32, None))
    assert found.get('reached') is reached and found['train_error'] == error and found['train_images'] == 4


def _pictures(folder, *names):
    for name in names:
        (folder / name / 'cat').mkdir(parents=True)
        (folder / name / 'cat' / '1.png').touch()  # listed, never opened
    return str(folder)


@pytest.fixture
def preparing(monkeypatch):
    """What was asked to be prepared."""
    asked = []

    def prepared(source, output, **_):
        asked.append(source)
        os.makedirs(output)

    monkeypatch.setattr(prepare, 'prepare', prepared)
    return asked


def test_images_are_prepared_once_and_those_of_another_folder_are_refused(preparing, tmp_path, monkeypatch):
    one, other = (_pictures(tmp_path / name, 'train', 'val') for name in ('one', 'other'))
    out = str(tmp_path / 'out')
    os.mkdir(out)
    for path in (one, f'{one}/', os.path.relpath(one)):
        assert runner.prepare_images(path, _suite('cifar10', small.digits_config(), 1, out)) == os.path.join(
            out, 'data-32'
        )
    assert preparing == [one]
    for path in (other, str(tmp_path / 'typo')):
        with pytest.raises(UserError, match=f'data-32 was prepared from {one}, not from {path}; give the same again'):
            runner.prepare_images(path, _suite('cifar10', small.digits_config(), 1, out))
    assert runner.prepare_images(
        other, _suite('views', small.digits_config(**{'data.image_size': 56}), 1, out)
    ) == os.path.join(out, 'data-64')
    os.remove(os.path.join(out, 'data-32.source'))
    with pytest.raises(UserError, match=f'not known what {out}/data-32 was prepared from; if that was {one}, write so'):
        runner.prepare_images(one, _suite('cifar10', small.digits_config(), 1, out))


@pytest.mark.parametrize('dry', [False, True])
@pytest.mark.parametrize(
    ('folders', 'suite', 'message'),
    [
        (('train',), 'views', 'raw. has no val or test split to evaluate on'),
        (('test', 'val'), 'figure1', 'raw. has no train split, only test and val'),
        ((), 'figure1', 'there is no input .*raw'),
    ],
)
def test_what_cannot_be_used_is_not_prepared(dry, folders, suite, message, preparing, tmp_path):
    raw = _pictures(tmp_path / 'raw', *folders)
    with pytest.raises(UserError, match=message):
        if dry:
            runner.plan_suite(_suite(suite, small.digits_config(), 3, tmp_path / 'out'), raw)
        else:
            runner.prepare_images(raw, _suite(suite, small.digits_config(), 1, str(tmp_path / 'out')))
    assert not preparing and not (tmp_path / 'out').exists()


def test_figure_1_without_images_to_measure_on(preparing, tmp_path):
    raw = _pictures(tmp_path / 'raw', 'train')
    assert runner.prepare_images(raw, _suite('figure1', small.digits_config(), 1, str(tmp_path))) and preparing == [raw]


@pytest.mark.parametrize(('seeds', 'count'), [(1, 14), (3, 18)])
def test_the_runs_that_figure_1_can_take(seeds, count):
    """Seven rates for each of two activations with one seed; of each the best with all others."""
    found = runner.max_trials(_paper(), seeds, 'out')
    assert len(found) == len({trial.workdir for trial in found}) == count
    assert sum(trial.seed > 0 for trial in found) == count - 14


@pytest.fixture
def command(monkeypatch, tmp_path):
    """`main` in this process, every run of which diverges."""
    base = small.digits_config()
    fixed = {'data': 'digits', 'output': str(tmp_path), 'seeds': 1, 'scale': 1.0, 'dry_run': False, 'base': base}

    def run(suite, **changes):
        experiments.main(SimpleNamespace(**{**fixed, **changes}), [suite])

    def diverged(trial, suite, dataset):
        return {'suite': suite, 'variant': trial.variant.name, 'seed': trial.seed, 'diverged': True}

    monkeypatch.setattr(runner, 'run_trial', diverged)
    return run


def test_a_remedy_that_the_suite_takes(command):
    with pytest.raises(UserError, match='all networks of cifar10 diverged; it sets the learning rates itself'):
        command('cifar10')
    with pytest.raises(UserError, match='all networks of views diverged; use a lower --base.optim.learning_rate'):
        command('views')


def test_an_output_that_cannot_be_made(command, tmp_path):
    (tmp_path / 'file').touch()
    for name, why in (('file', 'File exists'), ('file/below', 'Not a directory')):
        with pytest.raises(UserError, match=f"^--output='.*{name}' cannot be used: {why}. Give another directory.$"):
            command('views', output=str(tmp_path / name))


def test_a_prepared_folder_that_does_not_suit_is_named(command, tmp_path, monkeypatch):
    """One that figure1 has left: it took no images to measure on."""
    digits = datasets.open_dataset('digits')
    monkeypatch.setattr(runner, 'prepare_images', lambda *_: 'out/data-32')
    monkeypatch.setattr(
        datasets, 'open_dataset', lambda path: digits._replace(splits={'train': digits.splits['train']})
    )
    with pytest.raises(UserError, match="'out/data-32' .remove it if 'raw' has changed. has no val or test split"):
        command('cifar10', data='raw')


def _command(*words, code=0):
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(
        [sys.executable, '-m', 'alexnet_jax', 'experiments', *map(str, words), '--cpu_devices=1'],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800,
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
        words = (*words[:-2], '--seeds=1', '--scale=0.25', '--base.num_steps=6')  # whatever the variants say of passes
    elif suite == 'cifar10':
        words = (*words[:-2], '--seeds=1', '--scale=0.1', '--base.num_steps=2')
    said = _command(*words)
    with open(out / 'results.csv') as file:
        rows = list(csv.DictReader(file))
    page = (out / 'report.html').read_text()
    assert '<html' in page and suite in page
    seen = {(row['variant'], row['seed']) for row in rows}
    if suite == 'ablations':
        assert len(seen) == len(ablations.ablations(small.digits_config()))
        assert '+1.40 / +1.20' in said and 'no normalization' in page
    elif suite == 'figure1':
        assert {row['variant'].split()[0] for row in rows} == {'relu', 'tanh'} and 'tanh / ReLU' in said
    else:
        assert len(seen) == (len(cifar10.NETS) if suite == 'cifar10' else 2)
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
    trained = loading.load_checkpoint(str(run))
    records = datasets.open_dataset('digits').split('val')
    labels = np.array([record['label'] for record in records])
    found = predict.predict(trained, np.stack([record['image'] for record in records]), views=10)
    assert float(row['top1_ten']) == pytest.approx(100 * np.mean(found.argmax(1) != labels), abs=1e-6)


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (('ablation',), "Did you mean 'ablations'?"),
        (('views', '--scale=2'), '--scale=2.0'),
        (('views', '--base=configs/papr.py'), "there is no config file 'configs/papr.py'"),
        (('views', '--output=README.md/out'), "--output='README.md/out' cannot be used: Not a directory"),
        ((), 'give one SUITE (figure1, ablations, cifar10, ensemble, views)'),
    ],
)
@pytest.mark.slow
def test_what_is_wrong_is_one_line(words, message, tmp_path):
    said = _command('--data=digits', f'--output={tmp_path}/out', *words, code=2)
    assert message in said and 'Traceback' not in said


@pytest.mark.slow
def test_a_dry_run_trains_nothing(tmp_path):
    (tmp_path / 'base.py').write_text(BASE)
    said = _command(
        'ablations', '--data=digits', f'--output={tmp_path}/out', f'--base={tmp_path}/base.py', '--seeds=1', '--dry_run'
    )
    assert '1,437 images' in said and f'{len(ablations.ablations(small.digits_config()))} runs' in said
    assert not (tmp_path / 'out' / 'runs').exists()


def test_colors_by_hand():
    """The more colored half is not always the first."""
    rows = [
        {'variant': 'a', 'color_0': 0.2, 'color_1': 0.6},
        {'variant': 'a', 'color_0': 0.7, 'color_1': 0.1},
        {'variant': 'b'},
    ]
    table = tables.color_table(rows, [Variant('a', {}), Variant('b', {})])
    assert table.rows == [('a', '0.65 ± 0.07', '0.15 ± 0.07', '0.50 ± 0.14'), ('b', '', '', '')]


@pytest.mark.slow
def test_a_run_that_diverges_at_once_is_a_result(tmp_path, capsys):
    """Before its first checkpoint, and told again from what was written."""
    base = small.digits_config(**{'optim.learning_rate': 1e30, 'num_steps': 4, 'mesh.tower': 1})
    (trial,) = runner.make_trials([Variant('wild', {})], base, 1, str(tmp_path))
    digits = datasets.open_dataset('digits')
    for _ in range(2):
        row = runner.run_trial(trial, 'ablations', digits)
        assert row['diverged'] and 'top1_error' not in row
    assert 'not finite' in capsys.readouterr().out
    table = tables.comparison_table('ablations', [row], [trial.variant])
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
    config = alexnet_jax.get_config('tiny_imagenet')
    config.data.path, config.num_epochs, config.mesh.tower = str(tmp_path / 'data'), 1.0, 1
    train.train_and_evaluate(config, str(tmp_path / 'run'))
    last = json.loads((tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()[-1])
    assert last['split'] == 'val' and last['count'] == 1000 and last['loss'] < 2.9
