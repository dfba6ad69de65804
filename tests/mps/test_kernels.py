"""The classes of `jax_mps.mps` as objects: defaults, values, errors, policies, states, lowered text."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mps
from jax_mps import mps

WINDOW = {"kernel_width": 3, "kernel_height": 2}
DESCRIPTOR = mps.MPSCNNConvolutionDescriptor(
    kernel_width=3, kernel_height=3, input_feature_channels=2, output_feature_channels=4,
    stride_in_pixels_x=2, stride_in_pixels_y=2,
)  # fmt: skip
WEIGHTS = np.random.default_rng(0).normal(size=DESCRIPTOR.weights_shape).astype(np.float32)
POOLS = (
    mps.MPSCNNPoolingMax,
    mps.MPSCNNDilatedPoolingMax,
    mps.MPSCNNPoolingAverage,
    mps.MPSCNNPoolingL2Norm,
)
GRADIENTS = (
    mps.MPSCNNPoolingMaxGradient,
    mps.MPSCNNDilatedPoolingMaxGradient,
    mps.MPSCNNPoolingAverageGradient,
    mps.MPSCNNPoolingL2NormGradient,
)
CONVOLUTIONS = (mps.MPSCNNConvolutionTranspose, mps.MPSCNNConvolutionTransposeGradient)
SAME_TOP_LEFT = mps.MPSNNPaddingMethod.SIZE_SAME


def source(descriptor=DESCRIPTOR, weights=WEIGHTS, **more):
    return mps.ConvolutionDataSource(descriptor, jnp.asarray(weights), **more)


def make(cls, **members):
    return cls(weights=source(), **members) if cls in CONVOLUTIONS else cls(**WINDOW, **members)


ALL = POOLS + GRADIENTS + CONVOLUTIONS

# --- objects ------------------------------------------------------------------------------------------

KERNEL = {"options": 0, "device": None, "implementation": None}
FORWARD = KERNEL | {
    "offset": mps.MPSOffset(x=0, y=0, z=0),
    "clip_rect": None,
    "destination_feature_channel_offset": 0,
    "source_feature_channel_offset": 0,
    "source_feature_channel_max_count": None,
    "edge_mode": mps.MPSImageEdgeMode.ZERO,
    "padding": SAME_TOP_LEFT,
}
BINARY = KERNEL | {
    "primary_offset": mps.MPSOffset(x=0, y=0, z=0),
    "secondary_offset": mps.MPSOffset(x=0, y=0, z=0),
    "clip_rect": None,
    "destination_feature_channel_offset": 0,
    "primary_source_feature_channel_offset": 0,
    "secondary_source_feature_channel_offset": 0,
    "primary_source_feature_channel_max_count": None,
    "secondary_source_feature_channel_max_count": None,
    "primary_edge_mode": mps.MPSImageEdgeMode.ZERO,
    "secondary_edge_mode": mps.MPSImageEdgeMode.ZERO,
    "padding": SAME_TOP_LEFT,
    "kernel_offset_x": 0,
    "kernel_offset_y": 0,
    "primary_kernel_width": 1,
    "primary_kernel_height": 1,
    "primary_stride_in_pixels_x": 1,
    "primary_stride_in_pixels_y": 1,
    "primary_dilation_rate_x": 1,
    "primary_dilation_rate_y": 1,
    "is_backwards": True,
}
PLACED = {"stride_in_pixels_x": 1, "stride_in_pixels_y": 1, **WINDOW}
ONES = {"dilation_rate_x": 1, "dilation_rate_y": 1}
PADS = {"zero_pad_size_x": 0, "zero_pad_size_y": 0}
SECONDARY = {
    "secondary_kernel_width": 3,
    "secondary_kernel_height": 2,
    "secondary_stride_in_pixels_x": 1,
    "secondary_stride_in_pixels_y": 1,
    "secondary_dilation_rate_x": 1,
    "secondary_dilation_rate_y": 1,
    "source_size": mps.MTLSize(width=None, height=None, depth=None),
}
DEFAULTS = {
    mps.MPSCNNPoolingMax: FORWARD | PLACED | ONES | {"is_backwards": False},
    mps.MPSCNNDilatedPoolingMax: FORWARD | PLACED | ONES,
    mps.MPSCNNPoolingAverage: FORWARD | PLACED | ONES | PADS,
    mps.MPSCNNPoolingL2Norm: FORWARD | PLACED | ONES,
    mps.MPSCNNPoolingMaxGradient: BINARY | PLACED | SECONDARY,
    mps.MPSCNNDilatedPoolingMaxGradient: BINARY | PLACED | SECONDARY | ONES,
    mps.MPSCNNPoolingAverageGradient: BINARY | PLACED | SECONDARY | PADS,
    mps.MPSCNNPoolingL2NormGradient: BINARY | PLACED | SECONDARY,
    mps.MPSCNNConvolutionTranspose: FORWARD
    | ONES
    | {
        "kernel_width": 3,
        "kernel_height": 3,
        "stride_in_pixels_x": 2,
        "stride_in_pixels_y": 2,
        "kernel_offset_x": 0,
        "kernel_offset_y": 0,
        "input_feature_channels": 2,
        "output_feature_channels": 4,
        "groups": 1,
        "accumulator_precision_option": mps.MPSNNConvolutionAccumulatorPrecisionOption.FLOAT,
        "is_backwards": True,
    },
    mps.MPSCNNConvolutionTransposeGradient: BINARY
    | {
        "gradient_option": mps.MPSCNNConvolutionGradientOption.ALL,
        "groups": 1,
        "source_gradient_feature_channels": 4,
        "source_image_feature_channels": 2,
        "secondary_kernel_width": 3,
        "secondary_stride_in_pixels_x": 2,
    },
}


@pytest.mark.parametrize("cls", ALL)
def test_defaults(cls):
    kernel = make(cls)
    assert {name: getattr(kernel, name) for name in DEFAULTS[cls]} == DEFAULTS[cls]


def test_defaults_of_descriptors_and_numbers_of_enumerations():
    descriptor = mps.MPSCNNConvolutionDescriptor(input_feature_channels=1, output_feature_channels=1)
    assert (descriptor.kernel_width, descriptor.kernel_height, descriptor.groups) == (3, 3, 1)
    assert (descriptor.stride_in_pixels_x, descriptor.dilation_rate_y) == (1, 1)
    assert descriptor.fused_neuron_descriptor is None
    assert [m.value for m in mps.MPSImageEdgeMode] == [0, 1, 2, 3, 4]
    assert [m.value for m in mps.MPSCNNNeuronType] == list(range(16))
    method = mps.MPSNNPaddingMethod
    assert [method.SIZE_VALID_ONLY, method.SIZE_SAME, method.SIZE_FULL] == [0, 16, 32]
    assert [method.ADD_REMAINDER_TO_TOP_RIGHT, method.ADD_REMAINDER_TO_BOTTOM_LEFT] == [4, 8]
    assert [method.CUSTOM_ALLOW_FOR_NODE_FUSION, method.CUSTOM, method.EXCLUDE_EDGES] == [8192, 16384, 32768]
    assert set(mps.__all__) <= set(dir(mps))


@pytest.mark.parametrize("cls", ALL)
def test_kernels_are_values(cls):
    kernel, same = make(cls), make(cls)
    assert kernel == same
    assert hash(kernel) == hash(same)
    assert kernel == copy.copy(kernel) == kernel.copy() == pickle.loads(pickle.dumps(kernel))
    other = kernel.copy(destination_feature_channel_offset=1)
    assert other != kernel
    assert other.destination_feature_channel_offset == 1
    assert other.copy(destination_feature_channel_offset=0) == kernel
    with pytest.raises(dataclasses.FrozenInstanceError, match=r"clip_rect cannot be set.*copy\(clip_rect="):
        kernel.clip_rect = None
    with pytest.raises(dataclasses.FrozenInstanceError, match="anything"):
        kernel.anything = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        del kernel.clip_rect
    with pytest.raises(TypeError, match="colour"):
        make(cls, colour=1)
    with pytest.raises(TypeError, match="colour"):
        kernel.copy(colour=1)
    assert cls.__name__ in repr(kernel)
    assert "destination_feature_channel_offset=1" in repr(other)


@pytest.mark.parametrize("cls", POOLS + GRADIENTS)
def test_pooling_kernels_are_static(cls):
    kernel = make(cls)
    assert jax.tree.leaves(kernel) == []
    assert eval(repr(kernel), vars(mps)) == kernel
    assert jax.jit(lambda k: k)(kernel) == kernel
    traces = []
    count = jax.jit(lambda k, x: traces.append(k) or x, static_argnums=0)
    count(kernel, 1.0)
    count(make(cls), 1.0)
    assert len(traces) == 1


@pytest.mark.parametrize("cls", CONVOLUTIONS)
def test_convolutions_are_pytrees(cls):
    kernel = make(cls)
    (leaf,) = jax.tree.leaves(kernel)
    assert leaf.shape == (3, 3, 2, 4)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, kernel)
    assert doubled != kernel
    assert hash(doubled) == hash(kernel)
    np.testing.assert_array_equal(doubled.export_weights_and_biases().weights, 2 * WEIGHTS)
    assert doubled.data_source is kernel.data_source
    assert doubled.copy(clip_rect=None) == doubled
    traces = []
    function = jax.jit(lambda k: traces.append(k) or k)
    assert function(kernel) == kernel
    assert function(doubled) == doubled
    assert len(traces) == 1


def test_abstract_classes_and_devices():
    for cls in (mps.MPSCNNPooling, mps.MPSCNNPoolingGradient):
        with pytest.raises(TypeError, match=f"{cls.__name__} is abstract"):
            cls(**WINDOW)
    device = jax.devices()[0]
    x = np.ones((3, 3, 2), np.float32)
    for cls in (mps.MPSCNNPoolingMax, mps.MPSCNNConvolutionTranspose):
        assert make(cls, device=device).encode(x).devices() == {device}
    with pytest.raises(TypeError, match=r"device must be None or a jax\.Device, got 'gpu'"):
        make(mps.MPSCNNPoolingMax, device="gpu")


def test_structs_take_keywords_only():
    with pytest.raises(TypeError):
        mps.MPSOffset(1, 2)
    assert mps.MPSOffset(x=np.int64(-1)) == mps.MPSOffset(x=-1)
    assert pickle.loads(pickle.dumps(mps.MTLSize(width=1))) == mps.MTLSize(width=1)


# --- errors -------------------------------------------------------------------------------------------

X = np.ones((2, 4, 5, 3), np.float32)
SPEC = {"input_feature_channels": 2, "output_feature_channels": 4}
ERRORS = {
    "kernel 0": (
        ValueError,
        "kernel_width must be at least 1, got 0",
        lambda: mps.MPSCNNPoolingMax(kernel_width=0, kernel_height=1),
    ),
    "stride": (
        TypeError,
        "stride_in_pixels_x must be an int",
        lambda: make(POOLS[0], stride_in_pixels_x=1.5),
    ),
    "missing": (TypeError, "kernel_height", lambda: mps.MPSCNNPoolingMax(kernel_width=1)),
    "read-only": (TypeError, "dilation_rate_x", lambda: make(POOLS[0], dilation_rate_x=2)),
    "mirror": (
        ValueError,
        "edge_mode must be ZERO or CLAMP, got MIRROR",
        lambda: make(POOLS[0], edge_mode="mirror"),
    ),
    "edge": (
        ValueError,
        "edge_mode must be a MPSImageEdgeMode, .*got 'round'",
        lambda: make(POOLS[0], edge_mode="round"),
    ),
    "secondary": (
        ValueError,
        "secondary_edge_mode must be ZERO or CLAMP, got CONSTANT",
        lambda: make(GRADIENTS[0], secondary_edge_mode=4),
    ),
    "offset": (TypeError, "offset must be an MPSOffset, got", lambda: make(POOLS[0], offset=(1, 1))),
    "clip": (TypeError, "clip_rect must be an MTLRegion or None", lambda: make(POOLS[0], clip_rect=3)),
    "origin": (ValueError, "x of MTLOrigin must be at least 0, got -1", lambda: mps.MTLOrigin(x=-1)),
    "size": (TypeError, "width of MTLSize must be an int", lambda: mps.MTLSize(width=1.5)),
    "region": (TypeError, "origin must be an MTLOrigin", lambda: mps.MTLRegion(origin=mps.MPSOffset())),
    "region size": (TypeError, "size must be an MTLSize", lambda: mps.MTLRegion(size=3)),
    "channel": (
        ValueError,
        "source_feature_channel_offset must be at least 0",
        lambda: make(POOLS[0], source_feature_channel_offset=-1),
    ),
    "custom": (ValueError, "padding must not be CUSTOM", lambda: make(POOLS[0], padding=1 << 14)),
    "reserved": (
        ValueError,
        "padding must be made of documented values",
        lambda: make(POOLS[0], padding="align_reserved"),
    ),
    "unknown bits": (
        ValueError,
        "padding must be made of documented",
        lambda: make(POOLS[0], padding=1 << 8),
    ),
    "size reserved": (
        ValueError,
        "padding must be made of documented",
        lambda: make(POOLS[0], padding=3 << 4),
    ),
    "implementation": (
        ValueError,
        "implementation must be None, 'native' or 'xla'",
        lambda: make(POOLS[0], implementation="cuda"),
    ),
    "kernel offset": (
        ValueError,
        "kernel_offset_x must be 0 for the gradient of a pooling.*got 1",
        lambda: make(GRADIENTS[0], kernel_offset_x=1),
    ),
    "clamp": (
        ValueError,
        "edge_mode must be ZERO for a transposed convolution, got CLAMP",
        lambda: make(CONVOLUTIONS[0], edge_mode="clamp"),
    ),
    "clamp gradient": (
        ValueError,
        "secondary_edge_mode must be ZERO",
        lambda: make(CONVOLUTIONS[1], secondary_edge_mode=1),
    ),
    "primary": (
        ValueError,
        "primary_offset must be 0 for the gradient of a transposed",
        lambda: make(CONVOLUTIONS[1], primary_offset=mps.MPSOffset(x=1)),
    ),
    "option": (
        ValueError,
        "gradient_option must ask for a gradient",
        lambda: make(CONVOLUTIONS[1], gradient_option=0),
    ),
    "source": (
        TypeError,
        "weights must be a data source, with the methods",
        lambda: mps.MPSCNNConvolutionTranspose(weights=WEIGHTS),
    ),
    "weights": (
        ValueError,
        r"weights must have shape .* = \(4, 3, 3, 2\), got \(1,\)",
        lambda: mps.MPSCNNConvolutionTranspose(weights=source(weights=np.ones(1, np.float32))),
    ),
    "biases": (
        ValueError,
        r"bias_terms must have shape \(4,\)",
        lambda: mps.MPSCNNConvolutionTranspose(weights=source(bias_terms=np.ones(3))),
    ),
    "groups": (
        ValueError,
        "groups must divide output_feature_channels=4, got 3",
        lambda: mps.MPSCNNConvolutionDescriptor(
            input_feature_channels=3, output_feature_channels=4, groups=3
        ),
    ),
    "descriptor": (
        ValueError,
        "kernel_width must be at least 1",
        lambda: mps.MPSCNNConvolutionDescriptor(kernel_width=0, **SPEC),
    ),
    "neuron": (
        TypeError,
        "fused_neuron_descriptor must be",
        lambda: mps.MPSCNNConvolutionDescriptor(fused_neuron_descriptor="relu", **SPEC),
    ),
    "prelu": (
        ValueError,
        "data of fused_neuron_descriptor must have one number for each of the 4",
        lambda: mps.MPSCNNConvolutionDescriptor(
            fused_neuron_descriptor=mps.MPSNNNeuronDescriptor(neuron_type="prelu", data=[1, 2]), **SPEC
        ),
    ),
    "no slopes": (
        ValueError,
        "data must be given for PRELU",
        lambda: mps.MPSNNNeuronDescriptor(neuron_type="prelu"),
    ),
    "base": (
        ValueError,
        "c must be a positive base",
        lambda: mps.MPSNNNeuronDescriptor(neuron_type="logarithm", c=-2),
    ),
    "normalization": (
        ValueError,
        "mean of batch_normalization must have one number",
        lambda: mps.MPSCNNConvolutionDescriptor(**SPEC).set_batch_normalization_parameters_for_inference(
            mean=[1], variance=[1]
        ),
    ),
    "axes": (ValueError, "source_image must be an image", lambda: make(POOLS[0]).encode(X[0, 0])),
    "dtype": (
        TypeError,
        "source_image must have a dtype of float32.*got int32",
        lambda: make(POOLS[2]).encode(X.astype(np.int32)),
    ),
    "dtypes": (
        TypeError,
        "destination_image must have the dtype of source_image",
        lambda: make(POOLS[0]).encode(X, X.astype(np.float16)),
    ),
    "rank": (
        ValueError,
        "destination_image must have as many axes as source_image, 4",
        lambda: make(POOLS[0]).encode(X, X[0]),
    ),
    "z": (
        ValueError,
        "offset.z=1 and a clip rectangle of 2 images need 3 source images, got 2",
        lambda: make(POOLS[0], offset=mps.MPSOffset(z=1)).encode(X, X),
    ),
    "far z": (
        ValueError,
        "offset.z=3 must be one of the 2",
        lambda: make(POOLS[0], offset=mps.MPSOffset(z=3)).encode(X),
    ),
    "first channel": (
        ValueError,
        "source_feature_channel_offset=4 must be at most the 3",
        lambda: make(POOLS[0], source_feature_channel_offset=4).encode(X),
    ),
    "room": (
        ValueError,
        "destination_feature_channel_offset=1 leaves room for 2 channels.*but 3",
        lambda: make(POOLS[0], destination_feature_channel_offset=1).encode(X, X),
    ),
    "empty": (
        ValueError,
        "padding=.*leaves no window of 9 pixels along y on 4",
        lambda: mps.MPSCNNPoolingMax(kernel_width=1, kernel_height=9, padding=0).encode(X),
    ),
    "inputs": (
        ValueError,
        "source_image must have input_feature_channels=2 channels.*got 3",
        lambda: make(CONVOLUTIONS[0]).encode(X),
    ),
    "outputs": (
        ValueError,
        "source_gradient must have 4 channels to be read.*got 3",
        lambda: make(CONVOLUTIONS[1]).encode(X, X[..., :2]),
    ),
    "images": (
        ValueError,
        "offset.z=0 and a gradient of 2 images need 2 source images, got 1",
        lambda: make(CONVOLUTIONS[1]).encode(np.ones((2, 1, 1, 4), np.float32), X[:1, :, :, :2]),
    ),
    "unequal": (
        ValueError,
        "must have as many channels to be read, got 3 of 3 and 2 of 2",
        lambda: make(GRADIENTS[0]).encode(X, X[..., :2]),
    ),
    "batches": (
        ValueError,
        "must have as many images each, got 2, 1",
        lambda: make(POOLS[0]).encode_batch([X, X], [X]),
    ),
    "wrong state": (
        ValueError,
        "must be that of an MPSCNNPoolingMax, got that of an MPSCNNPoolingAverage",
        lambda: make(GRADIENTS[0]).encode(X, X, make(POOLS[2]).result_state(X)),
    ),
    "other window": (
        ValueError,
        "must be that of a kernel with the same window",
        lambda: make(GRADIENTS[0], stride_in_pixels_x=2).encode(X, X, make(POOLS[0]).result_state(X)),
    ),
    "other shapes": (
        ValueError,
        r"gradient_state is of a call that took \(2, 4, 5, 3\)",
        lambda: make(GRADIENTS[0]).encode(X[:1], X[:1], make(POOLS[0]).result_state(X)),
    ),
    "no source": (
        ValueError,
        "data_source must not be None",
        lambda: make(CONVOLUTIONS[0])._without_arrays().reload_weights_and_biases_from_data_source(),
    ),
    "two tables": (
        ValueError,
        "ranges and lookup_table must not both",
        lambda: source(ranges=1, lookup_table=1),
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    kind, message, call = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()


# --- padding policies ---------------------------------------------------------------------------------


def places(kernel, height, width):
    x = jnp.zeros((height, width, 1))
    placed = kernel.placed(x)
    assert kernel.destination_image_descriptor(x).shape == kernel.encode(x).shape
    (rows, columns, _) = kernel.destination_image_descriptor(x).shape
    return (rows, columns), (placed.offset.y, placed.offset.x)


METHOD = mps.MPSNNPaddingMethod
TENSORFLOW = METHOD.SIZE_SAME | METHOD.ADD_REMAINDER_TO_BOTTOM_RIGHT


def test_valid_only_is_centred():
    kernel = mps.MPSCNNPoolingMax(
        kernel_width=2, kernel_height=1, stride_in_pixels_x=3, padding=METHOD.ADD_REMAINDER_TO_BOTTOM_RIGHT
    )
    assert places(kernel, 1, 4) == ((1, 1), (0, 2))  # pixels 1 and 2
    assert kernel.encode(jnp.array([9.0, 1.0, 2.0, 9.0]).reshape(1, 4, 1)).item() == 2
    top_left = kernel.copy(padding=METHOD.SIZE_VALID_ONLY)
    assert places(top_left, 1, 4) == ((1, 1), (0, 1))  # pixels 0 and 1
    assert places(top_left, 1, 5)[1] == (0, 1)


def test_same_with_the_remainder_at_the_end_is_same_elsewhere():
    x = np.random.default_rng(0).normal(size=(1, 7, 1)).astype(np.float32)
    for kernel, stride in itertools.product((1, 2, 3, 5), (1, 2, 3)):
        if (-(-7 // stride) - 1) * stride + kernel - 7 <= -2:
            continue
        pool = mps.MPSCNNPoolingMax(
            kernel_width=kernel,
            kernel_height=1,
            stride_in_pixels_x=stride,
            padding=TENSORFLOW,
            edge_mode="clamp",
        )
        expected = jax_mps.max_pool(x, (1, kernel), strides=(1, stride), padding="SAME")
        np.testing.assert_array_equal(pool.encode(x), expected)


@pytest.mark.parametrize("size", range(5, 9))
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (2, 2), (3, 1), (3, 2), (4, 3), (5, 4)])
def test_same_offsets_are_those_of_the_header(size, kernel, stride):
    if (-(-size // stride) - 1) * stride + kernel - size < 0:
        return
    pool = mps.MPSCNNPoolingAverage(
        kernel_width=kernel, kernel_height=1, stride_in_pixels_x=stride, padding=TENSORFLOW
    )
    rest = (size - 1) % stride
    expected = math.ceil(rest / 2) if kernel % 2 else math.floor(rest / 2) + 1
    assert pool.placed(jnp.zeros((1, size, 1))).offset.x == expected


def test_alignments_and_remainders():
    x = jnp.zeros((4, 4, 1))
    kernel = mps.MPSCNNPoolingMax(kernel_width=2, kernel_height=2)

    def offset(method):
        at = kernel.copy(padding=method | METHOD.SIZE_SAME).placed(x).offset
        return at.y, at.x

    assert offset(METHOD.ADD_REMAINDER_TO_TOP_LEFT) == (0, 0)
    assert offset(METHOD.ADD_REMAINDER_TO_TOP_RIGHT) == (0, 1)
    assert offset(METHOD.ADD_REMAINDER_TO_BOTTOM_LEFT) == (1, 0)
    assert offset(METHOD.ADD_REMAINDER_TO_BOTTOM_RIGHT) == (1, 1)
    assert offset(METHOD.ALIGN_TOP_LEFT) == (0, 0)
    assert offset(METHOD.ALIGN_BOTTOM_RIGHT) == (1, 1)
    full = kernel.copy(padding=METHOD.SIZE_FULL)
    assert full.encode(x).shape == (5, 5, 1)


def test_exclude_edges_clamps_averages():
    x = jnp.array([6.0, 12.0, 18.0, 24.0]).reshape(1, 4, 1)
    pool = mps.MPSCNNPoolingAverage(
        kernel_width=3, kernel_height=1, padding=METHOD.EXCLUDE_EDGES | METHOD.SIZE_SAME
    )
    np.testing.assert_allclose(pool.encode(x).ravel(), [9, 12, 18, 21])


@pytest.mark.parametrize("taps", [2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_policies_of_the_transposed_convolution(taps, stride):
    """Full undoes nothing of the plain scatter, same cuts it, valid keeps what all taps reach."""
    descriptor = mps.MPSCNNConvolutionDescriptor(
        kernel_width=taps, kernel_height=1, input_feature_channels=1, output_feature_channels=1,
        stride_in_pixels_x=stride,
    )  # fmt: skip
    weights = jnp.arange(1.0, taps + 1).reshape(1, 1, taps, 1)
    kernel = mps.MPSCNNConvolutionTranspose(weights=source(descriptor, weights))
    x = jnp.array([1.0, 10.0, 100.0]).reshape(1, 3, 1)
    expanded = np.zeros(2 * stride + 1)
    expanded[::stride] = [1, 10, 100]
    for mode, method in {
        "full": METHOD.SIZE_FULL,
        "same": TENSORFLOW,
        "valid": METHOD.SIZE_VALID_ONLY,
    }.items():
        expected = np.correlate(expanded, np.asarray(weights).ravel(), "full")
        if mode == "valid":
            expected = expected[taps - 1 : len(expanded)]
        if mode == "same":
            start = taps // 2
            expected = expected[start : start + len(expanded)]
        out = kernel.copy(padding=method).encode(x).ravel()
        np.testing.assert_array_equal(out, expected, err_msg=mode)


def test_destinations_without_one_are_zero_around_what_is_written():
    x = jnp.ones((1, 3, 3, 2))
    pool = mps.MPSCNNPoolingMax(
        kernel_width=1,
        kernel_height=1,
        destination_feature_channel_offset=1,
        clip_rect=mps.MTLRegion(origin=mps.MTLOrigin(x=1), size=mps.MTLSize(height=2)),
    )
    out = np.asarray(pool.encode(x))
    expected = np.zeros((1, 3, 3, 3))
    expected[:, :2, 1:, 1:] = 1
    np.testing.assert_array_equal(out, expected)


# --- batches and states -------------------------------------------------------------------------------


def test_batches_of_images_of_any_size():
    pool = make(mps.MPSCNNPoolingMax)
    images = [jnp.ones((2, 3, 1)), jnp.ones((4, 2, 1))]
    outs, states = pool.encode_batch_with_states(images)
    assert [o.shape for o in outs] == [(2, 3, 1), (4, 2, 1)]
    gradients = make(mps.MPSCNNPoolingMaxGradient).encode_batch(outs, images, states)
    assert [g.shape for g in gradients] == [(2, 3, 1), (4, 2, 1)]
    assert (states[1].source_width, states[1].source_height) == (2, 4)


def test_states_cross_jit():
    pool, x = make(mps.MPSCNNPoolingMax), jnp.ones((3, 4, 1))
    y, state = jax.jit(pool.encode_with_state)(x)
    assert state == pool.result_state(x)
    assert jax.tree.leaves(state) == []
    out = jax.jit(make(mps.MPSCNNPoolingMaxGradient).encode)(y, x, state)
    np.testing.assert_array_equal(out, jax.vjp(pool.encode, x)[1](y)[0])


def test_without_a_state_the_result_is_shifted():
    """The origin of the clip rectangle receives the first pixel that the first window covers."""
    gradient = mps.MPSCNNPoolingMaxGradient(
        kernel_width=1, kernel_height=1, secondary_offset=mps.MPSOffset(x=2)
    )
    g, x = jnp.array([1.0, 2.0]).reshape(1, 2, 1), jnp.ones((1, 4, 1))
    np.testing.assert_array_equal(gradient.encode(g, x).ravel(), [1, 2, 0, 0])


def test_undoing_a_convolution():
    """The result has the size of the convolution's source, and is what its transpose gives."""
    rng = np.random.default_rng(0)
    for kernel, stride, low, length in [(3, 2, 1, 7), (2, 2, 0, 6), (4, 1, 2, 5), (3, 3, 0, 8)]:
        x = jnp.asarray(rng.normal(size=(1, 1, length, 2)), jnp.float32)
        w = jnp.asarray(rng.normal(size=(1, kernel, 2, 3)), jnp.float32)

        def convolve(x, w=w, stride=stride, low=low):
            return jax.lax.conv_general_dilated(
                x, w, (1, stride), ((0, 0), (low, low)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        y, pull = jax.vjp(convolve, x)
        transpose_kernel = jnp.flip(w, (0, 1)).transpose(2, 0, 1, 3)
        descriptor = mps.MPSCNNConvolutionDescriptor(
            kernel_width=kernel, kernel_height=1, input_feature_channels=3, output_feature_channels=2,
            stride_in_pixels_x=stride,
        )  # fmt: skip
        state = mps.MPSCNNConvolutionGradientState(
            source_width=length, source_height=1, offset=mps.MPSOffset(x=kernel // 2 - low)
        )
        undo = mps.MPSCNNConvolutionTranspose(weights=source(descriptor, transpose_kernel))
        out, made = undo.encode_with_state(y, convolution_gradient_state=state)
        np.testing.assert_allclose(out, pull(y)[0], rtol=1e-4, atol=1e-4)
        assert made.destination_shape == x.shape


# --- nothing under jit --------------------------------------------------------------------------------


def lowered(function, *arrays):
    def encode(*arrays):
        return function(*arrays)

    return jax.jit(encode).lower(*arrays).as_text()


IMAGE, POOLED = jnp.ones((2, 7, 8, 3)), jnp.ones((2, 4, 3, 3))
KW = {"kernel_width": 3, "kernel_height": 2, "stride_in_pixels_x": 3, "stride_in_pixels_y": 2}
CALL = {"strides": (2, 3), "padding": ((1, 0), (1, 0))}
CONVOLUTION = make(mps.MPSCNNConvolutionTranspose)
HWIO = jnp.asarray(WEIGHTS.transpose(1, 2, 3, 0))
SAME_TEXT = {
    "max": (
        lambda x: mps.MPSCNNPoolingMax(**KW, edge_mode="clamp").encode(x, POOLED),
        lambda x: jax_mps.max_pool(x, (2, 3), **CALL),
    ),
    "max inside": (
        lambda x: mps.MPSCNNPoolingMax(**KW, offset=mps.MPSOffset(x=1, y=1)).encode(x, POOLED[:, :3, :2]),
        lambda x: jax_mps.max_pool(x, (2, 3), strides=(2, 3)),
    ),
    "average": (
        lambda x: mps.MPSCNNPoolingAverage(**KW).encode(x, POOLED),
        lambda x: jax_mps.avg_pool(x, (2, 3), **CALL),
    ),
    "average clamped": (
        lambda x: mps.MPSCNNPoolingAverage(**KW, edge_mode="clamp").encode(x, POOLED),
        lambda x: jax_mps.avg_pool(x, (2, 3), **CALL, count_include_pad=False),
    ),
    "norm": (
        lambda x: mps.MPSCNNPoolingL2Norm(**KW).encode(x, POOLED),
        lambda x: jax_mps.l2_pool(x, (2, 3), **CALL),
    ),
    "max gradient": (
        lambda x: mps.MPSCNNPoolingMaxGradient(**KW, secondary_edge_mode="clamp").encode(POOLED, x),
        lambda x: jax_mps.max_pool_gradient(POOLED, x, (2, 3), **CALL),
    ),
    "average gradient": (
        lambda x: mps.MPSCNNPoolingAverageGradient(**KW).encode(POOLED, x),
        lambda x: jax_mps.avg_pool_gradient(POOLED, x.shape, (2, 3), **CALL),
    ),
    "norm gradient": (
        lambda x: mps.MPSCNNPoolingL2NormGradient(**KW).encode(POOLED, x),
        lambda x: jax_mps.l2_pool_gradient(POOLED, x, (2, 3), **CALL),
    ),
    "transposed": (
        lambda x: CONVOLUTION.encode(x[..., :2]),
        lambda x: jax_mps.conv_transpose(x[..., :2], HWIO, strides=2, padding=1),
    ),
}


@pytest.mark.parametrize("name", SAME_TEXT)
def test_lowered_text_is_that_of_the_function(name, implementation):
    by_class, by_function = SAME_TEXT[name]
    assert lowered(by_class, IMAGE) == lowered(by_function, IMAGE)


def test_plans_are_made_once():
    from jax_mps.mps.forward import forward_plan

    pool, x = make(mps.MPSCNNPoolingMax), jnp.ones((3, 9, 1))
    pool.encode(x)
    misses = forward_plan.cache_info().misses
    pool.encode(x)
    make(mps.MPSCNNPoolingMax).encode(x)
    assert forward_plan.cache_info().misses == misses


def test_the_package_is_imported_when_it_is_used():
    code = (
        "import sys, jax_mps; assert 'jax_mps.mps' not in sys.modules; jax_mps.mps.MPSOffset; "
        "from jax_mps import mps; assert mps is jax_mps.mps"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'jax_mps' has no attribute 'nothing'"):
        jax_mps.nothing  # noqa: B018


def test_export_with_any_number_of_images():
    (n,) = jax.export.symbolic_shape("n")
    for kernel in (make(mps.MPSCNNPoolingMax), make(mps.MPSCNNConvolutionTranspose)):
        x = np.random.default_rng(0).normal(size=(3, 4, 5, 2)).astype(np.float32)
        exported = jax.export.export(jax.jit(kernel.encode))(jax.ShapeDtypeStruct((n, 4, 5, 2), x.dtype))
        np.testing.assert_allclose(exported.call(x), kernel.encode(x), rtol=1e-4, atol=1e-4)
