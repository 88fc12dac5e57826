"""AlexNet as a table of layers: one Flax module for one device and for one tower of two.

The defaults are the paper's network (section 3.5, figure 2). A variant is another table, never another class.
"""

import functools
import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from alexnet_jax.core import architecture, normalization, ops, pooling
from alexnet_jax.core.architecture import FAN_IN, ConvSpec, DenseSpec, LocalSpec


class Weights(nn.Module):
    """Owns one layer's `kernel` and `bias`.

    shape: of a kernel. positions: sides of the maps, where each position has a kernel and a bias of its own.
    """

    shape: tuple[int, ...]
    init_std: float | str
    bias: float | str
    positions: tuple[int, ...] = ()

    @nn.compact
    def __call__(self):
        bound = math.prod(self.shape[:-1]) ** -0.5  # torch.nn's default for both, kaiming_uniform(a=sqrt(5))

        def uniform(key, shape):
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        kernel = uniform if self.init_std == FAN_IN else nn.initializers.normal(self.init_std)
        bias = uniform if self.bias == FAN_IN else nn.initializers.constant(self.bias)
        shapes = (*self.positions, *self.shape), (*self.positions, self.shape[-1])
        return self.param('kernel', kernel, shapes[0]), self.param('bias', bias, shapes[1])


class AlexNet(nn.Module):
    """The network of section 3: 60,965,224 parameters with the defaults.

    `model.apply({'params': params}, x_NHWC, masks)` maps float [N, S, S, 3], mean-subtracted, on the 0-255 scale, to
    float32 logits [N, num_classes]. `masks` (from `dropout_masks`) switches training on; None is test time.
    With `mutable='intermediates'` it also returns the output of every operation: `conv1_linear`, `conv1_relu`, ...

    Inside `shard_map` (see sharding.py) `tower_axis` names the mesh axis of the towers: the module then sees its
    tower's part of every parameter and map, and gathers before a layer with one group whose input is split.

    Attributes (sources: the paper's sections; `layer.py` and `layers-145.cfg` of the authors' release; Caffe's
    `bvlc_alexnet`; torchvision's `alexnet`):
      conv, local, dense: the table; tuples in the order of `ConvSpec` (`local` too) and `DenseSpec`.
      num_classes: outputs of the classifier, the last fully-connected layer (fc8).
      classifier: its (init_std, bias), as in a row of `dense`; 0.01 and 0 in section 5.
      pool_window, pool_stride: 3 and 2 overlap (section 3.4).
      lrn_n, lrn_k, lrn_alpha, lrn_beta: constants of the response normalization (section 3.3). Caffe's k is 1.
      lrn_alpha_over_n: whether alpha is divided by n, as in the authors' code (`layer.py`) and Caffe; not in the paper.
      norm_groups: parts of the channels that a normalization window does not cross: 2, one for each GPU of the paper;
        1 in Caffe: across.
      spatial_n, spatial_k, spatial_alpha, spatial_beta: of 'spatial_norm' (`type=rnorm` of the authors' code, behind
        the second normalization); alpha is divided by n^2.
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

    def layer_specs(self) -> dict[str, ConvSpec | DenseSpec]:
        """Layers by name, in order: conv1 ... fc8."""
        return architecture.layer_specs(self)

    @nn.compact
    def __call__(self, x_NHWC, masks: dict[str, Any] | None = None):
        towers = 1 if self.tower_axis is None else lax.axis_size(self.tower_axis)
        parts = [x_NHWC.astype(self.dtype)]  # the maps, in one array or in one for each group (see `ops.regroup`)
        split = False  # whether they are only this tower's
        for name, layer in self.layer_specs().items():
            with jax.named_scope(name):
                if split and layer.groups == 1:
                    (x,) = ops.regroup(parts, 1)
                    parts = [lax.all_gather(x, self.tower_axis, axis=x.ndim - 1, tiled=True)]
                parts = self._linear(name, layer, ops.regroup(parts, max(1, layer.groups // towers)), towers)
                self._sow_output(f'{name}_linear', parts)
                for op in layer.post.split():
                    with jax.named_scope(op):
                        mask = None if masks is None else masks.get(name)
                        parts = self._apply_op(op, parts, mask, max(1, self.norm_groups // towers))
                    self._sow_output(f'{name}_{op}', parts)
            split = towers > 1
        return parts[0]

    def _linear(self, name: str, layer: ConvSpec | DenseSpec, parts: list, towers: int) -> list:
        """A layer's weighted sums and biases: each group's of its own part."""
        features, inputs, positions = layer.features // towers, parts[0].shape[-1], ()
        if isinstance(layer, LocalSpec):
            shape = (inputs * layer.kernel**2, features)
            positions = ((parts[0].shape[1] + sum(layer.padding) - layer.kernel) // layer.stride + 1,) * 2
            op = functools.partial(ops.local_conv, size=layer.kernel, stride=layer.stride, padding=layer.padding)
        elif isinstance(layer, ConvSpec):
            shape = (layer.kernel, layer.kernel, inputs, features)
            op = functools.partial(ops.conv, stride=layer.stride, padding=layer.padding)
        else:
            shape = (math.prod(parts[0].shape[1:]), features)
            # The logits are never rounded to bfloat16: of 1,000, the best two would often tie.
            logits = name == list(self.layer_specs())[-1]
            op = functools.partial(ops.dense, dtype=jnp.promote_types(self.dtype, jnp.float32) if logits else None)
        kernel, bias = Weights(shape, layer.init_std, layer.bias, positions, name=name)()
        kernels, biases = (ops.regroup([whole], len(parts)) for whole in (kernel.astype(self.dtype), bias))
        return [ops.add_bias(op(x, w), b) for x, w, b in zip(parts, kernels, biases, strict=True)]

    def _sow_output(self, name: str, parts: list) -> None:
        if self.is_mutable_collection('intermediates'):
            self.sow('intermediates', name, *ops.regroup(parts, 1))

    def _apply_op(self, name: str, parts: list, mask, norm_groups: int) -> list:
        """An operation that follows a layer, on each part of its maps."""
        match name:
            case 'relu':
                op = nn.relu
            case 'tanh':
                op = jnp.tanh
            case 'lrn':
                if norm_groups % len(parts):  # windows that cross from one part to the next
                    parts = ops.regroup(parts, 1)
                op = functools.partial(
                    normalization.local_response_norm,
                    n=self.lrn_n,
                    k=self.lrn_k,
                    alpha=self.lrn_alpha / self.lrn_n if self.lrn_alpha_over_n else self.lrn_alpha,
                    beta=self.lrn_beta,
                    groups=norm_groups // len(parts),
                )
            case 'pool' | 'avg_pool':
                pool = pooling.max_pool if name == 'pool' else pooling.avg_pool
                op = functools.partial(pool, window=self.pool_window, stride=self.pool_stride)
            case 'dropout':
                kept = [None] * len(parts) if mask is None else ops.regroup([mask], len(parts))
                op = functools.partial(ops.dropout, rate=self.dropout_rate, inverted=self.dropout_inverted)
                return [op(x, part) for x, part in zip(parts, kept, strict=True)]
            case 'spatial_norm':
                op = functools.partial(
                    normalization.spatial_response_norm,
                    n=self.spatial_n,
                    k=self.spatial_k,
                    alpha=self.spatial_alpha / self.spatial_n**2,
                    beta=self.spatial_beta,
                )
            case _:
                raise AssertionError(name)  # `infer_shapes` admits no other
        return [op(x) for x in parts]


def init_params(model: AlexNet, key: chex.PRNGKey, image_size: int):
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
        for i, (name, sizes) in enumerate(architecture.infer_shapes(model, image_size).items())
        if sizes.dropped is not None
    }
