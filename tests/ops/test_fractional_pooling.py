"""Fractional max pooling against loops and PyTorch, and random calls of all poolings of this kind."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.test_util import check_grads

import grid
import jax_mps
import oracle
import other_poolings as other
from programs import export_it, lower

# Image, window, result.
CASES = {
    "line": ((11,), (2,), (4,)),
    "overlapping": ((9,), (3,), (6,)),
    "one window": ((7,), (3,), (1,)),
    "tight": ((6,), (3,), (4,)),
    "plane": ((9, 7), (2, 2), (4, 3)),
    "rectangle": ((8, 11), (3, 1), (2, 6)),
    "pixels": ((5, 6), (1, 1), (3, 5)),
    "volume": ((6, 5, 7), (2, 1, 3), (3, 4, 2)),
    "tight plane": ((5, 4), (2, 2), (4, 3)),
}
each_case = pytest.mark.parametrize("case", CASES)
GROUP = 20
"""Random cases in one program."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`--random N` says how many random calls there are, of all four functions together."""
    if "numbers" in metafunc.fixturenames:
        count = metafunc.config.getoption("--random")
        groups = [range(i, min(i + GROUP, count)) for i in range(0, count, GROUP)]
        metafunc.parametrize("numbers", groups, ids=str)


def test_random_calls_agree_with_pytorch(numbers, native, x64):
    pytest.importorskip("torch")
    assert other.differences(numbers) == []


def arrays(case, dtype=np.float32):
    sizes, window, counts = CASES[case]
    x = (np.round(2 * oracle.normal((2, 3, *sizes))) / 2).astype(dtype)  # ties
    samples = np.random.default_rng(1).uniform(0, 0.99, (2, 3, len(sizes))).astype(dtype)
    return x, samples, window, counts


@pytest.mark.parametrize("data_format", grid.FORMATS)
@each_case
def test_values_indices_and_gradients(case, data_format, implementation):
    x, samples, window, counts = arrays(case)
    pool = functools.partial(
        jax_mps.fractional_max_pool, data_format=data_format, implementation=implementation
    )
    g = oracle.normal((2, 3, *counts), seed=2)

    @jax.jit
    def run(x, samples, g):
        y, pull_back = jax.vjp(lambda x: pool(x, window, counts, samples), x)
        return y, pull_back(g)[0], pool(x, window, counts, samples, return_indices=True)

    image = other.last(x, data_format)
    y, dx, (again, at) = run(image, samples, other.last(g, data_format))
    value, position = other.fractional(x, window, counts, samples)
    assert at.dtype == np.int32
    oracle.assert_same(other.first(y, data_format), value)
    oracle.assert_same(other.first(again, data_format), value)
    oracle.assert_same(other.first(at, data_format), position)
    oracle.assert_close(other.first(dx, data_format), other.put(g, position, x.shape[2:]), length=9)
    oracle.assert_same(pool(image, window, counts, samples), y)  # eagerly, samples known


@pytest.mark.parametrize("dtype", grid.FLOATS)
@pytest.mark.parametrize("case", ["plane", "rectangle", "tight plane", "volume"])
def test_pytorchs_samples_give_pytorchs_windows(case, dtype, x64):
    """The axes of the samples in PyTorch's order, which is another in two dimensions and in three."""
    torch = pytest.importorskip("torch")
    x, _, window, counts = arrays(case)
    kind = getattr(torch, dtype)
    function = getattr(torch.nn.functional, f"fractional_max_pool{len(window)}d")
    for seed in range(20):
        u = np.asarray(jnp.asarray(np.random.default_rng(seed).uniform(0, 0.99, (2, 3, len(window))), dtype))
        samples = torch.tensor(u.astype(np.float64)).to(kind)
        y, at = function(
            torch.tensor(x).to(kind), window, counts, return_indices=True, _random_samples=samples
        )
        ours, position = jax_mps.fractional_max_pool(
            x.astype(u.dtype), window, counts, u, return_indices=True, data_format="channels_first"
        )
        assert ours.dtype == dtype
        oracle.assert_same(ours, y.double())
        oracle.assert_same(position, at)


@pytest.mark.parametrize("dtype", grid.FLOATS)
def test_where_windows_start(dtype, x64):
    """Long axes, where rounding matters: every step in the type of the samples, compiled or not."""
    u = np.asarray(jnp.asarray(np.random.default_rng(0).uniform(0, 0.99, (50, 1, 1)), dtype))
    x = np.broadcast_to(np.arange(300, dtype=np.float32), (50, 1, 300))
    f = functools.partial(
        jax_mps.fractional_max_pool, window_shape=1, output_size=97, data_format="channels_first"
    )
    expected = [other.starts(one, 300, 1, 97) for one in u[:, 0, 0]]
    for call in (f, jax.jit(f)):
        oracle.assert_same(call(x, samples=u)[:, 0], np.array(expected, np.float32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", *grid.INTEGERS])
def test_dtypes(dtype, implementation):
    x, samples, window, counts = arrays("plane")
    x = np.abs(x).astype(jnp.dtype(dtype))
    y, at = jax_mps.fractional_max_pool(
        x,
        window,
        counts,
        samples,
        return_indices=True,
        data_format="channels_first",
        implementation=implementation,
    )
    value, position = other.fractional(x, window, counts, samples)
    assert y.dtype == dtype
    oracle.assert_same(y, value)
    oracle.assert_same(at, position)


def test_gradients_of_half_precision_are_rounded_once(implementation):
    x = jnp.asarray([0, 0, 9, 0, 0], jnp.bfloat16).reshape(1, 1, 5)
    g = np.asarray([256, 1, 1], x.dtype).reshape(1, 1, 3)
    pool = functools.partial(
        jax_mps.fractional_max_pool,
        window_shape=3,
        output_size=3,
        samples=jnp.zeros((1, 1, 1)),
        data_format="channels_first",
        implementation=implementation,
    )
    dx = jax.vjp(pool, x)[1](g)[0]
    oracle.assert_same(dx.ravel(), np.array([0, 0, 258, 0, 0]))


def test_ties_nan_and_infinities(implementation):
    nan, inf = np.nan, np.inf
    x = np.array([2, 2, 2, nan, 3, nan, -inf, -inf, 5, inf], np.float32).reshape(1, 1, 10)
    samples = np.full((1, 1, 1), 0.3, np.float32)
    y, at = jax_mps.fractional_max_pool(
        x, 2, 5, samples, return_indices=True, data_format="channels_first", implementation=implementation
    )
    value, position = other.fractional(x, (2,), (5,), samples)
    oracle.assert_same(y, value)
    oracle.assert_same(at, position)


def test_samples_outside_their_range_stay_inside_the_image(implementation):
    x = oracle.distinct((1, 1, 9))
    for sample in (-5.0, 1.0, 7.3):
        _, at = jax_mps.fractional_max_pool(
            x,
            2,
            4,
            jnp.full((1, 1, 1), sample),
            return_indices=True,
            data_format="channels_first",
            implementation=implementation,
        )
        assert np.all((at >= 0) & (at < 9))


@pytest.mark.parametrize("case", ["overlapping", "plane"])
def test_higher_orders(case, implementation, x64):
    _, samples, window, counts = arrays(case, np.float64)
    x = oracle.distinct((2, 3, *CASES[case][0]), np.float64)

    @jax.jit
    def function(x):
        y = jax_mps.fractional_max_pool(
            x, window, counts, samples, data_format="channels_first", implementation=implementation
        )
        return jnp.sin(y)

    check_grads(function, (x,), order=2, modes=["fwd", "rev"], eps=1e-4, atol=1e-5, rtol=1e-5)


def test_the_derivative_to_the_samples_is_0(implementation):
    x, samples, window, counts = arrays("plane")

    def f(x, samples):
        return jax_mps.fractional_max_pool(
            x, window, counts, samples, data_format="channels_first", implementation=implementation
        )

    assert not np.any(jax.grad(lambda s: f(x, s).sum())(samples))
    assert not np.any(jax.jvp(lambda s: f(x, s), (samples,), (samples,))[1])


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0), (3, 1), (2, 3)], ids=str)
def test_vmap(axes, implementation):
    """Over images, samples, both; where samples are mapped, windows differ."""
    x, samples = oracle.normal((3, 2, 9, 3)), np.random.default_rng(0).uniform(size=(3, 2, 3, 3))
    samples = samples.astype(np.float32)[..., :1] if axes != (2, 3) else samples.astype(np.float32)
    image = {None: x[0], 0: x, 3: np.moveaxis(x, 0, 3), 2: np.moveaxis(x, 0, 2)}[axes[0]]
    drawn = {
        None: samples[0],
        0: samples,
        1: np.moveaxis(samples, 0, 1),
        3: np.moveaxis(samples[..., :1], 0, 3),
    }[axes[1]]

    def f(x, samples):
        def total(x):
            y = jax_mps.fractional_max_pool(x, 2, 4, samples, implementation=implementation)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(total, has_aux=True)(x)

    found = jax.jit(jax.vmap(f, axes))(image, drawn)
    for i in range(3):
        one = f(*(a if d is None else np.take(a, i, d) for a, d in zip((image, drawn), axes, strict=True)))
        for each, expected in zip(found, one, strict=True):
            oracle.assert_close(each[i], expected)


@pytest.mark.parametrize("batch", [(), (0,), (2, 2)], ids=str)
def test_batches(batch, implementation):
    x = oracle.normal((*batch, 7, 6, 2))
    samples = np.random.default_rng(0).uniform(size=(*batch, 2, 2)).astype(np.float32)
    y = jax_mps.fractional_max_pool(x, 2, (3, 2), samples, implementation=implementation)
    assert y.shape == (*batch, 3, 2, 2)
    flat = jax_mps.fractional_max_pool(
        x.reshape(-1, 7, 6, 2), 2, (3, 2), samples.reshape(-1, 2, 2), implementation=implementation
    )
    oracle.assert_same(y, flat.reshape(y.shape))


def test_unpooling_inverts_it():
    x, samples, window, counts = arrays("plane")
    y, at = jax_mps.fractional_max_pool(
        x, window, counts, samples, return_indices=True, data_format="channels_first"
    )
    back = jax_mps.max_unpool(y, at, (9, 7), data_format="channels_first")
    assert np.all((np.asarray(back) == x) | (np.asarray(back) == 0))


def test_paths(native):
    x, samples, window, counts = arrays("plane")
    for implementation, expected in (("native", True), ("xla", False), (None, True)):
        f = functools.partial(
            jax_mps.fractional_max_pool,
            window_shape=window,
            output_size=counts,
            data_format="channels_first",
            implementation=implementation,
        )
        text = lower(lambda x, s, f=f: f(x, samples=s), x, samples, platform="cpu").as_text()
        assert ("custom_call" in text) == expected


@pytest.mark.parametrize(
    ("case", "names"), [("line", ("NWC", "NCW")), ("plane", ("NHWC", "NCHW")), ("volume", ("NDHWC", "NCDHW"))]
)
def test_names_of_layouts(case, names):
    """Starts differ between channels, so samples in the wrong order give other windows."""
    x, samples, window, counts = arrays(case)
    for name, data_format in zip(names, grid.FORMATS, strict=True):
        expected, found = (
            jax_mps.fractional_max_pool(other.last(x, data_format), window, counts, samples, data_format=f)
            for f in (data_format, name)
        )
        oracle.assert_same(found, expected)


def test_symbolic_batches():
    def f(x, samples):
        return jax_mps.fractional_max_pool(x, 2, 3, samples, return_indices=True)

    a, c = export.symbolic_shape("a, c")
    exported = export_it(
        f, jax.ShapeDtypeStruct((a, 7, 6, c), np.float32), jax.ShapeDtypeStruct((a, c, 2), np.float32)
    )
    x = oracle.distinct((2, 7, 6, 3))
    samples = np.random.default_rng(0).uniform(size=(2, 3, 2)).astype(np.float32)
    jax.tree.map(oracle.assert_same, exported.call(x, samples), f(x, samples))


def test_symbolic_sizes_are_refused():
    (h,) = export.symbolic_shape("h")
    with pytest.raises(ValueError, match=r"x must have spatial axes of known sizes, got symbolic .*\(h, 6\)"):
        export_it(
            lambda x, s: jax_mps.fractional_max_pool(x, 2, 3, s),
            jax.ShapeDtypeStruct((2, h, 6, 3), np.float32),
            jax.ShapeDtypeStruct((2, 3, 2), np.float32),
        )


X, SAMPLES = np.zeros((2, 7, 6, 3), np.float32), np.zeros((2, 3, 2), np.float32)
REFUSED = {
    "too many windows": (
        {"output_size": (7, 3)},
        ValueError,
        r"output_size=7 and window_shape=2 need at least 8 pixels .* axis 0, got 7",
    ),
    "too large windows": (
        {"window_shape": (2, 5)},
        ValueError,
        r"output_size=3 and window_shape=5 need at least 7 .* axis 1, got 6",
    ),
    "no windows": ({"output_size": 0}, ValueError, r"output_size must be at least 1 .*0"),
    "no taps": ({"window_shape": (0, 1)}, ValueError, r"window_shape must be at least 1 .*\(0, 1\)"),
    "lengths": (
        {"window_shape": (2,)},
        ValueError,
        r"window_shape must have one entry for each .* got \(2,\)",
    ),
    "samples of a plane": (
        {"samples": SAMPLES[0]},
        ValueError,
        r"samples must have shape \(2, 3, 2\) .* got \(3, 2\)",
    ),
    "samples of two channels": (
        {"samples": SAMPLES[:, :2]},
        ValueError,
        r"samples must have shape \(2, 3, 2\) .* got \(2, 2, 2\)",
    ),
    "a number": (
        {"samples": np.float32(0)},
        ValueError,
        r"samples must have shape \(\*batch, channels, rank\) .* got \(\)",
    ),
    "four axes": (
        {"samples": np.zeros((2, 3, 4), np.float32)},
        ValueError,
        r"samples must have shape .* got \(2, 3, 4\)",
    ),
    "integers": (
        {"samples": SAMPLES.astype(np.int32)},
        TypeError,
        r"samples must have a dtype of float32.* got int32",
    ),
    "a float": ({"output_size": 2.5}, TypeError, r"output_size must be an int known at trace time, got 2\.5"),
    "complex": ({"x": X.astype(np.complex64)}, TypeError, r"x must have a dtype of float32.* got complex64"),
    "layout": ({"data_format": "HWCN"}, ValueError, r"data_format must be .* got 'HWCN'"),
    "path": (
        {"implementation": "gpu"},
        ValueError,
        r"implementation must be None, 'native' or 'xla', got 'gpu'",
    ),
    "flag": ({"return_indices": 1}, TypeError, r"return_indices must be a bool, got 1"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_arguments(what):
    arguments, error, match = REFUSED[what]
    call = {"x": X, "window_shape": 2, "output_size": 3, "samples": SAMPLES} | arguments
    with pytest.raises(error, match=match):
        jax_mps.fractional_max_pool(**call)
