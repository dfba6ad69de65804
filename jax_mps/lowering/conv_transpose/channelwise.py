"""The form `channelwise`, for depthwise convolutions.

They have no sum over channels, so there is nothing that a matrix unit could do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax import lax

from jax_mps.lowering.axes import (
    concatenate,
    cover,
    cut,
    neighbours,
    nth_before,
    repeat,
    spread,
    tap_of,
    unblock,
)
from jax_mps.lowering.conv_transpose.description import Conv
from jax_mps.lowering.rule import accumulator

Array = Any


def forward(conv: Conv, x: Array, kernel: Array) -> Array:
    """A term for each window that reaches a block of `stride` pixels."""
    kernel = _depthwise(conv, kernel)
    x = lax.convert_element_type(x, kernel.dtype)
    terms = [_term(conv, x, chosen, taps) for chosen, taps in _taps_of_neighbours(conv, kernel)]
    y = conv.sum(terms, arrays=2)
    for i in reversed(range(conv.rank)):
        y = unblock(y, conv.window.axes[i], conv.spatial + 2 * i)
    return y


def data(conv: Conv, g: Array, kernel: Array) -> Array:
    kernel = _depthwise(conv, kernel)
    terms = []
    for at, seen in _each_tap(conv, lax.convert_element_type(g, kernel.dtype)):
        weight = kernel
        for dim, k in enumerate(at):
            weight = cut(weight, dim, k, k + 1)
        weight = lax.reshape(weight, (conv.groups,))
        terms.append(seen * lax.broadcast_in_dim(weight, seen.shape, (conv.channel,)))
    return conv.sum(terms, arrays=2)


def weights(conv: Conv, g: Array, x: Array) -> Array:
    wide = accumulator(g.dtype)
    g, x = (lax.convert_element_type(a, wide) for a in (g, x))
    pixels = [i for i in range(x.ndim) if i != conv.channel]
    sums = [
        lax.expand_dims(lax.reduce(seen * x, np.zeros((), wide), lax.add, pixels), (0,))
        for _, seen in _each_tap(conv, g)
    ]
    kernel = concatenate(sums, 0)
    return lax.reshape(kernel, (*conv.window.shape, conv.groups, 1, 1))


def _depthwise(conv: Conv, kernel: Array) -> Array:
    """`(*window, channels)`, in the type that sums are formed in."""
    kernel = lax.reshape(kernel, (*conv.window.shape, conv.groups))
    return lax.convert_element_type(kernel, accumulator(kernel.dtype))


def _taps_of_neighbours(conv: Conv, kernel: Array) -> list[tuple[tuple[int, ...], Array]]:
    """For every combination of neighbours (see `neighbours`): which, and the taps `(phases..., channels)`."""
    found: list[tuple[tuple[int, ...], Array]] = [((), kernel)]
    for dim, axis in enumerate(conv.window.axes):
        found = [
            ((*chosen, j), _pick(part, dim, taps)) for chosen, part in found for j, taps in neighbours(axis)
        ]
    return found


def _pick(kernel: Array, dim: int, taps: np.ndarray) -> Array:
    """The taps of those numbers, and zeros for -1."""
    first, last = int(taps[0]), int(taps[-1])
    if np.array_equal(taps, np.arange(first, first + taps.size)):
        return cut(kernel, dim, first, last + 1)
    parts = {int(r): cut(kernel, dim, int(taps[r]), int(taps[r]) + 1) for r in np.flatnonzero(taps >= 0)}
    return spread(parts, taps.size, dim)


def _term(conv: Conv, x: Array, chosen: tuple[int, ...], taps: Array) -> Array:
    """What those neighbours add to the result, every axis of which is (blocks, phases)."""
    rank, axes = conv.rank, conv.window.axes
    for dim, (axis, j) in enumerate(zip(axes, chosen, strict=True), conv.spatial):
        x = nth_before(x, axis, dim, j, 0)
    for i, axis in enumerate(axes):
        x = repeat(x, conv.spatial + 2 * i, axis.stride)
    phases = [conv.spatial + 2 * i + 1 for i in range(rank)]
    if conv.channels_last:
        order = (*phases, 1 + 2 * rank)
    else:
        taps, order = lax.transpose(taps, (rank, *range(rank))), (1, *phases)
    return x * lax.broadcast_in_dim(taps, x.shape, order)


def _each_tap(conv: Conv, g: Array) -> Iterator[tuple[tuple[int, ...], Array]]:
    """Every tap of the window, and what all windows see through it."""
    axes = conv.window.axes
    for dim, axis in enumerate(axes, conv.spatial):
        g = cover(g, axis, dim, 0)
    for at in itertools.product(*(range(a.taps) for a in axes)):
        seen = g
        for dim, (axis, k) in enumerate(zip(axes, at, strict=True), conv.spatial):
            seen = tap_of(seen, axis, dim, k)
        yield at, seen
