"""The gradients of the pooling kernels."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_mps.geometry import Divisor, Edge, Window
from jax_mps.mps.forward import MPSCNNKernel
from jax_mps.mps.gradient import MPSCNNGradientKernel
from jax_mps.mps.gradient_plan import GradientPlan, pooling_plan, with_members_of
from jax_mps.mps.kernel import kernel_class
from jax_mps.mps.placement import Array, Images, Shape, Span, aligned, check_destination
from jax_mps.mps.pooling import (
    MPSCNNPooling,
    MPSCNNPoolingAverage,
    MPSCNNPoolingL2Norm,
    MPSCNNPoolingMax,
    average_divisor,
    l2_edge,
    max_edge,
)
from jax_mps.mps.settings import count, setting, struct
from jax_mps.mps.states import MPSNNGradientState
from jax_mps.mps.structs import MPSOffset, MTLOrigin, MTLRegion, MTLSize
from jax_mps.ops.avg_pooling import gradient as average_gradient
from jax_mps.ops.l2_pooling import gradient as l2_gradient
from jax_mps.ops.max_pooling import gradient as max_gradient


@kernel_class
class MPSCNNPoolingGradient(MPSCNNGradientKernel):
    """The base of the gradients of the pooling kernels; of no use by itself.

    The primary image is the incoming gradient G, the secondary the image X that was pooled, and the edge
    mode of the forward kernel is `secondary_edge_mode`. The pixels of G from `primary_offset` on,
    `source_size` of them, count; the one at `primary_offset` belongs to the window centred at
    `secondary_offset`. The origin of the clip rectangle receives the derivative of the first pixel of X that
    the first window covers, `max(0, secondary_offset - extent // 2)`; pixels of the rectangle that get no
    gradient are set to 0.

    Given a state and no destination, `encode` takes all of this from the forward call, and the result is
    aligned with X.

    Args:
      kernel_width: columns of a window.
      kernel_height: rows of a window.
      stride_in_pixels_x: the forward kernel's stride.
      stride_in_pixels_y: the forward kernel's stride.
      source_size: how many columns, rows and images of G count.
    """

    kernel_width: int = setting(count(1))
    kernel_height: int = setting(count(1))
    stride_in_pixels_x: int = setting(count(1), default=1)
    stride_in_pixels_y: int = setting(count(1), default=1)
    source_size: MTLSize = setting(struct(MTLSize), default=MTLSize())

    _forward: ClassVar[type[MPSCNNPooling]] = MPSCNNPooling

    def _check(self) -> None:
        if type(self) is MPSCNNPoolingGradient:
            raise TypeError("MPSCNNPoolingGradient is abstract: use MPSCNNPoolingMaxGradient and its like")
        for name in ("kernel_offset_x", "kernel_offset_y"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} must be 0 for the gradient of a pooling, whose windows secondary_offset places, "
                    f"got {getattr(self, name)}"
                )

    def _spans(self) -> tuple[Span, Span]:
        return (
            Span(self.kernel_height, self.stride_in_pixels_y, 1),
            Span(self.kernel_width, self.stride_in_pixels_x, 1),
        )

    def _compute(self, g: Array, x: Array, plan: GradientPlan) -> Array:
        """The derivative of the source images of the plan."""
        raise NotImplementedError

    def _members_from(self, forward: MPSCNNKernel) -> dict[str, Any]:
        assert forward.clip_rect is not None
        offset, origin, size = forward.offset, forward.clip_rect.origin, forward.clip_rect.size
        y, x = (max(0, o - s.extent // 2) for o, s in zip((offset.y, offset.x), self._spans(), strict=True))
        read = forward.source_feature_channel_max_count
        return {
            "primary_offset": MPSOffset(x=origin.x, y=origin.y, z=origin.z),
            "source_size": size,
            "secondary_offset": offset,
            "secondary_edge_mode": forward.edge_mode,
            "clip_rect": MTLRegion(origin=MTLOrigin(x=x, y=y, z=offset.z)),
            "primary_source_feature_channel_offset": forward.destination_feature_channel_offset,
            "primary_source_feature_channel_max_count": read,
            "secondary_source_feature_channel_offset": forward.source_feature_channel_offset,
            "secondary_source_feature_channel_max_count": read,
            "destination_feature_channel_offset": forward.source_feature_channel_offset,
        }

    def encode(
        self,
        source_gradient: ArrayLike,
        source_image: ArrayLike,
        gradient_state: MPSNNGradientState | None = None,
        destination_gradient: ArrayLike | None = None,
    ) -> jax.Array:
        """Runs the kernel.

        Args:
          source_gradient: the gradient of the forward kernel's destination, `[height, width, channels]` or
            `[number, height, width, channels]`.
          source_image: the forward kernel's source, of as many axes and the same dtype.
          gradient_state: the state of the forward call. Without a destination, the members that place the
            windows are those of that call, and the result is `jax.vjp` of it. With one it is only checked.
          destination_gradient: an array to write into, within the clip rectangle.

        Returns:
          The destination; without one, an array like `source_image` with zeros where nothing is written.

        Raises:
          TypeError: an unsupported dtype, or dtypes that differ.
          ValueError: the state is that of another kernel or of other shapes, the images have different
            numbers of channels to be read, or the destination has too few channels.
        """
        g, x = self._operands(source_gradient, source_image)
        kernel: MPSCNNPoolingGradient = self
        shape, destination = x.shape, None
        if gradient_state is not None:
            self._check_call(gradient_state, g.shape, x.shape)
        if destination_gradient is not None:
            destination = self._image("destination_gradient", destination_gradient)
            check_destination("destination_gradient", destination, "source_image", x)
            shape = destination.shape
        elif gradient_state is not None:
            kernel = with_members_of(self, gradient_state.kernel)
        plan = pooling_plan(kernel, kernel.source_size, g.shape, x.shape, shape)

        def derivative() -> Array:
            return kernel._compute(plan.gradient.read(g), plan.image.read(x), plan)

        return plan.write(derivative, g.dtype, destination)

    def _check_call(self, state: MPSNNGradientState, g: Shape, x: Shape) -> None:
        """Whether this kernel undoes the call of the state, and these are the shapes of that call."""
        self._check_state(state, self._forward)
        if (g, x) != (state.destination_shape, state.source_shape):
            raise ValueError(
                f"gradient_state is of a call that took {state.source_shape} to {state.destination_shape}, "
                f"but source_image has shape {x} and source_gradient {g}"
            )

    def encode_batch(
        self,
        source_gradients: Images,
        source_images: Images,
        gradient_states: list[MPSNNGradientState] | None = None,
        destination_gradients: Images | None = None,
    ) -> list[jax.Array]:
        """`encode` of every image of an `MPSImageBatch`."""
        batches: Any = (source_gradients, source_images, gradient_states, destination_gradients)
        return [self.encode(*images) for images in aligned(*batches)]


@kernel_class
class MPSCNNPoolingMaxGradient(MPSCNNPoolingGradient):
    """The gradient of `MPSCNNPoolingMax`: each window's gradient goes to its maximum.

    To the first maximum in row-major order, or the first NaN. The zeros outside take part with
    `secondary_edge_mode` ZERO: where one is the first maximum, the window's gradient vanishes. A repeated
    pixel (CLAMP) passes its gradient on to the pixel that it repeats.

    Args:
      kernel_width: columns of a window.
      kernel_height: rows of a window.
      stride_in_pixels_x: the forward kernel's stride.
      stride_in_pixels_y: the forward kernel's stride.
      **members: those of `MPSCNNPoolingGradient` and its bases.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_mps import mps
      >>> x = jnp.array([1., 3., 3., 2., 0.]).reshape(1, 5, 1)
      >>> g = jnp.array([10., 20., 30.]).reshape(1, 3, 1)
      >>> window = dict(kernel_width=3, kernel_height=1, stride_in_pixels_x=2)
      >>> y, state = mps.MPSCNNPoolingMax(**window, edge_mode="clamp").encode_with_state(x)
      >>> mps.MPSCNNPoolingMaxGradient(**window).encode(g, x, state).ravel()
      Array([ 0., 30.,  0., 30.,  0.], dtype=float32)

    Source: `MPSCNNPoolingMaxGradient` in MPSCNNPooling.h.
    """

    _forward: ClassVar[type[MPSCNNPooling]] = MPSCNNPoolingMax

    def _edge_rule(self, window: Window) -> Edge:
        return max_edge(window, self.secondary_edge_mode)

    def _compute(self, g: Array, x: Array, plan: GradientPlan) -> Array:
        return max_gradient(
            g, x, plan.window, plan.start, edge=plan.edge_rule, implementation=self.implementation
        )


@kernel_class
class MPSCNNDilatedPoolingMaxGradient(MPSCNNPoolingMaxGradient):
    """The gradient of `MPSCNNDilatedPoolingMax`, as `MPSCNNPoolingMaxGradient`.

    Args:
      kernel_width: taps of a window along x.
      kernel_height: taps of a window along y.
      dilation_rate_x: columns from one tap to the next.
      dilation_rate_y: rows from one tap to the next.
      stride_in_pixels_x: the forward kernel's stride.
      stride_in_pixels_y: the forward kernel's stride.
      **members: those of `MPSCNNPoolingGradient` and its bases.

    Source: `MPSCNNDilatedPoolingMaxGradient` in MPSCNNPooling.h.
    """

    dilation_rate_x: int = setting(count(1), default=1)
    dilation_rate_y: int = setting(count(1), default=1)

    def _spans(self) -> tuple[Span, Span]:
        return (
            Span(self.kernel_height, self.stride_in_pixels_y, self.dilation_rate_y),
            Span(self.kernel_width, self.stride_in_pixels_x, self.dilation_rate_x),
        )


@kernel_class
class MPSCNNPoolingAverageGradient(MPSCNNPoolingGradient):
    """The gradient of `MPSCNNPoolingAverage`: each window's gradient, divided, goes to all its pixels.

    It is divided by what the forward kernel divides by; a window with nothing to count has no gradient. Of
    the source image only the shape matters.

    Args:
      kernel_width: columns of a window.
      kernel_height: rows of a window.
      stride_in_pixels_x: the forward kernel's stride.
      stride_in_pixels_y: the forward kernel's stride.
      zero_pad_size_x: the forward kernel's.
      zero_pad_size_y: the forward kernel's.
      **members: those of `MPSCNNPoolingGradient` and its bases.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_mps import mps
      >>> g = jnp.array([6., 12., 18., 24.]).reshape(1, 4, 1)
      >>> kernel = mps.MPSCNNPoolingAverageGradient(kernel_width=3, kernel_height=1)
      >>> kernel.encode(g, jnp.zeros_like(g)).ravel()
      Array([ 6., 12., 18., 14.], dtype=float32)
      >>> kernel.copy(secondary_edge_mode="clamp").encode(g, jnp.zeros_like(g)).ravel()
      Array([ 7., 13., 22., 18.], dtype=float32)

    Source: `MPSCNNPoolingAverageGradient` in MPSCNNPooling.h.
    """

    zero_pad_size_x: int = setting(count(), default=0)
    zero_pad_size_y: int = setting(count(), default=0)

    _forward: ClassVar[type[MPSCNNPooling]] = MPSCNNPoolingAverage

    def _members_from(self, forward: MPSCNNKernel) -> dict[str, Any]:
        pads = {name: getattr(forward, name) for name in ("zero_pad_size_x", "zero_pad_size_y")}
        return super()._members_from(forward) | pads

    def _edge_rule(self, window: Window) -> Divisor:
        return average_divisor(window, self.secondary_edge_mode, self.zero_pad_size_y, self.zero_pad_size_x)

    def _compute(self, g: Array, x: Array, plan: GradientPlan) -> Array:
        return average_gradient(
            g, plan.window, plan.start, plan.edge_rule, implementation=self.implementation
        )


@kernel_class
class MPSCNNPoolingL2NormGradient(MPSCNNPoolingGradient):
    """The gradient of `MPSCNNPoolingL2Norm`: each pixel gets its share, pixel over norm, of each gradient.

    The norms are found again from the source image; a norm of 0 has no gradient. With `secondary_edge_mode`
    CLAMP a pixel counts as often as a window reads it.

    Args:
      kernel_width: columns of a window.
      kernel_height: rows of a window.
      stride_in_pixels_x: the forward kernel's stride.
      stride_in_pixels_y: the forward kernel's stride.
      **members: those of `MPSCNNPoolingGradient` and its bases.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_mps import mps
      >>> x = jnp.array([3., 4., 0., 0., -5., 12.]).reshape(1, 6, 1)
      >>> g = jnp.array([10., 20., 26.]).reshape(1, 3, 1)
      >>> kernel = mps.MPSCNNPoolingL2NormGradient(
      ...     kernel_width=2, kernel_height=1, stride_in_pixels_x=2, secondary_offset=mps.MPSOffset(x=1))
      >>> kernel.encode(g, x).ravel()
      Array([  6.,   8.,   0.,   0., -10.,  24.], dtype=float32)

    Source: `MPSCNNPoolingL2NormGradient` in MPSCNNPooling.h.
    """

    _forward: ClassVar[type[MPSCNNPooling]] = MPSCNNPoolingL2Norm

    def _edge_rule(self, window: Window) -> Edge:
        return l2_edge(window, self.secondary_edge_mode)

    def _compute(self, g: Array, x: Array, plan: GradientPlan) -> Array:
        dx = l2_gradient(
            g, x, plan.window, plan.start, edge=plan.edge_rule, implementation=self.implementation
        )
        rows, columns = (axis.pixels_read(plan.edge_rule) for axis in plan.window.axes)
        if rows.all() and columns.all():
            return dx
        # Pixel times nothing: of an infinite pixel that no window reads this is not 0 by itself.
        read = (rows[:, None] & columns)[..., None]
        return jnp.where(read if x.ndim == 3 else read[None], dx, jnp.zeros((), dx.dtype))
