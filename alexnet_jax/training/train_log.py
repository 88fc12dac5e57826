"""Averages the reports of training steps into log lines and stops a run on too many failures."""

import contextlib
import dataclasses
import math
import time
from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.core import metrics
from alexnet_jax.training import metric_writer
from alexnet_jax.utils import distributed
from alexnet_jax.utils.errors import DivergedError, UserError
from alexnet_jax.utils.logs import format_duration

LOWER_RATE = 'Lower optim.learning_rate, and use another --workdir if this one has a checkpoint.'


@dataclasses.dataclass
class LogState:
    """Log state that a resumed run needs. Stored as JSON in the checkpoint."""

    sums: dict[str, Any] | None = None  # `metrics.sums` since the last line
    steps: int = 0  # updates since the last line
    error: float | None = None  # top-1 training error of the last line, percent
    nonfinite: int = 0  # batches skipped because a value was not finite
    epoch: int = 0  # the pass through the data that `unreadable` refers to
    unreadable: int = 0  # unreadable images in that pass
    norms: dict[str, float | dict[str, float]] = dataclasses.field(default_factory=dict)  # of the last finite update
    window: tuple[float, float, int] = (0.0, 0.0, 0)  # of `ChanceLevelMonitor`

    def reached(self, error: float) -> bool:
        """Returns whether the last line's training error is at most `error` percent. 0 disables the check."""
        return error > 0 and self.error is not None and self.error <= error


@jax.jit
def _pack(report: dict) -> jax.Array:
    """Stacks a report's numbers into one array: fetching them one by one takes about as long as a fast step."""
    return jnp.stack(jax.tree.leaves(report))


@dataclasses.dataclass
class TrainLog:
    """Collects the reports of training steps and writes them as log lines.

    Reports are fetched two steps late, so the device never waits for the host. A line holds the means over all steps
    since the previous line. Speed and data wait cover the same steps but at least the last eight, because steps are
    dispatched to the device at uneven intervals. Each failure is logged as a warning. More failures than allowed raise
    DivergedError (values that are not finite) or UserError (unreadable images).
    """

    writer: metric_writer.MetricWriter | None  # None: no output
    _: dataclasses.KW_ONLY
    batch_size: int
    examples: int  # images in one pass through the data
    total_steps: int
    num_classes: int
    on_nonfinite: str  # 'stop' or 'skip'
    max_nonfinite: int  # allowed number of skipped batches
    max_unreadable: int  # allowed number of unreadable images in one pass
    saved: dataclasses.InitVar[dict | None] = None  # `state()` of the run to resume

    def __post_init__(self, saved: dict | None):
        self._state = LogState(**(saved or {}))
        self._pending: deque[Any] = deque()
        self._clock = deque([(time.perf_counter(), 0.0)])  # (dispatch time of a step, seconds waited for its batch)
        self._paused = 0.0  # seconds spent on validation and saving
        self._printed = -math.inf
        window = min(1000, max(100, math.ceil(self.examples / self.batch_size)))
        self._monitor = ChanceLevelMonitor(self.num_classes, window, self._state.window)

    def add(self, step: int, report: dict, *, waited: float, log: bool) -> None:
        """Adds a report of `train_step.train_step`. waited: seconds waited for the batch. log: write a line."""
        sent = time.perf_counter() - self._paused
        self._pending.append((step, jax.tree.structure(report), _pack(report), waited, sent, log))
        self._fetch_all(keep=2)

    @contextlib.contextmanager
    def pause(self):
        """Excludes its body from images/s. First fetches all reports, to check that the state is finite."""
        self._fetch_all()
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def reached(self, error: float) -> bool:
        """Returns whether the last line's training error is at most `error` percent. Fetches all reports first."""
        self._fetch_all()
        return self._state.reached(error)

    def state(self) -> dict:
        """Returns the state that a resumed run needs to continue this log, as JSON. Call it within `pause`."""
        return dataclasses.asdict(dataclasses.replace(self._state, window=self._monitor.window))

    def _fetch_all(self, keep: int = 0) -> None:
        while len(self._pending) > keep:
            self._fetch_next()

    def _fetch_next(self) -> None:
        step, structure, numbers, waited, sent, log = self._pending.popleft()
        report = jax.tree.unflatten(structure, np.asarray(numbers))
        rate = float(report.pop('learning_rate'))
        norms = {name: report.pop(name) for name in ('gradient_norm', 'gradient_norms', 'update_norms')}
        state = self._state
        state.steps += 1
        self._clock.append((sent, waited))
        self._count_unreadable(step, self.batch_size - round(float(report['weight'])))
        if report.pop('finite'):
            # Python floats (float64): float32 sums over an epoch lose precision.
            state.sums = metrics.merge(state.sums, jax.tree.map(float, report))
            state.norms = jax.tree.map(float, norms)
            if self._monitor.add(float(report['loss']), float(report['weight'])):
                distributed.warn(
                    f'step {step}: the loss of the last {self._monitor.counted} updates is at chance level, '
                    f'ln(num_classes) = {math.log(self.num_classes):.2f}. Nothing is learned yet. Try wider initial '
                    'weights (as in --config=paper:init=authors) or a learning rate three times lower or higher, and '
                    'check the labels.'
                )
        else:
            self._count_nonfinite(step, rate)
        if log and state.sums and state.sums['weight']:
            self._write_line(step, rate)

    def _count_nonfinite(self, step: int, rate: float) -> None:
        self._state.nonfinite += 1
        count, limit = self._state.nonfinite, self.max_nonfinite
        problem = f'step {step}: loss, gradient or update is not finite (learning rate {rate:g})'
        if self.on_nonfinite == 'stop':
            raise DivergedError(f'{problem}; this update is discarded and no later state is saved. {LOWER_RATE}')
        if count > limit:
            raise DivergedError(f'{problem}, as in {count - 1} batches before; max_nonfinite={limit}. {LOWER_RATE}')
        distributed.warn(f'{problem}; skipping the batch ({count} of at most max_nonfinite={limit}).')

    def _count_unreadable(self, step: int, count: int) -> None:
        """Counts unreadable images per pass. count: images of weight 0 in this batch; warnings have named them."""
        state, limit = self._state, self.max_unreadable
        first, last = ((step * self.batch_size - back) // self.examples for back in (self.batch_size, 1))
        if first > state.epoch:
            state.epoch, state.unreadable = first, 0
        state.unreadable += count
        # If the batch spans two passes, count as many as allowed in the first pass and the rest in the second.
        while state.epoch < last:
            state.epoch, state.unreadable = state.epoch + 1, max(0, state.unreadable - limit)
        if count and state.unreadable > limit:
            raise UserError(
                f'step {step}: {state.unreadable} images of this pass cannot be read (named above): expected at most '
                f'data.max_unreadable={limit}; prepare the data again or raise --config.data.max_unreadable.'
            )

    def _write_line(self, step: int, rate: float) -> None:
        state = self._state
        while len(self._clock) > 1 + max(8, state.steps):
            self._clock.popleft()
        elapsed = max(self._clock[-1][0] - self._clock[0][0], 1e-9)
        speed = (len(self._clock) - 1) * self.batch_size / elapsed
        waited = sum(waited for _, waited in list(self._clock)[1:])
        line: dict[str, Any] = {'step': step, 'epoch': step * self.batch_size / self.examples, 'split': 'train'}
        line |= {**metrics.means(state.sums or {}), 'learning_rate': rate, **state.norms}
        line |= {'images_per_second': speed, 'data_wait': min(1.0, waited / elapsed)}
        if self.writer:
            self.writer.write(line)
        now = time.perf_counter()
        if now - self._printed >= 1 or step == self.total_steps:
            left = (self.total_steps - step) * self.batch_size / speed
            metric_writer.log_line(line, self.total_steps, f'  ETA {format_duration(left)}')
            self._printed = now
        state.sums, state.steps, state.error = None, 0, line['top1_error']


def is_valid_state(saved) -> bool:
    """Returns whether a checkpoint's log has the form of `TrainLog.state()`. None (no log yet) is valid."""
    if saved is None:
        return True
    try:
        state = LogState(**saved)
        sums = dict.fromkeys(metrics.NAMES, 0) if state.sums is None else state.sums
        loss, weight, steps = state.window
        numbers = [loss, weight, steps, *sums.values(), *jax.tree.leaves(state.norms)]
    except (TypeError, ValueError, AttributeError):
        return False
    numbers += [state.steps, state.nonfinite, state.epoch, state.unreadable, 0 if state.error is None else state.error]
    known = isinstance(state.norms, dict) and sums.keys() == set(metrics.NAMES)
    return known and all(type(number) in (int, float) for number in numbers)


@dataclasses.dataclass
class ChanceLevelMonitor:
    """Detects a loss stuck at chance level: within 1% of ln(num_classes) at the end of a window of `length` updates.

    Only the last quarter of a window counts. The mean over a whole window is near ln(num_classes) also for a run that
    starts above it and has learned since.
    """

    num_classes: int
    length: int
    window: tuple[float, float, int] = (0.0, 0.0, 0)  # summed loss and weight of its last quarter; updates so far

    @property
    def counted(self) -> int:
        """Number of updates at the end of a window whose loss counts."""
        return math.ceil(self.length / 4)

    def add(self, loss: float, weight: float) -> bool:
        """Adds a batch's summed loss and weight. Returns True if a window has just ended at chance level."""
        total, count, steps = self.window
        steps += 1
        if steps > self.length - self.counted:
            total, count = total + loss, count + weight
        ended, chance = steps >= self.length, math.log(self.num_classes)
        self.window = (0.0, 0.0, 0) if ended else (total, count, steps)
        return ended and abs(total / max(count, 1) - chance) < 0.01 * chance
