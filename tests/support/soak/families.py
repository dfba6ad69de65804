"""All functions of the library that compute: how a call is drawn, what is called, what is expected.

A call is drawn as shapes of operands and keywords, all of which JSON can hold.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

import grid
import jax_mps
import oracle
import other_poolings as other
import references
from jax_mps import geometry
from jax_mps.ops import edges, max_pooling, operands
from references import Layout, Reference

Array = Any
Call = dict[str, Any]
Draw = Callable[[Any], Any]
Drawn = tuple[list[list[int]], Call]

LENGTHS = (7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)
"""Around the lengths of vectors."""

LAYOUTS = {1: ("NWC", "NCW"), 2: ("NHWC", "NCHW"), 3: ("NDHWC", "NCDHW")}
ORDERS = (1, 1.5, 2, 2.5, 3, 4, 7, math.inf)
NOTHING: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Family:
    """A function.

    Attributes:
      draw: gives the shapes of the operands and the keywords, from Hypothesis' `draw`.
      function: of the operands, the keywords and an implementation.
      reference: of the keywords, the operands in float64 or integers, and whether they are finite.
      kinds: what the operands are: "number", "index" or "sample". Derivatives are taken but in indices.
      more: dtypes beside floating point, of which there are values only.
      differentiable: whether it has derivatives.
      narrow: dtypes of 8 bits.
      complexes: complex dtypes.
    """

    draw: Callable[[Draw], Drawn]
    function: Callable[..., Any]
    reference: Callable[..., Reference]
    kinds: tuple[str, ...] = ("number",)
    more: Sequence[str] = NOTHING
    differentiable: bool = True
    narrow: Sequence[str] = NOTHING
    complexes: Sequence[str] = NOTHING


# --- drawing ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Image:
    """What an image array has beside its spatial axes.

    `focus` says what has the length of vectors, or that the array is large enough for several threads.
    """

    rank: int
    batch: list[int]
    data_format: str
    focus: str

    @property
    def last(self) -> bool:
        return self.data_format == "channels_last" or self.data_format.endswith("C")

    def shape(self, sizes: Sequence[int], channels: int) -> list[int]:
        return [*self.batch, *sizes, channels] if self.last else [*self.batch, channels, *sizes]


def image(draw: Draw, *, large: bool = True) -> Image:
    rank = draw(st.sampled_from([2, 1, 3]))
    focus = draw(st.sampled_from(["nothing", "channels", "pixels", *["large"] * large]))
    small, much = [*[[1], [2], [], [2, 1], [3]] * 3, [0]], [[8], [17], [3, 5]]
    batch = draw(st.sampled_from(much if focus == "large" else small))
    return Image(
        rank, batch, draw(st.sampled_from(["channels_last", "channels_first", *LAYOUTS[rank]])), focus
    )


def channels(draw: Draw, focus: str) -> int:
    long = focus in ("channels", "large")
    return draw(st.sampled_from(LENGTHS) if long else st.sampled_from([*[1, 2, 3, 5] * 4, 0]))


def pixels(focus: str, rank: int, axis: int) -> st.SearchStrategy[int]:
    """The size of a spatial axis, of which the last one may have the length of vectors."""
    if focus == "pixels" and axis == rank - 1:
        return st.sampled_from(LENGTHS)
    most = {1: 300, 2: 20, 3: 8} if focus == "large" else {1: 12, 2: 7, 3: 4}
    return st.integers(1, most[rank])


def taps(rank: int) -> st.SearchStrategy[int]:
    return st.integers(1, {1: 9, 2: 4, 3: 3}[rank])


def window_axis(focus: str, rank: int, axis: int, ceil_mode: bool) -> st.SearchStrategy[dict[str, Any]]:
    """The windows of an axis, each of which has a pixel; padding may be negative or wider than the image."""

    def valid(a: dict[str, Any]) -> bool:
        line = oracle.line(a["size"], a["taps"], a["stride"], a["dilation"], a["padding"], ceil_mode)
        return line.windows > 0 and all(line.counted(i, (0, 0)) for i in range(line.windows))

    return st.fixed_dictionaries(
        {
            "size": pixels(focus, rank, axis),
            "taps": taps(rank),
            "stride": st.integers(1, 4),
            "dilation": st.sampled_from([1, 1, 2, 3]),
            "padding": st.tuples(st.integers(-2, 5), st.integers(-2, 5)),
        }
    ).filter(valid)


def by_name(axes: Sequence[dict[str, Any]], *names: str) -> list[list[Any]]:
    return [[a[name] for a in axes] for name in names]


def windows(draw: Draw, drawn: Image) -> tuple[list[int], Call]:
    """Spatial sizes, and the keywords of pooling."""
    rank, ceil_mode = drawn.rank, draw(st.booleans())
    axes = [draw(window_axis(drawn.focus, rank, i, ceil_mode)) for i in range(rank)]
    sizes, window, strides, dilation, pads = by_name(axes, "size", "taps", "stride", "dilation", "padding")
    call = {"window_shape": window, "strides": strides, "window_dilation": dilation, "ceil_mode": ceil_mode}
    call |= {"padding": [list(p) for p in pads], "data_format": drawn.data_format}
    other_padding = draw(st.sampled_from(["pairs", "pairs", 0, 1, "VALID", "SAME", "SAME_LOWER"]))
    if other_padding != "pairs" and not (ceil_mode and isinstance(other_padding, str)):
        call["padding"] = other_padding
        assume(other.readable(sizes, window, placed(sizes, call)))
    if len(drawn.batch) == 1 and draw(st.booleans()):  # ints stand for every axis
        names = ("window_shape", "strides", "window_dilation")
        whole = {name: call[name][0] for name in names}
        if all(call[name] == [whole[name]] * rank for name in names):
            call |= whole
    return sizes, call


def placed(sizes: Sequence[int], call: Call) -> Call:
    """The windows of a call for the oracle, which knows no "SAME_LOWER"."""
    found = {name: call[name] for name in ("strides", "padding", "window_dilation", "ceil_mode")}
    if found["padding"] == "SAME_LOWER":
        shape = oracle.each_axis(call["window_shape"], len(sizes))
        axes = oracle.lines(sizes, shape, **found | {"padding": "SAME"})
        ends = [(a.windows - 1) * a.stride + (a.taps - 1) * a.dilation + 1 for a in axes]
        totals = [max(end - a.size, 0) for end, a in zip(ends, axes, strict=True)]
        found["padding"] = [(total - total // 2, total // 2) for total in totals]
    return found


def pooling(
    draw: Draw,
    *,
    gradient: bool = False,
    divisor: bool = False,
    order: bool = False,
    indices: bool = False,
    large: bool = True,
) -> Drawn:
    drawn = image(draw, large=large)
    sizes, call = windows(draw, drawn)
    count = channels(draw, drawn.focus)
    shapes = [drawn.shape(sizes, count)]
    if divisor:
        call["count_include_pad"] = draw(st.booleans())
        call["divisor_override"] = draw(st.sampled_from([None, None, 3, -2]))
    if order:
        call["p"] = draw(st.sampled_from(ORDERS))
    if indices:
        call["return_indices"] = draw(st.booleans())
    if gradient:
        shape = oracle.each_axis(call["window_shape"], drawn.rank)
        counts = [a.windows for a in oracle.lines(sizes, shape, **placed(sizes, call))]
        shapes.insert(0, drawn.shape(counts, count))
    return shapes, call


def average_gradient(draw: Draw) -> Drawn:
    (g, source), call = pooling(draw, gradient=True, divisor=True)
    return [g], call | {"source_shape": source}


def selection(draw: Draw) -> Drawn:
    shapes, call = pooling(draw, large=False)  # the reference looks at number after number
    return shapes, call | {"with_padding": draw(st.booleans())}


def selected_tap(
    x: Array, *, data_format: Any, with_padding: bool, implementation: str | None = None, **call: Any
) -> Array:
    """The taps that accelerated stock gradients of maxima select: no public function has them."""
    placement = geometry.place(x.shape, data_format=data_format, **call)
    bind = max_pooling.max_pool_selected_tap_index_p.bind
    params: Call = {"window": placement.window, "start": placement.start, "implementation": implementation}
    return bind(edges.crop(x, placement), with_padding=with_padding, **params)


def adaptive(draw: Draw, *, indices: bool = False) -> Drawn:
    drawn = image(draw)
    sizes = [draw(pixels(drawn.focus, drawn.rank, i)) for i in range(drawn.rank)]
    most = {1: 14, 2: 8, 3: 5}[drawn.rank]
    call: Call = {"data_format": drawn.data_format}
    call["output_size"] = [draw(st.none() | st.integers(1, most)) for _ in sizes]
    if indices:
        call["return_indices"] = draw(st.booleans())
    return [drawn.shape(sizes, channels(draw, drawn.focus))], call


def fractional(draw: Draw) -> Drawn:
    drawn = image(draw)
    axes = [
        draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 4))) for _ in range(drawn.rank)
    ]
    count = channels(draw, drawn.focus)
    call: Call = {"window_shape": [k for k, _, _ in axes], "output_size": [o for _, o, _ in axes]}
    call |= {"data_format": drawn.data_format, "return_indices": draw(st.booleans())}
    shape = drawn.shape([k + o - 1 + more for k, o, more in axes], count)
    return [shape, [*drawn.batch, count, drawn.rank]], call


def unpool(draw: Draw) -> Drawn:
    drawn = image(draw)
    sizes = [draw(pixels(drawn.focus, drawn.rank, i)) for i in range(drawn.rank)]
    counts = [draw(st.integers(1, {1: 9, 2: 4, 3: 3}[drawn.rank])) for _ in sizes]
    call: Call = {"output_shape": sizes, "data_format": drawn.data_format}
    if draw(st.booleans()):
        call["indices_shape"] = [draw(st.integers(max(n - 2, 1), n + 2)) for n in sizes]
    return [drawn.shape(counts, channels(draw, drawn.focus))] * 2, call


def conv_channels(draw: Draw, focus: str) -> tuple[int, int, int]:
    """Groups, and the channels of a group on either side."""
    form = draw(st.sampled_from(["dense", "groups", "depthwise"]))
    long = st.sampled_from(LENGTHS) if focus in ("channels", "large") else st.integers(1, 4)
    if form == "depthwise":
        return draw(long), 1, draw(st.sampled_from([1, 1, 2]))
    groups = 1 if form == "dense" else draw(st.integers(2, 4))
    each = [max(draw(long) // groups, 1), draw(st.integers(1, 4))]
    if draw(st.booleans()):
        each.reverse()
    return groups, each[0], each[1]


def conv_axis(focus: str, rank: int, axis: int, transposed: bool) -> st.SearchStrategy[dict[str, Any]]:
    names: dict[str, st.SearchStrategy[Any]] = {
        "size": pixels(focus, rank, axis),
        "taps": taps(rank),
        "stride": st.integers(1, 4),
        "dilation": st.sampled_from([1, 1, 2, 3]),
        "padding": st.tuples(st.integers(-2, 5), st.integers(-2, 5)),
        "more": st.integers(0, 3) if transposed else st.sampled_from([1, 1, 2, 3]),
    }

    def valid(a: dict[str, Any]) -> bool:
        extent = (a["taps"] - 1) * a["dilation"] + 1
        if not transposed:
            return (a["size"] - 1) * a["more"] + 1 + sum(a["padding"]) >= extent
        size = (a["size"] - 1) * a["stride"] + extent
        more, most = a["more"], max(a["stride"], a["dilation"])
        return more < most and max(a["padding"]) < size and size - sum(a["padding"]) + more >= 1

    return st.fixed_dictionaries(names).filter(valid)


def convolution(draw: Draw, *, transposed: bool, operands: str = "xk") -> Drawn:
    """The operands are named by letters: the image, the kernel, a gradient of the result."""
    drawn = image(draw)
    rank = drawn.rank
    axes = [draw(conv_axis(drawn.focus, rank, i, transposed)) for i in range(rank)]
    names = ("size", "taps", "stride", "dilation", "padding", "more")
    sizes, window, strides, dilation, pads, more = by_name(axes, *names)
    groups, inputs, outputs = conv_channels(draw, drawn.focus)
    call: Call = {"strides": strides, "kernel_dilation": dilation, "groups": groups}
    call |= {"padding": [list(p) for p in pads], "data_format": drawn.data_format}
    call["output_padding" if transposed else "input_dilation"] = more
    kernel = [*window, inputs, outputs * groups]
    if transposed:
        if not any(more) and draw(st.booleans()):
            call["padding"] = draw(st.sampled_from(["VALID", "SAME", "SAME_LOWER"]))
        call["transpose_kernel"] = draw(st.booleans())
        if call["transpose_kernel"]:
            kernel = [*window, outputs, inputs * groups]
    elif draw(st.booleans()):
        call["padding"] = draw(st.sampled_from([0, 1, "VALID", "SAME", "SAME_LOWER"]))
    shapes = {"x": drawn.shape(sizes, inputs * groups), "k": kernel, "b": [outputs * groups]}
    lengths = [a.size for a in conv_lines(sizes, window, call, transposed)]
    if not transposed:
        assume(all(a.windows > 0 for a in conv_lines(sizes, window, call, transposed)))
    shapes["g"] = drawn.shape(lengths, outputs * groups)
    if operands == "gk":
        call["source_shape"] = shapes["x"]
    if operands == "gx":
        call["kernel_shape"] = shapes["k"]
    if operands == "xk" and draw(st.booleans()):
        operands = "xkb"
    if draw(st.sampled_from([False, False, True])):
        call["preferred_element_type"] = "wider"
    return [shapes[name] for name in operands], call


def conv_lines(
    sizes: Sequence[int], window: Sequence[int], call: Call, transposed: bool
) -> tuple[oracle.Line, ...]:
    """The windows of a convolution, of its result to its image where it is transposed."""
    rank, padding = len(window), call["padding"]
    if transposed:
        names = ("strides", "output_padding", "kernel_dilation")
        same = padding == "SAME_LOWER"
        axes = oracle.transposed_lines(
            sizes, window, padding="SAME" if same else padding, **{n: call[n] for n in names}
        )
        if same:
            ends = [
                (n - 1) * a.stride + (a.taps - 1) * a.dilation + 1 for n, a in zip(sizes, axes, strict=True)
            ]
            totals = [max(end - a.size, 0) for end, a in zip(ends, axes, strict=True)]
            axes = tuple(a._replace(low=total - total // 2) for a, total in zip(axes, totals, strict=True))
        return axes
    expansion = oracle.each_axis(call["input_dilation"], rank)
    between = [(n - 1) * e + 1 for n, e in zip(sizes, expansion, strict=True)]
    pooled: Call = {
        "window_shape": window,
        "strides": call["strides"],
        "padding": padding,
        "ceil_mode": False,
    }
    pooled["window_dilation"] = call["kernel_dilation"]
    axes = oracle.lines(between, window, **placed(between, pooled))
    return tuple(a._replace(expansion=e) for a, e in zip(axes, expansion, strict=True))


# --- what the results should be -------------------------------------------------------------------------


def spatial(call: Call, x: np.ndarray) -> tuple[int, tuple[int, ...], list[int]]:
    """The first spatial axis of a pooled image, its sizes, and the taps of a window."""
    window = call["window_shape"]
    rank = len(window) if isinstance(window, Sequence) else x.ndim - 2
    start = oracle.start_of(x.ndim, rank, form(call))
    return start, x.shape[start : start + rank], list(oracle.each_axis(window, rank))


def form(call: Call) -> str:
    name = call["data_format"]
    return (
        name if name.startswith("channels") else "channels_last" if name.endswith("C") else "channels_first"
    )


def oracles(call: Call, x: np.ndarray, *names: str) -> tuple[list[int], Call]:
    """The window, and the keywords that the oracle takes."""
    _, sizes, window = spatial(call, x)
    return window, placed(sizes, call) | {"data_format": form(call)} | {name: call[name] for name in names}


def torch_takes(call: Call, x: np.ndarray, *, dilation: bool = True) -> Call | None:
    """The keywords of PyTorch's pooling, if it has these windows."""
    _, sizes, window = spatial(call, x)
    pads = oracle.each_axis(placed(sizes, call)["padding"], len(window))
    strides, dilations = (
        list(oracle.each_axis(call[n], len(window))) for n in ("strides", "window_dilation")
    )
    if call["padding"] in ("SAME", "SAME_LOWER"):
        return None
    pairs = [(0, 0) if p == "VALID" else (p, p) if isinstance(p, int) else tuple(p) for p in pads]
    if any(low != high or low < 0 or 2 * low > k for (low, high), k in zip(pairs, window, strict=True)):
        return None
    found = {
        "kernel_size": window,
        "stride": strides,
        "padding": [low for low, _ in pairs],
        "ceil_mode": call["ceil_mode"],
    }
    if dilation:
        return found | {"dilation": dilations}
    return found if all(d == 1 for d in dilations) else None


def in_planes(function: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    """A function of `(batch, channels, *spatial)` as one of images."""
    return lambda x: layout.back(function(layout.planes(x)))


def torch_pooling(
    name: str, call: Call, x: np.ndarray, *, multilinear: bool, **more: Any
) -> references.Torch:
    import torch

    rank = len(spatial(call, x)[2])
    function = functools.partial(getattr(torch.nn.functional, f"{name}{rank}d"), **more)
    return references.Torch(in_planes(function, layout_of(call, x, rank)), multilinear=multilinear)


def layout_of(call: Call, x: np.ndarray, rank: int) -> Layout:
    return Layout(x.shape, rank, call["data_format"])


def maximum(call: Call, x: np.ndarray, finite: bool) -> Reference:
    _, sizes, window = spatial(call, x)
    taken = torch_takes(call, x) if finite and x.dtype == np.float64 else None
    if taken is not None and not call.get("return_indices"):
        return torch_pooling("max_pool", call, x, multilinear=False, **taken)
    window, keywords = oracles(call, x)
    positions = oracle.max_pool(x, window, **keywords)[1]
    inner = references.chosen(positions, sizes, layout_of(call, x, len(window)))
    return references.WithIndices(inner, positions) if call.get("return_indices") else inner


def maximum_gradient(call: Call, g: np.ndarray, x: np.ndarray, finite: bool) -> Reference:
    _, sizes, window = spatial(call, x)
    positions = oracle.max_pool(x, window, **oracles(call, x)[1])[1]
    return references.Constant(references.put_at(positions, sizes, layout_of(call, x, len(window))))


def selected(call: Call, x: np.ndarray, finite: bool) -> Reference:
    _, sizes, window = spatial(call, x)
    layout = layout_of(call, x, len(window))
    axes = oracle.lines(sizes, window, **placed(sizes, call))
    image = layout.planes(x)[(..., *(slice(a.first, a.last) for a in axes))]
    cropped = [a._replace(size=a.last - a.first, low=a.low + a.first) for a in axes]
    taps = oracle.selected_taps(np.moveaxis(image, 1, -1), cropped, with_padding=call["with_padding"])
    return references.Multilinear(lambda x: layout.back(np.moveaxis(taps, -1, 1)))


def average(call: Call, x: np.ndarray, finite: bool) -> Reference:
    taken = torch_takes(call, x, dilation=False) if finite else None
    _, sizes, window = spatial(call, x)
    rank = len(sizes)
    # PyTorch refuses windows in three dimensions that are larger than the image without its edges.
    if rank == 3 and any(k > size for k, size in zip(window, sizes, strict=True)):
        taken = None
    if taken is not None and (rank > 1 or call["divisor_override"] is None):
        taken["count_include_pad"] = call["count_include_pad"]
        if rank > 1:
            taken["divisor_override"] = call["divisor_override"]
        return torch_pooling("avg_pool", call, x, multilinear=True, **taken)
    window, keywords = oracles(call, x, "count_include_pad", "divisor_override")
    return references.Multilinear(
        lambda x: oracle.avg_pool(x, window, **keywords),
        lambda g, x: oracle.avg_pool_gradient(g, x.shape, window, **keywords),
    )


def spread(call: Call, g: np.ndarray, finite: bool) -> Reference:
    shape = tuple(call["source_shape"])
    window, keywords = oracles(call, np.empty(shape), "count_include_pad", "divisor_override")
    return references.Multilinear(
        lambda g: oracle.avg_pool_gradient(g, shape, window, **keywords),
        lambda c, g: oracle.avg_pool(c, window, **keywords),
    )


def norm(call: Call, x: np.ndarray, finite: bool) -> references.Norm:
    start, sizes, window = spatial(call, x)
    axes = oracle.lines(sizes, window, **placed(sizes, call))
    return references.Norm(x.shape, axes, call.get("p", 2), start)


def norm_gradient(call: Call, g: np.ndarray, x: np.ndarray, finite: bool) -> Reference:
    return references.NormGradient(norm(call, x, finite))


def shared_out(call: Call, x: np.ndarray) -> tuple[int, Layout, other.Boxes]:
    """The rank, the layout and the windows of adaptive pooling."""
    rank = len(call["output_size"])
    start = oracle.start_of(x.ndim, rank, form(call))
    sizes = x.shape[start : start + rank]
    counts = [n if o is None else o for n, o in zip(sizes, call["output_size"], strict=True)]
    return rank, layout_of(call, x, rank), other.adaptive(sizes, counts)


def adaptive_average(call: Call, x: np.ndarray, finite: bool) -> Reference:
    rank, layout, boxes = shared_out(call, x)
    if finite:
        import torch

        function = getattr(torch.nn.functional, f"adaptive_avg_pool{rank}d")
        counts = [len(axis) for axis in boxes]
        return references.Torch(in_planes(lambda x: function(x, counts), layout), multilinear=True)
    sizes = layout.planes(x).shape[2:]
    return references.Multilinear(
        in_planes(lambda x: other.averages(x, boxes), layout),
        lambda g, x: layout.back(other.averages_gradient(layout.planes(g), sizes, boxes)),
    )


def adaptive_maximum(call: Call, x: np.ndarray, finite: bool) -> Reference:
    _, layout, boxes = shared_out(call, x)
    planes = layout.planes(x)
    return taken_at(call, layout, planes.shape[2:], other.maxima(planes, boxes)[1])


def fractional_maximum(call: Call, x: np.ndarray, samples: np.ndarray, finite: bool) -> Reference:
    rank = samples.shape[-1]
    layout = layout_of(call, x, rank)
    planes = layout.planes(x)
    numbers = samples.reshape(*planes.shape[:2], rank)
    at = other.fractional(planes, call["window_shape"], call["output_size"], numbers)[1]
    return references.Constant(taken_at(call, layout, planes.shape[2:], at))


def taken_at(call: Call, layout: Layout, sizes: Sequence[int], at: np.ndarray) -> Reference:
    positions = layout.back(at)
    inner = references.chosen(positions, sizes, layout)
    return references.WithIndices(inner, positions) if call["return_indices"] else inner


def unpooled(call: Call, y: np.ndarray, indices: np.ndarray, finite: bool) -> Reference:
    """Where a position is named twice, the last entry stays."""
    sizes: Sequence[int] = call["output_shape"]
    plane: Sequence[int] = call.get("indices_shape", sizes)
    layout = layout_of(call, y, len(sizes))
    at = layout.planes(indices)
    inside = (at >= 0) & (at < math.prod(plane))
    pixels = np.unravel_index(np.where(inside, at, 0), plane)
    inside &= np.all([p < n for p, n in zip(pixels, sizes, strict=True)], axis=0)
    moved = np.ravel_multi_index(pixels, sizes, mode="clip").reshape(*at.shape[:2], -1)
    last = np.zeros(moved.shape, bool)
    for b, c in np.ndindex(moved.shape[:2]):
        kept = np.flatnonzero(inside[b, c])
        last[b, c, list({moved[b, c, i]: i for i in kept}.values())] = True
    return references.put_at(layout.back(np.where(last, moved, -1).reshape(at.shape)), sizes, layout)


# --- convolutions ---------------------------------------------------------------------------------------
#
# Three functions, of one plan: `forward` from the windows to the image, `data` and `weights` back.


@dataclasses.dataclass
class Plan:
    """A convolution in integers: its windows lie on the image of `data`, with zeros between its pixels."""

    axes: tuple[oracle.Line, ...]
    groups: int
    transpose_kernel: bool
    data_format: str

    @property
    def rank(self) -> int:
        return len(self.axes)


class ByLoops:
    """The three functions by the oracle, which multiplies neither padding nor zeros between pixels."""

    def __init__(self, plan: Plan, batch: Sequence[int]) -> None:
        self.plan, self.batch = plan, batch

    def _grouped(self, x: np.ndarray) -> np.ndarray:
        return oracle.grouped(x, self.plan.rank, self.plan.groups, self.plan.data_format)

    def _back(self, y: np.ndarray) -> np.ndarray:
        return oracle.ungrouped(y, self.plan.rank, self.batch, self.plan.data_format)

    def _kernel(self, kernel: np.ndarray) -> np.ndarray:
        return oracle.kernel_in(kernel, self.plan.groups, self.plan.transpose_kernel)

    def forward(self, x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        return self._back(oracle.transposed_of(self._grouped(x), self._kernel(kernel), self.plan.axes))

    def data(self, g: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        return self._back(oracle.transposed_data_of(self._grouped(g), self._kernel(kernel), self.plan.axes))

    def weights(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        dk = oracle.transposed_weights_of(self._grouped(g), self._grouped(x), self.plan.axes)
        return oracle.kernel_out(dk, self.plan.groups, self.plan.transpose_kernel)


class ByTorch:
    """The functions by PyTorch, of tensors."""

    def __init__(self, plan: Plan, layout: Layout) -> None:
        self.plan, self.layout = plan, layout

    def _kernel(self, kernel: Any) -> Any:
        """As PyTorch's transposed convolution has it, `(in, out / groups, *window)`."""
        if self.plan.transpose_kernel:
            return kernel.movedim((-1, -2), (0, 1)).contiguous()
        kernel = kernel.flip(tuple(range(self.plan.rank))).unflatten(-1, (self.plan.groups, -1))
        return kernel.movedim((-2, -3, -1), (0, 1, 2)).flatten(0, 1).contiguous()

    def _options(self) -> Call:
        axes = self.plan.axes
        return {
            "stride": [a.stride for a in axes],
            "dilation": [a.dilation for a in axes],
            "groups": self.plan.groups,
        }

    def _padded(self, x: Any, pads: Sequence[tuple[int, int]]) -> Any:
        """Padded first, then cut: there may be nothing left in between."""
        import torch

        flat = [p for pair in reversed(pads) for p in pair]
        for some in ([max(p, 0) for p in flat], [min(p, 0) for p in flat]):
            x = torch.nn.functional.pad(x, some)
        return x

    def _ends(self) -> list[tuple[int, int]]:
        """What the windows have beyond both ends of the image."""
        return [
            (a.low, (a.windows - 1) * a.stride + (a.taps - 1) * a.dilation + 1 - a.low - a.size)
            for a in self.plan.axes
        ]

    def forward(self, x: Any, kernel: Any) -> Any:
        import torch

        function = getattr(torch.nn.functional, f"conv_transpose{self.plan.rank}d")
        y = function(self.layout.planes(x), self._kernel(kernel), **self._options())
        return self.layout.back(self._padded(y, [(-low, -high) for low, high in self._ends()]))

    def data(self, g: Any, kernel: Any) -> Any:
        import torch

        function = getattr(torch.nn.functional, f"conv{self.plan.rank}d")
        g = self.layout.planes(g)
        expansion = [a.expansion for a in self.plan.axes]
        for dim, e in enumerate(expansion, 2):  # zeros between the pixels
            behind = [0, 0] * (g.ndim - dim - 1)
            g = torch.nn.functional.pad(g.unsqueeze(dim + 1), [*behind, 0, e - 1]).flatten(dim, dim + 1)
        # Those behind the last pixel are cut off again.
        ends = [(low, high - e + 1) for (low, high), e in zip(self._ends(), expansion, strict=True)]
        return self.layout.back(function(self._padded(g, ends), self._kernel(kernel), **self._options()))


def plan_of(call: Call, lengths: Sequence[int], window: Sequence[int], *, transposed: bool) -> Plan:
    axes = conv_lines(lengths, window, call, transposed)
    return Plan(axes, call["groups"], not transposed or call["transpose_kernel"], form(call))


def spatial_sizes(call: Call, shape: Sequence[int], rank: int) -> list[int]:
    start = oracle.start_of(len(shape), rank, form(call))
    return list(shape[start : start + rank])


def biased(function: Callable[..., Any], last: bool, rank: int) -> Callable[..., Any]:
    def add(x: Any, kernel: Any, *bias: Any) -> Any:
        y = function(x, kernel)
        return y + (bias[0] if last else bias[0].reshape(-1, *[1] * rank)) if bias else y

    return add


def convolved(
    call: Call, x: np.ndarray, kernel: np.ndarray, *bias: np.ndarray, finite: bool, transposed: bool
) -> Reference:
    rank = kernel.ndim - 2
    plan = plan_of(call, spatial_sizes(call, x.shape, rank), kernel.shape[:rank], transposed=transposed)
    layout = layout_of(call, x, rank)
    if finite:
        torch = ByTorch(plan, layout)
        function = torch.forward if transposed else torch.data
        return references.Torch(biased(function, layout.last, rank), multilinear=True)
    loops = ByLoops(plan, layout.batch)
    if transposed:
        return references.Multilinear(
            loops.forward, lambda g, x, k: loops.data(g, k), lambda g, x, k: loops.weights(g, x)
        )
    return references.Multilinear(
        loops.data, lambda g, x, k: loops.forward(g, k), lambda g, x, k: loops.weights(x, g)
    )


def data_gradient(call: Call, g: np.ndarray, kernel: np.ndarray, finite: bool) -> Reference:
    rank = kernel.ndim - 2
    plan = plan_of(
        call, spatial_sizes(call, call["source_shape"], rank), kernel.shape[:rank], transposed=True
    )
    layout = layout_of(call, g, rank)
    if finite:
        return references.Torch(ByTorch(plan, layout).data, multilinear=True)
    loops = ByLoops(plan, layout.batch)
    return references.Multilinear(
        loops.data, lambda c, g, k: loops.forward(c, k), lambda c, g, k: loops.weights(g, c)
    )


def weights_gradient(call: Call, g: np.ndarray, x: np.ndarray, finite: bool) -> Reference:
    shape = call["kernel_shape"]
    rank = len(shape) - 2
    plan = plan_of(call, spatial_sizes(call, x.shape, rank), shape[:rank], transposed=True)
    layout = layout_of(call, x, rank)
    # PyTorch refuses the derivatives of some ("grad_weight must be contiguous").
    loops = ByLoops(plan, layout.batch)
    return references.Multilinear(
        loops.weights, lambda c, g, x: loops.forward(x, c), lambda c, g, x: loops.data(g, c)
    )


# --- the table ------------------------------------------------------------------------------------------

WHOLE = (*grid.INTEGERS, *operands.WIDE_INTEGERS)
NARROW = ("float8_e4m3fn", "float8_e5m2")

FAMILIES = {
    "max_pool": Family(
        functools.partial(pooling, indices=True), jax_mps.max_pool, maximum, more=WHOLE, narrow=NARROW
    ),
    "max_pool_gradient": Family(
        functools.partial(pooling, gradient=True),
        jax_mps.max_pool_gradient,
        maximum_gradient,
        ("number", "number"),
        narrow=NARROW,
    ),
    "selected_tap": Family(selection, selected_tap, selected, differentiable=False),
    "avg_pool": Family(
        functools.partial(pooling, divisor=True), jax_mps.avg_pool, average, complexes=operands.COMPLEX
    ),
    "avg_pool_gradient": Family(
        average_gradient, jax_mps.avg_pool_gradient, spread, complexes=operands.COMPLEX
    ),
    "l2_pool": Family(pooling, jax_mps.l2_pool, norm),
    "l2_pool_gradient": Family(
        functools.partial(pooling, gradient=True),
        jax_mps.l2_pool_gradient,
        norm_gradient,
        ("number", "number"),
    ),
    "lp_pool": Family(functools.partial(pooling, order=True), jax_mps.lp_pool, norm),
    "adaptive_avg_pool": Family(adaptive, jax_mps.adaptive_avg_pool, adaptive_average),
    "adaptive_max_pool": Family(
        functools.partial(adaptive, indices=True),
        jax_mps.adaptive_max_pool,
        adaptive_maximum,
        more=grid.INTEGERS,
    ),
    "fractional_max_pool": Family(
        fractional,
        lambda x, samples, **call: jax_mps.fractional_max_pool(x, samples=samples, **call),
        fractional_maximum,
        ("number", "sample"),
        more=grid.INTEGERS,
    ),
    "max_unpool": Family(unpool, jax_mps.max_unpool, unpooled, ("number", "index"), more=WHOLE),
    "conv": Family(
        functools.partial(convolution, transposed=False),
        jax_mps.conv,
        functools.partial(convolved, transposed=False),
        ("number",) * 3,
        complexes=operands.COMPLEX,
    ),
    "conv_transpose": Family(
        functools.partial(convolution, transposed=True),
        jax_mps.conv_transpose,
        functools.partial(convolved, transposed=True),
        ("number",) * 3,
        complexes=operands.COMPLEX,
    ),
    "conv_transpose_gradient_data": Family(
        functools.partial(convolution, transposed=True, operands="gk"),
        jax_mps.conv_transpose_gradient_data,
        data_gradient,
        ("number",) * 2,
        complexes=operands.COMPLEX,
    ),
    "conv_transpose_gradient_weights": Family(
        functools.partial(convolution, transposed=True, operands="gx"),
        jax_mps.conv_transpose_gradient_weights,
        weights_gradient,
        ("number",) * 2,
        complexes=operands.COMPLEX,
    ),
}
