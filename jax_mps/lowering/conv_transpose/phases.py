"""The form `phases`: one convolution of stride 1, whose channels are the phases of the result.

Without dilation, pixel r of block q (blocks of `stride` pixels) gets tap `r + stride * m` of window q - m.
That is a convolution of stride 1 over the operand, whose kernel has the taps m mirrored and a channel for
each r.

For instance, the operand `1 10`, the kernel `1 2 3 4 5` and a stride of 2. The blocks of the kernel are
`1 2`, `3 4` and `5 0`: the tap that is missing is a zero. Mirrored, with a channel for each phase, the kernel
is

    channel 0     5 3 1
    channel 1     0 4 2

and the convolution over the operand with two zeros on either side, `0 0 1 10 0 0`, gives

    channel 0     1 13 35 50        for instance 5 * 1 + 3 * 10 = 35
    channel 1     2 24 40  0

Interleaved, that is `1 2 13 24 35 40 50 0`, and all but the last pixel is the result.
"""

from __future__ import annotations

import math
from typing import Any

from jax import lax

from jax_mps.lowering.axes import resize, unblock
from jax_mps.lowering.conv_transpose.conv import convolve
from jax_mps.lowering.conv_transpose.description import Conv
from jax_mps.lowering.conv_transpose.kernels import mirrored

Array = Any


def forward(conv: Conv, x: Array, kernel: Array) -> Array:
    once = (1,) * conv.rank
    kernel = _phases_as_channels(conv, kernel)
    pads = tuple((n - 1, n - 1) for n in kernel.shape[: conv.rank])
    return _interleaved(conv, convolve(conv, x, mirrored(conv, kernel), once, pads, once))


def _one_axis_of_groups(conv: Conv) -> tuple[int, ...]:
    """None where there is one group: Apple's plugins may have only eight axes."""
    return () if conv.groups == 1 else (conv.groups,)


def _phases_as_channels(conv: Conv, kernel: Array) -> Array:
    """`(blocks of taps..., in / groups, groups * phases * out / groups)`."""
    rank, groups = conv.rank, _one_axis_of_groups(conv)
    strides = [a.stride for a in conv.window.axes]
    counts = [-(-a.taps // a.stride) for a in conv.window.axes]
    for dim, (axis, count) in enumerate(zip(conv.window.axes, counts, strict=True)):
        kernel = resize(kernel, dim, 0, count * axis.stride - axis.taps, 0)
    *_, outputs, inputs = kernel.shape
    blocks = [n for pair in zip(counts, strides, strict=True) for n in pair]
    kernel = lax.reshape(kernel, (*blocks, *groups, outputs, inputs))
    taps, phases, last = range(0, 2 * rank, 2), range(1, 2 * rank, 2), 2 * rank + len(groups)
    # (blocks of taps..., inputs, groups, phases..., outputs)
    kernel = lax.transpose(kernel, (*taps, last + 1, *range(2 * rank, last), *phases, last))
    return lax.reshape(kernel, (*counts, inputs, conv.groups * math.prod(strides) * outputs))


def _interleaved(conv: Conv, y: Array) -> Array:
    """Channels (groups, phases..., outputs) to their places; every axis is (blocks, phases) for a moment."""
    rank, axes, groups = conv.rank, conv.window.axes, _one_axis_of_groups(conv)
    at = conv.channel
    split = (*groups, *(a.stride for a in axes), conv.outputs // conv.groups)
    y = lax.reshape(y, (*y.shape[:at], *split, *y.shape[at + 1 :]))
    phase = at + len(groups)
    channels = [*range(at, phase), phase + rank]
    blocks = conv.spatial if conv.channels_last else phase + rank + 1
    pairs = [d for i in range(rank) for d in (blocks + i, phase + i)]
    y = lax.transpose(y, [0, *pairs, *channels] if conv.channels_last else [0, *channels, *pairs])
    merged = slice(1 + 2 * rank, y.ndim) if conv.channels_last else slice(1, 1 + len(channels))
    shape = list(y.shape)
    shape[merged] = [conv.outputs]
    y = lax.reshape(y, shape)
    for i in reversed(range(rank)):
        y = unblock(y, axes[i], conv.spatial + 2 * i)
    return y
