"""Experiment suites: rate search, resuming after a kill, measurements and preparation of data."""

import csv
import json
import os
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest

import alexnet_jax
from alexnet_jax.checkpoints import manager
from alexnet_jax.data import datasets
from alexnet_jax.experiments import ablations, cifar10, figure1, figures, runner, tables, trials
from alexnet_jax.experiments.ablations import Variant
from alexnet_jax.prepare import prepare
from alexnet_jax.training import train
from alexnet_jax.utils.errors import DivergedError, UserError
from tests import SHARED_DATA, helpers


def _suite(name, base, seeds, output):
    return trials.Suite(name, base, seeds, str(output), 1.0)


@pytest.mark.parametrize('name', ['authors_2012', 'sixth_conv:finetune', 'cifar10:11pct', 'cifar10:18pct', 'caffe'])
def test_shipped_configs_work_as_base(name, tmp_path):
    """Includes a config that freezes a layer removed by a variant, and one without hidden layers: all can be built."""
    base = alexnet_jax.get_config(name)
    base.init_from = 'somewhere'  # required if init_fresh is set
    found = trials.make_trials(ablations.ablations(base), base, 1, str(tmp_path))
    names = [trial.variant.name for trial in found]
    assert 'without conv 1' in names and ('towers without communication' in names) == (name != 'cifar10:18pct')


def test_only_selects_variants_and_their_baselines(tmp_path):
    suite = _suite('ablations', helpers.digits_config(), 1, tmp_path)
    names = [variant.name for variant in suite._replace(only=('no color', 'no dropout')).variants()]
    assert names == ['base', 'no dropout', 'no color']
    assert len(suite.variants()) == 15
    (tail,) = _suite('cifar10', helpers.digits_config(), 1, tmp_path)._replace(only=('11pct',)).variants()[:-1]
    assert tail.name == '13pct'


@pytest.mark.parametrize(
    ('suite', 'name', 'message'),
    [
        ('ablations', 'no drop out', "--only=no drop out: expected one of base, no normalization.*'no dropout'"),
        ('views', 'base', '--only=base: expected no names, because views needs all its runs'),
        ('figure1', 'relu', '--only=relu: expected no names, because figure1 needs all its runs'),
    ],
)
def test_only_refuses_other_names(suite, name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        _suite(suite, helpers.digits_config(), 1, tmp_path)._replace(only=(name,)).variants()


def test_given_settings_change_all_networks(tmp_path):
    """Also if all networks of the suite change them, to the same value."""
    given = {'batch_size': 64, 'optim.momentum': 0.5, 'seed': 3}
    base = alexnet_jax.get_config('cifar10:19pct')
    base.update_from_flattened_dict(given)
    for name in ('cifar10', 'figure1'):
        suite = _suite(name, base, 1, tmp_path)._replace(overrides=given)
        for trial in trials.make_trials(suite.variants(), base, 1, 'out'):
            assert (trial.config.batch_size, trial.config.optim.momentum, trial.seed) == (64, 0.5, 3)
    # What some of the networks change remains theirs.
    variants = _suite('ablations', base, 1, tmp_path)._replace(overrides={'data.color_std': 0.2}).variants()
    assert {variant.name: variant.changes.get('data.color_std') for variant in variants}['no color'] == 0.0


def test_given_settings_change_the_selected_networks(tmp_path):
    given = {'num_epochs': 5.0, 'model.layers.conv1.init': 'normal(1.0)'}
    base = alexnet_jax.get_config('cifar10:19pct')
    suite = _suite('cifar10', base, 1, tmp_path)._replace(only=('18pct',), overrides=given)
    (trial,) = trials.make_trials(suite.variants(), base, 1, 'out')
    layers = alexnet_jax.get_config('cifar10:18pct').model.layers
    layers.conv1.init = 'normal(1.0)'
    assert trial.config.num_epochs == 5 and trial.config.model.layers.to_dict() == layers.to_dict()
    suite = suite._replace(only=('18pct', '19pct'), overrides={'num_epochs': 5.0})
    assert [variant.changes['num_epochs'] for variant in suite.variants()] == [5.0, 5.0]


@pytest.mark.parametrize(
    ('suite', 'key', 'value', 'message'),
    [
        (
            'figure1',
            'optim.learning_rate',
            0.1,
            'the networks of figure1 have their own optim.learning_rate; remove it',
        ),
        (
            'figure1',
            'stop_at_error',
            50.0,
            'stop_at_error=50.0: figure1 sets stop_at_error; it counts the epochs until',
        ),
        ('cifar10', 'data.image_size', 28, '--base.data.image_size=28: the networks of cifar10 have their own data.im'),
        (
            'cifar10',
            'model.layers.conv1.init',
            'zeros',
            'the networks of cifar10 have their own model.layers.conv1.init',
        ),
        (
            'cifar10',
            'model.spatial_n',
            5,
            'the networks of cifar10 have their own model.spatial_n; remove it',
        ),  # of one
        (
            'large_batch',
            'optim.schedule',
            'cosine',
            'the networks of large_batch have their own optim.schedule; remove',
        ),
        ('views', 'log_every_steps', 10, 'views sets log_every_steps; suites log once per epoch'),
        ('ablations', 'data.path', 'here', '--base.data.path=here: ablations sets data.path; use --data'),
    ],
)
def test_settings_without_effect_are_refused(suite, key, value, message, tmp_path):
    with pytest.raises(UserError, match=message):
        _suite(suite, helpers.digits_config(), 1, tmp_path)._replace(overrides={key: value}).variants()


@pytest.mark.parametrize('name', cifar10.NETS)
def test_figure1_trains_the_network_of_its_base(name, tmp_path):
    base = alexnet_jax.get_config(f'cifar10:{name}')
    base.model.layers.conv1.init = 'normal(0.02)'
    for trial in trials.make_trials(_suite('figure1', base, 1, tmp_path).variants(), base, 1, 'out'):
        config, activation = trial.config, trial.variant.name.split()[0]
        layers = config.model.layers.to_dict()
        for layer in layers.values():
            layer['post'] = layer['post'].replace(activation, 'relu')
        assert layers == base.model.layers.to_dict() and activation in config.model.layers.conv1.post
        assert (config.optim.weight_decay, config.optim.layer_decays, config.data.reflect) == (0.0, (), False)


def test_figure1_needs_relu(tmp_path):
    base = alexnet_jax.get_config('cifar10:19pct')
    for layer in base.model.layers.values():
        layer.post = layer.post.replace('relu', 'tanh')
    with pytest.raises(UserError, match='figure1: expected a base with ReLUs'):
        trials.make_trials(_suite('figure1', base, 1, tmp_path).variants(), base, 1, 'out')


def test_short_durations_are_in_minutes():
    hours = (0.001, 0.5, 59.01 / 60, 1.0, 26.26)
    assert [runner.format_hours(value) for value in hours] == ['1 min', '30 min', '60 min', '1.0 h', '26.3 h']


def test_invalid_variant_is_refused_before_training(tmp_path):
    base = helpers.digits_config()
    variants = [Variant('fine', {}), Variant('broken', {'model.pool_window': 1})]
    with pytest.raises(UserError, match="variant 'broken' cannot be built from this base: model.pool_stride=2"):
        trials.make_trials(variants, base, 1, str(tmp_path))


def test_ten_views_need_a_base_or_variant_with_reflections(tmp_path):
    variants = [Variant('base', {}), Variant('none', {'data.reflect': False}), Variant('own', {'data.reflect': True})]
    for reflect, expected in ((True, [True, True, True]), (False, [False, False, True])):
        base = helpers.digits_config(**{'data.reflect': reflect})
        assert [trial.ten_views for trial in trials.make_trials(variants, base, 1, str(tmp_path))] == expected


@pytest.mark.slow
def test_network_without_first_layer_is_measured(tmp_path):
    base = helpers.digits_config(**{'num_steps': 2, 'mesh.tower': 1, 'optim.layer_rates': (('conv1', 0.1),)})
    variants = [variant for variant in ablations.ablations(base) if variant.name == 'without conv 1']
    (trial,) = trials.make_trials(variants, base, 1, str(tmp_path))
    row = trials.run_trial(trial, 'ablations', datasets.open_dataset('digits'))
    assert not row['diverged'] and 0 <= row['color_0'] and row['test_images'] == 360
    assert 'top1_error' in row and 'top1_ten' not in row, 'digits are not reflected'


def test_rate_search_stops_between_two_slower_rates(monkeypatch, tmp_path):
    """Epochs are a made-up function of the rate; a rate may use no more epochs than the best so far.

    The last batch of an epoch extends a little into the next.
    """
    needs, asked = {}, []

    def run(trial, suite, dataset):
        rate, limit = trial.config.optim.learning_rate, trial.config.num_epochs
        asked.append((rate, limit))
        return {'learning_rate': rate, 'epochs': min(needs[rate], limit) + 0.0016, 'reached': needs[rate] <= limit}

    monkeypatch.setattr(trials, 'run_trial', run)
    needs.update({0.001: 30, 0.003: 12, 0.01: 9, 0.03: 11})
    suite = _suite('figure1', alexnet_jax.get_config('cifar10:19pct'), 1, tmp_path)
    best, rows = figure1.search_rate('relu', suite, None)
    assert best.name == 'relu 0.01' and best.changes['num_epochs'] == 100
    assert asked == [(0.003, 100.0), (0.01, 12.0), (0.03, 9.0)]  # the lower rates are not tried
    assert [row['reached'] for row in rows] == [True, True, False]

    asked.clear()
    needs.update({0.0001: 9, 0.0003: 8, 0.001: 11, 0.01: 12})
    best, _ = figure1.search_rate('relu', suite, None)
    assert best.name == 'relu 0.0003'
    assert asked == [(0.003, 100.0), (0.01, 12.0), (0.001, 12.0), (0.0003, 11.0), (0.0001, 8.0)]


class _KilledError(BaseException):
    pass


@pytest.fixture
def fakes(monkeypatch):
    """Training without computation. It records what was trained and dies before the run that `left` counts down to."""
    state = SimpleNamespace(left=1000, trained=[], measured=[])

    def train_and_evaluate(config, workdir):
        if workdir in state.trained:
            return  # already finished
        state.left -= 1
        if not state.left:
            raise _KilledError
        state.trained.append(workdir)
        os.makedirs(workdir)

    def measure(trial, dataset):
        state.measured.append(trial.workdir)
        needs = {0.001: 30, 0.003: 12, 0.01: 9, 0.03: 11}.get(trial.config.optim.learning_rate, 100)
        epochs = min(needs, trial.config.num_epochs) + 0.0016
        return {'epochs': epochs, 'learning_rate': trial.config.optim.learning_rate, 'reached': needs < epochs}

    monkeypatch.setattr(train, 'train_and_evaluate', train_and_evaluate)
    monkeypatch.setattr(trials, 'measure', measure)
    monkeypatch.setattr(trials, '_latest_step', lambda trial: 7)
    return state


def _csv(folder):
    with open(folder / 'results.csv') as file:
        return [(row['variant'], int(row['seed']), row['epochs'], row['reached']) for row in csv.DictReader(file)]


@pytest.mark.parametrize('suite', [pytest.param('figure1', marks=pytest.mark.slow), 'cifar10'])
def test_killed_suite_resumes_where_it_stopped(suite, fakes, tmp_path):
    """Also during a rate search: each network is trained and measured once, and the rows equal those of one run."""

    def run_suite(folder):
        run = figure1.run if suite == 'figure1' else runner.run_variants
        return run(_suite(suite, helpers.digits_config(), 2, tmp_path / folder), None)[1]

    expected, count = run_suite('whole'), len(fakes.trained)
    assert len(expected) == count == len(_csv(tmp_path / 'whole')) > 6
    for kill in range(1, count + 1):
        fakes.trained.clear(), fakes.measured.clear()
        fakes.left, folder = kill, tmp_path / f'killed-{kill}'
        with pytest.raises(_KilledError):
            run_suite(folder)
        assert len(fakes.trained) == kill - 1 == (len(_csv(folder)) if kill > 1 else 0), 'each has its row at once'
        fakes.left = 1000
        assert run_suite(folder) == expected
        assert len(set(fakes.trained)) == len(fakes.trained) == count and fakes.measured == fakes.trained
        assert sorted(_csv(folder)) == sorted(_csv(tmp_path / 'whole'))


def test_suite_killed_again_keeps_its_rows(fakes, tmp_path, monkeypatch):
    more = (_suite('views', helpers.digits_config(), 3, tmp_path), None)
    runner.run_variants(*more)
    before = _csv(tmp_path)

    def die(config, workdir):
        if workdir.endswith('-2'):
            raise _KilledError

    monkeypatch.setattr(train, 'train_and_evaluate', die)
    with pytest.raises(_KilledError):
        runner.run_variants(*more)
    assert sorted(_csv(tmp_path)) == sorted(before) and len(before) == 3


def test_diverged_run_is_not_trained_again(fakes, tmp_path, monkeypatch, capsys):
    """Unless the config changed; without a checkpoint, only config.json shows that."""
    asked = []

    def diverges(config, workdir):
        os.makedirs(workdir, exist_ok=True)
        with open(os.path.join(workdir, 'config.json'), 'w') as file:
            json.dump(manager.config_to_json(config), file)
        asked.append(config.optim.learning_rate)
        raise DivergedError('step 1: not finite.')

    monkeypatch.setattr(train, 'train_and_evaluate', diverges)
    monkeypatch.setattr(trials, '_latest_step', lambda trial: None)
    for rate in (9.0, 9.0, 8.0):
        base = helpers.digits_config(**{'optim.learning_rate': rate})
        (trial,) = trials.make_trials([Variant('wild', {})], base, 1, str(tmp_path))
        assert trials.run_trial(trial, 'ablations', None)['diverged']
    assert asked == [9.0, 8.0]
    first, again, other = capsys.readouterr().out.splitlines()
    assert first == other == f'wild, seed {base.seed}: step 1: not finite.'
    assert again == f'wild, seed {base.seed}: diverged in an earlier run.'


@pytest.mark.parametrize(('threshold', 'error', 'reached'), [(25.0, 0.0, True), (25.0, 25.1, False), (0.0, 0.0, None)])
def test_measure_compares_error_with_threshold(threshold, error, reached, monkeypatch, tmp_path):
    """An error of 0 is below any threshold; without a threshold, the result is empty."""
    curve = figures.Curve(*np.array([[1.0], [error], [0.1]]))
    network = SimpleNamespace(layers={'conv1': SimpleNamespace(features=3)})
    monkeypatch.setattr(tables, 'load_last', lambda workdir: SimpleNamespace(network=network))
    monkeypatch.setattr(figures, 'curves', lambda workdir: {'train': curve})
    (trial,) = trials.make_trials(
        [Variant('a', {'stop_at_error': threshold})], helpers.digits_config(), 1, str(tmp_path)
    )
    found = trials.measure(trial, datasets.Dataset({'train': [0] * 4}, ('a',), 32, None))
    assert found.get('reached') is reached and found['train_error'] == error and found['train_images'] == 4


def _pictures(folder, *names):
    for name in names:
        for class_name in ('cat', 'dog'):
            (folder / name / class_name).mkdir(parents=True)
            (folder / name / class_name / '1.png').touch()  # listed, never opened
    return str(folder)


@pytest.fixture
def sources(monkeypatch):
    """The inputs passed to `prepare`, which only creates its output folder."""
    asked = []

    def fake_prepare(source, output, **_):
        asked.append(source)
        os.makedirs(output)

    monkeypatch.setattr(prepare, 'prepare', fake_prepare)
    return asked


def test_images_are_prepared_once_per_source(sources, tmp_path, monkeypatch):
    one, other = (_pictures(tmp_path / name, 'train', 'val') for name in ('one', 'other'))
    out = str(tmp_path / 'out')
    os.mkdir(out)
    for path in (one, f'{one}/', os.path.relpath(one)):
        assert runner.prepare_images(path, _suite('cifar10', helpers.digits_config(), 1, out)) == os.path.join(
            out, 'data-32'
        )
    assert sources == [one]
    for path in (other, str(tmp_path / 'typo')):
        with pytest.raises(UserError, match=f'data-32 was prepared from {one}, not from {path}; use the same source'):
            runner.prepare_images(path, _suite('cifar10', helpers.digits_config(), 1, out))
    assert runner.prepare_images(
        other, _suite('views', helpers.digits_config(**{'data.image_size': 56}), 1, out)
    ) == os.path.join(out, 'data-64')
    os.remove(os.path.join(out, 'data-32.source'))
    with pytest.raises(UserError, match=f'the source of {out}/data-32 is unknown; if it is {one},'):
        runner.prepare_images(one, _suite('cifar10', helpers.digits_config(), 1, out))


@pytest.mark.parametrize('dry', [False, True])
@pytest.mark.parametrize(
    ('folders', 'suite', 'message'),
    [
        (('train',), 'views', 'raw. has no val or test split to evaluate on'),
        (('test', 'val'), 'figure1', 'raw. has no train split, only test and val'),
        ((), 'figure1', 'input .*raw. does not exist'),
    ],
)
def test_unusable_images_are_not_prepared(dry, folders, suite, message, sources, tmp_path):
    raw = _pictures(tmp_path / 'raw', *folders)
    with pytest.raises(UserError, match=message):
        if dry:
            runner.plan_suite(_suite(suite, helpers.digits_config(), 3, tmp_path / 'out'), raw)
        else:
            runner.prepare_images(raw, _suite(suite, helpers.digits_config(), 1, str(tmp_path / 'out')))
    assert not sources and not (tmp_path / 'out').exists()


def test_figure1_needs_no_evaluation_images(sources, tmp_path):
    raw = _pictures(tmp_path / 'raw', 'train')
    assert runner.prepare_images(raw, _suite('figure1', helpers.digits_config(), 1, str(tmp_path))) and sources == [raw]


@pytest.mark.parametrize(('seeds', 'count'), [(1, 14), (3, 18)])
def test_max_trials_of_figure1(seeds, count):
    """One seed trains seven rates for each of two activations; further seeds train the best rate of each."""
    found = figure1.max_trials(_suite('figure1', alexnet_jax.get_config('cifar10:19pct'), seeds, 'out'))
    assert len(found) == len({trial.workdir for trial in found}) == count
    assert sum(trial.seed > 0 for trial in found) == count - 14


@pytest.mark.slow
def test_immediate_divergence_is_a_result(tmp_path, capsys):
    """The run diverges before its first checkpoint; the second time the result is read from its files."""
    base = helpers.digits_config(**{'optim.learning_rate': 1e30, 'num_steps': 4, 'mesh.tower': 1})
    (trial,) = trials.make_trials([Variant('wild', {})], base, 1, str(tmp_path))
    digits = datasets.open_dataset('digits')
    for _ in range(2):
        row = trials.run_trial(trial, 'ablations', digits)
        assert row['diverged'] and 'top1_error' not in row
    assert 'not finite' in capsys.readouterr().out
    table = tables.comparison_table('ablations', [row], [trial.variant])
    assert table.rows[0][:4] == ('wild', '0, 1 diverged', '', '')


@pytest.mark.slow
def test_tiny_imagenet_base_learns(tmp_path):
    """One epoch of 10,000 images. Guessing has loss ln 20 = 3.00, where a network with dead ReLUs stays."""
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
