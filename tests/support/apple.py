"""Every operation with its derivatives and `vmap`, as programs to lower for Apple's plugins."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import convs
import grid
import jax_mps
import oracle
from jax_mps.geometry import DataFormat


class Function(NamedTuple):
    """A function of arrays, and arrays for it."""

    name: str
    call: Callable[..., Any]
    operands: tuple[Any, ...]
    differentiable: bool = True

    def lower(self, platform: str) -> Any:
        return jax.jit(self.call).trace(*self.operands).lower(lowering_platforms=(platform,))


MODES = ("forward", "jvp", "vjp", "jvp of vjp", "vjp of vjp", "vmap")


def in_mode(function: Function, mode: str) -> list[Function]:
    """A function's derivative, or the function mapped over each operand and over all."""
    f, operands, count = function.call, function.operands, len(function.operands)
    if mode == "forward":
        return [function]
    if mode == "vmap":
        one = {tuple(0 if i in (j, count) else None for i in range(count)) for j in range(count)}
        maps = sorted(one | {(0,) * count}, key=str)
        return [
            Function(
                f"{function.name}, vmap {axes}",
                jax.vmap(f, axes),
                tuple(
                    x if a is None else np.stack([x, x[::-1]]) for x, a in zip(operands, axes, strict=True)
                ),
            )
            for axes in maps
        ]
    if not function.differentiable:
        return []
    result = jax.eval_shape(f, *operands)
    others = tuple(oracle.normal(x.shape, x.dtype, seed=5 + i) for i, x in enumerate(operands))
    g = oracle.normal(result.shape, result.dtype, seed=9)

    def pull_back(g: Any, *operands: Any) -> Any:
        return jax.vjp(f, *operands)[1](g)

    made: dict[str, tuple[Callable[..., Any], tuple[np.ndarray, ...]]] = {
        "jvp": (lambda *a: jax.jvp(f, a[:count], a[count:]), (*operands, *others)),
        "vjp": (pull_back, (g, *operands)),
        "jvp of vjp": (
            lambda *a: jax.jvp(pull_back, a[: count + 1], a[count + 1 :]),
            (g, *operands, g[::-1], *others),
        ),
        "vjp of vjp": (
            lambda *a: jax.vjp(pull_back, *a[: count + 1])[1](a[count + 1 :]),
            (g, *operands, *others),
        ),
    }
    call, arguments = made[mode]
    return [Function(f"{function.name}, {mode}", call, arguments)]


def poolings(name: str, data_format: DataFormat, dtype: Any = np.float32) -> Iterator[Function]:
    """All functions of the poolings of a window: the poolings, their gradient kernels, unpooling."""
    case = grid.CASES[name]
    call = {**case.geometry, "data_format": data_format}
    shape = case.shape(data_format)
    for op in grid.OPS:
        x = op.image(shape, dtype)
        title = f"{op.name} {name} {data_format}"
        pool = functools.partial(op.pool, window_shape=case.window_shape, **call, **op.options)
        yield Function(title, pool, (x,))
        g = oracle.normal(jax.eval_shape(pool, x).shape, dtype, seed=1)
        gradient = functools.partial(_gradient, op, case.window_shape, {**call, **op.options})
        yield Function(f"{title}, gradient kernel", gradient, (g, x))
    x = grid.MAX.image(shape, dtype)
    both = functools.partial(jax_mps.max_pool, window_shape=case.window_shape, return_indices=True, **call)
    yield Function(f"indices {name} {data_format}", both, (x,), differentiable=False)
    y, at = (np.asarray(a) for a in both(x))
    unpool = functools.partial(jax_mps.max_unpool, output_shape=case.sizes, data_format=data_format)
    yield Function(f"unpool {name} {data_format}", lambda y: unpool(y, at), (y,))
    yield Function(f"unpool of both {name} {data_format}", unpool, (y, at), differentiable=False)


def _gradient(op: grid.Op, window: Any, call: dict[str, Any], g: Any, x: Any) -> Any:
    return op.gradient(g, x, window, **call)


def transposed(name: str, data_format: str, dtype: Any = np.float32) -> Iterator[Function]:
    """The three functions of a transposed convolution."""
    case = convs.CASES[name]
    arrays = case.arrays(data_format, dtype=dtype)
    for op in convs.OPS:
        call = functools.partial(_of_two, op, arrays, {**case.call, "data_format": data_format})
        yield Function(f"conv {op.name} {name} {data_format}", call, op.of(arrays))


def _of_two(op: convs.Op, arrays: convs.Arrays, call: dict[str, Any], a: Any, b: Any) -> Any:
    return op.apply(arrays._replace(**dict(zip(op.operands, (a, b), strict=True))), **call)


def in_modes(function: Function, modes: Sequence[str] = MODES) -> Function:
    """One program of a function, its derivatives and its maps."""
    variants = [variant for mode in modes for variant in in_mode(function, mode)]

    def call(*operands: Any) -> list[Any]:
        return [variant.call(*of) for variant, of in zip(variants, operands, strict=True)]

    return Function(function.name, call, tuple(variant.operands for variant in variants))


def functions(family: str, name: str, data_format: DataFormat, dtype: Any = np.float32) -> list[Function]:
    return list({"pool": poolings, "conv": transposed}[family](name, data_format, dtype))


CASES = [("pool", name) for name in grid.CASES] + [("conv", name) for name in convs.CASES]


def check_close(actual: list[Any], expected: list[Any], what: str) -> None:
    """The same numbers but for rounding, relative to the largest of all results; integers the same.

    Second derivatives of a norm are differences of large numbers: hence the wide margin beside 0.
    """
    assert len(actual) == len(expected) > 0
    floats = [np.asarray(e, np.float64) for e in expected if jnp.issubdtype(e.dtype, jnp.floating)]
    scale = max((float(np.abs(e[np.isfinite(e)]).max(initial=0)) for e in floats), default=0)
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert (a.shape, a.dtype) == (e.shape, e.dtype), what
        if e.dtype.kind in "iub":
            np.testing.assert_array_equal(a, e, err_msg=what)
            continue
        step = float(jnp.finfo(e.dtype).eps)
        a, e = a.astype(np.float64), e.astype(np.float64)
        np.testing.assert_allclose(a, e, rtol=64 * step, atol=512 * step * max(scale, 1), err_msg=what)
