"""Kernels as bytes: `to_bytes` and `from_bytes`, in place of NSSecureCoding.

The bytes are a safetensors file. Its metadata holds one text, the *document*, and its tensors the parameters
of a convolution:

    {"class": "MPSCNNPoolingMax", "format": "jax_mps.mps", "settings": {...}, "sha256": "...", "version": 1}

Nothing that is read is ever executed. Sizes are compared with what is there before anything is made of them:
beside the kernel's own arrays, reading takes memory for the data once more, and a megabyte; for headers
above 64 KB, that is for thousands of slopes, 16 bytes a byte of the header instead. Every setting passes
through the initialiser of its class; and what came out must give the very document that went in, tensors
included, so nothing is ignored, rounded or put right. The digest is for damage, not for forgery: who can
change the file can change it.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jax_mps.mps.data_source import ConvolutionDataSource
from jax_mps.mps.descriptor import BatchNormalization, MPSCNNConvolutionDescriptor
from jax_mps.mps.forward import MPSCNNKernel
from jax_mps.mps.gradient import MPSCNNBinaryKernel, MPSCNNGradientKernel
from jax_mps.mps.kernel import MOST_BYTES, MPSKernel, serves_kernels
from jax_mps.mps.neuron import MPSNNNeuronDescriptor
from jax_mps.mps.pooling import (
    MPSCNNDilatedPoolingMax,
    MPSCNNPooling,
    MPSCNNPoolingAverage,
    MPSCNNPoolingL2Norm,
    MPSCNNPoolingMax,
)
from jax_mps.mps.pooling_gradient import (
    MPSCNNDilatedPoolingMaxGradient,
    MPSCNNPoolingAverageGradient,
    MPSCNNPoolingGradient,
    MPSCNNPoolingL2NormGradient,
    MPSCNNPoolingMaxGradient,
)
from jax_mps.mps.structs import MPSOffset, MTLOrigin, MTLRegion, MTLSize
from jax_mps.mps.transposed import MPSCNNConvolutionTranspose
from jax_mps.mps.transposed_gradient import MPSCNNConvolutionTransposeGradient

__all__ = ["CodingError", "from_bytes", "to_bytes"]

KEY, FORMAT, VERSION = "jax_mps.mps", "jax_mps.mps", 1

MOST_HEADER = 2**18
"""Bytes of names, shapes and settings; a kernel needs some hundred, and 20 for each slope of a PReLU."""

MOST_BRACKETS = 256
"""Opening brackets of a header, each of which becomes an object of 100 bytes; a kernel needs some dozen."""

LARGEST = 2**31 - 1
"""No integer of a kernel is larger, with either sign."""

KERNELS: dict[str, type[MPSKernel]] = {
    kind.__name__: kind
    for kind in (
        MPSKernel,
        MPSCNNKernel,
        MPSCNNBinaryKernel,
        MPSCNNGradientKernel,
        MPSCNNPooling,
        MPSCNNPoolingMax,
        MPSCNNDilatedPoolingMax,
        MPSCNNPoolingAverage,
        MPSCNNPoolingL2Norm,
        MPSCNNPoolingGradient,
        MPSCNNPoolingMaxGradient,
        MPSCNNDilatedPoolingMaxGradient,
        MPSCNNPoolingAverageGradient,
        MPSCNNPoolingL2NormGradient,
        MPSCNNConvolutionTranspose,
        MPSCNNConvolutionTransposeGradient,
    )
}
"""The classes that can be stored: those of `jax_mps.mps`."""

STRUCTS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        MPSOffset,
        MTLOrigin,
        MTLSize,
        MTLRegion,
        MPSNNNeuronDescriptor,
        BatchNormalization,
        MPSCNNConvolutionDescriptor,
    )
}
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


class CodingError(ValueError):
    """Bytes that are no kernel, or not the kernel that was asked for."""


@serves_kernels
def to_bytes(kernel: MPSKernel) -> bytes:
    """See `MPSKernel.to_bytes`."""
    save = _safetensors().numpy.save
    text, tensors = _document(kernel)
    return save(tensors, metadata={KEY: text})


def from_bytes(
    data: bytes | bytearray | memoryview,
    *,
    weights: Any = None,
    device: jax.Device | None = None,
    most_bytes: int = MOST_BYTES,
) -> Any:
    """Restores whichever kernel `to_bytes` wrote.

    Args:
      data: what `to_bytes` gave.
      weights: for an `MPSCNNConvolutionTransposeGradient`, which is stored without its parameters, the data
        source of the forward kernel.
      device: the device of the kernel, as its initialiser takes it; devices are not stored.
      most_bytes: longer data is refused.

    Returns:
      A kernel equal to the one that was stored, but for its device.

    Raises:
      CodingError: the bytes are no kernel, damaged, cut off, of another version, or too long; or `weights` is
        missing, given to a kernel that stores its own or has none, or does not fit.
      ImportError: safetensors is not installed.

    Examples:
      >>> from jax_mps import mps
      >>> kernel = mps.MPSCNNPoolingMax(kernel_width=3, kernel_height=2)
      >>> mps.from_bytes(kernel.to_bytes()) == kernel
      True
    """
    text, tensors = _read(data, most_bytes)
    document = _loads(text)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        _fail(f"the metadata {KEY!r} is no description of a kernel")
    if document.get("version") != VERSION:
        _fail(f"version {document.get('version')!r:.40} is not {VERSION}, the one that this release reads")
    name = document.get("class")
    kind = KERNELS.get(name) if isinstance(name, str) else None
    if kind is None:
        _fail(f"{name!r:.80} is no class of kernels")
    if not isinstance(document.get("settings"), dict):
        _fail("the settings are missing")
    stored = {key: document[key] for key in document if key != "sha256"}
    if document.get("sha256") != _digest(_dumps(stored), tensors):
        _fail("the digest does not fit: the data is damaged")
    try:
        settings = {key: _value(value, 0) for key, value in document["settings"].items()}
        kernel = _kernel(kind, settings, tensors, weights)
    except CodingError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise CodingError(f"these are no settings of {name}: {error}") from error
    if _document(kernel)[0] != text:
        _fail("the description is not in the form that to_bytes gives it")
    return kernel if device is None else kernel.copy(device=device)


@serves_kernels
def from_bytes_of(cls: type[MPSKernel], data: bytes | bytearray | memoryview, **given: Any) -> MPSKernel:
    """See `MPSKernel.from_bytes`."""
    kernel = from_bytes(data, **given)
    if not isinstance(kernel, cls):
        _fail(f"this is an {type(kernel).__name__}, not an {cls.__name__}")
    return kernel


# --- the document -------------------------------------------------------------------------------------


def _document(kernel: Any) -> tuple[str, dict[str, np.ndarray[Any, Any]]]:
    """What describes a kernel, and its parameters."""
    name = type(kernel).__name__
    if KERNELS.get(name) is not type(kernel):
        raise TypeError(f"only kernels of jax_mps.mps can be stored, got an instance of {type(kernel)!r}")
    settings, tensors = kernel.settings(), {}
    del settings["device"]
    if hasattr(kernel, "descriptor"):
        settings["descriptor"] = kernel.descriptor
    if isinstance(kernel, MPSCNNConvolutionTranspose):
        state = kernel.export_weights_and_biases()
        if isinstance(state.weights, jax.core.Tracer):
            raise TypeError("a kernel with traced weights cannot be stored: call to_bytes outside of jit")
        tensors["weights"] = np.ascontiguousarray(state.weights)
        if state.biases is not None:
            tensors["biases"] = np.ascontiguousarray(state.biases)
    stored = {
        "class": name,
        "format": FORMAT,
        "settings": {key: _plain(key, value) for key, value in settings.items()},
        "version": VERSION,
    }
    return _dumps(stored | {"sha256": _digest(_dumps(stored), tensors)}), tensors


def _kernel(kind: Any, settings: dict[str, Any], tensors: dict[str, Any], weights: Any) -> Any:
    """The kernel that a document and its tensors describe."""
    forward = issubclass(kind, MPSCNNConvolutionTranspose)
    gradient = issubclass(kind, MPSCNNConvolutionTransposeGradient)
    if not set(tensors) <= ({"weights", "biases"} if forward else set()):
        _fail(f"{kind.__name__} is not stored with tensors {sorted(tensors)!r:.80}")
    if gradient and weights is None:
        _fail("weights must be the data source of the forward kernel: a gradient kernel is stored without")
    if not gradient and weights is not None:
        _fail(f"weights must be None for an {kind.__name__}")
    if not (forward or gradient):
        return kind(**settings)
    descriptor = settings.pop("descriptor", None)
    if forward:
        if "weights" not in tensors or not isinstance(descriptor, MPSCNNConvolutionDescriptor):
            _fail("the weights or their descriptor are missing")
        weights = ConvolutionDataSource(descriptor, tensors["weights"], tensors.get("biases"))
    kernel = kind(weights=weights, **settings)
    if kernel.descriptor != descriptor:
        _fail("weights must be a data source with the descriptor of the kernel that was stored")
    return kernel


def _dumps(document: Any) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


def _loads(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            _fail("a name is given twice")
        return dict(pairs)

    if text.count("[") + text.count("{") > MOST_BRACKETS:
        _fail(f"the header has more than {MOST_BRACKETS} brackets, more than a kernel can need")
    try:
        return json.loads(text, object_pairs_hook=once)
    except CodingError:
        raise
    except (ValueError, RecursionError) as error:
        raise CodingError(f"the header is no JSON: {error}") from error


def _digest(text: str, tensors: dict[str, np.ndarray[Any, Any]]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"\n{name} {x.dtype.name} {x.shape}\n".encode())
        digest.update(x.ravel().view(np.uint8).data)  # no copy: weights are large
    return digest.hexdigest()


def _plain(name: str, value: Any) -> Any:
    """A setting as JSON: structs become {their class: their fields}, enumerations their numbers."""
    if type(value) in STRUCTS.values():
        fields = {f.name: _plain(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {type(value).__name__: fields}
    if isinstance(value, enum.IntEnum | enum.IntFlag):
        value = int(value)
    if isinstance(value, tuple):
        return [_plain(name, v) for v in value]
    if type(value) is int and abs(value) > LARGEST:
        raise ValueError(f"{name}={value} is too large to be stored, more than {LARGEST}")
    if value is None or type(value) in (int, float, str):
        return value
    raise TypeError(f"{name}={value!r} cannot be stored")


def _value(value: Any, depth: int) -> Any:
    """The setting that `_plain` turned into JSON."""
    if depth > 4:
        _fail("the settings are nested too deeply")
    if isinstance(value, list):
        return tuple(_value(v, depth + 1) for v in value)
    if isinstance(value, dict):
        ((name, fields),) = value.items() if len(value) == 1 else ((None, None),)
        if name not in STRUCTS or not isinstance(fields, dict):
            _fail(f"{value!r:.80} is no struct")
        return STRUCTS[name](**{key: _value(v, depth + 1) for key, v in fields.items()})
    if isinstance(value, int) and abs(value) > LARGEST:
        _fail(f"{value!r:.40} is too large")
    return value


# --- the file -----------------------------------------------------------------------------------------


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "to_bytes and from_bytes need safetensors; get it with: pip install 'jax-mps-primitives[mps]'"
        ) from error
    return safetensors


def _read(data: Any, most_bytes: int) -> tuple[str, dict[str, np.ndarray[Any, Any]]]:
    """The document and the tensors of a file."""
    library = _safetensors()
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"data must be bytes, got {type(data).__name__}")
    length = memoryview(data).nbytes
    if length > most_bytes:
        _fail(f"{length} bytes are more than most_bytes={most_bytes}")
    data = bytes(data)
    header = int.from_bytes(data[:8], "little")
    if length < 8 or header > length - 8:
        _fail("the data is cut off, or no safetensors file")
    if header > MOST_HEADER:
        _fail(f"a header of {header} bytes is longer than {MOST_HEADER}, more than a kernel can need")
    try:
        loaded = _loads(data[8 : 8 + header].decode())
        entries = library.deserialize(data)  # it compares shapes and positions with what is there
    except (library.SafetensorError, UnicodeDecodeError) as error:
        raise CodingError(f"this is no safetensors file: {error}") from error
    metadata = loaded.get("__metadata__")
    if not isinstance(metadata, dict) or list(metadata) != [KEY]:
        _fail(f"the metadata must be {KEY!r} alone")
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in DTYPES:
            _fail(f"{name!r:.40} is of type {entry['dtype']}, not of {', '.join(DTYPES)}")
        if not entry["data"]:
            _fail(f"{name!r:.40} is empty")  # and its shape may be anything
        dtype = jnp.dtype(DTYPES[entry["dtype"]])
        if dtype == np.float64 and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
            _fail(f"{name!r:.40} is of type float64, for which jax_enable_x64 must be set")
        tensors[name] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
    return metadata[KEY], tensors


def _fail(message: str) -> NoReturn:
    raise CodingError(message)
