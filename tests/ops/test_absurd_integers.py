"""Integers that no machine can serve are refused by name; long strides of one window cost nothing."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

import jax_mps
from jax_mps import mps

ABSURD = {
    "2**31": 2**31,
    "2**32+1": 2**32 + 1,
    "2**62": 2**62,
    "2**63": 2**63,
    "2**64": 2**64,
    "-2**63": -(2**63),
    "int64": np.int64(2**63 - 1),
    "uint64": np.uint64(2**64 - 1),
}

X = np.arange(12, dtype=np.float32).reshape(1, 6, 2)
KERNEL = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
Y = np.ones((1, 3, 2), np.float32)  # of windows of 2 with stride 2
WIDE = np.ones((1, 8, 2), np.float32)  # of a transposed convolution with 3 taps
AT = np.zeros((1, 3, 2), np.int32)

POOL = {"window_shape": (2,), "strides": 2, "padding": 0, "window_dilation": 1}
TRANSPOSED = {"strides": 1, "padding": 0, "output_padding": 0, "kernel_dilation": 1, "groups": 1}
CALLS = {
    "max_pool": (functools.partial(jax_mps.max_pool, X), POOL),
    "max_pool_gradient": (functools.partial(jax_mps.max_pool_gradient, Y, X), POOL),
    "avg_pool": (functools.partial(jax_mps.avg_pool, X), POOL | {"divisor_override": 2}),
    "avg_pool_gradient": (
        functools.partial(jax_mps.avg_pool_gradient, Y),
        POOL | {"divisor_override": 2, "source_shape": (1, 6, 2)},
    ),
    "l2_pool": (functools.partial(jax_mps.l2_pool, X), POOL),
    "l2_pool_gradient": (functools.partial(jax_mps.l2_pool_gradient, Y, X), POOL),
    "max_unpool": (functools.partial(jax_mps.max_unpool, Y, AT), {"output_shape": (6,)}),
    "conv": (
        functools.partial(jax_mps.conv, X, KERNEL),
        {"strides": 1, "padding": 0, "input_dilation": 1, "kernel_dilation": 1, "groups": 1},
    ),
    "conv_transpose": (functools.partial(jax_mps.conv_transpose, X, KERNEL), TRANSPOSED),
    "conv_transpose_gradient_data": (
        functools.partial(jax_mps.conv_transpose_gradient_data, WIDE, KERNEL),
        TRANSPOSED | {"source_shape": (1, 6, 2)},
    ),
    "conv_transpose_gradient_weights": (
        functools.partial(jax_mps.conv_transpose_gradient_weights, WIDE, X),
        TRANSPOSED | {"kernel_shape": (3, 2, 2)},
    ),
}


def forms(argument, good, value):
    """The value alone, and in every place where the argument takes a sequence."""
    if argument == "padding":
        return [value, ((value, 0),), ((0, value),)]
    if argument.endswith("_shape") and argument != "window_shape":
        return [(*good[:i], value, *good[i + 1 :]) for i in range(len(good))]
    if argument in ("groups", "divisor_override"):
        return [value]
    return [value, (value,)]


@pytest.mark.parametrize("value", ABSURD)
@pytest.mark.parametrize(("function", "argument"), [(f, a) for f, (_, good) in CALLS.items() for a in good])
def test_refused_by_name(function, argument, value, implementation):
    call, good = CALLS[function]
    for form in forms(argument, good[argument], ABSURD[value]):
        with pytest.raises(ValueError, match=rf"{argument}.*{int(ABSURD[value])}"):
            call(**good | {argument: form}, implementation=implementation)


@pytest.mark.parametrize("value", ABSURD)
def test_conventions_refuse(value):
    n = ABSURD[value]
    for name in ("kernel_to_torch", "kernel_from_torch"):
        with pytest.raises(ValueError, match="groups"):
            getattr(jax_mps, name)(np.zeros((3, 3, 3, 3), np.float32), groups=n)


MEMBERS = {
    "MPSCNNPoolingMax": (
        {"kernel_width": 2, "kernel_height": 2},
        ["kernel_width", "kernel_height", "stride_in_pixels_x", "stride_in_pixels_y"],
    ),
    "MPSCNNDilatedPoolingMax": (
        {"kernel_width": 2, "kernel_height": 2},
        ["dilation_rate_x", "dilation_rate_y"],
    ),
    "MPSCNNConvolutionDescriptor": (
        {"input_feature_channels": 1, "output_feature_channels": 1},
        [
            "kernel_width", "kernel_height", "stride_in_pixels_x", "stride_in_pixels_y", "dilation_rate_x",
            "dilation_rate_y", "groups", "input_feature_channels", "output_feature_channels",
        ],
    ),
    "MPSOffset": ({}, ["x", "y", "z"]),
    "MTLOrigin": ({}, ["x", "y", "z"]),
    "MTLSize": ({}, ["width", "height", "depth"]),
}  # fmt: skip


@pytest.mark.parametrize("value", ABSURD)
@pytest.mark.parametrize("kind", MEMBERS)
def test_classes_refuse(kind, value):
    good, names = MEMBERS[kind]
    for name in names:
        with pytest.raises(ValueError, match=rf"{name}.*{int(ABSURD[value])}"):
            getattr(mps, kind)(**good | {name: ABSURD[value]})


# --- what is long, but means something small ----------------------------------------------------------

LONG = 10**8
SAME_AS = {
    "max_pool": ({"window_shape": (5,), "strides": LONG}, {"window_shape": (5,), "strides": 7}),
    "avg_pool": (
        {"window_shape": (1,), "strides": 2, "window_dilation": LONG},
        {"window_shape": (1,), "strides": 2},
    ),
    "l2_pool": (
        {"window_shape": (5,), "strides": LONG, "padding": ((1, 0),)},
        {"window_shape": (5,), "strides": 7, "padding": ((1, 0),)},
    ),
    "conv": ({"strides": LONG}, {"strides": 4}),
}


@pytest.mark.parametrize("name", SAME_AS)
def test_long_strides_of_one_window(name, implementation):
    f = functools.partial(getattr(jax_mps, name), implementation=implementation)
    operands = (X, KERNEL) if name == "conv" else (X,)
    results = []
    for keywords in SAME_AS[name]:
        y, pull_back = jax.vjp(functools.partial(f, **keywords), *operands)
        results.append((y, *pull_back(y)))
    for actual, expected in zip(*results, strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("channels", [1, 2])
def test_long_strides_and_dilations_of_a_transposed_convolution(channels, implementation):
    f = functools.partial(jax_mps.conv_transpose, implementation=implementation, groups=channels)
    x, kernel = np.ones((1, 1, 2), np.float32), np.ones((3, 2 // channels, 2), np.float32)
    one_pixel = [jax.vjp(functools.partial(f, strides=s), x, kernel) for s in (LONG, 3)]
    for actual, expected in zip(*((y, *pull_back(y)) for y, pull_back in one_pixel), strict=True):
        np.testing.assert_array_equal(actual, expected)
    x, kernel = np.ones((1, 5, 2), np.float32), np.ones((1, 2 // channels, 2), np.float32)
    one_tap = [jax.vjp(functools.partial(f, kernel_dilation=d), x, kernel) for d in (LONG, 1)]
    for actual, expected in zip(*((y, *pull_back(y)) for y, pull_back in one_tap), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("function", ["conv_transpose", "max_pool_gradient", "conv"])
def test_programs_do_not_grow_with_strides(function):
    """Several windows, so the stride matters: the program has as many operations as with a short one."""

    def operations(stride):
        n = 2 * stride + 4
        if function == "max_pool_gradient":
            f = functools.partial(jax_mps.max_pool_gradient, window_shape=(3,), strides=stride)
            shapes = (1, 3, 2), (1, n, 2)
        else:
            f = functools.partial(getattr(jax_mps, function), strides=stride, kernel_dilation=2, groups=2)
            shapes = (1, 3 if function == "conv_transpose" else n, 2), (2, 1, 2)
        f = functools.partial(f, implementation="xla")
        return len(
            jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, np.float32) for s in shapes)).as_text().split("\n")
        )

    assert operations(2000) <= operations(6) + 3
