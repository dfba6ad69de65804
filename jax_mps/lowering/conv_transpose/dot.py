"""The form `dot`: one matrix product with all taps."""

from __future__ import annotations

import math
from typing import Any

from jax import lax

from jax_mps.geometry import Axis
from jax_mps.lowering.axes import concatenate, cover, cut, resize, spread, tap_of, unblock
from jax_mps.lowering.conv_transpose.description import Conv
from jax_mps.lowering.conv_transpose.products import (
    contract,
    from_channels_last,
    matmul,
    pixels_in_rows,
    to_channels_last,
)

Array = Any


def forward(conv: Conv, x: Array, kernel: Array) -> Array:
    """The products of all pixels with all taps, added up where they fall."""
    rank, groups, window = conv.rank, conv.groups, conv.window
    x = to_channels_last(conv, x)
    columns = lax.transpose(kernel, (rank, rank + 2, *range(rank), rank + 1))
    columns = lax.reshape(columns, (groups, conv.inputs // groups, window.taps * (conv.outputs // groups)))
    if window.is_static():
        z = _of_pixels_in_rows(conv, x, columns)
    else:  # JAX may not know that the number of pixels is one
        x = lax.reshape(x, (*x.shape[:-1], groups, conv.inputs // groups))
        z = contract(conv, x, columns, (((rank + 2,), (1,)), ((rank + 1,), (0,))))
        z = lax.reshape(z, (*z.shape[:-1], *window.shape, conv.outputs // groups))
        pairs = [d for i in range(rank) for d in (2 + i, 2 + rank + i)]
        z = lax.transpose(z, (1, *pairs, 0, 2 + 2 * rank))
        z = lax.reshape(z, (*z.shape[:-2], conv.outputs))
    for i in reversed(range(rank)):
        z = _overlap_add(conv, z, window.axes[i], 1 + 2 * i)
    return from_channels_last(conv, z)


def _of_pixels_in_rows(conv: Conv, x: Array, columns: Array) -> Array:
    """The products of all pixels with the columns: `(batch, (pixels, taps) of each axis..., outputs)`."""
    rank, groups, window = conv.rank, conv.groups, conv.window
    z = matmul(conv, pixels_in_rows(conv, x), columns, (2, 1))
    # (groups, pixels, taps, outputs) to (batch, pixels and taps of each axis..., outputs); the batch stays
    # with the first axis on the way, because Apple's plugins may have no more than eight axes.
    n, (first, *others) = x.shape[0], x.shape[1:-1]
    z = lax.reshape(z, (groups, n * first, *others, *window.shape, conv.outputs // groups))
    z = lax.transpose(z, (*(d for i in range(rank) for d in (1 + i, 1 + rank + i)), 0, 1 + 2 * rank))
    return lax.reshape(z, (n, first, *z.shape[1:-2], conv.outputs))


def data(conv: Conv, g: Array, kernel: Array) -> Array:
    """The product of all that the windows read with all taps."""
    rank, groups, window = conv.rank, conv.groups, conv.window
    per_group = conv.inputs // groups
    rows = lax.transpose(kernel, (rank, *range(rank), rank + 1, rank + 2))
    rows = lax.reshape(rows, (groups, window.taps * (conv.outputs // groups), per_group))
    x = matmul(conv, _patches_in_rows(conv, g), rows, (2, 1))
    x = lax.reshape(lax.transpose(x, (1, 0, 2)), (g.shape[0], *window.counts, conv.inputs))
    return from_channels_last(conv, x)


def weights(conv: Conv, g: Array, x: Array) -> Array:
    """The product of all that the windows read with all pixels."""
    rank, groups, window = conv.rank, conv.groups, conv.window
    patches, pixels = _patches_in_rows(conv, g), pixels_in_rows(conv, to_channels_last(conv, x))
    kernel = matmul(conv, patches, pixels, (1, 1))
    kernel = lax.reshape(kernel, (groups, *window.shape, conv.outputs // groups, conv.inputs // groups))
    return lax.transpose(kernel, (*range(1, rank + 1), 0, rank + 1, rank + 2))


def _overlap_add(conv: Conv, z: Array, axis: Axis, dim: int) -> Array:
    """Adds up the taps of all windows of an axis, `(windows, taps)` at `dim`, where they fall."""
    if axis.dilation == 1 or axis.taps == 1:
        return unblock(_blocks_of_taps(conv, z, axis, dim), axis, dim)
    return unblock(_phases_of_taps(conv, z, axis, dim), axis, dim)


def _blocks_of_taps(conv: Conv, z: Array, axis: Axis, dim: int) -> Array:
    """(blocks, phases), where `stride` taps that follow each other are a block."""
    s, count = axis.stride, -(-axis.taps // axis.stride)
    z = resize(z, dim + 1, 0, count * s - axis.taps, 0)
    parts = [cut(z, dim + 1, m * s, (m + 1) * s) for m in range(count)]
    return conv.sum(resize(part, dim, m, count - 1 - m, 0) for m, part in enumerate(parts))


def _phases_of_taps(conv: Conv, z: Array, axis: Axis, dim: int) -> Array:
    """(blocks, phases), where every phase is the sum of the dilated taps that fall on it."""
    falls = [divmod(axis.dilation * k, axis.stride) for k in range(axis.taps)]
    last = max(block for block, _ in falls)
    terms: dict[int, list[Array]] = {}
    for k, (block, phase) in enumerate(falls):
        term = resize(cut(z, dim + 1, k, k + 1), dim, block, last - block, 0)
        terms.setdefault(phase, []).append(term)
    return spread({phase: conv.sum(those) for phase, those in terms.items()}, axis.stride, dim + 1)


def _patches_in_rows(conv: Conv, g: Array) -> Array:
    """All that the windows read, in rows: `(groups, pixels, taps * out / groups)`."""
    rank, groups, window = conv.rank, conv.groups, conv.window
    g = to_channels_last(conv, g)
    for i in reversed(range(rank)):
        g = _patches(g, window.axes[i], 1 + i)
        # (batch, pixels..., this axis, taps of this axis, more taps, channels): taps to the others
        order = list(range(g.ndim))
        order.insert(rank + 1, order.pop(2 + i))
        g = lax.transpose(g, order)
    pixels = math.prod(g.shape[: rank + 1])
    g = lax.reshape(g, (pixels, window.taps, groups, conv.outputs // groups))
    g = lax.transpose(g, (2, 0, 1, 3))
    return lax.reshape(g, (groups, pixels, window.taps * (conv.outputs // groups)))


def _patches(image: Array, axis: Axis, dim: int) -> Array:
    """What the windows of an axis read: `(windows, taps)` in place of the pixels."""
    s, count = axis.stride, -(-axis.taps // axis.stride)
    if axis.dilation == 1 or axis.taps == 1:
        blocks = axis.windows + count - 1
        image = resize(image, dim, axis.low, blocks * s - axis.low - axis.size, 0)
        image = lax.reshape(image, (*image.shape[:dim], blocks, s, *image.shape[dim + 1 :]))
        parts = [cut(image, dim, m, m + axis.windows) for m in range(count)]
        return cut(concatenate(parts, dim + 1), dim + 1, 0, axis.taps)
    image = cover(image, axis, dim, 0)
    taps = [lax.expand_dims(tap_of(image, axis, dim, k), (dim + 1,)) for k in range(axis.taps)]
    return concatenate(taps, dim + 1)
