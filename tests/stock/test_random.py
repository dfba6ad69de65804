"""Random stock operations, accelerated and not: values, tangents, gradients, and tangents of gradients.

Stock convolutions are computed in float64: in float32 XLA's CPU compiler reads beside the array where
padding is negative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest

import jax_mps
import stock_random

pytestmark = pytest.mark.usefixtures("native")

GROUP = 25
"""Operations of a test: most of the time of one alone would go into starting it."""

DTYPES = (*["float32"] * 4, "float64", "float16", "bfloat16")
"""Types of operations, in turn."""

ROUNDING = {"float64": 1e-12, "float32": 2e-5, "float16": 2e-2, "bfloat16": 1e-1}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`--random N` says how many operations of each kind there are."""
    metafunc.parametrize("first", range(0, metafunc.config.getoption("--random"), GROUP))


def derivatives(f: Callable[..., Any], operands: Sequence[np.ndarray], seed: int) -> dict[str, Any]:
    """What is compared, from one program."""
    rng = np.random.default_rng(seed)
    like = jax.eval_shape(f, *operands)
    tangents = tuple(rng.standard_normal(x.shape).astype(x.dtype) for x in operands)
    cotangent = rng.standard_normal(like.shape).astype(like.dtype)

    def everything(operands: Any, tangents: Any, cotangent: Any) -> dict[str, Any]:
        def gradient(*operands: Any) -> Any:
            return jax.vjp(f, *operands)[1](cotangent)

        value, tangent = jax.jvp(f, operands, tangents)
        gradients, second = jax.jvp(gradient, operands, tangents)
        return {"value": value, "tangent": tangent, "gradient": gradients, "second": second}

    found = jax.jit(everything)(tuple(operands), tangents, cotangent)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), found)


def compare(
    case: stock_random.Case, seed: int, reference: Any = np.float64, skip: Sequence[str] = ()
) -> tuple[Any, ...]:
    """Stock and accelerated, compared; returns what was lowered."""
    wanted = derivatives(case.function, [x.astype(reference) for x in case.operands], seed)
    with jax_mps.accelerate() as handle:
        found = derivatives(case.function, case.operands, seed)
    rounding = {"float64": 1e-12, "float32": 2e-5, "float16": 2e-2, "bfloat16": 1e-1}[
        case.operands[0].dtype.name
    ]
    for name, expected in wanted.items():
        if name in skip:
            continue
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found[name]), strict=True):
            size = np.abs(a[np.isfinite(a)]).max(initial=1e-3)
            note = f"{name}: {case.note}"
            np.testing.assert_allclose(b, a, rtol=rounding, atol=rounding * size, err_msg=note)
    return handle.report().rows


def test_convolutions(x64: None, first: int) -> None:
    seeds = range(first, first + GROUP)
    cases = {seed: stock_random.convolution(seed, DTYPES[seed % len(DTYPES)]) for seed in seeds}
    rows = [row for seed, case in cases.items() for row in compare(case, seed)]
    ours = sum(row.ours for row in rows)
    assert ours > 0.6 * len(rows)
    known = ("no array can be the image", "0.85")
    assert all(row.ours or any(why in row.why for why in known) for row in rows)


@pytest.mark.parametrize("kind", ["max", "min", "sum"])
def test_windows(x64: None, kind: str, first: int) -> None:
    """The odd ones with ties, NaN and infinities, whose gradients are where stock JAX has them."""
    rows: list[Any] = []
    for seed in range(first, first + GROUP):
        dtype = DTYPES[seed % len(DTYPES)]
        case = stock_random.reduction(seed, kind, dtype, special=bool(seed % 2))
        if case.differentiable:
            # In which order XLA compares equal maxima for a tangent depends on the shape.
            skip = ("tangent", "second") if seed % 2 and kind != "sum" else ()
            wide = kind == "sum" or dtype == "float64"
            rows += compare(case, seed, np.float64 if wide else np.float32, skip)
    assert any(row.ours for row in rows)
    refusals = ("no axis is windowed", "windows over 4 axes", "windows over 5 axes")
    assert all(row.ours or row.why.startswith(refusals) for row in rows)
