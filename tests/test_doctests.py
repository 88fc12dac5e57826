"""The examples in docstrings give the results that they show, and the code of the gallery draws its pictures."""

import doctest
import importlib
import inspect
import re

import pytest

from alexnet_jax.experiments import figures, picture_plots, tables
from tests import ROOT, helpers

PACKAGE = ROOT / 'alexnet_jax'
SOURCES = {path: text for path in sorted(PACKAGE.rglob('*.py')) if '>>> ' in (text := path.read_text())}


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_examples_of_a_module(path):
    module = importlib.import_module('.'.join(path.relative_to(ROOT).with_suffix('').parts))
    tests = doctest.DocTestFinder().find(module)
    # The finder leaves out objects that a decorator has wrapped.
    assert sum(len(test.examples) for test in tests) == SOURCES[path].count('>>> ')
    runner = doctest.DocTestRunner()
    output = []
    for test in tests:
        runner.run(test, out=output.append)
    assert not runner.failures, ''.join(output)


def test_docstrings_have_examples():
    assert sum(text.count('>>> ') for text in SOURCES.values()) >= 40


def test_gallery_shows_every_figure():
    text = (ROOT / 'docs' / 'gallery.md').read_text()
    names = {'error', 'loss', 'gradient_norms', 'update_norms', *tables._CAPTIONS}
    for module in (figures, picture_plots):
        names |= set(re.findall(r"^ +yield '(\w+)'", inspect.getsource(module), re.M))
    assert len(names) > 15 and {name for name in names if f'`{name}`' not in text} == set()


@pytest.fixture
def run_page(tmp_path, monkeypatch):
    """Runs the Python code of a page with an untrained network; returns the variables."""
    monkeypatch.chdir(tmp_path)
    helpers.save_untrained('runs/quickstart')

    def run(page):
        names = {}
        for block in re.findall(r'^```python\n(.*?)^```', (ROOT / 'docs' / page).read_text(), re.S | re.M):
            exec(block, names)
        return names

    return run


def test_code_of_the_tutorial_runs(run_page):
    names = run_page('tutorial.md')
    assert names['probabilities'].shape == (4, 10) and names['maps'].keys() == {'conv1', 'conv5'}


@pytest.mark.slow
def test_code_of_the_gallery_draws_its_pictures(run_page, tmp_path):
    run_page('gallery.md')
    assert {path.name for path in (tmp_path / 'figures').glob('*.png')} == {'maps.png', 'gradients.png', 'rdm.png'}
