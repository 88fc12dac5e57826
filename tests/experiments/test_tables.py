"""Differences and statistics computed by hand."""

import csv
import json

import pytest

from alexnet_jax.core.augment import Augmentation
from alexnet_jax.data import datasets
from alexnet_jax.experiments import cifar10, tables
from alexnet_jax.experiments.ablations import Variant
from alexnet_jax.inference import evaluate


def test_mean_and_standard_deviation():
    deviation = 7**0.5  # ((-2)^2 + (-1)^2 + 3^2) / 2
    assert tables.format_mean_std([1.0, 2.0, 6.0], signed=True) == f'+3.00 ± {deviation:.2f}' == '+3.00 ± 2.65'
    assert tables.format_mean_std([4.0]) == '4.00' and tables.format_mean_std([None]) == ''


def test_differences_pair_equal_seeds():
    rows = [
        {'variant': variant, 'seed': seed, 'top1_error': error}
        for variant, seed, error in (('a', 0, 10.0), ('b', 1, 13.0), ('a', 1, 12.0), ('b', 0, 14.0), ('b', 2, 50.0))
    ]
    assert sorted(tables.differences(rows, 'b', 'a', 'top1_error')) == [1.0, 4.0]


def test_sign_agreement():
    assert tables.sign_agreement([0.1, 2.0], 1) == 'agrees'
    assert tables.sign_agreement([-0.1, -2.0], 1) == 'disagrees'
    assert tables.sign_agreement([-0.1, 2.0, 3.0], 1) == 'undecided (2 of 3 seeds agree)'
    assert tables.sign_agreement([-0.1], -1) == 'agrees'
    assert tables.sign_agreement([1.0], 0) == tables.sign_agreement([], 1) == ''


def test_comparison_table():
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
    assert table.title.endswith('with the paper') and 'mixup' not in table.note
    recipe = tables.comparison_table('recipe', rows, variants)
    assert recipe.title.endswith('with the base') and 'With mixup' in recipe.note and recipe.rows == table.rows
    large = tables.comparison_table('large_batch', rows, variants)
    assert large.title.endswith('with the base') and large.note == table.note
    named = dict(zip(table.columns, table.rows[1], strict=True))
    assert (named['top-1'], named['difference']) == ('13.00 ± 0.00', '+2.00 ± 1.41')
    assert (named['paper'], named["authors' log"], named['sign']) == ('+1.40 / +1.20', '+1.37', 'agrees')
    assert dict(zip(table.columns, table.rows[0], strict=True))['paper'] == '40.70 / 18.20'
    assert 'ablations' in tables.as_text(table) and '+1.40 / +1.20' in tables.as_text(table)


def test_figure1_ratio_uses_seeds_that_reach_in_both():
    variants = ['relu 0.01', 'tanh 0.003']
    rows = [
        {'variant': variant, 'seed': seed, 'epochs': epochs, 'reached': reached}
        for variant, seed, epochs, reached in (
            ('relu 0.01', 0, 4.0, True), ('relu 0.01', 1, 5.0, True), ('relu 0.01', 2, 5.0, True),
            ('tanh 0.003', 0, 24.0, True), ('tanh 0.003', 1, 25.0, True), ('tanh 0.003', 2, 100.0, False),
        )
    ]  # fmt: skip
    table = tables.figure1_table(rows, variants, cifar10.RATES, ['conv1', 'fc2'])
    assert 'has the layers conv1, fc2.' in table.note
    assert table.rows[0][1:3] == ('3 of 3', '4.67 ± 0.58')
    assert table.rows[2][1:] == ('2', '5.50 ± 0.71', '6')


def test_ensemble_gain(averaging):
    table = tables.averaged_table('ensemble', ['10', '14'], averaging, max_unreadable=3)
    one, average = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    # Ten views of a network have an error one point below that of its center: 9 / 5 and 13 / 9; averaged 8 / 6.
    assert (one['evaluated as'], one['networks'], one['top-1'], one['top-5']) == (
        'one network', '2', '11.00 ± 2.83', '7.00 ± 2.83',
    )  # fmt: skip
    assert (average['evaluated as'], average['top-1'], average['top-5']) == ('2 networks averaged', '8.00', '6.00')
    # 8 - 9, 8 - 13 and 6 - 5, 6 - 9
    assert average['difference'] == '-3.00 ± 2.83 / -1.00 ± 2.83' and average['sign'] == 'agrees'
    assert (average['paper'], average["authors' log"]) == ('-2.60 / -1.80', '')
    assert one['difference'] == one['sign'] == '' and 'There is only one average' in table.note


def test_ten_views_gain(averaging, caplog):
    table = tables.averaged_table('views', ['10', '14'], averaging, max_unreadable=3)
    assert 'views: trained without reflections; five of the ten views are reflections' in caplog.text
    center, ten = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert (center['evaluated as'], center['top-1'], center['top-5']) == ('center', '12.00 ± 2.83', '7.00 ± 2.83')
    assert (ten['evaluated as'], ten['top-1'], ten['top-5']) == ('ten views', '11.00 ± 2.83', '7.00 ± 2.83')
    assert ten['difference'] == '-1.00 ± 0.00 / +0.00 ± 0.00' and ten['sign'] == 'agrees'
    assert ten['paper'] == '-1.50 / -1.30' and 'There is only one average' not in table.note


class _Network(float):
    augmentation = Augmentation(reflect=False)


@pytest.fixture
def averaging(monkeypatch):
    """Fake networks named by their center top-1 error; top-5 is 5 lower, and ten views lower top-1 by one point."""

    def evaluated(network, split, mesh, views, max_unreadable):
        assert split == ['of val'] and views in (1, 10) and max_unreadable == 3
        return {'top1_error': network - (views == 10), 'top5_error': network - 5.0}

    def evaluated_ensemble(networks, split, mesh, views, max_unreadable):
        assert (networks, split, views, max_unreadable) == ([10.0, 14.0], ['of val'], 10, 3)
        return {'top1_error': 8.0, 'top5_error': 6.0}

    monkeypatch.setattr(tables, 'load_last', _Network)
    monkeypatch.setattr(evaluate, 'evaluate', evaluated)
    monkeypatch.setattr(evaluate, 'evaluate_ensemble', evaluated_ensemble)
    return datasets.Dataset({'train': [], 'val': ['of val'], 'test': ['of test']}, ('a',), 32, None)


def test_csv_rows_are_kept_until_replaced(tmp_path):
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


def test_summary_describes_the_measurements():
    rows = [{'diverged': True}, {'diverged': False, 'data': 'tiny', 'train_images': 10_000}]
    environment = {'devices': ['cpu:0'], 'versions': {'jax': '1.2'}, 'commit': 'abc'}
    expected = '2 runs on 10,000 training images of 64 px (tiny), cpu:0, jax 1.2, commit abc.'
    assert tables.summary(rows, 64, environment) == expected


def test_color_table():
    """The half with more color is not always the first."""
    rows = [
        {'variant': 'a', 'color_0': 0.2, 'color_1': 0.6},
        {'variant': 'a', 'color_0': 0.7, 'color_1': 0.1},
        {'variant': 'b'},
    ]
    table = tables.color_table(rows, [Variant('a', {}), Variant('b', {})])
    assert table.rows == [('a', '0.65 ± 0.07', '0.15 ± 0.07', '0.50 ± 0.14'), ('b', '', '', '')]


def _ablation_rows():
    """Two seeds of a base, of a variant that is worse as claimed, of one that is better, and of one that diverged."""
    errors = {'base': (10.0, 12.0), 'worse': (13.0, 13.0), 'better': (8.0, 11.0), 'unstable': (None, 14.0)}
    return [
        {'variant': variant, 'seed': seed, 'diverged': error is None}
        | ({} if error is None else {'top1_error': error, 'top1_ten': error, 'train_error': 5.0})
        for variant, seeds in errors.items()
        for seed, error in enumerate(seeds)
    ]


VARIANTS = [Variant('base', {}), *(Variant(name, {}, 'base', sign=1) for name in ('worse', 'better', 'unstable'))]


def test_verdict_states_claims_effects_and_divergence():
    assert tables.verdict(_ablation_rows(), VARIANTS) == (
        'Of 3 claimed signs, 2 agree in every seed, 1 disagree in every seed, and 0 are undecided. '
        'Largest differences from the baseline, in percentage points: worse +2.00 ± 1.41, unstable +2.00, '
        'better -1.50 ± 0.71. Diverged: unstable (1 of 2 seeds).'
    )


def test_table_names_diverged_runs_beside_their_network():
    table = tables.comparison_table('ablations', _ablation_rows(), VARIANTS)
    assert [row[:3] for row in table.rows[2:]] == [
        ('better', '2', '-1.50 ± 0.71'),
        ('unstable', '1, 1 diverged', '+2.00'),
    ]
    text = tables.as_text(table)
    assert text.index('Of 3 claimed signs') < text.index('better')


def test_validation_curves_are_means_over_seeds(tmp_path):
    for seed, errors in enumerate(([90.0, 60.0], [80.0, 50.0, 40.0])):  # the second run is longer
        (tmp_path / str(seed)).mkdir()
        lines = [{'split': 'val', 'epoch': i + 1, 'top1_error': e, 'loss': 1.0} for i, e in enumerate(errors)]
        (tmp_path / str(seed) / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    curves = tables.mean_validation_curves({str(tmp_path / '0'): 'base', str(tmp_path / '1'): 'base'})
    assert [list(values) for values in curves['base']] == [[1, 2], [85, 55]]
