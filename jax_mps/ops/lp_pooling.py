"""Pooling by norms of any order.

The orders 1, 2 and infinity are a sum, `l2_pool` and a maximum. For any other every window is a tile, for its
taps are divided by its greatest one. The derivative of a norm y is a weighted sum of tangents,

    dy = sum over the taps of w(x / y) * dx,        w(r) = sign(r) * |r| ** (p - 1),

which has no intermediate result that is larger than y, and whose own derivatives need nothing new.
"""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_mps import geometry
from jax_mps.geometry import DataFormat, Divisor, Ints, Padding, Window, place
from jax_mps.lowering import rule
from jax_mps.ops import avg_pooling, edges, max_pooling, operands, tiling
from jax_mps.ops.l2_pooling import l2_pool
from jax_mps.ops.operands import FLOATS

Array = Any


def lp_pool(
    x: ArrayLike,
    window_shape: Ints,
    *,
    p: float,
    strides: Ints,
    padding: Padding = "VALID",
    window_dilation: Ints = 1,
    ceil_mode: bool = False,
    data_format: DataFormat = "channels_last",
    implementation: str | None = None,
) -> jax.Array:
    """The p-norm of every window of an image.

    With the windows of `max_pool` and taps outside the image reading 0,

        y[..., i, c] = (sum over the taps of |x[..., t, c]| ** p) ** (1 / p),

    and for p = inf the maximum of |x[..., t, c]|. p = 2 is `l2_pool`. Powers neither overflow nor
    underflow: a result is infinite only if the norm itself is too large. Half precision accumulates in
    float32 and is rounded once. Differentiable as often as the norm is; a window of zeros has the
    gradient 0, and so has a pixel that is 0, in all orders that do not exist there.

    PyTorch's `lp_pool2d` computes `s ** (1 / p)` of the sum s of `x ** p`, without the absolute value. So
    for odd p negative numbers count against positive ones there and a negative sum gives NaN, and if p is no
    integer every negative number gives NaN. In `ceil_mode` it takes a window that hangs over for a whole
    one with the same average: of [1, 2, 3, 4, 5], p = 2, windows and strides of 2, its last result is 7.07,
    and here it is 5, the norm of what is there.

    For p other than 1, 2 and inf, windows are copied first, so that overlapping ones take memory; spatial
    sizes must be known at trace time; and the program has powers, which are not on the list of what Apple's
    plugins can run.

    Args:
      x: array of shape `(*batch, *spatial, channels)`, or `(*batch, channels, *spatial)` with
        `data_format="channels_first"`; 1 to 3 spatial axes, any number of batch axes. float32, float64,
        float16 or bfloat16.
      window_shape: taps of a window along each spatial axis; ints and tuples as for `max_pool`.
      p: the order of the norm, a number of at least 1 known at trace time, or `math.inf`.
      strides: pixels from one window to the next. Libraries disagree about a default, so there is none.
      padding: "VALID", "SAME", an int, or a `(low, high)` pair for each spatial axis; negative crops.
      window_dilation: pixels from one tap to the next.
      ceil_mode: rounds the number of windows up as PyTorch does. Not with a string for `padding`.
      data_format: "channels_last" or "channels_first"; "NHWC", "NCHW" and their like also check the axes.
      implementation: None chooses; "native" or "xla" forces a path.

    Returns:
      The pooled array, of the type of `x`, with as many windows as `max_pool` has.

    Raises:
      TypeError: an argument has the wrong type or an unsupported dtype.
      ValueError: a value is out of range, lengths disagree, a window would have no tap in the image, the
        output would be empty, spatial sizes are symbolic, or `implementation="native"` cannot be had.

    Examples:
      >>> import jax.numpy as jnp, jax_mps
      >>> x = jnp.array([3., -4., 0., 0., 5., 1.]).reshape(1, 6, 1)
      >>> jax_mps.lp_pool(x, 2, p=1, strides=2).ravel()
      Array([7., 0., 6.], dtype=float32)
      >>> jax_mps.lp_pool(x, 2, p=3, strides=2).ravel().round(4)
      Array([4.4979, 0.    , 5.0133], dtype=float32)
      >>> jax_mps.lp_pool(x, 2, p=float("inf"), strides=2).ravel()
      Array([4., 0., 5.], dtype=float32)

    Source: PyTorch's `lp_pool2d`, but for what is said above.
    """
    p = _order(p)
    if p == 2:
        return l2_pool(
            x,
            window_shape,
            strides=strides,
            padding=padding,
            window_dilation=window_dilation,
            ceil_mode=ceil_mode,
            data_format=data_format,
            implementation=implementation,
        )
    image = operands.array("x", x, FLOATS)
    placement = place(image.shape, window_shape, strides, padding, window_dilation, ceil_mode, data_format)
    window, start = placement.window, placement.start
    rule.check_implementation(implementation, static=window.is_static())
    image = edges.crop(image, placement)
    if p == 1:
        sums = avg_pooling.pool(
            _absolute(image), window, start, Divisor(1, ()), implementation=implementation
        )
        return edges.trim(sums, placement)
    if p == math.inf:
        largest = max_pooling.pool(_absolute(image), window, start, implementation=implementation)
        return edges.trim(largest, placement)
    geometry.static_sizes(image.shape, start, window.rank)
    tiles = tiling.tile(tiling.widened(image), start, [axis.pixels_or_nothing() for axis in window.axes])
    y = _norm(tiles, p, tiling.window_of_tiles(window.counts, window.shape), start, implementation)
    return lax.convert_element_type(y, image.dtype)


def _order(p: Any) -> float:
    if isinstance(p, bool | np.bool_) or not isinstance(p, numbers.Real):
        raise TypeError(f"p must be a number known at trace time, got {type(p).__name__} {p}")
    order = float(p)
    if not order >= 1:  # NaN is not either
        raise ValueError(f"p must be at least 1, got {p}")
    return order


def _absolute(x: Array) -> Array:
    """|x|, with the derivative 0 at 0, from operations that Apple's plugins have; NaN * 0 is NaN."""
    zero = lax.full_like(x, 0)
    sign = lax.convert_element_type(x > zero, x.dtype) - lax.convert_element_type(zero > x, x.dtype)
    return x * sign


# --- norms of tiles -----------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _norm(tiles: Array, p: float, window: Window, start: int, implementation: str | None) -> Array:
    size = lax.abs(tiles)
    largest = max_pooling.pool(size, window, start, implementation=implementation)
    # Of subnormal numbers, which XLA may flush, quotients can be 0 / 0.
    tiny = lax.full_like(largest, float(jnp.finfo(largest.dtype).tiny))
    scale = jnp.where(largest == jnp.inf, lax.full_like(largest, 1), lax.max(largest, tiny))
    powers = _power(size / _spread(scale, window, start), p)
    return scale * _power(_sum(powers, window, start, implementation), 1 / p)


@_norm.defjvp
def _norm_jvp(
    p: float,
    window: Window,
    start: int,
    implementation: str | None,
    primals: tuple[Array],
    tangents: tuple[Array],
) -> tuple[Array, Array]:
    (tiles,), (t,) = primals, tangents
    y = _norm(tiles, p, window, start, implementation)
    divisor = jnp.where(y == 0, lax.full_like(y, 1), y)
    weights = _weight(tiles / _spread(divisor, window, start), p - 1)
    return y, _sum(weights * t, window, start, implementation)


def _weight(ratio: Array, power: float) -> Array:
    """sign(ratio) * |ratio| ** power; 0 is the derivative at 0 where it is not a polynomial."""
    if power % 2 == 1:
        return lax.integer_pow(ratio, int(power))
    nowhere = ratio == 0
    safe = jnp.where(nowhere, lax.full_like(ratio, 1), ratio)
    return jnp.where(nowhere, lax.full_like(ratio, 0), lax.sign(safe) * _power(lax.abs(safe), power))


def _power(x: Array, power: float) -> Array:
    return lax.pow(x, lax.full_like(x, power))


def _sum(tiles: Array, window: Window, start: int, implementation: str | None) -> Array:
    return avg_pooling.pool(tiles, window, start, Divisor(1, ()), implementation=implementation)


def _spread(y: Array, window: Window, start: int) -> Array:
    """A number for every tile, at every tap of it."""
    return tiling.tile(
        y, start, [np.repeat(np.arange(a.windows), a.taps).reshape(-1, a.taps) for a in window.axes]
    )
