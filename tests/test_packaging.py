"""The version, the files of the wheel and of the source distribution, and deprecation warnings as errors."""

import re
import subprocess
import sys
import tarfile
import warnings
import zipfile

import pytest
import yaml

import alexnet_jax
from tests import ROOT


def test_citation_and_changelog_have_the_version_of_the_package():
    assert yaml.safe_load((ROOT / 'CITATION.cff').read_text())['version'] == alexnet_jax.__version__
    latest = re.search(r'^## \[(\d.*?)\]', (ROOT / 'CHANGELOG.md').read_text(), re.M)
    assert latest[1] == alexnet_jax.__version__


@pytest.mark.slow
def test_distributions_hold_the_package_and_configs_only(tmp_path):
    pytest.importorskip('build', reason="needs pip install -e '.[lint]'")
    pytest.importorskip('twine', reason="needs pip install -e '.[lint]'")
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = [name for name in listed.split('\0') if (ROOT / name).is_file()]
    for name in tracked:  # a copy, because setuptools adds what earlier builds left in the folder
        path = tmp_path / 'source' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((ROOT / name).read_bytes())
    full_name = f'alexnet_jax-{alexnet_jax.__version__}'
    files = [tmp_path / f'{full_name}-py3-none-any.whl', tmp_path / f'{full_name}.tar.gz']
    for command in (
        ['build', '--no-isolation', f'--outdir={tmp_path}', tmp_path / 'source'],
        ['twine', 'check', '--strict', *files],
    ):
        done = subprocess.run([sys.executable, '-m', *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(files[0]) as wheel:
        in_wheel = {name for name in wheel.namelist() if not name.startswith(f'{full_name}.dist-info/')}
    with tarfile.open(files[1]) as sdist:
        in_sdist = {info.name.removeprefix(f'{full_name}/') for info in sdist if info.isfile()}
    package = {name for name in tracked if name.startswith('alexnet_jax/')}
    configs = {name for name in tracked if name.startswith('configs/')}
    assert in_wheel == package | {f'alexnet_jax/{name}' for name in configs}
    generated = {name for name in in_sdist if name.startswith('alexnet_jax.egg-info/')} | {'PKG-INFO', 'setup.cfg'}
    others = {'LICENSE', 'MANIFEST.in', 'README.md', 'pyproject.toml'}
    assert in_sdist - generated == package | configs | others


CATEGORIES = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


@pytest.mark.parametrize('category', CATEGORIES)
@pytest.mark.parametrize('module', ['alexnet_jax', 'alexnet_jax.core.model', 'tests.helpers', '<run_path>'])
def test_deprecations_in_this_repository_are_errors(module, category):
    with pytest.raises(category):
        warnings.warn_explicit('old', category, 'file.py', 1, module)


@pytest.mark.parametrize('category', CATEGORIES[:2])
def test_deprecations_between_libraries_are_ignored(category):
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn_explicit('old', category, 'file.py', 1, 'orbax.checkpoint')
    assert not caught
