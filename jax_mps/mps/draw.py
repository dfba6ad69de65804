"""What notebooks show of a kernel, and where its windows lie on an image."""

from __future__ import annotations

import dataclasses
import enum
import html
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jax_mps import geometry
from jax_mps.geometry import Axis
from jax_mps.mps import picture
from jax_mps.mps.gradient import MPSCNNBinaryKernel
from jax_mps.mps.gradient_plan import gradient_axes
from jax_mps.mps.kernel import MPSKernel, serves_kernels
from jax_mps.mps.parameters import KernelWithParameters
from jax_mps.mps.picture import Line, Picture
from jax_mps.mps.placement import Span, clipped
from jax_mps.mps.structs import MPSImageEdgeMode

__all__ = ["draw_windows"]

Plane = tuple[int, int]


def draw_windows(
    kernel: MPSKernel,
    source_shape: Sequence[int],
    destination_shape: Sequence[int] | None = None,
    *,
    source_gradient_shape: Sequence[int] | None = None,
) -> Picture:
    """A picture of where a kernel's windows lie on its source image, and which destination pixel is whose.

    It shows the pixels that some window reads and those that none does, what lies around the image (zeros,
    repeated pixels, the band of zeros that an average counts), the taps of the first window, and the
    destination with its clip rectangle. Of a transposed convolution it shows the source with the zeros
    between its pixels, of a gradient kernel the windows of its forward kernel and which pixels of the
    incoming gradient count.

    Args:
      kernel: any kernel.
      source_shape: of the source image, `[height, width, ...]` or `[number, height, width, channels]`.
      destination_shape: of the destination, likewise; `None` lets the kernel's padding policy size it and
        place the windows, as `encode` without a destination does. Only for forward kernels.
      source_gradient_shape: of the incoming gradient. Only for gradient kernels, which need it.

    Returns:
      An SVG image, which notebooks show.

    Raises:
      ValueError: a shape is missing, or none is wanted.

    Examples:
      >>> from jax_mps import mps
      >>> kernel = mps.MPSCNNPoolingMax(kernel_width=3, kernel_height=3, stride_in_pixels_x=2)
      >>> picture = mps.draw_windows(kernel, (5, 7))
      >>> picture.svg[:4]
      '<svg'
    """
    size = _plane("source_shape", source_shape)
    forward = not isinstance(kernel, MPSCNNBinaryKernel)
    if forward and source_gradient_shape is not None:
        raise ValueError("source_gradient_shape must be None for a forward kernel")
    if not forward and (source_gradient_shape is None or destination_shape is not None):
        raise ValueError("a gradient kernel needs source_gradient_shape, and no destination_shape")
    if forward:
        to = None if destination_shape is None else _plane("destination_shape", destination_shape)
        rows, columns = _forward(kernel, size, to)
        result = f"destination, {rows.pixels} \u00d7 {columns.pixels}"
        rest = "destination pixel left as it was"
    else:
        rows, columns = _gradient(kernel, size, _plane("source_gradient_shape", source_gradient_shape or ()))
        result = f"incoming gradient, {rows.pixels} \u00d7 {columns.pixels}"
        rest = "gradient pixel that does not count"
    image = f"source image, {size[0]} \u00d7 {size[1]}"
    if rows.step > 1 or columns.step > 1:
        image += f", with zeros between its pixels {rows.axis.size} \u00d7 {columns.axis.size}"
    return picture.draw(_title(kernel), image, result, rest, rows, columns, _edge(kernel))


@serves_kernels
def html_of(kernel: MPSKernel) -> str:
    """A table and a picture of a kernel, for notebooks."""
    rows = "".join(
        f"<tr><td style='text-align:left'><code>{name}</code></td>"
        f"<td style='text-align:left'>{html.escape(_words(value))}</td></tr>"
        for name, value in _changed(kernel)
    )
    try:
        title, sketch = _title(kernel), _sketch(kernel).svg
    except (AttributeError, NotImplementedError):  # a base class, which has no windows
        title, sketch = type(kernel).__name__, ""
    return f"<div><b>{title}</b><table>{rows}</table>{sketch}</div>"


# --- the windows of a kernel --------------------------------------------------------------------------


def _plane(name: str, shape: Sequence[int]) -> Plane:
    """Height and width."""
    sizes = tuple(geometry.integer(name, n) for n in shape)
    if len(sizes) not in (2, 3, 4) or min(sizes) < 0:
        raise ValueError(f"{name} must be (height, width) or the shape of an image or images, got {sizes}")
    height, width = sizes if len(sizes) == 2 else sizes[-3:-1]
    return height, width


def _forward(kernel: Any, source: Plane, destination: Plane | None) -> tuple[Line, Line]:
    """The axes (y, x) of a forward kernel, in the integers that `encode` computes with."""
    spans = kernel._spans()
    if destination is None:
        (height, _), (width, _) = kernel._places_by_policy(*source)
        destination = height, width
        kernel = kernel.placed(jax.ShapeDtypeStruct((*source, 1), np.float32))
    origin, size = clipped(kernel.clip_rect, (1, *destination, 1))

    def line(i: int) -> Line:
        axis, step = kernel._axis(i, source[i], size[1 + i]), 1
        if kernel.is_backwards:
            axis, step = _expanded(axis, source[i], spans[i]), spans[i].stride
        return Line(axis, destination[i], origin[1 + i], step, _band(kernel, i))

    return line(0), line(1)


def _gradient(kernel: Any, source: Plane, gradient: Plane) -> tuple[Line, Line]:
    """The axes (y, x) of a gradient kernel: its forward kernel's windows, of the pixels that count."""
    if isinstance(kernel, KernelWithParameters):
        spans = kernel._spans()
        axes = (kernel._axis(i, source[i], gradient[i]) for i in range(2))
        rows, columns = (
            Line(_expanded(axis, n, span), pixels, step=span.stride)
            for axis, n, span, pixels in zip(axes, source, spans, gradient, strict=True)
        )
    else:
        _, *plane = gradient_axes(kernel, kernel.source_size, (1, *gradient), (1, *source))
        rows, columns = (
            Line(axis.axis, gradient[i], axis.pixels[0], band=_band(kernel, i))
            for i, axis in enumerate(plane)
        )
    return rows, columns


def _expanded(axis: Axis, length: int, span: Span) -> Axis:
    """The windows of a transposed convolution on its source with zeros between the pixels."""
    size = max(0, (length - 1) * span.stride + 1)
    return Axis.from_offset(size, span.kernel, 1, span.dilation, axis.total_offset, axis.size)


def _edge(kernel: Any) -> str:
    mode = kernel.edge_mode if hasattr(kernel, "edge_mode") else kernel.secondary_edge_mode
    if mode != MPSImageEdgeMode.CLAMP:
        return "zero"
    return "shrink" if hasattr(kernel, "zero_pad_size_x") else "clamp"


def _band(kernel: Any, i: int) -> int:
    """Zeros around the image that the divisor of an average counts."""
    return (kernel.zero_pad_size_y, kernel.zero_pad_size_x)[i] if _edge(kernel) == "shrink" else 0


# --- words --------------------------------------------------------------------------------------------


def _title(kernel: Any) -> str:
    """The class and the windows of a kernel."""
    y, x = kernel._spans()
    text = f"{type(kernel).__name__} {y.kernel} \u00d7 {x.kernel}"
    if (y.stride, x.stride) != (1, 1):
        text += f", stride {y.stride} \u00d7 {x.stride}"
    if (y.dilation, x.dilation) != (1, 1):
        text += f", dilation {y.dilation} \u00d7 {x.dilation}"
    return text


def _changed(kernel: Any) -> list[tuple[str, Any]]:
    """The members that have not their default value, and the descriptor of a convolution."""
    defaults = {f.name: f.default for f in dataclasses.fields(kernel)}
    members = [(name, v) for name, v in kernel.settings().items() if v != defaults[name]]
    if isinstance(kernel, KernelWithParameters):
        members.append(("descriptor", kernel.descriptor))
    return members


def _words(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return value.name or repr(value)
    return repr(value)


def _sketch(kernel: Any) -> Picture:
    """The first windows of a kernel, three along each axis, on an image that they just fill."""
    y, x = kernel._spans()
    if isinstance(kernel, KernelWithParameters):
        source, other = (3, 3), (2 * y.stride + 1, 2 * x.stride + 1)
    else:
        source, other = (2 * y.stride + y.extent, 2 * x.stride + x.extent), (3, 3)
    if isinstance(kernel, MPSCNNBinaryKernel):
        return draw_windows(kernel, source, source_gradient_shape=other)
    return draw_windows(kernel, source, other)
