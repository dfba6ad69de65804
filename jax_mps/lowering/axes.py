"""One axis of an array: growing it, cutting it, and the two views of it that windows need.

Every function takes the array and the number `dim` of the axis. Windows that start `stride` pixels apart cut
the axis into blocks of `stride` pixels; pixel r of a block is its phase r.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax import lax

from jax_mps.geometry import Axis, Dim

Array = Any


def resize(x: Array, dim: int, before: Dim, after: Dim, fill: Any) -> Array:
    """Adds that many elements of `fill` at the ends of an axis; cuts elements off where negative."""
    length = x.shape[dim]
    if all(isinstance(n, int) for n in (length, before, after)):
        # The part of x that stays, which may be nothing.
        first = min(max(-before, 0), length)
        limit = max(min(length + after, length), first)
        if (first, limit) != (0, length):
            x = cut(x, dim, first, limit)
            before, after = before + first, after + length - limit
            before, after = (before, after) if limit > first else (before + after, 0)
        if before == after == 0:
            return x
    config = [(0, 0, 0)] * x.ndim
    config[dim] = (before, after, 0)
    return lax.pad(x, np.array(fill, x.dtype), config)


def cut(x: Array, dim: int, first: Dim, limit: Dim, stride: int = 1) -> Array:
    starts, limits, strides = [0] * x.ndim, list(x.shape), [1] * x.ndim
    starts[dim], limits[dim], strides[dim] = first, limit, stride
    return lax.slice(x, starts, limits, strides)


def cover(x: Array, axis: Axis, dim: int, fill: Any) -> Array:
    """The pixels from the first to the last tap of all windows."""
    return resize(x, dim, axis.low, axis.high, fill)


def uncover(x: Array, axis: Axis, dim: int, fill: Any) -> Array:
    """From an array that begins with the first tap to the pixels of the image."""
    return resize(x, dim, -axis.low, axis.size + axis.low - x.shape[dim], fill)


def tap_of(x: Array, axis: Axis, dim: int, k: int, first: int = 0) -> Array:
    """Tap `k` of every window of a covered array, the first of which is at pixel `first`."""
    first += k * axis.dilation
    return cut(x, dim, first, first + (axis.windows - 1) * axis.stride + 1, axis.stride)


def split_windows(x: Array, axis: Axis, dim: int, fill: Any) -> Array:
    """Windows that do not touch, as the rows of a new axis behind `dim`."""
    x = resize(x, dim, axis.low, axis.windows * axis.stride - axis.low - axis.size, fill)
    x = lax.reshape(x, (*x.shape[:dim], axis.windows, axis.stride, *x.shape[dim + 1 :]))
    return cut(x, dim + 1, 0, axis.taps)


def unblock(x: Array, axis: Axis, dim: int) -> Array:
    """The inverse of splitting an axis into (blocks, phases); then cut or grown to the image."""
    x = lax.reshape(x, (*x.shape[:dim], x.shape[dim] * x.shape[dim + 1], *x.shape[dim + 2 :]))
    return uncover(x, axis, dim, 0)


def add_up(terms: Iterable[Array], at_once: int) -> Array:
    """The sum of arrays, at most `at_once` of them by elementwise operations in a row.

    Further sums are left to a reduction, which compilers that fuse elementwise operations keep apart.
    """
    arrays = list(terms)
    sums = [functools.reduce(lax.add, arrays[i : i + at_once]) for i in range(0, len(arrays), at_once)]
    if len(sums) == 1:
        return sums[0]
    shape, dtype = sums[0].shape, sums[0].dtype
    wide = np.promote_types(dtype, np.float32)
    rows = lax.concatenate([lax.reshape(a, (1, math.prod(shape))) for a in sums], 0)
    total = lax.reduce(lax.convert_element_type(rows, wide), np.zeros((), wide), lax.add, (0,))
    return lax.reshape(lax.convert_element_type(total, dtype), shape)


def concatenate(arrays: list[Array], dim: int) -> Array:
    return arrays[0] if len(arrays) == 1 else lax.concatenate(arrays, dim)


def disjoint(axis: Axis) -> bool:
    """Whether the windows do not touch each other."""
    return axis.dilation == 1 and axis.stride >= axis.taps


def blocks_reached(axis: Axis) -> np.ndarray:
    """The blocks of `stride` pixels that the taps of a window fall on, counted from its first."""
    return np.unique(np.arange(axis.taps) * axis.dilation // axis.stride)


def neighbours(axis: Axis) -> list[tuple[int, np.ndarray]]:
    """Which windows reach a pixel.

    Cut the padded axis into blocks of `stride` pixels, so that pixel r of block q is number
    `q * stride + r`, and window p starts with block p. Returns the pairs (j, taps): pixel r of block q
    is tap `taps[r]` of window q - j, or none of its taps where `taps[r]` is -1.
    """
    found = []
    for j in blocks_reached(axis).tolist():
        distance = np.arange(j * axis.stride, (j + 1) * axis.stride)
        hit = (distance % axis.dilation == 0) & (distance < axis.extent)
        found.append((j, np.where(hit, distance // axis.dilation, -1).astype(np.int32)))
    return found


def nth_window(axis: Axis, j: int) -> tuple[Array, Array]:
    """For every pixel, the window `j` blocks before its own (see `neighbours`), and which of its taps it is.

    Where there is no such window, or the pixel is none of its taps, that is -1, and the window any.
    """
    place = lax.iota(np.int32, axis.size) + np.int32(axis.low)
    window = lax.div(place, np.int32(axis.stride)) - np.int32(j)
    distance = place - window * np.int32(axis.stride)
    tap = lax.div(distance, np.int32(axis.dilation))
    hit = (distance == tap * np.int32(axis.dilation)) & (tap >= 0) & (tap < axis.taps)
    hit &= (window >= 0) & (window < axis.windows)
    inside = lax.clamp(np.int32(0), window, np.int32(axis.windows - 1))
    return inside, lax.select(hit, tap, lax.full_like(tap, -1))


def pixels_at(arrays: Sequence[Array], places: Sequence[Array], start: int) -> list[Array]:
    """Reads arrays at the grid of these places, one vector an axis."""
    rank, shape = len(places), tuple(place.shape[0] for place in places)
    grid = concatenate([lax.broadcast_in_dim(a, (*shape, 1), (i,)) for i, a in enumerate(places)], rank)
    spatial = tuple(range(start, start + rank))
    others = tuple(i for i in range(arrays[0].ndim) if i not in spatial)
    slices = [1 if i in spatial else n for i, n in enumerate(arrays[0].shape)]
    numbers = lax.GatherDimensionNumbers(others, spatial, spatial)
    inside = lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return [lax.gather(x, grid, numbers, slices, mode=inside) for x in arrays]


def spread(parts: Mapping[int, Array], count: int, dim: int) -> Array:
    """Arrays of length 1 at those places of an axis of `count`, and zeros at all others."""
    pieces, filled = [], 0
    for place, part in sorted(parts.items()):
        pieces.append(resize(part, dim, place - filled, 0, 0))
        filled = place + 1
    return resize(concatenate(pieces, dim), dim, 0, count - filled, 0)


def nth_before(g: Array, axis: Axis, dim: int, j: int, fill: Any) -> Array:
    """For every block of `stride` pixels (see `neighbours`), the window `j` blocks before it."""
    blocks = -(-(axis.size + axis.low) // axis.stride)
    return resize(g, dim, j, blocks - axis.windows - j, fill)


def repeat(x: Array, dim: int, count: int) -> Array:
    """Repeats every element of an axis along a new axis behind it."""
    shape = (*x.shape[: dim + 1], count, *x.shape[dim + 1 :])
    return lax.broadcast_in_dim(x, shape, [i for i in range(len(shape)) if i != dim + 1])
