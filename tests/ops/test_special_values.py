"""Ties, NaN, infinities, signed zeros, and sums that half precision would lose."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grid
import jax_mps
import oracle

nan, inf = np.nan, np.inf


def row(*values, dtype=np.float32):
    return np.array(values, dtype).reshape(1, -1, 1)


def max_pool_and_vjp(x, g, implementation, **call):
    """Values, positions, reverse and forward mode and the gradient function, all of one call."""
    pool = functools.partial(jax_mps.max_pool, **call, implementation=implementation)
    y, indices = pool(x, return_indices=True)
    np.testing.assert_array_equal(y, pool(x))
    dx = jax.vjp(pool, x)[1](g)[0]
    np.testing.assert_array_equal(dx, jax_mps.max_pool_gradient(g, x, **call, implementation=implementation))
    return y, indices, dx


# --- ties ---------------------------------------------------------------------------------------------


def test_ties_in_a_row(implementation):
    y, indices, dx = max_pool_and_vjp(
        row(1, 3, 3, 2, 0), row(10, 20, 30), implementation, window_shape=3, strides=2, padding=1
    )
    np.testing.assert_array_equal(y.ravel(), [3, 3, 2])
    np.testing.assert_array_equal(indices.ravel(), [1, 1, 3])
    np.testing.assert_array_equal(dx.ravel(), [0, 30, 0, 30, 0])


def test_ties_choose_the_first_in_row_major_order(implementation):
    x = np.array([[1, 2, 0], [2, 2, 2], [0, 2, 1]], np.float32).reshape(1, 3, 3, 1)
    g = np.ones((1, 1, 1, 1), np.float32)
    _, indices, dx = max_pool_and_vjp(x, g, implementation, window_shape=3, strides=1)
    assert indices.item() == 1
    np.testing.assert_array_equal(dx.ravel(), [0, 1, 0, 0, 0, 0, 0, 0, 0])


def test_a_column_does_not_come_before_a_row(implementation):
    """The first maximum is in the lower left in one order of the axes, in the upper right in the other."""
    x = np.array([[0, 5], [5, 0]], np.float32).reshape(1, 2, 2, 1)
    _, indices, _ = max_pool_and_vjp(
        x, np.ones((1, 1, 1, 1), np.float32), implementation, window_shape=2, strides=1
    )
    assert indices.item() == 1


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "int8", "uint8", "int32"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    ("sizes", "channels", "window", "strides"),
    [
        ((13, 19), 3, (9, 7), (2, 3)),
        ((14, 14), 16, (11, 11), (1, 1)),
        ((9, 8, 10), 5, (4, 5, 3), (1, 1, 1)),
        ((11, 50, 6), 1, (6, 6, 6), (4, 4, 4)),
        ((33, 80), 2, (16, 40), (17, 40)),
        ((300,), 1, (300,), (1,)),
    ],
)
def test_ties_in_large_windows(sizes, channels, window, strides, data_format, dtype, native, x64):
    """Few different numbers, so every window has ties; kernels may reduce rows or columns first."""
    rng = np.random.default_rng(0)
    numbers = [-inf, -1, -0.0, 0, inf, nan] if "float" in dtype else [0, 1, 2, 100]
    shares = [0.5, 0.2, 0.14, 0.14, 0.01, 0.01] if "float" in dtype else [0.4, 0.4, 0.19, 0.01]
    x = rng.choice(numbers, (2, *sizes, channels), p=shares).astype(jnp.dtype(dtype))
    x[0, ..., 0] = numbers[0]
    x = x if data_format == "channels_last" else np.moveaxis(x, -1, 1)
    call = {"strides": strides, "padding": [(1, 0)] * len(sizes), "data_format": data_format}
    expected, position = oracle.max_pool(x.astype(np.float64), window, **call)
    y, indices = jax_mps.max_pool(x, window, **call, return_indices=True, implementation="native")
    y = np.asarray(y).astype(np.float64)
    np.testing.assert_array_equal(indices, position)
    np.testing.assert_array_equal(y, expected)
    zero = expected == 0
    np.testing.assert_array_equal(np.signbit(y[zero]), np.signbit(expected[zero]))


@pytest.mark.parametrize("data_format", grid.FORMATS)
@pytest.mark.parametrize(
    "name", ["stem", "aspp", "nine", "blocks", "five", "volume-padded", "volume-long", "global"]
)
def test_ties_after_a_relu(name, data_format, implementation):
    """And of constant images, where all pixels tie."""
    case = grid.CASES[name]
    shape, call = case.shape(data_format), {**case.geometry, "data_format": data_format}

    @jax.jit
    def run(x, g):
        def pool(x):
            return jax_mps.max_pool(
                x, case.window_shape, **call, return_indices=True, implementation=implementation
            )

        _, vjp, indices = jax.vjp(pool, x, has_aux=True)
        return indices, vjp(g)[0]

    for x in (oracle.tied(shape), np.zeros(shape, np.float32), np.full(shape, -2, np.float32)):
        expected, position = oracle.max_pool(x, case.window_shape, **call)
        g = oracle.normal(expected.shape)
        indices, dx = run(x, g)
        oracle.assert_same(indices, position)
        expected = oracle.max_pool_gradient(g, x, case.window_shape, **call)
        oracle.assert_close(dx, expected, length=case.taps, scale=float(np.abs(g).max()) * case.taps)


@pytest.mark.parametrize("dtype", grid.INTEGERS)
def test_ties_of_integers(dtype, implementation):
    x = oracle.tied((2, 9, 8, 3)).astype(dtype)
    _, indices = jax_mps.max_pool(
        x, 3, strides=2, padding=1, return_indices=True, implementation=implementation
    )
    oracle.assert_same(indices, oracle.max_pool(x, (3, 3), strides=2, padding=1)[1])


def test_zeros_of_either_sign_are_equal(implementation):
    g = row(1, 1)
    for x in (row(-0.0, 0.0, 0.0, -0.0), row(0.0, -0.0, -0.0, 0.0)):
        y, indices, dx = max_pool_and_vjp(x, g, implementation, window_shape=2, strides=2)
        np.testing.assert_array_equal(y.ravel(), [0, 0])
        np.testing.assert_array_equal(indices.ravel(), [0, 2])
        np.testing.assert_array_equal(dx.ravel(), [1, 0, 1, 0])


# --- NaN and infinities -------------------------------------------------------------------------------


def test_nan_propagates_and_the_first_nan_takes_the_gradient(implementation):
    """PyTorch sends the gradient to the last NaN, XLA to an element that is none."""
    x = row(1, nan, 5, nan, 7)
    y, indices, dx = max_pool_and_vjp(x, row(1, 10, 100), implementation, window_shape=3, strides=1)
    np.testing.assert_array_equal(y.ravel(), [nan, nan, nan])
    np.testing.assert_array_equal(indices.ravel(), [1, 1, 3])
    np.testing.assert_array_equal(dx.ravel(), [0, 11, 0, 100, 0])


@pytest.mark.parametrize("dtype", grid.FLOATS)
@pytest.mark.parametrize("name", ["stem", "nine", "aspp"])
def test_nan_and_infinities_anywhere(name, dtype, implementation, x64):
    case = grid.CASES[name]
    rng = np.random.default_rng(3)
    shape = case.shape("channels_last")
    kinds = [nan, -nan, inf, -inf, 0.0, -0.0, 1.0, -1.0]
    x = rng.choice(kinds, size=shape, p=[0.05, 0.05, 0.05, 0.4, 0.1, 0.1, 0.1, 0.15]).astype(jnp.dtype(dtype))

    @jax.jit
    def run(x, g):
        pool = functools.partial(
            jax_mps.max_pool, window_shape=case.window_shape, **case.geometry, implementation=implementation
        )
        return pool(x), *pool(x, return_indices=True), jax.vjp(pool, x)[1](g)[0]

    expected, position = oracle.max_pool(x, case.window_shape, **case.geometry)
    assert np.isnan(expected).any()
    assert np.isfinite(expected).any()
    g = np.random.default_rng(4).integers(-4, 5, size=expected.shape).astype(x.dtype)
    plain, y, indices, dx = run(x, g)
    oracle.assert_same(plain, expected)
    oracle.assert_same(y, expected)
    oracle.assert_same(indices, position)
    oracle.assert_same(dx, oracle.max_pool_gradient(g, x, case.window_shape, **case.geometry))


@pytest.mark.parametrize("data_format", grid.FORMATS)
@pytest.mark.parametrize("name", ["values", "indices", "adaptive", "fractional"])
def test_nan_propagates_in_larger_images(name, data_format, implementation):
    """XLA's CPU code reduces those in another way than small ones, which loses NaN."""
    x = np.random.default_rng(0).normal(size=(4, 64, 64, 8)).astype(np.float32)
    x[np.random.default_rng(1).random(x.shape) < 0.05] = nan
    expected = x.reshape(4, 32, 2, 32, 2, 8).max((2, 4))
    samples = jnp.zeros((4, 8, 2))
    call = {"data_format": data_format, "implementation": implementation}
    pool = {
        "values": lambda x: jax_mps.max_pool(x, 2, strides=2, **call),
        "indices": lambda x: jax_mps.max_pool(x, 2, strides=2, return_indices=True, **call)[0],
        "adaptive": lambda x: jax_mps.adaptive_max_pool(x, (32, 32), **call),
        "fractional": lambda x: jax_mps.fractional_max_pool(x, 2, (32, 32), samples, **call),
    }[name]
    if data_format == "channels_first":
        x, expected = np.moveaxis(x, -1, 1), np.moveaxis(expected, -1, 1)
    np.testing.assert_array_equal(jax.jit(pool)(x), expected)


@pytest.mark.parametrize("dtype", grid.FLOATS)
def test_padding_never_wins_against_minus_infinity(dtype, implementation, x64):
    x = row(-inf, -inf, -inf, -inf, dtype=jnp.dtype(dtype))
    g = row(1, 2, dtype=jnp.dtype(dtype))
    y, indices, dx = max_pool_and_vjp(x, g, implementation, window_shape=3, strides=2, padding=1)
    np.testing.assert_array_equal(y.astype(np.float32).ravel(), [-inf, -inf])
    np.testing.assert_array_equal(indices.ravel(), [0, 1])
    np.testing.assert_array_equal(dx.astype(np.float32).ravel(), [1, 2, 0, 0])


@pytest.mark.parametrize(
    "name", ["stem", "nine", "aspp", "volume-padded", "larger-than-image", "dilated-holes", "wide"]
)
def test_images_of_minus_infinity(name, implementation):
    case = grid.CASES[name]
    x = np.full(case.shape("channels_last"), -inf, np.float32)
    _, position = oracle.max_pool(x, case.window_shape, **case.geometry)
    _, indices = jax_mps.max_pool(
        x, case.window_shape, **case.geometry, return_indices=True, implementation=implementation
    )
    oracle.assert_same(indices, position)
    g = np.ones(position.shape, np.float32)
    dx = jax_mps.max_pool_gradient(g, x, case.window_shape, **case.geometry, implementation=implementation)
    assert dx.sum() == g.sum()


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "bool"])
def test_images_of_the_lowest_number(dtype, implementation):
    lowest = False if dtype == "bool" else np.iinfo(dtype).min
    x = np.full((1, 5, 5, 2), lowest, dtype)
    y, indices = jax_mps.max_pool(
        x, 3, strides=2, padding=1, return_indices=True, implementation=implementation
    )
    oracle.assert_same(y, np.full((1, 3, 3, 2), lowest, dtype))
    oracle.assert_same(indices, oracle.max_pool(x, (3, 3), strides=2, padding=1)[1])


def test_an_infinite_gradient_stays_with_its_maximum(implementation):
    dx = jax_mps.max_pool_gradient(
        row(inf, nan), row(1, 2, 4, 3), 2, strides=2, implementation=implementation
    )
    np.testing.assert_array_equal(dx.ravel(), [0, inf, nan, 0])


@pytest.mark.parametrize("op", [grid.AVERAGE, grid.L2], ids=str)
def test_nan_and_infinity_stay_in_their_windows(op, implementation):
    """Neither leaks into a neighbour through a running sum, nor through padding."""
    x = row(1, 2, nan, 4, inf, 6, -inf, 8, 2, 2)
    y = np.asarray(op.pool(x, 2, strides=1, padding=1, implementation=implementation)).ravel()
    expected = {
        "average": [0.5, 1.5, nan, nan, inf, inf, -inf, -inf, 5, 2, 1],
        "l2": [1, 5**0.5, nan, nan, inf, inf, inf, inf, 68**0.5, 8**0.5, 2],
    }[op.name]
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_opposite_infinities_average_to_nan(implementation):
    y = jax_mps.avg_pool(row(inf, -inf, 1, 1), 2, strides=2, implementation=implementation)
    np.testing.assert_array_equal(y.ravel(), [nan, 1])


# --- L2 beyond the range of squares -------------------------------------------------------------------

RANGES = [
    ("float32", 1e20),
    ("float32", 3e38),
    ("float32", 1e-30),
    ("float32", 1e-37),  # XLA flushes what is smaller than 1.2e-38
    ("float16", 300.0),
    ("float16", 30000.0),
    ("float16", 1e-4),
    ("bfloat16", 1e20),
    ("bfloat16", 3e38),
    ("bfloat16", 1e-30),
    ("float64", 1e200),
    ("float64", 1e-200),
    ("float64", 1e-300),
]


@pytest.mark.parametrize(("dtype", "size"), RANGES)
def test_l2_of_extreme_numbers(dtype, size, implementation, x64):
    """Windows of [3, 4] / 5 times a size whose square cannot be held, beside ordinary windows."""
    x = row(0.6 * size, -0.8 * size, 3, 4, 0, 0, 0.8 * size, 0, dtype=jnp.dtype(dtype))
    pool = functools.partial(jax_mps.l2_pool, window_shape=2, strides=2, implementation=implementation)
    y, vjp = jax.vjp(pool, x)
    expected = oracle.l2_pool(x, (2,), strides=2)
    np.testing.assert_allclose(
        np.asarray(y, np.float64).ravel(), expected.ravel(), rtol=oracle.tolerance(dtype, 2)
    )
    ones = np.ones(y.shape, x.dtype)
    expected = oracle.l2_pool_gradient(ones, x, (2,), strides=2)
    for dx in (vjp(ones)[0], jax_mps.l2_pool_gradient(ones, x, 2, strides=2, implementation=implementation)):
        np.testing.assert_allclose(
            np.asarray(dx, np.float64).ravel(), expected.ravel(), rtol=oracle.tolerance(dtype, 2)
        )
    _, tangent = jax.jvp(pool, (x,), (np.ones_like(x),))
    np.testing.assert_allclose(
        np.asarray(tangent, np.float64).ravel(), [-0.2, 1.4, 0, 1], rtol=8 * oracle.tolerance(dtype, 2)
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "exponents", [(0, 19), (-30, 0), (-30, 30), (-21, -19), (17, 20), (-12, -13), (8, 9)], ids=str
)
def test_l2_of_mixed_sizes(exponents, dtype, implementation, x64):
    """One window holds numbers of very different sizes, on either side of any threshold for scaling."""
    rng = np.random.default_rng(0)
    power = rng.uniform(*sorted(exponents), size=(2, 9, 9, 4)) * (6 if dtype == "float64" else 1)
    x = (rng.choice([-1, 1], size=power.shape) * 10.0**power).astype(dtype)
    y = jax_mps.l2_pool(x, 3, strides=2, padding=1, implementation=implementation)
    expected = oracle.l2_pool(x, (3, 3), strides=2, padding=1)
    np.testing.assert_allclose(y, expected, rtol=oracle.tolerance(dtype, 9))


@pytest.mark.parametrize("channels", [128, 100, 37])
@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [("bfloat16", e) for e in (-126, -100, -63, -60, -40, -39, 0, 59, 60, 63, 64, 120)]
    + [("float16", e) for e in (-24, -14, -12, 0, 12)],
)
def test_l2_of_one_channel_of_another_size(dtype, exponent, channels, implementation):
    """A vector of sums holds one whose squares vanish or overflow, beside ordinary ones and some of zeros."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 9, 9, channels))
    x[..., 30:34] = 0
    x[0, :, :, 35] = rng.uniform(1, 2, (9, 9)) * 2.0**exponent
    x[1, 2:5, :, 36] = rng.uniform(1, 2, (3, 9)) * 2.0**exponent
    x = x.astype(jnp.dtype(dtype))
    for window, strides in ((3, 2), (2, 1), (9, 9)):
        y = jax_mps.l2_pool(x, window, strides=strides, implementation=implementation)
        expected = oracle.l2_pool(x, (window, window), strides=strides)
        half_a_step = 2.0**-25 if dtype == "float16" else 0  # between the smallest numbers
        np.testing.assert_allclose(
            np.asarray(y, np.float64),
            expected,
            rtol=oracle.tolerance(dtype, window * window),
            atol=half_a_step,
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_l2_of_infinity_and_nan_among_channels(dtype, implementation):
    x = np.ones((1, 3, 3, 64), jnp.dtype(dtype))
    x[0, 1, 1, 3], x[0, 1, 1, 40], x[0, 0, 1, 41], x[0, 0, 0, 41] = inf, nan, -inf, nan
    expected = np.full(64, 3.0)
    expected[3], expected[40], expected[41] = inf, nan, nan
    y = jax_mps.l2_pool(x, 3, strides=3, implementation=implementation)
    np.testing.assert_array_equal(np.asarray(y, np.float64).ravel(), expected)


def test_l2_of_infinity_and_nan(implementation):
    x = row(inf, 1, -inf, inf, nan, 1, 1, 1)
    y = jax_mps.l2_pool(x, 2, strides=2, implementation=implementation)
    np.testing.assert_allclose(y.ravel(), [inf, inf, nan, 2**0.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "size", "gradient"),
    [
        ("float32", 1e-30, 1e10),
        ("float32", 1, 1e38),
        ("float32", 1e-3, 1e30),
        ("float32", 1e30, 1e-30),
        ("float32", 1e-30, 1e-30),
        ("float64", 1, 1e300),
        ("float64", 1e-300, 1e10),
        ("float64", 1e300, 1e-20),
        ("float64", 1e300, 1e300),
    ],
)
@pytest.mark.parametrize("strides", [1, 2])
def test_l2_gradient_beyond_the_range_of_its_quotient(dtype, size, gradient, strides, implementation, x64):
    """Gradient over norm leaves the range of the type before the pixel brings it back."""
    x = row(3 * size, 4 * size, 3, 4, 0, 0, 3 * size, 4 * size, dtype=dtype)
    g = row(*[gradient, 0, 1, 0, 1, 0, gradient][::strides], dtype=dtype)
    dx = jax_mps.l2_pool_gradient(g, x, 2, strides=strides, implementation=implementation)
    expected = [0.6 * gradient, 0.8 * gradient, 0.6, 0.8, 0, 0, 0.6 * gradient, 0.8 * gradient]
    np.testing.assert_allclose(dx.ravel(), expected, rtol=1e-6)


def test_l2_second_derivatives_beyond_the_range_of_a_factor(implementation):
    """A gradient over a norm that float16 cannot hold, though it holds what comes of it."""
    x, g, t = (row(*a, dtype=np.float16) for a in ((1e-2, 1e-5), (100,), (16, 0)))
    gradient = functools.partial(
        jax_mps.l2_pool_gradient, window_shape=2, strides=2, implementation=implementation
    )
    _, second = jax.jvp(lambda x: gradient(g, x), (x,), (t,))
    np.testing.assert_allclose(second[0, 1, 0], -160, rtol=1e-2)


@pytest.mark.parametrize("strides", [1, 2])
def test_l2_gradient_of_subnormal_norms_in_float64(strides, native, x64):
    x = np.repeat(row(3, 4, dtype=np.float64) * 2.0**-1070, 17, axis=2)
    x = np.concatenate([x, np.ones_like(x)], axis=1)
    g = np.ones((1, 3, 17))[:, ::strides]
    dx = jax_mps.l2_pool_gradient(g, x, 2, strides=strides, implementation="native")
    expected = oracle.l2_pool_gradient(g, x, (2,), strides=strides)
    np.testing.assert_allclose(dx, expected, rtol=1e-15)


@pytest.mark.parametrize("dtype", grid.FLOATS)
@pytest.mark.parametrize("data_format", grid.FORMATS)
@pytest.mark.parametrize("window", [(2, 2), (3, 1)], ids=str)
def test_l2_gradient_of_pixels_that_no_window_reads(window, data_format, dtype, implementation, x64):
    """It is 0, whatever they are, and finite at their neighbours."""
    x = np.full((2, 9, 8, 17), 3.0)
    call = {"strides": (4, 3), "padding": ((1, 0), (0, -1))}
    g = np.ones_like(oracle.l2_pool(x, window, **call))
    expected = oracle.l2_pool_gradient(g, x, window, **call)
    rng = np.random.default_rng(0)
    x = np.where(expected == 0, rng.choice([nan, inf, -inf], x.shape), x).astype(jnp.dtype(dtype))
    if data_format == "channels_first":
        x, expected = (np.moveaxis(a, -1, 1) for a in (x, expected))
    pool = functools.partial(
        jax_mps.l2_pool, window_shape=window, **call, data_format=data_format, implementation=implementation
    )
    y, pull_back = jax.vjp(pool, x)
    oracle.assert_close(pull_back(jnp.ones_like(y))[0], expected, length=4)


@pytest.mark.parametrize("channels", [3, 128])
@pytest.mark.parametrize("strides", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_l2_gradient_with_channels_beyond_the_range_of_quotients(dtype, strides, channels, implementation):
    """In one image a channel's quotients overflow and another's lose digits, beside ordinary ones."""
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 2, (2, 9, 40, channels))
    g = rng.uniform(1, 2, jax.eval_shape(lambda x: jax_mps.l2_pool(x, 3, strides=strides), x).shape)
    x[1, ..., 1] *= 1e-30
    g[1, ..., 1] *= 1e10
    x[1, 3:, :, 2] *= 1e30
    g[1, 3 // strides :, :, 2] *= 1e-12
    x, g = (a.astype(jnp.dtype(dtype)) for a in (x, g))
    dx = jax_mps.l2_pool_gradient(g, x, 3, strides=strides, implementation=implementation)
    expected = oracle.l2_pool_gradient(g, x, (3, 3), strides=strides)
    np.testing.assert_allclose(np.asarray(dx, np.float64), expected, rtol=oracle.tolerance(dtype, 9))


# --- sums in half precision ---------------------------------------------------------------------------

HALVES = ("float16", "bfloat16")


@pytest.mark.parametrize("dtype", HALVES)
def test_the_mean_of_many_ones_is_one(dtype, implementation):
    ones = jnp.ones((1, 1024, 1), dtype)
    y, vjp = jax.vjp(lambda x: jax_mps.avg_pool(x, 1024, strides=1, implementation=implementation), ones)
    assert y.item() == 1
    np.testing.assert_array_equal(vjp(y)[0].astype(np.float32), np.full((1, 1024, 1), 2.0**-10))


@pytest.mark.parametrize("dtype", HALVES)
def test_the_gradient_of_many_overlapping_means_is_one(dtype, implementation):
    """Each inner pixel lies in 1024 windows and takes 1/1024 from each."""
    shape = (1, 70, 70, 2)
    g = jnp.ones((1, 39, 39, 2), dtype)
    for dx in (
        jax_mps.avg_pool_gradient(g, shape, 32, strides=1, implementation=implementation),
        jax.vjp(
            lambda x: jax_mps.avg_pool(x, 32, strides=1, implementation=implementation),
            jnp.ones(shape, dtype),
        )[1](g)[0],
    ):
        assert dx.dtype == dtype
        np.testing.assert_array_equal(dx[:, 31:39, 31:39].astype(np.float32), np.ones((1, 8, 8, 2)))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("stride", [1, 3, 64])
def test_wide_windows(stride, dtype, implementation):
    x = oracle.normal((1, 80, 70, 2), jnp.dtype(dtype)) + jnp.asarray(1, dtype)
    x = np.asarray(x)
    y = jax_mps.avg_pool(x, 64, strides=stride, implementation=implementation)
    views = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (64, 64), axis=(1, 2))
    oracle.assert_close(y, views[:, ::stride, ::stride].mean(axis=(-2, -1)), length=64 * 64)
    z = jax_mps.l2_pool(x, 64, strides=stride, implementation=implementation)
    expected = np.sqrt((views[:, ::stride, ::stride] ** 2).sum(axis=(-2, -1)))
    oracle.assert_close(z, expected, length=64 * 64)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_gradient_of_many_overlapping_maxima(dtype, implementation):
    """512 windows choose the same pixel; the sum of their gradients is rounded once."""
    x = np.zeros((1, 1023, 1), jnp.dtype(dtype))
    x[0, 511] = 1
    g = np.full((1, 512, 1), 1.0 + 2.0**-7, x.dtype)
    dx = jax_mps.max_pool_gradient(g, x, 512, strides=1, implementation=implementation)
    np.testing.assert_array_equal(np.flatnonzero(dx), [511])
    assert float(dx[0, 511, 0]) == 516


@pytest.mark.parametrize("dtype", HALVES)
def test_sums_that_overflow_half_precision(dtype, implementation):
    x = np.full((1, 64, 1), 6e4 if dtype == "float16" else 3e38, jnp.dtype(dtype))
    y = jax_mps.avg_pool(x[:, :4] / x.dtype.type(4), 4, strides=4, implementation=implementation)
    oracle.assert_close(y, x[:, :1].astype(np.float64) / 4)
    if dtype == "float16":
        y = jax_mps.avg_pool(x, 64, strides=64, implementation=implementation)
        oracle.assert_close(y, x[:, :1])


def test_long_sums_in_float32(implementation):
    """2**20 terms that differ by much; the reference is float64."""
    x = np.abs(oracle.normal((1, 2**20, 1))) ** 8
    y = jax_mps.avg_pool(x, 2**20, strides=1, implementation=implementation)
    np.testing.assert_allclose(y.item(), x.astype(np.float64).mean(), rtol=oracle.tolerance("float32", 2**20))


def test_divisors_beyond_the_exact_integers_of_half_precision(implementation):
    """4099 taps are no float16 number; the divisor must not be rounded to one."""
    x = np.full((1, 4099, 1), 1000.0, np.float16)
    y = jax_mps.avg_pool(
        x, 4099, strides=1, padding=0, count_include_pad=False, implementation=implementation
    )
    assert y.item() == 1000
    y = jax_mps.avg_pool(x, 4099, strides=1, divisor_override=4099 * 2, implementation=implementation)
    assert y.item() == 500
