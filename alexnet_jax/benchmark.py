"""Images a second of a step, the input, both together or the preparation - beside PyTorch in the same call.

    python -m alexnet_jax.benchmark step|input|train|prepare [--against=torch] [--batch_size=128] [--repeats=5]

step: updates on one batch that stays on the device; on several devices also on one of them. input: training batches
from prepared data; with --input=RAW PyTorch reads and squares those originals, else it reads the same squares as JPEG
files. train: both together, beside the step alone. prepare: --input=RAW into records.

The sides take turns; each is waited for once, at the end of its turn, and a turn is one measurement. Printed are a
table of medians, what the compiled step computes and moves by layer and between devices, a line of JSON and, with
--against=torch, `ratio: X`. With --compile_for=h200 a step is compiled for a GPU that need not be there, and not run.
"""

import contextlib
import json
import math
import os
import resource
import statistics as stats
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags

from alexnet_jax import cli, processes  # JAX only where it is needed: not to prepare
from alexnet_jax.errors import UserError

MODES = ('step', 'input', 'train', 'prepare')
PRECISIONS = {'float32': 'float32', 'tf32': 'default', 'bfloat16': 'bfloat16'}  # for jax_default_matmul_precision
OURS, TORCH = 'alexnet_jax', 'torch'
_LEAST_SECONDS = 2.0  # of a turn


class Side(NamedTuple):
    """What is measured, in turns with others."""

    name: str
    turn: Callable[[], float]  # works to the end; images a second
    facts: dict[str, Any] | None = None  # what else is known of it: seconds to compile, bytes, products


def take_turns(sides: Sequence[Side], repeats: int) -> dict[str, list[float]]:
    """Images/s of every turn; who begins alternates."""
    rates = {side.name: [] for side in sides}
    for i in range(repeats):
        for side in sides if i % 2 == 0 else sides[::-1]:
            rates[side.name].append(side.turn())
    return rates


def report(sides: Sequence[Side], rates: dict[str, list[float]], settings: dict[str, Any]) -> str:
    """The tables, one line of JSON, and the ratio of the medians where there is a peer."""
    lines, found = [f'{"":24} {"images/s":>10} {"lowest":>10} {"highest":>10} {"turns":>6}'], {}
    for side in sides:
        own, facts = rates[side.name], side.facts or {}
        median = stats.median(own)
        line = f'{side.name:24} {median:10.1f} {min(own):10.1f} {max(own):10.1f} {len(own):6}'
        if 'flops' in facts:
            line += f'  {facts["flops"] * median / 1e9:.0f} GFLOP/s'
        if 'compile_seconds' in facts:
            line += f', compiled in {facts["compile_seconds"]} s'
        if facts.get('bytes'):
            line += f', {facts["bytes"] / 2**30:.2f} GiB'
        lines.append(line)
        found[side.name] = {'median': median, 'turns': own, **facts}
    lines += compiled_report(sides[0].facts or {})
    lines.append(json.dumps({'images_per_second': found, **settings}))
    if TORCH in found:
        lines.append(f'ratio: {found[OURS]["median"] / found[TORCH]["median"]:.3f}')
    return '\n'.join(lines)


def compiled_report(facts: dict[str, Any]) -> list[str]:
    """Lines on what the compiled step does, layer by layer and between devices."""
    from alexnet_jax import traffic

    lines = traffic.table(facts['layers']) if 'layers' in facts else []
    for name, (count, size) in facts.get('moved', {}).items():
        lines.append(f'moved by {count} {name}: {size / 1e6:.3f} MB a step and device')
    return lines


def our_training(run, config, steps: int, precision: str, stack, *, name: str, batches: bool) -> tuple[Side, int]:
    """Updates as `train_and_evaluate` makes them, on one batch that stays or on a new one each.

    Returns the side and how many steps its turns have: `steps`, or with 0 what takes two seconds.
    """
    import jax

    from alexnet_jax import sharding, traffic, trainlog

    key = sharding.random_key(run.mesh, config.seed)
    stream = run.batches(0)
    stack.callback(stream.close)
    batch, state = run.to_mesh(next(stream)), run.init(key)
    sent = sharding.prefetch_to_device(stream, run.to_mesh)
    if not batches:
        stream.close()
    log = trainlog.TrainLog(  # fetches the reports, and writes nothing; of one class, no loss is that of guessing
        None, **{'batch_size': config.batch_size, 'examples': run.examples, 'total_steps': 0, 'num_classes': 1},
        budget=trainlog.Budget('skip', math.inf, math.inf),
    )  # fmt: skip
    compiled, facts = traffic.compile_step(run, config.batch_size, precision, (state, batch, run.statistics, key))

    def turn() -> float:  # reads `steps` when it is called: below it is set after the warm-up
        nonlocal state, batch
        jax.block_until_ready(state)
        for _ in range(_ready(config) if batches else 0):  # not those that were made while others had their turn
            next(stream)
        began = time.perf_counter()
        for step in range(1, steps + 1):
            if batches:
                batch, _ = next(sent)
            state, report = compiled(state, batch, run.statistics, key)
            log.add(step, report, waited=0.0, log=False)
        jax.block_until_ready(state)
        return steps * config.batch_size / (time.perf_counter() - began)

    wanted, steps = steps, 1
    turn()  # the first step waits for memory
    steps = wanted or max(1, round(_LEAST_SECONDS * turn() / config.batch_size))
    if batches and steps > 1 and not wanted:  # they come in bursts, as many as there are workers
        steps = max(steps, 2 * _ready(config))
    return Side(name, turn, facts), steps


def torch_training(run, config, steps: int, precision: str, data: Any = None) -> Side:
    """PyTorch's updates, on one batch that stays on the device or on those of its loader."""
    import numpy as np
    import torch

    from alexnet_jax import peer

    size = run.augmentation.image_size
    mean = np.asarray(run.dataset.statistics.mean_image).mean((0, 1))
    threads = processes.cores()
    update, wait = peer.training(run.network, size, mean, config.optim, precision=precision, threads=threads)
    began = time.perf_counter()
    if data is None:
        rng, count = np.random.default_rng(0), config.batch_size
        images = torch.from_numpy(rng.integers(0, 256, (count, size, size, 3), np.uint8))
        labels = torch.from_numpy(rng.integers(0, config.model.num_classes, count))
        batch = [part.to(peer.device()) for part in (images, torch.zeros(count, 3), labels)]
    for _ in range(2):
        peer.forget_peak()  # of what is compiled and chosen
        update(batch if data is None else next(data))
        wait()
    facts = {'first_two_steps_seconds': round(time.perf_counter() - began, 1), 'bytes': peer.peak_bytes()}

    def turn() -> float:
        for _ in range(0 if data is None else _ready(config)):
            next(data)
        began = time.perf_counter()
        for _ in range(steps):
            update(batch if data is None else next(data))
        wait()
        return steps * config.batch_size / (time.perf_counter() - began)

    return Side(TORCH, turn, facts)


def reading(name: str, stream, batch_size: int, steps: int, ready: int) -> Side:
    """Batches of a pipeline; `ready` of them may lie there when its turn comes: taken before the clock starts."""

    def turn() -> float:
        for _ in range(ready):
            next(stream)
        began = time.perf_counter()
        for _ in range(steps):
            next(stream)
        rate = steps * batch_size / (time.perf_counter() - began)
        _refill(ready, batch_size, rate)
        return rate

    return Side(name, turn)


def _refill(ready: int, batch_size: int, rate: float) -> None:
    """Waits until a pipeline has filled its buffers again, so that it takes nothing from the next one's turn."""
    time.sleep(1.5 * ready * batch_size / rate)


def _ready(config) -> int:
    """Batches that lie ready or are under way at most, on either side."""
    from alexnet_jax import data

    workers = config.data.num_workers  # PyTorch has two a worker
    return max(1, workers) * (2 * (config.data.num_threads or data.default_threads(workers)) + 4)


def preparing(raw: str) -> Side:
    """The whole preparation, processes started and all."""
    from alexnet_jax import prepare, sources

    def turn() -> float:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            began = time.perf_counter()
            prepare.prepare(raw, os.path.join(folder, 'prepared'))
            took = time.perf_counter() - began
            splits = sources.open_dataset(os.path.join(folder, 'prepared')).splits
            return sum(len(split) for split in splits.values()) / took

    return Side(OURS, turn)


def _sides(mode: str, config, stack, *, torch: bool, steps: int, raw: str | None, precision: str) -> list[Side]:
    from alexnet_jax import assemble, sources

    if torch:
        from alexnet_jax import peer
    if mode == 'prepare':
        return [preparing(raw)]
    if mode == 'step':
        dataset = sources.synthetic(config.data.image_size, config.model.num_classes)
    else:
        dataset = sources.open_dataset(config.data.path)
        config.model.num_classes = len(dataset.class_names)
        if torch and not raw:  # it gets copies of the records; both sides read so many at most
            config.data.fraction = min(config.data.fraction, 20_000 / len(dataset.split('train')))
    run = assemble.build(config, dataset)
    config.data.num_workers = run.num_workers  # for what -1 stands
    if mode == 'input':
        ready = _ready(config)
        steps = steps or max(16, 2 * ready)
        stream = run.batches(0)
        stack.callback(stream.close)
        sides = [reading(OURS, stream, config.batch_size, steps, ready)]
        if torch:
            stream = peer.batches(run, config, raw, stack)
            sides.append(reading(TORCH, stream, config.batch_size, steps, ready))
        return sides
    ours, steps = our_training(run, config, steps, precision, stack, name=OURS, batches=mode == 'train')
    sides = [ours]
    if mode == 'train':
        alone = f'{OURS}, step alone'
        sides.append(our_training(run, config, steps, precision, stack, name=alone, batches=False)[0])
    elif run.mesh.size > 1:
        single = config.copy_and_resolve_references()
        single.mesh.update({'data': 1, 'tower': 1})
        one = assemble.build(single, dataset)
        sides.append(our_training(one, single, steps, precision, stack, name='one device', batches=False)[0])
    if torch:
        data = peer.batches(run, config, raw, stack) if mode == 'train' else None
        sides.append(torch_training(run, config, steps, precision, data))
    return sides


def _find_torch(gpu: bool) -> None:
    """After JAX has opened its devices. Raises UserError where there is no PyTorch for the same."""
    try:
        import torch
    except ImportError as error:
        raise UserError("--against=torch needs PyTorch, which is not installed: pip install -e '.[oracle]'") from error
    if gpu != torch.cuda.is_available():
        ours, theirs = ('a GPU', 'none') if gpu else ('no GPU', 'one')
        raise UserError(
            f'JAX has {ours} here and PyTorch {theirs}; install both for it (docs/performance.md), or --cpu_devices=1.'
        )


def main(words: Sequence[str]) -> None:
    args, config = flags.FLAGS, flags.FLAGS.config
    mode = words[0]
    if mode not in MODES or len(words) > 1:
        raise UserError(f'{" ".join(words)!r}; expected one of {", ".join(MODES)}.')
    if mode == 'prepare' and not args.input:
        raise UserError('--input is missing: images for alexnet_jax.prepare.')
    if mode == 'prepare' and args.against:
        raise UserError('prepare has nothing to be compared with; omit --against.')
    if args.input and mode in ('step', 'train'):
        raise UserError(f'--input is for input and prepare; {mode} does not read originals.')
    if args.input and (args.input.startswith('tfds:') or not args.against) and mode == 'input':
        raise UserError('--input is what --against=torch reads: archives or folders of files.')
    if mode == 'input' and args.against and config.data.cache:
        raise UserError(
            "input --against=torch would compare PyTorch's cutting with our copying; use --config.data.cache=''."
        )
    if args.compile_for is not None and (mode != 'step' or args.against):
        raise UserError('--compile_for is for step alone: it compiles, and runs nothing.')
    if args.against:
        os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # the peer needs memory too
        if args.cpu_devices:
            os.environ['CUDA_VISIBLE_DEVICES'] = ''
    cli.set_up_jax()
    import jax

    from alexnet_jax import sources, traffic, writers

    if args.compile_for is not None:
        jax.config.update('jax_platforms', 'cpu')  # see `traffic.topology_devices`
    gpu = args.compile_for is not None or jax.devices()[0].platform == 'gpu'
    if args.against:
        _find_torch(gpu)
        if gpu:
            config.mesh.update({'data': 1, 'tower': 1})  # as many as PyTorch's side has
    jax.config.update('jax_enable_compilation_cache', False)  # for the seconds that compiling takes
    # Without --precision: the one in which `main` trains on this device.
    precision = args.precision or ('bfloat16' if config.model.dtype == 'bfloat16' else 'tf32' if gpu else 'float32')
    jax.config.update('jax_default_matmul_precision', PRECISIONS[precision])
    config.model.dtype = 'bfloat16' if precision == 'bfloat16' else 'float32'
    if args.batch_size:
        config.batch_size = args.batch_size
    settings = {'mode': mode, 'precision': precision, **writers.environment()}
    if args.compile_for is not None:
        dataset = sources.synthetic(config.data.image_size, config.model.num_classes)
        facts = traffic.compile_step_for(config, dataset, precision, args.compile_for)
        record = {**settings, 'config': config.to_dict(), 'compiled': facts}
        print('\n'.join([*compiled_report(facts), json.dumps(record)]), flush=True)
        return
    wanted = {'torch': bool(args.against), 'steps': args.steps, 'raw': args.input, 'precision': precision}
    with contextlib.ExitStack() as stack:
        sides = _sides(mode, config, stack, **wanted)
        rates = take_turns(sides, args.repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    settings |= {'config': config.to_dict(), 'repeats': args.repeats, 'peak_host_bytes': peak}
    settings['device_memory'] = jax.devices()[0].memory_stats()
    if args.against:
        from alexnet_jax import peer

        settings |= peer.facts()
    print(report(sides, rates, settings), flush=True)


if __name__ == '__main__':
    cli.define_config('config', 'configs/paper.py', 'A file of configs/: the network and its update.')
    flags.DEFINE_enum('against', None, [TORCH], 'A peer that takes turns with us.')
    flags.DEFINE_integer('batch_size', 0, 'Images a batch; 0: as the config says.', lower_bound=0)
    flags.DEFINE_integer('repeats', 5, 'Turns of each side.', lower_bound=1)
    enough = '0: enough for two seconds, or to empty the buffers of a pipeline twice.'
    flags.DEFINE_integer('steps', 0, f'Batches in a turn; {enough}', lower_bound=0)
    flags.DEFINE_enum('precision', None, list(PRECISIONS), 'Of products on both sides; of the model too if bfloat16.')
    flags.DEFINE_string('compile_for', None, "Only compiles, for GPUs that need not be there: 'h200', '2xh200'.")
    flags.DEFINE_string('input', None, 'Originals, as for alexnet_jax.prepare.')
    cli.define_cpu_devices()
    cli.run(main, required=('config',), arguments='one mode (step, input, train, prepare)')
