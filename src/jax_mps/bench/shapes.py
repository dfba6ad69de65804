"""The named shapes: layers of real networks, shared by the tests and the benchmarks."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

__all__ = ["POOLING", "PoolingShape"]


@dataclasses.dataclass(frozen=True)
class PoolingShape:
    """One pooling layer, the same along every spatial axis.

    Attributes:
      name: what `--shapes` and test identifiers call it.
      kind: which pooling.
      batch: the number of images.
      spatial: the size of the source along each spatial axis.
      channels: the number of channels.
      window: the number of taps along an axis.
      stride: source elements from one window to the next.
      padding: elements added on both sides.
      dilation: source elements from one tap to the next.
    """

    name: str
    kind: Literal["max", "avg", "l2"]
    batch: int
    spatial: tuple[int, ...]
    channels: int
    window: int
    stride: int
    padding: int = 0
    dilation: int = 1

    @property
    def ndim(self) -> int:
        """The number of spatial axes."""
        return len(self.spatial)

    @property
    def extent(self) -> int:
        """The length of an axis that a window spans."""
        return (self.window - 1) * self.dilation + 1

    @property
    def taps(self) -> int:
        """The number of elements under a window."""
        return self.window**self.ndim

    @property
    def pooled(self) -> tuple[int, ...]:
        """The size of the result along each spatial axis."""
        return tuple((n + 2 * self.padding - self.extent) // self.stride + 1 for n in self.spatial)

    @property
    def source_shape(self) -> tuple[int, ...]:
        """The shape of the source, channels last."""
        return (self.batch, *self.spatial, self.channels)

    @property
    def result_shape(self) -> tuple[int, ...]:
        """The shape of the result, channels last."""
        return (self.batch, *self.pooled, self.channels)

    @property
    def source_size(self) -> int:
        """The number of elements of the source."""
        return math.prod(self.source_shape)

    @property
    def result_size(self) -> int:
        """The number of elements of the result."""
        return math.prod(self.result_shape)

    def __str__(self) -> str:
        details = f"k{self.window} s{self.stride}"
        details += f" p{self.padding}" if self.padding else ""
        details += f" d{self.dilation}" if self.dilation > 1 else ""
        return f"{self.kind} {'x'.join(map(str, self.source_shape))} {details}"


POOLING = (
    PoolingShape("resnet_stem", "max", 8, (112, 112), 64, window=3, stride=2, padding=1),
    PoolingShape("unet_down", "max", 8, (128, 128), 64, window=2, stride=2),
    PoolingShape("inception_max", "max", 16, (32, 32), 128, window=3, stride=1, padding=1),
    PoolingShape("inception_avg", "avg", 16, (32, 32), 128, window=3, stride=1, padding=1),
    PoolingShape("aspp", "max", 8, (64, 64), 64, window=3, stride=1, padding=6, dilation=6),
    PoolingShape("facenet", "l2", 8, (56, 56), 192, window=3, stride=2, padding=1),
    PoolingShape("global", "avg", 32, (7, 7), 512, window=7, stride=7),
    PoolingShape("audio_pool", "avg", 8, (16384,), 32, window=4, stride=2, padding=1),
    PoolingShape("volume_down", "max", 2, (64, 64, 64), 32, window=2, stride=2),
)
