"""Matrix products of `(groups, rows, columns)`, and images as such matrices."""

from __future__ import annotations

import math
from typing import Any

from jax import lax

from jax_mps.lowering.conv_transpose.description import Conv
from jax_mps.lowering.rule import accumulator

Array = Any


def matmul(conv: Conv, a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """The product of `(groups, ...)` matrices, without the batch axis where there is one group."""
    if conv.groups == 1:
        a, b = (lax.squeeze(m, (0,)) for m in (a, b))
        axes = (axes[0] - 1, axes[1] - 1)
    batch: tuple[Any, Any] = ((), ()) if conv.groups == 1 else ((0,), (0,))
    out = contract(conv, a, b, (((axes[0],), (axes[1],)), batch))
    return lax.expand_dims(out, (0,)) if conv.groups == 1 else out


def contract(conv: Conv, a: Array, b: Array, dimensions: Any) -> Array:
    """`lax.dot_general` with the precision that is wanted."""
    wide = None if conv.platform == "apple" else accumulator(a.dtype)
    return lax.dot_general(a, b, dimensions, precision=conv.precision, preferred_element_type=wide)


def pixels_in_rows(conv: Conv, x: Array) -> Array:
    """`(groups, pixels, in / groups)` of an operand of `forward` with its channels last."""
    x = lax.reshape(x, (math.prod(x.shape[:-1]), conv.groups, conv.inputs // conv.groups))
    return lax.transpose(x, (1, 0, 2))


def to_channels_last(conv: Conv, x: Array) -> Array:
    if conv.channels_last:
        return x
    return lax.transpose(x, (0, *range(2, x.ndim), 1))


def from_channels_last(conv: Conv, x: Array) -> Array:
    """The inverse of `to_channels_last`: with the channel axis where the convolution has it."""
    if conv.channels_last:
        return x
    return lax.transpose(x, (0, x.ndim - 1, *range(1, x.ndim - 1)))
