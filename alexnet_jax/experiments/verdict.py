"""Says what the errors on a few val pictures mean: confidence intervals, and whether guessing is as good."""

import math

import numpy as np

_Z = 1.959964  # 97.5% quantile of the normal distribution


def wilson(count: int, total: int) -> tuple[float, float]:
    """Returns the 95% confidence interval of a proportion, `count` of `total` (Wilson 1927)."""
    share, z2 = count / total, _Z**2
    center = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, center - half), min(1.0, center + half)


def error_with_interval(correct: int, total: int) -> str:
    """Returns an error in percent with its 95% confidence interval, as text.

    >>> error_with_interval(correct=32, total=40)
    '20.0% (95% confidence interval 10.5% to 34.8%)'
    """
    low, high = wilson(total - correct, total)
    return f'{100 * (1 - correct / total):.1f}% (95% confidence interval {100 * low:.1f}% to {100 * high:.1f}%)'


def verdict(confusion: np.ndarray, class_names: tuple[str, ...], steps: list[str]) -> list[str]:
    """Returns lines that state the error, compare it with guessing the most frequent class, and list every class.

    Args:
      confusion: int [K, K]; rows are true classes, columns predicted classes.
      class_names: K names.
      steps: what to try next if guessing may be as good.
    """
    count_K, answers_K, right_K = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    total, correct, guessed = int(confusion.sum()), int(right_K.sum()), int(count_K.max())
    lines = [f'top-1 error {error_with_interval(correct, total)} of {total} val images']
    results = f'{correct} of {total} are right; always answering {class_names[int(count_K.argmax())]!r}: {guessed}'
    better = wilson(correct, total)[0] > guessed / total
    if better:
        lines.append(f'better than guessing: {results}')
    elif correct > guessed:
        lines.append(f'too few val images to tell whether it is better than guessing: {results}')
    else:
        lines.append(f'not better than guessing: {results}')
    notes = ['never predicted' if not answers else '' for answers in answers_K]
    for name, count, right, note in zip(class_names, count_K, right_K, notes, strict=True):
        lines.append(f'  {name}: {right} of {count} right' + (f' ({note})' if note else ''))
    return lines if better else [*lines, 'try next:', *(f'  - {step}' for step in steps)]


def next_steps(*, mode: str, trained: bool, train: int, classes: int, val: int) -> list[str]:
    """Returns what to try next; nothing that is already set."""
    found = []
    per_class = train / classes
    if per_class < (100 if trained else 500):
        wanted = 'a hundred' if trained else 'several hundred'
        found.append(f'more pictures: {per_class:.0f} per class to train on, {wanted} are better')
    if not trained:
        found.append('trained weights: --init_from=torchvision, or a checkpoint that was trained on similar pictures')
    elif mode == 'features':
        found.append('--mode=full, which trains all layers')
        found.append('other weights: --init_from=CHECKPOINT')
    else:
        found.append('--mode=features, which fits only the last layer')
    if val < 40:
        found.append('more val pictures, in val/CLASS, to tell small differences')
    found.append('check that the pictures are in the right class folders')
    return found
