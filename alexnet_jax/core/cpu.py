"""Operations in the form that XLA computes fast on a CPU. The results are those of the plain forms."""

from jax import Array, lax

_ORDER = ('NHWC', 'HWIO', 'NHWC')


def conv_gradients(
    stride: int, padding: tuple[int, int], x_NHWC: Array, kernel_HWIO: Array, gradient_NHWO: Array
) -> tuple[Array, Array]:
    """Returns the gradients of the feature maps and of the kernel, equal to those that JAX derives.

    On a CPU, XLA calls Eigen for a convolution of arrays in the order NHWC and HWIO whose window is not reversed. The
    gradients that JAX derives have another order and a reversed window. XLA transposes them only outside of loops. In
    the loop of `grad_accum_steps` it would compile nested loops, which took fifty times as long.

    `gradient_NHWO` is the gradient of the output. See `ops.conv` for the other arguments.
    """
    size = kernel_HWIO.shape[0]
    # The last window ends at this position of the image without padding.
    ends = [(n - 1) * stride + size - padding[0] for n in gradient_NHWO.shape[1:3]]
    sides = x_NHWC.shape[1:3]
    x_gradient = lax.conv_general_dilated(
        gradient_NHWO,
        lax.rev(kernel_HWIO, (0, 1)).swapaxes(2, 3),
        (1, 1),
        [(size - 1 - padding[0], side - end + size - 1) for side, end in zip(sides, ends, strict=True)],
        lhs_dilation=(stride, stride),
        dimension_numbers=_ORDER,
    )
    kernel_gradient_IHWO = lax.conv_general_dilated(
        x_NHWC.transpose(3, 1, 2, 0),
        gradient_NHWO.transpose(1, 2, 0, 3),
        (1, 1),
        [(padding[0], end - side) for side, end in zip(sides, ends, strict=True)],
        rhs_dilation=(stride, stride),
        dimension_numbers=_ORDER,
    )
    return x_gradient, kernel_gradient_IHWO.transpose(1, 2, 0, 3)


def barrier(*arrays: Array) -> tuple[Array, ...]:
    """On a CPU, makes XLA store the arrays instead of fusing their computation with operations that use them.

    XLA would repeat the computation for each use. Elsewhere returns the arrays: a GPU is limited by its memory.
    """
    return lax.platform_dependent(*arrays, cpu=lambda *a: lax.optimization_barrier(a), default=lambda *a: a)
