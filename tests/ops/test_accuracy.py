"""Sums over large windows: the error does not grow with the number of taps.

Windows hold equal numbers, so the mean is known, and every addition rounds in the same direction: that is the
worst case of a sum.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mps

ERROR = {"float32": 2e-6, "bfloat16": 2.0**-8, "float16": 2.0**-10}
"""Relative; of half precision the rounding of the result."""


def of_rank(x: np.ndarray, data_format: str) -> np.ndarray:
    """An image with its channels, which are last, where the format has them."""
    return np.moveaxis(x, -1, 1) if data_format == "channels_first" else x


def error(got: jax.Array, wanted: float) -> float:
    return float(jnp.max(jnp.abs(got.astype(jnp.float32) / wanted - 1)))


LARGE = [((2**24,), 1), ((4096, 4096), 1), ((256, 256, 256), 1), ((3, 5, 2**19), 2), ((1000, 999), 16)]
"""Windows, and channels of the image."""


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    ("dtype", "window", "channels"),
    [("float32", *case) for case in LARGE]
    + [(half, *LARGE[i]) for half in ("bfloat16", "float16") for i in (1, 4)],
)
def test_large_windows(window, channels, data_format, dtype, implementation):
    """Means and norms, with and without a window that reaches beyond the image."""
    value, most = float(jnp.asarray(0.7, dtype)), ERROR[dtype]
    if implementation == "xla" and dtype == "float32" and jax.__version_info__ < (0, 10):
        most = 3e-4  # this XLA may sum axes together, and add 32 numbers an axis one after the other
    x = of_rank(np.full((1, *window, channels), value, jnp.dtype(dtype)), data_format)
    how = {"strides": window, "data_format": data_format, "implementation": implementation}
    assert error(jax_mps.avg_pool(x, window, **how), value) <= most
    behind = [(0, n // 8) for n in window]
    y = jax_mps.avg_pool(x, window, padding=behind, count_include_pad=False, **how)
    assert error(y, value) <= most
    if dtype != "float16":  # whose norms overflow
        norm = value * math.sqrt(math.prod(window))
        assert error(jax_mps.l2_pool(x, window, **how), norm) <= most


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(("window", "channels"), [((2**13,), 1), ((150, 150), 8), ((30, 30, 30), 4)])
@pytest.mark.parametrize("count_include_pad", [True, False])
def test_pixels_of_many_windows(count_include_pad, window, channels, data_format, implementation):
    """Every pixel is read by as many windows as these have taps, and gets a share of each."""
    size = tuple(2 * n for n in window)
    x = of_rank(np.full((1, *size, channels), 0.7, np.float32), data_format)
    counted = [np.minimum(np.arange(2 * n + n - 1) + 1, n) for n in window]
    shares = (
        [np.minimum(c, c[::-1]) for c in counted]
        if not count_include_pad
        else [np.full(3 * n - 1, n) for n in window]
    )
    along = [np.convolve(1 / s, np.ones(n), "valid") for s, n in zip(shares, window, strict=True)]
    wanted = 0.7 * along[0]
    for a in along[1:]:
        wanted = wanted[..., None] * a
    wanted = of_rank(np.broadcast_to(wanted[None, ..., None], (1, *size, channels)), data_format)

    def pool(x):
        return jax_mps.avg_pool(
            x,
            window,
            strides=1,
            padding=[(n - 1, n - 1) for n in window],
            count_include_pad=count_include_pad,
            data_format=data_format,
            implementation=implementation,
        )

    y, pull_back = jax.vjp(pool, x)
    (got,) = pull_back(jnp.full_like(y, np.float32(0.7)))
    np.testing.assert_allclose(got, wanted, rtol=2e-6)


@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "window"), [((1, 40, 40, 3), (40, 40)), ((1, 4000, 1), (4000,)), ((1, 9, 9, 9, 16), (9, 9, 9))]
)
def test_what_is_not_finite_stays(shape, window, dtype, special, native):
    """What is kept of the rounding changes no infinity, of either sign, and no NaN."""
    x = np.ones(shape, np.float32)
    x[(0, *(n // 3 for n in window), 0)] = special
    x = jnp.asarray(x, dtype)
    for pool in (jax_mps.avg_pool, jax_mps.l2_pool):
        y = np.asarray(pool(x, window, strides=window, implementation="native"), np.float32).ravel()
        np.testing.assert_array_equal(y[0], abs(special) if pool is jax_mps.l2_pool else special)
        np.testing.assert_allclose(
            y[1:], 1 if pool is jax_mps.avg_pool else math.sqrt(math.prod(window)), rtol=2e-3
        )
    large = jnp.full(shape, 3e38, jnp.float32)
    assert np.isposinf(jax_mps.avg_pool(large, window, strides=window, implementation="native")).all()
