"""AlexNet as a table of layers: one Flax module for one device and for one tower of two.

The defaults are the paper's network (section 3.5, figure 2). A variant is another table, never another class.
"""

import dataclasses
import functools
import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from alexnet_jax import layers, ops, pooling
from alexnet_jax.errors import UserError, did_you_mean
from alexnet_jax.layers import FAN_IN, Conv, Dense, Local


class Weights(nn.Module):
    """Owns one layer's `kernel` and `bias`; what is done with them is for the network to say.

    shape: of a kernel. places: of the maps, where each place has a kernel and a bias of its own.
    """

    shape: tuple[int, ...]
    init_std: float | str
    bias: float | str
    places: tuple[int, ...] = ()

    @nn.compact
    def __call__(self):
        bound = math.prod(self.shape[:-1]) ** -0.5  # torch.nn's default for both, kaiming_uniform(a=sqrt(5))

        def uniform(key, shape):
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        kernel = uniform if self.init_std == FAN_IN else nn.initializers.normal(self.init_std)
        bias = uniform if self.bias == FAN_IN else nn.initializers.constant(self.bias)
        shapes = (*self.places, *self.shape), (*self.places, self.shape[-1])
        return self.param('kernel', kernel, shapes[0]), self.param('bias', bias, shapes[1])


class AlexNet(nn.Module):
    """The network of section 3: 60,965,224 parameters with the defaults.

    `model.apply({'params': params}, x_NHWC, masks)` maps float [N, S, S, 3], mean-subtracted, on the 0-255 scale, to
    float32 logits [N, num_classes]. `masks` (from `dropout_masks`) switches training on; None is test time.
    With `mutable='intermediates'` it also returns every step's output: `conv1_linear`, `conv1_relu`, ...

    Inside `shard_map` (see sharding.py) `tower_axis` names the mesh axis of the towers: the module then sees its
    tower's part of every parameter and map, and gathers before a layer with one group whose input is split.

    Attributes (sources: the paper's sections; `layer.py` and `layers-145.cfg` of the authors' release; Caffe's
    `bvlc_alexnet`; torchvision's `alexnet`):
      conv, local, dense: the table; tuples in the order of `layers.Conv` (`local` too) and `layers.Dense`.
      num_classes: outputs of the classifier, the last fully-connected layer (fc8).
      classifier: its (init_std, bias), as in a row of `dense`; 0.01 and 0 in section 5.
      pool_window, pool_stride: 3 and 2 overlap (section 3.4).
      lrn_n, lrn_k, lrn_alpha, lrn_beta: constants of the response normalisation (section 3.3). Caffe's k is 1.
      lrn_alpha_over_n: whether alpha is divided by n, as in the authors' code (`layer.py`) and Caffe; not in the paper.
      norm_groups: parts of the channels that a normalisation window does not cross: 2, one for each GPU of the paper;
        1 in Caffe: across.
      spatial_n, spatial_k, spatial_alpha, spatial_beta: of 'spatial_norm' (`type=rnorm` of the authors' code, behind
        the second normalisation); alpha is divided by n^2.
      dropout_rate: probability that a hidden unit is silenced (section 4.2).
      dropout_inverted: scale in training (Caffe, torchvision) and not at test (section 4.2).
      dtype: of the computation: 'float32', 'bfloat16', 'float64'. Parameters are float32, or float64
        where jax.enable_x64 is on.
      tower_axis: None on one device.
    """

    conv: tuple[tuple, ...] = (
        (96, 11, 4, (0, 3), 1, 0.01, 0.0, 'relu lrn pool'),
        (256, 5, 1, (2, 2), 2, 0.01, 1.0, 'relu lrn pool'),
        (384, 3, 1, (1, 1), 1, 0.01, 0.0, 'relu'),
        (384, 3, 1, (1, 1), 2, 0.01, 1.0, 'relu'),
        (256, 3, 1, (1, 1), 2, 0.01, 1.0, 'relu pool'),
    )
    dense: tuple[tuple, ...] = (
        (4096, 1, 0.01, 1.0, 'relu dropout'),
        (4096, 1, 0.01, 1.0, 'relu dropout'),
    )
    local: tuple[tuple, ...] = ()
    num_classes: int = 1000
    classifier: tuple[float | str, float | str] = (0.01, 0.0)
    pool_window: int = 3
    pool_stride: int = 2
    lrn_n: int = 5
    lrn_k: float = 2.0
    lrn_alpha: float = 1e-4
    lrn_beta: float = 0.75
    lrn_alpha_over_n: bool = False
    norm_groups: int = 2
    spatial_n: int = 5
    spatial_k: float = 1.0
    spatial_alpha: float = 1e-3
    spatial_beta: float = 0.75
    dropout_rate: float = 0.5
    dropout_inverted: bool = False
    dtype: str = 'float32'
    tower_axis: str | None = None

    def table(self) -> dict[str, Conv | Dense]:
        """Layers by name, in order: conv1 ... fc8."""
        return layers.table(self)

    @nn.compact
    def __call__(self, x_NHWC, masks: dict[str, Any] | None = None):
        towers = 1 if self.tower_axis is None else lax.axis_size(self.tower_axis)
        parts = [x_NHWC.astype(self.dtype)]  # the maps, in one array or in one for each group (see `ops.regroup`)
        split = False  # whether they are only this tower's
        for name, layer in self.table().items():
            with jax.named_scope(name):
                if split and layer.groups == 1:
                    (x,) = ops.regroup(parts, 1)
                    parts = [lax.all_gather(x, self.tower_axis, axis=x.ndim - 1, tiled=True)]
                parts = self._linear(name, layer, ops.regroup(parts, max(1, layer.groups // towers)), towers)
                self._keep(f'{name}_linear', parts)
                for step in layer.then.split():
                    with jax.named_scope(step):
                        mask = None if masks is None else masks.get(name)
                        parts = self._step(step, parts, mask, max(1, self.norm_groups // towers))
                    self._keep(f'{name}_{step}', parts)
            split = towers > 1
        return parts[0]

    def _linear(self, name: str, layer: Conv | Dense, parts: list, towers: int) -> list:
        """A layer's weighted sums and biases: each group's of its own part."""
        features, inputs, places = layer.features // towers, parts[0].shape[-1], ()
        if isinstance(layer, Local):
            shape = (inputs * layer.kernel**2, features)
            places = ((parts[0].shape[1] + sum(layer.padding) - layer.kernel) // layer.stride + 1,) * 2
            op = functools.partial(ops.local_conv, size=layer.kernel, stride=layer.stride, padding=layer.padding)
        elif isinstance(layer, Conv):
            shape = (layer.kernel, layer.kernel, inputs, features)
            op = functools.partial(ops.conv, stride=layer.stride, padding=layer.padding)
        else:
            shape = (math.prod(parts[0].shape[1:]), features)
            # The logits are never rounded to bfloat16: of 1,000, the best two would often tie.
            logits = name == list(self.table())[-1]
            op = functools.partial(ops.dense, dtype=jnp.promote_types(self.dtype, jnp.float32) if logits else None)
        kernel, bias = Weights(shape, layer.init_std, layer.bias, places, name=name)()
        kernels, biases = (ops.regroup([whole], len(parts)) for whole in (kernel.astype(self.dtype), bias))
        return [ops.add_bias(op(x, w), b) for x, w, b in zip(parts, kernels, biases, strict=True)]

    def _keep(self, name: str, parts: list) -> None:
        if self.is_mutable_collection('intermediates'):
            self.sow('intermediates', name, *ops.regroup(parts, 1))

    def _step(self, step: str, parts: list, mask, norm_groups: int) -> list:
        match step:
            case 'relu':
                op = nn.relu
            case 'tanh':
                op = jnp.tanh
            case 'lrn':
                if norm_groups % len(parts):  # windows that cross from one part to the next
                    parts = ops.regroup(parts, 1)
                op = functools.partial(
                    ops.local_response_norm,
                    n=self.lrn_n,
                    k=self.lrn_k,
                    alpha=self.lrn_alpha / self.lrn_n if self.lrn_alpha_over_n else self.lrn_alpha,
                    beta=self.lrn_beta,
                    groups=norm_groups // len(parts),
                )
            case 'pool':
                op = functools.partial(pooling.max_pool, window=self.pool_window, stride=self.pool_stride)
            case 'avg_pool':
                op = functools.partial(pooling.avg_pool, window=self.pool_window, stride=self.pool_stride)
            case 'dropout':
                kept = [None] * len(parts) if mask is None else ops.regroup([mask], len(parts))
                op = functools.partial(ops.dropout, rate=self.dropout_rate, inverted=self.dropout_inverted)
                return [op(x, part) for x, part in zip(parts, kept, strict=True)]
            case 'spatial_norm':
                op = functools.partial(
                    ops.spatial_response_norm,
                    n=self.spatial_n,
                    k=self.spatial_k,
                    alpha=self.spatial_alpha / self.spatial_n**2,
                    beta=self.spatial_beta,
                )
            case _:
                raise AssertionError(step)  # layers.sizes admits no other
        return [op(x) for x in parts]


FIELDS = tuple(f.name for f in dataclasses.fields(AlexNet) if f.name not in ('parent', 'name', 'tower_axis'))


def from_config(fields: dict[str, Any]) -> AlexNet:
    """The network a config's `model` describes, also when JSON has turned its tuples into lists.

    Raises:
      UserError: a key that is no attribute of the network, or a value that cannot be one.
    """
    for key in fields:
        if key not in FIELDS:
            raise UserError(f'model.{key} is unknown.{did_you_mean(key, FIELDS)}')
    model = AlexNet(**{key: tuples(value) for key, value in fields.items()})
    for name, kind, rows in (('conv', Conv, model.conv), ('local', Local, model.local), ('dense', Dense, model.dense)):
        if not isinstance(rows, tuple):
            raise UserError(f'model.{name}={rows!r}; expected a tuple of rows ({", ".join(kind._fields)}).')
        for row in rows:
            if not isinstance(row, tuple) or len(row) != len(kind._fields):
                raise UserError(f'model.{name} has the row {row!r}; expected {", ".join(kind._fields)}.')
            for field, value in zip(kind._fields, row, strict=True):
                _check_value(f'{field} in model.{name}', field, value)
    for key in FIELDS:
        _check_value(f'model.{key}', key, getattr(model, key))
    if model.pool_stride > model.pool_window:
        raise UserError(f'model.pool_stride={model.pool_stride} leaves gaps between windows of {model.pool_window} px.')
    if model.dtype == 'float64' and not jax.config.jax_enable_x64:
        raise UserError("model.dtype='float64' takes jax.enable_x64; expected float32 or bfloat16.")
    return model


def tuples(value):
    """Lists, as JSON gives them, as the tuples that they were."""
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value


_COUNTS = {
    'features', 'kernel', 'stride', 'groups', 'num_classes', 'pool_window', 'pool_stride', 'lrn_n', 'norm_groups',
    'spatial_n',
}  # fmt: skip
_DTYPES = ('float32', 'bfloat16', 'float64')


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def _is_std(value) -> bool:
    return value == FAN_IN or (_is_number(value) and value >= 0)


def _is_bias(value) -> bool:
    return value == FAN_IN or _is_number(value)


def _check_value(name: str, field: str, value) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    match field:
        case 'conv' | 'local' | 'dense':
            return
        case 'then':
            right, expected = isinstance(value, str), "words such as 'relu lrn pool'"
        case 'dtype':
            right, expected = value in _DTYPES, f'one of {", ".join(_DTYPES)}'
        case 'padding':
            right = isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, int) and v >= 0 for v in value)
            expected = 'a pair of pixels (before, after)'
        case 'dropout_rate':
            right, expected = _is_number(value) and 0 <= value < 1, 'a number from 0 up to, not including, 1'
        case 'lrn_alpha_over_n' | 'dropout_inverted':
            right, expected = isinstance(value, bool), 'True or False'
        case 'lrn_k' | 'spatial_k':
            right, expected = _is_number(value) and value > 0, 'a number above 0'
        case 'init_std':
            right, expected = _is_std(value), f'a number of 0 or more, or {FAN_IN!r}'
        case 'bias':
            right, expected = _is_bias(value), f'a number or {FAN_IN!r}'
        case 'classifier':
            right = isinstance(value, tuple) and len(value) == 2 and _is_std(value[0]) and _is_bias(value[1])
            expected = f'(init std of 0 or more, bias), each a number or {FAN_IN!r}'
        case _ if field in _COUNTS:
            right, expected = whole and value > 0, 'a whole number above 0'
        case _:
            right, expected = _is_number(value), 'a number'
    if not right:
        raise UserError(f'{name} is {value!r}; expected {expected}.')


def init(model: AlexNet, key: chex.PRNGKey, image_size: int):
    """Draws parameters in the one global layout, whatever mesh they will live on: {'conv1': {'kernel', 'bias'}, ...}.

    Kernels are float32 HWIO (convolutions: I counts one group's inputs) or [inputs, outputs].
    """
    whole = model.clone(tower_axis=None)
    return whole.init(key, jnp.zeros((1, image_size, image_size, 3)))['params']


def dropout_masks(model: AlexNet, key: chex.PRNGKey, batch_size: int, image_size: int) -> dict[str, chex.Array]:
    """Bool [batch_size, ...] for each layer followed by dropout: True keeps the unit (section 4.2).

    Drawn in global shape, so that every mesh sees the same masks and no two towers share one.
    """
    keep = jnp.float32(1 - model.dropout_rate)  # a Python float would draw other masks under jax.enable_x64
    return {
        name: jax.random.bernoulli(jax.random.fold_in(key, i), keep, (batch_size, *sizes.dropped))
        for i, (name, sizes) in enumerate(layers.sizes(model, image_size).items())
        if sizes.dropped is not None
    }
