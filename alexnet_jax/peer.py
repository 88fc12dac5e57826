"""PyTorch's side of alexnet_jax.benchmark: the same network, update and input, as a PyTorch user would write them.

Needs the extra `oracle`. Only `benchmark.py` imports it, and only for --against=torch.
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from alexnet_jax import augment, layers, listing, processes, sources
from alexnet_jax.assemble import Run
from alexnet_jax.errors import UserError
from alexnet_jax.layers import Conv
from alexnet_jax.model import AlexNet


class Net(nn.Module):
    """The table of a network in NCHW: grouped convolutions, normalisation within its groups, pooling, dropout."""

    def __init__(self, network: AlexNet, image_size: int):
        super().__init__()
        self.network, self.rows = network, list(network.table().values())
        for name, row in network.table().items():
            if 'spatial_norm' in row.then or network.local or (not isinstance(row, Conv) and row.groups > 1):
                raise UserError(
                    f'--against=torch: PyTorch has nothing like {name}, {tuple(row)}; use another --config.'
                )
        made = []
        for row, sizes in zip(self.rows, layers.sizes(network, image_size).values(), strict=True):
            if isinstance(row, Conv):
                made.append(nn.Conv2d(sizes.inputs[-1], row.features, row.kernel, row.stride, groups=row.groups))
            else:
                made.append(nn.Linear(int(np.prod(sizes.inputs)), row.features))
        self.layers = nn.ModuleList(made)

    def forward(self, x):
        network = self.network
        for row, layer in zip(self.rows, self.layers, strict=True):
            if isinstance(row, Conv):
                before, after = row.padding
                if before == after:
                    x = functional.conv2d(x, layer.weight, layer.bias, row.stride, before, groups=row.groups)
                else:
                    x = layer(functional.pad(x, (before, after, before, after)))
            else:
                x = layer(x.flatten(1))
            for step in row.then.split():
                match step:
                    case 'relu':
                        x = functional.relu(x)
                    case 'tanh':
                        x = torch.tanh(x)
                    case 'lrn':
                        x = self._norm(x)
                    case 'pool':
                        x = functional.max_pool2d(x, network.pool_window, network.pool_stride, ceil_mode=True)
                    case 'avg_pool':
                        x = functional.avg_pool2d(x, network.pool_window, network.pool_stride, ceil_mode=True)
                    case 'dropout':
                        x = functional.dropout(x, network.dropout_rate, self.training)
        return x

    def _norm(self, x):
        network = self.network
        alpha = network.lrn_alpha * (1 if network.lrn_alpha_over_n else network.lrn_n)  # PyTorch divides it by n
        parts = [
            functional.local_response_norm(part, network.lrn_n, alpha, network.lrn_beta, network.lrn_k)
            for part in x.chunk(network.norm_groups, dim=1)
        ]
        return torch.cat(parts, dim=1)


class Squares(Dataset):
    """A Dataset of images, cut out and mirrored as `augment.draw` says: uint8 [s, s, 3], a colour shift and a label."""

    def __init__(self, images: Sequence, augmentation: augment.Augmentation, record_size: int):
        """images: (path of a square JPEG, label), or a `listing.Ref` of an image of any size."""
        self.images, self.augmentation, self.record_size = images, augmentation, record_size
        # At once, as ours draws a batch: one by one they would be a handicap.
        self.draws = augment.draw_batch(augmentation, seed=0, first=0, count=len(images), record_size=record_size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        what = self.images[index]
        if isinstance(what, listing.Ref):
            encoded, label = listing.read(what)
            image = Image.open(io.BytesIO(encoded)).convert('RGB')
            scale = self.record_size / min(image.size)
            width, height = (max(self.record_size, round(side * scale)) for side in image.size)
            left, top = (width - self.record_size) // 2, (height - self.record_size) // 2
            square = (left, top, left + self.record_size, top + self.record_size)
            pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR).crop(square))
        else:
            path, label = what
            with open(path, 'rb') as file:
                pixels = np.asarray(Image.open(io.BytesIO(file.read())).convert('RGB'))
        drawn = augment.Draw(*(values[index] for values in self.draws))
        image = augment.crop(pixels, drawn, self.augmentation.image_size)
        return torch.from_numpy(image), torch.from_numpy(drawn.colour), label


def loader(dataset: Dataset, batch_size: int, workers: int) -> Iterator:
    """Endless shuffled batches: uint8 [n, s, s, 3], float32 [n, 3], int64 [n]."""
    batches = DataLoader(
        dataset,
        batch_size,
        # Many passes in one: a DataLoader begins and ends slowly.
        sampler=torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10_000 * batch_size),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=True,
    )
    while True:
        yield from batches


def batches(run: Run, config, raw: str | None, stack: contextlib.ExitStack) -> Iterator:
    """`loader` over the originals at `raw` (see `listing.find`), or over the training records as JPEG files.

    stack: removes these files at its end.

    Raises:
      UserError: no train split there, or the records are no JPEGs.
    """
    if raw:
        splits, _ = listing.find(raw)
        if 'train' not in splits:
            raise UserError(f'--input={raw} has no train split; it has: {", ".join(splits)}.')
        images = splits['train']
    else:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        images = []
        for i, record in enumerate(sources.subset(run.dataset.splits['train'], config.data.fraction)):
            if not isinstance(record['image'], bytes):
                raise UserError('--against=torch reads JPEG squares: prepare with --format=jpeg, or give --input=RAW.')
            images.append((os.path.join(folder, f'{i}.jpg'), record['label']))
            with open(images[-1][0], 'wb') as file:
                file.write(record['image'])
    dataset = Squares(images, run.augmentation, run.dataset.record_size)
    return loader(dataset, config.batch_size, config.data.num_workers or processes.cores())


def training(
    network: AlexNet, image_size: int, mean: np.ndarray, optim, *, precision: str, threads: int
) -> tuple[Callable, Callable]:
    """Returns (update, wait): `update(batch)` begins one update, `wait()` returns when all are done.

    On a GPU channels-last, `torch.compile` from the pixels to the loss, autocast and a fused update, as PyTorch's own
    guide advises; on the CPU none of them.

    Args:
      network: whose table it has. image_size: side of its input, pixels.
      mean: float [3], of the pixels.
      optim: a config's `optim`; its rate, momentum and weight decay, of weights alone.
      precision: 'float32', 'tf32' or 'bfloat16'.
      threads: of the CPU.
    """
    where = device()
    gpu = where.type == 'cuda'
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision('high' if precision == 'tf32' else 'highest')
    torch.backends.cudnn.allow_tf32 = precision == 'tf32'
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    layout = torch.channels_last if gpu else torch.contiguous_format  # no faster on the CPU
    net = Net(network, image_size).to(where, memory_format=layout).train()
    decay = optim.weight_decay
    groups = [
        {'params': [p for p in net.parameters() if p.ndim > 1], 'weight_decay': decay},
        {'params': [p for p in net.parameters() if p.ndim == 1]},
    ]
    optimizer = torch.optim.SGD(groups, lr=optim.learning_rate, momentum=optim.momentum, fused=gpu)
    mean = torch.from_numpy(np.float32(mean))[:, None, None].to(where)

    def loss(images, colour, labels):
        x = images.permute(0, 3, 1, 2).contiguous(memory_format=layout).float() - mean + colour[:, :, None, None]
        with torch.autocast(where.type, torch.bfloat16, enabled=precision == 'bfloat16'):
            return functional.cross_entropy(net(x).float(), labels)

    compiled = torch.compile(loss) if gpu else loss

    def update(batch) -> None:
        images, colour, labels = (part.to(where, non_blocking=True) for part in batch)
        optimizer.zero_grad(set_to_none=True)
        compiled(images, colour, labels).backward()
        optimizer.step()

    return update, torch.cuda.synchronize if gpu else lambda: None


def device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def forget_peak() -> None:
    """`peak_bytes` counts from here on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int | None:
    """The most that tensors took on the GPU; None on the CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def facts() -> dict[str, str]:
    """Version and device, for the record."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'
    return {
        'torch': torch.__version__,
        'torch_cuda': f'{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}',
        'torch_device': name,
        'torch_threads': str(torch.get_num_threads()),
    }
