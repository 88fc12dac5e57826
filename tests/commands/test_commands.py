"""The commands as a user runs them: errors are one line on stderr with exit code 2, never a traceback."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import time

import jax
import pytest

import alexnet_jax
from alexnet_jax.__main__ import COMMANDS
from alexnet_jax.commands import app
from alexnet_jax.data import datasets
from tests import ROOT, helpers
from tests.commands import forked
from tests.helpers import run_command

_PROGRAM = """
from types import SimpleNamespace
from alexnet_jax.commands import app
def run(function):
    nothing = {'__name__': 'mine', '__doc__': 'Mine.', 'FLAGS': ()}
    app.run(SimpleNamespace(**nothing, main=lambda args: function()), [])
"""
MAIN = ['train', '--config=configs/quickstart.py', '--cpu_devices=1']


def _assert_user_error(result, pattern):
    lines = result.stderr.splitlines()
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1 and lines[0].startswith('error: '), result.stderr
    assert re.search(pattern, lines[0]), lines[0]


@pytest.mark.parametrize(
    ('arguments', 'pattern'),
    [
        ([*MAIN, '--workdir=W', '--config.optim.learning_rat=1'], r"Did you mean 'optim.learning_rate'\?"),
        ([*MAIN, '--workdir=W', '--config.modle.dtype=x'], r"'modle.dtype'. Did you mean 'model.dtype'"),
        ([*MAIN, '--workdir=W', '--config.bach_size=1'], r"config key 'bach_size'. Did you mean 'batch_size'\?"),
        ([*MAIN, '--workdir=W', '--config.batch_size=many'], r'config.batch_size=many: invalid literal for int'),
        ([*MAIN, '--workdir=W', '--config.data.reflect=perhaps'], 'config.data.reflect=perhaps'),
        ([*MAIN, '--workdir=W', '--config.num_epochs=inf', '--config.num_steps=0'], 'num_epochs=inf'),
        ([*MAIN, '--workdir=W', '--config.batch_size=0'], 'batch_size=0: expected a positive integer'),
        ([*MAIN, '--workdir=W', '--config.model.layers.conv2.pots=x'], "Did you mean 'model.layers.conv2.post'"),
        ([*MAIN, '--workdir=W', '--config.model.layers.cnv2.post=x'], "Did you mean 'model.layers.conv2.post'"),
        ([*MAIN, '--summary', '--config.model.layers.conv2.post=relu pol'], "relu pol': op 'pol' is not available"),
        ([*MAIN, '--workdir=W', '--config.model.layers.fc8.features=5'], "key 'model.layers.fc8.features'. Did you"),
        ([*MAIN, '--workdir=W', '--config.data.pixel_std[0]=5'], r"config key 'data.pixel_std\[0\]'. Did you mean"),
        ([*MAIN, '--summary', '--config.=3'], "unknown config key ''"),
        (['train', '--config.seed=1', '--workdir=W'], '--config.seed requires --config=NAME'),
        ([*MAIN], '--workdir is missing'),
        (['train', '--config.seed=x', '--config', 'configs/quickstart.py', '--workdir=W'], 'config.seed=x: invalid'),
        ([*MAIN, '--summary', '--config.mesh.tower=0'], 'mesh.tower=0: expected 1 or 2'),
        ([*MAIN, '--workdir=W', '--config.data.path=W/none'], 'no data directory .*alexnet_jax prepare --input'),
        ([*MAIN, '--workdir=W', '--config.model.num_classes=12'], 'model.num_classes=12: the data have 10 classes'),
        ([*MAIN, '--workdir=gs://bucket/run'], "'gs://bucket/run': remote paths are not supported"),
        (['prepare', '--input=W', '--output=s3://bucket/data'], "'s3://bucket/data': remote paths are not supported"),
        ([*MAIN, '--workdir=~/run'], "'~/run': the shell does not expand ~ after =; use .HOME/run instead"),
        (['predict', '--checkpoint=W', 'https://host/cat.jpg'], "'https://host/cat.jpg': remote paths"),
        ([*MAIN, '--workdir=W', '--cpu_devices=3'], 'mesh.tower=2: 3 devices cannot be paired'),
        ([*MAIN, '--workdir=W', 'stray'], "unexpected argument 'stray'"),
        (['train', '--workdir=W', '--config=configs/nobody.py'], r"no config file 'configs/nobody.py'"),
        (['train', '--workdir=W', '--config=configs/papr.py'], r"'configs/papr.py'. Did you mean 'configs/paper.py'\?"),
        (['train', '--workdir=W', '--config=papr'], r"no config file 'papr'. Did you mean 'paper'\?"),
        (['train', '--workdir=W', '--config=ablations'], "unknown variant ''; expected one of no_normalization"),
        (['train', '--workdir=W', '--config=configs/paper.py:init=x'], "variant 'init=x'; expected 'init=paper'"),
        (['train', '--workdir=W', '--config=configs/torchvision.py:x'], "'configs/torchvision.py' has no variants"),
        (['prepare', '--output=W'], '--input is missing'),
        (['prepare', '--input=W', '--output=W/out'], 'input .* does not exist'),
        (['prepare', '--input=W', '--output=W/out', '--size=big'], r'--size=big'),
        (['prepare', '--input=W', '--output=W/out', '--part='], '--part=: expected i/n with i from 1 to n'),
        (['prepare', '--output=W/out', '--join', '--size=64'], '--size=64: not used with --join, which takes it from'),
        (['evaluate', '--checkpoint=W', '--data=digits'], "there is no checkpoint at"),
        (['evaluate', '--checkpoint=W', '--data=digits', '--split=best'], "no split 'best' .*; choose from: train"),
        (['evaluate', '--checkpoint=W', '--data=digits', '--views=3'], '--views=3: expected 1'),
        (['evaluate', '--data=digits'], '--checkpoint is missing'),
        (['evaluate', '--checkpoint=README.md', '--data=digits'], "README.md' is a file, not a checkpoint"),
        (['finetune', '--input=W', '--output=W', '--config.num_epoch=1'], "'num_epoch'. Did you mean 'num_epochs'"),
        (['finetune', '--config.seed=1', '--config=configs/nobody.py'], "no config file 'configs/nobody.py'"),
        (['finetune', '--config.num_epochs=1', '--input=W', '--output=W/out'], "input .* does not exist"),
        (['benchmark'], "'': expected one of step, input, train, inference, prepare, loop"),
        (['benchmark', 'speed'], "'speed': expected one of step, input, train, inference, prepare, loop"),
        (['benchmark', 'prepare'], '--input is missing'),
        (['benchmark', 'input'], 'no dataset given; use --config.data.path=DIR'),
        (['benchmark', 'input', '--against=torch', '--config.data.cache=host'], "would compare .*; use .*cache=''"),
        (['benchmark', 'train', '--input=W'], "Unknown command line flag 'input'"),
        (['benchmark', 'train', '--compile_for=h200'], "Unknown command line flag 'compile_for'"),
        (['benchmark', 'step', '--output=W/none/a.json'], '--output=.*: expected a file in an existing folder'),
        (['benchmark', 'step', '--compile_for='], 'expected h100 or h200, several in one host such as 2xh200'),
        (['convert', '--output=W'], '--input is missing'),
        (['convert', '--input=W', '--output=W'], 'expected an existing .caffemodel, .pth, .npy or'),
        (['convert', '--input=README.md', '--output=W'], 'expected an existing .caffemodel, .pth, .npy or'),
        (['convert', '--input=W', '--output=W', '--to=safetensors'], 'there is no checkpoint at'),
    ],
)  # fmt: skip
def test_user_errors(arguments, pattern, tmp_path):
    workdir = tmp_path / 'w'
    _assert_user_error(forked.run_command([a.replace('W', str(workdir)) for a in arguments], tmp_path), pattern)
    assert not workdir.exists()


@pytest.mark.slow
def test_second_start_uses_compilation_cache(tmp_path):
    here = {
        'XDG_CACHE_HOME': str(tmp_path),
        'JAX_COMPILATION_CACHE_DIR': None,
        'JAX_DEBUG_LOG_MODULES': 'jax._src.compiler',
    }
    steps = ['--config.num_steps=1', '--config.eval_every_steps=1']
    first = run_command(*MAIN, f'--workdir={tmp_path}/a', *steps, **here)
    kept = sorted(path.name for path in (tmp_path / 'alexnet_jax').iterdir())
    second = run_command(*MAIN, f'--workdir={tmp_path}/b', *steps, **here)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert any(name.startswith('jit_train_step') for name in kept)
    assert "cache hit for 'jit_train_step'" not in first.stderr
    assert "cache hit for 'jit_train_step'" in second.stderr


@pytest.mark.slow
def test_unwritable_cache_folder_is_ignored(tmp_path):
    (tmp_path / 'file').touch()
    here = {'XDG_CACHE_HOME': str(tmp_path / 'file'), 'JAX_COMPILATION_CACHE_DIR': None}
    result = run_command(*MAIN, f'--workdir={tmp_path}/a', '--config.num_steps=1', **here)
    assert (result.returncode, result.stderr) == (0, ''), result.stderr


def test_unwritable_workdir_is_refused(tmp_path):
    (tmp_path / 'file').write_text('')
    _assert_user_error(run_command(*MAIN, f'--workdir={tmp_path}/file'), 'the workdir .* cannot be used')


def test_config_may_exit_with_its_own_code(tmp_path):
    (tmp_path / 'config.py').write_text('def get_config():\n    raise SystemExit(3)\n')
    assert run_command('train', f'--config={tmp_path}/config.py', f'--workdir={tmp_path}/w').returncode == 3


@pytest.mark.parametrize(
    'text, pattern',
    [
        ('seed = 1', r"c.py' has no function get_config\(\)"),
        ('def get_config(:', r"cannot load .*c.py' \(SyntaxError: "),
        ('import nosuch', r"cannot load .*c.py' \(ModuleNotFoundError: No module named 'nosuch'\)"),
        ('def get_config():\n    return {}', 'returns dict: expected an ml_collections.ConfigDict'),
    ],
)
def test_invalid_config_file_is_refused(text, pattern, tmp_path):
    (tmp_path / 'c.py').write_text(text)
    _assert_user_error(run_command('train', f'--config={tmp_path}/c.py', f'--workdir={tmp_path}/w'), pattern)


def test_memory_error_is_one_line():
    """Python's MemoryError has no message."""
    script = f'{_PROGRAM}\ndef f(): raise MemoryError\nrun(f)'
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and 'out of memory (MemoryError)' in done.stderr


def test_missing_device_is_one_line(tmp_path):
    """Covers a platform unknown to JAX, and a known platform without devices."""
    done = run_command(*MAIN[:2], f'--workdir={tmp_path}', JAX_PLATFORMS='nothing')
    _assert_user_error(done, "JAX cannot initialize its devices .JAX_PLATFORMS='nothing': Unable to .*--cpu_devices=1")
    script = (
        f'{_PROGRAM}\nimport jax; from jax._src import hardware_utils, xla_bridge\n'
        "hardware_utils.has_visible_nvidia_gpu = lambda: False; jax.config.update('jax_platforms', 'cuda')\n"
        'run(jax.devices)'
    )
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True)
    _assert_user_error(done, 'JAX cannot initialize its devices')


@pytest.mark.slow
def test_out_of_device_memory_is_one_line(tmp_path):
    """Allocates 2^48 floats, too many for any device."""
    script = f'{_PROGRAM}\nimport jax.numpy as jnp\nrun(lambda: print(jnp.zeros(1 << 48).sum()))'
    result = subprocess.run(
        [sys.executable, '-c', script],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    )  # fmt: skip
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert 'out of memory' in result.stderr and '--config.grad_accum_steps=N' in result.stderr


@pytest.mark.slow
def test_train_resume_evaluate(tmp_path):
    """Runs the quickstart command on two devices, interrupted, resumed and extended, then evaluates."""
    run = ['train', '--config=configs/quickstart.py', '--cpu_devices=2', f'--workdir={tmp_path}']
    first = run_command(*run, '--config.num_steps=40')
    assert first.returncode == 0 and 'val    step 40/40' in first.stdout, first.stderr
    again = run_command(*run, '--config.num_steps=40')
    assert again.returncode == 0 and 'is finished: step 40 of 40' in again.stdout
    longer = run_command(*run, '--config.num_steps=50')
    assert longer.returncode == 0 and 'Resuming from step 40 of 50' in longer.stdout
    _assert_user_error(run_command(*run, '--config.seed=1'), r'contains a run with another config \(seed: 0 -> 1\)')
    for views in (1, 10):
        result = run_command('evaluate', f'--checkpoint={tmp_path}', '--data=digits', f'--views={views}', '--json')
        assert result.returncode == 0, result.stderr
        found = json.loads(result.stdout.splitlines()[-1])
        assert set(found) == {'top1_error', 'top5_error', 'loss', 'count', 'views'}
        assert (found['count'], found['views']) == (360, views) and 0 <= found['top1_error'] < 60
    assert not first.stderr and not longer.stderr, first.stderr + longer.stderr


@pytest.mark.slow
def test_quickstart_reaches_low_error(tmp_path):
    result = run_command('train', '--config=configs/quickstart.py', '--cpu_devices=2', f'--workdir={tmp_path}')
    assert result.returncode == 0, result.stderr
    last = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[-1])
    assert last['split'] == 'val' and last['count'] == 360 and last['top1_error'] < 4


@pytest.mark.slow
def test_full_size_network_on_imagenet_photos(imagenet_tar, tmp_path):
    """Prepares, trains at full size on two devices, stops with SIGKILL, resumes, evaluates with ten views."""
    data = f'{tmp_path}/photos'
    prepared = run_command('prepare', f'--input={imagenet_tar}', f'--output={data}', '--val_fraction=0.03')
    assert prepared.returncode == 0, prepared.stderr
    run = [
        'train', '--config=configs/paper.py', '--cpu_devices=2', f'--workdir={tmp_path}/run',
        f'--config.data.path={data}', '--config.batch_size=16', '--config.num_steps=8',
        '--config.checkpoint_every_steps=2', '--config.log_every_steps=1',
    ]  # fmt: skip
    command = [sys.executable, '-m', 'alexnet_jax', *run]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    # Exists once the step is complete, some updates later.
    saved = tmp_path / 'run' / 'checkpoints' / '2' / 'SHA256SUMS'
    while child.poll() is None and not saved.exists():
        time.sleep(0.01)
    child.kill()
    child.wait()
    again = run_command(*run)
    assert again.returncode == 0, again.stderr
    assert re.search('Resuming from step [24] of 8', again.stdout), again.stdout
    lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    assert abs(lines[0]['loss'] - 6.9078) < 0.5  # ln 1000
    assert [line['step'] for line in lines if line['split'] == 'train'] == list(range(1, 9))
    result = run_command(
        'evaluate', f'--checkpoint={tmp_path}/run', f'--data={data}', '--views=10', '--batch_size=10', '--json'
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])['count'] == 30


@pytest.mark.parametrize('words', [[], ['train', '--help']])
def test_closed_output_pipe_is_no_traceback(words):
    """As in `alexnet_jax | head`."""
    command = [sys.executable, '-m', 'alexnet_jax', *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ''
    assert process.returncode == 141


def test_package_lists_its_commands():
    result = subprocess.run([sys.executable, '-m', 'alexnet_jax'], capture_output=True, text=True, cwd=ROOT, check=True)
    listed = re.findall(r'^alexnet_jax (\w+) ', result.stdout, re.M)
    modules = {path.stem for path in (ROOT / 'alexnet_jax' / 'commands').glob('*.py')} - {
        '__init__',
        'app',
        'flag',
    }
    assert set(listed) == modules and len(listed) == len(COMMANDS)


def _commands():
    """Yields (words, module or class) for every command and subcommand."""
    for name in COMMANDS:
        command = importlib.import_module(f'alexnet_jax.commands.{name}')
        yield from [([name, sub], c) for sub, c in getattr(command, 'SUBCOMMANDS', {}).items()] or [([name], command)]


@pytest.mark.parametrize(('words', 'command'), [pytest.param(w, c, id=' '.join(w)) for w, c in _commands()])
def test_help_has_purpose_example_and_own_flags(words, command):
    text = app.help_text(command)
    assert text.startswith(inspect.getdoc(command).splitlines()[0])
    assert re.search(rf'^ *alexnet_jax {" ".join(words)} ', text.partition('flags:')[0], re.M)
    assert set(re.findall(r'^  --(?:\[no\])?(\w+)', text, re.M)) == {flag.name for flag in command.FLAGS}


@pytest.mark.parametrize('word', ['-h', '--help'])
def test_help_exits_with_0(word):
    done = run_command('evaluate', word)
    assert (done.returncode, done.stderr) == (0, '') and '--checkpoint' in done.stdout
    done = run_command('benchmark', word)
    assert (done.returncode, done.stderr) == (0, '') and '  step ' in done.stdout


def test_env_prints_versions_and_devices():
    done = run_command('env', '--json', '--cpu_devices=1')
    found = json.loads(done.stdout)
    assert found['versions']['jax'] == jax.__version__ and found['devices'] == ['cpu:0 cpu']
    done = run_command('env', '--cpu_devices=1')
    assert f'jax: {jax.__version__}\n' in done.stdout and 'devices: cpu:0 cpu\n' in done.stdout


def test_main_module_is_the_train_command():
    done = [
        subprocess.run([sys.executable, '-m', *words], capture_output=True, text=True, cwd=ROOT)
        for words in (['alexnet_jax.main', '--summary', MAIN[1]], ['alexnet_jax', 'train', '--summary', MAIN[1]])
    ]
    assert done[0].stdout == done[1].stdout and 'conv5' in done[0].stdout and not done[0].returncode


def test_unknown_command_suggests_the_nearest():
    done = run_command('evalute', '--json')
    assert (done.returncode, done.stderr) == (2, "error: unknown command 'evalute'. Did you mean 'evaluate'?\n")
    done = run_command('train', '--config=configs/quickstart.py', '--summary')
    assert done.returncode == 0 and 'conv5' in done.stdout and '2 towers, 28 px' in done.stdout
    done = run_command('train', '--config=configs/quickstart.py')
    assert done.returncode == 2 and '--workdir is missing' in done.stderr


def test_public_names():
    for name in alexnet_jax.__all__:
        assert getattr(alexnet_jax, name)
    assert set(alexnet_jax.__all__) == {
        'AlexNet', 'activations', 'build', 'get_config', 'gradients', 'in_memory', 'init_params', 'linear_cka',
        'load_checkpoint', 'load_lpips', 'lpips', 'noise_ceiling', 'predict', 'rdm', 'receptive_field', 'rsa',
        'ten_views', 'train_and_evaluate', 'visualize', '__version__',
    }  # fmt: skip
    with pytest.raises(AttributeError):
        alexnet_jax.nothing  # noqa: B018


@pytest.mark.parametrize(
    'code',
    [
        'import alexnet_jax',
        'import alexnet_jax.prepare.prepare, alexnet_jax.prepare.parts, alexnet_jax.prepare.record_writer',
        'import importlib; from alexnet_jax import __main__; from alexnet_jax.commands import app; '
        '[app.help_text(importlib.import_module(f"alexnet_jax.commands.{name}")) for name in __main__.COMMANDS]',
    ],
    ids=['package', 'prepare', 'help'],
)
def test_imports_and_help_do_not_load_jax(code):
    """Covers the package import, the worker processes of `prepare`, and `--help` of every command."""
    heavy = '("jax", "flax", "optax", "orbax", "grain", "tensorflow", "torch")'
    code = f'{code}\nimport sys; print([name for name in {heavy} if name in sys.modules])'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == '[]'


def test_training_does_not_load_pytorch(tmp_path):
    """If PyTorch is installed, loading it would double the memory of every decoding process."""
    (tmp_path / 'torch.py').write_text('Tensor = None\n')
    checks = 'assert "torch" not in sys.modules; import torch; assert torch.Tensor is None'
    code = f'import sys, alexnet_jax.training.train; {checks}'
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(tmp_path)}, check=True)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full, which this system has not got')
def test_unwritable_output_is_one_line():
    """Also covers output that Python writes only when it exits."""
    program = f"{_PROGRAM}\nrun(lambda: print('x'))"
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONUNBUFFERED'}
    with open('/dev/full', 'w') as full:
        done = subprocess.run(
            [sys.executable, '-c', program], stdout=full, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
    expected = 'error: the output cannot be read or written: No space left on device.\n'
    assert (done.returncode, done.stderr) == (2, expected)


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'utf-8'])
def test_terminals_of_other_encodings(encoding, tmp_path):
    """Class names and paths that a terminal cannot show are printed with escapes."""
    names = {'日本', 'café'}
    helpers.write_files(tmp_path / 'in', {f'{name}/a.png': helpers.encode(helpers.picture(0), 'PNG') for name in names})
    words = ['prepare', f'--input={tmp_path}/in', f'--output={tmp_path}/é', '--size=16']
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONIOENCODING': encoding}
    command = [sys.executable, '-m', 'alexnet_jax', *words]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    for text in (*names, f'{tmp_path}/é is ready'):
        assert text.encode(encoding, 'backslashreplace') in done.stdout


@pytest.mark.slow
def test_commands_print_names_in_ascii(tmp_path, monkeypatch):
    names, digits = [f'ü{i}' for i in range(10)], datasets.open_dataset('digits')
    monkeypatch.setattr(datasets, 'open_dataset', lambda path: digits._replace(class_names=tuple(names)))
    checkpoint = helpers.save_untrained(tmp_path / 'rün')
    image = helpers.encode(helpers.picture(0), 'PNG')
    images = helpers.write_files(tmp_path / 'in', {f'val/{name}/ä.png': image for name in names[:2]})
    environment = {'PYTHONIOENCODING': 'ascii', 'LC_ALL': 'C'}
    for words, text in (
        (
            ['prepare', f'--input={images}', f'--output={tmp_path}/dätä', '--size=32'],
            'classes: 2 (\\xfc0, \\xfc1)',
        ),
        (['evaluate', f'--data={tmp_path}/dätä', '--per_class'], '\n\\xfc1 '),
        (
            ['activations', f'--images={images}/val', '--layers=fc7', f'--output={tmp_path}/ä.npz'],
            'val: \\xfc0, ',
        ),
    ):
        words += [] if words[0] == 'prepare' else [f'--checkpoint={checkpoint}', '--cpu_devices=1']
        done = helpers.run_command(*words, **environment)
        assert done.returncode == 0 and text in done.stdout, done


def test_other_encodings_of_file_names_are_said(tmp_path):
    environment = {'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0', 'LC_ALL': 'C'}
    done = helpers.run_command('prepare', '--input=none', f'--output={tmp_path}/out', **environment)
    warning, error = done.stderr.splitlines()
    assert warning.startswith('warning: file names are read as ascii: set PYTHONUTF8=1') and 'does not exist' in error
