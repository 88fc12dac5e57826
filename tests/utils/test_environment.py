"""What is known of the software and the machine."""

import shutil
import subprocess
import sys

import jax

from alexnet_jax.training import metric_writer
from alexnet_jax.utils.environment import describe_environment, warn_of_changes
from tests import ROOT


def test_other_software_or_cores_than_before_are_told(tmp_path, capsys):
    now = describe_environment()
    warn_of_changes(str(tmp_path), now)  # of an earlier start nothing is known
    metric_writer.write_json(str(tmp_path), {'environment': now})
    warn_of_changes(str(tmp_path), {**now, 'commit': 'another', 'command': []})
    assert not capsys.readouterr().err
    warn_of_changes(str(tmp_path), {**now, 'cores': 77, 'versions': {**now['versions'], 'jax': '9.9'}})
    assert f'cores {now["cores"]} -> 77; jax {jax.__version__} -> 9.9: the run continues' in capsys.readouterr().err


def test_the_commit_is_not_that_of_a_repository_around_the_package(tmp_path):
    package = tmp_path / 'venv' / 'lib' / 'alexnet_jax'
    shutil.copytree(ROOT / 'alexnet_jax', package)
    script = "from alexnet_jax.utils.environment import describe_environment as d; print(d()['commit'])"
    for repository, known in ((tmp_path, False), (package.parent, True)):
        subprocess.run(['git', 'init', '-q'], cwd=repository, check=True)
        who = ['-c', 'user.name=a', '-c', 'user.email=b']
        subprocess.run(['git', *who, 'commit', '-q', '--allow-empty', '-m', 'c'], cwd=repository, check=True)
        done = subprocess.run([sys.executable, '-c', script], cwd=package.parent, capture_output=True, text=True)
        assert (len(done.stdout.strip()) >= 40) == known, done.stdout + done.stderr
