"""Settings that follow from the number of pictures, and what the errors on few pictures mean."""

import math

import numpy as np
import pytest

from alexnet_jax.experiments import finetune_settings, verdict


def _schedule(train, trained=False, **given):
    given = {key.replace('__', '.'): value for key, value in given.items()}
    return {found.key: found.value for found in finetune_settings.schedule(train, trained=trained, given=given)}


@pytest.mark.parametrize(
    ('train', 'trained', 'batch', 'rate', 'epochs', 'every'),
    [
        (40, False, 8, 0.01 / 16, 100, 500),  # the table of docs/own_pictures.md
        (60, True, 8, 0.001 / 8, 67, 503),
        (400, False, 32, 0.01 / 4, 60, 750),
        (1200, True, 64, 0.001, 30, 29),
        (5000, False, 128, 0.01, 60, 118),
        (100_000, True, 64, 0.001, 30, 2344),
    ],
)
def test_schedule_follows_number_of_pictures(train, trained, batch, rate, epochs, every):
    found = _schedule(train, trained)
    assert (found['batch_size'], found['num_epochs']) == (batch, epochs)
    assert found['optim.learning_rate'] == pytest.approx(rate)
    assert found['eval_every_steps'] == found['checkpoint_every_steps'] == every
    assert [stage[1] for stage in found['optim.stages']] == [1.0, 0.1, 0.01]


def test_reason_of_the_batch_size_holds_where_a_batch_is_more_than_an_eighth():
    batch = finetune_settings.schedule(39, trained=False, given={})[0]
    assert str(batch) == '--config.batch_size=8: a power of two up to an eighth of the pictures, but 8 to 128'


@pytest.mark.parametrize('train', [1, 7, 40, 60, 333, 499, 500, 1000, 9999, 10**6])
@pytest.mark.parametrize('trained', [False, True])
def test_a_run_saves_at_most_twenty_times_and_never_mid_epoch(train, trained):
    found = _schedule(train, trained)
    total = math.ceil(found['num_epochs'] * train / found['batch_size'])
    assert total >= 500 or trained
    every = found['checkpoint_every_steps']
    assert total // every <= 20 and every * found['batch_size'] >= train
    assert total // every == 1 or train >= 500


def test_settings_follow_given_ones_and_never_replace_them():
    found = _schedule(60, num_epochs=10.0, batch_size=30)
    assert not {'num_epochs', 'batch_size'} & set(found)
    assert [stage[0] for stage in found['optim.stages']] == [0, 6.67, 8.67]
    assert found['eval_every_steps'] == 20 and found['optim.learning_rate'] == pytest.approx(0.01 * 30 / 128)
    found = _schedule(60, num_steps=12, batch_size=30)
    assert 'num_epochs' not in found and [stage[0] for stage in found['optim.stages']] == [0, 4, 5.2]
    assert 'optim.stages' not in _schedule(60, optim__schedule='plateau')
    for broken in ({'num_epochs': math.inf}, {'num_epochs': -1.0}, {'batch_size': 0}):
        assert _schedule(60, **broken)  # refused later, with the config


def test_mode_follows_weights_pictures_and_options():
    def mode(train, trained, given=(), wanted='auto'):
        return finetune_settings.mode(wanted, train, trained=trained, given=given).value

    assert [mode(train, True) for train in (60, 1000, 1001)] == ['features', 'features', 'full']
    assert mode(60, False) == mode(60, True, ['config.num_epochs']) == mode(60, True, wanted='full') == 'full'
    reason = str(finetune_settings.mode('auto', 60, trained=True, given=['config.num_epochs']))
    assert reason == '--mode=full: --config.num_epochs is for training all layers'


def test_val_fraction_gives_forty_pictures_if_it_can():
    assert [finetune_settings.val_fraction(n).value for n in (60, 120, 200, 400, 5000)] == [0.333, 0.333, 0.2, 0.1, 0.1]


def test_network_from_scratch_is_narrow_for_few_pictures():
    assert [finetune_settings.network(n).value for n in (60, 10_000)] == ['tiny_imagenet', 'finetune:scratch']


@pytest.mark.parametrize(
    ('count', 'total', 'low', 'high'),
    [(0, 10, 0, 0.2775), (20, 40, 0.3520, 0.6480), (1, 20, 0.0089, 0.2361), (10, 10, 0.7225, 1)],
)
def test_wilson_interval_equals_solution_of_its_equation(count, total, low, high):
    """The bounds p solve (count / total - p)^2 = z^2 p (1 - p) / total; here also their known values."""
    found = verdict.wilson(count, total)
    np.testing.assert_allclose(found, (low, high), atol=5e-5)
    for p in found:
        np.testing.assert_allclose((count / total - p) ** 2, 1.959964**2 * p * (1 - p) / total, atol=1e-9)


@pytest.mark.parametrize(
    ('confusion', 'expected'),
    [
        ([[20, 0], [20, 0]], "not better than guessing: 20 of 40 are right; always answering 'cat': 20"),
        ([[35, 1], [3, 1]], "not better than guessing: 36 of 40 are right; always answering 'cat': 36"),
        ([[3, 0], [1, 2]], 'too few val images to tell whether it is better than guessing: 5 of 6 are right'),
        ([[18, 2], [3, 17]], "better than guessing: 35 of 40 are right; always answering 'cat': 20"),
    ],
)
def test_verdict_compares_with_the_largest_class(confusion, expected):
    lines = verdict.verdict(np.array(confusion), ('cat', 'dog'), ['something else'])
    assert lines[1].startswith(expected)
    assert ('  - something else' in lines) == (not expected.startswith('better'))
    assert lines[2] == f'  cat: {confusion[0][0]} of {sum(confusion[0])} right'
    assert lines[3].endswith('(never predicted)') == (confusion[0][1] + confusion[1][1] == 0)


def test_error_is_stated_with_its_interval():
    assert verdict.error_with_interval(32, 40) == '20.0% (95% confidence interval 10.5% to 34.8%)'


def test_next_steps_are_not_already_set():
    def found(mode, trained, train=60, val=40):
        return ' '.join(verdict.next_steps(mode=mode, trained=trained, train=train, classes=2, val=val))

    assert '--mode=full' in found('features', True) and '--mode=features' not in found('features', True)
    assert '--mode=features' in found('full', True) and '--mode=full' not in found('full', True)
    assert '--init_from' in found('full', False) and '--mode' not in found('full', False)
    assert 'more pictures' in found('full', False) and 'more pictures' not in found('full', True, train=1000)
