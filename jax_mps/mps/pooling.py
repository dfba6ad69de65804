"""The pooling kernels."""

from __future__ import annotations

from typing import ClassVar

from jax_mps.geometry import Axis, Divisor, Edge, Window
from jax_mps.mps import padding as policies
from jax_mps.mps.forward import ForwardPlan, MPSCNNKernel
from jax_mps.mps.kernel import kernel_class
from jax_mps.mps.placement import Array, Span
from jax_mps.mps.settings import count, setting
from jax_mps.mps.structs import MPSImageEdgeMode
from jax_mps.ops.avg_pooling import pool as average_pool
from jax_mps.ops.l2_pooling import pool as l2_pool
from jax_mps.ops.max_pooling import pool as max_pool
from jax_mps.ops.operands import FLOATS, INTEGERS

CLAMP = MPSImageEdgeMode.CLAMP

# --- what the functions take for an edge mode ---------------------------------------------------------
#
# Where it makes no difference these are what `max_pool`, `avg_pool` and `l2_pool` with padding would use.


def max_edge(window: Window, mode: MPSImageEdgeMode) -> Edge:
    """For maxima, what "zero" and "clamp" come to."""
    if not window.overlaps_padding():
        return "exclude"
    if mode != CLAMP:
        return "zero"
    # A window without gaps that touches the image has each repeated pixel among its own already.
    same = all(a.dilation == 1 and a.first_empty_window() is None for a in window.axes)
    return "exclude" if same else "clamp"


def l2_edge(window: Window, mode: MPSImageEdgeMode) -> Edge:
    """For norms, to which zeros add nothing."""
    if not window.overlaps_padding():
        return "exclude"
    if mode == CLAMP:
        return "clamp"
    return "zero" if any(a.first_empty_window() is not None for a in window.axes) else "exclude"


def average_divisor(window: Window, mode: MPSImageEdgeMode, pad_y: int, pad_x: int) -> Divisor:
    """Zero divides by all taps, clamp by those in the image or its band of zeros."""
    if mode != CLAMP or not window.overlaps_padding():
        return Divisor(window.taps, ())
    return Divisor(0, ((pad_y, pad_y), (pad_x, pad_x)))


# --- the kernels --------------------------------------------------------------------------------------


@kernel_class
class MPSCNNPooling(MPSCNNKernel):
    """The base of the pooling kernels; of no use by itself.

    Args:
      kernel_width: columns of a window.
      kernel_height: rows of a window.
      stride_in_pixels_x: columns from one window to the next.
      stride_in_pixels_y: rows from one window to the next.
    """

    kernel_width: int = setting(count(1))
    kernel_height: int = setting(count(1))
    stride_in_pixels_x: int = setting(count(1), default=1)
    stride_in_pixels_y: int = setting(count(1), default=1)

    dilation_rate_x: int = setting(count(1), default=1, init=False)
    dilation_rate_y: int = setting(count(1), default=1, init=False)

    def _check(self) -> None:
        if type(self) is MPSCNNPooling:
            raise TypeError("MPSCNNPooling is abstract: use MPSCNNPoolingMax, ...Average or ...L2Norm")

    def _spans(self) -> tuple[Span, Span]:
        return (
            Span(self.kernel_height, self.stride_in_pixels_y, self.dilation_rate_y),
            Span(self.kernel_width, self.stride_in_pixels_x, self.dilation_rate_x),
        )

    def _axis(self, i: int, length: int, windows: int) -> Axis:
        return Axis.from_offset(length, *self._spans()[i], (self.offset.y, self.offset.x)[i], windows)


@kernel_class
class MPSCNNPoolingMax(MPSCNNPooling):
    """The maximum of every window.

    Pixel i of the clip rectangle has the window centred at `offset + stride * i`; an even window reaches one
    pixel further to the left and to the top. Taps outside the image read 0 (`edge_mode` ZERO) or the nearest
    pixel (CLAMP), so with ZERO negative data next to a border loses to the zeros. NaN propagates.

    Args:
      kernel_width: columns of a window.
      kernel_height: rows of a window.
      stride_in_pixels_x: columns from one window to the next.
      stride_in_pixels_y: rows from one window to the next.
      **members: those of `MPSCNNKernel` and `MPSKernel`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_mps import mps
      >>> x = jnp.array([-3., -1., -4., -1., -5.]).reshape(1, 5, 1)
      >>> pool = mps.MPSCNNPoolingMax(kernel_width=3, kernel_height=1, stride_in_pixels_x=2)
      >>> pool.encode(x).ravel()
      Array([ 0., -1.,  0.], dtype=float32)
      >>> pool.copy(edge_mode="clamp").encode(x).ravel()
      Array([-1., -1., -1.], dtype=float32)

    Source: `MPSCNNPoolingMax` in MPSCNNPooling.h.
    """

    _dtypes: ClassVar[tuple[str, ...]] = FLOATS + INTEGERS

    def _edge_rule(self, window: Window) -> Edge:
        return max_edge(window, self.edge_mode)

    def _compute(self, x: Array, plan: ForwardPlan) -> Array:
        return max_pool(x, plan.window, plan.start, edge=plan.edge_rule, implementation=self.implementation)


@kernel_class
class MPSCNNDilatedPoolingMax(MPSCNNPoolingMax):
    """The maximum of every window whose taps lie apart.

    As `MPSCNNPoolingMax`, with `dilation_rate` pixels from one tap to the next; what is centred is the window
    with its gaps. With CLAMP a tap outside reads the nearest pixel even where no tap of the window lies on
    it, which padding with -inf would not.

    Args:
      kernel_width: taps of a window along x.
      kernel_height: taps of a window along y.
      dilation_rate_x: columns from one tap to the next.
      dilation_rate_y: rows from one tap to the next.
      stride_in_pixels_x: columns from one window to the next.
      stride_in_pixels_y: rows from one window to the next.
      **members: those of `MPSCNNKernel` and `MPSKernel`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_mps import mps
      >>> x = jnp.array([1., 9., 2., 8., 3., 7., 4., 6.]).reshape(1, 8, 1)
      >>> pool = mps.MPSCNNDilatedPoolingMax(kernel_width=2, kernel_height=1, dilation_rate_x=3)
      >>> pool.encode(x).ravel()
      Array([9., 2., 8., 9., 7., 8., 6., 7.], dtype=float32)

    Source: `MPSCNNDilatedPoolingMax` in MPSCNNPooling.h.
    """

    dilation_rate_x: int = setting(count(1), default=1)
    dilation_rate_y: int = setting(count(1), default=1)


@kernel_class
class MPSCNNPoolingAverage(MPSCNNPooling):
    """The average of every window.

    Windows lie as in `MPSCNNPoolingMax`, and taps outside the image add 0. With `edge_mode` ZERO the sum is
    divided by all taps of the window; with CLAMP by those in the image or in a band of `zero_pad_size` pixels
    around it, and the average of none is 0.

    Args:
      kernel_width: columns of a window.
      kernel_height: rows of a window.
      stride_in_pixels_x: columns from one window to the next.
      stride_in_pixels_y: rows from one window to the next.
      zero_pad_size_x: columns of zeros on both sides that count with CLAMP. They move no window.
      zero_pad_size_y: rows of zeros above and below.
      **members: those of `MPSCNNKernel` and `MPSKernel`. With `EXCLUDE_EDGES` in `padding`, a call without a
        destination clamps.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_mps import mps
      >>> x = jnp.array([6., 12., 18., 24.]).reshape(1, 4, 1)
      >>> pool = mps.MPSCNNPoolingAverage(kernel_width=3, kernel_height=1)
      >>> pool.encode(x).ravel()
      Array([ 6., 12., 18., 14.], dtype=float32)
      >>> pool.copy(edge_mode="clamp").encode(x).ravel()
      Array([ 9., 12., 18., 21.], dtype=float32)

    Source: `MPSCNNPoolingAverage` in MPSCNNPooling.h.
    """

    zero_pad_size_x: int = setting(count(), default=0)
    zero_pad_size_y: int = setting(count(), default=0)

    def _with_offset(self, y: int, x: int) -> MPSCNNPoolingAverage:
        kernel = super()._with_offset(y, x)
        return kernel.copy(edge_mode=CLAMP) if self.padding & policies.METHOD.EXCLUDE_EDGES else kernel

    def _edge_rule(self, window: Window) -> Divisor:
        return average_divisor(window, self.edge_mode, self.zero_pad_size_y, self.zero_pad_size_x)

    def _compute(self, x: Array, plan: ForwardPlan) -> Array:
        return average_pool(x, plan.window, plan.start, plan.edge_rule, implementation=self.implementation)


@kernel_class
class MPSCNNPoolingL2Norm(MPSCNNPooling):
    """The Euclidean norm of every window, not divided by the number of taps.

    Windows lie as in `MPSCNNPoolingMax`. Taps outside the image add nothing (`edge_mode` ZERO), or the
    square of the nearest pixel each (CLAMP).

    Args:
      kernel_width: columns of a window.
      kernel_height: rows of a window.
      stride_in_pixels_x: columns from one window to the next.
      stride_in_pixels_y: rows from one window to the next.
      **members: those of `MPSCNNKernel` and `MPSKernel`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_mps import mps
      >>> x = jnp.array([3., 4., 0., -5., 12.]).reshape(1, 5, 1)
      >>> pool = mps.MPSCNNPoolingL2Norm(kernel_width=2, kernel_height=1)
      >>> pool.copy(padding="size_valid_only").encode(x).ravel()
      Array([ 5.,  4.,  5., 13.], dtype=float32)

    Source: `MPSCNNPoolingL2Norm` in MPSCNNPooling.h.
    """

    def _edge_rule(self, window: Window) -> Edge:
        return l2_edge(window, self.edge_mode)

    def _compute(self, x: Array, plan: ForwardPlan) -> Array:
        return l2_pool(x, plan.window, plan.start, edge=plan.edge_rule, implementation=self.implementation)
