"""Stored kernels of `jax_mps.mps`, files that a forger makes of them, and what `from_bytes` owes to each."""

from __future__ import annotations

import dataclasses
import json
import struct
import tracemalloc
from typing import Any

import numpy as np
import safetensors.numpy

from jax_mps import mps
from jax_mps.mps import coding

Document = dict[str, Any]
Tensors = dict[str, np.ndarray[Any, Any]]

# --- what is stored -----------------------------------------------------------------------------------

classes: Any = mps  # enumerations may be given as text, which types do not know
DESCRIPTOR = classes.MPSCNNConvolutionDescriptor(
    kernel_width=3,
    kernel_height=2,
    input_feature_channels=4,
    output_feature_channels=2,
    stride_in_pixels_x=2,
    groups=2,
    fused_neuron_descriptor=classes.MPSNNNeuronDescriptor(neuron_type="prelu", data=[0.1, 0.2]),
    batch_normalization=classes.BatchNormalization(mean=[1, 2], variance=[1, 1], beta=[0.5, 0.1]),
)
SOURCE = classes.ConvolutionDataSource(
    DESCRIPTOR, np.arange(24, dtype=np.float32).reshape(2, 2, 3, 2), np.array([1, 2], np.float32)
)
KERNELS: dict[str, mps.MPSKernel] = {
    type(kernel).__name__: kernel
    for kernel in (
        classes.MPSCNNPoolingMax(kernel_width=3, kernel_height=2),
        classes.MPSCNNPoolingAverage(
            kernel_width=2,
            kernel_height=2,
            stride_in_pixels_x=2,
            zero_pad_size_x=1,
            edge_mode="clamp",
            offset=classes.MPSOffset(x=-3, y=7),
            clip_rect=classes.MTLRegion(
                origin=classes.MTLOrigin(x=1), size=classes.MTLSize(width=3, depth=1)
            ),
            source_feature_channel_max_count=3,
            padding="size_full",
            options="allow_reduced_precision",
        ),
        classes.MPSCNNPoolingL2Norm(kernel_width=1, kernel_height=4, implementation="xla"),
        classes.MPSCNNDilatedPoolingMax(kernel_width=2, kernel_height=2, dilation_rate_x=3),
        classes.MPSCNNPoolingMaxGradient(
            kernel_width=3, kernel_height=3, source_size=classes.MTLSize(width=2)
        ),
        classes.MPSCNNPoolingAverageGradient(kernel_width=3, kernel_height=3, zero_pad_size_y=2),
        classes.MPSCNNPoolingL2NormGradient(
            kernel_width=3, kernel_height=3, primary_offset=classes.MPSOffset(z=-1)
        ),
        classes.MPSCNNDilatedPoolingMaxGradient(kernel_width=3, kernel_height=3, dilation_rate_y=2),
        classes.MPSCNNConvolutionTranspose(
            weights=SOURCE,
            kernel_offset_x=-1,
            accumulator_precision_option="half",
        ),
        classes.MPSCNNConvolutionTransposeGradient(weights=SOURCE, gradient_option=1),
        classes.MPSKernel(),
        classes.MPSCNNKernel(),
        classes.MPSCNNBinaryKernel(),
        classes.MPSCNNGradientKernel(),
    )
}
"""One of every class that is not abstract."""


def own_weights(name: str) -> dict[str, Any]:
    """What `from_bytes` needs beside the bytes."""
    return {"weights": SOURCE} if name == "MPSCNNConvolutionTransposeGradient" else {}


# --- files --------------------------------------------------------------------------------------------


def document(data: bytes) -> Document:
    """What the metadata of a file says."""
    return json.loads(_header(data)["__metadata__"][coding.KEY])


def tensors(data: bytes) -> Tensors:
    """The tensors of a file."""
    return safetensors.numpy.load(data)


def written(document: Document, tensors: Tensors | None = None) -> bytes:
    """A file as a forger would make it, with a digest that fits."""
    tensors = {} if tensors is None else tensors
    stored = {key: value for key, value in document.items() if key != "sha256"}
    text = coding._dumps(stored | {"sha256": coding._digest(coding._dumps(stored), tensors)})
    return safetensors.numpy.save(tensors, metadata={coding.KEY: text})


def with_text(name: str, text: str) -> bytes:
    """The file of a class with another document. The digest is made to fit where the text is an object."""
    arrays = tensors(KERNELS[name].to_bytes())
    try:
        return written(dict(json.loads(text)), arrays)
    except (TypeError, ValueError, RecursionError):
        return safetensors.numpy.save(arrays, metadata={coding.KEY: text})


def _header(data: bytes) -> dict[str, Any]:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size])


# --- mutations ----------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 255, 256, 2**31 - 1, -(2**31), 2**31, 2**63, 2**64, 10**40, 0.5, -0.0,
    1e308, float("nan"), float("inf"), "", "zero", "MPSOffset", "\u0000", "\ud800", "x" * 300, [], [[]], [0],
    {}, {"": 0}, {"MPSOffset": {"x": 0, "y": 0, "z": 0}}, {"MTLSize": {}}, "F32", "BF16", "F64", "I8",
)  # fmt: skip
"""Values where others are expected."""


KINDS = ("bytes", "header", "document", "large")
MANY = ("[],", "{},", "[{}],", "0,", "1.5,", "77777,", '"",', '"ab",', '"\\u00e9",', "\\u005b\\u005d,", " ")
"""What a large header may be full of; the last but one are brackets to the second reader alone."""


def mutant(name: str, kind: str, seed: int) -> bytes:
    """A changed file of a class: `kind` says whether bytes, the header or the document changed, or grew."""
    rng = np.random.default_rng([list(KERNELS).index(name), KINDS.index(kind), seed])
    data = KERNELS[name].to_bytes()
    if kind == "large":
        return _with_large_header(rng, data)
    if kind == "bytes":
        return mutated(rng, data)
    if kind == "header":
        header = _header(data)
        for _ in range(rng.integers(1, 4)):
            header = changed(rng, header)
        (size,) = struct.unpack("<Q", data[:8])
        # Parts that are no UTF-8 cannot be written; those that Python alone calls JSON can.
        text = json.dumps(header).encode("utf-8", "replace")
        lengths = (len(text),) * 40 + (0, 1, len(text) - 1, 2**32, 2**63, 2**64 - 1)
        length = lengths[rng.integers(len(lengths))]
        return struct.pack("<Q", length) + text + data[8 + size :]
    forged, arrays = document(data), tensors(data)
    for _ in range(rng.integers(1, 4)):
        forged = changed(rng, forged)
    if rng.random() < 0.3:
        arrays = _other_tensors(rng, arrays)
    return written(forged if isinstance(forged, dict) else {"document": forged}, arrays)


def _with_large_header(rng: np.random.Generator, data: bytes) -> bytes:
    """The file with thousands of values in its header or in its document, to the largest size and beyond."""
    (size,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + size].decode()
    many = MANY[rng.integers(len(MANY))]
    filling = "[" + many * (int(rng.integers(2**19)) // len(many)) + "0]"
    if rng.random() < 0.7:  # in the document, whose quotes are escaped
        filling = filling.replace('"', '\\"')
        place = text.rindex('\\"version\\"') + len('\\"version\\":')
    else:
        place = text.index("{") + 1
        filling = f'"more":{filling},'
    text = text[:place] + filling + text[place:]
    return struct.pack("<Q", len(text)) + text.encode() + data[8 + size :]


def mutated(rng: np.random.Generator, data: bytes) -> bytes:
    """The bytes with a few random changes."""
    changing = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, kind = int(rng.integers(len(changing))), rng.integers(6)
        if kind == 0:
            changing[at] ^= 1 << rng.integers(8)
        elif kind == 1:
            changing[at] = rng.integers(256)
        elif kind == 2:
            del changing[at : at + int(rng.integers(1, 40))]
        elif kind == 3:
            changing[at:at] = rng.bytes(int(rng.integers(1, 40)))
        elif kind == 4:  # a piece of the file somewhere else
            start = int(rng.integers(len(changing)))
            changing[at:at] = changing[start : start + 20]
        else:  # a digit, which may still be well formed
            digits = [i for i, byte in enumerate(changing) if 48 <= byte < 58]
            if digits:
                changing[rng.choice(digits)] = 48 + rng.integers(10)
        if not changing:
            break
    return bytes(changing)


def changed(rng: np.random.Generator, node: Any) -> Any:
    """A tree of JSON with one change, as likely deep as near the root."""
    if not isinstance(node, dict | list) or not node or rng.random() < 0.05:
        return _other_value(rng, node)
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    key = keys[rng.integers(len(keys))]
    copy: Any = node.copy()
    if isinstance(node[key], dict | list) or rng.random() < 0.6:
        copy[key] = changed(rng, node[key])
    elif rng.random() < 0.5:
        del copy[key]
    elif isinstance(copy, dict):
        copy[str(rng.choice(["x", "device", "class", "__metadata__", f"{key}_"]))] = node[key]
    else:
        copy.insert(int(rng.integers(len(copy))), node[key])
    return copy


def _other_value(rng: np.random.Generator, value: Any) -> Any:
    if type(value) is int and rng.random() < 0.7:
        return value + int(rng.choice([-2, -1, 1, 2, 100, 10_000]))
    if type(value) is float and rng.random() < 0.7:
        return value * float(rng.choice([-1, 0, 0.5, 1e300]))
    if rng.random() < 0.2:
        for _ in range(rng.integers(1, 8)):
            value = [value] if rng.random() < 0.5 else {"MTLRegion": value}
        return value
    return ODD[rng.integers(len(ODD))]


def _other_tensors(rng: np.random.Generator, arrays: Tensors) -> Tensors:
    """The arrays with one of another type or shape, too many or missing."""
    if not arrays or rng.random() < 0.2:
        return arrays | {"biases" if rng.random() < 0.5 else "more": np.ones(2, np.float32)}
    name = sorted(arrays)[rng.integers(len(arrays))]
    x = arrays[name]
    others = (
        x.ravel(),
        x[..., :1].copy(),
        x[:0],
        x[None],
        np.repeat(x, 2, axis=-1),
        x.astype(str(rng.choice(["float16", "float64", "int32", "bool", "complex64"]))),
        np.where(rng.random(x.shape) < 0.5, np.float32(np.nan), x),
    )
    without = {key: value for key, value in arrays.items() if key != name}
    choice = int(rng.integers(len(others) + 1))
    return without if choice == len(others) else without | {name: others[choice]}


# --- what is owed -------------------------------------------------------------------------------------

MEGABYTE = 2**20


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a file."""

    refused: bool
    allocated: int
    """The most bytes that Python and NumPy had at once for it."""


def check(data: bytes, name: str) -> Outcome:
    """Reads a file that was made of one of class `name`: it is refused, or it is what the kernel gives.

    Refused means a `CodingError`. A file that is accepted gives a kernel that is stored with the very
    document and tensors of the file, bit by bit, and restored from that it is equal. Either takes no more
    memory than the file once more, and a megabyte; of headers above 64 KB, whose numbers become objects, 16
    bytes a byte.
    """
    header = min(int.from_bytes(data[:8], "little"), len(data), coding.MOST_HEADER)
    allowed = len(data) + max(MEGABYTE, 16 * header)
    outcome = read(data, name)
    if outcome.allocated > allowed:
        outcome = read(data, name)  # what is compiled or imported once is not the input's doing
    assert outcome.allocated <= allowed, (len(data), header, outcome)
    return outcome


def read(data: bytes, name: str) -> Outcome:
    """Reads a file, and checks everything but the memory that it took."""
    already = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            restored = mps.from_bytes(data, **own_weights(name))
        except mps.CodingError:
            restored = None
        allocated = tracemalloc.get_traced_memory()[1] - before
    finally:
        if not already:
            tracemalloc.stop()
    if restored is not None:
        again = restored.to_bytes()
        assert _header(again)["__metadata__"] == _header(data)["__metadata__"], "another document"
        assert _plain(tensors(again)) == _plain(tensors(data)), "other tensors"
        # Kernels of weights that are NaN equal no other.
        assert mps.from_bytes(again, **own_weights(name)).to_bytes() == again, "another kernel"
    return Outcome(restored is None, allocated)


def _plain(tensors: Tensors) -> dict[str, Any]:
    """Equal where the bits are."""
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in tensors.items()}
