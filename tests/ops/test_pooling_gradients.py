"""The documented gradient kernels, `jax.vjp` and `jax.jvp` against the oracle, and higher orders."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import grid
import jax_mps
import oracle

OPS = (grid.MAX, grid.AVERAGE, grid.EXCLUDING, grid.L2)


@functools.cache
def derivatives(name, data_format, implementation):
    """All functions' derivatives in one compiled program: images, gradients, tangents and results."""
    case = grid.CASES[name]
    shape = case.shape(data_format)
    call = {**case.geometry, "data_format": data_format, "implementation": implementation}
    outs = tuple(a.windows for a in oracle.lines(case.sizes, case.window_shape, **case.geometry))
    images = {op.name: op.image(shape, np.float32) for op in OPS}
    g = oracle.normal(case._replace(sizes=outs).shape(data_format), seed=1)
    t = oracle.normal(shape, seed=2)

    @jax.jit
    def run(images, g, t):
        results = {}
        for op in OPS:
            x = images[op.name]
            pool = functools.partial(op.pool, window_shape=case.window_shape, **call, **op.options)
            results[op.name] = {
                "vjp": jax.vjp(pool, x)[1](g)[0],
                "documented": op.gradient(g, x, case.window_shape, **call, **op.options),
                "jvp": jax.jvp(pool, (x,), (t,))[1],
            }
        return results

    return images, g, t, run(images, g, t)


def tangent(op, x, t, window_shape, data_format, **call):
    """The derivative of pooling `x` in the direction `t`."""
    if op is grid.MAX:  # the tangent at the maximum
        rank = len(window_shape)
        start = oracle.start_of(x.ndim, rank, data_format)
        _, position = oracle.max_pool(x, window_shape, data_format=data_format, **call)
        directions, at = (oracle.spatial_first(a, start, rank) for a in (t, position))
        chosen = np.take_along_axis(directions.reshape(-1, at.shape[-1]), at.reshape(-1, at.shape[-1]), 0)
        return oracle.back(chosen.reshape(at.shape), x.shape, start, rank)
    if op is grid.L2:  # central differences in float64
        h, x, t = 1e-6, x.astype(np.float64), t.astype(np.float64)
        up, down = (
            oracle.l2_pool(x + s * h * t, window_shape, data_format=data_format, **call) for s in (1, -1)
        )
        return (up - down) / (2 * h)
    return op.oracle_pool(t, window_shape, data_format=data_format, **call)  # linear


@pytest.mark.parametrize("op", OPS, ids=str)
@grid.each_case
def test_first_derivatives(name, data_format, op, implementation):
    case = grid.CASES[name]
    images, g, t, results = derivatives(name, data_format, implementation)
    x, call = images[op.name], {**case.geometry, **op.options, "data_format": data_format}
    expected = op.oracle_gradient(g, x, case.window_shape, **call)
    scale = op.gradient_error(g, x, case.window_shape, **call)
    for kind in ("vjp", "documented"):
        oracle.assert_close(results[op.name][kind], expected, length=case.taps, scale=scale)
    scale = op.pool_error(t, case.window_shape, **call)
    expected = tangent(op, x, t, case.window_shape, **call)
    oracle.assert_close(results[op.name]["jvp"], expected, length=case.taps, scale=scale)


@pytest.mark.parametrize("name", ["stem", "nine-s2", "volume-ceil"])
@pytest.mark.parametrize("op", grid.FAMILIES, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_dtypes(dtype, op, name, implementation, x64):
    case = grid.CASES[name]
    call = {**case.geometry, **op.options}
    x = op.image(case.shape("channels_last"), jnp.dtype(dtype))
    g = oracle.normal(op.oracle_pool(x, case.window_shape, **call).shape, jnp.dtype(dtype), seed=1)
    t = oracle.normal(x.shape, jnp.dtype(dtype), seed=2)

    @jax.jit
    def run(x, g, t):
        pool = functools.partial(
            op.pool, window_shape=case.window_shape, **call, implementation=implementation
        )
        gradient = op.gradient(g, x, case.window_shape, **call, implementation=implementation)
        return jax.vjp(pool, x)[1](g)[0], gradient, jax.jvp(pool, (x,), (t,))[1]

    *gradients, tangent = run(x, g, t)
    expected = op.oracle_gradient(g, x, case.window_shape, **call)
    scale = op.gradient_error(g, x, case.window_shape, **call)
    for dx in gradients:
        assert dx.dtype == dtype
        oracle.assert_close(dx, expected, length=case.taps, scale=scale)
    assert tangent.dtype == dtype
    # Forward and reverse mode are each other's transpose.
    product = np.sum(np.asarray(tangent, np.float64) * np.asarray(g, np.float64))
    np.testing.assert_allclose(
        product,
        np.sum(expected * np.asarray(t, np.float64)),
        atol=oracle.tolerance(dtype) * np.abs(expected).sum() * 4,
    )


# --- higher orders ------------------------------------------------------------------------------------

SMALL = {
    "1d": grid.Case((7,), (3,), (2,), 1),
    "1d-crop": grid.Case((9,), (2,), (2,), ((-1, 2),), (3,)),
    "2d": grid.Case((5, 4), (2, 3), (2, 1), ((0, 1), (1, 1)), (3, 1), True),
    "3d": grid.Case((2, 3, 4), (2, 2, 2), (1, 1, 2), ((0, 0), (1, 0), (0, 0))),
    "nine": grid.Case((11,), (9,), (1,), 2),
}


def smooth_image(op, shape):
    """Numbers whose derivatives are ordinary: no ties near a maximum, no norms near 0."""
    x = oracle.distinct(shape, np.float64)
    gap = np.diff(np.sort(x.ravel())).min()
    assert gap > 0.1, "a finite difference may change which number is the maximum"
    return x if op is grid.MAX else x / 3 + 0.5


ORDERS = [
    *((op, "1d", 3) for op in grid.FAMILIES),
    *((op, "2d", 2) for op in (*grid.FAMILIES, grid.EXCLUDING)),
    (grid.MAX, "nine", 2),
]
MORE_ORDERS = [
    (op, name, 2) for op in grid.OPS for name in SMALL if (op, name, 2) not in ORDERS and name != "1d"
]


@pytest.mark.parametrize(
    ("op", "name", "order"),
    [*ORDERS, *(pytest.param(*call, marks=pytest.mark.full) for call in MORE_ORDERS)],
    ids=str,
)
def test_check_grads(op, name, order, implementation, x64):
    case = SMALL[name]
    x = smooth_image(op, case.shape("channels_last", (1,), 2))

    @jax.jit
    def function(x):  # the sine, so that second derivatives do not vanish where pooling is linear
        y = op.pool(x, case.window_shape, **case.geometry, **op.options, implementation=implementation)
        return jnp.sin(y)

    for modes in (["fwd", "rev"],) if order == 2 else (["fwd"], ["rev"]):
        check_grads(function, (x,), order=order, modes=modes, eps=1e-4, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("op", grid.FAMILIES, ids=str)
def test_gradient_functions_differentiate(op, implementation, x64):
    """With respect to the incoming gradient and to the image, to second order."""
    case = SMALL["1d"]
    x = smooth_image(op, case.shape("channels_last", (1,), 1))
    g = oracle.normal(op.oracle_pool(x, case.window_shape, **case.geometry).shape, np.float64)

    @jax.jit
    def function(g, x):
        gradient = op.gradient(
            g, x, case.window_shape, **case.geometry, **op.options, implementation=implementation
        )
        return jnp.sin(gradient)

    check_grads(function, (g, x), order=2, modes=["fwd", "rev"], eps=1e-4, atol=1e-5, rtol=1e-5)


def test_max_pool_gradient_does_not_depend_on_the_image(implementation):
    x, g = oracle.distinct((1, 6, 1)), oracle.normal((1, 3, 1))

    def function(x):
        return jax_mps.max_pool_gradient(g, x, 2, strides=2, implementation=implementation)

    y, tangent = jax.jvp(function, (x,), (np.ones_like(x),))
    assert np.any(y)
    assert not np.any(tangent)
    assert not np.any(jax.vjp(function, x)[1](y)[0])


@pytest.mark.parametrize("op", grid.FAMILIES, ids=str)
def test_gradients_are_linear(op, implementation):
    case = grid.CASES["stem"]
    x = op.image(case.shape("channels_last"), np.float32)
    g, h = (
        oracle.normal(op.oracle_pool(x, case.window_shape, **case.geometry).shape, seed=s) for s in (1, 2)
    )

    def gradient(g):
        return op.gradient(g, x, case.window_shape, **case.geometry, implementation=implementation)

    both, one, other = gradient(2 * g - 3 * h), gradient(g), gradient(h)
    np.testing.assert_allclose(both, 2 * one - 3 * other, atol=1e-5)
    assert np.any(both)
    assert not np.any(gradient(0 * g))


@pytest.mark.parametrize("op", grid.FAMILIES, ids=str)
def test_the_gradient_functions_are_transposes(op, implementation, x64):
    """<gradient(g), t> = <g, jvp(t)>."""
    case = grid.CASES["aspp"]
    x = op.image(case.shape("channels_last"), np.float64)
    pool = functools.partial(
        op.pool, window_shape=case.window_shape, **case.geometry, implementation=implementation
    )
    t = oracle.normal(x.shape, np.float64, seed=1)
    _, tangent = jax.jvp(pool, (x,), (t,))
    g = oracle.normal(tangent.shape, np.float64, seed=2)
    dx = op.gradient(g, x, case.window_shape, **case.geometry, implementation=implementation)
    np.testing.assert_allclose(np.vdot(dx, t), np.vdot(g, tangent), rtol=1e-12)


def hvp_modes(f, x, v):
    """The Hessian times a vector, by every composition of the two modes; the last, twice times it."""
    grad = jax.grad(f)

    def along(x):
        return jax.jvp(f, (x,), (v,))[1]

    return {
        "forward over reverse": jax.jvp(grad, (x,), (v,))[1],
        "reverse over forward": jax.grad(along)(x),
        "reverse over reverse": jax.grad(lambda x: jnp.vdot(grad(x), v))(x),
        "forward over forward": jax.jvp(along, (x,), (v,))[1],
    }


@pytest.mark.parametrize("op", grid.FAMILIES, ids=str)
def test_hessian_vector_products(op, implementation, x64):
    case = SMALL["2d"]
    x = smooth_image(op, case.shape("channels_last", (1,), 2))
    v = oracle.normal(x.shape, np.float64)

    def f(x):
        y = op.pool(x, case.window_shape, **case.geometry, implementation=implementation)
        return jnp.sum(y**3)

    # The reference: central differences of the oracle's gradient.
    def gradient(x):
        y = op.oracle_pool(x, case.window_shape, **case.geometry)
        return op.oracle_gradient(3 * y**2, x, case.window_shape, **case.geometry)

    h = 1e-5
    expected = (gradient(x + h * v) - gradient(x - h * v)) / (2 * h)
    for mode, product in jax.jit(lambda x: hvp_modes(f, x, v))(x).items():
        reference = np.vdot(v, expected) if mode == "forward over forward" else expected
        tolerance = 1e-6 * np.abs(expected).max()
        np.testing.assert_allclose(product, reference, rtol=1e-6, atol=tolerance, err_msg=mode)


def test_l2_hessian(implementation, x64):
    """d2 |x| / dx2 = (1 - x x^T / |x|^2) / |x|."""
    x = np.array([3.0, -4.0, 12.0])

    def norm(x):
        return jax_mps.l2_pool(x.reshape(1, 3, 1), 3, strides=1, implementation=implementation).sum()

    expected = (np.eye(3) - np.outer(x, x) / 169) / 13
    for hessian in (jax.hessian(norm), jax.jacrev(jax.jacrev(norm)), jax.jacrev(jax.jacfwd(norm))):
        np.testing.assert_allclose(hessian(x), expected, rtol=1e-12, atol=1e-15)


def test_l2_at_zero(implementation):
    """The gradient of an all-zero window is 0, whatever its neighbours do; all orders stay finite."""
    x = np.array([0, 0, 0, 3, 4, 0, 0], np.float32).reshape(1, 7, 1)
    g = np.array([5, 7, 10, 11, 13, 17], np.float32).reshape(1, 6, 1)

    def pool(x):
        return jax_mps.l2_pool(x, 2, strides=1, implementation=implementation)

    y, vjp = jax.vjp(pool, x)
    np.testing.assert_array_equal(y[0, :, 0], [0, 0, 3, 5, 4, 0])
    expected = [0, 0, 0, 10 + 11 * 3 / 5, 11 * 4 / 5 + 13, 0, 0]
    np.testing.assert_allclose(vjp(g)[0][0, :, 0], expected, rtol=1e-6)
    documented = jax_mps.l2_pool_gradient(g, x, 2, strides=1, implementation=implementation)
    np.testing.assert_allclose(documented[0, :, 0], expected, rtol=1e-6)
    _, tangent = jax.jvp(pool, (x,), (np.ones_like(x),))
    np.testing.assert_allclose(tangent[0, :, 0], [0, 0, 1, 7 / 5, 1, 0], rtol=1e-6)
    hessian = jax.hessian(lambda x: pool(x).sum())(x)
    assert np.all(np.isfinite(hessian))
    assert not np.any(np.asarray(hessian)[0, :3, 0, 0, :2])


def test_l2_at_zero_everywhere(implementation):
    zeros = np.zeros((1, 4, 4, 2), np.float32)

    def pool(x):
        return jax_mps.l2_pool(x, 2, strides=2, implementation=implementation)

    for function in (pool, jax.grad(lambda x: pool(x).sum()), jax.grad(lambda x: (pool(x) ** 2).sum())):
        out = np.asarray(function(zeros))
        np.testing.assert_array_equal(out, np.zeros_like(out))


@pytest.mark.parametrize("dtype", grid.INTEGERS)
def test_integers_have_float0_tangents(dtype, implementation):
    x = np.ones((1, 4, 1), dtype)
    pool = functools.partial(jax_mps.max_pool, window_shape=2, strides=2, implementation=implementation)
    y, tangent = jax.jvp(pool, (x,), (np.zeros(x.shape, jax.dtypes.float0),))
    assert y.dtype == dtype
    assert tangent.dtype == jax.dtypes.float0
    (dx,) = jax.vjp(pool, x)[1](np.zeros(y.shape, jax.dtypes.float0))
    assert dx.dtype == jax.dtypes.float0


def test_gradient_through_the_values_beside_indices(implementation):
    x, g = oracle.distinct((1, 6, 5, 2)), oracle.normal((1, 2, 2, 2))

    def pool(x):
        return jax_mps.max_pool(x, 3, strides=2, return_indices=True, implementation=implementation)

    dx = jax.vjp(lambda x: pool(x)[0], x)[1](g)[0]
    oracle.assert_close(dx, oracle.max_pool_gradient(g, x, (3, 3), strides=2))
    _, tangents = jax.jvp(pool, (x,), (x,))
    assert tangents[1].dtype == jax.dtypes.float0


def test_the_residual_of_max_pooling_is_one_byte_a_window(implementation):
    """Not the image: what `jax.vjp` keeps is the tap number."""
    x = oracle.normal((2, 16, 16, 4))
    pool = functools.partial(jax_mps.max_pool, window_shape=2, strides=2, implementation=implementation)
    y, vjp = jax.vjp(pool, x)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
    assert kept == y.size


def test_a_network_learns_the_same_on_both_paths(native):
    """Gradients through two poolings and something that is not linear."""

    def loss(x, implementation):
        y = jax_mps.max_pool(jnp.tanh(x), 3, strides=2, padding=1, implementation=implementation)
        y = jax_mps.l2_pool(y, 2, strides=1, implementation=implementation)
        return jnp.sum(jax_mps.avg_pool(y, 2, strides=2, implementation=implementation) ** 2)

    x = oracle.normal((2, 12, 11, 5))
    one, other = (jax.jit(jax.grad(functools.partial(loss, implementation=i)))(x) for i in ("native", "xla"))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", grid.OPS, ids=str)
def test_large_planes(op, implementation):
    """XLA's CPU compiler treats programs above some sizes differently, and has been wrong there."""
    case = grid.Case((64, 128), (3, 3), (2, 2), 1)
    x = op.image((1, 64, 128, 2), np.float32)
    call = {**case.geometry, **op.options}
    g = oracle.normal((1, 32, 64, 2), seed=1)
    pool = functools.partial(op.pool, window_shape=case.window_shape, **call, implementation=implementation)
    dx = jax.vjp(jax.jit(pool), x)[1](g)[0]
    scale = op.gradient_error(g, x, case.window_shape, **call)
    oracle.assert_close(dx, op.oracle_gradient(g, x, case.window_shape, **call), length=9, scale=scale)
