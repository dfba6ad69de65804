"""Where the parameters of a convolution come from: descriptor, data source, quantised weights."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_mps import geometry
from jax_mps.mps.neuron import MPSNNNeuronDescriptor
from jax_mps.mps.states import (
    MPSCNNConvolutionTransposeGradientState,
    MPSCNNConvolutionWeightsAndBiasesState,
)
from jax_mps.mps.structs import (
    MPSCNNNeuronType,
    MPSCNNWeightsQuantizationType,
    MPSDataType,
    member,
)

Array = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchNormalization:
    """A batch normalisation for inference: `gamma * (x - mean) / sqrt(variance + epsilon) + beta` a channel.

    Args:
      mean: one number for each output channel.
      variance: likewise.
      gamma: likewise; `None` is 1.
      beta: likewise; `None` is 0.
      epsilon: added to the variance.
    """

    mean: tuple[float, ...]
    variance: tuple[float, ...]
    gamma: tuple[float, ...] | None = None
    beta: tuple[float, ...] | None = None
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("mean", "variance", "gamma", "beta"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(np.ravel(value).astype(float).tolist()))

    def fold(self, kernel: Array, biases: Array | None) -> tuple[Array, Array]:
        """A kernel `[..., out]` and its biases that do the normalisation too."""
        scale = 1 / np.sqrt(np.array(self.variance) + self.epsilon)
        if self.gamma is not None:
            scale = scale * np.array(self.gamma)
        shift = -scale * np.array(self.mean)
        if self.beta is not None:
            shift = shift + np.array(self.beta)
        factor = jnp.asarray(scale, kernel.dtype).reshape((1,) * (kernel.ndim - 1) + scale.shape)
        dtype = np.dtype(np.float32) if biases is None else biases.dtype
        moved = jnp.asarray(shift, dtype)
        return kernel * factor, moved if biases is None else biases * jnp.asarray(scale, dtype) + moved


@dataclasses.dataclass(frozen=True, kw_only=True)
class MPSCNNConvolutionDescriptor:
    """The shape of a convolution, and what is fused with it.

    Args:
      kernel_width: columns of the weights.
      kernel_height: rows of the weights.
      input_feature_channels: channels of the source.
      output_feature_channels: channels of the result.
      stride_in_pixels_x: for a transposed convolution the upsampling factor along x.
      stride_in_pixels_y: the same along y.
      dilation_rate_x: columns from one tap to the next.
      dilation_rate_y: rows from one tap to the next.
      groups: groups of channels; divides both numbers of channels. Block g of the input feeds block g of the
        output.
      fused_neuron_descriptor: an activation function that is applied last; `None` is none.
      batch_normalization: is folded into weights and biases; see
        `set_batch_normalization_parameters_for_inference`.

    Source: `MPSCNNConvolutionDescriptor` in MPSCNNConvolution.h.
    """

    kernel_width: int = 3
    kernel_height: int = 3
    input_feature_channels: int
    output_feature_channels: int
    stride_in_pixels_x: int = 1
    stride_in_pixels_y: int = 1
    dilation_rate_x: int = 1
    dilation_rate_y: int = 1
    groups: int = 1
    fused_neuron_descriptor: MPSNNNeuronDescriptor | None = None
    batch_normalization: BatchNormalization | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name in ("fused_neuron_descriptor", "batch_normalization"):
                continue
            value = geometry.integer(field.name, getattr(self, field.name))
            if value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
            object.__setattr__(self, field.name, value)
        for name in ("input_feature_channels", "output_feature_channels"):
            if getattr(self, name) % self.groups:
                raise ValueError(f"groups must divide {name}={getattr(self, name)}, got {self.groups}")
        neuron, normalization = self.fused_neuron_descriptor, self.batch_normalization
        if neuron is not None:
            if not isinstance(neuron, MPSNNNeuronDescriptor):
                raise TypeError(
                    f"fused_neuron_descriptor must be an MPSNNNeuronDescriptor or None, got {neuron!r}"
                )
            if neuron.neuron_type == MPSCNNNeuronType.PRELU:
                self._check_length("data of fused_neuron_descriptor", neuron.data)
        if normalization is not None:
            if not isinstance(normalization, BatchNormalization):
                raise TypeError(
                    f"batch_normalization must be a BatchNormalization or None, got {normalization!r}"
                )
            for name in ("mean", "variance", "gamma", "beta"):
                self._check_length(f"{name} of batch_normalization", getattr(normalization, name))

    def _check_length(self, name: str, values: tuple[float, ...] | None) -> None:
        if values is not None and len(values) != self.output_feature_channels:
            raise ValueError(
                f"{name} must have one number for each of the {self.output_feature_channels} output "
                f"channels, got {len(values)}"
            )

    @property
    def weights_shape(self) -> tuple[int, int, int, int]:
        """`(out, kernel height, kernel width, in / groups)`."""
        per_group = self.input_feature_channels // self.groups
        return (self.output_feature_channels, self.kernel_height, self.kernel_width, per_group)

    def set_batch_normalization_parameters_for_inference(
        self,
        *,
        mean: Any,
        variance: Any,
        gamma: Any = None,
        beta: Any = None,
        epsilon: float = 1e-5,
    ) -> MPSCNNConvolutionDescriptor:
        """A descriptor like this one that normalises; see `BatchNormalization` for the arguments."""
        normalization = BatchNormalization(
            mean=mean, variance=variance, gamma=gamma, beta=beta, epsilon=epsilon
        )
        return dataclasses.replace(self, batch_normalization=normalization)


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
