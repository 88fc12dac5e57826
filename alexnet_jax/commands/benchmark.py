"""Measures images per second of updates, input, training, inference or preparation, also with other programs.

    alexnet_jax benchmark step|input|train|inference|prepare|loop [--against=torch] [--batch_size=128] [--repeats=5]
    alexnet_jax benchmark scaling [--devices=1..1024] [--network=h200]

The measured programs alternate. Each measurement waits for the device once, at its end. The output is a table of
medians, the FLOPs, memory traffic and communication of the compiled step, a line of JSON, and with --against=torch a
line `ratio: X`. On a CPU, step, train and inference also measure a large matrix product and the rates of the memory,
and print the share of these limits that is reached.

--output=FILE.json also writes the measurements to a file, from which docs/tables.py writes tables.
"""

import contextlib
import importlib
import json
import os
import resource
import sys
from typing import Any

from absl import flags

from alexnet_jax.commands.flag import CPU_DEVICES, ConfigFlag, Flag
from alexnet_jax.utils.errors import UserError

PRECISIONS = {'float32': 'float32', 'tf32': 'default', 'bfloat16': 'bfloat16'}  # for jax_default_matmul_precision
NETWORKS = ('h100', 'h200', 'h200_ethernet')  # keys of `scaling.NETWORKS`
AGAINST = Flag('against', None, 'torch: also measure PyTorch, alternating.', choices=('torch',))
CONFIG = ConfigFlag('config', 'paper', 'Name or file of a config, for the network and the optimizer.')
OUTPUT = Flag('output', None, 'A file for the result, in JSON; an existing file is replaced.')
SHARED = (
    CONFIG,
    Flag('batch_size', 0, "Images per batch; 0: the config's batch_size.", at_least=0),
    Flag('repeats', 5, 'Measurements of each program.', at_least=1),
    Flag('steps', 0, 'Batches per measurement; 0: about two seconds, at least twice the buffered batches.', at_least=0),
    Flag('precision', None, 'float32, tf32 or bfloat16, for both; bfloat16 sets model.dtype.', choices=(*PRECISIONS,)),
    CPU_DEVICES,
    OUTPUT,
)


class Step:
    """Measures updates on one batch that stays on the device. With several devices, also measures a single device.

        alexnet_jax benchmark step [--against=torch] [--precision=bfloat16] [--batch_size=128] [--repeats=5]
        alexnet_jax benchmark step --compile_for=h200

    --compile_for only compiles the step, for devices that need not be present: GPUs in one host (h100, 2xh200), 8 GPUs
    in each of 16 hosts (h200:8x16), or the chips of a TPU slice (tpu_v5e:16x16, tpu_v6e:16x16, tpu_v5p:8x8x16,
    tpu_v4:8x8x16). --batch_size counts the images of all devices.
    """

    COMPILE_FOR = Flag('compile_for', None, 'Only compile, for absent devices: h200, 2xh200, h200:8x16, tpu_v5e:16x16.')
    FLAGS = (*SHARED, AGAINST, COMPILE_FOR)

    @staticmethod
    def main(args: flags.FlagValues) -> None:
        if args.compile_for is None:
            return _measure(args, 'step')
        if args.against:
            raise UserError('--compile_for only compiles; remove --against.')
        import jax

        from alexnet_jax.benchmark import hlo_cost, record, throughput
        from alexnet_jax.data import datasets

        record.check_output(args.output)
        jax.config.update('jax_platforms', 'cpu')  # see `topologies.topology_devices`
        settings, config = _settings(args, 'step', _set_precision(args, gpu=True)), args.config
        dataset = datasets.synthetic(config.data.image_size, config.model.num_classes)
        facts = hlo_cost.compile_step_for(config, dataset, settings['precision'], args.compile_for)
        settings |= {'config': config.to_dict(), 'compiled': facts, 'repeats': 1}
        print('\n'.join([*throughput.compiled_report(facts), json.dumps(settings)]), flush=True)
        if args.output:
            record.write(args.output, settings, {'compiled': facts})


class Train:
    """Measures updates on batches of prepared data and, for comparison, on one batch.

    alexnet_jax benchmark train --config.data.path=DIR [--against=torch] [--batch_size=128] [--repeats=5]
    """

    FLAGS = (*SHARED, AGAINST)

    @staticmethod
    def main(args: flags.FlagValues) -> None:
        _measure(args, 'train')


class Input:
    """Measures the input pipeline. PyTorch reads the same images as JPEG files, or the original images at --input.

    alexnet_jax benchmark input --config.data.path=DIR [--against=torch] [--input=RAW] [--repeats=5]
    """

    FLAGS = (*SHARED, AGAINST, Flag('input', None, 'Original images, as for alexnet_jax prepare.'))

    @staticmethod
    def main(args: flags.FlagValues) -> None:
        if args.input and (args.input.startswith('tfds:') or not args.against):
            raise UserError(f'--input={args.input}: expected archives or folders, together with --against=torch.')
        if args.against and args.config.data.cache:
            raise UserError(
                f'data.cache={args.config.data.cache!r} with --against=torch would compare copying cached images with '
                "cropping in PyTorch; use --config.data.cache=''."
            )
        _measure(args, 'input', raw=args.input)


class Prepare:
    """Measures the preparation of the images at --input.

    alexnet_jax benchmark prepare --input=RAW [--repeats=5]
    """

    FLAGS = (*SHARED, Flag('input', None, 'Original images, as for alexnet_jax prepare.', required=True))

    @staticmethod
    def main(args: flags.FlagValues) -> None:
        _measure(args, 'prepare', raw=args.input)


class Inference:
    """Measures the prediction of images in memory on the CPU, with random weights.

    alexnet_jax benchmark inference [--against=torch,onnxruntime,openvino] [--config=paper] [--batch_sizes=1,8,64]

    The other programs run the exports of the network (see alexnet_jax export). Their probabilities are compared first.
    The ratio is ours to the fastest other program, at the batch size where it is lowest.
    """

    FLAGS = (
        ConfigFlag('config', 'paper', 'Name or file of a config, for the network and its preprocessing.'),
        Flag('against', '', 'Programs to compare with: torch, onnxruntime, openvino.'),
        Flag('batch_sizes', '1,8,64', 'Images per call, separated by commas.'),
        Flag('repeats', 5, 'Measurements of each program.', at_least=1),
        CPU_DEVICES,
        OUTPUT,
    )

    @staticmethod
    def main(args: flags.FlagValues) -> None:
        from alexnet_jax.benchmark import inference, record

        record.check_output(args.output)
        against = [name for part in args.against.split(',') if (name := part.strip())]
        inference.check_peers(against)
        sizes = args.batch_sizes.split(',')
        if not all(size.strip().isdecimal() and int(size) for size in sizes):
            raise UserError(f'--batch_sizes={args.batch_sizes}: expected positive integers, such as 1,8,64.')
        settings = _settings(args, 'inference', 'float32')
        settings |= {'config': args.config.to_dict(), 'peers': inference.versions(against)}
        with contextlib.ExitStack() as stack:
            measured = inference.measure(args.config, against, list(map(int, sizes)), args.repeats, stack)
        rates, settings['limits'], lines = measured
        results = inference.results(rates)
        print(inference.report(results, settings, lines), flush=True)
        if args.output:
            record.write(args.output, settings, {'images_per_second': results, 'limits': settings['limits']})


class Loop:
    """Measures the work of the host for each step: the training loop around a step that computes nothing.

    alexnet_jax benchmark loop [--config=quickstart] [--batch_size=128] [--steps=2000] [--repeats=5]

    Synthetic images are in the memory of the device. The last line is the median time of a step.
    """

    FLAGS = (
        ConfigFlag('config', 'quickstart', 'Name or file of a config, for the network and the optimizer.'),
        Flag('batch_size', 128, 'Images per batch.', at_least=1),
        Flag('repeats', 5, 'Measurements.', at_least=1),
        Flag('steps', 2000, 'Steps per measurement.', at_least=1),
        CPU_DEVICES,
        OUTPUT,
    )

    @staticmethod
    def main(args: flags.FlagValues) -> None:
        from absl import logging

        from alexnet_jax.benchmark import loop, record

        record.check_output(args.output)
        settings = _settings(args, 'loop', 'float32')
        args.config.batch_size = args.batch_size
        logging.set_verbosity(logging.ERROR)  # the lines of the run would look like those of training
        measured = loop.host_milliseconds(args.config, args.steps, args.repeats)
        settings |= {'steps': args.steps, 'config': args.config.to_dict()}
        print(json.dumps({'host_milliseconds': measured, **settings}), loop.report(measured, args.batch_size), sep='\n')
        if args.output:
            record.write(args.output, settings, {'host_milliseconds': measured})


class Scaling:
    """Predicts the time of training on many devices, without running anything (docs/scaling.md).

        alexnet_jax benchmark scaling [--devices=1..1024] [--network=h200] [--images_per_device=128] [--epochs=90]

    Computing in bfloat16 is a roofline times the share of it that one H100 reached. For a network other than the
    paper's, this compiles its step, which needs JAX's compiler for NVIDIA GPUs.
    """

    FLAGS = (
        CONFIG,
        Flag('devices', '1..1024', 'Numbers of devices: 1,8,64, or doublings from A to B: A..B.'),
        Flag('network', 'h200', 'Devices and links: h100, h200 or h200_ethernet.', choices=NETWORKS),
        Flag('images_per_device', 128, 'Images of a batch for each device.', at_least=1),
        Flag('epochs', 90.0, 'Epochs of 1,281,167 images.'),
        OUTPUT,
    )

    @staticmethod
    def main(args: flags.FlagValues) -> None:
        import jax

        from alexnet_jax.benchmark import record, scaling_report

        record.check_output(args.output)
        counts = scaling_report.device_counts(args.devices)
        if not args.epochs > 0:
            raise UserError(f'--epochs={args.epochs:g}: expected a positive number.')
        jax.config.update('jax_platforms', 'cpu')  # see `topologies.topology_devices`
        settings = _settings(args, 'scaling', 'bfloat16')
        found = scaling_report.predictions(args.config, args.network, counts, args.images_per_device, args.epochs)
        print(scaling_report.report(found), flush=True)
        if args.output:
            record.write(args.output, settings, found)


SUBCOMMANDS = {
    'step': Step, 'input': Input, 'train': Train, 'inference': Inference, 'prepare': Prepare, 'loop': Loop,
    'scaling': Scaling,
}  # fmt: skip


def _measure(args: flags.FlagValues, mode: str, **options: str | None) -> None:
    """Measures the programs of a mode and prints the report. options: of the mode's function in `CONTENDERS`."""
    import jax

    from alexnet_jax.benchmark import limits, record, throughput

    record.check_output(args.output)
    against = 'against' in args and bool(args.against)
    if against:
        os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # PyTorch needs memory too
        if args.cpu_devices:
            os.environ['CUDA_VISIBLE_DEVICES'] = ''
    gpu, config = jax.devices()[0].platform == 'gpu', args.config
    torch_baseline: Any = None
    if against:
        throughput.check_torch(gpu)
        torch_baseline = importlib.import_module('alexnet_jax.benchmark.torch_baseline')
        if gpu:
            config.mesh.update({'data': 1, 'tower': 1})  # PyTorch uses one GPU
    settings = _settings(args, mode, _set_precision(args, gpu))
    measurement = throughput.Options(torch_baseline, args.steps, settings['precision'])
    machine = limits.contenders() if mode in ('step', 'train') and jax.default_backend() == 'cpu' else []
    with contextlib.ExitStack() as stack:
        contenders = throughput.CONTENDERS[mode](config, measurement, stack, **options)
        rates = throughput.measure_in_turns([*contenders, *machine], args.repeats)
    settings |= {'config': config.to_dict(), 'device_memory': jax.devices()[0].memory_stats()}
    if not machine:  # which holds large arrays of its own
        settings['peak_host_bytes'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch_baseline:
        settings |= torch_baseline.facts()
    results, lines = throughput.results(contenders, rates), []
    if machine:
        ours, settings['limits'] = results[throughput.OURS], limits.summary(rates)
        lines = [limits.add_share(settings['limits'], ours['median'], ours['flops'])]
    print(throughput.report(results, settings, lines), flush=True)
    if args.output:
        limited = {'limits': settings['limits']} if machine else {}
        record.write(args.output, settings, {'images_per_second': results, **limited})


def _settings(args: flags.FlagValues, mode: str, precision: str) -> dict[str, Any]:
    """Returns what is known before a measurement. Call it before the config is changed by what the machine has."""
    from alexnet_jax.benchmark import record
    from alexnet_jax.utils.environment import describe_environment

    name, _ = CONFIG.split(sys.argv)
    repeats = args.repeats if 'repeats' in args else 1  # a prediction is not repeated
    settings = {'mode': mode, 'precision': precision, 'repeats': repeats, **describe_environment()}
    return settings | {'config_name': name or CONFIG.default, 'config_digest': record.config_digest(args.config)}


def _set_precision(args: flags.FlagValues, gpu: bool) -> str:
    """Sets and returns the precision: --precision, or by default the precision that `train` uses on this device."""
    import jax

    config = args.config
    jax.config.update('jax_enable_compilation_cache', False)  # compile times are measured
    precision = args.precision or ('bfloat16' if config.model.dtype == 'bfloat16' else 'tf32' if gpu else 'float32')
    jax.config.update('jax_default_matmul_precision', PRECISIONS[precision])
    config.model.dtype = 'bfloat16' if precision == 'bfloat16' else 'float32'
    if args.batch_size:
        config.batch_size = args.batch_size
    return precision
