"""Measures images/s of inference with other runtimes, which run the exports of the same network."""

import functools
import importlib.util
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib import metadata
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax.benchmark import limits
from alexnet_jax.benchmark.throughput import OURS, Contender, images_per_second, measure_in_turns
from alexnet_jax.checkpoints.manager import Checkpoint, config_to_json
from alexnet_jax.core.model import init_params
from alexnet_jax.data import datasets
from alexnet_jax.export import hub, onnx_model, pytorch_module
from alexnet_jax.inference.evaluate import Evaluator
from alexnet_jax.training.check_config import network_and_augmentation
from alexnet_jax.utils import processes
from alexnet_jax.utils.errors import UserError

_MIN_SECONDS = 1.0  # per measurement
_TOLERANCE = 1e-3  # largest difference of a probability between programs that are compared
Predict = Callable[[np.ndarray], np.ndarray]  # uint8 [N, S, S, 3] -> probabilities [N, K]


def random_checkpoint(config: ConfigDict) -> Checkpoint:
    """Returns the network of a config with random weights and the image statistics of random images."""
    network, augmentation = network_and_augmentation(config)
    dataset = datasets.synthetic(augmentation.image_size, network.num_classes)
    assert dataset.image_stats is not None
    params = jax.device_get(init_params(network, jax.random.key(0), augmentation.image_size))
    arguments = (network, augmentation, dataset.record_size, dataset.class_names, dataset.image_stats)
    return Checkpoint(0, params, *arguments, config_to_json(config))


def _onnxruntime(checkpoint: Checkpoint, stack: ExitStack) -> Predict:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = processes.cores()
    model, providers = onnx_model.onnx_model(checkpoint), ['CPUExecutionProvider']
    session = onnxruntime.InferenceSession(model, options, providers=providers)
    return lambda images: session.run(['probabilities'], {'image': images})[0]


def _openvino(checkpoint: Checkpoint, stack: ExitStack) -> Predict:
    import openvino

    settings = {'INFERENCE_NUM_THREADS': processes.cores(), 'PERFORMANCE_HINT': 'LATENCY'}
    settings['INFERENCE_PRECISION_HINT'] = 'f32'
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(onnx_model.onnx_model(checkpoint)), 'CPU', settings)
    return lambda images: compiled(images)['probabilities']


def _torch(checkpoint: Checkpoint, stack: ExitStack) -> Predict:
    import torch

    folder = pathlib.Path(stack.enter_context(TemporaryDirectory()))
    for name in ('safetensors', 'pytorch'):
        hub.write(folder, name, checkpoint, views=1)
    spec = importlib.util.spec_from_file_location('exported_alexnet', folder / pytorch_module.FILE_NAME)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.load(folder)

    def predict(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model.probabilities(torch.from_numpy(images)).numpy()

    return predict


PEERS: dict[str, Callable[[Checkpoint, ExitStack], Predict]] = {
    'torch': _torch,
    'onnxruntime': _onnxruntime,
    'openvino': _openvino,
}


def check_peers(names: Sequence[str]) -> None:
    """Raises UserError for an unknown program, or one that is not installed."""
    for name in names:
        if name not in PEERS:
            raise UserError(f'--against={name}: expected names of {", ".join(PEERS)}, separated by commas.')
        for package in {name, *(('onnx',) if name != 'torch' else ())}:
            if importlib.util.find_spec(package) is None:
                raise UserError(f'--against={name}: needs the package {package}; pip install {package}.')
    if names and jax.default_backend() != 'cpu':
        raise UserError(f'--against={",".join(names)}: compares programs on the CPU; add --cpu_devices=1.')


def versions(names: Sequence[str]) -> dict[str, str]:
    """Returns the versions of installed packages."""
    return {name: metadata.version(name) for name in names}


def measure(
    config: ConfigDict, against: Sequence[str], batch_sizes: Sequence[int], repeats: int, stack: ExitStack
) -> tuple[dict[int, dict[str, list[float]]], dict[int, dict[str, Any]], list[str]]:
    """Returns (rates, limits, lines): the images/s by batch size and program, and on a CPU see `limits.add_bound`.

    Every program maps uint8 images in memory to probabilities in memory. Compilation is not included. Raises UserError
    if their results differ.
    """
    checkpoint = random_checkpoint(config)
    peers = {name: PEERS[name](checkpoint, stack) for name in against}
    side, rates, bounds, lines = checkpoint.record_size, {}, {}, []
    machine = limits.contenders() if jax.default_backend() == 'cpu' else []
    for size in batch_sizes:
        images = np.random.default_rng(0).integers(0, 256, (size, side, side, 3), np.uint8)
        programs = {OURS: Evaluator(checkpoint, batch_size=size).predict, **peers}
        expected = programs[OURS](images)
        for name, predict in programs.items():
            if not (difference := float(np.abs(predict(images) - expected).max())) < _TOLERANCE:
                raise UserError(f'--against={name}: its probabilities differ by {difference:.2g}; nothing is measured.')
        contenders = [Contender(name, _measurement(predict, images)) for name, predict in programs.items()]
        measured = measure_in_turns([*contenders, *machine], repeats)
        rates[size] = {name: measured[name] for name in programs}
        if machine:
            bounds[size] = limits.summary(measured)
            ours = statistics.median(measured[OURS])
            lines.append(limits.add_bound(bounds[size], ours, checkpoint.network, checkpoint.image_size, size))
        print(f'batch {size}: measured', file=sys.stderr, flush=True)
    return rates, bounds, lines


def _measurement(predict: Predict, images: np.ndarray) -> Callable[[], float]:
    once = functools.partial(predict, images)
    steps = max(1, round(_MIN_SECONDS * images_per_second(once, 1, 1)))
    return lambda: images_per_second(once, steps, len(images))


def results(rates: dict[int, dict[str, list[float]]]) -> dict[int, dict[str, Any]]:
    """Returns the median and the measurements of each program by batch size and name."""
    return {
        size: {name: {'median': statistics.median(v), 'measurements': v} for name, v in programs.items()}
        for size, programs in rates.items()
    }


def report(results: dict[int, dict[str, Any]], settings: dict[str, Any], lines: Sequence[str] = ()) -> str:
    """Formats the table, more lines, a line of JSON and, with other programs, our lowest ratio to the fastest."""
    table, ratios = [f'{"":24} {"batch":>6} {"images/s":>10} {"lowest":>10} {"highest":>10} {"n":>6}'], []
    for size, programs in results.items():
        for name, found in programs.items():
            values = found['measurements']
            spread = f'{min(values):10.1f} {max(values):10.1f} {len(values):6}'
            table.append(f'{name:24} {size:6} {found["median"]:10.1f} {spread}')
        if others := [found['median'] for name, found in programs.items() if name != OURS]:
            ratios.append(programs[OURS]['median'] / max(others))
    table += [*lines, json.dumps({'images_per_second': results, **settings})]
    return '\n'.join([*table, *([f'ratio: {min(ratios):.3f}'] if ratios else [])])
