"""Parity with PyTorch on the CPU: values, positions and gradients.

Where the two differ on purpose, the tests at the end say how, and the oracle's tests hold ours: NaN, norms
that overflow, norms in the overhang of `ceil_mode`, wide padding.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest

import grid
import jax_mps
import oracle

torch = pytest.importorskip("torch")
F = torch.nn.functional

SIZES = {1: (23,), 2: (13, 12), 3: (7, 6, 9)}


class Call(NamedTuple):
    kernel: int | tuple[int, ...]
    stride: int | tuple[int, ...]
    padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    ceil_mode: bool = False

    def __str__(self) -> str:
        numbers = f"k{self.kernel}-s{self.stride}-p{self.padding}-d{self.dilation}"
        return numbers + "-ceil" * self.ceil_mode

    def each(self, value, rank):
        return (value,) * rank if isinstance(value, int) else value[:rank]

    def ours(self, rank):
        return {
            "window_shape": self.each(self.kernel, rank),
            "strides": self.each(self.stride, rank),
            "padding": tuple((p, p) for p in self.each(self.padding, rank)),
            "ceil_mode": self.ceil_mode,
        }

    def theirs(self, rank):
        return {
            "kernel_size": self.each(self.kernel, rank),
            "stride": self.each(self.stride, rank),
            "padding": self.each(self.padding, rank),
            "ceil_mode": self.ceil_mode,
        }


CALLS = [
    Call(2, 2),
    Call(3, 1, 1),
    Call(3, 2, 1, ceil_mode=True),
    Call(2, 3, ceil_mode=True),
    Call((3, 2, 4), (2, 1, 3), (1, 0, 2), ceil_mode=True),
    Call((1, 4, 3), (1, 2, 2), (0, 2, 1)),
]
DILATED = [
    Call(2, 1, 1, 3),
    Call(3, 2, 1, 2, ceil_mode=True),
    Call((2, 3, 2), (1, 3, 2), (1, 1, 0), (4, 2, 3)),
]


def to_torch(x, data_format, rank):
    """Channels first, and on the tape."""
    x = np.moveaxis(x, -1, -rank - 1) if data_format == "channels_last" else x
    return torch.tensor(np.ascontiguousarray(x), requires_grad=True)


def from_torch(y, data_format, rank):
    y = y.detach().numpy()
    return np.moveaxis(y, -rank - 1, -1) if data_format == "channels_last" else y


def shape_of(rank, data_format):
    return (2, *SIZES[rank], 3) if data_format == "channels_last" else (2, 3, *SIZES[rank])


def compare(ours, theirs, x, data_format, rank, length):
    """Values and gradients of a function of an image; returns the indices if the functions give them."""
    image = to_torch(x, data_format, rank)
    result = theirs(image)
    expected, *positions = result if isinstance(result, tuple) else (result,)
    g = oracle.normal(from_torch(expected, data_format, rank).shape, x.dtype, seed=1)

    @jax.jit
    def run(x, g):
        if not positions:
            y, vjp = jax.vjp(ours, x)
            return y, vjp(g)[0]
        y, vjp, indices = jax.vjp(ours, x, has_aux=True)
        return y, vjp(g)[0], indices

    y, dx, *indices = run(x, g)
    assert y.dtype == x.dtype
    oracle.assert_close(y, from_torch(expected, data_format, rank), length=length, scale=4)
    expected.backward(to_torch(g, data_format, rank).detach())
    oracle.assert_close(dx, from_torch(image.grad, data_format, rank), length=length, scale=8)
    return (*indices, *positions)


@pytest.mark.parametrize(
    ("call", "data_format"), [(c, grid.FORMATS[i % 2]) for i, c in enumerate(CALLS + DILATED)], ids=str
)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_max_pool(rank, call, data_format, implementation):
    x = oracle.tied(shape_of(rank, data_format)) - np.float32(1)
    max_pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[rank]
    dilation = call.each(call.dilation, rank)

    def ours(x):
        return jax_mps.max_pool(
            x,
            **call.ours(rank),
            window_dilation=dilation,
            data_format=data_format,
            return_indices=True,
            implementation=implementation,
        )

    def theirs(x):
        return max_pool(x, **call.theirs(rank), dilation=dilation, return_indices=True)

    indices, expected = compare(ours, theirs, x, data_format, rank, 27)
    np.testing.assert_array_equal(indices, from_torch(expected, data_format, rank))


@pytest.mark.parametrize("count_include_pad", [True, False], ids=["include", "exclude"])
@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_avg_pool(rank, call, count_include_pad, implementation):
    data_format = grid.FORMATS[count_include_pad]
    x = oracle.normal(shape_of(rank, data_format))
    avg_pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[rank]
    ours = functools.partial(
        jax_mps.avg_pool,
        **call.ours(rank),
        count_include_pad=count_include_pad,
        data_format=data_format,
        implementation=implementation,
    )
    theirs = functools.partial(avg_pool, **call.theirs(rank), count_include_pad=count_include_pad)
    compare(ours, theirs, x, data_format, rank, 27)


@pytest.mark.parametrize("divisor", [1, 5, -2])
@pytest.mark.parametrize("rank", [2, 3])
def test_divisor_override(rank, divisor, implementation):
    call = CALLS[2]
    x = oracle.normal(shape_of(rank, "channels_last"))
    avg_pool = {2: F.avg_pool2d, 3: F.avg_pool3d}[rank]
    ours = functools.partial(
        jax_mps.avg_pool, **call.ours(rank), divisor_override=divisor, implementation=implementation
    )
    theirs = functools.partial(avg_pool, **call.theirs(rank), divisor_override=divisor)
    compare(ours, theirs, x, "channels_last", rank, 27)


@pytest.mark.parametrize("call", [Call(2, 2), Call(3, 2), Call((3, 2, 4), (2, 1, 3))], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_l2_pool(rank, call, implementation):
    """With an image of zeros, whose gradient both define as 0. PyTorch has no padding here."""
    data_format = grid.FORMATS[call.stride == 2]
    x = oracle.normal(shape_of(rank, data_format))
    x[0] = 0
    lp_pool = {1: F.lp_pool1d, 2: F.lp_pool2d, 3: F.lp_pool3d}[rank]
    ours = functools.partial(
        jax_mps.l2_pool, **call.ours(rank), data_format=data_format, implementation=implementation
    )
    kernel, stride = call.each(call.kernel, rank), call.each(call.stride, rank)
    if rank == 1:
        kernel, stride = kernel[0], stride[0]

    def theirs(x):
        return lp_pool(x, 2, kernel, stride, ceil_mode=call.ceil_mode)

    compare(ours, theirs, x, data_format, rank, 27)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("op", grid.FAMILIES, ids=str)
def test_dtypes(op, dtype, implementation, x64):
    """Half precision agrees to a rounding: PyTorch too accumulates the values in float32."""
    x = op.image((2, 9, 8, 3), np.float32).astype(jax.numpy.dtype(dtype))
    image = to_torch(np.asarray(x, np.float64), "channels_last", 2).to(getattr(torch, dtype))
    theirs = {
        "max": lambda x: F.max_pool2d(x, 3, 2, 1),
        "average": lambda x: F.avg_pool2d(x, 3, 2, 1),
        "l2": lambda x: F.lp_pool2d(F.pad(x, (1, 1, 1, 1)).double(), 2, 3, 2).to(x.dtype),
    }[op.name](image)
    y = op.pool(x, 3, strides=2, padding=1, implementation=implementation)
    assert y.dtype == dtype
    oracle.assert_close(y, from_torch(theirs.double(), "channels_last", 2), length=9)


@pytest.mark.parametrize("op", grid.FAMILIES, ids=str)
def test_images_that_are_not_contiguous(op, implementation):
    """Transposed, reversed and strided views, on either side and inside a compiled program."""
    base = oracle.normal((16, 3, 20, 2))
    pool = functools.partial(op.pool, window_shape=3, strides=2, padding=1, implementation=implementation)
    theirs = {
        "max": lambda x: F.max_pool2d(x, 3, 2, 1),
        "average": lambda x: F.avg_pool2d(x, 3, 2, 1),
        "l2": lambda x: F.lp_pool2d(F.pad(x, (1, 1, 1, 1)), 2, 3, 2),
    }[op.name]

    def view(x):
        return x.transpose(3, 0, 2, 1)[:, ::-1, 1::2]

    image = to_torch(view(base), "channels_last", 2)
    expected = theirs(image)
    g = oracle.normal(np.shape(pool(view(base))), seed=1)
    expected.backward(to_torch(g, "channels_last", 2))
    for function in (lambda x: pool(view(x)), jax.jit(lambda x: pool(view(x)))):
        oracle.assert_close(function(base), from_torch(expected, "channels_last", 2), length=9)
        dx = np.asarray(jax.vjp(function, base)[1](g)[0])
        oracle.assert_close(view(dx), from_torch(image.grad, "channels_last", 2), length=9, scale=8)
    # A cotangent that arrives transposed.
    turned = jax.vjp(lambda x: pool(view(x)).transpose(2, 0, 3, 1), base)[1](g.transpose(2, 0, 3, 1))[0]
    np.testing.assert_array_equal(turned, dx)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("data_format", grid.FORMATS)
def test_max_unpool(data_format, rank, implementation):
    """For windows that do not overlap; PyTorch leaves open what happens to duplicates."""
    x = oracle.distinct(shape_of(rank, data_format))
    call = {"window_shape": (3, 2, 3)[:rank], "strides": (3, 2, 4)[:rank], "data_format": data_format}
    y, indices = jax_mps.max_pool(x, **call, return_indices=True, implementation=implementation)

    def ours(y):
        return jax_mps.max_unpool(
            y, indices, SIZES[rank], data_format=data_format, implementation=implementation
        )

    pooled = to_torch(np.asarray(y), data_format, rank)
    at = to_torch(np.asarray(indices, np.float32), data_format, rank).long()
    unpool = {1: F.max_unpool1d, 2: F.max_unpool2d, 3: F.max_unpool3d}[rank]
    expected = unpool(pooled, at, (3, 2, 3)[:rank], (3, 2, 4)[:rank], output_size=SIZES[rank])
    unpooled, vjp = jax.vjp(jax.jit(ours), y)
    oracle.assert_same(unpooled, from_torch(expected, data_format, rank))
    g = oracle.normal(unpooled.shape, seed=1)
    expected.backward(to_torch(g, data_format, rank).detach())
    oracle.assert_same(vjp(g)[0], from_torch(pooled.grad, data_format, rank))


def test_torch_sends_the_gradient_of_nan_to_the_last(implementation):
    x = np.array([1, np.nan, 5, np.nan, 7], np.float32).reshape(1, 5, 1)
    _, indices = jax_mps.max_pool(x, 5, strides=1, return_indices=True, implementation=implementation)
    _, last = F.max_pool1d(torch.tensor(x.reshape(1, 1, 5)), 5, 1, return_indices=True)
    assert (indices.item(), last.item()) == (1, 3)


def test_norms_overflow_in_torch(implementation):
    x = np.full((1, 2, 1), 1e20, np.float32)
    ours = jax_mps.l2_pool(x, 2, strides=2, implementation=implementation)
    assert ours.item() == pytest.approx(2**0.5 * 1e20)
    assert F.lp_pool1d(torch.tensor(x.reshape(1, 1, 2)), 2, 2, 2).item() == np.inf


def test_torch_scales_the_norm_of_an_overhanging_window(implementation):
    """It multiplies the mean of the squares inside by all taps; ours is the norm of what is inside."""
    x = np.array([3, 4, 5], np.float32).reshape(1, 3, 1)
    ours = jax_mps.l2_pool(x, 2, strides=2, padding=0, ceil_mode=True, implementation=implementation)
    theirs = F.lp_pool1d(torch.tensor(x.reshape(1, 1, 3)), 2, 2, 2, ceil_mode=True)
    np.testing.assert_allclose(ours.ravel(), [5, 5], rtol=1e-6)
    np.testing.assert_allclose(theirs.numpy().ravel(), [5, 5 * 2**0.5], rtol=1e-6)


def test_torch_refuses_padding_of_more_than_half_a_window(implementation):
    x = np.array([3, 4], np.float32).reshape(1, 2, 1)
    y = jax_mps.max_pool(x, 3, strides=2, padding=2, implementation=implementation)
    np.testing.assert_array_equal(y.ravel(), [3, 4])
    with pytest.raises(RuntimeError, match="half"):
        F.max_pool1d(torch.tensor(x.reshape(1, 1, 2)), 3, 2, 2)
