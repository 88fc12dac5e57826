"""A weight gradient of convolutions that is faster than XLA's on the CPU backend."""

import math

import jax.numpy as jnp
from jax import Array, lax

_PATCH_BYTES = 12 << 20  # maximum memory for the patches of one chunk, which is two images in conv1


def weight_gradient(
    stride: int, padding: tuple[int, int], kernel_HWIO: Array, x_NHWC: Array, gradient_NHWO: Array
) -> Array:
    """Returns the gradient of a convolution's kernel, the matrix product of input patches and output gradient.

    Images are processed in chunks that fit in the cache. Blocks of stride x stride pixels are first moved into the
    channels (space to depth), so that a patch consists of a few long contiguous pieces of memory. Only shape and dtype
    of `kernel_HWIO` are used; `gradient_NHWO` is the gradient of the output. See `ops.conv` for `stride` and `padding`.
    """
    size, _, channels, features = kernel_HWIO.shape
    count, height, width, _ = gradient_NHWO.shape
    blocks, depth = -(-size // stride), stride * stride * channels
    sum_dtype = jnp.promote_types(x_NHWC.dtype, jnp.float32)

    def patches(x_nHWC: Array) -> Array:
        ends = [
            (n - 1 + blocks) * stride - padding[0] - side
            for n, side in zip((height, width), x_nHWC.shape[1:3], strict=True)
        ]
        edges = [(0, 0, 0), *((padding[0], end, 0) for end in ends), (0, 0, 0)]  # a negative end crops
        x = lax.pad(x_nHWC, jnp.zeros((), x_nHWC.dtype), edges)
        x = x.reshape(len(x), height - 1 + blocks, stride, width - 1 + blocks, stride * channels)
        x = x.swapaxes(2, 3).reshape(len(x), height - 1 + blocks, width - 1 + blocks, depth)
        x = jnp.concatenate([x[:, :, j : j + width] for j in range(blocks)], axis=-1)  # along rows, then columns
        x = jnp.concatenate([x[:, i : i + height] for i in range(blocks)], axis=-1)
        return x.reshape(-1, blocks * blocks * depth)

    def product(chunk: list[Array]) -> Array:
        x, gradient = chunk
        return jnp.matmul(patches(x).T, gradient.reshape(-1, features), preferred_element_type=sum_dtype)

    max_images = _PATCH_BYTES // (height * width * blocks * blocks * depth * x_NHWC.dtype.itemsize)
    chunk_size = math.gcd(count, 1 << max(max_images, 1).bit_length() - 1)
    chunks = [a.reshape(-1, chunk_size, *a.shape[1:]) for a in (x_NHWC, gradient_NHWO)]
    total, _ = lax.scan(  # starts from the first chunk: in `shard_map` the carry must vary over the axes of the sums
        lambda total, chunk: (total + product(chunk), None), product([a[0] for a in chunks]), [a[1:] for a in chunks]
    )
    total = total.reshape(blocks, blocks, stride, stride, channels, features).swapaxes(1, 2)
    kernel = total.reshape(blocks * stride, blocks * stride, channels, features)
    return kernel[:size, :size].astype(kernel_HWIO.dtype)
