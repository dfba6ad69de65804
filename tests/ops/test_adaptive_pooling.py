"""Adaptive pooling against loops and PyTorch: values, indices, derivatives, transformations, arguments."""

from __future__ import annotations

import functools

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

POOLS = {"average": jax_mps.adaptive_avg_pool, "max": jax_mps.adaptive_max_pool}
each_pool = pytest.mark.parametrize("name", POOLS)

# Sizes of the image, and of the result.
CASES = {
    "halves": ((8,), (4,)),
    "uneven": ((7,), (3,)),
    "keeps": ((5,), (5,)),
    "global": ((13,), (1,)),
    "one more": ((6,), (7,)),
    "repeats": ((2,), (4,)),
    "larger": ((3,), (11,)),
    "one pixel": ((1,), (3,)),
    "planes": ((9, 6), (4, 4)),
    "one axis alone": ((5, 7), (1, 9)),
    "half regular": ((8, 7), (4, 2)),
    "volumes": ((4, 5, 6), (3, 2, 7)),
    "global volume": ((3, 4, 2), (1, 1, 1)),
}
each_case = pytest.mark.parametrize("case", CASES)
each_format = pytest.mark.parametrize("data_format", grid.FORMATS)


def reference(name, x, g, counts):
    """Value, positions and gradient of loops, in channels first."""
    sizes = x.shape[2:]
    boxes = other.adaptive(sizes, counts)
    if name == "average":
        return other.averages(x, boxes), None, other.averages_gradient(g, sizes, boxes)
    y, at = other.maxima(x, boxes)
    return y, at, other.put(g, at, sizes)


def image(name, sizes, dtype=np.float32):
    x = oracle.normal((2, 3, *sizes))
    return (np.round(2 * x) / 2 if name == "max" else x).astype(dtype)  # ties


@each_format
@each_case
@each_pool
def test_values_and_gradients(name, case, data_format, implementation):
    sizes, counts = CASES[case]
    x, g = image(name, sizes), oracle.normal((2, 3, *counts), seed=1)
    t = oracle.normal(x.shape, seed=2)
    pool = functools.partial(
        POOLS[name], output_size=counts, data_format=data_format, implementation=implementation
    )

    @jax.jit
    def run(x, g, t):
        y, pull_back = jax.vjp(pool, x)
        indices = pool(x, return_indices=True) if name == "max" else None
        return y, pull_back(g)[0], jax.jvp(pool, (x,), (t,))[1], indices

    y, dx, tangent, indices = run(*(other.last(a, data_format) for a in (x, g, t)))
    value, at, gradient = reference(name, x, g, counts)
    terms = max(x[0, 0].size, g[0, 0].size)
    oracle.assert_close(other.first(y, data_format), value, length=terms)
    oracle.assert_close(other.first(dx, data_format), gradient, length=terms)
    if name == "max":
        oracle.assert_same(indices[0], y)
        assert indices[1].dtype == np.int32
        oracle.assert_same(other.first(indices[1], data_format), at)
        expected = np.take_along_axis(t.reshape(2, 3, -1), at.reshape(2, 3, -1), -1).reshape(at.shape)
    else:
        expected, _, _ = reference(name, t, g, counts)
    oracle.assert_close(other.first(tangent, data_format), expected, length=terms, scale=3)
    oracle.assert_close(pool(other.last(x, data_format)), y, length=terms)  # eagerly


@each_case
@each_pool
def test_agrees_with_pytorch(name, case, x64):
    torch = pytest.importorskip("torch")
    sizes, counts = CASES[case]
    x, g = image(name, sizes, np.float64), oracle.normal((2, 3, *counts), np.float64, seed=1)
    tensor = torch.tensor(x, requires_grad=True)
    short = {"average": "avg", "max": "max"}[name]
    y = getattr(torch.nn.functional, f"adaptive_{short}_pool{len(sizes)}d")(tensor, counts)
    y.backward(torch.tensor(g))
    pool = functools.partial(POOLS[name], output_size=counts, data_format="channels_first")
    value, pull_back = jax.vjp(pool, x)
    np.testing.assert_allclose(value, y.detach(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(pull_back(g)[0], tensor.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("case", ["one more", "planes", "volumes", "halves"])
@each_pool
def test_dtypes(name, case, dtype, implementation, x64):
    sizes, counts = CASES[case]
    x = image(name, sizes, jnp.dtype(dtype))
    g = oracle.normal((2, 3, *counts), jnp.dtype(dtype), seed=1)
    pool = functools.partial(
        POOLS[name], output_size=counts, data_format="channels_first", implementation=implementation
    )
    y, pull_back = jax.vjp(pool, x)
    (dx,) = pull_back(g)
    assert y.dtype == dx.dtype == dtype
    value, _, gradient = reference(name, x.astype(np.float64), g.astype(np.float64), counts)
    terms = max(x[0, 0].size, g[0, 0].size)
    oracle.assert_close(y, value, length=terms)
    oracle.assert_close(dx, gradient, length=terms)


@pytest.mark.parametrize("dtype", grid.INTEGERS)
def test_maxima_of_integers(dtype, implementation):
    x = np.random.default_rng(0).integers(0, 5, (2, 3, 7, 5)).astype(dtype)
    y, at = jax_mps.adaptive_max_pool(
        x, (3, 9), return_indices=True, data_format="channels_first", implementation=implementation
    )
    value, position = other.maxima(x, other.adaptive((7, 5), (3, 9)))
    assert y.dtype == dtype
    oracle.assert_same(y, value)
    oracle.assert_same(at, position)


def test_half_precision_is_summed_in_float32(implementation):
    ones = jnp.ones((1, 1023, 1), jnp.bfloat16)
    pool = functools.partial(jax_mps.adaptive_avg_pool, output_size=2, implementation=implementation)
    oracle.assert_same(pool(ones), np.ones((1, 2, 1)))
    _, pull_back = jax.vjp(functools.partial(pool, output_size=1023), jnp.ones((1, 2, 1), jnp.bfloat16))
    # 511 windows of one pixel, and half of the window between.
    oracle.assert_same(pull_back(ones)[0], np.full((1, 2, 1), jnp.bfloat16(511.5), np.float64))


def test_ties_nan_and_infinities(implementation):
    nan, inf = np.nan, np.inf
    x = np.array([2, 2, 2, 2, 2, 1, nan, 3, nan, -inf, -inf, -inf, 5], np.float32).reshape(1, 13, 1)
    pool = functools.partial(
        jax_mps.adaptive_max_pool, output_size=5, return_indices=True, implementation=implementation
    )
    y, at = pool(x)
    value, position = other.maxima(np.moveaxis(x, -1, 1), other.adaptive((13,), (5,)))
    oracle.assert_same(y.ravel(), value.ravel())
    oracle.assert_same(at.ravel(), position.ravel())
    dx = jax.vjp(lambda x: pool(x)[0], x)[1](np.ones((1, 5, 1), np.float32))[0]
    oracle.assert_same(dx.ravel(), other.put(np.ones((1, 1, 5)), position, (13,)).ravel())
    # The zeros that fill up short windows of an average meet no infinity.
    mean = jax_mps.adaptive_avg_pool(x[:, 7:], 4, implementation=implementation)
    expected = other.averages(np.moveaxis(x[:, 7:], -1, 1), other.adaptive((6,), (4,)))
    oracle.assert_same(mean.ravel(), expected.ravel())


@pytest.mark.parametrize(
    ("case", "order"),
    [("uneven", 3), ("larger", 2), ("planes", 2), pytest.param("volumes", 2, marks=pytest.mark.full)],
)
@each_pool
def test_higher_orders(name, case, order, implementation, x64):
    sizes, counts = CASES[case]
    x = oracle.distinct((1, 1, *sizes), np.float64)

    @jax.jit
    def function(x):
        return jnp.sin(POOLS[name](x, counts, data_format="channels_first", implementation=implementation))

    for modes in (["fwd"], ["rev"], ["fwd", "rev"])[: 3 if order == 2 else 2]:
        check_grads(function, (x,), order=order, modes=modes, eps=1e-4, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("axis", range(4))
@each_pool
def test_vmap(name, axis, implementation):
    x = oracle.normal((4, 7, 3, 5))
    options = {"return_indices": True} if name == "max" else {}

    def pool(x):
        return POOLS[name](x, (4,), implementation=implementation, **options)

    mapped = jax.jit(jax.vmap(pool, axis))(x)
    expected = [pool(np.take(x, i, axis)) for i in range(x.shape[axis])]
    close = oracle.assert_close if name == "average" else oracle.assert_same
    jax.tree.map(close, mapped, jax.tree.map(lambda *y: jnp.stack(y), *expected))
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(jax.tree.leaves(pool(x))[0])))
    each = jnp.stack([gradient(np.take(x, i, axis)) for i in range(x.shape[axis])])
    oracle.assert_close(jax.jit(jax.vmap(gradient, axis))(x), each)


@pytest.mark.parametrize("batch", [(), (0,), (2, 3)], ids=str)
@each_pool
def test_batches(name, batch, implementation):
    x = oracle.normal((*batch, 7, 5, 2))
    y = POOLS[name](x, (3, None), implementation=implementation)
    assert y.shape == (*batch, 3, 5, 2)
    flat = POOLS[name](x.reshape(-1, 7, 5, 2), (3, 5), implementation=implementation)
    oracle.assert_same(y, flat.reshape(y.shape))


def test_an_int_and_a_list():
    x = oracle.normal((2, 7, 5, 2))
    for name, pool in POOLS.items():
        oracle.assert_same(pool(x, 3), pool(x, [3, 3]))
        oracle.assert_same(pool(x, np.array([3, 3])), pool(x, (np.int64(3), 3)))
        whole = {"average": jnp.mean, "max": jnp.max}[name](x, (1, 2), keepdims=True)
        oracle.assert_close(pool(x, 1), whole, length=35)


def test_where_sizes_divide_it_is_ordinary_pooling(implementation):
    x = oracle.normal((2, 8, 6, 3))
    ordinary = {"average": jax_mps.avg_pool, "max": jax_mps.max_pool}
    for name, pool in POOLS.items():
        y = pool(x, (4, 2), implementation=implementation)
        oracle.assert_same(y, ordinary[name](x, (2, 3), strides=(2, 3), implementation=implementation))
        jaxpr = str(jax.make_jaxpr(functools.partial(pool, output_size=(4, 2)))(x))
        assert "pick" not in jaxpr


@each_pool
def test_paths(name, native):
    x = oracle.normal((1, 7, 1))
    for implementation, expected in (("native", True), ("xla", False), (None, True)):
        f = functools.partial(POOLS[name], output_size=3, implementation=implementation)
        assert ("custom_call" in lower(f, x, platform="cpu").as_text()) == expected


# --- programs for other platforms ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", apple.MODES)
@pytest.mark.parametrize("case", ["larger", "planes", "volumes"])
@each_pool
def test_apple_has_the_operations_and_their_results(name, case, mode):
    sizes, counts = CASES[case]
    pool = functools.partial(POOLS[name], output_size=counts)
    x = oracle.distinct((2, *sizes, 3))
    functions = [apple.Function(name, pool, (x,))]
    if name == "max":
        both = functools.partial(pool, return_indices=True)
        functions.append(apple.Function("indices", both, (x,), differentiable=False))
    for variant in (v for f in functions for v in apple.in_mode(f, mode)):
        assert checker.violations(variant.lower("METAL")) == []
        exported = export.export(
            jax.jit(variant.call),
            platforms=["METAL"],
            disabled_checks=[export.DisabledSafetyCheck.platform()],
        )(*variant.operands)
        found = jax.tree.leaves(jax.jit(exported.call)(*variant.operands))
        apple.check_close(found, jax.tree.leaves(jax.jit(variant.call)(*variant.operands)), variant.name)


@each_pool
def test_symbolic_batches(name):
    f = functools.partial(POOLS[name], output_size=(3, 4))
    exported = export_it(f, jax.ShapeDtypeStruct(export.symbolic_shape("a, b, 7, 6, c"), np.float32))
    for shape in ((2, 1, 7, 6, 3), (1, 3, 7, 6, 1)):
        x = oracle.normal(shape)
        oracle.assert_close(exported.call(x), f(x), length=9)


@each_pool
def test_symbolic_sizes_are_refused(name):
    f = functools.partial(POOLS[name], output_size=(3, 4))
    with pytest.raises(ValueError, match=r"x must have spatial axes of known sizes, got symbolic .*\(h, 6\)"):
        export_it(f, jax.ShapeDtypeStruct(export.symbolic_shape("2, h, 6, c"), np.float32))


# --- arguments ----------------------------------------------------------------------------------------

REFUSED = {
    "zero": ((3, 0), ValueError, r"output_size must be at least 1 .*\(3, 0\)"),
    "below zero": (-1, ValueError, r"output_size must be at least 1 .*-1"),
    "no axes": ((), ValueError, r"output_size must name 1 to 3 spatial axes, got 0"),
    "four axes": ((1,) * 4, ValueError, r"output_size must name 1 to 3 spatial axes, got 4"),
    "too many axes": ((1, 1, 1), ValueError, r"output_size=\(1, 1, 1\) needs 3 spatial axes .* of 3 axes"),
    "a float": (2.0, TypeError, r"output_size must be an int known at trace time, got 2.0"),
    "a string": ("33", TypeError, r"output_size must be an int or a sequence of ints|known at trace time"),
    "nothing": (None, TypeError, r"output_size must be an int known at trace time, got NoneType"),
}


@pytest.mark.parametrize("what", REFUSED)
@each_pool
def test_bad_sizes(name, what):
    size, error, match = REFUSED[what]
    x = np.zeros((2, 5, 3), np.float32)
    with pytest.raises(error, match=match):
        POOLS[name](x, size)
    with pytest.raises(error, match=match):
        jax.jit(lambda x: POOLS[name](x, size)).trace(x)


@each_pool
def test_other_bad_arguments(name):
    x = np.zeros((2, 5, 3), np.float32)
    with pytest.raises(ValueError, match="data_format='NHWC' has 2 spatial axes, the other arguments 1"):
        POOLS[name](x, 2, data_format="NHWC")
    with pytest.raises(ValueError, match="implementation must be None, 'native' or 'xla', got 'gpu'"):
        POOLS[name](x, 2, implementation="gpu")
    with pytest.raises(TypeError, match=r"x must have a dtype of float32.* got complex64"):
        POOLS[name](x.astype(np.complex64), 2)
    with pytest.raises(
        ValueError, match=r"every spatial axis of x needs at least one pixel, got sizes \(0,\)"
    ):
        POOLS[name](x[:, :0], 2)
    with pytest.raises(ValueError, match="2 axes: give output_size as a tuple"):
        POOLS[name](x[0], 2)
    with pytest.raises(TypeError, match="return_indices must be a bool, got 1"):
        jax_mps.adaptive_max_pool(x, 2, return_indices=1)
