"""The transposed convolution kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_mps import geometry
from jax_mps.lowering import rule
from jax_mps.mps import neuron, padding
from jax_mps.mps.forward import ForwardPlan, MPSCNNKernel, forward_plan, in_effect
from jax_mps.mps.kernel import kernel_class
from jax_mps.mps.parameters import KernelWithParameters
from jax_mps.mps.placement import Array, Images, Shape, Span, aligned, four
from jax_mps.mps.settings import one_of, setting
from jax_mps.mps.states import MPSCNNConvolutionGradientState, MPSCNNConvolutionTransposeGradientState
from jax_mps.mps.structs import MPSImageEdgeMode, MPSNNConvolutionAccumulatorPrecisionOption, MPSOffset
from jax_mps.ops.convolution import forward as conv_transpose

PRECISION = MPSNNConvolutionAccumulatorPrecisionOption


@kernel_class
class MPSCNNConvolutionTranspose(KernelWithParameters, MPSCNNKernel):
    """The transposed convolution, with bias and activation.

    Along each axis, `stride - 1` zeros are put between the pixels of the source, and the weights, not
    rotated, are moved over that in steps of one pixel. The window of pixel 0 of the clip rectangle is
    centred at the expanded pixel `offset * stride + kernel_offset`. Then biases are added and the
    descriptor's neuron is applied:

        y[i, o] = f(bias[o] + sum over k, c of weights[o, k, c] * expanded[i + total - extent // 2 + dilation
        * k, c])

    Sums are formed in float32 (float64 for float64) and rounded once. Differentiable in the source, and in
    the weights and biases: `jax.grad` of a function of the kernel gives a kernel whose
    `export_weights_and_biases` are the gradients.

    Args:
      weights: a data source, see `MPSCNNConvolutionDataSource`; it is loaded, read and purged here.
      kernel_offset_x: columns of the expanded source by which the windows are moved.
      kernel_offset_y: rows, likewise.
      accumulator_precision_option: FLOAT keeps sums, biases and activation in float32 until the result is
        stored. HALF rounds the sums to the type of the image first.
      **members: those of `MPSCNNKernel` and `MPSKernel`. `edge_mode` must be ZERO. Without a destination,
        `padding` sizes the result (SAME: `(size - 1) * stride + 1`, not `size * stride`) and replaces
        `offset` and the kernel offsets.

    Raises:
      TypeError: `weights` is no data source, or a member has the wrong type.
      ValueError: a member is out of range, or the data source does not load or does not fit its descriptor.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_mps import mps
      >>> descriptor = mps.MPSCNNConvolutionDescriptor(
      ...     kernel_width=3, kernel_height=1, input_feature_channels=1, output_feature_channels=1,
      ...     stride_in_pixels_x=2)
      >>> source = mps.ConvolutionDataSource(descriptor, jnp.array([1., 10., 100.]).reshape(1, 1, 3, 1))
      >>> kernel = mps.MPSCNNConvolutionTranspose(weights=source)
      >>> kernel.encode(jnp.array([1., 2., 3., 4.]).reshape(1, 4, 1)).ravel()
      Array([ 10., 201.,  20., 302.,  30., 403.,  40.], dtype=float32)

    Source: `MPSCNNConvolutionTranspose` in MPSCNNConvolution.h.
    """

    kernel_offset_x: int = setting(geometry.integer, default=0)
    kernel_offset_y: int = setting(geometry.integer, default=0)
    accumulator_precision_option: PRECISION = setting(one_of(PRECISION), default=PRECISION.FLOAT)

    is_backwards: ClassVar[bool] = True

    kernel_width = property(lambda self: self.descriptor.kernel_width, doc="Columns of the weights.")
    kernel_height = property(lambda self: self.descriptor.kernel_height, doc="Rows of the weights.")
    stride_in_pixels_x = property(
        lambda self: self.descriptor.stride_in_pixels_x, doc="Upsampling factor along x."
    )
    stride_in_pixels_y = property(
        lambda self: self.descriptor.stride_in_pixels_y, doc="Upsampling factor along y."
    )
    dilation_rate_x = property(
        lambda self: self.descriptor.dilation_rate_x, doc="Columns from one tap to the next."
    )
    dilation_rate_y = property(
        lambda self: self.descriptor.dilation_rate_y, doc="Rows from one tap to the next."
    )
    input_feature_channels = property(
        lambda self: self.descriptor.input_feature_channels, doc="Channels of the source."
    )
    output_feature_channels = property(
        lambda self: self.descriptor.output_feature_channels, doc="Channels of the result."
    )

    def _check(self) -> None:
        if self.edge_mode != MPSImageEdgeMode.ZERO:
            raise ValueError(
                f"edge_mode must be ZERO for a transposed convolution, got {self.edge_mode.name}: between "
                "inserted zeros there is no nearest pixel"
            )

    def _place_by_policy(self, name: str, length: int, span: Span) -> tuple[int, int]:
        return padding.sized(self.padding, name, (length - 1) * span.stride + 1, span.extent, 1)

    def _with_offset(self, y: int, x: int) -> Self:
        return self.copy(offset=MPSOffset(z=self.offset.z), kernel_offset_y=y, kernel_offset_x=x)

    def _channels_written(self, read: int) -> int:
        if read != self.descriptor.input_feature_channels:
            raise ValueError(
                f"source_image must have input_feature_channels={self.descriptor.input_feature_channels} "
                "channels to be read (see source_feature_channel_offset and "
                f"source_feature_channel_max_count), got {read}"
            )
        return self.descriptor.output_feature_channels

    def _compute(self, x: Array, plan: ForwardPlan) -> Array:
        kernel, biases, descriptor = self._kernel, self._biases, self.descriptor
        if descriptor.batch_normalization is not None:
            kernel, biases = descriptor.batch_normalization.fold(kernel, biases)
        function = descriptor.fused_neuron_descriptor
        once = biases is None and function is None
        half = self.accumulator_precision_option == PRECISION.HALF
        dtype = x.dtype if once or half else rule.accumulator(x.dtype)
        if x.size:
            params = self._function_arguments(plan.window, plan.start)
            y = conv_transpose(x, kernel, out_dtype=dtype, **params)
        else:
            y = lax.full(plan.target.block, np.zeros((), dtype))
        if biases is not None:
            y = y + biases.astype(y.dtype).reshape((1,) * (y.ndim - 1) + biases.shape)
        if function is not None:
            y = neuron.apply(y, function)
        return y if once or half else lax.convert_element_type(y, x.dtype)

    def _plan_undoing(self, state: MPSCNNConvolutionGradientState, shape: Shape) -> ForwardPlan:
        """The plan of the call that takes an image of `shape` back to a convolution's source."""
        size, offset = (state.source_height, state.source_width), (state.offset.y, state.offset.x)
        return undoing_plan(self._without_arrays(), shape, size, offset)

    def encode(
        self,
        source_image: ArrayLike,
        destination_image: ArrayLike | None = None,
        convolution_gradient_state: MPSCNNConvolutionGradientState | None = None,
    ) -> jax.Array:
        """Runs the kernel.

        Without a destination, `padding` gives the result its size and the windows their place; or, given the
        state of an ordinary convolution, the result has the size of that convolution's source and the
        windows lie where that convolution had them. Channels before `destination_feature_channel_offset` and
        pixels outside `clip_rect` are 0. With a destination, neither has a meaning: the result is the
        destination, with the clip rectangle and the channels concerned written anew.

        Args:
          source_image: an image `[height, width, channels]`, or images `[number, height, width, channels]`.
          destination_image: as many axes as the source, of its dtype.
          convolution_gradient_state: of the convolution that this kernel undoes.

        Returns:
          The destination.

        Raises:
          TypeError: an unsupported dtype, or dtypes that differ.
          ValueError: the source has not the descriptor's channels, `offset.z` and the clip rectangle ask for
            more source images than there are, the destination has too few channels, or the result would be
            empty.
        """
        if convolution_gradient_state is None or destination_image is not None:
            return super().encode(source_image, destination_image)
        x = self._image("source_image", source_image)
        return self._encode(x, self._plan_undoing(convolution_gradient_state, x.shape), None)

    def encode_with_state(
        self,
        source_image: ArrayLike,
        destination_image: ArrayLike | None = None,
        convolution_gradient_state: MPSCNNConvolutionGradientState | None = None,
    ) -> tuple[jax.Array, MPSCNNConvolutionTransposeGradientState]:
        """`encode`, and the state with which the gradient kernel undoes that call."""
        y = self.encode(source_image, destination_image, convolution_gradient_state)
        return y, self.result_state(source_image, destination_image, convolution_gradient_state)

    def encode_batch(
        self,
        source_images: Images,
        destination_images: Images | None = None,
        convolution_gradient_states: Sequence[MPSCNNConvolutionGradientState] | None = None,
    ) -> list[jax.Array]:
        """`encode` of every image of an `MPSImageBatch`."""
        batches: Any = (source_images, destination_images, convolution_gradient_states)
        return [self.encode(*images) for images in aligned(*batches)]

    def encode_batch_with_states(
        self,
        source_images: Images,
        destination_images: Images | None = None,
        convolution_gradient_states: Sequence[MPSCNNConvolutionGradientState] | None = None,
    ) -> tuple[list[jax.Array], list[Any]]:
        """`encode_with_state` of every image of an `MPSImageBatch`."""
        batches: Any = (source_images, destination_images, convolution_gradient_states)
        pairs = [self.encode_with_state(*images) for images in aligned(*batches)]
        return [y for y, _ in pairs], [state for _, state in pairs]

    def result_state(
        self,
        source_image: Any,
        destination_image: Any = None,
        convolution_gradient_state: MPSCNNConvolutionGradientState | None = None,
    ) -> MPSCNNConvolutionTransposeGradientState:
        """The state that `encode_with_state` returns for images of these shapes."""
        shape = tuple(np.shape(source_image))
        if destination_image is not None:
            plan = forward_plan(self._without_arrays(), shape, tuple(np.shape(destination_image)))
        elif convolution_gradient_state is not None:
            plan = self._plan_undoing(convolution_gradient_state, shape)
        else:
            plan = forward_plan(self._without_arrays(), shape, None)
        convolution = convolution_gradient_state and convolution_gradient_state.convolution
        return MPSCNNConvolutionTransposeGradientState(
            kernel=in_effect(plan),
            source_shape=shape,
            destination_shape=plan.target.shape,
            convolution_transpose=self,
            convolution=convolution,
        )


@functools.lru_cache(maxsize=4096)
def undoing_plan(
    kernel: MPSCNNConvolutionTranspose, shape: Shape, size: tuple[int, int], offset: tuple[int, int]
) -> ForwardPlan:
    """The plan of `kernel` undoing a convolution of a source of that size (y, x), with that offset."""
    even = [span.extent % 2 == 0 for span in kernel._spans()]
    kernel = kernel._with_offset(even[0] - offset[0], even[1] - offset[1])
    images = four(shape)[0] - kernel.offset.z
    to = (*size, kernel.destination_feature_channel_offset + kernel.output_feature_channels)
    return forward_plan(kernel, shape, to if len(shape) == 3 else (images, *to))
