"""The table of choices: which form serves where, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from jax_mps.lowering.conv_transpose.description import Conv
from jax_mps.lowering.rule import Platform

Form = Literal["conv", "phases", "dot", "taps", "channelwise"]
Operation = Literal["forward", "data", "weights"]

_UNROLLED = 64
"""Taps that depthwise forms write out one by one; more are left to a matrix product or a convolution."""

_FEW = 8
"""Channels of a result that are too few for cuDNN."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A row of the table: the form for these operations and platforms, where the condition holds."""

    operations: tuple[Operation, ...]
    platforms: tuple[Platform, ...]
    condition: Callable[[Conv], bool]
    form: Form
    why: str


_ALL: tuple[Operation, ...] = ("forward", "data", "weights")
_EVERYWHERE: tuple[Platform, ...] = ("cpu", "cuda", "apple", "any")
_ORDINARY: tuple[Platform, ...] = ("cpu", "any")

# Times are of the named shapes of `bench/shapes.py`. H100: microseconds of the device, float32 with TF32 /
# bfloat16, batch 32, JAX 0.11.2, 2026-11-24. CPU: milliseconds, float32, two cores, JAX 0.10.2. The last row
# for an operation and a platform always fits. Rows that say H200 are times of `conv` and its gradients there,
# as the host sees them: 32 or 16 images, JAX 0.11.2, 2026-11-28.
CHOICES = (
    Choice(
        ("forward", "data"),
        ("cuda",),
        lambda c: c.rank == 2 and c.unstrided and not c.disjoint and (c.groups > 1 or c.dilated),
        "conv",
        "3 x 3, H200, data: 28x28x256 in 32 groups 55/62, dot 259/224; dilated 92/71, dot 220/163; "
        "depthwise 112x112x96 116/89, channelwise 223/183. In one dimension cuDNN takes 12 times as long",
    ),
    Choice(
        ("weights",),
        ("cuda",),
        lambda c: c.rank == 2 and c.unstrided and not c.disjoint and c.groups > 1 and c.window.taps <= 9,
        "conv",
        "the same: 32 groups 136/54, dot 256/217; depthwise 98/98, channelwise 543/524. Of 7 x 7 taps cuDNN "
        "takes 4 times as long in float32",
    ),
    Choice(
        _ALL,
        _EVERYWHERE,
        lambda c: c.depthwise and c.window.taps <= _UNROLLED,
        "channelwise",
        "upsample, H100: forward 59/59, conv 1426/1207; data 66/51, conv 444/428",
    ),
    Choice(
        ("data",),
        _EVERYWHERE,
        lambda c: not c.window.is_static(),
        "conv",
        "symbolic sizes: a matrix product needs the number of pixels, and JAX may not know that it is one",
    ),
    Choice(("weights",), _EVERYWHERE, lambda c: not c.window.is_static(), "taps", "symbolic sizes, as above"),
    Choice(
        _ALL,
        _EVERYWHERE,
        lambda c: c.disjoint,
        "dot",
        "nnunet_up, H100: forward 27/26, conv 79/77; data 30/33, conv 67/81; weights 38/28, conv 85/73; "
        "unet_up forward 55/28, conv 39/31, but with bias and relu behind them 55/28 and 61/44",
    ),
    Choice(
        ("forward",),
        ("apple",),
        lambda c: not c.dilated and (c.groups == 1 or c.rank < 3),
        "phases",
        "one convolution, which Apple's plugins have without zeros; groups along two axes at most",
    ),
    Choice(
        _ALL,
        ("cpu", "cuda", "any"),
        lambda c: c.outputs == c.groups,
        "dot",
        "volume_head, H100: forward 51/49, conv 183/191; data 52/53, conv 74/84; weights 50/42, conv 193/155",
    ),
    Choice(
        _ALL,
        ("cuda",),
        lambda c: c.rank == 2 and c.groups >= 8 and not c.dilated,
        "conv",
        "k3 s2, 8 groups of 56x56x512, H200: data 116/77, dot 247/167; weights 193/82, dot 264/170; "
        "with 2 groups of 56x56x64 113/82, dot 69/54",
    ),
    Choice(
        _ALL,
        ("cuda",),
        lambda c: c.dilated or c.groups > 1,
        "dot",
        "cuDNN refuses some dilated bfloat16 convolutions, and is slow in small groups",
    ),
    Choice(
        ("forward",),
        ("cuda",),
        lambda c: c.outputs <= _FEW and all(axis.taps % axis.stride == 0 for axis in c.window.axes),
        "phases",
        "image_head, H100: 300/274, conv 1025/751, dot 733/686; 128->8 k4 s2, 64x64, H200: 95/82, "
        "conv 190/105, dot 126/89",
    ),
    Choice(
        ("forward",),
        ("cuda",),
        lambda c: c.outputs <= _FEW // 2,
        "dot",
        "phases have taps that are zero; 32->4 k3 s2 of 128x128, H200: 72/69, phases 98/93, conv 139/122; "
        "3-D 32->2 k3 s2 of 48^3: 115/103, phases 138/106, conv 335/265",
    ),
    Choice(
        _ALL,
        ("cuda",),
        lambda c: True,
        "conv",
        "fcn, H100: forward 102/55, phases 113/67; data 102/64, dot 232/137; weights 121/57, dot 240/140",
    ),
    Choice(
        ("forward",),
        _EVERYWHERE,
        lambda c: True,
        "dot",
        "CPU: volume_head 25, phases 222; dcgan 46, phases 35, which multiplies padding: NaN would spread",
    ),
    Choice(
        ("data",),
        _EVERYWHERE,
        lambda c: c.rank == 3 and (c.groups > 1 or c.platform != "apple"),
        "dot",
        "CPU: volume_head 19, conv 73; Apple's plugins have no groups along three axes",
    ),
    Choice(
        ("data",),
        _ORDINARY,
        lambda c: c.groups > 1,
        "dot",
        "XLA's partitioner gathers the batch of grouped ones",
    ),
    Choice(("data",), _EVERYWHERE, lambda c: True, "conv", "CPU: dcgan 36, dot 38; hifigan 32, dot 34"),
    Choice(("weights",), _EVERYWHERE, lambda c: True, "taps", "CPU: dcgan 43, dot 57; hifigan 54, dot 55"),
)


def choose(operation: Operation, conv: Conv) -> Form:
    """The form of the first row that fits."""
    return next(
        row.form
        for row in CHOICES
        if operation in row.operations and conv.platform in row.platforms and row.condition(conv)
    )
