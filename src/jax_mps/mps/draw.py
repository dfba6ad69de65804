"""What notebooks show of a kernel, and where its windows lie on an image."""

from __future__ import annotations

import dataclasses
import enum
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jax_mps.geometry import Axis
from jax_mps.mps import picture
from jax_mps.mps.picture import Line, Picture
from jax_mps.mps.structs import MPSImageEdgeMode

if TYPE_CHECKING:
    from jax_mps.mps.kernel import MPSKernel

__all__ = ["Shown", "draw_windows"]


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
    between its pixels, of a gradient kernel the windows of its forward kernel and which pixels of the incoming
    gradient count.

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
    forward = hasattr(kernel, "offset")
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


class Shown:
    """What every kernel inherits: a table and a picture of itself, for notebooks."""

    def _repr_html_(self) -> str:
        kernel: Any = self
        rows = "".join(
            f"<tr><td style='text-align:left'><code>{name}</code></td>"
            f"<td style='text-align:left'>{html.escape(_words(value))}</td></tr>"
            for name, value in _changed(kernel)
        )
        return (
            f"<div><b>{_title(kernel)}</b><table>{rows}</table>"
            f"{_sketch(kernel).svg if hasattr(kernel, '_spans') else ''}</div>"
        )


# --- the windows of a kernel --------------------------------------------------------------------------


def _forward(kernel: Any, source: Plane, destination: Plane | None) -> tuple[Line, Line]:
    """The axes of a forward kernel, from the plan that `encode` follows."""
    from jax_mps.mps.kernel import forward_plan

    ...
