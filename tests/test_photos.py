"""Commands and exports, with weights converted from PyTorch, agree with PyTorch on original ImageNet photos."""

import importlib.util
import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from alexnet_jax.data import cache, datasets
from tests import ROOT

torch = pytest.importorskip('torch', reason="needs PyTorch: pip install 'alexnet_jax[oracle]'")
nn = torch.nn

pytestmark = pytest.mark.slow
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def _net():
    """Builds torchvision's AlexNet with a scaled classifier, so that probabilities are not uniform."""
    torch.manual_seed(0)
    net = nn.Module()
    net.features = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip
    net.classifier = nn.Sequential(
        nn.Dropout(), nn.Linear(9216, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(),
        nn.Linear(4096, 1000),
    )  # fmt: skip
    with torch.no_grad():
        net.classifier[6].weight *= 300
    return net.eval()


def _probabilities(net, images_NHWC):
    """Applies ToTensor, Normalize, the network and softmax to uint8 images of 224 px."""
    x = (np.asarray(images_NHWC) / 255 - MEAN) / STD
    with torch.no_grad():
        x = torch.tensor(x, dtype=torch.float32).permute(0, 3, 1, 2)
        return torch.softmax(net.classifier(net.features(x).flatten(1)), 1).double().numpy()


def _ten_crops(image):
    """Returns the corners and the center, then their reflections, as torchvision's TenCrop."""
    corners = [(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)]
    five = [image[y : y + 224, x : x + 224] for y, x in corners]
    return five + [view[:, ::-1] for view in five]


def _run(command, *arguments):
    result = subprocess.run(
        [sys.executable, '-m', 'alexnet_jax', command, *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture(scope='module')
def converted(tmp_path_factory):
    folder, net = tmp_path_factory.mktemp('converted'), _net()
    torch.save(net.state_dict(), folder / 'alexnet.pth')
    _run('convert', f'--input={folder}/alexnet.pth', f'--output={folder}/alexnet')
    return net, f'{folder}/alexnet'


@pytest.fixture(scope='module')
def photos(imagenet_tar, tmp_path_factory):
    """Returns (sorted files of five photos, their squares uint8 [5, 256, 256, 3])."""
    folder = tmp_path_factory.mktemp('photos')
    with tarfile.open(imagenet_tar) as archive:
        for member in archive.getmembers()[:200:40]:
            with tarfile.open(fileobj=io.BytesIO(archive.extractfile(member).read())) as inner:
                image = inner.getmembers()[0]
                (folder / image.name).write_bytes(inner.extractfile(image).read())
    files, squares = sorted(folder.iterdir()), []
    for path in files:  # Resize(256), CenterCrop(256)
        image = Image.open(path).convert('RGB')
        scale = 256 / min(image.size)
        image = image.resize([max(256, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
        left, top = (image.width - 256) // 2, (image.height - 256) // 2
        squares.append(np.asarray(image.crop((left, top, left + 256, top + 256))))
    return files, np.stack(squares)


def _predict(checkpoint, paths, views):
    """Returns the probabilities that the command predicts, [N, 1000]; checks the order of the files."""
    words = [f'--checkpoint={checkpoint}', *map(str, paths), f'--views={views}', '--top=1000', '--json']
    lines = [json.loads(line) for line in _run('predict', *words)]
    assert [line['file'] for line in lines] == [str(path) for path in paths]
    tops = [{row['index']: row['probability'] for row in line['top']} for line in lines]
    return np.array([[top[i] for i in range(1000)] for top in tops])


def _expected(net, squares, views):
    crops = [[square[16:240, 16:240]] if views == 1 else _ten_crops(square) for square in squares]
    expected = np.stack([_probabilities(net, crop).mean(0) for crop in crops])
    assert (expected.max(1) > 0.01).all()  # not the uniform distribution
    return expected


def test_predict_agrees_with_pytorch(converted, photos):
    net, checkpoint = converted
    files, squares = photos
    for views in (1, 10):
        # Pixels may differ by one level, because Pillow rounds between its two passes.
        found, expected = _predict(checkpoint, files, views), _expected(net, squares, views)
        np.testing.assert_allclose(found, expected, rtol=0.02)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_predict_and_exports_agree_on_equal_pixels(converted, photos, tmp_path):
    net, checkpoint = converted
    squares = photos[1]
    expected = _expected(net, squares, 1)
    paths = [tmp_path / f'{i}.png' for i in range(len(squares))]  # of the size of the records: nothing is resized
    for path, square in zip(paths, squares, strict=True):
        Image.fromarray(square).save(path)
    np.testing.assert_allclose(_predict(checkpoint, paths, 1), expected, rtol=1e-4)

    _run('export', f'--checkpoint={checkpoint}', f'--output={tmp_path}/out', '--formats=onnx,pytorch')
    spec = importlib.util.spec_from_file_location('alexnet', tmp_path / 'out' / 'alexnet.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.no_grad():
        found = module.load().probabilities(torch.tensor(squares)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    runtime = pytest.importorskip('onnxruntime')
    session = runtime.InferenceSession(tmp_path / 'out' / 'model.onnx', providers=['CPUExecutionProvider'])
    (found,) = session.run(['probabilities'], {'image': squares})
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize('views', [1, 10])
def test_evaluate_agrees_with_pytorch(converted, imagenet_tar, tmp_path, views):
    net, checkpoint = converted
    prepared = f'{tmp_path}/photos'
    _run('prepare', f'--input={imagenet_tar}', f'--output={prepared}', '--val_fraction=0.06')
    (line,) = _run('evaluate', f'--checkpoint={checkpoint}', f'--data={prepared}', f'--views={views}', '--json')[-1:]
    found = json.loads(line)
    records = list(datasets.open_dataset(prepared).split('val'))
    images, labels = (
        [cache.decode(record, 256) for record in records],
        np.array([record['label'] for record in records]),
    )
    crops = [[image[16:240, 16:240]] if views == 1 else _ten_crops(image) for image in images]
    p = np.stack([_probabilities(net, crop).mean(0) for crop in crops])
    rank = (p > p[np.arange(len(p)), labels][:, None]).sum(1)
    assert found['count'] == len(records) == 60
    np.testing.assert_allclose(found['loss'], -np.log(p[np.arange(60), labels]).mean(), rtol=1e-5)
    np.testing.assert_allclose(found['top1_error'], 100 * (rank >= 1).mean(), atol=1e-3)
    np.testing.assert_allclose(found['top5_error'], 100 * (rank >= 5).mean(), atol=1e-3)
