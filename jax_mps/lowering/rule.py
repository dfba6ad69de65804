"""How a primitive becomes code.

| platform and context | code |
|---|---|
| cpu; one device or a fully manual mesh, static shapes, the library loaded | native kernel |
| the same, for windows so large that it is slower (`pooling/large_windows.py`) | StableHLO |
| cpu otherwise: several devices under automatic or explicit sharding, export, symbolic shapes | StableHLO |
| every other platform, Apple's included | StableHLO |

The StableHLO is written with `jax.lax` alone: `lowering/pooling/`, nearly the same for every platform, and
`lowering/conv_transpose/`, which has several forms and a table that says which serves where.
`lowering/apple.py` says what Apple's plugins can run, and `cli/lower.py` prints programs. Nothing is
registered under a third party's platform name: JAX raises for a platform whose plugin is absent, so the
default rule serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from jax.interpreters import mlir

from jax_mps import _compat
from jax_mps.lowering import library

IMPLEMENTATIONS = (None, "native", "xla")

Platform = Literal["cpu", "cuda", "apple", "any"]
"""What StableHLO can be shaped for; "any" has to suit every platform."""

_PLATFORMS: dict[Platform, frozenset[str]] = {
    "cpu": frozenset({"cpu"}),
    "cuda": frozenset({"cuda"}),
    "apple": frozenset({"METAL", "mps"}),
}


def accumulator(dtype: Any) -> np.dtype[Any]:
    """The type that sums are formed in: float32, or float64 for float64."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def platform_of(ctx: Any) -> Platform:
    """What the code of this lowering is to be shaped for."""
    names = frozenset(_compat.platforms(ctx))
    if names & _PLATFORMS["apple"]:  # they can run less than others, so they decide for all
        return "apple"
    return next((platform for platform, known in _PLATFORMS.items() if names <= known), "any")


def check_implementation(implementation: Any, *, static: bool) -> None:
    """Refuses an unknown implementation, and a native one that is already known to be impossible."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be None, 'native' or 'xla', got {implementation!r}")
    if implementation == "native":
        if not library.status().available:
            raise ValueError(f"implementation='native' cannot be had: {library.status().reason}")
        if not static:
            raise ValueError("implementation='native' needs static shapes, got symbolic dimensions")


def register(
    primitive: Any,
    *,
    xla: Callable[..., Any],
    native: Callable[..., tuple[str, dict[str, Any]]] | None,
    native_is_slower: Callable[..., bool] = lambda *_, **__: False,
) -> None:
    """Registers both lowerings of a primitive.

    Args:
      primitive: its parameters include `implementation`, which this module alone reads, if it has a kernel.
      xla: the function of the operands, the other parameters, and `platform`, one of `Platform`, to trace
        into StableHLO.
      native: gives the handler's name and its attributes for the other parameters; None if it has no kernel.
      native_is_slower: whether the StableHLO is to be preferred to the kernel, for the type of the first
        operand and the other parameters.
    """
    plainly = _compat.lower_plainly(xla)

    def to_stablehlo(ctx: Any, *operands: Any, **params: Any) -> Any:
        platform = platform_of(ctx)
        if platform == "apple":
            _check_apple_has(primitive.name, (*ctx.avals_in, *ctx.avals_out))
        return plainly(ctx, *operands, platform=platform, **params)

    def portable(ctx: Any, *operands: Any, implementation: str | None = None, **params: Any) -> Any:
        if implementation == "native":
            raise ValueError(
                f"implementation='native' cannot be had on {', '.join(_compat.platforms(ctx))}: "
                "native kernels are for the CPU"
            )
        return to_stablehlo(ctx, *operands, **params)

    def cpu(ctx: Any, *operands: Any, implementation: str | None, **params: Any) -> Any:
        reason = "" if implementation == "xla" else obstacle(ctx)
        if reason and implementation == "native":
            raise ValueError(f"implementation='native' cannot be had: {reason}")
        free = implementation is None and not reason
        if reason or implementation == "xla" or (free and native_is_slower(ctx.avals_in[0], **params)):
            return to_stablehlo(ctx, *operands, **params)
        name, attributes = native(**params)  # type: ignore[misc]
        return _compat.call_native(ctx, library.target(name), *operands, **attributes)

    mlir.register_lowering(primitive, portable)
    if native is not None:
        mlir.register_lowering(primitive, cpu, platform="cpu")


def _check_apple_has(name: str, avals: Sequence[Any]) -> None:
    for aval in avals:
        if aval.dtype.kind == "c" or aval.dtype.itemsize == 8:
            raise TypeError(
                f"{name} cannot be lowered for Apple's GPUs with an array of {aval.dtype.name}: they have no "
                "64-bit and no complex numbers; convert to float32 first"
            )


def obstacle(ctx: Any) -> str:
    """Why a native kernel cannot serve here; empty if it can."""
    if _compat.for_export(ctx):
        return "an exported program must not depend on this library"
    if not _compat.runs_whole_arrays(ctx):
        return "arrays sharded over several devices need StableHLO, which XLA can partition"
    if any(_compat.is_symbolic(d) for aval in ctx.avals_in for d in aval.shape):
        return "shapes are symbolic"
    for aval in (*ctx.avals_in, *ctx.avals_out):
        if aval.dtype.kind in "iu" and aval.dtype.itemsize == 8:
            return f"dtype {aval.dtype.name} has no native kernel"
    return library.status().reason
