"""The communication of a compiled program: its collectives, the bytes that they move, and the links that they cross."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

_COLLECTIVE = r'= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\((.*)'
_DIMS = r'\[[\d,]*\](?:T\([\d,]*\))?'  # a range that is reshaped and transposed, such as [4,2]T(1,0)


class Collective(NamedTuple):
    """A collective operation of a compiled program."""

    name: str  # 'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all' or 'collective-permute'
    bytes: float  # received by a device
    groups: list[list[int]]  # positions in the mesh that communicate; pairs for a collective-permute


def collectives(compiled_text: str, devices: int) -> list[Collective]:
    """Returns the collectives of a compiled program.

    A collective in a loop counts once. Assumes ring algorithms, which need the least communication: with n devices, an
    all-gather or a reduce-scatter receives (n - 1) / n of the full array, and an all-reduce twice as much.

    compiled_text: `jit(f).lower(...).compile().as_text()`. devices: number of devices the program runs on.
    """
    found = []
    for match in re.finditer(_COLLECTIVE, compiled_text):
        shapes, name, asynchronous, rest = match.groups()
        arrays = array_bytes(shapes)
        if asynchronous and name == 'collective-permute':
            arrays = arrays[1:2]  # (input, output, two counters)
        elif asynchronous and name != 'all-reduce':
            arrays = arrays[len(arrays) // 2 :]  # (inputs, outputs)
        groups = replica_groups(rest, devices)
        n = max(map(len, groups))
        share = {'all-reduce': 2 * (n - 1) / n, 'reduce-scatter': n - 1, 'collective-permute': 1.0}
        found.append(Collective(name, sum(arrays) * share.get(name, (n - 1) / n), groups))
    return found


def collective_bytes(compiled_text: str, devices: int) -> dict[str, tuple[int, float]]:
    """Returns the communication of a compiled program: {operation: (count, bytes received per device)}.

    The arguments and the assumption are those of `collectives`.
    """
    sums: dict[str, tuple[int, float]] = {}
    for one in collectives(compiled_text, devices):
        count, total = sums.get(one.name, (0, 0.0))
        sums[one.name] = (count + 1, total + one.bytes)
    return sums


def bytes_by_link(
    found: Iterable[Collective], hosts: Sequence[int], links: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Returns {operation: {link: bytes received per device}}.

    hosts: of each device, by its position in the mesh. links: the name of the links inside a host, then of those
    between hosts; a single name if all devices have the same links.
    """
    sums: dict[str, dict[str, float]] = {}
    for one in found:
        row = sums.setdefault(one.name, dict.fromkeys(links, 0.0))
        share = max(share_between_hosts(one.name, [hosts[position] for position in group]) for group in one.groups)
        row[links[0]] += one.bytes * (1 - share)
        row[links[-1]] += one.bytes * share
    return sums


def share_between_hosts(name: str, hosts: Sequence[int]) -> float:
    """Returns the share of the bytes of a collective that devices receive from other hosts, on average.

    Each pair of devices exchanges other bytes in an all-to-all. The other collectives need to bring every byte into a
    host only once: n devices in k hosts then receive (k - 1) / (n - 1) of the bytes from other hosts.

    hosts: of each device in the group.
    """
    n, counts = len(hosts), Counter(hosts)
    if n == 1:
        return 0.0
    if name == 'all-to-all':
        return 1 - sum(count * (count - 1) for count in counts.values()) / (n * (n - 1))
    return (len(counts) - 1) / (n - 1)


def array_bytes(shape: str) -> list[int]:
    """Returns the bytes of each array in an HLO shape, such as 'f32[2,3]{1,0}' or a tuple of shapes."""
    return [
        (1 if kind == 'pred' else int(bits or 0) // 8) * math.prod(map(int, re.findall(r'\d+', sides)))
        for kind, bits, sides in re.findall(r'\b([a-z]+)(\d*)\[([\d,]*)\]', shape)
    ]


def replica_groups(line: str, devices: int) -> list[list[int]]:
    """Returns the groups of a collective, from its line of HLO. Without groups, all devices are one group.

    HLO has three notations: lists {{0,2},{1,3}}, a reshaped and transposed range [2,2]<=[2,2]T(1,0) with the same
    groups, and axes of a mesh, mesh['a'=2,'b'=2] {'a'}, again with the same groups.
    """
    if lists := re.search(r'(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}', line):
        return [[int(number) for number in group.split(',')] for group in re.findall(r'\{([\d, ]+)\}', lists[1])]
    if match := re.search(rf'replica_groups=\[(\d+),(\d+)\]<=({_DIMS})', line):
        return _numbers(match[3]).reshape(int(match[1]), int(match[2])).tolist()
    ids = rf'(?:, device_ids=\(({_DIMS}|[\d,]*)\))?'
    if match := re.search(rf'replica_groups=mesh\[([^\]]*)\]{ids} \{{([^}}]*)\}}', line):
        return _mesh_groups(*match.groups()).tolist()
    return [list(range(devices))]


def _numbers(text: str) -> np.ndarray:
    """Returns the array of a list '0,2,1,3', or of a reshaped and transposed range such as '[4,2]T(1,0)'."""
    if not text.startswith('['):
        return np.array([int(number) for number in text.split(',')])
    dims, order = (list(map(int, re.findall(r'\d+', part))) for part in text.partition('T')[::2])
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return numbers.transpose(order) if order else numbers


def _mesh_groups(mesh: str, ids: str | None, axes: str) -> np.ndarray:
    """Returns the groups, [groups, devices], that communicate along axes of a mesh.

    mesh: names and sizes, "'a'=2,'b'=8". ids: the devices of the mesh, see `_numbers`. axes: "'a'", or a part of an
    axis: "'b':(2)4" is the second of the axes (2, 4, rest) into which b is divided.
    """
    chosen = [
        (name, int(before or 1), int(size or 0))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    ]
    dims: list[int] = []
    position: dict[tuple[str, int], int] = {}
    for name, side in re.findall(r"'([^']+)'=(\d+)", mesh):
        parts = [(before, size or int(side)) for other, before, size in chosen if other == name]
        cuts = sorted({1, int(side)} | {cut for before, size in parts for cut in (before, before * size)})
        for low, high in itertools.pairwise(cuts):
            position[name, low] = len(dims)
            dims.append(high // low)
    grouped = [position[name, before] for name, before, _ in chosen if (name, before) in position]
    devices = (_numbers(ids) if ids else np.arange(math.prod(dims))).reshape(dims)
    last = np.moveaxis(devices, grouped, range(-len(grouped), 0))
    return last.reshape(-1, math.prod(dims[axis] for axis in grouped))
