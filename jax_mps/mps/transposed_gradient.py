"""The gradient of the transposed convolution kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_mps.lowering import rule
from jax_mps.mps.forward import MPSCNNKernel
from jax_mps.mps.gradient import MPSCNNGradientKernel
from jax_mps.mps.gradient_plan import GradientPlan, block_written, transposed_plan, with_members_of
from jax_mps.mps.kernel import kernel_class
from jax_mps.mps.parameters import KernelWithParameters
from jax_mps.mps.placement import Array, Images, aligned, check_destination
from jax_mps.mps.settings import one_of, setting, struct
from jax_mps.mps.states import MPSCNNConvolutionTransposeGradientState
from jax_mps.mps.structs import MPSCNNConvolutionGradientOption, MPSImageEdgeMode, MPSOffset
from jax_mps.mps.transposed import MPSCNNConvolutionTranspose
from jax_mps.ops.convolution import gradient_data, gradient_weights

OPTION = MPSCNNConvolutionGradientOption


@kernel_class
class MPSCNNConvolutionTransposeGradient(KernelWithParameters, MPSCNNGradientKernel):
    """The gradient of `MPSCNNConvolutionTranspose`: to its source, its weights and its biases.

    With E the gradient of the pixels that the forward kernel wrote, X its source, and the output pixel
    `i = stride * j - total + extent // 2 - dilation * k` that tap k of source pixel j feeds,

        data     dX[j, c]    = sum over o, k of      weights[o, k, c] * E[i, o]
        weights  dW[o, k, c] = sum over images, j of E[i, o] * X[j, c]
        biases   db[o]       = sum over images, i of E[i, o]

    E is the gradient before biases and activation: of a fused neuron or batch normalisation nothing is
    undone here (`jax.grad` through the forward kernel does undo them).

    Args:
      weights: the data source of the forward kernel.
      offset: the forward kernel's offset.
      kernel_offset_x: the forward kernel's.
      kernel_offset_y: the forward kernel's.
      gradient_option: which gradients to compute.
      **members: those of `MPSCNNBinaryKernel` and `MPSKernel`; `primary_offset` and `secondary_offset` must
        be 0.

    Raises:
      TypeError: `weights` is no data source, or a member has the wrong type.
      ValueError: a member is out of range, or the data source does not load or does not fit its descriptor.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_mps import mps
      >>> descriptor = mps.MPSCNNConvolutionDescriptor(
      ...     kernel_width=3, kernel_height=1, input_feature_channels=1, output_feature_channels=1)
      >>> source = mps.ConvolutionDataSource(descriptor, jnp.array([1., 10., 100.]).reshape(1, 1, 3, 1))
      >>> g = jnp.array([1., 10., 100., 1000.]).reshape(1, 4, 1)
      >>> x = jnp.array([1., 2., 3., 4.]).reshape(1, 4, 1)
      >>> dx, state = mps.MPSCNNConvolutionTransposeGradient(weights=source).encode(g, x)
      >>> dx.ravel()
      Array([   20.,   300.,  3000., 20000.], dtype=float32)
      >>> state.gradient_for_weights.ravel(), state.gradient_for_biases
      (Array([3210., 4321.,  432.], dtype=float32), Array([1111.], dtype=float32))

    Source: `MPSCNNConvolutionTransposeGradient` in MPSCNNConvolution.h.
    """

    offset: MPSOffset = setting(struct(MPSOffset), default=MPSOffset())
    gradient_option: MPSCNNConvolutionGradientOption = setting(one_of(OPTION), default=OPTION.ALL)

    source_gradient_feature_channels = property(
        lambda self: self.descriptor.output_feature_channels, doc="Channels of the incoming gradient."
    )
    source_image_feature_channels = property(
        lambda self: self.descriptor.input_feature_channels, doc="Channels of the source."
    )

    def _check(self) -> None:
        for name in ("primary_offset", "secondary_offset"):
            if getattr(self, name) != MPSOffset():
                raise ValueError(
                    f"{name} must be 0 for the gradient of a transposed convolution, whose windows offset "
                    f"and kernel_offset place as in the forward kernel, got {getattr(self, name)}"
                )
        if self.secondary_edge_mode != MPSImageEdgeMode.ZERO:
            raise ValueError(
                "secondary_edge_mode must be ZERO for a transposed convolution, got "
                f"{self.secondary_edge_mode.name}"
            )
        if not self.gradient_option:
            raise ValueError(f"gradient_option must ask for a gradient, got {self.gradient_option!r}")

    def _members_from(self, forward: MPSCNNKernel) -> dict[str, Any]:
        assert isinstance(forward, MPSCNNConvolutionTranspose)
        return {
            "offset": forward.offset,
            "kernel_offset_x": forward.kernel_offset_x,
            "kernel_offset_y": forward.kernel_offset_y,
            "primary_source_feature_channel_offset": forward.destination_feature_channel_offset,
            "primary_source_feature_channel_max_count": forward.output_feature_channels,
            "secondary_source_feature_channel_offset": forward.source_feature_channel_offset,
            "secondary_source_feature_channel_max_count": forward.input_feature_channels,
            "destination_feature_channel_offset": forward.source_feature_channel_offset,
            "clip_rect": None,
        }

    def encode(
        self,
        source_gradient: ArrayLike,
        source_image: ArrayLike,
        gradient_state: MPSCNNConvolutionTransposeGradientState | None = None,
        destination_gradient: ArrayLike | None = None,
    ) -> tuple[jax.Array | None, MPSCNNConvolutionTransposeGradientState]:
        """Runs the kernel.

        Args:
          source_gradient: the gradient of the forward kernel's clip rectangle; given its state and no
            destination, the gradient of all of its destination will do too.
          source_image: the forward kernel's source, of as many axes and the same dtype.
          gradient_state: the state of the forward call. Without a destination, offsets and channel offsets
            are those of that call. With one it is only checked.
          destination_gradient: an array to write the gradient of the source into, within the clip rectangle.

        Returns:
          A pair: the gradient of the source, and the state with `gradient_for_weights` and
          `gradient_for_biases`; `None` for each of the three that `gradient_option` does not ask for. The
          first is the destination, or without one an array like `source_image`, with zeros where nothing is
          written.

        Raises:
          TypeError: an unsupported dtype, or dtypes that differ.
          ValueError: the state is that of another kernel or of other shapes, the numbers of channels are not
            those of the descriptor, or the gradient has more images than the source.
        """
        g, x = self._operands(source_gradient, source_image)
        kernel, shape, destination = self._without_arrays(), x.shape, None
        if gradient_state is not None:
            self._check_state(gradient_state, MPSCNNConvolutionTranspose)
        if destination_gradient is not None:
            destination = self._image("destination_gradient", destination_gradient)
            check_destination("destination_gradient", destination, "source_image", x)
            shape = destination.shape
        elif gradient_state is not None:
            forward = gradient_state.kernel
            g = block_written(forward, gradient_state.destination_shape, g.shape).read(g)
            kernel = with_members_of(kernel, forward)
        plan = transposed_plan(kernel, self.descriptor, kernel.offset.z, g.shape, x.shape, shape)
        g, images = plan.gradient.read(g), plan.image.read(x)
        data = weights = biases = None
        if self.gradient_option & OPTION.GRADIENT_WITH_DATA:
            data = self._gradient_with_data(g, plan, x.dtype, destination)
        if self.gradient_option & OPTION.GRADIENT_WITH_WEIGHTS_AND_BIAS:
            weights, biases = self._gradient_with_weights_and_bias(g, images, plan)
        if gradient_state is None:
            gradient_state = MPSCNNConvolutionTransposeGradientState(
                kernel=self._without_arrays(), source_shape=x.shape, destination_shape=g.shape
            )
        return data, dataclasses.replace(
            gradient_state, gradient_for_weights=weights, gradient_for_biases=biases
        )

    def _gradient_with_data(
        self, g: Array, plan: GradientPlan, dtype: DTypeLike, destination: Array | None
    ) -> Array:
        arguments = self._function_arguments(plan.window, plan.start)

        def derivative() -> Array:
            return gradient_data(g, self._kernel, out_dtype=dtype, **arguments)

        return plan.write(derivative, dtype, destination)

    def _gradient_with_weights_and_bias(self, g: Array, x: Array, plan: GradientPlan) -> tuple[Array, Array]:
        sums = rule.accumulator(x.dtype)
        if g.size and x.size:
            arguments = self._function_arguments(plan.window, plan.start)
            weights = gradient_weights(g, x, out_dtype=sums, **arguments).transpose(3, 0, 1, 2)
        else:
            weights = jnp.zeros(self.descriptor.weights_shape, sums)
        return weights, jnp.sum(g, axis=tuple(range(g.ndim - 1)), dtype=sums)

    def encode_batch(
        self,
        source_gradients: Images,
        source_images: Images,
        gradient_states: Sequence[MPSCNNConvolutionTransposeGradientState] | None = None,
        destination_gradients: Images | None = None,
    ) -> tuple[list[jax.Array | None], MPSCNNConvolutionTransposeGradientState]:
        """`encode` of every image of an `MPSImageBatch`; one state holds the sums of the gradients."""
        batches: Any = (source_gradients, source_images, gradient_states, destination_gradients)
        data, states = zip(*(self.encode(*images) for images in aligned(*batches)), strict=True)
        first, *rest = states
        weights, biases = first.gradient_for_weights, first.gradient_for_biases
        if weights is not None:
            for state in rest:
                weights, biases = weights + state.gradient_for_weights, biases + state.gradient_for_biases
        return list(data), dataclasses.replace(
            first, gradient_for_weights=weights, gradient_for_biases=biases
        )
