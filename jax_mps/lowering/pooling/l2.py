"""L2 pooling, its tangent and its gradient.

Squares and quotients of numbers near the ends of a type's range leave it, and compilers flush subnormal
numbers to 0. Powers of two, which round nothing, keep intermediate results inside.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from jax_mps.geometry import Window
from jax_mps.lowering.axes import cut
from jax_mps.lowering.pooling.few_axes import few_axes_on_apple
from jax_mps.lowering.pooling.fold import State
from jax_mps.lowering.pooling.sums import sum_of_taps, sum_of_windows, sums_of_taps
from jax_mps.lowering.rule import Platform, accumulator

Array = Any

_CLASSES = {
    # accumulator: (exponent below which a number is small, its scale's), (above which large, its scale's)
    np.dtype(np.float32): ((-40, 80), (56, -72)),
    np.dtype(np.float64): ((-400, 620), (460, -600)),
}


@few_axes_on_apple
def l2_pool(x: Array, *, window: Window, start: int, out_dtype: Any, platform: Platform) -> Array:
    if x.dtype == np.float16:  # a square stays in the range of float32
        x = lax.convert_element_type(x, np.float32)
        return lax.convert_element_type(lax.sqrt(sum_of_taps(x * x, window, start)), out_dtype)
    parts, scales = _classes(lax.convert_element_type(x, accumulator(x.dtype)))
    sums = _sums([a * a for a in parts], window, start, platform)
    ordinary, small, large = (lax.sqrt(a) * _power(a, -scale) for a, scale in zip(sums, scales, strict=True))
    return lax.convert_element_type(_hypotenuse(_hypotenuse(small, ordinary), large), out_dtype)


def _sums(parts: Sequence[Array], window: Window, start: int, platform: Platform) -> State:
    """The sums of the taps of several images."""
    if platform != "apple":
        return sums_of_taps(tuple(parts), window, start)
    # As one image: their sums go into one kernel later, which could not read the taps of them all.
    sums = sum_of_taps(lax.concatenate(parts, 0), window, start)
    size = parts[0].shape[0]
    return tuple(cut(sums, 0, i * size, (i + 1) * size) for i in range(len(parts)))


def _classes(x: Array) -> tuple[State, tuple[int, ...]]:
    """Ordinary, small and large numbers apart, each scaled to a range whose squares stay in the type."""
    (low, up), (high, down) = _CLASSES[np.dtype(x.dtype)]
    size, zero = lax.max(x, -x), lax.full_like(x, 0)
    small, large = lax.gt(_power(x, low), size), lax.gt(size, _power(x, high))
    parts = (
        lax.select(lax.bitwise_or(small, large), zero, x),
        lax.select(small, x * _power(x, up), zero),
        lax.select(large, x * _power(x, down), zero),
    )
    return parts, (0, up, down)


def _exponent_of_quotients(dtype: Any) -> int:
    """Of their scale: as large as leaves the digits of sums that cancel in the range of normal numbers."""
    info = np.finfo(dtype)
    return int(info.maxexp - info.nmant) - 7


def _above_1(a: Array) -> Array:
    return lax.gt(lax.max(a, -a), lax.full_like(a, 1))


def _power(like: Array, exponent: int) -> Array:
    return lax.full_like(like, 2.0**exponent)


def _hypotenuse(a: Array, b: Array) -> Array:
    """The norm of two norms; exact where one of them is 0."""
    long, short = lax.max(a, b), lax.min(a, b)
    # Equal sides include two zeros and two infinities, whose quotient is no number.
    ratio = lax.select(lax.eq(long, short), lax.full_like(long, 1), short / long)
    return long * lax.sqrt(ratio * ratio + lax.full_like(ratio, 1))


@few_axes_on_apple
def l2_pool_tangent(
    t: Array, x: Array, y: Array, *, window: Window, start: int, out_dtype: Any, platform: Platform
) -> Array:
    t, image = (lax.convert_element_type(a, y.dtype) for a in (t, x))
    nowhere = lax.eq(y, lax.full_like(y, 0))
    norm = lax.select(nowhere, lax.full_like(y, 1), y)
    parts, scales = ((image,), (0,)) if x.dtype == np.float16 else _classes(image)
    sums = _sums([a * t for a in parts], window, start, platform)
    terms = (a / norm * _power(a, -scale) for a, scale in zip(sums, scales, strict=True))
    out = lax.select(nowhere, lax.full_like(y, 0), functools.reduce(lax.add, terms))
    return lax.convert_element_type(out, out_dtype)


@few_axes_on_apple
def l2_pool_gradient(
    g: Array, x: Array, y: Array, *, window: Window, start: int, platform: Platform
) -> Array:
    g, image = (lax.convert_element_type(a, y.dtype) for a in (g, x))
    one, zero = lax.full_like(y, 1), lax.full_like(y, 0)

    def total(g: Array, norm: Array, served: Array) -> Array:
        """The sum of the quotients of the windows that are served."""
        norm = lax.select(served, norm, one)
        return sum_of_windows(lax.select(served, g / norm, zero), window, start, platform)

    somewhere = lax.ne(y, zero)
    if x.dtype == np.float16 or platform == "apple":  # Metal lets few arrays feed one kernel
        dx = image * total(g, y, somewhere)
    else:
        # Quotients above 1 are brought down, the others up, by the operand that has room. What is left of
        # sums that cancel must not be subnormal.
        size, exponent = lax.max(g, -g), _exponent_of_quotients(y.dtype)
        up, down = _power(y, exponent), _power(y, -exponent)
        above = lax.gt(size, y)
        below = lax.bitwise_not(above)
        first = lax.gt(lax.select(above, size, y), one)  # whether there is room in the larger one
        high = total(
            lax.select(first, g * down, g), lax.select(first, y, y * up), lax.bitwise_and(somewhere, above)
        )
        low = total(
            lax.select(first, g, g * up), lax.select(first, y * down, y), lax.bitwise_and(somewhere, below)
        )
        # The factor goes where it brings a number closer to 1.
        up, down = _power(image, exponent), _power(image, -exponent)
        dx = lax.select(_above_1(high), image * up * high, image * (high * up))
        dx += lax.select(_above_1(low), image * (low * down), image * low * down)
    if platform != "apple":  # there masks would be too many arrays for one kernel
        dx = _clear_unread(dx, window, start)
    return lax.convert_element_type(dx, x.dtype)


def _clear_unread(dx: Array, window: Window, start: int) -> Array:
    """0 at pixels that no window reads, whatever they are: infinity times an empty sum is no number.

    Of symbolic sizes it is not known which these are.
    """
    for dim, axis in enumerate(window.axes, start):
        if axis.is_static() and not (read := axis.pixels_read("exclude")).all():
            wanted = lax.broadcast_in_dim(read.astype(dx.dtype), dx.shape, (dim,))
            dx = lax.select(lax.gt(wanted, lax.full_like(dx, 0)), dx, lax.full_like(dx, 0))
    return dx
