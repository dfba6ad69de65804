"""Checks of the arrays that the public functions take."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mps.geometry import Dim, Placement

Array = Any

F = TypeVar("F", bound="Callable[..., Any]")

COMPLEX = ("complex64", "complex128")
FLOATS = ("float32", "float64", "float16", "bfloat16")
INTEGERS = ("int8", "int16", "int32", "uint8", "uint16", "uint32", "bool")
WIDE_INTEGERS = ("int64", "uint64")
"""Of these the native library knows nothing."""

FLOAT8 = tuple(
    f"float8_{form}"
    for form in ("e3m4", "e4m3", "e4m3fn", "e4m3b11fnuz", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
)


def array(name: str, value: Any, dtypes: Sequence[str]) -> Array:
    """`value` as an array of one of the dtypes."""
    x = value if hasattr(value, "aval") else jnp.asarray(value)
    if x.dtype.name not in dtypes:
        raise TypeError(f"{name} must have a dtype of {', '.join(dtypes)}, got {x.dtype.name}")
    return x


def widened(x: Array) -> Array:
    """Numbers of 8 bits as float32, which holds them all: no kernel takes them as they are."""
    return lax.convert_element_type(x, np.float32) if x.dtype.name in FLOAT8 else x


def by_parts(count: int) -> Callable[[F], F]:
    """Serves complex numbers by a function of real ones, linear in each of its `count` first arguments.

    Products of real and imaginary parts are those of complex numbers, without a conjugate.
    """

    def decorate(function: F) -> F:
        names = list(inspect.signature(function).parameters)[:count]

        @functools.wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            keywords |= dict(zip(names, args, strict=False))
            rest = args[count:]
            if any(name not in keywords for name in names) or not any(
                np.iscomplexobj(keywords[name]) for name in names
            ):
                return function(*args, **{k: v for k, v in keywords.items() if k not in names[: len(args)]})
            arrays = [array(name, keywords.pop(name), COMPLEX) for name in names]
            for name, x in zip(names, arrays, strict=True):
                check_same_dtype(name, x, names[0], arrays[0])
            wanted = keywords.pop("preferred_element_type", None)
            if wanted is not None:
                keywords["preferred_element_type"] = _real_type(jnp.dtype(wanted))

            def of(*parts: Array) -> Array:
                return function(*parts, *rest, **keywords)

            if count == 1:
                return lax.complex(*(of(part) for part in _parts(arrays[0])))
            (a, b), (c, d) = map(_parts, arrays)
            return lax.complex(of(a, c) - of(b, d), of(a, d) + of(b, c))

        return call  # type: ignore[return-value]

    return decorate


def _parts(x: Array) -> tuple[Array, Array]:
    return lax.real(x), lax.imag(x)


def _real_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    if dtype.name not in COMPLEX:
        raise TypeError(
            f"preferred_element_type of complex operands must be {' or '.join(COMPLEX)}, got {dtype.name}"
        )
    return np.dtype(np.float64 if dtype.name == "complex128" else np.float32)


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
