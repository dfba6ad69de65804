"""Bad arguments raise while tracing, and say which argument, which value, and which rule."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grid
import jax_mps
from processes import finish, start

X = np.zeros((2, 8, 9, 3), np.float32)
LAST = {"window_shape": (2, 2), "strides": (2, 2)}


def pool_calls():
    """Every public function that takes windows, as a function of an image and arguments."""

    def gradient(op):
        def call(x, window_shape, **arguments):
            g = jnp.zeros((2, 4, 4, 3), jnp.asarray(x).dtype)
            return op.gradient(g, x, window_shape, **arguments)

        return call

    return {
        "max_pool": jax_mps.max_pool,
        "avg_pool": jax_mps.avg_pool,
        "l2_pool": jax_mps.l2_pool,
        "max_pool_gradient": gradient(grid.MAX),
        "avg_pool_gradient": gradient(grid.AVERAGE),
        "l2_pool_gradient": gradient(grid.L2),
    }


POOLS = pool_calls()


def refuse(call, error, match, x=X, **arguments):
    """Eagerly, while tracing for `jit`, and in the abstract."""
    arguments = {**LAST, **arguments}
    with pytest.raises(error, match=match):
        call(x, **arguments)
    with pytest.raises(error, match=match):
        jax.jit(lambda x: call(x, **arguments)).trace(x)
    with pytest.raises(error, match=match):
        jax.eval_shape(lambda x: call(x, **arguments), x)


BAD_VALUES = {
    "window of 0": ({"window_shape": (2, 0)}, r"window_shape must be at least 1 .*\(2, 0\)"),
    "window below 0": ({"window_shape": -1, "strides": 1}, r"window_shape must be at least 1 .*-1"),
    "stride of 0": ({"strides": 0}, r"strides must be at least 1 .*0"),
    "stride below 0": ({"strides": (2, -2)}, r"strides must be at least 1 .*\(2, -2\)"),
    "dilation of 0": ({"window_dilation": 0}, r"window_dilation must be at least 1 .*0"),
    "strides too short": ({"strides": (2,)}, r"strides has length 1, but window_shape has length 2"),
    "strides too long": ({"strides": (2, 2, 2)}, r"strides has length 3, but window_shape has length 2"),
    "dilation too long": (
        {"window_dilation": (1, 1, 1)},
        r"window_dilation has length 3, but window_shape has length 2",
    ),
    "empty window": (
        {"window_shape": (), "strides": 1},
        r"window_shape must name 1 to 3 spatial axes, got 0",
    ),
    "four axes": (
        {"window_shape": (1, 1, 1, 1), "strides": 1},
        r"window_shape must name 1 to 3 spatial axes, got 4",
    ),
    "too few pairs": (
        {"padding": ((1, 1),)},
        r"padding must have one \(low, high\) pair for each of the 2 .*\(\(1, 1\),\)",
    ),
    "too many pairs": (
        {"padding": ((0, 0),) * 3},
        r"padding must have one \(low, high\) pair for each of the 2",
    ),
    "pairs of one": ({"padding": ((1,), (1,))}, r"padding must be .* pair .*\(\(1,\), \(1,\)\)"),
    "pairs of three": ({"padding": ((1, 1, 1), (1, 1, 1))}, r"padding must be .* pair"),
    "no pairs": ({"padding": (1, 1)}, r"padding must be .* pair .*\(1, 1\)"),
    "strings in pairs": ({"padding": ("SAME", "SAME")}, r"padding must be .* pair"),
    "unknown padding": (
        {"padding": "FULL"},
        r"padding must be 'VALID', 'SAME', 'SAME_LOWER', an int or pairs, got 'FULL'",
    ),
    "ceil with SAME_LOWER": (
        {"padding": "SAME_LOWER", "ceil_mode": True},
        r"ceil_mode=True needs padding as an int or pairs, got 'SAME_LOWER'",
    ),
    "ceil with SAME": (
        {"padding": "SAME", "ceil_mode": True},
        r"ceil_mode=True needs padding as an int or pairs, got 'SAME'",
    ),
    "ceil with VALID": (
        {"padding": "VALID", "ceil_mode": True},
        r"ceil_mode=True needs padding .* got 'VALID'",
    ),
    "unknown layout": (
        {"data_format": "HWCN"},
        r"data_format must be one of 'channels_last', 'channels_first', 'NWC', .*, got 'HWCN'",
    ),
    "layout of another rank": (
        {"data_format": "NWC"},
        r"data_format='NWC' has 1 spatial axes, the other arguments 2",
    ),
    "no layout": ({"data_format": None}, r"data_format must be .* got None"),
    "window too large": (
        {"window_shape": (9, 2)},
        r"window_shape=9 .* spans 9 pixels, more than the 8 of spatial axis 0 .* below 1",
    ),
    "dilated too large": (
        {"window_shape": (2, 3), "window_dilation": (1, 5)},
        r"window_shape=3 with window_dilation=5 spans 11 .* 9 of spatial axis 1",
    ),
    "cropped away": (
        {"padding": ((-4, -4), (0, 0))},
        r"spatial axis 0 .*padding \(-4, -4\).* output size would be below 1",
    ),
    "window in the padding": (
        {"padding": ((2, 0), (0, 0))},
        r"padding=\(2, 0\) of spatial axis 0 leaves window 0 without a valid tap",
    ),
    "last window in the padding": (
        {"padding": ((0, 0), (0, 4))},
        r"padding=\(0, 4\) of spatial axis 1 leaves window \d without a valid tap",
    ),
    "window steps over": (
        {"x": X[:, :1, :1], "window_dilation": 2, "padding": 1},
        r"padding=\(1, 1\) of spatial axis 0 leaves window 0 without a valid tap",
    ),
    "unknown implementation": (
        {"implementation": "cuda"},
        r"implementation must be None, 'native' or 'xla', got 'cuda'",
    ),
    "implementation of a wrong type": (
        {"implementation": True},
        r"implementation must be None, 'native' or 'xla', got True",
    ),
}


@pytest.mark.parametrize("name", BAD_VALUES)
@pytest.mark.parametrize("function", POOLS)
def test_bad_values(function, name):
    arguments, match = BAD_VALUES[name]
    refuse(POOLS[function], ValueError, match, **arguments)


BAD_TYPES = {
    "float window": ({"window_shape": 2.0}, r"window_shape must be an int .*2\.0"),
    "float in window": ({"window_shape": (2, 2.5)}, r"window_shape must be an int .*2\.5"),
    "string window": ({"window_shape": "2"}, r"window_shape must be an int .*'2'"),
    "bool window": ({"window_shape": True}, r"window_shape must be an int .*True"),
    "no window": ({"window_shape": None}, r"window_shape must be an int .*None"),
    "float strides": ({"strides": (1.0, 1)}, r"strides must be an int .*1\.0"),
    "string strides": ({"strides": "same"}, r"strides must be an int .*'same'"),
    "no strides": ({"strides": None}, r"strides must be an int .*None"),
    "float array strides": ({"strides": np.array([1.0, 2.0])}, r"strides must be an int .*1"),
    "float dilation": ({"window_dilation": 1.5}, r"window_dilation must be an int .*1\.5"),
    "float padding": ({"padding": 1.0}, r"padding must be an int .*1\.0"),
    "float in padding": ({"padding": ((0, 0), (0.5, 0))}, r"padding must be an int .*0\.5"),
    "no padding": ({"padding": None}, r"padding must be an int .*None"),
    "int ceil_mode": ({"ceil_mode": 1}, r"ceil_mode must be a bool, got .*1"),
    "string ceil_mode": ({"ceil_mode": "yes"}, r"ceil_mode must be a bool, got .*'yes'"),
}


@pytest.mark.parametrize("name", BAD_TYPES)
@pytest.mark.parametrize("function", POOLS)
def test_bad_types(function, name):
    arguments, match = BAD_TYPES[name]
    refuse(POOLS[function], TypeError, match, **arguments)


@pytest.mark.parametrize("argument", ["window_shape", "strides", "window_dilation", "padding"])
@pytest.mark.parametrize("function", POOLS)
def test_traced_values(function, argument):
    @jax.jit
    def call(value):
        return POOLS[function](X, **{**LAST, argument: value})

    with pytest.raises(TypeError, match=f"{argument} must be an int known at trace time"):
        call(2)
    if argument != "padding":
        with pytest.raises(TypeError, match=f"{argument} must be an int known at trace time"):
            jax.jit(lambda v: POOLS[function](X, **{**LAST, argument: (v, 2)}))(2)


@pytest.mark.parametrize("function", POOLS)
def test_required_arguments(function):
    with pytest.raises(TypeError, match="strides"):
        POOLS[function](X, (2, 2))


@pytest.mark.parametrize("function", ["max_pool", "avg_pool", "l2_pool"])
def test_keywords_only(function):
    with pytest.raises(TypeError, match="positional"):
        POOLS[function](X, 2, 2)


@pytest.mark.parametrize("function", ["max_pool", "avg_pool", "l2_pool"])
def test_ranks(function):
    call = POOLS[function]
    for shape in ((), (4,), (4, 4)):
        refuse(
            call,
            ValueError,
            rf"window_shape=\(2, 2\) needs 2 spatial axes .* got an array of {len(shape)} axes",
            np.zeros(shape, np.float32),
            strides=1,
        )
    for shape in ((4, 4), (2,) * 6):
        refuse(
            call,
            ValueError,
            rf"window_shape=2 as an int .* got {len(shape)} axes",
            np.zeros(shape, np.float32),
            window_shape=2,
            strides=2,
        )


@pytest.mark.parametrize("dtype", ["complex64", "int4", "uint4", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("function", POOLS)
def test_unsupported_dtypes(function, dtype):
    if (dtype == "complex64" and "avg" in function) or (dtype.startswith("float8") and "max" in function):
        return  # see test_dtypes.py
    x = jnp.zeros(X.shape, jnp.dtype(dtype))
    name = "x" if "gradient" not in function else "source_gradient" if "avg" in function else "source"
    refuse(POOLS[function], TypeError, rf"{name} must have a dtype of float32, .*, got {dtype}", x)


@pytest.mark.parametrize("dtype", grid.INTEGERS)
@pytest.mark.parametrize("function", [name for name in POOLS if name != "max_pool"])
def test_integers_are_for_max_pool(function, dtype):
    refuse(
        POOLS[function],
        TypeError,
        rf"must have a dtype of float32, float64, float16, bfloat16.*, got {dtype}",
        np.zeros(X.shape, dtype),
    )


@pytest.mark.parametrize("function", ["max_pool", "avg_pool", "l2_pool"])
def test_not_an_array(function):
    with pytest.raises(TypeError):
        POOLS[function]("image", 2, strides=2)


# --- options of one function --------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["avg_pool", "avg_pool_gradient"])
def test_average_options(function):
    call = POOLS[function]
    refuse(call, ValueError, "divisor_override must not be 0", divisor_override=0)
    refuse(call, TypeError, r"divisor_override must be an int .*1\.5", divisor_override=1.5)
    refuse(call, TypeError, r"divisor_override must be an int .*True", divisor_override=True)
    refuse(call, TypeError, r"divisor_override must be an int .*'2'", divisor_override="2")
    refuse(call, TypeError, "count_include_pad must be a bool, got .*1", count_include_pad=1)
    refuse(call, TypeError, "count_include_pad must be a bool, got .*None", count_include_pad=None)
    with pytest.raises(TypeError, match="divisor_override must be an int known at trace time"):
        jax.jit(lambda n: call(X, **LAST, divisor_override=n))(2)


@pytest.mark.parametrize("value", [1, None, "yes", np.ones(2, bool)], ids=str)
def test_return_indices_is_a_bool(value):
    refuse(jax_mps.max_pool, TypeError, "return_indices must be a bool", return_indices=value)


@pytest.mark.parametrize("op", [grid.MAX, grid.L2], ids=str)
def test_gradients_that_do_not_match(op):
    good = np.zeros((2, 4, 4, 3), np.float32)

    def call(g, **arguments):
        return op.gradient(g, X, **arguments)

    assert call(good, **LAST).shape == X.shape
    match = r"source_gradient must have shape \(2, 4, 4, 3\) .*pooled source.*, got "
    for shape in ((2, 4, 4, 1), (1, 4, 4, 3), (2, 4, 5, 3), (2, 4, 4), (2, 3, 4, 4)):
        refuse(call, ValueError, match, np.zeros(shape, np.float32))
    refuse(
        call,
        TypeError,
        "source_gradient must have the dtype of source, float32, got float16",
        good.astype(np.float16),
    )
    refuse(call, TypeError, "source_gradient must have a dtype of .* got int32", good.astype(np.int32))


def test_average_gradients_that_do_not_match():
    def call(g, source_shape=X.shape, **arguments):
        return jax_mps.avg_pool_gradient(g, source_shape, **arguments)

    good = np.zeros((2, 4, 4, 3), np.float32)
    assert call(good, **LAST).shape == X.shape
    match = r"source_gradient must have shape \(2, 4, 4, 3\) .*source_shape.*, got "
    for shape in ((2, 4, 4, 1), (2, 4, 5, 3), (2, 4, 4)):
        refuse(call, ValueError, match, np.zeros(shape, np.float32))
    refuse(call, TypeError, "source_shape must be a sequence of ints", good, source_shape=5)
    refuse(call, TypeError, "source_shape must be a sequence of ints", good, source_shape="abcd")
    refuse(call, TypeError, r"source_shape must be an int .*8\.0", good, source_shape=(2, 8.0, 9, 3))
    refuse(call, ValueError, "source_shape must not have negative", good, source_shape=(2, -8, 9, 3))


def test_unpool():
    y, indices = np.zeros((2, 4, 3), np.float32), np.zeros((2, 4, 3), np.int32)

    def call(y, indices=indices, output_shape=(8,), window_shape=None, strides=None, **arguments):
        return jax_mps.max_unpool(y, indices, output_shape, **arguments)

    assert call(y).shape == (2, 8, 3)
    refuse(
        call,
        TypeError,
        "indices must have a dtype of int8, .*uint64, got float32",
        y,
        indices=indices.astype(np.float32),
    )
    refuse(call, TypeError, "indices must have a dtype of .*, got bool", y, indices=indices.astype(bool))
    refuse(
        call,
        ValueError,
        r"indices must have shape \(2, 4, 3\) .*that of y.*, got \(2, 3, 3\)",
        y,
        indices=indices[:, 1:],
    )
    refuse(
        call, ValueError, r"indices must have shape \(2, 4, 3\) .*, got \(1, 4, 3\)", y, indices=indices[:1]
    )
    refuse(call, TypeError, "y must have a dtype of .* got complex64", y.astype(np.complex64))
    refuse(call, TypeError, "output_shape must be a sequence of ints, got int 8", y, output_shape=8)
    refuse(call, TypeError, "output_shape must be a sequence of ints", y, output_shape="8")
    refuse(call, TypeError, r"output_shape must be an int .*8\.0", y, output_shape=(8.0,))
    refuse(call, ValueError, "output_shape must not have negative", y, output_shape=(-8,))
    refuse(
        call,
        ValueError,
        r"output_shape must be 1 to 3 spatial sizes of at least 1 .*\(0,\)",
        y,
        output_shape=(0,),
    )
    refuse(call, ValueError, r"output_shape must be 1 to 3 .*\(\)", y, output_shape=())
    refuse(call, ValueError, r"output_shape must be 1 to 3 .*\(2, 2, 2, 2\)", y, output_shape=(2,) * 4)
    refuse(
        call, ValueError, r"output_shape must be .* fewer than 2\*\*31 pixels", y, output_shape=(2**16, 2**15)
    )
    refuse(
        call,
        ValueError,
        r"y must have 3 spatial axes and a channel axis, got shape \(2, 4, 3\)",
        y,
        output_shape=(2, 2, 2),
    )
    refuse(
        call,
        ValueError,
        "data_format must be one of 'channels_last', .*, got 'NCL'",
        y,
        data_format="NCL",
    )
    refuse(
        call,
        ValueError,
        "implementation must be None, 'native' or 'xla', got 'fast'",
        y,
        implementation="fast",
    )
    with pytest.raises(TypeError, match="output_shape must be an int known at trace time"):
        jax.jit(lambda n: call(y, output_shape=(n,)))(8)


# --- the native implementation where it cannot be had -------------------------------------------------

WITHOUT_NATIVE = """
import numpy as np, jax_mps
from without_native import check_refused
x = np.arange(8, dtype=np.float32).reshape(1, 8, 1)
y, at = jax_mps.max_pool(x, 2, strides=2, return_indices=True)
np.testing.assert_array_equal(y.ravel(), [1, 3, 5, 7])
g = np.ones((1, 4, 1), np.float32)
calls = [
    lambda i: jax_mps.max_pool(x, 2, strides=2, implementation=i),
    lambda i: jax_mps.avg_pool(x, 2, strides=2, implementation=i),
    lambda i: jax_mps.l2_pool(x, 2, strides=2, implementation=i),
    lambda i: jax_mps.max_pool_gradient(g, x, 2, strides=2, implementation=i),
    lambda i: jax_mps.avg_pool_gradient(g, x.shape, 2, strides=2, implementation=i),
    lambda i: jax_mps.l2_pool_gradient(g, x, 2, strides=2, implementation=i),
    lambda i: jax_mps.max_unpool(y, at, (8,), implementation=i),
]
for call in calls:
    np.testing.assert_array_equal(call(None), call("xla"))
check_refused(calls)
print("done")
"""


def test_native_switched_off():
    assert finish(start(WITHOUT_NATIVE, JAX_MPS_NATIVE="off")) == "done\n"


# --- empty arrays are not bad arguments ---------------------------------------------------------------


@pytest.mark.parametrize("data_format", grid.FORMATS)
@pytest.mark.parametrize(("batch", "channels"), [((0,), 3), ((2,), 0), ((2, 0), 3), ((0,), 0)], ids=str)
@pytest.mark.parametrize("op", grid.OPS, ids=str)
def test_empty_batches_and_channels(op, batch, channels, data_format, implementation):
    case = grid.CASES["stem"]
    shape = case.shape(data_format, batch, channels)
    pooled = case._replace(sizes=(5, 4)).shape(data_format, batch, channels)
    call = {**case.geometry, **op.options, "data_format": data_format, "implementation": implementation}
    x, g = np.zeros(shape, np.float32), np.zeros(pooled, np.float32)

    @jax.jit
    def run(g, x):
        y, vjp = jax.vjp(lambda x: op.pool(x, case.window_shape, **call), x)
        _, tangent = jax.jvp(lambda x: op.pool(x, case.window_shape, **call), (x,), (x,))
        return y, vjp(g)[0], op.gradient(g, x, case.window_shape, **call), tangent

    assert [a.shape for a in run(g, x)] == [pooled, shape, shape, pooled]


@pytest.mark.parametrize(("batch", "channels"), [(0, 3), (2, 0)])
def test_empty_unpooling(batch, channels, implementation):
    x = np.zeros((batch, 6, 4, channels), np.float32)
    y, indices = jax_mps.max_pool(x, 2, strides=2, return_indices=True, implementation=implementation)
    assert y.shape == indices.shape == (batch, 3, 2, channels)
    out, vjp = jax.vjp(lambda y: jax_mps.max_unpool(y, indices, (6, 4), implementation=implementation), y)
    assert out.shape == x.shape
    assert vjp(out)[0].shape == y.shape


def test_an_empty_image_has_no_window():
    for op in grid.FAMILIES:
        refuse(
            op.pool,
            ValueError,
            "output size would be below 1|without a valid tap",
            np.zeros((2, 0, 9, 3), np.float32),
        )
        refuse(op.pool, ValueError, "without a valid tap", np.zeros((2, 0, 9, 3), np.float32), padding=1)
