"""Arrays for the tests of the Flax layers, and their comparison."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mps.flax import nnx

needs_nnx_lists = pytest.mark.skipif(not hasattr(nnx, "List"), reason="this Flax is older than nnx.List")


class LayerCase(NamedTuple):
    """A layer, and the image that it is given."""

    shape: tuple[int, ...]
    features: int
    kernel_size: int | tuple[int, ...]
    options: dict[str, Any] = {}  # noqa: RUF012
    input_dtype: Any = jnp.float32
    tolerance: float = 1e-5
    ours: bool = True
    """Whether it is computed by this library."""


def operand(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


def numbers(key: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """An initialiser; those of JAX take seconds to compile for every shape."""
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), dtype)


def filled(shapes: Any) -> Any:
    """Parameters and statistics of these shapes that keep the variance."""
    random = np.random.default_rng(0)

    def fill(path: Any, like: Any) -> jax.Array:
        array = random.standard_normal(like.shape)
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(1 + np.abs(array), jnp.float32)
        return jnp.asarray(array * math.sqrt(2 / max(math.prod(like.shape[:-1]), 1)), jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def filled_linen(model: Any, x: jax.Array) -> Any:
    """Variables of a Linen module."""
    return filled(jax.eval_shape(model.init, jax.random.key(0), x))


def filled_nnx(make: Any) -> Any:
    """The NNX module that `make` makes of random numbers, with others."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, filled(nnx.to_pure_dict(state)))
    return nnx.merge(graph, state)


def close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """The same trees and types and, to a tolerance of the greatest value, numbers."""
    structure: Any = jax.tree.structure(actual)
    assert structure == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        wide = np.complex128 if jnp.issubdtype(theirs.dtype, jnp.complexfloating) else np.float64
        ours, theirs = np.asarray(ours, wide), np.asarray(theirs, wide)
        scale = np.abs(theirs).max(initial=1)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale)
