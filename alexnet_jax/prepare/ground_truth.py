"""The classes of images in a flat folder, from the files that ILSVRC and Kaggle publish with it."""

import glob
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

from absl import logging

from alexnet_jax.prepare import tar, tfds
from alexnet_jax.utils.errors import UserError, as_user_error
from alexnet_jax.utils.files import as_utf8, open_regular

# Names of images with a ground truth. That of the test set of 2012 was not published.
PREFIXES = (tar.VAL_PREFIX, 'ILSVRC2010_val_', 'ILSVRC2010_test_')
KAGGLE_LIST = 'LOC_val_solution.csv'  # ImageId,PredictionString; the latter is WNID X Y W H, once per box
# SciPy allocates the sizes that a file declares, and deep nesting ends its process.
_MAT_READER = """
import json, resource, sys
from scipy import io
resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
synsets = io.loadmat(sys.argv[1], squeeze_me=True)['synsets']
ids, names = synsets['ILSVRC2010_ID'], synsets['WNID']
print(json.dumps([(int(number), str(name)) for number, name in zip(ids.ravel(), names.ravel(), strict=True)]))
"""
_MAT_SECONDS = 60
_LEVELS = 5  # of folders above the images in which their files may be: Kaggle's list is beside ILSVRC/Data/CLS-LOC/val
_PLACES = ('', 'data', '*devkit*', '*devkit*/data', '*devkit*/*/data')  # of ILSVRC's files in these folders


def split_of(name: str) -> str:
    """Returns the split of an image of ILSVRC from its name."""
    return 'test' if '_test_' in name else 'val'


def classes_of(folder: str, names: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """Returns the WordNet ids of images in a flat folder by file name, and all ids of ILSVRC-2010 if they are of it.

    Labels of ILSVRC-2012 are part of TFDS; Kaggle's list goes before them. ILSVRC-2010 needs the ground truth and
    meta.mat of its development kit. Files are looked for in the folder and above it.

    Raises UserError if a file that is needed is missing or does not fit.
    """
    names = [name for name in names if name.startswith(PREFIXES)]
    classes: dict[str, str] = {}
    known: set[str] = set()
    for prefix in PREFIXES:
        of_prefix = [name for name in names if name.startswith(prefix)]
        if of_prefix and prefix == tar.VAL_PREFIX:
            classes |= _classes_of_2012(folder, of_prefix)
        elif of_prefix:
            found, all_classes = _classes_of_2010(folder, prefix, of_prefix)
            classes, known = classes | found, known | all_classes
    return classes, known


def _classes_of_2012(folder: str, names: Sequence[str]) -> dict[str, str]:
    """Returns the classes of the validation images of 2012. Compares those of Kaggle's list with the published ones."""
    published = {name: tar.validation_class(name) for name in names}
    _check_ids(folder)
    path = _find(folder, KAGGLE_LIST)
    if not path:
        return published
    listed = _read_kaggle_list(path)
    classes = {name: listed[stem] for name in names if (stem := name.split('.')[0]) in listed}
    if len(classes) < len(names):
        logging.warning('%s: skipped %d images that are not in %s.', folder, len(names) - len(classes), path)
    if len(classes) < len(listed):
        logging.warning('%s: %d of its %d images are missing.', path, len(listed) - len(classes), len(listed))
    if other := [name for name, class_name in classes.items() if class_name != published[name]]:
        logging.warning(
            '%s: %d images have another class than in the ground truth of ILSVRC-2012, such as %s; that of the file is '
            'used.',
            *(path, len(other), as_utf8(other[0])),
        )
    logging.info('the classes of the images in %s are those of %s', as_utf8(folder), as_utf8(path))
    return classes


def _read_kaggle_list(path: str) -> dict[str, str]:
    """Returns {ImageId: WordNet id}. Raises UserError for other rows, and for an image with boxes of two classes."""
    classes: dict[str, str] = {}
    with as_user_error(f'{path!r} cannot be read'), open_regular(path, encoding='utf-8-sig', errors='replace') as file:
        for line, cells in enumerate((row.strip().split(',') for row in file), 1):
            if not cells[0] or (line == 1 and cells[0] == 'ImageId'):
                continue
            boxes = cells[1].split() if len(cells) == 2 else []
            found = set(boxes[::5])
            if len(found) != 1 or len(boxes) % 5 or not re.fullmatch(r'n\d{8}', boxes[0]):
                raise UserError(
                    f'{path!r}, line {line}: expected an image and boxes of one class, such as '
                    f'ILSVRC2012_val_00000001,n01751748 100 110 200 210; got {",".join(cells)[:100]!r}.'
                )
            if classes.setdefault(cells[0], boxes[0]) != boxes[0]:
                raise UserError(f'{path!r}, line {line}: {cells[0]!r} has another class than in an earlier line.')
    return classes


def _check_ids(folder: str) -> None:
    """Raises UserError if a ground truth of 2012 is there that is not the published one. It is not needed."""
    path = _find(folder, 'ILSVRC2012_validation_ground_truth.txt')
    if path:
        ids, published = _read_ids(path), tfds.validation_classes()
        if len(ids) != len(published) or len(set(zip(ids, published, strict=True))) != len(set(published)):
            raise UserError(
                f'{path!r}: its {len(ids)} lines are not the ground truth of the {len(published)} validation images of '
                'ILSVRC-2012; remove it (the labels are known), or give labels of your own with --labels.'
            )


def _classes_of_2010(folder: str, prefix: str, names: Sequence[str]) -> tuple[dict[str, str], set[str]]:
    """Returns the classes of images of ILSVRC-2010 and all its classes. Skips test images without ground truth."""
    file = f'ILSVRC2010_{"test" if "test" in prefix else "validation"}_ground_truth.txt'
    path = _find(folder, file)
    if not path and prefix == 'ILSVRC2010_test_':
        logging.warning('skipped %d test images in %s: %s is missing', len(names), folder, file)
        return {}, set()
    if not path:
        raise UserError(f'{folder!r}: nothing says the classes of {prefix}*; put {file} and meta.mat there.')
    ids, wordnet_ids = _read_ids(path), _read_meta(path, folder)
    classes: dict[str, str] = {}
    if unknown := set(ids) - wordnet_ids.keys():
        raise UserError(f'{path!r}: meta.mat has no ILSVRC2010_ID {min(unknown)}; use the two files of one kit.')
    for name in names:
        number = name.removeprefix(prefix).split('.')[0]
        if not (number.isascii() and number.isdecimal() and len(number) <= 8 and 1 <= int(number) <= len(ids)):
            raise UserError(
                f'{name!r} in {folder!r}: expected {prefix}NUMBER.JPEG with at most {len(ids)}, as in {path!r}.'
            )
        classes[name] = wordnet_ids[ids[int(number) - 1]]
    if len(names) < len(ids):
        logging.warning('%s: %d of its %d images are missing in %s.', path, len(ids) - len(names), len(ids), folder)
    return classes, {wordnet_ids[i] for i in ids}


def _read_ids(path: str) -> list[int]:
    """Returns the class number of each image, in the order of their names. Raises UserError for other lines."""
    with as_user_error(f'{path!r} cannot be read'), open_regular(path, encoding='utf-8-sig', errors='replace') as file:
        lines = file.read().split('\n')
    lines = [line.strip() for line in (lines[:-1] if not lines[-1].strip() else lines)]
    for i, line in enumerate(lines, 1):
        if not re.fullmatch(r'[1-9]\d{0,3}', line, re.ASCII):
            raise UserError(f'{path!r}, line {i}: expected the number of a class, from 1, got {line[:40]!r}.')
    return [int(line) for line in lines]


def _read_meta(ground_truth: str, folder: str) -> dict[int, str]:
    """Returns {ILSVRC2010_ID: WordNet id} from meta.mat or meta.txt, of lines ID WNID. Raises UserError."""
    beside = os.path.dirname(ground_truth)
    paths = [os.path.join(beside, name) for name in ('meta.mat', 'meta.txt')]
    path = next(filter(os.path.isfile, paths), None) or _find(folder, 'meta.mat') or _find(folder, 'meta.txt')
    if not path:
        raise UserError(
            f'{ground_truth!r} has numbers of classes whose WordNet ids are not known; put meta.mat of the development '
            f'kit (ILSVRC2010_devkit-1.0/data) into {beside!r}, or meta.txt with lines NUMBER WORDNET_ID.'
        )
    if path.endswith('.mat'):
        return _read_mat(path)
    with as_user_error(f'{path!r} cannot be read'), open_regular(path, encoding='utf-8-sig', errors='replace') as file:
        lines = [re.match(r'\s*(\d{1,8})[\s,;]+(n\d{8})\b', line, re.ASCII) for line in file if line.strip()]
    if not lines or not all(lines) or len({line[1] for line in lines if line}) < len(lines):
        raise UserError(f'{path!r}: expected lines NUMBER WORDNET_ID, such as 1 n01440764, with each number once.')
    return {int(line[1]): line[2] for line in lines if line}


def _read_mat(path: str) -> dict[int, str]:
    """Returns {ILSVRC2010_ID: WordNet id} from the struct array `synsets` of MATLAB's file."""
    with as_user_error(f'{path!r} cannot be read'):
        open_regular(path, 'rb').close()
    environment = {**os.environ, 'OPENBLAS_NUM_THREADS': '1'}  # each thread takes addresses
    try:
        command = [sys.executable, '-P', '-c', _MAT_READER, path]  # nothing from the current folder
        done = subprocess.run(command, capture_output=True, text=True, timeout=_MAT_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        reason = f'reading it takes more than {_MAT_SECONDS} s'
    else:
        if not done.returncode:
            return {int(number): name for number, name in json.loads(done.stdout)}
        reason = (done.stderr.splitlines() or ['damaged'])[-1][:200]
    raise UserError(f'{path!r}: expected synsets with ILSVRC2010_ID and WNID ({reason!r}).')


def _find(folder: str, name: str) -> str | None:
    """Returns the path of a file in a folder or above it, also in folders of a development kit, or None."""
    folder = os.path.abspath(folder)
    for _ in range(_LEVELS):
        for place in _PLACES:
            if found := sorted(glob.glob(os.path.join(glob.escape(folder), place, name))):
                return found[0]
        folder = os.path.dirname(folder)
    return None
