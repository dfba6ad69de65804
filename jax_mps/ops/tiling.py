"""Windows copied side by side: tiles, which ordinary pooling takes, wherever the windows lay.

One linear primitive copies pixels of an axis, by positions known at trace time. -1 reads 0:

    y[..., q, ...] = sum over the rows of x[..., row[q], ...]

Its transpose sums, for every pixel, what was copied from there: the same primitive with other rows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mps import _compat
from jax_mps.geometry import Axis, Window
from jax_mps.lowering import rule
from jax_mps.lowering.rule import Platform
from jax_mps.ops import primitive
from jax_mps.ops.max_pooling import positions_p
from jax_mps.ops.operands import FLOATS

Array = Any
Rows = tuple[tuple[int, ...], ...]


def tile(x: Array, start: int, pixels: Sequence[np.ndarray]) -> Array:
    """The taps of all windows side by side.

    Args:
      x: the image.
      start: its first spatial axis.
      pixels: for every spatial axis where the taps of its windows lie, `(windows, taps)`; -1 reads 0.
    """
    for dim, places in enumerate(pixels, start):
        row = tuple(places.ravel().tolist())
        if row != tuple(range(x.shape[dim])):
            x = pick_p.bind(x, rows=(row,), dim=dim)
    return x


def window_of_tiles(counts: Sequence[int], taps: Sequence[int]) -> Window:
    """The window whose image consists of `counts` tiles along each axis."""
    return Window(tuple(Axis(n * k, k, k, 1, 0, n) for n, k in zip(counts, taps, strict=True)))


def widened(x: Array) -> Array:
    """In the type that sums are formed in: gradients of pixels that several tiles have are added up."""
    return lax.convert_element_type(x, rule.accumulator(x.dtype)) if x.dtype.name in FLOATS else x


def along(values: Any, dim: int, ndim: int) -> Any:
    """A vector as an array of `ndim` axes that has length 1 along all but `dim`."""
    return np.expand_dims(values, [i for i in range(ndim) if i != dim])


def positions(
    tap_index: Array, window: Window, start: int, sizes: Sequence[int], firsts: Sequence[Any]
) -> Array:
    """Tap indices of tiles as flat positions in the plane of `sizes` that the tiles were copied from.

    Args:
      tap_index: for every tile.
      window: that of the tiles.
      start: the first spatial axis.
      sizes: of the plane.
      firsts: for every spatial axis the pixels at which windows start, to be broadcast to `tap_index`.
    """
    crop = ((0, 0),) * window.rank
    flat = positions_p.bind(tap_index, window=window, start=start, crop=crop, sizes=tuple(sizes))
    pixels = 1
    for i in reversed(range(window.rank)):
        axis = window.axes[i]
        assumed = along(np.arange(axis.windows, dtype=np.int32) * axis.stride, start + i, tap_index.ndim)
        flat = flat + (firsts[i] - assumed) * np.int32(pixels)
        pixels *= sizes[i]
    return flat


# --- the primitive ------------------------------------------------------------------------------------


def _picked(x: Array, *, rows: Rows, dim: int, platform: Platform) -> Array:
    pixels = np.array(rows, np.int32).ravel()
    if platform == "apple":  # its plugins have no gather
        y = lax.concatenate([_run(x, dim, *run) for run in _runs(pixels.tolist())], dim)
    else:
        outside = np.where(pixels < 0, x.shape[dim], pixels)
        y = jnp.take(x, outside, axis=dim, mode="fill", fill_value=0)
    if len(rows) == 1:
        return y
    y = lax.reshape(y, (*x.shape[:dim], *np.shape(rows), *x.shape[dim + 1 :]))
    return lax.reduce(y, np.zeros((), x.dtype), lax.add, (dim,))


def _runs(pixels: Sequence[int]) -> list[tuple[int, int]]:
    """Pixels that follow each other: the first, and how many they are; zeros have the first -1."""
    groups = itertools.groupby(enumerate(pixels), lambda each: None if each[1] < 0 else each[1] - each[0])
    runs = (list(group) for _, group in groups)
    return [(run[0][1], len(run)) for run in runs]


def _run(x: Array, dim: int, first: int, count: int) -> Array:
    if first < 0:
        return lax.full((*x.shape[:dim], count, *x.shape[dim + 1 :]), 0, x.dtype)
    return lax.slice_in_dim(x, first, first + count, axis=dim)


@functools.lru_cache(maxsize=1024)
def _transposed(rows: Rows, size: int) -> Rows:
    """For every one of `size` pixels the places that it was copied to."""
    places: list[list[int]] = [[] for _ in range(size)]
    for row in rows:
        for q, pixel in enumerate(row):
            if pixel >= 0:
                places[pixel].append(q)
    return tuple(itertools.zip_longest(*places, fillvalue=-1)) or ((-1,) * size,)


def _batch(prim: Any, args: Sequence[Array], dims: Sequence[int], *, rows: Rows, dim: int) -> Any:
    (x,), (mapped,) = args, dims
    return prim.bind(x, rows=rows, dim=dim + (mapped <= dim)), mapped


pick_p = primitive.define(
    "pick",
    lambda x, *, rows, dim: _compat.retyped(x, (*x.shape[:dim], len(rows[0]), *x.shape[dim + 1 :]), x.dtype),
    xla_fun=_picked,
    native=None,
    batch=_batch,
)
primitive.define_multilinear(
    pick_p,
    {0: lambda ct, x, *, rows, dim: pick_p.bind(ct, rows=_transposed(rows, x.aval.shape[dim]), dim=dim)},
)
