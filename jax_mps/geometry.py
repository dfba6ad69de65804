"""Windows on an axis, as integers: where they lie, what they read, how many there are.

Nothing here touches an array. Every axis is described alone, because every rule of a window is
separable. Window `i` of an axis has the taps

    t_k(i) = stride * i - low + dilation * k,        k = 0 .. taps - 1,

and a tap outside `0 <= t < size` lies in the padding. Sizes and paddings may be symbolic dimensions
(`jax.export`); kernels, strides and dilations are always plain integers.

A transposed convolution has the same windows, of the ordinary convolution that it transposes: its operand
holds one pixel a window, its result is the image.

Apple's pooling kernels describe the same windows by the *centre* of the first one (`offset`), and its
transposed convolution by a total offset in the image with zeros between its pixels. The conversions are
`Axis.from_offset`, `Axis.offset`, `Axis.from_total_offset` and `Axis.total_offset`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np

from jax_mps import _compat

Dim = Any
"""An axis length: an `int`, or a symbolic dimension while exporting."""

Ints = int | Sequence[int]
"""One int for all spatial axes, or one for each."""

Padding = str | int | Sequence[Sequence[int]]
"""A string, "VALID", "SAME" or "SAME_LOWER"; an int for all sides; or a `(low, high)` pair for each axis."""

DataFormat = Literal[
    "channels_last", "channels_first", "NWC", "NHWC", "NDHWC", "NCW", "NCHW", "NCDHW"
]  # fmt: skip
"""Whether the channel axis is the last one, or the one before the spatial axes.

The short names say how many spatial axes there are, too, which is checked; N is any number of batch axes.
"""

Edge = Literal["exclude", "zero", "clamp"]
"""What a tap outside the image reads: nothing; the value 0; the nearest pixel of the image."""

LARGEST = 2**30
"""No argument is beyond this: sums and products of two stay inside the integers of compilers and kernels."""

MOST_PIXELS = 2**31 - 1
"""Of an axis that a shape names, and taps of a window: they have numbers in int32."""


class _Renamed:
    """Attributes under the names that they had before version 0.2, until 0.3."""

    _old_names: ClassVar[dict[str, str]] = {}

    def __getattr__(self, name: str) -> Any:
        if name not in self._old_names:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        new = self._old_names[name]
        warnings.warn(f"{type(self).__name__}.{name} is now {new}", DeprecationWarning, stacklevel=2)
        return getattr(self, new)


@dataclasses.dataclass(frozen=True)
class Axis(_Renamed):
    """The windows along one axis.

    Attributes:
      size: pixels of the image.
      taps: of a window.
      stride: pixels from one window to the next.
      dilation: pixels from one tap to the next.
      low: pixels by which the first window starts before the image (negative: after its first pixel).
      windows: how many there are.
    """

    _old_names = {"kernel": "taps", "lo": "low", "hi": "high", "out": "windows"}  # noqa: RUF012

    size: Dim
    taps: int
    stride: int
    dilation: int
    low: Dim
    windows: Dim

    @property
    def extent(self) -> int:
        """Pixels from the first to the last tap of a window, both included."""
        return (self.taps - 1) * self.dilation + 1

    @property
    def high(self) -> Dim:
        """Pixels by which the last window ends after the image (negative: pixels no window reaches)."""
        return (self.windows - 1) * self.stride + self.extent - self.low - self.size

    @property
    def offset(self) -> Dim:
        """Apple's offset: the pixel under the centre of the first window; an even extent leans left."""
        return self.extent // 2 - self.low

    @classmethod
    def from_offset(cls, size: Dim, kernel: int, stride: int, dilation: int, offset: int, out: int) -> Axis:
        """The axis of an MPS kernel, whose first window is centred at the pixel `offset`."""
        extent = (kernel - 1) * dilation + 1
        return cls(size, kernel, stride, dilation, extent // 2 - offset, out).simplified()

    @property
    def total_offset(self) -> Dim:
        """Apple's total offset of a transposed convolution, `offset * stride + kernel_offset`."""
        return self.low + self.extent // 2 - (self.extent - 1)

    @classmethod
    def from_total_offset(
        cls, length: Dim, kernel: int, stride: int, dilation: int, total: int, size: int
    ) -> Axis:
        """The axis of an MPS transposed convolution of `length` pixels to `size` pixels.

        Its kernel is centred, for pixel 0 of the result, at the pixel `total` of the source with
        `stride - 1` zeros between its pixels.
        """
        extent = (kernel - 1) * dilation + 1
        return cls(size, kernel, stride, dilation, total - extent // 2 + extent - 1, length).simplified()

    def simplified(self) -> Axis:
        """The same windows, without a dilation of one tap and without the long stride of one window.

        Programs and tables grow with strides and dilations, so these must not be longer than they matter.
        """
        once = isinstance(self.windows, int) and self.windows == 1
        return dataclasses.replace(
            self,
            stride=min(self.stride, self.extent) if once else self.stride,
            dilation=self.dilation if self.taps > 1 else 1,
        )

    def select(self, first: int, count: int) -> Axis:
        """Only the windows `first .. first + count - 1`."""
        return dataclasses.replace(self, low=self.low - self.stride * first, windows=count)

    def cropped(self, before: Dim, after: Dim) -> Axis:
        """The same windows after `before` and `after` pixels have been cut off the image."""
        return dataclasses.replace(self, size=self.size - before - after, low=self.low + before)

    def enclosed(self) -> tuple[Axis, Dim, Dim]:
        """The same windows on an image grown until they all lie inside it, and by how much it grew."""
        before, after = at_least_zero(self.low), at_least_zero(self.high)
        return self.cropped(-before, -after), before, after

    def pixels_or_nothing(self) -> np.ndarray:
        """Where every tap of every window lies, `(windows, taps)`; -1 for a tap in the padding."""
        taps = self._pixels_of_taps()
        return np.where((taps >= 0) & (taps < self.size), taps, -1)

    def _pixels_of_taps(self) -> np.ndarray:
        """Where every tap of every window lies: `(windows, taps)`."""
        first = self.stride * np.arange(self.windows) - self.low
        return first[:, None] + self.dilation * np.arange(self.taps)

    def first_empty_window(self) -> int | None:
        """The number of the first window all of whose taps lie in the padding, if there is one."""
        if not self.is_static():
            return None
        if self.low >= self.extent:
            return 0
        # A window that begins before the image and ends behind its first pixel is empty if its taps step
        # over the image. Where they do repeats with the dilation.
        before = -(-max(self.low, 0) // self.stride)
        period = self.dilation // math.gcd(self.stride, self.dilation)
        first = self.stride * np.arange(min(before, self.windows, period)) - self.low
        over = np.flatnonzero(first % self.dilation >= self.size)
        if over.size:
            return int(over[0])
        behind = max(-(-(self.size + self.low) // self.stride), 0)
        return behind if behind < self.windows else None

    def counted_taps(self, low: int, high: int) -> np.ndarray:
        """For every window, how many taps lie in the image or in a band of `low`, `high` pixels around it."""
        first = self.stride * np.arange(self.windows) - self.low
        lowest = np.maximum(-((first + low) // self.dilation), 0)
        highest = np.minimum((self.size + high - 1 - first) // self.dilation, self.taps - 1)
        return np.maximum(highest - lowest + 1, 0)

    def pixels_read(self, edge: Edge) -> np.ndarray:
        """For every pixel of the image, whether a tap of some window reads it."""
        first = self.stride * np.arange(self.windows) - self.low
        taps = first[:, None] + self.dilation * np.arange(self.taps)
        if edge == "clamp":
            taps = np.clip(taps, 0, self.size - 1)
        read = np.zeros(self.size, bool)
        read[taps[(taps >= 0) & (taps < self.size)]] = True
        return read

    def is_static(self) -> bool:
        return all(isinstance(d, int) for d in (self.size, self.low, self.windows))

    def overlaps_padding(self) -> bool:
        """Whether some tap may lie in the padding; true where a symbolic size leaves it open."""
        return not (surely_below(self.low, 1) and surely_below(self.high, 1))


@dataclasses.dataclass(frozen=True)
class Window(_Renamed):
    """The windows over all spatial axes, outermost axis first."""

    _old_names = {"kernel": "shape", "outs": "counts"}  # noqa: RUF012

    axes: tuple[Axis, ...]

    @property
    def rank(self) -> int:
        return len(self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Taps along each axis."""
        return tuple(a.taps for a in self.axes)

    @property
    def sizes(self) -> tuple[Dim, ...]:
        """Spatial shape of the image."""
        return tuple(a.size for a in self.axes)

    @property
    def counts(self) -> tuple[Dim, ...]:
        """Spatial shape of the pooled array."""
        return tuple(a.windows for a in self.axes)

    @functools.cached_property
    def taps(self) -> int:
        return math.prod(self.shape)

    @property
    def tap_dtype(self) -> np.dtype[Any]:
        """The narrowest signed integer that numbers every tap (Apple plugins have no unsigned ones)."""
        bound = {np.int8: 2**7, np.int16: 2**15, np.int32: 2**31}
        return np.dtype(next(t for t, limit in bound.items() if self.taps <= limit))

    def is_static(self) -> bool:
        return all(a.is_static() for a in self.axes)

    def overlaps_padding(self) -> bool:
        return any(a.overlaps_padding() for a in self.axes)


Band = tuple[tuple[Dim, Dim], ...]
Margins = tuple[tuple[Dim, Dim], ...]


class Divisor(NamedTuple):
    """What an average divides by.

    A window's sum is divided by `number`; or, where that is 0, by the number of its taps that lie in
    the image or in a band of `band[axis] = (low, high)` pixels around it, counted axis by axis. A window
    with no such tap averages to 0.
    """

    number: int
    band: Band


class Placement(NamedTuple):
    """A pooling call in integers.

    A symbolic size may turn out to be too small for any window. So that every program has one, such an image
    is grown first, and what the windows beyond the true ones give is cut off last.

    Attributes:
      window: the windows, on the image that has been grown and cropped.
      start: where the spatial axes start.
      grow: pixels to be added to the image, before and after, along each axis; nothing with static sizes.
      crop: pixels to be cut off then.
      pads: the padding.
      spare: windows to be cut off the result; none with static sizes.
    """

    window: Window
    start: int
    grow: Margins
    crop: Margins
    pads: Margins
    spare: Margins

    @property
    def counts(self) -> tuple[Dim, ...]:
        """Spatial shape of the result."""
        return tuple(n - after for n, (_, after) in zip(self.window.counts, self.spare, strict=True))


# --- from the arguments of a call to a placement ------------------------------------------------------


def place(
    shape: Sequence[Dim],
    window_shape: Ints,
    strides: Ints,
    padding: Padding,
    window_dilation: Ints,
    ceil_mode: bool,
    data_format: str,
) -> Placement:
    """Checks the arguments of a pooling call on an array of `shape` and places its windows.

    A string pads as `lax.padtype_to_pads` does. `ceil_mode` is PyTorch's: the number of windows is
    rounded up, but a window that would start behind the image and its low padding is dropped.
    """
    window_shape, strides = freeze("window_shape", window_shape), freeze("strides", strides)
    window_dilation, padding = freeze("window_dilation", window_dilation), freeze_padding(padding)
    flag("ceil_mode", ceil_mode)
    arguments = (window_shape, strides, padding, window_dilation, bool(ceil_mode), data_format)
    if all(isinstance(d, int) for d in shape):
        return _place_static(tuple(shape), *arguments)
    return _place(tuple(shape), *arguments)


def _place(
    shape: tuple[Dim, ...],
    window_shape: int | tuple[int, ...],
    strides: int | tuple[int, ...],
    padding: str | int | tuple[tuple[int, int], ...],
    window_dilation: int | tuple[int, ...],
    ceil_mode: bool,
    data_format: str,
) -> Placement:
    rank = spatial_rank(
        len(shape), window_shape=window_shape, strides=strides, window_dilation=window_dilation
    )
    start = spatial_start(len(shape), rank, data_format)
    sizes = shape[start : start + rank]
    kernel = per_axis("window_shape", window_shape, rank)
    stride = per_axis("strides", strides, rank)
    dilation = per_axis("window_dilation", window_dilation, rank)
    if math.prod(kernel) > MOST_PIXELS:
        raise ValueError(f"window_shape must have fewer than 2**31 taps in all, got {kernel}")
    pads = _pads(padding, sizes, kernel, stride, dilation, ceil_mode)

    axes, grow, crop, spare = [], [], [], []
    for i, (size, k, s, d, pad) in enumerate(zip(sizes, kernel, stride, dilation, pads, strict=True)):
        cut = (at_least_zero(-pad[0]), at_least_zero(-pad[1]))
        count = _count_windows(i, size, k, s, d, pad, ceil_mode)
        missing: Dim = 0
        if not isinstance(size, int) and not (_surely_positive(count) and _surely_positive(size - sum(cut))):
            overhang = s - 1 if ceil_mode else 0
            least = (k - 1) * d + 1 - sum(pad) - overhang
            missing = at_least_zero(max(least, sum(cut) + 1, 1 - pad[0]) - size)
        windows = count if _is_zero(missing) else _count_windows(i, size + missing, k, s, d, pad, ceil_mode)
        axis = Axis(size + missing, k, s, d, pad[0], windows).cropped(*cut).simplified()
        _check_every_window_has_a_tap(i, axis, size, pad)
        axes.append(axis)
        grow.append((0, missing))
        crop.append(cut)
        spare.append((0, windows - at_least_zero(count)))
    return Placement(Window(tuple(axes)), start, tuple(grow), tuple(crop), pads, tuple(spare))


def _surely_positive(value: Dim) -> bool:
    return surely_below(-value, 0)


def _is_zero(dim: Dim) -> bool:
    return isinstance(dim, int) and dim == 0


def _count_windows(i: int, size: Dim, k: int, s: int, d: int, pad: tuple[Dim, Dim], ceil_mode: bool) -> Dim:
    """How many windows spatial axis `i` has, at least one."""
    low, high = pad
    extent = (k - 1) * d + 1
    space = size + low + high - extent
    count = space // s + 1
    if ceil_mode:
        count = -(-space // s) + 1
        # PyTorch: the last window has to start inside the image or its low padding.
        behind = -(-(size + low) // s)
        count = min(count, behind) if isinstance(count, int) else _compat.min_dim(count, behind)
    if surely_below(count, 1):
        raise ValueError(
            f"window_shape={k} with window_dilation={d} spans {extent} pixels, more than the "
            f"{size + low + high} of spatial axis {i} (size {size}, padding {pad}): "
            "the output size would be below 1"
        )
    return count


def _check_every_window_has_a_tap(i: int, axis: Axis, size: Dim, pad: tuple[Dim, Dim]) -> None:
    """Refuses padding so wide that all taps of some window lie in it; `size` is that before cropping."""
    empty = axis.first_empty_window()
    if empty is not None:
        raise ValueError(
            f"padding={pad} of spatial axis {i} leaves window {empty} without a valid tap "
            f"(size {size}, window_shape {axis.taps}, strides {axis.stride}, "
            f"window_dilation {axis.dilation}): every window must read at least one pixel of the image"
        )


# Eager calls repeat the same few geometries; symbolic sizes are not worth keeping.
_place_static = functools.lru_cache(maxsize=1024)(_place)


class AdaptiveAxis(NamedTuple):
    """Windows of an axis that share out its pixels, as PyTorch does: `i * size / windows` on, to the next."""

    size: int
    windows: int

    @property
    def firsts(self) -> np.ndarray:
        """The first pixel of every window."""
        return np.arange(self.windows) * self.size // self.windows

    @property
    def lengths(self) -> np.ndarray:
        """The pixels of every window."""
        return -(-np.arange(1, self.windows + 1) * self.size // self.windows) - self.firsts

    @property
    def taps(self) -> int:
        """The pixels of the longest window."""
        return int(self.lengths.max())

    def pixels(self, *, fill: bool) -> np.ndarray:
        """Where the taps lie, `(windows, taps)`; beyond the window its last pixel, or -1 with `fill`."""
        k, lengths = np.arange(self.taps), self.lengths[:, None]
        inside = self.firsts[:, None] + np.minimum(k, lengths - 1)
        return np.where(k >= lengths, -1, inside) if fill else inside


class AdaptivePlacement(NamedTuple):
    """A call of adaptive pooling in integers: its windows, and where the spatial axes start."""

    axes: tuple[AdaptiveAxis, ...]
    start: int

    @property
    def regular(self) -> bool:
        """Whether all windows of an axis are equally long and none overlap."""
        return all(axis.size % axis.windows == 0 for axis in self.axes)


def place_adaptive(
    shape: Sequence[Dim], output_size: int | Sequence[int | None], data_format: str
) -> AdaptivePlacement:
    """Checks the arguments of adaptive pooling of an array of `shape` and places its windows."""
    kept = isinstance(output_size, Sequence) and [n is None for n in output_size]
    known = [1 if n is None else n for n in output_size] if isinstance(output_size, Sequence) else output_size
    counts = freeze("output_size", known)
    rank = spatial_rank(len(shape), output_size=counts)
    start = spatial_start(len(shape), rank, data_format)
    sizes = static_sizes(shape, start, rank)
    counts = per_axis("output_size", counts, rank)
    if kept:
        counts = tuple(n if keep else o for n, o, keep in zip(sizes, counts, kept, strict=True))
    return AdaptivePlacement(tuple(AdaptiveAxis(*axis) for axis in zip(sizes, counts, strict=True)), start)


def static_sizes(shape: Sequence[Dim], start: int, rank: int) -> tuple[int, ...]:
    """The spatial sizes of an array, where windows are only known if they are."""
    sizes = tuple(shape[start : start + rank])
    if not all(isinstance(n, int) for n in sizes):
        raise ValueError(f"x must have spatial axes of known sizes, got symbolic dimensions in {sizes}")
    if min(sizes) < 1:
        raise ValueError(f"every spatial axis of x needs at least one pixel, got sizes {sizes}")
    return sizes


class TransposedPlacement(NamedTuple):
    """A transposed convolution in integers.

    Attributes:
      window: its windows.
      start: where the spatial axes start.
      spare: pixels to be cut off the result, see `Placement`.
    """

    window: Window
    start: int
    spare: Margins

    @property
    def sizes(self) -> tuple[Dim, ...]:
        """Spatial shape of the result."""
        return tuple(n - after for n, (_, after) in zip(self.window.sizes, self.spare, strict=True))


def place_transposed(
    shape: Sequence[Dim],
    kernel: tuple[int, ...],
    strides: Ints,
    padding: Padding,
    output_padding: Ints,
    kernel_dilation: Ints,
    data_format: str,
) -> TransposedPlacement:
    """Checks the arguments of a transposed convolution of an array of `shape` and places its windows.

    `padding` is that of the ordinary convolution, of the result to the operand. Of the sizes that this
    convolution takes to the operand's, the result has the least plus `output_padding`, or with "SAME" the
    greatest, `length * stride`.
    """
    arguments = (
        kernel,
        freeze("strides", strides),
        freeze_padding(padding),
        freeze("output_padding", output_padding),
        freeze("kernel_dilation", kernel_dilation),
        data_format,
    )
    if all(isinstance(d, int) for d in shape):
        return _place_transposed_static(tuple(shape), *arguments)
    return _place_transposed(tuple(shape), *arguments)


def _place_transposed(
    shape: tuple[Dim, ...],
    kernel: tuple[int, ...],
    strides: int | tuple[int, ...],
    padding: str | int | tuple[tuple[int, int], ...],
    output_padding: int | tuple[int, ...],
    kernel_dilation: int | tuple[int, ...],
    data_format: str,
) -> TransposedPlacement:
    rank = len(kernel)
    per_axis("kernel", kernel, rank)
    stride = per_axis("strides", strides, rank)
    dilation = per_axis("kernel_dilation", kernel_dilation, rank)
    more = per_axis("output_padding", output_padding, rank, least=0)
    start, lengths = _pixels(shape, rank, data_format)
    if is_same(padding) and any(more):
        raise ValueError(
            f"output_padding must be 0 with padding={padding!r}, which already fixes the output size, "
            f"got {output_padding}"
        )
    for i, (op, s, d) in enumerate(zip(more, stride, dilation, strict=True)):
        if op >= max(s, d):
            raise ValueError(
                f"output_padding must be 0 to {max(s, d) - 1} on spatial axis {i}, below the greater of "
                f"strides ({s}) and kernel_dilation ({d}), got {op}"
            )
    pads = transposed_pads(padding, kernel, stride, dilation)
    axes, spare = [], []
    for i, each in enumerate(zip(lengths, kernel, stride, dilation, pads, more, strict=True)):
        axis = _transposed_axis(i, *each)
        missing = at_least_zero(1 - axis.size)
        axes.append(dataclasses.replace(axis, size=axis.size + missing))
        spare.append((0, axis.size + missing - at_least_zero(axis.size)))
    _check_plane(
        f"{strides=}, {padding=}, {output_padding=} and {kernel_dilation=}", [axis.size for axis in axes]
    )
    return TransposedPlacement(Window(tuple(axes)), start, tuple(spare))


def _transposed_axis(i: int, n: Dim, k: int, s: int, d: int, pad: tuple[Dim, Dim], more: int) -> Axis:
    """Spatial axis `i`, whose operand has `n` pixels and whose result has at least one."""
    low, high = pad
    extent = (k - 1) * d + 1
    size = (n - 1) * s + extent - low - high + more
    if surely_below(size, 1):
        raise ValueError(
            f"padding={pad} of spatial axis {i} leaves nothing of the {(n - 1) * s + extent + more} "
            f"pixels that {n} windows of {extent} pixels reach with strides {s} and output_padding "
            f"{more}: the output size would be below 1"
        )
    return Axis(size, k, s, d, low, n).simplified()


_place_transposed_static = functools.lru_cache(maxsize=1024)(_place_transposed)


def output_padding_of(
    output_size: Ints,
    shape: Sequence[Dim],
    kernel: tuple[int, ...],
    strides: Ints,
    padding: Padding,
    kernel_dilation: Ints,
    data_format: str,
) -> tuple[int, ...]:
    """The output padding with which a transposed convolution of an array of `shape` has that result."""
    least = place_transposed(shape, kernel, strides, padding, 0, kernel_dilation, data_format).window
    sizes = per_axis("output_size", freeze("output_size", output_size), len(kernel))
    if is_same(padding):
        raise ValueError(
            f"output_size must be None with padding={padding!r}, which already fixes it, got {sizes}"
        )
    if not least.is_static():
        raise ValueError(f"output_size must be None for symbolic sizes, got {sizes}")
    for i, (size, axis) in enumerate(zip(sizes, least.axes, strict=True)):
        most = axis.size + max(axis.stride, axis.dilation) - 1
        if not axis.size <= size <= most:
            raise ValueError(
                f"output_size must be {axis.size} to {most} on spatial axis {i}, for {axis.windows} pixels, "
                f"{axis.taps} taps, strides {axis.stride} and kernel_dilation {axis.dilation}, got {size}"
            )
    return tuple(size - axis.size for size, axis in zip(sizes, least.axes, strict=True))


class ConvPlacement(NamedTuple):
    """An ordinary convolution in integers.

    Attributes:
      ordinary: its windows on the image; None where zeros lie between the pixels of the image.
      transposed: the windows of the transposed convolution of the image, with the kernel backwards and the
        input dilation as its stride, that gives the results of stride 1.
      picked: the windows of one tap that pick the results of all strides from those.
      start: where the spatial axes start.
      grow, spare: pixels to be added to the image, and to be cut off the result, see `Placement`.
    """

    ordinary: Window | None
    transposed: Window
    picked: Window
    start: int
    grow: Margins
    spare: Margins


def place_conv(
    shape: Sequence[Dim],
    kernel: tuple[int, ...],
    strides: Ints,
    padding: Padding,
    input_dilation: Ints,
    kernel_dilation: Ints,
    data_format: str,
) -> ConvPlacement:
    """Checks the arguments of an ordinary convolution of an array of `shape` and places its windows.

    They lie on the image with `input_dilation - 1` zeros between its pixels. "SAME" pads that image as
    `lax.padtype_to_pads` does.
    """
    arguments = (
        kernel,
        freeze("strides", strides),
        freeze_padding(padding),
        freeze("input_dilation", input_dilation),
        freeze("kernel_dilation", kernel_dilation),
        data_format,
    )
    if all(isinstance(d, int) for d in shape):
        return _place_conv_static(tuple(shape), *arguments)
    return _place_conv(tuple(shape), *arguments)


def _place_conv(
    shape: tuple[Dim, ...],
    kernel: tuple[int, ...],
    strides: int | tuple[int, ...],
    padding: str | int | tuple[tuple[int, int], ...],
    input_dilation: int | tuple[int, ...],
    kernel_dilation: int | tuple[int, ...],
    data_format: str,
) -> ConvPlacement:
    rank = len(kernel)
    per_axis("kernel", kernel, rank)
    stride = per_axis("strides", strides, rank)
    expansion = per_axis("input_dilation", input_dilation, rank)
    dilation = per_axis("kernel_dilation", kernel_dilation, rank)
    start, lengths = _pixels(shape, rank, data_format)
    sizes = tuple((n - 1) * e + 1 for n, e in zip(lengths, expansion, strict=True))
    pads = _pads(padding, sizes, kernel, stride, dilation, False)
    axes, grow, spare = [], [], []
    for i, (n, e, *each) in enumerate(
        zip(lengths, expansion, sizes, kernel, stride, dilation, pads, strict=True)
    ):
        axis = _conv_axis(i, *each)
        missing, windows = 0, at_least_zero(axis.windows)
        if not _surely_positive(axis.windows):
            least = max(axis.extent - sum(pads[i]), 1)
            missing = at_least_zero(-(-(least - 1) // e) + 1 - n)
            axis = _conv_axis(i, axis.size + missing * e, *each[1:])
        axes.append(axis)
        grow.append((0, missing))
        spare.append((0, axis.windows - windows))
    lengths = tuple(n + after for n, (_, after) in zip(lengths, grow, strict=True))
    _check_plane(
        f"{strides=}, {padding=}, {input_dilation=} and {kernel_dilation=}", [_reach(axis) for axis in axes]
    )
    columns = list(zip(axes, lengths, expansion, strict=True))
    return ConvPlacement(
        Window(tuple(axes)) if all(e == 1 for e in expansion) else None,
        Window(tuple(_backwards(axis, n, e) for axis, n, e in columns)),
        Window(tuple(Axis(_reach(axis), 1, axis.stride, 1, 0, axis.windows).simplified() for axis in axes)),
        start,
        tuple(grow),
        tuple(spare),
    )


def _conv_axis(i: int, size: Dim, k: int, s: int, d: int, pad: tuple[Dim, Dim]) -> Axis:
    """Spatial axis `i` of `size` pixels, zeros between them included, with at least one window."""
    low, high = pad
    extent = (k - 1) * d + 1
    count = (size + low + high - extent) // s + 1
    if surely_below(count, 1):
        raise ValueError(
            f"a kernel of {k} taps with kernel_dilation={d} spans {extent} pixels, more than the "
            f"{size + low + high} of spatial axis {i} (size {size}, padding {pad}): "
            "the output size would be below 1"
        )
    return Axis(size, k, s, d, low, count).simplified()


def _reach(axis: Axis) -> Dim:
    """The results of stride 1 up to the last one that is wanted."""
    return (axis.windows - 1) * axis.stride + 1


def _backwards(axis: Axis, length: Dim, expansion: int) -> Axis:
    """The transposed convolution of `length` pixels that gives the results of stride 1 of `axis`.

    Pixel a feeds the result `expansion * a + low - dilation * k` with tap k, counted from the last tap here.
    """
    low = axis.extent - 1 - axis.low
    return Axis(_reach(axis), axis.taps, expansion, axis.dilation, low, length).simplified()


def _check_plane(arguments: str, sizes: Sequence[Dim]) -> None:
    """Refuses planes whose pixels nobody could hold, before compilers count them."""
    if all(isinstance(n, int) for n in sizes) and (max(sizes) > MOST_PIXELS or math.prod(sizes) > 2**40):
        raise ValueError(
            f"{arguments} make a plane of {sizes} pixels: an axis has fewer than 2**31, a plane at most 2**40"
        )


_place_conv_static = functools.lru_cache(maxsize=1024)(_place_conv)


def _pixels(shape: tuple[Dim, ...], rank: int, data_format: str) -> tuple[int, tuple[Dim, ...]]:
    """Where the spatial axes of a convolution's operand start, and their sizes."""
    if len(shape) < rank + 1:
        raise ValueError(
            f"a kernel with {rank} spatial axes needs an array with as many and a channel axis, "
            f"got one of shape {shape}"
        )
    start = spatial_start(len(shape), rank, data_format)
    sizes = shape[start : start + rank]
    if any(surely_below(n, 1) for n in sizes):
        raise ValueError(f"every spatial axis needs at least one pixel, got sizes {sizes}")
    return start, sizes


def divisor(
    placement: Placement, *, count_include_pad: bool, ceil_mode: bool, override: int | None
) -> Divisor:
    """PyTorch's divisor: taps in the image, and in its padding if that counts, never in ceil's overhang."""
    window = placement.window
    if override is not None:
        number = integer("divisor_override", override)
        if number == 0:
            raise ValueError("divisor_override must not be 0, got 0")
        return Divisor(number, ())
    if not window.overlaps_padding() or (count_include_pad and not ceil_mode):
        return Divisor(window.taps, ())
    if not count_include_pad:
        return Divisor(0, ((0, 0),) * window.rank)
    return Divisor(0, tuple((at_least_zero(low), at_least_zero(high)) for low, high in placement.pads))


def transposed_pads(
    padding: str | int | tuple[tuple[int, int], ...],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> tuple[tuple[int, int], ...]:
    """The padding of a transposed convolution as pairs; "SAME" makes it `strides` times as large."""
    if is_same(padding):
        totals = [(k - 1) * d + 1 - s for k, s, d in zip(kernel, stride, dilation, strict=True)]
        # Negative ones are pixels that no window reaches, which are at the end.
        return tuple((0, total) if total < 0 else _halves(total, padding) for total in totals)
    return _pads(padding, (1,) * len(kernel), kernel, stride, dilation, False)


def spatial_rank(ndim: int, **arguments: int | tuple[int, ...]) -> int:
    """How many spatial axes a call has: the length of any tuple given, else one batch axis is assumed."""
    lengths = {name: len(value) for name, value in arguments.items() if isinstance(value, tuple)}
    name, first = next(iter(arguments.items()))
    if not lengths:
        if not 3 <= ndim <= 5:
            raise ValueError(
                f"{name}={first} as an int needs an array of one batch axis, 1 to 3 spatial axes and one "
                f"channel axis, got {ndim} axes: give {name} as a tuple, one int for each spatial axis"
            )
        return ndim - 2
    name, rank = next(iter(lengths.items()))
    for other, length in lengths.items():
        if length != rank:
            raise ValueError(f"{other} has length {length}, but {name} has length {rank}: they must agree")
    if not 1 <= rank <= 3:
        raise ValueError(f"{name} must name 1 to 3 spatial axes, got {rank}: {arguments[name]}")
    if ndim < rank + 1:
        raise ValueError(
            f"{name}={arguments[name]} needs {rank} spatial axes and a channel axis, "
            f"got an array of {ndim} axes"
        )
    return rank


def spatial_start(ndim: int, rank: int, data_format: str) -> int:
    """The first spatial axis. The axes before it are batch, the axes after it channels (or nothing)."""
    return ndim - rank - int(channels_last(data_format, rank))


def channels_last(data_format: str, rank: int) -> bool:
    """Whether the channels of an array with `rank` spatial axes are behind them."""
    if data_format not in get_args(DataFormat):
        names = ", ".join(map(repr, get_args(DataFormat)))
        raise ValueError(f"data_format must be one of {names}, got {data_format!r}")
    if data_format.startswith("channels"):
        return data_format == "channels_last"
    if len(data_format) - 2 != rank:
        raise ValueError(
            f"data_format={data_format!r} has {len(data_format) - 2} spatial axes, the other arguments {rank}"
        )
    return data_format.endswith("C")


def is_same(padding: Any) -> bool:
    """Whether it is "SAME" or "SAME_LOWER"."""
    return isinstance(padding, str) and padding.upper() in ("SAME", "SAME_LOWER")


def _halves(total: Dim, padding: Any) -> tuple[Dim, Dim]:
    """Two halves; the odd pixel comes after the image, and before it with "SAME_LOWER"."""
    less, more = total // 2, total - total // 2
    return (less, more) if padding.upper() == "SAME" else (more, less)


def _pads(
    padding: str | int | tuple[tuple[int, int], ...],
    sizes: Sequence[Dim],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[tuple[Dim, Dim], ...]:
    rank = len(sizes)
    if isinstance(padding, str):
        if ceil_mode:
            raise ValueError(
                f"ceil_mode=True needs padding as an int or pairs, got {padding!r}: "
                "a string already fixes the output size (write padding=0 for 'VALID')"
            )
        if padding.upper() == "VALID":
            return ((0, 0),) * rank
        if not is_same(padding):
            raise ValueError(
                f"padding must be 'VALID', 'SAME', 'SAME_LOWER', an int or pairs, got {padding!r}"
            )
        totals = (
            at_least_zero((-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
            for n, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)
        )
        return tuple(_halves(total, padding) for total in totals)
    if isinstance(padding, int):
        return ((padding, padding),) * rank
    if len(padding) != rank:
        raise ValueError(
            f"padding must have one (low, high) pair for each of the {rank} spatial axes, got {padding}"
        )
    return padding


# --- checking single values ---------------------------------------------------------------------------


def integer(name: str, value: Any, *, largest: int = LARGEST) -> int:
    """`value` as an int, from `-largest` to `largest`; else an error that names the argument."""
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be an int known at trace time, got {_describe(value)}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int known at trace time, got {_describe(value)}") from None
    if abs(number) > largest:
        raise ValueError(f"{name} must be an int from {-largest} to {largest}, got {number}")
    return number


def flag(name: str, value: Any) -> None:
    """Refuses anything but a static bool."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def shape(name: str, value: Any) -> tuple[Dim, ...]:
    """`value` as the shape of an array: ints of at least 0, or symbolic dimensions."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence of ints, got {_describe(value)}")
    dims = tuple(d if _compat.is_symbolic(d) else integer(name, d, largest=MOST_PIXELS) for d in value)
    if any(surely_below(d, 0) for d in dims):
        raise ValueError(f"{name} must not have negative entries, got {dims}")
    return dims


def _describe(value: Any) -> str:
    return (
        repr(value) if isinstance(value, str | float | complex | bool) else f"{type(value).__name__} {value}"
    )


def freeze(name: str, value: Any) -> int | tuple[int, ...]:
    if isinstance(value, str):
        raise TypeError(f"{name} must be an int or a sequence of ints, got {value!r}")
    if isinstance(value, Sequence) or (isinstance(value, np.ndarray) and value.ndim):
        return tuple(integer(name, v) for v in value)
    return integer(name, value)


def freeze_padding(padding: Any) -> str | int | tuple[tuple[int, int], ...]:
    if isinstance(padding, str):
        return padding
    if not isinstance(padding, Sequence | np.ndarray) or getattr(padding, "ndim", 1) == 0:
        return integer("padding", padding)
    pairs = []
    for pair in padding:
        if isinstance(pair, str) or not isinstance(pair, Sequence | np.ndarray) or len(pair) != 2:
            raise ValueError(
                "padding must be 'VALID', 'SAME', 'SAME_LOWER', an int or one (low, high) pair for each "
                f"spatial axis, got {padding!r}"
            )
        pairs.append((integer("padding", pair[0]), integer("padding", pair[1])))
    return tuple(pairs)


def per_axis(name: str, value: int | tuple[int, ...], rank: int, *, least: int = 1) -> tuple[int, ...]:
    values = (value,) * rank if isinstance(value, int) else value
    if len(values) != rank:
        raise ValueError(f"{name} must have one entry for each of the {rank} spatial axes, got {value}")
    for v in values:
        if v < least:
            raise ValueError(f"{name} must be at least {least} on every axis, got {value}")
    return values


def surely_below(value: Dim, bound: int) -> bool:
    """Whether `value < bound`; false where a symbolic dimension leaves it open."""
    return value < bound if isinstance(value, int) else _compat.symbolic_below(value, bound)


def at_least_zero(value: Dim) -> Dim:
    return max(value, 0) if isinstance(value, int) else _compat.max_dim(value, 0)
