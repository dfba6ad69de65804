"""Paths between every window and its chosen tap, whose number grows with the logarithm of the window."""

from __future__ import annotations

from typing import Any

from jax import lax

from jax_mps.geometry import Axis, Window
from jax_mps.lowering.axes import cover, cut, resize, uncover
from jax_mps.lowering.pooling.values import full

Array = Any
Step = tuple[int, Array]
"""By how many pixels values move, and which of them do."""


class Routes:
    """Paths between every window and its chosen tap, through windows of half the size and half again.

    Begin with all windows of an axis, each at its first pixel. A window of K taps is covered by two parts of
    m < K taps: one with the same first pixel, one K - m taps later. The chosen tap lies in one of the parts,
    and the step moves the window's value to the first pixel of that part. When parts have one tap, every
    value is at its tap.

    Different windows can share a part. If both have chosen a tap inside it, that is the same tap, because
    the maximum of a set is the maximum of any part that contains it (ties and NaN included: the order of
    pixels is total). So one integer a pixel is enough, the distance in taps that is left, and each step moves
    all values at once. Negative integers mark pixels where no path passes.

    For instance, the pixels `1 2 5 4 3` and windows of three taps. All three windows have their maximum at
    the third pixel:

        left at each pixel         2  1  0  -  -     window 0 has two taps to go, window 1 one, window 2 none
        step 1, parts of 2 taps    -  1  0  -  -     window 0 moves on by one pixel, to where window 1 is
        step 2, parts of 1 tap     -  -  0  -  -     both move on by one pixel, to where window 2 is

    Values 10, 20 and 30 of the windows go along:

        `put`                       10 20 30  0  0
        after step 1                 0 30 30  0  0
        after step 2                 0  0 60  0  0

    `take` runs the same steps backwards, and copies instead of adding.
    """

    def __init__(self, tap_index: Array, window: Window, start: int) -> None:
        self.window, self.start = window, start
        self.steps: list[list[Step]] = []
        left, unit = tap_index, window.taps
        for dim, axis in enumerate(window.axes, start):
            unit //= axis.taps
            left = _at_first_pixel(left, axis, dim, -1)
            left, steps = _steps(left, axis, dim, unit)
            left = uncover(left, axis, dim, -1)
            self.steps.append(steps)

    def put(self, g: Array) -> Array:
        """Adds the value of every window at its tap."""
        for dim, (axis, steps) in enumerate(zip(self.window.axes, self.steps, strict=True), self.start):
            g = _at_first_pixel(g, axis, dim, 0)
            zero = lax.full_like(g, 0)
            for distance, moves in steps:
                g = lax.select(moves, zero, g) + _shift(lax.select(moves, g, zero), dim, distance, 0)
            g = uncover(g, axis, dim, 0)
        return g

    def take(self, t: Array) -> Array:
        """The value of every window's tap: `put` backwards."""
        for i in reversed(range(self.window.rank)):
            axis, dim = self.window.axes[i], self.start + i
            t = cover(t, axis, dim, 0)
            for distance, moves in reversed(self.steps[i]):
                later = resize(cut(t, dim, distance, t.shape[dim]), dim, 0, distance, 0)
                t = lax.select(moves, later, t)
            t = cut(t, dim, 0, (axis.windows - 1) * axis.stride + 1, axis.stride)
        return t


def _steps(left: Array, axis: Axis, dim: int, unit: int) -> tuple[Array, list[Step]]:
    """What is left to go along the other axes, and the steps along this one.

    A tap of this axis counts `unit` in `left`; what is below `unit` belongs to the axes that follow.
    """
    nowhere = full(left, -1)
    steps: list[Step] = []
    length = axis.taps
    while length > 1:
        half = 2 ** ((length - 1).bit_length() - 1)
        later = length - half
        bound = full(left, half * unit)
        moves = lax.gt(left, full(left, half * unit - 1))
        steps.append((later * axis.dilation, moves))
        # The subtraction makes negative what does not move, except where the two parts overlap.
        moved = left - bound if later == half else lax.select(moves, left - full(left, later * unit), nowhere)
        length = half
        if unit > 1 or length > 1:
            stay = lax.select(moves, nowhere, left)
            left = lax.max(stay, _shift(moved, dim, later * axis.dilation, -1))
    return left, steps


def _at_first_pixel(x: Array, axis: Axis, dim: int, fill: Any) -> Array:
    """Moves the value of every window to the window's first pixel, in an array of all pixels reached."""
    if axis.stride > 1:
        x = resize(lax.expand_dims(x, (dim + 1,)), dim + 1, 0, axis.stride - 1, fill)
        x = lax.reshape(x, (*x.shape[:dim], axis.windows * axis.stride, *x.shape[dim + 2 :]))
    return resize(x, dim, 0, (axis.windows - 1) * axis.stride + axis.extent - x.shape[dim], fill)


def _shift(x: Array, dim: int, distance: int, fill: Any) -> Array:
    """Moves all elements up an axis by `distance`; those at its end are known to be `fill`."""
    return resize(cut(x, dim, 0, x.shape[dim] - distance), dim, distance, 0, fill)
