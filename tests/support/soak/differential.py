"""Random calls of every function, native and StableHLO, against PyTorch or the oracle, with derivatives.

Hypothesis draws them, so that what fails shrinks. The numbers of a case come from a seed.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import grid
import haste  # noqa: F401
import oracle
import references
from jax_mps.ops import operands as known
from soak.families import FAMILIES
from soak.record import Case
from wide_types import enable_x64

Array = Any

EXAMPLES = 40
"""Cases of a step."""

TRANSFORMATIONS = ("value", "jvp", "vjp", "jvp of vjp", "vjp of vjp")
VALUES = ("normal", "ties", "scales", "subnormal", "special")


def step(
    seed: int,
    number: int,
    check: Callable[[Case], None],
    examples: int = EXAMPLES,
    names: Sequence[str] = tuple(FAMILIES),
) -> None:
    """Checks random cases, and shrinks one that fails."""

    @hypothesis.seed((seed << 32) + number)
    @hypothesis.settings(
        database=None,
        deadline=None,
        max_examples=examples,
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=False,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        print_blob=False,
    )
    @hypothesis.given(cases(names))
    def run(case: Case) -> None:
        check(case)

    try:
        run()
    finally:
        jax.clear_caches()


@st.composite
def cases(draw: Callable[[Any], Any], names: Sequence[str]) -> Case:
    name = draw(st.sampled_from(names))
    family = FAMILIES[name]
    shapes, call = family.draw(draw)
    dtypes = (
        *["float32"] * 4,
        "float64",
        "float16",
        "bfloat16",
        *family.more,
        *family.narrow,
        *family.complexes,
    )
    dtype = draw(st.sampled_from(dtypes))
    case: Case = {"op": name, "dtype": dtype, "shapes": shapes, "call": call}
    case["values"] = draw(st.sampled_from(VALUES if dtype in grid.FLOATS else VALUES[:2]))
    if case["values"] == "special" or dtype in family.complexes:
        del shapes[2:]  # a bias, which these references have not
    if dtype in family.complexes:
        call.pop("preferred_element_type", None)
    case["transformation"] = draw(st.sampled_from(transformations(name, dtype, case["values"])))
    if draw(st.booleans()):
        mapped = [draw(st.none() | st.integers(0, len(shape))) for shape in shapes]
        if any(axis is not None for axis in mapped):
            case["mapped"], case["lanes"] = mapped, draw(st.sampled_from([2, 1, 3, 0]))
    case["jit"] = draw(st.sampled_from([True] * 19 + [False]))
    case["seed"] = draw(st.integers(0, 2**32 - 1))
    return case


def transformations(name: str, dtype: str, values: str) -> Sequence[str]:
    """Those that have a result in the range of the type."""
    if dtype in FAMILIES[name].complexes:
        return TRANSFORMATIONS[:2]
    if dtype in FAMILIES[name].more or not FAMILIES[name].differentiable:
        return TRANSFORMATIONS[:1]
    if name in ("l2_pool", "lp_pool", "l2_pool_gradient") and values in ("special", "subnormal"):
        # Every derivative is larger by the inverse of a norm, and of tiny norms XLA's may all be 0.
        first_order = name == "l2_pool" or (name == "lp_pool" and values == "special")
        return TRANSFORMATIONS[: 3 if first_order else 1]
    return TRANSFORMATIONS


# --- numbers --------------------------------------------------------------------------------------------


def numbers(rng: np.random.Generator, shape: Sequence[int], kind: str, dtype: np.dtype[Any]) -> np.ndarray:
    """Of the given kind. Ties are multiples of a half."""
    if dtype.name in (*grid.INTEGERS, *known.WIDE_INTEGERS):
        if dtype.kind == "b":
            return rng.integers(0, 2, shape).astype(bool)
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        ends = rng.choice(np.array([low, high, 0], dtype), shape)
        few = rng.integers(max(low, -2), 3, shape).astype(dtype)
        return np.where(
            rng.random(shape) < 0.2,
            ends,
            few if kind == "ties" else rng.integers(low, high, shape, dtype, endpoint=True),
        )
    if dtype.kind == "c":
        parts = (numbers(rng, shape, kind, np.dtype(np.float64)) for _ in range(2))
        return (next(parts) + 1j * next(parts)).astype(dtype)
    x = rng.standard_normal(shape)
    if kind != "normal":
        x = np.where(rng.random(shape) < 0.3, x, np.round(2 * x) / 2)
    if kind == "scales":
        x = x * 10.0 ** rng.uniform(-2, 2 if dtype == np.float16 else 6, shape)
    if kind == "subnormal":
        tiny = float(jnp.finfo(dtype).tiny)
        x = np.where(rng.random(shape) < 0.6, np.round(4 * x) / 8 * tiny, x)
    if kind == "special":
        for value, share in ((-np.inf, 0.15), (np.inf, 0.05), (np.nan, 0.05), (-0.0, 0.1)):
            x[rng.random(shape) < share] = value
    return x.astype(dtype)


def positions(rng: np.random.Generator, shape: Sequence[int], plane: Sequence[int]) -> np.ndarray:
    """Most of them in the plane, some of them twice."""
    return rng.integers(-1, math.prod(plane) + 2, shape).astype(np.int32)


def arrays(case: Case) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Operands, and tangents of those that have derivatives, with the mapped axes."""
    family, dtype, rng = FAMILIES[case["op"]], jnp.dtype(case["dtype"]), np.random.default_rng(case["seed"])
    mapped = case.get("mapped", [None] * len(case["shapes"]))
    operands, tangents = [], []
    for shape, axis, kind in zip(case["shapes"], mapped, family.kinds, strict=False):
        if axis is not None:
            shape = [*shape[:axis], case["lanes"], *shape[axis:]]
        if kind == "index":
            plane = case["call"].get("indices_shape", case["call"].get("output_shape"))
            operands.append(positions(rng, shape, plane))
            continue
        kept = dtype if dtype.name in grid.FLOATS or kind == "number" else jnp.dtype(np.float32)
        if kind == "sample":
            operands.append(rng.uniform(0, 0.99, shape).astype(kept))
        else:
            operands.append(numbers(rng, shape, case["values"], kept))
        tangents.append(numbers(rng, shape, "normal", kept))
    return operands, tangents


# --- what is computed -----------------------------------------------------------------------------------


def keywords(case: Case) -> dict[str, Any]:
    call = dict(case["call"])
    if "preferred_element_type" in call:
        call["preferred_element_type"] = np.float64 if case["dtype"] in ("float32", "float64") else np.float32
    return call


def transformed(f: Callable[..., Any], kind: str) -> Callable[..., dict[str, Any]]:
    """A transformation of `f`, as a function of operands, their tangents, a cotangent, and other operands.

    The derivative of the gradient is the same in forward and reverse mode.
    """

    def call(x: Any, t: Any, g: Any, rest: Any) -> dict[str, Any]:
        if kind == "value":
            return {"value": f(*x, *rest)}

        def first(*x: Any) -> Any:
            return jax.tree.leaves(f(*x, *rest))[0]

        def gradient(x: Any, g: Any) -> Any:
            return list(jax.vjp(first, *x)[1](g))

        if kind == "jvp":
            return dict(zip(("value", "tangent"), jax.jvp(first, x, t), strict=True))
        if kind == "vjp":
            return {"gradient": gradient(x, g)}
        if kind == "jvp of vjp":
            return {"second": jax.jvp(lambda *x: gradient(x, g), x, t)[1]}
        second, tangent = jax.vjp(gradient, x, g)[1](list(t))
        return {"second": list(second), "tangent": tangent}

    return call


def compute(case: Case, paths: Sequence[str | None]) -> tuple[dict[str | None, Any], np.ndarray]:
    """Results of the paths, and the cotangent."""
    family, (operands, tangents) = FAMILIES[case["op"]], arrays(case)
    count = len(tangents)
    call = keywords(case)

    def of(path: str | None) -> Callable[..., Any]:
        f = functools.partial(family.function, implementation=path, **call)
        return transformed(f, case["transformation"])

    def unmapped(x: np.ndarray, axis: int | None) -> Any:
        shape = x.shape if axis is None else (*x.shape[:axis], *x.shape[axis + 1 :])
        return jax.ShapeDtypeStruct(shape, x.dtype)

    mapped = case.get("mapped", [None] * len(operands))
    types = [unmapped(x, axis) for x, axis in zip(operands, mapped, strict=True)]
    like = jax.tree.leaves(jax.eval_shape(functools.partial(family.function, **call), *types))[0]
    rng = np.random.default_rng([case["seed"], 1])
    lanes = [case["lanes"]] if "mapped" in case else []
    g = numbers(rng, (*lanes, *like.shape), "normal", like.dtype)

    axes = (tuple(mapped[:count]), tuple(mapped[:count]), 0 if lanes else None, tuple(mapped[count:]))
    split = (tuple(operands[:count]), tuple(tangents), g, tuple(operands[count:]))

    def run(*split: Any) -> list[Any]:
        return [(jax.vmap(of(p), in_axes=axes) if lanes else of(p))(*split) for p in paths]

    found = (jax.jit(run) if case["jit"] else run)(*split)
    found = jax.tree.map(np.asarray, found)
    return dict(zip(paths, found, strict=True)), g


# --- what is expected -----------------------------------------------------------------------------------


def wide(x: np.ndarray) -> np.ndarray:
    return x if x.dtype.kind in "biu" else x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def lanes(
    case: Case, g: np.ndarray, flushed: bool
) -> Iterator[tuple[list[np.ndarray], list[np.ndarray], np.ndarray]]:
    """Operands, tangents and cotangent of every lane, in float64."""
    operands, tangents = arrays(case)
    if flushed:
        operands = [without_subnormals(x) for x in operands]
    mapped = case.get("mapped", [None] * len(operands))

    def lane(x: np.ndarray, axis: int | None, i: int) -> np.ndarray:
        return x if axis is None else np.take(x, i, axis)

    for i in range(case["lanes"] if "mapped" in case else 1):
        x = [lane(a, axis, i) for a, axis in zip(operands, mapped, strict=True)]
        t = [wide(lane(a, axis, i)) for a, axis in zip(tangents, mapped, strict=False)]
        samples = FAMILIES[case["op"]].kinds
        yield (
            [a if kind == "sample" else wide(a) for a, kind in zip(x, samples, strict=False)],
            t,
            wide(g[i] if "mapped" in case else g),
        )


def without_subnormals(x: np.ndarray) -> np.ndarray:
    """As XLA's CPU code sees them: it flushes those of the type that it computes in."""
    if x.dtype.kind in "biu" or x.dtype.itemsize == 1:
        return x
    tiny = np.finfo(np.float64 if x.dtype == np.float64 else np.float32).tiny
    return np.where(np.abs(x.astype(np.float64)) < tiny, 0, x).astype(x.dtype)


def expected(case: Case, g: np.ndarray, names: Sequence[str], flushed: bool) -> tuple[Any, Any]:
    """Results and the sizes of their terms, for every name."""
    finite = case["values"] != "special"
    found: list[dict[str, Any]] = []
    sizes: list[dict[str, Any]] = []
    for x, t, cotangent in lanes(case, g, flushed):
        reference = FAMILIES[case["op"]].reference(case["call"], *x, finite=finite)
        if case["dtype"] in FAMILIES[case["op"]].complexes:
            reference = references.ByParts(reference)
        x = [wide(a) for a in x[: len(t)]]
        found.append({name: getattr(reference, name)(x, t, cotangent) for name in names})
        sizes.append({name: reference.magnitude(name, x, t, cotangent) for name in names})
    return stacked(found, case), stacked(sizes, case)


def stacked(results: list[dict[str, Any]], case: Case) -> Any:
    if "mapped" not in case:
        return results[0]
    return jax.tree.map(lambda *each: np.stack(each), *results)


# --- comparing ------------------------------------------------------------------------------------------


def check(case: Case) -> None:
    """Compares both paths with the reference."""
    with (
        enable_x64(),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        np.errstate(all="ignore"),
    ):
        paths = (None,) if case["dtype"] in known.WIDE_INTEGERS else ("native", "xla")
        found, g = compute(case, paths)
        reference = functools.cache(functools.partial(expected, case, g))
        for path, results in found.items():
            if case.get("lanes") == 0:
                assert not any(leaf.size for leaf in jax.tree.leaves(results))
            elif any(0 in shape for shape in case["shapes"]):
                nothing(results)
            else:
                compare(case, path, results, reference)


def nothing(results: dict[str, Any]) -> None:
    """Checks derivatives where an axis is empty: they are sums of nothing. Values have biases."""
    for name, result in results.items():
        for leaf in jax.tree.leaves(result):
            assert name == "value" or not np.any(leaf), name


def compare(case: Case, path: str | None, results: dict[str, Any], reference: Callable[..., Any]) -> None:
    if case["values"] == "subnormal" and not keeps_subnormals(case, path):
        with contextlib.suppress(AssertionError):
            return equals(case, path, results, reference, flushed=True)
    return equals(case, path, results, reference, flushed=False)


def equals(
    case: Case, path: str | None, results: dict[str, Any], reference: Callable[..., Any], *, flushed: bool
) -> None:
    wanted, sizes = reference(tuple(results), flushed)
    for name, result in results.items():
        leaves = [jax.tree.leaves(a) for a in (result, wanted[name], sizes[name])]
        for actual, right, size in zip(*leaves, strict=False):  # derivatives are of the first result alone
            assert actual.shape == right.shape, (name, path, actual.shape, right.shape)
            close(case, path, name, actual, right, size)


def keeps_subnormals(case: Case, path: str | None) -> bool:
    """XLA's CPU code may flush them to 0, and in some functions it is part of both paths."""
    call = case["call"]
    around = case["op"] == "adaptive_avg_pool" or call.get("p", 2) != 2 or "preferred_element_type" in call
    copied = None in case.get("mapped", ())  # by XLA, for every lane
    return path == "native" and not around and not copied


def close(
    case: Case, path: str | None, name: str, actual: np.ndarray, right: np.ndarray, size: np.ndarray
) -> None:
    note = f"{name}, {path}"
    if actual.dtype.kind == "c":
        actual, right = (np.stack([a.real, a.imag]) for a in (actual, right))
    if actual.dtype.kind in "biu":
        np.testing.assert_array_equal(actual, right, err_msg=note)
        return
    dtype = actual.dtype
    if name == "second" or (actual.dtype.itemsize > jnp.dtype(case["dtype"]).itemsize and name != "value"):
        dtype = jnp.dtype(case["dtype"])
    # A derivative of a derivative is rounded two times in between.
    rounding = oracle.tolerance(dtype, terms(case)) + {"value": 0, "second": 3}.get(name, 1) * float(
        jnp.finfo(dtype).eps
    )
    limit = float(jnp.finfo(actual.dtype).smallest_subnormal)
    if not keeps_subnormals(case, path) or name != "value" or len(case["shapes"]) > 2:
        # XLA adds the parts of a derivative, and biases.
        limit = max(
            limit, 4 * terms(case) * float(np.finfo(np.float64 if dtype == np.float64 else np.float32).tiny)
        )
    error = np.abs(actual.astype(np.float64) - right)
    allowed = rounding * np.abs(size) + limit
    same = (actual.astype(np.float64) == right) | (np.isnan(actual.astype(np.float64)) & np.isnan(right))
    wrong = ~(same | (error <= allowed))
    # What is rounded to infinity.
    most = float(jnp.finfo(actual.dtype).max)
    wrong &= ~((actual.astype(np.float64) == np.sign(right) * np.inf) & (np.abs(right) + allowed > most))
    if name != "value":
        # Parts of a derivative are rounded apart, and may each be beyond the range of the type.
        wrong &= np.isfinite(actual.astype(np.float64)) | ~(np.abs(size) > float(jnp.finfo(dtype).max))
    if multiplies_zeros(case, path):
        wrong &= ~np.isnan(actual.astype(np.float64))
    if np.any(wrong):
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{note}: {wrong.sum()} of {wrong.size} numbers differ, that at {at} is {actual[at]}, "
            f"not {right[at]}: an error of {error[at]:.3g}, {allowed[at]:.3g} is allowed"
        )


def multiplies_zeros(case: Case, path: str | None) -> bool:
    """Whether there may be more NaN than the reference has.

    StableHLO multiplies the zeros of padded edges. In the gradient of a convolution with both strides and
    input dilation, the results that were not picked are zeros.
    """
    if case["values"] != "special" or not case["op"].startswith("conv"):
        return False
    strides, expansion = (np.atleast_1d(case["call"].get(name, 1)) for name in ("strides", "input_dilation"))
    return path != "native" or (bool(np.any(strides > 1)) and bool(np.any(expansion > 1)))


def terms(case: Case) -> int:
    """Of a sum, at the most; errors of powers grow with them."""
    order = case["call"].get("p", 1)
    return (
        max(math.prod(shape) for shape in case["shapes"])
        * (1 if math.isinf(order) else math.ceil(order)) ** 2
    )
