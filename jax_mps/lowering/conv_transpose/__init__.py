"""The StableHLO of transposed convolution and its two gradients, in several forms.

None multiplies by inserted zeros, and none writes `lhs_dilation` out. What is left are matrix products,
ordinary convolutions, and slices, edge pads, reshapes and sums that put things in their place:

| form | forward | gradient to the image | gradient to the kernel |
|---|---|---|---|
| `conv` | transpose of a strided convolution | strided convolution | its gradient to the kernel |
| `phases` | one convolution of stride 1 whose channels are the phases, interleaved | - | - |
| `dot` | matrix product with every tap, overlapped and added | matrix product over patches | the same |
| `taps` | - | - | a matrix product for each tap, or block of taps |
| `channelwise` | depthwise: multiply and add over phases | over strided slices | multiply and reduce |

Each form has a file. `choices.py` says which form serves where, and why; `operations.py` does what it says.
`description.py` describes one convolution, `kernels.py` brings kernels to the one layout of all forms, and
`products.py` has the matrix products of two forms.
"""

from jax_mps.lowering.conv_transpose.operations import forward, gradient_data, gradient_weights

__all__ = ["forward", "gradient_data", "gradient_weights"]
