"""Average pooling and its documented gradient.

Two linear primitives, each the transpose of the other: `avg_pool` sums the taps of every window and divides
by the window's divisor, `avg_pool_gradient` divides every window's gradient by that divisor and adds it to
the window's pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_mps import geometry
from jax_mps.geometry import DataFormat, Divisor, Ints, Padding, Window, place
from jax_mps.lowering import pooling, rule
from jax_mps.lowering.pooling import slow_windows
from jax_mps.ops import edges, operands, primitive
from jax_mps.ops.operands import FLOATS

Array = Any

# --- public functions ---------------------------------------------------------------------------------


@operands.by_parts(1)
def avg_pool(
    x: ArrayLike,
    window_shape: Ints,
    *,
    strides: Ints,
    padding: Padding = "VALID",
    window_dilation: Ints = 1,
    count_include_pad: bool = True,
    ceil_mode: bool = False,
    divisor_override: int | None = None,
    data_format: DataFormat = "channels_last",
    implementation: str | None = None,
) -> jax.Array:
    """The average of every window of an image.

    With the windows of `max_pool` and taps outside the image reading 0,

        y[..., i, c] = (sum over the taps of x[..., t, c]) / N(i),

    where N(i) is an integer: `divisor_override` if given; else the number of taps in the image, and in
    its padding too with `count_include_pad` (but never in the overhang of `ceil_mode`). Sums are formed
    in float32 (float64 for float64) and rounded once, so half precision does not saturate. Linear;
    differentiable to any order.

    Args:
      x: array of shape `(*batch, *spatial, channels)`, or `(*batch, channels, *spatial)` with
        `data_format="channels_first"`; 1 to 3 spatial axes, any number of batch axes. float32, float64,
        float16, bfloat16, complex64 or complex128.
      window_shape: taps of a window along each spatial axis; ints and tuples as for `max_pool`.
      strides: pixels from one window to the next. Libraries disagree about a default, so there is none.
      padding: "VALID", "SAME", "SAME_LOWER", an int, or a `(low, high)` pair for each spatial axis;
        negative crops.
      window_dilation: pixels from one tap to the next.
      count_include_pad: whether taps in the padding count in N.
      ceil_mode: rounds the number of windows up as PyTorch does. Not with a string for `padding`.
      divisor_override: N for all windows, any integer but 0.
      data_format: "channels_last" or "channels_first"; "NHWC", "NCHW" and their like also check the axes.
      implementation: None chooses; "native" or "xla" forces a path.

    Returns:
      The pooled array, of the type of `x`, with as many windows as `max_pool` has.

    Raises:
      TypeError: an argument has the wrong type or an unsupported dtype.
      ValueError: a value is out of range, lengths disagree, a window would have no tap in the image, the
        output would be empty, or `implementation="native"` cannot be had.

    Examples:
      >>> import jax.numpy as jnp, jax_mps
      >>> x = jnp.array([6., 12., 18., 24.]).reshape(1, 4, 1)
      >>> jax_mps.avg_pool(x, 3, strides=1, padding=1).ravel()
      Array([ 6., 12., 18., 14.], dtype=float32)
      >>> jax_mps.avg_pool(x, 3, strides=1, padding=1, count_include_pad=False).ravel()
      Array([ 9., 12., 18., 21.], dtype=float32)
      >>> ones = jnp.ones((1, 1024, 1), jnp.bfloat16)
      >>> jax_mps.avg_pool(ones, 1024, strides=1).item()
      1.0

    Source: `MPSCNNPoolingAverage` in MPSCNNPooling.h (edge mode zero divides by all taps, clamp by those
    in the image and in `zeroPadSize`); the divisor's options are those of PyTorch's `avg_pool2d`.
    """
    image = operands.array("x", x, FLOATS)
    geometry.flag("count_include_pad", count_include_pad)
    placement = place(image.shape, window_shape, strides, padding, window_dilation, ceil_mode, data_format)
    window, start = placement.window, placement.start
    rule.check_implementation(implementation, static=window.is_static())
    number = geometry.divisor(
        placement, count_include_pad=count_include_pad, ceil_mode=ceil_mode, override=divisor_override
    )
    y = pool(edges.crop(image, placement), window, start, number, implementation=implementation)
    return edges.trim(y, placement)


@operands.by_parts(1)
def avg_pool_gradient(
    source_gradient: ArrayLike,
    source_shape: Sequence[int],
    window_shape: Ints,
    *,
    strides: Ints,
    padding: Padding = "VALID",
    window_dilation: Ints = 1,
    count_include_pad: bool = True,
    ceil_mode: bool = False,
    divisor_override: int | None = None,
    data_format: DataFormat = "channels_last",
    implementation: str | None = None,
) -> jax.Array:
    """The gradient kernel of `avg_pool`: spreads each window's gradient evenly over the window.

        dx[..., t, c] = sum over the windows i that have the tap t of source_gradient[..., i, c] / N(i)

    This is the transpose of `avg_pool`, and needs the shape of the image but not its values.

    Args:
      source_gradient: gradient of the pooled array, of a dtype that `avg_pool` takes.
      source_shape: shape of the image that was pooled, batch and channels included.
      window_shape: as for `avg_pool`, and so are the arguments that follow.
      strides: pixels from one window to the next.
      padding: as for `avg_pool`.
      window_dilation: pixels from one tap to the next.
      count_include_pad: as for `avg_pool`.
      ceil_mode: as for `avg_pool`.
      divisor_override: as for `avg_pool`.
      data_format: "channels_last" or "channels_first"; "NHWC", "NCHW" and their like also check the axes.
      implementation: None chooses; "native" or "xla" forces a path.

    Returns:
      An array of shape `source_shape` and the dtype of `source_gradient`.

    Raises:
      TypeError: an argument has the wrong type or an unsupported dtype.
      ValueError: as for `avg_pool`, or the shape of `source_gradient` is not that of the pooled array.

    Examples:
      >>> import jax.numpy as jnp, jax_mps
      >>> g = jnp.array([6., 12., 18., 24.]).reshape(1, 4, 1)
      >>> jax_mps.avg_pool_gradient(g, (1, 4, 1), 3, strides=1, padding=1).ravel()
      Array([ 6., 12., 18., 14.], dtype=float32)
      >>> jax_mps.avg_pool_gradient(g, (1, 4, 1), 3, strides=1, padding=1, count_include_pad=False).ravel()
      Array([ 7., 13., 22., 18.], dtype=float32)

    Source: `MPSCNNPoolingAverageGradient`.
    """
    g = operands.array("source_gradient", source_gradient, FLOATS)
    geometry.flag("count_include_pad", count_include_pad)
    shape = geometry.shape("source_shape", source_shape)
    placement = place(shape, window_shape, strides, padding, window_dilation, ceil_mode, data_format)
    window, start = placement.window, placement.start
    rule.check_implementation(implementation, static=window.is_static())
    expected = operands.pooled_shape(shape, placement)
    operands.check_shape("source_gradient", g, expected, "that of a pooled array of source_shape")
    number = geometry.divisor(
        placement, count_include_pad=count_include_pad, ceil_mode=ceil_mode, override=divisor_override
    )
    g = edges.untrim(g, placement)
    return edges.uncrop(gradient(g, window, start, number, implementation=implementation), placement)


# --- on windows that are placed already ---------------------------------------------------------------


def pool(
    x: Array, window: Window, start: int, divisor: Divisor, *, implementation: str | None = None
) -> Array:
    """`avg_pool` over the given windows, which may lie anywhere, with the given divisor."""
    if any(geometry.surely_below(axis.low, 0) for axis in window.axes):
        image, inside = edges.enclose(x, window, start, "zero")
        image = lax.convert_element_type(image, rule.accumulator(x.dtype))  # sums are rounded once
        total = pool(image, inside, start, Divisor(1, ()), implementation=implementation)
        return lax.convert_element_type(_divide(total, window, start, divisor), x.dtype)
    return avg_pool_p.bind(x, window=window, start=start, divisor=divisor, implementation=implementation)


def gradient(
    g: Array, window: Window, start: int, divisor: Divisor, *, implementation: str | None = None
) -> Array:
    """`avg_pool_gradient` over the given windows, which may lie anywhere, with the given divisor."""
    if any(geometry.surely_below(axis.low, 0) for axis in window.axes):
        shape = (*g.shape[:start], *window.sizes, *g.shape[start + window.rank :])
        accumulator = rule.accumulator(g.dtype)
        transpose = jax.linear_transpose(
            lambda x: pool(x, window, start, divisor, implementation=implementation),
            jax.ShapeDtypeStruct(shape, accumulator),
        )
        (dx,) = transpose(lax.convert_element_type(g, accumulator))
        return lax.convert_element_type(dx, g.dtype)
    return avg_pool_gradient_p.bind(
        g, window=window, start=start, divisor=divisor, implementation=implementation
    )


def _divide(total: Array, window: Window, start: int, divisor: Divisor) -> Array:
    if divisor.number:
        return total / divisor.number
    numbers = np.ones((1,) * total.ndim)
    for dim, (axis, band) in enumerate(zip(window.axes, divisor.band, strict=True), start):
        numbers = numbers * np.expand_dims(
            axis.counted_taps(*band), [i for i in range(total.ndim) if i != dim]
        )
    return total / np.maximum(numbers, 1).astype(total.dtype)


# --- primitives ---------------------------------------------------------------------------------------


def _native(name: str) -> Any:
    def call(*, window: Window, start: int, divisor: Divisor) -> tuple[str, dict[str, Any]]:
        lows, highs = zip(*(divisor.band or ((0, 0),) * window.rank), strict=True)
        return name, primitive.window_attributes(window, start) | {
            "divisor": np.int64(divisor.number),
            "band_low": np.array(lows, np.int64),
            "band_high": np.array(highs, np.int64),
        }

    return call


avg_pool_p = primitive.define(
    "avg_pool",
    lambda x, *, window, start, divisor, implementation: primitive.image_to_pooled(x, window, start),
    xla_fun=pooling.avg_pool,
    native=_native("avg_pool"),
    native_is_slower=slow_windows.of_averages,
    factors=primitive.pooling_factors("i", "p"),
)
avg_pool_gradient_p = primitive.define(
    "avg_pool_gradient",
    lambda g, *, window, start, divisor, implementation: primitive.pooled_to_image(g, window, start),
    xla_fun=pooling.avg_pool_gradient,
    native=_native("avg_pool_gradient"),
    native_is_slower=slow_windows.of_averages,
    factors=primitive.pooling_factors("p", "i"),
)
primitive.define_multilinear(avg_pool_p, {0: lambda ct, _, **params: avg_pool_gradient_p.bind(ct, **params)})
primitive.define_multilinear(avg_pool_gradient_p, {0: lambda ct, _, **params: avg_pool_p.bind(ct, **params)})
