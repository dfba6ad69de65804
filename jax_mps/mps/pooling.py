"""The pooling kernels and their gradients."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_mps.geometry import Axis, Divisor, Edge, Window
from jax_mps.lowering import rule
from jax_mps.mps import padding as policies
from jax_mps.mps.kernel import (
    Array,
    Block,
    ForwardPlan,
    Images,
    MPSCNNGradientKernel,
    MPSCNNKernel,
    Shape,
    Span,
    Target,
    aligned,
    channels,
    check_destination,
    check_room,
    clipped,
    count,
    four,
    kernel_class,
    setting,
    struct,
    write,
)
from jax_mps.mps.states import MPSNNGradientState
from jax_mps.mps.structs import MPSImageEdgeMode, MPSOffset, MTLOrigin, MTLRegion, MTLSize
from jax_mps.ops.avg_pooling import gradient as average_gradient
from jax_mps.ops.avg_pooling import pool as average_pool
from jax_mps.ops.l2_pooling import gradient as l2_gradient
from jax_mps.ops.l2_pooling import pool as l2_pool
from jax_mps.ops.max_pooling import gradient as max_gradient
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
    same = all(a.dilation == 1 and not a.windows_without_tap().size for a in window.axes)
    return "exclude" if same else "clamp"


def l2_edge(window: Window, mode: MPSImageEdgeMode) -> Edge:
    """For norms, to which zeros add nothing."""
    if not window.overlaps_padding():
        return "exclude"
    if mode == CLAMP:
        return "clamp"
    return "zero" if any(a.windows_without_tap().size for a in window.axes) else "exclude"


def average_divisor(window: Window, mode: MPSImageEdgeMode, pad_y: int, pad_x: int) -> Divisor:
    """Zero divides by all taps, clamp by those in the image or its band of zeros."""
    if mode != CLAMP or not window.overlaps_padding():
        return Divisor(window.taps, ())
    return Divisor(0, ((pad_y, pad_y), (pad_x, pad_x)))


# --- forward ------------------------------------------------------------------------------------------


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
    stride_in_pixels_x: int = setting(count(1), 1)
    stride_in_pixels_y: int = setting(count(1), 1)

    dilation_rate_x: int = setting(count(1), 1, init=False)
    dilation_rate_y: int = setting(count(1), 1, init=False)

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

    def _how(self, window: Window) -> Edge:
        return max_edge(window, self.edge_mode)

    def _run(self, x: Array, plan: ForwardPlan) -> Array:
        return max_pool(x, plan.window, plan.start, edge=plan.how, implementation=self.implementation)


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

    dilation_rate_x: int = setting(count(1), 1)
    dilation_rate_y: int = setting(count(1), 1)


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

    zero_pad_size_x: int = setting(count(), 0)
    zero_pad_size_y: int = setting(count(), 0)

    def _with_offset(self, y: int, x: int) -> MPSCNNPoolingAverage:
        kernel = super()._with_offset(y, x)
        return kernel.copy(edge_mode=CLAMP) if self.padding & policies.METHOD.EXCLUDE_EDGES else kernel

    def _how(self, window: Window) -> Divisor:
        return average_divisor(window, self.edge_mode, self.zero_pad_size_y, self.zero_pad_size_x)

    def _run(self, x: Array, plan: ForwardPlan) -> Array:
        return average_pool(x, plan.window, plan.start, plan.how, implementation=self.implementation)


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

    def _how(self, window: Window) -> Edge:
        return l2_edge(window, self.edge_mode)

    def _run(self, x: Array, plan: ForwardPlan) -> Array:
        return l2_pool(x, plan.window, plan.start, edge=plan.how, implementation=self.implementation)


# --- gradients ----------------------------------------------------------------------------------------


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
    stride_in_pixels_x: int = setting(count(1), 1)
    stride_in_pixels_y: int = setting(count(1), 1)
    source_size: MTLSize = setting(struct(MTLSize), MTLSize())

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

    def _how(self, window: Window) -> Any:
        raise NotImplementedError

    def _run(self, g: Array, x: Array, plan: GradientPlan) -> Array:
        raise NotImplementedError

    def _of_state(self, state: MPSNNGradientState) -> dict[str, Any]:
        """The members that the state of a forward call sets."""
        forward = state.kernel
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
            kernel = stated(self, gradient_state, g.shape, x.shape)
        if destination_gradient is not None:
            kernel = self
            destination = self._image("destination_gradient", destination_gradient)
            check_destination("destination_gradient", destination, "source_image", x)
            shape = destination.shape
        plan = gradient_plan(kernel, g.shape, x.shape, shape)
        return write(plan.block(kernel, g, x), plan.target, destination)

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


class GradientPlan(NamedTuple):
    """A gradient call in integers."""

    gradient: Block
    """The incoming pixels that count."""
    image: Block
    """The source images that they belong to, all pixels of them."""
    window: Window
    start: int
    covered: Block
    """Of the derivative, what the clip rectangle can hold."""
    inner: Target
    """Where that lies in the clip rectangle."""
    target: Target
    """Where the clip rectangle lies in the destination."""
    how: Any

    def block(self, kernel: MPSCNNPoolingGradient, g: Array, x: Array) -> Array:
        """The clip rectangle."""
        if 0 in self.inner.block or 0 in self.window.counts:
            return lax.full(self.target.block, np.zeros((), g.dtype))
        dx = kernel._run(self.gradient.read(g), self.image.read(x), self)
        return write(self.covered.read(dx), self.inner, None)


@functools.lru_cache(maxsize=4096)
def stated(
    kernel: MPSCNNPoolingGradient, state: MPSNNGradientState, g: Shape, x: Shape
) -> MPSCNNPoolingGradient:
    """The kernel with the members that the state of a forward call sets."""
    kernel._check_state(state, kernel._forward)
    if (g, x) != (state.destination_shape, state.source_shape):
        raise ValueError(
            f"gradient_state is of a call that took {state.source_shape} to {state.destination_shape}, but "
            f"source_image has shape {x} and source_gradient {g}"
        )
    return kernel.copy(**kernel._of_state(state))


@functools.lru_cache(maxsize=4096)
def gradient_plan(kernel: MPSCNNPoolingGradient, g: Shape, x: Shape, destination: Shape) -> GradientPlan:
    """Places the windows of a call on the source, and the derivative in the destination."""
    rule.check_implementation(kernel.implementation, static=True)
    drop = 4 - len(x)
    g, x, result = four(g), four(x), four(destination)
    from_g, from_x = (
        kernel.primary_source_feature_channel_offset,
        kernel.secondary_source_feature_channel_offset,
    )
    read = channels(
        "primary_source_feature_channel_offset", g[3], from_g, kernel.primary_source_feature_channel_max_count
    )
    of_source = channels(
        "secondary_source_feature_channel_offset",
        x[3],
        from_x,
        kernel.secondary_source_feature_channel_max_count,
    )
    if read != of_source:
        raise ValueError(
            f"source_gradient and source_image must have as many channels to be read, got {read} of {g[3]} "
            f"and {of_source} of {x[3]}"
        )
    at = kernel.destination_feature_channel_offset
    check_room(at, read, result, "the destination")
    origin, size = clipped(kernel.clip_rect, result)

    # Along every axis, images included: a window of one image each.
    spans = (Span(1, 1, 1), *kernel._spans())
    primary, secondary = kernel.primary_offset, kernel.secondary_offset
    bounds = (kernel.source_size.depth, kernel.source_size.height, kernel.source_size.width)
    axes, ranges, begins = [], [], []
    for p, s, span, bound, n, length in zip(
        (primary.z, primary.y, primary.x),
        (secondary.z, secondary.y, secondary.x),
        spans,
        bounds,
        g[:3],
        x[:3],
        strict=True,
    ):
        first = max(p, 0)
        last = max(first, n if bound is None else min(n, p + bound))
        axis = Axis.from_offset(length, span.kernel, span.stride, span.dilation, s, 0)
        axes.append(axis.select(first - p, last - first))
        ranges.append((first, last))
        begins.append(max(0, s - span.extent // 2))

    # Of the images only those that lie in the source, and come out in the clip rectangle.
    z, *rest = axes
    first = max(-z.low, 0)
    last = min(z.windows - z.low, z.size, begins[0] + size[0])
    images = (first, max(first, last))
    skipped = first - -z.low
    ranges[0] = (ranges[0][0] + skipped, ranges[0][0] + skipped + images[1] - images[0])

    window = Window(tuple(rest))
    lengths = [max(0, min(n, length - b)) for n, length, b in zip(size[1:], x[1:3], begins[1:], strict=True)]
    inner = (images[1] - images[0], *lengths, read)
    covered = [(0, inner[0]), *((b, b + n) for b, n in zip(begins[1:], lengths, strict=True)), (0, read)]
    return GradientPlan(
        Block.of(g[drop:], [*ranges, (from_g, from_g + read)]),
        Block.of(x[drop:], [images, (0, x[1]), (0, x[2]), (from_x, from_x + read)]),
        window,
        1 - drop,
        Block.of((inner[0], *x[1:3], read)[drop:], covered),
        Target((*size, read)[drop:], (max(0, images[0] - begins[0]), 0, 0, 0)[drop:], inner[drop:]),
        Target(result[drop:], (*origin, at)[drop:], (*size, read)[drop:]),
        kernel._how(window),
    )


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

    def _how(self, window: Window) -> Edge:
        return max_edge(window, self.secondary_edge_mode)

    def _run(self, g: Array, x: Array, plan: GradientPlan) -> Array:
        return max_gradient(g, x, plan.window, plan.start, edge=plan.how, implementation=self.implementation)


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

    dilation_rate_x: int = setting(count(1), 1)
    dilation_rate_y: int = setting(count(1), 1)

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

    zero_pad_size_x: int = setting(count(), 0)
    zero_pad_size_y: int = setting(count(), 0)

    _forward: ClassVar[type[MPSCNNPooling]] = MPSCNNPoolingAverage

    def _of_state(self, state: MPSNNGradientState) -> dict[str, Any]:
        forward: Any = state.kernel
        pads = {name: getattr(forward, name) for name in ("zero_pad_size_x", "zero_pad_size_y")}
        return super()._of_state(state) | pads

    def _how(self, window: Window) -> Divisor:
        return average_divisor(window, self.secondary_edge_mode, self.zero_pad_size_y, self.zero_pad_size_x)

    def _run(self, g: Array, x: Array, plan: GradientPlan) -> Array:
        return average_gradient(g, plan.window, plan.start, plan.how, implementation=self.implementation)


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

    def _how(self, window: Window) -> Edge:
        return l2_edge(window, self.secondary_edge_mode)

    def _run(self, g: Array, x: Array, plan: GradientPlan) -> Array:
        dx = l2_gradient(g, x, plan.window, plan.start, edge=plan.how, implementation=self.implementation)
        rows, columns = (axis.pixels_read(plan.how) for axis in plan.window.axes)
        if rows.all() and columns.all():
            return dx
        # Pixel times nothing: of an infinite pixel that no window reads this is not 0 by itself.
        read = (rows[:, None] & columns)[..., None]
        return jnp.where(read if x.ndim == 3 else read[None], dx, jnp.zeros((), dx.dtype))
