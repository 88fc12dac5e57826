"""Where things are. Of the commands that tests start, those that read a config of `tests` import this, not conftest."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / 'shared' / 'data'
