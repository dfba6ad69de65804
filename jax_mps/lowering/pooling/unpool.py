"""Values to and from any positions of a plane.

Positions are data here, so these two alone use scatter and gather. Where several values name the same
position the last one stays; a scatter of ordinal numbers under max finds it on any platform. Apple's
plugins, which have no scatter and gather to rely on, compare every entry with every pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mps.geometry import Dim
from jax_mps.lowering.pooling.few_axes import few_axes_on_apple
from jax_mps.lowering.pooling.values import counting, full, lowest, reduce_max
from jax_mps.lowering.rule import Platform

Array = Any

_COMPARISONS = 2**27
"""Comparisons of entries with pixels that are made at most: each takes four bytes for a moment."""


@few_axes_on_apple
def max_unpool(
    y: Array,
    indices: Array,
    *,
    sizes: tuple[Dim, ...],
    source: tuple[Dim, ...],
    start: int,
    platform: Platform,
) -> Array:
    if platform == "apple":
        table = _Table(indices, sizes, source, start)
        flat = table.choose(_flatten(y, start, len(sizes)), along=start)
        return lax.reshape(flat, (*y.shape[:start], *sizes, *y.shape[start + len(sizes) :]))

    def plane(y: Array, indices: Array) -> Array:
        last = _last_at(indices, sizes)
        at, zero = _place_of(jnp.maximum(last, 0), y.shape), jnp.zeros((), y.dtype)
        if not all(isinstance(n, int) for n in y.shape):  # there may be no entry, and a gather needs one
            y = lax.pad(y, zero, [(0, 1, 0)] * y.ndim)
        return jnp.where(last >= 0, y[at], zero)

    rank = len(sizes)
    arrays = (_flatten_static(a, start, rank) for a in (y, indices))
    flat = _over_planes(plane, y.ndim, start, rank)(*arrays)
    return lax.reshape(flat, (*y.shape[:start], *sizes, *y.shape[start + rank :]))


@few_axes_on_apple
def max_unpool_take(
    c: Array,
    indices: Array,
    *,
    sizes: tuple[Dim, ...],
    source: tuple[Dim, ...],
    start: int,
    platform: Platform,
) -> Array:
    if platform == "apple":
        table = _Table(indices, sizes, source, start)
        flat = table.choose(_flatten(c, start, len(sizes)), along=start + 1)
        return lax.reshape(flat, indices.shape)

    def plane(c: Array, indices: Array) -> Array:
        order = _numbers(indices.shape)
        inside = jnp.logical_and(indices >= 0, indices < c.shape[0])
        at = jnp.where(inside, indices, 0)
        won = jnp.logical_and(inside, _last_at(indices, sizes)[at] == order)
        return jnp.where(won, c[at], jnp.zeros((), c.dtype))

    rank = len(sizes)
    arrays = _flatten(c, start, rank), _flatten_static(indices, start, rank)
    flat = _over_planes(plane, c.ndim, start, rank)(*arrays)
    return lax.reshape(flat, indices.shape)


def _last_at(indices: Array, sizes: tuple[Dim, ...]) -> Array:
    """For every position of a plane, the last entry of `indices` that names it, or -1."""
    size = math.prod(sizes)
    order = _numbers(indices.shape)
    # `at` would count negative positions from the end.
    positions = jnp.where(indices < 0, size, indices)
    return jnp.full((size,), -1, np.int32).at[positions].max(order, mode="drop")


def _numbers(shape: Sequence[Dim]) -> Array:
    """The row-major number of every entry."""
    total = lax.full(shape, 0, np.int32)
    for i, n in enumerate(shape):
        total = total * jnp.asarray(n, np.int32) + lax.broadcasted_iota(np.int32, shape, i)
    return total


def _place_of(number: Array, shape: Sequence[Dim]) -> tuple[Array, ...]:
    """The inverse of `_numbers`."""
    place: list[Array] = []
    for n in reversed(shape[1:]):
        place.append(number % jnp.asarray(n, np.int32))
        number = number // jnp.asarray(n, np.int32)
    return (number, *reversed(place))


class _Table:
    """Which entry of `indices` each pixel takes: a table of entries and pixels for every plane."""

    def __init__(self, indices: Array, sizes: tuple[Dim, ...], source: tuple[Dim, ...], start: int) -> None:
        indices = _flatten(indices, start, len(sizes))
        pixels = math.prod(sizes)
        self.shape = (*indices.shape[:start], indices.shape[start], pixels, *indices.shape[start + 1 :])
        count = math.prod(self.shape)
        if not isinstance(count, int) or count > _COMPARISONS:
            raise ValueError(
                f"max_unpool from {source} to {sizes} cannot be lowered for Apple's GPUs: it takes "
                f"{count} comparisons of entries with pixels, and at most {_COMPARISONS} are made; unpool "
                "fewer or smaller planes at a time, or use the CPU"
            )
        self.at = start
        number = self._in_table(counting(indices.shape[start], "apple"), (start,))
        hit = lax.eq(
            self._in_table(indices, self._without(start + 1)),
            self._in_table(counting(pixels, "apple"), (start + 1,)),
        )
        last = reduce_max(lax.select(hit, number, full(number, -1)), (start,), "apple")
        # An entry that is the last to name a pixel names it.
        self.won = lax.eq(number, self._in_table(last, self._without(start)))

    def choose(self, values: Array, *, along: int) -> Array:
        """Along one axis of the table, the value where an entry has won, or 0.

        A maximum of one number is that number, whatever its type, and NaN.
        """
        table = self._in_table(values, self._without(2 * self.at + 1 - along))
        others = full(table, lowest(values.dtype))
        value = reduce_max(lax.select(self.won, table, others), (along,), "apple")
        chosen = reduce_max(lax.convert_element_type(self.won, np.int32), (along,), "apple")
        return lax.select(lax.gt(chosen, full(chosen, 0)), value, lax.full_like(value, 0))

    def _without(self, axis: int) -> list[int]:
        return [i for i in range(len(self.shape)) if i != axis]

    def _in_table(self, x: Array, dims: Sequence[int]) -> Array:
        return lax.broadcast_in_dim(x, self.shape, dims)


def _flatten(x: Array, start: int, rank: int) -> Array:
    spatial = math.prod(x.shape[start : start + rank])
    return lax.reshape(x, (*x.shape[:start], spatial, *x.shape[start + rank :]))


def _flatten_static(x: Array, start: int, rank: int) -> Array:
    """Symbolic sizes stay axes: of their product JAX may not know that it is a size."""
    return _flatten(x, start, rank) if all(isinstance(n, int) for n in x.shape) else x


def _over_planes(plane: Callable[..., Array], ndim: int, start: int, rank: int) -> Callable[..., Array]:
    for _ in range(ndim - start - rank):
        plane = jax.vmap(plane, in_axes=-1, out_axes=-1)
    for _ in range(start):
        plane = jax.vmap(plane)
    return plane
