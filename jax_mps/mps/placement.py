"""Images and destinations in integers: what a call reads, and where its result goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_mps.mps.structs import MTLRegion
from jax_mps.ops import operands

Array = Any
Shape = tuple[int, ...]
Images = Sequence[ArrayLike]


class Target(NamedTuple):
    """Where a result goes: `block` at the position `at` of an array of `shape`."""

    shape: Shape
    at: Shape
    block: Shape

    @property
    def whole(self) -> bool:
        """Whether the block is all of the array."""
        return self.block == self.shape


class Block(NamedTuple):
    """A box of an array, `limits` excluded; the same as the array if `whole`."""

    starts: Shape
    limits: Shape
    whole: bool

    @classmethod
    def of(cls, shape: Shape, ranges: Sequence[tuple[int, int]]) -> Block:
        """The block of those ranges, where one image has no use for the first of four."""
        ranges = ranges[4 - len(shape) :]
        starts, limits = (tuple(r[i] for r in ranges) for i in range(2))
        return cls(starts, limits, limits == shape and not any(starts))

    def read(self, x: Array) -> Array:
        """The block of an array."""
        return x if self.whole else lax.slice(x, self.starts, self.limits)


def write(y: Array, target: Target, destination: Array | None) -> Array:
    """The destination with the block written; zeros around it if there is no destination."""
    if target.whole:
        return y
    if destination is None:
        after = (n - at - size for n, at, size in zip(target.shape, target.at, target.block, strict=True))
        config = [(at, rest, 0) for at, rest in zip(target.at, after, strict=True)]
        return lax.pad(y, np.zeros((), y.dtype), config)
    if 0 in target.block:
        return destination
    return lax.dynamic_update_slice(destination, y, target.at)


def clipped(region: MTLRegion | None, shape: Shape) -> tuple[list[int], list[int]]:
    """Origin and size (image, y, x) of a clip rectangle inside a destination [images, height, width, ...]."""
    if region is None:
        return [0, 0, 0], list(shape[:3])
    origin, size = region.origin, region.size
    starts = [min(o, n) for o, n in zip((origin.z, origin.y, origin.x), shape, strict=False)]
    most = (size.depth, size.height, size.width)
    lengths = [n - o if m is None else min(m, n - o) for o, m, n in zip(starts, most, shape, strict=False)]
    return starts, lengths


def four(shape: Shape) -> Shape:
    """The shape of an image as that of one image in a row of images."""
    return shape if len(shape) == 4 else (1, *shape)


def channels(name: str, available: int, first: int, most: int | None) -> int:
    """How many feature channels are read."""
    if first > available:
        raise ValueError(f"{name}={first} must be at most the {available} channels of the image")
    return available - first if most is None else min(most, available - first)


def check_room(first: int, written: int, shape: Shape, name: str) -> None:
    """Whether a destination has the channels to be written."""
    if first + written > shape[-1]:
        raise ValueError(
            f"destination_feature_channel_offset={first} leaves room for {shape[-1] - first} channels in "
            f"{name} of shape {shape}, but {written} are written"
        )


def check_destination(name: str, destination: Array, other: str, x: Array) -> None:
    """Whether two images go together: both of one dtype, both one image or both several."""
    operands.check_same_dtype(name, destination, other, x)
    if destination.ndim != x.ndim:
        raise ValueError(
            f"{name} must have as many axes as {other}, {x.ndim}, got shape {tuple(destination.shape)}"
        )


class Span(NamedTuple):
    """The window of a kernel along one axis."""

    kernel: int
    stride: int
    dilation: int

    @property
    def extent(self) -> int:
        """Pixels from the first to the last tap, both included."""
        return (self.kernel - 1) * self.dilation + 1


def aligned(*batches: Images | None) -> list[tuple[Any, ...]]:
    """Images that belong together; `None` for those of a batch that is not there."""
    lengths = {len(b) for b in batches if b is not None}
    if len(lengths) > 1:
        raise ValueError(
            "the batches of one call must have as many images each, got "
            + ", ".join(str(len(b)) for b in batches if b is not None)
        )
    (n,) = lengths
    return list(zip(*([None] * n if b is None else b for b in batches), strict=True))
