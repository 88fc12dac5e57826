"""Published learning curves on ImageNet: is a run on track?"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from alexnet_jax.data import imagenet_classes

_UPDATE = 0.03  # epochs of an update with 32,768 images, rounded up
_IMAGENET = 1_200_000  # training images: fewer are a part of ILSVRC-2012, whose epochs are shorter


class PublishedCurve(NamedTuple):
    """Validation of a published run on ILSVRC-2012, center crop."""

    title: str
    source: str
    top1_accuracy: Mapping[float, float]  # epoch -> percent
    loss: Mapping[float, float]  # epoch -> nats

    def points(self, field: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns (epochs, values). field: 'top1_error' (percent) or 'loss' (nats); both may be empty."""
        values = self.loss if field == 'loss' else {epoch: 100 - x for epoch, x in self.top1_accuracy.items()}
        return np.array(list(values)), np.array(list(values.values()))

    def at(self, epoch: float) -> float | None:
        """Returns the top-1 error at an epoch, interpolated linearly; None outside the published epochs.

        A validation at the end of an epoch comes with the first update after it, up to `_UPDATE` epochs later.
        """
        epochs, errors = self.points('top1_error')
        return float(np.interp(epoch, epochs, errors)) if epochs[0] <= epoch <= epochs[-1] + _UPDATE else None


CURVES = {
    'caffenet': PublishedCurve(
        'CaffeNet: batch 256, rate 0.01, divided by ten at epochs 20 and 40',
        'ducha-aiki/caffenet-benchmark',
        {
            1: 12.6, 2: 22.0, 3: 27.8, 5: 34.7, 10: 39.5, 15: 42.6,
            20: 43.6, 21: 50.8, 30: 53.7, 40: 54.4, 41: 55.9, 60: 56.5,
        },
        {1: 4.64, 5: 3.02, 10: 2.77, 20: 2.53, 21: 2.17},
    ),
    'nvcaffe': PublishedCurve(
        'NVCaffe, groups and normalization: batch 1,024, rate 0.02, falling with (1 - progress)^2 over 100 epochs',
        'NVIDIA/caffe, models/bvlc_alexnet',
        {4: 33.1, 8: 40.1, 12: 44.3, 20: 47.3, 40: 53.1, 60: 55.2, 80: 56.6, 100: 58.6},
        {},
    ),
}  # fmt: skip


def is_imagenet(class_names: Sequence[str], examples: int) -> bool:
    """Returns whether a run trains on all of ILSVRC-2012. examples: number of training images."""
    return examples >= _IMAGENET and set(class_names) == set(imagenet_classes.wordnet_ids())


def compare(epoch: float, top1_error: float) -> str:
    """Describes a run on ImageNet beside the published runs at the same epoch; '' before and after their epochs."""
    texts = []
    for name, curve in CURVES.items():
        if (published := curve.at(epoch)) is not None:
            points = published - top1_error
            texts.append(f'{abs(points):.1f} points {"ahead of" if points >= 0 else "behind"} {name}')
    return f'  {", ".join(texts)}' if texts else ''
