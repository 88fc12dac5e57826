"""The reports of training steps: fetched late, averaged into lines, and watched for what a run may not put up with."""

import contextlib
import math
import time
from collections import deque
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax import metrics, writers
from alexnet_jax.errors import DivergedError, UserError

# What a run that goes on needs of the one before. norms: of the last gradient that was finite, and of its update.
_FRESH = {
    'sums': None, 'steps': 0, 'error': None, 'nonfinite': 0, 'pass': 0, 'bad': 0, 'norms': {}, 'stall': (0.0, 0.0, 0),
}  # fmt: skip


class Budget(NamedTuple):
    """What a run puts up with, and says each time; more ends it."""

    on_nonfinite: str  # 'stop' or 'skip'
    max_nonfinite: int  # batches left out
    max_bad: int  # unreadable images in a pass through the data


@jax.jit
def _packed(report: dict) -> jax.Array:
    """A report's numbers in one array: to fetch each by itself takes about as long as a fast step."""
    return jnp.stack(jax.tree.leaves(report))


class TrainLog:
    """Collects the reports of training steps two steps late, so that fetching them never makes the device wait.

    A line is the mean over all steps since the line before; its speed and data wait are over the same steps, and at
    least the last eight, since steps are sent ahead of the device unevenly. What a run may not put up with ends it
    here: DivergedError for losses and gradients that are not finite, UserError for images that cannot be read.

    saved: `state()` of the run that this one goes on with.
    """

    def __init__(
        self,
        writer: writers.RunWriter,
        *,
        batch_size: int,
        examples: int,
        total_steps: int,
        num_classes: int,
        budget: Budget,
        saved: dict | None = None,
    ):
        self._writer, self._budget = writer, budget
        self._batch_size, self._examples, self._total_steps = batch_size, examples, total_steps
        self._saved = {**_FRESH, **(saved or {})}
        self._pending = deque()
        self._clock = deque([(time.perf_counter(), 0.0)])  # (when it was sent, seconds its batch was waited for)
        self._paused = 0.0  # seconds that were no training
        self._printed = -math.inf
        window = min(1000, max(100, math.ceil(examples / batch_size)))
        self._stall = Stall(num_classes, window, *self._saved['stall'])

    def add(self, step: int, report: dict, *, waited: float, log: bool) -> None:
        """report: of `steps.train_step`, on device. waited: seconds spent waiting for its batch. log: write a line."""
        sent = time.perf_counter() - self._paused
        self._pending.append((step, jax.tree.structure(report), _packed(report), waited, sent, log))
        while len(self._pending) > 2:
            self._take()

    @contextlib.contextmanager
    def pause(self):
        """Around validation and saving. First fetches all reports, so that what is on the device is known to be finite;
        the time inside does not count in images/s."""
        self._take_all()
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def reached(self, error: float) -> bool:
        """Whether the last line's training error is that, percent, or less; fetches all reports first."""
        self._take_all()
        return reached(self._saved, error)

    def state(self) -> dict:
        """What a run that goes on from here needs to log as this one would have; JSON. Within `pause`."""
        return {**self._saved, 'stall': self._stall.so_far}

    def _take_all(self) -> None:
        while self._pending:
            self._take()

    def _take(self) -> None:
        step, structure, numbers, waited, sent, log = self._pending.popleft()
        report = jax.tree.unflatten(structure, np.asarray(numbers))
        rate = float(report.pop('learning_rate'))
        norms = {name: report.pop(name) for name in ('gradient_norm', 'gradient_norms', 'update_norms')}
        saved = self._saved
        saved['steps'] += 1
        self._clock.append((sent, waited))
        self._count_bad(step, self._batch_size - round(float(report['weight'])))
        if report.pop('finite'):
            saved['sums'] = metrics.merge(saved['sums'], jax.tree.map(float, report))  # float32 cannot add an epoch
            saved['norms'] = jax.tree.map(float, norms)
            if self._stall.seen(float(report['loss']), float(report['weight'])):
                writers.warn(self._stall.advice(step))
        else:
            self._count_nonfinite(step, rate)
        if log and saved['sums'] and saved['sums']['weight']:
            self._line(step, rate)

    def _count_nonfinite(self, step: int, rate: float) -> None:
        self._saved['nonfinite'] += 1
        count, most = self._saved['nonfinite'], self._budget.max_nonfinite
        what = f'step {step}: loss, gradient or update is not finite (learning rate {rate:g})'
        remedy = 'Lower optim.learning_rate (in another directory, if this has a checkpoint).'
        if self._budget.on_nonfinite == 'stop':
            raise DivergedError(f'{what}; this update was discarded, and no later state is saved. {remedy}')
        if count > most:
            raise DivergedError(f'{what}, as in {count - 1} batches before; max_nonfinite={most}. {remedy}')
        writers.warn(f'{what}; its batch is left out, number {count} of at most max_nonfinite={most}.')

    def _count_bad(self, step: int, count: int) -> None:
        """count: images of weight 0 in the batch of this step, on all processes; who read them has named them."""
        saved, most = self._saved, self._budget.max_bad
        first, last = ((step * self._batch_size - back) // self._examples for back in (self._batch_size, 1))
        if first > saved['pass']:
            saved.update({'pass': first, 'bad': 0})
        saved['bad'] += count
        while saved['pass'] < last:  # a batch of two passes: to the second belongs what the first cannot have held
            saved.update({'pass': saved['pass'] + 1, 'bad': max(0, saved['bad'] - most)})
        if count and saved['bad'] > most:
            raise UserError(
                f'step {step}: {saved["bad"]} images of this pass cannot be read (named above); data.max_bad={most}. '
                'Prepare the data again, or raise --config.data.max_bad.'
            )

    def _line(self, step: int, rate: float) -> None:
        while len(self._clock) > 1 + max(8, self._saved['steps']):
            self._clock.popleft()
        elapsed = max(self._clock[-1][0] - self._clock[0][0], 1e-9)
        speed = (len(self._clock) - 1) * self._batch_size / elapsed
        line = {
            'step': step,
            'epoch': step * self._batch_size / self._examples,
            'split': 'train',
            **metrics.means(self._saved['sums']),
            'learning_rate': rate,
            **self._saved['norms'],
            'images_per_second': speed,
            'data_wait': min(1.0, sum(waited for _, waited in list(self._clock)[1:]) / elapsed),
        }
        self._writer.write(line)
        now = time.perf_counter()
        if now - self._printed >= 1 or step == self._total_steps:
            left = (self._total_steps - step) * self._batch_size / speed
            writers.progress(line, self._total_steps, f'  ETA {writers.duration(left)}')
            self._printed = now
        self._saved.update({'sums': None, 'steps': 0, 'error': line['top1_error']})


def fits(saved) -> bool:
    """Whether what a checkpoint holds has the form of `TrainLog.state()`; None, where there was no log, has."""
    if saved is None:
        return True
    if not isinstance(saved, dict) or not saved.keys() <= _FRESH.keys():
        return False
    saved = {**_FRESH, **saved}
    sums, stall, error = saved['sums'], saved['stall'], saved['error']
    numbers = [saved[name] for name in ('steps', 'nonfinite', 'pass', 'bad')] + ([] if error is None else [error])
    if not isinstance(saved['norms'], dict) or not isinstance(stall, list | tuple) or not isinstance(sums, dict | None):
        return False
    numbers += [*stall, *(sums or {}).values(), *jax.tree.leaves(saved['norms'])]
    known = sums is None or sums.keys() == set(metrics.NAMES)
    return known and len(stall) == 3 and all(type(number) in (int, float) for number in numbers)


def reached(saved: dict | None, error: float) -> bool:
    """Whether the last line in a log's `state()` has that training error, percent, or less; 0 is never reached."""
    last = (saved or {}).get('error')
    return error > 0 and last is not None and last <= error


class Stall:
    """Sees a loss that stays where guessing is: at ln(classes), 1% more or less, over the last `window` updates."""

    def __init__(self, num_classes: int, window: int, loss: float = 0.0, weight: float = 0.0, steps: int = 0):
        """loss, weight, steps: `so_far` of the run that this one goes on with."""
        self._guessing, self._window = math.log(num_classes), window
        self._loss, self._weight, self._steps = loss, weight, steps

    @property
    def so_far(self) -> list[float]:
        """Loss, weight and updates of this window."""
        return [self._loss, self._weight, self._steps]

    def seen(self, loss: float, weight: float) -> bool:
        """Counts a batch in; whether a window ended and its loss stayed there. loss, weight: summed over the batch."""
        self._loss, self._weight, self._steps = self._loss + loss, self._weight + weight, self._steps + 1
        if self._steps < self._window:
            return False
        mean = self._loss / max(self._weight, 1)
        self._loss = self._weight = 0.0
        self._steps = 0
        return abs(mean - self._guessing) < 0.01 * self._guessing

    def advice(self, step: int) -> str:
        return (
            f'step {step}: over the last {self._window} updates the loss was that of guessing, ln(classes) = '
            f'{self._guessing:.2f}; nothing is learnt yet. Remedies: wider initial weights (as '
            '--config=configs/paper.py:init=authors), a third of optim.learning_rate or three times as much, a look at '
            'the labels.'
        )
