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


def by_parts(count: int, *, added: str = "") -> Callable[[F], F]:
    """Serves complex numbers by a function of real ones, linear in each of its `count` first arguments.

    Products of real and imaginary parts are those of complex numbers, without a conjugate. `added` names the
    argument after these, if there is one that is added to the result.
    """

    def decorate(function: F) -> F:
        named = list(inspect.signature(function).parameters)[: count + bool(added)]
        factors = named[:count]

        @functools.wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            known = keywords | dict(zip(named, args, strict=False))
            if any(name not in known for name in factors) or not any(
                np.iscomplexobj(known[name]) for name in factors
            ):
                return function(*args, **keywords)
            arrays = [array(name, known.pop(name), COMPLEX) for name in factors]
            for name, x in zip(factors, arrays, strict=True):
                check_same_dtype(name, x, factors[0], arrays[0])
            wanted = known.pop("preferred_element_type", None)
            if wanted is not None:
                known["preferred_element_type"] = _real_type(jnp.dtype(wanted))
            terms: tuple[Any, Any] = (None, None)
            if (term := known.pop(added, None)) is not None:
                terms = _parts(
                    lax.convert_element_type(array(added, term, FLOATS + COMPLEX), arrays[0].dtype)
                )

            def of(*parts: Array, term: Any = None) -> Array:
                more = {} if term is None else {added: term}
                return function(*parts, *args[len(named) :], **known, **more)

            if count == 1:
                return lax.complex(*(of(part) for part in _parts(arrays[0])))
            (a, b), (c, d) = map(_parts, arrays)
            return lax.complex(of(a, c, term=terms[0]) - of(b, d), of(a, d, term=terms[1]) + of(b, c))

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
