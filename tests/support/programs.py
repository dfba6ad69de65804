"""Programs as text: lowered for a platform, exported, their operations counted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax import export

PLATFORMS = ("cpu", "cuda", "tpu")


def export_it(f: Callable[..., Any], *shapes: Any) -> Any:
    """Exports for all platforms, through serialisation, with every safety check on."""
    exported = export.export(jax.jit(f), platforms=PLATFORMS)(*shapes)
    called = set(re.findall(r'custom_call @"?([\w.]+)', exported.mlir_module()))
    assert called <= {"shape_assertion"}  # JAX's own check of symbolic shapes
    return export.deserialize(exported.serialize())


def operations(lowered: Any) -> list[Any]:
    """Every operation of a lowered program, those inside functions and regions included."""

    def inside(operation: Any) -> Iterator[Any]:
        for region in operation.regions:
            for block in region:
                for child in block:
                    yield child.operation
                    yield from inside(child.operation)

    return list(inside(lowered.compiler_ir("stablehlo").operation))


def lower(f: Callable[..., Any], *operands: Any, platform: str) -> Any:
    return jax.jit(f).trace(*operands).lower(lowering_platforms=(platform,))


def size(lowered: Any) -> int:
    return sum(operation.name.startswith("stablehlo.") for operation in operations(lowered))


def arguments(lowered: Any, operands: Sequence[Any]) -> list[Any]:
    """The arrays that a lowered program takes: JAX leaves out those that it does not need."""
    kept = lowered._lowering.compile_args.get("kept_var_idx")
    leaves = jax.tree.leaves(operands)
    return [leaf for i, leaf in enumerate(leaves) if kept is None or i in kept]
