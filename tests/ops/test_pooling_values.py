"""Values of the public functions against loops over windows and taps."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grid
import jax_mps
import oracle
from jax_mps.geometry import Axis, Divisor, Window
from jax_mps.ops.avg_pooling import pool as average_windows
from jax_mps.ops.l2_pooling import gradient as l2_windows_gradient
from jax_mps.ops.l2_pooling import pool as l2_windows
from jax_mps.ops.max_pooling import gradient as max_windows_gradient
from jax_mps.ops.max_pooling import pool as max_windows


def check(op, x, window_shape, y, **call):
    expected = op.oracle_pool(x, window_shape, **call)
    assert y.dtype == x.dtype
    if op is grid.MAX:
        oracle.assert_same(y, expected)
    else:
        scale = op.pool_error(x, window_shape, **call)
        oracle.assert_close(y, expected, length=int(np.prod(window_shape)), scale=scale)


@functools.cache
def pooled(name, data_format, implementation):
    """The images and results of all functions in one compiled program, for several tests."""
    case = grid.CASES[name]
    call = {**case.geometry, "data_format": data_format, "implementation": implementation}
    images = {op.name: op.image(case.shape(data_format), np.float32) for op in grid.OPS}

    @jax.jit
    def run(images):
        results = {
            op.name: op.pool(images[op.name], case.window_shape, **call, **op.options) for op in grid.OPS
        }
        results["indices"] = jax_mps.max_pool(images["max"], case.window_shape, **call, return_indices=True)
        return results

    return images, run(images)


@pytest.mark.parametrize("op", grid.OPS, ids=str)
@grid.each_path
def test_geometry(name, op, data_format, implementation):
    case = grid.CASES[name]
    images, results = pooled(name, data_format, implementation)
    call = {**case.geometry, **op.options, "data_format": data_format}
    check(op, images[op.name], case.window_shape, results[op.name], **call)
    if op is grid.MAX:
        y, indices = results["indices"]
        expected = oracle.max_pool(images["max"], case.window_shape, **call)
        assert indices.dtype == np.int32
        oracle.assert_same(y, expected[0])
        oracle.assert_same(indices, expected[1])


@pytest.mark.parametrize("name", ["stem", "nine-s2", "volume-ceil"])
@pytest.mark.parametrize("op", grid.FAMILIES, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_floating_dtypes(dtype, op, name, implementation, x64):
    case = grid.CASES[name]
    call = {**case.geometry, **op.options}
    x = op.image(case.shape("channels_last"), jnp.dtype(dtype))
    y = op.pool(x, case.window_shape, **call, implementation=implementation)
    check(op, x, case.window_shape, y, **call)


@pytest.mark.parametrize("name", ["stem", "nine-s2", "blocks-ragged"])
@pytest.mark.parametrize("dtype", grid.INTEGERS)
def test_integers(dtype, name, implementation):
    case = grid.CASES[name]
    rng = np.random.default_rng(1)
    shape = case.shape("channels_last")
    if dtype == "bool":
        x = rng.random(shape) < 0.2
    else:
        # The extremes of the type are the likeliest to be lost; half of the image is the lowest number.
        info = np.iinfo(dtype)
        x = rng.integers(info.min, info.max, size=shape, dtype=dtype, endpoint=True)
        x = np.where(rng.random(shape) < 0.5, np.array(info.min, dtype), x)
        x[0] = info.min
        x[1, ..., 0] = info.max

    @jax.jit
    def run(x):
        call = {**case.geometry, "implementation": implementation}
        plain = jax_mps.max_pool(x, case.window_shape, **call)
        return plain, *jax_mps.max_pool(x, case.window_shape, **call, return_indices=True)

    plain, y, indices = run(x)
    expected, position = oracle.max_pool(x, case.window_shape, **case.geometry)
    assert plain.dtype == y.dtype == dtype
    oracle.assert_same(plain, expected)
    oracle.assert_same(y, expected)
    oracle.assert_same(indices, position)


@pytest.mark.parametrize("name", ["stem", "volume-padded"])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("op", grid.FAMILIES, ids=str)
def test_batch_axes(op, batch, name, implementation):
    case = grid.CASES[name]
    images = {f: op.image(case.shape(f, batch), np.float32) for f in grid.FORMATS}

    @jax.jit
    def run(images):
        call = {**case.geometry, "implementation": implementation}
        return {f: op.pool(x, case.window_shape, **call, data_format=f) for f, x in images.items()}

    for data_format, y in run(images).items():
        check(op, images[data_format], case.window_shape, y, **case.geometry, data_format=data_format)


@pytest.mark.parametrize("data_format", grid.FORMATS)
@pytest.mark.parametrize("op", grid.FAMILIES, ids=str)
def test_a_batch_equals_its_images_bit_by_bit(op, data_format, implementation):
    case = grid.CASES["stem"]
    x = op.image(case.shape(data_format, (5,)), np.float32)
    call = {**case.geometry, "data_format": data_format, "implementation": implementation}
    whole = op.pool(x, case.window_shape, **call)
    parts = [op.pool(x[i : i + 1], case.window_shape, **call) for i in range(5)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("channels", [1, 4, 7, 16, 33, 64])
@pytest.mark.parametrize("data_format", grid.FORMATS)
@pytest.mark.parametrize("op", grid.FAMILIES, ids=str)
def test_channels_equal_one_channel_each(op, data_format, channels, implementation):
    """Vector registers hold many channels at once, with a tail."""
    case = grid.CASES["stem"]
    x = op.image(case.shape(data_format, (1,), channels), np.float32)
    call = {**case.geometry, "data_format": data_format}
    y = op.pool(x, case.window_shape, **call, implementation=implementation)
    check(op, x, case.window_shape, y, **call)


@pytest.mark.parametrize("op", grid.OPS, ids=str)
def test_eager_equals_jit_bit_by_bit(op, implementation):
    case = grid.CASES["dilated"]
    x = op.image(case.shape("channels_last"), np.float32)
    pool = functools.partial(op.pool, **case.geometry, **op.options, implementation=implementation)
    compiled = jax.jit(pool, static_argnums=1)(x, case.window_shape)
    np.testing.assert_array_equal(pool(x, case.window_shape), compiled)


@pytest.mark.parametrize("op", grid.OPS, ids=str)
def test_both_paths_agree(op, native):
    case = grid.CASES["stem"]
    x = op.image(case.shape("channels_last"), np.float32)
    one, other = (
        op.pool(x, case.window_shape, **case.geometry, **op.options, implementation=implementation)
        for implementation in ("native", "xla")
    )
    if op is grid.MAX:
        oracle.assert_same(one, other)
    else:
        scale = op.pool_error(x, case.window_shape, **case.geometry, **op.options)
        oracle.assert_close(one, other, length=case.taps, scale=scale)


def written(window_shape, strides, padding="VALID", window_dilation=1):
    return locals()


WAYS = {
    "ints": (written(3, 2, 1), written((3, 3), (2, 2), ((1, 1), (1, 1)))),
    "lists": (written([3, 2], 1), written((3, 2), (1, 1))),
    "one-list": (written(2, [1, 3]), written((2, 2), (1, 3))),
    "dilation-tuple": (written(2, 1, 0, (1, 3)), written((2, 2), (1, 1), ((0, 0), (0, 0)), (1, 3))),
    "padding-lists": (written(2, 1, [[0, 1], [1, 0]]), written((2, 2), (1, 1), ((0, 1), (1, 0)))),
    "numpy": (written(np.int64(2), np.array([2, 1])), written((2, 2), (2, 1))),
    "same": (written(2, 2, "same"), written((2, 2), (2, 2), "SAME")),
    "valid": (written(2, 2, "valid"), written((2, 2), (2, 2), ((0, 0), (0, 0)))),
}


@pytest.mark.parametrize("op", grid.OPS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_write_arguments(op, way):
    short, long = WAYS[way]
    x = op.image((2, 7, 9, 3), np.float32)
    y = op.pool(x, **long, **op.options)
    np.testing.assert_array_equal(op.pool(x, **short, **op.options), y)
    window_shape = long["window_shape"]
    check(op, x, y=y, **{**long, **op.options, "window_shape": window_shape})


@pytest.mark.parametrize("op", grid.FAMILIES, ids=str)
def test_nested_lists_are_arrays(op):
    y = op.pool([[[1.0], [-5.0], [2.0], [4.0]]], 2, strides=2)
    expected = {"max": [1, 4], "average": [-2, 3], "l2": [26**0.5, 20**0.5]}[op.name]
    np.testing.assert_allclose(y[0, :, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("op", grid.FAMILIES, ids=str)
def test_the_result_keeps_no_weak_type(op):
    x = jnp.broadcast_to(1.0, (1, 4, 1))
    assert x.weak_type
    assert not op.pool(x, 2, strides=2).weak_type


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation"), [(13, 3, 2, 1), (8, 2, 3, 1), (7, 3, 5, 2), (12, 5, 4, 1)]
)
def test_string_padding_is_that_of_lax(size, kernel, stride, dilation, padding):  # fmt: skip
    x = oracle.normal((1, size, 2))
    y = jax_mps.max_pool(x, (kernel,), strides=stride, padding=padding, window_dilation=dilation)
    expected = jax.lax.reduce_window(
        x, -np.inf, jax.lax.max, (1, kernel, 1), (1, stride, 1), padding, window_dilation=(1, dilation, 1)
    )
    np.testing.assert_array_equal(y, expected)


EDGES = [
    # (kernel, stride, dilation, offset, out) of each axis; some windows lie wholly outside
    [(3, 2, 1, 0, 4), (2, 1, 1, 1, 6)],
    [(2, 5, 1, -7, 4), (3, 4, 1, -6, 5)],
    [(2, 1, 3, -1, 7), (3, 2, 2, 4, 5)],
    [(9, 3, 1, 2, 3), (1, 1, 1, -2, 9)],
    [(3, 1, 1, 9, 4), (2, 2, 1, 6, 2)],
]


@pytest.mark.parametrize("edge", ["zero", "clamp"])
@pytest.mark.parametrize("axes", EDGES, ids=str)
def test_edge_modes_of_placed_windows(axes, edge, implementation):
    sizes = (6, 5)
    x, g = oracle.normal((2, *sizes, 3)), oracle.normal((2, *(a[-1] for a in axes), 3), seed=1)
    window = Window(tuple(Axis.from_offset(n, *a) for n, a in zip(sizes, axes, strict=True)))
    lines = [oracle.mps_line(n, *a) for n, a in zip(sizes, axes, strict=True)]
    spatial_x, spatial_g = oracle.spatial_first(x, 1, 2), oracle.spatial_first(g, 1, 2)
    call = {"window": window, "start": 1, "edge": edge, "implementation": implementation}

    @jax.jit
    def run(g, x):
        return (
            max_windows(x, **call),
            max_windows_gradient(g, x, **call),
            l2_windows(x, **call),
            l2_windows_gradient(g, x, **call),
        )

    expected = (
        oracle.max_of(spatial_x, lines, edge)[0],
        oracle.max_gradient_of(spatial_g, spatial_x, lines, edge),
        oracle.norm_of(spatial_x, lines, edge),
        oracle.norm_gradient_of(spatial_g, spatial_x, lines, edge),
    )
    for actual, reference in zip(run(g, x), expected, strict=True):
        oracle.assert_close(actual, oracle.back(reference, x.shape, 1, 2), length=window.taps)


@pytest.mark.parametrize("band", [(0, 0), (1, 2), (9, 9)], ids=str)
@pytest.mark.parametrize("axes", EDGES, ids=str)
def test_bands_of_placed_windows(axes, band, implementation):
    sizes = (6, 5)
    x = oracle.normal((2, *sizes, 3))
    window = Window(tuple(Axis.from_offset(n, *a) for n, a in zip(sizes, axes, strict=True)))
    lines = [oracle.mps_line(n, *a) for n, a in zip(sizes, axes, strict=True)]
    y = average_windows(x, window, 1, Divisor(0, (band, band)), implementation=implementation)
    divisor = oracle.counted(lines, [band, band])
    expected = oracle.average_of(oracle.spatial_first(x, 1, 2), lines, divisor)
    oracle.assert_close(y, oracle.back(expected, x.shape, 1, 2), length=window.taps, scale=3)


@pytest.mark.parametrize("op", grid.OPS, ids=str)
@pytest.mark.parametrize(
    ("shape", "case"),
    [
        ((2, 64, 128, 3), grid.Case((64, 128), (3, 2), (2, 2), 1)),
        ((64, 128), grid.Case((64,), (3,), (2,), 1)),
        ((2, 8192, 2), grid.Case((8192,), (2,), (2,))),
    ],
    ids=["2d", "1d", "long"],
)
def test_large_planes(op, shape, case, implementation):
    """XLA's CPU compiler treats programs above some sizes differently, and has been wrong there."""
    x = op.image(shape, np.float32)
    y = op.pool(x, case.window_shape, **case.geometry, **op.options, implementation=implementation)
    check(op, x, case.window_shape, y, **case.geometry, **op.options)


@pytest.mark.parametrize("seed", range(40))
def test_random_calls(seed, implementation):
    """Value and both gradients of a random call."""
    rng = np.random.default_rng(seed)
    op = grid.OPS[seed % len(grid.OPS)]
    rank = int(rng.integers(1, 4))
    sizes = tuple(int(n) for n in rng.integers(1, {1: 40, 2: 14, 3: 8}[rank], size=rank))
    kernel = tuple(int(n) for n in rng.integers(1, {1: 12, 2: 6, 3: 4}[rank], size=rank))
    strides = tuple(int(n) for n in rng.integers(1, 5, size=rank))
    dilation = tuple(int(n) for n in rng.integers(1, 4, size=rank))
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    pads = tuple((int(rng.integers(-1, e)), int(rng.integers(-1, e))) for e in extents)
    case = grid.Case(sizes, kernel, strides, pads, dilation, bool(rng.integers(2)))
    data_format = grid.FORMATS[int(rng.integers(2))]
    call = {**case.geometry, **op.options, "data_format": data_format}
    x = op.image(case.shape(data_format), np.float32, seed)
    axes = oracle.lines(sizes, kernel, strides, pads, dilation, case.ceil_mode)
    valid = all(
        a.windows > 0 and a.last > a.first and all(a.counted(i, (0, 0)) for i in range(a.windows))
        for a in axes
    )
    if not valid:
        with pytest.raises(ValueError, match=r"window_shape|padding"):
            op.pool(x, kernel, **call, implementation=implementation)
        return
    y, vjp = jax.vjp(lambda x: op.pool(x, kernel, **call, implementation=implementation), x)
    check(op, x, kernel, y, **call)
    g = oracle.normal(y.shape, seed=seed + 1)
    expected, scale = op.oracle_gradient(g, x, kernel, **call), op.gradient_error(g, x, kernel, **call)
    oracle.assert_close(vjp(g)[0], expected, length=case.taps, scale=scale)
    documented = op.gradient(g, x, kernel, **call, implementation=implementation)
    oracle.assert_close(documented, expected, length=case.taps, scale=scale)
