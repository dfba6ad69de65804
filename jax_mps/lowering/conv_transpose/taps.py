"""The form `taps`: a matrix product for each tap, or block of taps, of the gradient to the kernel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from jax import lax

from jax_mps.lowering.axes import concatenate, cover, cut, tap_of
from jax_mps.lowering.conv_transpose.description import Conv
from jax_mps.lowering.conv_transpose.products import contract, matmul, pixels_in_rows, to_channels_last

Array = Any


def weights(conv: Conv, g: Array, x: Array) -> Array:
    """Blocks of `stride` neighbouring taps at a time where they are full, else single taps."""
    g, x = to_channels_last(conv, g), to_channels_last(conv, x)
    axes = conv.window.axes
    for dim, axis in enumerate(axes, 1):
        g = cover(g, axis, dim, 0)
    if not conv.window.is_static():
        return _by_contraction(conv, g, x)
    rows = pixels_in_rows(conv, x)
    steps = [a.stride if a.dilation == 1 and a.taps % a.stride == 0 else 1 for a in axes]
    firsts = itertools.product(*(range(0, a.taps, step) for a, step in zip(axes, steps, strict=True)))
    blocks = [lax.expand_dims(_block(conv, g, rows, first, steps), (0,)) for first in firsts]
    return _from_blocks(conv, concatenate(blocks, 0), steps)


def _by_contraction(conv: Conv, g: Array, x: Array) -> Array:
    """Symbolic sizes stay axes: of their product JAX may not know that it is a size."""
    shape = (*conv.window.shape, conv.groups, conv.outputs // conv.groups, conv.inputs // conv.groups)
    pixels, group = tuple(range(conv.rank + 1)), (conv.rank + 1,)
    x = lax.reshape(x, (*x.shape[:-1], conv.groups, shape[-1]))
    products = []
    for taps in itertools.product(*map(range, conv.window.shape)):
        seen = g
        for dim, (axis, k) in enumerate(zip(conv.window.axes, taps, strict=True), 1):
            seen = tap_of(seen, axis, dim, k)
        seen = lax.reshape(seen, (*seen.shape[:-1], conv.groups, shape[-2]))
        products.append(contract(conv, seen, x, ((pixels, pixels), (group, group))))
    return lax.reshape(concatenate(products, 0), shape)


def _block(conv: Conv, g: Array, rows: Array, first: Sequence[int], steps: Sequence[int]) -> Array:
    """`(groups, steps..., out / groups, in / groups)`: the taps from `first` on, so many along each axis."""
    per_group = (conv.outputs // conv.groups, conv.inputs // conv.groups)
    part = _block_in_rows(conv, g, first, steps)
    return lax.reshape(matmul(conv, part, rows, (1, 1)), (conv.groups, *steps, *per_group))


def _block_in_rows(conv: Conv, g: Array, first: Sequence[int], steps: Sequence[int]) -> Array:
    """What the windows read there: `(groups, pixels, taps * out / groups)`."""
    rank, groups, outputs = conv.rank, conv.groups, conv.outputs // conv.groups
    for i in reversed(range(rank)):  # every axis becomes (windows, taps)
        axis, k, step = conv.window.axes[i], first[i], steps[i]
        if step == 1:
            g = lax.expand_dims(tap_of(g, axis, 1 + i, k), (2 + i,))
        else:
            g = cut(g, 1 + i, k, k + axis.windows * step)
            g = lax.reshape(g, (*g.shape[: 1 + i], axis.windows, step, *g.shape[2 + i :]))
    pixels, taps = math.prod(g.shape[1 : 2 * rank : 2], start=g.shape[0]), math.prod(steps)
    g = lax.transpose(g, (0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1))
    g = lax.reshape(g, (pixels, taps, groups, outputs))
    return lax.reshape(lax.transpose(g, (2, 0, 1, 3)), (groups, pixels, taps * outputs))


def _from_blocks(conv: Conv, kernel: Array, steps: Sequence[int]) -> Array:
    """From `(blocks, groups, steps..., out / groups, in / groups)` to the layout of all forms."""
    rank, groups = conv.rank, conv.groups
    per_group = (conv.outputs // groups, conv.inputs // groups)
    counts = [a.taps // step for a, step in zip(conv.window.axes, steps, strict=True)]
    kernel = lax.reshape(kernel, (*counts, groups, *steps, math.prod(per_group)))
    pairs = [d for i in range(rank) for d in (i, rank + 1 + i)]
    kernel = lax.transpose(kernel, (*pairs, rank, 2 * rank + 1))
    return lax.reshape(kernel, (*conv.window.shape, groups, *per_group))
