"""The experiments command; each suite runs end to end at a small scale."""

import csv
import json

import numpy as np
import pytest
from absl import flags

from alexnet_jax.commands import app, experiments
from alexnet_jax.convert import loading
from alexnet_jax.data import datasets
from alexnet_jax.experiments import ablations, cifar10, figures, runner, trials
from alexnet_jax.inference import predict
from alexnet_jax.utils.errors import UserError
from tests import helpers

BASE = """
from tests import helpers

def get_config():
    return helpers.digits_config(**{'num_epochs': 1.0, 'mesh.tower': 1, 'mesh.data': 1, 'log_every_steps': 0})
"""


@pytest.fixture
def command(monkeypatch, tmp_path):
    """`main` in this process, with every run reported as diverged."""
    (tmp_path / 'base.py').write_text(BASE)
    fixed = {'data': 'digits', 'output': str(tmp_path), 'seeds': 1, 'base': f'{tmp_path}/base.py'}

    def run(*words, **changes):
        given = [f'--{name}={value}' for name, value in {**fixed, **changes}.items() if value]
        values = flags.FlagValues()
        experiments.main(values, app.parse(experiments, [*words, *given], values))

    def diverged(trial, suite, dataset):
        return {'suite': suite, 'variant': trial.variant.name, 'seed': trial.seed, 'diverged': True}

    monkeypatch.setattr(trials, 'run_trial', diverged)
    return run


def test_base_of_figure1_is_a_network_of_the_release(command, monkeypatch):
    """Unless another one is given. Settings that are given without a base change this network."""
    suites = []
    monkeypatch.setattr(runner, 'run_suite', lambda suite, data: suites.append(suite) or [])
    command('figure1', '--base.seed=5', '--base.model.layers.fc4.init=normal(0.5)', base=None)
    command('--dry_run=False', 'figure1', '--base.model.layers.conv3.init=normal(0.5)', base=None)
    command('figure1', base='cifar10:80sec')
    layers = [suite.base.model.layers for suite in suites]
    assert [list(found)[-1] for found in layers] == ['fc4', 'fc4', 'fc5']
    assert (layers[0].fc4.init, layers[1].conv3.init, layers[2].conv3.init) == (*2 * ['normal(0.5)'], 'normal(0.01)')
    assert suites[0].base.seed == 5 and suites[0].overrides['seed'] == 5
    with pytest.raises(UserError, match="unknown config key 'model.layers.conv4.init'"):
        command('figure1', '--base.model.layers.conv4.init=zeros', base=None)
    with pytest.raises(UserError, match="unknown config key 'model.layers.conv4.init' of cifar10:19pct"):
        command('--dry_run=False', 'figure1', '--base.model.layers.conv4.init=zeros', base=None)
    with pytest.raises(UserError, match=r'--base.optim.learning_rate=0.5: the networks of figure1 have their own'):
        command('figure1', '--base.optim.learning_rate=0.5')


def test_divergence_remedy_fits_the_suite(command):
    with pytest.raises(UserError, match='all networks of figure1 diverged; the suite sets the learning rates itself'):
        command('figure1')
    with pytest.raises(UserError, match='all networks of views diverged; use a lower --base.optim.learning_rate'):
        command('views')


def test_unusable_output_is_refused(command, tmp_path):
    (tmp_path / 'file').touch()
    for name, why in (('file', 'File exists'), ('file/below', 'Not a directory')):
        with pytest.raises(UserError, match=f"^--output='.*{name}' cannot be used: {why}. Give another directory.$"):
            command('views', output=str(tmp_path / name))


def test_prepared_folder_without_eval_split_is_named(command, tmp_path, monkeypatch):
    """For example a folder prepared by figure1, which takes no images to measure on."""
    digits = datasets.open_dataset('digits')
    monkeypatch.setattr(runner, 'prepare_images', lambda *_: 'out/data-32')
    monkeypatch.setattr(
        datasets, 'open_dataset', lambda path: digits._replace(splits={'train': digits.splits['train']})
    )
    with pytest.raises(UserError, match="'out/data-32' .remove it if 'raw' has changed. has no val or test split"):
        command('cifar10', data='raw')


def _run(*words, code=0):
    done = helpers.run_command('experiments', *words, '--cpu_devices=1')
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    'suite',
    [
        *(pytest.param(suite, marks=pytest.mark.slow) for suite in ('ensemble', 'views', 'figure1')),
        *(pytest.param(suite, marks=pytest.mark.full) for suite in ('ablations', 'recipe', 'cifar10')),
    ],
)
def test_suite_end_to_end(suite, tmp_path):
    (tmp_path / 'base.py').write_text(BASE)
    out = tmp_path / 'out'
    words = (suite, '--data=digits', f'--output={out}', f'--base={tmp_path}/base.py', '--seeds=2', '--scale=0.25')
    if suite in ('ablations', 'recipe'):  # compiling each network takes most of the time
        words = (*words[:-2], '--seeds=1', '--scale=0.1')
    elif suite == 'figure1':
        # Overrides the number of epochs of the variants.
        words = (*words[:-2], '--seeds=1', '--scale=0.25', '--base.num_steps=6')
    elif suite == 'cifar10':
        words = (*words[:-2], '--seeds=1', '--scale=0.1', '--base.num_steps=2')
    said = _run(*words)
    with open(out / 'results.csv') as file:
        rows = list(csv.DictReader(file))
    page = (out / 'report.html').read_text()
    assert '<html' in page and suite in page
    seen = {(row['variant'], row['seed']) for row in rows}
    result = json.loads((out / f'{suite}.json').read_text())
    assert len(result['runs']) == len(rows) and result['command'].startswith(f'alexnet_jax experiments {suite} --data')
    if suite == 'ablations':
        assert len(seen) == len(ablations.ablations(helpers.digits_config()))
        assert '+1.40 / +1.20' in said and 'no normalization' in page
    elif suite == 'figure1':
        assert {row['variant'].split()[0] for row in rows} == {'relu', 'tanh'} and 'tanh / ReLU' in said
    else:
        assert len(seen) == {'cifar10': len(cifar10.NETS), 'recipe': 4}.get(suite, 2)
    assert all(row['diverged'] == 'True' or 0 <= float(row['train_error']) <= 100 for row in rows)
    # A second run trains nothing and changes no result.
    before = {path: path.read_bytes() for path in out.rglob('SHA256SUMS')}
    again = _run(*words)
    assert 'is finished' in again and before == {path: path.read_bytes() for path in out.rglob('SHA256SUMS')}
    with open(out / 'results.csv') as file:
        assert list(csv.DictReader(file)) == rows


@pytest.mark.slow
def test_csv_row_agrees_with_evaluation(tmp_path):
    (tmp_path / 'base.py').write_text(BASE)
    words = ('views', '--data=digits', f'--output={tmp_path}/out', f'--base={tmp_path}/base.py', '--seeds=1')
    _run(*words, '--base.data.reflect=True')  # without reflections, ten views are not measured
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
        (('views', '--base=configs/papr.py'), "no config file 'configs/papr.py'"),
        (('views', '--output=README.md/out'), "--output='README.md/out' cannot be used: Not a directory"),
        ((), 'give one SUITE (figure1, ablations, recipe, large_batch, cifar10, ensemble, views)'),
    ],
)
@pytest.mark.slow
def test_user_errors_are_one_line(words, message, tmp_path):
    output = () if any('--output' in word for word in words) else (f'--output={tmp_path}/out',)
    said = _run('--data=digits', *output, *words, code=2)
    assert message in said and 'Traceback' not in said


@pytest.mark.slow
def test_dry_run_trains_nothing(tmp_path):
    (tmp_path / 'base.py').write_text(BASE)
    said = _run(
        'ablations', '--data=digits', f'--output={tmp_path}/out', f'--base={tmp_path}/base.py', '--seeds=1', '--dry_run'
    )
    assert '1,437 images' in said and f'{len(ablations.ablations(helpers.digits_config()))} runs' in said
    assert not (tmp_path / 'out' / 'runs').exists()


def test_help_names_every_suite():
    assert f'({", ".join(ablations.SUITES)})' in experiments.ARGUMENTS
