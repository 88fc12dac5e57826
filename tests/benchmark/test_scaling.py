"""The time model against hand-computed times, compiled programs and published measurements."""

import json
import math
import subprocess
import sys

import pytest

import alexnet_jax
from alexnet_jax.benchmark import hlo_cost, scaling, scaling_points, scaling_report
from alexnet_jax.benchmark.scaling import Link, Message, Network
from alexnet_jax.commands import benchmark
from alexnet_jax.utils.errors import UserError
from tests import ROOT

RESULTS = ROOT / 'docs' / 'results'
LAYERS = scaling_points.NETWORKS['paper']
SHARE = scaling.efficiency(LAYERS, hlo_cost.PEAKS)
LAUNCH = 8.4e-6
# Nodes of four devices: 1 MB takes 1 s inside a node and 10 s between nodes.
SLOW = Network('', 4, Link(1e6, ring=0.01, tree=0.1), Link(1e5, ring=0.02, tree=0.2))


@pytest.mark.parametrize(
    ('kind', 'devices', 'seconds', 'latency', 'algorithm'),
    [
        ('all-reduce', 1, 0, 0, ''),
        ('all-reduce', 4, 2 * 3 / 4, 2 * 3 * 0.01, 'ring'),
        ('all-gather', 4, 3 / 4, 3 * 0.01, 'ring'),
        ('reduce-scatter', 2, 1 / 2, 0.01, 'ring'),
        ('all-to-all', 4, 3 / 4, 3 * 0.01, 'ring'),
        # Inside the nodes as above; between them, a quarter of the array to each of a device's peers.
        ('all-reduce', 8, 2 * 3 / 4 + 2 * 1 / 2 * 10 / 4, 2 * 3 * 0.01 + 2 * 0.02, 'ring'),
        ('all-gather', 16, 3 / 4 + 3 / 4 * 10 / 4, 3 * 0.01 + 3 * 0.02, 'ring'),
        ('all-to-all', 8, 3 / 4 + 1 / 2 * 10, 3 * 0.01 + 0.02, 'ring'),
        ('server', 4, 2, 2 * 0.01, 'server'),
        # 256 nodes: 510 steps of a ring take 10.2 s, 16 levels of a tree 3.2 s, for 2 / 256 of 2.5 s more.
        ('all-reduce', 1024, 2 * 3 / 4 + 2 * 10 / 4, 2 * 3 * 0.01 + 2 * 8 * 0.2, 'tree'),
    ],
)
def test_times_of_collectives_follow_the_formulas(kind, devices, seconds, latency, algorithm):
    cost = scaling.collective(Message(kind, 1e6, devices), SLOW)
    launches = {1: 0, 2: 1, 4: 1}.get(devices, 3 if kind == 'all-reduce' else 2)
    assert cost.inside + cost.between == pytest.approx(seconds)
    assert cost.latency == pytest.approx(latency + launches * LAUNCH)
    assert cost.algorithm == algorithm


def test_towers_share_a_node_and_gradients_cross_them():
    """Of eight devices, two nodes of four: a tower's four devices are two in each node."""
    towers = scaling.collective(Message('all-gather', 1e6, 2), SLOW)
    assert towers.between == 0
    cost = scaling.collective(Message('all-reduce', 1e6, 4, stride=2), SLOW)
    assert (cost.inside, cost.between) == pytest.approx((2 * 1 / 2, 2 * 1 / 2 * 10 / 2))


@pytest.mark.parametrize(('data', 'tower'), [(1, 2), (2, 1), (2, 2)])
def test_bytes_equal_those_of_compiled_programs(data, tower):
    record = json.loads((RESULTS / f'cpu_mesh_{data}x{tower}.json').read_text())
    found = record['images_per_second']['alexnet_jax']['collectives']
    devices, scheme = data * tower, 'towers' if tower == 2 else 'data'
    received = dict.fromkeys(found, 0.0)
    for message in scaling.messages(LAYERS, scheme, devices, record['batch_size'] / devices, 4, 4):
        share = (message.devices - 1) / message.devices * (2 if message.kind == 'all-reduce' else 1)
        received[message.kind] += message.size * share
    # All-reduces of a few numbers per image are not modeled.
    assert received == {name: pytest.approx(size, abs=1e4) for name, (_, size) in found.items()}


@pytest.mark.parametrize('name', ['bytes_128_8x1_split', 'compiled_h200_8x16_hybrid'])
def test_bytes_of_the_hybrid_equal_those_of_compiled_programs(name):
    """On 8 devices, and on 128, which do not divide the classes."""
    record = json.loads((RESULTS / f'{name}.json').read_text())
    found, devices = record['compiled']['collectives'], record['compiled']['devices']
    received = dict.fromkeys(found, 0.0)
    for message in scaling.messages(LAYERS, 'hybrid', devices, record['batch_size'] / devices, 2, 4):
        share = (devices - 1) / devices * (2 if message.kind == 'all-reduce' else 1)
        received[message.kind] += message.size * share
    assert received == {name: pytest.approx(size, rel=0.03) for name, (_, size) in found.items()}


def test_devices_that_cannot_share_layers_have_no_hybrid():
    steps = scaling.predict(LAYERS, scaling.PAPER, 'h200', hlo_cost.PEAKS, SHARE, [3, 4, 6], 128)
    assert [step.devices for step in steps if step.scheme == 'hybrid'] == [4]


def test_hybrid_sends_activations_of_the_whole_batch():
    """The inputs of fc6, fc7 and fc8 in both directions, logits and the gradients of the convolutions."""
    sent = scaling.messages(LAYERS, 'hybrid', 8, 128, 4, 4)
    sizes = {kind: sum(message.size for message in sent if message.kind == kind) for kind in {m.kind for m in sent}}
    gathered = 8 * 128 * (9216 + 4096 + 4096) * 4
    logits = 2 * 128 * 1000 * 4
    assert sizes['all-gather'] == sizes['reduce-scatter'] == gathered and sizes['all-to-all'] == logits
    assert sizes['all-reduce'] == 4 * (60_965_224 - 58_631_144)


def test_roofline_equals_that_of_compiled_programs():
    """Printed by `benchmark step --compile_for=h100` (batch 128), `h200` (1,024) and `2xh200` (256, two towers)."""
    for kind, scheme, images, microseconds, error in (
        ('NVIDIA H100 80GB HBM3', 'data', 128, 2081.7, 1e-3),
        ('NVIDIA H200', 'data', 1024, 8339.3, 1e-3),
        ('NVIDIA H200', 'towers', 128, 1326.7, 0.03),  # predicted from the programs of one device
    ):
        seconds = scaling.roofline(LAYERS, scaling.PAPER, hlo_cost.PEAKS[kind], scheme, 2, images)
        assert 1e6 * sum(seconds.values()) == pytest.approx(microseconds, rel=error)


@pytest.mark.parametrize(
    ('name', 'scheme', 'error'),
    [('8x1_data', 'data', -0.11), ('8x1_towers', 'towers', -0.09), ('8x1_hybrid', 'hybrid', -0.02),
     ('8x16_hybrid', 'hybrid', -0.07), ('8x128_hybrid', 'hybrid', -0.11)],
)  # fmt: skip
def test_roofline_is_lower_than_that_of_programs_with_sums(name, scheme, error):
    """By as much as docs/scaling.md says."""
    compiled = json.loads((RESULTS / f'compiled_h200_{name}.json').read_text())['compiled']
    seconds = scaling.roofline(
        LAYERS, scaling.PAPER, hlo_cost.PEAKS['NVIDIA H200'], scheme, compiled['devices'], images=128
    )
    assert 1e6 * sum(seconds.values()) / compiled['layers']['all']['roofline_us'] - 1 == pytest.approx(error, abs=0.005)


def test_one_h100_reaches_the_measured_rate():
    record = json.loads((RESULTS / 'gpu_step_bfloat16_128.json').read_text())
    (step,) = scaling.predict(LAYERS, scaling.PAPER, 'h100', hlo_cost.PEAKS, SHARE, [1], 128)
    assert step.rate == pytest.approx(record['images_per_second']['alexnet_jax']['median'])
    assert 0 < SHARE < 1 and step.communication == 0


def test_layers_of_points_are_those_of_configs():
    for name, config in (('paper', 'paper'), ('one tower', 'torchvision')):
        found = scaling_report.layers_of(alexnet_jax.get_config(config))
        assert scaling_points.NETWORKS[name] == found
    sums = {name: sum(x.parameters for x in layers.values()) for name, layers in scaling_points.NETWORKS.items()}
    assert sums == {'paper': 60_965_224, 'tensorflow': 61_838_248, 'one tower': 61_100_840}


def test_overlap_hides_gradients_of_dense_layers_only():
    sent = [Message('all-reduce', 1e6, 4, overlaps=True), Message('all-reduce', 1e6, 4)]
    one = scaling.collective(sent[0], SLOW).seconds
    for backward, hidden in ((0.0, 0.0), (0.5, 0.5), (99.0, one)):
        step = scaling.step('data', 100.0, backward, sent, SLOW, devices=4, images=8)
        assert step.communication == pytest.approx(2 * one) and step.hidden == pytest.approx(hidden)
        assert step.rate == pytest.approx(32 / (100 + 2 * one))
        assert step.overlapped_rate == pytest.approx(32 / (100 + 2 * one - hidden))


def test_needed_rate_gives_the_published_rate():
    points = [point for point in scaling_points.POINTS if point.alone is None]
    assert len(points) == 3
    for point in points:
        assert scaling_points.predict(point, scaling_points.needed(point)).rate == pytest.approx(point.rate)
    assert scaling_points.needed(points[0]._replace(rate=1e9)) == math.inf


def test_published_errors_are_those_of_the_committed_file():
    found = scaling_points.compare()
    errors = [row['error_percent']['without overlap'] for row in found['points'] if 'error_percent' in row]
    assert len(errors) >= 8
    mean = found['mean_error_percent']['all']
    assert (mean['points'], mean['without overlap']) == (
        len(errors),
        pytest.approx(sum(map(abs, errors)) / len(errors)),
    )
    first = found['points'][0]  # NVCaffe on eight P100
    assert first['error_percent']['with overlap'] == pytest.approx(
        100 * (first['predicted']['with overlap'] / 16_861 - 1)
    )
    committed = json.loads((RESULTS / 'scaling_h200.json').read_text())['published']
    assert committed['mean_error_percent'] == {
        name: pytest.approx(row, rel=1e-4) for name, row in found['mean_error_percent'].items()
    }


@pytest.mark.parametrize('name', ['scaling_h200', 'scaling_h200_32', 'scaling_h200_ethernet'])
def test_predictions_are_those_of_the_committed_files(name):
    record = json.loads((RESULTS / f'{name}.json').read_text())
    counts, images = map(int, record['steps']), record['images_per_device']
    steps = scaling.predict(LAYERS, scaling.PAPER, record['network'], hlo_cost.PEAKS, SHARE, counts, images)
    rates = {(str(step.devices), step.scheme): step.rate for step in steps}
    committed = {
        (n, name): row['images_per_second'] for n, rows in record['steps'].items() for name, row in rows.items()
    }
    assert committed == {key: pytest.approx(rate, rel=1e-4) for key, rate in rates.items()}


@pytest.mark.parametrize(
    ('text', 'counts'),
    [('1..8', [1, 2, 4, 8]), ('3..13', [3, 6, 12]), ('64,8,8', [8, 64]), ('5', [5]), ('4..4', [4])],
)
def test_numbers_of_devices(text, counts):
    assert scaling_report.device_counts(text) == counts


@pytest.mark.parametrize('text', ['', '0', '-1', '1..', '8..4', '1..4..8', '1,x', '1.5', '2000000', '1,2..8', '٣'])
def test_wrong_numbers_of_devices_are_refused(text):
    with pytest.raises(UserError, match=f'--devices={text}: '):
        scaling_report.device_counts(text)


def test_report_states_scheme_limit_and_record():
    config = alexnet_jax.get_config('paper')
    config.batch_size, config.mesh.tower = 7, 1  # of no importance
    found = scaling_report.predictions(config, 'h200', [1, 64, 1024], 128, 90.0)
    lines = scaling_report.report(found).splitlines()
    rows = {tuple(line.split()[:2]): line for line in lines[2:-3]}
    assert len(rows) == 7 and rows['64', '*towers'].endswith('links between nodes, ring')
    assert '60 min' in rows['1', 'data'] and '100.0%' in rows['1', 'data']
    assert lines[-3].startswith('With 1024 devices the batch is above 65,536')
    assert '64 devices (towers) at a batch of 8,192' in lines[-1]
    step = found['steps']['64']['towers']
    assert step['seconds'] == pytest.approx(90 * 1_281_167 / step['images_per_second'])
    few = scaling_report.predictions(config, 'h200', [8], 128, 90.0)
    assert 'not reached; 8 devices (hybrid) reach 24%' in scaling_report.record_line(few)


def test_other_networks_are_compiled(monkeypatch):
    config, batches = alexnet_jax.get_config('quickstart'), []

    def compile_step_for(config, dataset, precision, target):
        batches.append(config.batch_size)
        row = {'product_bytes': 1e9 * config.batch_size, 'other_bytes': 2e6}
        assert (precision, target, config.model.dtype) == ('bfloat16', 'h200', 'bfloat16')
        return {'layers': {name: row for name in ('conv1', 'update', 'masks', 'all')}}

    monkeypatch.setattr(hlo_cost, 'compile_step_for', compile_step_for)
    found = scaling_report.program_of(config, 'h200')
    assert batches == [128, 1024] and found[128] == {'conv1': [128e3, 2.0], 'update': [128e3, 2.0]}
    assert (
        config.batch_size != 1024
        and scaling_report.program_of(alexnet_jax.get_config('paper'), 'h200') is scaling.PAPER
    )


def test_networks_of_the_flag_are_known():
    assert benchmark.NETWORKS == tuple(scaling.NETWORKS)
    assert {network.kind for network in scaling.NETWORKS.values()} <= set(hlo_cost.PEAKS)


@pytest.mark.slow
def test_scaling_command_writes_its_record(tmp_path):
    command = [sys.executable, '-m', 'alexnet_jax', 'benchmark', 'scaling', '--network=h100']
    output = f'--output={tmp_path / "a.json"}'
    result = subprocess.run([*command, '--devices=2,16', output], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / 'a.json').read_text())
    assert (found['mode'], found['n'], list(found['steps'])) == ('scaling', 1, ['2', '16'])
    for flag, message in (('--devices=x', 'expected numbers such as'), ('--epochs=nan', 'expected a positive number')):
        refused = subprocess.run([*command, flag], capture_output=True, text=True, cwd=ROOT, check=False)
        assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count('\n') == 1
