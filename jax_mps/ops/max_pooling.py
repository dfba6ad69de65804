"""Max pooling and its documented gradient.

Five primitives carry the family. Three reduce an image, to values, to tap indices, or to both. The tap index
of a window is the number of its maximum's tap in row-major order. The other two are linear and each other's
transpose: `take` reads an image at the chosen taps, `put` writes to them. The derivative of a maximum is a
`take`, its reverse a `put`, and neither needs the image any more: the tap index, one byte for windows of up
to 128 taps, is the only residual.

    jvp(max) = take(tangent, tap_index)        transpose(take) = put        transpose(put) = take

A sixth turns tap indices into positions in the plane, which `max_unpool` takes (`max_unpooling.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import numpy as np
from jax import lax
from jax.interpreters import ad
from jax.typing import ArrayLike

from jax_mps import _compat, geometry
from jax_mps.geometry import (
    DataFormat,
    Edge,
    Ints,
    Padding,
    Window,
    place,
)
from jax_mps.lowering import pooling, rule
from jax_mps.lowering.pooling import slow_windows
from jax_mps.ops import edges, operands, primitive
from jax_mps.ops.operands import FLOAT8, FLOATS, INTEGERS, WIDE_INTEGERS

Array = Any

# --- public functions ---------------------------------------------------------------------------------


@overload
def max_pool(
    x: ArrayLike,
    window_shape: Ints,
    *,
    strides: Ints,
    padding: Padding = ...,
    window_dilation: Ints = ...,
    ceil_mode: bool = ...,
    return_indices: Literal[False] = ...,
    data_format: DataFormat = ...,
    implementation: str | None = ...,
) -> jax.Array: ...
@overload
def max_pool(
    x: ArrayLike,
    window_shape: Ints,
    *,
    strides: Ints,
    padding: Padding = ...,
    window_dilation: Ints = ...,
    ceil_mode: bool = ...,
    return_indices: Literal[True],
    data_format: DataFormat = ...,
    implementation: str | None = ...,
) -> tuple[jax.Array, jax.Array]: ...
def max_pool(
    x: ArrayLike,
    window_shape: Ints,
    *,
    strides: Ints,
    padding: Padding = "VALID",
    window_dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    data_format: DataFormat = "channels_last",
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The maximum of every window of an image.

    Along each spatial axis, window `i` has the taps `t_k = strides * i - low + window_dilation * k` for
    `k < window_shape`, and

        y[..., i, c] = max over the taps inside the image of x[..., t, c].

    Padding never wins, not even against -inf. NaN propagates. The gradient of a window goes to its first
    maximum in row-major tap order; to its first NaN, if it has one. Differentiable to any order, in
    forward and reverse mode, dilated windows included; the only residual is the tap index (one byte an
    output for up to 128 taps).

    Args:
      x: array of shape `(*batch, *spatial, channels)`, or `(*batch, channels, *spatial)` with
        `data_format="channels_first"`; 1 to 3 spatial axes, any number of batch axes. float32, float64,
        float16, bfloat16, a float of 8 bits, an integer of 8 to 64 bits, or bool. Integers of 64 bits have
        no native kernel.
      window_shape: taps of a window along each spatial axis, in pixels. If this and `strides` and
        `window_dilation` are all plain ints, they apply to every spatial axis and `x` has exactly one
        batch axis; otherwise the length of a tuple is the number of spatial axes.
      strides: pixels from one window to the next. Libraries disagree about a default, so there is none.
      padding: "VALID" (none), "SAME" (outputs = ceil(size / strides), the odd pixel after the image),
        "SAME_LOWER" (before it), an int for all sides, or a `(low, high)` pair for each spatial axis.
        Negative numbers crop.
      window_dilation: pixels from one tap to the next.
      ceil_mode: rounds the number of windows up instead of down, as PyTorch does: the last windows may
        hang over the padding, but must start inside the image or its low padding. Not with a string.
      return_indices: also return where the maxima are.
      data_format: "channels_last" or "channels_first"; "NHWC", "NCHW" and their like also check the axes.
      implementation: None chooses; "native" or "xla" forces a path.

    Returns:
      The pooled array, of the type of `x`, with
      `floor((size + low + high - window_dilation * (window_shape - 1) - 1) / strides) + 1` windows along
      each spatial axis. With `return_indices` a pair of it and an int32 array of the same shape: the flat
      row-major position of each maximum in its unpadded spatial plane (PyTorch's convention).

    Raises:
      TypeError: an argument has the wrong type or an unsupported dtype.
      ValueError: a value is out of range, lengths disagree, a window would have no tap in the image, the
        output would be empty, or `implementation="native"` cannot be had.

    Examples:
      >>> import jax, jax.numpy as jnp, jax_mps
      >>> x = jnp.array([1., 5., 2., 4., 4., 3.]).reshape(1, 6, 1)
      >>> jax_mps.max_pool(x, 2, strides=2).ravel()
      Array([5., 4., 4.], dtype=float32)
      >>> y, at = jax_mps.max_pool(x, 3, strides=2, padding=1, return_indices=True)
      >>> at.ravel()
      Array([1, 1, 3], dtype=int32)
      >>> jax.grad(lambda x: jax_mps.max_pool(x, 2, strides=1, window_dilation=3).sum())(x).ravel()
      Array([0., 1., 0., 1., 0., 1.], dtype=float32)

    Source: `MPSCNNPoolingMax` and `MPSCNNDilatedPoolingMax` in MPSCNNPooling.h, with padding left out of
    the maximum as in PyTorch's `max_pool2d`.
    """
    given = operands.array("x", x, FLOATS + INTEGERS + WIDE_INTEGERS + FLOAT8)
    image = operands.widened(given)
    placement = place(image.shape, window_shape, strides, padding, window_dilation, ceil_mode, data_format)
    window, start = placement.window, placement.start
    geometry.flag("return_indices", return_indices)
    rule.check_implementation(implementation, static=window.is_static())
    sizes = image.shape[start : start + window.rank]
    image = edges.crop(image, placement)
    if not return_indices:
        y = edges.trim(pool(image, window, start, implementation=implementation), placement)
        return lax.convert_element_type(y, given.dtype)
    if window.is_static() and math.prod(sizes) > 2**31 - 1:
        raise ValueError(f"return_indices=True needs spatial planes below 2**31 pixels, got {sizes}")
    params = {"window": window, "start": start, "implementation": implementation}
    y, tap_index = max_pool_with_tap_index_p.bind(image, **params)
    at = positions_p.bind(tap_index, window=window, start=start, crop=placement.crop, sizes=sizes)
    y = lax.convert_element_type(edges.trim(y, placement), given.dtype)
    return y, edges.trim(at, placement)


def max_pool_gradient(
    source_gradient: ArrayLike,
    source: ArrayLike,
    window_shape: Ints,
    *,
    strides: Ints,
    padding: Padding = "VALID",
    window_dilation: Ints = 1,
    ceil_mode: bool = False,
    data_format: DataFormat = "channels_last",
    implementation: str | None = None,
) -> jax.Array:
    """The gradient kernel of `max_pool`: sends each window's gradient to the window's maximum.

        dx[..., t, c] = sum over the windows i whose selected tap is t of source_gradient[..., i, c]

    The selected tap is the first maximum in row-major order, or the first NaN. This is
    `jax.vjp(max_pool, source)` applied to `source_gradient`; the maxima are found again from `source`.
    Linear in `source_gradient`; its derivative with respect to `source` is 0.

    Args:
      source_gradient: gradient of the pooled array: its shape, the dtype of `source`.
      source: the image that was pooled, of a floating point dtype.
      window_shape: as for `max_pool`, and so are the arguments that follow.
      strides: pixels from one window to the next.
      padding: as for `max_pool`.
      window_dilation: pixels from one tap to the next.
      ceil_mode: as for `max_pool`.
      data_format: "channels_last" or "channels_first"; "NHWC", "NCHW" and their like also check the axes.
      implementation: None chooses; "native" or "xla" forces a path.

    Returns:
      An array like `source`. Pixels that no window selects get 0. Sums are formed in float32 (float64
      for float64) and rounded once.

    Raises:
      TypeError: an argument has the wrong type, or the dtypes are unsupported or differ.
      ValueError: as for `max_pool`, or the shape of `source_gradient` is not that of the pooled array.

    Examples:
      >>> import jax.numpy as jnp, jax_mps
      >>> x = jnp.array([1., 3., 3., 2., 0.]).reshape(1, 5, 1)
      >>> g = jnp.array([10., 20., 30.]).reshape(1, 3, 1)
      >>> jax_mps.max_pool_gradient(g, x, 3, strides=2, padding=1).ravel()
      Array([ 0., 30.,  0., 30.,  0.], dtype=float32)

    Source: `MPSCNNPoolingMaxGradient` and `MPSCNNDilatedPoolingMaxGradient`.
    """
    x = operands.array("source", source, FLOATS + FLOAT8)
    g = operands.array("source_gradient", source_gradient, FLOATS + FLOAT8)
    operands.check_same_dtype("source_gradient", g, "source", x)
    dtype, x, g = x.dtype, operands.widened(x), operands.widened(g)
    placement = place(x.shape, window_shape, strides, padding, window_dilation, ceil_mode, data_format)
    window, start = placement.window, placement.start
    rule.check_implementation(implementation, static=window.is_static())
    expected = operands.pooled_shape(x.shape, placement)
    operands.check_shape("source_gradient", g, expected, "that of the pooled source")
    g = edges.untrim(g, placement)
    dx = gradient(g, edges.crop(x, placement), window, start, implementation=implementation)
    return lax.convert_element_type(edges.uncrop(dx, placement), dtype)


# --- on windows that are placed already ---------------------------------------------------------------


def pool(
    x: Array, window: Window, start: int, *, edge: Edge = "exclude", implementation: str | None = None
) -> Array:
    """`max_pool` over the given windows, in any edge mode."""
    x, window = edges.enclose(x, window, start, edge)
    return max_pool_p.bind(x, window=window, start=start, implementation=implementation)


def gradient(
    g: Array,
    x: Array,
    window: Window,
    start: int,
    *,
    edge: Edge = "exclude",
    implementation: str | None = None,
) -> Array:
    """`max_pool_gradient` over the given windows, in any edge mode.

    A window that selects a zero of its padding loses its gradient; one that selects a repeated pixel
    sends it to that pixel.
    """
    image, inside = edges.enclose(x, window, start, edge)
    params: dict[str, Any] = {"window": inside, "start": start, "implementation": implementation}
    wide = rule.accumulator(g.dtype) if edge == "clamp" else g.dtype  # repeated pixels are added up
    tap_index = max_pool_tap_index_p.bind(image, **params)
    dx = _put(lax.convert_element_type(g, wide), tap_index, **params)
    return lax.convert_element_type(edges.expose(dx, x, window, start, edge), g.dtype)


def scatter(g: Array, x: Array, window: Window, start: int) -> Array:
    """The gradient of the maximum, as `lax.select_and_scatter_add` selects taps."""
    params = {"window": window, "start": start, "implementation": None}
    tap_index = max_pool_selected_tap_index_p.bind(x, with_padding=True, **params)
    return _put(g, tap_index, total_order=False, **params)


def gather(t: Array, x: Array, window: Window, start: int) -> Array:
    """The tangent of the maximum, as `lax.select_and_gather_add` selects taps."""
    params = {"window": window, "start": start, "implementation": None}
    tap_index = max_pool_selected_tap_index_p.bind(x, with_padding=False, **params)
    return _take(t, tap_index, total_order=False, **params)


# --- primitives ---------------------------------------------------------------------------------------


def _native(name: str) -> Any:
    return lambda *, window, start: (name, primitive.window_attributes(window, start))


def _native_chosen(name: str) -> Any:
    return lambda *, window, start, total_order: (name, primitive.window_attributes(window, start))


def _native_selected(*, window: Window, start: int, with_padding: bool) -> tuple[str, dict[str, Any]]:
    attributes = primitive.window_attributes(window, start)
    return "max_pool_selected_tap_index", attributes | {"with_padding": np.int64(with_padding)}


def _tap_index_aval(x: Any, window: Window, start: int) -> Any:
    return primitive.image_to_pooled(x, window, start, window.tap_dtype)


max_pool_p = primitive.define(
    "max_pool",
    lambda x, *, window, start, implementation: primitive.image_to_pooled(x, window, start),
    xla_fun=pooling.max_pool,
    native=_native("max_pool"),
    native_is_slower=slow_windows.of_maxima,
    factors=primitive.pooling_factors("i", "p"),
)
max_pool_tap_index_p = primitive.define(
    "max_pool_tap_index",
    lambda x, *, window, start, implementation: _tap_index_aval(x, window, start),
    xla_fun=pooling.max_pool_tap_index,
    native=_native("max_pool_tap_index"),
    native_is_slower=slow_windows.of_indices,
    factors=primitive.pooling_factors("i", "p"),
)
max_pool_selected_tap_index_p = primitive.define(
    "max_pool_selected_tap_index",
    lambda x, *, window, start, with_padding, implementation: _tap_index_aval(x, window, start),
    xla_fun=pooling.max_pool_selected_tap_index,
    native=_native_selected,
    native_is_slower=slow_windows.of_selected_indices,
    factors=primitive.pooling_factors("i", "p"),
)
max_pool_with_tap_index_p = primitive.define(
    "max_pool_with_tap_index",
    lambda x, *, window, start, implementation: [
        primitive.image_to_pooled(x, window, start),
        _tap_index_aval(x, window, start),
    ],
    xla_fun=pooling.max_pool_with_tap_index,
    native=_native("max_pool_with_tap_index"),
    native_is_slower=slow_windows.of_indices,
    multiple_results=True,
    factors=primitive.pooling_factors("i", "pp"),
)
max_pool_take_p = primitive.define(
    "max_pool_take",
    lambda t, tap_index, *, window, start, **_: primitive.image_to_pooled(t, window, start),
    xla_fun=pooling.max_pool_take,
    native=_native_chosen("max_pool_take"),
    factors=primitive.pooling_factors("ip", "p"),
)
max_pool_put_p = primitive.define(
    "max_pool_put",
    lambda g, tap_index, *, window, start, **_: primitive.pooled_to_image(g, window, start),
    xla_fun=pooling.max_pool_put,
    native=_native_chosen("max_pool_put"),
    factors=primitive.pooling_factors("pp", "i"),
)
positions_p = primitive.define(
    "max_pool_positions",
    lambda tap_index, **params: _compat.retyped(tap_index, tap_index.shape, np.dtype(np.int32)),
    xla_fun=pooling.positions,
    native=None,
)


# `total_order` says that one order of all pixels chose the taps. Stock JAX has none where there is NaN.


def _take(t: Array, tap_index: Array, *, total_order: bool = True, **params: Any) -> Array:
    return max_pool_take_p.bind(*_compat.vary_alike(t, tap_index), total_order=total_order, **params)


def _put(g: Array, tap_index: Array, *, total_order: bool = True, **params: Any) -> Array:
    return max_pool_put_p.bind(*_compat.vary_alike(g, tap_index), total_order=total_order, **params)


def _max_jvp(primals: Sequence[Array], tangents: Sequence[Array], **params: Any) -> tuple[Array, Array]:
    y, tap_index = max_pool_with_tap_index_p.bind(*primals, **params)
    return y, _take(tangents[0], tap_index, **params)


def _with_index_jvp(primals: Sequence[Array], tangents: Sequence[Array], **params: Any) -> Any:
    y, tap_index = max_pool_with_tap_index_p.bind(*primals, **params)
    return [y, tap_index], [_take(tangents[0], tap_index, **params), _compat.zero_tangent(tap_index)]


def _integer_jvp(prim: Any) -> Any:
    def jvp(primals: Sequence[Array], tangents: Sequence[Array], **params: Any) -> tuple[Array, Any]:
        out = prim.bind(*primals, **params)
        return out, _compat.zero_tangent(out)

    return jvp


def _max_jet(primals: Sequence[Array], series: Any, **params: Any) -> tuple[Array, Any]:
    (y, _), (terms, _) = _with_index_jet(primals, series, **params)
    return y, terms


def _with_index_jet(primals: Sequence[Array], series: Any, **params: Any) -> tuple[Any, Any]:
    y, tap_index = max_pool_with_tap_index_p.bind(*primals, **params)
    return [y, tap_index], [[_take(t, tap_index, **params) for t in series[0]], _compat.no_terms]


def _integer_jet(prim: Any) -> Any:
    return lambda primals, series, **params: (prim.bind(*primals, **params), _compat.no_terms)


_compat.define_jet(max_pool_p, _max_jet)
_compat.define_jet(max_pool_with_tap_index_p, _with_index_jet)
for _prim in (max_pool_selected_tap_index_p, max_pool_tap_index_p, positions_p):
    _compat.define_jet(_prim, _integer_jet(_prim))
ad.primitive_jvps[max_pool_p] = _max_jvp
ad.primitive_jvps[max_pool_with_tap_index_p] = _with_index_jvp
ad.primitive_jvps[max_pool_selected_tap_index_p] = _integer_jvp(max_pool_selected_tap_index_p)
ad.primitive_jvps[max_pool_tap_index_p] = _integer_jvp(max_pool_tap_index_p)
ad.primitive_jvps[positions_p] = _integer_jvp(positions_p)
primitive.define_multilinear(
    max_pool_take_p, {0: lambda ct, _, tap_index, **params: _put(ct, tap_index, **params)}
)
primitive.define_multilinear(
    max_pool_put_p, {0: lambda ct, _, tap_index, **params: _take(ct, tap_index, **params)}
)
