"""The tables of docs/differences.md that depend on the path; the examples of the page are doctests."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mps

PAGE = (Path(__file__).parents[2] / "docs" / "differences.md").read_text()


def line(*values: float) -> jax.Array:
    return jnp.array(values, jnp.float32).reshape(1, -1, 1)


TINY = line(1e-40, 1e-40)
ONES = line(1.0, 1.0).reshape(2, 1, 1)
AT = jnp.zeros((1, 1, 1), jnp.int32)

SUBNORMAL: dict[str, Callable[[str], jax.Array]] = {
    "`max_pool` of 0, 1e-40": lambda path: jax_mps.max_pool(
        line(0, 1e-40), 2, strides=2, implementation=path
    ),
    "index of the maximum of 1e-40, 2e-40": lambda path: jax_mps.max_pool(
        line(1e-40, 2e-40), 2, strides=2, return_indices=True, implementation=path
    )[1],
    "`avg_pool` of 1e-40, 1e-40": lambda path: jax_mps.avg_pool(TINY, 2, strides=2, implementation=path),
    "`l2_pool` of 1e-40, 1e-40": lambda path: jax_mps.l2_pool(TINY, 2, strides=2, implementation=path),
    "`l2_pool_gradient` of 1e-40, 1e-40, for a gradient of 1": lambda path: jax_mps.l2_pool_gradient(
        line(1.0), TINY, 2, strides=2, implementation=path
    ),
    "`conv` of 1e-40, 1e-40 with ones": lambda path: jax_mps.conv(TINY, ONES, implementation=path),
    "`max_unpool` of 1e-40": lambda path: jax_mps.max_unpool(line(1e-40), AT, (1,), implementation=path),
    "`max_pool_gradient` of 1e-40": lambda path: jax_mps.max_pool_gradient(
        line(1e-40), line(1), 1, strides=1, implementation=path
    ),
}


def told(row: str) -> list[str]:
    found = re.search(rf"^\| {re.escape(row)} \| (.*) \|$", PAGE, re.MULTILINE)
    assert found, row
    return found[1].split(" | ")


@pytest.mark.parametrize("row", SUBNORMAL)
@pytest.mark.usefixtures("native")
def test_native_kernels_keep_subnormal_numbers(row: str) -> None:
    expected = [float(value) for value in told(row)[0].split(", ")]
    np.testing.assert_allclose(np.asarray(SUBNORMAL[row]("native")).ravel(), expected, rtol=1e-4)


def test_infinity_and_padding(implementation: str) -> None:
    kernel = line(jnp.inf, 1.0, 1.0).reshape(3, 1, 1)
    y = jax_mps.conv(line(1.0, 2.0), kernel, padding=1, implementation=implementation)
    (row,) = told("`conv`, native" if implementation == "native" else "`conv`, StableHLO on the CPU")
    np.testing.assert_array_equal(y.ravel(), [float(value) for value in row.split(", ")])
