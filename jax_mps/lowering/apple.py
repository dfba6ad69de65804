"""What the plugins for Apple's GPUs can run, and a check of programs against it.

Three plugins matter: `jax-metal` (platform METAL, closed, not maintained since 2024) and two called `mps`, of
which one is built on MLX and one on MPSGraph. None takes kernels from other libraries, so they get StableHLO
made of the operations below alone: those that `jax-metal` has a converter for and the MLX plugin a handler,
in the form in which both compute what StableHLO means. What is left out, and why:

* gather, scatter, `dynamic_slice`, `dynamic_update_slice`: wrong results at the borders of arrays.
* `reduce_window`, `select_and_scatter`, cumulative operations: of certain ranks alone, or refused.
* `reverse`, inner and negative padding, `lhs_dilation`, reversed windows, groups of batches, and groups along
  one or three axes: refused by one of them, or silently ignored.
* loops, branches, custom calls, sort, random numbers, `iota`: crashes, or no converter.
* quotients of integers and broadcasts that change the order of axes: the MLX plugin computes something else.
* float64 and complex numbers. bfloat16 and unsigned integers are in neither's way but nobody has reported
  them to work with `jax-metal`: they are allowed, and unverified there.

Both plugins fuse elementwise operations that follow each other into one kernel, and a kernel of Metal takes
31 buffers, of which MLX needs up to three for itself. `MAX_OPERANDS` arrays at most may feed such a chain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

MAX_OPERANDS = 24
"""Arrays that may feed a chain of elementwise operations, which becomes one kernel."""

MAX_RANK = 8
"""Axes of an array: MLX compiles its kernels for up to 8, and of more nothing is known elsewhere."""

_TYPES = ("f32", "f16", "bf16", "i1", "i8", "i16", "i32")
_UNSIGNED = ("ui8", "ui16", "ui32")

Operation = Any
Value = TypeVar("Value")


def violations(program: Any) -> list[str]:
    """Names every operation of a program that an Apple plugin may not run, and says which rule it breaks.

    Functions that the program calls are taken as part of it, once for each call.

    A chain is what may be computed by one kernel: a value and the elementwise operations that lead to it
    (arithmetic, comparisons, `select`, `convert`, `broadcast_in_dim`). Its operands are the different arrays
    that enter it: arguments, constants with more than one value, and the results of all other operations, so
    that each slice of an array is one.

    Args:
      program: what `jax.jit(f).trace(...).lower(lowering_platforms=("METAL",))` returns, or its text.

    Returns:
      A line for each violation; an empty list if there are none.
    """
    if isinstance(program, str):
        with mlir.make_ir_context():
            return _violations(ir.Module.parse(program))
    return _violations(program.compiler_ir("stablehlo"))


def _violations(module: Any) -> list[str]:
    found: list[str] = []
    arguments = main(module).regions[0].blocks[0].arguments
    types = (*_TYPES, *sorted({_element(a.type) for a in arguments} & set(_UNSIGNED)))
    for argument in arguments:
        found += (f"{rule}, in the argument {argument.type}" for rule in _type_rules(argument.type, types))

    def check(op: Operation, operands: Sequence[_Array]) -> list[_Array]:
        rules = [rule for result in op.results for rule in _type_rules(result.type, types)]
        if op.name in _RULES:
            rules += _RULES[op.name](op)
        else:
            rules.append(f"{op.name} is not among the operations that all plugins have")
        results = [_Array() for _ in op.results]
        if op.name == "stablehlo.constant":
            results = [_Array(uniform=ir.DenseElementsAttr(op.attributes["value"]).is_splat)]
        elif op.name in _ELEMENTWISE:
            chain = frozenset().union(*(array.operands for array in operands))
            if len(chain) <= MAX_OPERANDS:
                results = [_Array(chain)]
            else:
                rules.append(
                    f"at most {MAX_OPERANDS} arrays may feed one elementwise chain, not {len(chain)}"
                )
        found.extend(f"{rule}, in {_line(op)}" for rule in rules)
        return results

    interpret(module, [_Array() for _ in arguments], check)
    return found


class _Array:
    """An array of a program: the operands of the chain that it is computed by, itself if by none."""

    def __init__(self, operands: frozenset[_Array] | None = None, *, uniform: bool = False) -> None:
        if operands is None:  # a constant with one value becomes part of the code
            operands = frozenset() if uniform else frozenset({self})
        self.operands = operands


# --- programs -----------------------------------------------------------------------------------------


def main(module: Any) -> Operation:
    return _functions(module)["main"]


def _functions(module: Any) -> dict[str, Operation]:
    functions = (f.operation for f in module.body.operations if f.operation.name == "func.func")
    return {ir.StringAttr(f.attributes["sym_name"]).value: f for f in functions}


def interpret(
    module: Any,
    arguments: Sequence[Value],
    apply: Callable[[Operation, Sequence[Value]], Sequence[Value]],
) -> list[Value]:
    """Runs a program on values of any kind.

    Args:
      module: the program; calls of functions in it are followed.
      arguments: the values of its arguments.
      apply: gives the values of an operation's results for those of its operands.

    Returns:
      The values of its results.
    """
    functions = _functions(module)

    def call(function: Operation, values: Sequence[Value]) -> list[Value]:
        block = function.regions[0].blocks[0]
        known = dict(zip(block.arguments, values, strict=True))
        for op in (each.operation for each in block.operations):
            operands = [known[operand] for operand in op.operands]
            if op.name == "func.return":
                return operands
            if op.name == "func.call":
                name = ir.FlatSymbolRefAttr(op.attributes["callee"]).value
                results: Sequence[Value] = call(functions[name], operands)
            else:
                results = apply(op, operands)
            known.update(zip(op.results, results, strict=True))
        raise ValueError("a function without a return")

    return call(functions["main"], arguments)


def _line(op: Operation) -> str:
    text = " ".join(str(op).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


# --- rules --------------------------------------------------------------------------------------------


def _type_rules(kind: Any, types: Sequence[str]) -> Iterator[str]:
    if not isinstance(kind, ir.RankedTensorType):
        yield f"{kind} is not an array"
        return
    if not kind.has_static_shape:
        yield f"shapes must be static, not {kind}"
    if kind.rank > MAX_RANK:
        yield f"arrays must have at most {MAX_RANK} axes, not {kind.rank}"
    if _element(kind) not in types:
        yield f"element types must be among {', '.join(types)}, not {_element(kind)}"


def _element(kind: Any) -> str:
    return str(ir.RankedTensorType(kind).element_type)


def _shape(value: Any) -> list[int]:
    return list(ir.RankedTensorType(value.type).shape)


def numbers(op: Operation, name: str, default: int = 0) -> list[int]:
    """The integers of an attribute in the order in which they are printed; `[default]` if it is left out."""
    if name not in op.attributes:
        return [default]
    attribute = op.attributes[name]
    return [attribute.value] if isinstance(attribute, ir.IntegerAttr) else [int(n) for n in attribute]


def _anything(op: Operation) -> Iterator[str]:
    return iter(())


def _broadcast(op: Operation) -> Iterator[str]:
    dims = numbers(op, "broadcast_dimensions")
    if dims != sorted(dims):  # the MLX plugin reshapes, and does not transpose
        yield f"broadcasts must keep the order of axes, not map them to {dims}"


def _pad(op: Operation) -> Iterator[str]:
    if min(*numbers(op, "edge_padding_low"), *numbers(op, "edge_padding_high"), 0) < 0:
        yield "padding must not be negative"
    if any(numbers(op, "interior_padding")):
        yield "padding must be at the edges"


def direction(op: Operation) -> str:
    return str(stablehlo.ComparisonDirectionAttr(op.attributes["comparison_direction"]).value)


def _compare(op: Operation) -> Iterator[str]:
    if direction(op) not in ("EQ", "NE", "GT"):
        yield f"comparisons must be EQ, NE or GT, not {direction(op)}"


def _float(op: Operation) -> Iterator[str]:
    if not _element(op.results[0].type).startswith(("f", "bf")):
        yield f"{op.name} must be of floating point numbers"


def _boolean(op: Operation) -> Iterator[str]:
    if _element(op.results[0].type) != "i1":
        yield f"{op.name} must be of booleans"


def reducer(op: Operation) -> str:
    """The name of the one operation of a reduction's body, or what it consists of."""
    return " ".join(
        o.operation.name for o in op.regions[0].blocks[0].operations if o.operation.name != "stablehlo.return"
    )


def _reduce(op: Operation) -> Iterator[str]:
    if len(op.results) != 1:
        yield "reductions must be of one array"
    if reducer(op) not in ("stablehlo.add", "stablehlo.maximum"):
        yield f"reductions must be by add or maximum, not {reducer(op)}"
    if reducer(op) == "stablehlo.add":
        yield from _float(op)  # MLX widens sums of small integers


def _convolution(op: Operation) -> Iterator[str]:
    spatial = list(range(len(_shape(op.operands[0])) - 2))
    rank = len(spatial)
    if rank not in (2, 3):
        yield f"convolutions must have 2 or 3 spatial axes, not {rank}"
    if layout(op) not in _layouts(rank):
        yield "convolutions must have the layout NHWC with HWIO, or NCHW with OIHW"
    if set(numbers(op, "lhs_dilation", 1)) != {1}:
        yield "convolutions must not have lhs_dilation"
    if any(numbers(op, "window_reversal")):
        yield "convolutions must not have a reversed window"
    if min(numbers(op, "padding")) < 0:
        yield "the padding of convolutions must not be negative"
    if numbers(op, "batch_group_count", 1) != [1]:
        yield "convolutions must not have groups of the batch"
    if rank != 2 and numbers(op, "feature_group_count", 1) != [1]:
        yield "convolutions must not have groups, but along two axes"
    yield from _float(op)


def layout(op: Operation) -> tuple[list[int], list[int], list[int]]:
    """The axes of image, kernel and result: batch (output channels), channels (input channels), space."""
    d = stablehlo.ConvDimensionNumbers(op.attributes["dimension_numbers"])
    return (
        [d.input_batch_dimension, d.input_feature_dimension, *d.input_spatial_dimensions],
        [d.kernel_output_feature_dimension, d.kernel_input_feature_dimension, *d.kernel_spatial_dimensions],
        [d.output_batch_dimension, d.output_feature_dimension, *d.output_spatial_dimensions],
    )


def _layouts(rank: int) -> list[tuple[list[int], list[int], list[int]]]:
    first = [0, 1, *range(2, rank + 2)]
    last = [0, rank + 1, *range(1, rank + 1)]
    return [(first, first, first), (last, [rank + 1, rank, *range(rank)], last)]


def _dot_general(op: Operation) -> Iterator[str]:
    batch, contracting = products(op)
    if any(len(side) != 1 for side in contracting):
        yield "products must contract one axis"
    if any(side != list(range(len(side))) for side in batch):
        yield "the batch axes of products must be the first"
    ranks = {len(_shape(operand)) for operand in op.operands}
    if not ranks <= {2, 3}:
        yield f"the operands of products must have 2 or 3 axes, not {max(ranks)}"
    yield from _float(op)


def products(op: Operation) -> tuple[tuple[list[int], list[int]], tuple[list[int], list[int]]]:
    """The batch axes of both operands of a product, and those that it contracts."""
    d = stablehlo.DotDimensionNumbers(op.attributes["dot_dimension_numbers"])
    return (
        (list(d.lhs_batching_dimensions), list(d.rhs_batching_dimensions)),
        (list(d.lhs_contracting_dimensions), list(d.rhs_contracting_dimensions)),
    )


_ELEMENTWISE: dict[str, Callable[[Operation], Iterator[str]]] = {
    "stablehlo.add": _anything,
    "stablehlo.and": _boolean,
    "stablehlo.broadcast_in_dim": _broadcast,
    "stablehlo.compare": _compare,
    "stablehlo.convert": _anything,
    "stablehlo.divide": _float,
    "stablehlo.maximum": _anything,
    "stablehlo.minimum": _anything,
    "stablehlo.multiply": _anything,
    "stablehlo.negate": _anything,
    "stablehlo.not": _boolean,
    "stablehlo.or": _boolean,
    "stablehlo.select": _anything,
    "stablehlo.sqrt": _float,
    "stablehlo.subtract": _anything,
}
_RULES: dict[str, Callable[[Operation], Iterator[str]]] = _ELEMENTWISE | {
    "stablehlo.concatenate": _anything,
    "stablehlo.constant": _anything,
    "stablehlo.convolution": _convolution,
    "stablehlo.dot_general": _dot_general,
    "stablehlo.pad": _pad,
    "stablehlo.reduce": _reduce,
    "stablehlo.reshape": _anything,
    "stablehlo.slice": _anything,  # StableHLO itself wants strides of at least 1
    "stablehlo.transpose": _anything,
}
