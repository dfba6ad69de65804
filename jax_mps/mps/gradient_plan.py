"""The calls of gradient kernels in integers: which pixels count, the windows on the source, and the way out.

A plan has two readings and two steps of writing. It reads the part of the incoming gradient that counts, and
the source images which that part belongs to. The function behind the kernel gives the derivative of these
images. What the clip rectangle can hold of it (`covered`) is put into the rectangle (`inner`), and the
rectangle into the destination (`target`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jax_mps.geometry import Axis, Window
from jax_mps.lowering import rule
from jax_mps.mps.descriptor import MPSCNNConvolutionDescriptor
from jax_mps.mps.forward import MPSCNNKernel
from jax_mps.mps.gradient import MPSCNNGradientKernel
from jax_mps.mps.placement import (
    Array,
    Block,
    Shape,
    Span,
    Target,
    channels,
    check_room,
    clipped,
    four,
    write,
)
from jax_mps.mps.structs import MTLSize

Range = tuple[int, int]


class GradientPlan(NamedTuple):
    """A gradient call in integers."""

    gradient: Block
    """The pixels of the incoming gradient that count."""
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
    edge_rule: Any
    """What the class itself derives from the windows."""

    def write(self, derivative: Callable[[], Array], dtype: DTypeLike, destination: Array | None) -> Array:
        """The destination with the derivative written. Where nothing of it is wanted, it is not computed."""
        if 0 in self.inner.block or 0 in self.window.counts:
            rectangle = lax.full(self.target.block, np.zeros((), dtype))
        else:
            rectangle = write(self.covered.read(derivative()), self.inner, None)
        return write(rectangle, self.target, destination)


# --- what both plans do alike -------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def with_members_of(kernel: MPSCNNGradientKernel, forward: MPSCNNKernel) -> Any:
    """The gradient kernel with the members that the kernel of a forward call sets."""
    return kernel.copy(**kernel._members_from(forward))


def _channels_read(kernel: MPSCNNGradientKernel, g: Shape, x: Shape) -> tuple[Range, Range]:
    """The channels of the gradient and of the source that are read."""

    def read(name: str, available: int, first: int, most: int | None) -> Range:
        return first, first + channels(name, available, first, most)

    return (
        read(
            "primary_source_feature_channel_offset",
            g[3],
            kernel.primary_source_feature_channel_offset,
            kernel.primary_source_feature_channel_max_count,
        ),
        read(
            "secondary_source_feature_channel_offset",
            x[3],
            kernel.secondary_source_feature_channel_offset,
            kernel.secondary_source_feature_channel_max_count,
        ),
    )


def _count(pixels: Range) -> int:
    return pixels[1] - pixels[0]


class _Rectangle(NamedTuple):
    """The clip rectangle in a destination of four axes, and the channels that are written."""

    result: Shape
    origin: Sequence[int]
    size: Sequence[int]
    first_channel: int
    written: int

    @classmethod
    def of(cls, kernel: MPSCNNGradientKernel, result: Shape, written: int) -> _Rectangle:
        first = kernel.destination_feature_channel_offset
        check_room(first, written, result, "the destination")
        return cls(result, *clipped(kernel.clip_rect, result), first, written)

    def plan(
        self,
        kernel: MPSCNNGradientKernel,
        window: Window,
        gradient: tuple[Shape, Sequence[Range]],
        image: tuple[Shape, Sequence[Range]],
        covered: Sequence[Range],
        first_image: int,
        drop: int,
    ) -> GradientPlan:
        """The plan of a call.

        Args:
          kernel: the kernel.
          window: the windows on the source.
          gradient: the shape of the incoming gradient, and the ranges of it that count.
          image: the shape of the source, and the ranges of it that are read.
          covered: the ranges of image, y and x of the derivative that the clip rectangle can hold.
          first_image: the image of the clip rectangle that the first of them goes to.
          drop: how many of the four axes the images do not have, 0 or 1.
        """
        (g, counting), (x, reading) = gradient, image
        derivative = (_count(reading[0]), *x[1:3], self.written)
        inner = (*(_count(pixels) for pixels in covered), self.written)
        rectangle = (*self.size, self.written)
        return GradientPlan(
            gradient=Block.of(g[drop:], counting),
            image=Block.of(x[drop:], reading),
            window=window,
            start=1 - drop,
            covered=Block.of(derivative[drop:], [*covered, (0, self.written)]),
            inner=Target(rectangle[drop:], (first_image, 0, 0, 0)[drop:], inner[drop:]),
            target=Target(self.result[drop:], (*self.origin, self.first_channel)[drop:], rectangle[drop:]),
            edge_rule=kernel._edge_rule(window),
        )


# --- pooling ------------------------------------------------------------------------------------------


class GradientAxis(NamedTuple):
    """One axis of a pooling's gradient. Images are an axis too, with windows of one image each."""

    axis: Axis
    """The windows that count, on the source."""
    pixels: Range
    """The pixels of the incoming gradient that count, one a window."""
    begin: int
    """The first pixel of the source that the first window covers; it goes to the clip rectangle's origin."""

    @classmethod
    def of(
        cls, span: Span, length: int, windows: int, primary: int, secondary: int, bound: int | None
    ) -> GradientAxis:
        """The axis of a source of `length` pixels, and a gradient with as many pixels as `windows`.

        Args:
          span: the window.
          length: pixels of the source.
          windows: pixels of the gradient.
          primary: the first pixel of the gradient that counts.
          secondary: the pixel of the source where its window has the centre.
          bound: how many pixels count at most; `None` is all that are left.
        """
        first = max(primary, 0)
        last = max(first, windows if bound is None else min(windows, primary + bound))
        axis = Axis.from_offset(length, span.kernel, span.stride, span.dilation, secondary, 0)
        begin = max(0, secondary - span.extent // 2)
        return cls(axis.select(first - primary, last - first), (first, last), begin)


def gradient_axes(
    kernel: MPSCNNGradientKernel, source_size: MTLSize, g: Shape, x: Shape
) -> list[GradientAxis]:
    """The axes of a pooling's gradient: images, y and x, of which `g` and `x` are the sizes."""
    primary, secondary = kernel.primary_offset, kernel.secondary_offset
    return [
        GradientAxis.of(*axis)
        for axis in zip(
            (Span(1, 1, 1), *kernel._spans()),
            x,
            g,
            (primary.z, primary.y, primary.x),
            (secondary.z, secondary.y, secondary.x),
            (source_size.depth, source_size.height, source_size.width),
            strict=True,
        )
    ]


@functools.lru_cache(maxsize=4096)
def pooling_plan(
    kernel: MPSCNNGradientKernel, source_size: MTLSize, g: Shape, x: Shape, destination: Shape
) -> GradientPlan:
    """Places the windows of a pooling on the source, and the derivative in the destination."""
    rule.check_implementation(kernel.implementation, static=True)
    drop = 4 - len(x)
    g, x = four(g), four(x)
    of_gradient, of_source = _channels_read(kernel, g, x)
    read = _count(of_gradient)
    if read != _count(of_source):
        raise ValueError(
            f"source_gradient and source_image must have as many channels to be read, got {read} of {g[3]} "
            f"and {_count(of_source)} of {x[3]}"
        )
    rectangle = _Rectangle.of(kernel, four(destination), read)

    images, *plane = gradient_axes(kernel, source_size, g[:3], x[:3])

    # Of the images only those that lie in the source, and come out in the clip rectangle.
    low = images.axis.low
    first = max(-low, 0)
    last = max(first, min(images.axis.windows - low, x[0], images.begin + rectangle.size[0]))
    first_of_gradient = images.pixels[0] + first + low

    lengths = [
        max(0, min(n, length - axis.begin))
        for n, length, axis in zip(rectangle.size[1:], x[1:3], plane, strict=True)
    ]
    return rectangle.plan(
        kernel,
        Window(tuple(axis.axis for axis in plane)),
        (g, [(first_of_gradient, first_of_gradient + last - first), *(a.pixels for a in plane), of_gradient]),
        (x, [(first, last), (0, x[1]), (0, x[2]), of_source]),
        [(0, last - first), *((a.begin, a.begin + n) for a, n in zip(plane, lengths, strict=True))],
        max(0, first - images.begin),
        drop,
    )


# --- transposed convolution ---------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def transposed_plan(
    kernel: MPSCNNGradientKernel,
    descriptor: MPSCNNConvolutionDescriptor,
    first_image: int,
    g: Shape,
    x: Shape,
    destination: Shape,
) -> GradientPlan:
    """Places the windows of a transposed convolution, and the derivative in the destination."""
    rule.check_implementation(kernel.implementation, static=True)
    drop = 4 - len(x)
    g, x = four(g), four(x)
    of_gradient, of_source = _channels_read(kernel, g, x)
    for side, image, wanted, read in (
        ("primary", "source_gradient", descriptor.output_feature_channels, _count(of_gradient)),
        ("secondary", "source_image", descriptor.input_feature_channels, _count(of_source)),
    ):
        if read != wanted:
            raise ValueError(
                f"{image} must have {wanted} channels to be read, as the descriptor says (see "
                f"{side}_source_feature_channel_offset and {side}_source_feature_channel_max_count), "
                f"got {read}"
            )
    z, images = first_image, g[0]
    if not 0 <= z <= x[0] - images:
        raise ValueError(
            f"offset.z={z} and a gradient of {images} images need {z + images} source images, got {x[0]}"
        )
    rectangle = _Rectangle.of(kernel, four(destination), descriptor.input_feature_channels)
    size = rectangle.size
    return rectangle.plan(
        kernel,
        Window(tuple(kernel._axis(i, x[1 + i], g[1 + i]) for i in range(2))),
        (g, [*((0, n) for n in g[:3]), of_gradient]),
        (x, [(z, z + images), (0, x[1]), (0, x[2]), of_source]),
        [(0, max(0, min(images, size[0] - z))), (0, min(x[1], size[1])), (0, min(x[2], size[2]))],
        min(z, size[0]),
        drop,
    )


@functools.lru_cache(maxsize=4096)
def block_written(forward: MPSCNNKernel, destination: Shape, g: Shape) -> Block:
    """The part of an incoming gradient that belongs to what a forward call wrote."""
    origin, size = clipped(forward.clip_rect, four(destination))
    size = [*size, destination[-1]]
    written = tuple(size[4 - len(destination) :])
    ranges = [(0, n) for n in size]
    if g == destination:
        ranges[:3] = [(o, o + n) for o, n in zip(origin, size[:3], strict=True)]
    elif g != written:
        raise ValueError(
            f"source_gradient must have the shape of the forward kernel's destination, {destination}, or of "
            f"what it wrote, {written}, got {g}"
        )
    return Block.of(g, ranges)
