"""Launch scripts: slurm.sh with fake Slurm commands, local.sh, and static checks of the other files."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from tests import ROOT, helpers, test_docs

LAUNCH = ROOT / 'launch'
# Fakes of the Slurm commands that the script uses. srun numbers the tasks, returns their highest exit code, and gives
# each task one core unless --cpus-per-task is repeated. scontrol lists hosts and requeues the job.
SRUN = """#!/usr/bin/env python3
import os, subprocess, sys
words = [word for word in sys.argv[1:] if not word.startswith(('--kill', '--wait', '--cpus'))]
assert '--cpus-per-task=32' in sys.argv
numbers = range(int(os.environ['SLURM_NTASKS']))
tasks = [subprocess.Popen(words, env={**os.environ, 'SLURM_PROCID': str(i)}) for i in numbers]
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo 127.0.0.1; echo 127.0.0.2; else echo "$@" >> "$QUEUE"; fi
"""


def _slurm(tmp_path, *words, task=None, **here):
    for name, text in (('srun', SRUN), ('scontrol', SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        'PATH': f'{tmp_path}:{os.environ["PATH"]}',
        'PYTHON': task or sys.executable,
        'PYTHONPATH': str(ROOT),
        'QUEUE': str(tmp_path / 'queue'),
        'SLURM_JOB_NODELIST': 'node[1-2]',
        'SLURM_JOB_ID': str(os.getpid()),
        'SLURM_NTASKS': '2',
        'SLURM_CPUS_PER_TASK': '32',
        'SLURM_STEP_NODELIST': 'node[1-2]',
        'SLURM_LOCALID': '0',
        **here,
    }
    environment = {name: value for name, value in environment.items() if value is not None}
    return subprocess.run(
        [str(LAUNCH / 'slurm.sh'), *map(str, words)], env=environment, cwd=ROOT, capture_output=True, text=True
    )


def _task(tmp_path, end: str):
    """Writes a script that replaces Python: it prints its settings and arguments, then runs `end`."""
    path = tmp_path / 'task'
    path.write_text(
        '#!/bin/sh\necho "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS: $@"\n' + end + '\n'
    )
    path.chmod(0o755)
    return str(path)


def test_slurm_passes_task_numbers_and_arguments(tmp_path):
    done = _slurm(tmp_path, '--config=a b', '--workdir=$HOME', task=_task(tmp_path, 'exit 0'))
    assert done.returncode == 0 and not (tmp_path / 'queue').exists()
    lines = sorted(done.stdout.splitlines())
    port = 20000 + os.getpid() % 20000
    expected = '{} of 2 at 127.0.0.1:' + str(port) + ': -m alexnet_jax.main --config=a b --workdir=$HOME'
    assert lines == [expected.format(0), expected.format(1)]


@pytest.mark.parametrize(('code', 'requeued'), [(143, True), (2, False), (1, False)])
def test_slurm_requeues_a_job_stopped_by_sigterm(tmp_path, code, requeued):
    done = _slurm(tmp_path, task=_task(tmp_path, f'[ "$JAX_PROCESS_ID" = 0 ] || exit {code}'))
    assert done.returncode == code
    assert (tmp_path / 'queue').exists() == requeued
    if requeued:
        assert (tmp_path / 'queue').read_text() == f'requeue {os.getpid()}\n'


_DEVICES = """#!{python}
import sys
import jax
from alexnet_jax.commands import app
app.set_up_jax(cpu_devices=1)
sys.stdout.write('GPUs: ' + jax.config.values['jax_cuda_visible_devices'] + '\\n')  # one write: two tasks share it
"""


@pytest.mark.slow
def test_slurm_task_uses_all_gpus_of_its_node(tmp_path):
    """By default JAX would use only the GPU with the number SLURM_LOCALID."""
    task = tmp_path / 'task'
    task.write_text(_DEVICES.format(python=sys.executable))
    task.chmod(0o755)
    done = _slurm(tmp_path, task=str(task))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ['GPUs: all'] * 2


def _output_of_two(tmp_path, command):
    """Returns the output of launch/local.sh with two processes that run a shell command instead of training."""
    task = tmp_path / 'task'
    task.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\n{command}\n')
    task.chmod(0o755)
    here = {**os.environ, 'PYTHON': str(task)}
    done = subprocess.run([str(LAUNCH / 'local.sh'), '2'], env=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_local_processes_have_one_gpu_each_and_know_their_count(tmp_path):
    output = _output_of_two(tmp_path, 'echo "GPU $JAX_LOCAL_DEVICE_IDS, one of $LOCAL_WORLD_SIZE"')
    assert sorted(output.splitlines()) == [f'GPU {i}, one of 2' for i in (0, 1)]


def test_local_processes_handle_ctrl_c_from_their_start(tmp_path):
    code = "import os, signal; os.write(1, b'%r ' % (signal.getsignal(signal.SIGINT) == signal.default_int_handler))"
    assert _output_of_two(tmp_path, f'exec {sys.executable} -c "{code}"').split() == ['True', 'True']


@pytest.mark.slow
def test_slurm_with_two_processes_trains_as_one_process(tmp_path):
    options = ('--config=tests/faults/config.py', '--config.num_steps=12', '--cpu_devices=1')
    home = {'XDG_CACHE_HOME': str(tmp_path / 'cache'), 'JAX_COMPILATION_CACHE_DIR': None}
    done = _slurm(tmp_path, *options, f'--workdir={tmp_path}/two', '--config.mesh.data=2', **home)
    assert done.returncode == 0, done.stderr[-3000:]
    # A compilation cache in the home folder may not be shared; one machine would wait for programs of another.
    assert not os.path.exists(home['XDG_CACHE_HOME'])
    one = [sys.executable, '-m', 'alexnet_jax.main', *options, f'--workdir={tmp_path}/one']
    subprocess.run(one, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, check=True, capture_output=True)
    two, one = ([json.loads(line) for line in open(tmp_path / name / 'metrics.jsonl')] for name in ('two', 'one'))
    assert [line['step'] for line in two] == [line['step'] for line in one]
    # Float32 rounding differences grow fast in so small a network. tests/training/test_survival.py compares all steps
    # to 1e-9 in float64.
    for a, b in zip(two[:2], one[:2], strict=True):
        assert a['loss'] == pytest.approx(b['loss'], rel=1e-3)


def _check_with(tool, *words):
    """Runs a linter; skips the test if it is not installed (`pip install -e '.[lint]'`)."""
    path = shutil.which(tool, path=os.pathsep.join((os.path.dirname(sys.executable), os.environ['PATH'])))
    if path is None:
        pytest.skip(f'needs {tool}, which is not installed')
    done = subprocess.run([path, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('name', ['local.sh', 'slurm.sh', 'cpu_figures.sh'])
def test_shell_scripts_pass_shellcheck(name):
    subprocess.run(['bash', '-n', str(LAUNCH / name)], check=True)
    _check_with('shellcheck', str(LAUNCH / name))


def test_dockerfile_passes_hadolint():
    _check_with('hadolint', str(LAUNCH / 'Dockerfile'))


def test_job_in_the_jobset_is_valid_kubernetes(tmp_path):
    """JobSet has no schema here, so only its Job is validated, against that of Kubernetes."""
    (job,) = yaml.safe_load((LAUNCH / 'jobset.yaml').read_text())['spec']['replicatedJobs']
    whole = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': job['name']}, **job['template']}
    (tmp_path / 'job.yaml').write_text(yaml.safe_dump(whole))
    _check_with('kubernetes-validate', '--strict', str(tmp_path / 'job.yaml'))


def test_jobset_is_consistent():
    jobset = yaml.safe_load((LAUNCH / 'jobset.yaml').read_text())
    name = jobset['metadata']['name']
    (job,) = jobset['spec']['replicatedJobs']
    spec = job['template']['spec']
    pod = spec['template']['spec']
    (container,) = pod['containers']
    environment = {variable['name']: variable for variable in container['env']}
    assert set(environment) == {'JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'}
    assert spec['parallelism'] == spec['completions'] == int(environment['JAX_NUM_PROCESSES']['value'])
    assert spec['completionMode'] == 'Indexed'
    # JobSet names its pods JOBSET-JOB-REPLICA-INDEX, in a domain with the JobSet's name.
    assert environment['JAX_COORDINATOR_ADDRESS']['value'].split(':')[0] == f'{name}-{job["name"]}-0-0.{name}'
    assert {mount['name'] for mount in container['volumeMounts']} == {volume['name'] for volume in pod['volumes']}
    assert container['args'][0] == 'train' and test_docs._missing(['alexnet_jax', *container['args']]) == []


def test_dockerfile_copies_the_sources_of_the_package():
    text = (LAUNCH / 'Dockerfile').read_text()
    copied = {word for line in re.findall(r'^COPY (.*) \S+$', text, re.M) for word in line.split()}
    assert {'pyproject.toml', 'README.md', 'LICENSE', 'alexnet_jax', 'configs'} == copied
    assert all((ROOT / name).exists() for name in copied)


# Replaces Python in gpu_figures.sh and cpu_figures.sh: notes the commands of the package, and runs everything else.
NOTES = """#!/bin/bash
if [ "$1" = -m ]; then shift 2; printf -v line '%q ' "$@"; echo "$line" >> "$NOTED"; else exec "$REAL" "$@"; fi
"""
STAGES = ('step', 'train', 'inference', 'resume', 'learn', 'cifar', 'suites')


def _figures(tmp_path, *stages, script='gpu_figures.sh', **environment):
    here = {'OUT': str(tmp_path / 'out'), 'PYTHON': sys.executable, 'PYTHONPATH': str(ROOT), **environment}
    command = [str(LAUNCH / script), *stages]
    return subprocess.run(command, env={**os.environ, **here}, cwd=tmp_path, capture_output=True, text=True)


def _noted(tmp_path, *stages, **settings):
    """Returns the commands of the package that a script would run."""
    (tmp_path / 'python').write_text(NOTES)
    (tmp_path / 'python').chmod(0o755)
    fake = {'PYTHON': str(tmp_path / 'python'), 'REAL': sys.executable, 'NOTED': str(tmp_path / 'noted')}
    done = _figures(tmp_path, *stages, **settings, **fake)
    assert done.returncode == 0, done.stderr
    return ['alexnet_jax ' + line for line in (tmp_path / 'noted').read_text().splitlines()]


@pytest.mark.parametrize('small', ['', '1'])
def test_commands_of_cpu_figures_exist(small, tmp_path):
    stages = ('step', 'inference', 'loop', 'input', 'train', 'prepare', 'mesh')
    commands = _noted(tmp_path, *stages, script='cpu_figures.sh', SMALL=small, IMAGES='photos')
    assert [command for command in commands if test_docs._missing(shlex.split(command))] == []
    outputs = [re.search(r' --output=\S+/cpu_(\w+).json', command) for command in commands if ' benchmark ' in command]
    names = {found[1] for found in outputs}
    assert len(names) == len(outputs) == (9 if small else 21)


@pytest.mark.parametrize('variables', [{'JAX_COORDINATOR_ADDRESS': 'localhost:1'}, {}])
def test_second_interrupt_does_not_disturb_the_exit(variables):
    """One of several processes exits at once. A normal exit would wait for the others."""
    code = """if True:
        import os, signal
        from alexnet_jax.commands import app
        signal.signal(signal.SIGINT, signal.default_int_handler)
        app.logs.escape_controls = lambda text: os.kill(os.getpid(), signal.SIGINT) or text
        def interrupted():
            raise KeyboardInterrupt
        app.report_errors(interrupted)
    """
    environment = {**os.environ, **variables, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, 'error: interrupted.\n')


@pytest.mark.full
@pytest.mark.parametrize('small', ['', '1'])
def test_commands_of_gpu_figures_exist(small, tmp_path):
    """The options of every command of every stage, at full size and at toy size."""
    commands = _noted(tmp_path, *STAGES, SMALL=small, TINY='tiny', CIFAR='cifar')
    assert len(commands) >= 43 - 6 * bool(small)  # at toy size, stage learn has one seed
    assert [command for command in commands if test_docs._missing(shlex.split(command))] == []
    assert {path.name for path in (tmp_path / 'out').glob('*.json')} == {f'{stage}.json' for stage in STAGES}


def test_gpu_figures_refuses_other_stages(tmp_path):
    done = _figures(tmp_path, 'step', 'steps')
    assert done.returncode == 2 and 'unknown stage steps: expected step, train' in done.stderr
    assert not list((tmp_path / 'out').glob('*.json'))


@pytest.mark.slow
def test_gpu_figures_at_toy_size(tmp_path):
    pictures = helpers.write_pictures(tmp_path / 'pictures', range(10), 20)
    small = {'SMALL': '1', 'TINY': str(pictures), 'CLASSES': '10'}
    done = _figures(tmp_path, 'inference', 'resume', **small)
    assert done.returncode == 0 and done.stdout.count(' 0 failed') == 2, done.stdout + done.stderr
    found = {name: json.loads((tmp_path / f'out/{name}.json').read_text()) for name in ('inference', 'resume')}
    (measured,) = found['inference']['commands']
    assert measured['command'].endswith('--output=record.json')
    assert set(measured['result']['images_per_second']) == {'1', '8'} and found['inference']['environment']['versions']
    same = [row['result'] for row in found['resume']['commands'] if row['command'].startswith('compare')]
    assert [row['same_bits'] for row in same] == [True, True]  # on a CPU in any case


@pytest.mark.slow
def test_cpu_figures_at_toy_size(tmp_path):
    photos = helpers.write_pictures(tmp_path / 'pictures', range(2), 4)
    done = _figures(tmp_path, 'step', 'loop', 'prepare', script='cpu_figures.sh', SMALL='1', IMAGES=str(photos))
    assert done.returncode == 0, done.stdout + done.stderr
    texts = {path.stem: path.read_text() for path in (tmp_path / 'out').glob('*.json')}
    assert set(texts) == {'cpu_step_cifar10_80sec', 'cpu_step_two_devices', 'cpu_loop_quickstart', 'cpu_prepare'}
    assert not [name for name, text in texts.items() if str(tmp_path) in text]
    tables = test_docs._tables()
    tables.DOCS = tmp_path
    (tmp_path / 'out').rename(tmp_path / 'results')
    for pattern, kind in (('cpu_step_*', 'step'), ('cpu_loop_*', 'loop'), ('cpu_prepare', 'rates')):
        assert 'Measured on' in tables.render(f'<!-- table: {pattern}.json {kind} -->\n<!-- end -->\n')
