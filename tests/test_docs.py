"""What the documentation names exists."""

import ast
import functools
import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest

from alexnet_jax.__main__ import COMMANDS
from tests import ROOT, SHARED_DATA
from tests.test_tune import write_pictures

CHECKLIST = ROOT / 'docs' / 'paper.md'
STATES = ('holds', 'measured', 'needs ImageNet', 'not built')


def _rows():
    rows = [line.strip('|').split('|') for line in CHECKLIST.read_text().splitlines() if line.startswith('|')]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if row[0].strip(' -') not in ('id', '')}


@functools.cache
def _names(path):
    """What a file defines at its top, and the fields of its classes."""
    found = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        targets = getattr(node, 'targets', [getattr(node, 'target', None)])
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
        found |= {node.name} if hasattr(node, 'name') else set()
    return found


def _exists(token):
    """Whether a word in backticks is a test, a name, a config, a command or a key that there is."""
    config = runpy.run_path(str(ROOT / 'configs' / 'paper.py'))['get_config']()
    if found := re.fullmatch(r'(tests/\w+\.py)::(\w+)', token):
        return (ROOT / found[1]).is_file() and found[2] in _names(found[1])
    if found := re.fullmatch(r'(alexnet_jax/\w+\.py):(\w+)', token):
        return (ROOT / found[1]).is_file() and found[2] in _names(found[1])
    if found := re.fullmatch(r'(configs/\w+\.py)(?::(.+))?', token):
        return bool(runpy.run_path(str(ROOT / found[1]))['get_config'](*([found[2]] if found[2] else [])))
    if found := re.fullmatch(r'python -m alexnet_jax\.(\w+)(.*)', token):
        source = ''.join((ROOT / 'alexnet_jax' / f'{name}.py').read_text() for name in (found[1], 'cli'))
        flags = re.findall(r'--(\w+)', found[2])
        return found[1] in COMMANDS and all(
            re.search(rf"(?:DEFINE_\w+|define_config)\(\s*'{flag}'", source) for flag in flags
        )
    section, _, key = token.rpartition('.')
    return key in (config[section] if section in config else config if not section else ())


def test_everything_mentioned_exists():
    tokens = set(re.findall(r'`([^`]+)`', CHECKLIST.read_text()))
    assert len(tokens) > 80
    missing = sorted(token for token in tokens if not _exists(token))
    assert not missing


def _commands(text):
    """Lines of code blocks that start a command of ours, as words."""
    for block in re.findall(r'^```\w*\n(.*?)^```', text, re.S | re.M):
        for line in block.replace('\\\n', ' ').splitlines():
            if found := re.search(r'(?:python -m alexnet_jax\.\w+|launch/(?:local|slurm)\.sh) .*', line):
                yield shlex.split(found[0])


def _unknown(words):
    """What a command names that there is not: itself, an option, a key of the config, a file of configs/."""
    config = runpy.run_path(str(ROOT / 'configs' / 'paper.py'))['get_config']()
    name = words[2].removeprefix('alexnet_jax.') if words[0] == 'python' else 'main'
    if name not in COMMANDS:
        return [name]
    sources = [(ROOT / 'alexnet_jax' / f'{file}.py').read_text() for file in (name, 'cli')]
    defined = {flag for source in sources for flag in re.findall(r"(?:DEFINE_\w+|define_config)\(\s*'(\w+)'", source)}
    missing = []
    for option, value in re.findall(r'^--([\w.]+)(?:=(\S*))?', '\n'.join(words), re.M):
        if option.startswith('config.'):
            section, _, key = option.removeprefix('config.').rpartition('.')
            known = key in (config[section] if section else config)
        else:
            known = option in defined
        if option in ('config', 'base') and value.startswith('configs/'):
            known = known and (ROOT / value.partition(':')[0]).is_file()
        missing += [] if known else [option]
    return missing


@pytest.mark.parametrize('page', ['README.md', *sorted(path.name for path in (ROOT / 'docs').glob('*.md'))])
def test_commands_name_what_there_is(page):
    text = ((ROOT if page == 'README.md' else ROOT / 'docs') / page).read_text()
    commands = list(_commands(text))
    assert len(commands) > 10 or page != 'README.md'
    assert {' '.join(words): _unknown(words) for words in commands if _unknown(words)} == {}


@pytest.mark.parametrize(
    'words',
    ['alexnet_jax.train', 'alexnet_jax.evaluate --view=1', 'alexnet_jax.main --config.optim.nothing=1',
     'alexnet_jax.main --config=configs/papr.py', 'alexnet_jax.main --config.nothing=1'],
)  # fmt: skip
def test_commands_that_name_nothing_are_seen(words):
    assert _unknown(['python', '-m', *words.split()])


@pytest.mark.parametrize('token', ['tests/test_docs.py::test_nothing', 'alexnet_jax/ops.py:tanh', 'configs/papr.py:x',
                                   'python -m alexnet_jax.train', 'python -m alexnet_jax.evaluate --view=1',
                                   'optim.nothing', 'nothing'])  # fmt: skip
def test_what_does_not_exist_is_seen(token):
    try:
        assert not _exists(token)
    except FileNotFoundError:
        pass


def test_every_row_is_whole():
    for name, cells in _rows().items():
        assert len(cells) == 5 and all(cells), name
        _, code, run, shown, state = cells
        assert state.startswith(STATES), name
        if not state.startswith('not built'):
            assert '`' in code and run != '-' and ('::' in shown or shown.startswith('as ')), name


def test_every_statement_of_the_paper_is_there():
    notes = SHARED_DATA.parent / 'reference' / 'paper.md'
    if not notes.exists():
        pytest.skip('needs the numbered statements of the paper, which this machine has not got')
    ids = re.findall(r'^\| (\w[\w.]*) \|', notes.read_text(), flags=re.MULTILINE)
    assert list(_rows()) == [i for i in ids if i != 'id'] and len(ids) > 50


def _blocks(page):
    """(language, lines) of every fenced block."""
    text = (ROOT / 'docs' / page).read_text()
    return [(language, body.splitlines()) for language, body in re.findall(r'^```(\w*)\n(.*?)^```', text, re.S | re.M)]


PAGES = ('imagenet.md', 'two_gpus.md', 'own_pictures.md', 'experiments.md', 'variants.md', 'trouble.md')


@pytest.mark.parametrize('page', PAGES)
def test_a_command_of_a_page_is_run_or_says_what_it_needs(page):
    blocks = _blocks(page)
    assert any(language == 'bash' for language, _ in blocks)
    for language, lines in blocks:
        if language == '' and any(re.match(r'python |launch/|sbatch |kubectl |docker ', line) for line in lines):
            assert lines[0].startswith('# needs ') or '[--' in lines[0], lines  # the second: a synopsis


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """Where a reader stands: in a clone, with pictures, and with ImageNet's archive where this machine has one."""
    monkeypatch.chdir(tmp_path)
    for name in ('configs', 'launch'):
        (tmp_path / name).symlink_to(ROOT / name)
    write_pictures(tmp_path / 'pictures', (3, 8), count=80)
    write_pictures(tmp_path / 'more', (3,), count=2)
    (tmp_path / 'photo.png').write_bytes(next((tmp_path / 'pictures').rglob('*.png')).read_bytes())
    archive = SHARED_DATA / 'ILSVRC2012_img_train.tar'
    if archive.exists():
        (tmp_path / archive.name).symlink_to(archive)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize('page', PAGES)
def test_the_commands_of_a_page_run_as_they_stand(page, desk):
    """Those in ```bash blocks, in their order."""
    commands = [line for language, lines in _blocks(page) if language == 'bash' for line in lines]
    here = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHON': sys.executable}
    for command in commands:
        words = shlex.split(command)
        if missing := [word for word in words if '.tar' in word and not (desk / word.partition('=')[2]).exists()]:
            pytest.skip(f'needs the archive of {missing[0]}, which this machine has not got')
        words = [sys.executable, *words[1:]] if words[0] == 'python' else words
        done = subprocess.run(words, cwd=desk, env=here, capture_output=True, text=True)
        assert done.returncode == 0, f'{command}: {done.stderr[-2000:]}'
