"""The parts of `.ci/soak` that draw calls: a few of them, and that a fault is found and made small."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import jax_mps
from soak import differential, stock
from soak.families import FAMILIES
from soak.record import Case

pytestmark = pytest.mark.usefixtures("native")


@pytest.mark.parametrize("number", range(3))
def test_functions(number: int) -> None:
    pytest.importorskip("torch")
    differential.step(0, number, differential.check, examples=6)


def test_stock_operations() -> None:
    stock.step(0, 0, stock.check, operations=8)


def test_cases_are_the_same_again() -> None:
    drawn: list[Case] = []
    for _ in range(2):
        differential.step(5, 7, drawn.append, examples=10)
    assert drawn[: len(drawn) // 2] == drawn[len(drawn) // 2 :]


def test_a_fault_is_found_and_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last number of every row of three or more is wrong."""

    def faulty(y: Any, indices: Any, output_shape: Any, **call: Any) -> Any:
        x = jax_mps.max_unpool(y, indices, output_shape, **call)
        return x.at[..., 2].set(x[..., 0]) if x.shape[-1] >= 3 else x

    faulty_family = dataclasses.replace(FAMILIES["max_unpool"], function=faulty)
    monkeypatch.setitem(FAMILIES, "max_unpool", faulty_family)
    failing: list[Case] = []

    def check(case: Case) -> None:
        try:
            differential.check(case)
        except AssertionError:
            failing.append(case)
            raise

    with pytest.raises(AssertionError, match=r"numbers differ|not equal"):
        differential.step(0, 0, check, names=["max_unpool"])
    smallest = failing[-1]
    assert smallest["shapes"][0][-1] <= 3
    assert smallest["values"] == "normal"
    assert smallest["transformation"] == "value"
    assert "mapped" not in smallest
