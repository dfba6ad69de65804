"""A network in plain `jax.lax` that has every operation that `accelerate()` knows, and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jax_mps

Array = Any

OPERATIONS = {
    "conv_general_dilated",
    "reduce_window_max",
    "reduce_window_min",
    "reduce_window_sum",
    "select_and_scatter_add",
}
"""What its gradient lowers."""


def arrays(batch: int = 2) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Kernels and images."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32) / 4

    return (draw(3, 3, 3, 6), draw(3, 3, 1, 6), draw(4, 4, 6, 2)), draw(batch, 12, 10, 3)


def block(kernels: tuple[Array, ...], x: Array) -> Array:
    """A convolution, poolings, a depthwise and a transposed convolution; channels last."""
    dense, depthwise, transposed = kernels
    dims = ("NHWC", "HWIO", "NHWC")
    halves = ((1, 2, 2, 1), (1, 2, 2, 1), "SAME")
    x = lax.conv_general_dilated(x, dense, (1, 1), "SAME", dimension_numbers=dims)
    largest = lax.reduce_window(x, -np.inf, lax.max, *halves)
    smallest = lax.reduce_window(x, np.inf, lax.min, *halves)
    x = largest + smallest + lax.reduce_window(x, 0.0, lax.add, *halves)
    x = lax.conv_general_dilated(x, depthwise, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=6)
    return lax.conv_general_dilated(
        jnp.tanh(x), transposed, (1, 1), ((2, 2), (2, 2)), (2, 2), dimension_numbers=dims
    )


def loss(kernels: tuple[Array, ...], x: Array) -> Array:
    """A nonlinear scalar."""
    return jnp.sum(jnp.sin(block(kernels, x)))


gradient = jax.grad(loss, argnums=(0, 1))


def check(f: Callable[..., Any], *operands: Any) -> jax_mps.stock.report.Report:
    """Compares `f` with what stock JAX computes; returns what was lowered."""
    expected = f(*operands)
    with jax_mps.accelerate() as handle:
        found = f(*operands)
    assert_close(found, expected)
    return handle.report()


def assert_close(found: Any, expected: Any) -> None:
    """Equal to the rounding of float32."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        # Small sums have terms as large as those of the largest.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=max(1e-5, 1e-6 * np.abs(b).max(initial=0)))
