"""Average pooling and its gradient, each the transpose of the other."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax import lax

from jax_mps.geometry import Axis, Dim, Divisor, Window
from jax_mps.lowering.pooling.few_axes import few_axes_on_apple
from jax_mps.lowering.pooling.fold import fold
from jax_mps.lowering.pooling.sums import add, sum_of_taps, sum_of_windows
from jax_mps.lowering.pooling.values import full, reduce_sum
from jax_mps.lowering.rule import Platform, accumulator

Array = Any


@few_axes_on_apple
def avg_pool(x: Array, *, window: Window, start: int, divisor: Divisor, platform: Platform) -> Array:
    total = sum_of_taps(lax.convert_element_type(x, accumulator(x.dtype)), window, start)
    return lax.convert_element_type(_divide(total, window, start, divisor), x.dtype)


@few_axes_on_apple
def avg_pool_gradient(g: Array, *, window: Window, start: int, divisor: Divisor, platform: Platform) -> Array:
    quotient = _divide(lax.convert_element_type(g, accumulator(g.dtype)), window, start, divisor)
    return lax.convert_element_type(sum_of_windows(quotient, window, start, platform), g.dtype)


def _divide(x: Array, window: Window, start: int, divisor: Divisor) -> Array:
    if divisor.number:
        return x / full(x, divisor.number)
    counts = [
        _counted_taps(axis, low, high, x.dtype)
        for axis, (low, high) in zip(window.axes, divisor.band, strict=True)
    ]
    counted: Array = None
    for dim, count in enumerate(counts, start):
        along = lax.broadcast_in_dim(count, x.shape, (dim,) if count.ndim else ())
        counted = along if counted is None else counted * along
    # A window that reaches neither image nor band has the sum 0, and so has its average.
    return x / lax.max(counted, full(x, 1))


def _counted_taps(axis: Axis, low: Dim, high: Dim, dtype: Any) -> Array:
    """How many taps of every window lie in the image or its band: a vector, or a number if all agree."""
    grown = axis.cropped(-low, -high)
    if not grown.overlaps_padding():
        return np.array(axis.taps, dtype)
    ones = lax.full((grown.size,), 1, dtype)
    # All of it is constant, so that nothing but the number of arrays matters.
    return fold((ones,), grown, 0, add, (0,), reduce=reduce_sum, chain=2)[0]
