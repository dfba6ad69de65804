"""What `jax_mps.flax.linen` and `jax_mps.flax.nnx` share: Flax's pooling functions, and both convolutions.

Defaults and meaning are Flax's. Beyond its arguments there are keyword arguments with those of `jax_mps`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, overload

import jax
import jax.numpy as jnp
from jax import dtypes, lax
from jax.typing import ArrayLike, DTypeLike

import jax_mps
from jax_mps import conventions, geometry
from jax_mps.geometry import Ints, Padding
from jax_mps.ops.convolution import UNROUNDED, Precision, unrounded
from jax_mps.ops.max_unpooling import max_unpool
from jax_mps.ops.operands import COMPLEX, FLOAT8, FLOATS, INTEGERS, WIDE_INTEGERS, array

__all__ = ["avg_pool", "l2_pool", "max_pool", "max_unpool", "min_pool"]

PaddingConvention = Literal["flax", "torch"]

_ORDERED = FLOATS + FLOAT8 + INTEGERS + WIDE_INTEGERS
"""Types that have a maximum."""

# --- pooling ------------------------------------------------------------------------------------------


@overload
def max_pool(
    inputs: ArrayLike,
    window_shape: Ints,
    strides: Ints | None = ...,
    padding: Padding = ...,
    *,
    window_dilation: Ints = ...,
    ceil_mode: bool = ...,
    return_indices: Literal[False] = ...,
    implementation: str | None = ...,
) -> jax.Array: ...
@overload
def max_pool(
    inputs: ArrayLike,
    window_shape: Ints,
    strides: Ints | None = ...,
    padding: Padding = ...,
    *,
    window_dilation: Ints = ...,
    ceil_mode: bool = ...,
    return_indices: Literal[True],
    implementation: str | None = ...,
) -> tuple[jax.Array, jax.Array]: ...
def max_pool(
    inputs: ArrayLike,
    window_shape: Ints,
    strides: Ints | None = None,
    padding: Padding = "VALID",
    *,
    window_dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    implementation: str | None = None,
) -> Any:
    """Flax's `max_pool`: the maximum of every window.

    As `jax_mps.max_pool`, with Flax's default of 1 for `strides`. Unlike Flax it takes windows as lists and
    ints too, pads of arrays with any number of batch axes, and dilated windows; it refuses a window that has
    no tap in the image, where Flax gives -inf.

    Args:
      inputs: array of shape `(*batch, *spatial, channels)`, of any dtype of `jax_mps.max_pool`.
      window_shape: taps of a window along each spatial axis.
      strides: pixels from one window to the next; None is 1, not the size of the window.
      padding: "VALID", "SAME", "SAME_LOWER", an int for all sides, or a `(low, high)` pair for each
        spatial axis.
      window_dilation: pixels from one tap to the next.
      ceil_mode: rounds the number of windows up as PyTorch does.
      return_indices: also return where the maxima are, for `max_unpool`.
      implementation: None chooses; "native" or "xla" forces a path.

    Returns:
      The pooled array, of the type of `inputs`; with `return_indices` a pair of it and the int32 positions.

    Raises:
      TypeError: an argument has the wrong type or an unsupported dtype.
      ValueError: as for `jax_mps.max_pool`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_mps.flax import linen as nn
      >>> x = jnp.array([1., 5., 2., 4., 4., 3.]).reshape(1, 6, 1)
      >>> nn.max_pool(x, (2,), strides=(2,)).ravel()
      Array([5., 4., 4.], dtype=float32)
      >>> nn.max_pool(x, (2,)).ravel()
      Array([5., 5., 4., 4., 4.], dtype=float32)
    """
    return jax_mps.max_pool(  # type: ignore[misc, call-overload]
        array("inputs", inputs, _ORDERED),
        window_shape,
        strides=1 if strides is None else strides,
        padding=padding,
        window_dilation=window_dilation,
        ceil_mode=ceil_mode,
        return_indices=return_indices,
        implementation=implementation,
    )


def min_pool(
    inputs: ArrayLike,
    window_shape: Ints,
    strides: Ints | None = None,
    padding: Padding = "VALID",
    *,
    window_dilation: Ints = 1,
    ceil_mode: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Flax's `min_pool`: the minimum of every window.

    The first of several equal minima gets the gradient; NaN is the minimum of its window.

    Args:
      inputs: as for `max_pool`, and so are the arguments that follow.
      window_shape: taps of a window along each spatial axis.
      strides: pixels from one window to the next; None is 1.
      padding: "VALID", "SAME", "SAME_LOWER", an int, or pairs.
      window_dilation: pixels from one tap to the next.
      ceil_mode: rounds the number of windows up as PyTorch does.
      implementation: None chooses; "native" or "xla" forces a path.

    Returns:
      The pooled array, of the type of `inputs`.

    Raises:
      TypeError: an argument has the wrong type or an unsupported dtype.
      ValueError: as for `max_pool`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_mps.flax import linen as nn
      >>> x = jnp.array([1., 5., 2., 4., 4., 3.]).reshape(1, 6, 1)
      >>> nn.min_pool(x, (2,), strides=(2,)).ravel()
      Array([1., 2., 3.], dtype=float32)
    """
    x = array("inputs", inputs, _ORDERED)
    # The complement turns the order of integers round as the negative does, and never overflows.
    reverse = lax.neg if jnp.issubdtype(x.dtype, jnp.floating) else lax.bitwise_not
    return reverse(
        max_pool(
            reverse(x),
            window_shape,
            strides,
            padding,
            window_dilation=window_dilation,
            ceil_mode=ceil_mode,
            implementation=implementation,
        )
    )


def avg_pool(
    inputs: ArrayLike,
    window_shape: Ints,
    strides: Ints | None = None,
    padding: Padding = "VALID",
    count_include_pad: bool = True,
    *,
    window_dilation: Ints = 1,
    ceil_mode: bool = False,
    divisor_override: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Flax's `avg_pool`: the average of every window.

    As `jax_mps.avg_pool`, with Flax's default of 1 for `strides`. Where it differs from Flax, Flax is wrong:
    half precision is summed in float32 and does not saturate, the result always has the type of `inputs`,
    and `count_include_pad=False` compiles no sum over ones.

    Args:
      inputs: array of shape `(*batch, *spatial, channels)`; float32, float64, float16 or bfloat16, complex
        numbers, or integers, whose average is a float.
      window_shape: taps of a window along each spatial axis.
      strides: pixels from one window to the next; None is 1, not the size of the window.
      padding: "VALID", "SAME", "SAME_LOWER", an int for all sides, or a `(low, high)` pair for each
        spatial axis.
      count_include_pad: whether taps in the padding count in the divisor.
      window_dilation: pixels from one tap to the next.
      ceil_mode: rounds the number of windows up as PyTorch does.
      divisor_override: what to divide by instead of the number of taps.
      implementation: None chooses; "native" or "xla" forces a path.

    Returns:
      The pooled array, of the type of `inputs` if that is a float.

    Raises:
      TypeError: an argument has the wrong type or an unsupported dtype.
      ValueError: as for `jax_mps.avg_pool`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_mps.flax import linen as nn
      >>> x = jnp.array([6., 12., 18., 24.]).reshape(1, 4, 1)
      >>> nn.avg_pool(x, (2,), strides=(2,)).ravel()
      Array([ 9., 21.], dtype=float32)
      >>> nn.avg_pool(x, (3,), padding="SAME", count_include_pad=False).ravel()
      Array([ 9., 12., 18., 21.], dtype=float32)
    """
    x = array("inputs", inputs, FLOATS + COMPLEX + INTEGERS + WIDE_INTEGERS)
    return jax_mps.avg_pool(
        x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(float),
        window_shape,
        strides=1 if strides is None else strides,
        padding=padding,
        window_dilation=window_dilation,
        count_include_pad=count_include_pad,
        ceil_mode=ceil_mode,
        divisor_override=divisor_override,
        implementation=implementation,
    )


def l2_pool(
    inputs: ArrayLike,
    window_shape: Ints,
    strides: Ints | None = None,
    padding: Padding = "VALID",
    *,
    window_dilation: Ints = 1,
    ceil_mode: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """The Euclidean norm of every window: `jax_mps.l2_pool` with the signature of Flax's `max_pool`.

    Args:
      inputs: array of shape `(*batch, *spatial, channels)`; float32, float64, float16 or bfloat16.
      window_shape: as for `max_pool`, and so are the arguments that follow.
      strides: pixels from one window to the next; None is 1.
      padding: "VALID", "SAME", "SAME_LOWER", an int, or pairs.
      window_dilation: pixels from one tap to the next.
      ceil_mode: rounds the number of windows up as PyTorch does.
      implementation: None chooses; "native" or "xla" forces a path.

    Returns:
      The pooled array, of the type of `inputs`. Its gradient at a window of zeros is 0.

    Raises:
      TypeError: an argument has the wrong type or an unsupported dtype.
      ValueError: as for `jax_mps.l2_pool`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_mps.flax import linen as nn
      >>> x = jnp.array([3., 4., 0., 0.]).reshape(1, 4, 1)
      >>> nn.l2_pool(x, (2,), strides=(2,)).ravel()
      Array([5., 0.], dtype=float32)
    """
    return jax_mps.l2_pool(
        array("inputs", inputs, FLOATS),
        window_shape,
        strides=1 if strides is None else strides,
        padding=padding,
        window_dilation=window_dilation,
        ceil_mode=ceil_mode,
        implementation=implementation,
    )


# --- the ordinary convolution of a layer --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Convolution:
    """`lax.conv_general_dilated` as Flax's `Conv` calls it, channels last, by `jax_mps.conv`.

    What `jax_mps.conv` does not compute is left to stock JAX.

    Attributes:
      implementation: as for `jax_mps.conv`.
      adds_bias: whether results of half precision stay in float32, for the layer to add its bias and round.
    """

    implementation: str | None = None
    adds_bias: bool = False

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        *arguments: Any,
        preferred_element_type: DTypeLike | None = None,
        **options: Any,
    ) -> jax.Array:
        """The convolution of `lhs` with `rhs`, of the arguments of `lax.conv_general_dilated`."""

        def convolve(lhs: jax.Array, rhs: jax.Array, dtype: DTypeLike | None) -> jax.Array:
            return self._convolve(lhs, rhs, *arguments, preferred_element_type=dtype, **options)

        dtype = lhs.dtype if preferred_element_type is None else _canonical(preferred_element_type)
        if self.adds_bias and is_half(dtype) and lhs.dtype == rhs.dtype:
            return unrounded(convolve, lhs, rhs, dtype)
        return convolve(lhs, rhs, preferred_element_type)

    def _convolve(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        window_strides: Sequence[int],
        padding: str | Sequence[tuple[int, int]],
        *,
        lhs_dilation: Sequence[int],
        rhs_dilation: Sequence[int],
        feature_group_count: int,
        precision: Precision,
        preferred_element_type: DTypeLike | None = None,
        dimension_numbers: Any,
        **others: Any,
    ) -> jax.Array:
        """The same; `others` are arguments of newer versions of JAX."""
        steps = {"strides": window_strides, "input_dilation": lhs_dilation, "kernel_dilation": rhs_dilation}
        for name, value in steps.items():
            geometry.per_axis(name, geometry.freeze(name, value), rhs.ndim - 2)
        if isinstance(padding, str) and all(e == 1 for e in lhs_dilation):
            extents = [(k - 1) * d + 1 for k, d in zip(rhs.shape[:-2], rhs_dilation, strict=True)]
            padding = lax.padtype_to_pads(lhs.shape[1:-1], extents, window_strides, padding)
        reason = _obstacle(lhs, rhs, padding, lhs_dilation, rhs_dilation, preferred_element_type, others)
        if not reason:
            return jax_mps.conv(
                lhs,
                rhs,
                strides=window_strides,
                padding=padding,
                input_dilation=lhs_dilation,
                kernel_dilation=rhs_dilation,
                groups=feature_group_count,
                precision=precision,
                preferred_element_type=_canonical(preferred_element_type),
                implementation=self.implementation,
            )
        if self.implementation not in (None, "xla"):
            raise ValueError(f"implementation={self.implementation!r} cannot be had: {reason}")
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            precision=precision,
            preferred_element_type=jnp.float32
            if preferred_element_type is UNROUNDED
            else preferred_element_type,
            **others,
        )


@dataclasses.dataclass(frozen=True)
class WideBias:
    """Flax's `promote_dtype`, but that a bias of half precision is given as float32.

    Attributes:
      promote_dtype: the function that promotes.
    """

    promote_dtype: Callable[..., Sequence[jax.Array | None]]

    def __call__(self, *arrays: Any, dtype: Any) -> tuple[jax.Array | None, ...]:
        """What `promote_dtype` makes of an image, a kernel and a bias."""
        image, kernel, bias = self.promote_dtype(*arrays, dtype=dtype)
        if bias is not None and is_half(bias.dtype):
            bias = bias.astype(jnp.float32)
        return image, kernel, bias


def adding_wide_bias(layer: Any) -> contextlib.AbstractContextManager[Any]:
    """Lets a layer of an old Flax, without `promote_dtype`, add a bias of half precision to float32 sums."""
    return (
        contextlib.nullcontext() if hasattr(layer, "promote_dtype") else jax.numpy_dtype_promotion("standard")
    )


def is_half(dtype: Any) -> bool:
    """Whether it is a floating dtype that is summed in a wider one."""
    return jnp.dtype(dtype).name in FLOATS and jnp.dtype(dtype).itemsize < 4


def round_half(y: jax.Array, promote: Callable[[], Any], preferred: DTypeLike | None) -> jax.Array:
    """The result of a layer whose convolution `adds_bias`, in the type that it would have without.

    Args:
      y: the result.
      promote: gives the promoted image first.
      preferred: the layer's `preferred_element_type`.
    """
    dtype = jax.eval_shape(promote)[0].dtype if preferred is None else _canonical(preferred)
    return y.astype(dtype) if is_half(dtype) else y


def _canonical(dtype: DTypeLike | None) -> Any:
    """The type that stock JAX makes of `dtype`: float32 of float64 without 64-bit types."""
    return dtype if dtype in (None, UNROUNDED) else dtypes.canonicalize_dtype(dtype)


def _obstacle(
    lhs: jax.Array,
    rhs: jax.Array,
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    preferred: DTypeLike | None,
    others: dict[str, Any],
) -> str:
    """Why stock JAX has to compute a convolution; empty if it need not."""
    if not 3 <= rhs.ndim <= 5:
        return f"{rhs.ndim - 2} spatial axes, ours are 1 to 3"
    if lhs.dtype.name not in FLOATS:
        return f"dtype {lhs.dtype.name}, ours are {', '.join(FLOATS)}"
    if lhs.dtype != rhs.dtype:
        return f"operands of two dtypes, {lhs.dtype.name} and {rhs.dtype.name}"
    wanted = lhs.dtype if preferred in (None, UNROUNDED) else _canonical(preferred)
    if wanted != lhs.dtype and (wanted.name not in FLOATS or wanted.itemsize <= lhs.dtype.itemsize):
        return f"{lhs.dtype.name} with a result of {wanted.name}"
    if isinstance(padding, str):  # stock JAX raises
        return f"padding={padding!r} of an image with an input_dilation"
    axes = zip(lhs.shape[1:-1], rhs.shape[:-2], padding, lhs_dilation, rhs_dilation, strict=True)
    room = [(n - 1) * e + low + high - (k - 1) * d for n, k, (low, high), e, d in axes]
    if 0 in (*lhs.shape, *rhs.shape) or any(geometry.surely_below(n, 1) for n in room):
        return "an empty array"
    return next((f"{name}={value}" for name, value in others.items() if value is not None), "")


# --- the transposed convolution of a layer ------------------------------------------------------------


class TransposedLayer(Protocol):
    """The attributes of a `ConvTranspose` of either module that say what it computes."""

    @property
    def kernel_size(self) -> Ints: ...
    @property
    def strides(self) -> Ints | None: ...
    @property
    def padding(self) -> Any: ...
    @property
    def kernel_dilation(self) -> Ints | None: ...
    @property
    def mask(self) -> jax.Array | None: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def preferred_element_type(self) -> DTypeLike | None: ...
    @property
    def transpose_kernel(self) -> bool: ...
    @property
    def groups(self) -> int: ...
    @property
    def output_padding(self) -> Ints: ...
    @property
    def padding_convention(self) -> PaddingConvention: ...
    @property
    def implementation(self) -> str | None: ...


def kernel_shape(layer: TransposedLayer, inputs: int, outputs: int) -> tuple[int, ...]:
    """The shape of the kernel of a layer with so many channels."""
    window = _window(layer)
    groups = geometry.integer("groups", layer.groups)
    if groups < 1 or inputs % groups or outputs % groups:
        raise ValueError(
            f"groups must be at least 1 and divide the {inputs} channels of the inputs and the {outputs} "
            f"features, got {groups}"
        )
    if layer.transpose_kernel:
        return (*window, outputs // groups, inputs)
    return (*window, inputs // groups, outputs)


def masked(layer: TransposedLayer, kernel: jax.Array) -> jax.Array:
    """The kernel times the layer's mask."""
    if layer.mask is None:
        return kernel
    if layer.mask.shape != kernel.shape:
        raise ValueError(f"mask must have the shape of the kernel, {kernel.shape}, got {layer.mask.shape}")
    return kernel * layer.mask


def transposed(
    layer: TransposedLayer, inputs: jax.Array, kernel: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """The transposed convolution that the attributes of the layer describe, of promoted arrays."""
    window = _window(layer)
    options: dict[str, Any] = {
        "strides": 1 if layer.strides is None else layer.strides,
        "kernel_dilation": 1 if layer.kernel_dilation is None else layer.kernel_dilation,
    }
    circular = isinstance(layer.padding, str) and layer.padding.upper() == "CIRCULAR"
    image = array("inputs", inputs, FLOATS + COMPLEX)
    options |= {
        "padding": _cut(layer, window, options),
        "output_padding": layer.output_padding,
        "groups": layer.groups,
        "transpose_kernel": layer.transpose_kernel,
        "precision": layer.precision,
        "implementation": layer.implementation,
    }
    preferred = layer.preferred_element_type
    if not circular:
        return jax_mps.conv_transpose(image, kernel, bias, preferred_element_type=preferred, **options)

    def convolve(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
        return jax_mps.conv_transpose(x, kernel, preferred_element_type=dtype, **options)

    # Pixels that fall together are summed before anything is rounded.
    dtype = jax.eval_shape(lambda x, kernel: convolve(x, kernel, preferred), image, kernel).dtype
    y = unrounded(convolve, image, kernel, dtype)
    strides = geometry.per_axis("strides", geometry.freeze("strides", options["strides"]), len(window))
    for axis, stride in enumerate(strides, inputs.ndim - len(window) - 1):
        period = inputs.shape[axis] * stride
        y = _wrap(y, axis, period, odd_pixel_first=not layer.transpose_kernel)
    if bias is not None:
        y = y + jnp.expand_dims(bias.astype(y.dtype), range(y.ndim - 1))
    return y.astype(dtype)


def _window(layer: TransposedLayer) -> tuple[int, ...]:
    return (layer.kernel_size,) if isinstance(layer.kernel_size, int) else tuple(layer.kernel_size)


def _cut(layer: TransposedLayer, window: tuple[int, ...], options: dict[str, Any]) -> Any:
    """The layer's padding as `jax_mps.conv_transpose` takes it."""
    padding = layer.padding
    if layer.padding_convention not in ("flax", "torch"):
        raise ValueError(f"padding_convention must be 'flax' or 'torch', got {layer.padding_convention!r}")
    if isinstance(padding, str):
        if layer.padding_convention == "torch":
            raise ValueError(
                f"padding must be an int, or ints or pairs for the {len(window)} spatial axes, with "
                f"padding_convention='torch', got {padding!r}"
            )
        name = padding.upper()
        if name not in ("SAME", "SAME_LOWER", "VALID", "CIRCULAR"):
            raise ValueError(
                "padding must be 'SAME', 'SAME_LOWER', 'VALID', 'CIRCULAR', an int, ints or pairs, "
                f"got {name!r}"
            )
        if name != "VALID" and layer.output_padding != 0:
            raise ValueError(
                f"output_padding must be 0 with padding={name!r}, which already fixes the output size, "
                f"got {layer.output_padding}"
            )
        if name == "SAME_LOWER":  # Flax has none
            return name
        padding = "VALID" if name == "CIRCULAR" else name
    elif isinstance(padding, Sequence):
        padding = tuple(p if isinstance(p, Sequence) else (p, p) for p in padding)
    if layer.padding_convention == "torch":
        return padding
    return conventions.padding_from_flax(padding, window, **options)


def _wrap(y: jax.Array, axis: int, period: Any, *, odd_pixel_first: bool) -> jax.Array:
    """Adds up what lies whole periods apart, around the middle of the axis.

    `y` grows by zeros on both sides to an odd number of periods, the middle one being the result.
    """
    missing = -(y.shape[axis] - period) % (2 * period)
    less, more = missing // 2, missing - missing // 2
    pads = [(0, 0)] * y.ndim
    pads[axis] = (more, less) if odd_pixel_first else (less, more)
    y = jnp.pad(y, pads)
    return y.reshape(*y.shape[:axis], -1, period, *y.shape[axis + 1 :]).sum(axis)
