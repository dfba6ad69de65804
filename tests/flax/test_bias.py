"""Biases of layers in half precision: their gradients are sums of many numbers, which have to be float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_arrays import numbers, operand
from jax_mps.flax import linen, nnx

HALVES = ["bfloat16", "float16"]
PADDINGS = ["SAME", "VALID", "CIRCULAR", 0]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layer", ["Conv", "ConvTranspose"])
def test_gradient_to_the_bias_is_summed_in_float32(layer: str, dtype: str, padding: Any) -> None:
    """In half precision sums of equal numbers end at 2 ** 8 or 2 ** 11 of them, and float16 overflows."""
    x = jnp.zeros((32, 64, 64, 1))
    half: Any = jnp.dtype(dtype)

    def check(y: Any, gradient: Any) -> None:
        assert y.dtype == half
        np.testing.assert_allclose(gradient(lambda y: jnp.mean(y.astype(jnp.float32))), 1, rtol=2e-3)
        squares = gradient(lambda y: jnp.mean((y.astype(jnp.float32) - 0.125) ** 2))
        np.testing.assert_allclose(squares, -0.25, rtol=2e-3)
        np.testing.assert_allclose(gradient(lambda y: jnp.sum(y.astype(jnp.float32)) / 64), 2048, rtol=2e-3)

    module = getattr(linen, layer)(1, (1, 1), dtype=half, padding=padding)
    variables = module.init(jax.random.key(0), x)
    check(
        module.apply(variables, x),
        lambda loss: jax.grad(lambda v: loss(module.apply(v, x)))(variables)["params"]["bias"],
    )
    nnx_layer = getattr(nnx, layer)(1, 1, (1, 1), dtype=half, padding=padding, rngs=nnx.Rngs(0))

    def of_nnx(loss: Any) -> Any:
        return nnx.to_pure_dict(nnx.grad(lambda layer: loss(layer(x)))(nnx_layer))["bias"]

    check(nnx_layer(x), of_nnx)


@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layer", ["Conv", "ConvTranspose"])
def test_one_rounding(layer: str, dtype: str, padding: str) -> None:
    """The result is the sum in float32, rounded; so are the gradients of half precision parameters."""
    x = operand(2, 6, 5, 3)
    options: dict[str, Any] = {
        "padding": padding,
        "strides": (2, 1),
        "kernel_init": numbers,
        "bias_init": numbers,
    }
    half: Any = jnp.dtype(dtype)
    narrow = getattr(linen, layer)(4, (3, 4), dtype=half, param_dtype=half, **options)
    wide = getattr(linen, layer)(4, (3, 4), dtype=jnp.float32, **options)
    x = x.astype(half)
    variables = narrow.init(jax.random.key(0), x)
    same = jax.tree.map(lambda a: a.astype(jnp.float32), variables)
    expected = wide.apply(same, x.astype(jnp.float32))
    actual = jax.jit(narrow.apply)(variables, x)
    assert actual.dtype == half
    # Sums in another order may lie on the other side of the middle of two numbers.
    step = float(jnp.finfo(half).eps)
    np.testing.assert_allclose(actual.astype(jnp.float32), expected, rtol=0.51 * step, atol=1e-5)
    g = operand(*actual.shape).astype(half)
    gradients = jax.vjp(narrow.apply, variables, x)[1](g)
    like = jax.vjp(wide.apply, same, x.astype(jnp.float32))[1](g.astype(jnp.float32))
    for a, e in zip(jax.tree.leaves(gradients), jax.tree.leaves(like), strict=True):
        assert a.dtype == half
        np.testing.assert_allclose(a.astype(jnp.float32), e, rtol=2 * step, atol=step * np.abs(e).max())


def test_a_given_convolution_is_left_alone() -> None:
    x = jnp.ones((1, 4, 2), jnp.bfloat16)
    layer = linen.Conv(3, (2,), dtype=jnp.bfloat16, conv_general_dilated=jax.lax.conv_general_dilated)
    assert layer.init_with_output(jax.random.key(0), x)[0].dtype == jnp.bfloat16
    assert not isinstance(layer.conv_general_dilated, linen.Convolution)


def test_strict_promotion_of_layers_in_half_precision() -> None:
    x = jnp.ones((1, 4, 2), jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        layer = linen.Conv(3, (2,), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        if hasattr(layer, "promote_dtype"):
            assert layer.init_with_output(jax.random.key(0), x)[0].dtype == jnp.bfloat16
