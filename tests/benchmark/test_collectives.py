"""Communication read from HLO text: groups, bytes, and the links that they cross, against examples computed by hand."""

import importlib.util
import json
import subprocess
import sys

import jax
import pytest

from alexnet_jax.benchmark import collectives, hlo_cost, throughput, topologies
from alexnet_jax.data import datasets
from alexnet_jax.utils.errors import UserError
from tests import ROOT, helpers

ROWS, COLUMNS = [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize(
    ('attributes', 'groups'),
    [
        ('replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}', ROWS),
        ('replica_groups=[2,4]<=[8], to_apply=%add', ROWS),
        ('replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add', COLUMNS),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add", ROWS),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add", COLUMNS),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, f={{9}}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'a'}", [[0, 1], [3, 2]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),  # axes of 2 x 2 x 2: the second
        ("replica_groups=mesh['one'=1,'a'=8] {'one','a'}", [list(range(8))]),
        ('replica_groups={}, to_apply=%add', [list(range(8))]),
        ('channel_id=1', [list(range(8))]),
        ('source_target_pairs={{0,1},{1,0}}', [[0, 1], [1, 0]]),
    ],
)
def test_groups_of_every_notation(attributes, groups):
    assert collectives.replica_groups(f'%x), channel_id=3, {attributes}', 8) == groups


@pytest.mark.parametrize(
    ('name', 'hosts', 'share'),
    [
        ('all-reduce', 'AAAA', 0),
        ('all-reduce', 'AB', 1),
        ('all-gather', 'AABB', 1 / 3),  # the other half, of 2 blocks, for 2 devices that receive 3 blocks each
        ('reduce-scatter', 'ABCD', 1),
        ('all-gather', 'AAAB', 1 / 3),  # A receives 1 block, B receives 3, of 12 in all
        ('all-to-all', 'AABB', 2 / 3),  # 2 of the 3 others are in the other host
        ('all-to-all', 'AAAB', 1 / 2),  # 3 blocks of 9 for the As, 3 of 3 for B
        ('collective-permute', 'AB', 1),
        ('all-reduce', 'A', 0),
    ],
)
def test_share_of_bytes_from_other_hosts(name, hosts, share):
    assert collectives.share_between_hosts(name, hosts) == pytest.approx(share)


def test_bytes_of_each_link_in_two_hosts():
    """Positions 0 ... 3 are in host 0, 4 ... 7 in host 1; towers are neighbors."""
    text = """
      %a = f32[8,10]{1,0} all-gather(%x), channel_id=1, replica_groups=[4,2]<=[8], dimensions={1}
      %b = f32[100]{0} all-reduce(%y), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%f
      %c = f32[6]{0} reduce-scatter(%u), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}
      %d = bf16[16]{0} all-to-all(%v), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
      %p = s8[8]{0} collective-permute(%w), source_target_pairs={{0,1},{3,4}}
    """
    found, hosts = collectives.collectives(text, 8), [0] * 4 + [1] * 4
    assert [one.bytes for one in found] == [160, 600, 24, 28, 8]
    assert collectives.bytes_by_link(found, hosts, ['in', 'out']) == {
        'all-gather': {'in': 160, 'out': 0},
        'all-reduce': {'in': pytest.approx(400), 'out': pytest.approx(200)},  # 4 devices in 2 hosts: 1 of 3 parts
        'reduce-scatter': {'in': 0, 'out': 24},
        'all-to-all': {'in': pytest.approx(12), 'out': pytest.approx(16)},  # from 3 and from 4 devices
        'collective-permute': {'in': 0, 'out': 8},  # a step waits for the pair of both hosts
    }
    slice_of_a_pod = collectives.bytes_by_link(found, hosts, ['ICI'])
    assert {name: sum(row.values()) for name, row in slice_of_a_pod.items()} == {
        one.name: pytest.approx(one.bytes) for one in found
    }


def test_memory_inside_a_tpu_core_is_not_counted():
    text = """
ENTRY %main (a: f32[8,128]) -> bf16[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %buffer = f32[64]{0:T(128)} custom-call(), custom_call_target="AllocateBuffer"
  %fetch = ((f32[8,128]{1,0:T(8,128)}), f32[2,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:2], [0:128]}
  %part = f32[2,128]{1,0:T(8,128)S(1)} slice-done(%fetch)
  %copy = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %whole = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%copy)
  %sum = f32[8,128]{1,0:T(8,128)S(1)} add(%whole, %whole)
  ROOT %out = bf16[8,128]{1,0:T(8,128)(2,1)} convert(%sum)
}
"""  # noqa: E501
    moved = [op.bytes for op in hlo_cost.hlo_ops(text, [])]
    assert moved == [2 * 128 * 4, 8 * 128 * 4, 0, 8 * 128 * 2]  # reads a slice and all of a; writes the result


def test_floors_are_amounts_divided_by_rates():
    cost = {'flops': 989e9, 'product_bytes': 4.0e9, 'other_bytes': 0.8e9}
    links = {
        'all-gather': {'inside a host': 450e3, 'between hosts': 4e5},
        'all-reduce': {'inside a host': 0, 'between hosts': 6e5},
    }
    assert hlo_cost.floors(cost, links, 'NVIDIA H200', 'bfloat16') == {
        'compute': pytest.approx(1000), 'memory': pytest.approx(1000),
        'inside a host': pytest.approx(1), 'between hosts': pytest.approx(20),
    }  # fmt: skip
    assert topologies.PEAKS.keys() == topologies.MEMORY.keys() == topologies.LINKS.keys()


def test_report_says_whether_the_step_fits():
    facts = {
        'device': 'NVIDIA H200', 'devices': 4, 'hosts': 2, 'mesh_shape': {'data': 2, 'tower': 2},
        'compile_seconds': 1.5, 'bytes': 2**30, 'memory': 2**31, 'floor_us': {'compute': 1234.0, 'between hosts': 7.0},
        'collectives': {'all-gather': (3, 4e6)}, 'links': {'all-gather': {'inside a host': 1e6, 'between hosts': 3e6}},
    }  # fmt: skip
    assert throughput.compiled_report(facts) == [
        '3 all-gather: 4.000 MB per step and device, 1.000 MB inside a host, 3.000 MB between hosts',
        '4 x NVIDIA H200 in 2 hosts, mesh 2 data x 2 tower: compiled in 1.5 s',
        'memory per device: 1.00 of 2.0 GiB: fits',
        "at the data sheet's rates a step takes at least: compute 1,234 us, between hosts 7 us",
    ]
    assert any('DOES NOT FIT' in line for line in throughput.compiled_report({**facts, 'memory': 2**29}))


@pytest.mark.parametrize(
    ('target', 'expected'),
    [
        ('tpu_v9:2x2', 'expected h100 or h200, several .* or TPUs such as tpu_v5e:16x16'),
        ('h200:8', 'expected h100 or h200'),
        ('h200:8x0', 'expected h100 or h200'),
        ('2xh200:8x2', 'expected h100 or h200'),
        ('tpu_v5e', 'expected h100 or h200'),
        ('h200:8x4096', 'expected at most 16,384 GPUs'),
        ('tpu_v5e:4x4x4', 'expected 2 sides, in all at most 256 chips'),
        ('tpu_v5e:32x16', 'expected 2 sides, in all at most 256 chips'),
        ('tpu_v5p:8x8', 'expected 3 sides, in all at most 6,144 chips'),
    ],
)
def test_unknown_topologies_are_refused(target, expected):
    with pytest.raises(UserError, match=f'--compile_for={target}: {expected}'):
        topologies.topology_devices(target)


def test_missing_tpu_compiler_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=r"--compile_for=tpu_v5e:2x2 needs the compiler .*: pip install -e '.\[tpu\]'"):
        topologies.topology_devices('tpu_v5e:2x2')


@pytest.fixture
def present(monkeypatch):
    """Lets the CPU devices of the test stand for TPUs. Returns (config, dataset)."""
    kind = jax.devices()[0].device_kind
    monkeypatch.setattr(hlo_cost, 'topology_devices', lambda target: jax.devices()[:2])
    for table in (topologies.PEAKS, topologies.MEMORY, topologies.LINKS):
        monkeypatch.setitem(table, kind, table['TPU v5 lite'])
    config = helpers.digits_config(**{'batch_size': 2**20, 'mesh.data': 2, 'mesh.tower': 1})
    return config, datasets.synthetic(config.data.image_size, config.model.num_classes)


def test_step_that_does_not_compile_is_an_error_line(present, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Ran out of memory.\nLargest allocations: ...')

    monkeypatch.setattr(hlo_cost, 'compile_step', fail)
    with pytest.raises(UserError) as error:
        hlo_cost.compile_step_for(*present, 'bfloat16', 'tpu_v5e:1x2')
    assert str(error.value) == (
        '--compile_for=tpu_v5e:1x2: XLA cannot compile the step: RESOURCE_EXHAUSTED: Ran out of memory.'
    )
    with pytest.raises(UserError, match='no peak is known for float32; use --precision=bfloat16'):
        hlo_cost.compile_step_for(*present, 'float32', 'tpu_v5e:1x2')


def test_batch_of_a_million_images_is_only_shapes(present, monkeypatch):
    shapes = []
    facts = {'layers': {'all': {'flops': 1.0, 'product_bytes': 1.0, 'other_bytes': 1.0}}}
    compiled = type('Compiled', (), {'as_text': lambda self: '%d = f32[5]{0} all-reduce(%v), replica_groups={}'})()
    monkeypatch.setattr(
        hlo_cost, 'compile_step', lambda setup, precision, arguments: (shapes.extend(arguments) or compiled, facts)
    )
    found = hlo_cost.compile_step_for(*present, 'bfloat16', 'tpu_v5e:1x2')
    batch = {name: (x.shape, x.dtype.name) for name, x in shapes[1].items()}
    assert batch['label'] == ((2**20,), 'int32') and batch['image'][0][::3] == (2**20, 3)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in shapes[1].values())
    assert (found['devices'], found['hosts'], found['mesh_shape']) == (2, 1, {'data': 2, 'tower': 1})
    assert found['links'] == {'all-reduce': {'ICI': 20.0}} and found['memory'] == 16 * 2**30


@pytest.mark.slow
@pytest.mark.parametrize(('target', 'package'), [('h200:2x2', 'jax_cuda12_plugin'), ('tpu_v5e:2x2', 'libtpu')])
def test_step_compiles_for_an_absent_cluster(target, package):
    pytest.importorskip(package, reason=f'needs the compiler in {package}')
    command = [sys.executable, '-m', 'alexnet_jax', 'benchmark', 'step', '--precision=bfloat16', '--batch_size=64']
    command += ['--config=cifar10', f'--compile_for={target}']
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])['compiled']
    assert (found['devices'], found['mesh_shape']) == (4, {'data': 4, 'tower': 1})
    moved = found['links']['all-reduce']
    assert sum(moved.values()) == pytest.approx(found['collectives']['all-reduce'][1])
    if package == 'libtpu':
        assert moved.keys() == {'ICI'}
    else:  # a ring through 2 + 2 GPUs: 1 of 3 parts arrives from the other host
        assert (found['hosts'], moved['between hosts']) == (2, pytest.approx(found['collectives']['all-reduce'][1] / 3))
