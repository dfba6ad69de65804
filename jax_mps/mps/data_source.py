"""Where the parameters of a convolution come from: data sources, and the weights of uint8 that some have."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_mps.mps.descriptor import MPSCNNConvolutionDescriptor
from jax_mps.mps.states import (
    MPSCNNConvolutionTransposeGradientState,
    MPSCNNConvolutionWeightsAndBiasesState,
)
from jax_mps.mps.structs import MPSCNNWeightsQuantizationType, MPSDataType, member

Array = Any


@runtime_checkable
class MPSCNNConvolutionDataSource(Protocol):
    """Where a convolution gets its parameters from: a protocol, of which `ConvolutionDataSource` is one case.

    A kernel calls `load`, the others, and `purge`, when it is made and when it reloads. Besides the methods
    here it uses, where they exist,

    * `label()`: a name;
    * `weights_quantization_type()`, with `ranges_for_uint8_kernel()` (for each output channel the numbers
    that 0
      and 255 stand for) or `lookup_table_for_uint8_kernel()` (256 numbers), where `data_type` is UINT8;
    * `kernel_weights_data_type()`: the type to convert the weights to, FLOAT16 or FLOAT32. Without it they
    keep
      theirs;
    * `update(gradient_state, source_state)`, see `ConvolutionDataSource`.

    Source: `MPSCNNConvolutionDataSource` in MPSCNNConvolution.h.
    """

    def load(self) -> bool:
        """Makes the rest available; false fails the kernel."""

    def purge(self) -> None:
        """The data will not be needed until the next `load`."""

    def descriptor(self) -> MPSCNNConvolutionDescriptor:
        """Shape and fused functions."""

    def data_type(self) -> MPSDataType:
        """The type of the weights."""

    def weights(self) -> ArrayLike:
        """The weights `[out, height, width, in / groups]`, or flat in that order."""

    def bias_terms(self) -> ArrayLike | None:
        """A number for each output channel, or `None`."""


class ConvolutionDataSource:
    """A data source that holds its parameters in memory.

    Args:
      descriptor: the shape of the convolution, and what is fused with it.
      weights: `[out, kernel height, kernel width, in / groups]`; float32, float16, bfloat16, float64, or
        uint8.
      bias_terms: a number for each output channel, or `None` for no bias.
      label: a name.
      ranges: for linearly quantised weights of uint8, for each output channel the numbers that 0 and 255
        stand for, `[out, 2]`.
      lookup_table: for weights of uint8 by a table, the 256 numbers.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_mps import mps
      >>> descriptor = mps.MPSCNNConvolutionDescriptor(
      ...     kernel_width=2, kernel_height=1, input_feature_channels=1, output_feature_channels=1,
      ...     stride_in_pixels_x=2)
      >>> source = mps.ConvolutionDataSource(descriptor, jnp.array([1., 10.]).reshape(1, 1, 2, 1))
      >>> mps.MPSCNNConvolutionTranspose(weights=source).descriptor == descriptor
      True
    """

    def __init__(
        self,
        descriptor: MPSCNNConvolutionDescriptor,
        weights: ArrayLike,
        bias_terms: ArrayLike | None = None,
        *,
        label: str | None = None,
        ranges: ArrayLike | None = None,
        lookup_table: ArrayLike | None = None,
    ):
        if ranges is not None and lookup_table is not None:
            raise ValueError("ranges and lookup_table must not both be given")
        self._descriptor, self._weights, self._bias_terms = descriptor, weights, bias_terms
        self._label, self._ranges, self._lookup_table = label, ranges, lookup_table

    def load(self) -> bool:
        """True: there is nothing to do."""
        return True

    def purge(self) -> None:
        """Does nothing."""

    def label(self) -> str | None:
        """The name."""
        return self._label

    def descriptor(self) -> MPSCNNConvolutionDescriptor:
        """The shape of the convolution, and what is fused with it."""
        return self._descriptor

    def data_type(self) -> MPSDataType:
        """The type of the weights."""
        return member(MPSDataType, "weights", jnp.result_type(self._weights).name)

    def weights(self) -> ArrayLike:
        """The weights."""
        return self._weights

    def bias_terms(self) -> ArrayLike | None:
        """The biases."""
        return self._bias_terms

    def weights_quantization_type(self) -> MPSCNNWeightsQuantizationType:
        """What weights of uint8 stand for."""
        if self._ranges is not None:
            return MPSCNNWeightsQuantizationType.LINEAR
        if self._lookup_table is not None:
            return MPSCNNWeightsQuantizationType.LOOKUP_TABLE
        return MPSCNNWeightsQuantizationType.NONE

    def ranges_for_uint8_kernel(self) -> ArrayLike | None:
        """For each output channel the numbers that 0 and 255 stand for."""
        return self._ranges

    def lookup_table_for_uint8_kernel(self) -> ArrayLike | None:
        """The numbers that 0 to 255 stand for."""
        return self._lookup_table

    def update(
        self,
        gradient_state: MPSCNNConvolutionTransposeGradientState,
        source_state: MPSCNNConvolutionWeightsAndBiasesState,
    ) -> MPSCNNConvolutionWeightsAndBiasesState | None:
        """One step of an optimiser; this one does none. Override it.

        Args:
          gradient_state: has `gradient_for_weights` and `gradient_for_biases`.
          source_state: the parameters that the kernel used.

        Returns:
          The new parameters, for `reload_weights_and_biases`; `None` for no update. A source that keeps its
          parameters up to date stores them too, so that `reload_weights_and_biases_from_data_source` finds
          them.
        """
        del gradient_state, source_state
        return None


class Parameters(NamedTuple):
    """What a kernel takes from its data source; `kernel` is `[height, width, in / groups, out]`."""

    data_source: Any
    descriptor: MPSCNNConvolutionDescriptor
    kernel: Array
    biases: Array | None


def load(source: MPSCNNConvolutionDataSource) -> Parameters:
    """Everything that a data source says, checked."""
    if not isinstance(source, MPSCNNConvolutionDataSource):
        raise TypeError(
            "weights must be a data source, with the methods load, purge, descriptor, data_type, weights and "
            f"bias_terms, got {type(source).__name__}"
        )
    if not source.load():
        raise ValueError(f"weights must be a data source whose load() is true, got false from {source!r}")
    try:
        descriptor = source.descriptor()
        if not isinstance(descriptor, MPSCNNConvolutionDescriptor):
            raise TypeError(
                f"descriptor() of weights must be an MPSCNNConvolutionDescriptor, got {descriptor!r}"
            )
        return Parameters(
            source, descriptor, *arrays(_weights(source, descriptor), source.bias_terms(), descriptor)
        )
    finally:
        source.purge()


def arrays(weights: Any, biases: Any, descriptor: MPSCNNConvolutionDescriptor) -> tuple[Array, Array | None]:
    """Weights `[out, height, width, in / groups]` or flat, and biases, as a kernel has them."""
    weights = weights if hasattr(weights, "aval") else jnp.asarray(weights)
    if weights.dtype.name not in ("float32", "float64", "float16", "bfloat16"):
        raise TypeError(f"weights must be of a floating point dtype, got {weights.dtype.name}")
    shape = descriptor.weights_shape
    if tuple(weights.shape) not in (shape, (math.prod(shape),)):
        raise ValueError(
            f"weights must have shape (out, kernel height, kernel width, in / groups) = {shape}, "
            f"got {weights.shape}"
        )
    kernel = weights.reshape(shape).transpose(1, 2, 3, 0)
    if biases is None:
        return kernel, None
    dtype = np.float64 if weights.dtype == np.float64 else np.float32
    biases = jnp.asarray(biases, dtype)
    if biases.shape != shape[:1]:
        raise ValueError(f"bias_terms must have shape {shape[:1]}, one an output channel, got {biases.shape}")
    return kernel, biases


def _weights(source: Any, descriptor: MPSCNNConvolutionDescriptor) -> Array:
    """The weights of a data source in the type that the kernel is to use."""
    declared = member(MPSDataType, "data_type() of weights", source.data_type())
    weights = source.weights()
    actual = jnp.result_type(weights).name
    if actual != declared.value:
        raise TypeError(
            f"weights() must be of the type that data_type() says, {declared.value}, got {actual}"
        )
    if declared == MPSDataType.UINT8:
        weights = _dequantised(source, np.asarray(weights), descriptor)
    if hasattr(source, "kernel_weights_data_type"):
        wanted = member(
            MPSDataType, "kernel_weights_data_type() of weights", source.kernel_weights_data_type()
        )
        if wanted == MPSDataType.UINT8:
            raise ValueError("kernel_weights_data_type() of weights must be a float, got UINT8")
        weights = jnp.asarray(weights, wanted.value)
    return weights


def _dequantised(source: Any, weights: np.ndarray, descriptor: MPSCNNConvolutionDescriptor) -> np.ndarray:
    none = MPSCNNWeightsQuantizationType.NONE
    kind = getattr(source, "weights_quantization_type", lambda: none)()
    kind = member(MPSCNNWeightsQuantizationType, "weights_quantization_type() of weights", kind)
    if kind == none:
        raise ValueError(
            "weights of uint8 need a weights_quantization_type() of LINEAR or LOOKUP_TABLE, got NONE"
        )
    if kind == MPSCNNWeightsQuantizationType.LOOKUP_TABLE:
        table = np.asarray(source.lookup_table_for_uint8_kernel(), np.float32)
        if table.shape != (256,):
            raise ValueError(
                f"lookup_table_for_uint8_kernel() must have 256 numbers, got shape {table.shape}"
            )
        return table[weights]
    outputs = descriptor.output_feature_channels
    ranges = np.asarray(source.ranges_for_uint8_kernel(), np.float32)
    if ranges.shape != (outputs, 2):
        raise ValueError(
            f"ranges_for_uint8_kernel() must have shape {(outputs, 2)}, (least, greatest) for each output "
            f"channel, got {ranges.shape}"
        )
    least, greatest = (ranges[:, i, None] for i in range(2))
    flat = weights.reshape(outputs, -1).astype(np.float32)
    return (flat / np.float32(255) * (greatest - least) + least).reshape(weights.shape)
