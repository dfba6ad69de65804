"""The StableHLO of every pooling primitive, from operations that every platform has.

No `reduce_window`, `select_and_scatter`, gather, scatter, reverse or interior padding: they are slow,
wrong or missing somewhere. What is left are slices, edge pads, reshapes, selects and elementwise
arithmetic. The size of a program depends on the window alone, and at most on its logarithm:

* Windows that do not touch each other are rows of a reshaped array.
* Up to `_CHAIN` taps of an axis are strided slices.
* More taps are combined by doubling: the result for 2m neighbouring taps is the combination of two
  results for m taps, one shifted by m.

Axes are taken one after the other, but for some maxima on CUDA (`_at_once_on_cuda`). An argmax survives
that, because the innermost axis is reduced first and every combination prefers its left side; so does the
routing of values to and from the argmax, because the windows that choose their maximum inside a common
part of the image choose the same pixel (`_Routes`).

Apple's plugins get the same, with four differences: arrays with few axes, sums and choices of many taps in
parts that one kernel can read, no quotients of integers, and no scatter and gather in unpooling.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mps.geometry import Axis, Band, Dim, Divisor, Window, surely_below
from jax_mps.lowering.apple import MAX_OPERANDS
from jax_mps.lowering.axes import (
    add_up,
    cover,
    cut,
    disjoint,
    neighbours,
    nth_before,
    repeat,
    resize,
    split_windows,
    tap_of,
    unblock,
    uncover,
)
from jax_mps.lowering.rule import Platform, accumulator

Array = Any
State = tuple[Array, ...]

_CHAIN = 8
"""Taps of an axis up to which strided slices are cheaper than doubling."""

_TAPS = 32
"""Taps of a window up to which each is compared with the chosen one, whatever axis it is on."""

_APPLE_TAPS = 6
"""How many of them by one kernel, beside the arrays that the chosen one is found from."""

_WINDOWS = 9
"""Windows that reach a pixel, up to which each is compared, whatever axis it is on."""


def _primitive(*, by_platform: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives the lowering of a primitive the keyword `platform`, and merges axes for Apple's plugins.

    Their operations are known to work with up to eight axes. One axis before the spatial ones and one
    behind them are enough; for everyone else merging axes would only keep arrays from being partitioned.
    """

    def decorate(fun: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fun)
        def lower(*operands: Array, platform: Platform, start: int, **params: Any) -> Any:
            if by_platform:
                params["platform"] = platform
            if platform != "apple":
                return fun(*operands, start=start, **params)
            rank = len(params["sizes"]) if "sizes" in params else params["window"].rank
            outer, inner = operands[0].shape[:start], operands[0].shape[start + rank :]

            def merged(x: Array) -> Array:
                behind = (math.prod(inner),) if inner else ()
                return lax.reshape(x, (math.prod(outer), *x.shape[start : start + rank], *behind))

            def split(y: Array) -> Array:
                return lax.reshape(y, (*outer, *y.shape[1 : 1 + rank], *inner))

            return jax.tree.map(split, fun(*map(merged, operands), start=1, **params))

        return lower

    return decorate


def _scalar(value: Any, dtype: Any) -> Array:
    return np.array(value, dtype)


def _fold(
    state: State,
    axis: Axis,
    dim: int,
    combine: Callable[[State, State, int], State],
    fill: State,
    *,
    reduce: Callable[[Array, int], Array] | None = None,
    idempotent: bool = False,
    chain: int = _CHAIN,
) -> State:
    """Combines the taps of every window of one axis.

    Args:
      state: arrays that are combined together.
      axis: the windows.
      dim: the axis of the arrays.
      combine: an associative function of the states of two runs of taps, the second of which begins the
        given number of taps after the first.
      fill: the values of the padding.
      reduce: the same over a whole axis, if one operation does it.
      idempotent: whether a tap may be combined twice.
      chain: how many taps may be combined without doubling.
    """
    if reduce is not None and disjoint(axis) and axis.taps > 1:
        return tuple(
            reduce(split_windows(x, axis, dim, f), dim + 1) for x, f in zip(state, fill, strict=True)
        )

    state = tuple(cover(x, axis, dim, f) for x, f in zip(state, fill, strict=True))
    if axis.taps <= chain:
        result = tuple(tap_of(x, axis, dim, 0) for x in state)
        for k in range(1, axis.taps):
            result = combine(result, tuple(tap_of(x, axis, dim, k) for x in state), k)
        return result

    # powers[b] combines 2**b neighbouring taps at every pixel.
    powers, d = [state], axis.dilation
    for bit in range(axis.taps.bit_length() - 1):
        taps = 2**bit
        length = powers[-1][0].shape[dim] - taps * d
        left = tuple(cut(x, dim, 0, length) for x in powers[-1])
        right = tuple(cut(x, dim, taps * d, taps * d + length) for x in powers[-1])
        powers.append(combine(left, right, taps))
    bits = [bit for bit in reversed(range(len(powers))) if axis.taps >> bit & 1]
    firsts = [axis.taps >> (bit + 1) << (bit + 1) for bit in bits]
    if idempotent and len(bits) > 1:  # two overlapping runs of the longest power cover the window
        bits, firsts = [bits[0]] * 2, [0, axis.taps - 2 ** bits[0]]
    span = (axis.windows - 1) * axis.stride + 1
    parts = [
        tuple(cut(x, dim, first * d, first * d + span, axis.stride) for x in powers[bit])
        for bit, first in zip(bits, firsts, strict=True)
    ]
    result = parts[0]
    for first, part in zip(firsts[1:], parts[1:], strict=True):
        result = combine(result, part, first)
    return result


def _fold_window(
    state: State,
    window: Window,
    start: int,
    combine: Callable[[State, State, int], State],
    fill: State,
    **options: Any,
) -> State:
    """Combines the taps of every window over all axes, the innermost first."""
    for i in reversed(range(window.rank)):
        state = _fold(state, window.axes[i], start + i, combine, fill, **options)
    return state


def _add(a: State, b: State, _: int) -> State:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _spread(g: Array, axis: Axis, dim: int) -> Array:
    """The transpose of summing the taps of one axis: every pixel gets the sum over its windows."""
    s, d = axis.stride, axis.dilation
    if s > 1:
        terms = neighbours(axis)
        if len(terms) <= _CHAIN:
            total = None
            for j, taps in terms:
                term = repeat(nth_before(g, axis, dim, j, 0), dim, s)
                if min(taps) < 0:
                    hit = lax.broadcast_in_dim(np.array(taps) >= 0, term.shape, (dim + 1,))
                    term = lax.select(hit, term, lax.full_like(term, 0))
                total = term if total is None else total + term
            return unblock(total, axis, dim)
        # Zeros between the windows turn the stride into 1.
        g = resize(lax.expand_dims(g, (dim + 1,)), dim + 1, 0, s - 1, 0)
        g = lax.reshape(g, (*g.shape[:dim], axis.windows * s, *g.shape[dim + 2 :]))
        g = cut(g, dim, 0, (axis.windows - 1) * s + 1)
    reach = (axis.taps - 1) * d
    length = g.shape[dim] + reach
    mirrored = Axis(g.shape[dim], axis.taps, 1, d, reach, length)
    (total,) = _fold((g,), mirrored, dim, _add, (0,))
    return uncover(total, axis, dim, 0)


# --- max ----------------------------------------------------------------------------------------------


@_primitive(by_platform=True)
def max_pool(x: Array, *, window: Window, start: int, platform: Platform) -> Array:
    lowest = _lowest(x.dtype)
    if platform == "cuda" and _at_once_on_cuda(x, window):
        return functools.reduce(lax.max, _each_tap(x, window, start, lowest))

    def combine(a: State, b: State, _: int) -> State:
        return (lax.max(a[0], b[0]),)

    def reduce(a: Array, dim: int) -> Array:
        return _reduce_max(a, (dim,))

    return _fold_window((x,), window, start, combine, (lowest,), reduce=reduce, idempotent=True)[0]


def _at_once_on_cuda(x: Array, window: Window) -> bool:
    """Whether one pass over all taps beats a pass an axis.

    Measured on an H100, microseconds for one pass and for one an axis: 3 x 3 windows of float32 with stride 1
    73 and 98 (dilated, `aspp`), 40 and 44 (`inception_max`); of bfloat16 75 and 60, 40 and 33; with stride 2
    95 and 91 (`resnet_stem`); 5 x 5 windows 219 and 106.
    """
    return window.taps <= _WINDOWS and x.dtype.itemsize >= 4 and all(a.stride == 1 for a in window.axes)


def _each_tap(x: Array, window: Window, start: int, fill: Any) -> Iterator[Array]:
    """What every window sees through one tap, tap after tap."""
    for i, axis in enumerate(window.axes, start):
        x = cover(x, axis, i, fill)
    for taps in itertools.product(*(range(n) for n in window.shape)):
        starts, limits, strides = [0] * x.ndim, list(x.shape), [1] * x.ndim
        for i, (axis, k) in enumerate(zip(window.axes, taps, strict=True), start):
            starts[i], strides[i] = k * axis.dilation, axis.stride
            limits[i] = starts[i] + (axis.windows - 1) * axis.stride + 1
        yield lax.slice(x, starts, limits, strides)


@_primitive(by_platform=True)
def max_pool_tap_index(x: Array, *, window: Window, start: int, platform: Platform) -> Array:
    return _argmax(x, window, start, platform)[1]


@_primitive(by_platform=True)
def max_pool_with_tap_index(x: Array, *, window: Window, start: int, platform: Platform) -> State:
    return _argmax(x, window, start, platform)


def _argmax(x: Array, window: Window, start: int, platform: Platform) -> State:
    if all(map(disjoint, window.axes)):
        value, tap = _argmax_of_blocks(x, window, start)
    else:  # two arrays a tap
        value, tap = _argmax_by_axis(x, window, start, chain=_CHAIN // 2 if platform == "apple" else _CHAIN)
    # The padding holds the lowest value. Where it ties with the image, everything ties, and tap 0 was
    # chosen; the first tap inside the image is the right one.
    unit, least = window.taps, None
    for dim, axis in enumerate(window.axes, start):
        unit //= axis.taps
        if not surely_below(axis.low, 1):
            first = _first_taps(axis)
            first = resize(first * np.int32(unit), 0, 0, axis.windows - first.shape[0], 0)
            along = lax.broadcast_in_dim(first, tap.shape, (dim,))
            least = along if least is None else least + along
    if least is not None:
        tap = lax.max(tap, least)
    return value, lax.convert_element_type(tap, window.tap_dtype)


def _argmax_by_axis(x: Array, window: Window, start: int, chain: int) -> State:
    state: State = (x, lax.full_like(x, 0, dtype=np.int32))
    unit = 1
    for i in reversed(range(window.rank)):

        def combine(a: State, b: State, distance: int, unit: int = unit) -> State:
            (left, il), (right, ir) = a, b
            value = lax.max(left, right)
            better = lax.ne(value, left)
            if _has_nan(left):  # the first NaN stays
                better = lax.bitwise_and(better, lax.eq(left, left))
            return value, lax.select(better, ir + _full(ir, distance * unit), il)

        fill = (_lowest(x.dtype), 0)
        state = _fold(state, window.axes[i], start + i, combine, fill, idempotent=True, chain=chain)
        unit *= window.axes[i].taps
    return state


def _argmax_of_blocks(x: Array, window: Window, start: int) -> State:
    """The maximum of every block and the smallest number of a tap that equals it."""
    blocks, dims = _all_blocks(x, window, start, _lowest(x.dtype))
    value = _reduce_max(blocks, dims)
    kept = [i for i in range(blocks.ndim) if i not in dims]
    maximum = lax.broadcast_in_dim(value, blocks.shape, kept)
    hit = lax.eq(blocks, maximum)
    if _has_nan(x):  # a maximum that is NaN was brought by a NaN
        hit = lax.bitwise_or(hit, lax.ne(blocks, blocks))
    # Counted from the last tap, the first one has the largest number.
    numbers = lax.broadcast_in_dim(window.taps - _numbers(window), blocks.shape, dims)
    first = _reduce_max(lax.select(hit, numbers, _full(numbers, 0)), dims)
    return value, _full(first, window.taps) - first


def _all_blocks(x: Array, window: Window, start: int, fill: Any) -> tuple[Array, tuple[int, ...]]:
    """Windows that do not touch along any axis: every axis becomes (windows, taps)."""
    for i, axis in reversed(list(enumerate(window.axes, start))):
        x = split_windows(x, axis, i, fill)
    return x, tuple(start + 2 * i + 1 for i in range(window.rank))


def _numbers(window: Window) -> np.ndarray:
    return np.arange(window.taps, dtype=np.int32).reshape(window.shape)


def _first_taps(axis: Axis) -> Array:
    """The first tap inside the image, for as many windows as can begin before it."""
    before = -(-(axis.extent - 1) // axis.stride)
    if isinstance(axis.windows, int):
        before = min(before, axis.windows)
    starts = axis.stride * np.arange(before, dtype=np.int32)
    if isinstance(axis.low, int):
        return np.maximum(-((starts - axis.low) // axis.dilation), 0).astype(np.int32)
    # A symbolic padding has a value only when the program runs.
    return jnp.maximum(-((starts - jnp.asarray(axis.low, np.int32)) // axis.dilation), 0)


def _has_nan(x: Array) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def _lowest(dtype: Any) -> Any:
    if dtype == np.bool_:
        return False
    return np.iinfo(dtype).min if np.dtype(dtype).kind in "iu" else -np.inf


def _reduce_max(x: Array, dims: Sequence[int]) -> Array:
    return lax.reduce(x, _scalar(_lowest(x.dtype), x.dtype), lax.max, dims)


def _full(x: Array, value: float) -> Array:
    return lax.full_like(x, value)


@_primitive(by_platform=True)
def positions(
    tap: Array,
    *,
    window: Window,
    start: int,
    crop: Sequence[tuple[Dim, Dim]],
    sizes: Sequence[Dim],
    platform: Platform,
) -> Array:
    """Tap numbers as flat positions in the plane, of which `crop` was cut off."""
    flat, pixels = lax.full_like(tap, 0, dtype=np.int32), 1
    rest = lax.convert_element_type(tap, np.int32)
    for i in reversed(range(window.rank)):
        axis, (before, _) = window.axes[i], crop[i]
        quotient = _quotient(rest, axis.taps, platform)
        k = rest - quotient * _full(rest, axis.taps)
        number = lax.broadcast_in_dim(_count(axis.windows, platform), rest.shape, (start + i,))
        position = number * axis.stride + (k * axis.dilation + (before - axis.low))
        rest, flat, pixels = quotient, flat + position * pixels, pixels * sizes[i]
    return flat


def _quotient(x: Array, divisor: int, platform: Platform) -> Array:
    if platform != "apple":
        return lax.div(x, _full(x, divisor))
    # Tap numbers are small enough for float32, and the half keeps rounding from reaching the next integer.
    wide = lax.convert_element_type(x, np.float32)
    return lax.convert_element_type((wide + _full(wide, 0.5)) / _full(wide, divisor), np.int32)


def _count(length: Dim, platform: Platform) -> Array:
    """0, 1, 2, ..."""
    if platform != "apple" or not isinstance(length, int):
        return lax.iota(np.int32, length)
    # Apple's plugins do not all have `iota`; two constants of the root of its size do.
    step = math.isqrt(length) + 1
    shape = (-(-length // step), step)
    rows, columns = (np.arange(n, dtype=np.int32) * unit for n, unit in zip(shape, (step, 1), strict=True))
    table = lax.broadcast_in_dim(rows, shape, (0,)) + lax.broadcast_in_dim(columns, shape, (1,))
    return cut(lax.reshape(table, (math.prod(shape),)), 0, 0, length)


@_primitive(by_platform=True)
def max_pool_take(t: Array, tap: Array, *, window: Window, start: int, platform: Platform) -> Array:
    tap = lax.convert_element_type(tap, np.int32)
    if all(map(disjoint, window.axes)):
        blocks, dims = _all_blocks(t, window, start, 0)
        kept = [i for i in range(blocks.ndim) if i not in dims]
        chosen = lax.broadcast_in_dim(tap, blocks.shape, kept)
        hit = lax.eq(chosen, lax.broadcast_in_dim(_numbers(window), blocks.shape, dims))
        values = lax.select(hit, blocks, lax.full_like(blocks, 0))
        return lax.reduce(values, _scalar(0, t.dtype), lax.add, dims)  # one term a block, so exact
    if window.taps > _TAPS:
        return _Routes(tap, window, start).take(t)
    parts, size = [], _APPLE_TAPS if platform == "apple" else _TAPS
    for number, seen in enumerate(_each_tap(t, window, start, 0)):
        if number % size == 0:
            parts.append(lax.full_like(t, 0, shape=tap.shape))
        parts[-1] = lax.select(lax.eq(tap, _full(tap, number)), seen, parts[-1])
    return add_up(parts, 1)


@_primitive(by_platform=True)
def max_pool_put(g: Array, tap: Array, *, window: Window, start: int, platform: Platform) -> Array:
    dtype = g.dtype
    g = lax.convert_element_type(g, accumulator(dtype))
    tap = lax.convert_element_type(tap, np.int32)
    terms = [neighbours(axis) for axis in window.axes]
    if math.prod(map(len, terms)) > _WINDOWS:
        image = _Routes(tap, window, start).put(g)
    else:
        image = _put_by_phases(g, tap, window, start, terms, platform)
    return lax.convert_element_type(image, dtype)


def _put_by_phases(
    g: Array,
    tap: Array,
    window: Window,
    start: int,
    terms: Sequence[Sequence[tuple[int, tuple[int, ...]]]],
    platform: Platform,
) -> Array:
    """Every pixel compares its own tap number with the choice of each window that reaches it.

    Each axis is split into (blocks, phases) at once, so that the image is written a single time.
    """
    shifted: dict[tuple[int, ...], State] = {(): (g, tap)}
    for i, (axis, along) in enumerate(zip(window.axes, terms, strict=True), start):
        shifted = {
            (*key, n): (nth_before(value, axis, i, j, 0), nth_before(chosen, axis, i, j, -1))
            for key, (value, chosen) in shifted.items()
            for n, (j, _) in enumerate(along)
        }
    phases = tuple(start + 2 * i + 1 for i in range(window.rank))
    parts = []
    for key, (value, chosen) in shifted.items():
        number = np.zeros((), np.int32)
        for axis, along, n in zip(window.axes, terms, key, strict=True):
            taps = np.array(along[n][1], np.int32)
            # Pixels that are no tap get a number that no window has chosen.
            none = (number[..., None] < 0) | (taps < 0)
            number = np.where(none, -2, number[..., None] * axis.taps + taps).astype(np.int32)
        shape = list(value.shape)
        for i, axis in reversed(list(enumerate(window.axes, start))):
            shape.insert(i + 1, axis.stride)
        kept = [i for i in range(len(shape)) if i not in phases]
        value, chosen = (lax.broadcast_in_dim(a, shape, kept) for a in (value, chosen))
        hit = lax.eq(chosen, lax.broadcast_in_dim(number, shape, phases))
        parts.append(lax.select(hit, value, lax.full_like(value, 0)))
    arrays = 2 if all(axis.stride == 1 for axis in window.axes) else 3
    image = add_up(parts, MAX_OPERANDS // arrays if platform == "apple" else len(parts))
    for i, axis in enumerate(window.axes, start):
        image = unblock(image, axis, i)
    return image


class _Routes:
    """Paths between every window and its chosen tap, through windows of half the size and half again.

    Begin with all windows of an axis, each at its first pixel. A window of K taps is covered by two of
    m < K taps: one with the same first pixel, one K - m taps later. Windows that overlap and choose the
    same part agree on the tap they choose in it, because a maximum of a set is the maximum of any part
    that contains it (ties and NaN included: the order of pixels is total). So one integer a pixel says
    where the tap is from there, and each step moves all values at once. Negative numbers mark pixels
    where no path passes.
    """

    def __init__(self, tap: Array, window: Window, start: int) -> None:
        self.window, self.start = window, start
        self.steps: list[list[tuple[int, Array]]] = []
        unit = window.taps
        for i, axis in enumerate(window.axes):
            unit //= axis.taps
            dim = start + i
            tap = _at_first_pixel(tap, axis, dim, -1)
            nowhere = _full(tap, -1)
            steps, length = [], axis.taps
            while length > 1:
                half = 2 ** ((length - 1).bit_length() - 1)
                later = length - half
                bound = _full(tap, half * unit)
                turn = lax.gt(tap, _full(tap, half * unit - 1))
                steps.append((later * axis.dilation, turn))
                # The other turn leaves a negative number, except where the two parts overlap.
                move = (
                    tap - bound
                    if later == half
                    else lax.select(turn, tap - _full(tap, later * unit), nowhere)
                )
                length = half
                if unit > 1 or length > 1:
                    stay = lax.select(turn, nowhere, tap)
                    tap = lax.max(stay, _shift(move, dim, later * axis.dilation, -1))
            tap = uncover(tap, axis, dim, -1)
            self.steps.append(steps)

    def put(self, g: Array) -> Array:
        """Adds the value of every window at its tap."""
        for dim, (axis, steps) in enumerate(zip(self.window.axes, self.steps, strict=True), self.start):
            g = _at_first_pixel(g, axis, dim, 0)
            zero = lax.full_like(g, 0)
            for distance, turn in steps:
                g = lax.select(turn, zero, g) + _shift(lax.select(turn, g, zero), dim, distance, 0)
            g = uncover(g, axis, dim, 0)
        return g

    def take(self, t: Array) -> Array:
        """The value of every window's tap: `put` backwards."""
        for i in reversed(range(self.window.rank)):
            axis, dim = self.window.axes[i], self.start + i
            t = cover(t, axis, dim, 0)
            for distance, turn in reversed(self.steps[i]):
                later = resize(cut(t, dim, distance, t.shape[dim]), dim, 0, distance, 0)
                t = lax.select(turn, later, t)
            t = cut(t, dim, 0, (axis.windows - 1) * axis.stride + 1, axis.stride)
        return t


def _at_first_pixel(x: Array, axis: Axis, dim: int, fill: Any) -> Array:
    """Moves the value of every window to the window's first pixel, in an array of all pixels reached."""
    if axis.stride > 1:
        x = resize(lax.expand_dims(x, (dim + 1,)), dim + 1, 0, axis.stride - 1, fill)
        x = lax.reshape(x, (*x.shape[:dim], axis.windows * axis.stride, *x.shape[dim + 2 :]))
    return resize(x, dim, 0, (axis.windows - 1) * axis.stride + axis.extent - x.shape[dim], fill)


def _shift(x: Array, dim: int, distance: int, fill: Any) -> Array:
    """Moves all elements up an axis by `distance`; those at its end are known to be `fill`."""
    return resize(cut(x, dim, 0, x.shape[dim] - distance), dim, distance, 0, fill)


# --- average ------------------------------------------------------------------------------------------


@_primitive()
def avg_pool(x: Array, *, window: Window, start: int, divisor: Divisor) -> Array:
    total = _sum(lax.convert_element_type(x, accumulator(x.dtype)), window, start)
    return lax.convert_element_type(_divide(total, window, start, divisor), x.dtype)


@_primitive()
def avg_pool_gradient(g: Array, *, window: Window, start: int, divisor: Divisor) -> Array:
    total = _divide(lax.convert_element_type(g, accumulator(g.dtype)), window, start, divisor)
    return lax.convert_element_type(_spread_window(total, window, start), g.dtype)


def _sum(x: Array, window: Window, start: int) -> Array:
    return _fold_window((x,), window, start, _add, (0,), reduce=_reduce_sum)[0]


def _reduce_sum(x: Array, dim: int) -> Array:
    return lax.reduce(x, _scalar(0, x.dtype), lax.add, (dim,))


def _spread_window(g: Array, window: Window, start: int) -> Array:
    for i, axis in enumerate(window.axes):
        g = _spread(g, axis, start + i)
    return g


def _divide(x: Array, window: Window, start: int, divisor: Divisor) -> Array:
    if divisor.number:
        return x / _full(x, divisor.number)
    number: Array = None
    for i, count in enumerate(_counts(window, divisor.band, x.dtype)):
        along = lax.broadcast_in_dim(count, x.shape, (start + i,) if count.ndim else ())
        number = along if number is None else number * along
    # A window that reaches neither image nor band has the sum 0, and so has its average.
    return x / lax.max(number, _full(x, 1))


def _counts(window: Window, band: Band, dtype: Any) -> list[Array]:
    """For each axis, how many taps of every window are counted: a vector, or a number if all agree."""
    counts = []
    for axis, (lo, hi) in zip(window.axes, band, strict=True):
        grown = axis.cropped(-lo, -hi)
        if grown.overlaps_padding():
            ones = lax.full((grown.size,), 1, dtype)
            # All of it is constant, so that nothing but the number of arrays matters.
            counts.append(_fold((ones,), grown, 0, _add, (0,), reduce=_reduce_sum, chain=2)[0])
        else:
            counts.append(np.array(axis.taps, dtype))
    return counts


# --- L2 -----------------------------------------------------------------------------------------------
#
# Squares and quotients of numbers near the ends of a type's range leave it, and compilers flush
# subnormal numbers to 0. Powers of two, which round nothing, keep intermediate results inside.

_CLASSES = {
    # accumulator: (exponent below which a number is small, its scale's), (above which large, its scale's)
    np.dtype(np.float32): ((-40, 80), (56, -72)),
    np.dtype(np.float64): ((-400, 620), (460, -600)),
}

_NORM_SCALE = {np.dtype(np.float32): 32, np.dtype(np.float64): 256}
"""Exponent of the scale of norms: below its inverse they are scaled up, else down."""


@_primitive(by_platform=True)
def l2_pool(x: Array, *, window: Window, start: int, out_dtype: Any, platform: Platform) -> Array:
    if x.dtype == np.float16:  # a square stays in the range of float32
        x = lax.convert_element_type(x, np.float32)
        return lax.convert_element_type(lax.sqrt(_sum(x * x, window, start)), out_dtype)
    parts, scales = _classes(lax.convert_element_type(x, accumulator(x.dtype)))
    sums = _sums([a * a for a in parts], window, start, platform)
    ordinary, small, large = (lax.sqrt(a) * _power(a, -scale) for a, scale in zip(sums, scales, strict=True))
    return lax.convert_element_type(_hypotenuse(_hypotenuse(small, ordinary), large), out_dtype)


def _sums(parts: Sequence[Array], window: Window, start: int, platform: Platform) -> State:
    """The sums of the taps of several images."""
    if platform != "apple":
        return _fold_window(tuple(parts), window, start, _add, (0,) * len(parts), reduce=_reduce_sum)
    # As one image: their sums go into one kernel later, which could not read the taps of them all.
    sums = _sum(lax.concatenate(parts, 0), window, start)
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


def _power(like: Array, exponent: int) -> Array:
    return lax.full_like(like, 2.0**exponent)


def _hypotenuse(a: Array, b: Array) -> Array:
    """The norm of two norms; exact where one of them is 0."""
    long, short = lax.max(a, b), lax.min(a, b)
    # Equal sides include two zeros and two infinities, whose quotient is no number.
    ratio = lax.select(lax.eq(long, short), lax.full_like(long, 1), short / long)
    return long * lax.sqrt(ratio * ratio + lax.full_like(ratio, 1))


@_primitive(by_platform=True)
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


@_primitive()
def l2_pool_gradient(g: Array, x: Array, y: Array, *, window: Window, start: int) -> Array:
    g, image = (lax.convert_element_type(a, y.dtype) for a in (g, x))
    zero, scale = lax.full_like(y, 0), _NORM_SCALE[np.dtype(y.dtype)]

    def term(served: Array, scale: int) -> Array:
        """What the windows that are served contribute, their norms scaled by a power of two."""
        norm = lax.select(served, y * _power(y, scale), lax.full_like(y, 1))
        quotient = lax.select(served, g / norm, zero)
        return image * _spread_window(quotient, window, start) * _power(image, scale)

    if x.dtype == np.float16:
        dx = term(lax.ne(y, zero), 0)
    else:
        tiny = lax.gt(_power(y, -scale), y)
        dx = term(lax.bitwise_not(tiny), -scale) + term(lax.bitwise_and(tiny, lax.ne(y, zero)), scale)
    return lax.convert_element_type(dx, x.dtype)


# --- unpooling ----------------------------------------------------------------------------------------
#
# Positions are data here, so these two alone use scatter and gather. Where several values name the same
# position the last one stays; a scatter of ordinal numbers under max finds it on any platform. Apple's
# plugins, which have no scatter and gather to rely on, compare every entry with every pixel.

_COMPARISONS = 2**27
"""Comparisons up to which that is done: each takes four bytes for a moment."""


@_primitive(by_platform=True)
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
        entry = _Entries(indices, sizes, source, start)
        flat = entry.choose(_flatten(y, start, len(sizes)), along=start)
        return lax.reshape(flat, (*y.shape[:start], *sizes, *y.shape[start + len(sizes) :]))

    def plane(y: Array, indices: Array) -> Array:
        last = _last_at(indices, sizes)
        return jnp.where(last >= 0, y[jnp.maximum(last, 0)], jnp.zeros((), y.dtype))

    rank = len(sizes)
    flat = _over_planes(plane, y.ndim, start, rank)(*(_flatten(a, start, rank) for a in (y, indices)))
    return lax.reshape(flat, (*y.shape[:start], *sizes, *y.shape[start + rank :]))


@_primitive(by_platform=True)
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
        entry = _Entries(indices, sizes, source, start)
        flat = entry.choose(_flatten(c, start, len(sizes)), along=start + 1)
        return lax.reshape(flat, indices.shape)

    def plane(c: Array, indices: Array) -> Array:
        order = jnp.arange(indices.shape[0], dtype=np.int32)
        inside = jnp.logical_and(indices >= 0, indices < c.shape[0])
        at = jnp.where(inside, indices, 0)
        won = jnp.logical_and(inside, _last_at(indices, sizes)[at] == order)
        return jnp.where(won, c[at], jnp.zeros((), c.dtype))

    rank = len(sizes)
    flat = _over_planes(plane, c.ndim, start, rank)(*(_flatten(a, start, rank) for a in (c, indices)))
    return lax.reshape(flat, indices.shape)


def _last_at(indices: Array, sizes: tuple[Dim, ...]) -> Array:
    """For every position of a plane, the last entry of `indices` that names it, or -1."""
    size = math.prod(sizes)
    order = jnp.arange(indices.shape[0], dtype=np.int32)
    # `at` would count negative positions from the end.
    positions = jnp.where(indices < 0, size, indices)
    return jnp.full((size,), -1, np.int32).at[positions].max(order, mode="drop")


class _Entries:
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
        number = self._spread(_count(indices.shape[start], "apple"), (start,))
        hit = lax.eq(
            self._spread(indices, self._without(start + 1)),
            self._spread(_count(pixels, "apple"), (start + 1,)),
        )
        last = _reduce_max(lax.select(hit, number, _full(number, -1)), (start,))
        # An entry that is the last to name a pixel names it.
        self.won = lax.eq(number, self._spread(last, self._without(start)))

    def choose(self, values: Array, *, along: int) -> Array:
        """Along one axis of the table, the value where an entry has won, or 0.

        A maximum of one number is that number, whatever its type, and NaN.
        """
        table = self._spread(values, self._without(2 * self.at + 1 - along))
        lowest = lax.full_like(table, _lowest(values.dtype))
        value = _reduce_max(lax.select(self.won, table, lowest), (along,))
        chosen = _reduce_max(lax.convert_element_type(self.won, np.int32), (along,))
        return lax.select(lax.gt(chosen, _full(chosen, 0)), value, lax.full_like(value, 0))

    def _without(self, axis: int) -> list[int]:
        return [i for i in range(len(self.shape)) if i != axis]

    def _spread(self, x: Array, dims: Sequence[int]) -> Array:
        return lax.broadcast_in_dim(x, self.shape, dims)


def _flatten(x: Array, start: int, rank: int) -> Array:
    spatial = math.prod(x.shape[start : start + rank])
    return lax.reshape(x, (*x.shape[:start], spatial, *x.shape[start + rank :]))


def _over_planes(plane: Callable[..., Array], ndim: int, start: int, rank: int) -> Callable[..., Array]:
    for _ in range(ndim - start - rank):
        plane = jax.vmap(plane, in_axes=-1, out_axes=-1)
    for _ in range(start):
        plane = jax.vmap(plane)
    return plane
