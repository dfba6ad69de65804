"""The bases of kernels of two images, which are the gradient kernels."""

from __future__ import annotations

from typing import Any, ClassVar

from jax.typing import ArrayLike

from jax_mps import geometry
from jax_mps.geometry import Axis, Window
from jax_mps.mps import padding as policies
from jax_mps.mps.forward import MPSCNNKernel
from jax_mps.mps.kernel import MPSKernel, kernel_class
from jax_mps.mps.placement import Array, Span, check_destination
from jax_mps.mps.settings import count, edge, policy, setting, struct
from jax_mps.mps.states import MPSNNGradientState
from jax_mps.mps.structs import MPSImageEdgeMode, MPSNNPaddingMethod, MPSOffset, MTLRegion


@kernel_class
class MPSCNNBinaryKernel(MPSKernel):
    """The base of kernels of two images, the primary and the secondary.

    Args:
      primary_offset: the position in the primary image that belongs to the origin of the clip rectangle.
      secondary_offset: the same in the secondary image.
      clip_rect: the part of the destination that is written; `None` is all of it.
      destination_feature_channel_offset: the first channel that is written.
      primary_source_feature_channel_offset: the first channel of the primary image that is read.
      primary_source_feature_channel_max_count: how many are read at most; `None` is all that are left.
      secondary_source_feature_channel_offset: the first channel of the secondary image that is read.
      secondary_source_feature_channel_max_count: how many are read at most.
      primary_edge_mode: what a tap outside the primary image reads.
      secondary_edge_mode: what a tap outside the secondary image reads.
      padding: the padding policy. The gradient kernels here have no use for it: the source image sizes their
        result.
    """

    primary_offset: MPSOffset = setting(struct(MPSOffset), default=MPSOffset())
    secondary_offset: MPSOffset = setting(struct(MPSOffset), default=MPSOffset())
    clip_rect: MTLRegion | None = setting(struct(MTLRegion, optional=True), default=None)
    destination_feature_channel_offset: int = setting(count(), default=0)
    primary_source_feature_channel_offset: int = setting(count(), default=0)
    primary_source_feature_channel_max_count: int | None = setting(count(unbounded=True), default=None)
    secondary_source_feature_channel_offset: int = setting(count(), default=0)
    secondary_source_feature_channel_max_count: int | None = setting(count(unbounded=True), default=None)
    primary_edge_mode: MPSImageEdgeMode = setting(edge, default=MPSImageEdgeMode.ZERO)
    secondary_edge_mode: MPSImageEdgeMode = setting(edge, default=MPSImageEdgeMode.ZERO)
    padding: MPSNNPaddingMethod = setting(policy, default=policies.DEFAULT)

    is_backwards: ClassVar[bool] = True
    """Whether strides count pixels of the destination."""

    def _spans(self) -> tuple[Span, Span]:
        """The window of the forward kernel along y and x."""
        raise NotImplementedError

    # The primary image is read a pixel at a time; the windows lie on the secondary one.
    primary_kernel_width = property(lambda self: 1, doc="Width of the window on the primary image: 1.")
    primary_kernel_height = property(lambda self: 1, doc="Height of the window on the primary image: 1.")
    primary_stride_in_pixels_x = property(lambda self: 1, doc="Columns from a window to the next: 1.")
    primary_stride_in_pixels_y = property(lambda self: 1, doc="Rows from a window to the next: 1.")
    primary_dilation_rate_x = property(lambda self: 1, doc="Columns from a tap to the next: 1.")
    primary_dilation_rate_y = property(lambda self: 1, doc="Rows from a tap to the next: 1.")
    secondary_kernel_width = property(
        lambda self: self._spans()[1].kernel, doc="Width of the window on the secondary image."
    )
    secondary_kernel_height = property(
        lambda self: self._spans()[0].kernel, doc="Height of the window on the secondary image."
    )
    secondary_stride_in_pixels_x = property(
        lambda self: self._spans()[1].stride, doc="Columns from a window to the next."
    )
    secondary_stride_in_pixels_y = property(
        lambda self: self._spans()[0].stride, doc="Rows from a window to the next."
    )
    secondary_dilation_rate_x = property(
        lambda self: self._spans()[1].dilation, doc="Columns from a tap to the next."
    )
    secondary_dilation_rate_y = property(
        lambda self: self._spans()[0].dilation, doc="Rows from a tap to the next."
    )


@kernel_class
class MPSCNNGradientKernel(MPSCNNBinaryKernel):
    """The base of the gradient kernels: the primary image is the gradient, the secondary the source.

    Args:
      kernel_offset_x: columns by which the windows are moved in the gradient with its inserted zeros.
      kernel_offset_y: rows, likewise.
    """

    kernel_offset_x: int = setting(geometry.integer, default=0)
    kernel_offset_y: int = setting(geometry.integer, default=0)

    # What a class says about itself

    def _members_from(self, forward: MPSCNNKernel) -> dict[str, Any]:
        """The members that the kernel of a forward call sets."""
        raise NotImplementedError

    def _axis(self, i: int, length: int, windows: int) -> Axis:
        """The windows along axis i of (y, x), where offsets place them as in a forward kernel."""
        raise NotImplementedError

    def _edge_rule(self, window: Window) -> Any:
        """What the function behind the kernel takes for the edge mode, given the windows."""
        raise NotImplementedError

    # What all do alike

    def _operands(self, source_gradient: ArrayLike, source_image: ArrayLike) -> tuple[Array, Array]:
        g = self._image("source_gradient", source_gradient)
        x = self._image("source_image", source_image)
        check_destination("source_gradient", g, "source_image", x)
        return g, x

    def _check_state(self, state: MPSNNGradientState, forward: type[MPSCNNKernel]) -> None:
        """Whether this kernel undoes the call of the state."""
        kernel = state.kernel
        if not isinstance(kernel, forward):
            raise ValueError(
                f"gradient_state of a {type(self).__name__} must be that of an {forward.__name__}, "
                f"got that of an {type(kernel).__name__}"
            )
        if kernel._spans() != self._spans():
            raise ValueError(
                "gradient_state must be that of a kernel with the same window, (kernel, stride, dilation) = "
                f"{[tuple(s) for s in self._spans()]} along y and x, got one with "
                f"{[tuple(s) for s in kernel._spans()]}"
            )
