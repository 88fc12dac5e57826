"""Published measurements of AlexNet on several devices, and what `scaling` predicts for them.

The constants are those of the data sheets and of the publications. None is fitted to the measurements.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from alexnet_jax.benchmark.scaling import IMAGENET, NET, NVLINK, PCIE, Layer, Link, Network, Step, messages, step


def alexnet(features: Sequence[int], groups: Sequence[int]) -> dict[str, Layer]:
    """Returns the layers of an AlexNet with these channels and groups in its five convolutional layers.

    Its maps have 55, 27, 13, 13 and 13 px per side, which is true of all networks of this name.
    """
    layers, channels = {}, 3
    kernels, before, after = (11, 5, 3, 3, 3), (224, 27, 13, 13, 13), (55, 27, 13, 13, 13)
    for number, (kernel, side, map_side) in enumerate(zip(kernels, before, after, strict=True)):
        weights = kernel**2 * channels // groups[number] * features[number]
        inputs, outputs = side**2 * channels, map_side**2 * features[number]
        flops = 2 * weights * map_side**2
        layers[f'conv{number + 1}'] = Layer(weights + features[number], inputs, outputs, flops, groups[number])
        channels = features[number]
    inputs = 6 * 6 * channels
    for number, outputs in enumerate((4096, 4096, 1000)):
        layers[f'fc{number + 6}'] = Layer((inputs + 1) * outputs, inputs, outputs, 2 * inputs * outputs, 1)
        inputs = outputs
    return layers


NETWORKS = {
    'paper': alexnet((96, 256, 384, 384, 256), (1, 2, 1, 2, 2)),  # also Caffe's
    'tensorflow': alexnet((64, 192, 384, 384, 256), (1,) * 5),  # `alexnet` of tf_cnn_benchmarks
    'one tower': alexnet((64, 192, 384, 256, 256), (1,) * 5),  # Krizhevsky 2014, and torchvision's
}

_IB_FDR = 7e9  # 56 Gb/s
# Bandwidths by data sheet, in one direction. PCI Express: 8 GT/s (generation 3), 5 GT/s (2), 16 GT/s (4), 16 lanes.
_PCIE3, _PCIE2, _PCIE4 = Link(15.75e9, *PCIE), Link(8e9, *PCIE), Link(31.5e9, *PCIE)
_NONE = Link(1e9, *NET)  # between nodes, where there is one node
MACHINES = {
    'DGX-1, P100': Network('', 8, Link(80e9, *NVLINK), _NONE),  # 4 NVLinks of 20 GB/s
    'K80': Network('', 8, Link(15.75e9 / 2, *PCIE), _NONE),  # a board has two GPUs and one PCI Express 3 slot
    'V100, NVLink': Network('', 8, Link(150e9, *NVLINK), _NONE),  # 6 NVLinks of 25 GB/s
    'A100, PCIe': Network('', 8, _PCIE4, _NONE),
    'K40': Network('', 8, _PCIE3, _NONE),
    'K20': Network('', 8, _PCIE2, _NONE),
    'V100 cluster': Network('', 8, Link(150e9, *NVLINK), Link(_IB_FDR / 8, *NET)),  # one port for eight devices
    'P40 cluster': Network('', 8, _PCIE3, Link(12.5e9 / 8, *NET)),  # 100 Gb/s for eight devices
    'Omni-Path cluster': Network('', 1, _NONE, Link(12.5e9, *NET)),  # Omni-Path, 100 Gb/s
}


class Point(NamedTuple):
    """A published rate of several devices."""

    who: str
    machine: str  # key of `MACHINES`
    network: str  # key of `NETWORKS`
    devices: int
    batch: int  # per device
    alone: float | None  # published images/s of one device, an input of the prediction; None: not published
    rate: float  # published images/s of all devices
    scheme: str = 'data'
    sums: str = 'all-reduce'  # how gradients are summed, if the publication states it
    gradient: int = 4  # bytes


_TF = 'tensorflow/benchmarks 2017'
_LAMBDA, _OWT = 'lambda-tensorflow-benchmark', 'Krizhevsky 2014'
_RECORD = 95 * IMAGENET / 90  # images/s
POINTS = [
    # Log files of models/bvlc_alexnet in NVIDIA's Caffe; batch 1,024 on eight devices.
    Point('NVCaffe', 'DGX-1, P100', 'paper', 8, 128, 2108, 16_861),
    # tensorflow.org/performance/benchmarks, synthetic images, batch 512. DGX-1: replicated variables summed by NCCL.
    # GCE: variables in the host. EC2: each variable on one of the GPUs, which moves as many bytes as a ring.
    *(
        Point(f'{_TF}, {place}', machine, 'tensorflow', n, 512, rates[0], rates[1 + i], sums=sums)
        for place, machine, sums, rates in (
            ('DGX-1', 'DGX-1, P100', 'all-reduce', (2987, 5658, 10_509, 17_822)),
            ('GCE', 'K80', 'server', (656, 1209, 2328, 4640)),
            ('EC2', 'K80', 'all-reduce', (684, 1244, 2479, 4853)),
        )
        for i, n in enumerate((2, 4, 8))
    ),
    # The same program. The batch is published for the A100 in float16 only; elsewhere it is the program's 512.
    Point(f'{_LAMBDA}, float32', 'V100, NVLink', 'tensorflow', 8, 512, 5132, 35_882),
    Point(f'{_LAMBDA}, float16', 'V100, NVLink', 'tensorflow', 8, 512, 9319, 70_869),
    Point(f'{_LAMBDA}, TF32', 'A100, PCIe', 'tensorflow', 8, 512, 10_187, 75_860),
    Point(f'{_LAMBDA}, float16', 'A100, PCIe', 'tensorflow', 8, 3584, 16_487, 129_266),
    # Caffe's documentation: about 1.8 and 3.5 times the rate of one (K40: 20 batches of 256 in 19.2 s).
    *(Point('Caffe', 'K40', 'paper', n, 256, 267, 267 * times) for n, times in ((2, 1.8), (4, 3.5))),
    # 410.2 times one device, 95 epochs in 1.5 minutes, batch 65,536; float16 gradients. The publication also leaves out
    # gradients near zero, which is not modeled.
    Point('Sun et al. 2019', 'V100 cluster', 'paper', 512, 128, _RECORD / 410.2, _RECORD, gradient=2),
    # Table 2 of arXiv:1404.5997, as commonly cited: 98.05, 50.24, 26.20 and 15.68 hours for 90 epochs.
    *(
        Point(_OWT, 'K20', 'one tower', n, 128, 90 * IMAGENET / 98.05 / 3600, 90 * IMAGENET / hours / 3600, 'hybrid')
        for n, hours in ((2, 50.24), (4, 26.20), (8, 15.68))
    ),
    # No rate of one device is published.
    Point('Jia et al. 2018', 'P40 cluster', 'paper', 1024, 64, None, 95 * IMAGENET / 240, gradient=2),
    Point('You et al. 2018, 512 KNL', 'Omni-Path cluster', 'paper', 512, 64, None, 100 * IMAGENET / 1440),
    Point('You et al. 2018, 1,024 Xeon', 'Omni-Path cluster', 'paper', 1024, 32, None, 100 * IMAGENET / 660),
]  # fmt: skip


def backward_share(layers: Mapping[str, Layer]) -> float:
    """Returns the backward pass of the convolutions as a share of the FLOPs of a step."""
    first, *later = layers
    backward = layers[first].flops + sum(2 * layers[name].flops for name in later if name.startswith('conv'))
    return backward / (2 * layers[first].flops + sum(3 * layers[name].flops for name in later))


def predict(point: Point, alone: float) -> Step:
    """Returns the predicted step of a published measurement. alone: images/s of one device."""
    layers, compute = NETWORKS[point.network], point.batch / alone
    sent = messages(layers, point.scheme, point.devices, point.batch, activation=4, gradient=point.gradient)
    sent = [message._replace(kind=point.sums) if message.kind == 'all-reduce' else message for message in sent]
    backward = backward_share(layers) * compute
    return step(
        point.scheme, compute, backward, sent, MACHINES[point.machine], devices=point.devices, images=point.batch
    )


def needed(point: Point) -> float:
    """Returns the images/s of one device with which the rate without overlap is the published one, or infinity."""
    low, high = point.rate / point.devices, 1e9
    if predict(point, high).rate < point.rate:
        return float('inf')
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if predict(point, middle).rate > point.rate else (middle, high)
    return high


def compare() -> dict[str, Any]:
    """Returns predictions and errors, signed, in percent of the published rate, and the means of their sizes.

    'with overlap': the gradients of the dense layers are summed during the backward pass of the convolutions; 'without
    overlap': nothing is. Points without a rate of one device have 'needed' instead.
    """
    rows = []
    for point in POINTS:
        row = {**point._asdict(), 'parameters': sum(layer.parameters for layer in NETWORKS[point.network].values())}
        if point.alone is None:
            rows.append({**row, 'needed': needed(point)})
            continue
        found = predict(point, point.alone)
        rates = {'without overlap': found.rate, 'with overlap': found.overlapped_rate}
        errors = {name: 100 * (rate / point.rate - 1) for name, rate in rates.items()}
        rows.append({**row, 'predicted': rates, 'error_percent': errors})
    means = {}
    for name, kinds in (('all', ('data', 'hybrid')), ('data parallelism', ('data',)), ('hybrid', ('hybrid',))):
        chosen = [row['error_percent'] for row in rows if 'error_percent' in row and row['scheme'] in kinds]
        means[name] = {
            'points': len(chosen),
            **{way: statistics.fmean(abs(error[way]) for error in chosen) for way in chosen[0]},
        }
    return {'points': rows, 'mean_error_percent': means}
