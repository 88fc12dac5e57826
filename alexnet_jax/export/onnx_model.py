"""Exports a network with its weights and preprocessing as ONNX, built from the layer table."""

import json
from typing import Any

import numpy as np

from alexnet_jax.checkpoints.manager import Checkpoint
from alexnet_jax.convert import layout
from alexnet_jax.core.architecture import ConvSpec, LayerSpec, infer_shapes
from alexnet_jax.core.model import AlexNet
from alexnet_jax.core.pooling import pooled_size
from alexnet_jax.export import portable
from alexnet_jax.utils.errors import UserError

FILE_NAME = 'model.onnx'
_OPSET, _IR_VERSION = 13, 7  # of ONNX 1.8 (2020); nothing newer is needed


def onnx_model(checkpoint: Checkpoint, views: int = 1) -> bytes:
    """Returns a network with its weights and preprocessing as a serialized ONNX model, checked by `onnx.checker`.

    The input is `image`, uint8 [N, S, S, 3] for any N, where S is the checkpoint's `record_size`. The outputs are
    float32: `probabilities` [N, K], and the `logits` [N, K], or [N, 10, K] with ten views (center, corners, their
    reflections). Everything is computed in float32. Raises UserError if the package onnx is missing.
    """
    try:
        import onnx
    except ImportError as error:
        raise UserError("--formats=onnx: needs the package onnx; pip install 'alexnet_jax[onnx]'.") from error
    graph, network = _Graph(), checkpoint.network
    x = _add_preprocessing(graph, checkpoint, views)
    size, is_map = checkpoint.image_size, True
    weights = layout.from_params(network, size, checkpoint.params)
    shapes = infer_shapes(network, size)
    for (name, spec), layer in zip(network.layers.items(), weights, strict=True):
        kernel, bias = graph.constant(f'{name}.weight', layer.weight), graph.constant(f'{name}.bias', layer.bias)
        if isinstance(spec, ConvSpec):
            before, after = spec.padding
            pads, strides = [before, before, after, after], [spec.stride] * 2
            x = graph.add('Conv', x, kernel, bias, group=spec.groups, strides=strides, pads=pads)
            size = shapes[name].linear[0]
        else:
            x = graph.add('Flatten', x) if is_map else x
            is_map = False
            x = _add_dense(graph, spec, x, kernel, bias)
        for op in spec.ops:
            x = _add_op(graph, network, op, x, size)
            size = pooled_size(size, network.pool_window, network.pool_stride) if 'pool' in op else size
    _add_outputs(graph, x, views, len(checkpoint.class_names))
    return graph.serialize(onnx, checkpoint, views)


class _Graph:
    """Nodes and constants in the order of the computation. A value is named after the number of its node."""

    def __init__(self) -> None:
        self.nodes: list[tuple[str, tuple[str, ...], list[str], dict[str, Any]]] = []
        self.constants: dict[str, np.ndarray] = {}

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        """Adds a constant and returns its name."""
        self.constants[name] = np.asarray(value, dtype)
        return name

    def add(self, op: str, *inputs: str, output: str = '', **attributes: Any) -> str:
        """Adds a node with one output and returns the name of the output."""
        output = output or f'{op}_{len(self.nodes)}'
        self.nodes.append((op, inputs, [output], attributes))
        return output

    def scale(self, x: str, op: str, value: float) -> str:
        """Adds 'Mul', 'Add' or 'Pow' with a number."""
        return self.add(op, x, self.constant(f'number_{len(self.nodes)}', value))

    def split(self, x: str, parts: int) -> list[str]:
        """Splits the channels into equal parts."""
        outputs = [f'Split_{len(self.nodes)}_{i}' for i in range(parts)]
        self.nodes.append(('Split', (x,), outputs, {'axis': 1}))
        return outputs

    def slice(self, x: str, start: tuple[int, ...], stop: tuple[int, ...], axes: tuple[int, ...], step: int = 1) -> str:
        """Takes values from `start` to before `stop` along each axis."""
        number = len(self.nodes)
        values = {'start': start, 'stop': stop, 'axes': axes, 'step': (step,) * len(axes)}
        return self.add('Slice', x, *(self.constant(f'{k}_{number}', v, np.int64) for k, v in values.items()))

    def serialize(self, onnx: Any, checkpoint: Checkpoint, views: int) -> bytes:
        """Returns the checked model. `onnx` is the module."""
        side, count = checkpoint.record_size, len(checkpoint.class_names)
        value, float32 = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
        image = value('image', onnx.TensorProto.UINT8, ['N', side, side, 3])
        logits = value('logits', float32, ['N', count] if views == 1 else ['N', views, count])
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node(op, ins, outs, name=outs[0], **attrs) for op, ins, outs, attrs in self.nodes],
            'AlexNet',
            [image],
            [value('probabilities', float32, ['N', count]), logits],
            [onnx.numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )
        opset = [onnx.helper.make_opsetid('', _OPSET)]
        model = onnx.helper.make_model(graph, producer_name='alexnet_jax', opset_imports=opset, ir_version=_IR_VERSION)
        onnx.helper.set_model_props(model, {'class_names': json.dumps(checkpoint.class_names)})
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString()


def _add_preprocessing(graph: _Graph, checkpoint: Checkpoint, views: int) -> str:
    """Adds the conversion of `image` to the network's input; the views follow each other along the batch axis."""
    size, augmentation = checkpoint.image_size, checkpoint.augmentation
    mean = graph.constant('mean', portable.mean_CHW(checkpoint))
    x = graph.add('Transpose', graph.add('Cast', 'image', to=1), perm=[0, 3, 1, 2])  # 1: float32
    if augmentation.mean == 'crop':
        x = graph.add('Sub', x, mean)
    corners = portable.crop_corners(checkpoint, views)
    crops = [graph.slice(x, corner, (corner[0] + size, corner[1] + size), (2, 3)) for corner in corners]
    x = crops[0]
    if views == 10:
        crops += [graph.slice(crop, (-1,), (np.iinfo(np.int64).min,), (3,), step=-1) for crop in crops]
        x = graph.add('Concat', *crops, axis=0)
    if augmentation.mean != 'crop':
        x = graph.add('Sub', x, mean)
    if any(std != 1 for std in augmentation.pixel_std):
        x = graph.add('Div', x, graph.constant('std', np.reshape(augmentation.pixel_std, (3, 1, 1))))
    return x


def _add_dense(graph: _Graph, spec: LayerSpec, x: str, kernel: str, bias: str) -> str:
    """Adds a dense layer; with groups, one product for each."""
    if spec.groups == 1:
        return graph.add('Gemm', x, kernel, bias, transB=1)
    values = [(kernel, graph.constants.pop(kernel)), (bias, graph.constants.pop(bias))]
    outputs = []
    for i, part in enumerate(graph.split(x, spec.groups)):
        constants = [graph.constant(f'{name}.{i}', np.split(value, spec.groups)[i]) for name, value in values]
        outputs.append(graph.add('Gemm', part, *constants, transB=1))
    return graph.add('Concat', *outputs, axis=1)


def _add_op(graph: _Graph, network: AlexNet, op: str, x: str, size: int) -> str:
    """Adds a post op on maps of `size` px, or on units, as at test time."""
    match op:
        case 'relu' | 'tanh':
            return graph.add(op.capitalize(), x)
        case 'dropout':
            return x if network.dropout_inverted else graph.scale(x, 'Mul', 1 - network.dropout_rate)
        case 'lrn':
            return _add_lrn(graph, network, x)
        case 'spatial_norm':
            n = network.spatial_n
            pads = [n // 2, n // 2, (n - 1) // 2, (n - 1) // 2]
            mean = graph.add('AveragePool', graph.add('Mul', x, x), kernel_shape=[n, n], pads=pads, count_include_pad=1)
            denominator = graph.scale(graph.scale(mean, 'Mul', network.spatial_alpha), 'Add', network.spatial_k)
            return graph.add('Div', x, graph.scale(denominator, 'Pow', network.spatial_beta))
        case 'pool' | 'avg_pool':
            # The last window may extend past the edge. Explicit padding is less ambiguous than ceil_mode.
            window, stride = network.pool_window, network.pool_stride
            end = max(0, (pooled_size(size, window, stride) - 1) * stride + window - size)
            name = 'MaxPool' if op == 'pool' else 'AveragePool'
            return graph.add(name, x, kernel_shape=[window] * 2, strides=[stride] * 2, pads=[0, 0, end, end])
    raise AssertionError(op)  # `portable.check_network` has refused other operations


def _add_lrn(graph: _Graph, network: AlexNet, x: str) -> str:
    """Adds local response normalization, separately for each group of channels."""
    constants = {'alpha': portable.lrn_alpha(network), 'beta': network.lrn_beta, 'bias': network.lrn_k}
    options: dict[str, Any] = {'size': network.lrn_n, **{key: float(value) for key, value in constants.items()}}
    if network.norm_groups == 1:
        return graph.add('LRN', x, **options)
    parts = [graph.add('LRN', part, **options) for part in graph.split(x, network.norm_groups)]
    return graph.add('Concat', *parts, axis=1)


def _add_outputs(graph: _Graph, x: str, views: int, classes: int) -> None:
    """Adds the outputs `logits` and `probabilities`, the mean over the views."""
    if views == 1:
        graph.add('Identity', x, output='logits')
        graph.add('Softmax', 'logits', axis=-1, output='probabilities')
        return
    shape = graph.constant('views', (views, -1, classes), np.int64)
    graph.add('Transpose', graph.add('Reshape', x, shape), perm=[1, 0, 2], output='logits')
    softmax = graph.add('Softmax', 'logits', axis=-1)
    graph.add('ReduceMean', softmax, axes=[1], keepdims=0, output='probabilities')
