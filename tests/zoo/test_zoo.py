"""Generated inputs of `prepare`, `predict`, `activations` and `convert`, as people have them.

Each case ends in the right pixels, classes, weights and counts, or in one line with exit code 2 and nothing on disk.
The oracles are the pixels that a case was made from, Pillow, and NumPy. docs/input_cases.md lists all cases.
"""

import collections
import contextlib
import functools
import importlib
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import chex
import numpy as np
import pytest
import safetensors.numpy

import alexnet_jax
from alexnet_jax.commands import app
from alexnet_jax.convert import loading
from alexnet_jax.data import datasets
from alexnet_jax.inference import activations
from alexnet_jax.prepare import dataset_writer, prepare
from tests import ROOT, helpers
from tests.commands import forked
from tests.zoo import activations_cases, convert_cases, listing, predict_cases, prepare_cases, weights
from tests.zoo.case import SIZE, picture

_load = functools.cache(alexnet_jax.load_checkpoint)


def _pixels(value):
    return picture(value) if isinstance(value, int) else value


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A checkpoint and a prepared data set, by the names that cases use."""
    folder = tmp_path_factory.mktemp('made')
    helpers.write_files(
        folder / 'in',
        {name: helpers.encode(picture(seed), 'PNG') for name, (seed, _) in activations_cases.PREPARED.items()},
    )
    with _in_process():
        prepare.prepare(folder / 'in', folder / 'prepared', size=SIZE, format='raw')
    return {'CHECKPOINT': helpers.save_untrained(folder / 'checkpoint'), 'PREPARED': str(folder / 'prepared')}


@contextlib.contextmanager
def _in_process():
    """Lets `prepare` write shards in a thread, since the start of a process takes longer than most cases."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset_writer, 'ProcessPoolExecutor', lambda workers, **_: ThreadPoolExecutor(1))
        yield


def _run(words, capfd):
    """Runs a command in this process. Returns (exit code, the lines of stdout, the lines of stderr)."""
    command = importlib.import_module(f'alexnet_jax.commands.{words[0]}')
    line, code = '', 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['alexnet_jax', *words])
        patch.setenv('PYTHONSAFEPATH', '1')  # which the command sets
        patch.setattr(loading, 'load_checkpoint', _load)
        try:
            app._call(command, words[1:])
        except BaseException as error:
            described = app._describe_error(error)
            if described is None:  # a user would see a traceback
                raise
            text, code = described
            line = 'error: ' + ' '.join(text.split())
    out, err = capfd.readouterr()
    return code, out.splitlines(), [*err.splitlines(), *([line] if line else [])]


def _all_paths(folder):
    walk = os.walk(folder)
    return sorted(os.path.join(root, name) for root, folders, names in walk for name in (*folders, *names))


def _readable_again(folder):
    for path in _all_paths(folder):
        if not os.path.islink(path):
            os.chmod(path, 0o755)


def _defaults(command, folder, output):
    return {
        'prepare': {'input': folder, 'output': output, 'size': SIZE, 'format': 'raw'},
        'predict': {'checkpoint': 'CHECKPOINT', 'json': 'true'},
        'activations': {'checkpoint': 'CHECKPOINT'},
        'convert': {'output': output},
    }[command]


def _words(case, folder, output, made):
    """Returns the command line: the words of the case, and the flags that it leaves open."""
    given = {re.match(r'--(\w*)', word)[1] for word in case.words if word.startswith('--')}
    defaults = _defaults(case.command, folder, output)
    if 'lines' in given:
        del defaults['json']
    words = [*(f'--{name}={value}' for name, value in defaults.items() if name not in given), *case.words]
    for name, value in {'FOLDER': str(folder), **made}.items():
        words = [word.replace(name, value) for word in words]
    return [case.command, *words]


def _check_prepared(output, expected, case, out, made):
    dataset = datasets.open_dataset(output)
    assert set(dataset.splits) == set(expected)
    if len(dataset.class_names) < 1000:
        folder_of = {class_name: os.path.dirname(name) for name, (class_name, _) in sorted(expected['train'].items())}
        by_number = all(class_name.isdecimal() for class_name in folder_of)
        assert dataset.class_names == tuple(sorted(folder_of, key=int if by_number else folder_of.get))
    for split, images in expected.items():
        found = helpers.read_back(output, split)
        assert {name: class_name for name, (_, class_name) in found.items()} == {n: c for n, (c, _) in images.items()}
        for name, (pixels, _) in found.items():
            chex.assert_trees_all_equal(pixels, _pixels(images[name][1]))


def _check_predicted(output, expected, case, out, made):
    found = [json.loads(line) for line in out]  # stdout has nothing else
    assert [line['file'] for line in found] == [os.fspath(path) for path, _ in expected]
    image_NHWC = np.stack([_pixels(value) for _, value in expected])
    probabilities = alexnet_jax.predict(_load(made['CHECKPOINT']), image_NHWC, batch_size=32)
    for line, wanted in zip(found, probabilities, strict=True):
        best = np.argsort(-wanted)[:5]
        assert [row['index'] for row in line['top']] == best.tolist()
        chex.assert_trees_all_close([row['probability'] for row in line['top']], wanted[best].tolist(), atol=1e-6)


def _check_activations(output, expected, case, out, made):
    path = next(
        word.partition('=')[2] for word in _words(case, output.parent / 'folder', output, made) if '--output' in word
    )
    if path.endswith('.npz'):
        with np.load(path) as file:
            arrays = dict(file)
    else:
        arrays = safetensors.numpy.load_file(path)
        arrays['files'] = [os.fsdecode(bytes(row).rstrip(b'\0')) for row in arrays['files']]
    layers = {name.strip() for word in case.words if word.startswith('--layers=') for name in word[9:].split(',')}
    labels = [label for *_, label in expected]
    assert set(arrays) == {'files', *layers, *([] if None in labels else ['labels', 'class_names'])}
    assert list(arrays['files']) == [name for name, *_ in expected]
    assert None in labels or arrays['labels'].tolist() == labels
    pixels = np.stack([_pixels(value) for _, value, _ in expected])
    wanted = activations.activations(_load(made['CHECKPOINT']), pixels, sorted(layers))
    for layer in layers:
        chex.assert_trees_all_close(arrays[layer], wanted[layer], rtol=1e-4, atol=1e-4)


def _check_converted(output, expected, case, out, made):
    assert not os.path.exists('ran')  # by the checkpoint that would run a program
    checkpoint = alexnet_jax.load_checkpoint(output)
    assert tuple(checkpoint.class_names) == expected.classes
    for i, (name, (weight, bias)) in enumerate(zip(checkpoint.network.layers, weights.layers(), strict=True)):
        weight, bias = (array.astype(expected.dtype).astype(np.float32) for array in (weight, bias))
        kernel = weights.kernel(weight[:, ::-1] if expected.bgr and not i else weight, first_dense=name == 'fc6')
        chex.assert_trees_all_equal(checkpoint.params[name], {'kernel': kernel, 'bias': bias})
    image = np.broadcast_to(expected.mean, checkpoint.image_stats.mean_image.shape)
    chex.assert_trees_all_close(checkpoint.image_stats.mean_image, image, rtol=1e-6)


CHECKS = {
    'prepare': _check_prepared,
    'predict': _check_predicted,
    'activations': _check_activations,
    'convert': _check_converted,
}
ALL = [*prepare_cases.CASES, *predict_cases.CASES, *activations_cases.CASES, *convert_cases.CASES]


@pytest.mark.parametrize('case', ALL, ids=[f'{case.command}: {case.input}' for case in ALL])
def test_input(case, made, tmp_path, capfd):
    folder, output = tmp_path / 'folder', tmp_path / 'output'
    folder.mkdir()
    expected = case.build(folder)
    if 'permission' in case.input and all(os.access(path, os.R_OK) for path in _all_paths(folder)):
        pytest.skip('this user may read everything')
    before = _all_paths(tmp_path)
    with _in_process():
        code, out, err = _run(_words(case, folder, output, made), capfd)
    after = _all_paths(tmp_path)
    _readable_again(folder)
    for pattern in case.says:
        assert any(re.search(pattern, line) for line in [*out, *err]), (pattern, out, err)
    if case.refused:
        assert code == 2, out
        line = err.pop()
        assert line.startswith('error: ') and re.search(case.refused, line) and len(line) < 1500, line
    else:
        assert code == 0, err
        assert case.says or not err
    assert all(line.startswith('warning: ') for line in err), err
    if expected is None:
        assert case.refused and after == before
    else:
        CHECKS[case.command](output, expected, case, out, made)


@pytest.mark.slow
@pytest.mark.parametrize(
    'case', [case for case in ALL if case.refused and 'permission' not in case.input][::12], ids=lambda case: case.input
)
def test_refused_by_the_command(case, made, tmp_path):
    """As a user sees it: exit code 2, the warnings and one line on stderr, no traceback."""
    folder = tmp_path / 'folder'
    folder.mkdir()
    case.build(folder)
    done = forked.run_command(_words(case, folder, tmp_path / 'output', made), tmp_path)
    *warnings, line = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith('error: ') and re.search(case.refused, line), done.stderr
    assert all(warning.startswith('warning: ') for warning in warnings), warnings


def test_number_of_cases():
    """Each is an input of its own, and is listed in docs/input_cases.md."""
    counts = collections.Counter(case.command for case in ALL)
    assert len({(case.command, case.input) for case in ALL}) == len(ALL)
    assert len({case.input for case in ALL}) >= 150
    assert all(
        counts[name] >= least
        for name, least in (('prepare', 30), ('predict', 30), ('convert', 30), ('activations', 15))
    )
    assert (ROOT / 'docs' / 'input_cases.md').read_text() == listing.page(ALL)
