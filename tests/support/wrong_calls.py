"""Calls of the native handlers that no public function makes."""

from __future__ import annotations

import inspect
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_mps
from jax_mps import _compat
from jax_mps.lowering import library

Call = tuple[str, Any, tuple[Any, ...], dict[str, Any]]  # handler, results, operands, attributes

# --- pooling ------------------------------------------------------------------------------------------

like = jax.ShapeDtypeStruct
f32, i8 = np.float32, np.int8
image, pooled = np.ones((1, 8, 8, 2), f32), like((1, 4, 4, 2), f32)
tap = np.zeros((1, 4, 4, 2), i8)


def window(**changes: Any) -> dict[str, Any]:
    columns = {
        "window_shape": [2, 2],
        "strides": [2, 2],
        "window_dilation": [1, 1],
        "low": [0, 0],
    } | changes
    start = columns.pop("start", 1)
    arrays = {k: np.array(v, np.int64) if isinstance(v, list) else v for k, v in columns.items()}
    return {"start": np.int64(start)} | arrays


def average(**changes: Any) -> dict[str, Any]:
    more = {"divisor": np.int64(0), "band_low": np.zeros(2, np.int64), "band_high": np.zeros(2, np.int64)}
    return window() | more | changes


def of(dtype: Any, x: Any = image) -> Any:
    return np.ones(x.shape, jnp.dtype(dtype))


POOLINGS: dict[str, Call] = {
    f"max_pool of {dtype}": ("max_pool", like(pooled.shape, dtype), (of(dtype),), window())
    for dtype in ("int4", "uint4", "float8_e4m3fn", "float8_e5m2", "complex64", "int64", "uint64")
    if hasattr(jnp, dtype)
}
POOLINGS |= {
    f"avg_pool of {dtype}": ("avg_pool", like(pooled.shape, dtype), (of(dtype),), average())
    for dtype in ("int4", "int32", "bool", "float8_e4m3fn", "complex64")
    if hasattr(jnp, dtype)
}
POOLINGS |= {
    "another result type": ("max_pool", like(pooled.shape, jnp.bfloat16), (image,), window()),
    "unsigned tap": ("max_pool_tap_index", like(pooled.shape, jnp.uint8), (image,), window()),
    "float tap": ("max_pool_tap_index", like(pooled.shape, f32), (image,), window()),
    "integer tangent": ("max_pool_take", like(pooled.shape, i8), (of(i8), tap), window()),
    "scalar": ("max_pool", like((), f32), (f32(1),), window()),
    "too few axes": ("max_pool", like((4,), f32), (np.ones(8, f32),), window()),
    "too many spatial axes": (
        "max_pool",
        like((1, 4, 4, 4, 4, 2), f32),
        (np.ones((1, 8, 8, 8, 8, 2), f32),),
        window(window_shape=[2] * 4, strides=[2] * 4, window_dilation=[1] * 4, low=[0] * 4),
    ),
    "no spatial axes": (
        "max_pool",
        like(image.shape, f32),
        (image,),
        window(window_shape=[], strides=[], window_dilation=[], low=[]),
    ),
    "results of another rank": ("max_pool", like((1, 4, 4), f32), (image,), window()),
    "other channels": ("max_pool", like((1, 4, 4, 3), f32), (image,), window()),
    "other batch": ("max_pool", like((2, 4, 4, 2), f32), (image,), window()),
    "start behind the end": ("max_pool", pooled, (image,), window(start=3)),
    "start far behind the end": ("max_pool", pooled, (image,), window(start=2**62)),
    "negative start": ("max_pool", pooled, (image,), window(start=-1)),
    "kernel of 0": ("max_pool", pooled, (image,), window(window_shape=[0, 2])),
    "negative kernel": ("max_pool", pooled, (image,), window(window_shape=[-3, 2])),
    "stride of 0": ("max_pool", pooled, (image,), window(strides=[2, 0])),
    "dilation of 0": ("max_pool", pooled, (image,), window(window_dilation=[0, 1])),
    "negative low": ("max_pool", pooled, (image,), window(low=[0, -1])),
    "short stride": ("max_pool", pooled, (image,), window(strides=[2])),
    "short low": ("max_pool", pooled, (image,), window(low=[0])),
    "long dilation": ("max_pool", pooled, (image,), window(window_dilation=[1, 1, 1])),
    "missing attribute": ("max_pool", pooled, (image,), dict(list(window().items())[:-1])),
    "extra attribute": ("max_pool", pooled, (image,), window() | {"edge": np.int64(1)}),
    "attribute of another type": ("max_pool", pooled, (image,), window(strides=np.array([2, 2], np.int32))),
    "float attribute": ("max_pool", pooled, (image,), window(strides=np.array([2, 2], f32))),
    "short band": ("avg_pool", pooled, (image,), average(band_low=np.zeros(1, np.int64))),
    "window's attributes for an average": ("avg_pool", pooled, (image,), window()),
    "no operand": ("max_pool", pooled, (), window()),
    "an operand too many": ("max_pool", pooled, (image, image), window()),
    "a result too many": ("max_pool", [pooled, pooled], (image,), window()),
    "a result too few": ("max_pool_with_tap_index", [pooled], (image,), window()),
    "taps of another shape": ("max_pool_take", pooled, (image, tap[:, :3]), window()),
    "taps of another shape than gradients": (
        "max_pool_put",
        like(image.shape, f32),
        (np.ones((1, 4, 4, 2), f32), tap[:, :3]),
        window(),
    ),
    "index of another shape than values": (
        "max_pool_with_tap_index",
        [pooled, like((1, 3, 4, 2), i8)],
        (image,),
        window(),
    ),
    "norms in half precision": (
        "l2_pool_tangent",
        like(pooled.shape, jnp.float16),
        (of(jnp.float16), of(jnp.float16), np.ones((1, 4, 4, 2), jnp.float16)),
        window(),
    ),
    "norm in an integer": ("l2_pool", like(pooled.shape, jnp.int32), (image,), window()),
    "norms of another shape": (
        "l2_pool_gradient",
        like(image.shape, f32),
        (np.ones((1, 4, 4, 2), f32), image, np.ones((1, 3, 4, 2), f32)),
        window(),
    ),
    "image of another shape": (
        "l2_pool_tangent",
        pooled,
        (image, image[:, :7], np.ones((1, 4, 4, 2), f32)),
        window(),
    ),
    "indices of another type": (
        "max_unpool",
        like(image.shape, f32),
        (np.ones((1, 4, 4, 2), f32), np.zeros((1, 4, 4, 2), jnp.int16)),
        {"start": np.int64(1), "rank": np.int64(2)},
    ),
    "indices of another shape": (
        "max_unpool",
        like(image.shape, f32),
        (np.ones((1, 4, 4, 2), f32), np.zeros((1, 4, 3, 2), jnp.int32)),
        {"start": np.int64(1), "rank": np.int64(2)},
    ),
    "rank of 0": (
        "max_unpool",
        like(image.shape, f32),
        (np.ones((1, 4, 4, 2), f32), np.zeros((1, 4, 4, 2), jnp.int32)),
        {"start": np.int64(1), "rank": np.int64(0)},
    ),
    "rank of 4": (
        "max_unpool_take",
        like((1, 4, 4, 2), f32),
        (image, np.zeros((1, 4, 4, 2), jnp.int32)),
        {"start": np.int64(0), "rank": np.int64(4)},
    ),
}  # fmt: skip


# --- transposed convolution ---------------------------------------------------------------------------

x, kernel, g = (np.ones(shape, f32) for shape in ((1, 4, 4, 6), (2, 2, 6, 4), (1, 8, 8, 4)))
columns = {"window_shape": [2, 2], "strides": [2, 2], "window_dilation": [1, 1], "low": [0, 0]}
scalars = {"start": 1, "channel": 3, "groups": 1, "transpose_kernel": 0}


def attributes(**changes: Any) -> dict[str, Any]:
    numbers = {k: np.int64(changes.pop(k, v)) for k, v in scalars.items()}
    return numbers | {k: np.array(v, np.int64) for k, v in (columns | changes).items()}


good = like(g.shape, np.float32), (x, kernel)
CHANGES: dict[str, dict[str, Any]] = {
    "kernel of another start": {"start": 2},
    "negative start": {"start": -1, "channel": 1},
    "start far behind the end": {"start": 2**62, "channel": 2**62 + 2},
    "channel among the pixels": {"channel": 2},
    "channel behind the end": {"channel": 4},
    "channel before the beginning": {"start": 0, "channel": -1},
    "no groups": {"groups": 0},
    "negative groups": {"groups": -1},
    "groups that do not divide": {"groups": 4},
    "groups of another kernel": {"groups": 2},
    "another window than the kernel's": {"window_shape": [2, 3]},
    "short window": {"window_shape": [2]},
    "another kind of kernel": {"transpose_kernel": 1},
    "stride of 0": {"strides": [0, 2]},
    "dilation of 0": {"window_dilation": [1, 0]},
    "stride beyond 32 bits": {"strides": [2, 2**31]},
    "low beyond 32 bits": {"low": [-(2**40), 0]},
    "short stride": {"strides": [2]},
    "short low": {"low": [0]},
    "long dilation": {"window_dilation": [1, 1, 1]},
    "no axes": {"window_shape": [], "strides": [], "window_dilation": [], "low": []},
    "four axes": {
        "window_shape": [2] * 4,
        "strides": [2] * 4,
        "window_dilation": [1] * 4,
        "low": [0] * 4,
    },
}
CONVOLUTIONS: dict[str, Call] = {
    name: ("conv_transpose", *good, attributes(**change)) for name, change in CHANGES.items()
}
some = list(attributes().items())
OPERANDS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "integers": (good[0], (of(np.int32, x), of(np.int32, kernel))),
    "complex numbers": (like(g.shape, np.complex64), (of(np.complex64, x), of(np.complex64, kernel))),
    "two types": (good[0], (x, kernel.astype(np.float16))),
    "a narrower result": (like(g.shape, np.float16), (x, kernel)),
    "a result of another half": (
        like(g.shape, jnp.bfloat16),
        (of(np.float16, x), of(np.float16, kernel)),
    ),
    "scalars": (like((), np.float32), (f32(1), f32(1))),
    "kernel of another rank": (good[0], (x, kernel[0])),
    "kernel of no taps": (good[0], (x, kernel[:0])),
    "kernel of other inputs": (good[0], (x, kernel[:, :, :5])),
    "kernel of other outputs": (good[0], (x, kernel[..., :3])),
    "result of another batch": (like((2, 8, 8, 4), np.float32), (x, kernel)),
    "result of another rank": (like((8, 8, 4), np.float32), (x, kernel)),
    "no operand": (good[0], ()),
    "one operand": (good[0], (x,)),
    "three operands": (good[0], (x, kernel, kernel)),
}
CONVOLUTIONS |= {name: ("conv_transpose", *pair, attributes()) for name, pair in OPERANDS.items()}
CONVOLUTIONS |= {
    "missing attribute": ("conv_transpose", *good, dict(some[:-1])),
    "extra attribute": ("conv_transpose", *good, attributes() | {"kernel": np.array([2, 2], np.int64)}),
    # JAX takes equal attributes for the same, whatever their types: no other call has this `low`.
    "attribute of another type": ("conv_transpose", *good, attributes(low=[1, 1]) | {"groups": np.int32(1)}),
    "image of another batch": (
        "conv_transpose_gradient_data", like((2, 4, 4, 6), np.float32), (g, kernel), attributes(),
    ),
    "image of other channels": (
        "conv_transpose_gradient_data", like((1, 4, 4, 5), np.float32), (g, kernel), attributes(),
    ),
    "source of another batch": (
        "conv_transpose_gradient_weights", like(kernel.shape, np.float32), (g, np.ones((2, 4, 4, 6), f32)),
        attributes(),
    ),
    "weights of other channels": (
        "conv_transpose_gradient_weights", like((2, 2, 6, 3), np.float32), (g, x), attributes(),
    ),
    "weights of another rank": (
        "conv_transpose_gradient_weights", like((2, 6, 4), np.float32), (g, x), attributes(),
    ),
}  # fmt: skip
WRONG_CALLS = POOLINGS | {f"convolution: {name}": call for name, call in CONVOLUTIONS.items()}


# --- what a process does ------------------------------------------------------------------------------


def call_handler(name: str, shapes: Any, operands: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
    ffi_call = _compat.ffi.ffi_call  # type: ignore[attr-defined]
    if "args" in inspect.signature(ffi_call).parameters:  # JAX < 0.5
        return ffi_call(library.target(name), shapes, *operands, **attributes)
    return ffi_call(library.target(name), shapes)(*operands, **attributes)


def make_all() -> None:
    """Makes every wrong call and prints the kind of error, or that there was none; then a right call."""
    jax.config.update("jax_enable_x64", True)
    assert library.status().available
    outcomes = {}
    for name, call in WRONG_CALLS.items():
        try:
            jax.block_until_ready(call_handler(*call))
            outcomes[name] = "accepted"
        except Exception as error:
            outcomes[name] = f"{type(error).__name__}: {error}"
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    y = jax_mps.max_pool(x, 2, strides=2, implementation="native")
    np.testing.assert_array_equal(np.ravel(y), [5, 7, 13, 15])
    print(json.dumps(outcomes))
