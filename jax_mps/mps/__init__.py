"""Apple's MPS CNN kernels, by name: pooling, transposed convolution, and their gradients.

The classes have the members and the meaning that Apple documents, with names in snake case and keywords for
the labels of the initialisers. A kernel does not change; `copy` makes changed ones. Images are arrays
`[height, width, channels]`, or `[number, height, width, channels]`. Everything works under `jit`, `vmap` and
`grad`, and a kernel costs nothing beside the function that it translates to (`jax_mps.max_pool` and so on).

Examples:
  >>> import jax, jax.numpy as jnp
  >>> from jax_mps import mps
  >>> window = dict(kernel_width=2, kernel_height=2, stride_in_pixels_x=2, stride_in_pixels_y=2)
  >>> pool = mps.MPSCNNPoolingMax(**window, offset=mps.MPSOffset(x=1, y=1))
  >>> x = jnp.arange(16.).reshape(4, 4, 1)
  >>> y, state = pool.encode_with_state(x, jnp.zeros((2, 2, 1)))
  >>> y[:, :, 0]
  Array([[ 5.,  7.],
         [13., 15.]], dtype=float32)
  >>> mps.MPSCNNPoolingMaxGradient(**window).encode(jnp.ones_like(y), x, state)[:, :, 0]
  Array([[0., 0., 0., 0.],
         [0., 1., 0., 1.],
         [0., 0., 0., 0.],
         [0., 1., 0., 1.]], dtype=float32)
"""

from jax_mps.mps.coding import CodingError, from_bytes, to_bytes
from jax_mps.mps.data_source import ConvolutionDataSource, MPSCNNConvolutionDataSource
from jax_mps.mps.descriptor import BatchNormalization, MPSCNNConvolutionDescriptor
from jax_mps.mps.draw import draw_windows
from jax_mps.mps.forward import MPSCNNKernel
from jax_mps.mps.gradient import MPSCNNBinaryKernel, MPSCNNGradientKernel
from jax_mps.mps.kernel import MPSKernel
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
from jax_mps.mps.states import (
    MPSCNNConvolutionGradientState,
    MPSCNNConvolutionTransposeGradientState,
    MPSCNNConvolutionWeightsAndBiasesState,
    MPSNNGradientState,
)
from jax_mps.mps.structs import (
    MPSCNNConvolutionGradientOption,
    MPSCNNConvolutionWeightsLayout,
    MPSCNNNeuronType,
    MPSCNNWeightsQuantizationType,
    MPSDataType,
    MPSImageEdgeMode,
    MPSKernelOptions,
    MPSNNConvolutionAccumulatorPrecisionOption,
    MPSNNPaddingMethod,
    MPSOffset,
    MTLOrigin,
    MTLRegion,
    MTLSize,
)
from jax_mps.mps.transposed import MPSCNNConvolutionTranspose
from jax_mps.mps.transposed_gradient import MPSCNNConvolutionTransposeGradient

__all__ = [
    "BatchNormalization",
    "CodingError",
    "ConvolutionDataSource",
    "MPSCNNBinaryKernel",
    "MPSCNNConvolutionDataSource",
    "MPSCNNConvolutionDescriptor",
    "MPSCNNConvolutionGradientOption",
    "MPSCNNConvolutionGradientState",
    "MPSCNNConvolutionTranspose",
    "MPSCNNConvolutionTransposeGradient",
    "MPSCNNConvolutionTransposeGradientState",
    "MPSCNNConvolutionWeightsAndBiasesState",
    "MPSCNNConvolutionWeightsLayout",
    "MPSCNNDilatedPoolingMax",
    "MPSCNNDilatedPoolingMaxGradient",
    "MPSCNNGradientKernel",
    "MPSCNNKernel",
    "MPSCNNNeuronType",
    "MPSCNNPooling",
    "MPSCNNPoolingAverage",
    "MPSCNNPoolingAverageGradient",
    "MPSCNNPoolingGradient",
    "MPSCNNPoolingL2Norm",
    "MPSCNNPoolingL2NormGradient",
    "MPSCNNPoolingMax",
    "MPSCNNPoolingMaxGradient",
    "MPSCNNWeightsQuantizationType",
    "MPSDataType",
    "MPSImageEdgeMode",
    "MPSKernel",
    "MPSKernelOptions",
    "MPSNNConvolutionAccumulatorPrecisionOption",
    "MPSNNGradientState",
    "MPSNNNeuronDescriptor",
    "MPSNNPaddingMethod",
    "MPSOffset",
    "MTLOrigin",
    "MTLRegion",
    "MTLSize",
    "draw_windows",
    "from_bytes",
    "to_bytes",
]
