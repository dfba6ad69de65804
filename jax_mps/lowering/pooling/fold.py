"""The taps of every window combined, one axis after the other or all in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax_mps.geometry import Axis, Window
from jax_mps.lowering.axes import cover, cut, disjoint, split_windows, tap_of
from jax_mps.lowering.pooling.taps import each_tap

Array = Any
State = tuple[Array, ...]
Combine = Callable[[State, State, int], State]

CHAIN = 8
"""Taps of an axis up to which strided slices are cheaper than doubling."""

AT_ONCE = 9
"""Taps of a window up to which one pass over all of them can beat a pass an axis, on CUDA."""


def fold(
    state: State,
    axis: Axis,
    dim: int,
    combine: Combine,
    fill: State,
    *,
    reduce: Callable[[Array, Sequence[int]], Array] | None = None,
    idempotent: bool = False,
    chain: int = CHAIN,
) -> State:
    """Combines the taps of every window of one axis.

    Args:
      state: arrays that are combined together.
      axis: the windows.
      dim: the axis of the arrays.
      combine: an associative function of the states of two runs of taps, the second of which begins the
        given number of taps after the first.
      fill: the values of the padding.
      reduce: the same over whole axes, if one operation does it.
      idempotent: whether a tap may be combined twice.
      chain: how many taps may be combined without doubling.
    """
    if reduce is not None and disjoint(axis) and axis.taps > 1:
        return tuple(
            reduce(split_windows(x, axis, dim, f), (dim + 1,)) for x, f in zip(state, fill, strict=True)
        )
    state = tuple(cover(x, axis, dim, f) for x, f in zip(state, fill, strict=True))
    if axis.taps <= chain:
        return _tap_by_tap(state, axis, dim, combine)
    return _by_doubling(state, axis, dim, combine, idempotent=idempotent)


def fold_window(
    state: State, window: Window, start: int, combine: Combine, fill: State, **options: Any
) -> State:
    """Combines the taps of every window over all axes, the innermost first."""
    for i in reversed(range(window.rank)):
        state = fold(state, window.axes[i], start + i, combine, fill, **options)
    return state


def in_one_pass(state: State, window: Window, start: int, combine: Combine, fill: State) -> State:
    """The same for functions of which the whole window is one run of taps."""
    taps = zip(*(each_tap(x, window, start, f) for x, f in zip(state, fill, strict=True)), strict=True)
    result: State = next(taps)
    for k, tap in enumerate(taps, 1):
        result = combine(result, tap, k)
    return result


def _tap_by_tap(state: State, axis: Axis, dim: int, combine: Combine) -> State:
    result = tuple(tap_of(x, axis, dim, 0) for x in state)
    for k in range(1, axis.taps):
        result = combine(result, tuple(tap_of(x, axis, dim, k) for x in state), k)
    return result


def _by_doubling(state: State, axis: Axis, dim: int, combine: Combine, *, idempotent: bool) -> State:
    """Runs of 1, 2, 4, ... taps at every pixel, of which some together are the window."""
    powers, d = _powers(state, axis, dim, combine), axis.dilation
    span = (axis.windows - 1) * axis.stride + 1
    runs = _runs(axis.taps, idempotent=idempotent)
    parts = [
        tuple(cut(x, dim, first * d, first * d + span, axis.stride) for x in powers[bit])
        for bit, first in runs
    ]
    result = parts[0]
    for (_, first), part in zip(runs[1:], parts[1:], strict=True):
        result = combine(result, part, first)
    return result


def _powers(state: State, axis: Axis, dim: int, combine: Combine) -> list[State]:
    """Entry b combines, at every pixel, the 2**b neighbouring taps that begin there."""
    powers, d = [state], axis.dilation
    for bit in range(axis.taps.bit_length() - 1):
        taps = 2**bit
        length = powers[-1][0].shape[dim] - taps * d
        left = tuple(cut(x, dim, 0, length) for x in powers[-1])
        right = tuple(cut(x, dim, taps * d, taps * d + length) for x in powers[-1])
        powers.append(combine(left, right, taps))
    return powers


def _runs(taps: int, *, idempotent: bool) -> list[tuple[int, int]]:
    """The runs of taps that make up a window: pairs of a power of two and of the first tap.

    A window of 13 taps is made of 8, 4 and 1 taps, which begin at the taps 0, 8 and 12; or, if a tap may be
    combined twice, of 8 and 8 taps, which begin at 0 and 5.
    """
    bits = [bit for bit in reversed(range(taps.bit_length())) if taps >> bit & 1]
    if idempotent and len(bits) > 1:
        return [(bits[0], 0), (bits[0], taps - 2 ** bits[0])]
    return [(bit, taps >> (bit + 1) << (bit + 1)) for bit in bits]
