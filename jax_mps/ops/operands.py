"""Checks of the arrays that the public functions take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jax_mps.geometry import Dim, Placement

Array = Any

FLOATS = ("float32", "float64", "float16", "bfloat16")
INTEGERS = ("int8", "int16", "int32", "uint8", "uint16", "uint32", "bool")


def array(name: str, value: Any, dtypes: Sequence[str]) -> Array:
    """`value` as an array of one of the dtypes."""
    x = value if hasattr(value, "aval") else jnp.asarray(value)
    if x.dtype.name not in dtypes:
        raise TypeError(f"{name} must have a dtype of {', '.join(dtypes)}, got {x.dtype.name}")
    return x


def check_shape(name: str, x: Array, expected: Sequence[Dim], rule: str) -> None:
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)} ({rule}), got {tuple(x.shape)}")


def check_same_dtype(name: str, x: Array, other: str, y: Array) -> None:
    if x.dtype != y.dtype:
        raise TypeError(f"{name} must have the dtype of {other}, {y.dtype.name}, got {x.dtype.name}")


def pooled_shape(shape: Sequence[Dim], placement: Placement) -> tuple[Dim, ...]:
    """The shape of the pooled array of an image array of that shape."""
    start = placement.start
    return (*shape[:start], *placement.counts, *shape[start + placement.window.rank :])
