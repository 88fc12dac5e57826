"""Measures images/s of the training step, of the input pipeline, of both together, and of data preparation."""

import functools
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stdout
from types import ModuleType
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from alexnet_jax.benchmark import hlo_cost
from alexnet_jax.core import sharding
from alexnet_jax.data import datasets, pipeline
from alexnet_jax.prepare import prepare
from alexnet_jax.training import build, train_log
from alexnet_jax.utils.errors import UserError

OURS, TORCH = 'alexnet_jax', 'torch'
_MIN_SECONDS = 2.0  # per measurement
_MAX_TORCH_IMAGES = 20_000  # number of images to copy to JPEG files for PyTorch


class Contender(NamedTuple):
    """A program that is measured, alternating with others."""

    name: str
    measure: Callable[[], float]  # runs one measurement and returns the rate, such as images/s
    facts: dict[str, Any] = {}  # noqa: RUF012  compile time, memory, FLOPs


class Options(NamedTuple):
    """Measurement options."""

    torch_baseline: ModuleType | None  # `benchmark.torch_baseline`, or None to measure without PyTorch
    steps: int  # batches per measurement; 0: automatic
    precision: str  # of matrix products: 'float32', 'tf32' or 'bfloat16'


def measure_in_turns(contenders: Sequence[Contender], repeats: int) -> dict[str, list[float]]:
    """Returns the rates of all measurements by contender. Every second round reverses the order."""
    rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for i in range(repeats):
        for contender in contenders if i % 2 == 0 else contenders[::-1]:
            rates[contender.name].append(contender.measure())
    return rates


def skip(stream: Iterator, count: int) -> None:
    """Discards batches that were prepared during another contender's turn."""
    for _ in range(count):
        next(stream)


def images_per_second(step: Callable[[], Any], steps: int, batch_size: int, wait: Callable = lambda: None) -> float:
    """Calls `step` `steps` times and returns images/s. `wait` blocks until all dispatched work is done."""
    began = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return steps * batch_size / (time.perf_counter() - began)


def results(contenders: Sequence[Contender], rates: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Returns the median, the measurements and the facts of each contender by name."""
    measured = {contender.name: (rates[contender.name], contender.facts) for contender in contenders}
    return {
        name: {'median': statistics.median(values), 'measurements': values, **facts}
        for name, (values, facts) in measured.items()
    }


def report(results: dict[str, dict[str, Any]], settings: dict[str, Any], lines: Sequence[str] = ()) -> str:
    """Formats the tables, more lines, a line of JSON and, with PyTorch, a line with the ratio of the medians."""
    table = [f'{"":24} {"images/s":>10} {"lowest":>10} {"highest":>10} {"n":>6}']
    for name, found in results.items():
        measured, median = found['measurements'], found['median']
        line = f'{name:24} {median:10.1f} {min(measured):10.1f} {max(measured):10.1f} {len(measured):6}'
        if 'flops' in found:
            line += f'  {found["flops"] * median / 1e9:.0f} GFLOP/s'
        if 'compile_seconds' in found:
            line += f', compiled in {found["compile_seconds"]} s'
        if found.get('bytes'):
            line += f', {found["bytes"] / 2**30:.2f} GiB'
        table.append(line)
    table += compiled_report(next(iter(results.values())))
    table += [*lines, json.dumps({'images_per_second': results, **settings})]
    if TORCH in results:
        table.append(f'ratio: {results[OURS]["median"] / results[TORCH]["median"]:.3f}')
    return '\n'.join(table)


def compiled_report(facts: dict[str, Any]) -> list[str]:
    """Formats the cost of the compiled step by layer, its communication, and what is known of absent devices."""
    lines = hlo_cost.table(facts['layers']) if 'layers' in facts else []
    for name, (count, size) in facts.get('collectives', {}).items():
        line = f'{count} {name}: {size / 1e6:.3f} MB per step and device'
        links = {link: moved for link, moved in facts.get('links', {}).get(name, {}).items() if moved}
        lines.append(line + ''.join(f', {moved / 1e6:.3f} MB {link}' for link, moved in links.items()))
    if 'floor_us' in facts:
        devices = f'{facts["devices"]} x {facts["device"]}'
        if facts['hosts'] > 1 and 'ICI' not in facts['floor_us']:
            devices += f' in {facts["hosts"]} hosts'
        mesh = ' x '.join(f'{count} {axis}' for axis, count in facts['mesh_shape'].items())
        lines.append(f'{devices}, mesh {mesh}: compiled in {facts["compile_seconds"]} s')
        fits = 'fits' if facts['bytes'] <= facts['memory'] else 'DOES NOT FIT'
        lines.append(f'memory per device: {facts["bytes"] / 2**30:.2f} of {facts["memory"] / 2**30:.1f} GiB: {fits}')
        least = ', '.join(f'{name} {value:,.0f} us' for name, value in facts['floor_us'].items())
        lines.append(f"at the data sheet's rates a step takes at least: {least}")
    return lines


def step_contenders(config: ConfigDict, options: Options, stack: ExitStack) -> list[Contender]:
    """Returns contenders for updates on one batch that stays on the device; with several devices, also on only one."""
    dataset = datasets.synthetic(config.data.image_size, config.model.num_classes)
    setup = build.build(config, dataset)
    ours, options = our_updates(setup, options, stack, name=OURS, on_batches=False)
    contenders = [ours]
    if setup.mesh.size > 1:
        single = config.copy_and_resolve_references()
        single.mesh.update({'data': 1, 'tower': 1})
        one, _ = our_updates(build.build(single, dataset), options, stack, name='one device', on_batches=False)
        contenders.append(one)
    if options.torch_baseline:
        contenders.append(options.torch_baseline.updates(setup, options))
    return contenders


def train_contenders(config: ConfigDict, options: Options, stack: ExitStack) -> list[Contender]:
    """Returns contenders for updates on new batches and, for comparison, on one batch."""
    setup = _setup_with_data(config, limit=bool(options.torch_baseline))
    ours, options = our_updates(setup, options, stack, name=OURS, on_batches=True)
    alone, _ = our_updates(setup, options, stack, name=f'{OURS}, step alone', on_batches=False)
    contenders = [ours, alone]
    if baseline := options.torch_baseline:
        contenders.append(baseline.updates(setup, options, baseline.batches(setup, None, stack)))
    return contenders


def input_contenders(config: ConfigDict, options: Options, stack: ExitStack, *, raw: str | None) -> list[Contender]:
    """Returns contenders for the input pipeline. PyTorch reads images at `raw`, or the prepared records if None."""
    setup = _setup_with_data(config, limit=bool(options.torch_baseline) and not raw)
    stream = setup.train_batches(0)
    stack.callback(stream.close)
    streams = {OURS: stream}
    if options.torch_baseline:
        streams[TORCH] = options.torch_baseline.batches(setup, raw, stack)
    buffered, batch_size = num_buffered(config), config.batch_size
    steps = options.steps or max(16, 2 * buffered)

    def measure(stream: Iterator) -> float:
        skip(stream, buffered)
        rate = images_per_second(lambda: next(stream), steps, batch_size)
        # Wait until the pipeline has refilled its buffers, so that it does not slow down the next contender.
        time.sleep(1.5 * buffered * batch_size / rate)
        return rate

    return [Contender(name, functools.partial(measure, stream)) for name, stream in streams.items()]


def prepare_contenders(config: ConfigDict, options: Options, stack: ExitStack, *, raw: str) -> list[Contender]:
    """Returns the contender for preparing the images at `raw`, including the start of worker processes."""

    def measure() -> float:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
            output = os.path.join(folder, 'prepared')
            began = time.perf_counter()
            prepare.prepare(raw, output)
            seconds = time.perf_counter() - began
            return sum(map(len, datasets.open_dataset(output).splits.values())) / seconds

    return [Contender(OURS, measure)]


CONTENDERS: dict[str, Callable[..., list[Contender]]] = {
    'step': step_contenders,
    'train': train_contenders,
    'input': input_contenders,
    'prepare': prepare_contenders,
}


def _setup_with_data(config: ConfigDict, limit: bool) -> build.TrainingSetup:
    """Builds the training setup with the config's data. limit: use at most `_MAX_TORCH_IMAGES` images."""
    dataset = datasets.open_dataset(config.data.path)
    config.model.num_classes = len(dataset.class_names)
    if limit:
        config.data.fraction = min(config.data.fraction, _MAX_TORCH_IMAGES / len(dataset.split('train')))
    setup = build.build(config, dataset)
    config.data.num_workers = setup.num_workers  # resolves -1
    return setup


def our_updates(
    setup: build.TrainingSetup, options: Options, stack: ExitStack, *, name: str, on_batches: bool
) -> tuple[Contender, Options]:
    """Returns (contender, options) for the updates of `train_and_evaluate`, on new batches or all on the same one.

    If `options.steps` is 0, the returned options have the steps of about two seconds.
    """
    config = setup.config
    key = sharding.random_key(setup.mesh, config.seed)
    stream = setup.train_batches(0)
    stack.callback(stream.close)
    batch, state = setup.to_mesh(next(stream)), setup.steps.init(key)
    prefetched = setup.prefetch(stream)
    if not on_batches:
        stream.close()
    # The log fetches step reports but writes nothing. With num_classes=1 it never detects a loss at chance level.
    limits: dict[str, Any] = {'on_nonfinite': 'skip', 'max_nonfinite': math.inf, 'max_unreadable': math.inf}
    counts = {'batch_size': config.batch_size, 'examples': setup.num_examples, 'total_steps': 0, 'num_classes': 1}
    log = train_log.TrainLog(None, **counts, **limits)
    compiled, facts = hlo_cost.compile_step(setup, options.precision, (state, batch, setup.image_stats, key))
    buffered = num_buffered(config) if on_batches else 0
    step_numbers = itertools.count(1)

    def step() -> None:
        nonlocal state, batch
        if on_batches:
            batch, _ = next(prefetched)
        state, step_report = compiled(state, batch, setup.image_stats, key)
        log.add(next(step_numbers), step_report, waited=0.0, log=False)

    def measure(steps: int) -> float:
        jax.block_until_ready(state)
        skip(stream, buffered)
        return images_per_second(step, steps, config.batch_size, lambda: jax.block_until_ready(state))

    measure(1)  # the first step also allocates memory
    steps = options.steps or max(1, round(_MIN_SECONDS * measure(1) / config.batch_size))
    if steps > 1 and not options.steps:  # batches arrive in bursts
        steps = max(steps, 2 * buffered)
    return Contender(name, functools.partial(measure, steps), facts), options._replace(steps=steps)


def num_buffered(config: ConfigDict) -> int:
    """Returns the largest number of batches that either input pipeline buffers."""
    workers = config.data.num_workers  # PyTorch prefetches two batches per worker
    parts = pipeline.INDEX_BATCHES if config.data.cache == 'device' else 1
    return parts * max(1, workers) * (2 * (config.data.num_threads or pipeline.default_threads(workers)) + 4)


def check_torch(gpu: bool) -> None:
    """Raises UserError if PyTorch is missing or uses another kind of device than JAX."""
    try:
        import torch
    except ImportError as error:
        raise UserError("--against=torch needs PyTorch, which is not installed: pip install -e '.[oracle]'") from error
    if gpu != torch.cuda.is_available():
        first, second = ('JAX', 'PyTorch') if gpu else ('PyTorch', 'JAX')
        raise UserError(
            f'{first} uses a GPU here and {second} does not; install both for the GPU (docs/performance.md) or use '
            '--cpu_devices=1.'
        )
