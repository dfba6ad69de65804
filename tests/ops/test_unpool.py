"""`max_unpool`: values, duplicates, positions outside, derivatives."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import grid
import jax_mps
import oracle


@pytest.fixture
def unpool(implementation):
    return functools.partial(jax_mps.max_unpool, implementation=implementation)


@pytest.mark.parametrize("data_format", grid.FORMATS)
@pytest.mark.parametrize(
    "name", ["halves", "padded", "stem", "inception", "aspp", "crops", "volume", "volume-ceil"]
)
def test_after_max_pool(name, data_format, unpool):
    """Overlapping windows name a pixel several times, each time with the same value."""
    case = grid.CASES[name]
    x = oracle.distinct(case.shape(data_format))
    y, indices = jax_mps.max_pool(
        x, case.window_shape, **case.geometry, data_format=data_format, return_indices=True
    )
    out = jax.jit(lambda y, i: unpool(y, i, case.sizes, data_format=data_format))(y, indices)
    assert out.dtype == y.dtype
    oracle.assert_same(out, oracle.max_unpool(y, indices, case.sizes, data_format=data_format))
    chosen = np.asarray(out) != 0
    oracle.assert_same(np.asarray(out)[chosen], x[chosen])


@pytest.mark.parametrize("data_format", grid.FORMATS)
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_any_indices(batch, data_format, unpool):
    """Duplicates: the last in row-major order stays. Outside of the plane on either side: dropped."""
    shape = (*batch, 4, 3, 5) if data_format == "channels_last" else (*batch, 5, 4, 3)
    y = oracle.distinct(shape)
    indices = np.random.default_rng(0).integers(-3, 15, size=shape).astype(np.int32)
    out = unpool(y, indices, (3, 4), data_format=data_format)
    oracle.assert_same(out, oracle.max_unpool(y, indices, (3, 4), data_format=data_format))


@pytest.mark.parametrize("outside", [-1, -4, 4, 5, 2**31 - 1, -(2**31)])
def test_an_index_outside_is_dropped(outside, unpool):
    y = np.array([5, 7], np.float32).reshape(1, 2, 1)
    indices = np.array([outside, 2], np.int32).reshape(1, 2, 1)
    out, vjp = jax.vjp(lambda y: unpool(y, indices, (4,)), y)
    np.testing.assert_array_equal(out.ravel(), [0, 0, 7, 0])
    np.testing.assert_array_equal(vjp(np.ones_like(out))[0].ravel(), [0, 1])


def test_duplicates(unpool):
    """Not even the larger value stays, but the last; the gradient goes to it alone."""
    y = np.array([3, 9, 4, 8], np.float32).reshape(1, 4, 1)
    indices = np.array([1, 0, 1, 0], np.int32).reshape(1, 4, 1)
    out, vjp = jax.vjp(lambda y: unpool(y, indices, (3,)), y)
    np.testing.assert_array_equal(out.ravel(), [8, 4, 0])
    g = np.array([10, 20, 30], np.float32).reshape(1, 3, 1)
    np.testing.assert_array_equal(vjp(g)[0].ravel(), [0, 0, 20, 10])
    _, tangent = jax.jvp(lambda y: unpool(y, indices, (3,)), (y,), (y * 2,))
    np.testing.assert_array_equal(tangent.ravel(), [16, 8, 0])


@pytest.mark.parametrize("dtype", grid.FLOATS + grid.INTEGERS)
def test_dtypes(dtype, unpool, x64):
    y = np.array([0, 1, 1, 0, 1, 1]).reshape(1, 3, 2).astype(jnp.dtype(dtype))
    indices = np.array([4, 0, 2, 3, 0, 4], np.int32).reshape(1, 3, 2)
    out = unpool(y, indices, (5,))
    assert out.dtype == dtype
    oracle.assert_same(out, oracle.max_unpool(y, indices, (5,)))


def test_nan_infinities_and_negative_zero_are_moved(unpool):
    y = np.array([np.nan, -np.inf, -0.0], np.float32).reshape(1, 3, 1)
    out = unpool(y, np.array([3, 0, 1], np.int32).reshape(1, 3, 1), (4,))
    np.testing.assert_array_equal(out.ravel(), [-np.inf, 0, 0, np.nan])
    np.testing.assert_array_equal(np.signbit(out.ravel()[:3]), [True, True, False])


@pytest.mark.parametrize("data_format", grid.FORMATS)
def test_derivatives(data_format, unpool, x64):
    shape = (2, 3, 2, 2) if data_format == "channels_last" else (2, 2, 3, 2)
    y = oracle.normal(shape, np.float64)
    indices = np.random.default_rng(1).integers(-1, 8, size=shape).astype(np.int32)
    function = jax.jit(lambda y: jnp.sin(unpool(y, indices, (2, 3), data_format=data_format)))
    check_grads(function, (y,), order=2, modes=["fwd", "rev"], eps=1e-4, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("data_format", grid.FORMATS)
def test_the_gradient_is_the_transpose(data_format, unpool, x64):
    """And the function is its own derivative, duplicates included."""
    shape = (1, 3, 2, 2) if data_format == "channels_last" else (1, 2, 3, 2)
    indices = np.random.default_rng(2).integers(-1, 8, size=shape).astype(np.int32)
    y = oracle.normal(shape, np.float64)

    def function(y):
        return unpool(y, indices, (2, 3), data_format=data_format).ravel()

    forward, reverse = jax.jacfwd(function)(y), jax.jacrev(function)(y)
    np.testing.assert_array_equal(forward, reverse)
    expected = oracle.max_unpool(y, indices, (2, 3), data_format=data_format)
    np.testing.assert_allclose(np.asarray(forward).reshape(12, 12) @ y.ravel(), expected.ravel())


def test_unpool_inverts_pool_and_back(unpool):
    """max_pool(max_unpool(y)) = y for positive values."""
    x = np.abs(oracle.distinct((2, 8, 6, 3))) + 1
    y, indices = jax_mps.max_pool(x, 2, strides=2, return_indices=True)
    again = jax_mps.max_pool(unpool(y, indices, (8, 6)), 2, strides=2)
    np.testing.assert_array_equal(again, y)


def test_a_smaller_and_a_larger_plane(unpool):
    y = np.array([1, 2, 3], np.float32).reshape(1, 3, 1)
    indices = np.array([0, 5, 2], np.int32).reshape(1, 3, 1)
    np.testing.assert_array_equal(unpool(y, indices, (3,)).ravel(), [1, 0, 3])
    np.testing.assert_array_equal(unpool(y, indices, (7,)).ravel(), [1, 0, 3, 0, 0, 2, 0])
    np.testing.assert_array_equal(
        unpool(y[:, :, None], indices[:, :, None], (2, 3)).ravel(), [1, 0, 3, 0, 0, 2]
    )


PLANES = [((4, 6), (5, 6)), ((4, 6), (3, 7)), ((6,), (4,)), ((2, 4, 4), (3, 3, 5))]


@pytest.mark.parametrize("data_format", grid.FORMATS)
@pytest.mark.parametrize(("plane", "sizes"), PLANES, ids=str)
def test_indices_of_another_plane(plane, sizes, data_format, unpool):
    """As to unpool to that plane, and to cut or pad the result."""
    shape = (2, *plane, 3) if data_format == "channels_last" else (2, 3, *plane)
    x = oracle.distinct(shape)
    y, at = jax_mps.max_pool(x, (2,) * len(plane), strides=2, data_format=data_format, return_indices=True)
    at = at.at[0, 0].add(-100)  # some are outside of every plane
    start = 1 if data_format == "channels_last" else 2
    expected = np.asarray(unpool(y, at, plane, data_format=data_format))
    for axis, (n, size) in enumerate(zip(plane, sizes, strict=True), start):
        pads = [(0, max(size - n, 0)) if i == axis else (0, 0) for i in range(x.ndim)]
        expected = np.take(np.pad(expected, pads), range(size), axis)
    call = functools.partial(unpool, output_shape=sizes, indices_shape=plane, data_format=data_format)
    np.testing.assert_array_equal(call(y, at), expected)
    np.testing.assert_array_equal(jax.jit(call)(y, at), expected)
    ours = jax.grad(lambda y: jnp.sum(call(y, at) ** 2))(y)
    np.testing.assert_array_equal(np.sort(ours[ours != 0]), np.sort(2 * expected[expected != 0]))


def test_wrong_planes_of_indices(unpool):
    y, at = jnp.ones((1, 2, 2, 1)), jnp.zeros((1, 2, 2, 1), jnp.int32)
    for plane in ((4,), (4, 4, 4), (0, 4)):
        with pytest.raises(ValueError, match="indices_shape must be 2 sizes of at least 1"):
            unpool(y, at, (4, 4), indices_shape=plane)
    with pytest.raises(TypeError, match="indices_shape must be a sequence of ints"):
        unpool(y, at, (4, 4), indices_shape=4)


def test_planes_have_fewer_pixels_than_int32_has_numbers():
    like = jax.ShapeDtypeStruct((1, 1, 1, 1), np.float32), jax.ShapeDtypeStruct((1, 1, 1, 1), np.int32)
    with pytest.raises(ValueError, match="fewer than 2"):
        jax.eval_shape(lambda y, at: jax_mps.max_unpool(y, at, (2**16, 2**15)), *like)


def test_images_without_channels_are_refused():
    with pytest.raises(ValueError, match=r"y must have 2 spatial axes and a channel axis, got shape .2, 3"):
        jax_mps.max_unpool(jnp.ones((2, 3)), jnp.zeros((2, 3), jnp.int32), (4, 6))
