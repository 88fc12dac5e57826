"""The CIFAR-10 networks of the paper and of the authors' release, as changes to `configs/paper.py`.

`NETS[name]` maps config keys to values for `config.update_from_flattened_dict`. All names but '80sec' are test errors
that the authors report. Images are 32 px (`alexnet_jax prepare --size=32`); '13pct' and '11pct' are trained on random
24 px crops and their reflections.

Sources: paper section 3.1, figure 1 and footnote 3; `layers/layers-cifar/*.cfg` of the authors' release; for '11pct'
the public cuda-convnet.
Deviation: the authors also trained the last stages on the validation images; here all training images are used from the
start. Shuffling, the last batch of an epoch and ties in max pooling are configured as in `configs/authors_2012.py`.
"""

from typing import Any

from ml_collections import ConfigDict

from alexnet_jax.utils.errors import UserError

Layers = dict[str, dict[str, Any]]  # the type of `config.model.layers`


def _net(layers: Layers, *, decays, stages, epochs, **changes) -> dict[str, Any]:
    """Returns a network's changes: batch size 128, learning rate 0.001 (biases 0.002), no color augmentation.

    Sets all values that the authors' files state, even those of the paper, because the base config may differ.
    """
    return {
        'batch_size': 128,
        'num_epochs': float(epochs),
        'log_every_steps': 0,
        'data.image_size': 32,
        'data.random_crop': True,
        'data.all_positions': False,
        'data.crop_area': (),
        'data.reflect': False,
        'data.mean': 'center',
        'data.pixel_std': (1.0, 1.0, 1.0),
        'data.mixup_alpha': 0.0,
        'data.draw_every': 1,
        'data.color_std': 0.0,
        'model.layers': layers,
        'model.pool_window': 3,
        'model.pool_stride': 2,
        'model.lrn_k': 1.0,
        'model.lrn_beta': 0.75,
        'model.lrn_alpha_over_n': True,
        'model.norm_groups': 1,
        'mesh.tower': 1,
        'optim.learning_rate': 0.001,
        'optim.bias_rate': 2.0,
        'optim.layer_rates': (),
        'optim.momentum': 0.9,
        'optim.rate_in_velocity': True,
        'optim.trust_coefficient': 0.0,
        'optim.trust_clip': False,
        'optim.warmup_epochs': 0.0,
        'optim.warmup_start': 0.0,
        'optim.label_smoothing': 0.0,
        'optim.average_decay': 0.0,
        'optim.weight_decay': 0.004,
        'optim.bias_decay': 0.0,
        'optim.layer_decays': decays,
        'optim.schedule': 'epochs',
        'optim.stages': tuple((epoch, factor, factor, ()) for epoch, factor in stages),
        **changes,
    }


def _conv(features: int, std: float, post: str, kernel: int = 5) -> dict[str, Any]:
    """Returns a convolution with stride 1 and 'same' padding."""
    window = {'kernel': kernel, 'stride': 1, 'padding': (kernel // 2, kernel // 2)}
    return {'features': features, **window, **_fc(std, post)}


def _fc(std: float = 0.01, post: str = '', **features) -> dict[str, Any]:
    return {**features, 'groups': 1, 'init': f'normal({std})', 'bias': 0.0, 'post': post}


def _three_convs(first: str = 'relu pool', second: str = 'relu avg_pool') -> Layers:
    """Returns three 5x5 convolutions and a classifier. Arguments: the operations after the first two."""
    return {
        'conv1': _conv(32, 0.0001, first),
        'conv2': _conv(32, 0.01, second),
        'conv3': _conv(64, 0.01, 'relu avg_pool'),
        'fc4': _fc(),
    }


_STAGES = ((0, 1.0), (120, 0.1), (130, 0.01))


def _locally_connected(first: str, second: str, features: int, **changes) -> dict[str, Any]:
    """Returns a network with two convolutions and two locally connected layers."""
    layers = {
        'conv1': _conv(64, 0.0001, first),
        'conv2': _conv(64, 0.01, second),
        'local3': _conv(features, 0.04, 'relu', kernel=3),
        'local4': _conv(32, 0.04, 'relu', kernel=3),
        'fc5': _fc(),
    }
    crops = {'data.image_size': 24, 'data.all_positions': True, 'data.reflect': True}
    return _net(layers, stages=((0, 1.0), (500, 0.1), (510, 0.01)), epochs=520, **crops, **changes)


NETS = {
    # 26% error after 80 seconds on a GPU of 2011. Has a hidden layer of 64 units.
    '80sec': _net(
        {**_three_convs(), 'fc4': _fc(0.1, 'relu', features=64), 'fc5': _fc(0.1)},
        decays=(('fc4', 0.03), ('fc5', 0.03)),
        stages=((0, 1.0), (8, 0.1)),
        epochs=10,
    ),
    '19pct': _net(_three_convs(), decays=(('fc4', 3.0),), stages=_STAGES, epochs=140),
    # Normalization within each map (`type=rnorm`) after the first two pooling layers; conv1 pools before its ReLU.
    '18pct': _net(
        _three_convs('pool relu spatial_norm', 'relu avg_pool spatial_norm'),
        decays=(('fc4', 1.0),),
        stages=_STAGES,
        epochs=140,
        **{'model.spatial_n': 3, 'model.spatial_k': 1.0, 'model.spatial_alpha': 5e-5, 'model.spatial_beta': 0.75},
    ),
    # Section 3.3: "13% without, 11% with normalization". '11pct' also differs in local3 and the decay of fc5.
    '13pct': _locally_connected('relu pool', 'relu pool', 32, decays=(('conv1', 0.0), ('conv2', 0.0))),
    '11pct': _locally_connected(
        'relu pool lrn',
        'relu lrn pool',
        64,
        decays=(('conv1', 0.0), ('conv2', 0.0), ('fc5', 0.01)),
        **{'model.lrn_n': 9, 'model.lrn_alpha': 1e-3},
    ),
}
ACTIVATIONS = ('relu', 'tanh')  # of figure 1
RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)  # candidate learning rates of figure 1


def figure1_changes(activation: str, learning_rate: float) -> dict[str, Any]:
    """Returns the changes of a base for figure 1: "no regularization of any kind", constant learning rate.

    Also removes dropout. Training stops at 25% training error. activation: 'relu' or 'tanh', which replaces the base's
    ReLUs; UserError if it has none. learning_rate: chosen for each activation.
    """

    def layers(base: ConfigDict) -> Layers:
        found = base.model.layers.to_dict()
        if not any('relu' in layer['post'].split() for layer in found.values()):
            raise UserError('figure1: expected a base with ReLUs, which tanh replaces; use another --base.')
        for layer in found.values():
            ops = [activation if op == 'relu' else op for op in layer['post'].split() if op != 'dropout']
            layer['post'] = ' '.join(ops)
        return found

    changes = {'optim.weight_decay': 0.0, 'optim.learning_rate': learning_rate, 'stop_at_error': 25.0}
    shared = _net({}, decays=(), stages=((0, 1.0),), epochs=100, **changes)
    return {**shared, 'model.layers': layers}
