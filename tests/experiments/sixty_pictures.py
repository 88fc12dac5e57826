"""Measures `finetune` on 30 + 30 pictures of two classes, with weights from the other classes. Not a test.

    python -m tests.experiments.sixty_pictures tiny_imagenet_20 OUTPUT [PAIR]

The pair of classes, numbers 2 PAIR and 2 PAIR + 1 of a random order (PAIR is 0 to 9, default 0), is left out when a
network is trained with configs/tiny_imagenet.py. Then ten times, 30 pictures of each class are drawn to train on and 20
others to test on. The results are in docs/own_pictures.md.
"""

import os
import pathlib
import shutil
import sys
import time

import numpy as np

import alexnet_jax
from alexnet_jax.experiments.finetune import finetune
from alexnet_jax.prepare.prepare import prepare


def train_without(images: pathlib.Path, pair: list[str], output: pathlib.Path) -> pathlib.Path:
    """Trains a network on all classes but two, unless that is done. Returns its workdir."""
    if not (output / 'data').exists():
        for split in ('train', 'val'):
            shutil.copytree(images / split, output / 'others' / split, ignore=lambda _, names: set(pair) & set(names))
        prepare(output / 'others', output / 'data', size=64, format='raw')
    config = alexnet_jax.get_config('tiny_imagenet')
    config.data.path = str(output / 'data')
    config.model.num_classes = len(os.listdir(output / 'others' / 'train'))
    alexnet_jax.train_and_evaluate(config, output / 'network')
    return output / 'network'


def draw(images: pathlib.Path, pair: list[str], seed: int, output: pathlib.Path) -> None:
    """Copies 30 pictures of each class to train/ and 20 others to val/."""
    rng = np.random.default_rng(seed)
    for name in pair:
        files = sorted(images.glob(f'*/{name}/*'))
        order = rng.permutation(len(files))
        for split, part in (('train', order[:30]), ('val', order[30:50])):
            (output / split / name).mkdir(parents=True)
            for i in part:
                shutil.copy(files[i], output / split / name)


def main(images: pathlib.Path, output: pathlib.Path, number: int) -> None:
    classes = sorted(folder.name for folder in (images / 'train').iterdir())
    pair = sorted(np.random.default_rng(0).permutation(classes)[2 * number : 2 * number + 2])
    network = train_without(images, pair, output)
    accuracies = []
    for seed in range(10):
        began = time.time()
        draw(images, pair, seed, output / f'pictures{seed}')
        matrix = finetune(None, output / f'pictures{seed}', output / f'run{seed}', init_from=network).confusion
        accuracies.append(100 * matrix.trace() / matrix.sum())
        print(f'draw {seed}: {matrix.trace()} of {matrix.sum()} right, {time.time() - began:.0f} s', flush=True)
    print(f'{" ".join(pair)}: {np.mean(accuracies):.1f}% right, standard deviation {np.std(accuracies, ddof=1):.1f}')


if __name__ == '__main__':
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
