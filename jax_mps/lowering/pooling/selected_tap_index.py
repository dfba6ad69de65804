"""Which tap of every window stock JAX selects, where it differentiates a windowed maximum.

A tap stays selected while it is `>=` the next one. So the first of equal maxima is selected, and after a
NaN the search begins anew. With padding, that takes part as -inf; where it is selected, the index is -1,
which is that of no tap. Without, the search begins at -inf before the window, and padding is left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jax import lax

from jax_mps.geometry import Window
from jax_mps.lowering.pooling.few_axes import few_axes_on_apple
from jax_mps.lowering.pooling.taps import each_tap
from jax_mps.lowering.pooling.values import full
from jax_mps.lowering.rule import Platform

Array = Any


@few_axes_on_apple
def max_pool_selected_tap_index(
    x: Array, *, window: Window, start: int, with_padding: bool, platform: Platform
) -> Array:
    pixels = lax.full_like(x, 1, dtype=np.int32)
    best: Array = None
    for tap, (value, count) in enumerate(
        zip(each_tap(x, window, start, -np.inf), each_tap(pixels, window, start, 0), strict=True)
    ):
        inside = lax.gt(count, full(count, 0))
        number = lax.select(inside, full(count, tap), full(count, -1))
        if best is None and with_padding:
            best, index = value, number
            continue
        if best is None:
            best, index = full(value, -np.inf), full(number, -1)
        stays = lax.ge(best, value)
        if not with_padding:
            stays = lax.bitwise_or(stays, lax.bitwise_not(inside))
        best, index = lax.select(stays, best, value), lax.select(stays, index, number)
    return lax.convert_element_type(index, window.tap_dtype)
