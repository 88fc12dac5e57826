"""The operations against loops written from the text of the paper."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.core import normalization, ops, pooling
from alexnet_jax.utils import compiler


def _random(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def _grouped(op, groups: int, x, kernel):
    """Applies a layer in groups, as the network does: each group of inputs uses its own share of the kernels."""
    pairs = zip(ops.regroup([jnp.asarray(x)], groups), ops.regroup([jnp.asarray(kernel)], groups), strict=True)
    (y,) = ops.regroup([op(*pair) for pair in pairs], 1)
    return y


def _lrn_loop(a, n, k, alpha, beta):
    """Section 3.3: b_i = a_i / (k + alpha sum_{j = max(0, i - n/2)}^{min(N - 1, i + n/2)} a_j^2)^beta.

    For an even n, which the paper does not use, the last position is left out.
    """
    b = np.empty_like(a)
    maps = a.shape[-1]
    for i in range(maps):
        total = sum(a[..., j] ** 2 for j in range(max(0, i - n // 2), min(maps, i - n // 2 + n)))
        b[..., i] = a[..., i] / (k + alpha * total) ** beta
    return b


def _spatial_lrn_loop(a, n, k, alpha, beta):
    """The same over n x n positions of each map."""
    b = np.empty_like(a)
    for image, i, j, c in np.ndindex(a.shape):
        top, left = i - n // 2, j - n // 2
        window = a[image, max(0, top) : top + n, max(0, left) : left + n, c]
        b[image, i, j, c] = a[image, i, j, c] / (k + alpha * (window**2).sum()) ** beta
    return b


@pytest.mark.parametrize('n', [3, 5])
def test_lrn_matches_formula_within_groups(n):
    a = 20 * _random(2, 3, 4, 12)
    constants = dict(n=n, k=2.0, alpha=0.01, beta=0.75)
    with jax.enable_x64():
        whole = normalization.local_response_norm(jnp.asarray(a), **constants)
        halves = normalization.local_response_norm(jnp.asarray(a), **constants, groups=2)
    chex.assert_trees_all_close(whole, _lrn_loop(a, **constants), rtol=1e-12)
    by_hand = np.concatenate([_lrn_loop(part, **constants) for part in np.split(a, 2, axis=-1)], axis=-1)
    chex.assert_trees_all_close(halves, by_hand, rtol=1e-12)
    assert np.abs(whole - halves).max() > 0.1  # the group boundary matters


def test_lrn_sums_in_float32():
    """The bfloat16 output and gradient are the float32 ones, rounded once."""
    x, gradient = (jnp.asarray(100 * _random(2, 3, 3, 10), jnp.bfloat16) for _ in range(2))
    narrow, back = jax.vjp(normalization.local_response_norm, x)
    wide, wide_back = jax.vjp(normalization.local_response_norm, x.astype(jnp.float32))
    assert narrow.dtype == back(gradient)[0].dtype == jnp.bfloat16
    chex.assert_trees_all_equal(narrow, wide.astype(jnp.bfloat16))
    chex.assert_trees_all_equal(back(gradient)[0], wide_back(gradient.astype(jnp.float32))[0].astype(jnp.bfloat16))


def test_lrn_defaults_are_the_papers_constants():
    a = 100 * _random(1, 2, 2, 10)
    with jax.enable_x64():
        b = normalization.local_response_norm(jnp.asarray(a))
    chex.assert_trees_all_close(b, _lrn_loop(a, n=5, k=2, alpha=1e-4, beta=0.75), rtol=1e-12)


@pytest.mark.parametrize(
    ('size', 'window', 'stride', 'places'), [(55, 3, 2, 27), (13, 3, 2, 6), (8, 3, 2, 4), (11, 2, 2, 6)]
)
def test_max_pool_matches_loop(size, window, stride, places):
    x = _random(2, size, size, 3).astype(np.float32)
    y = pooling.max_pool(x, window=window, stride=stride)
    chex.assert_shape(y, (2, places, places, 3))
    for i in range(places):
        for j in range(places):
            # NumPy cuts windows at the edge.
            seen = x[:, i * stride : i * stride + window, j * stride : j * stride + window]
            chex.assert_trees_all_equal(np.asarray(y[:, i, j]), seen.max((1, 2)))


@pytest.mark.parametrize(
    ('size', 'window', 'stride'), [(13, 3, 2), (8, 3, 2), (6, 3, 1), (9, 2, 2), (11, 5, 2), (10, 5, 3), (17, 16, 1)]
)
@pytest.mark.parametrize('values', [1, 2, 1000])
def test_max_pool_gradient_is_shared_among_maxima(size, window, stride, values):
    """`values` is the number of distinct values; with one or two, most windows have several maxima."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, values, (2, size, size + 1, 3)).astype(float)
    with jax.enable_x64():
        y, pull_back = jax.vjp(functools.partial(pooling.max_pool, window=window, stride=stride), jnp.asarray(x))
        gradient = rng.standard_normal(y.shape)
        (found,) = pull_back(jnp.asarray(gradient))
    y, expected = np.asarray(y), np.zeros_like(x)
    for n, i, j, c in np.ndindex(y.shape):
        seen = (n, slice(i * stride, i * stride + window), slice(j * stride, j * stride + window), c)
        winners = x[seen] == x[seen].max()
        assert y[n, i, j, c] == x[seen].max()  # under differentiation the forward pass uses different code
        expected[seen] += gradient[n, i, j, c] * winners / winners.sum()
    chex.assert_trees_all_close(np.asarray(found), expected, atol=1e-12)


def test_max_pool_gradient_is_summed_in_float32():
    """The bfloat16 gradient is the float32 one, rounded once."""
    x, gradient = (jnp.asarray(_random(2, side, side, 3), jnp.bfloat16) for side in (9, 4))
    pool = functools.partial(pooling.max_pool, window=3, stride=2)
    (narrow,) = jax.vjp(pool, x)[1](gradient)
    (wide,) = jax.vjp(pool, x.astype(jnp.float32))[1](gradient.astype(jnp.float32))
    chex.assert_trees_all_equal(narrow, wide.astype(jnp.bfloat16))


def test_bias_gradient_is_summed_in_its_own_dtype():
    """3,968 times 1 + 2^-7 is 3,999, which bfloat16 cannot represent; a bfloat16 sum would stop at a few hundred."""
    x, bias = jnp.zeros((4, 32, 31, 2), jnp.bfloat16), jnp.asarray([0.5, -3.0])
    y, pull_back = jax.vjp(ops.add_bias, x, bias)
    of_x, of_bias = pull_back(jnp.full_like(x, 1 + 2**-7))
    assert y.dtype == of_x.dtype == jnp.bfloat16 and of_bias.dtype == jnp.float32
    chex.assert_trees_all_equal(y.astype(jnp.float32), jnp.broadcast_to(bias, x.shape))
    chex.assert_trees_all_equal(of_bias, jnp.full(2, 3999.0))
    places = jnp.arange(6.0).reshape(3, 2)  # a bias per position: summed over images only
    chex.assert_trees_all_equal(jax.grad(lambda b: ops.add_bias(jnp.zeros((5, 3, 2)), b).sum())(places), 5 + 0 * places)


@pytest.mark.parametrize('groups', [1, 2])
def test_conv_matches_loop(groups):
    x, kernel = _random(2, 7, 7, 4), _random(3, 3, 4 // groups, 6)
    with jax.enable_x64():
        y = _grouped(functools.partial(ops.conv, stride=2, padding=(0, 1)), groups, x, kernel)
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    chex.assert_shape(y, (2, 3, 3, 6))
    for o in range(6):
        first = (o * groups // 6) * (4 // groups)  # first input channel of kernel o
        for i in range(3):
            for j in range(3):
                patch = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3, first : first + 4 // groups]
                by_hand = (patch * kernel[..., o]).sum((1, 2, 3))
                chex.assert_trees_all_close(np.asarray(y[:, i, j, o]), by_hand, rtol=1e-10)


@pytest.mark.parametrize(
    ('count', 'size', 'stride', 'padding', 'groups'),
    [(8, 11, 4, (0, 3), 1), (3, 5, 2, (2, 2), 2), (2, 3, 5, (1, 0), 1), (2, 3, 1, (1, 1), 2)],
)
def test_conv_gradients_match_loop(count, size, stride, padding, groups):
    x, kernel = _random(count, 19, 23, 4), _random(size, size, 4 // groups, 6)
    conv = functools.partial(_grouped, functools.partial(ops.conv, stride=stride, padding=padding), groups)
    with jax.enable_x64():
        y, pull_back = jax.vjp(conv, jnp.asarray(x), jnp.asarray(kernel))
        weights = np.random.default_rng(1).standard_normal(y.shape)
        found = pull_back(jnp.asarray(weights))
    padded = np.pad(x, ((0, 0), padding, padding, (0, 0)))
    of_x, of_kernel = np.zeros_like(padded), np.zeros_like(kernel)
    for i, j, o in np.ndindex(y.shape[1:]):
        first = (o * groups // 6) * (4 // groups)
        rows, columns = slice(stride * i, stride * i + size), slice(stride * j, stride * j + size)
        seen = (slice(None), rows, columns, slice(first, first + 4 // groups))
        weight = weights[:, i, j, o, None, None, None]
        of_kernel[..., o] += (weight * padded[seen]).sum(0)
        of_x[seen] += weight * kernel[..., o]
    before = padding[0]
    chex.assert_trees_all_close(np.asarray(found[0]), of_x[:, before : before + 19, before : before + 23], rtol=1e-10)
    chex.assert_trees_all_close(np.asarray(found[1]), of_kernel, rtol=1e-10)


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='the form of the convolutions matters on a CPU only')
@pytest.mark.parametrize(('size', 'stride', 'padding'), [(3, 1, (1, 1)), (5, 2, (0, 3))])
def test_conv_gradients_in_a_loop_use_the_fast_form(size, stride, padding):
    """Any other form is compiled to nested loops there, which took fifty times as long."""

    def step(total, x):
        conv = functools.partial(ops.conv, stride=stride, padding=padding)
        gradients = jax.grad(lambda x, kernel: jnp.square(conv(x, kernel)).sum(), argnums=(0, 1))(x, total)
        return total + gradients[1], gradients[0]

    kernel, images = jnp.ones((size, size, 4, 6)), jnp.ones((3, 2, 19, 19, 4))
    options = compiler.compiler_options('cpu')
    text = (
        jax.jit(lambda *args: jax.lax.scan(step, *args), compiler_options=options)
        .lower(kernel, images)
        .compile()
        .as_text()
    )
    found = [line for line in text.splitlines() if ' convolution(' in line]
    assert len(found) == 3
    for line in found:
        assert 'dim_labels=b01f_01io->b01f' in line and 'rhs_reversal' not in line, line


def test_dense_matches_numpy():
    x, kernel = _random(2, 2, 2, 4), _random(8, 6)
    with jax.enable_x64():
        whole = ops.dense(jnp.asarray(x), jnp.asarray(_random(16, 6)))
        halves = _grouped(ops.dense, 2, x, kernel)
    chex.assert_trees_all_close(whole, x.reshape(2, 16) @ _random(16, 6), rtol=1e-12)
    for o in range(6):
        inputs = x[..., :2] if o < 3 else x[..., 2:]
        chex.assert_trees_all_close(np.asarray(halves[:, o]), inputs.reshape(2, 8) @ kernel[:, o], rtol=1e-12)


def test_dropout_masks_in_training_and_halves_at_test():
    x = jnp.asarray([[1.0, -2.0, 3.0]])
    chex.assert_trees_all_equal(
        ops.dropout(x, jnp.asarray([[True, False, True]]), rate=0.5), jnp.asarray([[1.0, 0.0, 3.0]])
    )
    chex.assert_trees_all_equal(ops.dropout(x, None, rate=0.5), jnp.asarray([[0.5, -1.0, 1.5]]))


@pytest.mark.parametrize('n', [4, 5])
def test_spatial_lrn_matches_loop(n):
    a, constants = _random(2, 6, 7, 3), dict(n=n, k=1.5, alpha=0.3, beta=0.75)
    with jax.enable_x64():
        found = normalization.spatial_response_norm(jnp.asarray(a), **constants)
    chex.assert_trees_all_close(found, _spatial_lrn_loop(a, **constants), rtol=1e-12)


@pytest.mark.parametrize(('n', 'beta'), [(5, 0.75), (4, 0.75), (3, 0.6)])
@pytest.mark.parametrize(
    ('norm', 'by_hand'),
    [(normalization.local_response_norm, _lrn_loop), (normalization.spatial_response_norm, _spatial_lrn_loop)],
)
def test_lrn_gradients_match_finite_differences(norm, by_hand, n, beta):
    a, weights = 3 * _random(1, 4, 5, 6), np.random.default_rng(1).standard_normal((1, 4, 5, 6))
    constants = dict(n=n, k=1.5, alpha=0.2, beta=beta)
    slope = np.empty_like(a)
    for place in np.ndindex(a.shape):
        step = np.zeros_like(a)
        step[place] = 1e-5
        slope[place] = ((by_hand(a + step, **constants) - by_hand(a - step, **constants)) * weights).sum() / 2e-5
    with jax.enable_x64():
        grad = jax.grad(lambda a: (norm(a, **constants) * weights).sum())(jnp.asarray(a))
    chex.assert_trees_all_close(np.asarray(grad), slope, atol=1e-8)


def test_inverted_dropout_scales_in_training_only():
    x, mask = jnp.arange(1.0, 5.0)[None], jnp.array([[True, False, True, True]])
    chex.assert_trees_all_close(ops.dropout(x, mask, rate=0.2, inverted=True), jnp.array([[1.25, 0, 3.75, 5.0]]))
    chex.assert_trees_all_equal(ops.dropout(x, None, rate=0.2, inverted=True), x)


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize(('size', 'stride', 'padding'), [(3, 1, (1, 1)), (3, 2, (0, 1))])
def test_local_conv_matches_loop(groups, size, stride, padding):
    x = _random(2, 5, 5, 4)
    padded = np.pad(x, [(0, 0), padding, padding, (0, 0)])
    side = (5 + sum(padding) - size) // stride + 1
    inputs, features = 4 // groups, 6
    kernel = np.random.default_rng(1).standard_normal((side, side, inputs * size**2, features))
    expected = np.zeros((2, side, side, features))
    for n, i, j, o in np.ndindex(expected.shape):
        group = o // (features // groups)
        for c, a, b in np.ndindex(inputs, size, size):
            weight = kernel[i, j, (c * size + a) * size + b, o]
            expected[n, i, j, o] += padded[n, i * stride + a, j * stride + b, group * inputs + c] * weight
    with jax.enable_x64():
        local = functools.partial(ops.local_conv, size=size, stride=stride, padding=padding)
        found = _grouped(local, groups, x, kernel)
    chex.assert_trees_all_close(found, expected, rtol=1e-12)


@pytest.mark.parametrize(('side', 'window', 'stride'), [(7, 3, 2), (8, 3, 2), (6, 2, 2), (5, 5, 3)])
def test_avg_pool_matches_loop(side, window, stride):
    x = _random(2, side, side, 3)
    count = 1 + -(-(side - window) // stride)
    expected = np.empty((2, count, count, 3))
    for i, j in np.ndindex(count, count):
        part = x[:, i * stride : i * stride + window, j * stride : j * stride + window]  # windows are cut at the edge
        expected[:, i, j] = part.mean((1, 2))
    with jax.enable_x64():
        chex.assert_trees_all_close(
            pooling.avg_pool(jnp.asarray(x), window=window, stride=stride), expected, rtol=1e-12
        )
