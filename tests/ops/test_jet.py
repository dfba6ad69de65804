"""Taylor series of `jax.experimental.jet`, against nested tangents and against stock operations."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.jet import jet

import jax_mps
import oracle

ORDER = 3
WINDOWS = {
    1: {"window_shape": (3,), "strides": 2, "padding": 1},
    2: {"window_shape": (2, 3), "strides": 2, "padding": ((0, 1), (-1, 1))},
}
SIZES = {1: (7,), 2: (6, 7)}


def nested(f, operands, series):
    """The derivatives of `f` along the curves, by one tangent inside the other."""

    def curve(t):
        points = []
        for x, terms in zip(operands, series, strict=True):
            scale = 1.0
            for k, term in enumerate(terms, 1):
                scale *= k
                x = x + term * (t**k / scale)
            points.append(x)
        return f(*points)

    derivatives = []
    for _ in range(ORDER):
        curve = functools.partial(lambda g, t: jax.jvp(g, (t,), (jnp.ones_like(t),))[1], curve)
        derivatives.append(curve(jnp.float32(0)))
    return derivatives


def check(f, *operands):
    operands = [jnp.asarray(x, np.float32) for x in operands]
    series = [
        [jnp.asarray(oracle.normal(x.shape, seed=10 * i + k)) for k in range(ORDER)]
        for i, x in enumerate(operands)
    ]
    expected = nested(f, operands, series)
    for function in (f, jax.jit(f)):
        with jax.numpy_dtype_promotion("standard"):  # jet itself mixes types
            y, terms = jet(function, operands, series)
        np.testing.assert_allclose(y, f(*operands), rtol=1e-6)
        assert len(terms) == ORDER
        for actual, e in zip(terms, expected, strict=True):
            np.testing.assert_allclose(actual, e, rtol=1e-4, atol=1e-4 * max(1, np.abs(e).max()))


@pytest.mark.parametrize("rank", WINDOWS)
@pytest.mark.parametrize("name", ["max_pool", "avg_pool", "l2_pool"])
def test_pooling(name, rank, implementation):
    f = functools.partial(getattr(jax_mps, name), implementation=implementation, **WINDOWS[rank])
    x = oracle.normal((2, *SIZES[rank], 2))
    check(f, x)
    check(lambda x: f(jnp.sin(x)) * f(x), x)
    check(lambda x, g: jax.vjp(f, x)[1](g)[0], x, oracle.normal(f(x).shape, seed=1))


@pytest.mark.parametrize("name", ["max_pool", "avg_pool", "l2_pool"])
def test_gradient_kernels(name, implementation):
    options = {"implementation": implementation, **WINDOWS[2]}
    x = oracle.normal((2, *SIZES[2], 2))
    g = oracle.normal(getattr(jax_mps, name)(x, **options).shape, seed=1)
    kernel = functools.partial(getattr(jax_mps, f"{name}_gradient"), **options)
    if name == "avg_pool":
        check(lambda g: kernel(g, x.shape), g)
    else:
        check(kernel, g, x)


def test_windows_of_zeros_have_no_terms(implementation):
    """The derivative of a norm at 0 is 0 here, in every order."""
    x = np.zeros((1, 4, 1), np.float32)
    f = functools.partial(jax_mps.l2_pool, window_shape=2, strides=2, implementation=implementation)
    with jax.numpy_dtype_promotion("standard"):
        _, terms = jet(f, [x], [[np.ones_like(x)] * ORDER])
    np.testing.assert_array_equal(terms, np.zeros((ORDER, 1, 2, 1)))


def test_unpooling(implementation):
    def f(x):
        y, at = jax_mps.max_pool(x, (2, 2), strides=2, return_indices=True, implementation=implementation)
        return jax_mps.max_unpool(y * y, at, (4, 6), implementation=implementation)

    check(f, oracle.normal((2, 4, 6, 2)))


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", ["conv", "conv_transpose"])
def test_convolution(name, rank, implementation):
    f = functools.partial(getattr(jax_mps, name), strides=2, padding=1, implementation=implementation)
    x, kernel = oracle.normal((2, *SIZES[rank], 2)), oracle.normal((3,) * rank + (2, 3), seed=1)
    check(f, x, kernel)
    check(lambda x, kernel: jax.vjp(f, x, kernel)[1](f(x, kernel))[1], x, kernel)


def test_as_stock(implementation):
    x, kernel = oracle.normal((2, 6, 7, 2)), oracle.normal((3, 3, 2, 3), seed=1)
    series = [[oracle.normal(a.shape, seed=k) for k in range(ORDER)] for a in (x, kernel)]
    options = {"implementation": implementation}

    def average(x):
        return lax.reduce_window(x, np.float32(0), lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4

    def transposed(x, kernel):
        return lax.conv_transpose(x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    pairs = [
        (lambda x: jax_mps.avg_pool(x, 2, strides=2, **options), average, 1),
        (lambda x, kernel: jax_mps.conv_transpose(x, kernel, strides=2, **options), transposed, 2),
    ]
    for ours, stock, count in pairs:
        with jax.numpy_dtype_promotion("standard"):
            actual, expected = (jet(f, (x, kernel)[:count], series[:count]) for f in (ours, stock))
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)
