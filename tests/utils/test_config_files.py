"""Configs by name from any folder, in a source tree and in a wheel; precedence of names and paths."""

import os
import shutil
import subprocess
import sys

import pytest

import alexnet_jax
from alexnet_jax.utils import config_files
from alexnet_jax.utils.errors import UserError
from tests import ROOT

CONFIG = """
from ml_collections import ConfigDict
def get_config(arg=None):
    return ConfigDict({'seed': arg or 'own'})
"""


def test_config_names_are_the_files_of_configs():
    assert set(config_files.config_names()) == {path.stem for path in (ROOT / 'configs').glob('*.py')}


def test_configs_by_name_argument_and_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert alexnet_jax.get_config('paper').model.layers.conv3.init == 'normal(0.01)'
    assert alexnet_jax.get_config('paper:init=authors').model.layers.conv3.init == 'normal(0.03)'
    (tmp_path / 'mine.py').write_text(CONFIG)
    assert alexnet_jax.get_config('mine.py').seed == 'own'
    assert alexnet_jax.get_config(f'{tmp_path}/mine.py:other').seed == 'other'


def test_existing_path_wins_and_is_reported(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'paper').write_text(CONFIG)
    with caplog.at_level('INFO'):
        assert alexnet_jax.get_config('paper').seed == 'own'
    assert 'Using the file paper in this folder' in caplog.text


def test_colons_frozen_configs_and_errors_in_a_config(tmp_path):
    (tmp_path / 'a:b').mkdir()
    (tmp_path / 'a:b' / 'mine.py').write_text(CONFIG.replace('ConfigDict(', 'FrozenConfigDict(').replace(
        'import ConfigDict', 'import FrozenConfigDict'))  # fmt: skip
    config = alexnet_jax.get_config(f'{tmp_path}/a:b/mine.py')
    config.seed = 'changed'


def test_error_inside_a_config_names_its_file(tmp_path):
    (tmp_path / 'bad.py').write_text("def get_config():\n    return int('x')\n")
    with pytest.raises(UserError, match=r"bad.py': invalid literal for int\(\)"):
        alexnet_jax.get_config(f'{tmp_path}/bad.py')


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('papr', "no config file 'papr'. Did you mean 'paper'"),
        ('configs/paper.py', "no config file 'configs/paper.py'. Did you mean 'paper'"),
        ('caffe:x', "'caffe': unknown variant 'x'; expected 'net=alexnet'"),
        ('tiny_imagenet:x', "'tiny_imagenet' has no variants; remove ':x'"),
        ('cifar10:x', "'cifar10': unknown variant 'x'; expected one of 80sec"),
    ],
)
def test_unknown_configs_are_refused(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        alexnet_jax.get_config(name)


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """A folder with the package as installed from a wheel."""
    folder = tmp_path_factory.mktemp('wheel')
    tree, site = folder / 'tree', folder / 'site'
    tree.mkdir()
    for name in ('alexnet_jax', 'configs'):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, '-m', 'pip', '-q', 'install', '--no-deps', '--no-build-isolation', f'--target={site}']
    subprocess.run([*pip, str(tree)], check=True, cwd=folder)
    shutil.rmtree(tree)
    return site


@pytest.mark.slow
def test_wheel_contains_every_package_and_its_files(installed):
    def files(folder):
        kinds = ('.py', '.tsv', '.html', '.js', '.typed')
        return {path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.suffix in kinds}

    expected = files(ROOT / 'alexnet_jax') | {f'configs/{name}' for name in files(ROOT / 'configs')}
    assert files(installed / 'alexnet_jax') == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ('words', 'expected'),
    [
        (('train', '--summary', '--config=paper'), '60,965,224'),
        (('train', '--summary', '--config=paper:init=authors', '--config.model.layers.conv4.groups=1'), '61,628,776'),
        (('train', '--summary', '--config=ablations:one_gpu'), '59,798,312'),
        (('train', '--summary', '--config=cifar10:80sec'), 'conv3'),
        (('finetune', '--input=nothing', '--output=out'), "input 'nothing' does not exist"),
        (('experiments', 'ablations', '--data=nothing', '--output=out'), "input 'nothing' does not exist"),
    ],
)
def test_wheel_finds_configs_by_name(words, expected, installed, tmp_path):
    code = (
        'import os, sys, alexnet_jax; assert alexnet_jax.__file__.startswith(os.environ["PYTHONPATH"]); '
        'from alexnet_jax.__main__ import main; main()'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, *words],
        cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(installed)}, capture_output=True, text=True,
    )  # fmt: skip
    assert expected in done.stdout + done.stderr, done
