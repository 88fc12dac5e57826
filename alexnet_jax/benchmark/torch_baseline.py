"""PyTorch baseline: the same network, optimizer and input in idiomatic PyTorch. Requires the extra `oracle`."""

import io
import itertools
import math
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from alexnet_jax.benchmark.throughput import TORCH, Contender, Options, images_per_second, num_buffered, skip
from alexnet_jax.core import architecture, augment
from alexnet_jax.core.architecture import ConvSpec, DenseSpec, LocalSpec
from alexnet_jax.core.model import AlexNet
from alexnet_jax.data import datasets, random_crops
from alexnet_jax.prepare import discovery
from alexnet_jax.prepare.image_ref import ImageRef
from alexnet_jax.training.build import TrainingSetup
from alexnet_jax.utils import processes
from alexnet_jax.utils.errors import UserError

_GPU = torch.cuda.is_available()
_DEVICE = torch.device('cuda' if _GPU else 'cpu')


class Net(nn.Sequential):
    """An `AlexNet` in PyTorch (NCHW)."""

    def __init__(self, network: AlexNet, image_size: int):
        operations = {
            'relu': nn.ReLU,
            'tanh': nn.Tanh,
            'lrn': lambda: _GroupedNorm(network),
            'spatial_norm': lambda: _SpatialNorm(network),
            'pool': lambda: nn.MaxPool2d(network.pool_window, network.pool_stride, ceil_mode=True),
            'avg_pool': lambda: nn.AvgPool2d(network.pool_window, network.pool_stride, ceil_mode=True),
            'dropout': lambda: nn.Dropout(network.dropout_rate),
        }
        modules, shapes = [], architecture.infer_shapes(network, image_size)
        for name, spec in network.layers.items():
            grouped = isinstance(spec, DenseSpec) and spec.groups > 1
            if grouped or set(spec.ops) - operations.keys():
                raise UserError(f'--against=torch: no PyTorch equivalent of {name}, {spec}; use another --config.')
            inputs = shapes[name].inputs
            if isinstance(spec, ConvSpec):
                before, after = spec.padding
                padding = before if before == after else 0
                modules += [] if before == after else [nn.ZeroPad2d((before, after, before, after))]
                window = (spec.kernel, spec.stride, padding)
                if isinstance(spec, LocalSpec):
                    modules.append(_Local(inputs[-1], shapes[name].linear, *window))
                else:
                    modules.append(nn.Conv2d(inputs[-1], spec.features, *window, groups=spec.groups))
            else:
                modules += [nn.Flatten(), nn.Linear(math.prod(inputs), spec.features)]
            modules += [operations[operation]() for operation in spec.ops]
        super().__init__(*modules)
        self.layers = [module for module in modules if isinstance(module, nn.Conv2d | nn.Linear | _Local)]


class _Local(nn.Module):
    """A locally connected layer, which PyTorch does not have: patches, and one matrix product for each position."""

    def __init__(self, channels: int, outputs: tuple[int, ...], kernel: int, stride: int, padding: int):
        super().__init__()
        *self.sides, features = outputs
        self.window = {'kernel_size': kernel, 'stride': stride, 'padding': padding}
        fan_in = channels * kernel**2
        self.weight = nn.Parameter(torch.randn(math.prod(self.sides), fan_in, features) / math.sqrt(fan_in))
        self.bias = nn.Parameter(torch.zeros(features, math.prod(self.sides)))

    def forward(self, x):
        patches = nn.functional.unfold(x, **self.window)  # [N, C * kernel^2, positions]
        y = torch.einsum('npl,lpo->nol', patches, self.weight) + self.bias
        return y.reshape(len(x), -1, *self.sides)


class _GroupedNorm(nn.Module):
    """Response normalization within each group of channels."""

    def __init__(self, network: AlexNet):
        super().__init__()
        alpha = network.lrn_alpha * (1 if network.lrn_alpha_over_n else network.lrn_n)  # PyTorch divides alpha by n
        self.groups = network.norm_groups
        self.norm = nn.LocalResponseNorm(network.lrn_n, alpha, network.lrn_beta, network.lrn_k)

    def forward(self, x):
        return torch.cat([self.norm(part) for part in x.chunk(self.groups, dim=1)], dim=1)


class _SpatialNorm(nn.Module):
    """Response normalization over windows of each map."""

    def __init__(self, network: AlexNet):
        super().__init__()
        self.constants = network.spatial_k, network.spatial_alpha, network.spatial_beta
        n = network.spatial_n
        self.mean = nn.Sequential(nn.ZeroPad2d((n // 2, (n - 1) // 2) * 2), nn.AvgPool2d(n, stride=1))

    def forward(self, x):
        k, alpha, beta = self.constants
        return x * (k + alpha * self.mean(x * x)) ** -beta  # alpha is divided by n^2, as in the mean


class ImageDataset(Dataset):
    """Images cropped and reflected by `random_crops`: (uint8 [s, s, 3], color shift float32 [3], label)."""

    def __init__(self, images: Sequence[ImageRef], augmentation: augment.Augmentation, record_size: int):
        self.images, self.augmentation, self.record_size = images, augmentation, record_size
        # Drawn in one call, as alexnet_jax draws a batch, because one call per image would slow down PyTorch.
        self.draws = random_crops.draw_batch(augmentation, seed=0, first=0, count=len(images), record_size=record_size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        encoded, label = discovery.read_image(self.images[index])
        image, size = Image.open(io.BytesIO(bytes(encoded))).convert('RGB'), self.record_size
        if image.size != (size, size):
            scale = size / min(image.size)
            width, height = (max(size, round(side * scale)) for side in image.size)
            left, top = (width - size) // 2, (height - size) // 2
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            image = image.crop((left, top, left + size, top + size))
        drawn = random_crops.AugmentParams(*(values[index] for values in self.draws))
        crop = random_crops.crop(np.asarray(image), drawn, self.augmentation.image_size)
        return torch.from_numpy(crop), torch.from_numpy(drawn.color), label


def batches(setup: TrainingSetup, raw: str | None, stack: ExitStack) -> Iterator:
    """Returns endless shuffled batches: uint8 [n, s, s, 3], float32 [n, 3], int64 [n].

    Reads the raw images at `raw` (see `discovery.find_images`) or, if None, JPEG files of the training records, which
    `stack` removes when it closes. Raises UserError if there is no train split or if the records are not JPEGs.
    """
    config = setup.config
    if raw:
        splits = discovery.find_images(raw).splits
        if 'train' not in splits:
            raise UserError(f'--input={raw}: expected a train split, got only {", ".join(splits)}.')
        images = splits['train']
    else:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        images = []
        for i, record in enumerate(datasets.subset(setup.dataset.splits['train'], config.data.fraction)):
            if not isinstance(record['image'], bytes):
                raise UserError('--against=torch needs JPEG records: prepare with --format=jpeg, or use --input=RAW.')
            path = pathlib.Path(folder, f'{i}.jpg')
            path.write_bytes(record['image'])
            images.append(ImageRef(str(path), 0, -1, path.name, record['label']))
    dataset = ImageDataset(images, setup.augmentation, setup.dataset.record_size)
    # A very long epoch, because a DataLoader is slow at the start and end of an epoch.
    sampler = RandomSampler(dataset, replacement=True, num_samples=10_000 * config.batch_size)
    workers = config.data.num_workers or processes.cores()
    loader = DataLoader(
        dataset, config.batch_size, sampler=sampler, num_workers=workers, persistent_workers=True, pin_memory=_GPU
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def training(setup: TrainingSetup, precision: str) -> tuple[Callable, Callable]:
    """Returns (update, wait): `update(batch)` starts one update, `wait()` blocks until all updates are done.

    On a GPU it uses channels-last, `torch.compile` from pixels to loss, autocast and a fused optimizer, as recommended
    by PyTorch's tuning guide; on the CPU none of these. Biases have no weight decay. The mean is one value per color.
    """
    torch.set_num_threads(processes.cores())
    torch.set_float32_matmul_precision('high' if precision == 'tf32' else 'highest')
    torch.backends.cudnn.allow_tf32 = precision == 'tf32'
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    optim = setup.config.optim
    layout = torch.channels_last if _GPU else torch.contiguous_format  # no faster on the CPU
    net = Net(setup.network, setup.augmentation.image_size).to(_DEVICE, memory_format=layout).train()
    weights = [p for name, p in net.named_parameters() if name.endswith('weight')]
    biases = [p for name, p in net.named_parameters() if name.endswith('bias')]
    groups = [{'params': weights, 'weight_decay': optim.weight_decay}, {'params': biases}]
    optimizer = torch.optim.SGD(groups, lr=optim.learning_rate, momentum=optim.momentum, fused=_GPU)
    mean_color = np.asarray(setup.image_stats.mean_image).mean((0, 1))
    mean = torch.from_numpy(np.float32(mean_color))[:, None, None].to(_DEVICE)

    def loss(images, color, labels):
        x = images.permute(0, 3, 1, 2).contiguous(memory_format=layout).float() - mean + color[:, :, None, None]
        with torch.autocast(_DEVICE.type, torch.bfloat16, enabled=precision == 'bfloat16'):
            return nn.functional.cross_entropy(net(x).float(), labels)

    compiled = torch.compile(loss) if _GPU else loss

    def update(batch) -> None:
        images, color, labels = (part.to(_DEVICE, non_blocking=True) for part in batch)
        optimizer.zero_grad(set_to_none=True)
        compiled(images, color, labels).backward()
        optimizer.step()

    return update, torch.cuda.synchronize if _GPU else lambda: None


def updates(setup: TrainingSetup, options: Options, batches: Iterator | None = None) -> Contender:
    """Returns a contender for updates on `batches`, or on one batch that stays on the device."""
    config = setup.config
    buffered = num_buffered(config) if batches else 0
    update, wait = training(setup, options.precision)
    began = time.perf_counter()
    if batches is None:
        size, count, rng = setup.augmentation.image_size, config.batch_size, np.random.default_rng(0)
        images = torch.from_numpy(rng.integers(0, 256, (count, size, size, 3), np.uint8))
        labels = torch.from_numpy(rng.integers(0, config.model.num_classes, count))
        batches = itertools.repeat([part.to(_DEVICE) for part in (images, torch.zeros(count, 3), labels)])
    for _ in range(2):
        if _GPU:
            torch.cuda.reset_peak_memory_stats()  # exclude compilation and autotuning
        update(next(batches))
        wait()
    seconds = round(time.perf_counter() - began, 1)
    facts = {'first_two_steps_seconds': seconds, 'bytes': torch.cuda.max_memory_allocated() if _GPU else None}

    def measure() -> float:
        skip(batches, buffered)
        return images_per_second(lambda: update(next(batches)), options.steps, config.batch_size, wait)

    return Contender(TORCH, measure, facts)


def facts() -> dict[str, str]:
    """Returns versions and device names for the JSON record."""
    return {
        'torch': torch.__version__,
        'torch_cuda': f'{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}',
        'torch_device': torch.cuda.get_device_name() if _GPU else 'cpu',
        'torch_threads': str(torch.get_num_threads()),
    }
