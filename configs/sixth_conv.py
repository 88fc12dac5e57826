"""A sixth convolutional layer after the last pooling layer, pre-trained on a larger ImageNet: the paper's "1 CNN*".

Source: section 6 and table 2; net 146 of the authors' release (`layers-146*.cfg`, `layer-params-146*.cfg`). Conv 6
has 256 kernels of 3x3 that read both towers; 61,555,304 parameters with 1,000 classes. The fully-connected layers are
fc6, fc7 and the classifier fc8.

    alexnet_jax train --config=sixth_conv --workdir=runs/six --config.data.path=DIR

The procedure of the paper, training on ImageNet Fall 2011 and fine-tuning on ILSVRC-2012, takes two commands:

    ... --config=sixth_conv:pretrain --workdir=runs/fall --config.data.path=FALL2011
    ... --config=sixth_conv:finetune --workdir=runs/tuned --config.data.path=DIR --config.init_from=runs/fall

The authors trained a sequence of four networks. The first, A, is net 145 (configs/authors_2012.py), saved between
epochs 25 and 36. Each of the others starts with --config.init_from=PREVIOUS:

  argument      data                       copied              reinitialized        reduced learning rate
  authors=2009  Fall 2009, 10,184 classes  conv1-5 (of A)      conv6, dense layers  conv1-5: a tenth
  authors=2011  Fall 2011, 21,843 classes  conv1-6             dense layers         conv1-6: a tenth
  authors=2012  ILSVRC-2012                all but classifier  classifier           all: a tenth; conv1: less, then 0

On Fall 2011 the classifier (fc9) reads a linear layer of 2048 units (fc8). Copied layers start with zero velocity.

Reported by the paper, ILSVRC-2012 validation set, ten views: 39.0% top-1 and 16.6% top-5 error. Authors' log: 38.99%
and 16.62%. Here: parameters, shapes, FLOPs and collectives are tested, and a small instance of the sequence was run
(tests/training/test_finetune.py). Nothing was trained at this size.

Deviations:
- The paper does not state the learning rates of `finetune`; those of the weights in authors=2012 are used, also for
  biases.
- The bias learning rates of the sequence are inferred: first twice the weight learning rate, then 0.002 (conv 1: as its
  weights).
- Fractions of epochs are computed from the number of files of 1,024 images in the authors' log.
"""

import ml_collections

import alexnet_jax
from alexnet_jax.experiments import ablations

_LOWER = ('conv1', 'conv2', 'conv3', 'conv4', 'conv5')
_VARIANTS = (None, 'init=authors', 'pretrain', 'finetune', 'authors=2009', 'authors=2011', 'authors=2012')


def _tenth(names: tuple[str, ...]) -> tuple[tuple[str, float, float], ...]:
    return tuple((name, 0.1, 0.1) for name in names)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config. arg: None, 'init=authors' (see paper.py), or one of the stages described above."""
    if arg not in _VARIANTS:
        raise ValueError(f'unknown variant {arg!r}; expected one of {", ".join(_VARIANTS[1:])}.')
    authors = arg in ('authors=2009', 'authors=2011', 'authors=2012')
    base = 'authors_2012' if authors else 'paper:init=authors' if arg == 'init=authors' else 'paper'
    config = ablations.with_changes(alexnet_jax.get_config(base), ablations.SIXTH_CONV)
    if authors:
        config.data.color_epochs = 0.0

    if arg == 'pretrain':
        config.model.num_classes = 21_843
    if arg == 'authors=2009':
        config.model.num_classes = 10_184
        config.num_epochs = 5.74  # stopped at epoch 6, file 6,491 of 8,800
        config.init_fresh = ('conv6', 'fc6', 'fc7', 'fc8')
        config.optim.stages = ((0, 1.0, 1.0, _tenth(_LOWER)), (1.18, 0.1, 0.1, ()))
    if arg == 'authors=2011':
        config.model.num_classes = 21_843
        layers = config.model.layers
        layers.fc9 = layers.fc8
        layers.fc8 = dict(features=2048, **layers.fc9)
        config.num_epochs = 7.81  # stopped at epoch 8, file 11,295 of 13,900
        config.init_fresh = ('fc6', 'fc7', 'fc8', 'fc9')
        config.optim.stages = ((0, 1.0, 1.0, _tenth((*_LOWER, 'conv6'))), (5, 0.1, 0.1, ()))
    if arg in ('finetune', 'authors=2012'):
        frozen, classifier = ('conv1', 0.0, 0.0), ('fc8', 1.0, 1.0)
        config.num_epochs = 54.0
        config.init_fresh = ('fc8',)
        config.optim.schedule = 'epochs'
        stages = (
            (0, 0.1, 0.1, (('conv1', 0.01, 0.01),)),
            (0.24, 0.1, 0.1, (('conv1', 0.01, 0.01), classifier)),  # after 300 files of 1,024 images
            (4, 0.1, 0.1, (('conv1', 0.001, 0.001), classifier)),
            (6, 0.1, 0.1, (frozen, classifier)),
            (8, 0.1, 0.1, (frozen,)),
            (21, 0.01, 0.1, (frozen,)),
            (41, 0.001, 0.1, (frozen,)),
        )
        if authors:
            config.data.color_epochs = 37.0
        else:  # biases have the learning rates of weights
            stages = tuple((epoch, weights, weights, layers) for epoch, weights, _, layers in stages)
        config.optim.stages = stages
    return config
