"""The layout of the package: import directions, and the length of modules and functions."""

import ast
import itertools

import pytest

from tests import ROOT

PACKAGE = ROOT / 'alexnet_jax'
# From the lowest layer up. A subpackage imports from lower layers only, never from its own layer.
LAYERS = (
    ('utils',),
    ('core',),
    ('data', 'checkpoints'),
    ('prepare', 'convert'),
    ('inference',),
    ('training', 'export', 'visualize'),
    ('benchmark',),
    ('experiments',),
    ('commands',),
    ('main', '__main__'),
)
LAYER_OF = {name: i for i, names in enumerate(LAYERS) for name in names}
# Libraries that only some modules may import.
ONLY = {
    'grain': {'data/pipeline.py'},
    'tensorflow_datasets': {'data/datasets.py', 'prepare/'},
    'pyarrow': {'prepare/parquet.py'},
    'scipy': {'prepare/ground_truth.py'},
    'orbax': {'checkpoints/'},
    'flax': {'core/model.py'},
    'optax': {'core/optim.py', 'core/train_step.py', 'experiments/linear_probe.py', 'training/recipes.py'},
    'torch': {'benchmark/'},
    'onnxruntime': {'benchmark/inference.py'},
    'openvino': {'benchmark/inference.py'},
    'safetensors': {'convert/safetensors.py'},
    'onnx': {'export/onnx_model.py'},
    'pooch': {'convert/published.py'},
    'huggingface_hub': {'convert/loading.py'},
    'pillow_heif': {'data/image_io.py'},
    'simplejpeg': {'data/image_io.py'},
    'matplotlib': {'experiments/plots.py'},
    'google': {'convert/caffe.py', 'training/metric_writer.py'},
    'configs': set(),
}


def _modules():
    """Returns (path relative to the package, syntax tree) of every module."""
    paths = sorted(PACKAGE.rglob('*.py'))
    return [(path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())) for path in paths]


MODULES = _modules()


def _imported(tree):
    """Yields every import of a module, such as ('alexnet_jax.core.model', level)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f'{node.module or ""}.{alias.name}', node.level) for alias in node.names)


def import_problem(path, name, level):
    """Returns the problem with an import in a module, or None."""
    parts = name.split('.')
    own = path.split('/')[0].removesuffix('.py')
    if level:
        return 'a relative import'
    if parts[0] != 'alexnet_jax':
        allowed = ONLY.get(parts[0])
        fine = allowed is None or any(path.startswith(prefix) for prefix in allowed)
        return None if fine else f'only {sorted(allowed)} may import {parts[0]}'
    if len(parts) == 1:
        return 'the package as a whole'
    if own == '__init__':
        return None
    if parts[1] not in LAYER_OF:
        return f'no subpackage {parts[1]!r}'
    if parts[1] != own and LAYER_OF[parts[1]] >= LAYER_OF[own]:
        return f'{own} is not above {parts[1]}'
    return None


def test_every_subpackage_has_a_layer():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != '__pycache__'}
    assert folders == set(itertools.chain(*LAYERS[:-1]))


def test_imports_point_to_lower_layers():
    problems = [
        f'{path}: {name}: {problem}'
        for path, tree in MODULES
        for name, level in _imported(tree)
        if (problem := import_problem(path, name, level))
    ]
    assert not problems


@pytest.mark.parametrize(
    ('path', 'name', 'level'),
    [
        ('core/model.py', 'ops', 1),
        ('core/model.py', 'alexnet_jax', 0),
        ('core/model.py', 'alexnet_jax.data.random_crops', 0),
        ('data/random_crops.py', 'alexnet_jax.checkpoints.manager', 0),
        ('checkpoints/manager.py', 'alexnet_jax.data.random_crops', 0),
        ('utils/files.py', 'alexnet_jax.core.model', 0),
        ('training/train.py', 'alexnet_jax.commands.app', 0),
        ('core/model.py', 'alexnet_jax.nothing', 0),
        ('training/train.py', 'orbax.checkpoint', 0),
        ('inference/predict.py', 'grain', 0),
    ],
)
def test_forbidden_imports_are_detected(path, name, level):
    assert import_problem(path, name, level)


@pytest.mark.parametrize(
    ('path', 'name'),
    [
        ('core/model.py', 'alexnet_jax.core.ops'),
        ('core/model.py', 'alexnet_jax.utils.errors.UserError'),
        ('training/train.py', 'alexnet_jax.data.pipeline'),
        ('main.py', 'alexnet_jax.commands.app'),
        ('data/pipeline.py', 'grain'),
    ],
)
def test_allowed_imports_are_accepted(path, name):
    assert import_problem(path, name, 0) is None


def test_partition_specs_are_in_one_module():
    named = [path for path, tree in MODULES if any(name.endswith('.PartitionSpec') for name, _ in _imported(tree))]
    assert named == ['core/sharding.py']


def _defines_flags(node):
    return isinstance(node, ast.Attribute) and node.attr.startswith('DEFINE_')


def test_flags_are_defined_only_in_commands():
    paths = {path for path, tree in MODULES if any(map(_defines_flags, ast.walk(tree)))}
    assert paths and all(path.startswith('commands/') for path in paths)


def _code_lines(function):
    """Returns the number of lines of a function without its docstring."""
    count = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        count -= function.body[0].end_lineno - function.body[0].lineno + 1
    return count


def test_modules_and_functions_are_short():
    modules = {path: len((PACKAGE / path).read_text().splitlines()) for path, _ in MODULES}
    assert not {path: count for path, count in modules.items() if count > 350}
    functions = {
        f'{path}:{node.name}': _code_lines(node)
        for path, tree in MODULES
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    assert len(functions) > 400 and not {name: count for name, count in functions.items() if count > 60}
    core = sum(count for path, count in modules.items() if path.startswith('core/') and path != 'core/cpu.py')
    assert 1_000 < core <= 2_060 + 72  # 72 lines are examples in docstrings


def test_code_lines_exclude_the_docstring():
    (function,) = ast.parse('def f():\n    """One.\n\n    Two.\n    """\n    a = 1\n    return a\n').body
    assert _code_lines(function) == 3
