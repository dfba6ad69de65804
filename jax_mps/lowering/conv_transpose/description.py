"""What the forms are told of a convolution."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from jax_mps.geometry import Window
from jax_mps.lowering import axes
from jax_mps.lowering.apple import MAX_OPERANDS
from jax_mps.lowering.rule import Platform

Array = Any


@dataclasses.dataclass(frozen=True)
class Conv:
    """One transposed convolution, apart from its arrays.

    Its images have one batch axis.

    Attributes:
      window: the windows of the ordinary convolution that is transposed.
      groups: of channels.
      outputs: channels of the result of `forward`, of all groups.
      inputs: channels of its operand.
      channels_last: whether the channel axis is behind the spatial axes, or before them.
      transpose_kernel: whether the public kernel is that of the ordinary convolution.
      precision: of matrix products and convolutions, as `jax.lax` takes it.
      out_dtype: the type of the result.
      rounds_later: whether the result will be rounded to the type of the operands.
      platform: what the program is shaped for.
    """

    window: Window
    groups: int
    outputs: int
    inputs: int
    channels_last: bool
    transpose_kernel: bool
    precision: Any
    out_dtype: Any
    rounds_later: bool
    platform: Platform

    @property
    def rank(self) -> int:
        return self.window.rank

    @property
    def spatial(self) -> int:
        """The first spatial axis of an image."""
        return 1 if self.channels_last else 2

    @property
    def channel(self) -> int:
        """The channel axis of an image."""
        return self.rank + 1 if self.channels_last else 1

    @property
    def depthwise(self) -> bool:
        return self.groups == self.outputs == self.inputs > 1

    @property
    def unstrided(self) -> bool:
        return all(axis.stride == 1 for axis in self.window.axes)

    @property
    def disjoint(self) -> bool:
        return all(axis.taps == 1 or axes.disjoint(axis) for axis in self.window.axes)

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
        at_once = MAX_OPERANDS // 2 // arrays if self.platform == "apple" else len(terms)
        return axes.add_up(terms, at_once)
