"""Random calls of the native handlers, right and wrong, and a rule that says which of them is right.

A call is what JSON can hold:

    {"handler": "max_pool", "operands": [[shape, dtype], ...], "results": [[shape, dtype], ...],
     "attributes": {name: [type, value]}, "seed": 0}

Operands hold random bits of that seed: floats are NaN, infinite and subnormal now and then, and indices and
taps lie anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_mps.lowering import library
from wrong_calls import call_handler

Call = dict[str, Any]
Array = Sequence[Any]  # shape, dtype

FLOATS = ("float32", "float16", "bfloat16", "float64")
NUMBERS = (*FLOATS, "int8", "int16", "int32", "uint8", "uint16", "uint32", "bool")
TAPS = ("int8", "int16", "int32")
OTHERS = ("int64", "uint64", "complex64", "complex128", "float8_e4m3fn", "int4")


class Handler(NamedTuple):
    """What a handler takes.

    Arrays are `role:type`. Arrays of one role have one shape. Types are `float` and `number`, one and the
    same for the whole call; `sum`, the accumulator's; `wide`, either of these; `tap` and `int32`.
    """

    operands: str
    results: str
    attributes: str


HANDLERS = {
    "max_pool": Handler("image:number", "pooled:number", "window"),
    "max_pool_tap_index": Handler("image:number", "pooled:tap", "window"),
    "max_pool_with_tap_index": Handler("image:number", "pooled:number pooled:tap", "window"),
    "max_pool_selected_tap_index": Handler("image:float", "pooled:tap", "select"),
    "max_pool_take": Handler("image:float pooled:tap", "pooled:float", "window"),
    "max_pool_put": Handler("pooled:float pooled:tap", "image:float", "window"),
    "avg_pool": Handler("image:float", "pooled:float", "average"),
    "avg_pool_gradient": Handler("pooled:float", "image:float", "average"),
    "l2_pool": Handler("image:float", "pooled:wide", "window"),
    "l2_pool_tangent": Handler("image:float image:float pooled:sum", "pooled:wide", "window"),
    "l2_pool_gradient": Handler("pooled:wide image:float pooled:sum", "image:float", "window"),
    "max_unpool": Handler("pooled:number pooled:int32", "image:number", "plane"),
    "max_unpool_take": Handler("image:number pooled:int32", "pooled:number", "plane"),
    "conv_transpose": Handler("small:float kernel:float", "large:wide", "convolution"),
    "conv_transpose_gradient_data": Handler("large:float kernel:float", "small:wide", "convolution"),
    "conv_transpose_gradient_weights": Handler("large:float small:float", "kernel:wide", "convolution"),
}
WINDOW = {"start": 0, "window_shape": 1, "strides": 1, "window_dilation": 1, "low": 1}
ATTRIBUTES = {
    "window": WINDOW,
    "select": WINDOW | {"with_padding": 0},
    "average": WINDOW | {"divisor": 0, "band_low": 1, "band_high": 1},
    "plane": {"start": 0, "rank": 0},
    "convolution": WINDOW | {"channel": 0, "groups": 0, "transpose_kernel": 0},
}
"""The names of attributes, and their rank."""

MOST, FAR = 2**31, 2**61
"""Strides, dilations and taps of a window are below the first; no tap lies further off than the second."""


# --- which are right ----------------------------------------------------------------------------------


def right(call: Call) -> bool:
    """Whether a handler has to take a call; every other one is INVALID_ARGUMENT."""
    handler = HANDLERS[call["handler"]]
    attributes, ranks = call["attributes"], ATTRIBUTES[handler.attributes]
    if {name: (kind, np.ndim(value)) for name, (kind, value) in attributes.items()} != {
        name: ("int64", rank) for name, rank in ranks.items()
    }:
        return False
    shapes = _shapes(handler, call)
    if shapes is None:
        return False
    values = {name: value for name, (_, value) in attributes.items()}
    if handler.attributes == "convolution":
        return _right_convolution(values, shapes["small"], shapes["large"], shapes["kernel"])
    if handler.attributes == "plane":
        return _right_plane(values["start"], values["rank"], shapes["image"], shapes["pooled"])
    taps = [array[1] for entry, array in _entries(handler, call) if entry == "pooled:tap"]
    return _right_pooling(values, shapes["image"], shapes["pooled"]) and all(
        math.prod(values["window_shape"]) <= np.iinfo(dtype).max + 1 for dtype in taps
    )


def _entries(handler: Handler, call: Call) -> list[tuple[str, Array]]:
    """What the arrays have to be, and what they are."""
    sides = (handler.operands.split(), call["operands"]), (handler.results.split(), call["results"])
    return [pair for entries, arrays in sides for pair in zip(entries, arrays, strict=True)]


def _shapes(handler: Handler, call: Call) -> dict[str, list[int]] | None:
    """The shape of each role; None if numbers, types or shapes of the arrays do not agree."""
    try:
        entries = _entries(handler, call)
    except ValueError:  # too many arrays, or too few
        return None
    own = next(dtype for entry, (_, dtype) in entries if entry.endswith((":float", ":number")))
    total = "float64" if own == "float64" else "float32"
    allowed: dict[str, Sequence[str]] = {
        "float": [own] if own in FLOATS else [],
        "number": [own] if own in NUMBERS else [],
        "sum": [total],
        "wide": [own, total],
        "tap": TAPS,
        "int32": ["int32"],
    }
    shapes: dict[str, list[int]] = {}
    for entry, (shape, dtype) in entries:
        role, kind = entry.split(":")
        if dtype not in allowed[kind] or shapes.setdefault(role, list(shape)) != list(shape):
            return None
    return shapes


def _right_pooling(values: Mapping[str, Any], image: Sequence[int], pooled: Sequence[int]) -> bool:
    taps, start, rank = values["window_shape"], values["start"], len(values["window_shape"])
    if not _right_windows(values) or not _right_plane(start, rank, image, pooled):
        return False
    far = FAR // max(math.prod(image[start + rank :]), 1)
    bands = [values[name] for name in ("band_low", "band_high") if name in values]
    return (
        math.prod(taps) < MOST
        and all(0 <= low <= far for low in values["low"])
        and all(n * dilation <= far for n, dilation in zip(taps, values["window_dilation"], strict=True))
        and all(n * s <= far for n, s in zip(pooled[start : start + rank], values["strides"], strict=True))
        and all(len(band) == rank and all(-FAR <= n <= FAR for n in band) for band in bands)
    )


def _right_windows(values: Mapping[str, Any]) -> bool:
    sizes = [values[name] for name in ("window_shape", "strides", "window_dilation")]
    rank = len(sizes[0])
    return (
        1 <= rank <= 3
        and all(len(each) == rank for each in (*sizes, values["low"]))
        and all(1 <= n < MOST for each in sizes for n in each)
    )


def _right_plane(start: int, rank: int, image: Sequence[int], pooled: Sequence[int]) -> bool:
    """Whether there is room for the spatial axes, and the others are equal."""
    if not (1 <= rank <= 3 and len(image) == len(pooled) and 0 <= start <= len(image) - rank):
        return False
    return all(image[d] == pooled[d] for d in range(len(image)) if not start <= d < start + rank)


def _right_convolution(
    values: Mapping[str, Any], small: Sequence[int], large: Sequence[int], kernel: Sequence[int]
) -> bool:
    taps, start, channel, groups = (values[n] for n in ("window_shape", "start", "channel", "groups"))
    rank = len(taps)
    if not _right_windows(values) or len(small) != len(large) or len(kernel) != rank + 2 or groups < 1:
        return False
    if not all(n * dilation < MOST for n, dilation in zip(taps, values["window_dilation"], strict=True)):
        return False
    if not all(-MOST < low < MOST for low in values["low"]) or channel not in (start - 1, start + rank):
        return False
    batch = min(start, channel)
    if batch < 0 or batch + rank + 1 != len(small) or list(small[:batch]) != list(large[:batch]):
        return False
    inputs, outputs = small[channel], large[channel]
    if inputs % groups or outputs % groups or list(kernel[:rank]) != list(taps):
        return False
    pair = [outputs // groups, inputs] if values["transpose_kernel"] else [inputs // groups, outputs]
    return list(kernel[rank:]) == pair


# --- drawing ------------------------------------------------------------------------------------------


MOST_TAPS = 2**16
"""Of right calls: the kernels make a list of the taps along an axis, which takes time and memory."""


def draw(seed: int) -> Call:
    """A right call in which nothing up to three things were changed."""
    rng = np.random.default_rng(seed)
    call = _right_call(rng, str(rng.choice(list(HANDLERS))))
    assert right(call), call
    for _ in range(rng.integers(0, 4)):
        _change(rng, call)
    taps = call["attributes"].get("window_shape", ["int64", []])
    if right(call) and max(taps[1], default=0) > MOST_TAPS:
        taps[1] = [min(n, MOST_TAPS) for n in taps[1]]
    return call | {"seed": seed}


def _right_call(rng: np.random.Generator, name: str) -> Call:
    handler = HANDLERS[name]
    rank = int(rng.integers(1, 4))
    # Empty arrays are few: where nothing is left to compute, XLA makes no call.
    least = int(rng.random() > 0.1)
    batch = rng.integers(least, 4, rng.integers(0, 3)).tolist()
    last = bool(rng.integers(2))
    values: dict[str, Any] = {
        "window_shape": rng.integers(1, 5, rank).tolist(),
        "strides": rng.integers(1, 4, rank).tolist(),
        "window_dilation": rng.integers(1, 4, rank).tolist(),
        "low": rng.integers(0, 4, rank).tolist(),
        "divisor": int(rng.choice([0, 0, 1, -7, 2**40])),
        "band_low": rng.integers(0, 3, rank).tolist(),
        "band_high": rng.integers(0, 3, rank).tolist(),
        "with_padding": int(rng.integers(2)),
        "rank": rank,
        "transpose_kernel": int(rng.integers(2)),
        "groups": int(rng.integers(1, 4)),
    }
    values["start"] = len(batch) + (handler.attributes == "convolution" and not last)
    values["channel"] = len(batch) + rank if last else len(batch)
    planes = {role: rng.integers(least, 10, rank).tolist() for role in ("image", "pooled", "small", "large")}
    shapes = {}
    if handler.attributes == "convolution":
        per_group = {"small": int(rng.integers(least, 5)), "large": int(rng.integers(least, 5))}
        inputs, outputs = (values["groups"] * per_group[role] for role in ("small", "large"))
        for role, channels in (("small", inputs), ("large", outputs)):
            plane = planes[role]
            shapes[role] = [*batch, *plane, channels] if last else [*batch, channels, *plane]
        first = "large" if values["transpose_kernel"] else "small"
        whole = inputs if values["transpose_kernel"] else outputs
        shapes["kernel"] = [*values["window_shape"], per_group[first], whole]
    else:
        inner = rng.integers(1, 20, rng.integers(0, 2)).tolist()
        shapes = {role: [*batch, *planes[role], *inner] for role in ("image", "pooled")}
    own = str(rng.choice(NUMBERS if "number" in handler.operands else FLOATS))
    total = "float64" if own == "float64" else "float32"
    kinds = {"float": own, "number": own, "sum": total, "int32": "int32", "tap": str(rng.choice(TAPS))}
    kinds["wide"] = str(rng.choice([own, total]))

    def arrays(entries: str) -> list[list[Any]]:
        return [[shapes[role], kinds[kind]] for role, kind in (e.split(":") for e in entries.split())]

    return {
        "handler": name,
        "operands": arrays(handler.operands),
        "results": arrays(handler.results),
        "attributes": {key: ["int64", values[key]] for key in ATTRIBUTES[handler.attributes]},
    }


_EXTREMES = (0, -1, 1, 3, 127, 2**15, 2**31 - 1, 2**31, -(2**31), 2**32, 2**62, 2**63 - 1, -(2**63))


def _change(rng: np.random.Generator, call: Call) -> None:
    """Makes one thing another."""
    kind = rng.integers(10)
    side = "operands" if rng.random() < 0.6 else "results"
    arrays = call[side] = [[list(shape), dtype] for shape, dtype in call[side]]
    attributes = call["attributes"] = dict(call["attributes"])
    if kind < 3 and arrays:
        shape = arrays[rng.integers(len(arrays))][0]
        at = int(rng.integers(len(shape) + 1))
        if kind == 0 and at < len(shape):
            shape[at] = int(rng.integers(0, 12) if rng.random() < 0.2 else rng.integers(1, 12))
        elif kind == 1 and at < len(shape):
            del shape[at]
        elif len(shape) < 6:
            shape.insert(at, int(rng.integers(1, 4)))
    elif kind == 3 and arrays:
        arrays[rng.integers(len(arrays))][1] = str(rng.choice(NUMBERS + OTHERS))
    elif kind == 4 and arrays and side == "results":
        arrays.append(arrays[rng.integers(len(arrays))])
    elif kind == 4 and arrays:
        del arrays[rng.integers(len(arrays))]
    elif attributes:
        name = sorted(attributes)[rng.integers(len(attributes))]
        dtype, value = attributes[name]
        if kind == 5:
            del attributes[name]
        elif kind == 6:
            types = ["int32", "uint64", "float32", "float64", "bool", "string"]
            attributes[name] = [types[rng.integers(len(types))], value]
        elif kind == 7 and isinstance(value, list):
            attributes[name] = [dtype, value[:-1] if value and rng.random() < 0.5 else [*value, 1]]
        elif kind == 7:
            attributes["other"] = ["int64", 1]
        else:
            flat = list(value) if isinstance(value, list) else [value]
            if flat:
                at = int(rng.integers(len(flat)))
                extreme = _EXTREMES[rng.integers(len(_EXTREMES))]
                flat[at] = extreme if rng.random() < 0.6 else flat[at] + int(rng.choice([-1, 1, 2]))
            attributes[name] = [dtype, flat if isinstance(value, list) else flat[0]]


# --- making them --------------------------------------------------------------------------------------


def check(call: Call) -> bool:
    """Makes a call, which is taken where it is right and INVALID_ARGUMENT where not; whether it was taken.

    Where all results are empty, XLA calls nobody, and there is nothing to check but that it does not crash.
    """
    assert library.status().available
    assert jax.config.jax_enable_x64  # type: ignore[attr-defined]
    rng = np.random.default_rng(call.get("seed", 0))
    operands = tuple(_array(rng, *array) for array in call["operands"])
    results = [jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype)) for shape, dtype in call["results"]]
    attributes = {name: _attribute(*value) for name, value in call["attributes"].items()}
    try:
        # A new function each time: to JAX, attributes of equal values are the same, whatever their types.
        jax.block_until_ready(
            jax.jit(lambda *arrays: call_handler(call["handler"], results, arrays, attributes))(*operands)
        )
        complaint = ""
    except Exception as error:
        complaint = f"{type(error).__name__}: {error}"
    called = any(math.prod(shape) > 0 for shape, _ in call["results"])
    assert not called or (complaint == "") == right(call), complaint or "taken"
    assert not complaint or "INVALID_ARGUMENT" in complaint, complaint
    return called and not complaint


def _array(rng: np.random.Generator, shape: Sequence[int], name: str) -> np.ndarray[Any, Any]:
    """Random bits."""
    dtype = jnp.dtype(name)
    if dtype.itemsize == 1 and name not in ("int8", "uint8"):  # of bool and of four bits not all are used
        return rng.integers(0, 2, shape).astype(dtype)
    return np.frombuffer(rng.bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def _attribute(dtype: str, value: Any) -> Any:
    if dtype == "string":
        return str(value)
    numbers = np.array(value, object)
    if dtype in ("int32", "uint64", "int64"):  # what does not fit wraps around
        bits = np.iinfo(dtype).bits
        most = min(bits, 63) if dtype == "uint64" else bits  # JAX cannot write larger ones
        wrapped = np.array([n % 2**most for n in numbers.ravel().tolist()], np.uint64).reshape(numbers.shape)
        numbers = (
            wrapped.astype(f"uint{bits}").view(dtype)
            if numbers.ndim
            else wrapped.astype(f"uint{bits}").astype(dtype)
        )
    array = np.asarray(numbers).astype(dtype)
    return array if array.ndim else array[()]
