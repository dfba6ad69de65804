"""Random stock operations, accelerated and not: values, tangents, gradients, and tangents of gradients.

Stock convolutions are computed in float64: in float32 XLA's CPU compiler reads beside the array where
padding is negative.
"""

from __future__ import annotations

from typing import Any

import pytest

import stock_random
from stock_random import DTYPES, compare

pytestmark = pytest.mark.usefixtures("native")

GROUP = 25
"""Operations of a test: most of the time of one alone would go into starting it."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`--random N` says how many operations of each kind there are."""
    metafunc.parametrize("first", range(0, metafunc.config.getoption("--random"), GROUP))


def test_convolutions(x64: None, first: int) -> None:
    seeds = range(first, first + GROUP)
    cases = {seed: stock_random.convolution(seed, DTYPES[seed % len(DTYPES)]) for seed in seeds}
    rows = [row for seed, case in cases.items() for row in compare(case, seed)]
    ours = sum(row.ours for row in rows)
    assert ours > 0.6 * len(rows)
    assert all(row.ours or any(why in row.why for why in stock_random.REFUSED_CONVOLUTIONS) for row in rows)


@pytest.mark.parametrize("kind", ["max", "min", "sum"])
def test_windows(x64: None, kind: str, first: int) -> None:
    """The odd ones with ties, NaN and infinities, whose gradients are where stock JAX has them."""
    rows: list[Any] = []
    for seed in range(first, first + GROUP):
        dtype = DTYPES[seed % len(DTYPES)]
        special = bool(seed % 2)
        case = stock_random.reduction(seed, kind, dtype, special=special)
        if case.differentiable:
            rows += stock_random.compare_windows(case, seed, kind, special)
    assert any(row.ours for row in rows)
    assert all(row.ours or row.why.startswith(stock_random.REFUSED_WINDOWS) for row in rows)
