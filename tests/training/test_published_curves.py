"""Published learning curves, beside a run."""

from types import SimpleNamespace

import pytest

from alexnet_jax.commands import figures as command
from alexnet_jax.convert import loading
from alexnet_jax.data import imagenet_classes
from alexnet_jax.experiments import figures
from alexnet_jax.training import published_curves
from alexnet_jax.utils.errors import UserError
from tests import helpers

IDS = imagenet_classes.wordnet_ids()


@pytest.mark.parametrize(
    ('epoch', 'error', 'expected'),
    [
        (1, 86.4, '  1.0 points ahead of caffenet'),  # 100 - 12.6 = 87.4; nvcaffe begins at epoch 4
        (4, 70.0, '  1.2 points behind caffenet, 3.1 points behind nvcaffe'),  # (72.2 + 65.3) / 2 = 68.75; 66.9
        (60, 43.5, '  0.0 points ahead of caffenet, 1.3 points ahead of nvcaffe'),  # 43.5; 44.8
        (90, 42.0, '  0.4 points ahead of nvcaffe'),  # (43.4 + 41.4) / 2
        # The first updates after epochs 60 and 100 with batches of 128, 256 and 32,768 images.
        (600_547 * 128 / 1_281_167, 43.5, '  0.0 points ahead of caffenet, 1.3 points ahead of nvcaffe'),
        (500_456 * 256 / 1_281_167, 41.4, '  0.0 points ahead of nvcaffe'),
        (3_910 * 32_768 / 1_281_167, 42.4, '  1.0 points behind nvcaffe'),
        (60.05, 43.5, '  1.3 points ahead of nvcaffe'),
        (0.5, 99.0, ''),
        (120, 38.0, ''),
    ],
)
def test_run_is_compared_at_the_same_epoch(epoch, error, expected):
    assert published_curves.compare(epoch, error) == expected


def test_only_runs_on_all_of_imagenet_are_compared():
    assert published_curves.is_imagenet(sorted(IDS, reverse=True), 1_281_167)
    assert not published_curves.is_imagenet(IDS, 128_116)  # data.fraction=0.1
    assert not published_curves.is_imagenet([*IDS[1:], 'n00000000'], 1_281_167)
    assert not published_curves.is_imagenet([str(i) for i in range(1000)], 1_281_167)


def test_training_images_follow_from_the_first_whole_line():
    """1,281,167 images: the first line of a run with batches of 128, after damaged ones."""
    lines = [{}, {'step': 'x', 'epoch': 1}, {'step': 5, 'epoch': 0}, {'step': 100, 'epoch': 100 * 128 / 1_281_167}]
    assert command._train_images(lines, 128) == 1_281_167
    assert command._train_images(lines[:3], 128) == 0


def test_published_curve_is_drawn_beside_the_run(tmp_path):
    checkpoint = loading.load_checkpoint(helpers.save_untrained(tmp_path))
    (tmp_path / 'metrics.jsonl').write_text('{"split": "val", "epoch": 1, "top1_error": 80, "loss": 4}\n')
    drawn = figures.draw(checkpoint, run=tmp_path, beside='caffenet')
    lines = {line.get_label(): line for line in next(drawn)[1].axes[0].lines}
    assert list(lines) == ['val', 'caffenet, val']
    assert (lines['caffenet, val'].get_xdata()[7], lines['caffenet, val'].get_ydata()[7]) == (21, pytest.approx(49.2))
    loss = {line.get_label(): line for line in next(drawn)[1].axes[0].lines}
    assert list(loss['caffenet, val'].get_ydata()) == [4.64, 3.02, 2.77, 2.53, 2.17]


@pytest.mark.parametrize(
    ('beside', 'run', 'message'),
    [
        ('caffenet', False, '--beside=caffenet: needs training curves; use --run=WORKDIR'),
        ('cafenet', True, '--beside=cafenet: expected one of caffenet, nvcaffe. Did you mean'),
        ('nvcaffe', True, 'expected a run on all of ImageNet, got 10 other classes'),
    ],
)
def test_figures_command_refuses(beside, run, message, tmp_path):
    path = helpers.save_untrained(tmp_path)
    (tmp_path / 'metrics.jsonl').write_text('{"split": "train", "step": 10, "epoch": 0.1}\n')
    args = {'run': path if run else None, 'checkpoint': None if run else path}
    with pytest.raises(UserError, match=message):
        command.main(SimpleNamespace(**args, beside=beside, data=None, output=str(tmp_path / 'out')))
