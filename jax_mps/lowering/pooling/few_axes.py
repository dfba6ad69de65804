"""Arrays with few axes for Apple's plugins."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jax_mps.lowering.rule import Platform

Array = Any


def few_axes_on_apple(fun: Callable[..., Any]) -> Callable[..., Any]:
    """A lowering that merges the axes before the spatial ones, and those behind them, for Apple's plugins.

    Their operations are known to work with up to eight axes. One axis on either side is enough. For other
    platforms, merging axes would only keep arrays from being partitioned.
    """

    @functools.wraps(fun)
    def lower(*arrays: Array, platform: Platform, start: int, **params: Any) -> Any:
        if platform != "apple":
            return fun(*arrays, start=start, platform=platform, **params)
        rank = len(params["sizes"]) if "sizes" in params else params["window"].rank
        outer, inner = arrays[0].shape[:start], arrays[0].shape[start + rank :]

        def merge(x: Array) -> Array:
            behind = (math.prod(inner),) if inner else ()
            return lax.reshape(x, (math.prod(outer), *x.shape[start : start + rank], *behind))

        def split(y: Array) -> Array:
            return lax.reshape(y, (*outer, *y.shape[1 : 1 + rank], *inner))

        merged = fun(*map(merge, arrays), start=1, platform=platform, **params)
        return jax.tree.map(split, merged)

    return lower
