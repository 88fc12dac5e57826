"""Data with other classes than the network: how they are matched, what is left out, and accuracy by class."""

import json

import numpy as np
import pytest

from alexnet_jax.convert import loading
from alexnet_jax.core import sharding
from alexnet_jax.data import datasets, imagenet_classes
from alexnet_jax.inference import class_map, evaluate
from alexnet_jax.utils.errors import UnreadableError, UserError
from tests import helpers
from tests.commands import forked

IDS = imagenet_classes.wordnet_ids()
NAMES = tuple(imagenet_classes.names().values())
# Labels of Imagenette's folders in ILSVRC-2012, as published with the data set.
IMAGENETTE = {
    'n01440764': 0, 'n02102040': 217, 'n02979186': 482, 'n03000684': 491, 'n03028079': 497,
    'n03394916': 566, 'n03417042': 569, 'n03425413': 571, 'n03445777': 574, 'n03888257': 701,
}  # fmt: skip
SYNSETS = tuple(f'{key} {name}, and so on' for key, name in zip(IDS, NAMES, strict=True))


@pytest.mark.parametrize(
    ('names', 'network', 'labels', 'method'),
    [
        (IMAGENETTE, IDS, list(IMAGENETTE.values()), 'WordNet id'),
        (IMAGENETTE, NAMES, list(IMAGENETTE.values()), 'WordNet id'),
        (IMAGENETTE, SYNSETS, list(IMAGENETTE.values()), 'WordNet id'),
        (['tench', 'great_white_shark', 'Goldfish'], IDS, [0, 2, 1], 'WordNet id'),
        (['tench', 'great_white_shark', 'Goldfish'], NAMES, [0, 2, 1], 'name'),
        (['n01440764-tench', '0.n01443537'], IDS, [0, 1], 'WordNet id'),
        (['crane (n03126707)', 'crane (n02012849)'], IDS, [517, 134], 'WordNet id'),
        (['tench', 'n01443537'], ['goldfish', 'tench'], [1, 0], 'name and WordNet id'),
        # Two classes of ILSVRC-2012 have the name crane; Cardigan is a dog, cardigan is clothing.
        (['crane', 'tench'], IDS, [-1, 0], 'WordNet id'),
        (['cardigan', 'Cardigan'], IDS, [474, 264], 'WordNet id'),
        (['Cardigan', 'tench'], ['cardigan', 'tench'], [-1, 1], 'name'),
        # ImageNet-V2: folders are indices; data prepared before numeric order have '10' before '2'.
        (['0', '10', '2'], IDS, [0, 10, 2], 'index'),
        (['000', '001', '002'], ['a', 'b', 'c'], [0, 1, 2], 'index'),
        (['2', '0'], ['0', '1', '2'], [2, 0], 'name'),
        (['07', '1'], ['1', '7', 'x'], [1, 0], 'name'),
        (['b', 'a', 'c'], ['a', 'b', 'c'], [1, 0, 2], 'name'),
        (['b', 'z'], ['a', 'b', 'c'], [1, -1], 'name'),
        (['Gänseblümchen'], ['Ga\u0308nseblu\u0308mchen', 'x'], [0], 'name'),
        (['daisy', 'tulip'], ['0', '1'], [0, 1], 'index'),
        (['b', 'b '], ['b', 'b '], [0, 1], ''),
    ],
)
def test_classes_match_by_id_name_or_index(names, network, labels, method):
    found = class_map.match_classes(list(names), list(network), 'runs/x')
    assert (found.labels.tolist(), found.method) == (labels, method)
    assert len(found.missing) == labels.count(-1)


@pytest.mark.parametrize(
    ('names', 'network', 'message'),
    [
        (['a', 'b'], ['c', 'd', 'e'], r"none of the 2 classes of the data \('a', 'b'\) .* 3 of runs/x"),
        (['1', '2', '3'], ['a', 'b', 'c'], r'are the numbers 1 to 3, but runs/x .*\(indices 0 to 2\)'),
        (['1', '2', '3'], ['0', '1', '2'], 'are the numbers 1 to 3, but runs/x'),
        (['1', '1000'], IDS, r'are the numbers 1 to 1000, but runs/x .*\(indices 0 to 999\)'),
        (['7', '8'], ['0', '1', '2'], 'none of the 2 classes'),
        (['daisy', 'tulip'], ['0', '1', '2'], 'none of the 2 classes'),
        (['tench', 'n01440764'], IDS, "'tench' and 'n01440764' of the data both match .*'n01440764' of runs/x"),
        (['1', '01'], ['a', 'b', 'c'], "'1' and '01' of the data both match the class 'b'"),
    ],
)
def test_meaningless_class_matches_are_refused(names, network, message):
    with pytest.raises(UserError, match=message):
        class_map.match_classes(names, network, 'runs/x')


def test_relabeled_records_leave_out_unknown_classes():
    class Source(list):
        def __getitem__(self, index):
            if index == 3:
                raise UnreadableError('record 3')
            return super().__getitem__(index)

    records = Source({'image': i, 'label': label} for i, label in enumerate([0, 1, 2, 1, 0]))
    kept, left_out = class_map.relabel(records, np.array([5, -1, 7]))
    assert left_out == 1 and len(kept) == 4
    assert [kept[i] for i in (0, 1, 3)] == [{'image': i, 'label': label} for i, label in ((0, 5), (2, 7), (4, 5))]
    with pytest.raises(UnreadableError):  # counted as unreadable, not as left out
        kept[2]


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('checkpoints')
    return [helpers.save_untrained(folder / str(seed), seed) for seed in range(2)]


@pytest.mark.parametrize('networks', [1, 2])
def test_per_class_errors_match_counting(saved, networks):
    loaded = [loading.load_checkpoint(path) for path in saved[:networks]]
    val = [r for r in datasets.open_dataset('digits').split('val') if r['label'] != 4][:150]
    labels, mesh = np.array([r['label'] for r in val]), sharding.make_mesh(data=2, tower=2)
    outputs = np.mean([evaluate.Evaluator(one, mesh).probabilities(val)[0] for one in loaded], axis=0)
    rank = (outputs > outputs[np.arange(150), labels][:, None]).sum(1)
    if networks == 1:
        found = evaluate.evaluate(loaded[0], val, mesh, batch_size=64, per_class=True)
        without = evaluate.evaluate(loaded[0], val, mesh, batch_size=64)
    else:
        found = evaluate.evaluate_ensemble(loaded, val, mesh, per_class=True)
        without = evaluate.evaluate_ensemble(loaded, val, mesh)
    assert 'per_class' not in without
    for key in ('loss', 'top1_error', 'top5_error', 'count'):
        assert found[key] == pytest.approx(without[key], rel=1e-6)
    table = found['per_class']
    assert table['count'].tolist() == np.bincount(labels, minlength=10).tolist() and table['count'][4] == 0
    for k in (1, 5):
        errors = table[f'top{k}_error']
        assert np.isnan(errors[4])
        expected = [100 * (rank[labels == label] >= k).mean() for label in range(10) if label != 4]
        np.testing.assert_allclose(np.delete(errors, 4), expected, atol=1e-4)


def _permuted(checkpoint, order, names):
    """Returns a checkpoint whose output i is output order[i] of the given one."""
    fc8 = checkpoint.params['fc8']
    params = {**checkpoint.params, 'fc8': {'kernel': fc8['kernel'][..., order], 'bias': fc8['bias'][..., order]}}
    return checkpoint._replace(params=params, class_names=tuple(names))


def test_ensemble_averages_classes_not_columns(saved, caplog):
    first, second = map(loading.load_checkpoint, saved)
    first, second = (one._replace(class_names=tuple('abcdefghij')) for one in (first, second))
    val, mesh = datasets.open_dataset('digits').split('val')[:60], sharding.make_mesh(data=1, tower=1)
    order = [3, 1, 0, 2, 9, 8, 7, 6, 5, 4]
    permuted = _permuted(second, order, ['abcdefghij'[i].upper() for i in order])
    expected, found = (evaluate.evaluate_ensemble([first, one], val, mesh) for one in (second, permuted))
    for key in ('loss', 'top1_error', 'top5_error'):
        assert found[key] == pytest.approx(expected[key], rel=1e-5)
    assert "10 of 10 classes are classes of network 2 of the ensemble, matched by name ('a' = 'A'" in caplog.text
    wrong = second._replace(class_names=tuple('abcdefghiz'))
    with pytest.raises(UserError, match=r"network 2 of the ensemble .*; 1 of these have no match \('j'\)"):
        evaluate.evaluate_ensemble([first, wrong], val, mesh)


def test_evaluate_command_on_a_subset(tmp_path):
    """The data have four of the ten digits, one of them under another name, and a class that the network lacks."""
    pictures = helpers.write_pictures(tmp_path / 'in', (7, 2, 3, 5), count=6)
    for number, name in ((7, '07'), (2, '2'), (3, 'three'), (5, '5')):
        (pictures / f'digit {number}').rename(pictures / name)
    words = ['prepare', f'--input={pictures}', f'--output={tmp_path}/data', '--size=32', '--val_fraction=0.5']
    assert helpers.run_command(*words).returncode == 0
    checkpoint = helpers.save_untrained(tmp_path / 'run')
    words = ['evaluate', f'--checkpoint={checkpoint}', f'--data={tmp_path}/data', '--per_class', '--json']
    done = forked.run_command(words, tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert f"3 of 4 classes are classes of {checkpoint}, matched by name ('07' = '7', '2' = '2', '5' = '5')" in said
    assert 'Errors are over all 10 classes of the network.' in said
    assert (
        f'1 of 4 classes of the data have no match in {checkpoint}: three; 3 of 12 images of val are left out' in said
    )
    line = json.loads(done.stdout.splitlines()[-1])
    assert line['count'] == 9
    assert line['classes'] == {
        'data': 4, 'matched': 3, 'network': 10, 'matched_by': 'name', 'images_left_out': 3
    }  # fmt: skip
    rows = line['per_class']
    assert {(row['class'], row['index'], row['data_class'], row['count']) for row in rows} == {
        ('7', 7, '07', 3), ('2', 2, '2', 3), ('5', 5, '5', 3)
    }  # fmt: skip
    accuracies = [row['top1_accuracy'] for row in rows]
    assert accuracies == sorted(accuracies)
    assert sum(accuracies) / 3 == pytest.approx(100 - line['top1_error'], abs=1e-4)
    table = done.stdout.splitlines()[-5:-1]
    assert table[0].split() == ['class', 'images', 'top-1', '(accuracy)']
    assert [row.split()[0] for row in table[1:]] == [row['class'] for row in rows]
