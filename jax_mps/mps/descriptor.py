"""What a convolution is: its shape, and the normalisation and activation that are fused with it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_mps import geometry
from jax_mps.mps.neuron import MPSNNNeuronDescriptor
from jax_mps.mps.structs import MPSCNNNeuronType

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
