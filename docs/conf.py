"""Sphinx: `python -m sphinx -W docs build/site` builds the documentation site. Needs `pip install -e '.[docs]'`."""

import itertools
import re

import alexnet_jax

project = 'alexnet_jax'
author = 'The alexnet_jax authors'
release = alexnet_jax.__version__

extensions = [
    'myst_nb',
    'sphinx.ext.autodoc',
    'sphinx.ext.autosummary',
    'sphinx.ext.napoleon',
    'sphinx_copybutton',
]
exclude_patterns = ['results']
templates_path = ['templates']

# The notebooks are shown as they were run; tests run them again.
nb_execution_mode = 'off'
myst_heading_anchors = 4

autosummary_generate = True
autodoc_member_order = 'bysource'
autodoc_mock_imports = ['torch']
napoleon_use_param = False  # else `a, b: text` is read as an argument b of type a
python_maximum_signature_line_length = 88
default_role = 'code'  # docstrings have `names` in single backticks, as Markdown has them
suppress_warnings = ['ref.python']  # two classes have a field `bytes`

html_theme = 'sphinx_book_theme'
html_title = 'alexnet_jax'
html_theme_options = {
    'show_toc_level': 2,
    'home_page_in_toc': True,
    'collapse_navigation': True,
    'navbar_persistent': [],
}


ARGUMENT = re.compile(r'[a-z]\w*(, \w+)*: ')
MARKUP = re.compile(r'(`[^`]*`|^ *[*]{1,2}\w+:)|([*|])')  # * and | outside code


def to_rst(app, what, name, obj, options, lines):
    """Translates a docstring of this package: commands are indented, an argument is a line `name: text`."""
    found = []
    for blank, group in itertools.groupby(lines, key=lambda line: not line.strip()):
        paragraph = list(group)
        if blank or paragraph[0].startswith('>>> '):
            found += paragraph
        elif paragraph[0].startswith('    ') and (not found or any(re.match(r'\S', line) for line in found[-2:])):
            found += ['::', '', *paragraph]
        elif ARGUMENT.match(paragraph[0]) and what != 'module':
            found += ['Args:', *(('  ' if ARGUMENT.match(line) else '    ') + line for line in paragraph)]
        else:
            found += [MARKUP.sub(lambda part: part[1] or '\\' + part[2], line) for line in paragraph]
    lines[:] = found


def setup(app):
    app.connect('autodoc-process-docstring', to_rst, priority=400)  # before napoleon
