"""The page of report.py: the content of the file, and its behavior in headless Chromium."""

import base64
import html
import re

import jax
import numpy as np
import pytest
from jax import lax
from PIL import Image

from alexnet_jax.core import augment
from alexnet_jax.core.architecture import ConvSpec, DenseSpec
from alexnet_jax.experiments import report
from alexnet_jax.inference import predict
from alexnet_jax.utils.errors import UserError
from tests import helpers
from tests.experiments.pages import HOSTILE, RECORD, in_browser, noise_images, page_data, run_in_page, small_checkpoint


@pytest.fixture(scope='module')
def checkpoint():
    return small_checkpoint()


@pytest.fixture(scope='module')
def interactive(checkpoint, tmp_path_factory):
    """A page with interactive parts and hostile texts."""
    wide = report.Table('Wide', tuple(f'column {i}' for i in range(20)), [tuple(range(10**6, 10**6 + 20))])
    folder = tmp_path_factory.mktemp('interactive')
    Image.new('RGB', (2025, 90)).save(folder / 'wide.png')
    content = {'tables': [TABLE, wide], 'figures': [report.Figure('Wide <i>', str(folder / 'wide.png'))]}
    content |= {'checkpoint': checkpoint, 'image_NHWC': noise_images(), 'captions': [HOSTILE]}
    return _write(folder / 'r.html', title='title' * 30, **content)


def _write(path, **contents):
    report.write(str(path), **{'title': 'T', 'summary': 'S', **contents})
    return path.read_text()


TABLE = report.Table(
    'Errors <b>',
    ('network', 'error', 'images'),
    [('a&b', 37.5, 60965224), (None, 1 / 3, 2012), (HOSTILE, 17, 5)],
    'n<t',
)


def test_tables(tmp_path):
    page = _write(tmp_path / 'r.html', title='<i>', tables=[TABLE])
    cells = [html.unescape(cell) for cell in re.findall('<td[^>]*>(.*?)</td>', page)]
    assert cells == ['a&b', '37.5', '60,965,224', '', '0.333333', '2012', HOSTILE, '17', '5']
    assert re.findall('<th scope="col"( class="number")?>(.*?)</th>', page) == [
        ('', 'network'), (' class="number"', 'error'), (' class="number"', 'images')
    ]  # fmt: skip
    assert '<h1>&lt;i&gt;</h1>' in page and '<a href="#table-1">Errors &lt;b&gt;</a>' in page and '>n&lt;t</p>' in page
    assert page.index('<details><summary>Contents') < page.index('Errors &lt;b&gt;'), 'the page begins with the result'
    assert '<script' not in page and not re.search('<!--(?!data)', html.unescape(page)), (
        'no interactive, no markers left'
    )
    assert 'id="slide"' not in page and 'id="walk"' not in page and '#walk' not in page


def test_figures_and_scripts_are_embedded(checkpoint, tmp_path):
    svg = '<svg xmlns="http://www.w3.org/2000/svg"><a href="https://example.org"/></svg>'
    (tmp_path / 'a.svg').write_text(svg)
    Image.new('RGB', (3, 2)).save(tmp_path / 'b.PNG')
    figures = [report.Figure('A', str(tmp_path / 'a.svg'), '"quoted"'), report.Figure('B', str(tmp_path / 'b.PNG'))]
    page = _write(tmp_path / 'r.html', figures=figures, checkpoint=checkpoint, image_NHWC=noise_images(1))
    assert f'src="data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}" alt="&quot;quoted&quot;"' in page
    assert 'src="data:image/png;base64,' in page and 'alt="B"' in page
    assert re.findall('<div class="scroll" tabindex="0" role="region" aria-label="(.)">\n<img', page) == ['A', 'B']
    assert not re.search(r'https?:|url\(|@import|<link', page)
    assert all(value.startswith(('data:image/', '#')) for value in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.svg', 'b.PNG', 'r.html'], 'nothing half written is left'


def test_class_names_and_captions_are_escaped(interactive):
    assert interactive.count('<script') == interactive.count('</script>') == 2 and 'alert("x")<' not in interactive
    data = page_data(interactive)
    assert data['captions'] == [HOSTILE, 'image 2', 'image 3']
    assert HOSTILE in {row['label'] for rows in data['walk']['labels'] for row in rows}, 'choose another seed'


def test_walk_shows_the_networks_activations(checkpoint, interactive):
    walk, images = page_data(interactive)['walk'], noise_images()
    x = augment.views(images, checkpoint.image_stats, checkpoint.augmentation, count=1)[0]
    apply = jax.jit(lambda params, x: checkpoint.network.apply({'params': params}, x, mutable='intermediates'))
    _, seen = jax.device_get(apply(checkpoint.params, x))
    steps = [(name, step) for name, row in checkpoint.network.layers.items() for step in ('linear', *row.ops)]
    assert [stage['layer'] for stage in walk['stages']] == [name for name, _ in steps]
    assert sum(s['parameters'] for s in walk['stages']) == sum(p.size for p in jax.tree.leaves(checkpoint.params))
    for stage, (name, step) in zip(walk['stages'], steps, strict=True):
        (whole,) = seen['intermediates'][f'{name}.{step}']
        assert stage['shape'] == ' x '.join(map(str, whole.shape[1:]))
        for picture, expected in zip(stage['pictures'], whole, strict=True):
            values = np.frombuffer(base64.b64decode(picture['bytes']), np.uint8)
            if expected.ndim == 3:
                expected = np.moveaxis(expected[..., np.array(stage['chosen']) - 1], -1, 0)
            found = (values.astype(float) - 128) / 127 * picture['scale']
            np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=picture['scale'] / 253)
    probabilities = predict.predict(checkpoint, images, views=1)
    for rows, p in zip(walk['labels'], probabilities, strict=True):
        assert [row['label'] for row in rows] == [checkpoint.class_names[i] for i in np.argsort(-p)[:5]]
        np.testing.assert_allclose([row['probability'] for row in rows], np.sort(p)[:-6:-1], rtol=1e-4)


def _layers(*convs):
    """Returns convolutions followed by the dense layers of `helpers.SMALL`."""
    dense = {name: spec for name, spec in helpers.SMALL['layers'].items() if name.startswith('fc')}
    return {f'conv{i}': spec for i, spec in enumerate(convs, 1)} | dense


def test_many_images_and_large_layers_are_truncated(tmp_path):
    layers = {
        'conv1': ConvSpec(features=40, kernel=5, padding=(2, 2), init=helpers.INIT, bias=0.1, post='avg_pool'),
        'fc2': DenseSpec(features=5000, init=helpers.INIT, bias=0.5, post='tanh'),
        'fc3': DenseSpec(init=helpers.INIT),
    }
    checkpoint = small_checkpoint(layers=layers, pool_window=9, pool_stride=9, num_classes=3)
    data = page_data(_write(tmp_path / 'r.html', checkpoint=checkpoint, image_NHWC=noise_images(9)))
    assert len(data['pictures']) == len(data['captions']) == 6
    first = data['walk']['stages'][0]
    assert first['shape'] == '35 x 35 x 40' and (first['width'], len(first['chosen'])) == (32, 16)
    units = next(s for s in data['walk']['stages'] if s['operation'] == 'tanh')
    assert (units['shape'], units['units'], units['width'], units['height']) == ('5000', 4096, 128, 32)
    assert [len(rows) for rows in data['walk']['labels']] == [3] * 6


def test_filter_demo_needs_a_convolution(tmp_path):
    page = _write(tmp_path / 'r.html', checkpoint=small_checkpoint(layers=_layers()), image_NHWC=noise_images())
    assert 'id="walk"' in page and 'id="slide"' not in page and '#slide' not in page


def test_custom_step_is_shown_by_its_name():
    """docs/variants.md: the report describes steps it knows and shows others by name."""
    network = helpers.network()
    assert report.describe_op(network, network.layers['conv1'], (8, 8, 3), 'swish') == ('swish', '')


def test_repeated_step_is_shown_twice(tmp_path):
    """8 kernels on 8 px maps are pooled to 4 px, then to 2 px."""
    row = ConvSpec(features=8, kernel=3, stride=5, padding=(1, 1), init=helpers.INIT, post='relu pool pool')
    page = _write(tmp_path / 'r.html', checkpoint=small_checkpoint(layers=_layers(row)), image_NHWC=noise_images())
    sizes = re.findall(r'"operation": "max pooling".*?"shape": "(\d+) x', page)
    assert len(sizes) == 2 and int(sizes[1]) < int(sizes[0])


@pytest.mark.parametrize(
    ('contents', 'message'),
    [
        ({'tables': [report.Table('t', ('a', 'b'), [(1,)])]}, "table 't': expected 2 cells in every row, got 1"),
        ({'figures': [report.Figure('f', 'x.gif')]}, "'x.gif': expected a file of type .svg or .png"),
        ({'figures': [report.Figure('f', '/none/x.svg')]}, "'/none/x.svg' cannot be read: No such file"),
        ({'image_NHWC': np.zeros((1, RECORD, RECORD, 3), np.uint8)}, 'expected both checkpoint and image_NHWC'),
    ],
)
def test_user_errors(contents, message, tmp_path):
    with pytest.raises(UserError, match=message):
        _write(tmp_path / 'r.html', **contents)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('images', 'message'),
    [
        (np.zeros((1, 35, 35, 3), np.uint8), r'uint8 of shape \(1, 35, 35, 3\): expected uint8 of shape \(N, 40,'),
        (np.zeros((1, RECORD, RECORD, 3)), 'images are float64'),
        (np.zeros((0, RECORD, RECORD, 3), np.uint8), r'\(0, 40, 40, 3\)'),
    ],
)
def test_invalid_images_are_refused(images, message, checkpoint, tmp_path):
    with pytest.raises(UserError, match=message):
        _write(tmp_path / 'r.html', checkpoint=checkpoint, image_NHWC=images)
    assert not list(tmp_path.iterdir())


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="none/r.html' cannot be written: No such file"):
        _write(tmp_path / 'none' / 'r.html')


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize(
    ('mean', 'row'),
    [
        ('crop', {'kernel': 5, 'stride': 2, 'padding': (0, 1), 'post': 'relu'}),
        # The paper's layout, smaller: the last window extends beyond the edge.
        ('channel', {'kernel': 7, 'stride': 4, 'padding': (0, 3)}),
        ('center', {'kernel': 4, 'stride': 3, 'padding': (2, 0), 'post': 'relu'}),
    ],
)
def test_page_computes_the_convolution(mean, row, tmp_path):
    row = ConvSpec(features=8, init=helpers.INIT, bias=0.1, **row)
    checkpoint, images = (
        small_checkpoint(mean, layers={'conv1': row, 'fc2': DenseSpec(init=helpers.INIT)}),
        noise_images(),
    )
    page = _write(tmp_path / 'r.html', checkpoint=checkpoint, image_NHWC=images)
    found = run_in_page(
        tmp_path, page, 'return [[0, 0], [2, 5]].map((pair) => [...window.report.featureMap(...pair)]);'
    )
    x = augment.views(images, checkpoint.image_stats, checkpoint.augmentation, count=1)[0]
    weights = checkpoint.params['conv1']
    expected = lax.conv_general_dilated(
        x, weights['kernel'], (row.stride,) * 2, (row.padding,) * 2, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    expected = np.asarray(expected) + weights['bias']
    for (picture, kernel), values in zip([(0, 0), (2, 5)], found, strict=True):
        whole = expected[picture, :, :, kernel]
        np.testing.assert_allclose(np.reshape(values, whole.shape), whole, rtol=0, atol=1e-5 * np.abs(whole).max())


@pytest.fixture(scope='module')
def visit(interactive, tmp_path_factory):
    """One visit: the page width, then keys and buttons, and what is shown after each."""
    script = """
      const [slide, walk] = ['slide', 'walk'].map((name) => document.getElementById(name));
      const press = (node, key) => node.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
      const at = () => Number(slide.querySelector('.place').value);
      const shown = () => walk.querySelector('.value').textContent;
      const found = { width: [document.documentElement.scrollWidth, innerWidth], places: [at()], stages: [shown()] };
      for (const key of ['ArrowRight', 'ArrowDown', 'ArrowLeft', 'ArrowUp', 'ArrowUp']) {
        press(slide.querySelector('.stage'), key);
        found.places.push(at());
      }
      slide.querySelector('.step').click();
      found.places.push(at());
      press(slide.querySelector('.place'), 'ArrowRight'); // the slider moves by itself, and not twice
      found.places.push(at());
      slide.querySelectorAll('.kernels input')[2].click();
      found.value = slide.querySelector('.value').textContent;
      found.third = window.report.featureMap(0, 2)[1];
      await new Promise((resolve) => setTimeout(resolve, 300));
      found.still = at();
      const held = { key: 'ArrowRight', bubbles: true, cancelable: true };
      found.passed = ['altKey', 'ctrlKey', 'metaKey', 'shiftKey'].map((name) =>
        slide.querySelector('.stage').dispatchEvent(new KeyboardEvent('keydown', { ...held, [name]: true })));
      found.places.push(at());
      slide.querySelector('.play').click();
      await new Promise((resolve) => setTimeout(resolve, 1000));
      slide.querySelector('.play').click();
      found.played = at();
      await new Promise((resolve) => setTimeout(resolve, 300));
      found.paused = at() === found.played;
      for (const key of ['ArrowLeft', 'ArrowRight', 'ArrowRight']) {
        press(walk.querySelector('.stage'), key);
        found.stages.push(shown());
      }
      walk.querySelector('.next').click();
      found.stages.push(shown());
      found.maps = walk.querySelectorAll('.maps canvas').length;
      walk.querySelector('.layers button:last-child').click();
      found.stages.push(shown());
      const next = walk.querySelector('.next');
      walk.querySelector('.previous').click();
      next.focus();
      next.click(); // the end: the keys go on from here
      await new Promise((resolve) => setTimeout(resolve, 100));
      found.ends = ['.previous', '.next'].map((name) => walk.querySelector(name).getAttribute('aria-disabled'));
      press(document.activeElement, 'ArrowLeft');
      found.stages.push(shown());
      press(document.activeElement, 'ArrowRight');
      found.frames = [0, 1, Number(slide.querySelector('.place').max)].map((place) => {
        slide.querySelector('.place').value = place;
        slide.querySelector('.place').dispatchEvent(new Event('input'));
        const canvas = slide.querySelector('.picture');
        const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        let yellow = 0;
        for (let i = 0; i < data.length; i += 4) yellow += data[i] === 240 && data[i + 1] === 228 && data[i + 2] === 66;
        return yellow;
      });
      found.behind = getComputedStyle(slide.querySelector('.map')).backgroundImage;
      const figure = document.querySelector('img.figure'), box = figure.closest('.scroll');
      found.figure = [figure.clientWidth, box.clientWidth, box.scrollWidth];
      found.labels = [...walk.querySelectorAll('dt')].map((node) => node.textContent);
      const named = (node) => node.matches('[aria-label]') || node.closest('label, .maps[aria-label]');
      found.unnamed = [...document.querySelectorAll('canvas')].filter((node) => !named(node)).length;
      found.unnamed += document.querySelectorAll('img:not([alt])').length;
      found.clickable = document.querySelectorAll('[onclick], div[role=button], a:not([href])').length;
      found.endWidth = [document.documentElement.scrollWidth, innerWidth];
      return { ...found, wrong };
    """
    return run_in_page(tmp_path_factory.mktemp('played'), interactive, script)


@pytest.mark.slow
@in_browser
def test_page_has_no_errors_and_fits_a_phone(visit):
    assert visit['wrong'] == []
    assert visit['width'][1] == visit['endWidth'][1] == 375
    assert visit['width'][0] <= 375 and visit['endWidth'][0] <= 375
    assert visit['unnamed'] == visit['clickable'] == 0
    image, box, content = visit['figure']
    assert image == 66 * 16 <= content and box < 375, 'as wide as on a desk, and it scrolls'


@pytest.mark.slow
@in_browser
def test_window_moves_by_key_and_button(visit):
    side = (helpers.SIZE + 1 - 5) // 2 + 1
    assert visit['places'] == [0, 1, 1 + side, side, 0, 0, 1, 1, 1] and visit['passed'] == [True] * 4
    assert visit['frames'][0] == visit['frames'][1] == visit['frames'][2] > 0, 'whole, at the edge, too'
    assert visit['behind'].startswith('repeating-linear-gradient')
    assert visit['value'].startswith(f'Row 1 of {side}, column 2: 75 products and the bias 2 add up to ')
    assert float(visit['value'].split()[-1][:-1]) == pytest.approx(visit['third'], rel=5e-3)
    assert visit['still'] == 1 and visit['played'] > 1 and visit['paused']


@pytest.mark.slow
@in_browser
def test_walk_moves_by_key_and_button(visit):
    count = 22 + 2
    assert visit['stages'] == [
        f'1 of {count}, the image', f'1 of {count}, the image', f'2 of {count}, conv1: convolution',
        f'3 of {count}, conv1: ReLU', f'4 of {count}, conv1: response normalization', f'{count} of {count}, the labels',
        f'{count - 1} of {count}, fc8: fully connected',
    ]  # fmt: skip
    assert visit['ends'] == ['false', 'true']
    assert visit['maps'] == 8 and len(visit['labels']) == 5
