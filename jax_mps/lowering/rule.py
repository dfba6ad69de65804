"""How a primitive becomes code.

| platform and context | code |
|---|---|
| cpu; one device or a fully manual mesh, static shapes, the library loaded | native kernel |
| cpu; several devices, automatic or explicit sharding | native kernel on each part (`partition.py`) |
| the same, where a large or very small window makes it slower (`pooling/slow_windows.py`) | StableHLO |
| the same over several devices, for poolings with a single window along an axis | StableHLO |
| cpu otherwise: export, symbolic shapes, a mesh that is manual in part | StableHLO |
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
from jax_mps.geometry import Window
from jax_mps.lowering import library, partition

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
    factors: Callable[..., partition.Factors] | None = None,
) -> None:
    """Registers both lowerings of a primitive.

    Args:
      primitive: its parameters include `implementation`, which this module alone reads, if it has a kernel.
      xla: the function of the operands, the other parameters, and `platform`, one of `Platform`, to trace
        into StableHLO.
      native: gives the handler's name and its attributes for the other parameters; None if it has no kernel.
      native_is_slower: whether the StableHLO is to be preferred to the kernel, for the type of the first
        operand and the other parameters.
      factors: what devices can share, for the types of the operands and the other parameters; None if
        nothing, so that several devices take StableHLO.
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
        reason = "" if implementation == "xla" else obstacle(ctx, shared=factors is not None)
        if reason and implementation == "native":
            raise ValueError(f"implementation='native' cannot be had: {reason}")
        alone = _compat.runs_whole_arrays(ctx)

        def slower() -> bool:
            return native_is_slower(ctx.avals_in[0], **params) or (not alone and _is_reduction(**params))

        if reason or implementation == "xla" or (implementation is None and slower()):
            return to_stablehlo(ctx, *operands, **params)
        if not alone:
            params["implementation"] = implementation
            shares = factors(*ctx.avals_in, **params)  # type: ignore[misc]
            return _lower_parts(ctx, primitive, shares, params, operands)
        name, attributes = native(**params)  # type: ignore[misc]
        return _compat.call_native(ctx, library.target(name), *operands, **attributes)

    mlir.register_lowering(primitive, portable)
    if native is not None:
        mlir.register_lowering(primitive, cpu, platform="cpu")


def _is_reduction(*, window: Window | None = None, channels_last: bool | None = None, **_: Any) -> bool:
    """Whether a pooling has one window along an axis, which devices share as a reduction: XLA knows how."""
    axes = window.axes if window is not None and channels_last is None else ()
    return any(axis.windows == 1 and axis.taps > 1 for axis in axes)


def _lower_parts(
    ctx: Any, primitive: Any, factors: partition.Factors, params: dict[str, Any], operands: Sequence[Any]
) -> Any:
    """The primitive on each device's part of its operands."""

    def compute(*parts: Any, **params: Any) -> Sequence[Any]:
        out = primitive.bind(*parts, **params)
        return out if primitive.multiple_results else [out]

    def plan(mesh: dict[str, int], arrays: Any, results: Any) -> partition.Plan:
        sharded = ([partition.Sharded(*array) for array in some] for some in (arrays, results))
        return partition.plan(factors, params, compute, mesh, *sharded)

    def whole(*arrays: Any) -> Any:
        return primitive.bind(*arrays, **params)

    description = f"{library.target(primitive.name)} {sorted(params.items())}"
    return _compat.lower_partitioned(ctx, whole, description, factors.sharding_rule(), plan, *operands)


def _check_apple_has(name: str, avals: Sequence[Any]) -> None:
    for aval in avals:
        if aval.dtype.kind == "c" or aval.dtype.itemsize == 8:
            raise TypeError(
                f"{name} cannot be lowered for Apple's GPUs with an array of {aval.dtype.name}: they have no "
                "64-bit and no complex numbers; convert to float32 first"
            )


def obstacle(ctx: Any, *, shared: bool = True) -> str:
    """Why a native kernel cannot serve here; empty if it can.

    Args:
      ctx: of the lowering.
      shared: whether several devices can share the work.
    """
    if _compat.for_export(ctx):
        return "an exported program must not depend on this library"
    if not _compat.runs_whole_arrays(ctx) and not (shared and _compat.can_partition(ctx)):
        return "arrays sharded over several devices need StableHLO, which XLA can partition"
    if any(_compat.is_symbolic(d) for aval in ctx.avals_in for d in aval.shape):
        return "shapes are symbolic"
    for aval in (*ctx.avals_in, *ctx.avals_out):
        if aval.dtype.kind in "iu" and aval.dtype.itemsize == 8:
            return f"dtype {aval.dtype.name} has no native kernel"
    return library.status().reason
