"""The form `channelwise`, for depthwise convolutions.

They have no sum over channels, so there is nothing that a matrix unit could do.
"""

from __future__ import annotations

import dataclasses
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


TOGETHER = 4
"""Neighbouring results that CUDA's threads compute, each that many, so that a pixel is read once for them.

XLA's kernels compute one element of each operand of a concatenation. Four taps over 16 x 4096 x 1024, H200,
microseconds in float32 and bfloat16: 188 and 130 one by one, 158 and 110 by four; a copy takes 153 and 98.
"""


def forward(conv: Conv, x: Array, kernel: Array) -> Array:
    """A term for each window that reaches a block of `stride` pixels."""
    if _together(conv) > 1:
        return data(*_mirrored(conv, x, kernel))
    kernel = _depthwise(conv, kernel)
    x = lax.convert_element_type(x, kernel.dtype)
    terms = [_term(conv, x, chosen, taps) for chosen, taps in _taps_of_neighbours(conv, kernel)]
    y = conv.sum(terms, arrays=2)
    for i in reversed(range(conv.rank)):
        y = unblock(y, conv.window.axes[i], conv.spatial + 2 * i)
    return y


def data(conv: Conv, g: Array, kernel: Array) -> Array:
    """A term for each tap."""
    kernel = _depthwise(conv, kernel)
    together, last = _together(conv), conv.spatial + conv.rank - 1
    sums = [
        conv.sum(
            (_times_tap(conv, seen, kernel, at) for at, seen in _each_tap(conv, g, i, together)), arrays=2
        )
        for i in range(together)
    ]
    if together == 1:
        return sums[0]
    y = lax.concatenate([lax.expand_dims(a, (last + 1,)) for a in sums], last + 1)
    y = lax.reshape(y, (*y.shape[:last], y.shape[last] * together, *y.shape[last + 2 :]))
    return cut(y, last, 0, conv.window.axes[-1].windows)


def _times_tap(conv: Conv, seen: Array, kernel: Array, at: tuple[int, ...]) -> Array:
    for dim, k in enumerate(at):
        kernel = cut(kernel, dim, k, k + 1)
    weight = lax.broadcast_in_dim(lax.reshape(kernel, (conv.groups,)), seen.shape, (conv.channel,))
    return lax.convert_element_type(seen, kernel.dtype) * weight


def weights(conv: Conv, g: Array, x: Array) -> Array:
    wide = accumulator(g.dtype)
    x = lax.convert_element_type(x, wide)
    pixels = [i for i in range(x.ndim) if i != conv.channel]
    products = (lax.convert_element_type(seen, wide) * x for _, seen in _each_tap(conv, g))
    sums = [lax.expand_dims(lax.reduce(p, np.zeros((), wide), lax.add, pixels), (0,)) for p in products]
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


def _together(conv: Conv) -> int:
    """How many neighbours along the last axis are computed together."""
    return TOGETHER if conv.platform == "cuda" and conv.unstrided and conv.window.is_static() else 1


def _mirrored(conv: Conv, x: Array, kernel: Array) -> tuple[Conv, Array, Array]:
    """A convolution of stride 1 with the roles of image and windows exchanged, and its taps reversed."""
    axes = tuple(
        dataclasses.replace(axis, size=axis.windows, windows=axis.size, low=axis.extent - 1 - axis.low)
        for axis in conv.window.axes
    )
    conv = dataclasses.replace(conv, window=dataclasses.replace(conv.window, axes=axes))
    return conv, x, lax.rev(kernel, tuple(range(conv.rank)))


def _each_tap(conv: Conv, g: Array, part: int = 0, parts: int = 1) -> Iterator[tuple[tuple[int, ...], Array]]:
    """Every tap of the window, and what all windows see through it.

    Of the last axis these are the windows `part`, `part + parts`, ...; some behind the last one see zeros.
    """
    axes = list(conv.window.axes)
    axes[-1] = dataclasses.replace(axes[-1], windows=-(-axes[-1].windows // parts) * parts)
    for dim, axis in enumerate(axes, conv.spatial):
        g = cover(g, axis, dim, 0)
    first = part * axes[-1].stride
    axes[-1] = dataclasses.replace(
        axes[-1], stride=axes[-1].stride * parts, windows=axes[-1].windows // parts
    )
    for at in itertools.product(*(range(a.taps) for a in axes)):
        seen = g
        for dim, (axis, k) in enumerate(zip(axes, at, strict=True), conv.spatial):
            seen = tap_of(seen, axis, dim, k, first if axis is axes[-1] else 0)
        yield at, seen
