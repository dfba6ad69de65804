"""ONNX's own cases of poolings and convolutions, on both paths and in accelerated stock JAX."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jax_mps
import peers
import stock_calls

pytest.importorskip("onnx")

import onnx_nodes

CASES = onnx_nodes.cases()


def of_kind(kind: str) -> list[onnx_nodes.Case]:
    return [case for case in CASES if case.kind == kind]


FOUR_DIGITS = {"test_averagepool_2d_ceil_last_window_starts_on_pad"}
"""Cases whose images and outputs ONNX writes down with four digits."""


def check(found: list[Any], case: onnx_nodes.Case) -> None:
    for actual, expected in zip(found, onnx_nodes.expected(case), strict=True):
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), case.name
        size = np.abs(expected.astype(np.float64)).max(initial=0)
        # ONNX allows a thousandth. Sums of some hundred products in float32 are nearer.
        most = 1e-4 if case.name in FOUR_DIGITS else 1e-5 * size
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=most, err_msg=case.name)


def run(cases: list[onnx_nodes.Case], functions: Any) -> None:
    """All cases in one program."""

    def program(images: list[Any]) -> list[list[Any]]:
        return [
            onnx_nodes.run(case._replace(inputs=[x, *case.inputs[1:]]), functions)
            for case, x in zip(cases, images, strict=True)
        ]

    results = jax.jit(program)([case.inputs[0] for case in cases])
    for found, case in zip(results, cases, strict=True):
        check(found, case)


def test_all_are_there() -> None:
    assert {case.kind for case in CASES} == set(onnx_nodes.KINDS)
    assert len(CASES) > 100


@pytest.mark.parametrize("kind", onnx_nodes.KINDS)
def test_ours(kind: str, implementation: str) -> None:
    run(of_kind(kind), peers.ours(implementation))


@pytest.mark.parametrize("kind", sorted({*onnx_nodes.KINDS} - {"LpPool", "MaxUnpool"}))
def test_accelerated(native: None, kind: str) -> None:
    cases = [case for case in of_kind(kind) if len(case.outputs) == 1]
    with jax_mps.accelerate() as handle:
        run(cases, stock_calls)
    rows = handle.report().rows
    assert len(rows) >= len(cases)
    assert all(row.ours for row in rows), handle.report()
