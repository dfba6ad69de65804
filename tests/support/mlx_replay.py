"""Runs a StableHLO program on MLX, operation by operation, by the calls that the plugin jax-mps makes.

Each operation becomes the call of MLX that the plugin's handler makes of it (as of its release 0.10.10), with
the same arguments, so that MLX's own meaning of it counts: promotion, padding, layouts, NaN.
MLX's CPU build stands in for Metal: its kernels are others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
from jaxlib.mlir import ir

import programs
from jax_mps.lowering import apple

Array = mx.array

_DTYPES = {
    "f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16, "i1": mx.bool_, "i8": mx.int8, "i16": mx.int16,
    "i32": mx.int32, "ui8": mx.uint8, "ui16": mx.uint16, "ui32": mx.uint32,
}  # fmt: skip


def replay(lowered: Any, *operands: Any, compiled: bool = False) -> list[np.ndarray]:
    """The results of a lowered program, as the leaves of what the function returns.

    Args:
      lowered: the program, of `jax.jit(f).trace(...).lower(...)`.
      operands: the arguments of f.
      compiled: through `mx.compile`, which fuses kernels (and needs a C++ compiler on the CPU), as the plugin
        does; otherwise operation by operation.
    """
    module = lowered.compiler_ir("stablehlo")

    def run(*arguments: Array) -> list[Array]:
        return apple.interpret(module, arguments, _apply)

    arguments = [_from_numpy(leaf) for leaf in programs.arguments(lowered, operands)]
    with mx.stream(mx.cpu):
        results = (mx.compile(run) if compiled else run)(*arguments)
        mx.eval(results)
    function = apple.main(module)
    kind_of_main: Any = ir.TypeAttr(function.attributes["function_type"]).value
    declared = kind_of_main.results
    for result, kind in zip(results, declared, strict=True):
        assert (list(result.shape), result.dtype) == (list(kind.shape), _dtype(kind)), kind
    return [_to_numpy(result) for result in results]


def _from_numpy(x: Any) -> Array:
    x = np.array(x, order="C")  # MLX takes no strides below 0
    if x.dtype == jnp.bfloat16:
        return mx.array(x.astype(np.float32)).astype(mx.bfloat16)
    return mx.array(x)


def _to_numpy(x: Array) -> np.ndarray:
    if x.dtype == mx.bfloat16:
        return np.array(x.astype(mx.float32)).astype(jnp.bfloat16)
    return np.array(x)


def _dtype(kind: Any) -> Any:
    return _DTYPES[str(kind.element_type)]


def _apply(op: Any, operands: Sequence[Array]) -> list[Array]:
    handler = _HANDLERS[op.name]
    return [handler(op, *operands)]


def _shape(op: Any) -> list[int]:
    return list(op.results[0].type.shape)


def _constant(op: Any) -> Array:
    value, kind = op.attributes["value"], op.results[0].type
    if value.is_splat:
        return mx.full(_shape(op), value.get_splat_value().value, _dtype(kind))
    if str(kind.element_type) in ("f16", "i1") and jax.__version_info__ < (0, 5):
        pytest.skip("the MLIR bindings of this jaxlib abort on constants of float16 and of booleans")
    return mx.array(np.array(value)).astype(_dtype(kind))


def _broadcast_in_dim(op: Any, x: Array) -> Array:
    shape = [1] * len(_shape(op))
    for dim, size in zip(apple.numbers(op, "broadcast_dimensions"), x.shape, strict=True):
        shape[dim] = size
    return mx.broadcast_to(mx.reshape(x, shape), _shape(op))


def _slice(op: Any, x: Array) -> Array:
    first, limit, stride = (apple.numbers(op, n) for n in ("start_indices", "limit_indices", "strides"))
    return x[tuple(slice(*s) for s in zip(first, limit, stride, strict=True))]


def _pad(op: Any, x: Array, value: Array) -> Array:
    sides = (apple.numbers(op, f"edge_padding_{side}") for side in ("low", "high"))
    return mx.pad(x, list(zip(*sides, strict=True)), constant_values=value)


def _compare(op: Any, a: Array, b: Array) -> Array:
    return {"EQ": mx.equal, "NE": mx.not_equal, "GT": mx.greater}[apple.direction(op)](a, b)


def _reduce(op: Any, x: Array, _: Array) -> Array:
    call = {"stablehlo.add": mx.sum, "stablehlo.maximum": mx.max}[apple.reducer(op)]
    return call(x, axis=apple.numbers(op, "dimensions"))


def _dot_general(op: Any, a: Array, b: Array) -> Array:
    batch, contracting = apple.products(op)
    letters = iter("abcdefgh")
    names = [[""] * x.ndim for x in (a, b)]
    for axes in (batch, contracting):
        for left, right in zip(*axes, strict=True):
            names[0][left] = names[1][right] = next(letters)
    shared = {n for n in names[0] if n}
    kept = [names[0][axis] for axis in batch[0]]
    for side in names:
        side[:] = [name or next(letters) for name in side]
    result = [*kept, *(name for side in names for name in side if name not in shared)]
    return mx.einsum(f"{''.join(names[0])},{''.join(names[1])}->{''.join(result)}", a, b)


def _convolution(op: Any, image: Array, kernel: Array) -> Array:
    def last(axes: list[int]) -> list[int]:
        return [axes[0], *axes[2:], axes[1]]

    layouts = apple.layout(op)
    image, kernel = (mx.transpose(x, last(axes)) for x, axes in zip((image, kernel), layouts, strict=False))
    rank = image.ndim - 2
    stride, dilation = (
        apple.numbers(op, name) if name in op.attributes else [1] * rank
        for name in ("window_strides", "rhs_dilation")
    )
    pads = apple.numbers(op, "padding") if "padding" in op.attributes else [0] * 2 * rank
    (groups,) = apple.numbers(op, "feature_group_count")
    low, high = pads[::2], pads[1::2]
    # A kernel that is large for the result is taken for the gradient of a convolution to its weights.
    sizes = zip(image.shape[1:-1], low, high, kernel.shape[1:-1], dilation, strict=True)
    outs = [n + a + b - (k - 1) * d for n, a, b, k, d in sizes]
    large = all(k >= 2 * out > 0 for k, out in zip(kernel.shape[1:-1], outs, strict=True))
    if rank == 2 and large and set(stride) == {1} and groups == 1:
        swap = [rank + 1, *range(1, rank + 1), 0]
        source, gradient = mx.transpose(image, swap), mx.transpose(kernel, swap)

        def convolve(weights: Array) -> Array:
            return mx.conv_general(source, weights, dilation, (low, high))

        weights = mx.zeros([kernel.shape[0], *outs, image.shape[0]], source.dtype)
        (_, (result,)) = mx.vjp(lambda w: [convolve(w)], [weights], [gradient])
        result = mx.transpose(result, [rank + 1, *range(1, rank + 1), 0])
    else:
        result = mx.conv_general(image, kernel, stride, (low, high), dilation, 1, groups, False)
    back = [0] * result.ndim
    for i, axis in enumerate(last(layouts[2])):
        back[axis] = i
    return mx.transpose(result, back)


_HANDLERS: dict[str, Callable[..., Array]] = {
    "stablehlo.add": lambda op, a, b: mx.add(a, b),
    "stablehlo.and": lambda op, a, b: mx.bitwise_and(a, b),
    "stablehlo.broadcast_in_dim": _broadcast_in_dim,
    "stablehlo.compare": _compare,
    "stablehlo.concatenate": lambda op, *parts: mx.concatenate(
        list(parts), apple.numbers(op, "dimension")[0]
    ),
    "stablehlo.constant": _constant,
    "stablehlo.convert": lambda op, x: x.astype(_dtype(op.results[0].type)),
    "stablehlo.convolution": _convolution,
    "stablehlo.divide": lambda op, a, b: mx.divide(a, b),
    "stablehlo.dot_general": _dot_general,
    "stablehlo.maximum": lambda op, a, b: mx.maximum(a, b),
    "stablehlo.minimum": lambda op, a, b: mx.minimum(a, b),
    "stablehlo.multiply": lambda op, a, b: mx.multiply(a, b),
    "stablehlo.negate": lambda op, x: mx.negative(x),
    "stablehlo.not": lambda op, x: mx.logical_not(x),
    "stablehlo.or": lambda op, a, b: mx.bitwise_or(a, b),
    "stablehlo.pad": _pad,
    "stablehlo.reduce": _reduce,
    "stablehlo.reshape": lambda op, x: mx.reshape(x, _shape(op)),
    "stablehlo.select": lambda op, condition, a, b: mx.where(condition, a, b),
    "stablehlo.slice": _slice,
    "stablehlo.sqrt": lambda op, x: mx.sqrt(x),
    "stablehlo.subtract": lambda op, a, b: mx.subtract(a, b),
    "stablehlo.transpose": lambda op, x: mx.transpose(x, apple.numbers(op, "permutation")),
}
