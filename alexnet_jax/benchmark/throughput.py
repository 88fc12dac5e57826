"""Images/s of our updates, our input, both together and our preparation, in turns with others."""

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
_MIN_SECONDS = 2.0  # of a measurement
_MAX_TORCH_IMAGES = 20_000  # that PyTorch gets copies of


class Contender(NamedTuple):
    """What is measured, in turns with others."""

    name: str
    measure: Callable[[], float]  # works to the end; images/s
    facts: dict[str, Any] = {}  # noqa: RUF012  what else is known of it: seconds to compile, bytes, products


class Options(NamedTuple):
    """How contenders are measured."""

    torch_baseline: ModuleType | None  # `benchmark.torch_baseline`, where PyTorch takes turns with us
    steps: int  # batches in a measurement; 0: enough
    precision: str  # of products: 'float32', 'tf32' or 'bfloat16'


def measure_in_turns(contenders: Sequence[Contender], repeats: int) -> dict[str, list[float]]:
    """Images/s of every measurement; who begins alternates."""
    rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for i in range(repeats):
        for contender in contenders if i % 2 == 0 else contenders[::-1]:
            rates[contender.name].append(contender.measure())
    return rates


def skip(stream: Iterator, count: int) -> None:
    """Discards batches that were prepared during the turns of other contenders, before the clock starts."""
    for _ in range(count):
        next(stream)


def images_per_second(step: Callable[[], Any], steps: int, batch_size: int, wait: Callable = lambda: None) -> float:
    """Calls `step` `steps` times; returns images a second. `wait` blocks until all dispatched work is done."""
    began = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return steps * batch_size / (time.perf_counter() - began)


def report(contenders: Sequence[Contender], rates: dict[str, list[float]], settings: dict[str, Any]) -> str:
    """The tables, one line of JSON, and the ratio of the medians where there is PyTorch."""
    lines, results = [f'{"":24} {"images/s":>10} {"lowest":>10} {"highest":>10} {"n":>6}'], {}
    for contender in contenders:
        own, facts = rates[contender.name], contender.facts
        median = statistics.median(own)
        line = f'{contender.name:24} {median:10.1f} {min(own):10.1f} {max(own):10.1f} {len(own):6}'
        line += f'  {facts["flops"] * median / 1e9:.0f} GFLOP/s' if 'flops' in facts else ''
        line += f', compiled in {facts["compile_seconds"]} s' if 'compile_seconds' in facts else ''
        lines.append(line + (f', {facts["bytes"] / 2**30:.2f} GiB' if facts.get('bytes') else ''))
        results[contender.name] = {'median': median, 'measurements': own, **facts}
    lines += compiled_report(contenders[0].facts)
    lines.append(json.dumps({'images_per_second': results, **settings}))
    if TORCH in results:
        lines.append(f'ratio: {results[OURS]["median"] / results[TORCH]["median"]:.3f}')
    return '\n'.join(lines)


def compiled_report(facts: dict[str, Any]) -> list[str]:
    """Lines on what the compiled step does, layer by layer and between devices."""
    lines = hlo_cost.table(facts['layers']) if 'layers' in facts else []
    for name, (count, size) in facts.get('collectives', {}).items():
        lines.append(f'moved by {count} {name}: {size / 1e6:.3f} MB a step and device')
    return lines


def step_contenders(config: ConfigDict, options: Options, stack: ExitStack) -> list[Contender]:
    """Updates on one batch that stays on the device; on several devices also on one of them."""
    dataset = datasets.synthetic(config.data.image_size, config.model.num_classes)
    setup = _build(config, dataset)
    ours, options = our_updates(setup, options, stack, name=OURS, on_batches=False)
    contenders = [ours]
    if setup.mesh.size > 1:
        single = config.copy_and_resolve_references()
        single.mesh.update({'data': 1, 'tower': 1})
        one = our_updates(build.build(single, dataset), options, stack, name='one device', on_batches=False)
        contenders.append(one[0])
    if options.torch_baseline:
        contenders.append(options.torch_baseline.updates(setup, options))
    return contenders


def train_contenders(config: ConfigDict, options: Options, stack: ExitStack) -> list[Contender]:
    """Updates on a new batch each, beside updates on one batch alone."""
    setup = _setup_with_data(config, limit=bool(options.torch_baseline))
    ours, options = our_updates(setup, options, stack, name=OURS, on_batches=True)
    alone, _ = our_updates(setup, options, stack, name=f'{OURS}, step alone', on_batches=False)
    contenders = [ours, alone]
    if baseline := options.torch_baseline:
        contenders.append(baseline.updates(setup, options, baseline.batches(setup, None, stack)))
    return contenders


def input_contenders(config: ConfigDict, options: Options, stack: ExitStack, *, raw: str | None) -> list[Contender]:
    """Training batches from prepared data; PyTorch reads the originals at `raw`, or with None the same squares."""
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
        # Until the pipeline has filled its buffers again, so that it takes nothing from the next one's turn.
        time.sleep(1.5 * buffered * batch_size / rate)
        return rate

    return [Contender(name, functools.partial(measure, stream)) for name, stream in streams.items()]


def prepare_contenders(config: ConfigDict, options: Options, stack: ExitStack, *, raw: str) -> list[Contender]:
    """The whole preparation of the images at `raw`, processes started and all."""

    def measure() -> float:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
            output, began = os.path.join(folder, 'prepared'), time.perf_counter()
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
    """The objects of a config for the data it names; with `limit` for no more images than PyTorch gets copies of."""
    dataset = datasets.open_dataset(config.data.path)
    config.model.num_classes = len(dataset.class_names)
    if limit:
        config.data.fraction = min(config.data.fraction, _MAX_TORCH_IMAGES / len(dataset.split('train')))
    return _build(config, dataset)


def _build(config: ConfigDict, dataset: datasets.Dataset) -> build.TrainingSetup:
    setup = build.build(config, dataset)
    config.data.num_workers = setup.num_workers  # for what -1 stands
    return setup


def our_updates(
    setup: build.TrainingSetup, options: Options, stack: ExitStack, *, name: str, on_batches: bool
) -> tuple[Contender, Options]:
    """Updates as `train_and_evaluate` makes them, on one batch that stays or on a new one each.

    Returns the contender, and the options with `steps` filled in: if it was 0, enough for two seconds.
    """
    config = setup.config
    key = sharding.random_key(setup.mesh, config.seed)
    stream = setup.train_batches(0)
    stack.callback(stream.close)
    batch, state = setup.to_mesh(next(stream)), setup.steps.init(key)
    prefetched = pipeline.prefetch_to_device(stream, setup.to_mesh)
    if not on_batches:
        stream.close()
    # It fetches the reports, and writes nothing. Of one class, no loss is at chance level.
    limits: dict[str, Any] = {'on_nonfinite': 'skip', 'max_nonfinite': math.inf, 'max_unreadable': math.inf}
    counts = {'batch_size': config.batch_size, 'examples': setup.num_examples, 'total_steps': 0, 'num_classes': 1}
    log = train_log.TrainLog(None, **counts, **limits)
    compiled, facts = hlo_cost.compile_step(setup, options.precision, (state, batch, setup.image_stats, key))
    buffered, numbers = num_buffered(config) if on_batches else 0, itertools.count(1)

    def step() -> None:
        nonlocal state, batch
        if on_batches:
            batch, _ = next(prefetched)
        state, step_report = compiled(state, batch, setup.image_stats, key)
        log.add(next(numbers), step_report, waited=0.0, log=False)

    def measure(steps: int) -> float:
        jax.block_until_ready(state)
        skip(stream, buffered)
        return images_per_second(step, steps, config.batch_size, lambda: jax.block_until_ready(state))

    measure(1)  # the first step waits for memory
    steps = options.steps or max(1, round(_MIN_SECONDS * measure(1) / config.batch_size))
    if steps > 1 and not options.steps:  # batches come in bursts, as many as there are workers
        steps = max(steps, 2 * buffered)
    return Contender(name, functools.partial(measure, steps), facts), options._replace(steps=steps)


def num_buffered(config: ConfigDict) -> int:
    """Batches that are ready or under way at most, on either side."""
    workers = config.data.num_workers  # PyTorch has two a worker
    return max(1, workers) * (2 * (config.data.num_threads or pipeline.default_threads(workers)) + 4)


def check_torch(gpu: bool) -> None:
    """After JAX has opened its devices. Raises UserError where there is no PyTorch for the same."""
    try:
        import torch
    except ImportError as error:
        raise UserError("--against=torch needs PyTorch, which is not installed: pip install -e '.[oracle]'") from error
    if gpu != torch.cuda.is_available():
        ours, theirs = ('a GPU', 'none') if gpu else ('no GPU', 'one')
        remedy = 'install both for it (docs/performance.md), or --cpu_devices=1'
        raise UserError(f'JAX has {ours} here and PyTorch {theirs}; {remedy}.')
