"""The members of a kernel: each has a check, which gives its value in one form or raises."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from jax_mps import geometry
from jax_mps.mps import padding as policies
from jax_mps.mps.structs import MPSImageEdgeMode, MPSNNPaddingMethod, member


def setting(
    check: Callable[[str, Any], Any], *, default: Any = dataclasses.MISSING, init: bool = True
) -> Any:
    """A member of a kernel; `check` gives its value in one form, or raises. `init`: it can be chosen.

    `default` is a keyword: type checkers know of a default by this word alone.
    """
    return dataclasses.field(default=default, init=init, metadata={"check": check})


def count(least: int = 0, *, unbounded: bool = False) -> Callable[[str, Any], Any]:
    """An unsigned integer; `None` for as many as there are."""

    def check(name: str, value: Any) -> int | None:
        if unbounded and value is None:
            return None
        value = geometry.integer(name, value)
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
        return value

    return check


def struct(kind: type[Any], *, optional: bool = False) -> Callable[[str, Any], Any]:
    """One of the structs, or `None`."""

    def check(name: str, value: Any) -> Any:
        if isinstance(value, kind) or (optional and value is None):
            return value
        raise TypeError(f"{name} must be an {kind.__name__}{' or None' * optional}, got {value!r}")

    return check


def one_of(kind: type[Any]) -> Callable[[str, Any], Any]:
    """A member of an enumeration, its number or its name."""
    return functools.partial(member, kind)


def edge(name: str, value: Any) -> MPSImageEdgeMode:
    """An edge mode that has a meaning here."""
    mode = member(MPSImageEdgeMode, name, value)
    if mode not in (MPSImageEdgeMode.ZERO, MPSImageEdgeMode.CLAMP):
        raise ValueError(
            f"{name} must be ZERO or CLAMP, got {mode.name}: only MPSNNPad has a meaning for the others"
        )
    return mode


def policy(name: str, value: Any) -> MPSNNPaddingMethod:
    """A padding policy that has a meaning here."""
    return policies.check(name, member(MPSNNPaddingMethod, name, value))


def anything(name: str, value: Any) -> Any:
    """What needs no check, or has another."""
    del name
    return value


def a_device(name: str, value: Any) -> Any:
    """A device of JAX, or `None`."""
    if value is not None and not isinstance(value, jax.Device):
        raise TypeError(f"{name} must be None or a jax.Device, got {value!r}")
    return value
