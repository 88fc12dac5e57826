"""Predicts the time of a training step on many devices: a roofline for one device, and the links between devices.

docs/scaling.md states the formulas, their sources, and what they predict for published measurements. Nothing here runs
on a device. Times are in seconds, sizes in bytes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from alexnet_jax.benchmark.topologies import BETWEEN, INSIDE, LINKS

IMAGENET = 1_281_167  # training images
LARGEST_BATCH = 65_536  # the largest batch with a published recipe for AlexNet: Jia et al. 2018, Sun et al. 2019
RECORD = (95, 90.0)  # epochs and seconds of Sun et al. (arXiv:1902.06855): the fastest published training of AlexNet
SCHEMES = ('data', 'towers', 'hybrid')


class Link(NamedTuple):
    """How a device reaches others."""

    bandwidth: float  # bytes/s that it receives while it sends as many
    ring: float  # latency of a step of a ring, seconds
    tree: float  # latency of a level of a tree, seconds


class Network(NamedTuple):
    """A cluster: `per_node` devices share a node."""

    kind: str  # JAX's name of the device, a key of `topologies.PEAKS`; '' if only its links matter
    per_node: int
    inside: Link  # between the devices of a node
    between: Link  # between nodes, the share of one device


# Latencies: NCCL, src/graph/tuning.cc, hwLat and baseLat of the protocol for large messages ('Simple'). Versions
# differ in those of trees.
NVLINK, PCIE, NET = (3.4e-6, 4.0e-6), (5.7e-6, 4.0e-6), (14e-6, 14e-6)  # ring, tree
_LAUNCH = 8.4e-6  # of any collective
_H100, _H200 = 'NVIDIA H100 80GB HBM3', 'NVIDIA H200'
# 'ethernet': 100 Gb/s for a node of eight.
_NVLINK4, _NDR = Link(LINKS[_H200][INSIDE], *NVLINK), Link(LINKS[_H200][BETWEEN], *NET)
NETWORKS = {
    'h100': Network(_H100, 8, _NVLINK4, _NDR),
    'h200': Network(_H200, 8, _NVLINK4, _NDR),
    'h200_ethernet': Network(_H200, 8, _NVLINK4, Link(12.5e9 / 8, *NET)),
}


class Layer(NamedTuple):
    """What is known of a layer without compiling it, for one image and both towers. Dense layers are named fc6, fc7."""

    parameters: int
    inputs: int  # elements
    outputs: int
    flops: int  # of the forward pass
    groups: int


Rows = Mapping[str, Sequence[float]]  # {layer or other part: (MB of products, other MB)} of a compiled step
# The paper's network in bfloat16, batches of 128 and 1,024. Printed by `alexnet_jax benchmark step --compile_for=h100
# --precision=bfloat16 --batch_size=128` (and 1024) with JAX 0.10.2. For h200 it prints 0.3% fewer bytes.
PAPER: dict[int, Rows] = {
    128: {
        'conv1': (228.0, 1038.8), 'conv2': (198.9, 787.3), 'conv3': (88.4, 94.3), 'conv4': (103.7, 120.7),
        'conv5': (85.7, 71.5), 'fc6': (251.1, 254.3), 'fc7': (121.6, 123.8), 'fc8': (52.6, 33.8),
        'input': (0.0, 59.6), 'other': (0.0, 74.3), 'update': (0.0, 2204.3),
    },
    1024: {
        'conv1': (1822.8, 8305.9), 'conv2': (1578.4, 5899.3), 'conv3': (669.8, 714.9), 'conv4': (801.4, 935.1),
        'conv5': (667.2, 363.4), 'fc6': (308.3, 323.0), 'fc7': (151.0, 159.4), 'fc8': (66.1, 41.0),
        'input': (0.0, 471.6), 'other': (0.0, 53.8), 'update': (0.0, 2204.3),
    },
}  # fmt: skip
MEASURED = (_H100, 128, 24_306.6)  # device, batch, images/s: docs/results/gpu_step_bfloat16_128.json


def roofline(
    layers: Mapping[str, Layer], program: Mapping[int, Rows], peaks: Mapping[str, float], scheme: str, devices: int,
    images: float,
) -> dict[str, float]:  # fmt: skip
    """Returns the least time of each part of a step on one device. The last two parts are 'input' and 'update'.

    A layer's bytes are a line through those of two compiled batches: the constant is its parameters', the slope its
    images'. A device that computes 1/n of a layer for n times as many images does the same work with 1/n of the
    parameters, but reads n times the inputs, if the layer reads those of all devices.

    program: {batch: bytes} for two batches. peaks: 'bfloat16' FLOP/s and 'bytes' per second. images: per device.
    """
    (low, small), (high, large) = sorted(program.items())
    total = sum(layer.parameters for layer in layers.values())
    whole = _whole_classifier(layers, scheme, devices)
    held = sum(
        layer.parameters / (1 if name == whole else _split(name, scheme, devices)) for name, layer in layers.items()
    )
    seconds, first = {}, next(iter(layers))
    for name, row in small.items():
        layer, parts = layers.get(name), _split(name, scheme, devices)
        batch = images * (2 if name == 'input' and scheme == 'towers' else 1)
        constant = held / total if name == 'update' else 1 / parts
        flops = 0.0
        if layer:
            flops = images * layer.flops * (2 if name == first else 3)  # the first layer needs no gradient of its input
            if layer.groups == 1 and name != first:
                batch *= 1 + (parts - 1) * layer.inputs / (layer.inputs + layer.outputs)
        sizes = []
        for at_low, at_high in zip(row, large[name], strict=True):
            slope = max(0.0, (at_high - at_low) / (high - low))
            sizes.append(1e6 * ((at_low - slope * low) * constant + slope * batch))
        products, rest = sizes
        seconds[name] = max(flops / peaks['bfloat16'], products / peaks['bytes']) + rest / peaks['bytes']
    return seconds


def _split(name: str, scheme: str, devices: int) -> int:
    """Returns the number of devices that share the parameters of a layer."""
    if not name.startswith(('conv', 'local', 'fc')) or scheme == 'data':
        return 1
    return 2 if scheme == 'towers' else devices if name.startswith('fc') else 1


def _whole_classifier(layers: Mapping[str, Layer], scheme: str, devices: int) -> str:
    """Returns the name of the classifier if every device holds all of it, because they do not divide the classes."""
    name, layer = list(layers.items())[-1]
    return name if scheme == 'hybrid' and layer.outputs % devices else ''


def backward_of_convolutions(layers: Mapping[str, Layer], seconds: Mapping[str, float]) -> float:
    """Returns the part of `seconds` in which the gradients of the dense layers can be summed over devices.

    They are ready when the backward pass reaches the convolutions: two of the three products of a layer, one of two
    for the first layer.
    """
    first = next(iter(layers))
    return sum(seconds[name] * (1 / 2 if name == first else 2 / 3) for name in layers if not name.startswith('fc'))


class Message(NamedTuple):
    """A collective of a training step."""

    kind: str  # 'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', or 'server' (an all-reduce in the host)
    size: float  # bytes of the whole array; of an all-to-all, the bytes of one device
    devices: int
    stride: int = 1  # the distance of these devices in the order of all devices
    overlaps: bool = False  # with the backward pass of the convolutions


def messages(
    layers: Mapping[str, Layer], scheme: str, devices: int, images: float, activation: int, gradient: int
) -> list[Message]:
    """Returns the collectives of a training step (see docs/scaling.md).

    images: per device. activation, gradient: bytes of a number that is sent.
    """
    sums = {False: 0, True: 0}  # parameters of the convolutions and of the dense layers
    for name, layer in layers.items():
        sums[name.startswith('fc')] += layer.parameters
    last = list(layers.values())[-1]
    found = []
    shards, towers = (devices // 2, 2) if scheme == 'towers' else (devices, 1)
    for name, layer in list(layers.items())[1:]:
        if scheme == 'towers' and layer.groups == 1:
            group, stride, size = 2, 1, layer.inputs * images * 2 * activation
        elif scheme == 'hybrid' and name.startswith('fc'):
            group, stride, size = devices, 1, layer.inputs * images * devices * activation
        else:
            continue
        found += [Message(kind, size, group, stride) for kind in ('all-gather', 'reduce-scatter')]
    if scheme == 'hybrid':
        # The logits and their gradient are float32.
        found += 2 * [Message('all-to-all', last.outputs * images * max(4, activation), devices)]
        if _whole_classifier(layers, scheme, devices):  # the gradient and the update of its parameters
            padded = last.outputs + -last.outputs % devices
            found += 2 * [Message('all-gather', last.inputs * padded * gradient, devices)]
    else:
        found.append(Message('all-reduce', sums[True] / towers * gradient, shards, towers, overlaps=True))
    return [*found, Message('all-reduce', sums[False] / towers * gradient, shards, towers)]


class Cost(NamedTuple):
    """The time of a collective: seconds by what limits it, and the algorithm of its last stage."""

    inside: float
    between: float
    latency: float
    algorithm: str

    @property
    def seconds(self) -> float:
        """The sum of the three times."""
        return self.inside + self.between + self.latency


def collective(message: Message, network: Network) -> Cost:
    """Returns the cost of a collective. It has a stage inside the nodes and one between them, one after the other."""
    inside = min(message.devices, max(1, network.per_node // message.stride))
    between = math.ceil(message.devices / inside)
    size = message.size
    if message.kind == 'all-reduce' and between > 1 < inside:
        stages = [
            ('reduce-scatter', size, inside),
            ('all-gather', size, inside),
            ('all-reduce', size / inside, between),
        ]
    elif message.kind == 'all-to-all':  # to the right device of each node, then to the other nodes
        stages = [(message.kind, size, inside), (message.kind, size, between)]
    else:
        stages = [(message.kind, size, inside), (message.kind, size / inside, between)]
    moved, latency, algorithm = {False: 0.0, True: 0.0}, 0.0, ''
    for number, (kind, part, count) in enumerate(stages):
        if count > 1:
            outside = number == len(stages) - 1
            link = network.between if outside else network.inside
            moving, waiting, algorithm = _stage(kind, part, count, link)
            moved[outside] += moving
            latency += waiting + _LAUNCH
    return Cost(moved[False], moved[True], latency, algorithm)


def _stage(kind: str, size: float, count: int, link: Link) -> tuple[float, float, str]:
    """Returns (seconds for the bytes, for the latency, algorithm) among devices with one kind of link; the faster."""
    steps, levels = count - 1, math.ceil(math.log2(count))
    share = size / link.bandwidth * steps / count
    ring, tree = (share, steps * link.ring, 'ring'), (share, levels * link.tree, 'tree')
    if kind == 'server':  # all gradients to the memory of the host, all parameters back
        return 2 * size / link.bandwidth, 2 * link.ring, 'server'
    if kind == 'all-reduce':
        ring = (2 * share, 2 * steps * link.ring, 'ring')
        tree = (2 * size / link.bandwidth, 2 * levels * link.tree, 'tree')  # NCCL's double binary tree
    elif kind == 'all-to-all':  # one message to each device, or half of the array at each of log2(count) levels
        tree = (levels * size / 2 / link.bandwidth, levels * link.tree, 'tree')
    return min(ring, tree, key=lambda found: found[0] + found[1])


class Step(NamedTuple):
    """A predicted training step."""

    scheme: str
    devices: int
    images: float  # per device
    compute: float
    communication: float  # of all collectives
    hidden: float  # the part of it that can run while the device computes
    limit: str  # what most of the communication waits for, or 'compute' if communication takes less than 5%
    algorithm: str  # of the largest all-reduce

    @property
    def rate(self) -> float:
        """Images/s of all devices if they do not compute during communication."""
        return self.devices * self.images / (self.compute + self.communication)

    @property
    def overlapped_rate(self) -> float:
        """Images/s of all devices if communication overlaps as far as it can."""
        return self.devices * self.images / (self.compute + self.communication - self.hidden)


def step(scheme: str, compute: float, backward: float, sent: Iterable[Message], network: Network, **size: Any) -> Step:
    """Returns a step of `compute` seconds, of which `backward` can hide the messages that overlap.

    size: devices and images of the `Step`.
    """
    costs = [(message, collective(message, network)) for message in sent]
    parts = {
        'links in a node': sum(cost.inside for _, cost in costs),
        'links between nodes': sum(cost.between for _, cost in costs),
        'latency': sum(cost.latency for _, cost in costs),
    }
    communication = sum(parts.values())
    sums = [(message.size, cost.algorithm) for message, cost in costs if message.kind == 'all-reduce']
    return Step(
        scheme=scheme,
        compute=compute,
        communication=communication,
        hidden=min(backward, sum(cost.seconds for message, cost in costs if message.overlaps)),
        limit=max(parts, key=lambda name: parts[name]) if communication > 0.05 * compute else 'compute',
        algorithm=max(sums)[1] if sums else '',
        **size,
    )


def efficiency(layers: Mapping[str, Layer], peaks: Mapping[str, Mapping[str, float]]) -> float:
    """Returns the share of the roofline that the paper's network reached on one device, which is assumed for all."""
    device, batch, rate = MEASURED
    return sum(roofline(layers, PAPER, peaks[device], 'data', 1, batch).values()) * rate / batch


def predict(
    layers: Mapping[str, Layer], program: Mapping[int, Rows], name: str, peaks: Mapping[str, Mapping[str, float]],
    share: float, counts: Iterable[int], images: int,
) -> list[Step]:  # fmt: skip
    """Returns the steps of every scheme for each number of devices, in bfloat16 with gradients in float32.

    name: a key of `NETWORKS`. share: of the roofline, see `efficiency`. images: per device.
    """
    network, steps = NETWORKS[name], []
    for devices in counts:
        for scheme in SCHEMES:
            if (devices == 1 and scheme != 'data') or (scheme == 'towers' and devices % 2):
                continue
            if scheme == 'towers' and all(layer.groups == 1 for layer in layers.values()):
                continue
            hidden = [layer for name, layer in list(layers.items())[:-1] if name.startswith('fc')]
            if scheme == 'hybrid' and any(layer.outputs % devices for layer in hidden):
                continue  # `mesh.dense='split'` refuses it
            seconds = roofline(layers, program, peaks[network.kind], scheme, devices, images)
            sent = messages(layers, scheme, devices, images, activation=2, gradient=4)
            backward = backward_of_convolutions(layers, seconds) / share
            compute = sum(seconds.values()) / share
            steps.append(step(scheme, compute, backward, sent, network, devices=devices, images=images))
    return steps
