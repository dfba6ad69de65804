"""Pooling by p-norms against loops and PyTorch: values, derivatives, special values, arguments."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.test_util import check_grads

import apple
import grid
import jax_mps
import oracle
import other_poolings as other
from jax_mps.lowering import apple as checker
from programs import export_it, lower

ORDERS = (1, 1.5, 2, 2.5, 3, 4, 7, math.inf)
each_order = pytest.mark.parametrize("p", ORDERS)
NAMES = (
    "halves",
    "uneven",
    "ceil-padded",
    "crop-ceil",
    "stem",
    "mixed",
    "ceil-crop-2d",
    "gaps-2d",
    "volume-dilated",
    "volume-ceil",
)


def call_of(case, **more):
    return {"window_shape": case.window_shape, **case.geometry, **more}


def torch_norms(tensor, case, p):
    """PyTorch's norms of the taps of every window; for p = inf the first of equal taps."""
    import torch

    taps = other.taps_of(
        tensor, case.window_shape, case.geometry, lambda n: torch.zeros(n, dtype=tensor.dtype)
    )
    stacked = torch.stack(taps)
    if p == math.inf:
        best = np.argmax(np.abs(stacked.detach().numpy()), 0)
        return stacked.abs().gather(0, torch.tensor(best)[None])[0]
    return torch.linalg.vector_norm(stacked, p, 0)


@pytest.mark.parametrize(
    ("name", "data_format"), [(name, grid.FORMATS[i % 2]) for i, name in enumerate(NAMES)]
)
@each_order
def test_values_and_derivatives(p, name, data_format, implementation, x64):
    """In float64, to the second order."""
    torch = pytest.importorskip("torch")
    case = grid.CASES[name]
    x = oracle.normal(case.shape("channels_first"), np.float64)
    tensor = torch.tensor(x, requires_grad=True)
    y = torch_norms(tensor, case, p)
    g, t = oracle.normal(y.shape, np.float64, seed=1), oracle.normal(x.shape, np.float64, seed=2)
    (gradient,) = torch.autograd.grad(y, tensor, torch.tensor(g), create_graph=True)
    pool = functools.partial(
        jax_mps.lp_pool, p=p, **call_of(case), data_format=data_format, implementation=implementation
    )

    @jax.jit
    def run(x, g, t):
        def gradient(x):
            return jax.vjp(pool, x)[1](g)[0]

        return *jax.jvp(pool, (x,), (t,)), *jax.jvp(gradient, (x,), (t,))

    found = [other.first(a, data_format) for a in run(*(other.last(a, data_format) for a in (x, g, t)))]
    value, tangent, dx, second = found
    np.testing.assert_allclose(
        value, other.norms(x, p=p, window=case.window_shape, **case.geometry), rtol=1e-12
    )
    np.testing.assert_allclose(value, y.detach(), rtol=1e-12)
    np.testing.assert_allclose(dx, gradient.detach(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(np.vdot(tangent, g), np.vdot(dx, t), rtol=1e-10)
    if p > 2:  # PyTorch's second derivatives are NaN at the zeros of the padding for smaller ones
        (expected,) = torch.autograd.grad(gradient, tensor, torch.tensor(t))
        np.testing.assert_allclose(second, expected, rtol=1e-8, atol=1e-10)
    assert np.all(np.isfinite(second))


@pytest.mark.parametrize("p", ORDERS[:-1])  # PyTorch raises to the power of infinity
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_agrees_with_pytorch_where_numbers_are_positive(rank, p):
    torch = pytest.importorskip("torch")
    x = np.abs(oracle.normal((2, 3, *(7, 6, 5)[:rank])))
    y = getattr(torch.nn.functional, f"lp_pool{rank}d")(torch.tensor(x), p, 3, 2)
    ours = jax_mps.lp_pool(x, (3,) * rank, p=p, strides=2, data_format="channels_first")
    np.testing.assert_allclose(ours, y, rtol=2e-5)


def test_what_differs_from_pytorch():
    torch = pytest.importorskip("torch")
    pool = torch.nn.functional.lp_pool1d
    x = np.array([1, 2, 3, 4, 5], np.float32)

    def theirs(x, p, ceil_mode=False):
        return pool(torch.tensor(x).reshape(1, 1, -1), p, 2, 2, ceil_mode).numpy().ravel()

    def ours(x, p, ceil_mode=False):
        return jax_mps.lp_pool(x.reshape(1, -1, 1), 2, p=p, strides=2, padding=0, ceil_mode=ceil_mode).ravel()

    np.testing.assert_allclose(theirs(x, 2.0, True)[-1], 5 * math.sqrt(2), rtol=1e-6)
    assert ours(x, 2, True)[-1] == ours(x, 1, True)[-1] == 5
    np.testing.assert_allclose(ours(x, 3, True)[-1], 5, rtol=1e-6)
    assert np.all(np.isnan(theirs(-x, 3.0)))
    np.testing.assert_allclose(ours(-x, 3), ours(x, 3))
    assert np.all(np.isnan(theirs(-x, 2.5)))
    np.testing.assert_allclose(ours(-x, 2.5), ours(x, 2.5))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@each_order
def test_dtypes(p, dtype, implementation):
    case = grid.CASES["stem"]
    x = oracle.normal(case.shape("channels_last"), jnp.dtype(dtype))
    y = jax_mps.lp_pool(x, p=p, **call_of(case), implementation=implementation)
    assert y.dtype == dtype
    wide = other.norms(
        other.first(x, "channels_last").astype(np.float64), p=p, window=case.window_shape, **case.geometry
    )
    oracle.assert_close(other.first(y, "channels_last"), wide, length=9 * 16)


def test_half_precision_is_summed_in_float32(implementation):
    ones = jnp.ones((1, 1024, 1), jnp.bfloat16)
    for p in (1, 5):
        y = jax_mps.lp_pool(ones, 1024, p=p, strides=1, implementation=implementation)
        oracle.assert_close(y.ravel(), [1024 ** (1 / p)])
    # One pixel in many windows: its gradients are rounded once.
    _, pull_back = jax.vjp(
        lambda x: jax_mps.lp_pool(x, 1, p=1.5, strides=1, padding=0, implementation=implementation), ones
    )
    oracle.assert_same(pull_back(ones)[0], np.ones(ones.shape))


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e18, 3e37])
@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 4, 30, math.inf])
def test_no_power_overflows_or_underflows(p, size, implementation):
    if size == 1e-44:
        size = float(np.finfo(np.float32).tiny)  # XLA flushes smaller ones
    x = np.array([3, -4, 1, 0, 0, 0, 2, 2], np.float32).reshape(1, 8, 1) * np.float32(size)
    pool = functools.partial(jax_mps.lp_pool, window_shape=2, p=p, strides=2, implementation=implementation)
    g = np.full((1, 4, 1), 100, np.float32)
    y, pull_back = jax.vjp(pool, x)
    one, pull_back_one = jax.vjp(pool, x / np.float32(size))
    np.testing.assert_allclose(y / np.float32(size), one, rtol=2e-6)
    np.testing.assert_allclose(pull_back(g)[0], pull_back_one(g)[0], rtol=1e-5)


def test_only_a_norm_that_is_too_large_overflows(implementation):
    x = np.full((1, 4, 1), 3e38, np.float32)
    for p in (1, 1.5, 3):
        assert np.all(jax_mps.lp_pool(x, 4, p=p, strides=1, implementation=implementation) == np.inf)
    assert jax_mps.lp_pool(x, 4, p=30, strides=1, implementation=implementation) < np.inf


@each_order
def test_a_window_of_zeros_has_the_gradient_0(p, implementation):
    x = np.array([0, 0, 0, 3, 4, 0, 0], np.float32).reshape(1, 7, 1)

    def total(x):
        return jax_mps.lp_pool(x, 2, p=p, strides=1, implementation=implementation).sum()

    dx = np.asarray(jax.grad(total)(x)).ravel()
    assert np.all(dx[[0, 1, 5, 6]] == 0)
    assert np.all(dx[3:5] > 0)
    hessian = np.asarray(jax.hessian(total)(x))
    assert np.all(np.isfinite(hessian))
    assert not np.any(hessian[0, :2])
    zeros = jnp.zeros_like(x)
    for f in (total, jax.grad(total), jax.hessian(total)):
        assert not np.any(f(zeros))


@each_order
def test_special_values(p, implementation):
    nan, inf = np.nan, np.inf
    x = np.array([1, nan, inf, 2, -inf, inf, nan, inf, -0.0, 0], np.float32).reshape(1, 10, 1)
    y = jax_mps.lp_pool(x, 2, p=p, strides=2, implementation=implementation)
    oracle.assert_same(y.ravel(), np.array([nan, inf, inf, nan, 0]))


@pytest.mark.parametrize("p", [1.5, 3, math.inf])
def test_gradients_of_special_values_are_pytorchs(p, implementation):
    """0 at numbers beside an infinity; NaN where NaN is."""
    torch = pytest.importorskip("torch")
    x = np.array([1, 2, np.inf, 2, 3, np.nan], np.float32)
    dx = jax.grad(lambda x: jax_mps.lp_pool(x, 2, p=p, strides=2, implementation=implementation)[0, 1, 0])(
        x.reshape(1, 6, 1)
    )
    assert dx[0, 3, 0] == 0
    if p < math.inf:
        tensor = torch.tensor(x, requires_grad=True)
        torch.nn.functional.lp_pool1d(tensor.reshape(1, 1, 6), p, 2, 2)[0, 0, 1].backward()
        oracle.assert_same(dx.ravel()[2:4], tensor.grad[2:4])


@pytest.mark.parametrize(("p", "order"), [(1.5, 2), (3, 3), (4, 3), (1, 2), (math.inf, 2)])
def test_higher_orders(p, order, implementation, x64):
    case = grid.Case((5, 4), (2, 3), (2, 1), ((0, 1), (1, 1)), (3, 1), True)
    x = oracle.distinct(case.shape("channels_last", (1,), 1), np.float64) / 3 + 0.55

    @jax.jit
    def function(x):
        return jnp.sin(jax_mps.lp_pool(x, p=p, **call_of(case), implementation=implementation))

    for modes in (["fwd", "rev"],) if order == 2 else (["fwd"], ["rev"]):
        check_grads(function, (x,), order=order, modes=modes, eps=1e-4, atol=1e-5, rtol=1e-5)


def test_fourth_derivative_at_zero(x64):
    """An even power is a polynomial there: the fourth derivative of (a**4 + x**4) ** (1/4) is 6 / a**3."""

    def f(x):
        return jax_mps.lp_pool(
            jnp.stack([jnp.full_like(x, 2.0), x]).reshape(1, 2, 1), 2, p=4, strides=1
        ).sum()

    for _ in range(4):
        f = jax.grad(f)
    np.testing.assert_allclose(f(jnp.zeros(())), 6 / 8, rtol=1e-12)


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("p", [1, 3, math.inf])
def test_vmap(p, axis, implementation):
    x = oracle.normal((4, 7, 3, 5))

    def pool(x):
        return jax_mps.lp_pool(x, (3,), p=p, strides=2, padding=1, implementation=implementation)

    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(pool(x))))
    for f in (pool, gradient):
        each = jnp.stack([f(np.take(x, i, axis)) for i in range(x.shape[axis])])
        oracle.assert_close(jax.jit(jax.vmap(f, axis))(x), each, length=9)


def test_order_2_is_l2_pool(implementation):
    case = grid.CASES["stem"]
    x = oracle.normal(case.shape("channels_last"))
    for p in (2, 2.0, np.float32(2)):
        y = jax_mps.lp_pool(x, p=p, **call_of(case), implementation=implementation)
        oracle.assert_same(y, jax_mps.l2_pool(x, **call_of(case), implementation=implementation))


@each_order
def test_paths(p, native):
    x = oracle.normal((1, 7, 1))
    for implementation, expected in (("native", True), ("xla", False), (None, True)):
        f = functools.partial(jax_mps.lp_pool, window_shape=2, p=p, strides=1, implementation=implementation)
        assert ("custom_call" in lower(f, x, platform="cpu").as_text()) == expected


def test_an_empty_batch():
    for p in ORDERS:
        assert jax_mps.lp_pool(np.zeros((0, 7, 2), np.float32), 3, p=p, strides=2).shape == (0, 3, 2)


# --- programs for other platforms ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", apple.MODES)
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_apple_has_the_operations(p, mode):
    case = grid.CASES["stem"]
    f = functools.partial(jax_mps.lp_pool, p=p, **call_of(case))
    x = oracle.distinct(case.shape("channels_last"))
    for variant in apple.in_mode(apple.Function(f"order {p}", f, (x,)), mode):
        assert checker.violations(variant.lower("METAL")) == []


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_symbolic_sizes(p):
    f = functools.partial(jax_mps.lp_pool, window_shape=(3, 3), p=p, strides=2, padding=1)
    names = "a, b, 8, 9, c" if p == 3 else "a, b, h, w, c"
    shape = export.symbolic_shape(names, constraints=() if p == 3 else ("h >= 8", "w >= 8"))
    exported = export_it(f, jax.ShapeDtypeStruct(shape, np.float32))
    x = oracle.normal((2, 1, 8, 9, 3))
    oracle.assert_close(exported.call(x), f(x), length=9 * 8)


def test_symbolic_sizes_that_are_refused():
    f = functools.partial(jax_mps.lp_pool, window_shape=(3,), p=3, strides=2)
    with pytest.raises(ValueError, match=r"x must have spatial axes of known sizes, got symbolic .*\(h,\)"):
        export_it(
            f, jax.ShapeDtypeStruct(export.symbolic_shape("2, h, c", constraints=("h >= 3",)), np.float32)
        )


# --- arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "error", "match"),
    [
        (0.5, ValueError, r"p must be at least 1, got 0\.5"),
        (-math.inf, ValueError, "p must be at least 1, got -inf"),
        (math.nan, ValueError, "p must be at least 1, got nan"),
        ("2", TypeError, "p must be a number known at trace time, got str 2"),
        (True, TypeError, "p must be a number known at trace time, got bool True"),
        (None, TypeError, "p must be a number known at trace time, got NoneType"),
        (2j, TypeError, "p must be a number known at trace time, got complex 2j"),
    ],
)
def test_bad_orders(p, error, match):
    with pytest.raises(error, match=match):
        jax_mps.lp_pool(np.zeros((1, 4, 1), np.float32), 2, p=p, strides=2)


def test_a_traced_order_is_refused():
    x = np.zeros((1, 4, 1), np.float32)
    with pytest.raises(TypeError, match="p must be a number known at trace time"):
        jax.jit(lambda p: jax_mps.lp_pool(x, 2, p=p, strides=2))(3.0)


@each_order
def test_other_bad_arguments(p):
    x = np.zeros((1, 4, 1), np.float32)
    with pytest.raises(ValueError, match=r"window_shape=5 .* spans 5 pixels, more than the 4"):
        jax_mps.lp_pool(x, 5, p=p, strides=2)
    with pytest.raises(TypeError, match=r"x must have a dtype of float32.* got int32"):
        jax_mps.lp_pool(x.astype(np.int32), 2, p=p, strides=2)
    with pytest.raises(ValueError, match="implementation must be None, 'native' or 'xla', got 'gpu'"):
        jax_mps.lp_pool(x, 2, p=p, strides=2, implementation="gpu")


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, math.inf])
def test_subnormal_numbers_are_no_nan(p, implementation):
    """XLA flushes them at some places and not at others."""
    x = np.full((1, 4, 1), 1.5e-39, np.float32)
    pool = functools.partial(jax_mps.lp_pool, window_shape=2, p=p, strides=2, implementation=implementation)
    y, dx = jax.jit(lambda x: (pool(x), jax.grad(lambda x: pool(x).sum())(x)))(x)
    assert np.all((y >= 0) & (y <= 3.1e-39)), y
    assert np.all(np.isfinite(dx)), dx
