"""The sum over the taps of every window, and its transpose: the sum over the windows of every pixel."""

from __future__ import annotations

import functools
from typing import Any

from jax import lax

from jax_mps.geometry import Axis, Window
from jax_mps.lowering.axes import (
    blocks_reached,
    cut,
    neighbours,
    nth_before,
    nth_window,
    pixels_at,
    repeat,
    resize,
    unblock,
    uncover,
)
from jax_mps.lowering.pooling.fold import CHAIN, State, fold, fold_window
from jax_mps.lowering.pooling.values import full, reduce_sum
from jax_mps.lowering.rule import Platform

Array = Any


def add(a: State, b: State, _: int) -> State:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def sum_of_taps(x: Array, window: Window, start: int) -> Array:
    return sums_of_taps((x,), window, start)[0]


def sums_of_taps(state: State, window: Window, start: int) -> State:
    return fold_window(state, window, start, add, (0,) * len(state), reduce=reduce_sum)


def sum_of_windows(g: Array, window: Window, start: int, platform: Platform) -> Array:
    """The transpose of `sum_of_taps`."""
    for i, axis in enumerate(window.axes):
        g = _sum_of_windows(g, axis, start + i, platform)
    return g


def _sum_of_windows(g: Array, axis: Axis, dim: int, platform: Platform) -> Array:
    """Along one axis."""
    if axis.stride > 1:
        if blocks_reached(axis).size <= CHAIN:
            reads = platform == "cuda" and axis.is_static()
            return _by_reading(g, axis, dim) if reads else _by_neighbours(g, axis, dim)
        g = _with_stride_1(g, axis, dim)
    # With stride 1, the windows of a pixel are a window themselves, as long as its taps reach.
    reach = (axis.taps - 1) * axis.dilation
    mirrored = Axis(g.shape[dim], axis.taps, 1, axis.dilation, reach, g.shape[dim] + reach)
    (total,) = fold((g,), mirrored, dim, add, (0,))
    return uncover(total, axis, dim, 0)


def _by_neighbours(g: Array, axis: Axis, dim: int) -> Array:
    """A term for each window that reaches a block of `stride` pixels."""
    total = None
    for j, taps in neighbours(axis):
        term = repeat(nth_before(g, axis, dim, j, 0), dim, axis.stride)
        if taps.min() < 0:
            hit = lax.broadcast_in_dim(taps >= 0, term.shape, (dim + 1,))
            term = lax.select(hit, term, lax.full_like(term, 0))
        total = term if total is None else total + term
    return unblock(total, axis, dim)


def _by_reading(g: Array, axis: Axis, dim: int) -> Array:
    """The same with reads at computed places: on CUDA one kernel for all axes, in half of the time."""
    terms = []
    for j in blocks_reached(axis).tolist():
        place, tap = nth_window(axis, j)
        (term,) = pixels_at((g,), (place,), dim)
        hit = lax.broadcast_in_dim(lax.ge(tap, full(tap, 0)), term.shape, (dim,))
        terms.append(lax.select(hit, term, lax.full_like(term, 0)))
    return functools.reduce(lax.add, terms)


def _with_stride_1(g: Array, axis: Axis, dim: int) -> Array:
    """Zeros between the windows."""
    g = resize(lax.expand_dims(g, (dim + 1,)), dim + 1, 0, axis.stride - 1, 0)
    g = lax.reshape(g, (*g.shape[:dim], axis.windows * axis.stride, *g.shape[dim + 2 :]))
    return cut(g, dim, 0, (axis.windows - 1) * axis.stride + 1)
