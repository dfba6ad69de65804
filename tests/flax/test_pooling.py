"""Flax's pooling functions, ours beside its own: values, gradients, and where Flax is wrong."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mps
from jax_mps.flax import linen, nnx


def image(shape: tuple[int, ...], dtype: Any = np.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(-50, 50, shape), dtype)


class Case(NamedTuple):
    shape: tuple[int, ...]
    window_shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    padding: Any = "VALID"


CASES = [
    Case((2, 9, 3), (3,), (2,), "SAME"),
    Case((9, 3), (3,), (2,), ((1, 2),)),
    Case((2, 7, 6, 3), (3, 2), (2, 2), ((1, 1), (0, 1))),
    Case((2, 7, 6, 3), (3, 2), None, "SAME"),
    Case((2, 2, 7, 6, 3), (3, 2), (2, 2), "SAME"),
    Case((1, 4, 5, 4, 2), (2, 2, 3), (2, 2, 1), ((0, 0), (1, 0), (1, 1))),
]


@pytest.mark.parametrize("name", ["max_pool", "min_pool", "avg_pool", "avg_pool_without_pad"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_flax(name: str, case: Case) -> None:
    options = {"count_include_pad": False} if name == "avg_pool_without_pad" else {}
    name = name.removesuffix("_without_pad")
    x = image(case.shape)

    def value_and_gradient(function: Any) -> Any:
        def total(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = function(x, *case[1:], **options)
            return jnp.sum(y * jnp.arange(y.size).reshape(y.shape)), y

        gradient, y = jax.jit(jax.grad(total, has_aux=True))(x)
        return y, gradient

    assert getattr(nnx, name) is getattr(linen, name)
    actual, expected = (value_and_gradient(getattr(module, name)) for module in (linen, flax.nnx))
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "uint32", "bool", "bfloat16", "float16"])
def test_types(dtype: str) -> None:
    bounds = jnp.iinfo(dtype) if "int" in dtype else None
    values = [bounds.min, bounds.max, 3, 5, 2, 2] if bounds else [0, 1, 3, 5, -2, 2]
    x = jnp.asarray(np.array(values).astype(dtype)).reshape(1, 6, 1)
    for name in ("max_pool", "min_pool"):
        actual, expected = (getattr(m, name)(x, (2,), (1,), ((1, 0),)) for m in (linen, flax.nnx))
        assert actual.dtype == expected.dtype == x.dtype
        np.testing.assert_array_equal(actual, expected, err_msg=name)
    # Flax adds up the integers in their own type.
    average = linen.avg_pool(x, (2,), (2,))
    assert average.dtype == (x.dtype if "float" in dtype else jnp.float32)
    exact = np.asarray(x, np.float32).reshape(3, 2).mean(1)
    np.testing.assert_allclose(np.asarray(average, np.float32).ravel(), exact, rtol=1e-6)


def test_nan_and_infinity() -> None:
    x = jnp.array([1.0, jnp.nan, 2.0, jnp.inf, -jnp.inf, -jnp.inf]).reshape(1, 6, 1)
    for name in ("max_pool", "min_pool"):
        actual, expected = (getattr(m, name)(x, (2,), (2,), ((0, 1),)) for m in (linen, flax.nnx))
        np.testing.assert_array_equal(actual, expected, err_msg=name)


def test_windows_as_ints_and_lists() -> None:
    x = image((2, 6, 6, 1))
    expected = linen.max_pool(x, (2, 2), (2, 2))
    np.testing.assert_array_equal(linen.max_pool(x, 2, 2), expected)
    np.testing.assert_array_equal(linen.max_pool(x, [2, 2], [2, 2], [(0, 0), (0, 0)]), expected)


def test_negative_pads() -> None:
    """Flax crops, but cannot differentiate."""
    x = image((2, 7, 6, 3))
    y = linen.max_pool(x, (2, 2), (2, 2), ((-1, 1), (0, -2)))
    np.testing.assert_array_equal(y, flax.nnx.max_pool(x, (2, 2), (2, 2), ((-1, 1), (0, -2))))
    gradient = jax.grad(lambda x: linen.max_pool(x, (2, 2), (2, 2), ((-1, 1), (0, -2))).sum())(x)
    expected = jax.grad(lambda x: flax.nnx.max_pool(x[:, 1:, :-2], (2, 2), (2, 2), ((0, 1), (0, 0))).sum())(x)
    np.testing.assert_array_equal(gradient, expected)


def test_beyond_flax() -> None:
    x = image((2, 3, 7, 8, 1)).astype(jnp.float32)  # two batch axes and pads
    options: dict[str, Any] = {"padding": ((1, 0), (1, 1)), "window_dilation": (2, 1), "ceil_mode": True}
    for name in ("max_pool", "avg_pool", "l2_pool"):
        actual = getattr(linen, name)(x, (2, 3), (2, 2), **options)
        expected = getattr(jax_mps, name)(x, (2, 3), strides=(2, 2), **options)
        np.testing.assert_array_equal(actual, expected, err_msg=name)
    np.testing.assert_array_equal(
        linen.min_pool(x, (2, 3), (2, 2), **options), -linen.max_pool(-x, (2, 3), (2, 2), **options)
    )
    np.testing.assert_array_equal(
        linen.avg_pool(x, (2, 2), (2, 2), divisor_override=1), 4 * linen.avg_pool(x, (2, 2), (2, 2))
    )
    y, indices = linen.max_pool(x, (2, 2), (2, 2), return_indices=True)
    np.testing.assert_array_equal(y, linen.max_pool(x, (2, 2), (2, 2)))
    back = linen.max_unpool(y, indices, (7, 8))
    np.testing.assert_array_equal(linen.max_pool(jnp.where(back == 0, -99, back), (2, 2), (2, 2)), y)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: linen.max_pool(x * 1j, (2,)), TypeError, ["inputs", "complex64"]),
        (lambda x: linen.min_pool(x * 1j, (2,)), TypeError, ["inputs", "complex64"]),
        (lambda x: linen.l2_pool(x.astype(int), (2,)), TypeError, ["inputs", "int32"]),
        (lambda x: linen.max_pool(x, (2,), (1,), ((5, 0),)), ValueError, ["padding", "(5, 0)", "window 0"]),
        (lambda x: linen.max_pool(x, (9,)), ValueError, ["window_shape", "9", "below 1"]),
        (lambda x: linen.avg_pool(x, (2,), (1,), "CIRCULAR"), ValueError, ["padding", "CIRCULAR"]),
        (lambda x: linen.avg_pool(x, (2, 2), (1,)), ValueError, ["strides"]),
    ],
)
def test_errors(call: Any, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call(jnp.zeros((1, 4, 1)))
    assert all(word in str(caught.value) for word in words), caught.value


# --- where Flax is wrong ------------------------------------------------------------------------------


def test_half_precision_averages() -> None:
    x = jnp.ones((1, 32, 32, 1), jnp.bfloat16)
    flax_average, ours = (m.avg_pool(x, (32, 32)).item() for m in (flax.nnx, nnx))
    assert (flax_average, ours) == (0.25, 1.0)
    wide = jnp.ones((1, 63, 63, 1), jnp.bfloat16)
    flax_gradient, ours = (
        jax.grad(lambda x, m=m: m.avg_pool(x, (32, 32)).astype(float).sum())(wide)[0, 31, 31, 0].item()
        for m in (flax.nnx, nnx)
    )
    assert (flax_gradient, ours) == (0.25, 1.0)


def test_average_without_pad_keeps_the_type() -> None:
    x = jnp.ones((1, 5, 1), jnp.bfloat16)
    options: dict[str, Any] = {"padding": "SAME", "count_include_pad": False}
    assert flax.nnx.avg_pool(x, (3,), **options).dtype == jnp.float32
    assert nnx.avg_pool(x, (3,), **options).dtype == jnp.bfloat16


def test_divisor_is_no_sum_over_ones() -> None:
    """Flax sums ones in windows, which XLA folds when it compiles: half a minute for 128 pixels cubed."""
    x = jnp.ones((1, 128, 128, 128, 1))

    def program(module: Any) -> str:
        pool = lambda x: module.avg_pool(x, (3, 3, 3), padding="SAME", count_include_pad=False)  # noqa: E731
        return jax.jit(pool).lower(jax.ShapeDtypeStruct(x.shape, x.dtype)).as_text()

    assert program(flax.nnx).count("reduce_window") == 2
    ours = program(nnx)
    assert "reduce_window" not in ours
    assert "128x128x128x1xf32> dense" not in ours  # nor a constant as large as the image


def test_complex_averages_as_flax() -> None:
    x = jax.lax.complex(image((2, 9, 3)), image((2, 9, 3))[::-1])
    actual, expected = (m.avg_pool(x, (3,), (2,), "SAME", False) for m in (linen, flax.nnx))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["max_pool", "min_pool"])
def test_maxima_of_wide_and_narrow_types_as_flax(name: str, x64: None) -> None:
    for dtype, scale in (("int64", 2**40), ("uint64", 2**40), ("float8_e4m3fn", 1), ("float8_e5m2", 1)):
        x = (jnp.arange(12) * 5 % 7 * scale).reshape(1, 12, 1).astype(dtype)
        actual, expected = (
            getattr(m, name)(x.astype(t), (3,), (2,)) for m, t in ((linen, dtype), (flax.nnx, "float64"))
        )
        assert actual.dtype == dtype
        np.testing.assert_array_equal(actual.astype("float64"), expected)
