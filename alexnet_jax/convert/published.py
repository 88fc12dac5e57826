"""Published weights: a table of their sources, and verified local copies of their files.

The downloads could not be tried when this was written; a server on this machine stood in for them in the tests.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from absl import logging

from alexnet_jax.convert import archive
from alexnet_jax.utils.errors import UserError, as_user_error, first_line
from alexnet_jax.utils.files import cache_folder

DEFAULT = 'torchvision'
FOLDER_VARIABLE = 'ALEXNET_JAX_WEIGHTS'  # environment variable: a folder with files fetched by hand
_TIMEOUT = (10, 20)  # seconds to connect, and between two packets
_PATIENCE = 45  # seconds without data after which a download ends: a host may have many addresses to connect to
_CHUNK = 2**16  # bytes


class File(NamedTuple):
    """A published file."""

    url: str
    digest: str  # 'ALGORITHM:HEX' of the file, or of `member`; HEX may be the beginning only
    member: str = ''  # if the published file is an archive: the file that is needed from it

    @property
    def name(self) -> str:
        """The published name."""
        return os.path.basename(self.url)

    @property
    def needed(self) -> str:
        """The name of the file that is needed, which is in the archive if the published file is one."""
        return self.member or self.name


class Published(NamedTuple):
    """Published weights of one network."""

    network: str
    config: str  # network and preprocessing
    source: str
    license: str
    errors: tuple[float, float]  # top-1, top-5: percent, as published; ILSVRC-2012 validation set, center crop
    parameters: int
    weights: File
    mean: File | None = None  # mean image, of Caffe's networks

    @property
    def mebibytes(self) -> float:
        """The size of the weights."""
        return 4 * self.parameters / 2**20


_CAFFE = 'http://dl.caffe.berkeleyvision.org'
# Caffe states no digest of the archive. This one is of the file in it, and is listed by Apache MXNet's Caffe converter.
_CAFFE_MEAN = File(
    f'{_CAFFE}/caffe_ilsvrc12.tar.gz', 'sha1:63e4652e656abc1e87b7a8339a7e02fca63a2c0c', 'imagenet_mean.binaryproto'
)
_PYTORCHCV = 'https://github.com/osmr/imgclsmob/releases/download'
PUBLISHED = {
    'torchvision': Published(
        "torchvision's AlexNet: one tower, no normalization",
        'torchvision', 'torchvision, AlexNet_Weights.IMAGENET1K_V1', 'BSD-3-Clause', (43.48, 20.93), 61_100_840,
        File('https://download.pytorch.org/models/alexnet-owt-7be5be79.pth', 'sha256:7be5be79'),
    ),
    'caffe': Published(
        "Caffe's AlexNet: one tower, groups, normalization",
        'caffe', 'BVLC/caffe, bvlc_alexnet', 'unrestricted use', (42.9, 19.8), 60_965_224,
        File(f'{_CAFFE}/bvlc_alexnet.caffemodel', 'sha1:9116a64c0fbe4459d18f4bb6b56d647b63920377'), _CAFFE_MEAN,
    ),
    'caffenet': Published(
        "Caffe's CaffeNet: as caffe, but pooling before normalization",
        'caffe:net=caffenet', 'BVLC/caffe, bvlc_reference_caffenet', 'unrestricted use', (42.6, 19.6), 60_965_224,
        File(f'{_CAFFE}/bvlc_reference_caffenet.caffemodel', 'sha1:4c8d77deb20ea792f84eb5e6d0a11ca0a8660a46'),
        _CAFFE_MEAN,
    ),
    'pytorchcv': Published(
        "pytorchcv's alexnet: the paper's widths without groups, normalization",
        'pytorchcv', 'osmr/imgclsmob v0.0.481, alexnet', 'MIT', (38.50, 16.64), 62_378_344,
        File(
            f'{_PYTORCHCV}/v0.0.481/alexnet-1664-2768cdb3.pth.zip',
            'sha1:2768cdb312d584e33e93f31b0c569589bb289749', 'alexnet-1664-2768cdb3.pth',
        ),
    ),
    'pytorchcv-b': Published(
        "pytorchcv's alexnetb: torchvision's network",
        'pytorchcv:net=b', 'osmr/imgclsmob v0.0.485, alexnetb', 'MIT', (39.74, 17.47), 61_100_840,
        File(
            f'{_PYTORCHCV}/v0.0.485/alexnetb-1747-ac887bf7.pth.zip',
            'sha1:ac887bf7eada4179857d243584ac30b4d74a6493', 'alexnetb-1747-ac887bf7.pth',
        ),
    ),
}  # fmt: skip


def cache() -> str:
    """Returns the folder of downloaded files and converted checkpoints. It may not exist."""
    return os.path.join(cache_folder(), 'weights')


@contextlib.contextmanager
def lock_cache() -> Iterator[None]:
    """Holds the lock of the cache; waits for another process or thread that holds it. Raises UserError."""
    with contextlib.ExitStack() as stack:
        with as_user_error(f'{cache()!r} cannot be written', 'Set XDG_CACHE_HOME to a folder that can be written.'):
            os.makedirs(cache(), exist_ok=True)
            file = stack.enter_context(open(os.path.join(cache(), '.lock'), 'a'))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logging.info('Waiting for another process that fetches published weights.')
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find(file: File) -> str | None:
    """Returns the path of a file in the folder `ALEXNET_JAX_WEIGHTS` or in the cache, under either of its names.

    Raises UserError if `ALEXNET_JAX_WEIGHTS` is not a folder.
    """
    own = os.environ.get(FOLDER_VARIABLE, '')
    if own and not os.path.isdir(own):
        raise UserError(f'{FOLDER_VARIABLE}={own!r}: expected a folder with weights fetched by hand.')
    paths = [os.path.join(folder, name) for folder in (own, cache()) if folder for name in (file.needed, file.name)]
    return next((path for path in paths if os.path.isfile(path)), None)


def fetch(file: File) -> str:
    """Returns the path of a file whose digest is right. Downloads it into the cache unless `find` finds it.

    The caller holds the lock of the cache. Raises UserError if the file cannot be fetched or has another digest.
    Nothing is written then.
    """
    path = find(file)
    if path is not None and os.path.basename(path) == file.needed:
        _check_digest(file, path, repr(path), f'Remove it or fetch {file.url} again.')
        return path
    kept, by_hand = os.path.join(cache(), file.needed), os.path.join(cache(), file.name)
    remedy = f'Save it by hand as {by_hand!r}, or in another folder and set {FOLDER_VARIABLE} to that folder.'
    with as_user_error(f'{file.url} cannot be kept in {cache()!r}', remedy), _staging(file.name) as folder:
        where = file.url
        if path is None:
            path = _download(file, folder, remedy)
        else:
            where, remedy = repr(path), f'Remove it or fetch {file.url} again.'
        if file.member:
            path = _unpack(file, path, where, folder, remedy)
        _check_digest(file, path, where, remedy)
        os.replace(path, kept)
    return kept


@contextlib.contextmanager
def _staging(name: str) -> Iterator[str]:
    """Yields an empty folder in the cache, which is removed on exit."""
    folder = os.path.join(cache(), f'.{name}.incomplete')
    shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
    os.makedirs(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unpack(file: File, path: str, where: str, folder: str, remedy: str) -> str:
    inner = archive.find(path, lambda name: name == file.member)
    if inner is None:
        size = os.path.getsize(path)
        raise UserError(f'{where}: expected an archive that contains {file.member}, found {size:,} bytes. {remedy}')
    try:
        return archive.unpack(path, inner, folder)
    except OSError:
        raise
    except Exception as error:  # damaged archives raise many types
        raise UserError(f'{where}: a damaged archive ({first_line(error)}). {remedy}') from error


def _check_digest(file: File, path: str, where: str, remedy: str) -> None:
    """Raises UserError if a file does not have the published digest. where: its origin, for the message."""
    algorithm, _, expected = file.digest.partition(':')
    with as_user_error(f'{path!r} cannot be read', remedy), open(path, 'rb') as content:
        found = hashlib.file_digest(content, algorithm).hexdigest()
    if not found.startswith(expected):
        raise UserError(
            f'{where}: expected {file.needed} with a {algorithm.upper()} digest of {expected[:8]}..., found '
            f'{found[:8]}... ({os.path.getsize(path):,} bytes); it is damaged or not the published file. {remedy}'
        )


class _Watch:
    """Logs the progress of a download every ten seconds. Has the interface of pooch's progress bars."""

    total = 0  # bytes; 0 if the server does not state it

    def __init__(self) -> None:
        self._done = 0
        self.active = self._logged = time.monotonic()

    def update(self, count: int) -> None:
        self._done += count
        self.active = time.monotonic()
        if self.active - self._logged >= 10:
            self._logged = self.active
            total = f' of {self.total / 2**20:.0f}' if self.total else ''
            logging.info('%.0f%s MiB', self._done / 2**20, total)

    def reset(self) -> None:
        self._logged = time.monotonic()  # pooch counts the whole file again at its end

    def close(self) -> None:
        pass


def _download(file: File, folder: str, remedy: str) -> str:
    """Downloads a file into a folder and returns its path. Raises UserError if no data arrives for `_PATIENCE` s."""
    import pooch

    logging.info('Fetching %s to %s.', file.url, cache())
    path, watch, failed = os.path.join(folder, file.name), _Watch(), []
    downloader = pooch.HTTPDownloader(progressbar=watch, chunk_size=_CHUNK, timeout=_TIMEOUT)

    def work() -> None:
        try:
            downloader(file.url, path, None)
        except Exception as error:
            failed.append(error)

    # The time to connect has no limit in requests: each address of the host is tried in turn, and each redirect.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
        if time.monotonic() - watch.active > _PATIENCE:
            failed.append(TimeoutError(f'no data for {_PATIENCE} seconds'))
            break
    if failed:
        raise UserError(f'{file.url} cannot be fetched: {_reason(failed[0])}. {remedy}') from failed[0]
    return path


def _reason(error: BaseException) -> str:
    """Returns the reason of a failed download: an HTTP status, or the innermost error."""
    if (response := getattr(error, 'response', None)) is not None:
        return f'HTTP status {response.status_code} {response.reason}'
    while inner := error.__cause__ or error.__context__:
        error = inner
    return getattr(error, 'strerror', None) or first_line(error)
