"""Names, commands and links in the documentation exist."""

import ast
import functools
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys

import pytest

import alexnet_jax
from alexnet_jax.__main__ import COMMANDS
from alexnet_jax.experiments import ablations
from tests import ROOT, SHARED_DATA, helpers

CHECKLIST = ROOT / 'docs' / 'paper.md'
ARCHITECTURE = ROOT / 'docs' / 'architecture.md'
EVERY_PAGE = [
    'README.md',
    'CONTRIBUTING.md',
    'CHANGELOG.md',
    *sorted(f'docs/{path.name}' for path in (ROOT / 'docs').glob('*.md')),
]
STATES = ('holds', 'measured', 'needs ImageNet', 'not built')


def _rows():
    rows = [line.strip('|').split('|') for line in CHECKLIST.read_text().splitlines() if line.startswith('|')]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if row[0].strip(' -') not in ('id', '')}


@functools.cache
def _names(path):
    """Returns the top-level names of a file and the members of its classes: 'AlexNet', 'AlexNet.__call__'."""
    names = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        names |= _defined(node)
        if isinstance(node, ast.ClassDef):
            names |= {f'{node.name}.{name}' for part in node.body for name in _defined(part)}
    return names


def _defined(node):
    targets = getattr(node, 'targets', [getattr(node, 'target', None)])
    named = {target.id for target in targets if isinstance(target, ast.Name)}
    return named | ({node.name} if hasattr(node, 'name') else set())


@functools.cache
def _config_exists(name):
    """Returns whether a config exists, such as configs/paper.py:init=authors or configs/large_batch.py:BATCH."""
    path, _, variant = name.partition(':')
    path = str(ROOT / path) if path.endswith('.py') else path
    try:
        alexnet_jax.get_config(f'{path}:{variant}' if variant and not variant.isupper() else path)
    except ValueError:  # raised by a config for an unknown variant
        return False
    return True


@functools.cache
def _paper_config():
    return alexnet_jax.get_config('paper')


def _is_key(name):
    """Returns whether a config key exists, such as 'seed' or 'optim.momentum'."""
    *sections, key = name.split('.')
    config = _paper_config()
    for section in sections:
        config = config.get(section, {})
    return key in config


@functools.cache
def _defined_flags(command, subcommand):
    """Returns the names of a command's flags; None if there is no such subcommand."""
    module = importlib.import_module(f'alexnet_jax.commands.{command}')
    if subcommands := getattr(module, 'SUBCOMMANDS', None):
        module = subcommands.get(subcommand)
    return None if module is None else frozenset(flag.name for flag in module.FLAGS)


@functools.cache
def _variants(suite):
    return frozenset(variant.name for variant in ablations.SUITES[suite](_paper_config()))


def _missing(words):
    """Returns the parts of a command line that do not exist: command, option, config key or file of configs/."""
    if words[0] == 'python':  # python -m alexnet_jax.main, python -m alexnet_jax COMMAND
        words = ['alexnet_jax', 'train', *words[3:]] if words[2] == 'alexnet_jax.main' else words[2:]
    elif words[0].startswith('launch/'):
        words = ['alexnet_jax', 'train', *words[1:]]
    if words[0] != 'alexnet_jax' or words[1] not in COMMANDS:
        return words[:2]
    subcommand = words[2] if len(words) > 2 else ''
    defined = _defined_flags(words[1], subcommand)
    if defined is None:
        return words[2:3]
    missing = []
    for word in words[2:]:
        if not (option := re.fullmatch(r'\[?--([\w.]+)(?:=(.*?))?\]?', word)):  # [--option] in a synopsis
            continue
        name, value = option.groups()
        flag, _, key = name.partition('.')  # --config.KEY and --base.KEY
        known = _is_key(key) if key and flag in (*defined, 'config') else name in defined
        if name in ('config', 'base') and re.fullmatch(r'[\w/.]+(:\S+)?', value) and not value.isupper():
            known = known and _config_exists(value)
        if name == 'only':  # names of the suite's variants
            known = known and not set(value.split(',')) - _variants(subcommand)
        missing += [] if known else [name]
    return missing


def _exists(token):
    """Returns whether the name in backticks exists; None if it is not a name of a checked kind."""
    if found := re.fullmatch(r'(tests/[\w/]+\.py)::(\w+)', token):
        return (ROOT / found[1]).is_file() and found[2] in _names(found[1])
    if found := re.fullmatch(r'((?:alexnet_jax|tests)/[\w/]+\.py)(?::([\w.]+))?', token):
        return (ROOT / found[1]).is_file() and (not found[2] or found[2] in _names(found[1]))
    if re.fullmatch(r'configs/\w+\.py(:\S+)?', token):
        return _config_exists(token)
    if re.fullmatch(r'(docs|launch)/[\w/]+\.\w+', token):
        return (ROOT / token).is_file()
    if re.match(r'(python -m )?alexnet_jax [a-z]|python -m alexnet_jax\.', token):
        return not _missing(shlex.split(token))
    if found := re.fullmatch(r'(alexnet_jax(?:\.\w+)+)(?:\(.*\))?', token):
        return _is_importable(found[1])
    if re.fullmatch(r'(seed|batch_size|\w+_steps|(data|model|mesh|optim)\.[a-z]\w*)', token):
        return _is_key(token)
    return None


def _is_importable(name):
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def _tokens(text):
    """Returns the words in backticks outside code blocks."""
    return set(re.findall(r'`([^`\n]+)`', re.sub(r'^```.*?^```', '', text, flags=re.S | re.M)))


def test_rows_of_inputs_name_their_tests():
    lines = (ROOT / 'docs' / 'inputs.md').read_text().splitlines()
    cells = [line.split(' | ')[-1] for line in lines if line.startswith('| ') and 'shown by' not in line]
    named = [re.findall(r'test_\w+(?=`)', cell) for cell in cells]
    sources = ''.join(path.read_text() for path in (ROOT / 'tests').rglob('test_*.py'))
    assert len(cells) > 100
    assert {name for names in named for name in names} <= set(re.findall(r'^def (test_\w+)', sources, re.M))
    assert all(names or cell == 'the same |' for cell, names in zip(cells, named, strict=True))


def test_names_in_the_checklist_exist():
    tokens = _tokens(CHECKLIST.read_text())
    assert len(tokens) > 80
    assert not sorted(token for token in tokens if not (_exists(token) or _is_key(token)))


@pytest.mark.parametrize('page', EVERY_PAGE)
def test_names_on_every_page_exist(page):
    assert not sorted(token for token in _tokens((ROOT / page).read_text()) if _exists(token) is False)


def _commands(text):
    """Yields the words of each line in a code block that starts a command of the package."""
    ours = r'python -m alexnet_jax\S*|(?<![\w./-])alexnet_jax(?= [a-z])|launch/(?:local|slurm)\.sh'
    for language, block in re.findall(r'^```(\w*)\n(.*?)^```', text, re.S | re.M):
        for line in block.replace('\\\n', ' ').splitlines() if language != 'python' else ():
            if found := re.search(rf'(?:{ours}) .*', line):
                yield shlex.split(found[0])


@pytest.mark.parametrize('page', EVERY_PAGE)
def test_commands_and_options_exist(page):
    commands = list(_commands((ROOT / page).read_text()))
    assert {' '.join(words): _missing(words) for words in commands if _missing(words)} == {}


def test_pages_contain_commands():
    assert sum(len(list(_commands((ROOT / page).read_text()))) for page in EVERY_PAGE) > 60


def _headings(path):
    """Returns the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r'^```.*?^```', '', path.read_text(), flags=re.S | re.M)
    titles = re.findall(r'^#+ (.+)$', text, re.M)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


def _broken_links(path, text):
    """Returns relative links that lead to no file or to no heading of a page."""
    broken = []
    for link in re.findall(r'\]\(([^)\s]+)\)', re.sub(r'^```.*?^```', '', text, flags=re.S | re.M)):
        file, _, anchor = link.partition('#')
        target = path.parent / file if file else path
        if '://' not in link and not (target.exists() and (not anchor or anchor in _headings(target))):
            broken.append(link)
    return broken


@pytest.mark.parametrize('page', EVERY_PAGE)
def test_links_resolve(page):
    assert not _broken_links(ROOT / page, (ROOT / page).read_text())


def test_links_of_the_notebook_resolve():
    path = ROOT / 'docs' / 'notebooks' / 'tour.ipynb'
    cells = [cell for cell in json.loads(path.read_text())['cells'] if cell['cell_type'] == 'markdown']
    assert not _broken_links(path, '\n'.join(''.join(cell['source']) for cell in cells))


@pytest.mark.parametrize('link', ['nothing.md', 'img/nothing.png', 'variants.md#nothing', '#nothing', 'docs/paper.md'])
def test_broken_link_is_detected(link):
    assert _broken_links(ROOT / 'docs' / 'index.md', f'See [this]({link}).') == [link]


def test_index_lists_every_page():
    links = set(re.findall(r'\]\((\w+\.md)\)', (ROOT / 'docs' / 'index.md').read_text()))
    assert links == {path.name for path in (ROOT / 'docs').glob('*.md')} - {'index.md'}


def test_readme_is_short_and_starts_with_commands():
    text = (ROOT / 'README.md').read_text()
    assert len(text.splitlines()) <= 160
    # Required by .ci/run.
    assert all(body.count('\n') == 1 for body in re.findall(r'^```bash\n(.*?)^```', text, re.S | re.M)[:2])


@pytest.mark.parametrize(
    'line',
    [
        'alexnet_jax main --config=configs/paper.py',
        'python -m alexnet_jax main --config=configs/paper.py',
        'python -m alexnet_jax.evaluate --checkpoint=runs/paper',
        '.venv/bin/python -m alexnet_jax.main --config.optim.nothing=1',
        'alexnet_jax evaluate --view=1',
        'alexnet_jax train --config.nothing=1',
        'alexnet_jax train --config.nothing.seed=1',
        'alexnet_jax train --config=configs/papr.py',
        'alexnet_jax train --config=configs/paper.py:init=nothing',
        'alexnet_jax benchmark speed',
        'alexnet_jax benchmark prepare --against=torch',
        'alexnet_jax experiments figure1 [--basis=configs/paper.py]',
        'alexnet_jax experiments ablations --base.optim.nothing=1',
        "alexnet_jax experiments ablations --only='no normalization,no overlap'",
        'alexnet_jax train --base.seed=1',
        'launch/local.sh 2 --configs=configs/paper.py',
    ],
)
def test_unknown_commands_are_detected(line):
    (words,) = _commands(f'Text.\n\n```bash\n{line}\n```\n')
    assert _missing(words)


@pytest.mark.parametrize(
    'line',
    [
        'alexnet_jax train --config=configs/paper.py:init=authors --config.optim.momentum=0.5',
        'python -m alexnet_jax.main --config=configs/paper.py',
        'python -m alexnet_jax evaluate --views=10',
        'alexnet_jax benchmark step --against=torch [--repeats=5]',
        'launch/slurm.sh --config=configs/large_batch.py:8192',
    ],
)
def test_known_commands_are_accepted(line):
    (words,) = _commands(f'```\n{line}\n```\n')
    assert not _missing(words)


@pytest.mark.parametrize(
    'token',
    [
        'tests/test_docs.py::test_nothing',
        'tests/test_nothing.py',
        'alexnet_jax/core/ops.py:tanh',
        'alexnet_jax/ops.py:conv',
        'alexnet_jax/core/model.py:AlexNet.nothing',
        'alexnet_jax/nothing/ops.py',
        'alexnet_jax.nothing',
        'alexnet_jax.core.ops.tanh(x)',
        'configs/papr.py',
        'configs/paper.py:nothing',
        'docs/nothing.md',
        'python -m alexnet_jax.train',
        'alexnet_jax evaluate --view=1',
        'optim.nothing',
    ],
)
def test_missing_names_are_detected(token):
    assert _exists(token) is False


@pytest.mark.parametrize('token', ['nothing', 'data.', 'nothing.seed'])
def test_unknown_keys_are_detected(token):
    assert not _is_key(token)


def _modules():
    """Returns the paths of all modules that are not empty, relative to the package."""
    paths = (ROOT / 'alexnet_jax').rglob('*.py')
    return {path.relative_to(ROOT / 'alexnet_jax').as_posix() for path in paths if path.stat().st_size}


def _map_problems(text):
    """Returns errors of the module map: modules without exactly one row, and unknown names."""
    cells = re.findall(r'^\| (`[\w/]+\.py`(?:, `[\w/]+\.py`)*) \| .+ \|$', text, re.M)
    rows = re.findall(r'`(.+?)`', ' '.join(cells))
    problems = [f'{name}: {rows.count(name)} rows' for name in _modules() if rows.count(name) != 1]
    for token in _tokens(text):
        if re.fullmatch(r'[\w/]+\.py(:[\w.]+)?', token):
            folder = '' if re.match('(configs|tests)/', token) else 'alexnet_jax/'
            if not _exists(f'{folder}{token}'):
                problems.append(f'{token}: there is none')
    return problems


def test_architecture_page_lists_every_module():
    assert not _map_problems(ARCHITECTURE.read_text())


@pytest.mark.parametrize(
    ('old', 'new'),
    [
        ('| `core/ops.py` |', '| |'),
        ('| `core/ops.py` |', '| `core/operations.py` |'),
        ('| `core/ops.py` |', '| `core/pooling.py` |'),
        ('`core/ops.py`', '`ops.py`'),
        ('\n## ', '\n`core/ops.py:nothing`\n## '),
        ('\n## ', '\n`configs/papr.py`\n## '),
    ],
    ids=['no row', 'wrong row', 'another row', 'no folder', 'unknown name', 'unknown config'],
)
def test_errors_in_the_module_map_are_detected(old, new):
    text = ARCHITECTURE.read_text()
    assert old in text and _map_problems(text.replace(old, new, 1))


def test_checklist_rows_are_complete():
    for name, cells in _rows().items():
        assert len(cells) == 5 and all(cells), name
        _, code, run, shown, state = cells
        assert state.startswith(STATES), name
        if not state.startswith('not built'):
            assert '`' in code and run != '-' and ('::' in shown or shown.startswith('as ')), name


def test_checklist_has_every_statement_of_the_paper():
    notes = SHARED_DATA.parent / 'reference' / 'paper.md'
    if not notes.exists():
        pytest.skip('needs the numbered statements of the paper, which this machine has not got')
    ids = re.findall(r'^\| (\w[\w.]*) \|', notes.read_text(), flags=re.MULTILINE)
    assert list(_rows()) == [i for i in ids if i != 'id'] and len(ids) > 50


def _blocks(page):
    """Returns (language, lines) of every fenced block."""
    text = (ROOT / 'docs' / page).read_text()
    return [(language, body.splitlines()) for language, body in re.findall(r'^```(\w*)\n(.*?)^```', text, re.S | re.M)]


def _bash_lines(page):
    return [line for language, lines in _blocks(page) if language == 'bash' for line in lines]


PAGES = (
    'imagenet.md', 'two_gpus.md', 'own_pictures.md', 'experiments.md', 'variants.md', 'trouble.md', 'weights.md',
    'configuration.md', 'inside.md', 'tutorial.md',
)  # fmt: skip


@pytest.mark.parametrize('page', PAGES)
def test_commands_are_run_or_state_requirements(page):
    blocks = _blocks(page)
    assert any(language == 'bash' for language, _ in blocks)
    for language, lines in blocks:
        if language == '' and any(
            re.match(r'python |alexnet_jax |launch/|sbatch |kubectl |docker ', line) for line in lines
        ):
            assert lines[0].startswith('# needs ') or '[--' in lines[0], lines  # the second case is a synopsis


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder like a clone, with images, and with ImageNet's archive if this machine has it."""
    monkeypatch.chdir(tmp_path)
    for name in ('configs', 'launch'):
        (tmp_path / name).symlink_to(ROOT / name)
    helpers.write_pictures(tmp_path / 'pictures', (3, 8), count=80)
    helpers.write_pictures(tmp_path / 'more', (3,), count=2)
    (tmp_path / 'photo.png').write_bytes(next((tmp_path / 'pictures').rglob('*.png')).read_bytes())
    archive = SHARED_DATA / 'ILSVRC2012_img_train.tar'
    if archive.exists():
        (tmp_path / archive.name).symlink_to(archive)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize('page', PAGES)
def test_commands_of_a_page_run(page, clone):
    """Runs the commands in ```bash blocks, in order; of the tutorial, those that no other page has, with 60 updates."""
    commands = _bash_lines(page)
    if page == 'tutorial.md':
        others = {line for other in PAGES if other != page for line in _bash_lines(other)}
        commands = [line + ' --config.num_steps=60' * (' train ' in line) for line in commands if line not in others]
        assert 0 < len(commands) < len(_bash_lines(page)) - 4
    here = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHON': sys.executable}
    for command in commands:
        words = shlex.split(command)
        if missing := [word for word in words if '.tar' in word and not (clone / word.partition('=')[2]).exists()]:
            pytest.skip(f'needs the archive of {missing[0]}, which this machine has not got')
        words = [sys.executable, '-m', *words] if words[0] == 'alexnet_jax' else words
        done = subprocess.run(words, cwd=clone, env=here, capture_output=True, text=True)
        assert done.returncode == 0, f'{command}: {done.stderr[-2000:]}'


def _tables():
    spec = importlib.util.spec_from_file_location('tables', ROOT / 'docs' / 'tables.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_tables_are_up_to_date():
    """`python docs/tables.py` changes nothing, every table has its files, and every result is in a table."""
    pages = {path.name: path.read_text() for path in (ROOT / 'docs').glob('*.md')}
    assert {name: _tables().render(page) for name, page in pages.items()} == pages
    results = ROOT / 'docs' / 'results'
    patterns = re.findall(r'<!-- table: (\S+) ', '\n'.join(pages.values()))
    assert {path.name for name in patterns for path in results.glob(name)} == {p.name for p in results.glob('*.json')}


def test_table_without_a_file_is_refused():
    with pytest.raises(ValueError, match='table: nothing_.*json step -->: there is no such file'):
        _tables().render('<!-- table: nothing_*.json step -->\n<!-- end -->\n')


def _beside_generated(page):
    """Returns the header of every table of rates that is written by hand in a section with a generated table."""
    sections = re.split(r'^#+ .*$', page, flags=re.M)
    texts = [re.sub(r'<!-- table: .*?<!-- end -->', '', text, flags=re.S) for text in sections if '<!-- table' in text]
    return re.findall(r'^\|(?=.*(?:images/s|ratio)).*\|$(?=\n\| ?-)', '\n'.join(texts), re.M)


def test_rates_are_not_written_by_hand_beside_generated_ones():
    for page in (ROOT / 'docs').glob('*.md'):
        assert not _beside_generated(page.read_text()), page.name
    by_hand = '\n| network | images/s |\n|---|---|\n| paper | 20 |\n'
    generated = '\n<!-- table: a.json step -->\n| ratio |\n| --- |\n<!-- end -->\n'
    assert _beside_generated(f'## A\n{generated}{by_hand}') == ['| network | images/s |']
    assert _beside_generated(f'## A\n{generated}\n## B\n{by_hand}') == []


def test_suite_table_has_means_and_differences_by_seed():
    runs = [
        {'variant': name, 'seed': seed, 'diverged': False, 'train_error': 50.0, 'top1_error': error, 'top5_error': 5.0}
        for name, errors in (('base', (20.0, 22.0)), ('other', (21.0, 25.0)))
        for seed, error in enumerate(errors)
    ]
    runs[-1] = {'variant': 'other', 'seed': 1, 'diverged': True}
    rows = _tables().suite([{'runs': runs, 'networks': {'base': '', 'other': 'base'}}])
    assert [list(row.values()) for row in rows] == [
        ['base', '2', '50.00 ± 0.00', '21.00 ± 1.41', '5.00 ± 0.00', ''],
        ['other', '1, 1 diverged', '50.00', '21.00', '5.00', '+1.00'],
    ]


def test_suite_table_compares_what_a_variant_is_about():
    errors = [('base', 5.0, 20.0), ('no weight decay', 8.0, 19.0)]
    runs = [
        {'variant': name, 'seed': 0, 'diverged': False, 'train_error': train, 'top1_error': top1, 'top5_error': 0.0}
        for name, train, top1 in errors
    ]
    result = {'runs': runs, 'networks': {'base': '', 'no weight decay': 'base'}}
    for measures, difference in (({}, '-1.00'), ({'no weight decay': 'train_error'}, '+3.00')):
        assert _tables().suite([{**result, 'measures': measures}])[1]['difference'] == difference


def test_figure1_table_has_ratios_by_seed():
    """A run that does not reach 25% has trained for longer than the epochs it states."""
    cases = [
        ('relu 0.01', 0, 8.0, False), ('relu 0.003', 0, 8.0, True), ('relu 0.003', 1, 5.0, True),
        ('tanh 0.01', 0, 40.0, True), ('tanh 0.01', 1, 20.0, True), ('tanh 0.003', 0, 48.0, True),
    ]  # fmt: skip
    names = ('variant', 'seed', 'epochs', 'reached')
    runs = [{**dict(zip(names, case, strict=True)), 'train_error': 20.0 + case[1]} for case in cases]
    rows = _tables().figure1([{'runs': runs, 'networks': {'relu 0.003': '', 'tanh 0.01': ''}}])
    assert [list(row.values()) for row in rows] == [
        ['relu 0.003', '2 of 2', '6.50 ± 2.12', '20.50 ± 0.71'],
        ['relu 0.01', '0 of 1', 'more than 8', '20.00'],
        ['tanh 0.003', '1 of 1', '48.00', '20.00'],
        ['tanh 0.01', '2 of 2', '30.00 ± 14.14', '20.50 ± 0.71'],
        ['**tanh / ReLU, each with its own rate**', '2', '4.50 ± 0.71', '6'],
        ['tanh / ReLU, both with 0.003', '1', '6.00', '6'],
    ]


def _measured(**rates):
    return {name: {'median': sorted(values)[1], 'measurements': values} for name, values in rates.items()}


def _record(mode, words, **results):
    environment = {
        'machine': {'cpu': 'EPYC', 'cores': 2, 'memory_gib': 23.5}, 'devices': ['cpu:0 cpu'], 'commit': 'f' * 40,
        'versions': {'jax': '1.2', 'torch': '3.4'}, 'date': '2026-11-27', 'n': 3,
    }  # fmt: skip
    command = f'alexnet_jax benchmark {mode} --config=paper {words}'
    return {'mode': mode, 'command': command, 'config': 'paper', 'batch_size': 128, **environment, **results}


@pytest.fixture
def rendered(tmp_path):
    """Returns a function that renders the table of a kind over files of records, as lists of cells."""
    tables = _tables()
    tables.DOCS = tmp_path
    (tmp_path / 'results').mkdir()

    def render(kind, *records):
        for number, record in enumerate(records):
            (tmp_path / 'results' / f'a_{number}.json').write_text(json.dumps(record))
        text = tables.render(f'<!-- table: a_*.json {kind} -->\nold\n<!-- end -->\n')
        head, _, *rows, empty, source, _ = text.splitlines()[1:]
        assert not empty
        return [*([cell.strip() for cell in row.split('|')[1:-1]] for row in (head, *rows)), source]

    return render


def test_step_table_has_ratios_and_shares(rendered):
    ours = _measured(alexnet_jax=[30.0, 20.0, 40.0], torch=[10.0, 1500.0, 20.0])
    ours['alexnet_jax']['flops'] = 2e9
    limits = {'float32 product': {'median': 120.0}, 'share': 0.5}
    two = {'alexnet_jax': [4e3, 2e3, 3e3], 'alexnet_jax, alone': [9e3] * 3, 'one device': [2e3] * 3}
    two = _measured(**two)
    two['alexnet_jax']['flops'] = 1e6
    records = [
        _record('step', '--against=torch --repeats=3', images_per_second=ours, limits=limits),
        _record('step', '--cpu_devices=2', images_per_second=two),
        _record('inference', '', images_per_second={}),  # not a step
    ]
    head, first, second, source = rendered('step', *records)
    both = ['alexnet_jax', 'alexnet_jax, alone', 'one device', 'PyTorch']
    assert head == ['network', 'batch', *both, 'ratio', 'GFLOP/s', 'of a product', 'share']
    rates = ['30.0 (20.0 - 40.0)', '', '', '20.0 (10.0 - 1,500.0)']
    assert first == ['paper', '128', *rates, '**1.50**', '60', '120', '50%']
    rates = ['3,000 (2,000 - 4,000)', '9,000 (9,000 - 9,000)', '2,000 (2,000 - 2,000)', '']
    assert second == ['paper, `cpu_devices=2`', '128', *rates, '**1.50**', '3', '', '']
    assert source == 'Measured on EPYC (2 cores, 24 GiB), jax 1.2, torch 3.4, commit ffffffffffff, 2026-11-27, n = 3.'


def test_scaling_tables_have_the_fastest_scheme_and_errors(rendered):
    step = {
        'batch': 256, 'compute_ms': 4.0, 'communication_ms': 0.5, 'images_per_second': 1e3, 'efficiency': 0.5,
        'seconds': 200.0, 'limit': 'latency',
    }  # fmt: skip
    point = {
        'who': 'A', 'machine': 'K', 'devices': 2, 'batch': 128, 'alone': 600.0, 'rate': 1e3, 'scheme': 'hybrid',
        'predicted': {'without overlap': 1100.0}, 'error_percent': {'without overlap': 10.0, 'with overlap': -20.0},
    }  # fmt: skip
    published = {
        'points': [point, {**point, 'alone': None, 'needed': 501.4, 'scheme': 'data'}],
        'mean_error_percent': {'all': {'points': 1, 'without overlap': 10.0, 'with overlap': 20.0}},
    }
    steps = {'1': {'data': step}, '2': {'data': step, 'hybrid': {**step, 'images_per_second': 2e3, 'seconds': 50.0}}}
    record = _record('scaling', '', steps=steps, epochs=90.0, published=published)
    _, one, two, source = rendered('scaling', record)
    assert one == ['1', '256', '**1,000**', '', '', '4.00 + 0.50', '50%', '3.3 min', 'latency']
    assert two == ['2', '256', '1,000', '', '**2,000**', '4.00 + 0.50', '50%', '50 s', 'latency']
    assert source.startswith('Computed with jax 1.2')
    _, first, needed, mean, _ = rendered('published', record)
    assert first == ['A, hybrid', '2 (K)', '128', '1,000', '600', '1,100', '+10.0%', '-20.0%']
    assert needed == ['A', '2 (K)', '128', '1,000', 'not published; needs 501', '', '', '']
    assert mean == ['**mean error, all, 1 points**', '', '', '', '', '', '**10.0%**', '**20.0%**']


def test_communication_table_has_totals(rendered):
    collectives = {'all-gather': [4, 15.54e6], 'all-reduce': [1, 4.9e3]}
    ours = {'alexnet_jax': {'median': 1.0, 'measurements': [1.0], 'collectives': collectives}}
    record = _record('step', '', images_per_second=ours, mesh={'data': 1, 'tower': 2})
    head, row, source = rendered('communication', record)
    assert source == 'Computed with jax 1.2, torch 3.4, commit ffffffffffff, 2026-11-27.'
    assert head == ['mesh', 'all-gather', 'all-reduce', 'per step and device']
    assert row == ['1x2', '4: 15.5 MB', '1: 0.005 MB', '15.5 MB']


def test_compiled_tables_are_ordered_by_size(rendered):
    def record(devices, tower, dense=None):
        facts = {
            'target': f'h200:8x{devices // 8}', 'device': 'NVIDIA H200', 'devices': devices, 'hosts': devices // 8,
            'mesh_shape': {'data': devices // tower, 'tower': tower}, 'bytes': 3 * 2**29, 'memory': 140 * 2**30,
            'layers': {'all': {'flops': 1.234e12}}, 'compile_seconds': 61.4,
            'floor_us': {'compute': 1e3, 'memory': 2e3, 'inside a host': 3.0, 'between hosts': 0.4},
            'collectives': {'all-reduce': [2, 5e6]},
            'links': {'all-reduce': {'inside a host': 2e6, 'between hosts': 5e3}},
        }  # fmt: skip
        mesh = {'data': 0, 'tower': tower, **({'dense': dense} if dense else {})}
        return _record('step', '', compiled=facts, mesh=mesh)

    records = [record(128, 2), record(8, 1, 'split')]
    head, first, second, source = rendered('compiled', *records)
    columns = ['GiB per device', 'TFLOP per device']
    columns += [f'{name}, us' for name in ('compute', 'memory', 'inside a host', 'between hosts')]
    assert head == ['devices', '`--compile_for`', 'mesh', *columns, 'compiled in']
    assert first[:3] == ['8', '`h200:8x1`', '8x1, dense split'] and second[:3] == ['128', '`h200:8x16`', '64x2']
    assert first[3:] == ['1.50 of 140', '1.23', '1,000', '2,000', '3', '0', '61 s']
    assert source.startswith('Computed with jax 1.2')
    *_, row, _ = rendered('compiled_links', *records)
    assert row[3] == '2: 2.0 inside a host + 0.005 between hosts'


def test_inference_and_input_tables_have_their_columns(rendered):
    programs = {'1': _measured(alexnet_jax=[30.0, 20.0, 40.0], torch=[9.0, 7.0, 8.0], openvino=[60.0, 60.0, 60.0])}
    limits = {'1': {'bound': 100.0, 'bound_by': 'dense weights', 'share': 0.3}}
    _, row, *_ = rendered('inference', _record('inference', '', images_per_second=programs, limits=limits))
    assert row[:3] == ['paper', '1', '30.0 (20.0 - 40.0)'] and row[-3:] == ['**0.50**', '100 (dense weights)', '30%']
    stage = {'stage': 'train', 'commands': [{'result': None}, {'result': {'same_bits': True}}]}
    stage['commands'].append(
        {'result': _record('input', '--input=a', images_per_second=_measured(alexnet_jax=[1, 2, 3]))}
    )
    _, row, *_ = rendered('rates', stage)
    assert row == ['`input=a`', '2.0 (1.0 - 3.0)']
