"""Which tap of every window is its maximum, and where that tap lies in the plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mps.geometry import Axis, Dim, Window, surely_below
from jax_mps.lowering.axes import disjoint, resize
from jax_mps.lowering.pooling.few_axes import few_axes_on_apple
from jax_mps.lowering.pooling.fold import AT_ONCE, CHAIN, Combine, State, fold, in_one_pass
from jax_mps.lowering.pooling.taps import all_blocks, over_blocks, tap_indices
from jax_mps.lowering.pooling.values import counting, full, has_nan, lowest, reduce_max
from jax_mps.lowering.rule import Platform

Array = Any


@few_axes_on_apple
def max_pool_tap_index(x: Array, *, window: Window, start: int, platform: Platform) -> Array:
    return _argmax(x, window, start, platform)[1]


@few_axes_on_apple
def max_pool_with_tap_index(x: Array, *, window: Window, start: int, platform: Platform) -> State:
    return _argmax(x, window, start, platform)


def _argmax(x: Array, window: Window, start: int, platform: Platform) -> State:
    """The maximum of every window, and the index of the first tap that has it."""
    if platform == "cuda" and window.taps <= AT_ONCE:
        value, tap_index = _argmax_in_one_pass(x, window, start)
    elif all(map(disjoint, window.axes)):
        value, tap_index = _argmax_of_blocks(x, window, start, platform)
    else:  # two arrays a tap
        chain = CHAIN // 2 if platform == "apple" else CHAIN
        value, tap_index = _argmax_by_axis(x, window, start, chain)
    tap_index = _inside(lax.convert_element_type(tap_index, np.int32), window, start)
    return value, lax.convert_element_type(tap_index, window.tap_dtype)


def _argmax_in_one_pass(x: Array, window: Window, start: int) -> State:
    """On CUDA half of the time of a pass an axis, between which indices are written."""
    state = (x, lax.full_like(x, 0, dtype=window.tap_dtype))
    return in_one_pass(state, window, start, _first_greater(1), (lowest(x.dtype), 0))


def _argmax_of_blocks(x: Array, window: Window, start: int, platform: Platform) -> State:
    """For windows that do not touch: the smallest index of a tap that equals the maximum."""
    blocks, dims = all_blocks(x, window, start, lowest(x.dtype))
    value = reduce_max(blocks, dims, platform)
    maximum = over_blocks(value, blocks, dims)
    hit = lax.eq(blocks, maximum)
    if has_nan(x):  # a maximum that is NaN was brought by a NaN
        hit = lax.bitwise_or(hit, lax.ne(blocks, blocks))
    # Counted from the last tap, the first one has the largest number.
    numbers = lax.broadcast_in_dim(window.taps - tap_indices(window), blocks.shape, dims)
    first = reduce_max(lax.select(hit, numbers, full(numbers, 0)), dims, platform)
    return value, full(first, window.taps) - first


def _argmax_by_axis(x: Array, window: Window, start: int, chain: int) -> State:
    """For all windows: an axis after the other, the innermost first."""
    state: State = (x, lax.full_like(x, 0, dtype=np.int32))
    unit = 1  # what the index grows by from one tap of the axis to the next
    for i in reversed(range(window.rank)):
        fill = (lowest(x.dtype), 0)
        state = fold(
            state, window.axes[i], start + i, _first_greater(unit), fill, idempotent=True, chain=chain
        )
        unit *= window.axes[i].taps
    return state


def _first_greater(unit: int) -> Combine:
    """The greater of two values with its index; the left one if they are equal, and the first NaN."""

    def combine(a: State, b: State, distance: int) -> State:
        (left, left_index), (right, right_index) = a, b
        value = lax.max(left, right)
        better = lax.ne(value, left)
        if has_nan(left):  # the first NaN stays
            better = lax.bitwise_and(better, lax.eq(left, left))
        later = right_index + full(right_index, distance * unit)
        return value, lax.select(better, later, left_index)

    return combine


def _inside(tap_index: Array, window: Window, start: int) -> Array:
    """The indices of taps inside the image.

    The padding holds the lowest value. Where that ties with the image, everything ties, and tap 0 was chosen;
    the first tap inside the image is the right one.
    """
    unit, least = window.taps, None
    for dim, axis in enumerate(window.axes, start):
        unit //= axis.taps
        if not surely_below(axis.low, 1):
            first = _first_taps(axis)
            first = resize(first * np.int32(unit), 0, 0, axis.windows - first.shape[0], 0)
            along = lax.broadcast_in_dim(first, tap_index.shape, (dim,))
            least = along if least is None else least + along
    return tap_index if least is None else lax.max(tap_index, least)


def _first_taps(axis: Axis) -> Array:
    """The first tap inside the image, for as many windows as can begin before it."""
    before = -(-(axis.extent - 1) // axis.stride)
    if isinstance(axis.windows, int):
        before = min(before, axis.windows)
    starts = axis.stride * np.arange(before, dtype=np.int32)
    if isinstance(axis.low, int):
        return np.maximum(-((starts - axis.low) // axis.dilation), 0).astype(np.int32)
    # A symbolic padding has a value only when the program runs.
    return jnp.maximum(-((starts - jnp.asarray(axis.low, np.int32)) // axis.dilation), 0)


@few_axes_on_apple
def positions(
    tap_index: Array,
    *,
    window: Window,
    start: int,
    crop: Sequence[tuple[Dim, Dim]],
    sizes: Sequence[Dim],
    platform: Platform,
) -> Array:
    """Tap indices as flat positions in the plane, of which `crop` was cut off."""
    flat, pixels = lax.full_like(tap_index, 0, dtype=np.int32), 1
    rest = lax.convert_element_type(tap_index, np.int32)
    for i in reversed(range(window.rank)):
        axis, (before, _) = window.axes[i], crop[i]
        quotient = _quotient(rest, axis.taps, platform)
        k = rest - quotient * full(rest, axis.taps)
        number = lax.broadcast_in_dim(counting(axis.windows, platform), rest.shape, (start + i,))
        position = number * axis.stride + (k * axis.dilation + (before - axis.low))
        rest, flat, pixels = quotient, flat + position * pixels, pixels * sizes[i]
    return flat


def _quotient(x: Array, divisor: int, platform: Platform) -> Array:
    if platform != "apple":
        return lax.div(x, full(x, divisor))
    # Tap indices are small enough for float32, and the half keeps rounding from reaching the next integer.
    wide = lax.convert_element_type(x, np.float32)
    return lax.convert_element_type((wide + full(wide, 0.5)) / full(wide, divisor), np.int32)
