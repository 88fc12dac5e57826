"""Measures the work of the host for each step of training: the training loop around a step that computes nothing."""

import dataclasses
import json
import math
import os
import statistics
import tempfile
from typing import Any

import jax
from ml_collections import ConfigDict

from alexnet_jax.core.sharding import replicated
from alexnet_jax.data import datasets
from alexnet_jax.training import build, train

_IMAGES = 20_000


def host_milliseconds(config: ConfigDict, steps: int, repeats: int) -> list[float]:
    """Returns the milliseconds of a step, in `repeats` parts of `steps` steps of one run.

    The run is that of `train_and_evaluate` on synthetic images in the memory of the device, without validation. Its
    step has the arguments and results of an update, and increases the step number. The first part is not counted.
    """
    config = config.copy_and_resolve_references()
    config.data.cache, config.num_steps = 'device', (repeats + 1) * steps
    config.log_every_steps, config.checkpoint_every_steps = steps, config.num_steps
    one = datasets.synthetic(config.data.image_size, config.model.num_classes)
    records = one.split('train')
    records *= math.ceil(min(_IMAGES, 2**30 / records[0]['image'].size) / len(records))  # at most 1 GiB
    setup = _without_update(build.build(config, one._replace(splits={'train': records})))
    with tempfile.TemporaryDirectory() as workdir:
        train.run(setup, workdir)
        with open(os.path.join(workdir, 'metrics.jsonl'), encoding='utf-8') as file:
            rates = [json.loads(line)['images_per_second'] for line in file]
    return [1000 * config.batch_size / rate for rate in rates[1:]]


def report(milliseconds: list[float], batch_size: int) -> str:
    """Formats the median of `host_milliseconds`, and the images/s that it allows."""
    median = statistics.median(milliseconds)
    spread = f'{min(milliseconds):.3f} - {max(milliseconds):.3f}, n = {len(milliseconds)}'
    return f'host work per step: {median:.3f} ms ({spread}), at most {1000 * batch_size / median:,.0f} images/s'


def _without_update(setup: build.TrainingSetup) -> build.TrainingSetup:
    """Replaces the training step by one that only increases the step number, with a meaningless report."""
    batches = setup.train_batches(0)
    arguments = (setup.steps.state_shapes, setup.to_mesh(next(batches)), setup.image_stats, setup.key)
    batches.close()
    _, shapes = jax.eval_shape(setup.steps.train_step, *arguments)
    shardings = jax.tree.map(lambda x: x.sharding, setup.steps.state_shapes)

    def step(state, batch, image_stats, key) -> tuple[Any, dict[str, Any]]:
        report = jax.tree.map(lambda x: batch['weight'].sum().astype(x.dtype), shapes)
        return state._replace(step=state.step + 1), report

    empty = jax.jit(step, out_shardings=(shardings, replicated(setup.mesh)), donate_argnums=0)
    return dataclasses.replace(setup, steps=dataclasses.replace(setup.steps, train_step=empty))
