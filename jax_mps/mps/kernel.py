"""What all kernels share: immutable objects, images, destinations, and the two ways to encode.

A kernel is a value. Its settings are checked once, when it is made, and everything that follows from them and
from the shapes of a call is worked out once and kept (`forward_plan`, and its likes for gradients), so that
a call is little more than the call of the function behind it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, dataclass_transform

import jax
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_mps import geometry
from jax_mps.geometry import Axis, Window
from jax_mps.lowering import rule
from jax_mps.mps import padding as policies
from jax_mps.mps.coding import Coded
from jax_mps.mps.draw import Shown
from jax_mps.mps.states import MPSNNGradientState
from jax_mps.mps.structs import (
    MPSImageEdgeMode,
    MPSKernelOptions,
    MPSNNPaddingMethod,
    MPSOffset,
    MTLOrigin,
    MTLRegion,
    MTLSize,
    member,
)
from jax_mps.ops import operands
from jax_mps.ops.operands import FLOATS

Array = Any
Shape = tuple[int, ...]
Images = Sequence[ArrayLike]

# --- settings -----------------------------------------------------------------------------------------


def setting(
    check: Callable[[str, Any], Any], default: Any = dataclasses.MISSING, *, init: bool = True
) -> Any:
    """A member of a kernel; `check` gives its value in one form, or raises. `init`: it can be chosen."""
    return dataclasses.field(default=default, init=init, metadata={"check": check})


def count(least: int = 0, *, unbounded: bool = False) -> Callable[[str, Any], Any]:
    """An unsigned integer; `None` for as many as there are."""

    def check(name: str, value: Any) -> int | None:
        if unbounded and value is None:
            return None
        value = geometry.integer(name, value)
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
        return value

    return check


def struct(kind: type[Any], *, optional: bool = False) -> Callable[[str, Any], Any]:
    """One of the structs, or `None`."""

    def check(name: str, value: Any) -> Any:
        if isinstance(value, kind) or (optional and value is None):
            return value
        raise TypeError(f"{name} must be an {kind.__name__}{' or None' * optional}, got {value!r}")

    return check


def one_of(kind: type[Any]) -> Callable[[str, Any], Any]:
    """A member of an enumeration, its number or its name."""
    return functools.partial(member, kind)


def edge(name: str, value: Any) -> MPSImageEdgeMode:
    """An edge mode that has a meaning here."""
    mode = member(MPSImageEdgeMode, name, value)
    if mode not in (MPSImageEdgeMode.ZERO, MPSImageEdgeMode.CLAMP):
        raise ValueError(
            f"{name} must be ZERO or CLAMP, got {mode.name}: only MPSNNPad has a meaning for the others"
        )
    return mode


def policy(name: str, value: Any) -> MPSNNPaddingMethod:
    """A padding policy that has a meaning here."""
    return policies.check(name, member(MPSNNPaddingMethod, name, value))


def anything(name: str, value: Any) -> Any:
    """What needs no check, or has another."""
    del name
    return value


def a_device(name: str, value: Any) -> Any:
    """A device of JAX, or `None`."""
    if value is not None and not isinstance(value, jax.Device):
        raise TypeError(f"{name} must be None or a jax.Device, got {value!r}")
    return value


# --- kernels as values --------------------------------------------------------------------------------

K = TypeVar("K", bound="type[MPSKernel]")


def _refuse(self: Any, name: str, value: Any = None) -> None:
    raise dataclasses.FrozenInstanceError(
        f"{type(self).__name__} does not change, so {name} cannot be set: "
        f"make a changed kernel with copy({name}=...)"
    )


@dataclass_transform(kw_only_default=True, frozen_default=True, eq_default=False, field_specifiers=(setting,))
def kernel_class(cls: K) -> K:
    """Makes a class of kernels: initialiser, immutability, and its place as a node of JAX's pytrees."""
    made = dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)(cls)
    made.__setattr__ = made.__delattr__ = _refuse  # type: ignore[method-assign]
    jax.tree_util.register_pytree_node(
        made, lambda kernel: kernel._flatten(), lambda static, leaves: static._with_leaves(leaves)
    )
    return made  # type: ignore[return-value]


@kernel_class
class MPSKernel(Coded, Shown):
    """The base of every kernel. Kernels do not change; `copy` makes changed ones.

    Kernels hash and are equal by value, so they may be static arguments of `jax.jit`, parts of its other
    arguments (as pytrees, of which only the parameters of convolutions are leaves), or simply closed over.

    Args:
      device: where to compute: a `jax.Device`, or `None` for where the images are.
      options: `ALLOW_REDUCED_PRECISION` lets a transposed convolution multiply with less than float32 where
        the platform has faster units for that; without it, JAX's own configuration decides. The others have
        no meaning here.
      implementation: `None` chooses; "native" or "xla" forces a path.
    """

    device: jax.Device | None = setting(a_device, None)
    options: MPSKernelOptions = setting(one_of(MPSKernelOptions), MPSKernelOptions.NONE)
    implementation: str | None = setting(anything, None)

    _leaves: ClassVar[tuple[str, ...]] = ()
    """The attributes that hold arrays."""

    _key: Any = setting(anything, None, init=False)
    _hash: int = setting(anything, 0, init=False)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(
                self, field.name, field.metadata["check"](field.name, getattr(self, field.name))
            )
        if self.implementation not in rule.IMPLEMENTATIONS:
            rule.check_implementation(self.implementation, static=True)
        self._check()
        self._finish()

    def _check(self) -> None:
        """The rules that concern several members, or a member of one class."""

    def _finish(self) -> None:
        """Keeps what every call needs."""
        key = (type(self), *self._statics())
        object.__setattr__(self, "_key", key)
        object.__setattr__(self, "_hash", hash(key))

    def _statics(self) -> tuple[Any, ...]:
        """Everything but the arrays."""
        return tuple(self.settings().values())

    def settings(self) -> dict[str, Any]:
        """The members that the initialiser takes, and their values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}

    def copy(self, **changes: Any) -> Self:
        """A kernel like this one with some members changed.

        Args:
          **changes: the members to change, as the initialiser takes them.

        Raises:
          TypeError: there is no such member.
          ValueError: as the initialiser.
        """
        return type(self)(**(self.settings() | changes))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(self) is not type(other) or self._key != other._key:
            return False
        return all(_equal(getattr(self, name), getattr(other, name)) for name in self._leaves)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        changed = [f"{name}={value!r}" for name, value in self.settings().items() if value != defaults[name]]
        return f"{type(self).__name__}({', '.join(changed)})"

    def _bare(self) -> Self:
        """The kernel without its arrays."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Hashes differ from process to process, so a pickled kernel is made again.
        return functools.partial(type(self), **self.settings()), ()

    # As a pytree

    def _flatten(self) -> tuple[tuple[Any, ...], Any]:
        return tuple(getattr(self, name) for name in self._leaves), self

    def _with_leaves(self, leaves: Sequence[Any]) -> Self:
        del leaves
        return self

    # Images

    def _image(self, name: str, value: ArrayLike, dtypes: Sequence[str] = FLOATS) -> Array:
        x = operands.array(name, value, dtypes)
        if x.ndim not in (3, 4):
            raise ValueError(
                f"{name} must be an image [height, width, channels] or images "
                f"[number, height, width, channels], got shape {x.shape}"
            )
        return x if self.device is None else jax.device_put(x, self.device)


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if a is None or b is None or isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return False
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and np.array_equal(a, b)


# --- destinations -------------------------------------------------------------------------------------


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


# --- forward kernels ----------------------------------------------------------------------------------


class ForwardPlan(NamedTuple):
    """A forward call in integers: what is read, the windows on it, and where the result goes."""

    read: Block
    window: Window
    start: int
    target: Target
    how: Any
    """What the class itself derives from the windows."""
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

    offset: MPSOffset = setting(struct(MPSOffset), MPSOffset())
    clip_rect: MTLRegion | None = setting(struct(MTLRegion, optional=True), None)
    destination_feature_channel_offset: int = setting(count(), 0)
    source_feature_channel_offset: int = setting(count(), 0)
    source_feature_channel_max_count: int | None = setting(count(unbounded=True), None)
    edge_mode: MPSImageEdgeMode = setting(edge, MPSImageEdgeMode.ZERO)
    padding: MPSNNPaddingMethod = setting(policy, policies.DEFAULT)

    is_backwards: ClassVar[bool] = False
    """Whether strides count pixels of the destination."""

    _dtypes: ClassVar[tuple[str, ...]] = FLOATS

    # What a class says about itself

    def _spans(self) -> tuple[Span, Span]:
        """The window along y and x."""
        raise NotImplementedError

    def _policy(self, name: str, length: int, span: Span) -> tuple[int, int]:
        return policies.sized(self.padding, name, length, span.extent, span.stride)

    def _with_offset(self, y: int, x: int) -> Self:
        return self.copy(offset=MPSOffset(x=x, y=y, z=self.offset.z))

    def _axis(self, i: int, length: int, windows: int) -> Axis:
        raise NotImplementedError

    def _written(self, read: int) -> int:
        """How many channels are written when that many are read."""
        return read

    def _how(self, window: Window) -> Any:
        """What else `_run` needs to know, from the windows."""
        raise NotImplementedError

    def _run(self, x: Array, plan: ForwardPlan) -> Array:
        """The block of the destination, from the block of the source."""
        raise NotImplementedError

    # Encoding

    def encode(self, source_image: ArrayLike, destination_image: ArrayLike | None = None) -> jax.Array:
        """Runs the kernel.

        Without a destination, `padding` gives the result its size and the windows their place, in stead of
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
            return self._encode(x, forward_plan(self._bare(), x.shape, None), None)
        destination = self._image("destination_image", destination_image, self._dtypes)
        check_destination("destination_image", destination, "source_image", x)
        return self._encode(x, forward_plan(self._bare(), x.shape, destination.shape), destination)

    def _encode(self, x: Array, plan: ForwardPlan, destination: Array | None) -> Array:
        if 0 in plan.target.block:
            y = lax.full(plan.target.block, np.zeros((), x.dtype))
        else:
            y = self._run(plan.read.read(x), plan)
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
        plan = forward_plan(self._bare(), shape, to)
        return MPSNNGradientState(
            kernel=in_effect(plan), source_shape=shape, destination_shape=plan.target.shape
        )

    def destination_image_descriptor(self, source_image: Any) -> jax.ShapeDtypeStruct:
        """Shape and dtype of what `encode` of such a source returns without a destination."""
        plan = forward_plan(self._bare(), tuple(np.shape(source_image)), None)
        return jax.ShapeDtypeStruct(plan.target.shape, source_image.dtype)

    def placed(self, source_image: Any) -> Self:
        """This kernel with the offset that `padding` gives it for such a source."""
        _, height, width, _ = four(tuple(np.shape(source_image)))
        places = [
            self._policy(name, length, span)[1]
            for name, length, span in zip("yx", (height, width), self._spans(), strict=True)
        ]
        return self._with_offset(*places)


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


@functools.lru_cache(maxsize=4096)
def forward_plan(kernel: MPSCNNKernel, shape: Shape, destination: Shape | None) -> ForwardPlan:
    """Places the windows of a call: without a destination, as the padding policy says."""
    rule.check_implementation(kernel.implementation, static=all(isinstance(n, int) for n in shape))
    images, height, width, available = four(shape)
    z, spans = kernel.offset.z, kernel._spans()
    if not 0 <= z <= images:
        raise ValueError(f"offset.z={z} must be one of the {images} source images")
    first = kernel.source_feature_channel_offset
    read = channels(
        "source_feature_channel_offset", available, first, kernel.source_feature_channel_max_count
    )
    written = kernel._written(read)
    at = kernel.destination_feature_channel_offset
    if destination is None:
        sizes = [
            kernel._policy(name, n, span) for name, n, span in zip("yx", (height, width), spans, strict=True)
        ]
        kernel = kernel._with_offset(*(offset for _, offset in sizes))
        result: Shape = (images - z, *(n for n, _ in sizes), at + written)
    else:
        result = four(destination)
    check_room(at, written, result, "destination_image")
    origin, (depth, *lengths) = clipped(kernel.clip_rect, result)
    if z + depth > images:
        raise ValueError(
            f"offset.z={z} and a clip rectangle of {depth} images need {z + depth} source images, "
            f"got {images}"
        )
    window = Window(
        tuple(
            kernel._axis(i, n, out) for i, (n, out) in enumerate(zip((height, width), lengths, strict=True))
        )
    )
    drop = 4 - len(shape)
    return ForwardPlan(
        Block.of(shape, [(z, z + depth), (0, height), (0, width), (first, first + read)]),
        window,
        1 - drop,
        Target(result[drop:], (*origin, at)[drop:], (depth, *lengths, written)[drop:]),
        kernel._how(window),
        kernel,
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


# --- gradient kernels ---------------------------------------------------------------------------------


@kernel_class
class MPSCNNBinaryKernel(MPSKernel):
    """The base of kernels of two images, the primary and the secondary.

    Args:
      primary_offset: the position in the primary image that belongs to the origin of the clip rectangle.
      secondary_offset: the same in the secondary image.
      clip_rect: the part of the destination that is written; `None` is all of it.
      destination_feature_channel_offset: the first channel that is written.
      primary_source_feature_channel_offset: the first channel of the primary image that is read.
      primary_source_feature_channel_max_count: how many are read at most; `None` is all that are left.
      secondary_source_feature_channel_offset: the first channel of the secondary image that is read.
      secondary_source_feature_channel_max_count: how many are read at most.
      primary_edge_mode: what a tap outside the primary image reads.
      secondary_edge_mode: what a tap outside the secondary image reads.
      padding: the padding policy. The gradient kernels here have no use for it: the source image sizes their
        result.
    """

    primary_offset: MPSOffset = setting(struct(MPSOffset), MPSOffset())
    secondary_offset: MPSOffset = setting(struct(MPSOffset), MPSOffset())
    clip_rect: MTLRegion | None = setting(struct(MTLRegion, optional=True), None)
    destination_feature_channel_offset: int = setting(count(), 0)
    primary_source_feature_channel_offset: int = setting(count(), 0)
    primary_source_feature_channel_max_count: int | None = setting(count(unbounded=True), None)
    secondary_source_feature_channel_offset: int = setting(count(), 0)
    secondary_source_feature_channel_max_count: int | None = setting(count(unbounded=True), None)
    primary_edge_mode: MPSImageEdgeMode = setting(edge, MPSImageEdgeMode.ZERO)
    secondary_edge_mode: MPSImageEdgeMode = setting(edge, MPSImageEdgeMode.ZERO)
    padding: MPSNNPaddingMethod = setting(policy, policies.DEFAULT)

    is_backwards: ClassVar[bool] = True
    """Whether strides count pixels of the destination."""

    def _spans(self) -> tuple[Span, Span]:
        """The window of the forward kernel along y and x."""
        raise NotImplementedError

    # The primary image is read a pixel at a time; the windows lie on the secondary one.
    primary_kernel_width = property(lambda self: 1, doc="Width of the window on the primary image: 1.")
    primary_kernel_height = property(lambda self: 1, doc="Height of the window on the primary image: 1.")
    primary_stride_in_pixels_x = property(lambda self: 1, doc="Columns from a window to the next: 1.")
    primary_stride_in_pixels_y = property(lambda self: 1, doc="Rows from a window to the next: 1.")
    primary_dilation_rate_x = property(lambda self: 1, doc="Columns from a tap to the next: 1.")
    primary_dilation_rate_y = property(lambda self: 1, doc="Rows from a tap to the next: 1.")
    secondary_kernel_width = property(
        lambda self: self._spans()[1].kernel, doc="Width of the window on the secondary image."
    )
    secondary_kernel_height = property(
        lambda self: self._spans()[0].kernel, doc="Height of the window on the secondary image."
    )
    secondary_stride_in_pixels_x = property(
        lambda self: self._spans()[1].stride, doc="Columns from a window to the next."
    )
    secondary_stride_in_pixels_y = property(
        lambda self: self._spans()[0].stride, doc="Rows from a window to the next."
    )
    secondary_dilation_rate_x = property(
        lambda self: self._spans()[1].dilation, doc="Columns from a tap to the next."
    )
    secondary_dilation_rate_y = property(
        lambda self: self._spans()[0].dilation, doc="Rows from a tap to the next."
    )


@kernel_class
class MPSCNNGradientKernel(MPSCNNBinaryKernel):
    """The base of the gradient kernels: the primary image is the gradient, the secondary the source.

    Args:
      kernel_offset_x: columns by which the windows are moved in the gradient with its inserted zeros.
      kernel_offset_y: rows, likewise.
    """

    kernel_offset_x: int = setting(geometry.integer, 0)
    kernel_offset_y: int = setting(geometry.integer, 0)

    _dtypes: ClassVar[tuple[str, ...]] = FLOATS

    def _operands(self, source_gradient: ArrayLike, source_image: ArrayLike) -> tuple[Array, Array]:
        g = self._image("source_gradient", source_gradient)
        x = self._image("source_image", source_image)
        check_destination("source_gradient", g, "source_image", x)
        return g, x

    def _check_state(self, state: MPSNNGradientState, forward: type[MPSCNNKernel]) -> None:
        """Whether this kernel undoes the call of the state."""
        kernel = state.kernel
        if not isinstance(kernel, forward):
            raise ValueError(
                f"gradient_state of a {type(self).__name__} must be that of an {forward.__name__}, "
                f"got that of an {type(kernel).__name__}"
            )
        if kernel._spans() != self._spans():
            raise ValueError(
                "gradient_state must be that of a kernel with the same window, (kernel, stride, dilation) = "
                f"{[tuple(s) for s in self._spans()]} along y and x, got one with "
                f"{[tuple(s) for s in kernel._spans()]}"
            )
