"""Predictions of `scaling` for a config and a cluster, as a table and as a record."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from alexnet_jax.benchmark import hlo_cost, scaling, scaling_points
from alexnet_jax.benchmark.scaling import Layer, Rows, Step
from alexnet_jax.core import architecture
from alexnet_jax.data import datasets
from alexnet_jax.training import check_config
from alexnet_jax.utils.config_files import get_config
from alexnet_jax.utils.errors import UserError

_MOST_DEVICES = 2**20
_COMPILED = (128, 1024)  # batches
_JPEG_BYTES, _JPEG_RATE = 33e3, 2830  # of a prepared image, and images/s a core: docs/imagenet.md, docs/performance.md


def device_counts(text: str) -> list[int]:
    """Returns the numbers of devices of a flag: '1,8,64', or the doublings '1..1024'. Raises UserError otherwise.

    >>> device_counts('1..16'), device_counts('8,1')
    ([1, 2, 4, 8, 16], [1, 8])
    """
    numbers = re.split(r',|\.\.', text)
    counts = [int(number) for number in numbers if re.fullmatch('[0-9]{1,9}', number)]
    ranged = '..' in text
    if len(counts) < len(numbers) or not all(0 < n <= _MOST_DEVICES for n in counts) or (ranged and len(counts) != 2):
        raise UserError(f'--devices={text}: expected numbers such as 1,8,64, or doublings such as 1..1024.')
    if not ranged:
        return sorted(set(counts))
    low, high = counts
    if low > high:
        raise UserError(f'--devices={text}: {low} is above {high}; use {high}..{low}.')
    return [low << power for power in range(high.bit_length()) if low << power <= high]


def layers_of(config: ConfigDict) -> dict[str, Layer]:
    """Returns the layers of a config's network."""
    network, augmentation = check_config.network_and_augmentation(config)
    shapes = architecture.infer_shapes(network, augmentation.image_size)
    sizes: dict[str, Layer] = {}
    for name, shape in shapes.items():
        inputs, outputs = math.prod(shape.inputs), math.prod(shape.linear)
        sizes[name] = Layer(shape.parameters, inputs, outputs, shape.flops, network.layers[name].groups)
    return sizes


def program_of(config: ConfigDict, kind: str) -> Mapping[int, Rows]:
    """Returns the bytes of a config's step for two batches: those of the paper's network, or compiled for `kind`.

    kind: 'h100' or 'h200'. Raises UserError if the config is another and JAX's compiler for GPUs is not installed.
    """
    config, paper = config.copy_and_resolve_references(), get_config('paper', packaged=True)
    for one in (config, paper):
        one.model.dtype = 'bfloat16'
    ours, theirs = config.to_dict(), paper.to_dict()  # of which one is locked and therefore never equal
    same = all(ours[key] == theirs[key] for key in ('model', 'optim', 'grad_accum_steps'))
    if same and config.data.image_size == paper.data.image_size:
        return scaling.PAPER
    config.mesh.update({'data': 1, 'tower': 1})
    dataset, found = datasets.synthetic(config.data.image_size, config.model.num_classes), {}
    for batch in _COMPILED:
        config.batch_size = batch
        try:
            layers = hlo_cost.compile_step_for(config, dataset, 'bfloat16', kind)['layers']
        except UserError as error:
            raise UserError(f"a network other than the paper's must be compiled: {error}") from error
        parts = [name for name in layers if name not in ('all', 'masks')]
        found[batch] = {name: [layers[name][key] / 1e6 for key in ('product_bytes', 'other_bytes')] for name in parts}
    return found


def predictions(config: ConfigDict, name: str, counts: Sequence[int], images: int, epochs: float) -> dict[str, Any]:
    """Returns the predicted steps by number of devices and scheme, and the comparison with published measurements.

    name: a key of `scaling.NETWORKS`. images: per device.
    """
    layers = layers_of(config)
    paper = layers_of(get_config('paper', packaged=True))
    share = scaling.efficiency(paper, hlo_cost.PEAKS)
    program = program_of(config, name.partition('_')[0])
    steps = scaling.predict(layers, program, name, hlo_cost.PEAKS, share, [1, *counts], images)
    alone = steps[0].rate
    table: dict[str, dict[str, Any]] = {}
    for step in steps[1:]:
        table.setdefault(str(step.devices), {})[step.scheme] = _facts(step, alone, epochs)
    return {
        'network': name,
        'images_per_device': images,
        'epochs': epochs,
        'share_of_roofline': share,
        'steps': table,
        'published': scaling_points.compare(),
    }


def _facts(step: Step, alone: float, epochs: float) -> dict[str, Any]:
    return {
        'batch': step.devices * step.images,
        'compute_ms': 1e3 * step.compute,
        'communication_ms': 1e3 * step.communication,
        'hidden_ms': 1e3 * step.hidden,
        'images_per_second': step.rate,
        'images_per_second_overlapped': step.overlapped_rate,
        'efficiency': step.rate / alone / step.devices,
        'seconds': epochs * scaling.IMAGENET / step.rate,
        'limit': step.limit,
        'all_reduce': step.algorithm,
    }


def best(schemes: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the fastest scheme of a number of devices."""
    return max(schemes, key=lambda scheme: schemes[scheme]['images_per_second'])


def duration(seconds: float) -> str:
    """Formats a time: seconds up to two minutes, minutes up to two hours, then hours."""
    unit, name = next(
        (unit, name) for unit, name in ((3600, 'h'), (60, 'min'), (1, 's')) if seconds >= 2 * unit or unit == 1
    )
    return f'{seconds / unit:.{0 if seconds / unit >= 10 else 1}f} {name}'


def report(found: Mapping[str, Any]) -> str:
    """Formats predictions as text: a row for each number of devices and scheme, and what they imply."""
    titles = (
        'devices',
        'scheme',
        'batch',
        'compute ms',
        'communication',
        'images/s',
        'efficiency',
        'time',
        'overlapped',
    )
    lines = [
        f'{found["network"]}, {found["images_per_device"]} images per device, bfloat16, '
        f'{found["share_of_roofline"]:.1%} of the roofline (one H100, measured). Predicted, not measured; * is the '
        'fastest scheme. Communication does not overlap, except in the column "overlapped".',
        '{:>8}  {:8}{:>9}{:>12}{:>15}{:>13}{:>12}{:>9}{:>13}  limit, all-reduce'.format(*titles),
    ]
    for devices, schemes in found['steps'].items():
        fastest = best(schemes)
        for scheme, row in schemes.items():
            mark = '*' if scheme == fastest and len(schemes) > 1 else ' '
            limit, spent = ', '.join(filter(None, [row['limit'], row['all_reduce']])), row['communication_ms']
            lines.append(
                f'{devices:>8} {mark}{scheme:8}{row["batch"]:>9,}{row["compute_ms"]:12.3f}{spent:15.3f}'
                f'{row["images_per_second"]:13,.0f}{row["efficiency"]:12.1%}{duration(row["seconds"]):>9}'
                f'{row["images_per_second_overlapped"]:13,.0f}  {limit}'
            )
    large = [count for count, schemes in found['steps'].items() if schemes['data']['batch'] > scaling.LARGEST_BATCH]
    if large:
        lines.append(
            f'With {" and ".join(large)} devices the batch is above {scaling.LARGEST_BATCH:,}, the largest with a '
            'published recipe: use fewer --images_per_device.'
        )
    errors = found['published']['mean_error_percent']['all']
    lines.append(
        f'Mean error of the model against {errors["points"]} published measurements: {errors["without overlap"]:.1f}% '
        f'without and {errors["with overlap"]:.1f}% with overlap (docs/scaling.md).'
    )
    return '\n'.join([*lines, record_line(found)])


def record_line(found: Mapping[str, Any]) -> str:
    """Returns a sentence on what it takes to reach the fastest published training."""
    epochs, seconds = scaling.RECORD
    rate = epochs * scaling.IMAGENET / seconds
    rows = [(devices, scheme := best(schemes), schemes[scheme]) for devices, schemes in found['steps'].items()]
    enough = [row for row in rows if row[2]['images_per_second'] >= rate]
    goal = f'{epochs} epochs in {seconds / 60:g} minutes (Sun et al., 512 Volta) are {rate:,.0f} images/s: '
    if not enough:
        devices, scheme, row = max(rows, key=lambda row: row[2]['images_per_second'])
        return (
            goal
            + f'not reached; {devices} devices ({scheme}) reach {row["images_per_second"] / rate:.0%} ({row["limit"]}).'
        )
    devices, scheme, row = enough[0]
    return goal + (
        f'{devices} devices ({scheme}) at a batch of {row["batch"]:,}. The input must deliver '
        f'{rate * 256 * 256 * 3 / 1e9:,.0f} GB/s of raw squares of 256 px, or {rate * _JPEG_BYTES / 1e9:,.0f} GB/s of '
        f'JPEG and {rate / _JPEG_RATE:,.0f} cores that each decode {_JPEG_RATE:,} images/s.'
    )
