"""Max pooling."""

from __future__ import annotations

import functools
from typing import Any

from jax import lax

from jax_mps.geometry import Window
from jax_mps.lowering.pooling.few_axes import few_axes_on_apple
from jax_mps.lowering.pooling.fold import AT_ONCE, State, fold_window, in_one_pass
from jax_mps.lowering.pooling.values import lowest, reduce_max
from jax_mps.lowering.rule import Platform

Array = Any


@few_axes_on_apple
def max_pool(x: Array, *, window: Window, start: int, platform: Platform) -> Array:
    fill = (lowest(x.dtype),)
    if platform == "cuda" and _at_once_on_cuda(x, window):
        return in_one_pass((x,), window, start, _greater, fill)[0]
    reduce = functools.partial(reduce_max, platform=platform)
    return fold_window((x,), window, start, _greater, fill, reduce=reduce, idempotent=True)[0]


def _greater(a: State, b: State, _: int) -> State:
    return (lax.max(a[0], b[0]),)


def _at_once_on_cuda(x: Array, window: Window) -> bool:
    """Whether one pass over all taps beats a pass an axis.

    Measured on an H100, microseconds for one pass and for one an axis: 3 x 3 windows of float32 with stride 1
    73 and 98 (dilated, `aspp`), 40 and 44 (`inception_max`); of bfloat16 75 and 60, 40 and 33; with stride 2
    95 and 91 (`resnet_stem`); 5 x 5 windows 219 and 106.
    """
    return window.taps <= AT_ONCE and x.dtype.itemsize >= 4 and all(a.stride == 1 for a in window.axes)
