"""The notebook, cell by cell, as a program of its own; what it prints is what it says."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests import ROOT

PATH = ROOT / 'notebooks' / 'tour.ipynb'


def _cells():
    return [''.join(cell['source']) for cell in json.loads(PATH.read_text())['cells'] if cell['cell_type'] == 'code']


@pytest.mark.slow
def test_the_tour_runs_from_its_first_cell_to_its_last(tmp_path):
    # The last expression of a cell is what a notebook shows.
    program = 'import ast\n'
    for cell in _cells():
        program += (
            f'tree = ast.parse({cell!r})\nshown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None\n'
        )
        program += "exec(compile(tree, 'cell', 'exec'))\n"
        program += "if shown: print(eval(compile(ast.Expression(shown.value), 'cell', 'eval')))\n"
    done = subprocess.run(
        [sys.executable, '-c', program],
        cwd=PATH.parent,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'TMPDIR': str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout
    assert '60,965,224' in said and "'all-gather': (4," in said
    towers, update = (float(found) for found in re.findall(r'largest difference (\S+)', said))
    assert towers < 1e-4 and update < 1e-8
    assert float(re.search(r'top-1 error (\S+)% of 360 images\n', said)[1]) < 15
    assert (tmp_path / 'alexnet_jax_tour' / 'figures' / 'kernels.png').exists()


def test_the_notebook_is_committed_without_what_it_showed():
    cells = json.loads(PATH.read_text())['cells']
    assert all(not cell.get('outputs') and not cell.get('execution_count') for cell in cells)
    assert len({cell['id'] for cell in cells}) == len(cells)
