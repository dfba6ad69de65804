"""The named shapes: layers of real networks, shared by the tests and the benchmarks."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

__all__ = ["POOLING", "TRANSPOSED", "PoolingShape", "TransposedShape"]


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


@dataclasses.dataclass(frozen=True)
class TransposedShape:
    """One transposed convolution, the same along every spatial axis.

    Attributes:
      name: what `--shapes` and test identifiers call it.
      batch: the number of images.
      spatial: the size of the source along each spatial axis.
      inputs: channels of the source.
      outputs: channels of the result.
      window: the number of taps along an axis.
      stride: pixels of the result from one pixel of the source to the next.
      padding: pixels of the result that are cut off on both sides.
      output_padding: pixels that the high end has beyond the least size.
      groups: the number of groups of channels.
    """

    name: str
    batch: int
    spatial: tuple[int, ...]
    inputs: int
    outputs: int
    window: int
    stride: int
    padding: int = 0
    output_padding: int = 0
    groups: int = 1

    @property
    def ndim(self) -> int:
        """The number of spatial axes."""
        return len(self.spatial)

    @property
    def taps(self) -> int:
        """The number of elements under a window."""
        return self.window**self.ndim

    @property
    def result_spatial(self) -> tuple[int, ...]:
        """The size of the result along each spatial axis."""
        reach = self.window - 2 * self.padding + self.output_padding
        return tuple((n - 1) * self.stride + reach for n in self.spatial)

    @property
    def source_shape(self) -> tuple[int, ...]:
        """The shape of the source, channels last."""
        return (self.batch, *self.spatial, self.inputs)

    @property
    def result_shape(self) -> tuple[int, ...]:
        """The shape of the result, channels last."""
        return (self.batch, *self.result_spatial, self.outputs)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of the kernel of the convolution that is transposed, `(*window, out / groups, in)`."""
        return (*(self.window,) * self.ndim, self.outputs // self.groups, self.inputs)

    @property
    def products(self) -> int:
        """The number of multiplications, those with pixels that padding cuts off included."""
        return math.prod(self.source_shape) * self.taps * self.outputs // self.groups

    def __str__(self) -> str:
        details = f"k{self.window} s{self.stride}"
        details += f" p{self.padding}" if self.padding else ""
        details += f" op{self.output_padding}" if self.output_padding else ""
        details += f" g{self.groups}" if self.groups > 1 else ""
        return f"{'x'.join(map(str, self.source_shape))} to {self.outputs} {details}"


TRANSPOSED = (
    TransposedShape("dcgan", 8, (16, 16), 256, 128, window=4, stride=2, padding=1),
    TransposedShape("unet_up", 4, (32, 32), 128, 64, window=2, stride=2),
    TransposedShape("fcn", 4, (64, 64), 64, 32, window=3, stride=2, padding=1, output_padding=1),
    TransposedShape("upsample", 4, (32, 32), 128, 128, window=4, stride=2, padding=1, groups=128),
    TransposedShape("image_head", 1, (256, 256), 32, 3, window=4, stride=2, padding=1),
    TransposedShape("hifigan", 4, (512,), 256, 128, window=16, stride=8, padding=4),
    TransposedShape("vocoder_depthwise", 4, (4096,), 96, 96, window=12, stride=2, padding=5, groups=96),
    TransposedShape("nnunet_up", 2, (16, 16, 16), 128, 64, window=2, stride=2),
    TransposedShape("volume_head", 1, (64, 64, 32), 64, 1, window=3, stride=2, padding=1, output_padding=1),
)
