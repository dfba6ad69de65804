"""What a forward kernel hands to its gradient kernel, and what a gradient kernel hands to an optimiser."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_mps.mps.descriptor import MPSCNNConvolutionDescriptor
from jax_mps.mps.structs import MPSCNNConvolutionWeightsLayout, MPSOffset

Shape = tuple[int, ...]
ORIGIN = MPSOffset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MPSNNGradientState:
    """The record of one call of a forward kernel, from `result_state` or `encode_with_state`.

    Attributes:
      kernel: the forward kernel, with the offset and the clip rectangle that were in effect.
      source_shape: shape of the source.
      destination_shape: shape of the destination.
    """

    kernel: Any
    source_shape: Shape
    destination_shape: Shape

    @property
    def source_width(self) -> int:
        """Columns of the source image."""
        return self.source_shape[-2]

    @property
    def source_height(self) -> int:
        """Rows of the source image."""
        return self.source_shape[-3]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MPSCNNConvolutionGradientState:
    """The record of one call of an ordinary convolution, for the transposed one that undoes it.

    There is no class of ordinary convolutions here (`jax.lax` has them); make this state from what one does.

    Attributes:
      source_width: columns of the convolution's source.
      source_height: rows of the convolution's source.
      offset: the convolution's offset, as MPS counts it: the centre of its first window. One that pads with
        `low` pixels has `(dilation * (kernel - 1) + 1) // 2 - low`.
      gradient_for_weights: float32 `[out, height, width, in / groups]`, once known.
      gradient_for_biases: float32 `[out]`, once known.
      convolution: the convolution, whatever stands for it.
    """

    source_width: int
    source_height: int
    offset: MPSOffset = ORIGIN
    gradient_for_weights: Any = None
    gradient_for_biases: Any = None
    convolution: Any = None

    gradient_for_weights_layout = MPSCNNConvolutionWeightsLayout.OHWI


@dataclasses.dataclass(frozen=True, kw_only=True)
class MPSCNNConvolutionTransposeGradientState(MPSNNGradientState):
    """The record of one call of a transposed convolution, and after the gradient kernel its gradients.

    Attributes:
      kernel: the forward kernel, with the offset and the clip rectangle that were in effect, without weights.
      gradient_for_weights: float32 `[out, height, width, in / groups]`, summed over the images (float64 for
        float64 images); `None` before the gradient kernel, or where it was not asked for.
      gradient_for_biases: float32 `[out]`, likewise.
      convolution_transpose: the forward kernel.
      convolution: what the `MPSCNNConvolutionGradientState` given to the forward kernel had, if one was
        given.
    """

    convolution_transpose: Any = None
    gradient_for_weights: Any = None
    gradient_for_biases: Any = None
    convolution: Any = None

    gradient_for_weights_layout = MPSCNNConvolutionWeightsLayout.OHWI


@dataclasses.dataclass(frozen=True, kw_only=True)
class MPSCNNConvolutionWeightsAndBiasesState:
    """The parameters of a convolution.

    Attributes:
      weights: `[out, height, width, in / groups]`.
      biases: `[out]`, or `None` for none.
    """

    weights: ArrayLike
    biases: ArrayLike | None = None

    @classmethod
    def from_descriptor(
        cls, descriptor: MPSCNNConvolutionDescriptor
    ) -> MPSCNNConvolutionWeightsAndBiasesState:
        """Zeros in the shapes that a descriptor asks for."""
        return cls(
            weights=jnp.zeros(descriptor.weights_shape, jnp.float32),
            biases=jnp.zeros(descriptor.output_feature_channels, jnp.float32),
        )


jax.tree_util.register_dataclass(
    MPSNNGradientState, data_fields=[], meta_fields=["kernel", "source_shape", "destination_shape"]
)
jax.tree_util.register_dataclass(
    MPSCNNConvolutionTransposeGradientState,
    data_fields=["convolution_transpose", "gradient_for_weights", "gradient_for_biases"],
    meta_fields=["kernel", "source_shape", "destination_shape", "convolution"],
)
jax.tree_util.register_dataclass(
    MPSCNNConvolutionGradientState,
    data_fields=["gradient_for_weights", "gradient_for_biases"],
    meta_fields=["source_width", "source_height", "offset", "convolution"],
)
jax.tree_util.register_dataclass(
    MPSCNNConvolutionWeightsAndBiasesState, data_fields=["weights", "biases"], meta_fields=[]
)
