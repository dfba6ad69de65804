"""Exported programs: portable, with symbolic sizes, the same after serialisation."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jax_mps
import oracle
from programs import PLATFORMS, export_it

# Names are of symbolic dimensions: two batch axes, uneven planes.
SYMBOLS = {1: "a, b, h, c", 2: "a, b, h, w, c", 3: "a, d, h, w, c"}
CONCRETE = {
    1: [(1, 2, 20, 3), (2, 1, 33, 1)],
    2: [(1, 2, 16, 21, 3), (2, 1, 37, 18, 1)],
    3: [(1, 9, 8, 11, 2), (2, 8, 10, 9, 1)],
}

WINDOWS: dict[str, dict[str, Any]] = {
    "k2 s2": {"window_shape": (2, 2), "strides": 2},
    "k3 s2 p1": {"window_shape": (3, 3), "strides": 2, "padding": 1},
    "k3 s2": {"window_shape": (3, 3), "strides": 2},
    "k3 s1 p1": {"window_shape": (3, 3), "strides": 1, "padding": 1},
    "k3 s2 SAME": {"window_shape": (3, 3), "strides": 2, "padding": "SAME"},
    "k4x5 s3x1 SAME": {"window_shape": (4, 5), "strides": (3, 1), "padding": "SAME"},
    "k3 s2 p1 ceil": {"window_shape": (3, 3), "strides": 2, "padding": 1, "ceil_mode": True},
    "k2 s3 ceil": {"window_shape": (2, 2), "strides": 3, "padding": 0, "ceil_mode": True},
    "k3 s2 d2 p2": {"window_shape": (3, 3), "strides": 2, "padding": 2, "window_dilation": 2},
    "k3 s2 crops": {"window_shape": (3, 3), "strides": 2, "padding": ((-1, -2), (-3, 1))},
    "k9x12 s2 p4": {"window_shape": (9, 12), "strides": 2, "padding": 4},
    "1-D k4 s2 p1": {"window_shape": (4,), "strides": 2, "padding": 1},
    "1-D k3 s2 SAME": {"window_shape": (3,), "strides": 2, "padding": "SAME"},
    "3-D k2 s2": {"window_shape": (2, 2, 2), "strides": 2},
    "3-D k3 s2 p1 ceil": {"window_shape": (3, 3, 3), "strides": 2, "padding": 1, "ceil_mode": True},
}

KINDS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "max": (jax_mps.max_pool, {}),
    "max with indices": (jax_mps.max_pool, {"return_indices": True}),
    "avg": (jax_mps.avg_pool, {}),
    "avg excluding": (jax_mps.avg_pool, {"count_include_pad": False}),
    "avg override": (jax_mps.avg_pool, {"divisor_override": 7}),
    "l2": (jax_mps.l2_pool, {}),
}


@pytest.fixture(autouse=True, scope="module")
def compile_fast():
    """Optimised machine code would double the time, and is not what these tests are about."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def symbolic(rank: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    """Without constraints, as stock operations take it."""
    return jax.ShapeDtypeStruct(export.symbolic_shape(SYMBOLS[rank]), jnp.dtype(dtype))


def value_and_gradient(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """All results of `f`, and the gradient of a nonlinear function of the first."""

    def function(x: Any) -> Any:
        results, pull_back = jax.vjp(lambda x: jax.tree.leaves(f(x))[0], x)
        return f(x), pull_back(2 * results)[0]

    return jax.jit(function)


def check_close(actual: Any, expected: Any) -> None:
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        if np.issubdtype(e.dtype, np.integer):
            np.testing.assert_array_equal(a, e)
        else:
            oracle.assert_close(a, e, length=256)


# Every other pair of a kind and a window, like the squares of one colour; the rest runs in the whole grids.
@pytest.mark.parametrize(
    ("kind", "window"),
    [
        *(
            pytest.param(kind, window, marks=[pytest.mark.full] if (i + j) % 2 else [])
            for i, kind in enumerate(("max with indices", "avg", "avg excluding", "l2"))
            for j, window in enumerate(WINDOWS)
        ),
        *((kind, window) for kind in ("max", "avg override") for window in ("k3 s2 p1", "k3 s2 p1 ceil")),
    ],
)
def test_symbolic_sizes(kind, window):
    function, options = KINDS[kind]
    keywords = WINDOWS[window] | options
    f = value_and_gradient(functools.partial(function, **keywords))
    rank = len(keywords["window_shape"])
    exported = export_it(f, symbolic(rank))
    assert exported.platforms == PLATFORMS
    for shape in CONCRETE[rank]:
        x = oracle.distinct(shape)
        check_close(exported.call(x), f(x))


@pytest.mark.parametrize("kind", KINDS)
def test_constrained_sizes(kind):
    function, options = KINDS[kind]
    f = value_and_gradient(functools.partial(function, **WINDOWS["k9x12 s2 p4"], **options))
    shape = export.symbolic_shape("b, h, w, c", constraints=("h >= 9", "w >= 16"))
    exported = export.export(f)(jax.ShapeDtypeStruct(shape, np.float32))
    x = oracle.distinct((2, 11, 17, 1))
    check_close(exported.call(x), f(x))


@pytest.mark.parametrize("size", [(1, 2), (2, 9), (3, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_too_small_for_a_window_give_nothing(kind, size):
    """As stock JAX does, where a size is known too late to be refused."""
    function, options = KINDS[kind]
    f = value_and_gradient(functools.partial(function, window_shape=(3, 3), strides=2, **options))
    stock = export.export(
        jax.jit(lambda x: jax.lax.reduce_window(x, -np.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID"))
    )
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("b, h, w, c"), np.float32)
    x = oracle.distinct((2, *size, 1))
    *results, dx = jax.tree.leaves(export.export(f)(shape).call(x))
    assert {y.shape for y in results} == {stock(shape).call(x).shape}
    assert dx.shape == x.shape
    if min(size) < 3:
        np.testing.assert_array_equal(dx, np.zeros_like(x))


def test_ceil_mode_on_one_pixel():
    """A window that hangs over the end is one, however small the image turns out to be."""
    options = {"strides": 3, "padding": 0, "ceil_mode": True, "count_include_pad": False}
    f = value_and_gradient(functools.partial(jax_mps.avg_pool, window_shape=(2, 2), **options))
    exported = export.export(f)(jax.ShapeDtypeStruct(export.symbolic_shape("b, h, w, c"), np.float32))
    for shape in ((1, 1, 2, 1), (1, 4, 1, 2)):
        x = oracle.distinct(shape)
        check_close(exported.call(x), f(x))


CONVOLUTIONS: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "valid": ("conv", {}, (1, 2)),
    "stride": ("conv", {"strides": 2}, (1, 2)),
    "SAME": ("conv", {"strides": (2, 3), "padding": "SAME"}, (2, 1)),
    "pairs": ("conv", {"padding": ((-1, -2), (1, 1)), "kernel_dilation": 2}, (4, 1)),
    "input dilation": ("conv", {"input_dilation": 2, "strides": 3, "kernel_dilation": 2}, (1, 2)),
    "transposed": ("conv_transpose", {"strides": 2, "output_padding": 1}, (1, 2)),
    "transposed SAME": ("conv_transpose", {"strides": 2, "padding": "SAME"}, (4, 1)),
    "transposed, cropped": ("conv_transpose", {"strides": 2, "padding": 3}, (2, 2)),
    "transposed, dilated": ("conv_transpose", {"strides": (3, 2), "kernel_dilation": 2}, (1, 1)),
}


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_symbolic_convolutions(name, data_format):
    function, keywords, (groups, per_group) = CONVOLUTIONS[name]
    channels = groups * per_group
    f = functools.partial(getattr(jax_mps, function), groups=groups, data_format=data_format, **keywords)

    @jax.jit
    def both(x: Any, kernel: Any) -> Any:
        y, pull_back = jax.vjp(f, x, kernel)
        return y, pull_back(y)

    last = data_format == "channels_last"
    kernel = oracle.normal((3, 3, per_group, channels), seed=1)
    shape = export.symbolic_shape(f"b, h, w, {channels}" if last else f"b, {channels}, h, w")
    exported = export_it(both, jax.ShapeDtypeStruct(shape, np.float32), kernel)
    for sizes in ((8, 9), (9, 8)):
        x = oracle.normal((2, *sizes, channels) if last else (2, channels, *sizes))
        check_close(exported.call(x, kernel), both(x, kernel))
    one = np.ones((1, 1, 1, channels) if last else (1, channels, 1, 1), np.float32)
    assert exported.call(one, kernel)[1][0].shape == one.shape


@pytest.mark.parametrize("kind", KINDS)
def test_concrete_sizes(kind):
    function, options = KINDS[kind]
    f = value_and_gradient(functools.partial(function, **WINDOWS["k3 s2 p1"], **options))
    x = oracle.distinct((1, 2, 9, 8, 3))
    check_close(export_it(f, x).call(x), f(x))


def test_a_symbolic_program_has_the_values_of_the_definition():
    keywords = WINDOWS["k3 s2 p1 ceil"] | {"count_include_pad": False}
    exported = export_it(value_and_gradient(functools.partial(jax_mps.avg_pool, **keywords)), symbolic(2))
    x = oracle.normal((1, 2, 17, 16, 3))
    y, dx = exported.call(x)
    expected = oracle.avg_pool(x, **keywords)
    oracle.assert_close(y, expected, length=9)
    oracle.assert_close(dx, oracle.avg_pool_gradient(2 * expected, x.shape, **keywords), length=9, scale=4.0)

    keywords = WINDOWS["k3 s2 SAME"]
    exported = export_it(
        value_and_gradient(functools.partial(jax_mps.max_pool, return_indices=True, **keywords)), symbolic(2)
    )
    for shape in ((1, 1, 17, 16, 2), (1, 1, 16, 19, 2)):
        x = oracle.distinct(shape)
        (y, at), dx = exported.call(x)
        values, positions = oracle.max_pool(x, **keywords)
        np.testing.assert_array_equal(y, values)
        np.testing.assert_array_equal(at, positions)
        oracle.assert_close(dx, oracle.max_pool_gradient(2 * values, x, **keywords), length=4)


@pytest.mark.parametrize("name", ["max", "l2"])
def test_symbolic_gradient_kernels_of_source_and_gradient(name):
    kernel = {"max": jax_mps.max_pool_gradient, "l2": jax_mps.l2_pool_gradient}[name]
    f = functools.partial(kernel, window_shape=(2, 2), strides=2)
    like = np.zeros((1, 1, 1, 1), np.float32)
    g, x = export.symbolic_args_specs((like, like), ("n, h, w, c", "n, 2*h, 2*w, c"))
    exported = export_it(f, g, x)
    for n, h, w, c in ((1, 4, 5, 2), (3, 2, 1, 1)):
        operands = oracle.normal((n, h, w, c)), oracle.distinct((n, 2 * h, 2 * w, c))
        check_close(exported.call(*operands), f(*operands))


def test_symbolic_average_gradient_kernel():
    def f(g: Any, x: Any) -> Any:
        return jax_mps.avg_pool_gradient(g, x.shape, (2, 2), strides=2)

    like = np.zeros((1, 1, 1, 1), np.float32)
    g, x = export.symbolic_args_specs((like, like), ("n, h, w, c", "n, 2*h, 2*w, c"))
    exported = export_it(f, g, x)
    operands = oracle.normal((2, 3, 4, 2)), oracle.normal((2, 6, 8, 2))
    check_close(exported.call(*operands), f(*operands))


def test_symbolic_gradient_kernels_of_images_that_may_be_too_small_for_a_window():
    def f(x):
        y = jax_mps.max_pool(x, 3, strides=1)
        return jax_mps.max_pool_gradient(y, x, 3, strides=1)

    x = oracle.normal((1, 6, 5, 2))
    exported = export_it(f, jax.ShapeDtypeStruct(export.symbolic_shape("n, h, w, c"), np.float32))
    oracle.assert_close(exported.call(x), f(x))


def test_symbolic_unpooling():
    def f(x: Any) -> Any:
        y, at = jax_mps.max_pool(x, (2, 2), strides=2, return_indices=True)
        return jax_mps.max_unpool(y, at, x.shape[2:4])

    f = value_and_gradient(f)
    exported = export_it(f, symbolic(2))
    for shape in CONCRETE[2]:
        x = oracle.distinct(shape)
        check_close(exported.call(x), f(x))


@pytest.mark.parametrize("kind", KINDS)
def test_symbolic_sizes_of_half_precision(kind):
    function, options = KINDS[kind]
    dtype = "float16" if kind in ("max", "avg override") else "bfloat16"
    f = value_and_gradient(functools.partial(function, **WINDOWS["k3 s2 p1"], **options))
    x = oracle.tied(CONCRETE[2][0]).astype(jnp.dtype(dtype))
    actual, expected = export_it(f, symbolic(2, dtype)).call(x), f(x)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(e, np.float64), rtol=float(jnp.finfo(dtype).eps)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_symbolic_channels_first(kind):
    function, options = KINDS[kind]
    f = value_and_gradient(
        functools.partial(function, **WINDOWS["k3 s2 p1"], **options, data_format="channels_first")
    )
    shape = export.symbolic_shape("n, c, h, w")
    exported = export_it(f, jax.ShapeDtypeStruct(shape, np.float32))
    for concrete in ((2, 3, 9, 12), (1, 1, 30, 8)):
        x = oracle.distinct(concrete)
        check_close(exported.call(x), f(x))


def test_second_derivatives_of_an_exported_program():
    f = functools.partial(jax_mps.l2_pool, window_shape=(3, 3), strides=2, padding=1)
    exported = export.export(jax.jit(f), platforms=PLATFORMS)(symbolic(2))
    again = export.deserialize(exported.serialize(vjp_order=2))
    x = oracle.distinct(CONCRETE[2][0])

    def gradient(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return jax.grad(lambda x: jnp.sum(f(x) ** 2 * jnp.sin(f(x))))

    def curvature(f: Callable[[Any], Any]) -> Any:
        return jax.grad(lambda x: jnp.sum(gradient(f)(x) ** 2))(x)

    for order, expected in ((gradient(again.call)(x), gradient(f)(x)), (curvature(again.call), curvature(f))):
        np.testing.assert_allclose(order, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_export_runs_where_the_library_is_not(tmp_path):
    f = value_and_gradient(functools.partial(jax_mps.max_pool, **WINDOWS["k3 s2 p1"]))
    x = oracle.distinct(CONCRETE[2][0])
    (tmp_path / "exported").write_bytes(
        export.export(jax.jit(f), platforms=PLATFORMS)(symbolic(2)).serialize()
    )
    np.save(tmp_path / "x.npy", x)
    code = f"""
import sys, pathlib, numpy as np
from jax import export
folder = pathlib.Path({str(tmp_path)!r})
exported = export.deserialize(bytearray((folder / "exported").read_bytes()))
y, dx = exported.call(np.load(folder / "x.npy"))
assert not any(name.startswith("jax_mps") for name in sys.modules)
np.savez(folder / "out.npz", y, dx)
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
    with np.load(tmp_path / "out.npz") as out:
        check_close([out["arr_0"], out["arr_1"]], f(x))


def test_forcing_the_native_path_in_an_export_is_an_error(native):
    f = functools.partial(jax_mps.max_pool, window_shape=(2, 2), strides=2, implementation="native")
    with pytest.raises(ValueError, match="implementation='native' needs static shapes"):
        export.export(jax.jit(f))(symbolic(2))
    with pytest.raises(ValueError, match="implementation='native' cannot be had: an exported program"):
        export.export(jax.jit(f))(jax.ShapeDtypeStruct((1, 4, 4, 1), np.float32))


def test_imports_without_what_exports_need():
    """JAX before 0.6 has `jax.export` only where absl-py is installed, which is no dependency of its own."""
    code = (
        "import sys; sys.modules['absl'] = None\n"
        "import jax, jax_mps\n"
        "print(jax_mps.max_pool(jax.numpy.arange(4.0).reshape(1, 4, 1), 2, strides=2).ravel())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "[1. 3.]\n"), run.stderr
