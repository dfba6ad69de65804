"""Each rule by which stock operations are recognised: one that is ours because of it, or stays stock."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_mps
from jax_mps.stock import choices, convolution, switch, windows
from jax_mps.stock.report import Row

pytestmark = pytest.mark.usefixtures("native")


def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


def lower(f: Callable[..., Any], *operands: Any) -> tuple[Row, ...]:
    """What a function lowers under `accelerate()`; it is not compiled."""
    with jax_mps.accelerate() as handle:
        jax.jit(functools.partial(f)).lower(*operands)
    return handle.report().rows


def run(f: Callable[..., Any], *operands: Any) -> tuple[Row, ...]:
    """The same, compared with stock JAX."""
    expected = jax.jit(functools.partial(f))(*operands)
    with jax_mps.accelerate() as handle:
        found = jax.jit(functools.partial(f))(*operands)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        wide = np.complex128 if np.iscomplexobj(a) else np.float64
        np.testing.assert_allclose(np.asarray(a, wide), np.asarray(b, wide), rtol=1e-4, atol=1e-5)
    return handle.report().rows


# --- convolutions -------------------------------------------------------------------------------------


def convolve(x: Any, k: Any, layout: str = "NHWC", **call: Any) -> Any:
    spatial = layout.strip("NC")
    kernel = spatial + "IO" if layout[-1] == "C" else "OI" + spatial
    ones = (1,) * len(spatial)
    call = {"window_strides": ones, "padding": [(1, 1)] * len(spatial)} | call
    return lax.conv_general_dilated(x, k, dimension_numbers=(layout, kernel, layout), **call)


# Which map each of the three operations of a layer becomes.
LAYERS = {
    "ordinary": ({"window_strides": (2, 2)}, ["gradient_data", "gradient_weights", "forward"]),
    "transposed": ({"lhs_dilation": (2, 2)}, ["forward", "gradient_weights", "gradient_data"]),
}


@pytest.mark.parametrize(("groups", "outputs"), [(1, 16), (8, 8)])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_become_the_map_that_moves_nothing(
    monkeypatch: pytest.MonkeyPatch, layer: str, layout: str, groups: int, outputs: int
) -> None:
    call, maps = LAYERS[layer]
    channels = (8, outputs) if layer == "ordinary" else (outputs, 8)  # of the image and its windows
    first = layout == "NCHW"
    x = normal(2, 8, 9, 10) if first else normal(2, 9, 10, 8)
    k = normal(outputs, 8 // groups, 3, 3) if first else normal(3, 3, 8 // groups, outputs)
    call = call | {"layout": layout, "feature_group_count": groups, "padding": [(1, 2), (0, 1)]}

    def everything(x: Any, k: Any) -> Any:
        y, pull = jax.vjp(functools.partial(convolve, **call), x, k)
        return y, pull(y)

    readings: list[Any] = []

    def choose(reading: Any, platform: Any) -> tuple[bool, str]:
        readings.append(reading)
        return choices.choose(reading, platform)

    monkeypatch.setattr(switch, "choose", choose)
    rows = run(everything, x, k)
    assert all(row.ours for row in rows)
    assert readings[0].map == maps[0]
    assert sorted(reading.map for reading in readings) == sorted(maps)
    for reading in readings:
        assert (reading.batch, reading.outputs, reading.inputs, reading.groups) == (2, *channels, groups)
    with jax_mps.accelerate():
        text = jax.jit(functools.partial(everything)).lower(x, k).compile().as_text()
    moved = re.findall(r"f32\[([\d,]+)\]\S* (?:transpose|reverse|copy)\(", text)
    largest = max((math.prod(map(int, shape.split(","))) for shape in moved), default=0)
    assert largest <= (k.size if first else 0), moved  # PyTorch's kernels are transposed


def test_groups_of_images() -> None:
    def everything(x: Any, k: Any) -> Any:
        y, pull = jax.vjp(functools.partial(convolve, batch_group_count=3), x, k)
        return y, pull(y)

    rows = run(everything, normal(6, 7, 8, 4), normal(3, 3, 4, 9))
    assert len(rows) == 3
    assert all(row.ours for row in rows)


def test_of_readings_that_move_nothing_the_one_with_few_taps_is_taken() -> None:
    # The pixels of one image could as well be taps.
    gradient = jax.grad(lambda k, x: jnp.sum(convolve(x, k) ** 2))
    rows = run(gradient, normal(3, 3, 1, 1), normal(1, 12, 12, 1))
    assert [row.why.partition(":")[0] for row in rows] == ["gradient_data", "gradient_weights"]


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1), (0, 1, 2), (0, 1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize(("groups", "outputs"), [(1, 6), (2, 6), (3, 3), (6, 6), (6, 12)])
def test_kernels_reversed_along_any_axes(axes: tuple[int, ...], groups: int, outputs: int) -> None:
    def f(x: Any, k: Any) -> Any:
        return convolve(x, lax.rev(k, axes), feature_group_count=groups)

    (row,) = run(f, normal(2, 7, 8, 6), normal(3, 3, 6 // groups, outputs))
    assert row.ours


@pytest.mark.parametrize(("dtype", "out"), [("bfloat16", "float32"), ("float16", "float32")])
def test_results_of_the_type_that_sums_have(dtype: str, out: str) -> None:
    f = functools.partial(convolve, preferred_element_type=jnp.dtype(out))
    x, k = (a.astype(jnp.dtype(dtype)) for a in (normal(2, 7, 8, 6), normal(3, 3, 6, 4)))
    (row,) = run(f, x, k)
    assert row.ours
    assert row.result == f"{out}[2,7,8,4]"


CONVOLUTIONS_THAT_STAY: dict[str, tuple[str, Callable[..., Any], Sequence[tuple[int, ...]], str]] = {
    "no pixels": (
        "0 spatial axes",
        lambda x, k: lax.conv_general_dilated(x, k, (), ()),
        [(2, 3), (4, 3)],
        "float32",
    ),
    "four axes": (
        "4 spatial axes",
        lambda x, k: lax.conv_general_dilated(x, k, (1,) * 4, "SAME"),
        [(1, 2, 3, 3, 3, 3), (2, 2, 2, 2, 2, 2)],
        "float32",
    ),
    "integers": ("dtype int32", convolve, [(1, 5, 5, 2), (3, 3, 2, 2)], "int32"),
    "a wide result": (
        "float32 with a result of float64",
        functools.partial(convolve, preferred_element_type=np.float64),
        [(1, 5, 5, 2), (3, 3, 2, 2)],
        "float32",
    ),
    "no pixels but padding": (
        "an empty array",
        functools.partial(convolve, padding=[(2, 2)] * 2),
        [(1, 0, 5, 2), (3, 3, 2, 2)],
        "float32",
    ),
    "no images": ("an empty array", convolve, [(0, 5, 5, 2), (3, 3, 2, 2)], "float32"),
    "no channels": ("an empty array", convolve, [(1, 5, 5, 0), (3, 3, 0, 2)], "float32"),
    "no result": (
        "an empty array",
        functools.partial(convolve, padding=[(0, 0)] * 2),
        [(1, 2, 2, 2), (3, 3, 2, 2)],
        "float32",
    ),
    "every factor": (
        "no array can be the image",
        functools.partial(convolve, window_strides=(2, 1), lhs_dilation=(1, 2), rhs_dilation=(2, 2)),
        [(1, 9, 9, 2), (3, 3, 2, 2)],
        "float32",
    ),
    "a stride without end": (
        "a number of 2**31",
        functools.partial(convolve, window_strides=(2**31, 1)),
        [(1, 9, 9, 2), (3, 3, 2, 2)],
        "float32",
    ),
    "padding without end": (
        "a number of 2**31",
        functools.partial(convolve, window_strides=(2**30, 1), padding=[(2**31, 0), (0, 0)]),
        [(1, 9, 9, 2), (3, 3, 2, 2)],
        "float32",
    ),
    "an image moved away": (
        "a number of 2**31",
        functools.partial(convolve, padding=[(-(2**31), 2**31 - 1), (0, 0)]),
        [(1, 9, 9, 2), (3, 3, 2, 2)],
        "float32",
    ),
    "pixels without end": (
        "a number of 2**31",
        functools.partial(convolve, window_strides=(2**30, 1)),
        [(1, 2**31, 9, 2), (3, 3, 2, 2)],
        "float32",
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS_THAT_STAY)
def test_convolutions_that_stay_stock(x64: None, name: str) -> None:
    why, f, shapes, dtype = CONVOLUTIONS_THAT_STAY[name]
    rows = lower(f, *(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes))
    assert rows
    assert all(why in row.why and not row.ours for row in rows), rows


@pytest.mark.parametrize(
    ("kernel", "dtype", "reason"),
    [
        ((3, 3, 2, 2), "float16", "operands of two dtypes, float32 and float16"),
        ((0, 3, 2, 2), "float32", "an empty array"),
    ],
)
def test_kernels_that_only_the_primitive_would_allow(
    kernel: tuple[int, ...], dtype: str, reason: str
) -> None:
    x, k = jax.ShapeDtypeStruct((1, 5, 5, 2), np.float32), jax.ShapeDtypeStruct((3, 3, 2, 2), np.float32)
    (equation,) = jax.make_jaxpr(convolve)(x, k).eqns
    out = equation.outvars[0].aval
    assert isinstance(convolution.recognise(x, k, out, equation.params), convolution.Reading)
    other = jax.ShapeDtypeStruct(kernel, jnp.dtype(dtype))
    assert convolution.recognise(x, other, out, equation.params) == reason


# The gradient of a 1 x 1 kernel's layer to one channel: each number is a sum over the channels of a pixel.
@pytest.mark.parametrize(
    ("kernel", "inputs", "groups", "ours"),
    [
        ((1, 1, 32, 1), 32, 1, False),
        ((1, 1, 32, 2), 32, 1, True),
        ((3, 3, 32, 1), 32, 1, True),
        ((1, 1, 1, 1), 1, 1, True),
        ((1, 1, 16, 2), 32, 2, True),
    ],
)
def test_sums_over_the_channels_of_a_pixel_stay_stock(
    kernel: tuple[int, ...], inputs: int, groups: int, ours: bool
) -> None:
    f = functools.partial(convolve, padding="SAME", feature_group_count=groups)
    (row,) = run(f, normal(2, 6, 7, inputs), normal(*kernel))
    assert row.ours == ours
    assert row.why.startswith("gradient_data")


# --- windows ------------------------------------------------------------------------------------------


def reduce(x: Any, kind: str, dims: Sequence[int], strides: Sequence[int] | None = None, **call: Any) -> Any:
    """A `reduce_window` without padding, if none is named."""
    x = jnp.asarray(x)
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    least, most = (-np.inf, np.inf) if floating else (np.iinfo(x.dtype).min, np.iinfo(x.dtype).max)
    first, combine = {"max": (least, lax.max), "min": (most, lax.min), "sum": (0, lax.add)}[kind]
    call = {"padding": "VALID"} | call
    return lax.reduce_window(x, np.array(first, x.dtype), combine, dims, strides or (1,) * x.ndim, **call)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint8", "uint16", "uint32"])
@pytest.mark.parametrize("kind", ["max", "min"])
def test_integers(kind: str, dtype: str) -> None:
    info = np.iinfo(dtype)
    x = np.random.default_rng(0).integers(info.min, info.max, (2, 9, 8, 3), dtype, endpoint=True)
    x[0, :4, :4] = info.min
    x[0, 5:, 4:] = info.max
    f = functools.partial(reduce, kind=kind, dims=(1, 2, 3, 1), padding=[(0, 0), (1, 2), (0, 1), (0, 0)])
    (row,) = run(f, x)
    assert row.ours


@pytest.mark.parametrize("kind", ["max", "sum"])
@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((4, 3, 2, 5), (2, 1, 1, 2)),  # those between become one axis
        ((4, 2, 2, 2, 5, 3), (2, 1, 1, 1, 2, 1)),
        ((3, 4, 2, 3), (1, 2, 2, 2)),
        ((5,), (2,)),
        ((4, 3, 2, 5, 3), (2, 1, 1, 1, 1)),
    ],
)
def test_windows_over_any_axes(kind: str, shape: tuple[int, ...], dims: tuple[int, ...]) -> None:
    f = functools.partial(reduce, kind=kind, dims=dims)
    rows = run(lambda x: (f(x), jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))(x)), normal(*shape))
    assert all(row.ours for row in rows), rows


# An axis is covered because of one thing alone.
@pytest.mark.parametrize("kind", ["max", "sum"])
@pytest.mark.parametrize(
    "call",
    [
        {"dims": (2, 1), "padding": [(0, 1), (0, 0)]},
        {"dims": (2, 1), "window_dilation": (3, 1)},
        {"dims": (1, 1), "strides": (2, 1)},
        {"dims": (1, 1), "strides": (2, 1), "padding": [(0, 4), (0, 0)]},
        {"dims": (1, 1), "padding": [(1, 0), (0, 0)]},
        {"dims": (1, 1), "padding": [(0, 1), (0, 0)]},
    ],
)
def test_one_thing_makes_a_window(kind: str, call: dict[str, Any]) -> None:
    (row,) = run(functools.partial(reduce, kind=kind, **call), normal(5, 4))
    assert row.ours


@pytest.mark.parametrize("kind", ["max", "min", "sum"])
@pytest.mark.parametrize("lows", [(1, -1), (-1, 0), (-2, 3), (0, -2)])
@pytest.mark.parametrize("taps", [1, 2])
def test_negative_padding(kind: str, lows: tuple[int, int], taps: int) -> None:
    """XLA's own code ends the process here."""
    x = normal(5, 4)
    f = functools.partial(reduce, kind=kind, dims=(taps, 1))
    fill = np.float32({"max": -np.inf, "min": np.inf, "sum": 0}[kind])
    expected = f(lax.pad(x, fill, [(*lows, 0), (0, 0, 0)]))
    with jax_mps.accelerate() as handle:
        found = jax.jit(functools.partial(f, padding=[lows, (0, 0)]))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    (row,) = handle.report()
    assert row.ours


def padded(x: Any, config: Sequence[tuple[int, int, int]], fill: float = 0, **call: Any) -> Any:
    return reduce(lax.pad(x, np.float32(fill), config), "sum", **call)


# Sums of arrays that were padded with zeros: which operand is read, and as what.
PADDED: dict[str, tuple[Callable[..., Any], str]] = {
    "between": (lambda x: padded(x, [(1, 2, 1), (0, 0, 0)], dims=(3, 1)), "spread sum"),
    "around": (lambda x: padded(x, [(1, 2, 0), (2, 0, 0)], dims=(3, 2), strides=(2, 1)), "sum"),
    "cut": (lambda x: padded(x, [(-1, 2, 0), (0, -2, 0)], dims=(2, 2)), "sum"),
    "cut between": (lambda x: padded(x, [(-1, -1, 2), (0, 0, 0)], dims=(2, 1)), "spread sum"),
    "twice": (
        lambda x: padded(x, [(0, 0, 1), (0, 0, 0)], dims=(3, 1), padding=[(1, 1), (0, 1)]),
        "sum",
    ),
    "then dilated": (
        lambda x: padded(x, [(1, 1, 0), (0, 0, 0)], dims=(3, 1), base_dilation=(2, 1)),
        "spread sum",
    ),
    "between, then dilated": (
        lambda x: padded(x, [(0, 0, 1), (0, 0, 0)], dims=(3, 1), base_dilation=(2, 1)),
        "spread sum",
    ),
    "between, with strides": (
        lambda x: padded(x, [(0, 0, 1), (0, 0, 0)], dims=(3, 1), strides=(2, 1)),
        "sum",
    ),
    "with ones": (lambda x: padded(x, [(1, 2, 1), (0, 0, 0)], 1.0, dims=(3, 1)), "sum"),
    "not at all": (lambda x: reduce(x, "sum", (3, 1), base_dilation=(2, 1)), "spread sum"),
}


@pytest.mark.parametrize("name", PADDED)
def test_sums_of_padded_arrays(name: str) -> None:
    f, reading = PADDED[name]
    (row,) = run(f, normal(7, 6))
    assert row.ours
    assert row.why.startswith(f"{reading}:"), row


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "complex64", "int32", "int8"])
@pytest.mark.parametrize("fill", [0, 1])
def test_sums_of_padded_arrays_of_every_type(x64: None, dtype: str, fill: int) -> None:
    """The fill is read from the program's text, each type of which has another form."""

    def f(x: Any) -> Any:
        padded = lax.pad(x, np.array(fill, x.dtype), [(1, 2, 1), (0, 0, 0)])
        return lax.reduce_window(padded, np.array(0, x.dtype), lax.add, (3, 1), (1, 1), "VALID")

    x = np.arange(12).reshape(4, 3).astype(jnp.dtype(dtype))
    (row,) = run(f, x)
    if row.ours:
        assert row.why.startswith("sum:" if fill else "spread sum:")
    assert row.ours == (dtype not in ("complex64", "int32", "int8"))


def test_windows_of_operands_that_are_read_as_they_were_leave_no_padding() -> None:
    with jax_mps.accelerate():
        text = jax.jit(PADDED["between"][0]).lower(normal(7, 6)).compile().as_text()
    assert " pad(" not in text


WINDOWS_THAT_STAY: dict[str, tuple[str, Callable[..., Any], tuple[int, ...], str]] = {
    "integer sums": ("dtype int32", lambda x: reduce(x, "sum", (2, 2)), (4, 4), "int32"),
    "integer sums between elements": (
        "dtype int32",
        lambda x: reduce(x, "sum", (2, 2), base_dilation=(2, 1)),
        (4, 4),
        "int32",
    ),
    "64-bit integers": ("dtype int64", lambda x: reduce(x, "max", (2, 2)), (4, 4), "int64"),
    "maxima between elements": (
        "base_dilation above 1",
        lambda x: reduce(x, "max", (2, 2), base_dilation=(2, 1)),
        (4, 4),
        "float32",
    ),
    "sums of windows apart between elements": (
        "both base_dilation and window_strides",
        lambda x: reduce(x, "sum", (2, 2), (1, 2), base_dilation=(2, 1)),
        (4, 4),
        "float32",
    ),
    "one element": ("no axis is windowed", lambda x: reduce(x, "max", (1, 1)), (4, 4), "float32"),
    "nothing": ("an empty array", lambda x: reduce(x, "max", (1, 2)), (0, 4), "float32"),
    "nothing but padding": (
        "an empty array",
        lambda x: reduce(x, "max", (1, 2), padding=[(2, 2), (0, 0)]),
        (0, 4),
        "float32",
    ),
    "an image moved away": (
        "a number of 2**31",
        lambda x: reduce(x, "max", (2, 2), padding=[(-(2**31), 2**31 - 1), (0, 0)]),
        (4, 4),
        "float32",
    ),
    "no windows": ("an empty array", lambda x: reduce(x, "sum", (1, 5)), (4, 4), "float32"),
    "four axes": ("windows over 4 axes", lambda x: reduce(x, "max", (2,) * 4), (4,) * 4, "float32"),
    "axes apart": (
        "windows over 5 axes",
        lambda x: reduce(x, "sum", (2, 1, 2, 1, 2)),
        (4,) * 5,
        "float32",
    ),
    "a stride without end": (
        "a number of 2**31",
        lambda x: reduce(x, "max", (2, 2), (2**31, 1)),
        (4, 4),
        "float32",
    ),
}


@pytest.mark.parametrize("name", WINDOWS_THAT_STAY)
def test_windows_that_stay_stock(x64: None, name: str) -> None:
    why, f, shape, dtype = WINDOWS_THAT_STAY[name]
    (row,) = lower(f, jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))
    assert not row.ours
    assert why in row.why


@pytest.mark.parametrize("mode", ["gradient", "tangent"])
@pytest.mark.parametrize("kind", ["max", "min"])
def test_selections(kind: str, mode: str) -> None:
    f = functools.partial(
        reduce, kind=kind, dims=(2, 1, 2), strides=(2, 1, 1), padding=[(0, 1), (0, 0), (1, 0)]
    )
    x = normal(6, 3, 5)
    if mode == "gradient":
        rows = run(jax.grad(lambda x: jnp.sum(jnp.sin(f(x)))), x)
        assert rows[-1].operation == "select_and_scatter_add"
    else:
        (row,) = rows = run(lambda x, t: jax.jvp(f, (x,), (t,))[1], x, np.cos(x))
        assert row.operation == "select_and_gather_add"
    assert all(row.ours for row in rows), rows


@pytest.mark.parametrize("kind", ["max", "min"])
def test_gradient_of_an_image_that_is_cut_at_its_end(kind: str) -> None:
    def loss(x: Any, **call: Any) -> Any:
        return jnp.sum(jnp.sin(reduce(x, kind, (2, 1), **call)))

    x = normal(6, 3)
    expected = jax.grad(lambda x: loss(x[:-2]))(x)
    with jax_mps.accelerate() as handle:
        found = jax.jit(jax.grad(functools.partial(loss, padding=[(0, -2), (0, 0)])))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert all(row.ours for row in handle.report())
    assert [row.operation for row in handle.report()][-1] == "select_and_scatter_add"


SELECTION = {
    "select_prim": lax.ge_p,
    "window_dimensions": (2, 1),
    "window_strides": (1, 1),
    "padding": ((0, 0), (0, 0)),
}
GATHER = SELECTION | {"base_dilation": (1, 1), "window_dilation": (1, 1)}


CHANGES: tuple[tuple[dict[str, Any], str | None], ...] = (
    ({}, None),
    ({"select_prim": lax.le_p}, None),
    ({"select_prim": lax.gt_p}, "it selects by gt"),
    ({"padding": ((-1, 2), (0, 0))}, "negative padding"),
    ({"padding": ((1, -1), (0, 0))}, None),
    ({"window_dimensions": (6, 1)}, "an empty array"),
)


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [(name, *change) for name in ("scatter", "gather") for change in CHANGES]
    + [("gather", {"base_dilation": (2, 1)}, "base_dilation above 1")],
)
def test_selections_alone(name: str, change: dict[str, Any], why: str | None) -> None:
    """JAX makes only some of these, so they are read alone."""
    operand = jax.ShapeDtypeStruct((5, 4), np.float32)
    pooled = jax.ShapeDtypeStruct((0 if why == "an empty array" else 4, 4), np.float32)
    if name == "scatter":
        reading = windows.recognise_scatter(pooled, operand, operand, SELECTION | change)
    else:
        reading = windows.recognise_gather(operand, operand, pooled, GATHER | change)
    if why is None:
        assert isinstance(reading, windows.Reading)
        assert reading.name == name
    else:
        assert reading == why


@pytest.mark.parametrize("types", [("float32", "float16"), ("int32", "int32")])
def test_selections_of_other_types_have_no_reading(types: tuple[str, str]) -> None:
    operand = jax.ShapeDtypeStruct((5, 4), jnp.dtype(types[0]))
    source = jax.ShapeDtypeStruct((4, 4), jnp.dtype(types[1]))
    reading = windows.recognise_scatter(source, operand, operand, SELECTION)
    assert isinstance(reading, str)
    assert reading.startswith(f"dtypes {types[0]} and {types[1]}")


# --- the table ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [choices.CPU, choices.CUDA])
def test_the_first_row_that_fits_decides(table: tuple[choices.Choice, ...]) -> None:
    for i, row in enumerate(table):
        later = [other.operation for other in table[i + 1 :]]
        # A row that always fits is the last of its operation, and every operation has one.
        assert (row.condition is choices._always) == (row.operation not in later)
