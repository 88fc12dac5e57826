"""The benchmark command at a small scale: cost counts, report format, and every mode against PyTorch."""

import contextlib
import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_jax.benchmark import hlo_cost, inference, limits, loop, record, throughput
from alexnet_jax.benchmark.throughput import Contender
from alexnet_jax.core import architecture, post_ops, sharding
from alexnet_jax.data import datasets
from alexnet_jax.training import build
from alexnet_jax.utils.errors import UserError
from tests import ROOT, helpers

# A small network on small images; conv1 has a stride.
TINY = [
    '--config=configs/quickstart.py', '--batch_size=8', '--steps=2', '--repeats=2', '--config.data.image_size=24',
    '--config.data.num_threads=1',
]  # fmt: skip


def test_contenders_alternate():
    played = []
    sides = [Contender('a', lambda: played.append('a') or 1.0), Contender('b', lambda: played.append('b') or 2.0)]
    assert throughput.measure_in_turns(sides, 3) == {'a': [1.0] * 3, 'b': [2.0] * 3}
    assert ''.join(played) == 'abbaab'


def test_report_ends_with_ratio_of_medians():
    ours, torch = (
        Contender(throughput.OURS, lambda: 0.0, {'flops': 10**9, 'bytes': 2**30}),
        Contender(throughput.TORCH, lambda: 0.0),
    )
    rates = {throughput.OURS: [30.0, 10.0, 20.0], throughput.TORCH: [5.0, 8.0, 90.0]}
    results = throughput.results([ours, torch], rates)
    *table, line, record, ratio = throughput.report(results, {'n': 3}, ['limits']).splitlines()
    assert ratio == 'ratio: 2.500' and line == 'limits'
    found = json.loads(record)
    assert found['n'] == 3 and found['images_per_second'][throughput.TORCH] == {
        'median': 8.0,
        'measurements': [5.0, 8.0, 90.0],
    }
    assert table[1].split()[:5] == ['alexnet_jax', '20.0', '10.0', '30.0', '3']
    assert '20 GFLOP/s' in table[1] and '1.00 GiB' in table[1]
    alone = throughput.report(throughput.results([ours], {throughput.OURS: [1.0]}), {}).splitlines()
    assert json.loads(alone[-1])  # no ratio without a peer


def test_limits_are_those_of_product_and_memory(monkeypatch):
    monkeypatch.setattr(limits, '_SIDE', 64)
    monkeypatch.setattr(limits, '_BYTES', 2**20)
    monkeypatch.setattr(limits, '_MIN_SECONDS', 1e-9)
    rates = throughput.measure_in_turns(limits.contenders(), 3)
    found = limits.summary(rates)
    assert [len(row['measurements']) for row in found.values()] == [3, 3, 3]
    assert all(row['median'] > 0 for row in found.values())


def test_bound_of_inference_is_the_larger_time():
    """fc6 reads 64 x 32 weights and 32 biases, fc7 32 x 32 and 32, fc8 32 x 12 and 12."""
    dense, network = 4 * (65 * 32 + 33 * 32 + 33 * 12), helpers.network()
    flops = sum(cost.flops for cost in architecture.infer_shapes(network, helpers.SIZE).values())
    for read, batch, seconds, by in ((1e-6, 1, dense / 1e3, 'dense weights'), (1e9, 8, 8 * flops / 1e9, 'product')):
        found = {name: {'median': rate} for name, rate in (('float32 product', 1.0), ('copy', 5.0), ('read', read))}
        line = limits.add_bound(found, 0.25 * batch / seconds, network, helpers.SIZE, batch)
        assert found['bound'] == pytest.approx(batch / seconds) and found['bound_by'] == by
        assert found['share'] == pytest.approx(0.25) and line.endswith('alexnet_jax reaches 25%')


def test_share_of_a_step_is_that_of_the_product():
    found = {name: {'median': 100.0} for name in ('float32 product', 'copy', 'read')}
    assert limits.add_share(found, images_per_second=20.0, flops=2e9).endswith('the step reaches 40% of the product')


def test_record_of_a_measurement_names_no_folder():
    words = [
        'benchmark',
        'input',
        '--config.data.path=/home/me/my data/squares/',
        '--input',
        '/raw/a.tar',
        '--repeats=2',
    ]
    assert record.command(words) == ('alexnet_jax benchmark input --config.data.path=squares --input a.tar --repeats=2')
    configs = [helpers.digits_config(**{'data.path': path}) for path in ('/a/digits', '../digits', '/a/others')]
    first, same, other = map(record.config_digest, configs)
    assert first == same != other and len(first) == 12
    assert first != record.config_digest(helpers.digits_config(**{'data.path': '/a/digits', 'seed': 7}))


def test_record_is_short_json(tmp_path):
    numbers = [1 / 3] * 40
    value = {'a': numbers, 'b': {1: {'c': 2.0}}, 'd': {str(i): 'x' * 20 for i in range(5)}}
    settings = {
        'mode': 'step', 'command': ['prog', 'benchmark'], 'config_name': '/x/y.py', 'config_digest': 'f', 'repeats': 1,
        'xla_flags': '--a=/tmp/b', 'config': {'batch_size': 3, 'mesh': {}}, 'peers': {'onnx': '1'},
        'precision': 'float32',
        **{key: {} for key in ('commit', 'python', 'versions', 'cpu', 'cores', 'memory_gib', 'devices')},
    }  # fmt: skip
    record.write(str(tmp_path / 'a.json'), settings, value)
    lines = (tmp_path / 'a.json').read_text().splitlines()
    assert f' "a": [{", ".join(["0.333333"] * 40)}],' in lines and ' "b": {"1": {"c": 2.0}},' in lines
    assert f'  "3": "{"x" * 20}",' in lines
    found = json.loads('\n'.join(lines))
    assert (found['config'], found['xla_flags'], found['versions']) == ('y.py', '--a=b', {'onnx': '1'})
    with pytest.raises(UserError, match='--output=.*none/a.json: expected a file in an existing folder'):
        record.check_output(str(tmp_path / 'none' / 'a.json'))


def test_collective_bytes_follow_ring_algorithms():
    text = """
      %a = f32[8,10]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={1}
      %b = (bf16[100]{0}, s32[]) all-reduce(%y, %z), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%f
      %c = f32[6]{0} reduce-scatter(%u), replica_groups=[2,3]<=[6], dimensions={0}
      %d = f32[5]{0} all-reduce(%v), replica_groups={}, to_apply=%f
      %g = (f32[4]{0}, f32[8]{0}) all-gather-start(%w), replica_groups={{0,1}}, dimensions={0}
      %h = f32[8]{0} all-gather-done(%g)
      %p = (s8[8]{0}, s8[8]{0}, u32[], u32[]) collective-permute-start(%w), source_target_pairs={{0,1},{1,0}}
      %e = f32[5]{0} add(%all-gather.1, %all-reduce.2)
    """
    found = hlo_cost.collective_bytes(text, devices=8)
    assert found == {
        'all-gather': (2, 320 * 1 / 2 + 32 * 1 / 2),
        'all-reduce': (2, 204 * 2 * 3 / 4 + 20 * 2 * 7 / 8),
        'reduce-scatter': (1, 24 * 2),
        'collective-permute': (1, 8),
    }


PROGRAM = """
HloModule jit_f, is_scheduled=true

%cutting (param_0: f32[100,10], param_1: bf16[4]) -> f32[2,10] {
  %param_0 = f32[100,10]{1,0} parameter(0)
  %bitcast.1 = f32[10,100]{1,0} bitcast(%param_0)
  %slice.1 = f32[2,10]{1,0} slice(%bitcast.1), slice={[0:2], [0:10]}
  %param_1 = bf16[4]{0} parameter(1)
  ROOT %add.1 = f32[2,10]{1,0} add(%slice.1, %slice.1), metadata={op_name="jit(f)/jvp(Net)/conv1/lrn/add"}
}

%product (param_0.1: f32[2,10], param_1.1: f32[10,3]) -> (f32[2,3], pred[7]) {
  %param_0.1 = f32[2,10]{1,0} parameter(0)
  %param_1.1 = f32[10,3]{1,0} parameter(1)
  ROOT %dot.1 = f32[2,3]{1,0} dot(%param_0.1, %param_1.1), metadata={op_name="jit(f)/transpose(jvp(Net))/fc2/dot"}
}

%body (t: (f32[5])) -> (f32[5]) {
  %t = (f32[5]{0}) parameter(0)
  %gte.1 = f32[5]{0} get-tuple-element(%t), index=0
  %negate.1 = f32[5]{0} negate(%gte.1), metadata={op_name="jit(f)/while/body/update/neg"}
  ROOT %tuple.1 = (f32[5]{0}) tuple(%negate.1)
}

ENTRY %main (a: f32[100,10], b: bf16[4]) -> f32[2,3] {
  %a = f32[100,10]{1,0} parameter(0), metadata={op_name="a"}
  %b = bf16[4]{0} parameter(1)
  %c = f32[10,3]{1,0} constant({...})
  %cut = f32[2,10]{1,0} fusion(%a, %b), kind=kLoop, calls=%cutting
  %both = (f32[2,3]{1,0}, pred[7]{0}) fusion(%cut, /*index=1*/%c), kind=kCustom, calls=%product
  %y = f32[2,3]{1,0} get-tuple-element(%both), index=0
  %conv = (bf16[8]{0}, u8[0]{0}) custom-call(%b), custom_call_target="__cudnn$convForward", metadata={op_name="jit(f)/conv1/conv"}
  %w = (f32[5]{0}) while(%start), condition=%never, body=%body, backend_config={"known_trip_count":{"n":"6"}}
  %gather = (bf16[4]{0}, bf16[8]{0}) all-gather-start(%b), replica_groups={{0,1}}, dimensions={0}
  %gathered = bf16[8]{0} all-gather-done(%gather)
  %convert.1 = f32[4]{0} convert(%b)
  ROOT %copy.1 = f32[2,3]{1,0} copy(%y)
}
"""  # noqa: E501


def test_bytes_are_counted_per_kernel():
    found = hlo_cost.hlo_ops(PROGRAM, ['conv1', 'fc2', 'update'])
    assert found == [
        ('conv1', False, 2 * 10 * 4 + 2 * 10 * 4 + 4 * 2),  # writes the output, reads the slice of a and all of b
        ('fc2', True, 2 * 3 * 4 + 7 + 2 * 10 * 4 + 10 * 3 * 4),
        ('conv1', True, 8 * 2 + 4 * 2),
        ('update', False, 6 * (5 * 4 + 5 * 4)),
        ('other', False, 8 * 2 + 4 * 2),
        ('other', False, 4 * 4 + 4 * 2),
        ('other', False, 2 * (2 * 3 * 4)),
    ]


@pytest.mark.slow
def test_step_costs_cover_the_minimum_of_each_layer():
    config = helpers.digits_config(**{'batch_size': 8, 'mesh.data': 1, 'mesh.tower': 1})
    run = build.build(config)
    key, batches = jax.random.key(0), run.train_batches(0)
    _, facts = hlo_cost.compile_step(run, 'float32', (run.steps.init(key), next(batches), run.image_stats, key))
    batches.close()
    costs = architecture.infer_shapes(run.network, config.data.image_size)
    forward = {name: 8 * cost.flops for name, cost in costs.items()}
    rows = facts['layers']
    for name, cost in costs.items():
        assert rows[name]['flops'] == forward[name] * (2 if name == 'conv1' else 3)
        # Forward pass, inputs and outputs once.
        least = 4 * (cost.parameters + 8 * (np.prod(cost.inputs) + np.prod(cost.linear)))
        assert rows[name]['product_bytes'] + rows[name]['other_bytes'] > least, name
    assert rows['input']['other_bytes'] > 8 * 3 * config.data.image_size**2  # reads the pixels
    parameters = sum(cost.parameters for cost in costs.values())
    assert rows['update']['other_bytes'] > 4 * 5 * parameters  # reads weights, velocity, gradient; writes the first two
    assert rows['all']['flops'] == pytest.approx(sum(rows[name]['flops'] for name in costs))
    assert hlo_cost.table(rows)[-1].split()[0] == 'all'


def test_invalid_compile_for_devices_are_refused():
    for what in ('h300', 'x', '', '0xh200', '2h200', 'h200\n'):
        with pytest.raises(UserError, match=f'--compile_for={what.strip()} ?: expected h100 or h200'):
            hlo_cost.topology_devices(what)


@pytest.mark.slow
def test_step_compiles_for_absent_gpu():
    """On the GPU, cuDNN adds the biases, so little memory traffic remains between the convolutions."""
    pytest.importorskip('jax_cuda12_plugin', reason="needs pip install -e '.[cuda12]'")
    command = [sys.executable, '-m', 'alexnet_jax', 'benchmark', 'step', '--precision=bfloat16', '--batch_size=256']
    result = subprocess.run([*command, '--compile_for=2xh200'], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])['compiled']
    assert (found['device'], found['devices']) == ('NVIDIA H200', 2)
    assert {name: count for name, (count, _) in found['collectives'].items()}['all-gather'] == 4
    numbers = 256 * 55 * 55 * 96 / 2  # activations of conv1 in one tower
    # Normalization moves 2 + 2 bytes per number forward; backward, 2 + 2 of the gradient and x and 4 + 4 of the terms.
    # Pooling and ReLU move 6 more.
    assert found['layers']['conv1']['other_bytes'] < 30 * numbers


@pytest.mark.slow
@pytest.mark.parametrize(('data', 'tower'), [(1, 2), (2, 2), (2, 1)])
def test_collective_bytes_follow_from_layers(data, tower):
    config = helpers.digits_config(**{'batch_size': 8, 'mesh.data': data, 'mesh.tower': tower})
    config.model.num_classes = 12
    config.model.layers = {name: dataclasses.asdict(spec) for name, spec in helpers.SMALL['layers'].items()}
    del config.model.layers.fc8.features
    config.data.image_size = helpers.SIZE
    run = build.build(config, datasets.synthetic(config.data.image_size, config.model.num_classes))
    key = jax.device_put(jax.random.key(0), sharding.replicated(run.mesh))
    batches = run.train_batches(0)
    batch, state = run.to_mesh(next(batches)), run.steps.init(key)
    batches.close()
    found = hlo_cost.collective_bytes(
        run.steps.train_step.lower(state, batch, run.image_stats, key).compile().as_text(), data * tower
    )
    # Before conv3, fc6, fc7 and fc8 (maps of 35 px images: 17, 8, 4, 2 per side) each device receives the other half.
    halves = (4 * 4 * 16 + 2 * 2 * 16 + 32 + 32) * (8 // data) // 2 * 4
    if tower == 2:
        assert found['all-gather'] == (4, halves)
        assert found['reduce-scatter'] == (4, halves)  # the backward pass returns as much
    else:
        assert 'all-gather' not in found
    # All gradients of one tower's parameters, sent and received once, plus a few numbers per image.
    parameters = sum(x.size for x in jax.tree.leaves(state.params)) // tower * 4
    gradients = parameters * 2 * (data - 1) / data
    assert gradients <= found['all-reduce'][1] < gradients + 1000


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """A folder with JPEGs of three classes (`raw`) and their prepared form (`prepared`)."""
    folder, rng = tmp_path_factory.mktemp('benchmark'), np.random.default_rng(0)
    for i in range(24):
        path = folder / 'raw' / 'train' / 'abc'[i % 3] / f'{i}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    command = ['prepare', f'--input={folder}/raw', f'--output={folder}/prepared', '--size=32']
    subprocess.run([sys.executable, '-m', 'alexnet_jax', *command], cwd=ROOT, check=True)
    return folder


def _benchmark(*arguments):
    result = helpers.run_command('benchmark', *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.slow
def test_step_on_two_devices_compares_with_one():
    lines = _benchmark('step', *TINY, '--cpu_devices=2', '--config.mesh.tower=2')
    found = json.loads(lines[-1])
    assert set(found['images_per_second']) == {'alexnet_jax', 'one device'}
    assert len(found['images_per_second']['one device']['measurements']) == 2
    assert any(line.startswith('4 all-gather: ') for line in lines)
    assert found['config']['batch_size'] == 8 and found['versions']['jax'] == jax.__version__


@pytest.mark.slow
def test_prepare_and_input_modes(images):
    output = images / 'prepare.json'
    lines = _benchmark('prepare', f'--input={images}/raw', '--repeats=1', f'--output={output}')
    written = json.loads(output.read_text())
    assert written['command'].endswith('prepare --input=raw --repeats=1 --output=prepare.json')
    assert 'batch_size' not in written and 'limits' not in written
    assert json.loads(lines[-1])['images_per_second']['alexnet_jax']['median'] > 0
    lines = _benchmark('input', *TINY, f'--config.data.path={images}/prepared')
    assert json.loads(lines[-1])['images_per_second']['alexnet_jax']['median'] > 0


@pytest.mark.parametrize('mode', ['step', 'input', 'input of originals', 'train'])
def test_every_mode_against_pytorch(images, mode):
    pytest.importorskip('torch')
    mode, *of = mode.split(' of ')
    arguments = [] if mode == 'step' else [f'--config.data.path={images}/prepared']
    arguments += [f'--input={images}/raw'] if of else []
    output = images / f'{mode}.json'
    *_, line, record, ratio = _benchmark(mode, '--against=torch', *TINY, *arguments, f'--output={output}')
    found = json.loads(record)
    ours, theirs = (found['images_per_second'][name]['median'] for name in ('alexnet_jax', 'torch'))
    assert ratio == f'ratio: {ours / theirs:.3f}' and found['torch']
    written = json.loads(text := output.read_text())
    assert str(images) not in text and written['versions']['torch'] == found['torch']
    assert len(written['images_per_second']['torch']['measurements']) == written['n'] == 2
    assert ('limits' in written) == (mode in ('step', 'train')) == line.startswith('machine: float32 product ')


@pytest.mark.parametrize(('ours', 'theirs'), [(False, True), (True, False)])
def test_peer_on_another_kind_of_device_is_refused(ours, theirs, monkeypatch):
    """If JAX or PyTorch falls back to the CPU, a ratio of the two rates is meaningless."""
    torch = pytest.importorskip('torch')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: theirs)
    with pytest.raises(UserError, match='(JAX|PyTorch) uses a GPU here and (JAX|PyTorch) does not; install both'):
        throughput.check_torch(ours)
    throughput.check_torch(theirs)


@pytest.mark.parametrize('local', [False, True])
def test_peer_computes_same_network(local):
    torch = pytest.importorskip('torch')
    from alexnet_jax.benchmark import torch_baseline

    layers = helpers.layers(conv2={'post': 'relu spatial_norm pool'}, conv5={'groups': 1 if local else 2})
    if local:
        layers = {name.replace('conv5', 'local5'): layer for name, layer in layers.items()}
        layers['local5'] = architecture.LocalSpec(**dataclasses.asdict(layers['local5']))
    norm = {'spatial_n': 4 if local else 3, 'spatial_alpha': 0.1}
    network = helpers.network(dropout_rate=0.0, layers=layers, **norm)
    params, x = helpers.init(network), 60 * np.random.default_rng(0).standard_normal((2, helpers.SIZE, helpers.SIZE, 3))
    net = torch_baseline.Net(network, helpers.SIZE).eval()
    with torch.no_grad():
        for name, layer in zip(network.layers, net.layers, strict=True):
            kernel = np.asarray(params[name]['kernel'])
            if kernel.ndim == 2 and name == 'fc6':  # PyTorch flattens maps in (C, H, W) order
                kernel = kernel.reshape(2, 2, 16, -1).transpose(2, 0, 1, 3).reshape(64, -1)
            bias = np.asarray(params[name]['bias'])
            if name == 'local5':
                kernel, bias = kernel.reshape(-1, *kernel.shape[2:]), bias.reshape(-1, bias.shape[-1]).T
            else:
                kernel = kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)
            layer.weight.copy_(torch.tensor(kernel))
            layer.bias.copy_(torch.tensor(bias))
        theirs = net(torch.tensor(np.float32(x.transpose(0, 3, 1, 2)))).numpy()
    ours = np.asarray(network.apply({'params': params}, np.float32(x)))
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize('change', [{'fc6': {'groups': 2}}, {'conv1': {'post': 'swish'}}], ids=['grouped', 'post op'])
def test_network_unsupported_by_peer_is_refused(change, monkeypatch):
    pytest.importorskip('torch')
    from alexnet_jax.benchmark import torch_baseline

    monkeypatch.setitem(post_ops.POST_OPS, 'swish', post_ops.PostOp(lambda x, context: jax.nn.swish(x)))
    with pytest.raises(UserError, match='no PyTorch equivalent of (fc6|conv1)'):
        torch_baseline.Net(helpers.network(layers=helpers.layers(**change)), helpers.SIZE)


def test_inference_ratio_is_the_lowest_to_the_fastest():
    rates = {
        1: {'alexnet_jax': [30.0], 'torch': [10.0], 'openvino': [20.0]},
        8: {'alexnet_jax': [90.0], 'torch': [60.0]},
    }
    *table, record, ratio = inference.report(inference.results(rates), {'n': 1}).splitlines()
    assert ratio == 'ratio: 1.500'  # 30 / 20 = 90 / 60
    assert table[1].split() == ['alexnet_jax', '1', '30.0', '30.0', '30.0', '1'] and len(table) == 6
    assert json.loads(record)['images_per_second']['8']['torch']['median'] == 60
    assert json.loads(
        inference.report(inference.results({1: {'alexnet_jax': [1.0]}}), {}).splitlines()[-1]
    )  # no ratio without others


@pytest.mark.slow
def test_inference_refuses_unknown_programs_and_other_results(monkeypatch):
    with pytest.raises(UserError, match='--against=tflite: expected names of torch, onnxruntime, openvino'):
        inference.check_peers(['onnxruntime', 'tflite'])
    uniform = lambda checkpoint, stack: lambda images: np.full((len(images), 10), 0.1)  # noqa: E731
    monkeypatch.setitem(inference.PEERS, 'torch', uniform)
    config = helpers.digits_config(**{'model.layers.fc8.init': 'normal(1.0)'})
    with contextlib.ExitStack() as stack, pytest.raises(UserError, match='--against=torch: its probabilities differ'):
        inference.measure(config, ['torch'], [2], 1, stack)


@pytest.mark.slow
def test_inference_against_other_runtimes(tmp_path):
    pytest.importorskip('torch')
    against = [name for name in inference.PEERS if importlib.util.find_spec(name)]
    assert {'torch', 'onnxruntime'} <= set(against)
    words = ['--config=quickstart', f'--against={",".join(against)}', '--batch_sizes=1,3', '--repeats=1']
    output = tmp_path / 'inference.json'
    done = helpers.run_command('benchmark', 'inference', *words, '--cpu_devices=1', f'--output={output}')
    assert done.returncode == 0, done.stderr
    written = json.loads(output.read_text())
    assert set(against) < set(written['versions']) and set(written['limits']) == {'1', '3'}
    *_, record, ratio = done.stdout.splitlines()
    assert {size: set(rows) for size, rows in json.loads(record)['images_per_second'].items()} == {
        size: {'alexnet_jax', *against} for size in '13'
    }
    assert float(ratio.removeprefix('ratio: ')) > 0


@pytest.mark.slow
def test_loop_reports_the_median_step():
    record, last = _benchmark('loop', '--batch_size=8', '--steps=20', '--repeats=3')
    measured = json.loads(record)['host_milliseconds']
    assert len(measured) == 3 and min(measured) > 0
    assert last.startswith(f'host work per step: {sorted(measured)[1]:.3f} ms (') and last.endswith(' images/s')
    assert loop.report([2.0, 1.0, 4.0], 100) == (
        'host work per step: 2.000 ms (1.000 - 4.000, n = 3), at most 50,000 images/s'
    )
