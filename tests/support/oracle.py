"""What the operations mean: loops over windows and taps in NumPy, to compare the library with.

Nothing here is shared with the library. Every function puts the spatial axes first and then visits one
window after another and one tap after another, in row-major order, as the definitions are written;
batch and channels ride along as one vector. Floating point runs in float64.

    window i, tap k      lies at the pixel  t = stride * i - lo + dilation * k
    a tap outside        "exclude": does not exist;  "zero": reads 0;  "clamp": reads the nearest pixel
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

Pixel = tuple[int, ...]


# --- where windows lie --------------------------------------------------------------------------------


class Line(NamedTuple):
    """The windows along one axis. Pixels `first .. last - 1` are the image, any other is outside."""

    size: int
    taps: int
    stride: int
    dilation: int
    low: int
    windows: int
    first: int
    last: int
    band: tuple[int, int] = (0, 0)
    """Pixels around the image that the divisor of an average may count."""
    expansion: int = 1
    """In convolutions, pixels from one of the array to the next. Those between are never multiplied."""

    @property
    def pixels(self) -> int:
        return (self.size - 1) // self.expansion + 1

    def tap(self, i: int, k: int) -> int:
        return self.stride * i - self.low + self.dilation * k

    def counted(self, i: int, band: tuple[int, int]) -> int:
        """Taps of window `i` in the image or in a band around it."""
        taps = [self.tap(i, k) for k in range(self.taps)]
        return sum(self.first - band[0] <= t < self.last + band[1] for t in taps)


def line(size: int, kernel: int, stride: int, dilation: int, padding: Any, ceil_mode: bool) -> Line:
    """The windows of a call with `padding`: "VALID", "SAME", or (lo, hi), where negative numbers crop."""
    extent = (kernel - 1) * dilation + 1
    if padding == "VALID":
        padding = (0, 0)
    if padding == "SAME":
        missing = max((math.ceil(size / stride) - 1) * stride + extent - size, 0)
        padding = (missing // 2, missing - missing // 2)
    lo, hi = padding
    end = size + lo + hi
    if ceil_mode:
        # PyTorch: a window more as long as the one before does not reach the end, if it starts in the image
        # or its low padding.
        windows = (i for i in range(max(end, 0)) if (i - 1) * stride + extent < end)
        out = sum(i * stride < size + lo for i in windows)
    else:
        out = sum(i * stride + extent <= end for i in range(max(end, 0)))
    first, last = max(0, -lo), size - max(0, -hi)
    return Line(size, kernel, stride, dilation, lo, out, first, last, (max(lo, 0), max(hi, 0)))


def mps_line(size: int, kernel: int, stride: int, dilation: int, offset: int, out: int) -> Line:
    """The windows of an MPS kernel, whose first is centred at the pixel `offset`."""
    extent = (kernel - 1) * dilation + 1
    return Line(size, kernel, stride, dilation, math.floor(extent / 2) - offset, out, 0, size)


def lines(
    sizes: Sequence[int],
    window_shape: Sequence[int],
    strides: Any,
    padding: Any = "VALID",
    window_dilation: Any = 1,
    ceil_mode: bool = False,
) -> tuple[Line, ...]:
    rank = len(window_shape)
    pads = [(p, p) if isinstance(p, int) else p for p in each_axis(padding, rank)]
    others = [each_axis(v, rank) for v in (strides, window_dilation)]
    axes = zip(sizes, window_shape, *others, pads, strict=True)
    return tuple(line(n, k, s, d, p, ceil_mode) for n, k, s, d, p in axes)


def transposed_line(
    length: int, kernel: int, stride: int, dilation: int, padding: Any, output_padding: int
) -> Line:
    """The windows of a transposed convolution: those of the convolution whose result has `length` pixels."""
    extent = (kernel - 1) * dilation + 1
    covered = (length - 1) * stride + extent
    if padding == "SAME":
        missing = max(covered - length * stride, 0)
        return Line(length * stride, kernel, stride, dilation, missing // 2, length, 0, length * stride)
    lo, hi = (0, 0) if padding == "VALID" else padding
    size = covered - lo - hi + output_padding
    return Line(size, kernel, stride, dilation, lo, length, 0, size)


def mps_transposed_line(length: int, kernel: int, stride: int, dilation: int, total: int, size: int) -> Line:
    """The windows of an MPS transposed convolution with a total offset.

    It reads the expanded image at `i + total - floor(extent / 2) + dilation * m` for tap m, so pixel j of the
    source, at `stride * j` there, feeds `i = stride * j - total + floor(extent / 2) - dilation * m`. Tap k of
    a window is tap m = kernel - 1 - k.
    """
    extent = (kernel - 1) * dilation + 1
    lo = total - math.floor(extent / 2) + dilation * (kernel - 1)
    return Line(size, kernel, stride, dilation, lo, length, 0, size)


def each_axis(value: Any, rank: int) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else (value,) * rank


def transposed_lines(
    lengths: Sequence[int],
    window_shape: Sequence[int],
    strides: Any = 1,
    padding: Any = "VALID",
    output_padding: Any = 0,
    kernel_dilation: Any = 1,
) -> tuple[Line, ...]:
    rank = len(window_shape)
    pads = [(p, p) if isinstance(p, int) else p for p in each_axis(padding, rank)]
    others = [each_axis(v, rank) for v in (strides, kernel_dilation)]
    axes = zip(lengths, window_shape, *others, pads, each_axis(output_padding, rank), strict=True)
    return tuple(transposed_line(*axis) for axis in axes)


def windows(axes: Sequence[Line], edge: str) -> Iterator[tuple[Pixel, list[Pixel | None]]]:
    """Every window, and what its taps read in row-major order: a pixel, or None for the constant 0."""

    def address(axis: Line, t: int) -> int | None:
        if axis.first <= t < axis.last:
            return t
        return min(max(t, axis.first), axis.last - 1) if edge == "clamp" else None

    for i in np.ndindex(*(a.windows for a in axes)):
        reads: list[Pixel | None] = []
        for k in itertools.product(*(range(a.taps) for a in axes)):
            found = (address(a, a.tap(*at)) for a, at in zip(axes, zip(i, k, strict=True), strict=True))
            pixel = tuple(at for at in found if at is not None)
            if len(pixel) == len(axes):
                reads.append(pixel)
            elif edge != "exclude":
                reads.append(None)
        yield i, reads


# --- the operations on (spatial..., vector) -----------------------------------------------------------


def values(x: np.ndarray, reads: Sequence[Pixel | None]) -> np.ndarray:
    nothing = np.zeros(x.shape[-1], x.dtype)
    return np.stack([nothing if p is None else x[p] for p in reads])


def max_of(x: np.ndarray, axes: Sequence[Line], edge: str) -> tuple[np.ndarray, np.ndarray]:
    """Maxima, and the flat position of the pixel that each was read from (-1: it was an outside 0)."""
    shape = (*(a.windows for a in axes), x.shape[-1])
    y, position = np.zeros(shape, x.dtype), np.zeros(shape, np.int64)
    for i, reads in windows(axes, edge):
        inside = values(x, reads)
        chosen = np.argmax(inside, axis=0)  # the first maximum, or the first NaN
        y[i] = np.take_along_axis(inside, chosen[None], 0)[0]
        flat = [-1 if p is None else np.ravel_multi_index(p, [a.size for a in axes]) for p in reads]
        position[i] = np.array(flat)[chosen]
    return y, position


def selected_taps(x: np.ndarray, axes: Sequence[Any], *, with_padding: bool) -> np.ndarray:
    """The taps that gradients of stock maxima select, of an array `(batch, *spatial, channels)`."""
    out = np.full((x.shape[0], *(a.windows for a in axes), x.shape[-1]), -1)
    for place in np.ndindex(out.shape):
        n, *at, c = place
        best, tap = (None, -1) if with_padding else (-np.inf, -1)
        for number, taps in enumerate(itertools.product(*(range(a.taps) for a in axes))):
            pixel = [a.stride * i - a.low + a.dilation * k for a, i, k in zip(axes, at, taps, strict=True)]
            inside = all(0 <= p < a.size for p, a in zip(pixel, axes, strict=True))
            if not inside and not with_padding:
                continue
            value, index = (x[(n, *pixel, c)], number) if inside else (-np.inf, -1)
            if best is None or not best >= value:
                best, tap = value, index
        out[place] = tap
    return out


def max_gradient_of(g: np.ndarray, x: np.ndarray, axes: Sequence[Line], edge: str) -> np.ndarray:
    _, position = max_of(x, axes, edge)
    dx = np.zeros((math.prod(x.shape[:-1]), x.shape[-1]))
    for i in np.ndindex(g.shape):
        if position[i] >= 0:
            dx[position[i], i[-1]] += g[i]
    return dx.reshape(x.shape)


def average_of(x: np.ndarray, axes: Sequence[Line], divisor: Callable[[Pixel], int]) -> np.ndarray:
    y = np.zeros((*(a.windows for a in axes), x.shape[-1]))
    for i, reads in windows(axes, "zero"):
        y[i] = values(x, reads).sum(axis=0) / divisor(i) if divisor(i) else 0
    return y


def average_gradient_of(g: np.ndarray, axes: Sequence[Line], divisor: Callable[[Pixel], int]) -> np.ndarray:
    dx = np.zeros((*(a.size for a in axes), g.shape[-1]))
    for i, reads in windows(axes, "zero"):
        for pixel in reads:
            if pixel is not None and divisor(i):
                dx[pixel] += g[i] / divisor(i)
    return dx


def norm_of(x: np.ndarray, axes: Sequence[Line], edge: str) -> np.ndarray:
    y = np.zeros((*(a.windows for a in axes), x.shape[-1]))
    for i, reads in windows(axes, edge):
        y[i] = np.hypot.reduce(values(x, reads), axis=0)  # neither overflows nor underflows
    return y


def norm_gradient_of(g: np.ndarray, x: np.ndarray, axes: Sequence[Line], edge: str) -> np.ndarray:
    y, dx = norm_of(x, axes, edge), np.zeros(x.shape)
    for i, reads in windows(axes, edge):
        for pixel in reads:
            if pixel is not None:
                dx[pixel] += np.where(y[i] == 0, 0, x[pixel] / np.where(y[i] == 0, 1, y[i])) * g[i]
    return dx


def counted(axes: Sequence[Line], bands: Sequence[tuple[int, int]]) -> Callable[[Pixel], int]:
    """A divisor: the taps in the image or in a band around it, axis by axis."""
    return lambda i: math.prod(a.counted(n, band) for a, n, band in zip(axes, i, bands, strict=True))


# --- transposed convolution on (spatial..., groups, channels of a group, vector) ------------------------
#
# Kernels are `(*window, groups, out / groups, in / groups)`.


def products(axes: Sequence[Line]) -> Iterator[tuple[Pixel, Pixel, Pixel]]:
    """Every pixel of the source, every tap, and the pixel of the result where they meet."""
    for j in np.ndindex(*(a.windows for a in axes)):
        for k in itertools.product(*(range(a.taps) for a in axes)):
            i = tuple(a.tap(*at) for a, at in zip(axes, zip(j, k, strict=True), strict=True))
            if all(0 <= t < a.size and t % a.expansion == 0 for t, a in zip(i, axes, strict=True)):
                yield tuple(t // a.expansion for t, a in zip(i, axes, strict=True)), j, k


def transposed_of(x: np.ndarray, kernel: np.ndarray, axes: Sequence[Line]) -> np.ndarray:
    groups, outputs = kernel.shape[len(axes) : len(axes) + 2]
    y = np.zeros((*(a.pixels for a in axes), groups, outputs, x.shape[-1]))
    for i, j, k in products(axes):
        y[i] += kernel[k] @ x[j]
    return y


def transposed_data_of(g: np.ndarray, kernel: np.ndarray, axes: Sequence[Line]) -> np.ndarray:
    groups, inputs = kernel.shape[len(axes)], kernel.shape[-1]
    dx = np.zeros((*(a.windows for a in axes), groups, inputs, g.shape[-1]))
    for i, j, k in products(axes):
        dx[j] += kernel[k].swapaxes(-1, -2) @ g[i]
    return dx


def transposed_weights_of(g: np.ndarray, x: np.ndarray, axes: Sequence[Line]) -> np.ndarray:
    dk = np.zeros((*(a.taps for a in axes), *g.shape[-3:-1], x.shape[-2]))
    for i, j, k in products(axes):
        dk[k] += g[i] @ x[j].swapaxes(-1, -2)
    return dk


def kernel_in(kernel: Any, groups: int, transpose_kernel: bool) -> np.ndarray:
    """From `(*window, out / groups, in)`, or the mirrored `(*window, in / groups, out)`."""
    kernel = np.asarray(kernel, np.float64)
    *window, per_group, full = kernel.shape
    kernel = kernel.reshape(*window, per_group, groups, full // groups)
    if transpose_kernel:
        return kernel.swapaxes(-3, -2)
    return np.moveaxis(np.flip(kernel, tuple(range(len(window)))), -3, -1)


def kernel_out(kernel: np.ndarray, groups: int, transpose_kernel: bool) -> np.ndarray:
    """The inverse of `kernel_in`."""
    window = kernel.shape[:-3]
    if transpose_kernel:
        kernel = kernel.swapaxes(-3, -2)
    else:
        kernel = np.flip(np.moveaxis(kernel, -1, -3), tuple(range(len(window))))
    return kernel.reshape(*window, kernel.shape[-3], groups * kernel.shape[-1])


def grouped(x: Any, rank: int, groups: int, data_format: str) -> np.ndarray:
    """An image as (spatial..., groups, channels of a group, batch)."""
    x = np.asarray(x, np.float64)
    channel = x.ndim - 1 if data_format == "channels_last" else x.ndim - rank - 1
    x = np.moveaxis(x, channel, -1)
    batch, sizes, channels = x.shape[: -rank - 1], x.shape[-rank - 1 : -1], x.shape[-1]
    x = x.reshape(math.prod(batch), *sizes, groups, channels // groups)
    return np.moveaxis(x, 0, -1)


def ungrouped(y: np.ndarray, rank: int, batch: Sequence[int], data_format: str) -> np.ndarray:
    """The inverse of `grouped`."""
    y = np.moveaxis(y, -1, 0)
    y = y.reshape(*batch, *y.shape[1 : rank + 1], y.shape[-2] * y.shape[-1])
    return y if data_format == "channels_last" else np.moveaxis(y, -1, -rank - 1)


# --- the public functions -----------------------------------------------------------------------------


def start_of(ndim: int, rank: int, data_format: str = "channels_last") -> int:
    return ndim - rank - (data_format == "channels_last")


def spatial_first(x: Any, start: int, rank: int) -> np.ndarray:
    """An array as (spatial..., vector), floating point in float64."""
    x = np.asarray(x)
    x = x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
    x = np.moveaxis(x, range(start, start + rank), range(rank))
    return x.reshape(*x.shape[:rank], math.prod(x.shape[rank:]))


def back(y: np.ndarray, shape: Sequence[int], start: int, rank: int) -> np.ndarray:
    """The inverse of `spatial_first`, where `shape` gives the axes that are not spatial."""
    rest = (*shape[:start], *shape[start + rank :])
    return np.moveaxis(y.reshape(*y.shape[:rank], *rest), range(rank), range(start, start + rank))


def max_pool(
    x: Any, window_shape: Sequence[int], *, data_format: str = "channels_last", **geometry: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Values and flat positions."""
    rank, shape = len(window_shape), np.shape(x)
    start = start_of(len(shape), rank, data_format)
    axes = lines(shape[start : start + rank], window_shape, **geometry)
    y, position = max_of(spatial_first(x, start, rank), axes, "exclude")
    return back(y, shape, start, rank), back(position, shape, start, rank)


def max_pool_gradient(
    g: Any, x: Any, window_shape: Sequence[int], *, data_format: str = "channels_last", **geometry: Any
) -> np.ndarray:
    rank, shape = len(window_shape), np.shape(x)
    start = start_of(len(shape), rank, data_format)
    axes = lines(shape[start : start + rank], window_shape, **geometry)
    g, x = (spatial_first(a, start, rank) for a in (g, x))
    return back(max_gradient_of(g, x, axes, "exclude"), shape, start, rank)


def _divisor(axes: Sequence[Line], count_include_pad: bool, divisor_override: int | None) -> Any:
    if divisor_override is not None:
        return lambda i: divisor_override
    return counted(axes, [a.band if count_include_pad else (0, 0) for a in axes])


def avg_pool(
    x: Any,
    window_shape: Sequence[int],
    *,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    data_format: str = "channels_last",
    **geometry: Any,
) -> np.ndarray:
    rank, shape = len(window_shape), np.shape(x)
    start = start_of(len(shape), rank, data_format)
    axes = lines(shape[start : start + rank], window_shape, **geometry)
    divisor = _divisor(axes, count_include_pad, divisor_override)
    return back(average_of(spatial_first(x, start, rank), axes, divisor), shape, start, rank)


def avg_pool_gradient(
    g: Any,
    shape: Sequence[int],
    window_shape: Sequence[int],
    *,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    data_format: str = "channels_last",
    **geometry: Any,
) -> np.ndarray:
    rank = len(window_shape)
    start = start_of(len(shape), rank, data_format)
    axes = lines(shape[start : start + rank], window_shape, **geometry)
    divisor = _divisor(axes, count_include_pad, divisor_override)
    return back(average_gradient_of(spatial_first(g, start, rank), axes, divisor), shape, start, rank)


def l2_pool(
    x: Any, window_shape: Sequence[int], *, data_format: str = "channels_last", **geometry: Any
) -> np.ndarray:
    rank, shape = len(window_shape), np.shape(x)
    start = start_of(len(shape), rank, data_format)
    axes = lines(shape[start : start + rank], window_shape, **geometry)
    return back(norm_of(spatial_first(x, start, rank), axes, "zero"), shape, start, rank)


def l2_pool_gradient(
    g: Any, x: Any, window_shape: Sequence[int], *, data_format: str = "channels_last", **geometry: Any
) -> np.ndarray:
    rank, shape = len(window_shape), np.shape(x)
    start = start_of(len(shape), rank, data_format)
    axes = lines(shape[start : start + rank], window_shape, **geometry)
    g, x = (spatial_first(a, start, rank) for a in (g, x))
    return back(norm_gradient_of(g, x, axes, "zero"), shape, start, rank)


def max_unpool(
    y: Any, indices: Any, output_shape: Sequence[int], *, data_format: str = "channels_last"
) -> np.ndarray:
    rank, shape = len(output_shape), np.shape(y)
    start = start_of(len(shape), rank, data_format)
    y, indices = (spatial_first(a, start, rank) for a in (y, indices))
    x = np.zeros((math.prod(output_shape), y.shape[-1]), y.dtype)
    for i in np.ndindex(y.shape):
        if 0 <= indices[i] < len(x):
            x[indices[i], i[-1]] = y[i]
    return back(x.reshape(*output_shape, -1), shape, start, rank)


def conv_transpose(
    x: Any,
    kernel: Any,
    *,
    groups: int = 1,
    transpose_kernel: bool = False,
    data_format: str = "channels_last",
    **geometry: Any,
) -> np.ndarray:
    rank, shape = np.ndim(kernel) - 2, np.shape(x)
    start = start_of(len(shape), rank, data_format)
    axes = transposed_lines(shape[start : start + rank], np.shape(kernel)[:rank], **geometry)
    y = transposed_of(
        grouped(x, rank, groups, data_format), kernel_in(kernel, groups, transpose_kernel), axes
    )
    return ungrouped(y, rank, shape[: -rank - 1], data_format)


def conv_transpose_gradient_data(
    g: Any,
    kernel: Any,
    shape: Sequence[int],
    *,
    groups: int = 1,
    transpose_kernel: bool = False,
    data_format: str = "channels_last",
    **geometry: Any,
) -> np.ndarray:
    rank = np.ndim(kernel) - 2
    start = start_of(len(shape), rank, data_format)
    axes = transposed_lines(shape[start : start + rank], np.shape(kernel)[:rank], **geometry)
    dx = transposed_data_of(
        grouped(g, rank, groups, data_format), kernel_in(kernel, groups, transpose_kernel), axes
    )
    return ungrouped(dx, rank, shape[: -rank - 1], data_format)


def conv_transpose_gradient_weights(
    g: Any,
    x: Any,
    kernel_shape: Sequence[int],
    *,
    groups: int = 1,
    transpose_kernel: bool = False,
    data_format: str = "channels_last",
    **geometry: Any,
) -> np.ndarray:
    rank, shape = len(kernel_shape) - 2, np.shape(x)
    start = start_of(len(shape), rank, data_format)
    axes = transposed_lines(shape[start : start + rank], kernel_shape[:rank], **geometry)
    g, x = (grouped(a, rank, groups, data_format) for a in (g, x))
    return kernel_out(transposed_weights_of(g, x, axes), groups, transpose_kernel)


# --- comparing ----------------------------------------------------------------------------------------


def tolerance(dtype: Any, length: int = 1) -> float:
    """The relative error of a sum of `length` terms, accumulated in float32 or better and rounded once."""
    eps = float(jnp.finfo(dtype).eps)
    accumulator = float(np.finfo(np.float64 if np.dtype(dtype) == np.float64 else np.float32).eps)
    return eps + 4 * accumulator * math.sqrt(length)


def assert_close(actual: Any, expected: Any, *, length: int = 1, scale: float | None = None) -> None:
    """Compares a result with a float64 reference, within the tolerance of the result's type.

    Args:
      actual: the result.
      expected: the reference.
      length: how many terms were summed for one element.
      scale: the size of those terms, where they cancel; by default that of the largest element.
    """
    actual, expected = np.asarray(actual), np.asarray(expected, np.float64)
    rtol = tolerance(actual.dtype, length)
    if scale is None:
        finite = np.abs(expected[np.isfinite(expected)])
        scale = float(finite.max(initial=0))
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual.astype(np.float64), expected, rtol=rtol, atol=rtol * scale)


def assert_same(actual: Any, expected: Any) -> None:
    """Compares results that involve no rounding. NaN equals NaN, and -0 equals 0."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    if actual.dtype.kind not in "biu":
        actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    np.testing.assert_array_equal(actual, expected)


# --- inputs -------------------------------------------------------------------------------------------


def normal(shape: Sequence[int], dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def distinct(shape: Sequence[int], dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    """Shuffled numbers about 0, all different and well apart, so that no maximum is a tie."""
    n = math.prod(shape)
    x = np.random.default_rng(seed).permutation(n).reshape(shape) - n // 2
    x = (x / 8).astype(dtype)
    assert np.unique(x).size == n, (shape, dtype)
    return x


def tied(shape: Sequence[int], dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    """Small integers with many ties; half are 0, as behind a ReLU."""
    rng = np.random.default_rng(seed)
    return np.maximum(rng.integers(-3, 4, size=shape), 0).astype(dtype)


def images(rank: int, data_format: str, batch: Sequence[int] = (2,), channels: int = 3) -> tuple[int, ...]:
    """The shape of a small image array of uneven sizes."""
    sizes = {1: (13,), 2: (9, 8), 3: (6, 5, 7)}[rank]
    return (*batch, *sizes, channels) if data_format == "channels_last" else (*batch, channels, *sizes)
