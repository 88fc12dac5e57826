"""The page of inside_page.py: its data, its forward pass and its behavior in headless Chromium."""

import base64
import dataclasses
import io
import re

import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_jax import visualize
from alexnet_jax.core.architecture import ConvSpec, DenseSpec, LocalSpec
from alexnet_jax.core.augment import center_crop
from alexnet_jax.core.model import AlexNet
from alexnet_jax.data import datasets
from alexnet_jax.experiments import inside_page
from alexnet_jax.inference.activations import activations
from alexnet_jax.inference.predict import predict
from alexnet_jax.inference.receptive_field import receptive_field
from alexnet_jax.utils.errors import UserError
from tests import helpers
from tests.experiments import pages
from tests.experiments.pages import HOSTILE, RECORD, in_browser, noise_images, run_in_page, small_checkpoint

INIT = {'init': helpers.INIT}
LAYERS = {
    'conv1': ConvSpec(features=8, kernel=5, stride=2, padding=(0, 1), post='relu lrn pool', **INIT),
    'conv2': ConvSpec(features=12, kernel=3, padding=(1, 1), groups=2, bias=0.5, post='relu spatial_norm pool', **INIT),
    'fc3': DenseSpec(features=14, bias=0.5, post='relu dropout', **INIT),
    'fc4': DenseSpec(init='normal(0.02)'),
}
OTHER_LAYERS = {
    'conv1': ConvSpec(features=6, kernel=4, stride=3, padding=(2, 0), post='tanh lrn avg_pool', init='normal(0.001)'),
    'local2': LocalSpec(features=6, kernel=2, padding=(1, 0), groups=2, post='tanh', **INIT),
    'local3': LocalSpec(features=4, kernel=2, stride=2, **INIT),
    'fc4': DenseSpec(features=10, groups=2, post='tanh dropout', **INIT),
    'fc5': DenseSpec(init=helpers.INIT),
}
OTHER = {'dropout_inverted': True, 'lrn_alpha_over_n': True, 'norm_groups': 1, 'lrn_n': 4, 'dropout_rate': 0.3}
SILENCED = [{}, {'conv2': [3]}, {'conv1': [4, 5, 6, 7], 'fc3': [5]}]


@pytest.fixture(scope='module')
def checkpoint():
    return small_checkpoint(layers=LAYERS, spatial_alpha=0.1)


@pytest.fixture(scope='module')
def page(checkpoint, tmp_path_factory):
    return _write(tmp_path_factory.mktemp('page') / 'p.html', checkpoint)


@pytest.fixture(scope='module')
def data(page):
    return pages.page_data(page)


def _write(path, checkpoint, count=12):
    inside_page.write(str(path), checkpoint, noise_images(count), [HOSTILE] * count, title='<T>', source=HOSTILE)
    return path.read_text()


def _edit(silenced):
    def zero(units):
        return lambda x: x.at[..., np.array(units)].set(0)

    return {name: zero(units) for name, units in silenced.items()}


def _by_layer(checkpoint, silenced):
    return [silenced.get(name, []) for name in checkpoint.network.layers]


_FORWARD = """
  return %s.map((units) => {
    const { outputs, probabilities } = window.inside.forward(2, units.map((list) => new Set(list)));
    return [probabilities, ...outputs.map((x) => [...x])];
  });
"""


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize(
    ('layers', 'changes', 'silenced'),
    [(LAYERS, {'spatial_alpha': 0.1}, SILENCED), (OTHER_LAYERS, {**OTHER, 'mean': 'channel'}, [{}, {'local2': [2]}])],
    ids=['relu', 'tanh'],
)
def test_page_computes_the_network(layers, changes, silenced, page, tmp_path, monkeypatch):
    checkpoint = small_checkpoint(layers=layers, **changes)
    if layers is OTHER_LAYERS:
        nothing = {'units': [0], 'values': [[0.0]], 'tile': 8, 'inner': 8, 'tiles': ''}
        monkeypatch.setattr(inside_page, '_unit_pictures', lambda *_: nothing)  # their compilation takes seconds
        page = _write(tmp_path / 'p.html', checkpoint, count=3)
    script = _FORWARD % [_by_layer(checkpoint, units) for units in silenced]
    names, image = list(checkpoint.network.layers), noise_images(12)[2:3]
    for units, (probabilities, *outputs) in zip(silenced, run_in_page(tmp_path, page, script), strict=True):
        expected = activations(checkpoint, image, names, edit=_edit(units))
        for name, output in zip(names, outputs, strict=True):
            (whole,) = expected[name]
            scale = np.abs(whole).max()
            np.testing.assert_allclose(np.reshape(output, whole.shape), whole, rtol=0, atol=1e-4 * scale, err_msg=name)
        softmax = np.asarray(jax.nn.softmax(expected[names[-1]][0]))
        np.testing.assert_allclose(probabilities, softmax, rtol=0, atol=1e-4)
    np.testing.assert_allclose(predict(checkpoint, image)[0].sum(), 1, atol=1e-5)


@pytest.mark.slow
def test_file_is_self_contained(page, data, checkpoint):
    assert not re.search(r'https?:|url\(|@import|<link|fetch\(|import\(', page)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert page.count('<script') == page.count('</script>') == 2 and '<h1>&lt;T&gt;</h1>' in page
    assert not re.findall(r'<!--\w+-->', page.replace(HOSTILE, '')) and 'id="slide"' in page
    assert data['captions'] == [HOSTILE] * 12 and data['small']
    stored = [base64.b64decode(layer[key]) for layer in data['layers'] for key in ('bias', 'weights')]
    weights = [checkpoint.params[name][key].tobytes() for name in LAYERS for key in ('bias', 'kernel')]
    assert stored == weights
    assert [layer['towers'] for layer in data['layers']] == [2, 2, 2, 1], 'the classifier is on both'


@pytest.mark.slow
@pytest.mark.parametrize('name', ['conv1', 'conv2', 'fc3'])
def test_patches_and_projections_of_units(name, data, checkpoint):
    images = noise_images(12)
    layer = data['layers'][list(LAYERS).index(name)]
    _, width, count = layer['shape']
    maps = activations(checkpoint, images, name)[name].reshape(12, -1, count)
    assert layer['units'] == list(range(count)), 'all units of a small layer'
    np.testing.assert_allclose(layer['values'], -np.sort(-maps.max(1).T, axis=1)[:, :9], rtol=1e-3, atol=1e-5)
    unit = int(maps.max((0, 1)).argmax())
    best = maps[:, :, unit].max(1).argmax()
    row, column = divmod(int(maps[best, :, unit].argmax()), width)
    field = receptive_field(checkpoint.network, name)
    top, left, bottom, right = field.box(row, column, checkpoint.image_size)
    patch = center_crop(images, checkpoint.image_size)[best, top:bottom, left:right]
    (signal,) = visualize.deconvnet(checkpoint, images[best], name, unit)[None, 0, top:bottom, left:right]
    signal = 128 + 127 * signal / np.abs(signal).max()
    sprite = np.asarray(Image.open(io.BytesIO(base64.b64decode(layer['tiles']))), float)
    assert sprite.shape == (40 * count, 400, 3)
    scale = {'conv1': 4, 'conv2': 1, 'fc3': 1}[name]  # fields of 9, 25 and 35 px
    assert layer['inner'] == scale * min(35, field.size or 35)
    for tile, expected in ((0, patch), (9, signal)):
        found = sprite[40 * unit :, 40 * tile :][: scale * (bottom - top), : scale * (right - left)]
        correlation = np.corrcoef(found.ravel(), np.kron(expected, np.ones((scale, scale, 1))).ravel())[0, 1]
        assert correlation > (0.9 if tile == 0 or scale > 1 else 0.5), 'JPEG blurs noise'


_VISIT = """
  const network = document.getElementById('network'), find = (name) => network.querySelector('.' + name);
  const units = [...network.querySelectorAll('.units')], text = (name) => find(name).textContent;
  const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
  const found = { width: [document.documentElement.scrollWidth, innerWidth] };
  const labels = () => [...network.querySelectorAll('.bars dt, .bars dd:not(.bar)')].map((node) => node.textContent);
  found.groups = units.map((group) => group.querySelectorAll('[tabindex="0"]').length);
  found.count = units.map((group) => group.children.length);
  network.querySelectorAll('.pictures input')[2].click();
  found.plain = labels();
  units[0].children[1].focus();
  found.field = find('field').getAttribute('aria-label');
  found.about = text('about');
  units[2].firstChild.focus(); // as the tab key does
  found.focused = text('unit');
  for (const key of ['ArrowRight', 'ArrowDown', 'ArrowLeft', 'ArrowRight']) press(key);
  found.moved = [text('unit'), document.activeElement.tabIndex, units[2].querySelectorAll('[tabindex="0"]').length];
  document.activeElement.click(); // as Enter does: `detail` is 0
  found.pressed = [document.activeElement.getAttribute('aria-pressed'), text('silenced'), text('silence')];
  found.edited = labels();
  find('silence').click();
  found.restored = labels();
  network.querySelectorAll('.tower h4 button')[1].click();
  found.tower = [labels(), text('silenced')];
  find('restore').click();
  found.after = [labels(), text('silenced')];
  const last = units[units.length - 1].lastChild;
  const tap = (name) => last.dispatchEvent(new PointerEvent(name, { pointerType: 'touch' }));
  const taps = [];
  for (const _ of [1, 2]) {
    tap('pointerenter');
    tap('pointerdown');
    last.focus();
    last.dispatchEvent(new MouseEvent('click', { detail: 1, bubbles: true }));
    taps.push([text('unit'), last.getAttribute('aria-pressed')]);
  }
  found.taps = taps;
  units[0].firstChild.dispatchEvent(new PointerEvent('pointerenter', { pointerType: 'mouse' }));
  found.hovered = text('unit');
  await new Promise((resolve) => setTimeout(resolve, 300));
  const patches = find('patches');
  const pixels = patches.getContext('2d').getImageData(0, 0, patches.width, patches.height).data;
  found.painted = pixels.filter((value, i) => i % 4 === 3 && value).length / (pixels.length / 4);
  const named = (node) => node.closest('label, [aria-label]');
  found.unnamed = [...document.querySelectorAll('canvas')].filter((node) => !named(node)).length;
  found.endWidth = [document.documentElement.scrollWidth, innerWidth];
  return { ...found, wrong };
"""


@pytest.fixture(scope='module')
def visit(page, tmp_path_factory):
    return run_in_page(tmp_path_factory.mktemp('visit'), page, _VISIT, width=390)


def _labels(checkpoint, edit=None):
    """Returns the names and probabilities of the third image, as strings in descending order."""
    logits = activations(checkpoint, noise_images(12)[2:3], 'fc4', edit=edit)['fc4'][0]
    p = np.asarray(jax.nn.softmax(logits))
    return [(checkpoint.class_names[i], f'{100 * p[i]:.1f}%') for i in np.argsort(-p)[:5]]


def _pairs(labels, was=False):
    assert all((' (was ' in text) == was for text in labels[1::2])
    return [(name, text.split()[0]) for name, text in zip(labels[::2], labels[1::2], strict=True)]


@pytest.mark.slow
@in_browser
def test_page_fits_a_phone_without_errors(visit):
    assert visit['wrong'] == [] and visit['unnamed'] == 0
    assert visit['width'][1] == visit['endWidth'][1] == 390
    assert visit['width'][0] <= 390 and visit['endWidth'][0] <= 390


@pytest.mark.slow
@in_browser
def test_keys_reach_and_silence_units(visit, checkpoint):
    assert visit['groups'] == [1] * 7 and visit['count'] == [4, 4, 6, 6, 7, 7, 12]
    assert visit['focused'] == 'conv2, map 0 (tower 0)'
    assert visit['moved'] == ['conv2, map 1 (tower 0)', 0, 1], 'six maps fit one row: down does nothing'
    assert visit['pressed'] == ['true', 'Silenced: conv2 1.', 'Restore this unit']
    assert _pairs(visit['plain']) == _pairs(visit['restored']) == _labels(checkpoint)
    assert _pairs(visit['edited'], was=True) == _labels(checkpoint, _edit({'conv2': [1]}))
    assert visit['edited'] != visit['plain']


@pytest.mark.slow
@in_browser
def test_towers_taps_and_pointer(visit, checkpoint):
    labels, text = visit['tower']
    assert text == 'Silenced: tower 1 of conv1.'
    assert _pairs(labels, was=True) == _labels(checkpoint, _edit({'conv1': [4, 5, 6, 7]}))
    assert _pairs(visit['after'][0]) == _labels(checkpoint) and visit['after'][1] == ''
    assert visit['taps'] == [['fc4, unit 11: class 11', 'false'], ['fc4, unit 11: class 11', 'true']]
    assert visit['hovered'] == 'conv1, map 0 (tower 0)' and visit['painted'] > 0.9


@pytest.mark.slow
@in_browser
def test_receptive_field_of_the_maximum_is_drawn(visit, checkpoint):
    maps = activations(checkpoint, noise_images(12)[2:3], 'conv1')['conv1'][0, ..., 1]
    row, column = np.unravel_index(maps.argmax(), maps.shape)
    assert row != column, 'choose another map'
    box = receptive_field(checkpoint.network, 'conv1').box(int(row), int(column), checkpoint.image_size)
    top, left, bottom, right = box
    assert visit['field'] == f'Rows {top} to {bottom - 1}, columns {left} to {right - 1} of {HOSTILE}'
    assert f'at row {row}, column {column}. It sees {bottom - top} x {right - left} pixels' in visit['about']


@pytest.mark.slow
@in_browser
def test_large_network_has_maps_and_labels_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(inside_page, 'MAX_PARAMETERS', 10)
    monkeypatch.setattr(inside_page, '_UNITS', {False: 3})
    layers = {
        'conv1': dataclasses.replace(LAYERS['conv1'], init='normal(0.0005)', post='tanh lrn pool'),
        'fc5': LAYERS['fc4'],
    }
    checkpoint, images = small_checkpoint(layers=layers), noise_images(2)
    page = _write(tmp_path / 'p.html', checkpoint, count=2)
    data = pages.page_data(page)
    assert data['projection'] == 'guided backpropagation', 'a deconvnet cannot reverse tanh'
    assert 'the network has 6,' in data['how'] and 'edit={' in data['how'] and 'weights' not in data['layers'][0]
    first = data['layers'][0]
    assert first['note'].endswith('Shown: 3 of 8, evenly spaced.')
    assert first['units'] == [0, 4, 7], 'evenly spaced'
    found = activations(checkpoint, images, 'conv1')['conv1'][1][..., [0, 4, 7]]
    values = np.frombuffer(base64.b64decode(first['maps'][1]['bytes']), np.uint8).reshape(3, 8, 8)
    restored = np.moveaxis((values - 128.0) / 127 * first['maps'][1]['scale'], 0, -1)
    np.testing.assert_allclose(restored, found, atol=first['maps'][1]['scale'] / 253)
    row, column, value = first['maxima'][1][0]
    assert (row, column) == np.unravel_index(found[..., 0].argmax(), (8, 8)) and row != column, 'choose another map'
    assert value == pytest.approx(found[..., 0].max(), abs=1e-4)
    script = """
      const text = (name) => document.querySelector(`#network .${name}`).textContent;
      document.querySelectorAll('#network .pictures input')[1].click();
      const units = document.querySelectorAll('#network .units button');
      for (const button of [units[2], units[0]]) button.click();
      const hidden = getComputedStyle(document.querySelector('.editing')).display, count = units.length;
      const labels = [...document.querySelectorAll('.bars dt')].map((node) => node.textContent);
      return { wrong, unit: text('unit'), about: text('about'), hidden, count, labels };
    """
    shown = run_in_page(tmp_path, page, script, width=390)
    order = np.argsort(-predict(checkpoint, images)[1])[:5]
    assert shown['labels'] == [checkpoint.class_names[i] for i in order]
    assert (shown['wrong'], shown['unit'], shown['hidden'], shown['count']) == ([], 'conv1, map 0', 'none', 6)
    assert f'at row {int(row)}, column {int(column)}.' in shown['about']


@pytest.mark.slow
def test_report_command(tmp_path):
    run = helpers.save_untrained(tmp_path / 'run', without=('conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7'))
    words = ('--checkpoint', run, '--output', tmp_path / 'page.html')
    done = helpers.run_command('report', *words, '--data=digits', '--cpu_devices=1')
    assert done.returncode == 0, done.stderr
    size = (tmp_path / 'page.html').stat().st_size
    assert done.stdout.splitlines()[-1] == (
        f'Wrote {tmp_path}/page.html ({size / 1e6:.1f} MB): 360 of 360 images of val of digits.'
    )
    assert 'patches of 8 of 8 units' in done.stdout and size < 6e6
    assert sorted(path.name for path in tmp_path.iterdir()) == ['page.html', 'run']


def test_large_networks_are_named_with_their_reason():
    def reason(network, size):
        checkpoint = small_checkpoint(layers=LAYERS)
        augmentation = checkpoint.augmentation._replace(image_size=size)
        return inside_page.why_large(checkpoint._replace(network=network, augmentation=augmentation))

    assert 'the network has 60,965,224 parameters, and a page with over 2,000,000' in reason(AlexNet(), 224)
    assert reason(helpers.network(), 35) == ''
    wide = {**helpers.layers(conv1={'stride': 1, 'features': 32}), 'fc6': DenseSpec(features=2, post='relu')}
    assert 'more than 500 would take a browser too long' in reason(helpers.network(layers=wide), 400)


def test_images_are_a_fixed_part_of_the_split():
    checkpoint = small_checkpoint(layers=LAYERS)
    image = np.zeros((RECORD, RECORD, 3), np.uint8)
    records = [{'image': image + i % 256, 'label': i % 2, 'file_name': b'a.png' if i else b''} for i in range(1500)]
    images, captions = inside_page.read_images(checkpoint, records, ['cat', 'dog'])
    assert len(images) == len(captions) == 1000 and len(np.unique(images[:, 0, 0, 0])) > 200
    again, _ = inside_page.read_images(checkpoint, datasets.subset(records, 1), ['cat', 'dog'])
    assert (images == again).all()
    few, captions = inside_page.read_images(checkpoint, records[:2], ['cat', 'dog'])
    assert few.shape == (2, RECORD, RECORD, 3) and captions == ['cat', 'a.png (dog)']


def test_captions_of_image_files_are_their_names(tmp_path):
    (tmp_path / 'cats').mkdir()
    path = str(tmp_path / 'cats' / '1.png')
    Image.new('RGB', (50, 60)).save(path)
    images, captions = inside_page.read_images(small_checkpoint(layers=LAYERS), [path])
    assert images.shape == (1, RECORD, RECORD, 3) and captions == ['cats/1.png']


@pytest.mark.parametrize(
    ('images', 'captions', 'message'),
    [
        (np.zeros((1, 35, 35, 3), np.uint8), (), r'uint8 of shape \(1, 35, 35, 3\): expected uint8 of shape \(N, 40,'),
        (np.zeros((0, RECORD, RECORD, 3), np.uint8), (), 'expected at least one image'),
        (np.zeros((2, RECORD, RECORD, 3), np.uint8), ['one'], 'expected 2, one for each image, got 1'),
    ],
)
def test_invalid_images_are_refused(images, captions, message, tmp_path):
    with pytest.raises(UserError, match=message):
        inside_page.write(str(tmp_path / 'p.html'), small_checkpoint(layers=LAYERS), images, captions)
    assert not list(tmp_path.iterdir())
