"""Published weights by name, from a server on this machine that serves small generated files; and exported folders."""

import contextlib
import errno
import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from types import SimpleNamespace

import chex
import numpy as np
import pytest
import safetensors.numpy
from absl import flags
from PIL import Image

import alexnet_jax
from alexnet_jax.checkpoints import manager
from alexnet_jax.commands import app, weights
from alexnet_jax.convert import convert, loading, published
from alexnet_jax.convert.published import File, Published
from alexnet_jax.core import architecture
from alexnet_jax.core.config import model_from_config
from alexnet_jax.utils.errors import UserError
from tests import ROOT, helpers

WIDTHS = (4, 6, 6, 6, 4)
NAMES = ('features.0', 'features.3', 'features.6', 'features.8', 'features.10')


def _weights():
    """Returns a safetensors file of torchvision's layout with few kernels and seven classes."""
    rng = np.random.default_rng(0)
    shapes = zip(WIDTHS, (3, *WIDTHS), (11, 5, 3, 3, 3), strict=False)
    arrays = {name: (o, i, k, k) for name, (o, i, k) in zip(NAMES, shapes, strict=True)}
    arrays |= {'classifier.1': (8, 36 * WIDTHS[-1]), 'classifier.4': (8, 8), 'classifier.6': (7, 8)}
    tensors = {f'{name}.weight': rng.normal(size=shape).astype(np.float32) for name, shape in arrays.items()}
    tensors |= {f'{name}.bias': rng.normal(size=shape[0]).astype(np.float32) for name, shape in arrays.items()}
    return safetensors.numpy.save(tensors)


WEIGHTS = _weights()
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; the first part of a path chooses what goes wrong."""

    def do_GET(self):
        _, how, name = self.path.split('/')
        self.server.requests.append(how)
        content = self.server.files.get(name, b'')
        if how == 'missing':
            self.send_error(404)
            return
        if how == 'moved':
            self.send_response(302)
            self.send_header('Location', f'/good/{name}')
            self.end_headers()
            return
        self.send_response(200)
        self.send_header('Content-Length', str(len(content)))
        if how == 'encoded':
            self.send_header('Content-Encoding', 'x-gzip')
        self.end_headers()
        if how == 'slow':
            time.sleep(0.5)
        with contextlib.suppress(OSError):  # the client may have given up
            self.wfile.write(content[:100] if how in ('cut', 'stalled') else content)
            self.wfile.flush()
        if how == 'stalled':
            self.server.stop.wait(20)

    def log_message(self, *_):
        pass


@pytest.fixture(scope='module')
def server():
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Handler) as running:
        running.daemon_threads = True
        running.files, running.requests, running.stop = {'small.safetensors': WEIGHTS}, [], threading.Event()
        running.url = f'http://127.0.0.1:{running.server_port}'
        threading.Thread(target=running.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True).start()
        yield running
        running.stop.set()
        running.shutdown()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, in which published weights are kept."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.delenv(published.FOLDER_VARIABLE, raising=False)
    return tmp_path / 'cache' / 'alexnet_jax' / 'weights'


def _register(monkeypatch, url, name='small', digest=f'sha256:{SHA256[:8]}', mean=None):
    """Adds an entry to the published weights and returns its name."""
    entry = Published('a network', 'torchvision', 'a test', 'none', (50.0, 25.0), 1000, File(url, digest), mean)
    monkeypatch.setitem(published.PUBLISHED, name, entry)
    return name


def _assert_same(first, second):
    chex.assert_trees_all_equal((first.params, first.image_stats), (second.params, second.image_stats))
    assert first._replace(params=None, image_stats=None) == second._replace(params=None, image_stats=None)


def _read(tmp_path):
    (tmp_path / 'w.safetensors').write_bytes(WEIGHTS)
    return convert.read(tmp_path / 'w.safetensors')


@pytest.mark.parametrize('how', ['good', 'moved'])
def test_weights_are_fetched_and_converted_once(how, server, cache, tmp_path, monkeypatch):
    name = _register(monkeypatch, f'{server.url}/{how}/small.safetensors')
    server.requests.clear()
    first = alexnet_jax.load_checkpoint(name)
    assert server.requests == [how, 'good'][: 1 + (how == 'moved')]
    folder = os.path.basename(loading.converted_path(name))
    assert sorted(os.listdir(cache)) == ['.lock', folder, 'small.safetensors']
    (cache / 'small.safetensors').unlink()  # no longer needed
    for loaded in (first, alexnet_jax.load_checkpoint(name)):
        _assert_same(loaded, _read(tmp_path))
    assert len(server.requests) == 1 + (how == 'moved')


def _full_disk(monkeypatch, server):
    opened = open

    def full(path, mode='r', *rest, **options):
        if 'incomplete' in str(path) and 'w' in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, mode, *rest, **options)

    monkeypatch.setattr('builtins.open', full)


def _unreachable(monkeypatch, server):
    monkeypatch.setattr(published, '_TIMEOUT', (0.3, 0.3))


def _patience(monkeypatch, server):
    monkeypatch.setattr(published, '_PATIENCE', 0.4)


@pytest.mark.parametrize(
    ('url', 'prepare', 'reason'),
    [
        ('{url}/missing/small.safetensors', None, 'cannot be fetched: HTTP status 404 Not Found'),
        ('{url}/cut/small.safetensors', None, r'cannot be fetched: .*100 bytes read, \d+ more expected'),
        ('{url}/good/empty', None, r'expected empty with a SHA256 digest of \w{8}..., found e3b0c442... \(0 bytes\)'),
        ('{url}/stalled/small.safetensors', _unreachable, 'cannot be fetched: .*timed out'),
        ('{url}/stalled/small.safetensors', _patience, 'cannot be fetched: no data for 0.4 seconds'),
        ('http://127.0.0.1:9/good/small.safetensors', None, 'cannot be fetched: Connection refused'),
        ('http://nowhere.invalid/good/small.safetensors', None, 'cannot be fetched: .*[Nn]ame'),
        ('{url}/good/small.safetensors', _full_disk, 'cannot be fetched: No space left on device'),
    ],
)
def test_failed_downloads_leave_nothing(url, prepare, reason, server, cache, monkeypatch):
    url = url.format(url=server.url)
    name = _register(monkeypatch, url)
    if prepare:
        prepare(monkeypatch, server)
    with pytest.raises(UserError, match=reason) as raised:
        alexnet_jax.load_checkpoint(name)
    message = str(raised.value)
    assert url in message and repr(str(cache / os.path.basename(url))) in message and '\n' not in message
    assert os.listdir(cache) == ['.lock']


def test_full_disk_during_conversion_leaves_the_download(server, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    name = _register(monkeypatch, f'{server.url}/good/small.safetensors')
    monkeypatch.setattr(manager.CheckpointManager, 'save', full)
    with pytest.raises(UserError, match='cannot write .*small-.*No space left on device'):
        alexnet_jax.load_checkpoint(name)
    assert sorted(os.listdir(cache)) == ['.lock', 'small.safetensors']


def test_unwritable_cache_is_refused(server, tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    name = _register(monkeypatch, f'{server.url}/good/small.safetensors')
    with pytest.raises(UserError, match='file/alexnet_jax/weights.* cannot be written.*Set XDG_CACHE_HOME'):
        alexnet_jax.load_checkpoint(name)


def test_remains_of_a_killed_download_are_replaced(server, cache, monkeypatch):
    (cache / '.small.safetensors.incomplete').mkdir(parents=True)
    (cache / '.small.safetensors.incomplete' / 'small.safetensors').write_bytes(b'half')
    alexnet_jax.load_checkpoint(_register(monkeypatch, f'{server.url}/good/small.safetensors'))
    assert not (cache / '.small.safetensors.incomplete').exists()


def test_simultaneous_calls_fetch_once(server, cache, monkeypatch):
    name = _register(monkeypatch, f'{server.url}/slow/small.safetensors')
    server.requests.clear()
    loaded = []
    threads = [threading.Thread(target=lambda: loaded.append(alexnet_jax.load_checkpoint(name))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.requests == ['slow'] and len(loaded) == 3
    _assert_same(loaded[0], loaded[2])


@pytest.mark.parametrize('where', ['cache', 'variable'])
def test_files_fetched_by_hand_are_found(where, cache, tmp_path, monkeypatch):
    """The address is unreachable."""
    folder = cache if where == 'cache' else tmp_path / 'own'
    folder.mkdir(parents=True)
    if where == 'variable':
        monkeypatch.setenv(published.FOLDER_VARIABLE, str(folder))
    (folder / 'small.safetensors').write_bytes(WEIGHTS)
    name = _register(monkeypatch, 'http://127.0.0.1:9/small.safetensors')
    _assert_same(alexnet_jax.load_checkpoint(name), _read(tmp_path))


def test_files_fetched_by_hand_are_checked(cache, tmp_path, monkeypatch):
    (tmp_path / 'own').mkdir()
    monkeypatch.setenv(published.FOLDER_VARIABLE, str(tmp_path / 'own'))
    (tmp_path / 'own' / 'small.safetensors').write_bytes(WEIGHTS[:-1])
    name = _register(monkeypatch, 'http://127.0.0.1:9/small.safetensors')
    with pytest.raises(UserError, match='own/small.safetensors.: expected .* found .*Remove it or fetch http://'):
        alexnet_jax.load_checkpoint(name)
    monkeypatch.setenv(published.FOLDER_VARIABLE, str(tmp_path / 'none'))
    with pytest.raises(UserError, match=f"{published.FOLDER_VARIABLE}='.*none': expected a folder"):
        alexnet_jax.load_checkpoint(name)


def _tar_gz(name, content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as archive:
        for member, data in ((name, content), ('./val.txt', b'...')):
            entry = tarfile.TarInfo(member)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _zip(*files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return buffer.getvalue()


def test_files_in_archives_are_unpacked(server, cache, monkeypatch):
    """Also where the server declares the gzip layer as an encoding, which the HTTP client removes."""
    server.files |= {'mean.tar.gz': _tar_gz('./mean.npy', b'mean'), 'w.zip': _zip(('w.pth', b'w'))}
    for url, member, content in (
        ('good/mean.tar.gz', 'mean.npy', b'mean'),
        ('encoded/mean.tar.gz', 'mean.npy', b'mean'),
        ('good/w.zip', 'w.pth', b'w'),
    ):
        file = File(f'{server.url}/{url}', f'sha1:{hashlib.sha1(content).hexdigest()}', member)
        with published.lock_cache():
            path = published.fetch(file)
        assert path == str(cache / member) and (cache / member).read_bytes() == content
        assert sorted(os.listdir(cache)) == ['.lock', member]
        (cache / member).unlink()
        (cache / file.name).write_bytes(server.files[file.name])  # fetched by hand
        with published.lock_cache():
            assert published.fetch(file._replace(url=f'http://127.0.0.1:9/{file.name}')) == path
        (cache / member).unlink()
        (cache / file.name).unlink()


@pytest.mark.parametrize(
    ('content', 'problem'),
    [
        (b'<html>', 'expected an archive that contains w.pth, found 6 bytes'),
        (_zip(('other.pth', b'w')), 'expected an archive that contains w.pth'),
        (_zip(('w.pth', b'w'))[:-30], 'expected an archive that contains w.pth'),
        (_zip(('w.pth', b'w' * 999)).replace(b'w.pth+', b'w.pth\x03', 1), 'a damaged archive'),
        (_zip(('w.pth', bytes(10**8))), 'w.pth declares 100,000,000 bytes'),
    ],
    ids=['web page', 'other file', 'cut off', 'damaged', 'bomb'],  # the contents have the time of day
)
def test_unsuitable_archives_are_refused(content, problem, server, cache):
    server.files['w.zip'] = content
    file = File(f'{server.url}/good/w.zip', f'sha1:{hashlib.sha1(b"w").hexdigest()}', 'w.pth')
    with published.lock_cache(), pytest.raises(UserError, match=problem):
        published.fetch(file)
    assert os.listdir(cache) == ['.lock']


def test_checkpoints_of_other_files_or_formats_are_not_reused(cache, monkeypatch):
    name = _register(monkeypatch, 'http://127.0.0.1:9/small.safetensors')
    paths = [loading.converted_path(name)]
    for target, attribute, value in (
        (manager, 'FORMAT', manager.FORMAT + 1),
        (loading, '_CONVERSION', loading._CONVERSION + 1),
        (published, 'PUBLISHED', {name: published.PUBLISHED[name]._replace(config='caffe')}),
        (published, 'PUBLISHED', {name: published.PUBLISHED[name]._replace(weights=File('x', 'sha256:00'))}),
        (published, 'PUBLISHED', {name: published.PUBLISHED[name]._replace(mean=File('x', 'sha256:00'))}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, attribute, value)
            paths.append(loading.converted_path(name))
    assert len({*paths}) == len(paths)


def test_a_checkpoint_here_is_preferred_and_named(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = _register(monkeypatch, 'http://127.0.0.1:9/small.safetensors')
    (tmp_path / name).mkdir()  # contains no checkpoint
    with pytest.raises(UserError, match='cannot be fetched'):
        alexnet_jax.load_checkpoint(name)
    (tmp_path / name).rmdir()
    convert.save(_read(tmp_path), name)
    _assert_same(alexnet_jax.load_checkpoint(name), _read(tmp_path))
    assert 'Using the folder small here, not the published weights of that name.' in capsys.readouterr().out
    _assert_same(alexnet_jax.load_checkpoint(f'./{name}'), _read(tmp_path))


def test_damaged_converted_checkpoint_names_the_remedy(server, cache, monkeypatch):
    name = _register(monkeypatch, f'{server.url}/good/small.safetensors')
    alexnet_jax.load_checkpoint(name)
    path = loading.converted_path(name)
    with open(os.path.join(path, 'checkpoints', '0', 'meta', 'metadata'), 'a') as file:
        file.write(' ')
    with pytest.raises(UserError, match=f'is damaged: .* Remove {path!r} to convert small again'):
        alexnet_jax.load_checkpoint(name)


@pytest.mark.parametrize(
    ('name', 'hint'), [('torchvison', "Did you mean 'torchvision'"), ('zzz', 'Choose from: caffe, caffenet, pytorchcv')]
)
def test_mistyped_names_are_corrected(name, hint):
    with pytest.raises(UserError, match=f'there is no checkpoint at {name!r}, and no published weights .*{hint}'):
        alexnet_jax.load_checkpoint(name)


def test_all_commands_take_the_same_checkpoints():
    """Only `convert/` loads paths alone."""
    sources = [
        path for path in (ROOT / 'alexnet_jax').rglob('*.py') if path.parent.name not in ('convert', 'checkpoints')
    ]
    assert len(sources) > 60
    assert not [path for path in sources if re.search(r'checkpoints(\.| import .*)loading', path.read_text())]


def test_published_table():
    """Each entry has a config of its number of parameters, and digests as long as the sources state them."""
    for name, entry in published.PUBLISHED.items():
        config = alexnet_jax.get_config(entry.config)
        sizes = architecture.infer_shapes(model_from_config(config.model), config.data.image_size)
        assert sum(size.parameters for size in sizes.values()) == entry.parameters, name
        assert entry.mean is None or config.data.mean == 'crop', name
        for file in filter(None, (entry.weights, entry.mean)):
            algorithm, digest = file.digest.split(':')
            assert (algorithm, len(digest)) in [('sha1', 40), ('sha256', 8)] and int(digest, 16), name
            assert file.member == '' or file.name.endswith(('.zip', '.tar.gz')), name
    assert published.DEFAULT in published.PUBLISHED
    released = [published.PUBLISHED[name].weights for name in ('pytorchcv', 'pytorchcv-b')]
    for file in released:  # NAME-ERROR-SHA8.pth.zip
        assert file.name == f'{file.member}.zip' and file.digest[5:13] == file.member[-12:-4]


def test_weights_command_lists_them(server, cache, monkeypatch, capsys):
    names = [_register(monkeypatch, f'{server.url}/good/small.safetensors', name) for name in ('first', 'second')]
    entry = published.PUBLISHED['second']
    monkeypatch.setitem(published.PUBLISHED, 'second', entry._replace(weights=File('http://x/none', 'sha1:00')))
    alexnet_jax.load_checkpoint('first')
    capsys.readouterr()
    values = flags.FlagValues()
    app.parse(weights, ['--json'], values)
    weights.main(values)
    rows = json.loads(capsys.readouterr().out)
    assert [rows[name]['cached'] for name in names] == ['converted', '']
    assert rows['torchvision']['top1_error'] == 43.48 and rows['torchvision']['license'] == 'BSD-3-Clause'
    weights.main(SimpleNamespace(json=False))
    text = capsys.readouterr().out
    assert all(url in text for row in rows.values() for url in row['urls']) and str(cache) in text


_COMMAND = """import sys
from alexnet_jax import __main__
from alexnet_jax.convert import published
url, digest = sys.argv.pop(1), sys.argv.pop(1)
entry = published.PUBLISHED['torchvision']
published.PUBLISHED['torchvision'] = entry._replace(weights=published.File(url, digest))
__main__.main()
"""


def _start(url, *words):
    """Starts a command with another file in place of torchvision's."""
    words = [sys.executable, '-c', _COMMAND, url, f'sha256:{SHA256[:8]}', *map(str, words)]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_commands_use_published_weights(server, cache, tmp_path):
    """`predict` without --checkpoint, twice at once; `convert` by name; one line and exit code 2 for a failure."""
    Image.fromarray(helpers.picture(0)).save(tmp_path / 'a.png')
    failed = _start(f'{server.url}/missing/small.safetensors', 'predict', tmp_path / 'a.png')
    assert failed.wait() == 2 and failed.stdout.read() == ''
    errors = [line for line in failed.stderr if not re.match('No --checkpoint|Fetching', line)]
    assert len(errors) == 1 and errors[0].startswith('error: http://127.0.0.1')
    server.requests.clear()
    url = f'{server.url}/slow/small.safetensors'
    started = [_start(url, 'predict', '--json', '--top=7', tmp_path / 'a.png') for _ in range(2)]
    outputs = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0] and server.requests == ['slow']
    rows = [json.loads(out) for out, _ in outputs]  # nothing else on stdout
    assert all('No --checkpoint: using the published weights' in err for _, err in outputs) and rows[0] == rows[1]
    expected = alexnet_jax.predict(_read(tmp_path), tmp_path / 'a.png')
    found = {row['index']: row['probability'] for row in rows[0]['top']}
    np.testing.assert_allclose([found[i] for i in range(7)], expected, rtol=1e-4)
    converted = _start(url, 'convert', '--input=torchvision', f'--output={tmp_path}/out', '--to=safetensors')
    assert converted.wait() == 0
    _assert_same(alexnet_jax.load_checkpoint(tmp_path / 'out'), _read(tmp_path))


# Exported folders.


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """Returns (a checkpoint, the folder of its export without the StableHLO file)."""
    from alexnet_jax.convert import safetensors as own_safetensors
    from alexnet_jax.export import hub

    folder = tmp_path_factory.mktemp('exported')
    saved = _read(tmp_path_factory.mktemp('source'))._replace(step=7)
    own_safetensors.write(str(folder), saved)
    (folder / 'config.json').write_text(json.dumps(hub.hub_config(saved, 1)))
    return saved, folder


def test_exported_folders_are_loaded_exactly(exported):
    saved, folder = exported
    loaded = alexnet_jax.load_checkpoint(folder)
    assert loaded.step == 7
    _assert_same(loaded, saved)


def _copy(folder, target, **changed):
    target.mkdir()
    for name in ('model.safetensors', 'config.json', 'image_stats.npz'):
        content = changed.get(name.partition('.')[0], (folder / name).read_bytes())
        if content is not None:
            (target / name).write_bytes(content)
    return target


@pytest.mark.parametrize(
    ('changed', 'problem'),
    [
        (dict(model=WEIGHTS), 'was not written by alexnet_jax; use alexnet_jax convert --input='),
        (dict(model=WEIGHTS[:50]), 'cannot be read: expected a safetensors file'),
        (dict(image_stats=None), 'expected image_stats.npz of 256 px beside it'),
        (dict(config=b'{"alexnet_jax": {"step": 1, "config": {}}}'), 'state different configs'),
        (dict(config=b'{}'), 'config.json.* is not as alexnet_jax export wrote it'),
        (dict(config=b'\xff'), 'config.json.* is not as alexnet_jax export wrote it'),
    ],
)
def test_changed_exported_folders_are_refused(changed, problem, exported, tmp_path):
    with pytest.raises(UserError, match=problem):
        alexnet_jax.load_checkpoint(_copy(exported[1], tmp_path / 'copy', **changed))


def test_exported_folders_need_no_config_json(exported, tmp_path):
    """`convert --to=safetensors` writes none."""
    loaded = alexnet_jax.load_checkpoint(_copy(exported[1], tmp_path / 'copy', config=None))
    assert loaded.step == 0 and loaded.network == exported[0].network


def test_hub_names_are_passed_on(exported, monkeypatch):
    """huggingface_hub is replaced: only the arguments and the errors are checked here."""
    calls = []

    def snapshot_download(repo_id, *, revision, allow_patterns):
        calls.append((repo_id, revision, allow_patterns))
        if repo_id == 'user/none':
            raise OSError('404 Client Error.\n\nRepository Not Found for url')
        return str(exported[1]) if repo_id == 'user/net' else os.path.dirname(exported[1])

    fake = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', fake)
    files = ['model.safetensors', 'config.json', 'image_stats.npz']
    for source, revision in (('hf:user/net', None), ('hf:user/net@v1', 'v1')):
        chex.assert_trees_all_equal(alexnet_jax.load_checkpoint(source).params, exported[0].params)
        assert calls[-1] == ('user/net', revision, files)
    with pytest.raises(UserError, match=r'hf:user/none cannot be fetched \(404 Client Error.\); check the name'):
        alexnet_jax.load_checkpoint('hf:user/none')
    with pytest.raises(UserError, match='hf:user/empty has no model.safetensors, which alexnet_jax export writes'):
        alexnet_jax.load_checkpoint('hf:user/empty')
    for wrong in ('hf:', 'hf:net', 'hf:no/such/name', 'hf:/net', 'hf:user/'):
        with pytest.raises(UserError, match=f'{wrong}: expected hf:USER/REPO or hf:USER/REPO@REVISION'):
            alexnet_jax.load_checkpoint(wrong)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(UserError, match=r"needs huggingface_hub; pip install 'alexnet_jax\[hub\]'"):
        alexnet_jax.load_checkpoint('hf:user/net')


class _Hub(http.server.BaseHTTPRequestHandler):
    """Serves `server.folder` as the repository user/net of a Hub, with the three routes that a download needs."""

    def do_GET(self):
        path, commit, files = self.path.partition('?')[0], 'c' * 40, sorted(os.listdir(self.server.folder))
        name = os.path.basename(path)
        status, headers, content = 200, {}, b''
        if path == '/api/models/user/net/revision/main':
            content = json.dumps({'_id': '1', 'id': 'user/net', 'sha': commit}).encode()
        elif path == f'/api/models/user/net/tree/{commit}':
            sizes = {file: os.path.getsize(os.path.join(self.server.folder, file)) for file in files}
            rows = [{'type': 'file', 'path': file, 'oid': file, 'size': size} for file, size in sizes.items()]
            content = json.dumps(rows).encode()
        elif path == f'/user/net/resolve/{commit}/{name}' and name in files:
            with open(os.path.join(self.server.folder, name), 'rb') as file:
                content = file.read()
            headers = {'X-Repo-Commit': commit, 'ETag': f'"{name}"'}
        else:
            status, headers = 404, {'X-Error-Code': 'RepoNotFound'}
        self.send_response(status)
        for key, value in {**headers, 'Content-Length': str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


def test_networks_are_loaded_from_a_hub(exported, tmp_path, monkeypatch):
    """The real huggingface_hub, against a server on this machine; then from its cache, without the server."""
    constants = pytest.importorskip(
        'huggingface_hub.constants', reason="needs huggingface_hub: pip install 'alexnet_jax[hub]'"
    )
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Hub) as running:
        running.folder = str(exported[1])
        url = f'http://127.0.0.1:{running.server_port}'
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
        monkeypatch.setattr(constants, 'ENDPOINT', url)
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
        threading.Thread(target=running.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True).start()
        _assert_same(alexnet_jax.load_checkpoint('hf:user/net'), exported[0])
        with pytest.raises(UserError, match='hf:user/other cannot be fetched .*; check the name') as raised:
            alexnet_jax.load_checkpoint('hf:user/other')
        assert '\n' not in str(raised.value)
        running.shutdown()
    _assert_same(alexnet_jax.load_checkpoint('hf:user/net'), exported[0])
