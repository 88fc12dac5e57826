"""AlexNet as one Flax module, for one device or for one of two towers.

The defaults are the paper's network (section 3.5, figure 2). Variants change `layers`, not the class.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax import Array, lax

from alexnet_jax.core import architecture, checks, ops
from alexnet_jax.core.architecture import ConvSpec, DenseSpec, LayerSpec, LocalSpec
from alexnet_jax.core.post_ops import POST_OPS, Context
from alexnet_jax.utils.errors import UserError, check_type

Masks = dict[str, Array]  # dropout masks by layer: bool, True keeps the unit
Edits = Mapping[str, Callable[[Array], Array]]  # functions by operation: output [N, ...] -> output of the same shape
_PAPER_LAYERS: Mapping[str, LayerSpec] = FrozenDict(
    conv1=ConvSpec(features=96, kernel=11, stride=4, padding=(0, 3), post='relu lrn pool'),
    conv2=ConvSpec(features=256, kernel=5, padding=(2, 2), groups=2, bias=1.0, post='relu lrn pool'),
    conv3=ConvSpec(features=384, kernel=3, padding=(1, 1), post='relu'),
    conv4=ConvSpec(features=384, kernel=3, padding=(1, 1), groups=2, bias=1.0, post='relu'),
    conv5=ConvSpec(features=256, kernel=3, padding=(1, 1), groups=2, bias=1.0, post='relu pool'),
    fc6=DenseSpec(features=4096, bias=1.0, post='relu dropout'),
    fc7=DenseSpec(features=4096, bias=1.0, post='relu dropout'),
    fc8=DenseSpec(),
)


class Weights(nn.Module):
    """Parameters `kernel` and `bias` of one layer."""

    shape: tuple[int, ...]  # of the kernel at one position
    init_std: float | None  # None: kernel and bias use torch.nn's default, kaiming_uniform(a=sqrt(5))
    bias: float
    positions: tuple[int, ...] = ()  # height and width of the output, if each position has its own kernel and bias

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        bound = math.prod(self.shape[:-1]) ** -0.5

        def uniform(key: Array, shape: tuple[int, ...]) -> Array:
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        if self.init_std is None:
            kernel, bias = uniform, lambda key, shape: self.bias + uniform(key, shape)
        else:
            kernel, bias = nn.initializers.normal(self.init_std), nn.initializers.constant(self.bias)
        shapes = (*self.positions, *self.shape), (*self.positions, self.shape[-1])
        return self.param('kernel', kernel, shapes[0]), self.param('bias', bias, shapes[1])


class AlexNet(nn.Module):
    """The network of section 3: 60,965,224 parameters with the defaults.

    `network.apply({'params': params}, x_NHWC)` maps float [N, S, S, 3], mean-subtracted, on the 0-255 scale, to float32
    logits [N, num_classes]; `params` come from `init_params`. Dropout is on with `train=True, rng=key`, which draws the
    masks from the key, or with given masks, `masks=dropout_masks(...)`. `mutable='intermediates'` also returns the
    output of every operation: `conv1.linear`, `conv1.relu`, ... `edit={'conv2.relu': function}` replaces an output by
    the function of it before the next operation reads it; of equal operations of a layer, that of the last.

    Inside `shard_map` (see sharding.py) `tower_axis` names the mesh axis of the towers. The module then holds only its
    tower's part of every parameter and feature map. It gathers a split input before each layer with one group.
    `dense_axis` names a second axis that splits the dense layers, that of the batch: see `sharding.forward`.

    Sources of the attributes: the paper's sections; `layer.py` and `layers-145.cfg` of the authors' release; Caffe's
    `bvlc_alexnet`; torchvision's `alexnet`.

    Attributes:
      layers: layer specs by name, sorted in network order. A name is a kind (`architecture.KINDS`) and a number.
        None: the paper's conv1 to conv5, fc6, fc7 and fc8.
      num_classes: width of the last layer, the classifier; replaces `features` of its spec.
      pool_window, pool_stride: 3 and 2 give overlapping windows (section 3.4).
      lrn_n, lrn_k, lrn_alpha, lrn_beta: constants of the local response normalization (section 3.3). k is 1 in Caffe.
      lrn_alpha_over_n: whether alpha is divided by n, as in the authors' code (`layer.py`) and Caffe; not in the paper.
      norm_groups: channel groups that a normalization window does not cross: 2 in the paper, one for each GPU; 1 in
        Caffe, where it covers all channels.
      spatial_n, spatial_k, spatial_alpha, spatial_beta: constants of 'spatial_norm' (`type=rnorm` of the authors' code,
        after the second normalization); alpha is divided by n^2.
      dropout_rate: probability of setting a hidden unit to zero (section 4.2).
      dropout_inverted: whether units are scaled in training (Caffe, torchvision), not at test time (section 4.2).
      dtype: dtype of the computation: 'float32', 'bfloat16' or 'float64'. Parameters are float32, or float64 with
        jax.enable_x64.
      tower_axis, dense_axis: mesh axes of the towers and of the split dense layers; None: not split.

    Raises UserError for an attribute of another type or out of range.

    >>> network = AlexNet({'conv1': ConvSpec(features=4, kernel=3, post='relu'), 'fc2': DenseSpec()}, num_classes=2)
    >>> params = init_params(network, jax.random.key(0), image_size=8)
    >>> network.apply({'params': params}, jnp.zeros((5, 8, 8, 3))).shape
    (5, 2)
    """

    layers: Mapping[str, LayerSpec] = cast(Any, None)  # a FrozenDict after __post_init__
    num_classes: int = 1000
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
    dense_axis: str | None = None

    def __post_init__(self) -> None:
        layers = _PAPER_LAYERS if self.layers is None else self.layers
        checks.check_layers(layers)
        names = architecture.sort_layers(layers)
        layers = {name: layers[name] for name in names}
        layers[names[-1]] = dataclasses.replace(layers[names[-1]], features=self.num_classes)
        self.layers = FrozenDict(layers)
        if not isinstance(self.dtype, str | None):  # such as jnp.bfloat16
            with contextlib.suppress(TypeError):
                self.dtype = jnp.dtype(self.dtype).name
        checks.check_network(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x_NHWC: Array,
        masks: Masks | None = None,
        *,
        train: bool = False,
        rng: Array | None = None,
        edit: Edits | None = None,
    ) -> Array:
        if (rank := getattr(x_NHWC, 'ndim', 0)) != 4:
            raise UserError(f'the input has {rank} axes: expected 4, as in [N, S, S, 3].')
        if train and masks is None:
            if rng is None and any('dropout' in layer.ops for layer in self.layers.values()):
                raise UserError('train=True needs a random key for dropout; pass rng, such as jax.random.key(0).')
            masks = dropout_masks(self, cast(Array, rng), len(x_NHWC), x_NHWC.shape[1])
        towers = 1 if self.tower_axis is None else lax.axis_size(self.tower_axis)
        parts = [x_NHWC.astype(self.dtype)]  # feature maps: one array, or one for each group (see `ops.regroup`)
        split: tuple[str, ...] = ()  # mesh axes over which the channels of `parts` are split
        whole_batch = False  # whether `parts` hold the images of all devices
        for name, layer in self.layers.items():
            with jax.named_scope(name):
                # Gather images before the channels of towers: then only one tower's part of them crosses hosts.
                if self.dense_axis in self.split_axes(name) and not whole_batch:
                    parts, whole_batch = self._gather(parts, [self.dense_axis], axis=0), True
                parts = self._gather(parts, [axis for axis in split if layer.groups == 1 or axis != self.tower_axis])
                parts = self._linear(name, layer, ops.regroup(parts, max(1, layer.groups // towers)))
                parts = self._output(f'{name}.linear', parts, edit or {})
                for i, op in enumerate(layer.ops):
                    with jax.named_scope(op):
                        parts = self._apply_op(op, parts, None if masks is None else masks.get(name), towers)
                    parts = self._output(f'{name}.{op}', parts, {} if op in layer.ops[i + 1 :] else edit or {})
            split = self.split_axes(name)
        (x,) = ops.regroup(parts, 1)
        # Back to this device's images, with the classes of its tower.
        return lax.all_to_all(x, self.dense_axis, split_axis=0, concat_axis=1, tiled=True) if whole_batch else x

    def split_axes(self, name: str) -> tuple[str, ...]:
        """Returns the mesh axes over which the parameters and outputs of a layer are split, the slowest first."""
        axes = (self.tower_axis, self.dense_axis if isinstance(self.layers[name], DenseSpec) else None)
        return tuple(axis for axis in axes if axis)

    def _gather(self, parts: list[Array], mesh_axes: Sequence[str], axis: int = -1) -> list[Array]:
        """Gathers the channels, or with axis=0 the images, that other devices hold."""
        if not mesh_axes:
            return parts
        (x,) = ops.regroup(parts, 1)
        return [lax.all_gather(x, tuple(mesh_axes), axis=axis % x.ndim, tiled=True)]

    def _linear(self, name: str, layer: LayerSpec, parts: list[Array]) -> list[Array]:
        """Computes a layer's weighted sums plus biases, separately for each group."""
        axes = self.split_axes(name)
        features, inputs = layer.features // (lax.axis_size(axes) if axes else 1), parts[0].shape[-1]
        positions: tuple[int, ...] = ()
        if isinstance(layer, LocalSpec):
            shape: tuple[int, ...] = (inputs * layer.kernel**2, features)
            positions = ((parts[0].shape[1] + sum(layer.padding) - layer.kernel) // layer.stride + 1,) * 2
            op = functools.partial(ops.local_conv, size=layer.kernel, stride=layer.stride, padding=layer.padding)
        elif isinstance(layer, ConvSpec):
            shape = (layer.kernel, layer.kernel, inputs, features)
            op = functools.partial(ops.conv, stride=layer.stride, padding=layer.padding)
        else:
            shape = (math.prod(parts[0].shape[1:]), features)
            # The logits are never rounded to bfloat16: the two best of 1,000 classes would often tie.
            logits = name == list(self.layers)[-1]
            op = functools.partial(ops.dense, dtype=jnp.promote_types(self.dtype, jnp.float32) if logits else None)
        kernel, bias = Weights(shape, architecture.init_std(layer.init), layer.bias, positions, name=name)()
        kernels, biases = (ops.regroup([whole], len(parts)) for whole in (kernel.astype(self.dtype), bias))
        return [ops.add_bias(op(x, w), b) for x, w, b in zip(parts, kernels, biases, strict=True)]

    def _output(self, name: str, parts: list[Array], edit: Edits) -> list[Array]:
        """Returns the edited output of an operation, and sows it. An edit reads the channels of all devices."""
        if name in edit:
            (x,), axes = ops.regroup(parts, 1), self.split_axes(name.partition('.')[0])
            channels, last = x.shape[-1], x.ndim - 1
            (whole,) = self._gather([x], axes)
            edited = jnp.asarray(edit[name](whole), x.dtype)
            if edited.shape != whole.shape:
                raise UserError(f'edit of {name!r} returns the shape {edited.shape}: expected {whole.shape}.')
            start = lax.axis_index(axes) * channels if axes else 0
            parts = [lax.dynamic_slice_in_dim(edited, start, channels, axis=last)]
        if self.is_mutable_collection('intermediates'):
            self.sow('intermediates', name, *ops.regroup(parts, 1))
        return parts

    def _apply_op(self, name: str, parts: list[Array], mask: Array | None, towers: int) -> list[Array]:
        """Applies a post op to each part of a layer's output."""
        op, groups = POST_OPS[name], 1
        if op.groups:
            local_groups = max(1, op.groups(self) // towers)
            if local_groups % len(parts):  # the operation mixes channels of different parts
                parts = ops.regroup(parts, 1)
            groups = local_groups // len(parts)
        masks = [None] * len(parts) if mask is None else ops.regroup([mask], len(parts))
        return [op.function(x, Context(self, groups, m)) for x, m in zip(parts, masks, strict=True)]


def init_params(model: AlexNet, key: Array, image_size: int) -> Any:
    """Draws initial parameters {'conv1': {'kernel', 'bias'}, ...} in the global layout, the same for every mesh.

    `image_size` is the side of the network's input in pixels. Kernels are float32: HWIO for convolutions, where I is
    the number of input channels of one group; [inputs, outputs] for dense layers; see `ops.local_conv` for local ones.
    Raises UserError if the layers do not fit each other or the image size.
    """
    check_type('the model', model, AlexNet, 'an AlexNet, such as AlexNet()')
    if isinstance(image_size, bool) or not isinstance(image_size, int | np.integer) or image_size < 1:
        raise UserError(f'image_size={image_size!r}: expected a positive integer, in pixels.')
    architecture.infer_shapes(model, image_size)
    return model.clone(tower_axis=None, dense_axis=None).init(key, jnp.zeros((1, image_size, image_size, 3)))['params']


def dropout_masks(model: AlexNet, key: Array, batch_size: int, image_size: int) -> Masks:
    """Draws a mask, bool [batch_size, ...], for each layer with dropout; True keeps the unit (section 4.2).

    Masks are drawn in their global shape, so they do not depend on the mesh, and the two towers get different ones.
    """
    keep = jnp.float32(1 - model.dropout_rate)  # a Python float would change the masks under jax.enable_x64
    return {
        name: jax.random.bernoulli(jax.random.fold_in(key, i), keep, (batch_size, *sizes.dropped))
        for i, (name, sizes) in enumerate(architecture.infer_shapes(model, image_size).items())
        if sizes.dropped is not None
    }
