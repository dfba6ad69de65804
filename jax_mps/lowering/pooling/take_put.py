"""Values from and to the chosen tap of every window. The two operations are each other's transpose."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from jax_mps.geometry import Window
from jax_mps.lowering.apple import MAX_OPERANDS
from jax_mps.lowering.axes import (
    add_up,
    blocks_reached,
    disjoint,
    neighbours,
    nth_before,
    nth_window,
    pixels_at,
    unblock,
)
from jax_mps.lowering.pooling.few_axes import few_axes_on_apple
from jax_mps.lowering.pooling.fold import State
from jax_mps.lowering.pooling.tap_routes import Routes
from jax_mps.lowering.pooling.taps import all_blocks, each_tap, over_blocks, tap_indices
from jax_mps.lowering.pooling.values import full, reduce_sum
from jax_mps.lowering.rule import Platform, accumulator

Array = Any
Neighbours = Sequence[tuple[int, np.ndarray]]
"""What `neighbours` says of an axis: the windows that reach a block of pixels, and by which taps."""

_TAPS = 32
"""Taps of a window up to which each is compared with the chosen one, whatever axis it is on."""

_APPLE_TAPS = 6
"""How many of them by one kernel, beside the arrays that the chosen one is found from."""

_WINDOWS = 9
"""Windows that reach a pixel, up to which each is compared, whatever axis it is on."""

_WINDOWS_READ = 25
"""The same where each is read at its place."""


@few_axes_on_apple
def max_pool_take(
    t: Array, tap_index: Array, *, window: Window, start: int, total_order: bool, platform: Platform
) -> Array:
    tap_index = lax.convert_element_type(tap_index, np.int32)
    if all(map(disjoint, window.axes)):
        return _take_from_blocks(t, tap_index, window, start)
    if window.taps > _TAPS and total_order:
        return Routes(tap_index, window, start).take(t)
    return _take_by_taps(t, tap_index, window, start, platform)


def _take_from_blocks(t: Array, tap_index: Array, window: Window, start: int) -> Array:
    blocks, dims = all_blocks(t, window, start, 0)
    chosen = over_blocks(tap_index, blocks, dims)
    hit = lax.eq(chosen, lax.broadcast_in_dim(tap_indices(window), blocks.shape, dims))
    values = lax.select(hit, blocks, lax.full_like(blocks, 0))
    return reduce_sum(values, dims)  # one term a block, so exact


def _take_by_taps(t: Array, tap_index: Array, window: Window, start: int, platform: Platform) -> Array:
    parts, size = [], _APPLE_TAPS if platform == "apple" else _TAPS
    for k, seen in enumerate(each_tap(t, window, start, 0)):
        if k % size == 0:
            parts.append(lax.full_like(t, 0, shape=tap_index.shape))
        parts[-1] = lax.select(lax.eq(tap_index, full(tap_index, k)), seen, parts[-1])
    return add_up(parts, 1)


@few_axes_on_apple
def max_pool_put(
    g: Array, tap_index: Array, *, window: Window, start: int, total_order: bool, platform: Platform
) -> Array:
    dtype = g.dtype
    g = lax.convert_element_type(g, accumulator(dtype))
    tap_index = lax.convert_element_type(tap_index, np.int32)
    windows = math.prod(blocks_reached(axis).size for axis in window.axes)
    if platform == "cuda" and windows <= _WINDOWS_READ and window.is_static():
        image = _put_by_reading(g, tap_index, window, start)
    elif total_order and windows > _WINDOWS:
        image = Routes(tap_index, window, start).put(g)
    else:
        image = _put_by_phases(g, tap_index, window, start, platform)
    return lax.convert_element_type(image, dtype)


def _put_by_reading(g: Array, tap_index: Array, window: Window, start: int) -> Array:
    """Every pixel reads the value and the choice of each window that reaches it, and compares.

    On CUDA all of it is one kernel, whose reads at computed places take half of the time of padded and
    interleaved arrays.
    """
    around = [[nth_window(axis, j) for j in blocks_reached(axis).tolist()] for axis in window.axes]
    terms, spatial = [], tuple(range(start, start + window.rank))
    for reached in itertools.product(*around):
        places, taps = zip(*reached, strict=True)
        value, chosen = pixels_at((g, tap_index), places, start)
        own = lax.broadcast_in_dim(_joined(taps, window), chosen.shape, spatial)
        terms.append(lax.select(lax.eq(chosen, own), value, lax.full_like(value, 0)))
    return functools.reduce(lax.add, terms)


def _joined(taps: Sequence[Array], window: Window) -> Array:
    """The index of a tap from its number along each axis, for all pixels; negative if one of these is."""
    index, least = taps[0], taps[0]
    for axis, tap in zip(window.axes[1:], taps[1:], strict=True):
        shape = (*index.shape, *tap.shape)
        index, least = (lax.broadcast_in_dim(a, shape, tuple(range(index.ndim))) for a in (index, least))
        tap = lax.broadcast_in_dim(tap, shape, (len(shape) - 1,))
        index, least = index * full(index, axis.taps) + tap, lax.min(least, tap)
    return index if len(taps) == 1 else lax.select(lax.lt(least, full(least, 0)), least, index)


def _put_by_phases(
    g: Array,
    tap_index: Array,
    window: Window,
    start: int,
    platform: Platform,
) -> Array:
    """Every pixel compares its own tap index with the choice of each window that reaches it.

    Each axis is split into (blocks, phases) at once, so that the image is written a single time.
    """
    around = [neighbours(axis) for axis in window.axes]
    # By the number of a neighbour along each axis: its values and its choices.
    shifted: dict[tuple[int, ...], State] = {(): (g, tap_index)}
    for i, (axis, along) in enumerate(zip(window.axes, around, strict=True), start):
        shifted = {
            (*key, n): (nth_before(value, axis, i, j, 0), nth_before(chosen, axis, i, j, -1))
            for key, (value, chosen) in shifted.items()
            for n, (j, _) in enumerate(along)
        }
    parts = [
        _where_chosen(value, chosen, _own_tap_indices(window, around, key), window, start)
        for key, (value, chosen) in shifted.items()
    ]
    arrays = 2 if all(axis.stride == 1 for axis in window.axes) else 3
    image = add_up(parts, MAX_OPERANDS // arrays if platform == "apple" else len(parts))
    for i, axis in enumerate(window.axes, start):
        image = unblock(image, axis, i)
    return image


def _own_tap_indices(window: Window, around: Sequence[Neighbours], key: Sequence[int]) -> np.ndarray:
    """For every phase, which tap of that neighbour a pixel is; -2 if it is none, which nobody has chosen."""
    own = np.zeros((), np.int32)
    for axis, along, n in zip(window.axes, around, key, strict=True):
        taps = along[n][1]
        none = (own[..., None] < 0) | (taps < 0)
        own = np.where(none, -2, own[..., None] * axis.taps + taps).astype(np.int32)
    return own


def _where_chosen(value: Array, chosen: Array, own: np.ndarray, window: Window, start: int) -> Array:
    """Every axis as (blocks, phases): the neighbour's value where the pixel is its chosen tap, else 0."""
    shape = list(value.shape)
    for i, axis in reversed(list(enumerate(window.axes, start))):
        shape.insert(i + 1, axis.stride)
    phases = tuple(start + 2 * i + 1 for i in range(window.rank))
    kept = [i for i in range(len(shape)) if i not in phases]
    value, chosen = (lax.broadcast_in_dim(a, shape, kept) for a in (value, chosen))
    hit = lax.eq(chosen, lax.broadcast_in_dim(own, shape, phases))
    return lax.select(hit, value, lax.full_like(value, 0))
