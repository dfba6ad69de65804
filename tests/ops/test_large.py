"""Arrays of more than 2**31 elements: every position is computed in 64 bits."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jax_mps

needs_memory = pytest.mark.full  # 2 to 4 GiB

N = 2**31 + 2**20
ROW = 2**13
FAR = (2**18 + 64) * ROW + 64 * 5 + 1


@pytest.fixture
def image():
    """More than 2**31 bytes of zeros with a few numbers, some of them behind 2**31."""
    x = np.zeros(N, np.int8)
    x[[7, 2**31 - 1, 2**31, FAR]] = [3, 5, 7, 9]
    return x


def where(y):
    y = np.asarray(y).ravel()
    return {int(i): int(y[i]) for i in np.flatnonzero(y)}


@needs_memory
def test_a_long_axis(image, implementation):
    """Channels first: one axis of 2**31 pixels and more, windows of 2**16 that touch each other."""
    pool = jax.jit(
        lambda x: jax_mps.max_pool(
            x, 2**16, strides=2**16, data_format="channels_first", implementation=implementation
        )
    )
    y = pool(image.reshape(1, 1, N))
    assert y.shape == (1, 1, N // 2**16)
    assert where(y) == {0: 3, 2**15 - 1: 5, 2**15: 7, FAR // 2**16: 9}


@needs_memory
def test_a_large_plane(image, implementation):
    """Channels last: two axes, windows of 2 x 2 pixels far apart, two of which hold a number."""

    @jax.jit
    def pool(x):
        return jax_mps.max_pool(x, 2, strides=64, implementation=implementation)

    y = pool(image.reshape(1, N // ROW, ROW, 1))
    columns = ROW // 64
    assert y.shape == (1, N // ROW // 64, columns, 1)
    assert where(y) == {2**18 // 64 * columns: 7, (2**18 + 64) // 64 * columns + 5: 9}


@needs_memory
def test_a_gradient_of_a_large_image(native):
    """The native kernel alone: XLA's needs a float32 copy of the image, too much memory for a test."""
    shape = (1, N // 2**12, 2**12, 1)
    outs = ((shape[1] - 1) // 2**10 + 1, 4)
    g = np.arange(1, 1 + outs[0] * 4, dtype=np.float16).reshape(1, *outs, 1)
    spread = jax.jit(
        lambda g: jax_mps.avg_pool_gradient(
            g, shape, (1, 2**10), strides=(2**10, 2**10), divisor_override=1, implementation="native"
        )
    )
    dx = np.asarray(spread(g))
    assert dx.size > 2**31
    rows = np.arange(0, shape[1], 2**10)
    np.testing.assert_array_equal(dx[0, rows, ::512, 0], np.repeat(g[0, :, :, 0], 2, axis=1))
    assert not dx[0, -1].any()
    assert not dx[0, rows[-1] + 1].any()


def test_planes_too_large_for_int32_positions():
    x = jax.ShapeDtypeStruct((1, 2**16, 2**15, 1), np.int8)
    with pytest.raises(ValueError, match=r"return_indices=True needs spatial planes below 2\*\*31"):
        jax.eval_shape(lambda x: jax_mps.max_pool(x, 2, strides=2, return_indices=True), x)
    largest = jax.ShapeDtypeStruct((1, 2**31 - 1, 1), np.int8)
    y, at = jax.eval_shape(lambda x: jax_mps.max_pool(x, 2, strides=2, return_indices=True), largest)
    assert y.shape == at.shape == (1, 2**30 - 1, 1)
