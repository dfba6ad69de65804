"""Kernels as bytes: round trips, and input that is damaged or hostile."""

import itertools
import json
import struct
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mps_cases
import mps_random
from jax_mps import mps

safetensors = pytest.importorskip("safetensors.numpy")

DESCRIPTOR = mps.MPSCNNConvolutionDescriptor(
    kernel_width=3,
    kernel_height=2,
    input_feature_channels=4,
    output_feature_channels=2,
    stride_in_pixels_x=2,
    groups=2,
    fused_neuron_descriptor=mps.MPSNNNeuronDescriptor(neuron_type="prelu", data=[0.1, 0.2]),
    batch_normalization=mps.BatchNormalization(mean=[1, 2], variance=[1, 1], beta=[0.5, 0.1]),
)
SOURCE = mps.ConvolutionDataSource(
    DESCRIPTOR, np.arange(24, dtype=np.float32).reshape(2, 2, 3, 2), np.array([1, 2], np.float32)
)
KERNELS = [
    mps.MPSCNNPoolingMax(kernel_width=3, kernel_height=2),
    mps.MPSCNNPoolingAverage(
        kernel_width=2,
        kernel_height=2,
        stride_in_pixels_x=2,
        zero_pad_size_x=1,
        edge_mode="clamp",
        offset=mps.MPSOffset(x=-3, y=7),
        clip_rect=mps.MTLRegion(origin=mps.MTLOrigin(x=1), size=mps.MTLSize(width=3, depth=1)),
        source_feature_channel_max_count=3,
        padding="size_full",
        options="allow_reduced_precision",
    ),
    mps.MPSCNNPoolingL2Norm(kernel_width=1, kernel_height=4, implementation="xla"),
    mps.MPSCNNDilatedPoolingMax(kernel_width=2, kernel_height=2, dilation_rate_x=3),
    mps.MPSCNNPoolingMaxGradient(kernel_width=3, kernel_height=3, source_size=mps.MTLSize(width=2)),
    mps.MPSCNNPoolingAverageGradient(kernel_width=3, kernel_height=3, zero_pad_size_y=2),
    mps.MPSCNNPoolingL2NormGradient(kernel_width=3, kernel_height=3, primary_offset=mps.MPSOffset(z=-1)),
    mps.MPSCNNDilatedPoolingMaxGradient(kernel_width=3, kernel_height=3, dilation_rate_y=2),
    mps.MPSCNNConvolutionTranspose(weights=SOURCE, kernel_offset_x=-1, accumulator_precision_option="half"),
    mps.MPSCNNConvolutionTransposeGradient(weights=SOURCE, gradient_option=1),
]
IDS = [type(kernel).__name__ for kernel in KERNELS]


def own_weights(kernel):
    """What from_bytes needs beside the bytes."""
    return {"weights": SOURCE} if type(kernel) is mps.MPSCNNConvolutionTransposeGradient else {}


def written(document, tensors=None):
    """A file as a forger would make it, with a digest that fits."""
    from jax_mps.mps import coding

    tensors = {} if tensors is None else tensors
    stored = {key: value for key, value in document.items() if key != "sha256"}
    text = coding._dumps(stored | {"sha256": coding._digest(coding._dumps(stored), tensors)})
    return safetensors.save(tensors, metadata={coding.KEY: text})


def document(data):
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["jax_mps.mps"])


def test_every_class_can_be_stored():
    from jax_mps.mps import coding

    public = [getattr(mps, name) for name in mps.__all__]
    kernels = {kind for kind in public if isinstance(kind, type) and issubclass(kind, mps.MPSKernel)}
    assert set(coding.KERNELS.values()) == kernels


@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
def test_round_trip(kernel):
    data = kernel.to_bytes()
    for restored in (
        type(kernel).from_bytes(data, **own_weights(kernel)),
        mps.MPSKernel.from_bytes(memoryview(data), **own_weights(kernel)),
        mps.from_bytes(bytearray(data), **own_weights(kernel)),
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
    kernel = KERNELS[0].copy(device=device)
    assert mps.from_bytes(kernel.to_bytes()).device is None
    assert mps.from_bytes(kernel.to_bytes(), device=device) == kernel


def test_gradient_kernels_take_the_data_source_of_the_forward_kernel():
    data = KERNELS[-1].to_bytes()
    assert b"weights" not in data[: data.index(b"jax_mps.mps")]
    with pytest.raises(mps.CodingError, match="weights must be the data source"):
        mps.from_bytes(data)
    other = mps.MPSCNNConvolutionDescriptor(input_feature_channels=1, output_feature_channels=1)
    with pytest.raises(mps.CodingError, match="descriptor"):
        mps.from_bytes(data, weights=mps.ConvolutionDataSource(other, np.ones((1, 3, 3, 1), np.float32)))
    with pytest.raises(mps.CodingError, match="weights must be None"):
        mps.from_bytes(KERNELS[0].to_bytes(), weights=SOURCE)


def test_another_class_is_refused():
    data = KERNELS[0].to_bytes()
    assert mps.MPSCNNPooling.from_bytes(data) == KERNELS[0]
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
    forged = document(KERNELS[0].to_bytes()) | change
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
    forged = document(KERNELS[0].to_bytes())
    forged["settings"][setting] = value
    with pytest.raises(mps.CodingError):
        mps.from_bytes(written(forged))


def test_forged_tensors_are_refused():
    kernel = KERNELS[8]
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
        mps.from_bytes(written(document(KERNELS[0].to_bytes()), good))


def test_sizes_are_limited():
    data = KERNELS[0].to_bytes()
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
        KERNELS[0].copy(offset=mps.MPSOffset(x=2**40))
    huge = document(data)
    for number in (2**30 + 1, 2**40):
        huge["settings"]["offset"] = {"MPSOffset": {"x": number, "y": 0, "z": 0}}
        with pytest.raises(mps.CodingError):
            mps.from_bytes(safetensors.save({}, metadata={"jax_mps.mps": json.dumps(huge)}))


def test_every_prefix_is_refused():
    data = KERNELS[8].to_bytes()
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
        jax.jit(store)(KERNELS[8])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.delitem(sys.modules, "safetensors.numpy")
    with pytest.raises(ImportError, match=r"jax-mps-primitives\[mps\]"):
        KERNELS[0].to_bytes()


# --- mutations ----------------------------------------------------------------------------------------


def mutated(rng, data):
    """The bytes with a few random changes."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, kind = int(rng.integers(len(data))), rng.integers(6)
        if kind == 0:
            data[at] ^= 1 << rng.integers(8)
        elif kind == 1:
            data[at] = rng.integers(256)
        elif kind == 2:
            del data[at : at + int(rng.integers(1, 40))]
        elif kind == 3:
            data[at:at] = rng.bytes(int(rng.integers(1, 40)))
        elif kind == 4:  # a piece of the file somewhere else
            start = int(rng.integers(len(data)))
            data[at:at] = data[start : start + 20]
        else:  # a digit, which may still be well formed
            digits = [i for i, byte in enumerate(data) if 48 <= byte < 58]
            if digits:
                data[rng.choice(digits)] = 48 + rng.integers(10)
        if not data:
            break
    return bytes(data)


def fuzz(seeds):
    originals = [(kernel, kernel.to_bytes()) for kernel in KERNELS]
    refused = 0
    for seed, (kernel, data) in zip(seeds, itertools.cycle(originals), strict=False):
        changed = mutated(np.random.default_rng(seed), data)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            restored = mps.from_bytes(changed, **own_weights(kernel))
        except mps.CodingError:
            refused += 1
        else:
            assert restored == kernel, seed
            assert restored.to_bytes() == data, seed
        # What Python and NumPy allocate: copies of the input, and its JSON as objects.
        assert tracemalloc.get_traced_memory()[1] - before < 100_000 + 100 * len(changed), seed
    assert refused > 0.9 * len(seeds)


@pytest.fixture
def traced_memory():
    for kernel in KERNELS:  # what is compiled or imported once is not the input's doing
        mps.from_bytes(kernel.to_bytes(), **own_weights(kernel))
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_mutated_bytes(traced_memory):
    fuzz(range(500))


@pytest.mark.full
def test_many_mutated_bytes(traced_memory):
    fuzz(range(500, 20_500))
