"""Runs the cells of the notebooks as programs and checks their output."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tests import ROOT

NAMES = ('tour', 'two_towers', 'edges_parts_objects', 'own_experiment')
TOUR, TOWERS, PARTS, OWN = (ROOT / 'docs' / 'notebooks' / f'{name}.ipynb' for name in NAMES)


def _run(path, tmp_path):
    """Runs the code cells of a notebook. Returns what they print, with the value of the last expression of each."""
    program = 'import ast\n'
    for cell in json.loads(path.read_text())['cells']:
        if cell['cell_type'] == 'code':
            program += f'tree = ast.parse({"".join(cell["source"])!r})\n'
            program += 'shown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None\n'
            program += "exec(compile(tree, 'cell', 'exec'))\n"
            program += "if shown: print(eval(compile(ast.Expression(shown.value), 'cell', 'eval')))\n"
    done = subprocess.run(
        [sys.executable, '-c', program],
        cwd=path.parent,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'TMPDIR': str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_tour_runs(tmp_path):
    said = _run(TOUR, tmp_path)
    assert '60,965,224' in said and "'all-gather': (4," in said
    towers, update = (float(found) for found in re.findall(r'largest difference (\S+)', said))
    assert towers < 1e-4 and update < 1e-8
    assert float(re.search(r'top-1 error (\S+)% of 360 images\n', said)[1]) < 15
    assert (tmp_path / 'alexnet_jax_tour' / 'figures' / 'kernels.png').exists()


@pytest.mark.slow
def test_two_towers_runs(tmp_path):
    """Each tower alone is worse than both, and exchanged towers are worst."""
    said = _run(TOWERS, tmp_path)
    whole = float(re.search(r'top-1 error (\S+)% of 360 images\n', said)[1])
    assert whole < 25 and float(re.search(r'largest difference (\S+)', said)[1]) < 1e-3
    alone = [float(error) for pair in re.findall(r'^conv\d +(\S+)% +(\S+)%$', said, re.M) for error in pair]
    exchanged = [float(error) for error in re.findall(r'^conv\d, towers exchanged: top-1 error (\S+)%', said, re.M)]
    assert len(alone) == 10 and len(exchanged) == 2
    assert min(alone) >= whole and min(exchanged) > 60
    assert len(re.findall('between the towers 0', said)) == 7


@pytest.mark.full
def test_edges_parts_objects_runs(tmp_path):
    """Classes are more alike in fc 6 than in the pixels, and there as much as is possible."""
    said = _run(PARTS, tmp_path)
    assert float(re.search(r'top-1 error (\S+)% of 360 images\n', said)[1]) < 5
    layers = re.findall(r'^(pixels|conv\d|fc\d) +\S+% +(\S+)$', said, re.M)
    correlation = {name: float(value) for name, value in layers}
    highest = float(re.search(r'highest possible +(\S+)', said)[1])
    assert len(correlation) == 9 and 0.5 < highest < 0.55  # sqrt(3 p (1 - p)) for p = 1 / 10 of the pairs
    assert correlation['pixels'] < 0.45 < highest - 0.03 < correlation['fc6'] <= highest
    assert len(re.findall(r'^conv\d: \d+ x \d+ pixels', said, re.M)) == 4


@pytest.mark.full
def test_own_experiment_runs(tmp_path):
    """Networks recognize the images that they were trained on; blurred training helps with blurred images."""
    said = _run(OWN, tmp_path)
    found = re.findall(r'^(.*), seed \d: sharp (\S+)%, blur 2 (\S+)%$', said, re.M)
    means = {arm: np.mean([list(map(float, row[1:])) for row in found if row[0] == arm], axis=0) for arm, *_ in found}
    assert len(found) == 9 and len(means) == 3
    assert means['always sharp'][0] < 10 and means['always sharp'][0] < means['blurred at first'][0]
    assert means['always blurred'][1] < means['always sharp'][1]


@pytest.mark.parametrize(('path', 'shown'), [(TOUR, 3), (TOWERS, 1), (PARTS, 8), (OWN, 2)])
def test_notebook_is_stored_with_its_outputs(path, shown):
    """The outputs are from one run of all cells in order, and contain no paths of the machine."""
    cells = json.loads(path.read_text())['cells']
    code = [cell for cell in cells if cell['cell_type'] == 'code']
    assert [cell['execution_count'] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell['outputs'] for cell in code)
    assert not any(output['output_type'] == 'error' for cell in code for output in cell['outputs'])
    pictures = [output for cell in code for output in cell['outputs'] if 'image/png' in output.get('data', {})]
    assert len(pictures) == shown
    assert len({cell['id'] for cell in cells}) == len(cells)
    assert not re.search('/(tmp|home|root|work|Users)/', path.read_text())
