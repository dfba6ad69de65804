"""What windows see: through one tap after the other, or, where they do not touch, through all at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax import lax

from jax_mps.geometry import Window
from jax_mps.lowering.axes import cover, split_windows

Array = Any


def each_tap(x: Array, window: Window, start: int, fill: Any) -> Iterator[Array]:
    """What every window sees through one tap, tap after tap."""
    for i, axis in enumerate(window.axes, start):
        x = cover(x, axis, i, fill)
    for taps in itertools.product(*(range(n) for n in window.shape)):
        starts, limits, strides = [0] * x.ndim, list(x.shape), [1] * x.ndim
        for i, (axis, k) in enumerate(zip(window.axes, taps, strict=True), start):
            starts[i], strides[i] = k * axis.dilation, axis.stride
            limits[i] = starts[i] + (axis.windows - 1) * axis.stride + 1
        yield lax.slice(x, starts, limits, strides)


def all_blocks(x: Array, window: Window, start: int, fill: Any) -> tuple[Array, tuple[int, ...]]:
    """Windows that do not touch along any axis: every axis becomes (windows, taps).

    Returns:
      The array, and which of its axes are taps.
    """
    for i, axis in reversed(list(enumerate(window.axes, start))):
        x = split_windows(x, axis, i, fill)
    return x, tuple(start + 2 * i + 1 for i in range(window.rank))


def over_blocks(pooled: Array, blocks: Array, dims: tuple[int, ...]) -> Array:
    """The value of every window, repeated at all its taps; `dims` are the axes of the taps."""
    kept = [i for i in range(blocks.ndim) if i not in dims]
    return lax.broadcast_in_dim(pooled, blocks.shape, kept)


def tap_indices(window: Window) -> np.ndarray:
    """The index of every tap of a window: its number in row-major order."""
    return np.arange(window.taps, dtype=np.int32).reshape(window.shape)
