"""`conv_general_dilated`, read as one of the three maps of transposed convolution.

Along each spatial axis an ordinary convolution multiplies and adds where

    lhs_dilation * a + low = strides * p + rhs_dilation * q

for the pixels a of its first operand, p of its result and q of its second operand. The maps of
`ops/convolution.py` do so where `i = stride * j - low + dilation * k`, for the pixels i of an image,
windows j, and taps k. So whichever of the three arrays has the factor 1 can be the image, and the other two
are windows and taps:

| factor 1 | windows | taps | map | role in a network |
|---|---|---|---|---|
| lhs | result | rhs | `gradient_data` | the ordinary convolution |
| lhs | rhs | result | `gradient_weights` | its gradient to the kernel |
| result | lhs | rhs | `forward` | its gradient to the image; a transposed convolution |
| rhs | lhs | result | `gradient_weights` | gradient to the kernel of a transposed convolution |

Where the result or the second operand is the image, taps run backwards: the kernel is mirrored, as
`transpose_kernel=False` reads it. All readings that fit compute the same sums. The one that moves the
fewest numbers in memory is taken, then the one with the fewest taps: roles cannot be told by sizes, for 7 x
7 taps over 6 x 6 pixels fit several.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from jax import lax

from jax_mps.geometry import Axis, Window
from jax_mps.lowering.rule import accumulator
from jax_mps.ops import convolution
from jax_mps.ops.operands import FLOATS

Array = Any
Map = Literal["forward", "gradient_data", "gradient_weights"]

_MAPS: dict[Map, Callable[..., Array]] = {
    "forward": convolution.forward,
    "gradient_data": convolution.gradient_data,
    "gradient_weights": convolution.gradient_weights,
}

# Limits of the native kernels, below which no product of sizes and strides overflows.
_LIMIT = 2**31


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the numbers of a stock array lie in ours.

    Attributes:
      stock: the shape of the stock array.
      cut: that shape, with one axis perhaps cut into `(groups, rest)`.
      order: the axes of `cut`, in the order of ours.
      ours: the shape of ours, where some of these axes are joined.
    """

    stock: tuple[int, ...]
    cut: tuple[int, ...]
    order: tuple[int, ...]
    ours: tuple[int, ...]

    def to_ours(self, x: Array) -> Array:
        """Our array."""
        return lax.reshape(lax.transpose(lax.reshape(x, self.cut), self.order), self.ours)

    def to_stock(self, x: Array) -> Array:
        """The stock array that ours was made of."""
        moved = lax.reshape(x, [self.cut[i] for i in self.order])
        return lax.reshape(lax.transpose(moved, np.argsort(self.order)), self.stock)

    @property
    def moved(self) -> int:
        """How many numbers change their place in memory."""
        order = [i for i in self.order if self.cut[i] != 1]
        return 0 if order == sorted(order) else math.prod(self.cut)


@dataclasses.dataclass(frozen=True)
class Reading:
    """A stock convolution as one of our maps.

    Attributes:
      map: which of them.
      params: its arguments.
      lhs: where the first stock operand goes.
      rhs: where the second one goes.
      result: where our result comes from.
      swapped: whether our map takes the second stock operand first.
      unreversed: whether the second operand is to be taken as it was before its reversal.
      outputs: channels of the image, of all groups together.
      inputs: channels of the windows.
      batch: images.
      moved: how many numbers change their place in memory.
    """

    map: Map
    params: dict[str, Any]
    lhs: Place
    rhs: Place
    result: Place
    swapped: bool
    unreversed: bool
    outputs: int
    inputs: int
    batch: int
    moved: int

    @property
    def window(self) -> Window:
        """The windows of our map."""
        return self.params["window"]

    @property
    def groups(self) -> int:
        """The number of groups of channels."""
        return self.params["groups"]

    def __call__(self, lhs: Array, rhs: Array) -> Array:
        """The stock result; `rhs` is the array before its reversal if `unreversed`."""
        operands = (self.lhs.to_ours(lhs), self.rhs.to_ours(rhs))
        out = _MAPS[self.map](*(operands[::-1] if self.swapped else operands), **self.params)
        return self.result.to_stock(out)


def recognise(
    lhs: Any, rhs: Any, out: Any, params: dict[str, Any], reversed_kernel: bool = False
) -> Reading | str:
    """Reads a `conv_general_dilated`.

    Args:
      lhs: the type of the first operand. rhs: the type of the second one. out: the type of the result.
      params: the parameters of the primitive. reversed_kernel: whether the second operand is a reversal
      along all spatial axes, and can be had as it was before.

    Returns:
      The reading, or the reason why there is none.
    """
    if reason := _refusal(lhs, rhs, out, params):
        return reason
    found = list(_readings(lhs, rhs, out, params, reversed_kernel))
    if not found:
        return "strides, lhs_dilation and rhs_dilation are all above 1, so that no array can be the image"
    return min(found, key=lambda reading: (reading.moved, reading.window.taps))


def _refusal(lhs: Any, rhs: Any, out: Any, params: dict[str, Any]) -> str:
    rank = lhs.ndim - 2
    if not 1 <= rank <= 3:
        return f"{rank} spatial axes, ours have 1 to 3"
    if lhs.dtype.name not in FLOATS:
        return f"dtype {lhs.dtype.name}, ours are {', '.join(FLOATS)}"
    if lhs.dtype != rhs.dtype:
        return f"operands of two dtypes, {lhs.dtype.name} and {rhs.dtype.name}"
    if out.dtype not in (lhs.dtype, accumulator(lhs.dtype)):
        return f"{lhs.dtype.name} with a result of {out.dtype.name}"
    if 0 in (*lhs.shape, *rhs.shape, *out.shape):
        return "an empty array"
    factors = (*params["window_strides"], *params["lhs_dilation"], *params["rhs_dilation"])
    pads = [abs(n) for pair in params["padding"] for n in pair]
    if max(*factors, *pads, *lhs.shape, *rhs.shape, *out.shape) >= _LIMIT:
        return "a number of 2**31 or more"
    return ""


def _readings(
    lhs: Any, rhs: Any, out: Any, params: dict[str, Any], reversed_kernel: bool
) -> Iterator[Reading]:
    """All readings that fit; the more usual ones first."""
    spec = params["dimension_numbers"]
    (a_batch, a_channel, *a), (q_kept, q_summed, *q), (p_batch, p_channel, *p) = spec
    of_lhs, of_rhs, of_out = [lhs.shape[i] for i in a], [rhs.shape[i] for i in q], [out.shape[i] for i in p]
    lows = [low for low, _ in params["padding"]]
    strides, lhs_dilation, rhs_dilation = (
        params[name] for name in ("window_strides", "lhs_dilation", "rhs_dilation")
    )
    feature_groups, batch_groups = params["feature_group_count"], params["batch_group_count"]

    def window(sizes: Any, taps: Any, stride: Any, dilation: Any, counts: Any, *, backwards: bool) -> Window:
        columns = zip(sizes, taps, stride, dilation, lows, counts, strict=True)
        return Window(
            tuple(
                # Backwards i = stride * j - dilation * k + low, which is counted from the last tap here.
                Axis(size, k, s, d, d * (k - 1) - low if backwards else low, count)
                for size, k, s, d, low, count in columns
            )
        )

    def reading(
        name: Map, window: Window, places: Sequence[Place], channels_last: bool, **rest: Any
    ) -> Reading:
        lhs_place, rhs_place, result = places
        unreversed = rest["unreversed"]
        params_of_ours = {
            "window": window,
            "start": 1 if channels_last else 2,
            "channels_last": channels_last,
            "groups": feature_groups * batch_groups,  # one of them is 1
            "transpose_kernel": rest.pop("transpose_kernel"),
            "precision": params["precision"],
            "out_dtype": out.dtype,
            "implementation": None,
        }
        moved = sum(place.moved for place in places)
        if reversed_kernel and not unreversed:
            moved += math.prod(rhs.shape)
        return Reading(name, params_of_ours, lhs_place, rhs_place, result, moved=moved, **rest)

    def as_kernel(name: Map, window: Window, *, backwards: bool) -> Iterator[Reading]:
        """The second operand is the kernel."""
        kept, summed, groups = rhs.shape[q_kept], rhs.shape[q_summed], feature_groups * batch_groups
        orders = [(False, (*q, q_summed, q_kept))]
        if reversed_kernel and (groups == 1 or (summed == 1 and kept == groups)):
            orders.append((True, (*q, q_kept, q_summed) if groups == 1 else (*q, q_summed, q_kept)))
        outputs, inputs = (kept, summed * groups) if backwards else (summed * groups, kept)
        for channels_last in (True, False):
            images = (
                _image(lhs.shape, a_batch, a_channel, a, channels_last, batch_groups),
                _image(out.shape, p_batch, p_channel, p, channels_last),
            )
            for unreversed, order in orders:
                kernel = Place(rhs.shape, rhs.shape, order, tuple(rhs.shape[i] for i in order))
                yield reading(
                    name, window, (images[0], kernel, images[1]), channels_last,
                    transpose_kernel=backwards == unreversed, swapped=False, unreversed=unreversed,
                    outputs=outputs, inputs=inputs, batch=out.shape[p_batch],
                )  # fmt: skip

    def to_kernel(window: Window, *, backwards: bool) -> Iterator[Reading]:
        """The result is the kernel: the operands' channels are what is not summed over."""
        order = (*p, p_batch, p_channel)
        result = Place(out.shape, out.shape, order, tuple(out.shape[i] for i in order))
        groups = feature_groups * batch_groups
        sides = (out.shape[p_batch] * groups, out.shape[p_channel])
        outputs, inputs = sides[::-1] if backwards else sides
        for channels_last in (True, False):
            first = _image(lhs.shape, a_channel, a_batch, a, channels_last, feature_groups)
            second = _image(rhs.shape, q_summed, q_kept, q, channels_last)
            yield reading(
                "gradient_weights", window, (first, second, result), channels_last,
                transpose_kernel=not backwards, swapped=backwards, unreversed=False,
                outputs=outputs, inputs=inputs, batch=rhs.shape[q_summed],
            )  # fmt: skip

    if all(d == 1 for d in lhs_dilation):
        ordinary = window(of_lhs, of_rhs, strides, rhs_dilation, of_out, backwards=False)
        yield from as_kernel("gradient_data", ordinary, backwards=False)
        yield from to_kernel(
            window(of_lhs, of_out, rhs_dilation, strides, of_rhs, backwards=False), backwards=False
        )
    if all(s == 1 for s in strides):
        transposed = window(of_out, of_rhs, lhs_dilation, rhs_dilation, of_lhs, backwards=True)
        yield from as_kernel("forward", transposed, backwards=True)
    if all(d == 1 for d in rhs_dilation):
        yield from to_kernel(
            window(of_rhs, of_out, lhs_dilation, strides, of_lhs, backwards=True), backwards=True
        )


def _image(
    shape: Sequence[int],
    batch: int,
    channel: int,
    spatial: Sequence[int],
    channels_last: bool,
    groups: int = 1,
) -> Place:
    """An array of images; with groups, the outer factor of its batch axis joins the channels."""
    cut, pixels = list(shape), [shape[i] for i in spatial]
    cut[batch : batch + 1] = [groups, shape[batch] // groups]
    after = [i + (i > batch) for i in range(len(shape))]  # where the other axes are after the cut
    channels = (batch, after[channel])
    places = [after[i] for i in spatial]
    count = groups * shape[channel]
    if channels_last:
        order, ours = (batch + 1, *places, *channels), (shape[batch] // groups, *pixels, count)
    else:
        order, ours = (batch + 1, *channels, *places), (shape[batch] // groups, count, *pixels)
    return Place(tuple(shape), tuple(cut), order, ours)
