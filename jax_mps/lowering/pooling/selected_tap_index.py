"""Which tap of every window stock JAX selects, where it differentiates a windowed maximum.

A tap stays selected while it is `>=` the next one. So the first of equal maxima is selected, and after a
NaN the search begins anew. With padding, that takes part as -inf; where it is selected, the index is -1,
which is that of no tap. Without, the search begins at -inf before the window, and padding is left out.

The search over a run of taps needs to know of the taps before it only whether one of its own is NaN, for
then nothing before matters. So runs are combined as those of other reductions are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jax import lax

from jax_mps.geometry import Window
from jax_mps.lowering.pooling.few_axes import few_axes_on_apple
from jax_mps.lowering.pooling.fold import AT_ONCE, CHAIN, Combine, State, fold, in_one_pass
from jax_mps.lowering.pooling.values import full
from jax_mps.lowering.rule import Platform

Array = Any


@few_axes_on_apple
def max_pool_selected_tap_index(
    x: Array, *, window: Window, start: int, with_padding: bool, platform: Platform
) -> Array:
    # Of a run of taps: the selected value, its index or -1 for padding, and whether a NaN is among them.
    broken = lax.convert_element_type(lax.ne(x, x), np.int32)
    state: State = (x, lax.full_like(x, 0, dtype=np.int32), broken)
    fill = (-np.inf, -1, 0)
    if platform == "cuda" and window.taps <= AT_ONCE:
        state = in_one_pass(state, window, start, _search_on(1, with_padding), fill)
    else:
        chain = CHAIN // 2 if platform == "apple" else CHAIN  # three arrays a tap
        unit = 1  # what the index grows by from one tap of the axis to the next
        for i in reversed(range(window.rank)):
            axis, combine = window.axes[i], _search_on(unit, with_padding)
            state = fold(state, axis, start + i, combine, fill, idempotent=True, chain=chain)
            unit *= axis.taps
    value, index, broken = state
    if not with_padding:  # -inf before the window stays selected while the taps are no greater
        nothing = lax.bitwise_and(lax.eq(value, full(value, -np.inf)), lax.eq(broken, full(broken, 0)))
        index = lax.select(nothing, full(index, -1), index)
    return lax.convert_element_type(index, window.tap_dtype)


def _search_on(unit: int, with_padding: bool) -> Combine:
    """The search that has selected `a`, over the taps that alone select `b`."""

    def combine(a: State, b: State, distance: int) -> State:
        (left, left_index, left_broken), (right, right_index, right_broken) = a, b
        # Greater or equal, which Apple's plugins do not have.
        stays = lax.bitwise_or(lax.gt(left, right), lax.eq(left, right))
        stays = lax.bitwise_and(stays, lax.eq(right_broken, full(right_broken, 0)))
        outside = lax.gt(full(right_index, 0), right_index)
        if not with_padding:
            stays = lax.bitwise_and(stays, lax.gt(left_index, full(left_index, -1)))
            stays = lax.bitwise_or(stays, outside)
        later = lax.select(outside, right_index, right_index + full(right_index, distance * unit))
        return (
            lax.select(stays, left, right),
            lax.select(stays, left_index, later),
            lax.max(left_broken, right_broken),
        )

    return combine
