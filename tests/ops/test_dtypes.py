"""Integers of 64 bits, floats of 8 bits, indices of any width, complex numbers, four spatial axes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_mps
import oracle
from jax_mps.flax import linen

WINDOW = {"window_shape": (3, 2), "strides": 2, "padding": ((1, 0), (0, 1))}
WIDTHS = ("int8", "int16", "int64", "uint8", "uint16", "uint32", "uint64")
FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e4m3b11fnuz")


@pytest.mark.parametrize("function", [None, "xla"])
@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_integers_of_64_bits(dtype, function, x64):
    x = oracle.tied((2, 7, 6, 2)).astype(dtype) * np.array(2**40, dtype) + np.array(2**60, dtype)
    expected = oracle.max_pool(oracle.tied((2, 7, 6, 2)), **WINDOW)[1]
    for transform in (lambda f: f, jax.jit):
        f = functools.partial(jax_mps.max_pool, return_indices=True, implementation=function, **WINDOW)
        y, at = transform(f)(x)
        assert (y.dtype, at.dtype) == (dtype, np.int32)
        np.testing.assert_array_equal(at, expected)
        planes = np.moveaxis(x, 3, 1).reshape(2, 2, -1)
        chosen = np.take_along_axis(planes, np.moveaxis(expected, 3, 1).reshape(2, 2, -1), 2)
        np.testing.assert_array_equal(np.moveaxis(np.asarray(y), 3, 1).reshape(2, 2, -1), chosen)
        back = transform(lambda y, at: jax_mps.max_unpool(y, at, (7, 6), implementation=function))(y, at)
        assert back.dtype == dtype
        np.testing.assert_array_equal(np.asarray(back)[back != 0], x[np.asarray(back) != 0])


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_no_kernel_for_64_bits(dtype, native, x64):
    x = np.ones((1, 4, 4, 1), dtype)
    with pytest.raises(ValueError, match=f"'native' cannot be had: dtype {dtype} has no native kernel"):
        jax.jit(lambda x: jax_mps.max_pool(x, 2, strides=2, implementation="native")).lower(x)


@pytest.mark.parametrize("dtype", WIDTHS)
def test_indices_of_any_width(dtype, implementation, x64):
    y, at = jax_mps.max_pool(oracle.distinct((2, 6, 4, 2)), (2, 2), strides=2, return_indices=True)
    f = functools.partial(jax_mps.max_unpool, output_shape=(6, 4), implementation=implementation)
    expected, pull_back = jax.vjp(lambda y: f(y, at), y)
    actual, pull_back_too = jax.vjp(lambda y: f(y, at.astype(dtype)), y)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(pull_back_too(actual)[0], pull_back(expected)[0])


@pytest.mark.parametrize(
    ("dtype", "outside"),
    [("int64", 2**32), ("int64", -(2**32) + 1), ("uint64", 2**64 - 1), ("uint32", 2**31), ("int8", -1)],
)
def test_indices_outside_are_dropped(dtype, outside, implementation, x64):
    at = np.array([outside, 2], dtype).reshape(1, 2, 1)
    y = np.ones((1, 2, 1), np.float32)
    actual = jax_mps.max_unpool(y, at, (4,), implementation=implementation)
    np.testing.assert_array_equal(np.ravel(actual), [0, 0, 1, 0])


@pytest.mark.parametrize("dtype", FLOAT8)
def test_maxima_of_8_bits(dtype, implementation):
    if not hasattr(jnp, dtype):
        pytest.skip(f"this JAX has no {dtype}")
    every = lax.bitcast_convert_type(jnp.arange(256, dtype=jnp.uint8), jnp.dtype(dtype))
    x = jnp.asarray(np.random.default_rng(0).permutation(256), np.int32)
    x = every[x].reshape(1, 16, 16, 1)
    f = functools.partial(jax_mps.max_pool, implementation=implementation, **WINDOW)
    wide = x.astype(np.float32)
    y, at = f(x, return_indices=True)
    expected, where = f(wide, return_indices=True)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y.astype(np.float32), expected)
    np.testing.assert_array_equal(at, where)
    g = jnp.ones(y.shape, dtype)
    (dx,), (expected,) = jax.vjp(f, x)[1](g), jax.vjp(f, wide)[1](g.astype(np.float32))
    assert dx.dtype == x.dtype
    np.testing.assert_array_equal(dx.astype(np.float32), expected)
    kernel = jax_mps.max_pool_gradient(g, x, implementation=implementation, **WINDOW)
    np.testing.assert_array_equal(kernel.astype(np.float32), expected)


def complex_array(shape, seed=0):
    return (oracle.normal(shape, seed=seed) + 1j * oracle.normal(shape, seed=seed + 100)).astype(np.complex64)


def check_complex(ours, stock, *operands):
    """Value, tangent, gradient, and the gradient's tangent, with the conventions of JAX."""

    def everything(f):
        def gradient(*x):
            return jax.vjp(f, *x)[1](f(*x))

        return f(*operands), jax.jvp(f, operands, operands), jax.jvp(gradient, operands, operands)

    found, wanted = jax.tree.leaves(everything(ours)), jax.tree.leaves(everything(stock))
    for actual, expected in zip(found, wanted, strict=True):
        assert actual.dtype == np.complex64
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_complex_averages(implementation):
    def stock(x):
        zero = np.complex64(0)
        return lax.reduce_window(x, zero, lax.add, (1, 3, 2, 1), (1, 2, 1, 1), "VALID") / np.complex64(6)

    options = {"window_shape": (3, 2), "strides": (2, 1), "implementation": implementation}
    x = complex_array((2, 7, 6, 2))
    check_complex(functools.partial(jax_mps.avg_pool, **options), stock, x)
    g = stock(x)
    np.testing.assert_allclose(
        jax_mps.avg_pool_gradient(g, x.shape, **options), jax.vjp(stock, x)[1](g)[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ["conv", "conv_transpose"])
def test_complex_convolutions(name, groups, implementation):
    numbers = ("NHWC", "HWIO", "NHWC")
    x, kernel = complex_array((2, 6, 5, 4)), complex_array((3, 2, 4 // groups, 6), seed=1)
    if name == "conv":
        options = {"strides": 2}
        stock = functools.partial(
            lax.conv_general_dilated, window_strides=(2, 2), padding="VALID", dimension_numbers=numbers,
            feature_group_count=groups,
        )  # fmt: skip
    else:
        options = {"strides": (2, 3)}
        stock = functools.partial(
            lax.conv_general_dilated, window_strides=(1, 1), padding=((2, 2), (1, 1)), lhs_dilation=(2, 3),
            dimension_numbers=numbers, feature_group_count=groups,
        )  # fmt: skip
    ours = functools.partial(getattr(jax_mps, name), groups=groups, implementation=implementation, **options)
    check_complex(ours, stock, x, kernel)
    if name == "conv_transpose":
        g = ours(x, kernel)
        dx, dk = jax.vjp(stock, x, kernel)[1](g)
        options |= {"groups": groups, "implementation": implementation}
        actual = jax_mps.conv_transpose_gradient_data(g, kernel, x.shape, **options)
        np.testing.assert_allclose(actual, dx, rtol=1e-4, atol=1e-4)
        actual = jax_mps.conv_transpose_gradient_weights(g, x, kernel.shape, **options)
        np.testing.assert_allclose(actual, dk, rtol=1e-4, atol=1e-4)


def test_complex_numbers_beside_real_ones_are_refused():
    x, kernel = np.ones((1, 4, 2), np.complex64), np.ones((3, 2, 2), np.float32)
    with pytest.raises(TypeError, match="kernel must have a dtype of complex64, complex128, got float32"):
        jax_mps.conv(x, kernel)
    with pytest.raises(TypeError, match="x must have a dtype of complex64, complex128, got float32"):
        jax_mps.conv_transpose(kernel=x, x=kernel)
    with pytest.raises(TypeError, match="preferred_element_type of complex operands must be complex64"):
        jax_mps.conv(x, kernel.astype(np.complex64), preferred_element_type=np.float32)


FOUR = np.ones((1, 2, 2, 2, 2, 1), np.float32)
ONES = (1,) * 4


@pytest.mark.parametrize(
    "call",
    [
        lambda: jax_mps.max_pool(FOUR, ONES, strides=1),
        lambda: jax_mps.avg_pool(FOUR, ONES, strides=1),
        lambda: jax_mps.l2_pool(FOUR, ONES, strides=1),
        lambda: jax_mps.max_pool_gradient(FOUR, FOUR, ONES, strides=1),
        lambda: jax_mps.avg_pool_gradient(FOUR, FOUR.shape, ONES, strides=1),
        lambda: jax_mps.l2_pool_gradient(FOUR, FOUR, ONES, strides=1),
        lambda: jax_mps.max_unpool(FOUR, FOUR.astype(np.int32), (2,) * 4),
        lambda: jax_mps.conv(FOUR, np.ones((*ONES, 1, 1), np.float32)),
        lambda: jax_mps.conv_transpose(FOUR, np.ones((*ONES, 1, 1), np.float32)),
        lambda: jax_mps.conv_transpose_gradient_data(FOUR, np.ones((*ONES, 1, 1), np.float32), FOUR.shape),
        lambda: jax_mps.conv_transpose_gradient_weights(FOUR, FOUR, (*ONES, 1, 1)),
        lambda: linen.max_pool(FOUR, ONES),
        lambda: linen.avg_pool(FOUR, ONES),
        lambda: linen.l2_pool(FOUR, ONES),
        lambda: linen.ConvTranspose(1, ONES).init(jax.random.key(0), FOUR),
    ],
)
def test_four_spatial_axes_are_refused(call):
    with pytest.raises(ValueError, match="1 to 3"):
        call()


@pytest.mark.parametrize("function", [jax_mps.conv, jax_mps.conv_transpose])
@pytest.mark.parametrize("real_bias", [False, True])
def test_bias_of_complex_convolutions(function, real_bias, implementation):
    def numbers(shape, seed):
        return jax.lax.complex(*(jnp.asarray(oracle.normal(shape, seed=seed + i)) for i in range(2)))

    x, kernel, bias = numbers((2, 5, 3), 0), numbers((3, 3, 4), 2), numbers((4,), 4)
    bias = bias.real if real_bias else bias
    expected = function(x, kernel) + bias.astype(x.dtype).reshape(1, 1, -1)
    for call in (function, jax.jit(function, static_argnames="implementation")):
        np.testing.assert_allclose(
            call(x, kernel, bias, implementation=implementation), expected, rtol=1e-5, atol=1e-5
        )
        np.testing.assert_allclose(
            call(x, bias=bias, kernel=kernel, implementation=implementation), expected, rtol=1e-5, atol=1e-5
        )
