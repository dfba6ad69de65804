"""Kernels as bytes: round trips, and input that is damaged or hostile."""

import json
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mps_cases
import mps_random
from jax_mps import mps

safetensors = pytest.importorskip("safetensors.numpy")

import hostile_bytes  # noqa: E402
from hostile_bytes import DESCRIPTOR, KERNELS, SOURCE, document, own_weights, written  # noqa: E402

POOLING, CONVOLUTION = KERNELS["MPSCNNPoolingMax"], KERNELS["MPSCNNConvolutionTranspose"]
GRADIENT = KERNELS["MPSCNNConvolutionTransposeGradient"]


def test_every_class_can_be_stored():
    from jax_mps.mps import coding

    public = [getattr(mps, name) for name in mps.__all__]
    kernels = {kind for kind in public if isinstance(kind, type) and issubclass(kind, mps.MPSKernel)}
    assert set(coding.KERNELS.values()) == kernels


@pytest.mark.parametrize("name", KERNELS)
def test_round_trip(name):
    kernel = KERNELS[name]
    data = kernel.to_bytes()
    for restored in (
        type(kernel).from_bytes(data, **own_weights(name)),
        mps.MPSKernel.from_bytes(memoryview(data), **own_weights(name)),
        mps.from_bytes(bytearray(data), **own_weights(name)),
    ):
        assert type(restored) is type(kernel)
        assert restored == kernel
        assert restored.settings() == kernel.settings()
        assert restored.to_bytes() == data == mps.to_bytes(kernel)


@pytest.mark.parametrize("name", mps_random.CLASSES)
def test_round_trip_of_random_kernels(name):
    for i in range(4 if name.startswith("conv") else 40):  # weights have to be compiled for
        case = mps_random.draw(name, i).case
        kernel = mps_cases.build(case)
        given = {"weights": kernel.data_source} if name == "conv_transpose_gradient" else {}
        assert mps.from_bytes(kernel.to_bytes(), **given) == kernel


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("biased", [True, False])
def test_weights_come_back_bit_by_bit(dtype, biased):
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 3, 2)), dtype)
    source = mps.ConvolutionDataSource(DESCRIPTOR, weights, np.ones(2, np.float32) if biased else None)
    kernel = mps.MPSCNNConvolutionTranspose(weights=source)
    state = mps.from_bytes(kernel.to_bytes()).export_weights_and_biases()
    assert state.weights.dtype == dtype
    assert np.array_equal(state.weights, weights)
    assert (state.biases is not None) == biased


def test_float64_needs_64_bit_types(x64):
    source = mps.ConvolutionDataSource(DESCRIPTOR, np.ones((2, 2, 3, 2)))
    kernel = mps.MPSCNNConvolutionTranspose(weights=source)
    data = kernel.to_bytes()
    assert mps.from_bytes(data) == kernel
    with jax.enable_x64(False) if hasattr(jax, "enable_x64") else pytest.skip("old JAX"):  # noqa: SIM117
        with pytest.raises(mps.CodingError, match="jax_enable_x64"):
            mps.from_bytes(data)


def test_the_device_is_given_anew():
    device = jax.devices()[0]
    kernel = POOLING.copy(device=device)
    assert mps.from_bytes(kernel.to_bytes()).device is None
    assert mps.from_bytes(kernel.to_bytes(), device=device) == kernel


def test_gradient_kernels_take_the_data_source_of_the_forward_kernel():
    data = GRADIENT.to_bytes()
    assert b"weights" not in data[: data.index(b"jax_mps.mps")]
    with pytest.raises(mps.CodingError, match="weights must be the data source"):
        mps.from_bytes(data)
    other = mps.MPSCNNConvolutionDescriptor(input_feature_channels=1, output_feature_channels=1)
    with pytest.raises(mps.CodingError, match="descriptor"):
        mps.from_bytes(data, weights=mps.ConvolutionDataSource(other, np.ones((1, 3, 3, 1), np.float32)))
    with pytest.raises(mps.CodingError, match="weights must be None"):
        mps.from_bytes(POOLING.to_bytes(), weights=SOURCE)


def test_another_class_is_refused():
    data = POOLING.to_bytes()
    assert mps.MPSCNNPooling.from_bytes(data) == POOLING
    with pytest.raises(mps.CodingError, match="MPSCNNPoolingMax, not an MPSCNNPoolingAverage"):
        mps.MPSCNNPoolingAverage.from_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": "MPSOffset"}, "no class of kernels"),
        ({"class": "from_bytes"}, "no class of kernels"),
        ({"class": "__builtins__"}, "no class of kernels"),
        ({"class": "MPSCNNPooling"}, "abstract"),
        ({"class": ["MPSCNNPoolingMax"]}, "no class of kernels"),
        ({"version": 2}, "version 2"),
        ({"version": True}, "not in the form"),
        ({"format": "other"}, "no description"),
        ({"extra": 1}, "not in the form"),
        ({"settings": []}, "settings are missing"),
        ({"settings": {}}, "no settings of MPSCNNPoolingMax"),
    ],
)
def test_forged_documents_are_refused(change, message):
    forged = document(POOLING.to_bytes()) | change
    with pytest.raises(mps.CodingError, match=message):
        mps.from_bytes(written(forged))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("kernel_width", 0),
        ("kernel_width", True),
        ("kernel_width", 3.0),
        ("kernel_width", "3"),
        ("kernel_width", 2**31),
        ("kernel_width", None),
        ("offset", {"MPSOffset": {"x": 1}}),
        ("offset", {"MTLOrigin": {"x": 0, "y": 0, "z": 0}}),
        ("offset", {"x": 0, "y": 0, "z": 0}),
        ("offset", {"MPSOffset": {"x": 0, "y": 0, "z": 0}, "MTLSize": {}}),
        ("offset", {"MPSOffset": [0, 0, 0]}),
        ("offset", {"MPSOffset": {"x": 0, "y": 0, "z": 0, "w": 0}}),
        ("edge_mode", "zero"),
        ("edge_mode", 4),
        ("padding", 1 << 14),
        ("device", None),
        ("unknown", 1),
        ("clip_rect", [[[[[[1]]]]]]),
    ],
)
def test_forged_settings_are_refused(setting, value):
    forged = document(POOLING.to_bytes())
    forged["settings"][setting] = value
    with pytest.raises(mps.CodingError):
        mps.from_bytes(written(forged))


def test_forged_tensors_are_refused():
    kernel = CONVOLUTION
    state, forged = kernel.export_weights_and_biases(), document(kernel.to_bytes())
    good = {"weights": np.ascontiguousarray(state.weights), "biases": np.asarray(state.biases)}
    assert mps.from_bytes(written(forged, good)) == kernel
    for bad in (
        {},
        {"biases": good["biases"]},
        good | {"more": good["biases"]},
        good | {"weights": good["weights"].astype(np.int32)},
        good | {"weights": good["weights"].ravel()},
        good | {"weights": good["weights"][:, :1].copy()},
        good | {"weights": np.zeros((0, 2, 3, 2), np.float32)},
        good | {"biases": good["biases"].astype(np.float16)},
    ):
        with pytest.raises(mps.CodingError):
            mps.from_bytes(written(forged, bad))
    with pytest.raises(mps.CodingError, match="not stored with tensors"):
        mps.from_bytes(written(document(POOLING.to_bytes()), good))


def test_sizes_are_limited():
    data = POOLING.to_bytes()
    with pytest.raises(mps.CodingError, match="most_bytes=10"):
        mps.from_bytes(data, most_bytes=10)
    for size in (2**63, 2**64 - 1, len(data), 2**40):
        with pytest.raises(mps.CodingError, match="cut off"):
            mps.from_bytes(struct.pack("<Q", size) + data[8:])
    with pytest.raises(mps.CodingError, match="longer than"):
        mps.from_bytes(struct.pack("<Q", 2**19) + b" " * 2**19)
    deep = b'{"__metadata__":' + b"[" * 100_000
    with pytest.raises(mps.CodingError):
        mps.from_bytes(struct.pack("<Q", len(deep)) + deep)
    nested = document(data)
    nested["settings"]["offset"] = 0
    text = json.dumps(nested).replace('"offset": 0', f'"offset": {"[" * 5000}{"]" * 5000}')
    with pytest.raises(mps.CodingError):
        mps.from_bytes(safetensors.save({}, metadata={"jax_mps.mps": text}))
    with pytest.raises(ValueError, match="x of MPSOffset must be an int from"):
        POOLING.copy(offset=mps.MPSOffset(x=2**40))
    huge = document(data)
    for number in (2**30 + 1, 2**40):
        huge["settings"]["offset"] = {"MPSOffset": {"x": number, "y": 0, "z": 0}}
        with pytest.raises(mps.CodingError):
            mps.from_bytes(safetensors.save({}, metadata={"jax_mps.mps": json.dumps(huge)}))


def test_every_prefix_is_refused():
    data = CONVOLUTION.to_bytes()
    for length in range(len(data)):
        with pytest.raises(mps.CodingError):
            mps.from_bytes(data[:length])
    with pytest.raises(TypeError, match="must be bytes"):
        mps.from_bytes("text")


def test_a_class_of_the_user_is_not_stored():
    class Mine(mps.MPSCNNPoolingMax):
        pass

    with pytest.raises(TypeError, match="only kernels of"):
        Mine(kernel_width=1, kernel_height=1).to_bytes()


def test_traced_weights_are_not_stored():
    def store(kernel):
        kernel.to_bytes()
        return 0

    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(store)(CONVOLUTION)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.delitem(sys.modules, "safetensors.numpy")
    with pytest.raises(ImportError, match=r"jax-mps-primitives\[mps\]"):
        POOLING.to_bytes()


# --- mutations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", hostile_bytes.KINDS)
@pytest.mark.parametrize("name", KERNELS)
def test_mutants_are_refused_or_what_they_say(name, kind):
    """`.ci/soak --part hostile` does it for hours."""
    outcomes = [hostile_bytes.check(hostile_bytes.mutant(name, kind, seed), name) for seed in range(8)]
    assert sum(outcome.refused for outcome in outcomes) >= 4


def test_weights_are_read_without_more_than_one_copy():
    weights = np.ones((128, 3, 3, 256), np.float32)
    descriptor = mps.MPSCNNConvolutionDescriptor(
        kernel_width=3, kernel_height=3, input_feature_channels=256, output_feature_channels=128
    )
    kernel = mps.MPSCNNConvolutionTranspose(weights=mps.ConvolutionDataSource(descriptor, weights))
    assert not hostile_bytes.check(kernel.to_bytes(), "MPSCNNConvolutionTranspose").refused


@pytest.mark.parametrize("opening", ["[", r"\u005b"])
def test_a_header_of_brackets_is_refused_before_they_are_objects(opening):
    text = json.dumps({"__metadata__": {"jax_mps.mps": "filled"}}).replace(
        "filled", f"[{f'{opening}],' * (200_000 // len(opening + '],'))}0]"
    )
    data = struct.pack("<Q", len(text)) + text.encode()
    with pytest.raises(mps.CodingError, match="brackets"):
        mps.from_bytes(data)
    assert hostile_bytes.check(data, "MPSCNNPoolingMax").allocated < 3 * len(data)
