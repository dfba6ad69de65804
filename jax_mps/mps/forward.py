"""The base of the forward kernels, and the plan of a call.

`encode` goes the same way for every kernel. `forward_plan` asks the class where its windows lie, and gives
the call in integers; it does so once for a kernel and the shapes of a call. Then the source is cut to what is
read, `_compute` of the class gives the block of the result, and the block goes into the destination.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, NamedTuple, Self

import jax
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_mps.geometry import Axis, Window
from jax_mps.lowering import rule
from jax_mps.mps import padding as policies
from jax_mps.mps.kernel import MPSKernel, kernel_class
from jax_mps.mps.placement import (
    Array,
    Block,
    Images,
    Shape,
    Span,
    Target,
    aligned,
    channels,
    check_destination,
    check_room,
    clipped,
    four,
    write,
)
from jax_mps.mps.settings import count, edge, policy, setting, struct
from jax_mps.mps.states import MPSNNGradientState
from jax_mps.mps.structs import MPSImageEdgeMode, MPSNNPaddingMethod, MPSOffset, MTLOrigin, MTLRegion, MTLSize
from jax_mps.ops.operands import FLOATS


class ForwardPlan(NamedTuple):
    """A forward call in integers: what is read, the windows on it, and where the result goes."""

    read: Block
    window: Window
    start: int
    target: Target
    edge_rule: Any
    """What the class itself derives from the windows, see `_edge_rule`."""
    kernel: Any
    """The kernel with the offset that a policy gave it."""


@kernel_class
class MPSCNNKernel(MPSKernel):
    """The base of the forward kernels.

    Args:
      offset: the position in the source that belongs to the origin of the clip rectangle: the centre of the
        first window, and in `z` the first source image.
      clip_rect: the part of the destination that is written; `None` is all of it. It is cut to the
        destination. Its origin does not move the windows.
      destination_feature_channel_offset: the first channel that is written.
      source_feature_channel_offset: the first channel that is read.
      source_feature_channel_max_count: how many channels are read at most; `None` is all that are left.
      edge_mode: what a tap outside the image reads: 0 (`ZERO`), or the nearest pixel (`CLAMP`).
      padding: sizes the result, and replaces x and y of `offset`, where no destination is given.
    """

    offset: MPSOffset = setting(struct(MPSOffset), default=MPSOffset())
    clip_rect: MTLRegion | None = setting(struct(MTLRegion, optional=True), default=None)
    destination_feature_channel_offset: int = setting(count(), default=0)
    source_feature_channel_offset: int = setting(count(), default=0)
    source_feature_channel_max_count: int | None = setting(count(unbounded=True), default=None)
    edge_mode: MPSImageEdgeMode = setting(edge, default=MPSImageEdgeMode.ZERO)
    padding: MPSNNPaddingMethod = setting(policy, default=policies.DEFAULT)

    is_backwards: ClassVar[bool] = False
    """Whether strides count pixels of the destination."""

    _dtypes: ClassVar[tuple[str, ...]] = FLOATS

    # What a class says about itself: `forward_plan` asks in this order, and `_encode` asks the last

    def _spans(self) -> tuple[Span, Span]:
        """The window along y and x."""
        raise NotImplementedError

    def _channels_written(self, read: int) -> int:
        """How many channels are written when that many are read."""
        return read

    def _place_by_policy(self, name: str, length: int, span: Span) -> tuple[int, int]:
        """How many windows the padding policy wants along an axis, and the offset of the first."""
        return policies.sized(self.padding, name, length, span.extent, span.stride)

    def _places_by_policy(self, height: int, width: int) -> list[tuple[int, int]]:
        """`_place_by_policy` along y and x."""
        return [
            self._place_by_policy(name, length, span)
            for name, length, span in zip("yx", (height, width), self._spans(), strict=True)
        ]

    def _with_offset(self, y: int, x: int) -> Self:
        """This kernel with the offset that the policy gave."""
        return self.copy(offset=MPSOffset(x=x, y=y, z=self.offset.z))

    def _axis(self, i: int, length: int, windows: int) -> Axis:
        """The windows along axis i of (y, x), on so many pixels."""
        raise NotImplementedError

    def _edge_rule(self, window: Window) -> Any:
        """What the function behind the kernel takes for the edge mode, given the windows."""
        raise NotImplementedError

    def _compute(self, x: Array, plan: ForwardPlan) -> Array:
        """The block of the destination, from the block of the source."""
        raise NotImplementedError

    # Encoding

    def encode(self, source_image: ArrayLike, destination_image: ArrayLike | None = None) -> jax.Array:
        """Runs the kernel.

        Without a destination, `padding` gives the result its size and the windows their place, instead of
        `offset.x` and `offset.y`; channels before `destination_feature_channel_offset`, and pixels outside
        `clip_rect`, are 0. With a destination, `padding` has no meaning: the result is the destination, with
        the clip rectangle and the channels concerned written anew.

        Args:
          source_image: an image `[height, width, channels]`, or images `[number, height, width, channels]`.
          destination_image: as many axes as the source, of its dtype.

        Returns:
          The destination.

        Raises:
          TypeError: an unsupported dtype, or dtypes that differ.
          ValueError: `offset.z` and the clip rectangle ask for more source images than there are, the
            destination has too few channels, or the result would be empty.
        """
        x = self._image("source_image", source_image, self._dtypes)
        if destination_image is None:
            return self._encode(x, forward_plan(self._without_arrays(), x.shape, None), None)
        destination = self._image("destination_image", destination_image, self._dtypes)
        check_destination("destination_image", destination, "source_image", x)
        return self._encode(x, forward_plan(self._without_arrays(), x.shape, destination.shape), destination)

    def _encode(self, x: Array, plan: ForwardPlan, destination: Array | None) -> Array:
        if 0 in plan.target.block:
            y = lax.full(plan.target.block, np.zeros((), x.dtype))
        else:
            y = self._compute(plan.read.read(x), plan)
        return write(y, plan.target, destination)

    def encode_with_state(
        self, source_image: ArrayLike, destination_image: ArrayLike | None = None
    ) -> tuple[jax.Array, Any]:
        """`encode`, and the state with which the gradient kernel undoes that call."""
        y = self.encode(source_image, destination_image)
        return y, self.result_state(source_image, destination_image)

    def encode_batch(
        self, source_images: Images, destination_images: Images | None = None
    ) -> list[jax.Array]:
        """`encode` of every image of an `MPSImageBatch`."""
        return [self.encode(*images) for images in aligned(source_images, destination_images)]

    def encode_batch_with_states(
        self, source_images: Images, destination_images: Images | None = None
    ) -> tuple[list[jax.Array], list[Any]]:
        """`encode_with_state` of every image of an `MPSImageBatch`."""
        pairs = [self.encode_with_state(*images) for images in aligned(source_images, destination_images)]
        return [y for y, _ in pairs], [state for _, state in pairs]

    def result_state(self, source_image: Any, destination_image: Any = None) -> Any:
        """The state that `encode_with_state` returns for images of these shapes."""
        shape = tuple(np.shape(source_image))
        to = None if destination_image is None else tuple(np.shape(destination_image))
        return self._state(shape, to)

    def _state(self, shape: Shape, to: Shape | None) -> Any:
        plan = forward_plan(self._without_arrays(), shape, to)
        return MPSNNGradientState(
            kernel=in_effect(plan), source_shape=shape, destination_shape=plan.target.shape
        )

    def destination_image_descriptor(self, source_image: Any) -> jax.ShapeDtypeStruct:
        """Shape and dtype of what `encode` of such a source returns without a destination."""
        plan = forward_plan(self._without_arrays(), tuple(np.shape(source_image)), None)
        return jax.ShapeDtypeStruct(plan.target.shape, source_image.dtype)

    def placed(self, source_image: Any) -> Self:
        """This kernel with the offset that `padding` gives it for such a source."""
        _, height, width, _ = four(tuple(np.shape(source_image)))
        return self._with_offset(*(offset for _, offset in self._places_by_policy(height, width)))


@functools.lru_cache(maxsize=4096)
def forward_plan(kernel: MPSCNNKernel, shape: Shape, destination: Shape | None) -> ForwardPlan:
    """Places the windows of a call: without a destination, as the padding policy says."""
    rule.check_implementation(kernel.implementation, static=all(isinstance(n, int) for n in shape))
    images, height, width, available = four(shape)
    z = kernel.offset.z
    if not 0 <= z <= images:
        raise ValueError(f"offset.z={z} must be one of the {images} source images")
    first = kernel.source_feature_channel_offset
    read = channels(
        "source_feature_channel_offset", available, first, kernel.source_feature_channel_max_count
    )
    written = kernel._channels_written(read)
    at = kernel.destination_feature_channel_offset
    if destination is None:
        places = kernel._places_by_policy(height, width)
        kernel = kernel._with_offset(*(offset for _, offset in places))
        result: Shape = (images - z, *(n for n, _ in places), at + written)
    else:
        result = four(destination)
    check_room(at, written, result, "destination_image")
    origin, (depth, *lengths) = clipped(kernel.clip_rect, result)
    if z + depth > images:
        raise ValueError(
            f"offset.z={z} and a clip rectangle of {depth} images need {z + depth} source images, "
            f"got {images}"
        )
    window = Window((kernel._axis(0, height, lengths[0]), kernel._axis(1, width, lengths[1])))
    drop = 4 - len(shape)
    return ForwardPlan(
        read=Block.of(shape, [(z, z + depth), (0, height), (0, width), (first, first + read)]),
        window=window,
        start=1 - drop,
        target=Target(result[drop:], (*origin, at)[drop:], (depth, *lengths, written)[drop:]),
        edge_rule=kernel._edge_rule(window),
        kernel=kernel,
    )


@functools.lru_cache(maxsize=4096)
def in_effect(plan: ForwardPlan) -> Any:
    """The kernel of a call with numbers for everything that a policy or a bound left open."""
    target, (first, last) = plan.target, (plan.read.starts[-1], plan.read.limits[-1])
    z, y, x, _ = target.at if len(target.at) == 4 else (0, *target.at)
    depth, height, width, _ = four(target.block)
    return plan.kernel.copy(
        clip_rect=MTLRegion(
            origin=MTLOrigin(z=z, y=y, x=x), size=MTLSize(depth=depth, height=height, width=width)
        ),
        source_feature_channel_max_count=last - first,
    )
