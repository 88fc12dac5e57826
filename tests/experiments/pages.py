"""What the tests of HTML pages share: a small checkpoint with images, and headless Chromium."""

import html
import json
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.core import augment, image_stats
from tests import helpers

RECORD = 40  # px; the network reads the central 35 px, conv1 with stride 2 and padding (0, 1)
HOSTILE = '</script><script>alert("x")</script><!--data-->'
BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason='needs chromium, chromium-browser or google-chrome')


def noise_images(count=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, RECORD, RECORD, 3), np.uint8)


def small_checkpoint(mean='crop', **changes):
    network = helpers.network(**changes)
    params = jax.device_get(helpers.init(network))
    first = params[next(iter(network.layers))]
    first['bias'] = np.arange(first['bias'].size, dtype=np.float32)
    drawn = noise_images(20, seed=1)
    moments = image_stats.Moments.zeros(RECORD)
    for image in drawn // np.arange(1, 4, dtype=np.uint8):  # channels with different means
        moments = moments.add(image)
    return Checkpoint(
        step=1,
        params=params,
        network=network,
        augmentation=augment.Augmentation(image_size=helpers.SIZE, mean=mean, pixel_std=(1.0, 2.0, 3.0)),
        record_size=RECORD,
        class_names=(HOSTILE, *(f'class {i}' for i in range(1, network.num_classes))),
        image_stats=image_stats.from_moments(moments),
        config={},
    )


LISTEN = """<script>
const wrong = [];
addEventListener('error', (event) => wrong.push(event.message));
addEventListener('securitypolicyviolation', (event) => wrong.push(event.blockedURI));
console.error = console.warn = (...all) => wrong.push(all.join(' '));
</script>"""
WRAP = """<iframe src="%s" width="%d" height="800"></iframe><script>
addEventListener('message', (event) => {
  const found = document.createElement('pre');
  found.textContent = 'FOUND' + event.data + 'END';
  document.body.append(found);
});
</script>"""


def run_in_page(folder, page, script, width=375):
    """Returns the result of an async script that runs in the page, in a window of `width` px."""
    tell = f'parent.postMessage(JSON.stringify(await (async () => {{ {script} }})()), "*")'
    instrumented = page.replace('<head>', '<head>' + LISTEN).replace(
        '</body>', f'<script type="module">{tell}</script></body>'
    )
    (folder / 'played.html').write_text(instrumented)
    (folder / 'wrap.html').write_text(WRAP % ('played.html', width))  # Chromium's own windows are at least 500 px wide
    flags = ['--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={folder}/profile']
    flags += ['--virtual-time-budget=20000', '--dump-dom', f'file://{folder}/wrap.html']
    result = subprocess.run([BROWSER, *flags], capture_output=True, text=True, timeout=120)
    found = re.search('<pre>FOUND(.*)END</pre>', result.stdout, re.S)
    assert found, result.stdout[-2000:] + result.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def page_data(page):
    return json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
