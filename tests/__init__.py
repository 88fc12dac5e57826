"""Paths of the repository and of the shared data.

Config files in `tests`, which commands load, import this module instead of conftest.
"""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / 'shared' / 'data'
