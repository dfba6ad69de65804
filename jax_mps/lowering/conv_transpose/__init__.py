"""The StableHLO of transposed convolution and its two gradients, in several forms.

None multiplies by inserted zeros, and none writes `lhs_dilation` out. What is left are matrix products,
ordinary convolutions, and slices, edge pads, reshapes and sums that put things in their place:

| form | forward | gradient to the image | gradient to the kernel |
|---|---|---|---|
| `conv` | transpose of a strided convolution | strided convolution | its gradient to the kernel |
| `phases` | one convolution of stride 1 whose channels are the phases, interleaved | - | - |
| `dot` | matrix product with every tap, overlapped and added | matrix product over patches | the same |
| `taps` | - | - | a matrix product for each tap, or block of taps |
| `channelwise` | depthwise: multiply and add over phases | over strided slices | multiply and reduce |

`_CHOICES` says which form serves where, and why.

Inside, arrays have one batch axis, and `_Conv.spatial` numbers the first spatial axis. Kernels are
brought to `(*window, groups, out / groups, in / groups)`, as the module `jax_mps.conv_transpose` uses them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import numpy as np
from jax import lax

from jax_mps.geometry import Axis, Window
from jax_mps.lowering.apple import MAX_OPERANDS
from jax_mps.lowering.axes import (
    add_up,
    cover,
    cut,
    disjoint,
    neighbours,
    nth_before,
    repeat,
    resize,
    tap_of,
    unblock,
)
from jax_mps.lowering.rule import Platform, accumulator

Array = Any
Form = Literal["conv", "phases", "dot", "taps", "channelwise"]
Operation = Literal["forward", "data", "weights"]

_UNROLLED = 64
"""Taps that depthwise forms write out one by one; more are left to a matrix product or a convolution."""

_FEW = 4
"""Channels of a result that are too few for cuDNN."""


@dataclasses.dataclass(frozen=True)
class _Conv:
    """One transposed convolution, apart from its arrays."""

    window: Window
    groups: int
    outputs: int
    inputs: int
    channels_last: bool
    transpose_kernel: bool
    precision: Any
    out_dtype: Any
    platform: Platform

    @property
    def rank(self) -> int:
        return self.window.rank

    @property
    def spatial(self) -> int:
        return 1 if self.channels_last else 2

    @property
    def channel(self) -> int:
        return self.rank + 1 if self.channels_last else 1

    @property
    def depthwise(self) -> bool:
        return self.groups == self.outputs == self.inputs > 1

    @property
    def disjoint(self) -> bool:
        return all(axis.taps == 1 or disjoint(axis) for axis in self.window.axes)

    @property
    def apart(self) -> bool:
        """Whether no window reaches the image at all."""
        return any(
            axis.is_static()
            and (axis.low >= (axis.windows - 1) * axis.stride + axis.extent or -axis.low >= axis.size)
            for axis in self.window.axes
        )

    @property
    def dilated(self) -> bool:
        return any(axis.dilation > 1 and axis.taps > 1 for axis in self.window.axes)

    def sum(self, terms: Iterable[Array], arrays: int = 1) -> Array:
        """The sum of terms, each computed from that many arrays.

        On Apple's GPUs a kernel reads half as many as it may: the derivative of a product adds two sums.
        """
        terms = list(terms)
        return add_up(terms, MAX_OPERANDS // 2 // arrays if self.platform == "apple" else len(terms))


# --- which form serves where --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Choice:
    """A row of the table: the form for these operations and platforms, where the condition holds."""

    operations: tuple[Operation, ...]
    platforms: tuple[Platform, ...]
    condition: Callable[[_Conv], bool]
    form: Form
    why: str


_ALL: tuple[Operation, ...] = ("forward", "data", "weights")
_EVERYWHERE: tuple[Platform, ...] = ("cpu", "cuda", "apple", "any")
_ORDINARY: tuple[Platform, ...] = ("cpu", "any")

# Times are of the named shapes of `bench/shapes.py`. H100: microseconds of the device, float32 with TF32 /
# bfloat16, batch 32, JAX 0.11.2, 2026-11-24. CPU: milliseconds, float32, two cores, JAX 0.10.2. The last row
# for an operation and a platform always fits.
_CHOICES = (
    _Choice(
        _ALL,
        _EVERYWHERE,
        lambda c: c.depthwise and c.window.taps <= _UNROLLED,
        "channelwise",
        "upsample, H100: forward 59/59, conv 1426/1207; data 66/51, conv 444/428",
    ),
    _Choice(
        _ALL,
        _EVERYWHERE,
        lambda c: c.disjoint,
        "dot",
        "nnunet_up, H100: forward 27/26, conv 79/77; data 30/33, conv 67/81; weights 38/28, conv 85/73; "
        "unet_up forward 55/28, conv 39/31, but with bias and relu behind them 55/28 and 61/44",
    ),
    _Choice(
        ("forward",),
        ("apple",),
        lambda c: not c.dilated and (c.groups == 1 or c.rank < 3),
        "phases",
        "one convolution, which Apple's plugins have without zeros; groups along two axes at most",
    ),
    _Choice(
        _ALL,
        ("cpu", "cuda", "any"),
        lambda c: c.outputs == c.groups,
        "dot",
        "volume_head, H100: forward 51/49, conv 183/191; data 52/53, conv 74/84; weights 50/42, conv 193/155",
    ),
    _Choice(
        _ALL,
        ("cuda",),
        lambda c: c.dilated or c.groups > 1,
        "dot",
        "cuDNN refuses some dilated bfloat16 convolutions, and is slow in small groups",
    ),
    _Choice(
        ("forward",),
        ("cuda",),
        lambda c: c.outputs <= _FEW,
        "phases",
        "image_head, H100: 300/274, conv 1025/751, dot 733/686",
    ),
    _Choice(
        _ALL,
        ("cuda",),
        lambda c: True,
        "conv",
        "fcn, H100: forward 102/55, phases 113/67; data 102/64, dot 232/137; weights 121/57, dot 240/140",
    ),
    _Choice(
        ("forward",),
        _EVERYWHERE,
        lambda c: True,
        "dot",
        "CPU: volume_head 25, phases 222; dcgan 46, phases 35, which multiplies padding: NaN would spread",
    ),
    _Choice(
        ("data",),
        _EVERYWHERE,
        lambda c: c.rank == 3 and (c.groups > 1 or c.platform != "apple"),
        "dot",
        "CPU: volume_head 19, conv 73; Apple's plugins have no groups along three axes",
    ),
    _Choice(
        ("data",),
        _ORDINARY,
        lambda c: c.groups > 1,
        "dot",
        "XLA's partitioner gathers the batch of grouped ones",
    ),
    _Choice(("data",), _EVERYWHERE, lambda c: True, "conv", "CPU: dcgan 36, dot 38; hifigan 32, dot 34"),
    _Choice(("weights",), _EVERYWHERE, lambda c: True, "taps", "CPU: dcgan 43, dot 57; hifigan 54, dot 55"),
)


def choose(operation: Operation, conv: _Conv) -> Form:
    """The form of the first row that fits."""
    return next(
        row.form
        for row in _CHOICES
        if operation in row.operations and conv.platform in row.platforms and row.condition(conv)
    )


# --- the three operations -----------------------------------------------------------------------------


def forward(x: Array, kernel: Array, *, start: int, **params: Any) -> Array:
    conv = _conv(kernel.shape[-2:], **params)
    result = (*conv.window.sizes, conv.outputs)
    return _over_batch(_FORWARD[choose("forward", conv)], conv, x, start, kernel, result)


def gradient_data(g: Array, kernel: Array, *, start: int, **params: Any) -> Array:
    conv = _conv(kernel.shape[-2:], **params)
    result = (*conv.window.counts, conv.inputs)
    return _over_batch(_DATA[choose("data", conv)], conv, g, start, kernel, result)


def gradient_weights(g: Array, x: Array, *, start: int, **params: Any) -> Array:
    rank, channels_last = params["window"].rank, params["channels_last"]
    channel = start + rank if channels_last else start - 1
    outputs, inputs = g.shape[channel], x.shape[channel]
    groups = params["groups"]
    pair = (outputs // groups, inputs) if params["transpose_kernel"] else (inputs // groups, outputs)
    conv = _conv(pair, **params)
    g, x = (_one_batch_axis(a, start, conv) for a in _widened(conv, g, x))
    if conv.apart:
        return lax.full((*conv.window.shape, *pair), 0, conv.out_dtype)
    kernel = _WEIGHTS[choose("weights", conv)](conv, g, x)
    return lax.convert_element_type(_kernel_out(conv, kernel), conv.out_dtype)


def _conv(
    kernel_channels: tuple[int, int], *, window: Window, groups: int, transpose_kernel: bool, **params: Any
) -> _Conv:
    per_group, full = kernel_channels
    outputs, inputs = (per_group * groups, full) if transpose_kernel else (full, per_group * groups)
    return _Conv(
        window=window,
        groups=groups,
        outputs=outputs,
        inputs=inputs,
        transpose_kernel=transpose_kernel,
        **params,
    )


def _widened(conv: _Conv, *arrays: Array) -> Iterable[Array]:
    """Half precision in the type that sums are formed in, unless the processor's products do that inside."""
    for array in arrays:
        inside = conv.platform in ("cuda", "apple") and conv.out_dtype == array.dtype
        yield array if inside else lax.convert_element_type(array, accumulator(array.dtype))


def _over_batch(
    form: Callable[[_Conv, Array, Array], Array],
    conv: _Conv,
    image: Array,
    start: int,
    kernel: Array,
    result: tuple[Any, ...],
) -> Array:
    """A form of `forward` or `gradient_data` on arrays as the primitives have them.

    `result` has the sizes and the channels of the result.
    """
    batch = image.shape[: start if conv.channels_last else start - 1]
    if conv.apart:
        places = result if conv.channels_last else (result[-1], *result[:-1])
        return lax.full((*batch, *places), 0, conv.out_dtype)
    image, kernel = _widened(conv, image, kernel)
    out = form(conv, _one_batch_axis(image, start, conv), _kernel_in(conv, kernel))
    out = lax.convert_element_type(out, conv.out_dtype)
    return out if len(batch) == 1 else lax.reshape(out, (*batch, *out.shape[1:]))


def _one_batch_axis(x: Array, start: int, conv: _Conv) -> Array:
    axes = start if conv.channels_last else start - 1
    if axes == 1:
        return x
    return lax.reshape(x, (math.prod(x.shape[:axes]), *x.shape[axes:]))


# --- kernels ------------------------------------------------------------------------------------------


def _kernel_in(conv: _Conv, kernel: Array) -> Array:
    """From either public layout to `(*window, groups, out / groups, in / groups)`."""
    rank, groups = conv.rank, conv.groups
    window = range(rank)
    if conv.transpose_kernel:
        kernel = lax.reshape(kernel, (*kernel.shape[: rank + 1], groups, conv.inputs // groups))
        return lax.transpose(kernel, (*window, rank + 1, rank, rank + 2))
    kernel = lax.reshape(_mirror(conv, kernel), (*kernel.shape[: rank + 1], groups, conv.outputs // groups))
    return lax.transpose(kernel, (*window, rank + 1, rank + 2, rank))


def _kernel_out(conv: _Conv, kernel: Array) -> Array:
    """The inverse of `_kernel_in`."""
    rank = conv.rank
    window = range(rank)
    if conv.transpose_kernel:
        kernel = lax.transpose(kernel, (*window, rank + 1, rank, rank + 2))
        return lax.reshape(kernel, (*kernel.shape[: rank + 1], conv.inputs))
    kernel = lax.transpose(kernel, (*window, rank + 2, rank, rank + 1))
    return _mirror(conv, lax.reshape(kernel, (*kernel.shape[: rank + 1], conv.outputs)))


def _mirror(conv: _Conv, kernel: Array) -> Array:
    """Rotated by 180 degrees. Apple's plugins do not all have `reverse`, and kernels are small."""
    for dim in range(conv.rank):
        if conv.platform == "apple":
            slices = [cut(kernel, dim, k, k + 1) for k in reversed(range(kernel.shape[dim]))]
            kernel = _concatenate(slices, dim)
        else:
            kernel = lax.rev(kernel, (dim,))
    return kernel


def _concatenate(parts: list[Array], dim: int) -> Array:
    return parts[0] if len(parts) == 1 else lax.concatenate(parts, dim)


# --- conv ---------------------------------------------------------------------------------------------


def _convolve(
    conv: _Conv, image: Array, kernel: Array, strides: Any, pads: Any, dilation: Any, precision: Any
) -> Array:
    """An ordinary convolution; `kernel` is `(*window, channels of a group, channels of the result)`."""
    rank, lifted = conv.rank, conv.platform == "apple" and conv.rank == 1
    if lifted:  # Apple's plugins do not all have groups along one axis
        image = lax.expand_dims(image, (conv.spatial,))
        kernel = lax.expand_dims(kernel, (0,))
        strides, pads, dilation, rank = (1, *strides), ((0, 0), *pads), (1, *dilation), 2
    letters = "DHW"[3 - rank :]
    if conv.channels_last:
        numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    else:
        kernel = lax.transpose(kernel, (rank + 1, rank, *range(rank)))
        numbers = (f"NC{letters}", f"OI{letters}", f"NC{letters}")
    out = lax.conv_general_dilated(
        image,
        kernel,
        strides,
        pads,
        rhs_dilation=dilation,
        dimension_numbers=numbers,
        feature_group_count=conv.groups,
        precision=precision,
    )
    return lax.squeeze(out, (conv.spatial,)) if lifted else out


def _strided(conv: _Conv, image: Array, kernel: Array) -> Array:
    """The convolution that is transposed, over an image that the windows cover exactly or with padding."""
    axes = conv.window.axes
    return _convolve(
        conv,
        image,
        kernel,
        tuple(a.stride for a in axes),
        tuple((_positive(a.low), _positive(a.high)) for a in axes),
        tuple(a.dilation for a in axes),
        conv.precision,
    )


def _positive(n: Any) -> Any:
    return n if not isinstance(n, int) else max(n, 0)


def _trimmed(conv: _Conv, image: Array) -> Array:
    """Without the pixels before the first and behind the last window: negative padding, cut off."""
    for dim, axis in enumerate(conv.window.axes, conv.spatial):
        image = resize(image, dim, -_positive(-axis.low), -_positive(-axis.high), 0)
    return image


def _untrimmed(conv: _Conv, image: Array) -> Array:
    for dim, axis in enumerate(conv.window.axes, conv.spatial):
        image = resize(image, dim, _positive(-axis.low), _positive(-axis.high), 0)
    return image


def _ordinary(conv: _Conv, kernel: Array) -> Array:
    """`(*window, out / groups, in)`, the kernel of the convolution that is transposed."""
    rank = conv.rank
    kernel = lax.transpose(kernel, (*range(rank), rank + 1, rank, rank + 2))
    return lax.reshape(kernel, (*kernel.shape[: rank + 1], conv.inputs))


def _trimmed_like(conv: _Conv, x: Array) -> Any:
    shape = list(x.shape)
    shape[conv.channel] = conv.outputs
    for dim, axis in enumerate(conv.window.axes, conv.spatial):
        shape[dim] = axis.size - _positive(-axis.low) - _positive(-axis.high)
    return jax.ShapeDtypeStruct(tuple(shape), x.dtype)


def _reaching(conv: _Conv, x: Array) -> tuple[_Conv, Array]:
    """Without the windows at the ends that do not reach the image.

    They would turn into negative padding, with which XLA's CPU compiler reads beside the array.
    """
    axes = []
    for dim, axis in enumerate(conv.window.axes, conv.spatial):
        if axis.is_static():
            first = max(-(-(axis.low - axis.extent + 1) // axis.stride), 0)
            limit = min(-(-(axis.size + axis.low) // axis.stride), axis.windows)
            if (first, limit) != (0, axis.windows):
                x, axis = cut(x, dim, first, limit), axis.select(first, limit - first)
        axes.append(axis)
    return dataclasses.replace(conv, window=Window(tuple(axes))), x


def _forward_conv(conv: _Conv, x: Array, kernel: Array) -> Array:
    conv, x = _reaching(conv, x)
    kernel = _ordinary(conv, kernel)
    transpose = jax.linear_transpose(lambda y: _strided(conv, y, kernel), _trimmed_like(conv, x))
    return _untrimmed(conv, transpose(x)[0])


def _data_conv(conv: _Conv, g: Array, kernel: Array) -> Array:
    return _strided(conv, _trimmed(conv, g), _ordinary(conv, kernel))


def _weights_conv(conv: _Conv, g: Array, x: Array) -> Array:
    rank, groups, g = conv.rank, conv.groups, _trimmed(conv, g)
    like = jax.ShapeDtypeStruct((*conv.window.shape, conv.outputs // groups, conv.inputs), x.dtype)
    (kernel,) = jax.linear_transpose(lambda kernel: _strided(conv, g, kernel), like)(x)
    kernel = lax.reshape(kernel, (*kernel.shape[: rank + 1], groups, conv.inputs // groups))
    return lax.transpose(kernel, (*range(rank), rank + 1, rank, rank + 2))


# --- phases -------------------------------------------------------------------------------------------
#
# Without dilation, pixel r of block q (blocks of `stride` pixels) gets tap `r + stride * m` of window q - m:
# a convolution of stride 1 over x, whose kernel has the taps m mirrored and a channel for each r.


def _forward_phases(conv: _Conv, x: Array, kernel: Array) -> Array:
    rank, axes = conv.rank, conv.window.axes
    counts = [-(-a.taps // a.stride) for a in axes]
    for dim, (axis, count) in enumerate(zip(axes, counts, strict=True)):
        kernel = resize(kernel, dim, 0, count * axis.stride - axis.taps, 0)
    strides = [a.stride for a in axes]
    interleaved = [n for pair in zip(counts, strides, strict=True) for n in pair]
    *_, outputs, inputs = kernel.shape
    groups = () if conv.groups == 1 else (conv.groups,)  # one axis less: Apple's plugins may have only eight
    kernel = lax.reshape(kernel, (*interleaved, *groups, outputs, inputs))
    # (taps..., inputs, groups, phases..., outputs)
    taps, phases, last = range(0, 2 * rank, 2), range(1, 2 * rank, 2), 2 * rank + len(groups)
    kernel = lax.transpose(kernel, (*taps, last + 1, *range(2 * rank, last), *phases, last))
    kernel = lax.reshape(kernel, (*counts, inputs, conv.groups * math.prod(strides) * outputs))
    y = _convolve(
        conv,
        x,
        _mirror(conv, kernel),
        (1,) * rank,
        tuple((n - 1, n - 1) for n in counts),
        (1,) * rank,
        conv.precision,
    )
    # Channels (groups, phases..., outputs) to their places; every axis is (blocks, phases) for a moment.
    first, at = conv.spatial, conv.channel
    y = lax.reshape(y, (*y.shape[:at], *groups, *strides, outputs, *y.shape[at + 1 :]))
    phase = at + len(groups)
    channels = [*range(at, phase), phase + rank]
    blocks = first if conv.channels_last else phase + rank + 1
    pairs = [d for i in range(rank) for d in (blocks + i, phase + i)]
    y = lax.transpose(y, [0, *pairs, *channels] if conv.channels_last else [0, *channels, *pairs])
    places = slice(1 + 2 * rank, y.ndim) if conv.channels_last else slice(1, 1 + len(channels))
    shape = list(y.shape)
    shape[places] = [conv.outputs]
    y = lax.reshape(y, shape)
    for i in reversed(range(rank)):
        y = unblock(y, axes[i], first + 2 * i)
    return y


# --- dot ----------------------------------------------------------------------------------------------


def _matmul(conv: _Conv, a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """The product of `(groups, ...)` matrices, without the batch axis where there is one group."""
    if conv.groups == 1:
        a, b = (lax.squeeze(m, (0,)) for m in (a, b))
        contract = (contract[0] - 1, contract[1] - 1)
    batch: tuple[Any, Any] = ((), ()) if conv.groups == 1 else ((0,), (0,))
    out = lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), batch),
        precision=conv.precision,
        preferred_element_type=None if conv.platform == "apple" else accumulator(a.dtype),
    )
    return lax.expand_dims(out, (0,)) if conv.groups == 1 else out


def _rows(conv: _Conv, x: Array, channels: int) -> Array:
    """Pixels in rows: `(groups, pixels, channels / groups)`; `x` has its channels last."""
    x = lax.reshape(x, (math.prod(x.shape[:-1]), conv.groups, channels // conv.groups))
    return lax.transpose(x, (1, 0, 2))


def _last(conv: _Conv, x: Array) -> Array:
    """With the channel axis last."""
    if conv.channels_last:
        return x
    return lax.transpose(x, (0, *range(2, x.ndim), 1))


def _in_place(conv: _Conv, x: Array) -> Array:
    """The inverse of `_last`."""
    if conv.channels_last:
        return x
    return lax.transpose(x, (0, x.ndim - 1, *range(1, x.ndim - 1)))


def _forward_dot(conv: _Conv, x: Array, kernel: Array) -> Array:
    rank, groups, window = conv.rank, conv.groups, conv.window
    x = _last(conv, x)
    columns = lax.transpose(kernel, (rank, rank + 2, *range(rank), rank + 1))
    columns = lax.reshape(columns, (groups, conv.inputs // groups, window.taps * (conv.outputs // groups)))
    z = _matmul(conv, _rows(conv, x, conv.inputs), columns, (2, 1))
    # (groups, pixels, taps, outputs) to (batch, pixels and taps of each axis..., outputs); the batch stays
    # with the first axis on the way, because Apple's plugins may have no more than eight axes.
    n, (first, *others) = x.shape[0], x.shape[1:-1]
    z = lax.reshape(z, (groups, n * first, *others, *window.shape, conv.outputs // groups))
    z = lax.transpose(z, (*(d for i in range(rank) for d in (1 + i, 1 + rank + i)), 0, 1 + 2 * rank))
    z = lax.reshape(z, (n, first, *z.shape[1:-2], conv.outputs))
    for i in reversed(range(rank)):
        z = _overlap_add(conv, z, window.axes[i], 1 + 2 * i)
    return _in_place(conv, z)


def _overlap_add(conv: _Conv, z: Array, axis: Axis, dim: int) -> Array:
    """Adds up the taps of all windows of an axis, `(windows, taps)` at `dim`, where they fall."""
    s, d = axis.stride, axis.dilation
    if axis.taps == 1:
        d = 1
    if d == 1:
        count = -(-axis.taps // s)
        z = resize(z, dim + 1, 0, count * s - axis.taps, 0)
        parts = [cut(z, dim + 1, m * s, (m + 1) * s) for m in range(count)]
        total = conv.sum(resize(part, dim, m, count - 1 - m, 0) for m, part in enumerate(parts))
        return unblock(total, axis, dim)
    places = [divmod(d * k, s) for k in range(axis.taps)]
    last = max(block for block, _ in places)
    phases = []
    for r in range(s):
        terms = [
            resize(cut(z, dim + 1, k, k + 1), dim, block, last - block, 0)
            for k, (block, phase) in enumerate(places)
            if phase == r
        ]
        phases.append(conv.sum(terms) if terms else None)
    like = next(p for p in phases if p is not None)
    filled = [lax.full_like(like, 0) if p is None else p for p in phases]
    return unblock(_concatenate(filled, dim + 1), axis, dim)


def _patches(image: Array, axis: Axis, dim: int) -> Array:
    """What the windows of an axis read: `(windows, taps)` in place of the pixels."""
    s, count = axis.stride, -(-axis.taps // axis.stride)
    if axis.dilation == 1 or axis.taps == 1:
        blocks = axis.windows + count - 1
        image = resize(image, dim, axis.low, blocks * s - axis.low - axis.size, 0)
        image = lax.reshape(image, (*image.shape[:dim], blocks, s, *image.shape[dim + 1 :]))
        parts = [cut(image, dim, m, m + axis.windows) for m in range(count)]
        return cut(_concatenate(parts, dim + 1), dim + 1, 0, axis.taps)
    image = cover(image, axis, dim, 0)
    taps = [lax.expand_dims(tap_of(image, axis, dim, k), (dim + 1,)) for k in range(axis.taps)]
    return _concatenate(taps, dim + 1)


def _patch_rows(conv: _Conv, g: Array) -> Array:
    """All that the windows read, in rows: `(groups, pixels, taps * out / groups)`."""
    rank, groups, window = conv.rank, conv.groups, conv.window
    g = _last(conv, g)
    for i in reversed(range(rank)):
        g = _patches(g, window.axes[i], 1 + i)
        # (batch, pixels..., this axis, taps of this axis, more taps, channels): taps to the others
        order = list(range(g.ndim))
        order.insert(rank + 1, order.pop(2 + i))
        g = lax.transpose(g, order)
    pixels = math.prod(g.shape[: rank + 1])
    g = lax.reshape(g, (pixels, window.taps, groups, conv.outputs // groups))
    g = lax.transpose(g, (2, 0, 1, 3))
    return lax.reshape(g, (groups, pixels, window.taps * (conv.outputs // groups)))


def _data_dot(conv: _Conv, g: Array, kernel: Array) -> Array:
    rank, groups, window = conv.rank, conv.groups, conv.window
    per_group = conv.inputs // groups
    rows = lax.transpose(kernel, (rank, *range(rank), rank + 1, rank + 2))
    rows = lax.reshape(rows, (groups, window.taps * (conv.outputs // groups), per_group))
    x = _matmul(conv, _patch_rows(conv, g), rows, (2, 1))
    x = lax.reshape(lax.transpose(x, (1, 0, 2)), (g.shape[0], *window.counts, conv.inputs))
    return _in_place(conv, x)


def _weights_dot(conv: _Conv, g: Array, x: Array) -> Array:
    rank, groups, window = conv.rank, conv.groups, conv.window
    kernel = _matmul(conv, _patch_rows(conv, g), _rows(conv, _last(conv, x), conv.inputs), (1, 1))
    kernel = lax.reshape(kernel, (groups, *window.shape, conv.outputs // groups, conv.inputs // groups))
    return lax.transpose(kernel, (*range(1, rank + 1), 0, rank + 1, rank + 2))


# --- taps ---------------------------------------------------------------------------------------------


def _weights_taps(conv: _Conv, g: Array, x: Array) -> Array:
    """Blocks of `stride` neighbouring taps at a time where they are full, else single taps."""
    rank, groups, window = conv.rank, conv.groups, conv.window
    g, rows = _last(conv, g), _rows(conv, _last(conv, x), conv.inputs)
    per_group = (conv.outputs // groups, conv.inputs // groups)
    steps = [a.stride if a.dilation == 1 and a.taps % a.stride == 0 else 1 for a in window.axes]
    for dim, axis in enumerate(window.axes, 1):
        g = cover(g, axis, dim, 0)

    def block(first: tuple[int, ...]) -> Array:
        part = g
        for i in reversed(range(rank)):
            axis, k, step = window.axes[i], first[i], steps[i]
            if step == 1:
                part = lax.expand_dims(tap_of(part, axis, 1 + i, k), (2 + i,))
            else:
                part = cut(part, 1 + i, k, k + axis.windows * step)
                part = lax.reshape(part, (*part.shape[: 1 + i], axis.windows, step, *part.shape[2 + i :]))
        pixels = math.prod(part.shape[1 : 2 * rank : 2], start=part.shape[0])
        order = (0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
        part = lax.transpose(part, order)
        taps = math.prod(steps)
        part = lax.reshape(part, (pixels, taps, groups, per_group[0]))
        part = lax.reshape(lax.transpose(part, (2, 0, 1, 3)), (groups, pixels, taps * per_group[0]))
        return lax.reshape(_matmul(conv, part, rows, (1, 1)), (groups, *steps, *per_group))

    firsts = itertools.product(*(range(0, a.taps, s) for a, s in zip(window.axes, steps, strict=True)))
    parts = [lax.expand_dims(block(first), (0,)) for first in firsts]
    kernel = _concatenate(parts, 0)
    counts = [a.taps // s for a, s in zip(window.axes, steps, strict=True)]
    kernel = lax.reshape(kernel, (*counts, groups, *steps, math.prod(per_group)))
    pairs = [d for i in range(rank) for d in (i, rank + 1 + i)]
    kernel = lax.transpose(kernel, (*pairs, rank, 2 * rank + 1))
    return lax.reshape(kernel, (*window.shape, groups, *per_group))


# --- channelwise --------------------------------------------------------------------------------------
#
# Depthwise convolutions have no sum over channels, so there is nothing that a matrix unit could do. Along
# each axis (blocks, phases) the taps of a neighbouring window (see `neighbours`) lie side by side.


def _phase_taps(kernel: Array, conv: _Conv) -> list[tuple[tuple[int, ...], Array]]:
    """For every combination of neighbours: which they are, and the taps `(phases..., channels)`."""
    axes = conv.window.axes
    found: list[tuple[tuple[int, ...], Array]] = [((), kernel)]
    for dim, axis in enumerate(axes):
        split = []
        for chosen, part in found:
            for j, taps in neighbours(axis):
                split.append(((*chosen, j), _pick(part, dim, taps)))
        found = split
    return found


def _pick(kernel: Array, dim: int, taps: tuple[int, ...]) -> Array:
    """The taps of those numbers, and zeros for -1."""
    parts = [cut(kernel, dim, k, k + 1) if k >= 0 else None for k in taps]
    like = next(p for p in parts if p is not None)
    if all(k == taps[0] + i for i, k in enumerate(taps)):
        return cut(kernel, dim, taps[0], taps[-1] + 1)
    return _concatenate([lax.full_like(like, 0) if p is None else p for p in parts], dim)


def _depthwise(conv: _Conv, kernel: Array) -> Array:
    """`(*window, channels)`, in the type that sums are formed in."""
    kernel = lax.reshape(kernel, (*conv.window.shape, conv.groups))
    return lax.convert_element_type(kernel, accumulator(kernel.dtype))


def _forward_channelwise(conv: _Conv, x: Array, kernel: Array) -> Array:
    rank, axes, kernel = conv.rank, conv.window.axes, _depthwise(conv, kernel)
    x = lax.convert_element_type(x, kernel.dtype)
    dims = [conv.spatial + 2 * i for i in range(rank)]
    channel = 1 if not conv.channels_last else 1 + 2 * rank
    terms = []
    for chosen, taps in _phase_taps(kernel, conv):
        term = x
        for dim, axis, j in zip(range(conv.spatial, conv.spatial + rank), axes, chosen, strict=True):
            term = nth_before(term, axis, dim, j, 0)
        for dim, axis in zip(dims, axes, strict=True):
            term = repeat(term, dim, axis.stride)
        if not conv.channels_last:
            taps = lax.transpose(taps, (rank, *range(rank)))
        spread = lax.broadcast_in_dim(taps, term.shape, sorted((*(d + 1 for d in dims), channel)))
        terms.append(term * spread)
    y = conv.sum(terms, arrays=2)
    for dim, axis in reversed(list(zip(dims, axes, strict=True))):
        y = unblock(y, axis, dim)
    return y


def _data_channelwise(conv: _Conv, g: Array, kernel: Array) -> Array:
    kernel = _depthwise(conv, kernel)
    terms = []
    for at, tap in _tap_slices(conv, lax.convert_element_type(g, kernel.dtype)):
        weight = kernel
        for dim, k in enumerate(at):
            weight = cut(weight, dim, k, k + 1)
        weight = lax.reshape(weight, (conv.groups,))
        terms.append(tap * lax.broadcast_in_dim(weight, tap.shape, (conv.channel,)))
    return conv.sum(terms, arrays=2)


def _weights_channelwise(conv: _Conv, g: Array, x: Array) -> Array:
    wide = accumulator(g.dtype)
    g, x = (lax.convert_element_type(a, wide) for a in (g, x))
    pixels = [i for i in range(x.ndim) if i != conv.channel]
    sums = [
        lax.expand_dims(lax.reduce(tap * x, np.zeros((), wide), lax.add, pixels), (0,))
        for _, tap in _tap_slices(conv, g)
    ]
    kernel = _concatenate(sums, 0)
    return lax.reshape(kernel, (*conv.window.shape, conv.groups, 1, 1))


def _tap_slices(conv: _Conv, g: Array) -> Iterable[tuple[tuple[int, ...], Array]]:
    """Every tap of the window, and what all windows read there."""
    axes = conv.window.axes
    for dim, axis in enumerate(axes, conv.spatial):
        g = cover(g, axis, dim, 0)
    for at in itertools.product(*(range(a.taps) for a in axes)):
        tap = g
        for dim, (axis, k) in enumerate(zip(axes, at, strict=True), conv.spatial):
            tap = tap_of(tap, axis, dim, k)
        yield at, tap


_FORWARD: dict[Form, Callable[[_Conv, Array, Array], Array]] = {
    "conv": _forward_conv,
    "phases": _forward_phases,
    "dot": _forward_dot,
    "channelwise": _forward_channelwise,
}
_DATA: dict[Form, Callable[[_Conv, Array, Array], Array]] = {
    "conv": _data_conv,
    "dot": _data_dot,
    "channelwise": _data_channelwise,
}
_WEIGHTS: dict[Form, Callable[[_Conv, Array, Array], Array]] = {
    "conv": _weights_conv,
    "dot": _weights_dot,
    "taps": _weights_taps,
    "channelwise": _weights_channelwise,
}
