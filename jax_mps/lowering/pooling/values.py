"""Constants and reductions that several poolings need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mps.geometry import Dim
from jax_mps.lowering.axes import cut
from jax_mps.lowering.rule import Platform, accumulator

Array = Any


def full(x: Array, value: float) -> Array:
    return lax.full_like(x, value)


def lowest(dtype: Any) -> Any:
    """The value that wins no maximum."""
    if dtype == np.bool_:
        return False
    return np.iinfo(dtype).min if np.dtype(dtype).kind in "iu" else -np.inf


def has_nan(x: Array) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def reduce_max(x: Array, dims: Sequence[int], platform: Platform) -> Array:
    # Of larger arrays, XLA's CPU code (seen in JAX 0.10 and 0.11) loses NaN in a reduction by `maximum`.
    loses_nan = has_nan(x) and platform not in ("cuda", "apple")
    greater = _greater_or_nan if loses_nan else lax.max
    return lax.reduce(x, np.array(lowest(x.dtype), x.dtype), greater, dims)


def _greater_or_nan(a: Array, b: Array) -> Array:
    return lax.select(lax.bitwise_or(lax.ge(a, b), lax.ne(a, a)), a, b)


def reduce_sum(x: Array, dims: Sequence[int]) -> Array:
    """The sum, formed in float32 (float64 for float64) and rounded once."""
    wide = accumulator(x.dtype)
    total = lax.reduce(lax.convert_element_type(x, wide), np.array(0, wide), lax.add, dims)
    return lax.convert_element_type(total, x.dtype)


def counting(length: Dim, platform: Platform) -> Array:
    """The numbers 0, 1, 2, ... below `length`."""
    if platform != "apple" or not isinstance(length, int):
        return lax.iota(np.int32, length)
    # Apple's plugins do not all have `iota`; two constants of the root of its size do.
    step = math.isqrt(length) + 1
    shape = (-(-length // step), step)
    rows, columns = (np.arange(n, dtype=np.int32) * unit for n, unit in zip(shape, (step, 1), strict=True))
    table = lax.broadcast_in_dim(rows, shape, (0,)) + lax.broadcast_in_dim(columns, shape, (1,))
    return cut(lax.reshape(table, (math.prod(shape),)), 0, 0, length)
