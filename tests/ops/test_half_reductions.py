"""No reduction runs in half precision: JAX can be told to refuse those, and all derivatives still work."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mps
import oracle

POOLS = {
    "disjoint": {"window_shape": (2, 2), "strides": 2},
    "overlapping": {"window_shape": (3, 3), "strides": 2, "padding": 1},
    "long": {"window_shape": (7, 6), "strides": 1},
    "long, disjoint along one axis": {"window_shape": (7, 3), "strides": (1, 3)},
}
CONVS = {
    "ordinary": {"strides": 2, "padding": 1},
    "groups": {"groups": 2, "kernel_dilation": 2},
    "depthwise": {"groups": 4, "strides": 2},
}


@pytest.fixture
def no_half_reductions():
    if not hasattr(jax.config, "jax_allow_f16_reductions"):  # older versions of JAX; the numbers are compared
        yield
        return
    jax.config.update("jax_allow_f16_reductions", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_allow_f16_reductions", True)


def check(f, *operands):
    """The value, tangent, gradient and gradient's tangent trace, and are as in float32 but for rounding."""

    def everything(*x):
        y, tangent = jax.jvp(f, x, x)
        gradient = lambda *x: jax.vjp(f, *x)[1](jnp.cos(f(*x)))  # noqa: E731
        return y, tangent, jax.jvp(gradient, x, x)

    actual = jax.tree.leaves(jax.jit(everything)(*operands))
    assert {a.dtype for a in actual} == {operands[0].dtype}
    expected = jax.tree.leaves(jax.jit(everything)(*(x.astype(np.float32) for x in operands)))
    eps = float(jnp.finfo(operands[0].dtype).eps)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, float), e, rtol=8 * eps, atol=16 * eps * np.abs(e).max())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("window", POOLS)
@pytest.mark.parametrize("name", ["max_pool", "avg_pool", "l2_pool"])
def test_pooling(name, window, dtype, implementation, no_half_reductions):
    x = jnp.asarray(oracle.distinct((2, 9, 10, 2)) / 64, dtype)
    f = functools.partial(getattr(jax_mps, name), implementation=implementation, **POOLS[window])
    check(f, x)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_unpooling(dtype, implementation, no_half_reductions):
    y, at = jax_mps.max_pool(oracle.distinct((2, 8, 8, 2)) / 64, (2, 2), strides=2, return_indices=True)
    f = functools.partial(jax_mps.max_unpool, indices=at, output_shape=(8, 8), implementation=implementation)
    check(f, y.astype(dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("name", ["conv", "conv_transpose"])
def test_convolution(name, case, dtype, implementation, no_half_reductions):
    keywords = CONVS[case]
    x = jnp.asarray(oracle.normal((2, 9, 8, 4)), dtype)
    kernel = jnp.asarray(oracle.normal((3, 3, 4 // keywords.get("groups", 1), 4), seed=1) / 8, dtype)
    check(functools.partial(getattr(jax_mps, name), implementation=implementation, **keywords), x, kernel)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "METAL"])
@pytest.mark.parametrize("name", ["max_pool", "avg_pool", "l2_pool"])
def test_other_platforms(name, platform, no_half_reductions):
    f = functools.partial(getattr(jax_mps, name), window_shape=(3, 3), strides=2, implementation="xla")
    x = jax.ShapeDtypeStruct((2, 9, 9, 2), np.float16)
    both = jax.jit(lambda x: (jax.jvp(f, (x,), (x,)), jax.vjp(f, x)[1](f(x))))
    assert both.trace(x).lower(lowering_platforms=(platform,)).as_text().startswith("module @")
